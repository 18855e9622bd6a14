"""Where rows come from: GLUE, a text file with one text per line, or one's own data.

One's own data is whatever `datasets` reads: a file, a folder, or a dataset of the Hub.
"""

from __future__ import annotations

import glob
import os
from pathlib import Path

from datasets import (
    Dataset,
    DatasetDict,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from huggingface_hub import metadata_load

from fffconvert.errors import UserError, first_line
from fffconvert.files import EXPECTED_CONTENT, READERS, read_file, read_lines, read_tables, refuse_table
from fffconvert.glue import load_task
from fffconvert.recipe import DataSource
from fffconvert.tasks import TASKS, Task, task_named

Source = Task | Path | DataSource
"""Where rows may come from: a GLUE task, a text file with one text per line, or one's own data."""


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


def train_split(source: Source, data_dir: Path | str | None) -> Dataset:
    """The rows to train on: of own data the split `train`, or the only one."""
    if isinstance(source, Task):
        return load_task(source, data_dir, ("train",))["train"]
    if isinstance(source, Path):
        return Dataset.from_dict({"text": list(read_lines(source))})
    return _train_of(source, load_source(source))


def train_and_validation_splits(
    source: Source, data_dir: Path | str | None
) -> tuple[Dataset, dict[str, Dataset]]:
    """The rows to train on, and those to evaluate on by split, of which there may be none."""
    if isinstance(source, DataSource):
        found = load_source(source)
        train, validations = _train_of(source, found), _validations_of(source, found)
        if source.validation is not None and validations[source.validation] is train:
            raise UserError(
                f"data.validation is {source.validation!r}, the rows to train on; expected others, or held_out instead"
            )
        return train, validations
    validations = load_task(source, data_dir, source.validations) if isinstance(source, Task) else {}
    return train_split(source, data_dir), validations


def splits_to_judge(source: Source, data_dir: Path | str | None) -> dict[str, Dataset]:
    """The rows to evaluate on by split: all rows where there are no splits."""
    if isinstance(source, Task):
        return load_task(source, data_dir, source.validations)
    if isinstance(source, Path):
        return {name_of(source): train_split(source, data_dir)}
    found = load_source(source)
    if splits := _validations_of(source, found):
        return splits
    if len(found) > 1:
        raise _several_splits(source, found)
    return {name_of(source): _train_of(source, found)}


def _validations_of(source: DataSource, found: DatasetDict) -> dict[str, Dataset]:
    if source.validation is not None:
        return {source.validation: _split(source, found, source.validation)}
    train = source.train or "train"
    names = [n for n in ("validation", "test") if n in found and n != train and len(found) > 1]
    return {name: found[name] for name in names[:1]}


def _train_of(source: DataSource, found: DatasetDict) -> Dataset:
    if source.train is not None:
        return _split(source, found, source.train)
    if "train" not in found and len(found) > 1:
        raise _several_splits(source, found)
    return found["train"] if "train" in found else next(iter(found.values()))


def _several_splits(source: DataSource, found: DatasetDict) -> UserError:
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
            expected = f"; expected {EXPECTED_CONTENT[READERS[path.suffix.lower()]]}"
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
        return read_file(path)
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
            return DatasetDict({split: read_tables(found) for split, found in files.items()})
    return load_dataset(str(path), subset)
