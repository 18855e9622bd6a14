"""The loss of a student, against hand-computed values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from fffconvert.loss import distillation_loss, logit_error, relative_error

MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])  # two rows of two tokens and one


def test_hidden_error_is_relative_per_row_and_blind_to_padding() -> None:
    theirs = torch.tensor([[[1.0, 2.0], [0.0, 2.0], [5.0, 5.0]], [[2.0, 0.0], [7.0, 7.0], [7.0, 7.0]]])
    ours = torch.tensor([[[1.0, 0.0], [1.0, 2.0], [9.0, 9.0]], [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
    # row 1: (4 + 1) / (1 + 4 + 4); row 2: 4 / 4
    torch.testing.assert_close(relative_error(ours, theirs, MASK.float()), torch.tensor([5 / 9, 1.0]))


def test_hidden_states_whose_squares_are_too_large_for_half_precision() -> None:
    theirs = torch.full((2, 3, 8), 300.0, dtype=torch.float16)
    found = relative_error(theirs * 1.5, theirs, MASK.float())
    torch.testing.assert_close(found, torch.full((2,), 0.25))


def test_squared_logit_error_per_row_and_per_token() -> None:
    real = MASK.float()
    rows = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    found = logit_error(rows, torch.zeros(2, 2), real, False, exclusive=False)
    assert float(found) == pytest.approx(5 / 4)
    found = logit_error(rows[:, :1], torch.zeros(2, 1), real, False, exclusive=True)
    assert float(found) == pytest.approx(1 / 2)
    tokens = torch.tensor([[[1.0, 1.0], [3.0, 1.0], [9.0, 9.0]], [[2.0, 0.0], [9.0, 9.0], [9.0, 9.0]]])
    # means over labels 1 and 5, so 3 in row 1; 2 in row 2
    found = logit_error(tokens, torch.zeros(2, 3, 2), real, False, exclusive=False)
    assert float(found) == pytest.approx(2.5)


def test_divergence_per_row_per_token_and_of_spans() -> None:
    real = MASK.float()
    even, three_to_one = torch.zeros(2), torch.tensor([0.0, math.log(3)])
    once = math.log(2) - math.log(3) / 2  # from even odds to 1:3, whose logs are log 1/4 and log 3/4
    rows = torch.stack([three_to_one, even + 7])  # which adds nothing
    assert float(logit_error(rows, torch.zeros(2, 2), real, False, exclusive=True)) == pytest.approx(once / 2)
    tokens = torch.stack([torch.stack([three_to_one, even, three_to_one * 9]), rows[[1, 0, 0]]])
    # half of the first row's two tokens; none of the second's one
    found = logit_error(tokens, torch.zeros(2, 3, 2), real, False, exclusive=True)
    assert float(found) == pytest.approx(once / 4)
    spans = torch.tensor([[0.0, math.log(3), 99.0], [5.0, 99.0, 99.0]])
    for exclusive in (True, False):
        found = logit_error(spans, torch.zeros(2, 3), real, True, exclusive)
        assert float(found) == pytest.approx(once / 2)


def test_padded_spans_have_finite_gradients() -> None:
    ours = torch.randn(2, 3, requires_grad=True)
    logit_error(ours, torch.randn(2, 3), MASK.float(), True, True).backward()
    assert ours.grad is not None
    assert torch.isfinite(ours.grad).all()
    assert not ours.grad[MASK == 0].any()
    assert ours.grad[0, 0] != 0


def test_loss_is_the_sum_of_its_parts_without_the_embeddings() -> None:
    def output(states: tuple[float, ...], **logits: Tensor) -> ModelOutput:
        hidden = tuple(torch.full((2, 3, 4), value) for value in states)
        return ModelOutput(hidden_states=hidden, **logits)

    start, end = torch.zeros(2, 3), torch.zeros(2, 3)
    student = output((9.0, 1.0, 3.0), start_logits=start, end_logits=end)
    teacher = output((1.0, 2.0, 2.0), start_logits=start + 1, end_logits=torch.tensor([[50.0, 0.0, 0.0]] * 2))
    loss, figures = distillation_loss(student, teacher, MASK)
    assert {name: float(value) for name, value in figures.items()} == {
        "hidden": 0.5,  # a quarter in each of two layers; the first state is the embeddings'
        "start_logits": 0.0,
        "end_logits": pytest.approx(math.log(2) / 2, abs=1e-6),
    }
    assert float(loss) == pytest.approx(0.5 + math.log(2) / 2)

    ones = torch.ones(2, 3, 4)
    far = torch.tensor([3.0, 1.0, 9.0])[None, :, None]  # the second row's second token is padding
    more, figures = distillation_loss(
        student, teacher, MASK, ffn_inputs=[(ones, 2 * ones), (ones * far, ones)]
    )
    # a quarter; 4 / 2 in the first row and 4 / 1 in the second
    assert float(figures["ffn_inputs"]) == pytest.approx(0.25 + (2 + 4) / 2)
    assert float(more) == pytest.approx(float(loss) + 3.25)
