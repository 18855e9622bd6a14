"""Arithmetic of scores; evaluation of models is tested by head in test_heads.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import sentences, tiny_config, tiny_model, tokenized_texts
from transformers import BertModel

from fffconvert import UserError, evaluation
from fffconvert.evaluation import (
    closeness,
    cosines,
    evaluate,
    make_scores,
    require_retention,
    score_similarity,
    score_task,
    value_kept,
)
from fffconvert.tasks import TASKS, Task, task_for


def test_the_nearest_are_the_same_some_rows_at_a_time(monkeypatch):
    vectors = np.random.default_rng(0).normal(size=(23, 5)).astype(np.float32)
    whole = evaluation.nearest(vectors)
    similarity = vectors @ vectors.T - 1e9 * np.eye(23, dtype=np.float32)
    assert list(whole) == list(similarity.argmax(1))
    monkeypatch.setattr(evaluation, "ROWS_AT_ONCE", 7)
    assert list(evaluation.nearest(vectors)) == list(whole)


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


def test_splits_have_any_name_and_some_rows(tokenizer):
    model, rows = tiny_model("bert", num_labels=2), tokenized_texts(sentences(6), tokenizer)
    rows = rows.add_column("labels", [0, 1] * 3)
    task = Task("own", ("text",), ("bad", "good"))
    assert evaluate(model, tokenizer, task, {"mine": rows}).metrics.keys() == {"mine"}
    for splits in ({}, {"mine": rows.select([])}):
        with pytest.raises(UserError, match="own has no rows to judge a model by"):
            evaluate(model, tokenizer, task, splits)


def test_dropout_is_off_whatever_mode_the_models_are_in(tokenizer):
    rows = tokenized_texts(sentences(6), tokenizer).add_column("labels", [0, 1] * 3)
    model, teacher = (tiny_model("bert", num_labels=2, hidden_act=act) for act in ("relu", "gelu"))
    task = Task("own", ("text",), ("bad", "good"))
    expected = evaluate(model, tokenizer, task, {"mine": rows}, teacher)
    assert evaluate(model.train(), tokenizer, task, {"mine": rows}, teacher) == expected
    assert evaluate(model, tokenizer, task, {"mine": rows}, teacher.train()) == expected
    assert model.training
    assert teacher.training


def test_a_teacher_with_a_head_is_no_encoders_teacher(tokenizer):
    rows = tokenized_texts(sentences(4), tokenizer)
    encoder, teacher = tiny_model("bert", "AutoModel"), tiny_model("bert")
    task = Task("text", ("text",), metrics=("cosine",), kind="embedding", label=None)
    with pytest.raises(UserError, match="has no head \\(BertModel\\) and the teacher has one"):
        evaluation.evaluate(encoder, tokenizer, task, {"held_out": rows}, teacher)


def test_a_head_that_is_not_the_tasks_is_refused(tokenizer):
    rows = tokenized_texts(sentences(6), tokenizer).add_column("labels", [0, 1] * 3)
    encoder = BertModel(tiny_config())
    with pytest.raises(UserError, match=r"own asks for a model ForSequenceClassification .* is a BertModel"):
        evaluate(encoder, tokenizer, Task("own", ("text",), ("bad", "good")), {"mine": rows})


def test_what_is_not_finite_is_no_answer(tokenizer):
    rows = tokenized_texts(sentences(6), tokenizer).add_column("labels", [0, 1] * 3)
    model = tiny_model("bert", num_labels=2)
    model.classifier.bias.data[0] = np.nan
    with pytest.raises(UserError, match="BertForSequenceClassification gives NaN or infinity"):
        evaluate(model, tokenizer, Task("own", ("text",), ("bad", "good")), {"mine": rows})


def test_neighbours():
    theirs = np.array([[1, 0], [0.8, 0.6], [0, 1]], dtype=np.float32)
    rows = [0, 1, 2]
    assert closeness(theirs, theirs, rows) == {"cosine": pytest.approx(1), "neighbour_agreement": 1}
    assert closeness(theirs[[0, 2, 1]], theirs, rows)["neighbour_agreement"] < 1


def test_a_copy_of_a_text_is_no_neighbour(tokenizer):
    """Else texts that come twice would agree, however far a student is."""
    teacher, student = (tiny_model("bert", "AutoModel", hidden_act=act) for act in ("gelu", "relu"))
    task = Task("text", ("text",), metrics=("cosine",), kind="embedding", label=None)
    once, thrice = (
        evaluate(student, tokenizer, task, {"own": tokenized_texts(texts, tokenizer)}, teacher).agreement
        for texts in (sentences(20), sentences(20) * 3)
    )
    assert once == thrice < 1
    with pytest.raises(UserError, match="has no neighbour"):
        evaluate(teacher, tokenizer, task, {"own": tokenized_texts(["good"] * 3, tokenizer)}, teacher)


def test_one_text_has_no_neighbour(tokenizer) -> None:
    model, rows = BertModel(tiny_config()), tokenized_texts(sentences(1), tokenizer)
    with pytest.raises(UserError, match="has no neighbour to judge by; expected two or more"):
        evaluation.evaluate(model, tokenizer, Task("text", ("text",), kind="embedding"), {"own": rows}, model)


def test_ffns_may_be_told_to_read_a_few_tokens_at_a_time(tokenizer):
    rows = tokenized_texts(sentences(6), tokenizer).add_column("labels", [0, 1] * 3)
    model, teacher = (tiny_model("bert", num_labels=2, hidden_act=act) for act in ("relu", "gelu"))
    task = Task("own", ("text",), ("bad", "good"))
    expected = evaluate(model, tokenizer, task, {"mine": rows}, teacher)
    for module in (*model.modules(), *teacher.modules()):
        if hasattr(module, "chunk_size_feed_forward"):
            module.chunk_size_feed_forward = 1000  # of which no batch is a multiple
    assert evaluate(model, tokenizer, task, {"mine": rows}, teacher) == expected
