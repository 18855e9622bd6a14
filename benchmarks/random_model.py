"""Writes a dense model of BERT-base's size and its conversion, with random weights: time does not depend on them.

    python -m benchmarks.random_model FOLDER [KEY=VALUE ...]

FOLDER then holds `dense` and `converted`. A KEY is one of BertConfig's, such as `num_hidden_layers=6`, or `depth` or
`leaf_width` of the tree.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from fffconvert.checkpoint import Loaded, save
from fffconvert.families import FAMILIES
from fffconvert.modeling import config_class, config_with, model_class
from fffconvert.tree import DEFAULT_TREE


def main(folder: str, *changes: str) -> None:
    """Writes both models, with a tokenizer of one word, which nothing that is timed uses."""
    torch.manual_seed(0)
    sizes = {key: int(value) for key, value in (change.split("=") for change in changes)}
    tree = replace(DEFAULT_TREE, **{key: sizes.pop(key) for key in ("depth", "leaf_width") if key in sizes})
    dense = BertModel(BertConfig(**sizes))
    family = FAMILIES["bert"]
    shape = family.shape_for(dense.config, tree)
    config = config_with(dense.config, config_class(family), fff=shape.to_dict())
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "word": 2}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, model in {"dense": dense, "converted": model_class(BertModel)(config)}.items():
        save(Loaded(folder, model, tokenizer), Path(folder) / name)  # a name that needs no Hub


if __name__ == "__main__":
    main(*sys.argv[1:])
