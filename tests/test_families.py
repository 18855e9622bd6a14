"""Every row of the table of families, on a tiny real model. A new row is covered by an entry in `TINY`."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from conftest import (
    TINY,
    batch_of,
    converted,
    sentences,
    tiny_config,
    tiny_model,
    tokenized_texts,
    unlike_first,
)
from torch import Tensor, nn
from transformers import BertForSequenceClassification, GPT2Config, PreTrainedModel, PreTrainedTokenizerFast

from fffconvert.activations import recording_inputs
from fffconvert.calibration import calibrate
from fffconvert.checkpoint import load
from fffconvert.distillation import comparing, distill
from fffconvert.errors import UserError
from fffconvert.families import (
    FAMILIES,
    count_ffns,
    family_of,
    ffn_starts_of,
    layers_of,
    longest_text,
    read_ffns,
    replace_ffns,
)
from fffconvert.inspection import info
from fffconvert.latency import benchmark, dense_ffns
from fffconvert.modeling import config_class
from fffconvert.recipe import Training
from fffconvert.tree import REMOVED, TreeShape
from fffconvert.twins import untrained_twin

every_family = pytest.mark.parametrize("model_type", TINY)


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    return model(**batch_of(tokenizer)).logits


def test_every_row_has_a_tiny_model() -> None:
    assert set(TINY) == set(FAMILIES)


@every_family
def test_row_names_the_configuration(model_type: str) -> None:
    config = tiny_config(model_type)
    assert config.model_type == model_type
    assert family_of(config) is FAMILIES[model_type]
    assert config_class(FAMILIES[model_type])().model_type == f"fff-{model_type}"


# ---- The identities


@every_family
def test_depth_0_with_all_neurons_is_the_dense_model(
    model_type: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    dense = tiny_model(model_type)
    expected = logits_of(dense, tokenizer)
    whole, removed = (
        logits_of(converted(dense, tokenizer, shape), tokenizer) for shape in (TreeShape(0, 32), REMOVED)
    )
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)
    assert (removed - expected).abs().max() > 0.1  # so the FFNs matter, and the comparison means something


@every_family
def test_ffn_read_is_the_ffn_that_the_model_runs(model_type: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """What a layer's FFN reads and adds to the residual, heard in the model, against the copied weights."""
    model = tiny_model(model_type)
    family = FAMILIES[model_type]
    n_uses = 0
    for ffn, layer, place in zip(
        read_ffns(model, family), layers_of(model, family), ffn_starts_of(model, family), strict=True
    ):
        outputs: list[Tensor] = []
        layer.get_submodule(family.down).register_forward_hook(lambda _m, _x, y, seen=outputs: seen.append(y))
        with recording_inputs(place) as inputs, torch.no_grad():
            model(**batch_of(tokenizer))
        assert (ffn.d_model, ffn.n_neurons, ffn.gated) == (16, 32, family.gate is not None)
        for x, output in zip(inputs, outputs, strict=True):
            torch.testing.assert_close(ffn(x.flatten(0, 1)), output.flatten(0, 1), rtol=1e-4, atol=1e-5)
        n_uses += len(inputs)
    assert n_uses == model.config.num_hidden_layers


@every_family
def test_calibration_gives_what_every_ffn_is_given_and_gives(
    model_type: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    model, family = tiny_model(model_type), FAMILIES[model_type]
    found = calibrate(model, tokenizer, sentences(40), 200).ffns()
    for ffn, (inputs, outputs) in zip(read_ffns(model, family), found, strict=True):
        assert len(inputs) in (200, 400)  # ALBERT's layers share one
        torch.testing.assert_close(outputs, ffn(inputs), rtol=1e-4, atol=1e-5)


@every_family
def test_nothing_of_the_dense_ffns_stays(model_type: str, tokenizer: PreTrainedTokenizerFast) -> None:
    dense = tiny_model(model_type)
    student = converted(dense, tokenizer, TreeShape(1, 2, linear=False))
    sizes = [
        sum(p.numel() for p in (*model.parameters(), *model.buffers()) if p.is_floating_point())
        for model in (dense, student)
    ]
    family = FAMILIES[model_type]
    linear = {family.up, family.down} | ({family.gate} if family.gate else set())
    layers = layers_of(dense, family)
    dense_ffn = sum(p.numel() for path in linear for p in layers[0].get_submodule(path).parameters())
    assert sizes[0] - sizes[1] == len(layers) * (
        dense_ffn - family.with_gates(TreeShape(1, 2, linear=False)).n_parameters(16)
    )
    assert len(layers) == count_ffns(dense.config, family)


@unlike_first()
def test_one_distillation_step_lowers_the_loss(model_type: str, tokenizer: PreTrainedTokenizerFast) -> None:
    teacher = tiny_model(model_type)
    student = converted(teacher, tokenizer, TreeShape(2, 3, linear=False))
    batch = batch_of(tokenizer)

    @torch.no_grad()
    def loss() -> float:
        with comparing(student, teacher) as loss_beside:
            value, figures = loss_beside(student, batch)
        assert figures["ffn_inputs"] > 0  # of layers past the first
        return float(value)

    before = loss()
    rows = tokenized_texts(sentences(8, seed=5), tokenizer)  # the same: one batch, so one step
    distill(student, teacher, tokenizer, rows, Training(epochs=1, batch_size=8, learning_rate=1e-4))
    assert loss() < before


@pytest.mark.parametrize("model_type", ["bert", "roberta", "albert", "mpnet"])
def test_encoder_without_pooler(
    model_type: str, tokenizer: PreTrainedTokenizerFast, folder_of: Callable[..., str]
) -> None:
    """Sentence encoders are often saved without one, which `config.json` does not say."""
    dense = tiny_model(model_type, "AutoModel")
    dense.pooler = None
    read = load(folder_of(dense)).model
    assert read.pooler is None
    student = converted(read, tokenizer)
    assert not any("pooler" in key for key in student.state_dict())
    again = load(folder_of(student, "student")).model
    batch = batch_of(tokenizer)
    with torch.no_grad():
        assert torch.equal(student(**batch)[0], deepcopy(again)(**batch)[0])
    assert untrained_twin(student, REMOVED).pooler is None


@unlike_first(name for name in TINY if name != "eurobert")  # whose head has weights of its own
def test_head_of_a_language_model_stays_tied(
    model_type: str, tokenizer: PreTrainedTokenizerFast, folder_of: Callable[..., str]
) -> None:
    student = converted(tiny_model(model_type, "AutoModelForMaskedLM"), tokenizer, TreeShape(1, 2))
    for model in (student, load(folder_of(student)).model):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@every_family
def test_longest_text_can_be_read(model_type: str) -> None:
    model = tiny_model(model_type, "AutoModel")
    n_tokens = longest_text(model.config)
    assert n_tokens == 64 - (model.config.pad_token_id + 1 if FAMILIES[model_type].offset_positions else 0)
    with torch.no_grad():
        assert model(torch.full((1, n_tokens), 7))[0].shape == (1, n_tokens, 16)


def test_positions_that_are_counted_from_no_padding_are_refused() -> None:
    with pytest.raises(UserError, match=r"config\.json has no pad_token_id; expected one"):
        longest_text(tiny_config("roberta", pad_token_id=None))


@pytest.mark.usefixtures("quick_latency")
@unlike_first()
def test_info_and_benchmark(
    model_type: str, tokenizer: PreTrainedTokenizerFast, folder_of: Callable[..., str]
) -> None:
    dense = tiny_model(model_type)
    student = converted(dense, tokenizer, TreeShape(2, 3, linear=False))
    family = FAMILIES[model_type]
    ffn = ffn_starts_of(student, family)[0]
    found = info(folder_of(student))
    assert found.ffn_parameters == sum(tensor.numel() for tensor in ffn.state_dict().values())
    assert found.n_ffns == len(layers_of(dense, family))
    assert found.active_neurons == pytest.approx(3 + 2 / (3 if found.gated else 2))
    x = torch.randn(5, 16)
    for timed, ffn in zip(dense_ffns(dense, family), read_ffns(dense, family), strict=True):
        # what is timed is what was replaced
        torch.testing.assert_close(timed(x), ffn(x), rtol=1e-4, atol=1e-5)
    benchmark(student, dense)


# ---- What is refused


def test_unknown_model_type_is_named_with_what_is_known() -> None:
    with pytest.raises(
        UserError, match=r"model type 'gpt2' is not supported; expected one of bert, .*distil"
    ):
        family_of(GPT2Config())


def test_model_without_layers_is_refused(classifier: BertForSequenceClassification) -> None:
    classifier.base_model.encoder.layer = nn.ModuleList()
    with pytest.raises(UserError, match=r"has no FFNs at encoder.layer\[i\].intermediate.*no layers"):
        layers_of(classifier, FAMILIES["bert"])


def test_model_with_its_ffns_elsewhere_is_refused(classifier: BertForSequenceClassification) -> None:
    family = replace(FAMILIES["bert"], place="feed_forward")
    with pytest.raises(UserError, match=r"BertForSequenceClassification has no FFNs at .*feed_forward"):
        read_ffns(classifier, family)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("intermediate.dense.weight", "in_weight"),
        ("intermediate.dense.bias", "in_bias"),
        ("output.dense.weight", "out_weight"),
        ("output.dense.bias", "out_bias"),
    ],
)
def test_weights_that_are_not_finite_are_refused(
    path: str, part: str, value: float, classifier: BertForSequenceClassification
) -> None:
    with torch.no_grad():
        classifier.bert.encoder.layer[1].get_parameter(path).flatten()[3] = value
    with pytest.raises(UserError, match=f"layer 1: the FFN's {part} holds NaN or infinity"):
        read_ffns(classifier, FAMILIES["bert"])


def test_activation_without_a_definition_is_refused() -> None:
    with pytest.raises(UserError, match=r"layer 0: activation 'mish' is not supported; expected one of gelu"):
        read_ffns(tiny_model("bert", hidden_act="mish"), FAMILIES["bert"])


def test_copies_share_no_memory(classifier: BertForSequenceClassification) -> None:
    ffn = read_ffns(classifier, FAMILIES["bert"])[0]
    before = ffn.in_weight.clone()
    with torch.no_grad():
        classifier.bert.encoder.layer[0].intermediate.dense.weight.zero_()
    assert torch.equal(ffn.in_weight, before)


def test_feed_forward_in_chunks(tokenizer: PreTrainedTokenizerFast) -> None:
    dense = tiny_model("bert")
    student = converted(dense, tokenizer)
    whole = logits_of(student, tokenizer)
    for layer in layers_of(student, FAMILIES["bert"]):
        layer.chunk_size_feed_forward = 1
    torch.testing.assert_close(logits_of(student, tokenizer), whole)


def test_replaced_by_what_is_given(classifier: BertForSequenceClassification) -> None:
    replace_ffns(classifier, FAMILIES["bert"], nn.Identity)
    for layer in classifier.bert.encoder.layer:
        assert isinstance(layer.intermediate, nn.Identity)
        assert isinstance(layer.output.dense, nn.Identity)
