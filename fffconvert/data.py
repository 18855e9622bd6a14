"""Where rows come from: GLUE, a text file, or one's own data, and what task one's own data makes.

GLUE comes from the Hub (`nyu-mll/glue`), or from a folder `DATA_DIR/TASK/` of Parquet files named after the
splits. One's own data is whatever `datasets` reads: a file, a folder, or a dataset of the Hub.
"""

from __future__ import annotations

import csv
import glob
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import (
    Dataset,
    DatasetDict,
    List,
    Value,
    load_dataset,
    load_from_disk,
)
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from fffconvert.calibration import Text, readable_length
from fffconvert.display import say
from fffconvert.encoding import class_names, labels_in, multi_hot, prompted, texts_in, texts_of, tokenized
from fffconvert.errors import UserError, first_line
from fffconvert.recipe import MAX_LENGTH, DataSource
from fffconvert.tasks import AGREEMENT, METRICS, Kind, Task, kind_of, labels_of, task_named

HUB_DATASET = "nyu-mll/glue"

Asked = Task | Path | DataSource
"""What may be asked for: a GLUE task, a text file with one text per line, or one's own data."""

PAIRS = (
    ("question", "context"),
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("question", "sentence"),
    ("query", "passage"),
)
TEXTS = (
    "text",
    "sentence",
    "tokens",
    "words",
    "review",
    "content",
    "document",
    "comment",
    "body",
    "question",
)
LABELS = (
    "label",
    "labels",
    "ner_tags",
    "tags",
    "answers",
    "target",
    "class",
    "category",
    "sentiment",
    "score",
)
"""Column names that are taken for text and labels where none are given, the first that is there."""

READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
WHOLE = {
    "csv": "a line with the names of the columns, then one for each row, in UTF-8",
    "json": "one object for each row, in UTF-8",
    "parquet": "a whole Parquet file",
}
"""What a file must hold by its reader."""

MOST_NAMES = 8  # of classes, in one line about them


def asked_for(task: str | None, text: str | Path | None, data: DataSource | None) -> Asked:
    """What a command or a recipe asks for.

    Raises:
        UserError: For none or several of the three, a task that is not GLUE's, or a table given for a text file.
    """
    given = [name for name, value in (("task", task), ("text", text), ("data", data)) if value is not None]
    if len(given) != 1:
        found = f"{' and '.join(given)} are named" if given else "nothing to read is named"
        raise UserError(f"{found}; expected either a task, a text file, or data of your own")
    if data is not None:
        return data
    if task is not None:
        return task_named(task)
    file = Path(str(text))
    if file.suffix.lower() in READERS:
        raise UserError(f"{file} is no text file but a table; give it as --data (in a recipe: data.path)")
    return file


@dataclass(frozen=True)
class Data:
    """What to train and to evaluate on.

    Attributes:
        task: What is asked.
        texts: The training texts.
        rows: The same, tokenized.
        validations: Tokenized rows to evaluate on, by split.
    """

    task: Task
    texts: list[Text]
    rows: Dataset
    validations: dict[str, Dataset]


def read_data(
    asked: Asked,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig | None,
    *,
    data_dir: Path | None = None,
    train_rows: int | None = None,
    held_out: int = 0,
    max_length: int = MAX_LENGTH,
    seed: int = 0,
    labelled: bool = True,
    prompt: str = "",
) -> Data:
    """Reads what was asked for, and draws the rows to train on.

    Args:
        asked: A GLUE task, a text file, or one's own data.
        tokenizer: The model's.
        config: The model's, whose head and labels the data is for; none where the head is still to be made.
        data_dir: As for `load_task`.
        train_rows: Rows to train on, drawn at random; all of them if not given.
        held_out: Rows to evaluate on where the data has none of its own; they are never trained on. With 0
            nothing is read to evaluate on.
        max_length: Tokens that a row is cut at.
        seed: Decides what is drawn.
        labelled: Whether labels are wanted; without them a row is text alone.
        prompt: What a sentence encoder has before every text.

    Raises:
        UserError: For data that is missing or malformed, or fewer rows than are to be held out.
    """
    random = np.random.default_rng(seed)
    train = train_split(asked, data_dir)
    task = task_of(asked, train, config, labelled)
    for column in task.columns:
        texts_in(task, train, column)  # before rows are drawn, so that one without text has its number
    validations = validation_splits(asked, data_dir) if held_out else {}
    drawn = train_rows is not None
    if held_out and not validations:
        if len(train) <= held_out:
            raise UserError(
                f"{_name(asked)} has {len(train)} rows; expected more than the {held_out} to hold out"
            )
        train = train.select(random.permutation(len(train)))
        validations = {"held_out": train.select(range(held_out))}
        train, drawn = train.select(range(held_out, len(train))), False
    if drawn:
        train = train.select(random.permutation(len(train)))
    train = train.select(range(min(train_rows or len(train), len(train))))
    if validations:
        task = replace(task, validations=tuple(validations))
    check_columns(task, validations)
    train, *judged = (prompted(task, rows, prompt) for rows in (train, *validations.values()))
    limit = readable_length(tokenizer, config, max_length)
    return Data(
        task,
        texts_of(task, train),
        tokenized(task, train, tokenizer, limit, seed),
        {
            n: tokenized(task, rows, tokenizer, limit, seed)
            for n, rows in zip(validations, judged, strict=True)
        },
    )


def read_validations(
    asked: Asked,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig | None,
    *,
    data_dir: Path | None = None,
    max_length: int = MAX_LENGTH,
    prompt: str = "",
) -> tuple[Task, dict[str, Dataset]]:
    """The task, and the tokenized rows to evaluate on by split: all rows where there are no splits.

    Takes what `read_data` takes.

    Raises:
        UserError: For data that is missing or malformed.
    """
    splits = validation_splits(asked, data_dir)
    if not splits and isinstance(asked, DataSource) and len(found := load_source(asked)) > 1:
        raise _several_splits(asked, found)
    splits = splits or {_name(asked): train_split(asked, data_dir)}
    task = replace(task_of(asked, next(iter(splits.values())), config), validations=tuple(splits))
    check_columns(task, splits)
    limit = readable_length(tokenizer, config, max_length)
    return task, {
        name: tokenized(task, prompted(task, rows, prompt), tokenizer, limit) for name, rows in splits.items()
    }


def check_columns(task: Task, splits: dict[str, Dataset]) -> None:
    """Raises a `UserError` for a split to evaluate on that lacks a column which another split has."""
    for split, rows in splits.items():
        for column in (*task.columns, task.label):
            if column is not None and column not in rows.column_names:
                raise UserError(
                    f"{task.name}: split {split!r} has no column {column!r}; it has {', '.join(rows.column_names)}"
                )


def read_texts(
    asked: Asked, config: PreTrainedConfig, data_dir: Path | None = None, prompt: str = ""
) -> Iterable[Text]:
    """The texts alone, for a model to be calibrated on. Takes and raises what `read_data` does."""
    if isinstance(asked, Path):
        prompt = prompt if kind_of(config) == "embedding" else ""
        return (prompt + line for line in read_lines(asked))
    rows = train_split(asked, data_dir)
    task = task_of(asked, rows, config, labelled=False)
    return texts_of(task, prompted(task, rows, prompt))


def train_split(asked: Asked, data_dir: Path | None) -> Dataset:
    """The rows to train on: of own data the split `train`, or the only one."""
    if isinstance(asked, Task):
        return load_task(asked, data_dir, ("train",))["train"]
    if isinstance(asked, Path):
        return Dataset.from_dict({"text": list(read_lines(asked))})
    found = load_source(asked)
    return found[_train_name(asked, found)]


def validation_splits(asked: Asked, data_dir: Path | None) -> dict[str, Dataset]:
    """The rows to evaluate on by split; none where the data has but those to train on."""
    if isinstance(asked, Task):
        return load_task(asked, data_dir, asked.validations)
    if isinstance(asked, Path):
        return {}
    found = load_source(asked)
    if asked.validation is not None:
        return {asked.validation: _split(asked, found, asked.validation)}
    train = asked.train or "train"
    names = [n for n in ("validation", "test") if n in found and n != train and len(found) > 1]
    return {name: found[name] for name in names[:1]}


def _train_name(source: DataSource, found: DatasetDict) -> str:
    if source.train is not None:
        _split(source, found, source.train)
        return source.train
    if "train" not in found and len(found) > 1:
        raise _several_splits(source, found)
    return "train" if "train" in found else next(iter(found))


def _several_splits(source: DataSource, found: DatasetDict) -> UserError:
    return UserError(f"{source.path} has the splits {', '.join(found)}; say which with --split")


def _split(source: DataSource, found: DatasetDict, name: str) -> Dataset:
    if name not in found:
        raise UserError(f"{source.path} has no split {name!r}; it has {', '.join(found)}")
    return found[name]


def _name(asked: Asked) -> str:
    """What scores call the data: the name of a file or folder, a Hub dataset's id."""
    if isinstance(asked, Task):
        return asked.name
    if isinstance(asked, Path):
        return "text"
    return Path(asked.path).name if Path(asked.path).exists() else asked.path


def load_source(source: DataSource) -> DatasetDict:
    """All splits of one's own data; a single file is one split.

    Raises:
        UserError: For data that is not there, or that `datasets` cannot read.
    """
    path = Path(source.path)
    try:
        found = _read(source, path)
    except UserError:
        raise
    except Exception as error:  # what can go wrong while reading shares no base class
        empty = path.is_file() and path.stat().st_size == 0
        reason = "it is empty" if empty else first_line(error.__cause__ or error)
        where = "" if path.exists() else " from the Hub; without it, name a file or a folder"
        expected = f"; expected {WHOLE[READERS[path.suffix.lower()]]}" if path.is_file() else where
        raise UserError(f"{source.path} could not be read ({reason}){expected}") from error
    return found if isinstance(found, DatasetDict) else DatasetDict({_name(source): found})


def _read(source: DataSource, path: Path) -> Dataset | DatasetDict:
    """Has `datasets` read what a source names, whatever it is; raises whatever that raises."""
    suffix = path.suffix.lower()
    reader = READERS.get(suffix)
    if path.is_dir():
        saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
        if not saved and glob.has_magic(str(path.resolve())):
            raise UserError(
                f"{path} has *, ? or [ in its name, which `datasets` reads as a pattern; rename it"
            )
        return load_from_disk(str(path)) if saved else load_dataset(str(path), source.subset)
    if path.is_file() and suffix == ".txt":
        return Dataset.from_dict({"text": list(read_lines(path))})
    if path.is_file() and reader is not None:
        options: dict[str, Any] = {}
        if reader == "csv":
            # an empty cell alone is nothing: "None" and "N/A" are texts, or names of classes
            options = {**dialect(path), "keep_default_na": False, "na_values": [""]}
        return load_dataset(reader, data_files=glob.escape(str(path)), split="train", **options)
    if path.exists() or reader is not None or source.path.startswith((".", "/", "~")):
        raise UserError(
            f"{path} {'cannot be read' if path.exists() else 'does not exist'}; expected a folder, "
            f"a file that ends with {', '.join(READERS)} or .txt, or the id of a dataset on the Hub"
        )
    return load_dataset(source.path, source.subset)


def dialect(file: Path) -> dict[str, Any]:
    """How a CSV or TSV file is written, in pandas' words: what stands between columns, and whether cells are quoted.

    Quotes in a TSV file mean something where every line closes those that it opens; elsewhere they are text.

    Raises:
        UserError: Where neither commas nor, in a `.tsv`, tabs part the columns, or a row has more of them than names.
    """
    tabs = file.suffix.lower() == ".tsv"
    separator = "\t" if tabs else ","
    with file.open(encoding="utf-8", errors="replace", newline="") as lines:
        unclosed = tabs and any(line.count('"') % 2 for line in lines)
        quoting: Literal[0, 3] = csv.QUOTE_NONE if unclosed else csv.QUOTE_MINIMAL
        lines.seek(0)
        names, *first = islice(csv.reader(lines, delimiter=separator, quoting=quoting), 2)
    for other, what in ((";", "semicolons"), ("|", "bars"), ("\t", "tabs")):
        if not tabs and len(names) == 1 and other in names[0]:
            raise UserError(f"{file} has {what} between its columns; expected commas, or tabs in a .tsv")
    if first and len(first[0]) > len(names):
        raise UserError(
            f"{file} names {len(names)} columns and its first row has {len(first[0])}; expected as many, and quotes "
            "around a text with commas"
        )
    return {"sep": separator, "quoting": quoting}


def task_of(asked: Asked, rows: Dataset, config: PreTrainedConfig | None, labelled: bool = True) -> Task:
    """The task that rows make for a model, whose head says what is asked; without one, the labels say it.

    Args:
        asked: Where the rows come from.
        rows: Some of them; the columns and classes are read off them.
        config: The model's; none where a head is still to be made for the labels.
        labelled: Whether labels are wanted.

    Raises:
        UserError: For a column that is not there or that cannot be guessed, or labels that a head is to be
            made for and that are not there.
    """
    if isinstance(asked, Task):
        return asked if labelled else unlabelled(asked.name, asked.columns, config)
    if isinstance(asked, Path):
        return unlabelled("text", ("text",), config)
    name = _name(asked)
    kind = kind_of(config) if config is not None else None
    label = label_column(asked, rows, kind) if labelled else None
    if kind is None:
        if label is None:
            raise UserError(
                f"{asked.path}: which column holds the labels? It has {', '.join(rows.column_names)}; "
                "name it with --label-column"
            )
        kind = kind_of_labels(asked, rows, label)
    columns = text_columns(asked, rows, kind, label)
    task = unlabelled(name, columns, config)
    if label is not None:
        labels = class_labels(rows, label, kind, config)
        entities = kind == "tokens" and any(each.startswith("B-") for each in labels)
        metrics = ("entity_f1", "accuracy") if entities else METRICS[kind]
        task = Task(name, columns, labels, metrics, kind=kind, label=label)
    say_what_was_chosen(task, rows, labelled and kind not in ("masked", "embedding"))
    return task


def unlabelled(name: str, columns: tuple[str, ...], config: PreTrainedConfig | None) -> Task:
    """A task of text alone, where the teacher is the judge."""
    kind = kind_of(config) if config is not None else "embedding"
    metrics = METRICS[kind] if kind in ("masked", "embedding") else AGREEMENT
    return Task(name, columns, metrics=metrics, kind=kind, label=None)


def label_column(source: DataSource, rows: Dataset, kind: Kind | None) -> str | None:
    """The column that holds the labels: the one named, or the first with a usual name."""
    if kind in ("masked", "embedding"):
        if source.label is not None:
            raise UserError(
                f"the model's head needs no labels ({kind}); leave out --label-column {source.label}"
            )
        return None
    if source.label is not None:
        _require(source, rows, source.label)
        return source.label
    found = _usual(rows, LABELS)
    if found is not None and len(rows) and all(value in (None, -1) for value in rows[found]):
        return None  # as GLUE's own test splits have it
    answers = found is not None and holds_answers(rows.features[found])
    return found if kind is None or answers == (kind == "question") else None


def kind_of_labels(source: DataSource, rows: Dataset, label: str) -> Kind:
    """What a head for these labels answers."""
    feature = rows.features[label]
    if holds_answers(feature):
        return "question"
    if isinstance(feature, List):
        words = any(isinstance(rows.features.get(name), List) for name in source.text)
        return "tokens" if words or _usual(rows, ("tokens", "words")) else "multi-label"
    if label.lower() in ("ner_tags", "tags"):
        return "tokens"  # as text with spaces between, in a CSV file
    return "regression" if isinstance(feature, Value) and "float" in feature.dtype else "classification"


def holds_answers(feature: Any) -> bool:
    """Whether a column holds answers to questions: objects, or lists of them."""
    return isinstance(feature.feature if isinstance(feature, List) else feature, dict)


def text_columns(source: DataSource, rows: Dataset, kind: Kind, label: str | None) -> tuple[str, ...]:
    """The columns that hold the text: those named, or those with usual names, or the only one of text."""
    for name in source.text:
        _require(source, rows, name)
    if len(source.text) > 2:
        raise UserError(f"{source.path}: {len(source.text)} text columns; a model reads one or two")
    if len(source.text) == 1 and kind == "question":
        raise UserError(
            f"{source.path}: one text column, {source.text[0]!r}; a question is asked of a context, so name both, "
            "each with --text-column, the question first"
        )
    if source.text:
        return source.text
    for pair in PAIRS[:1] if kind == "question" else () if kind == "tokens" else PAIRS:
        columns = tuple(_usual(rows, (name,)) for name in pair)
        if all(columns):
            return tuple(str(column) for column in columns)
    usual = _usual(rows, ("tokens", "words", *TEXTS) if kind == "tokens" else TEXTS)
    textual = [
        name
        for name, feature in rows.features.items()
        if isinstance(feature, Value) and "string" in feature.dtype and name != label
    ]
    if kind == "question" or (usual is None and len(textual) != 1):
        wanted = "question and which its context" if kind == "question" else "text"
        raise UserError(
            f"{source.path}: which column holds the {wanted}? It has {', '.join(rows.column_names)}; "
            "name it with --text-column"
        )
    return (usual or textual[0],)


def _usual(rows: Dataset, names: tuple[str, ...]) -> str | None:
    """The first of `names` among the columns, whatever their case."""
    there = {column.lower(): column for column in rows.column_names}
    return next((there[name] for name in names if name in there), None)


def _require(source: DataSource, rows: Dataset, column: str) -> None:
    if column not in rows.column_names:
        raise UserError(f"{source.path} has no column {column!r}; it has {', '.join(rows.column_names)}")


def class_labels(rows: Dataset, label: str, kind: Kind, config: PreTrainedConfig | None) -> tuple[str, ...]:
    """The names of the classes, in the order of the model's outputs; for a new head as the data has them.

    Where both name their classes, and differently, the data's numbers count, and one line says so.
    """
    if kind not in ("classification", "multi-label", "tokens"):
        return ()
    named = class_names(rows.features[label])
    if config is None:
        hot = multi_hot(rows, label) if kind == "multi-label" else 0
        found = tuple(named or [str(number) for number in range(hot)] or distinct(kind, rows[label]))
        if len(found) < 2:
            raise UserError(
                f"column {label!r} has {len(found)} label{'s' * (len(found) != 1)}; expected two or more"
            )
        times = Counter(name.lower() for name in found)
        if alike := sorted(name for name in found if times[name.lower()] > 1):
            raise UserError(
                f"column {label!r} has labels that differ in their case alone: {_some(alike)}; expected one spelling"
            )
        return found
    names = labels_of(config)
    if named and not {name.lower() for name in named} & {name.lower() for name in names}:
        say(f"The data's labels {_some(named)} are taken by number for the model's {_some(names)}")
    return names


def distinct(kind: Kind, column: Iterable[Any]) -> list[str]:
    """The names of the labels in a column, in order: numbers by size, then texts."""
    found = {label for value in column for label in labels_in(kind, value) if label is not None}
    return [str(label) for label in sorted(found, key=lambda label: (isinstance(label, str), label))]


def say_what_was_chosen(task: Task, rows: Dataset, labelled: bool) -> None:
    """One line about which columns are what, and what follows where labels were wanted and none were found."""
    missing = "no column of labels (--label-column names one), so the teacher is the judge"
    labels = f"labels from {task.label!r}" if task.label else missing if labelled else "no labels"
    by_number = task.label is not None and isinstance(next(iter(rows[task.label]), None), int | float)
    names = [f"{number} = {name}" for number, name in enumerate(task.labels)] if by_number else task.labels
    classes = f": {_some(names)}" if names else ""
    columns = " and ".join(repr(column) for column in task.columns)
    say(f"{task.name}: text from {columns}, {labels} ({task.kind}{classes})")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MOST_NAMES])
    return f"{shown}, ... {len(names)} in all" if len(names) > MOST_NAMES else shown


def load_task(task: Task, data_dir: Path | None, splits: tuple[str, ...]) -> DatasetDict:
    """Splits of a task, with the columns and label codes of `nyu-mll/glue`.

    Args:
        task: The task.
        splits: Some of `train` and the task's validation splits.
        data_dir: A folder with `TASK/SPLIT.parquet`; a `train_partial.parquet` serves, with a warning,
            where there is no `train.parquet`. Without a folder the data comes from the Hub.

    Raises:
        UserError: For data that is missing, cannot be read, or lacks a column.
    """
    if data_dir is None:
        found = _load_from_hub(task)
    else:
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
        UserError: For a file that is missing, is not UTF-8, or has no text in it.
    """
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
