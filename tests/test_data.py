"""Which rows are trained on, which are held out, and how they are cut."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sentences, tiny_config
from datasets import Dataset, DatasetDict
from own_data import config_for, reviews, write_jsonl
from transformers import BertForMaskedLM, BertForSequenceClassification, PreTrainedTokenizerFast

from fffconvert import sources
from fffconvert.data import read_data, read_texts, read_validations
from fffconvert.errors import UserError
from fffconvert.recipe import DataSource
from fffconvert.sources import splits_to_judge


def test_train_rows_are_drawn_where_there_is_a_split_to_evaluate_on_too(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = {"text": [f"good {i}" for i in range(40)], "label": [0, 1] * 20}
    for split in ("train", "validation"):
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    source = DataSource(str(tmp_path))
    texts = [read_data(source, tokenizer, None, train_rows=4, seed=seed).texts for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert rows["text"][:4] not in texts


def test_rows_are_held_out_where_there_is_no_split_for_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = write_jsonl(
        tmp_path / "own.jsonl", {"text": [f"good {i}" for i in range(10)], "label": [0, 1] * 5}
    )
    data = read_data(source, tokenizer, None, held_out=3, train_rows=4)
    assert len(data.texts) == len(data.rows) == 4
    assert len(data.validations["held_out"]) == 3
    again = read_data(source, tokenizer, None, held_out=3, train_rows=4)
    assert again.texts == data.texts
    assert read_data(source, tokenizer, None, held_out=3, train_rows=4, seed=1).texts != data.texts
    everything = read_data(source, tokenizer, None, held_out=3)
    assert len(everything.texts) == 7
    with pytest.raises(UserError, match="has 10 rows; expected more than the 10 to hold out"):
        read_data(source, tokenizer, None, held_out=10)


def test_a_single_file_is_evaluated_whole(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_jsonl(tmp_path / "own.jsonl", {"text": sentences(9), "label": [0, 1, 0] * 3})
    task, validations = read_validations(source, tokenizer, config_for("classification"))
    assert task.validations == ("own.jsonl",)
    assert len(validations["own.jsonl"]) == 9


def test_text_files_and_own_text_are_the_same(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = tmp_path / "own.txt"
    file.write_text("the film\n\n  a book  \nsaw it\n", encoding="utf-8")
    config = config_for("embedding")
    data = read_data(file, tokenizer, config)
    assert sorted(data.texts) == ["a book", "saw it", "the film"]
    assert data.task.name == "text"
    assert list(read_texts(file, config)) == list(read_texts(DataSource(str(file)), config))


def test_several_splits_and_none_to_train_on(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for split in ("validation", "test"):
        Dataset.from_dict(reviews(5)).to_csv(tmp_path / f"{split}.csv")
    source = DataSource(str(tmp_path))
    with pytest.raises(UserError, match="has the splits validation, test; say which with --split"):
        read_data(source, tokenizer, None)
    assert list(splits_to_judge(source, None)) == ["validation"]  # which nothing is trained for
    assert list(splits_to_judge(replace(source, train="validation"), None)) == ["test"]


def test_what_was_trained_on_is_not_judged_without_a_word(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    both = DatasetDict({name: Dataset.from_dict(reviews(5)) for name in ("train", "dev")})
    both.save_to_disk(str(tmp_path / "saved"))
    source = DataSource(str(tmp_path / "saved"))
    with pytest.raises(UserError, match="has the splits train, dev; say which with --split"):
        read_validations(source, tokenizer, None)
    assert list(read_validations(replace(source, train="dev", validation="dev"), tokenizer, None)[1]) == [
        "dev"
    ]
    with pytest.raises(UserError, match=r"data\.validation is 'dev', the rows to train on; expected others"):
        read_data(replace(source, train="dev", validation="dev"), tokenizer, None, held_out=1)


def test_own_data_is_read_once(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    Dataset.from_dict(reviews(5)).to_csv(tmp_path / "own.csv")
    reads: list[DataSource] = []
    load = sources.load_source
    monkeypatch.setattr(sources, "load_source", lambda source: reads.append(source) or load(source))
    read_data(DataSource(str(tmp_path / "own.csv")), tokenizer, None, held_out=1)
    read_validations(DataSource(str(tmp_path / "own.csv")), tokenizer, None)
    assert len(reads) == 2


def test_a_row_without_text_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = tmp_path / "own.csv"
    file.write_text("text,label\ngood,1\n,0\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"own.csv: row 1 has text None; expected text"):
        read_data(DataSource(str(file)), tokenizer, None)


def test_a_split_without_labels_is_not_judged(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_dict(reviews(6))
    splits = DatasetDict(train=rows, validation=rows.remove_columns("sentiment"))
    splits.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match="split 'validation' has no column 'sentiment'; it has id, review"):
        read_data(DataSource(str(tmp_path / "saved")), tokenizer, None, held_out=2)


def test_a_row_without_text_is_named_as_the_file_counts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = [None if number == 7 else f"good {number}" for number in range(50)]
    source = write_jsonl(tmp_path / "own.jsonl", {"text": texts, "label": [0, 1] * 25})
    with pytest.raises(UserError, match="row 7 has text None"):
        read_data(source, tokenizer, None, held_out=10, train_rows=20)


def test_a_model_in_memory_is_asked_for_what_it_is(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Its configuration still names the class of what it was made from."""
    source = write_jsonl(tmp_path / "own.jsonl", {"text": sentences(4), "label": [0, 1, 0, 1]})
    BertForMaskedLM(tiny_config()).save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2)
    assert model.config.architectures == ["BertForMaskedLM"]
    assert read_data(replace(source, text="text"), tokenizer, model).task.kind == "classification"
    assert read_validations(source, tokenizer, model)[0].kind == "classification"
    assert model.config.architectures == ["BertForMaskedLM"], "left as it was"
    for wrapped in (torch.compile(model), type("Mine", (BertForSequenceClassification,), {})(model.config)):
        assert read_validations(source, tokenizer, wrapped)[0].kind == "classification"
    with pytest.raises(UserError, match="names no architecture, so the model's head is not known"):
        read_data(source, tokenizer, tiny_config())


def test_a_length_that_holds_no_word_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_jsonl(tmp_path / "own.jsonl", reviews())
    with pytest.raises(UserError, match="max_length is 3; expected at least 4, as the tokenizer adds 3"):
        read_data(source, tokenizer, None, max_length=3, held_out=0)


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_jsonl(tmp_path / "own.jsonl", reviews())
    tokenizer = deepcopy(tokenizer)  # others use it too
    tokenizer.pad_token = None
    with pytest.raises(UserError, match="the tokenizer has no padding token; expected one"):
        read_data(source, tokenizer, None, held_out=0)


@pytest.mark.parametrize(
    ("source", "numbers", "message"),
    [
        ("own.csv", {}, "source is 'own.csv'; expected a Task, a Path or a DataSource"),
        (DataSource("own.csv"), {"held_out": -1}, "held_out is -1; expected a whole number of at least 0"),
        (DataSource("own.csv"), {"held_out": 0.1}, "held_out is 0.1; expected a whole number of at least 0"),
        (DataSource("own.csv"), {"train_rows": 0}, "train_rows is 0; expected a whole number of at least 1"),
        (DataSource("own.csv"), {"seed": -1}, "seed is -1; expected a whole number from 0 to 2147483647"),
        (DataSource("own.csv", subset="mine"), {}, "subset is 'mine', and own.csv is a file"),
    ],
)
def test_what_cannot_be_asked_for(
    source: Any, numbers: dict[str, float], message: str, tmp_path: Path, tokenizer, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.csv").write_text("text,label\ngood,1\nbad,0\n", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_data(source, tokenizer, None, **numbers)
