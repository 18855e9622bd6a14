"""What a model's answers are worth, beside those of its teacher."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from fffconvert.configuration import active_neurons, dense_neurons
from fffconvert.errors import UserError
from fffconvert.metrics import Answers, agreement, compute_metrics
from fffconvert.tasks import Task

ROWS_AT_ONCE = 1024  # of the similarities of texts to all others
MOST_NEIGHBOURS = 4096  # texts whose nearest neighbours are compared

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
            the Pearson correlation of their outputs; for an encoder the share of the first 4,096 texts
            whose nearest neighbour among all is the same, copies of a text apart.
        hidden_error: Relative squared error of the hidden states, summed over the layers: the mean over the first
            rows of the first split (see `fffconvert.loss.hidden_errors`). None without a teacher.
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
    near = closeness(ours, theirs, distinct)
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
    metrics = closeness(ours, theirs, distinct)
    agreed = next(iter(metrics.values()))["neighbour_agreement"]
    return make_scores(config, task, "cosine", metrics, 1.0, agreed)


def closeness(ours: Outputs, theirs: Outputs, distinct: dict[str, list[int]]) -> dict[str, dict[str, float]]:
    """By split, how close unit vectors `(n_texts, d_model)` are to the teacher's; neighbours are among `distinct`."""
    found = {}
    for split, rows in distinct.items():
        a, b = np.asarray(ours[split]), np.asarray(theirs[split])
        found[split] = {
            "cosine": float((a * b).sum(1).mean()),
            "neighbour_agreement": float((nearest(a[rows]) == nearest(b[rows])).mean()),
        }
    return found


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


def nearest(vectors: NDArray[np.float32]) -> NDArray[np.intp]:
    """For each of the first `MOST_NEIGHBOURS` rows the number of the row closest to it, of all."""
    found = []
    for start in range(0, min(len(vectors), MOST_NEIGHBOURS), ROWS_AT_ONCE):
        similarity = vectors[start : start + ROWS_AT_ONCE] @ vectors.T  # (n_at_once, n_texts)
        np.fill_diagonal(similarity[:, start:], -np.inf)
        found.append(similarity.argmax(1))
    return np.concatenate(found)
