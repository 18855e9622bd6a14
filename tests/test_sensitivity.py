"""What an error in the midst of a model does to its outputs."""

from __future__ import annotations

import pytest
import torch
from conftest import sentences, tiny_model
from torch import Tensor
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from fffconvert.activations import recording_inputs
from fffconvert.families import FAMILIES, ffn_ends_of
from fffconvert.sensitivity import differentiable, random_projection, sensitivities
from fffconvert.text import encode


@pytest.mark.parametrize("head", ["", "ForTokenClassification", "ForQuestionAnswering"])
def test_outputs_at_padding_do_not_count(head: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("bert", f"AutoModel{head}").eval()
    batch = dict(tokenizer(["good", "a very good film"], padding=True, return_tensors="pt"))
    with differentiable([model.base_model.encoder.layer[-1].output]) as outputs:
        given = model(**batch)
        value = random_projection(given, batch["attention_mask"], torch.Generator().manual_seed(0))
        (gradient,) = torch.autograd.grad(value, outputs[0])  # (n_texts, n_tokens, d_model)
    real = batch["attention_mask"].bool()
    assert not gradient[~real].any()
    assert gradient[real].any()


def test_sensitivity_tells_what_an_error_does_to_the_logits(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    batch = dict(tokenizer.pad(encode(tokenizer, sentences(8), 16), return_tensors="pt"))
    places = ffn_ends_of(classifier, FAMILIES["bert"])
    found = sensitivities(classifier, places, [batch] * 600, seed=0)
    assert [tuple(each.shape) for each in found] == [(16, 16)] * len(places)
    for number, place in enumerate(places):
        errors = 1e-3 * torch.randn(12, 16)
        costs = torch.stack([(cost_of(error, classifier, place, batch)) for error in errors])
        expected = torch.einsum("ni,ij,nj->n", errors, found[number], errors)
        assert torch.corrcoef(torch.stack([costs, expected]))[0, 1] > 0.95
        assert found[number].diagonal().mean() == pytest.approx(1, abs=1e-4)


@torch.no_grad()
def cost_of(
    error: Tensor, model: BertForSequenceClassification, place: torch.nn.Module, batch: dict[str, Tensor]
) -> Tensor:
    """The squared change of the logits for an error of a module's output at one token, over all tokens."""
    exact = model.eval()(**batch).logits
    total = torch.zeros(())
    for token in range(batch["input_ids"].shape[1]):
        real = batch["attention_mask"][:, token, None]

        def wrong(_module: torch.nn.Module, _args: object, output: Tensor, token: int = token) -> Tensor:
            output = output.clone()
            output[:, token] += error
            return output

        hook = place.register_forward_hook(wrong)
        total += ((model(**batch).logits - exact).square() * real).sum()
        hook.remove()
    return total


def test_sensitivities_leave_the_model_as_it_was(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    batch = dict(tokenizer.pad(encode(tokenizer, sentences(4), 16), return_tensors="pt"))
    classifier.train().requires_grad_(False)
    places = ffn_ends_of(classifier, FAMILIES["bert"])
    first, again = (sensitivities(classifier, places, [batch], seed=1) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert classifier.training
    assert all(parameter.grad is None for parameter in classifier.parameters())
    assert not any(module._forward_hooks for module in classifier.modules())


def test_a_configuration_may_give_an_ffn_a_few_tokens_at_a_time(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = dict(tokenizer.pad(encode(tokenizer, sentences(4), 16), return_tensors="pt"))
    model = tiny_model("bert", "AutoModelForSequenceClassification")
    places = ffn_ends_of(model, FAMILIES["bert"])
    (whole, *_) = sensitivities(model, places, [batch], seed=1)
    for layer in model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 7  # of which the batch is no multiple
    (chunked, *_) = sensitivities(model, places, [batch], seed=1)
    assert torch.equal(whole, chunked)


def test_words_of_a_vocabulary_are_differentiated_a_few_texts_at_a_time(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their numbers for a whole batch would take gigabytes."""
    batch = dict(tokenizer.pad(encode(tokenizer, sentences(5), 16), return_tensors="pt"))
    monkeypatch.setattr("fffconvert.sensitivity.BATCH_SIZE_OF_WORDS", 2)
    for head, expected in (("", [5]), ("ForMaskedLM", [2, 2, 1])):
        model = tiny_model("bert", f"AutoModel{head}")
        places = ffn_ends_of(model, FAMILIES["bert"])
        with recording_inputs(places[0]) as recorded:
            sensitivities(model, places, [batch], seed=0)
        assert [len(inputs) for inputs in recorded] == expected
