"""Loads a converted encoder with stock transformers, embeds sentences and searches among them.

python examples/embed_and_search.py models/demo "how do I open a file?"
"""

import sys

import torch
from transformers import AutoModel, AutoTokenizer

import fffconvert  # noqa: F401 - makes transformers know converted models

SENTENCES = [
    "Open a file and return a stream.",
    "Sort a list in place.",
    "Connect to a server over a socket.",
    "Parse a date from a string.",
]


def main(folder: str, query: str = "How do I read from a file?") -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    inputs = tokenizer([query, *SENTENCES], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state  # (n_texts, n_tokens, d_model)
    real = inputs["attention_mask"][..., None]  # (n_texts, n_tokens, 1)
    embeddings = torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)
    similarity = embeddings[1:] @ embeddings[0]  # (n_sentences,)
    print(f"{type(model).__name__}: {query}")
    for number in similarity.argsort(descending=True).tolist():
        print(f"  {similarity[number]:.2f}  {SENTENCES[number]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
