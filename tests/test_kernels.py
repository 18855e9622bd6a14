"""The CPU kernel against the reference, which defines what is right, and the door that chooses."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from processes import finish, in_processes, start
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fffconvert import kernels
from fffconvert.errors import UserError
from fffconvert.fff import FFF
from fffconvert.kernels import ACTIVATIONS, FFFWeights, cpu, reference
from fffconvert.tree import GatedTreeShape, TreeShape

AVAILABLE = kernels.status()["cpu"]
needs_kernel = pytest.mark.skipif(not AVAILABLE.available, reason=AVAILABLE.reason)

SHAPES = {
    "only_a_bias": (24, TreeShape(depth=0, leaf_width=0)),
    "dense": (24, TreeShape(depth=0, leaf_width=70)),
    "one_level": (5, TreeShape(depth=1, leaf_width=1)),
    "no_leaf_neurons": (33, TreeShape(depth=4, leaf_width=0)),
    "usual": (384, TreeShape(depth=5, leaf_width=12)),
    "usual_odd": (33, TreeShape(depth=3, leaf_width=7)),
    "trunk": (24, TreeShape(depth=3, leaf_width=5, trunk=41)),
    "two_trees": (24, TreeShape(depth=3, leaf_width=4, trees=2)),
    "emitting": (33, TreeShape(depth=6, leaf_width=1, emitting=True)),
    "emitting_no_leaf_neurons": (24, TreeShape(depth=3, leaf_width=0, emitting=True)),
    "emitting_wide": (5, TreeShape(depth=4, leaf_width=35, emitting=True)),
    "everything": (33, TreeShape(depth=4, leaf_width=6, trunk=3, trees=3, emitting=True)),
    "deep": (5, TreeShape(depth=13, leaf_width=2, emitting=True)),
    "gated": (33, GatedTreeShape(depth=3, leaf_width=7)),
    "gated_wide": (24, GatedTreeShape(depth=1, leaf_width=70)),
    "gated_everything": (33, GatedTreeShape(depth=4, leaf_width=35, trunk=41, trees=2, emitting=True)),
}
shapes = pytest.mark.parametrize(("d_model", "shape"), SHAPES.values(), ids=SHAPES)


def make(d_model: int, shape: TreeShape, seed: int = 0) -> FFFWeights:
    """Random weights; scaled so that pre-activations are of order 1."""
    generator = torch.Generator().manual_seed(seed)
    trees, leaves, nodes, width = shape.trees, shape.n_leaves, shape.n_nodes, shape.leaf_width
    rows, trunk_rows = shape.n_inputs * width, shape.n_inputs * shape.trunk

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator) / (d_model**0.5 if size[-1] == d_model else 1.0)

    return FFFWeights(
        router_weight=normal(trees, nodes, d_model),
        router_bias=normal(trees, nodes) * 0.1,
        node_out_weight=normal(trees, nodes if shape.emitting else 0, d_model),
        leaf_in_weight=normal(trees, leaves, rows, d_model),
        leaf_in_bias=normal(trees, leaves, rows),
        leaf_out_weight=normal(trees, leaves, width, d_model),
        leaf_out_bias=normal(trees, leaves, d_model),
        trunk_in_weight=normal(trunk_rows, d_model),
        trunk_in_bias=normal(trunk_rows),
        trunk_out_weight=normal(shape.trunk, d_model),
    )


def tokens(n_tokens: int, d_model: int, seed: int = 1) -> Tensor:
    return torch.randn(n_tokens, d_model, generator=torch.Generator().manual_seed(seed))


def cast(weights: FFFWeights, dtype: torch.dtype) -> FFFWeights:
    return FFFWeights(*(w.to(dtype) for w in weights))


def gradients(forward, x: Tensor, weights: FFFWeights, activation: str) -> dict[str, Tensor | None]:  # type: ignore[no-untyped-def]
    """The output and the gradient of every tensor, for an output gradient that is the same each time."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, *weights)]
    y = forward(leaves[0], FFFWeights(*leaves[1:]), activation)
    grad = tokens(1, y.numel(), seed=2).reshape(y.shape).to(y.dtype)
    grads = torch.autograd.grad(y, leaves, grad, allow_unused=True)
    return dict(zip(("y", "x", *FFFWeights._fields), (y, *grads), strict=True))


def assert_same(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> None:
    for name, expected in theirs.items():
        actual = ours[name]
        if expected is None or actual is None:
            assert actual is expected, f"{name}: one has a gradient, the other none"
        else:
            atol = 2e-6 * max(1.0, expected.detach().abs().amax().item() if expected.numel() else 1.0)
            torch.testing.assert_close(
                actual, expected, rtol=2e-5, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
            )


@needs_kernel
@shapes
@pytest.mark.parametrize("n_tokens", [1, 7, 300])
def test_equals_reference(d_model: int, shape: TreeShape, n_tokens: int) -> None:
    weights, x = make(d_model, shape), tokens(n_tokens, d_model)
    expected = gradients(reference.fff_forward, x, weights, "gelu")
    assert_same(gradients(cpu.fff_forward, x, weights, "gelu"), expected)
    assert_same({"y": cpu.fff_forward(x, weights, "gelu")}, {"y": expected["y"]})


@needs_kernel
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    d_model, shape = SHAPES["everything"]
    weights, x = make(d_model, shape), tokens(64, d_model) * 3
    expected = gradients(reference.fff_forward, x, weights, activation)
    assert_same(gradients(cpu.fff_forward, x, weights, activation), expected)


@needs_kernel
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_values(activation: str) -> None:
    """A leaf that computes nothing but the activation, over the whole range and at its edges."""
    values = torch.cat(
        [torch.linspace(-100, 100, 4001), torch.linspace(-6, 6, 4001), torch.logspace(-30, 38, 500)]
    )
    edges = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan")])
    x = torch.cat([values, -values, edges])[:, None]
    one, none = torch.ones(1, 1, 1, 1), torch.zeros(1, 0, 1)
    weights = FFFWeights(
        none, torch.zeros(1, 0), none, one, torch.zeros(1, 1, 1), one, torch.zeros(1, 1, 1),
        torch.zeros(0, 1), torch.zeros(0), torch.zeros(0, 1),
    )  # fmt: skip
    expected = ACTIVATIONS[activation](x.double())
    actual = cpu.fff_forward(x, weights, activation).double()
    torch.testing.assert_close(actual[:-5], expected[:-5], rtol=1e-6, atol=1e-6)
    # not of float32: with AVX-512 PyTorch's own GELU is no number at infinity
    torch.testing.assert_close(actual[-5:].float(), expected[-5:].float(), equal_nan=True)


@needs_kernel
@shapes
def test_no_tokens(d_model: int, shape: TreeShape) -> None:
    weights, x = make(d_model, shape), torch.zeros(0, d_model)
    assert cpu.fff_forward(x, weights, "gelu").shape == (0, d_model)
    ours = gradients(cpu.fff_forward, x, weights, "gelu")
    assert all(g is None or not g.any() for g in ours.values())


@needs_kernel
@pytest.mark.parametrize("emitting", [False, True], ids=["plain", "emitting"])
def test_ties_go_right(emitting: bool) -> None:
    """Whole numbers: every score is exact, and many are exactly 0."""
    shape = TreeShape(depth=5, leaf_width=3, emitting=emitting)
    weights = FFFWeights(*(w.mul(3).round() for w in make(8, shape)))
    x = tokens(500, 8).round()
    scores = x @ weights.router_weight[0].T + weights.router_bias[0]
    assert (scores == 0).sum() > 100
    assert_same(
        gradients(cpu.fff_forward, x, weights, "relu"), gradients(reference.fff_forward, x, weights, "relu")
    )
    zeros = FFFWeights(*(torch.zeros_like(w) for w in weights))
    zeros.leaf_out_bias[0, -1] = 1.0
    assert (cpu.fff_forward(x, zeros, "relu") == 1).all()


@needs_kernel
@pytest.mark.parametrize(
    ("value", "activation"),
    [
        (float("nan"), "gelu"),
        (float("inf"), "gelu"),
        (float("-inf"), "gelu"),
        (3e38, "gelu_new"),  # with AVX-512 PyTorch's own exact GELU is infinite there
    ],
)
@pytest.mark.parametrize("name", ["usual_odd", "everything", "deep", "gated"])
def test_values_that_are_no_numbers(name: str, value: float, activation: str) -> None:
    d_model, shape = SHAPES[name]
    weights, x = make(d_model, shape), tokens(40, d_model)
    x[::3, 1] = value
    x[4] = value
    actual, expected = (f(x, weights, activation) for f in (cpu.fff_forward, reference.fff_forward))
    spoilt = torch.zeros(40, dtype=torch.bool)
    spoilt[::3] = spoilt[4] = True
    torch.testing.assert_close(actual[~spoilt], expected[~spoilt], rtol=1e-5, atol=1e-5)
    assert (actual[spoilt].isfinite() == expected[spoilt].isfinite()).all()
    gradients(cpu.fff_forward, x, weights, activation)  # reads nothing outside, whatever comes out


@needs_kernel
@pytest.mark.parametrize("name", ["usual", "everything", "deep"])
def test_company_does_not_matter(name: str) -> None:
    """A token's output is the same to the last bit alone and among others."""
    d_model, shape = SHAPES[name]
    weights, x = make(d_model, shape), tokens(37, d_model)
    together = cpu.fff_forward(x, weights, "gelu")
    alone = torch.cat([cpu.fff_forward(token[None], weights, "gelu") for token in x])
    assert torch.equal(together, alone)


@needs_kernel
def test_views() -> None:
    """Inputs, weights and output gradients that are not contiguous, or not aligned."""
    d_model, shape = SHAPES["everything"]
    weights, x = make(d_model, shape), tokens(20, d_model)
    expected = gradients(reference.fff_forward, x, weights, "gelu")
    strided = torch.stack([x, x + 1], dim=-1).transpose(0, 1)[..., 0].T
    shifted = torch.cat([torch.zeros(1), x.flatten()])[1:].view_as(x)
    wide = FFFWeights(*(torch.stack([w, w + 1], dim=-1)[..., 0] for w in weights))
    for view in (strided, shifted):
        torch.testing.assert_close(cpu.fff_forward(view, wide, "gelu"), expected["y"], rtol=1e-5, atol=1e-5)
    leaf = x.clone().requires_grad_()
    cpu.fff_forward(leaf, wide, "gelu").sum().backward()  # the gradient of a sum has strides of 0
    other = x.clone().requires_grad_()
    reference.fff_forward(other, weights, "gelu").sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-5, atol=1e-5)


@needs_kernel
@pytest.mark.parametrize("size", [(33,), (3, 4, 33), (0, 4, 33), (2, 1, 2, 33)], ids=str)
def test_leading_dimensions(size: tuple[int, ...]) -> None:
    """Sequences of sequences are tokens, and one token needs no dimension of its own."""
    weights, x = make(*SHAPES["everything"]), tokens(1, math.prod(size)).reshape(size)
    flat = reference.fff_forward(x.reshape(-1, 33), weights, "gelu")
    assert torch.equal(reference.fff_forward(x, weights, "gelu"), flat.reshape(size))
    ours = gradients(cpu.fff_forward, x, weights, "gelu")
    assert ours["y"].shape == ours["x"].shape == size
    torch.testing.assert_close(ours["y"].detach(), flat.reshape(size), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cpu.fff_forward(x, weights, "gelu"), ours["y"].detach())


@needs_kernel
@pytest.mark.parametrize("name", ["usual", "trunk", "everything", "gated_everything"])
def test_bfloat16(name: str) -> None:
    """The budget: at most twice the error that plain PyTorch makes in bfloat16, against float32."""
    d_model, shape = SHAPES[name]
    weights, x = cast(make(d_model, shape), torch.bfloat16), tokens(200, d_model).bfloat16()
    same = torch.ones(len(x), dtype=torch.bool)  # tokens whose path does not depend on the rounding
    for tree in range(shape.trees):
        same &= reference.route(x, weights, tree) == reference.route(
            x.float(), cast(weights, torch.float), tree
        )
    x = x[same]
    truth = gradients(reference.fff_forward, x.float(), cast(weights, torch.float32), "gelu")
    plain = gradients(reference.fff_forward, x, weights, "gelu")
    ours = gradients(cpu.fff_forward, x, weights, "gelu")
    for key, expected in truth.items():
        if expected is not None and expected.numel():
            assert ours[key].dtype == torch.bfloat16
            error, budget = (
                (t[key].detach().float() - expected.detach()).abs().mean().item() for t in (ours, plain)
            )
            assert error <= 2 * budget + 1e-6, key


@needs_kernel
@shapes
def test_bfloat16_weights_of_float32_inputs_are_the_numbers_that_they_hold(
    d_model: int, shape: TreeShape
) -> None:
    weights, x = cast(make(d_model, shape), torch.bfloat16), tokens(50, d_model)
    same = cast(weights, torch.float32)
    assert torch.equal(cpu.fff_forward(x, weights, "gelu"), cpu.fff_forward(x, same, "gelu"))
    exact, plain = (gradients(f, x, same, "gelu") for f in (cpu.fff_forward, reference.fff_forward))
    for name, found in gradients(cpu.fff_forward, x, weights, "gelu").items():
        wanted = exact[name]
        if found is None or wanted is None:
            assert found is wanted
        else:
            assert found.dtype == (torch.float32 if name in ("x", "y") else torch.bfloat16)
            torch.testing.assert_close(found, wanted.to(found.dtype))
    # its gradients of nodes are summed in bfloat16
    found = gradients(reference.fff_forward, x, weights, "gelu")
    torch.testing.assert_close([found["y"], found["x"]], [plain["y"], plain["x"]])


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(
    d_model=st.integers(1, 40),
    shape=st.builds(
        lambda gated, *sizes: (GatedTreeShape if gated else TreeShape)(*sizes),
        st.booleans(),
        st.integers(0, 6),
        st.integers(0, 15),
        st.integers(0, 9),
        st.integers(1, 3),
        st.booleans(),
    ),
    n_tokens=st.integers(0, 70),
    seed=st.integers(0, 1000),
)
# in float32 the reference itself errs more than is allowed here: its sum over the tokens cancels
@example(d_model=1, shape=GatedTreeShape(0, 8, 6, 3, False), n_tokens=20, seed=377)
def test_any_shape(d_model: int, shape: TreeShape, n_tokens: int, seed: int) -> None:
    weights, x = make(d_model, shape, seed), tokens(n_tokens, d_model, seed)
    scores = x @ weights.router_weight.flatten(0, 1).T + weights.router_bias.flatten()
    x = x[(scores.abs() > 1e-5).all(dim=1)]  # tokens whose path does not depend on the rounding
    exact = gradients(reference.fff_forward, x.double(), cast(weights, torch.float64), "silu")
    expected = {name: None if value is None else value.float() for name, value in exact.items()}
    ours = gradients(cpu.fff_forward, x, weights, "silu")
    assert_same(ours, expected if len(x) else {"y": expected["y"]})


def test_gradcheck_of_the_reference() -> None:
    d_model, shape = 4, TreeShape(depth=2, leaf_width=2, trunk=1, trees=2, emitting=True)
    inputs = [t.double().requires_grad_() for t in (tokens(5, d_model), *make(d_model, shape))]
    assert torch.autograd.gradcheck(lambda x, *w: kernels.fff_forward(x, FFFWeights(*w), "gelu"), inputs)


# ---- What torch.compile and torch.export need


@needs_kernel
@pytest.mark.parametrize("name", ["everything", "gated", pytest.param("usual_odd", marks=pytest.mark.slow)])
def test_opcheck(name: str) -> None:
    d_model, shape = SHAPES[name]
    weights, x = make(d_model, shape), tokens(6, d_model)
    ops = torch.ops.fffconvert
    torch.library.opcheck(ops.fff.default, (x, list(weights), 0))
    leaves = [w.requires_grad_() for w in make(d_model, shape)]
    torch.library.opcheck(ops.fff_train.default, (x.clone().requires_grad_(), leaves, 0))
    y, paths, pre = ops.fff_train(x, list(weights), 0)
    torch.library.opcheck(ops.fff_backward.default, (y, x, list(weights), paths, pre, 0, True))


@needs_kernel
def test_wrong_shapes_are_refused() -> None:
    d_model, shape = SHAPES["everything"]
    weights, x = make(d_model, shape), tokens(6, d_model)
    for name, value in weights._asdict().items():
        with pytest.raises(RuntimeError, match="fffconvert"):
            cpu.fff_forward(x, weights._replace(**{name: value[..., :-1]}), "gelu")
    y, paths, pre = torch.ops.fffconvert.fff_train(x, list(weights), 0)
    for wrong in (paths + 999, paths + 1, paths - 1):  # the trunk has one leaf only, and there is no token -1
        with pytest.raises(RuntimeError, match="paths"):
            torch.ops.fffconvert.fff_backward(y, x, list(weights), wrong, pre, 0, True)


@needs_kernel
def test_derivatives_that_the_kernel_lacks_are_right_or_refused() -> None:
    d_model, shape = SHAPES["usual_odd"]
    weights, x = make(d_model, shape), tokens(6, d_model)
    kernels.fff_forward(x, weights, "gelu")

    def both(function: Callable[..., Tensor]) -> list[Tensor]:
        return [function(forward) for forward in (kernels.fff_forward, reference.fff_forward)]

    def along(forward: Callable[..., Tensor]) -> Tensor:
        tangent: Tensor = torch.func.jvp(lambda x: forward(x, weights, "gelu"), (x,), (x,))[1]
        return tangent

    def gradient_of(forward: Callable[..., Tensor]) -> Tensor:
        found: Tensor = torch.func.grad(lambda x: forward(x, weights, "gelu").square().sum())(x)
        return found

    with torch.no_grad():
        ours, theirs = both(along)
    torch.testing.assert_close(ours, theirs)
    assert theirs.abs().sum() > 0
    torch.testing.assert_close(*both(gradient_of))
    x.requires_grad_()
    y = kernels.fff_forward(x, weights, "gelu")
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; FFFCONVERT_KERNEL=reference has"):
        torch.autograd.grad(gradient.square().sum(), x)


class Layer(torch.nn.Module):
    def __init__(self, d_model: int, shape: TreeShape) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(make(d_model, shape))

    def forward(self, x: Tensor) -> Tensor:
        return kernels.fff_forward(x, FFFWeights(*self.weights), "gelu")


@needs_kernel
def test_compile_without_graph_breaks() -> None:
    d_model, shape = SHAPES["usual_odd"]
    layer, x = Layer(d_model, shape), tokens(20, d_model).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    (actual,) = torch.autograd.grad(compiled(x).sum(), x)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(actual, expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


@needs_kernel
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_export(grad: bool) -> None:
    d_model, shape = SHAPES["everything"]
    layer, x = Layer(d_model, shape), tokens(20, d_model)
    with torch.set_grad_enabled(grad):
        batch = torch.export.Dim("tokens", min=2, max=4096)
        program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: batch}})
        other = tokens(33, d_model)
        torch.testing.assert_close(program.module()(other), layer(other))


@needs_kernel
def test_autocast() -> None:
    d_model, shape = SHAPES["everything"]
    weights, x = make(d_model, shape), tokens(50, d_model)
    with torch.autocast("cpu", torch.bfloat16):
        mine = kernels.fff_forward(x.bfloat16(), weights, "gelu")
        plain = reference.fff_forward(x.bfloat16(), weights, "gelu")
        with torch.no_grad():
            half = FFFWeights(*(weight.bfloat16() for weight in weights))
            again = [kernels.fff_forward(x, half, "gelu") for _ in "ab"]
    truth = reference.fff_forward(x.bfloat16().float(), weights, "gelu")
    assert [y.dtype for y in again] == [torch.bfloat16] * 2
    assert mine.dtype == plain.dtype
    assert (mine - truth).abs().mean() <= (plain - truth).abs().mean()


BETWEEN_FORBIDDEN_PAGES = """
import ctypes, mmap
import torch
from fffconvert.kernels import FFFWeights, cpu
cpu.load()
protect = ctypes.CDLL(None, use_errno=True).mprotect
kept = []

def guarded(tensor, at_the_end):
    if not tensor.numel():
        return tensor
    page, size = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
    room = -(-size // page) * page
    memory = mmap.mmap(-1, room + page)
    kept.append(memory)
    forbidden = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + (room if at_the_end else 0)
    assert protect(ctypes.c_void_p(forbidden), ctypes.c_size_t(page), 0) == 0
    offset = room - size if at_the_end else page
    flat = torch.frombuffer(memory, dtype=tensor.dtype, offset=offset, count=tensor.numel())
    return flat.view(tensor.shape).copy_(tensor)

for name, x, weights in torch.load(file):
    results = []
    for place in (None, False, True):
        put = (lambda t: t) if place is None else (lambda t: guarded(t, place))
        here, w = put(x), FFFWeights(*map(put, weights))
        y, *held = torch.ops.fffconvert.fff_train(here, list(w), 0)
        grads = torch.ops.fffconvert.fff_backward(put(y), here, list(w), *map(put, held), 0, True)
        with torch.no_grad():
            short = cpu.infer(here, w, "gelu")
        results.append([y, torch.ops.fffconvert.fff(here, list(w), 0), *([] if short is None else [short]), *grads])
    for found in results[1:]:
        for actual, expected in zip(found, results[0], strict=True):
            torch.testing.assert_close(actual, expected, equal_nan=True)
"""


@in_processes
@needs_kernel
def test_reads_no_byte_outside_its_tensors(tmp_path: Path) -> None:
    """Every tensor just before, and just after, a page that ends the process which touches it."""
    cases = []
    for name in ("one_level", "usual_odd", "emitting_wide", "everything", "gated", "gated_everything"):
        d_model, shape = SHAPES[name]
        for n_tokens in (1, 11):
            weights, x = make(d_model, shape), tokens(n_tokens, d_model)
            x[::5, 0], x[1:2] = torch.inf, torch.nan
            cases += [
                (name, x, list(weights)),
                (name, x.bfloat16(), list(cast(weights, torch.bfloat16))),
                (name, x, list(cast(weights, torch.bfloat16))),
            ]
    torch.save(cases, tmp_path / "cases.pt")
    process = start(exec, BETWEEN_FORBIDDEN_PAGES, {"file": tmp_path / "cases.pt"})
    assert finish(process, 300) == 0


# ---- The short way, without the dispatcher


@needs_kernel
@shapes
@pytest.mark.parametrize("n_tokens", [0, 1, 7])
def test_short_way_equals_the_operator(d_model: int, shape: TreeShape, n_tokens: int) -> None:
    weights, x = make(d_model, shape), tokens(n_tokens, d_model)
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            narrow = cast(weights, torch.bfloat16)
            for inputs, held in ((x, weights), (x, narrow), (x.bfloat16(), narrow)):
                y = cpu.infer(inputs, held, "gelu")
                assert y is not None
                assert not y.requires_grad
                assert y.dtype == inputs.dtype
                assert torch.equal(y, cpu.fff_forward(inputs, held, "gelu"))


@needs_kernel
def test_bfloat16_is_rounded_as_pytorch_rounds() -> None:
    weights = cast(make(32, TreeShape(depth=3, leaf_width=2)), torch.bfloat16)
    x = tokens(500, 32).bfloat16()
    x[0, :4] = torch.tensor([3.4e38, -3.4e38, 1e-40, float("nan")])
    with torch.no_grad():
        found = cpu.infer(x, weights, "gelu")
        exact = cpu.infer(x.float(), weights, "gelu")
    assert found is not None
    assert exact is not None
    torch.testing.assert_close(found, exact.bfloat16(), rtol=0, atol=0, equal_nan=True)


def wrong(weights: FFFWeights, x: Tensor) -> dict[str, tuple[Tensor, FFFWeights]]:
    wide = torch.stack([weights.leaf_in_weight] * 2, -1)[..., 0]
    return {
        "x_not_contiguous": (torch.stack([x] * 2, -1)[..., 0], weights),
        "weights_not_contiguous": (x, weights._replace(leaf_in_weight=wide)),
        "narrower_x": (x.bfloat16(), weights),
        "two_dtypes": (x, weights._replace(router_bias=weights.router_bias.bfloat16())),
        "meta": (x.to("meta"), FFFWeights(*(w.to("meta") for w in weights))),
        "other_width": (x[:, 1:].contiguous(), weights),
        "nine_weights": (x, weights[:9]),  # type: ignore[dict-item]
        "no_tensor": (x, weights._replace(leaf_out_bias=None)),  # type: ignore[arg-type]
    }


@needs_kernel
@pytest.mark.parametrize("name", wrong(make(*SHAPES["usual_odd"]), tokens(2, 33)))
def test_short_way_leaves_to_the_operator(name: str) -> None:
    x, weights = wrong(make(*SHAPES["usual_odd"]), tokens(2, 33))[name]
    with torch.no_grad():
        assert cpu.infer(x, weights, "gelu") is None


@needs_kernel
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace` is deprecated")
def test_short_way_hides_from_nobody() -> None:
    """Whoever watches or rewrites operators meets the operator."""
    weights, x = make(*SHAPES["usual_odd"]), tokens(4, 33)
    expected = reference.fff_forward(x, weights, "gelu")

    def layer(x: Tensor) -> Tensor:
        return kernels.fff_forward(x, weights, "gelu")

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    class SeenFunctions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad():
        layer(x)  # the first call decides
        for mode in (Seen, SeenFunctions):
            names: list[str] = []
            with mode():
                layer(x)
            assert "fffconvert.fff.default" in names
        with torch.profiler.profile() as profile:
            layer(x)
        assert "fffconvert::fff" in {event.name for event in profile.events()}
        graph = make_fx(layer)(x)
        assert "fffconvert.fff" in graph.code
        other = tokens(4, 33, seed=5)
        torch.testing.assert_close(graph(other), layer(other))
        torch.testing.assert_close(torch.jit.trace(layer, (x,), check_trace=False)(other), layer(other))
        torch.testing.assert_close(layer(x.detach().requires_grad_()), expected)
        torch.testing.assert_close(layer(torch._neg_view(-x)), expected)  # its memory holds -x
        with pytest.raises(RuntimeError, match="vmap"):
            torch.func.vmap(layer)(x[:, None])


@needs_kernel
def test_short_way_reads_the_weights_of_the_moment() -> None:
    """Nothing is remembered: weights changed, exchanged, moved to another dtype and back are those that serve."""
    layer, x = FFF(TreeShape(3, 4), 33, "gelu"), tokens(2, 33)

    def agrees() -> None:
        with torch.no_grad():
            ours, plain = layer(x), reference.fff_forward(x, layer.weights, layer.activation)
        torch.testing.assert_close(ours, plain)

    agrees()
    for parameter in layer.parameters():
        parameter.data = parameter.data * 2
    agrees()
    layer.load_state_dict({name: -value for name, value in layer.state_dict().items()}, assign=True)
    agrees()
    layer.double().float()
    agrees()
    layer.leaf_out_bias = torch.nn.Parameter(torch.ones_like(layer.leaf_out_bias))
    agrees()
    layer = copy.deepcopy(layer).bfloat16()
    with torch.no_grad():
        assert layer(x.bfloat16()).dtype == torch.bfloat16


# ---- The door


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The door as a new process finds it."""
    kernels._wanted.cache_clear()
    monkeypatch.setattr(kernels, "_decided", None)
    kernels._cpu_kernel.cache_clear()
    monkeypatch.setattr(cpu, "_loaded", False)
    monkeypatch.setattr(cpu, "_infer", None)
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    yield monkeypatch
    kernels._wanted.cache_clear()
    kernels._cpu_kernel.cache_clear()


@pytest.fixture
def no_compiler(undecided: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    undecided.setenv("XDG_CACHE_HOME", str(tmp_path))
    undecided.setenv("PATH", str(tmp_path))
    undecided.delenv("CXX", raising=False)
    return undecided


@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_reference_serves() -> None:
    d_model, shape = SHAPES["usual_odd"]
    weights, x = make(d_model, shape), tokens(5, d_model)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler") as warned:
        first = kernels.fff_forward(x, weights, "gelu")
    assert len(warned) == 1
    kernels.fff_forward(x, weights, "gelu")  # says nothing more: a warning is an error here
    assert torch.equal(first, reference.fff_forward(x, weights, "gelu"))
    state = kernels.status()["cpu"]
    assert not state.available
    assert "no C++ compiler" in state.reason


def test_naming_what_is_not_there(no_compiler: pytest.MonkeyPatch) -> None:
    d_model, shape = SHAPES["usual_odd"]
    no_compiler.setenv(kernels.VARIABLE, "cpu")
    with pytest.raises(UserError, match="CPU kernel cannot serve: no C\\+\\+ compiler"):
        kernels.fff_forward(tokens(5, d_model), make(d_model, shape), "gelu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_naming_the_gpus_kernel_where_there_is_none(undecided: pytest.MonkeyPatch) -> None:
    d_model, shape = SHAPES["usual_odd"]
    undecided.setenv(kernels.VARIABLE, "gpu")
    with pytest.raises(UserError, match="the GPU kernel cannot serve"):
        kernels.fff_forward(tokens(5, d_model), make(d_model, shape), "gelu")


def test_misspelt_name(undecided: pytest.MonkeyPatch) -> None:
    d_model, shape = SHAPES["usual_odd"]
    undecided.setenv(kernels.VARIABLE, "cuda")
    with pytest.raises(UserError, match="auto, reference, cpu or gpu"):
        kernels.fff_forward(tokens(5, d_model), make(d_model, shape), "gelu")


def test_the_reference_by_name(undecided: pytest.MonkeyPatch) -> None:
    d_model, shape = SHAPES["usual_odd"]
    weights, x = make(d_model, shape), tokens(5, d_model)
    undecided.setenv(kernels.VARIABLE, "reference")
    undecided.setattr(cpu, "load", lambda: pytest.fail("built what nobody asked for"))
    assert torch.equal(kernels.fff_forward(x, weights, "gelu"), reference.fff_forward(x, weights, "gelu"))


def test_the_name_is_read_once(undecided: pytest.MonkeyPatch) -> None:
    d_model, shape = SHAPES["usual_odd"]
    weights, x = make(d_model, shape), tokens(5, d_model)
    undecided.setenv(kernels.VARIABLE, "reference")
    first = kernels.fff_forward(x, weights, "gelu")
    undecided.setenv(kernels.VARIABLE, "misspelt")
    assert torch.equal(kernels.fff_forward(x, weights, "gelu"), first)
    assert not kernels._uses_gpu_kernel()


BUILD_FOR_ANY_PROCESSOR = """
import os, sys
import fffconvert.kernels
assert not os.path.exists(os.environ["XDG_CACHE_HOME"]), "importing builds nothing"
import torch
from fffconvert import kernels
from fffconvert.kernels import cpu, reference
cpu._flags = lambda: ["-std=c++20", "-O0", "-shared", "-fPIC"]
state = kernels.status()["cpu"]
assert state.available, state.reason
x, weights = torch.load(sys.argv[1])
expected = reference.fff_forward(x, kernels.FFFWeights(*weights), "gelu")
torch.testing.assert_close(kernels.fff_forward(x, kernels.FFFWeights(*weights), "gelu"), expected)
"""


@needs_kernel
def test_importing_builds_nothing_and_what_is_built_for_any_processor_is_right(tmp_path: Path) -> None:
    """One process for both claims, because it takes seconds to import torch."""
    d_model, shape = SHAPES["everything"]
    torch.save((tokens(30, d_model), list(make(d_model, shape))), tmp_path / "case.pt")
    done = subprocess.run(
        [sys.executable, "-c", BUILD_FOR_ANY_PROCESSOR, str(tmp_path / "case.pt")],
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


COMPILER = """#!/bin/sh
# compiles nothing, and ends when two have begun
echo >> "{begun}"
while [ "$1" != -o ]; do shift; done
for _ in $(seq 1000); do [ $(wc -l < "{begun}") -ge 2 ] && break; sleep 0.1; done
cp "{library}" "$2"
"""

LOAD = """
import os
os.environ |= {"XDG_CACHE_HOME": folder, "CXX": f"{folder}/compiler"}
from fffconvert import kernels
state = kernels.status()["cpu"]
assert state.available, state.reason
"""


@in_processes
@needs_kernel
def test_two_processes_build_at_once(tmp_path: Path) -> None:
    compiler, begun, cache = (tmp_path / name for name in ("compiler", "begun", "fffconvert"))
    compiler.write_text(COMPILER.format(begun=begun, library=cpu.library_path()))
    compiler.chmod(0o700)
    abandoned = cache / "building-killed"
    abandoned.mkdir(parents=True)
    (abandoned / "half.so").write_text("what a killed process left")
    both = [start(exec, LOAD, {"folder": str(tmp_path)}) for _ in range(2)]
    assert [finish(process) for process in both] == [0, 0]
    assert begun.read_text() == "\n\n"
    assert {path.name for path in cache.iterdir()} == {abandoned.name, cpu.library_path().name}


def test_every_activation_has_a_number() -> None:
    assert set(cpu._NUMBERS) == set(ACTIVATIONS)
