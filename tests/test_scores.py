"""Arithmetic of scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_config

from fffconvert import UserError, scores
from fffconvert.scores import (
    closeness,
    cosines,
    make_scores,
    require_retention,
    score_similarity,
    score_task,
    value_kept,
)
from fffconvert.tasks import TASKS, task_for


def test_the_nearest_are_the_same_some_rows_at_a_time(monkeypatch):
    vectors = np.random.default_rng(0).normal(size=(23, 5)).astype(np.float32)
    whole = scores.nearest(vectors)
    similarity = vectors @ vectors.T - 1e9 * np.eye(23, dtype=np.float32)
    assert list(whole) == list(similarity.argmax(1))
    monkeypatch.setattr(scores, "ROWS_AT_ONCE", 7)
    assert list(scores.nearest(vectors)) == list(whole)
    monkeypatch.setattr(scores, "MOST_NEIGHBOURS", 14)
    assert list(scores.nearest(vectors)) == list(whole)[:14]


def test_value_kept():
    assert value_kept(0.8, 0.6, 1.0) == pytest.approx(0.5)
    assert value_kept(0.5, 0.6, 1.0) == pytest.approx(-0.25)
    assert value_kept(0.8, 0.9, 0.9) is None
    assert value_kept(0.8, 0.95, 0.9) is None  # an FFN that is worth less than nothing


def test_retention_has_no_meaning_without_a_teacher_or_where_it_is_no_good():
    for teacher, expected in ((0.8, 0.5), (None, None), (0.0, None), (-0.1, None)):
        metrics = {"validation": {"accuracy": 0.4}}
        found = make_scores(tiny_config(), TASKS["sst2"], "accuracy", metrics, teacher, None)
        assert found.retention == expected
    assert (found.active_neurons, found.share) == (32, 1)


@pytest.mark.parametrize(
    ("retention", "least", "message"),
    [
        (0.9, None, None),
        (0.9, 0.9, None),
        (0.89, 0.9, "retention is 89.00%; at least 90.00% was asked for; the report is in here.json"),
        (None, 0.9, "retention cannot be told"),
    ],
)
def test_the_guard(retention, least, message):
    if message is None:
        require_retention(retention, least, None)
        return
    with pytest.raises(UserError, match=message):
        require_retention(retention, least, Path("here.json"))


def test_the_first_split_counts_and_all_are_kept():
    task, labels = TASKS["mnli"], {name: np.array([0, 1, 2, 0]) for name in TASKS["mnli"].validations}
    right, half = np.eye(3)[[0, 1, 2, 0]], np.eye(3)[[0, 1, 0, 1]]
    ours = dict(zip(task.validations, (half, right), strict=True))
    theirs = dict.fromkeys(task.validations, right)
    found = score_task(tiny_config(), task, labels, ours, theirs)
    assert (found.score, found.teacher_score, found.retention, found.agreement) == (0.5, 1.0, 0.5, 0.5)
    assert [metrics["accuracy"] for metrics in found.metrics.values()] == [0.5, 1.0]


def test_pairs_of_embeddings_are_judged_by_their_cosine():
    config = tiny_config()
    config.architectures = ["BertModel"]
    task = task_for(config, TASKS["stsb"])
    first, second = np.eye(4)[[0, 1, 2]], np.array([[1.0, 0, 0, 0], [0, 0.6, 0.8, 0], [0, 0, 0, 1.0]])
    given = {"validation": np.concatenate([first, second])}
    assert cosines(given)["validation"][:, 0] == pytest.approx([1, 0.6, 0])
    labels = {"validation": np.array([5.0, 3.0, 1.0])}
    distinct = {"validation": [*range(6)]}
    found = score_similarity(config, task, labels, given, given, distinct)
    assert found.score == pytest.approx(1)
    assert found.metrics["validation"]["cosine"] == pytest.approx(1)
    alone = score_similarity(config, task, labels, given, None, distinct)
    assert "cosine" not in alone.metrics["validation"]
    assert alone.teacher_score is None


def test_neighbours():
    theirs = np.array([[1, 0], [0.8, 0.6], [0, 1]], dtype=np.float32)
    ours, given, distinct = {"own": theirs[[0, 2, 1]]}, {"own": theirs}, {"own": [0, 1, 2]}
    assert closeness(given, given, distinct)["own"] == {"cosine": pytest.approx(1), "neighbour_agreement": 1}
    assert closeness(ours, given, distinct)["own"]["neighbour_agreement"] < 1
