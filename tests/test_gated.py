"""Gates: a GLU in, a tree of neurons with gates out."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import sentences, tiny_model
from fitted import D_MODEL, error, inputs_of, normal, output
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from fffconvert import kernels
from fffconvert.configuration import shape_of
from fffconvert.conversion import convert
from fffconvert.dense import DenseFFN
from fffconvert.errors import UserError
from fffconvert.fff import FFF
from fffconvert.fit import contributions, fit_layer
from fffconvert.kernels import reference
from fffconvert.recipe import Init
from fffconvert.tree import GatedTreeShape, TreeShape, narrow
from fffconvert.twins import untrained_twin

N_NEURONS = 30
grown = pytest.mark.parametrize("init", ["inputs", "neurons"])


class Glu(nn.Module):
    """A GLU as a model has it: two projections apart or fused, with biases or without."""

    def __init__(self, fused: bool, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(D_MODEL, N_NEURONS * (2 if fused else 1), bias=bias)
        self.gate = None if fused else nn.Linear(D_MODEL, N_NEURONS, bias=bias)
        self.down = nn.Linear(N_NEURONS, D_MODEL, bias=bias)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        scores, gates = self.up(x).chunk(2, -1) if self.gate is None else (self.up(x), self.gate(x))
        return self.down(F.silu(scores) * gates)

    def read(self) -> DenseFFN:
        return DenseFFN.read([self.up, *([self.gate] if self.gate else [])], self.down, "silu", "layer 0")


def glu() -> DenseFFN:
    return Glu(fused=False, bias=True).read()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "apart"])
def test_read_is_the_glu_of_the_model(fused: bool, bias: bool) -> None:
    module = Glu(fused, bias)
    ffn, x = module.read(), inputs_of(20)
    assert ffn.gated
    assert (ffn.n_neurons, ffn.d_model) == (N_NEURONS, D_MODEL)
    torch.testing.assert_close(ffn(x), module(x).detach(), rtol=1e-5, atol=1e-4)
    assert bias or not (ffn.in_bias.any() or ffn.out_bias.any())


def test_gates_that_are_not_finite_are_refused() -> None:
    module = Glu(fused=False, bias=True)
    with torch.no_grad():
        module.gate.weight[3, 4] = torch.nan
    with pytest.raises(UserError, match="layer 0: the FFN's in_weight holds NaN"):
        module.read()


@grown
def test_all_neurons_at_depth_zero_are_the_dense_glu(init: Init) -> None:
    ffn, other = glu(), inputs_of(30, seed=3)
    layer = fit_layer(ffn, inputs_of(100), GatedTreeShape(0, N_NEURONS), init, seed=0)
    assert torch.equal(output(layer, other), ffn(other))


@grown
@pytest.mark.parametrize(
    "shape",
    [
        GatedTreeShape(3, N_NEURONS),
        GatedTreeShape(2, 3, trunk=N_NEURONS),
        GatedTreeShape(1, N_NEURONS, trees=2),
    ],
    ids=["every_leaf", "trunk", "two_trees"],
)
def test_part_with_all_neurons_leaves_nothing_to_explain(init: Init, shape: TreeShape) -> None:
    ffn, other = glu(), inputs_of(50, seed=3)
    layer = fit_layer(ffn, inputs_of(200), shape, init, seed=0)
    torch.testing.assert_close(output(layer, other), ffn(other), rtol=1e-4, atol=1e-3)


@grown
@pytest.mark.parametrize("linear", [False, True], ids=["gated", "linear"])
@pytest.mark.parametrize("emitting", [False, True], ids=["plain", "emitting"])
def test_wider_leaves_are_closer(init: Init, linear: bool, emitting: bool) -> None:
    ffn, x = glu(), inputs_of(1000)
    fit = partial(fit_layer, ffn, x, init=init, seed=0)
    errors = [
        error(fit(GatedTreeShape(2, width, linear=linear, emitting=emitting)), ffn, x) for width in (0, 4, 10)
    ]
    assert errors[2] < errors[1] < errors[0] <= 1.001


def test_linear_leaves_have_no_gates() -> None:
    ffn, x = glu(), inputs_of(300)
    layer = fit_layer(ffn, x, GatedTreeShape(2, 4, linear=True), "inputs", seed=0)
    assert layer.leaf_in_weight.shape[2] == layer.leaf_out_weight.shape[2] == 4
    assert not layer.weights.gated


def test_neurons_are_chosen_by_what_they_give_with_their_gates() -> None:
    ffn, x = glu(), inputs_of(200)
    moved = (ffn.activations(x)[:, :, None] * ffn.out_weight).var(0, unbiased=False).sum(1)
    torch.testing.assert_close(contributions(ffn, x), moved, rtol=1e-4, atol=1e-4)
    layer = fit_layer(ffn, x, GatedTreeShape(0, 5), "inputs", seed=0)
    chosen = moved.topk(5).indices.sort().values
    assert torch.equal(layer.leaf_in_weight[0, 0], ffn.in_weight[torch.cat([chosen, chosen + N_NEURONS])])


def test_narrow_control_of_a_glu_is_a_glu() -> None:
    assert narrow(GatedTreeShape(7, 12)) == GatedTreeShape(0, 15)  # 12 and 7 thirds


@pytest.mark.parametrize(
    "shape", [GatedTreeShape(3, 4), GatedTreeShape(2, 0, trunk=3)], ids=["leaf", "trunk"]
)
def test_door_serves_gates_as_the_reference_does(shape: TreeShape) -> None:
    layer, x = FFF(shape, D_MODEL, "silu"), inputs_of(40)
    assert layer.weights.gated
    torch.testing.assert_close(
        kernels.fff_forward(x, layer.weights, "silu"), reference.fff_forward(x, layer.weights, "silu")
    )


def test_gradients_are_those_of_the_definition() -> None:
    layer = FFF(GatedTreeShape(1, 2, trunk=2), 3, "silu").double()
    weights = [w.detach().clone().requires_grad_() for w in layer.weights]
    x = normal(5, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, *w: kernels.fff_forward(x, kernels.FFFWeights(*w), "silu"), (x, *weights)
    )


# ---- Real models


def test_rotary_frequencies_of_a_half_precision_model_stay_in_float32(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tiny_model("modernbert").bfloat16().save_pretrained(tmp_path / "dense")
    dense = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    student = convert(
        dense, tokenizer, sentences(20), TreeShape(1, 2, linear=False), calibration_tokens=100
    ).model
    assert student.dtype == torch.bfloat16
    assert student.model.rotary_emb.full_attention_inv_freq.dtype == torch.float32
    student.save_pretrained(tmp_path / "student")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    batch = tokenizer(sentences(4), padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(student(**batch).logits, deepcopy(again)(**batch).logits)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attention_implementation_is_kept(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    dense = tiny_model("modernbert")
    dense.set_attn_implementation(name)
    student = convert(
        dense, tokenizer, sentences(20), TreeShape(1, 2, linear=False), calibration_tokens=100
    ).model
    assert student.config._attn_implementation == name


def test_control_and_twin_of_a_glu(tokenizer: PreTrainedTokenizerFast) -> None:
    dense = tiny_model("modernbert")
    student = convert(
        dense, tokenizer, sentences(20), TreeShape(2, 3, linear=False), calibration_tokens=100
    ).model
    assert shape_of(student.config) == GatedTreeShape(2, 3, linear=False)
    wide = untrained_twin(student, narrow(shape_of(student.config)))
    assert wide.model.layers[0].mlp.leaf_in_weight.shape == (1, 1, 2 * 4, 16)  # 3 and 2 thirds: 4 with gates
    assert type(untrained_twin(student)) is type(dense)
