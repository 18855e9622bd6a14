"""A scikit-learn pipeline on a converted encoder: embeddings, then logistic regression.

python examples/classify_with_embeddings.py models/demo
"""

import sys

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from transformers import pipeline

import fffconvert  # noqa: F401 - makes transformers know converted models

ABOUT_FILES = ["Open a file and return a stream.", "Delete the directory.", "Copy a file to a folder."]
ABOUT_NETWORKS = ["Connect to a server over a socket.", "Send an HTTP request.", "Listen on a port."]


def main(folder: str) -> None:
    extract = pipeline("feature-extraction", folder)

    def embed(texts: list[str]) -> np.ndarray:
        return np.stack([np.mean(states[0], axis=0) for states in extract(texts)])  # (n_texts, d_model)

    classifier = make_pipeline(FunctionTransformer(embed), LogisticRegression())
    classifier.fit(ABOUT_FILES + ABOUT_NETWORKS, ["files"] * 3 + ["networks"] * 3)
    for text in ("Rename a file.", "Close the connection to the host."):
        print(f"{text}  {classifier.predict([text])[0]}")


if __name__ == "__main__":
    main(sys.argv[1])
