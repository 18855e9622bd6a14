"""Linear layers by oneDNN: the numbers and gradients of `F.linear`, wherever it serves, and nothing else changed."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from conftest import sentences, tiny_model
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from fffconvert import onednn
from fffconvert.conversion import convert
from fffconvert.families import FAMILIES, layers_of
from fffconvert.onednn import OneDNNLinear, WithOneDNN, linear, onednn_serves, product
from fffconvert.tree import TreeShape

needs_onednn = pytest.mark.skipif(not onednn.ONEDNN, reason="this PyTorch has no oneDNN for this processor")


@needs_onednn
def test_whoever_counts_operations_sees_them() -> None:
    layer, x = OneDNNLinear(24, 6), torch.randn(7, 24)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() == 2 * 7 * 24 * 6


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that oneDNN was asked for."""
    shapes: list[tuple[int, ...]] = []

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shapes.append(tuple(x.shape))
        return product(x, weight, bias)

    monkeypatch.setattr(onednn, "product", noted)
    return shapes


INPUTS = {
    "many": torch.randn(2, 5, 24),
    "one": torch.randn(24),
    "none": torch.randn(2, 0, 24),
    "strided": torch.randn(7, 48)[:, ::2],
    "transposed": torch.randn(24, 7).T,
    "first of each": torch.randn(7, 3, 24)[:, 0],
    "expanded": torch.randn(1, 24).expand(7, 24),
    "not finite": torch.tensor([[float("nan")], [float("inf")]]).expand(2, 24),
}


@needs_onednn
@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_gives_what_linear_gives(x: Tensor, bias: bool, asked: list[tuple[int, ...]]) -> None:
    layer = nn.Linear(24, 6, bias=bias)
    with torch.no_grad():
        torch.testing.assert_close(OneDNNLinear.from_linear(layer)(x), layer(x), equal_nan=True)
    assert asked == [tuple(x.shape)]


@needs_onednn
@pytest.mark.parametrize("x", [x for name, x in INPUTS.items() if name != "not finite"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_gradients_are_those_of_linear(x: Tensor, bias: bool, asked: list[tuple[int, ...]]) -> None:
    ours, theirs = (x.detach().requires_grad_() for _ in range(2))
    layer = nn.Linear(24, 6, bias=bias)
    with WithOneDNN():
        layer(ours).square().sum().backward()
    found = [parameter.grad for parameter in layer.parameters()]
    assert len(asked) == 3 * bool(x.numel())
    layer.zero_grad()
    layer(theirs).square().sum().backward()
    for a, b in zip([ours.grad, *found], [theirs.grad, *(p.grad for p in layer.parameters())], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_onednn
def test_only_the_gradients_that_are_needed(asked: list[tuple[int, ...]]) -> None:
    layer = nn.Linear(24, 6).requires_grad_(False)
    x = torch.randn(7, 24, requires_grad=True)
    with WithOneDNN():
        layer(x).sum().backward()
    assert asked == [(7, 24), (7, 6)]
    assert layer.weight.grad is None
    assert layer.bias.grad is None


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    x = torch.randn(7, 24, requires_grad=True)
    layer = nn.Linear(24, 6)
    with WithOneDNN():
        (grad,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    if onednn.ONEDNN:
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_are_left_to_linear(dtype: torch.dtype, asked: list[tuple[int, ...]]) -> None:
    layer, x = OneDNNLinear(24, 6).to(dtype), torch.randn(7, 24, dtype=dtype)
    with torch.no_grad(), WithOneDNN():
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not asked


def test_autocast_gradients_and_parts_of_matrices_are_left_to_linear(asked: list[tuple[int, ...]]) -> None:
    layer, x = OneDNNLinear(24, 6), torch.randn(7, 24)
    layer(x).sum().backward()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert not onednn_serves(x, torch.randn(6, 48)[:, :24], None)  # a thousand times as long
    assert not asked


class Packed(Tensor):
    """Numbers that are not where a tensor's are, as those of a quantized weight."""

    def __new__(cls) -> Packed:
        return Tensor._make_wrapper_subclass(cls, (6, 24), dtype=torch.float32)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return "its own product"
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> Any:
        raise NotImplementedError


def test_a_weight_of_a_class_of_its_own_keeps_its_product() -> None:
    layer = OneDNNLinear(24, 6, bias=False)
    del layer.weight
    layer.weight = Packed()  # type: ignore[assignment]
    with torch.no_grad(), WithOneDNN():
        assert layer(torch.randn(7, 24)) == "its own product"


def test_what_linear_takes_or_refuses_is_left_to_it() -> None:
    x = torch.randn(7, 24)
    with torch.no_grad(), WithOneDNN():
        assert F.linear(x, x[0]).shape == (7,)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            F.linear(x, torch.randn(6, 23))


def test_forward_derivatives_are_left_to_linear() -> None:
    layer = OneDNNLinear(24, 6)
    x, tangent = torch.randn(2, 7, 24)
    with torch.no_grad(), forward_ad.dual_level():
        found = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(found, tangent @ layer.weight.T)


@needs_onednn
def test_what_pytorch_asks_of_an_operator() -> None:
    torch.library.opcheck(linear, (torch.randn(2, 5, 24), torch.randn(6, 24), torch.randn(6)))


def test_projection_is_the_layer_that_it_was_made_of() -> None:
    layer = nn.Linear(24, 6).eval()
    made = OneDNNLinear.from_linear(layer)
    assert made.weight is layer.weight
    assert made.bias is layer.bias
    assert not made.training
    assert deepcopy(made).state_dict().keys() == layer.state_dict().keys()


@needs_onednn
@pytest.mark.parametrize("model_type", ["bert", "distilbert", "deberta-v2", "modernbert"])
def test_converted_model_uses_it_and_its_twin_without_gives_the_same(
    model_type: str,
    tokenizer: PreTrainedTokenizerFast,
    asked: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = convert(
        tiny_model(model_type), tokenizer, sentences(30), TreeShape(1, 2), calibration_tokens=100
    ).model
    for layer in layers_of(model, FAMILIES[model_type]):
        assert not [m for m in layer.modules() if type(m) is nn.Linear]
    batch = tokenizer(sentences(3), return_tensors="pt", padding=True)
    asked.clear()
    with torch.no_grad():
        found = model(**batch)[0]
        assert asked
        monkeypatch.setattr(onednn, "ONEDNN", False)
        torch.testing.assert_close(found, model(**batch)[0], rtol=1e-4, atol=1e-5)


@needs_onednn
def test_compiled_in_one_graph_and_exported_as_plain_linear(
    classifier: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = convert(classifier, tokenizer, sentences(30), TreeShape(1, 2), calibration_tokens=100).model
    ids = tokenizer(sentences(3), return_tensors="pt", padding=True)["input_ids"]
    graphs: list[torch.fx.GraphModule] = []

    def look(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    with torch.no_grad():
        compiled = torch.compile(model, backend=look, fullgraph=True)
        torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)
        exported = torch.export.export(model, (), {"input_ids": ids})
    (graph,) = graphs
    assert "fffconvert.linear" in graph.code
    assert "fffconvert.linear" not in exported.graph_module.code
    assert "mkldnn" not in exported.graph_module.code


def test_a_model_that_is_compiled_keeps_its_own_linear_layers(
    classifier: BertForSequenceClassification,
) -> None:
    ids, called = torch.arange(2, 8)[None], set[str]()

    def look(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        called.update(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.no_grad(), WithOneDNN():
        torch.compile(classifier, backend=look)(input_ids=ids)
    assert called
    assert not any("mkldnn" in name for name in called)
