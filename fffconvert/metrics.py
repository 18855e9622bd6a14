"""Metrics and agreement: from what models answer, and the truth, to numbers.

An *answer* is what evaluation keeps of a model's output for one row: its logits `(n_outputs,)`; for `tokens` the
class at every token that counts, `(n_counted,)`; for `masked` the token and the logarithm of the true token's
probability there, `(n_counted, 2)`; for `question` the first and last token of the span, `(2,)`.
The truth has the same rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from fffconvert.errors import UserError
from fffconvert.tasks import Task

LARGEST_LOSS = 700.0  # whose exponential is a number still, as JSON asks

LAST, ALONE = ("E", "L"), ("S", "U")
"""Prefixes of tags, besides `B` and `I`, of the last word of an entity and of an only one: IOBES and BILOU."""

Answers = NDArray[Any] | Sequence[NDArray[Any]]
"""One answer for each row; an array where all have the same shape."""


def predictions(task: Task, answers: Answers) -> NDArray[Any]:
    """What a model decides: `(n_rows,)`, of token tasks `(n_counted,)`; several numbers make one decision."""
    if task.kind == "tokens":
        return np.concatenate(answers)
    if task.kind == "masked":
        return np.concatenate(answers)[:, 0]
    logits = np.asarray(answers)
    if task.is_regression:
        return logits[:, 0]
    if task.kind == "multi-label":
        return (logits > 0).astype(int)
    return logits if task.kind == "question" else logits.argmax(1)


def compute_metrics(task: Task, answers: Answers, labels: Answers) -> dict[str, float]:
    """The task's metrics.

    Args:
        task: The task.
        answers: A model's answers.
        labels: The truth.

    Raises:
        UserError: Where no row has a word that counts.
    """
    if predictions(task, answers).size == 0:
        raise UserError(f"{task.name} has nothing to judge: no row has a word that counts")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that nobody predicts
        return {name: float(_METRICS[name](task, answers, labels)) for name in task.metrics}


def agreement(task: Task, ours: Answers, theirs: Answers) -> float:
    """Share of decisions that two models share, or how their regressed numbers correlate."""
    a, b = predictions(task, ours), predictions(task, theirs)
    if not task.is_regression:
        return float((a == b).reshape(len(a), -1).all(1).mean())
    return correlation(pearsonr, a, b)


def correlation(statistic: Any, a: NDArray[Any], b: NDArray[Any]) -> float:
    """A correlation, one of SciPy's; 0 where it is not defined: of one row, or with a constant."""
    if len(a) < 2:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a constant has no correlation
        value = float(statistic(a, b).statistic)
    return 0.0 if np.isnan(value) else value


def _truth(task: Task, labels: Answers) -> NDArray[Any]:
    return np.concatenate(labels) if task.is_per_token else np.asarray(labels)


def _on_decisions(metric: Any, **options: Any) -> Any:
    """A metric of scikit-learn, or a correlation, on truth and decisions."""

    def compute(task: Task, answers: Answers, labels: Answers) -> Any:
        return metric(_truth(task, labels), predictions(task, answers), **options)

    return compute


def span_f1(_task: Task, answers: Answers, labels: Answers) -> float:
    """Overlap of predicted and true spans, counted in tokens: the mean F1 over the rows."""
    a, b = np.asarray(answers), np.asarray(labels)
    shared = np.minimum(a[:, 1], b[:, 1]) - np.maximum(a[:, 0], b[:, 0]) + 1
    total = (a[:, 1] - a[:, 0] + 1) + (b[:, 1] - b[:, 0] + 1)
    return float((2 * np.maximum(shared, 0) / total).mean())


def entity_f1(task: Task, answers: Answers, labels: Answers) -> float:
    """F1 over the entities of all rows together; one is right if both its ends and its type are."""
    found, true = (
        {
            (row, *entity)
            for row, tags in enumerate(rows)
            for entity in entities([task.labels[tag] for tag in tags])
        }
        for rows in (answers, labels)
    )
    return 2 * len(found & true) / max(1, len(found) + len(true))


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Type, first word and word behind the last of each entity that tags mark: IOB, IOBES or BILOU.

    As CoNLL's own script reads them: an `I-` that follows no tag of its type starts an entity too.
    """
    found, kind, start = set(), "", 0
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, tagged = tag.partition("-")
        if kind and (prefix not in ("I", *LAST) or tagged != kind):
            found.add((kind, start, place))
            kind = ""
        if prefix in ("B", "I", *LAST, *ALONE) and tagged and not kind:
            kind, start = tagged, place
        if prefix in (*LAST, *ALONE) and kind:
            found.add((kind, start, place + 1))
            kind = ""
    return found


def micro_f1(labels: NDArray[np.int64], decided: NDArray[np.int64]) -> float:
    """F1 over all labels of all rows, `(n_rows, n_labels)` each; scikit-learn takes one column for two classes."""
    return float(f1_score(labels.ravel(), decided.ravel()))


def loss(_task: Task, answers: Answers, _labels: Answers) -> float:
    """Cross-entropy at the masked places, in nats."""
    return float(-np.concatenate(answers)[:, 1].mean())


_METRICS = {
    "accuracy": _on_decisions(accuracy_score),
    "f1": _on_decisions(f1_score),
    "macro_f1": _on_decisions(f1_score, average="macro"),
    "micro_f1": _on_decisions(micro_f1),
    "matthews_correlation": _on_decisions(matthews_corrcoef),
    "pearson": _on_decisions(partial(correlation, pearsonr)),
    "spearman": _on_decisions(partial(correlation, spearmanr)),
    "entity_f1": entity_f1,
    "span_f1": span_f1,
    "exact_match": agreement,  # of spans at both ends
    "loss": loss,
    "perplexity": lambda *given: np.exp(min(loss(*given), LARGEST_LOSS)),
}
