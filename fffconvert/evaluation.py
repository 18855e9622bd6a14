"""Models judged by the rows of a task, beside their teacher."""

from __future__ import annotations

import reprlib
from dataclasses import replace
from functools import cached_property

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fffconvert.errors import UserError
from fffconvert.heads import HEAD_BY_KIND, class_name
from fffconvert.inference import embed, hidden_error, predict
from fffconvert.labels import IGNORED
from fffconvert.loader import check_tokenized
from fffconvert.metrics import Answers
from fffconvert.modeling import check_is_model
from fffconvert.pair import check_pair
from fffconvert.scores import (
    Outputs,
    Scores,
    score_agreement,
    score_encoder,
    score_similarity,
    score_task,
)
from fffconvert.tasks import Task


class Judge:
    """Scores any number of models beside one teacher, whose outputs are computed once.

    Args:
        tokenizer: The tokenizer of teacher and models.
        task: The task; an encoder is judged by its embeddings.
        validations: Tokenized rows by split.
        teacher: The model to compare with; a task with labels can do without.
        pooling: How an encoder makes sentence embeddings; the mean over the tokens without it.

    Raises:
        UserError: For a task without labels and no teacher to compare with, or no rows; for what is no task.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        validations: dict[str, Dataset],
        teacher: PreTrainedModel | None,
        pooling: nn.Module | None = None,
    ) -> None:
        check_judged(task, validations, teacher)
        self.tokenizer, self.task, self.validations, self.teacher = tokenizer, task, validations, teacher
        self.pooling = pooling
        if task.kind == "embedding" and any(len(rows) < 2 for rows in self.distinct.values()):
            raise UserError(
                f"{task.name} has one text, which has no neighbour to judge by; expected two or more"
            )

    @cached_property
    def theirs(self) -> Outputs | None:
        """What the teacher gives."""
        return self.outputs_of(self.teacher) if self.teacher is not None else None

    @cached_property
    def distinct(self) -> dict[str, list[int]]:
        """By split, the numbers of the rows whose text no row before has: a copy would be anybody's nearest."""
        return {split: distinct_rows(rows) for split, rows in self.validations.items()}

    def outputs_of(self, model: PreTrainedModel) -> Outputs:
        """A model's answers on every split; for an encoder embeddings `(n_rows, d_model)`."""
        if self.task.is_embedded:
            return {
                split: embed(model, self.tokenizer, self.pooling, rows, split)
                for split, rows in self.validations.items()
            }
        return {
            split: predict(model, self.tokenizer, self.task, rows, split)
            for split, rows in self.validations.items()
        }

    def __call__(self, model: PreTrainedModel) -> Scores:
        """Scores a model, dense or converted.

        Raises:
            UserError: For a model whose head is not the task's, or whose outputs cannot be compared with the teacher's.
        """
        check_comparable(self.task, model, self.teacher)
        scores = self.score_outputs(model)
        if self.teacher is None:
            return scores
        rows = next(iter(self.validations.values()))
        return replace(scores, hidden_error=hidden_error(model, self.teacher, self.tokenizer, rows))

    def score_outputs(self, model: PreTrainedModel) -> Scores:
        """Scores without the hidden states' error."""
        ours = self.outputs_of(model)
        if not self.task.is_labelled:
            assert self.theirs is not None  # as __init__ asks
            if self.task.kind == "embedding":
                return score_encoder(model.config, self.task, ours, self.theirs, self.distinct)
            return score_agreement(model.config, self.task, ours, self.theirs)
        labels = {split: truth(self.task, rows) for split, rows in self.validations.items()}
        if self.task.kind == "similarity":
            return score_similarity(model.config, self.task, labels, ours, self.theirs, self.distinct)
        return score_task(model.config, self.task, labels, ours, self.theirs)


def check_judged(task: Task, validations: dict[str, Dataset], teacher: PreTrainedModel | None) -> None:
    """Raises a `UserError` for rows that no model can be judged by."""
    if not isinstance(task, Task) or not isinstance(validations, dict):
        raise UserError(
            f"task is {reprlib.repr(task)} and validations {reprlib.repr(validations)}; expected a Task, and "
            "tokenized rows by split, as read_data gives them"
        )
    for rows in validations.values():
        check_tokenized(rows)
    if teacher is None and not task.is_labelled:
        raise UserError(
            f"{task.name} has no labels, so a model is judged by how close it is to its teacher: "
            "name it with --teacher"
        )
    if not validations or not all(len(rows) for rows in validations.values()):
        raise UserError(f"{task.name} has no rows to judge a model by; expected some in every split")


def check_comparable(task: Task, model: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
    """Raises a `UserError` for a model whose head is not the task's, or a teacher that it cannot be compared with."""
    check_is_model(model)
    head, ours = HEAD_BY_KIND.get(task.kind, ""), class_name(model)
    if not ours.endswith(head):
        raise UserError(f"{task.name} asks for a model {head} ({task.kind}); this one is a {ours}")
    if teacher is None:
        return
    if head == "" and "For" in class_name(teacher):
        raise UserError(
            f"the model has no head ({ours}) and the teacher has one ({class_name(teacher)}); "
            "expected the encoder that the model was made from"
        )
    check_pair(model, teacher)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    validations: dict[str, Dataset],
    teacher: PreTrainedModel | None = None,
    pooling: nn.Module | None = None,
) -> Scores:
    """Scores one model, beside its teacher where there is one.

    Under `accelerate launch` the rows are shared out over the processes, and none counts twice.

    Args:
        model: The model, converted or dense.
        tokenizer: Its tokenizer.
        task: The task.
        validations: Tokenized rows for each validation split (see `fffconvert.data.read_validations`).
        teacher: The model to compare with.
        pooling: How an encoder makes sentence embeddings; the mean over the tokens without it.

    Raises:
        UserError: For a task without labels and no teacher to compare with, or a teacher that cannot be compared.
    """
    return Judge(tokenizer, task, validations, teacher, pooling)(model)


def truth(task: Task, rows: Dataset) -> Answers:
    """What is right in each row, as `fffconvert.metrics` takes it."""
    if task.kind == "question":
        return np.stack([rows["start_positions"], rows["end_positions"]], axis=1)
    if task.is_per_token:
        return [label[label != IGNORED] for label in map(np.asarray, rows["labels"])]
    labels = np.asarray(rows["labels"])
    return labels[: len(labels) // 2] if task.kind == "similarity" else labels


def distinct_rows(rows: Dataset) -> list[int]:
    """The numbers of the rows whose text no row before has."""
    first: dict[tuple[int, ...], int] = {}
    for number, ids in enumerate(rows["input_ids"]):
        first.setdefault(tuple(ids), number)
    return list(first.values())
