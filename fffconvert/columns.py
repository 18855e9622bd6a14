"""What task one's own data makes: which columns hold text and labels, and which classes there are."""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Value
from transformers import PreTrainedConfig

from fffconvert.display import say
from fffconvert.errors import UserError
from fffconvert.heads import Kind, kind_of, labels_of
from fffconvert.labels import IGNORED, LISTS, class_names, is_ignored, labels_in, multi_hot, whole
from fffconvert.recipe import DataSource
from fffconvert.sources import Source, name_of
from fffconvert.tasks import AGREEMENT, METRICS, Task

LOOSE_PAIRS = (("question", "answer"), ("query", "document"))
"""Those that are no pair beside a column of text."""

PAIRS = (
    ("question", "context"),
    ("question", "passage"),
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text", "text_pair"),
    ("question", "sentence"),
    ("query", "passage"),
    *LOOSE_PAIRS,
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

WITHOUT_LABELS: tuple[Kind, ...] = ("masked", "embedding")
"""The kinds of head that no labels are needed for."""

TAG = re.compile(f"O|{IGNORED}|[BIELSU]-.+")
"""A tag of a word by its looks: of IOB, IOBES or BILOU."""

MOST_NAMES = 8  # of classes, in one line about them


def task_of(source: Source, rows: Dataset, config: PreTrainedConfig | None, labelled: bool = True) -> Task:
    """The task that rows make for a model, whose head says what is asked; without one, the labels say it.

    Args:
        source: Where the rows come from.
        rows: Some of them; the columns and classes are read off them.
        config: The model's; none where a head is still to be made for the labels.
        labelled: Whether labels are wanted.

    Raises:
        UserError: For a column that is not there or that cannot be guessed, or labels that a head is to be
            made for and that are not there.
    """
    if isinstance(source, Task):
        return source if labelled else unlabelled(source.name, source.columns, config)
    if isinstance(source, Path):
        return unlabelled("text", ("text",), config)
    name = name_of(source)
    kind = kind_of(config) if config is not None else None
    if source.label is not None:
        _require(source, rows, source.label)
    label = label_column(source, rows, kind) if labelled else None
    if kind is None:
        if label is None:
            raise UserError(
                f"{source.path}: which column holds the labels? It has {', '.join(rows.column_names)}; "
                "name it with --label-column (in a recipe: data.label)"
            )
        kind = kind_of_labels(source, rows, label)
    columns = text_columns(source, rows, kind, label)
    task = unlabelled(name, columns, config)
    if label is not None:
        labels = class_labels(rows, label, kind, config)
        entities = kind == "tokens" and any(each.startswith("B-") for each in labels)
        metrics = ("entity_f1", "accuracy") if entities else METRICS[kind]
        task = Task(name, columns, labels, metrics, kind=kind, label=label)
    say_what_was_chosen(task, rows, labelled and kind not in WITHOUT_LABELS)
    return task


def unlabelled(name: str, columns: tuple[str, ...], config: PreTrainedConfig | None) -> Task:
    """A task of text alone, where the teacher is the judge."""
    kind = kind_of(config) if config is not None else "embedding"
    metrics = METRICS[kind] if kind in WITHOUT_LABELS else AGREEMENT
    return Task(name, columns, metrics=metrics, kind=kind, label=None)


def label_column(source: DataSource, rows: Dataset, kind: Kind | None) -> str | None:
    """The column that holds the labels: the one named, or the first with a usual name that suits the head."""
    if kind in WITHOUT_LABELS:
        if source.label is not None:
            raise UserError(
                f"the model's head needs no labels ({kind}); leave out --label-column {source.label}"
            )
        return None
    if source.label is not None:
        return source.label
    usual = [column for name in LABELS if (column := _usual(rows.column_names, (name,))) is not None]
    suits = (c for c in usual if kind is None or holds_answers(rows.features[c]) == (kind == "question"))
    found = next(suits, None)
    if found is not None and len(rows) and all(value in (None, -1) for value in rows[found][:]):
        return None  # as GLUE's own test splits have it
    return found


def kind_of_labels(source: DataSource, rows: Dataset, label: str) -> Kind:
    """What a head for these labels answers."""
    feature = rows.features[label]
    if holds_answers(feature):
        return "question"
    if isinstance(feature, LISTS):
        words = any(isinstance(rows.features.get(name), LISTS) for name in source.text)
        if words or _usual(rows.column_names, ("tokens", "words")):
            return "tokens"
        names = class_names(feature) or distinct("multi-label", rows[label][:])
        return "tokens" if all(map(TAG.fullmatch, names)) else "multi-label"
    if label.lower() in ("ner_tags", "tags"):
        return "tokens"  # as text with spaces between, in a CSV file
    number = isinstance(feature, Value) and ("float" in feature.dtype or "decimal" in feature.dtype)
    return "regression" if number else "classification"


def holds_answers(feature: Any) -> bool:
    """Whether a column holds answers to questions: objects, or lists of them."""
    return isinstance(feature.feature if isinstance(feature, LISTS) else feature, dict)


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
    pairs = {"question": PAIRS[:1], "tokens": ()}.get(kind, PAIRS)
    columns = [name for name in rows.column_names if name not in (label, source.label)]
    for pair in pairs:
        found = [_usual(columns, (name,)) for name in pair]
        others = [name for name in TEXTS if name not in pair]
        if all(found) and not (pair in LOOSE_PAIRS and _usual(columns, others)):
            return tuple(map(str, found))
    usual = _usual(columns, ("tokens", "words", *TEXTS) if kind == "tokens" else TEXTS)
    textual = [
        name
        for name in columns
        if isinstance(feature := rows.features[name], Value) and "string" in feature.dtype
    ]
    if len(textual) > 1:  # where labels are not wanted they are no text for all that
        textual = [name for name in textual if name.lower() not in LABELS]
    if kind == "question" or (usual is None and len(textual) != 1):
        wanted = "question and which its context" if kind == "question" else "text"
        raise UserError(
            f"{source.path}: which column holds the {wanted}? It has {', '.join(rows.column_names)}; "
            "name it with --text-column (in a recipe: data.text)"
        )
    return (usual or textual[0],)


def _usual(columns: Iterable[str], names: Iterable[str]) -> str | None:
    """The first of `names` among the columns, whatever their case."""
    there = {column.lower(): column for column in columns}
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
        found = tuple(named or [str(number) for number in range(hot)] or distinct(kind, rows[label][:]))
        if len(found) < 2:
            raise UserError(
                f"column {label!r} has {len(found)} label{'s' * (len(found) != 1)}; expected two or more"
            )
        times = Counter(name.strip().lower() for name in found)
        if alike := sorted(repr(name) for name in found if times[name.strip().lower()] > 1):
            raise UserError(
                f"column {label!r} has labels that differ in case or spaces alone: {_some(alike)}; "
                "expected one spelling"
            )
        return found
    names = labels_of(config)
    if named and not {name.lower() for name in named} & {name.lower() for name in names}:
        say(f"The data's labels {_some(named)} are taken by number for the model's {_some(names)}")
    return names


def distinct(kind: Kind, column: Iterable[Any]) -> list[str]:
    """The names of the labels in a column, in order: numbers by size, then texts; what is ignored is none.

    Raises:
        UserError: For labels that are lists or objects.
    """
    found = set()
    for label in (label for value in column for label in labels_in(kind, value) if label is not None):
        if isinstance(label, list | dict):
            raise UserError(f"{reprlib.repr(label)} is no label; expected a name or a number")
        if kind != "tokens" or not is_ignored(label):
            found.add(label)
    return [str(label) for label in sorted(found, key=numbers_first)]


def numbers_first(label: Any) -> tuple[bool, Any]:
    """By which labels are sorted: numbers, written as text too, by size, and then what is no number."""
    named = isinstance(label, str) and not label.isdecimal()
    return named, label if named else float(label)


def say_what_was_chosen(task: Task, rows: Dataset, labelled: bool) -> None:
    """One line about which columns are what, and what follows where labels were wanted and none were found."""
    missing = (
        "no column of labels (--label-column, in a recipe data.label, names one), so the teacher is the judge"
    )
    labels = f"labels from {task.label!r}" if task.label else missing if labelled else "labels are not needed"
    classes = f": {_some(shown_labels(task, rows))}" if task.labels else ""
    columns = " and ".join(repr(column) for column in task.columns)
    say(f"{task.name}: text from {columns}, {labels} ({task.kind}{classes})")


def shown_labels(task: Task, rows: Dataset) -> Sequence[str]:
    """The labels, each with its number where the data has numbers that stand for them, and are not their names."""
    if task.label is None or not isinstance(next(iter(rows[task.label]), None), int | float):
        return task.labels
    named = class_names(rows.features[task.label]) or {str(whole(value)) for value in rows[task.label][:]}
    if not {name.lower() for name in named}.isdisjoint(name.lower() for name in task.labels):
        return task.labels
    return [f"{number} = {name}" for number, name in enumerate(task.labels)]


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) if "," in name else name for name in names[:MOST_NAMES])
    return f"{shown}, ... {len(names)} in all" if len(names) > MOST_NAMES else shown
