"""How good a model is, beside its teacher and for how many neurons."""

from __future__ import annotations

import reprlib
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fffconvert.distillation import check_pair
from fffconvert.errors import UserError
from fffconvert.heads import HEAD_OF, class_name
from fffconvert.inference import embed, hidden_error, predict
from fffconvert.labels import IGNORED
from fffconvert.metrics import Answers, agreement, compute_metrics
from fffconvert.modeling import dense_neurons, is_converted, shape_of
from fffconvert.tasks import Task

ROWS_AT_ONCE = 1024  # of the similarities of all texts to all others

Outputs = dict[str, Answers]
"""Per validation split, one answer (see `fffconvert.metrics`) for each row of data."""


@dataclass(frozen=True)
class Scores:
    """One model's result, with the neurons that it took.

    Attributes:
        task: The task's name, or `text` for plain text.
        metric: The task's first metric; `cosine` for an encoder, `agreement` for other models on text alone.
        score: Its value on the first validation split; for an encoder the mean cosine of its sentence
            embeddings to the teacher's.
        teacher_score: The teacher's; none without a teacher.
        retention: `score / teacher_score`, none unless that is above 0. It flatters: a model without FFNs can have 98%
            (see the controls).
        agreement: Share of rows, or of tokens, on which model and teacher decide the same; for regression
            the Pearson correlation of their outputs; for an encoder the share of texts whose nearest
            neighbour is the same, copies of a text apart.
        hidden_error: Relative squared error of the hidden states, summed over the layers: the mean over the first
            rows of the first split (see `fffconvert.distillation.hidden_errors`). None without a teacher.
        active_neurons: Neurons that one token uses in each layer, routers included.
        dense_neurons: Neurons of one dense FFN.
        share: `active_neurons / dense_neurons`.
        metrics: Every metric on every validation split.
    """

    task: str
    metric: str
    score: float
    teacher_score: float | None
    retention: float | None
    agreement: float | None
    active_neurons: float
    dense_neurons: int
    share: float
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    hidden_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `--json` and `report.json` hold them."""
        return asdict(self)


def value_kept(student: float, removed: float, teacher: float) -> float | None:
    """The FFN's value that a student keeps: 0 for no FFN, 1 for the teacher; none where the FFN has no value."""
    return (student - removed) / (teacher - removed) if teacher > removed else None


def require_retention(retention: float | None, least: float | None, report: Path | None) -> None:
    """Raises a `UserError` for a retention below the one asked for; the line says where the report is.

    Args:
        retention: The student's score divided by the teacher's; none where that has no meaning.
        least: What was asked for; none asks for nothing.
        report: The file that holds all that was measured.
    """
    if least is None or (retention is not None and retention >= least):
        return
    found = "cannot be told" if retention is None else f"is {100 * retention:.2f}%"
    where = f"; the report is in {report}" if report else ""
    raise UserError(f"retention {found}; at least {100 * least:.2f}% was asked for{where}")


def active_neurons(config: PreTrainedConfig) -> float:
    """Neurons that one token uses in each layer of a converted or a dense model."""
    return shape_of(config).active_neurons if is_converted(config) else float(dense_neurons(config))


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
        if not isinstance(task, Task) or not isinstance(validations, dict):
            raise UserError(
                f"task is {reprlib.repr(task)} and validations {reprlib.repr(validations)}; expected a Task, and "
                "tokenized rows by split, as read_data gives them"
            )
        if teacher is None and not task.is_labelled:
            raise UserError(
                f"{task.name} has no labels, so a model is judged by how close it is to its teacher: "
                "name it with --teacher"
            )
        if not validations or not all(len(rows) for rows in validations.values()):
            raise UserError(f"{task.name} has no rows to judge a model by; expected some in every split")
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
        if self.task.kind in ("embedding", "similarity"):
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
        head, ours = HEAD_OF.get(self.task.kind, ""), class_name(model)
        if not ours.endswith(head):
            raise UserError(
                f"{self.task.name} asks for a model {head} ({self.task.kind}); this one is a {ours}"
            )
        if self.teacher is not None:
            if head == "" and "For" in class_name(self.teacher):
                raise UserError(
                    f"the model has no head ({ours}) and the teacher has one ({class_name(self.teacher)}); "
                    "expected the encoder that the model was made from"
                )
            check_pair(model, self.teacher)
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


def score_task(
    config: PreTrainedConfig, task: Task, labels: Outputs, ours: Outputs, theirs: Outputs | None
) -> Scores:
    """Scores answers against the truth and beside the teacher's answers."""
    metrics = {split: compute_metrics(task, answers, labels[split]) for split, answers in ours.items()}
    first, metric = next(iter(ours)), task.metrics[0]
    teacher_score = agreed = None
    if theirs is not None:
        teacher_score = compute_metrics(task, theirs[first], labels[first])[metric]
        agreed = agreement(task, ours[first], theirs[first])
    return make_scores(config, task, metric, metrics, teacher_score, agreed)


def score_agreement(config: PreTrainedConfig, task: Task, ours: Outputs, theirs: Outputs) -> Scores:
    """Scores answers where there is no truth but the teacher."""
    metrics = {split: {"agreement": agreement(task, ours[split], theirs[split])} for split in ours}
    agreed = next(iter(metrics.values()))["agreement"]
    return make_scores(config, task, "agreement", metrics, 1.0, agreed)


def score_similarity(
    config: PreTrainedConfig,
    task: Task,
    labels: Outputs,
    ours: Outputs,
    theirs: Outputs | None,
    distinct: dict[str, list[int]],
) -> Scores:
    """Scores the cosine of each pair of embeddings as an answer, and their closeness to the teacher's."""
    scores = score_task(config, task, labels, cosines(ours), cosines(theirs) if theirs is not None else None)
    if theirs is None:
        return scores
    near = score_encoder(config, task, ours, theirs, distinct).metrics
    return replace(
        scores, metrics={split: {**found, **near[split]} for split, found in scores.metrics.items()}
    )


def cosines(outputs: Outputs) -> Outputs:
    """The cosine of each pair, `(n_pairs, 1)`, of unit vectors `(2 * n_pairs, d)`: first texts, then second."""
    return {
        split: (first * second).sum(1, keepdims=True)
        for split, (first, second) in ((s, np.split(np.asarray(found), 2)) for s, found in outputs.items())
    }


def score_encoder(
    config: PreTrainedConfig, task: Task, ours: Outputs, theirs: Outputs, distinct: dict[str, list[int]]
) -> Scores:
    """Scores sentence embeddings `(n_texts, d_model)` by how close they are to the teacher's."""
    metrics = {s: closeness(np.asarray(ours[s]), np.asarray(theirs[s]), distinct[s]) for s in ours}
    agreed = next(iter(metrics.values()))["neighbour_agreement"]
    return make_scores(config, task, "cosine", metrics, 1.0, agreed)


def closeness(
    ours: NDArray[np.float32], theirs: NDArray[np.float32], distinct: list[int]
) -> dict[str, float]:
    """How close unit vectors `(n_texts, d_model)` are to the teacher's of the same texts; neighbours are `distinct`."""
    return {
        "cosine": float((ours * theirs).sum(1).mean()),
        "neighbour_agreement": float((nearest(ours[distinct]) == nearest(theirs[distinct])).mean()),
    }


def make_scores(
    config: PreTrainedConfig,
    task: Task,
    metric: str,
    metrics: dict[str, dict[str, float]],
    teacher_score: float | None,
    agreed: float | None,
) -> Scores:
    """The result by one metric on the first split, with what the model's configuration says of its cost."""
    active, dense = active_neurons(config), dense_neurons(config)
    score = next(iter(metrics.values()))[metric]
    return Scores(
        task=task.name,
        metric=metric,
        score=score,
        teacher_score=teacher_score,
        retention=score / teacher_score if teacher_score and teacher_score > 0 else None,
        agreement=agreed,
        active_neurons=active,
        dense_neurons=dense,
        share=active / dense,
        metrics=metrics,
    )


def truth(task: Task, rows: Dataset) -> Answers:
    """What is right in each row, as `fffconvert.metrics` takes it."""
    if task.kind == "question":
        return np.stack([rows["start_positions"], rows["end_positions"]], axis=1)
    if task.kind in ("tokens", "masked"):
        return [label[label != IGNORED] for label in map(np.asarray, rows["labels"])]
    labels = np.asarray(rows["labels"])
    return labels[: len(labels) // 2] if task.kind == "similarity" else labels


def distinct_rows(rows: Dataset) -> list[int]:
    """The numbers of the rows whose text no row before has."""
    first: dict[tuple[int, ...], int] = {}
    for number, ids in enumerate(rows["input_ids"]):
        first.setdefault(tuple(ids), number)
    return list(first.values())


def nearest(vectors: NDArray[np.float32]) -> NDArray[np.intp]:
    """For each row the number of the row closest to it, `(n_texts,)`."""
    found = []
    for start in range(0, len(vectors), ROWS_AT_ONCE):
        similarity = vectors[start : start + ROWS_AT_ONCE] @ vectors.T  # (n_at_once, n_texts)
        np.fill_diagonal(similarity[:, start:], -np.inf)
        found.append(similarity.argmax(1))
    return np.concatenate(found)
