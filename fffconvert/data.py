"""Rows to train and to evaluate on: read, drawn, held out and tokenized."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fffconvert.columns import task_of
from fffconvert.encoding import check_rows, check_texts, texts_of, tokenized
from fffconvert.errors import UserError
from fffconvert.files import read_lines
from fffconvert.heads import as_saved, check_judgeable, kind_of
from fffconvert.recipe import MAX_LENGTH, check_seed, check_whole
from fffconvert.sources import (
    Source,
    name_of,
    splits_to_judge,
    train_and_validation_splits,
    train_split,
)
from fffconvert.tasks import Task, check_head
from fffconvert.text import Text, readable_length


@dataclass(frozen=True)
class Data:
    """What to train and to evaluate on.

    Attributes:
        task: What is asked.
        train: The rows to train on, as they were read.
        rows: The same, tokenized.
        validations: Tokenized rows to evaluate on, by split.
    """

    task: Task
    train: Dataset
    rows: Dataset
    validations: dict[str, Dataset]

    @cached_property
    def texts(self) -> list[Text]:
        """The training texts."""
        return texts_of(self.task, self.train)


def read_data(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | PreTrainedConfig | None,
    *,
    data_dir: Path | str | None = None,
    train_rows: int | None = None,
    held_out: int = 0,
    max_length: int = MAX_LENGTH,
    seed: int = 0,
    labelled: bool = True,
    prompt: str = "",
) -> Data:
    """Reads a source, and draws the rows to train on.

    Args:
        source: A GLUE task, a text file, or one's own data.
        tokenizer: The model's.
        model: The model whose head and labels the data is for, or its configuration where it was saved so; none
            where the head is still to be made.
        data_dir: As for `run`.
        train_rows: Rows to train on, drawn at random; all of them if not given.
        held_out: Rows to evaluate on where the data has none of its own; they are never trained on. With 0
            nothing is read to evaluate on.
        max_length: Tokens that a row is cut at.
        seed: Decides what is drawn.
        labelled: Whether labels are wanted; without them a row is text alone.
        prompt: What a sentence encoder has before every text.

    Raises:
        UserError: For data that is missing or malformed, fewer rows than are to be held out, no rows to train on, or a
            seed out of range.
    """
    if not isinstance(source, Source):
        raise UserError(f"source is {source!r}; expected a Task, a Path or a DataSource")
    check_whole("held_out", held_out, 0)
    if train_rows is not None:
        check_whole("train_rows", train_rows, 1)
    check_seed(seed)
    config = None if model is None else as_saved(model)
    if held_out:
        train, validations = train_and_validation_splits(source, data_dir)
    else:
        train, validations = train_split(source, data_dir), {}
    task = prompted(task_of(source, train, config, labelled), prompt)
    check_rows(task, train)  # before any are drawn, so that a row has its number in the data
    check_splits(task, validations)
    if held_out and not validations:
        validations, train = hold_out(name_of(source), train, held_out, seed)
    elif train_rows is not None:
        train = train.shuffle(seed, keep_in_memory=True)
    train = train.select(range(min(train_rows or len(train), len(train))))
    task = replace(task, validations=tuple(validations) or task.validations)
    limit = readable_length(tokenizer, config, max_length)
    return Data(
        task,
        train,
        tokenized(task, train, tokenizer, limit, seed),
        {split: tokenized(task, rows, tokenizer, limit, seed) for split, rows in validations.items()},
    )


def prompted(task: Task, prompt: str) -> Task:
    """The task with a model's prompt before every text; where that has none, with its own."""
    return replace(task, prompt=prompt or task.prompt)


def check_model(source: Source, config: PreTrainedConfig, name: str) -> None:
    """Raises a `UserError` for a model whose head cannot be judged by these rows."""
    if isinstance(source, Task):
        check_head(source, config, name)
    else:
        check_judgeable(config, name)


def hold_out(name: str, train: Dataset, held_out: int, seed: int) -> tuple[dict[str, Dataset], Dataset]:
    """Rows to evaluate on, drawn from those to train on, and the rest of these in random order.

    Raises:
        UserError: For no more rows than are to be held out.
    """
    if len(train) <= held_out:
        raise UserError(
            f"{name} has {len(train)} rows; expected more than the {held_out} to hold out for evaluation "
            "(in a recipe: lower held_out, or name data.validation)"
        )
    train = train.shuffle(seed, keep_in_memory=True)
    return {"held_out": train.select(range(held_out))}, train.select(range(held_out, len(train)))


def read_validations(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | PreTrainedConfig | None,
    *,
    data_dir: Path | str | None = None,
    max_length: int = MAX_LENGTH,
    prompt: str = "",
) -> tuple[Task, dict[str, Dataset]]:
    """The task, and the tokenized rows to evaluate on by split: all rows where there are no splits.

    Takes what `read_data` takes.

    Raises:
        UserError: For data that is missing or malformed.
    """
    config = None if model is None else as_saved(model)
    splits = splits_to_judge(source, data_dir)
    task = prompted(task_of(source, next(iter(splits.values())), config), prompt)
    task = replace(task, validations=tuple(splits))
    check_splits(task, splits)
    limit = readable_length(tokenizer, config, max_length)
    return task, {name: tokenized(task, rows, tokenizer, limit) for name, rows in splits.items()}


def check_splits(task: Task, splits: dict[str, Dataset]) -> None:
    """Raises a `UserError` for splits to evaluate on that lack a column of the task, or hold what it cannot take."""
    for split, rows in splits.items():
        for column in (*task.columns, task.label):
            if column is not None and column not in rows.column_names:
                raise UserError(
                    f"{task.name}: split {split!r} has no column {column!r}; it has {', '.join(rows.column_names)}"
                )
        check_rows(task, rows)


def read_texts(
    source: Source, config: PreTrainedConfig, data_dir: Path | str | None = None, prompt: str = ""
) -> Iterable[Text]:
    """The texts alone, for a model of that configuration to be calibrated on. Raises what `read_data` does of them."""
    if isinstance(source, Path):
        prompt = prompt if kind_of(config) == "embedding" else ""
        return (prompt + line for line in read_lines(source))
    rows = train_split(source, data_dir)
    task = prompted(task_of(source, rows, config, labelled=False), prompt)
    check_texts(task, rows)
    return texts_of(task, rows)
