"""One's own data: which columns, which labels, which rows; and one line for what cannot be read."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import SPECIAL, WORDS, sentences, tiny_config
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import PreTrainedTokenizerFast

import fffconvert.data
from fffconvert import encoding
from fffconvert.data import (
    asked_for,
    load_source,
    read_data,
    read_lines,
    read_texts,
    read_validations,
    validation_splits,
)
from fffconvert.encoding import IGNORED
from fffconvert.errors import UserError
from fffconvert.recipe import DataSource
from fffconvert.tasks import TASKS, Task

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


# ---- Where rows come from


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_files_of_every_kind(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, ending: str) -> None:
    file, columns = tmp_path / f"own-reviews.{ending}", reviews()
    rows = Dataset.from_dict(columns)
    if ending == "parquet":
        rows.to_parquet(file)
    elif ending.startswith("json"):
        rows.to_json(file, lines=ending == "jsonl")
    else:
        rows.to_csv(file, sep="\t" if ending == "tsv" else ",")
    data = read_data(DataSource(str(file)), tokenizer, None)
    assert data.task.columns == ("review",)
    assert data.task.labels == ("good", "poor")
    assert data.texts == columns["review"]
    assert data.rows["labels"] == [int(label == "poor") for label in columns["sentiment"]]
    assert data.validations == {}


def test_a_folder_has_a_split_for_each_file(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for split, n in (("train", 12), ("validation", 5), ("test", 7)):
        Dataset.from_dict(reviews(n)).to_csv(tmp_path / f"{split}.csv")
    source = DataSource(str(tmp_path))
    data = read_data(source, tokenizer, None, held_out=1)
    assert len(data.rows) == 12
    assert {name: len(rows) for name, rows in data.validations.items()} == {"validation": 5}
    assert data.task.validations == ("validation",)
    named = DataSource(str(tmp_path), validation="test", train="validation")
    data = read_data(named, tokenizer, None, held_out=1)
    assert len(data.rows) == 5
    assert {name: len(rows) for name, rows in data.validations.items()} == {"test": 7}


def test_a_saved_dataset(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    saved = DatasetDict(train=Dataset.from_dict(reviews()), test=Dataset.from_dict(reviews(5)))
    saved.save_to_disk(tmp_path / "saved")
    data = read_data(DataSource(str(tmp_path / "saved")), tokenizer, None, held_out=1)
    assert {name: len(rows) for name, rows in data.validations.items()} == {"test": 5}


def test_a_dataset_of_the_hub(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(*args: Any) -> DatasetDict:
        asked.append(args)
        rows = Dataset.from_dict({"text": sentences(6), "label": [0, 1, 1, 0, 1, 0]})
        return DatasetDict(
            train=rows.cast_column("label", ClassLabel(names=["neg", "pos"])), unsupervised=rows
        )

    monkeypatch.setattr(fffconvert.data, "load_dataset", load_dataset)
    source = DataSource("user/reviews", subset="english")
    data = read_data(source, tokenizer, None)
    assert asked == [("user/reviews", "english")]
    assert data.task.name == "user/reviews"
    assert data.task.labels == ("neg", "pos")
    assert data.rows["labels"] == [0, 1, 1, 0, 1, 0]


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


def test_glue_is_a_row_of_the_same_type(glue: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    ours = DataSource(str(glue / "sst2"), text=("sentence",), label="label")
    data = read_data(TASKS["sst2"], tokenizer, None, data_dir=glue, held_out=1)
    own = read_data(ours, tokenizer, config_for("classification"), held_out=1)
    assert own.texts == data.texts
    assert own.rows[:] == data.rows[:]
    assert own.validations["validation"][:] == data.validations["validation"][:]


def test_text_files_and_own_text_are_the_same(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = tmp_path / "own.txt"
    file.write_text("the film\n\n  a book  \nsaw it\n", encoding="utf-8")
    config = config_for("embedding")
    data = read_data(file, tokenizer, config)
    assert sorted(data.texts) == ["a book", "saw it", "the film"]
    assert data.task.name == "text"
    assert list(read_texts(file, config)) == list(read_texts(DataSource(str(file)), config))


# ---- What cannot be read


def test_no_hub_is_one_line(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        UserError, match=r"user/reviews could not be read .* from the Hub; .*name a file"
    ) as error:
        read_data(DataSource("user/reviews"), tokenizer, None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing.csv", "nothing.csv does not exist; expected a folder, a file that ends with .csv"),
        ("./nothing", "nothing does not exist"),
        ("picture.png", "picture.png cannot be read; expected a folder, a file that ends with"),
        ("broken.parquet", "broken.parquet could not be read"),
        ("broken.jsonl", r"broken.jsonl could not be read .*; expected one object for each row"),
        ("empty.csv", r"empty.csv could not be read \(it is empty\); expected a line with the names of"),
        ("empty.jsonl", r"empty.jsonl could not be read \(it is empty\); expected one object for each"),
        ("semicolons.csv", "semicolons.csv has semicolons between its columns; expected commas, or tabs"),
        ("bars.csv", "bars.csv has bars between its columns; expected commas, or tabs"),
        ("empty", "empty could not be read"),
    ],
)
def test_data_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("picture.png", "broken.parquet", "broken.jsonl"):
        Path(name).write_text("{ no", encoding="utf-8")
    for name in ("empty.csv", "empty.jsonl"):
        Path(name).touch()
    Path("semicolons.csv").write_text("text;label\ngood, really;1\n", encoding="utf-8")
    Path("bars.csv").write_text("text|label\ngood, really|1\n", encoding="utf-8")
    Path("empty").mkdir()
    with pytest.raises(UserError, match=message) as error:
        load_source(DataSource(path))
    assert "\n" not in str(error.value)


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


def test_several_splits_and_none_to_train_on(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for split in ("validation", "test"):
        Dataset.from_dict(reviews(5)).to_csv(tmp_path / f"{split}.csv")
    source = DataSource(str(tmp_path))
    with pytest.raises(UserError, match="has the splits validation, test; say which with --split"):
        read_data(source, tokenizer, None)
    assert list(validation_splits(source, None)) == ["validation"]  # which nothing is trained for
    assert list(validation_splits(replace(source, train="validation"), None)) == ["test"]


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


def test_a_row_without_text_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = tmp_path / "own.csv"
    file.write_text("text,label\ngood,1\n,0\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"own.csv: row 1 has text None; expected text"):
        read_data(DataSource(str(file)), tokenizer, None)


def test_only_an_empty_cell_of_a_csv_file_has_nothing_in_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    file = tmp_path / "own.csv"
    file.write_text("text,label\nN/A,None\nnull,hate\n", encoding="utf-8")
    data = read_data(DataSource(str(file)), tokenizer, None)
    assert data.task.labels == ("None", "hate")
    assert data.texts == ["N/A", "null"]


def test_a_column_without_any_label_is_none(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for("classification")
    for blank in (-1, None):
        source = write_jsonl(tmp_path / "own.jsonl", {"text": ["good", "bad"], "label": [blank] * 2})
        task, _ = read_validations(source, tokenizer, config)
        assert task.label is None
        assert "so the teacher is the judge" in " ".join(capsys.readouterr().err.split())
        with pytest.raises(UserError, match=f"{blank} in column 'label' is no label"):
            read_validations(replace(source, label="label"), tokenizer, config)


def test_a_split_without_labels_is_not_judged(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_dict(reviews(6))
    splits = DatasetDict(train=rows, validation=rows.remove_columns("sentiment"))
    splits.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match="split 'validation' has no column 'sentiment'; it has id, review"):
        read_data(DataSource(str(tmp_path / "saved")), tokenizer, None, held_out=2)


def test_numbers_are_said_to_be_taken_for_classes(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for("classification", id2label={0: "bad", 1: "good"})
    encoded_labels(tmp_path, tokenizer, config, [1, 0])
    assert "0 = bad, 1 = good" in " ".join(capsys.readouterr().err.split())
    encoded_labels(tmp_path, tokenizer, config, ["good", "bad"])
    assert "bad, good" in " ".join(capsys.readouterr().err.split())


def test_a_table_is_no_text_file() -> None:
    with pytest.raises(UserError, match=r"reviews.csv is no text file but a table; give it as --data"):
        asked_for(None, "reviews.csv", None)


def test_a_text_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("good\n", encoding="utf-8-sig")
    assert list(read_lines(tmp_path / "own.txt")) == ["good"]


def test_only_one_of_task_text_and_data() -> None:
    assert asked_for("sst2", None, None) is TASKS["sst2"]
    assert asked_for(None, "a.txt", None) == Path("a.txt")
    assert asked_for(None, None, DataSource("a.csv")) == DataSource("a.csv")
    with pytest.raises(UserError, match="nothing to read is named; expected either a task, a text file, or"):
        asked_for(None, None, None)
    with pytest.raises(UserError, match="task and data are named; expected either a task, a text file, or"):
        asked_for("sst2", None, DataSource("a.csv"))


# ---- Columns and labels


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
        ({"text": ["a"], "score": [0.5]}, "regression", ("text",), "score"),
        ({"text": ["a"], "labels": [["x", "y"]]}, "multi-label", ("text",), "labels"),
        (
            {"tokens": [["a", "b"]], "ner_tags": [["O", "X"]], "text": ["a b"]},
            "tokens",
            ("tokens",),
            "ner_tags",
        ),
        ({"words": ["a b"], "tags": ["O X"]}, "tokens", ("words",), "tags"),
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


def test_a_named_column_of_words_has_tags(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_jsonl(tmp_path / "own.jsonl", {"toks": [["a", "b"]], "gold": [["O", "X"]]})
    named = replace(source, text=("toks",), label="gold")
    assert read_data(named, tokenizer, None).task.kind == "tokens"


def encoded_labels(tmp_path: Path, tokenizer: Any, config: Any, labels: list[Any]) -> list[Any]:
    source = write_jsonl(tmp_path / "own.jsonl", {"text": sentences(len(labels)), "label": labels})
    return list(read_data(source, tokenizer, config).rows["labels"])


def test_labels_of_a_model_that_is_there(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Names count, in the model's order and whatever their case; numbers are the model's own."""
    config = config_for("classification", id2label={0: "Positive", 1: "NEGATIVE", 2: "mixed"})
    assert encoded_labels(tmp_path, tokenizer, config, ["negative", "positive", "MIXED"]) == [1, 0, 2]
    assert encoded_labels(tmp_path, tokenizer, config, [2, 0, 1]) == [2, 0, 1]
    assert encoded_labels(tmp_path, tokenizer, config, ["2", "0", "1"]) == [2, 0, 1]
    assert encoded_labels(tmp_path, tokenizer, config, [2.0, 0.0, 1.0]) == [2, 0, 1]
    assert encoded_labels(tmp_path, tokenizer, config, [True, False]) == [1, 0]
    for wrong in (["dreadful"], [3], [-1, 0], [None, 0], [0.5], ["3"]):
        with pytest.raises(UserError, match=r"in column 'label' is no label; expected one of Positive, NEG"):
            encoded_labels(tmp_path, tokenizer, config, wrong)


def test_columns_named_as_a_model_names_its_own(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    columns = {"text": sentences(3), "length": ["short", "long", "long"], "labels": ["b", "a", "b"]}
    rows = read_data(write_jsonl(tmp_path / "own.jsonl", columns), tokenizer, None).rows
    assert rows["labels"] == [1, 0, 1]
    assert rows["length"] == [len(ids) for ids in rows["input_ids"]]
    columns["labels"] = [[0, 2], [], [1]]
    rows = read_data(write_jsonl(tmp_path / "own.jsonl", columns), tokenizer, None).rows
    assert rows["labels"] == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]


def test_numbers_that_are_names(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    stars = config_for("classification", id2label={i: str(i + 1) for i in range(5)})
    assert encoded_labels(tmp_path, tokenizer, stars, [1, 5, 3]) == [0, 4, 2]
    assert encoded_labels(tmp_path, tokenizer, stars, [1.0, 5.0, 3.0]) == [0, 4, 2]
    assert encoded_labels(tmp_path, tokenizer, None, [30, 4, 30]) == [1, 0, 1]  # a new head: 4, then 30


def test_named_classes_are_matched_by_name(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    rows = Dataset.from_dict({"text": sentences(3), "label": [0, 1, 1]}, features=features)
    DatasetDict(train=rows).save_to_disk(tmp_path / "saved")
    source = DataSource(str(tmp_path / "saved"))
    turned = config_for("classification", id2label={0: "POS", 1: "NEG"})
    assert list(read_data(source, tokenizer, turned).rows["labels"]) == [1, 0, 0]
    assert "by number" not in capsys.readouterr().err
    strange = config_for("classification", id2label={0: "bad", 1: "good"})
    assert list(read_data(source, tokenizer, strange).rows["labels"]) == [0, 1, 1]
    said = " ".join(capsys.readouterr().err.split())
    assert "The data's labels neg, pos are taken by number for the model's bad, good" in said


def test_names_and_numbers_are_not_mixed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Stars from 0 for a model whose classes are called 1 to 5 would merge two of them."""
    stars = config_for("classification", id2label={i: str(i + 1) for i in range(5)})
    with pytest.raises(UserError, match=r"0 in column 'label' is no label; expected one of 1, 2, 3, 4, 5$"):
        encoded_labels(tmp_path, tokenizer, stars, [0, 1, 4])
    features = Features({"text": Value("string"), "label": ClassLabel(names=["same", "other"])})
    rows = Dataset.from_dict({"text": sentences(2), "label": [0, 1]}, features=features)
    DatasetDict(train=rows).save_to_disk(tmp_path / "saved")
    three = config_for("classification", id2label={0: "same", 1: "neutral", 2: "opposite"})
    with pytest.raises(UserError, match=r"'other' in column 'label' is no label; expected one of same"):
        read_data(DataSource(str(tmp_path / "saved")), tokenizer, three)


def test_a_missing_label_is_not_the_class_none(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = config_for("classification", id2label={0: "none", 1: "hate"})
    with pytest.raises(UserError, match="None in column 'label' is no label; expected one of none, hate"):
        encoded_labels(tmp_path, tokenizer, config, ["hate", None])


def test_labels_that_differ_in_their_case_alone_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match=r"differ in their case alone: Good, good; expected one spelling"):
        encoded_labels(tmp_path, tokenizer, None, ["Good", "bad", "good"])


def test_regression(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = config_for("classification", num_labels=1)
    assert encoded_labels(tmp_path, tokenizer, config, [1, 2]) == [1.0, 2.0]
    with pytest.raises(UserError, match="'x' in column 'label' is no number; the model's head gives one"):
        encoded_labels(tmp_path, tokenizer, config, ["x"])


def test_several_labels(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_jsonl(tmp_path / "own.jsonl", {"text": sentences(3), "labels": [["b", "a"], [], ["c"]]})
    data = read_data(source, tokenizer, None)
    assert data.task.labels == ("a", "b", "c")
    assert list(data.rows["labels"]) == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    config = config_for(
        "classification", id2label={0: "c", 1: "b"}, problem_type="multi_label_classification"
    )
    file = tmp_path / "own.csv"
    file.write_text('text,labels\ngood,"b, c"\nbad,c\n', encoding="utf-8")
    assert list(read_data(DataSource(str(file)), tokenizer, config).rows["labels"]) == [[1, 1], [1, 0]]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([[0, 1, 1], [0, 0, 1]], [[0, 1, 1], [0, 0, 1]]),
        ([[0.0, 1.0], [1.0, 0.0]], [[0, 1], [1, 0]]),
        ([[False, True], [True, False]], [[0, 1], [1, 0]]),
        ([[0, 1], [1, 0]], [[0, 1], [1, 0]]),  # who lists both labels, each time, does it in one order
        ([[0, 1], [0, 1]], [[1, 1], [1, 1]]),
    ],
)
def test_a_zero_or_one_for_every_label(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, labels: Any, expected: list[list[float]]
) -> None:
    source = write_jsonl(tmp_path / "own.jsonl", {"text": sentences(2), "labels": labels})
    data = read_data(source, tokenizer, None)
    assert data.task.labels == tuple(str(number) for number in range(len(expected[0])))
    assert list(data.rows["labels"]) == expected
    names = config_for(
        "classification",
        id2label=dict(enumerate("abc"[: len(expected[0])])),
        problem_type="multi_label_classification",
    )
    assert list(read_data(source, tokenizer, names).rows["labels"]) == expected


def test_a_label_named_twice_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = config_for(
        "classification", id2label=dict(enumerate("abcd")), problem_type="multi_label_classification"
    )
    for labels in ([["a", "a"], ["b"]], [[0, 1, 1], [0, 0, 1]]):  # the second is of three labels
        source = write_jsonl(tmp_path / "own.jsonl", {"text": sentences(2), "labels": labels})
        with pytest.raises(
            UserError, match=r"names a label twice; expected the names or numbers of a row's labels"
        ):
            read_data(source, tokenizer, config)


def test_labels_are_not_looked_at_where_they_are_not_wanted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = write_jsonl(tmp_path / "own.jsonl", {"text": sentences(3), "label": ["x", "y", "z"]})
    data = read_data(source, tokenizer, config_for("classification"), labelled=False)
    assert "labels" not in data.rows.column_names
    assert not data.task.is_labelled


def test_an_encoder_reads_text_alone(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_jsonl(tmp_path / "own.jsonl", reviews())
    task, validations = read_validations(source, tokenizer, config_for("embedding"))
    assert (task.kind, task.label) == ("embedding", None)
    assert "labels" not in validations["own.jsonl"].column_names
    with pytest.raises(UserError, match=r"needs no labels \(embedding\); leave out --label-column id"):
        read_validations(replace(source, label="id"), tokenizer, config_for("embedding"))


def test_an_encoder_reads_each_text_of_a_pair_by_itself(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    pairs = {"sentence1": sentences(4), "sentence2": sentences(4, seed=1)}
    source, alone = write_jsonl(tmp_path / "own.jsonl", pairs), [*pairs["sentence1"], *pairs["sentence2"]]
    data = read_data(source, tokenizer, config_for("embedding"))
    assert data.texts == list(read_texts(source, config_for("embedding"))) == alone
    assert list(data.rows["input_ids"]) == tokenizer(alone)["input_ids"]
    assert read_texts(source, config_for("classification"))[0] == (alone[0], alone[4])


# ---- Tokens


def test_tags_stand_at_the_first_token_of_a_word(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """This tokenizer splits `film-book` in three; `New York` is one word of two."""
    words = [["the", "film-book", "good"], ["saw", "New York"]]
    source = write_jsonl(
        tmp_path / "own.jsonl", {"tokens": words, "ner_tags": [["O", "B-X", "I-X"], ["O", "B-X"]]}
    )
    data = read_data(source, tokenizer, None)
    assert data.task.labels == ("B-X", "I-X", "O")
    assert data.task.metrics[0] == "entity_f1"
    b, i, o, no = 0, 1, 2, IGNORED
    assert list(data.rows["labels"]) == [[no, o, b, no, no, i, no], [no, o, b, no, no]]
    assert data.texts == ["the film-book good", "saw New York"]

    config = config_for("tokens", id2label={0: "O", 1: "B-X", 2: "I-X"})
    assert read_data(source, tokenizer, config).rows["labels"][0] == [no, 0, 1, no, no, 2, no]
    unlabelled = read_data(source, tokenizer, config, labelled=False).rows["labels"]
    assert unlabelled[0] == [no, 0, 0, no, no, 0, no]

    short = read_data(source, tokenizer, None, max_length=4).rows["labels"]
    assert short[0] == [no, o, b, no]


def test_a_space_that_is_a_token_is_the_next_words() -> None:
    task = Task("own", ("words",), ("O", "B-X"), kind="tokens", label="tags")
    offsets = [[(0, 0), (0, 1), (1, 2), (2, 4), (4, 7), (0, 0)]]  # ["a", " ", "bc", " de"]
    tags = encoding._tags(task, offsets, [["a", "bc", "de"]], [[0, 1, 0]], int)
    assert tags == [[IGNORED, 0, 1, IGNORED, 0, IGNORED]]


def test_words_and_tags_of_a_csv_file(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = tmp_path / "own.csv"
    file.write_text("words,tags\nthe  film good,DET NOUN ADJ\nsaw it,VERB\n", encoding="utf-8")
    with pytest.raises(UserError, match="a row has 2 words and 1 tags in 'tags'; expected one tag for each"):
        read_data(DataSource(str(file)), tokenizer, None)
    file.write_text("words,tags\nthe  film good,DET NOUN ADJ\n", encoding="utf-8")
    data = read_data(DataSource(str(file)), tokenizer, None)
    assert data.task.labels == ("ADJ", "DET", "NOUN")
    assert data.task.metrics == ("accuracy", "macro_f1")
    assert list(data.rows["labels"]) == [[IGNORED, 1, 2, 0, IGNORED]]


def test_answers_are_found_in_the_context(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    context = "the film was very good"  # tokens: [CLS] saw [SEP] the film was very good [SEP]
    columns = {
        "question": ["saw"] * 3,
        "context": [context] * 3,
        "answers": [
            {"text": ["very good", "good"], "answer_start": [13, 18]},
            {"text": [], "answer_start": []},
            {"text": ["the"], "answer_start": [0]},
        ],
    }
    source = write_jsonl(tmp_path / "own.jsonl", columns)
    rows = read_data(source, tokenizer, None).rows
    assert list(rows["start_positions"]) == [6, 0, 3]
    assert list(rows["end_positions"]) == [7, 0, 3]
    short = read_data(source, tokenizer, None, max_length=8).rows  # `good` is cut off
    assert list(short["start_positions"]) == [0, 0, 3]


@pytest.mark.parametrize(
    "answer",
    [
        None,
        {"text": "good", "answer_start": 18},
        {"text": ["good"]},
        {"text": ["good"], "answer_start": [17]},
        [{"text": "good", "answer_start": 18}],
        "good",
    ],
    ids=str,
)
def test_answers_that_are_none_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, answer: Any
) -> None:
    answers = [{"text": ["good"], "answer_start": [18]}, answer]
    columns = {"question": ["saw"] * 2, "context": ["the film was very good"] * 2, "answers": answers}
    source = write_jsonl(tmp_path / "own.jsonl", columns)
    with pytest.raises(UserError, match="in column 'answers' is no answer; expected the lists `text` and"):
        read_data(replace(source, label="answers"), tokenizer, config_for("question"))


def test_answers_that_are_cut_off_are_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [{"text": ["good"], "answer_start": [18]}, {"text": [], "answer_start": []}]
    columns = {"question": ["saw"] * 2, "context": ["the film was very good"] * 2, "answers": answers}
    source = write_jsonl(tmp_path / "own.jsonl", columns)
    read_data(source, tokenizer, None)
    assert "answers end past" not in capsys.readouterr().err
    read_data(source, tokenizer, None, max_length=7)
    assert "1 of 1 answers end past token 7 and count as no answer" in " ".join(
        capsys.readouterr().err.split()
    )


def test_masks(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = tmp_path / "own.txt"
    file.write_text("\n".join(sentences(50)), encoding="utf-8")
    config = config_for("masked")
    rows = read_data(file, tokenizer, config).rows
    plain = read_data(file, tokenizer, config_for("embedding")).rows
    for masked, labels, ids in zip(rows["input_ids"], rows["labels"], plain["input_ids"], strict=True):
        hidden = [place for place, label in enumerate(labels) if label != IGNORED]
        assert len(hidden) == max(1, round(0.15 * (len(ids) - 2)))
        for place, token in enumerate(ids):
            assert masked[place] == (tokenizer.mask_token_id if place in hidden else token)
            assert labels[place] == (token if place in hidden else IGNORED)
            assert place not in hidden or token >= len(SPECIAL)
    assert read_data(file, tokenizer, config).rows["labels"][:] == rows["labels"][:]
    assert read_data(file, tokenizer, config, seed=1).rows["labels"][:] != rows["labels"][:]


def test_many_rows_are_tokenized_part_by_part(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write_jsonl(tmp_path / "own.jsonl", {"text": sentences(5), "label": list("ababa")})
    whole = read_data(source, tokenizer, None).rows
    assert "Tokenizing" not in capsys.readouterr().err
    monkeypatch.setattr("fffconvert.encoding.ROWS_AT_ONCE", 2)
    assert read_data(source, tokenizer, None).rows.to_list() == whole.to_list()
    assert "Tokenizing 3/3" in capsys.readouterr().err


# ---- How long


def test_texts_are_cut_where_asked(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_jsonl(tmp_path / "own.jsonl", {"text": [" ".join(WORDS * 20)], "label": [0]})

    def length(**settings: Any) -> int:
        config = config_for("classification", max_position_embeddings=300)
        return int(read_data(source, tokenizer, config, **settings).rows["length"][0])

    assert length() == 128
    assert length(max_length=7) == 7
    assert length(max_length=250) == 250


def test_a_model_that_reads_less_says_so(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "own.jsonl", {"text": [" ".join(WORDS * 20)], "label": [0]})
    data = read_data(source, tokenizer, config_for("classification"), max_length=200)
    assert data.rows["length"][0] == 64
    assert "Texts are cut at 64 tokens: the model reads no more" in " ".join(capsys.readouterr().err.split())


# ---- Files that were read as something else


def test_brackets_in_a_name_are_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "data1.csv").write_text("text,label\nother,1\nbad,0\n")
    (tmp_path / "data[1].csv").write_text("text,label\ngood,1\n")
    (found,) = load_source(DataSource(str(tmp_path / "data[1].csv"))).values()
    assert found["text"] == ["good"]
    (tmp_path / "f[1]").mkdir()
    (tmp_path / "f[1]" / "train.csv").write_text("text,label\ngood,1\n")
    with pytest.raises(UserError, match=r"f\[1\] has \*, \? or \[ in its name"):
        load_source(DataSource(str(tmp_path / "f[1]")))


def test_a_table_by_columns_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "own.json").write_text(json.dumps({"text": ["good film"] * 100, "label": [0, 1] * 50}))
    with pytest.raises(
        UserError, match=r"row 0 has text \['good film', 'good film', .*\.\.\.\]; expected text"
    ):
        read_data(DataSource(str(tmp_path / "own.json")), tokenizer, None, held_out=0)


@pytest.mark.parametrize(
    ("labels", "hot"), [([[1, 0], [0, 1]], 2), ([[0, 1], [0, 1]], 0), ([[0, 0], [0, 1]], 2), ([[0], [1]], 0)]
)
def test_zeros_and_ones_are_told_from_lists_of_labels(labels: list[list[int]], hot: int) -> None:
    assert encoding.multi_hot(Dataset.from_dict({"labels": labels}), "labels") == hot


def test_a_quote_that_nobody_closes_is_text_in_a_tsv(tmp_path: Path) -> None:
    file = tmp_path / "own.tsv"
    file.write_text('text\tlabel\n"good film\t1\nbad film\t0\nfine" film\t0\n')
    (found,) = load_source(DataSource(str(file))).values()
    assert found["text"] == ['"good film', "bad film", 'fine" film']
    file.write_text('text\tlabel\n"a ""good"" film"\t1\n')
    (found,) = load_source(DataSource(str(file))).values()
    assert found["text"] == ['a "good" film']


def test_more_columns_than_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("text,label\ngood, film,1\nbad, book,0\n")
    with pytest.raises(UserError, match=r"own.csv names 2 columns and its first row has 3; expected as many"):
        load_source(DataSource(str(tmp_path / "own.csv")))


def test_a_row_without_text_is_named_as_the_file_counts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = [None if number == 7 else f"good {number}" for number in range(50)]
    source = write_jsonl(tmp_path / "own.jsonl", {"text": texts, "label": [0, 1] * 25})
    with pytest.raises(UserError, match="row 7 has text None"):
        read_data(source, tokenizer, None, held_out=10, train_rows=20)


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_bytes(b"good film\n" * 3000 + b"caf\xe9\n")
    with pytest.raises(UserError, match=r"own.txt is not UTF-8 text \(line 3001\)"):
        list(read_lines(tmp_path / "own.txt"))


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
