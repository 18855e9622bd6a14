"""Which columns of one's own data hold text and labels, and which classes there are."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from conftest import sentences
from datasets import Dataset
from own_data import config_for, encoded_labels, write_jsonl
from transformers import PreTrainedTokenizerFast

from fffconvert.data import read_data, read_validations
from fffconvert.errors import UserError
from fffconvert.recipe import DataSource
from fffconvert.tasks import TASKS


def test_glue_is_a_row_of_the_same_type(glue: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    ours = DataSource(str(glue / "sst2"), text=("sentence",), label="label")
    data = read_data(TASKS["sst2"], tokenizer, None, data_dir=glue, held_out=1)
    own = read_data(ours, tokenizer, config_for("classification"), held_out=1)
    assert own.texts == data.texts
    assert own.rows[:] == data.rows[:]
    assert own.validations["validation"][:] == data.validations["validation"][:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": ("body",)}, "has no column 'body'; it has id, title, label"),
        ({"label": "stars"}, "has no column 'stars'; it has id, title, label"),
        ({"text": ("title", "id", "label")}, "3 text columns; a model reads one or two"),
        ({"text": ("id",)}, "row 0 has id 0; expected text"),
        ({"train": "training"}, "has no split 'training'; it has own.jsonl"),
    ],
)
def test_columns_that_are_not_there(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, changes: dict[str, Any], message: str
) -> None:
    columns = {"id": [0, 1], "title": ["good", "bad"], "label": [0, 1]}
    source = write_jsonl(tmp_path / "own.jsonl", columns)
    with pytest.raises(UserError, match=message):
        read_data(DataSource(source.path, **changes), tokenizer, None)


def test_columns_that_cannot_be_guessed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_jsonl(tmp_path / "own.jsonl", {"first": ["a"], "second": ["b"], "label": [0]})
    with pytest.raises(
        UserError, match=r"which column holds the text\? It has first, second, label; name it with --text-c"
    ):
        read_data(source, tokenizer, None)
    source = write_jsonl(tmp_path / "own.jsonl", {"text": ["a"], "kind": ["b"]})
    with pytest.raises(
        UserError, match=r"which column holds the labels\? It has text, kind; name it with --label-column"
    ):
        read_data(source, tokenizer, None)
    with pytest.raises(UserError, match=r"which column holds the question and which its context\?"):
        read_data(source, tokenizer, config_for("question"))
    with pytest.raises(UserError, match="one text column, 'text'; a question is asked of a context"):
        read_data(replace(source, text=("text",)), tokenizer, config_for("question"))


def test_one_class_is_nothing_to_learn(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_jsonl(tmp_path / "own.jsonl", {"text": ["a", "b"], "label": [1, 1]})
    with pytest.raises(UserError, match="column 'label' has 1 label; expected two or more"):
        read_data(source, tokenizer, None)


def test_a_column_without_any_label_is_none(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for("classification")
    for blank in (-1, None):
        source = write_jsonl(tmp_path / "own.jsonl", {"text": ["good", "bad"], "label": [blank] * 2})
        task, _ = read_validations(source, tokenizer, config)
        assert task.label is None
        assert "so the teacher is the judge" in " ".join(capsys.readouterr().err.split())
        message = (
            "row 0 has no label in column 'label'" if blank is None else "-1 in column 'label' is no label"
        )
        with pytest.raises(UserError, match=message):
            read_validations(replace(source, label="label"), tokenizer, config)


def test_a_usual_name_that_does_not_suit_the_head_hides_no_other(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    answers = {"text": ["b"], "answer_start": [2]}
    columns = {"question": ["a"], "context": ["a b"], "tags": ["x"], "answers": [answers], "category": ["y"]}
    source = write_jsonl(tmp_path / "own.jsonl", columns)
    assert read_validations(source, tokenizer, config_for("question"))[0].label == "answers"
    columns.pop("tags")
    source = write_jsonl(tmp_path / "own.jsonl", columns)
    named = config_for("classification", id2label={0: "x", 1: "y"})
    assert read_validations(source, tokenizer, named)[0].label == "category"


def test_decimal_numbers_are_numbers(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_dict({"text": sentences(2), "score": [Decimal("0.50"), Decimal("1.25")]})
    rows.to_parquet(tmp_path / "own.parquet")
    data = read_data(DataSource(str(tmp_path / "own.parquet")), tokenizer, None)
    assert data.task.kind == "regression"
    assert list(data.rows["labels"]) == [0.5, 1.25]


def test_labels_inside_labels_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_jsonl(tmp_path / "own.jsonl", {"text": ["a", "b"], "labels": [[["x"]], [["y"]]]})
    with pytest.raises(UserError, match=r"\['x'\] is no label; expected a name or a number"):
        read_data(source, tokenizer, None)


def test_numbers_are_said_to_be_taken_for_classes(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for("classification", id2label={0: "bad", 1: "good"})
    encoded_labels(tmp_path, tokenizer, config, [1, 0])
    assert "0 = bad, 1 = good" in " ".join(capsys.readouterr().err.split())
    encoded_labels(tmp_path, tokenizer, None, [1, 2])  # which are names, whatever their numbers
    assert "(classification: 1, 2)" in " ".join(capsys.readouterr().err.split())
    encoded_labels(tmp_path, tokenizer, config, ["good", "bad"])
    assert "bad, good" in " ".join(capsys.readouterr().err.split())
    encoded_labels(tmp_path, tokenizer, None, ["sad,mad", "sad"])  # which is one class
    assert "(classification: sad, 'sad,mad')" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("columns", "kind", "text", "label"),
    [
        ({"text": ["a", "b"], "label": [1, 0]}, "classification", ("text",), "label"),
        ({"Sentence": ["a", "b"], "Label": ["x", "y"]}, "classification", ("Sentence",), "Label"),
        (
            {"premise": ["a", "b"], "hypothesis": ["b", "a"], "label": [1, 0]},
            "classification",
            ("premise", "hypothesis"),
            "label",
        ),
        ({"note": ["a", "b"], "target": [1, 0]}, "classification", ("note",), "target"),
        (
            {"question": ["a"] * 2, "passage": ["b"] * 2, "label": [1, 0]},
            "classification",
            ("question", "passage"),
            "label",
        ),
        (
            {"text": ["a"] * 2, "text_pair": ["b"] * 2, "label": [1, 0]},
            "classification",
            ("text", "text_pair"),
            "label",
        ),
        ({"question": ["a", "b"], "label": [1, 0]}, "classification", ("question",), "label"),
        (
            {"question": ["a", "b"], "answer": ["b", "a"], "label": [1, 0]},
            "classification",
            ("question", "answer"),
            "label",
        ),
        (
            {"text": ["c", "d"], "query": ["a", "b"], "document": ["b", "a"], "label": [1, 0]},
            "classification",
            ("text",),
            "label",
        ),
        ({"text": ["a"], "score": [0.5]}, "regression", ("text",), "score"),
        ({"text": ["a"], "labels": [["x", "y"]]}, "multi-label", ("text",), "labels"),
        (
            {"tokens": [["a", "b"]], "ner_tags": [["O", "X"]], "text": ["a b"]},
            "tokens",
            ("tokens",),
            "ner_tags",
        ),
        ({"words": ["a b"], "tags": ["O X"]}, "tokens", ("words",), "tags"),
        ({"sentence": ["a b"], "labels": [["B-X", "O"]]}, "tokens", ("sentence",), "labels"),
        ({"text": ["a"], "labels": [["B-cell", "T-cell"]]}, "multi-label", ("text",), "labels"),
        (
            {"context": ["a b"], "question": ["a"], "answers": [{"text": ["b"], "answer_start": [2]}]},
            "question",
            ("question", "context"),
            "answers",
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_what_is_guessed(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    columns: dict[str, list[Any]],
    kind: str,
    text: tuple[str, ...],
    label: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write_jsonl(tmp_path / "own.jsonl", columns)
    task = read_data(source, tokenizer, None).task
    assert (task.kind, task.columns, task.label) == (kind, text, label)
    said = " ".join(capsys.readouterr().err.split())
    assert all(repr(column) in said for column in (*text, label))
    assert kind in said


@pytest.mark.parametrize("named", [{}, {"label": "label"}], ids=["guessed", "named"])
def test_labels_are_no_text_where_they_are_not_wanted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, named: dict[str, str]
) -> None:
    """As `convert` and `distill` read what `evaluate` and `run` read."""
    source = write_jsonl(tmp_path / "own.jsonl", {"message": ["a", "b"], "label": ["good", "bad"]})
    data = read_data(replace(source, **named), tokenizer, config_for("classification"), labelled=False)
    assert data.task.columns == ("message",)


def test_a_label_is_no_half_of_a_pair(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    columns = {"question": ["a", "b"], "answer": ["good", "bad"]}
    source = replace(write_jsonl(tmp_path / "own.jsonl", columns), label="answer")
    assert read_data(source, tokenizer, None).task.columns == ("question",)


def test_half_of_a_pair_is_not_taken_for_the_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_jsonl(tmp_path / "own.jsonl", {"question": ["a"], "note": ["b"], "label": [1]})
    with pytest.raises(UserError, match="which column holds the text"):
        read_data(source, tokenizer, None)


def test_a_named_column_of_words_has_tags(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_jsonl(tmp_path / "own.jsonl", {"toks": [["a", "b"]], "gold": [["O", "X"]]})
    named = replace(source, text=("toks",), label="gold")
    assert read_data(named, tokenizer, None).task.kind == "tokens"


def test_columns_named_as_a_model_names_its_own(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    columns = {"text": sentences(3), "length": ["short", "long", "long"], "labels": ["b", "a", "b"]}
    rows = read_data(write_jsonl(tmp_path / "own.jsonl", columns), tokenizer, None).rows
    assert rows["labels"] == [1, 0, 1]
    assert rows["length"] == [len(ids) for ids in rows["input_ids"]]
    columns["labels"] = [[0, 2], [], [1]]
    rows = read_data(write_jsonl(tmp_path / "own.jsonl", columns), tokenizer, None).rows
    assert rows["labels"] == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]


@pytest.mark.parametrize("other", ["Good", "good "])
def test_labels_that_differ_in_case_or_spaces_alone_are_refused(
    other: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match=rf"differ in case or spaces alone: .*'{other}'"):
        encoded_labels(tmp_path, tokenizer, None, [other, "bad", "good"])


def test_labels_are_not_looked_at_where_they_are_not_wanted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = write_jsonl(tmp_path / "own.jsonl", {"text": sentences(3), "label": ["x", "y", "z"]})
    data = read_data(source, tokenizer, config_for("classification"), labelled=False)
    assert "labels" not in data.rows.column_names
    assert not data.task.is_labelled
