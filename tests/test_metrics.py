"""Metrics: hand-made answers, then what holds for any."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fffconvert.errors import UserError
from fffconvert.heads import Kind
from fffconvert.metrics import agreement, compute_metrics, entities, predictions
from fffconvert.tasks import METRICS, TASKS, Task


def task_of(kind: Kind, labels: tuple[str, ...] = (), *metrics: str) -> Task:
    return Task("own", ("text",), labels, metrics or METRICS[kind], kind=kind)


# ---- One row, one decision


def test_classification() -> None:
    task = task_of("classification", ("a", "b", "c"))
    logits = np.eye(3)[[0, 1, 1, 2]]
    labels = np.array([0, 1, 2, 2])
    found = compute_metrics(task, logits, labels)
    assert found == pytest.approx({"accuracy": 3 / 4, "macro_f1": (1 + 2 / 3 + 2 / 3) / 3})
    assert agreement(task, logits, np.eye(3)[[0, 1, 2, 0]]) == 1 / 2


def test_several_classes_at_once() -> None:
    task = task_of("multi-label", ("a", "b"))
    logits, labels = np.array([[1.0, -1], [2, 3], [-1, -1]]), np.array([[1, 0], [1, 0], [0, 0]])
    assert predictions(task, logits).tolist() == [[1, 0], [1, 1], [0, 0]]
    assert compute_metrics(task, logits, labels) == pytest.approx({"micro_f1": 4 / 5, "accuracy": 2 / 3})
    assert agreement(task, logits, -logits) == 0


def test_one_label_that_may_be_absent_is_no_choice_of_two_classes() -> None:
    task, labels = task_of("multi-label", ("a",)), np.array([[1.0], [0], [0], [1]])
    silent, half = np.full((4, 1), -1.0), np.array([[1.0], [-1], [-1], [-1]])
    assert compute_metrics(task, silent, labels) == {"micro_f1": 0, "accuracy": 1 / 2}
    assert compute_metrics(task, half, labels)["micro_f1"] == pytest.approx(2 / 3)


def test_regression() -> None:
    task, x = task_of("regression"), np.array([[1.0], [2], [4]])
    assert compute_metrics(task, 3 * x + 1, x[:, 0]) == pytest.approx({"pearson": 1, "spearman": 1})
    assert compute_metrics(task, np.ones((3, 1)), x[:, 0]) == {"pearson": 0, "spearman": 0}
    bent = compute_metrics(task, x**3, x[:, 0])
    assert bent["pearson"] < 0.99 < bent["spearman"]
    assert agreement(task, x, x**3) == pytest.approx(bent["pearson"])
    assert agreement(task, x, -x) == pytest.approx(-1)
    assert agreement(task, x, np.ones((3, 1))) == 0


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5]], ids=str)
def test_a_correlation_that_is_not_defined_is_zero(values: list[float]) -> None:
    task, answers = task_of("regression"), np.array(values)[:, None]
    assert compute_metrics(task, answers, np.array(values)) == {"pearson": 0.0, "spearman": 0.0}
    assert agreement(task, answers, answers) == 0.0


def test_glue_has_its_own() -> None:
    logits, labels = np.eye(2)[[1, 1, 0, 0]], np.array([1, 0, 0, 0])
    assert compute_metrics(TASKS["mrpc"], logits, labels) == pytest.approx({"accuracy": 3 / 4, "f1": 2 / 3})
    expected = {"matthews_correlation": 1 / np.sqrt(3)}
    assert compute_metrics(TASKS["cola"], logits, labels) == pytest.approx(expected)


# ---- Tokens


def test_entities_by_hand() -> None:
    assert entities("O B-PER I-PER O B-LOC".split()) == {("PER", 1, 3), ("LOC", 4, 5)}  # noqa: SIM905
    assert entities("B-PER B-PER I-LOC I-PER".split()) == {  # noqa: SIM905
        ("PER", 0, 1),
        ("PER", 1, 2),
        ("LOC", 2, 3),
        ("PER", 3, 4),
    }
    assert entities([]) == set()


@pytest.mark.parametrize(("last", "alone"), ["ES", "LU"], ids=["IOBES", "BILOU"])
def test_entities_whose_last_words_are_marked(last: str, alone: str) -> None:
    tags = f"B-PER {last}-PER {alone}-PER {alone}-PER O B-LOC I-LOC {last}-LOC {last}-LOC"
    assert entities(tags.split()) == {
        ("PER", 0, 2),
        ("PER", 2, 3),
        ("PER", 3, 4),
        ("LOC", 5, 8),
        ("LOC", 8, 9),
    }


TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


@given(st.lists(st.sampled_from(TAGS), max_size=12))
@settings(max_examples=200, deadline=None)
def test_entities_hold_every_tagged_word_once(tags: list[str]) -> None:
    found = entities(tags)
    inside = sorted(place for _, start, end in found for place in range(start, end))
    assert inside == [place for place, tag in enumerate(tags) if tag != "O"]
    for kind, start, end in found:
        assert {tag[2:] for tag in tags[start:end]} == {kind}
        assert all(tag[0] == "I" for tag in tags[start + 1 : end])


def test_entity_f1_counts_whole_entities() -> None:
    """True: PER at 0-2 and LOC at 3, and PER at 0; found: PER cut short, LOC, and nothing."""
    task = task_of("tokens", TAGS, "entity_f1", "accuracy")
    labels = [np.array([1, 2, 0, 3]), np.array([1])]
    answers = [np.array([1, 0, 0, 3]), np.array([0])]
    assert compute_metrics(task, answers, labels) == pytest.approx({"entity_f1": 2 / 5, "accuracy": 3 / 5})
    assert compute_metrics(task, labels, labels) == {"entity_f1": 1, "accuracy": 1}
    nothing = [np.array([0, 0])]
    assert compute_metrics(task, nothing, nothing)["entity_f1"] == 0
    assert agreement(task, answers, labels) == pytest.approx(3 / 5)


def test_an_entity_does_not_reach_into_the_next_row() -> None:
    task = task_of("tokens", TAGS, "entity_f1")
    apart, together = [np.array([1]), np.array([2])], [np.array([1, 2]), np.array([], int)]
    assert compute_metrics(task, apart, together)["entity_f1"] == 0


def test_masked_words() -> None:
    task = task_of("masked")
    answers = [np.array([[7, np.log(0.5)], [8, np.log(0.25)]]), np.array([[9, np.log(0.5)]])]
    labels = [np.array([7, 1]), np.array([9])]
    found = compute_metrics(task, answers, labels)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["loss"] == pytest.approx(4 / 3 * np.log(2))
    assert found["perplexity"] == pytest.approx(2 ** (4 / 3))
    hopeless = [np.array([[7, -1e6], [8, -1e6]]), np.array([[9, -1e6]])]
    assert 1e300 < compute_metrics(task, hopeless, labels)["perplexity"] < np.inf
    assert agreement(task, answers, [answers[0], np.array([[1, 0.0]])]) == pytest.approx(2 / 3)


# ---- Spans


def test_spans_by_hand() -> None:
    task = task_of("question")
    labels = np.array([[2, 5], [3, 3], [1, 2], [0, 0]])
    answers = np.array([[2, 5], [4, 4], [2, 4], [0, 0]])
    # shares 4 of 4 and 4, none, 1 of 3 and 2, and the sign for no answer
    expected = {"span_f1": (1 + 0 + 2 / 5 + 1) / 4, "exact_match": 1 / 2}
    assert compute_metrics(task, answers, labels) == pytest.approx(expected)
    assert agreement(task, answers, labels) == 1 / 2


SPAN = st.tuples(st.integers(0, 8), st.integers(0, 8)).map(sorted)


@given(SPAN, SPAN)
@settings(max_examples=200, deadline=None)
def test_span_f1_is_the_f1_of_the_tokens(a: list[int], b: list[int]) -> None:
    ours, theirs = set(range(a[0], a[1] + 1)), set(range(b[0], b[1] + 1))
    precision, recall = len(ours & theirs) / len(ours), len(ours & theirs) / len(theirs)
    expected = 2 * precision * recall / (precision + recall) if ours & theirs else 0
    found = compute_metrics(task_of("question"), np.array([a]), np.array([b]))
    assert found["span_f1"] == pytest.approx(expected)
    assert found["exact_match"] == (a == b)


@pytest.mark.parametrize("kind", ["tokens", "masked"])
def test_rows_without_a_word_are_refused(kind: Kind) -> None:
    nothing = [np.zeros((0, 2)) if kind == "masked" else np.zeros(0, int)] * 2
    with pytest.raises(UserError, match="own has nothing to judge: no row has a word that counts"):
        compute_metrics(task_of(kind), nothing, nothing)
