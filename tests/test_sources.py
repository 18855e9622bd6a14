"""Where rows come from: files, folders, the Hub; and one line for what cannot be read."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pandas
import pytest
from conftest import sentences
from datasets import ClassLabel, Dataset, DatasetDict
from own_data import reviews
from transformers import PreTrainedTokenizerFast

import fffconvert.sources
from fffconvert.data import read_data
from fffconvert.errors import UserError
from fffconvert.files import read_lines
from fffconvert.recipe import DataSource
from fffconvert.sources import load_source, name_of, source_of
from fffconvert.tasks import TASKS


@pytest.mark.parametrize("ending", ["csv", "TSV", "jsonl", "JSON", "parquet"])
def test_files_of_every_kind(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, ending: str) -> None:
    file, columns = tmp_path / f"own-reviews.{ending}", reviews()
    rows = Dataset.from_dict(columns)
    if ending == "parquet":
        rows.to_parquet(file)
    elif ending.lower().startswith("json"):
        rows.to_json(file, lines=ending == "jsonl")
    else:
        rows.to_csv(file, sep="\t" if ending == "TSV" else ",")
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
    files = sorted((tmp_path / "saved").rglob("*"))
    data = read_data(DataSource(str(tmp_path / "saved")), tokenizer, None, held_out=1)
    assert {name: len(rows) for name, rows in data.validations.items()} == {"test": 5}
    assert sorted((tmp_path / "saved").rglob("*")) == files, "it may be somebody else's, or not be written to"


def test_a_dataset_of_the_hub(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(*args: Any) -> DatasetDict:
        asked.append(args)
        rows = Dataset.from_dict({"text": sentences(6), "label": [0, 1, 1, 0, 1, 0]})
        return DatasetDict(
            train=rows.cast_column("label", ClassLabel(names=["neg", "pos"])), unsupervised=rows
        )

    monkeypatch.setattr(fffconvert.sources, "load_dataset", load_dataset)
    source = DataSource("user/reviews", subset="english")
    data = read_data(source, tokenizer, None)
    assert asked == [("user/reviews", "english")]
    assert data.task.name == "user/reviews"
    assert data.task.labels == ("neg", "pos")
    assert data.rows["labels"] == [0, 1, 1, 0, 1, 0]


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
        ("commas.tsv", "commas.tsv has commas between its columns; expected tabs"),
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
    Path("commas.tsv").write_text("text,label\ngood,1\n", encoding="utf-8")
    Path("semicolons.csv").write_text("text;label\ngood, really;1\n", encoding="utf-8")
    Path("bars.csv").write_text("text|label\ngood, really|1\n", encoding="utf-8")
    Path("empty").mkdir()
    with pytest.raises(UserError, match=message) as error:
        load_source(DataSource(path))
    assert "\n" not in str(error.value)


def test_only_an_empty_cell_of_a_csv_file_has_nothing_in_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    file = tmp_path / "own.csv"
    file.write_text("text,label\nN/A,None\nnull,hate\n", encoding="utf-8")
    data = read_data(DataSource(str(file)), tokenizer, None)
    assert data.task.labels == ("None", "hate")
    assert data.texts == ["N/A", "null"]


def test_a_table_is_no_text_file() -> None:
    with pytest.raises(UserError, match=r"reviews.csv is no text file but a table; give it as --data"):
        source_of(None, "reviews.csv", None)
    with pytest.raises(UserError, match=r"reviews.csv is no text file but a table"):
        next(read_lines(Path("reviews.csv")))


def test_types_are_told_from_the_whole_of_a_csv_file(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Past the rows that `datasets` or pandas takes at a time: notes begin late, and a label is a word at last."""
    wide = 100  # columns: of these pandas takes 8,192 rows
    names, more = [f"more{number}" for number in range(wide)], "," * wide
    lines = [",".join(["text,label,notes", *names]), *[f"good,1,{more}"] * 10_001, f"bad,x,late{more}"]
    (tmp_path / "own.csv").write_text("\n".join(lines), encoding="utf-8")
    rows = load_source(DataSource(str(tmp_path / "own.csv")))["own.csv"]
    assert set(rows["label"]) == {"1", "x"}
    assert rows["notes"][-1] == "late"


def test_types_are_told_from_all_files_of_a_split(tmp_path: Path) -> None:
    for number, cell in enumerate(("", "late")):
        (tmp_path / f"train-{number}.csv").write_text(f"text,notes\ngood,{cell}\n", encoding="utf-8")
    assert load_source(DataSource(str(tmp_path)))["train"]["notes"] == [None, "late"]


def test_own_data_never_has_the_name_of_glues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By which the card of a model would publish its scores."""
    for name, called in (("sst2", "sst2 (own data)"), ("text", "text (own data)"), ("mine", "mine")):
        (tmp_path / name).mkdir()
        assert name_of(DataSource(str(tmp_path / name))) == called
    monkeypatch.chdir(tmp_path / "mine")
    Dataset.from_dict(reviews()).to_csv("train.csv")
    assert (name_of(DataSource(".")), name_of(DataSource(".."))) == ("mine", tmp_path.name)
    assert load_source(DataSource("."))["train"].num_rows == len(reviews()["review"])


def test_a_text_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("good\n", encoding="utf-8-sig")
    assert list(read_lines(tmp_path / "own.txt")) == ["good"]


def test_only_one_of_task_text_and_data() -> None:
    assert source_of("sst2", None, None) is TASKS["sst2"]
    assert source_of(None, "a.txt", None) == Path("a.txt")
    assert source_of(None, None, DataSource("a.csv")) == DataSource("a.csv")
    with pytest.raises(UserError, match="nothing to read is named; expected either `task` "):
        source_of(None, None, None)
    with pytest.raises(UserError, match="task and data are named; expected either `task` "):
        source_of("sst2", None, DataSource("a.csv"))


def test_brackets_in_a_name_are_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "data1.csv").write_text("text,label\nother,1\nbad,0\n")
    (tmp_path / "data[1].csv").write_text("text,label\ngood,1\n")
    (found,) = load_source(DataSource(str(tmp_path / "data[1].csv"))).values()
    assert found["text"] == ["good"]
    for name, text in (("1", "other"), ("[1]", "good")):
        (tmp_path / f"data{name}.jsonl").write_text(json.dumps({"text": text}))
    (found,) = load_source(DataSource(str(tmp_path / "data[1].jsonl"))).values()
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


def test_a_quote_that_nobody_closes_is_text_in_a_tsv(tmp_path: Path) -> None:
    file = tmp_path / "own.tsv"
    file.write_text('text\tlabel\n"good film\t1\nbad film\t0\nfine" film\t0\n')
    (found,) = load_source(DataSource(str(file))).values()
    assert found["text"] == ['"good film', "bad film", 'fine" film']
    file.write_text('text\tlabel\n"a ""good"" film"\t1\n')
    (found,) = load_source(DataSource(str(file))).values()
    assert found["text"] == ['a "good" film']
    file.write_text('text\tlabel\n"good film\t1\nbad film"\t0\n')  # two rows rather than one
    (found,) = load_source(DataSource(str(file))).values()
    assert found["text"] == ['"good film', 'bad film"']
    file.write_text('text\n"good film\nbad film"\n')
    (found,) = load_source(DataSource(str(file))).values()
    assert found["text"] == ['"good film', 'bad film"']
    table = pandas.DataFrame({"text": ["a film\nof two lines", 'a "good" one'], "label": [1, 0]})
    table.to_csv(file, sep="\t", index=False)
    (found,) = load_source(DataSource(str(file))).values()
    assert found["text"] == list(table["text"])


def test_files_of_a_folder_are_read_as_files_alone_are(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.tsv").write_text('text\tlabel\n"good film\tNA\nnull\t0\nfine" film\t0\n')
    for rows in load_source(DataSource(str(tmp_path))).values():
        assert rows["text"] == ['"good film', "null", 'fine" film']
        assert rows["label"] == ["NA", "0", "0"]
    (tmp_path / "test.tsv").write_text("text\tlabel\ngood\tfilm\t1\n")
    with pytest.raises(UserError, match=r"test.tsv names 2 columns and its first row has 3"):
        load_source(DataSource(str(tmp_path)))


def test_a_folder_is_read_as_it_says_and_what_is_no_part_of_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text('text\tlabel\n"a\tgood film"\t1\n')
    (tmp_path / "test.tsv").write_text('text\tlabel\n"bad film\t0\n')
    (tmp_path / "notes.csv").write_text("no;table\n")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "train.tsv").touch()
    found = load_source(DataSource(str(tmp_path)))
    assert {name: list(rows["text"]) for name, rows in found.items()} == {
        "train": ["a\tgood film"],
        "test": ['"bad film'],
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.csv").write_text("text;label\nfine, really;1\n")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: mine\n  data_files: data/mine.csv\n  sep: ';'\n"
        "- config_name: other\n  data_files: train.tsv\n---\n"
    )
    (rows,) = load_source(DataSource(str(tmp_path), subset="mine")).values()
    assert rows.to_list() == [{"text": "fine, really", "label": 1}]


def test_a_card_that_says_nothing_of_files_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\nnull,NA\ngood film,EU\n")
    alone = load_source(DataSource(str(tmp_path)))["train"].to_list()
    for card in ("# notes", "---\nlicense: mit\n---\n# notes"):
        (tmp_path / "README.md").write_text(card)
        assert load_source(DataSource(str(tmp_path)))["train"].to_list() == alone
    assert alone == [{"text": "null", "label": "NA"}, {"text": "good film", "label": "EU"}]


def test_a_license_beside_a_packed_table_costs_no_column(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "train.jsonl.gz", "wt") as file:
        file.write('{"text": "good film", "label": 1}\n')
    (tmp_path / "LICENSE.txt").write_text("All rights\n\nreserved\n")
    (rows,) = load_source(DataSource(str(tmp_path))).values()
    assert rows.column_names == ["text", "label"]


def test_a_folder_of_text_files_has_no_blank_texts(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("\ufeffgood film\n\n  \nbad film \n", encoding="utf-8")
    (tmp_path / "test.txt").write_text("fine film\n", encoding="utf-8")
    found = load_source(DataSource(str(tmp_path)))
    assert {name: list(rows["text"]) for name, rows in found.items()} == {
        "train": ["good film", "bad film"],
        "test": ["fine film"],
    }


def test_a_long_cell_one_of_two_lines_and_an_empty_line_are_read(tmp_path: Path) -> None:
    file, longest = tmp_path / "own.csv", csv.field_size_limit()
    file.write_text(f'\ntext,label\n{"a" * 200_000},1\n"good\nfilm",0\n')
    (found,) = load_source(DataSource(str(file))).values()
    assert [len(text) for text in found["text"]] == [200_000, 9]
    assert csv.field_size_limit() == longest


def test_whole_numbers_past_64_bits_are_text(tmp_path: Path) -> None:
    file = tmp_path / "own.csv"
    file.write_text("id,text,label\n123456789012345678901,good film,1\n7,bad film,0\n,fine film,1\n")
    (rows,) = load_source(DataSource(str(file))).values()
    assert rows["id"] == ["123456789012345678901", "7", None]
    assert rows["label"] == [1, 0, 1]


def test_a_column_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "own.csv"
    for mark in ("", "\ufeff"):
        file.write_text(f"{mark}label,text,label\n0,good film,1\n", encoding="utf-8")
        with pytest.raises(
            UserError, match=r"names the column label more than once; expected each name once"
        ):
            load_source(DataSource(str(file)))


def test_a_packed_table_without_rows_is_said_to_have_none(tmp_path: Path) -> None:
    file = tmp_path / "own.parquet"
    Dataset.from_dict({"text": [], "label": []}).to_parquet(file)
    with pytest.raises(UserError, match=r"could not be read \(it has no rows\)"):
        load_source(DataSource(str(file)))


def test_more_columns_than_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("text,label\ngood, film,1\nbad, book,0\n")
    with pytest.raises(UserError, match=r"own.csv names 2 columns and its first row has 3; expected as many"):
        load_source(DataSource(str(tmp_path / "own.csv")))


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_bytes(b"good film\n" * 3000 + b"caf\xe9\n")
    with pytest.raises(UserError, match=r"own.txt is not UTF-8 text \(line 3001\)"):
        list(read_lines(tmp_path / "own.txt"))


def test_what_is_no_table_is_said_in_words_of_ours(tmp_path: Path) -> None:
    (tmp_path / "header.csv").write_text("text,label\n")
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "train.csv").write_text("text\ngood\n")
    (tmp_path / "mixed" / "test.jsonl").write_text('{"text": "poor"}\n')
    for name, message in (
        ("header.csv", r"could not be read \(it has no rows\); expected a line with the names"),
        ("binary.csv", r"is no text in UTF-8; expected a line with the names"),
        ("mixed", r"could not be read \(its files are of several kinds\); expected a file of one kind"),
    ):
        with pytest.raises(UserError, match=message):
            load_source(DataSource(str(tmp_path / name)))


@pytest.mark.parametrize(
    ("name", "header"), [("own.csv", '"text, cleaned"'), ("own.tsv", "text (first, second)")]
)
def test_the_name_of_a_lone_column_may_have_commas(name: str, header: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(f"{header}\na good film\nbad\n", encoding="utf-8")
    (rows,) = load_source(DataSource(str(file))).values()
    assert rows.column_names == [header.strip('"')]
