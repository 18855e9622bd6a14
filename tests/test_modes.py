"""What a model is for a while ends when it should."""

from __future__ import annotations

import pytest
import torch
from transformers import BertForSequenceClassification

from fffconvert.modes import evaluating, frozen


def test_frozen_parameters_require_gradients_again_if_they_did() -> None:
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    with frozen(model):
        assert not model.weight.requires_grad
    assert model.weight.requires_grad
    assert not model.bias.requires_grad


def test_evaluating_restores_the_mode_of_every_part(classifier: BertForSequenceClassification) -> None:
    classifier.train().bert.eval()
    with evaluating(classifier):
        assert not any(module.training for module in classifier.modules())
    assert classifier.training
    assert not classifier.bert.training


def test_evaluating_restores_the_mode_after_an_error() -> None:
    module = torch.nn.Linear(2, 2).train()
    with pytest.raises(RuntimeError), evaluating(module):
        module(torch.ones(1, 3))
    assert module.training


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
def test_evaluating_switches_the_mode_for_a_while(training: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Dropout()).train(training)
    with evaluating(module):
        assert not module[0].training
    assert module[0].training is training
