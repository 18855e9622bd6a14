"""Classifies sentences with a converted classifier and stock transformers.

python examples/classify.py models/sst2 "A film to remember."
"""

import sys

from transformers import pipeline

import fffconvert  # noqa: F401 - makes transformers know converted models


def main(folder: str, *texts: str) -> None:
    classify = pipeline("text-classification", folder)
    for text, found in zip(texts, classify(list(texts)), strict=True):
        print(f"{found['score']:.2f}  {found['label']}  {text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
