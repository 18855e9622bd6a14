"""Labels as a model takes them: from names, numbers and lists in a column to numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, LargeList, List, Value

from fffconvert.errors import UserError
from fffconvert.heads import Kind
from fffconvert.tasks import Task

IGNORED = -100
"""The label of a token that does not count, for PyTorch's cross-entropy as for the metrics."""

LISTS = (List, LargeList)
"""What a column of lists may be: Arrow has two kinds, and some programs write the one for long ones."""


def coder(task: Task, rows: Dataset) -> Callable[[Any], Any]:
    """What turns a label as it stands in a column into what the model's loss takes."""
    if task.is_regression:
        return partial(number_in, task)
    one = class_coder(task, rows)
    return several_coder(task, rows, one) if task.kind == "multi-label" else one


def number_in(task: Task, value: Any) -> float:
    """A label that is a number, also where it stands as text.

    Raises:
        UserError: For anything else.
    """
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = np.nan
    if not np.isfinite(found):
        raise UserError(
            f"{task.name}: {value!r} in column {task.label!r} is no number; the model's head gives one"
        )
    return found


def class_coder(task: Task, rows: Dataset) -> Callable[[Any], int]:
    """What turns a class into its number.

    A class is given by its name (in any case, unless two names differ in nothing else) or by its number; numbers count
    where no label of the column is a name.
    """
    key = str.lower if len({name.lower() for name in task.labels}) == len(task.labels) else str
    numbers = {key(name): number for number, name in enumerate(task.labels)}
    names = (class_names(rows.features[task.label]) if task.label else None) or []

    def named(value: Any) -> Any:
        if names and isinstance(value, int) and 0 <= value < len(names):
            return names[value]
        return value if isinstance(value, bool) else whole(value)

    given = rows[task.label][:] if task.label and numbers else ()
    labels = (value for row in given for value in labels_in(task.kind, row) if value is not None)
    by_name = all(name.isdecimal() for name in numbers) or not numbers.keys().isdisjoint(
        {key(str(named(value))) for value in labels}
    )

    def one(value: Any) -> int:
        known = numbers.get(key(str(named(value)))) if value is not None else None
        if known is not None:
            return known
        digits = str(whole(value))
        if not by_name and digits.isdecimal() and int(digits) < len(task.labels):
            return int(digits)
        raise UserError(
            f"{task.name}: {named(value)!r} in column {task.label!r} is no label; expected one of "
            f"{', '.join(task.labels)}" + ("" if by_name else ", or its number from 0")
        )

    return one


def several_coder(task: Task, rows: Dataset, one: Callable[[Any], int]) -> Callable[[Any], list[float]]:
    """What turns a row's classes into a 0 or 1 for each, which they may be already (see `multi_hot`)."""
    hot = multi_hot(rows, task.label) if task.label else 0

    def several(values: Any) -> list[float]:
        if hot == len(task.labels):
            return [float(value) for value in values]
        chosen = [one(value) for value in labels_in(task.kind, values)]
        if len(set(chosen)) < len(chosen):
            raise UserError(
                f"{task.name}: {values!r} in column {task.label!r} names a label twice; expected the names or "
                "numbers of a row's labels"
            )
        return [float(number in chosen) for number in range(len(task.labels))]

    return several


def whole(value: Any) -> Any:
    """A number without a fraction as such, 1.0 and True too, as files have them; anything else as it is."""
    return int(value) if isinstance(value, bool | float) and value == value // 1 else value


def is_ignored(tag: Any) -> bool:
    """Whether a tag marks a word that does not count, as number or as text."""
    return str(whole(tag)) == str(IGNORED)


def labels_in(kind: Kind, value: Any) -> list[Any]:
    """The labels in one row: where there may be several, a CSV file holds them as one text."""
    if kind not in ("tokens", "multi-label"):
        return [value]
    if isinstance(value, str):
        parts = value.split() if kind == "tokens" else value.split(",")
        return [part.strip() for part in parts if part.strip()]
    return value if isinstance(value, list) else [] if value is None else [value]


def multi_hot(rows: Dataset, label: str) -> int:
    """For how many labels each row of a column has a 0 or 1; 0 where rows list their labels.

    Whole numbers are told from a list of labels 0 and 1 by a row that has one of them twice, or 1 before 0.
    """
    column, feature = rows[label][:], rows.features[label]
    if not isinstance(feature, LISTS) or not isinstance(feature.feature, Value) or None in column:
        return 0
    lengths = {len(row) for row in column}
    if len(lengths) > 1 or not {value for row in column for value in row} <= {0, 1}:
        return 0
    listed = "int" in feature.feature.dtype and all(row == sorted(set(row)) for row in column)
    return 0 if listed else lengths.pop()


def class_names(feature: Any) -> list[str] | None:
    """The names of a column's classes, of a list of them too; none where it holds plain values."""
    inner = feature.feature if isinstance(feature, LISTS) else feature
    return inner.names if isinstance(inner, ClassLabel) else None
