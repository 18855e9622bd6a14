"""What the tests of the fit share: inputs for small FFNs, and how far a fitted layer is from its FFN."""

from __future__ import annotations

import torch
from torch import Tensor

from fffconvert.dense import DenseFFN
from fffconvert.fff import FFF
from fffconvert.kernels import reference

D_MODEL = 12


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def inputs_of(n_tokens: int, d_model: int = D_MODEL, seed: int = 9) -> Tensor:
    """Inputs with more spread along some features than along others, as real ones have."""
    return normal(n_tokens, d_model, seed=seed) * torch.linspace(0.2, 2, d_model) + 0.5


def output(layer: FFF, x: Tensor) -> Tensor:
    """By the reference, which is the definition; the kernel adds up in another order."""
    with torch.no_grad():
        return reference.fff_forward(x, layer.weights, layer.activation)


def error(layer: FFF, ffn: DenseFFN, x: Tensor) -> float:
    """The share of the FFN's variance that the layer leaves unexplained."""
    target = ffn(x)
    return float((output(layer, x) - target).square().sum() / (target - target.mean(0)).square().sum())
