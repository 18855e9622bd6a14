"""A linear layer in float32 on a CPU by oneDNN, PyTorch's other library for matrix products.

PyTorch gives these products to MKL, which does not use the AVX-512 of AMD's processors: oneDNN is then up to
twice as fast, elsewhere about as fast, and for short texts of a small model slower. It computes the same up to
rounding.
"""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

ONEDNN = (
    platform.machine() in ("x86_64", "AMD64")  # on Arm PyTorch asks oneDNN itself
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def onednn_serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN serves here: float32 on a CPU, and nothing that follows or replaces PyTorch's own operators."""
    return (
        ONEDNN
        and plain(x)
        and plain(weight)
        and (bias is None or plain(bias))
        and weight.dim() == 2
        and weight.is_contiguous()  # in part of a larger matrix oneDNN takes the numbers one by one
        and 0 < x.shape[-1] == weight.shape[1]  # else `F.linear` says what is wrong
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and forward_ad._current_level < 0
        and (torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack())
    )


def plain(tensor: Tensor) -> bool:
    """Whether it is ordinary float32 on a CPU; a class of its own may hold other numbers."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.is_cpu
        and tensor.dtype is torch.float32
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` by oneDNN, without a derivative: `(..., n_out)` from `(..., n_in)` and `(n_out, n_in)`."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return result


@torch.library.custom_op("fffconvert::linear", mutates_args=(), device_types="cpu")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `product`, an operator that `torch.compile` takes as it is; it would take the other one for its own."""
    return product(x, weight, bias)


linear.register_fake(lambda x, weight, _bias: x.new_empty((*x.shape[:-1], weight.shape[0])))


class OneDNNLinear(nn.Linear):
    """`nn.Linear`, by oneDNN where it serves and under `torch.no_grad` or `inference_mode`."""

    @classmethod
    def from_linear(cls, layer: nn.Linear) -> OneDNNLinear:
        """The same layer with the very same parameters."""
        made = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        made.weight, made.bias = layer.weight, layer.bias
        return made.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """Runs the layer: `(..., out_features)` from `(..., in_features)`."""
        if torch.is_grad_enabled() or not onednn_serves(x, self.weight, self.bias):
            return super().forward(x)
        if torch.compiler.is_compiling():
            return super().forward(x) if torch.compiler.is_exporting() else linear(x, self.weight, self.bias)
        return product(x, self.weight, self.bias)


class WithOneDNN(TorchFunctionMode):
    """A context in which `F.linear` is oneDNN's wherever it serves, in any model and with gradients."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and not torch.compiler.is_compiling():
            x, weight, bias = (*args, None)[:3]
            if onednn_serves(x, weight, bias) and x.numel():
                rows = _Differentiable.apply(x.reshape(-1, x.shape[-1]), weight, bias)
                return rows.reshape(*x.shape[:-1], len(weight))
        return func(*args, **(kwargs or {}))


def onednn_on(device: torch.device) -> AbstractContextManager[object]:
    """`WithOneDNN` where it can serve: elsewhere its look at every call of PyTorch is worth nothing."""
    return WithOneDNN() if ONEDNN and device.type == "cpu" else nullcontext()


class _Differentiable(torch.autograd.Function):
    """`product` with the derivative of `F.linear`, of `(n_tokens, n_in)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            product(grad, weight.T, None) if for_x else None,
            product(grad.T, x.contiguous().T, None) if for_weight else None,
            grad.sum(0) if for_bias else None,
        )
