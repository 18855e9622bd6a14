"""Where rows come from: GLUE, a text file with one text per line, or one's own data.

GLUE comes from the Hub (`nyu-mll/glue`), or from a folder `DATA_DIR/TASK/` of Parquet files named after the
splits. One's own data is whatever `datasets` reads: a file, a folder, or a dataset of the Hub.
"""

from __future__ import annotations

import csv
import glob
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pandas
from datasets import (
    Dataset,
    DatasetDict,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from huggingface_hub import metadata_load

from fffconvert.errors import UserError, first_line
from fffconvert.recipe import DataSource
from fffconvert.tasks import TASKS, Task, task_named

HUB_DATASET = "nyu-mll/glue"

Source = Task | Path | DataSource
"""Where rows may come from: a GLUE task, a text file with one text per line, or one's own data."""

READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
MISSING = {"keep_default_na": False, "na_values": [""]}  # cells of a CSV file: "N/A" may be text, or a class
LONGEST_CELL = 2**31 - 1  # characters; Python's own limit is for its reader alone, not for pandas'
WHOLE = {
    "csv": "a line with the names of the columns, then one for each row, in UTF-8",
    "json": "one object for each row, in UTF-8",
    "parquet": "a whole Parquet file",
}
"""What a file must hold by its reader."""


def source_of(task: str | None, text: str | Path | None, data: DataSource | None) -> Source:
    """The one source that a command or a recipe names.

    Raises:
        UserError: For none or several of the three, a task that is not GLUE's, or a table given for a text file.
    """
    given = [name for name, value in (("task", task), ("text", text), ("data", data)) if value is not None]
    if len(given) != 1:
        found = f"{' and '.join(given)} are named" if given else "nothing to read is named"
        raise UserError(f"{found}; expected either `task` (of GLUE), `text` (a file), or `data` (your own)")
    if data is not None:
        return data
    if task is not None:
        return task_named(task)
    refuse_table(Path(str(text)))
    return Path(str(text))


def refuse_table(file: Path) -> None:
    """Raises a `UserError` for a table where a text file is expected."""
    if file.suffix.lower() in READERS:
        raise UserError(f"{file} is no text file but a table; give it as --data (in a recipe: data.path)")


def train_split(source: Source, data_dir: Path | str | None) -> Dataset:
    """The rows to train on: of own data the split `train`, or the only one."""
    if isinstance(source, Task):
        return load_task(source, data_dir, ("train",))["train"]
    if isinstance(source, Path):
        return Dataset.from_dict({"text": list(read_lines(source))})
    found = load_source(source)
    return found[_train_name(source, found)]


def validation_splits(source: Source, data_dir: Path | str | None) -> dict[str, Dataset]:
    """The rows to evaluate on by split; empty where there is a training split alone."""
    if isinstance(source, Task):
        return load_task(source, data_dir, source.validations)
    if isinstance(source, Path):
        return {}
    found = load_source(source)
    if source.validation is not None:
        return {source.validation: _split(source, found, source.validation)}
    train = source.train or "train"
    names = [n for n in ("validation", "test") if n in found and n != train and len(found) > 1]
    return {name: found[name] for name in names[:1]}


def _train_name(source: DataSource, found: DatasetDict) -> str:
    if source.train is not None:
        _split(source, found, source.train)
        return source.train
    if "train" not in found and len(found) > 1:
        raise several_splits(source, found)
    return "train" if "train" in found else next(iter(found))


def several_splits(source: DataSource, found: DatasetDict) -> UserError:
    """What says that data has several splits and none was named."""
    return UserError(
        f"{source.path} has the splits {', '.join(found)}; say which with --split (in a recipe: data.train)"
    )


def _split(source: DataSource, found: DatasetDict, name: str) -> Dataset:
    if name not in found:
        raise UserError(f"{source.path} has no split {name!r}; it has {', '.join(found)}")
    return found[name]


def name_of(source: Source) -> str:
    """What scores call the data: the name of a file or folder, a Hub dataset's id; none is GLUE's or that of text."""
    if isinstance(source, Task):
        return source.name
    if isinstance(source, Path):
        return "text"
    path = Path(source.path)
    name = Path(os.path.abspath(path)).name if path.exists() else source.path  # noqa: PTH100 - through no link
    return f"{name} (own data)" if name in (*TASKS, "text") else name


def load_source(source: DataSource) -> DatasetDict:
    """All splits of one's own data; a single file is one split.

    Raises:
        UserError: For data that is not there, or that `datasets` cannot read.
    """
    path = Path(source.path)
    path = path.absolute() if path.is_dir() else path  # "." has no name
    try:
        found = _read(source, path)
    except UserError:
        raise
    except Exception as error:  # what can go wrong while reading shares no base class
        reason = reason_of(error, path)
        if path.is_file():
            expected = f"; expected {WHOLE[READERS[path.suffix.lower()]]}"
        elif path.is_dir():
            expected = "; expected a file of one kind for each split, such as train.csv and test.csv"
        else:
            expected = " from the Hub; without it, name a file or a folder"
        raise UserError(f"{source.path} could not be read ({reason}){expected}") from error
    return found if isinstance(found, DatasetDict) else DatasetDict({name_of(source): found})


def reason_of(error: Exception, path: Path) -> str:
    """Why data could not be read, in words of ours where those of `datasets` say nothing."""
    if path.is_file() and path.stat().st_size == 0:
        return "it is empty"
    said = f"{error} {error.__cause__}"
    if "corresponds to no data" in said or "BatchSize must be greater than 0" in said:
        return "it has no rows"
    if "infer the same data file format" in str(error):
        return "its files are of several kinds"
    return first_line(error.__cause__ or error)


def _read(source: DataSource, path: Path) -> Dataset | DatasetDict:
    """Has `datasets` read what a source names, whatever it is; raises whatever that raises."""
    if path.is_dir():
        saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
        if not saved and glob.has_magic(str(path.resolve())):
            raise UserError(
                f"{path} has *, ? or [ in its name, which `datasets` reads as a pattern; rename it"
            )
        return load_from_disk(str(path), keep_in_memory=True) if saved else _read_folder(path, source.subset)
    if path.is_file() and path.suffix.lower() in (".txt", *READERS):
        if source.subset is not None:
            raise UserError(
                f"subset is {source.subset!r}, and {path} is a file, which has none; leave it out"
            )
        return _read_file(path)
    if path.exists() or path.suffix.lower() in READERS or source.path.startswith((".", "/", "~")):
        raise UserError(
            f"{path} {'cannot be read' if path.exists() else 'does not exist'}; expected a folder, "
            f"a file that ends with {', '.join(READERS)} or .txt, or the id of a dataset on the Hub"
        )
    return load_dataset(source.path, source.subset)


def _read_folder(path: Path, subset: str | None) -> Dataset | DatasetDict:
    """A folder's splits. CSV, TSV and text files are read as each alone is, unless a card says how to read them."""
    card = path / "README.md"
    told = (metadata_load(card) or {}) if card.is_file() else {}
    if not told.keys() & {"configs", "dataset_info"}:
        splits = load_dataset_builder(str(path), subset).config.data_files or {}
        files = {str(split): [Path(file) for file in found] for split, found in splits.items()}
        if {file.suffix.lower() for found in files.values() for file in found} <= {".csv", ".tsv", ".txt"}:
            return DatasetDict({split: _read_tables(found) for split, found in files.items()})
    return load_dataset(str(path), subset)


def _read_file(file: Path) -> Dataset:
    """A table or a text file."""
    reader = READERS.get(file.suffix.lower(), "text")
    if reader in ("text", "csv"):
        return _read_tables([file])
    return load_dataset(reader, data_files=glob.escape(str(file)), split="train")


def _read_tables(files: list[Path]) -> Dataset:
    """CSV, TSV and text files, whole: `datasets` would tell a column's type from the first 10,000 rows."""
    tables = [
        pandas.DataFrame({"text": list(read_lines(file))})
        if file.suffix.lower() == ".txt"
        else pandas.read_csv(file, **dialect(file), **MISSING, low_memory=False)
        for file in files
    ]
    table = pandas.concat(tables, ignore_index=True)
    if table.empty:
        raise ValueError("it has no rows")
    for name, column in table.items():  # Arrow has no whole numbers past 64 bits
        if column.dtype == object and any(type(value) is int and abs(value) >= 2**63 for value in column):
            table[name] = column.map(str, na_action="ignore")
    return Dataset.from_pandas(table, preserve_index=False)


def dialect(file: Path) -> dict[str, Any]:
    """How a CSV or TSV file is written, in pandas' words: what stands between columns, and whether cells are quoted.

    Quotes in a TSV file mean something where every line closes those that it opens; elsewhere they are text.

    Raises:
        UserError: As `check_header` does.
    """
    tabs = file.suffix.lower() == ".tsv"
    separator = "\t" if tabs else ","
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        unclosed = tabs and any(line.count('"') % 2 for line in lines)
        quoting: Literal[0, 3] = csv.QUOTE_NONE if unclosed else csv.QUOTE_MINIMAL
        lines.seek(0)
        longest = csv.field_size_limit(LONGEST_CELL)
        try:
            rows = csv.reader(lines, delimiter=separator, quoting=quoting)
            written = (row for row in rows if row)
            names, first = next(written, []), next(written, [])
        finally:
            csv.field_size_limit(longest)
    check_header(file, names, first, separator)
    return {"sep": separator, "quoting": quoting}


def check_header(file: Path, names: list[str], first: list[str], separator: str) -> None:
    """Raises a `UserError` for what is no text, a name that comes twice, columns that something else parts, or too few.

    Args:
        file: The table.
        names: Its first line, cut at the separator.
        first: Its first row, likewise; nothing where it has no row.
        separator: A comma, or in a `.tsv` a tab.
    """
    if any("\0" in name or "\ufffd" in name for name in names):
        raise UserError(f"{file} is no text in UTF-8; expected {WHOLE['csv']}")
    if twice := sorted(name for name, times in Counter(names).items() if name and times > 1):
        raise UserError(f"{file} names the column {twice[0]} more than once; expected each name once")
    tabs = separator == "\t"
    expected = "tabs" if tabs else "commas, or tabs in a .tsv"
    for other, what in ((";", "semicolons"), ("|", "bars"), ("\t", "tabs"), (",", "commas")):
        parts = names[0].count(other) if len(names) == 1 and other != separator else 0
        # there may be commas in the name of a lone column
        if parts and (not tabs or (first and first[0].count(other) == parts)):
            raise UserError(f"{file} has {what} between its columns; expected {expected}")
    if len(first) > len(names):
        raise UserError(
            f"{file} names {len(names)} columns and its first row has {len(first)}; expected as many, and quotes "
            "around a text with commas"
        )


def load_task(task: Task, data_dir: Path | str | None, splits: tuple[str, ...]) -> DatasetDict:
    """Splits of a task, with the columns and label codes of `nyu-mll/glue`.

    Args:
        task: The task.
        data_dir: A folder with `TASK/SPLIT.parquet`; a `train_partial.parquet` serves, with a warning,
            where there is no `train.parquet`. Without a folder the data comes from the Hub.
        splits: Some of `train` and the task's validation splits.

    Raises:
        UserError: For data that is missing, cannot be read, or lacks a column.
    """
    if data_dir is None:
        found = _load_from_hub(task)
    else:
        data_dir = Path(data_dir)
        files = {split: str(_file(data_dir / task.name, split)) for split in splits}
        try:
            found = load_dataset("parquet", data_files=files)
        except Exception as error:
            raise UserError(
                f"{data_dir / task.name}: not readable as Parquet ({first_line(error)})"
            ) from error
    for split in splits:
        missing = {*task.columns, "label"} - set(found[split].column_names)
        if missing:
            raise UserError(
                f"{task.name}, {split}: no column {', '.join(sorted(missing))}; "
                f"expected {', '.join((*task.columns, 'label'))}"
            )
    return DatasetDict({split: found[split] for split in splits})


def _load_from_hub(task: Task) -> DatasetDict:
    try:
        return load_dataset(HUB_DATASET, task.name)
    except Exception as error:
        raise UserError(
            f"{HUB_DATASET}/{task.name} could not be had from the Hub ({first_line(error)}). "
            f"Name a folder that holds {task.name}/train.parquet with --data-dir."
        ) from error


def _file(folder: Path, split: str) -> Path:
    whole, partial = folder / f"{split}.parquet", folder / f"{split}_partial.parquet"
    if whole.is_file():
        return whole
    if partial.is_file():
        warnings.warn(f"{partial}: only a part of the split, so scores are not GLUE's own", stacklevel=2)
        return partial
    raise UserError(f"{whole} does not exist; expected the {split} split as Parquet")


def read_lines(file: Path) -> Iterator[str]:
    """The non-empty lines of a text file, one text each, read as they are asked for.

    Raises:
        UserError: For a file that is missing, is a table, is not UTF-8, or has no text in it.
    """
    refuse_table(file)
    empty, number = True, 0
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007
                for part in line.decode("utf-8-sig").split("\r"):
                    if text := part.strip():
                        empty = False
                        yield text
    except OSError as error:
        raise UserError(f"{file} could not be read ({error.strerror}); expected a text file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (line {number}); expected one text per line") from error
    if empty:
        raise UserError(f"{file} is empty; expected one text per line")
