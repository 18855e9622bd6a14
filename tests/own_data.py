"""Tables of one's own, for the tests that read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import sentences, tiny_config

from fffconvert.data import read_data
from fffconvert.recipe import DataSource

HEADS = {
    "classification": "BertForSequenceClassification",
    "tokens": "BertForTokenClassification",
    "question": "BertForQuestionAnswering",
    "masked": "BertForMaskedLM",
    "embedding": "BertModel",
}


def config_for(kind: str, **changes: Any) -> Any:
    return tiny_config(architectures=[HEADS[kind]], **changes)


def write_jsonl(file: Path, columns: dict[str, list[Any]]) -> DataSource:
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataSource(str(file))


def reviews(n: int = 12, seed: int = 0) -> dict[str, list[Any]]:
    texts = sentences(n, seed)
    return {
        "id": list(range(n)),
        "review": texts,
        "sentiment": ["good" if "good" in t else "poor" for t in texts],
    }


def encoded_labels(tmp_path: Path, tokenizer: Any, config: Any, labels: list[Any]) -> list[Any]:
    source = write_jsonl(tmp_path / "own.jsonl", {"text": sentences(len(labels)), "label": labels})
    return list(read_data(source, tokenizer, config).rows["labels"])
