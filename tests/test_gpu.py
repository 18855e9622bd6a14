"""The GPU's paths against the reference: on a GPU where there is one, else through Triton's interpreter."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from test_kernels import SHAPES, assert_same, cast, gradients, make, tokens
from torch import Tensor

from fffconvert import kernels
from fffconvert.kernels import ACTIVATIONS, FFFWeights, grouped, reference
from fffconvert.tree import TreeShape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def gpu():  # type: ignore[no-untyped-def]
    """The module of the Triton kernels; conftest.py has asked for the interpreter where there is no GPU."""
    pytest.importorskip("triton", reason="triton is not installed, so its kernels cannot even be interpreted")
    from fffconvert.kernels import gpu

    return gpu


def on_device(weights: FFFWeights) -> FFFWeights:
    return FFFWeights(*(w.to(DEVICE) for w in weights))


CASES = {name: SHAPES[name] for name in ("dense", "no_leaf_neurons", "usual_odd", "trunk", "two_trees")} | {
    "everything": (33, TreeShape(depth=1, leaf_width=17, trunk=3, trees=2, emitting=True)),
}


@pytest.mark.parametrize(("d_model", "shape"), CASES.values(), ids=CASES)
def test_kernel_equals_reference(gpu, d_model: int, shape: TreeShape) -> None:  # type: ignore[no-untyped-def]
    """Forward and, with the grouped products behind it, every gradient; a leaf may have more tokens than a tile."""
    weights, x = on_device(make(d_model, shape)), tokens(21, d_model).to(DEVICE)
    x[3] = float("nan")
    torch.testing.assert_close(
        gpu.fff_forward(x, weights, "gelu"),
        reference.fff_forward(x, weights, "gelu"),
        rtol=1e-5, atol=1e-5, equal_nan=True,
    )  # fmt: skip
    x[3] = 0.0
    expected = gradients(reference.fff_forward, x, weights, "gelu")
    assert_same(gradients(gpu.fff_forward, x, weights, "gelu"), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernel_activations(gpu, activation: str) -> None:  # type: ignore[no-untyped-def]
    weights = on_device(make(16, TreeShape(depth=1, leaf_width=3)))
    x = torch.linspace(-40, 40, 96, device=DEVICE).reshape(6, 16)
    actual, expected = (f.fff_forward(x, weights, activation) for f in (gpu, reference))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        pytest.param(
            torch.bfloat16,
            marks=pytest.mark.skipif(
                DEVICE == "cpu", reason="Triton's interpreter cannot compute in bfloat16"
            ),
        ),
    ],
    ids=str,
)
def test_kernel_in_half_precision(gpu, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    """The budget: at most twice the error that plain PyTorch makes, against float32."""
    weights, x = on_device(cast(make(24, TreeShape(depth=0, leaf_width=20)), dtype)), tokens(9, 24).to(DEVICE)
    x = x.to(dtype)
    truth = reference.fff_forward(x.float(), cast(weights, torch.float32), "gelu")
    ours, plain = ((f.fff_forward(x, weights, "gelu").float() - truth).abs().mean() for f in (gpu, reference))
    assert ours <= 2 * plain


def test_kernel_shapes_and_ties(gpu) -> None:  # type: ignore[no-untyped-def]
    weights = on_device(FFFWeights(*(torch.zeros_like(w) for w in make(8, TreeShape(depth=1, leaf_width=2)))))
    weights.leaf_out_bias[0, -1] = 1.0
    assert (gpu.fff_forward(torch.ones(2, 3, 8, device=DEVICE), weights, "relu") == 1).all()
    assert gpu.fff_forward(torch.ones(0, 3, 8, device=DEVICE), weights, "relu").shape == (0, 3, 8)


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "deep" and not SHAPES[name][1].gated])
@pytest.mark.parametrize("n_tokens", [1, 60])
def test_grouped_training_equals_reference(name: str, n_tokens: int) -> None:
    d_model, shape = SHAPES[name]
    weights, x = on_device(make(d_model, shape)), tokens(n_tokens, d_model).to(DEVICE)
    leaves = [reference.route(x, weights, tree) for tree in range(shape.trees)]

    def forward(x: Tensor, weights: FFFWeights, activation: str) -> Tensor:
        return grouped.fff_forward(x, weights, activation, leaves)

    expected = gradients(reference.fff_forward, x, weights, "gelu")
    assert_same(gradients(forward, x, weights, "gelu"), expected)


def test_the_door_knows_whether_it_can_serve() -> None:
    state = kernels.status()["gpu"]
    assert state.available == (DEVICE == "cuda" and find_spec("triton") is not None)
