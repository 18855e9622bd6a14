"""The one door to the arithmetic of a fast feedforward layer.

Which implementation serves is decided once per process, at the first call: on a CPU the C++ kernel where it
can be built, else the reference. `FFFCONVERT_KERNEL` (`auto`, `reference`, `cpu` or `gpu`) overrides that by
name. The GPU's kernel serves only where it is named, as long as it has not been tried on a real GPU.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from fffconvert.errors import UserError
from fffconvert.kernels import cpu, reference
from fffconvert.kernels.reference import ACTIVATIONS, FFFWeights, route

__all__ = ["ACTIVATIONS", "FFFWeights", "Implementation", "fff_forward", "route", "status"]

VARIABLE = "FFFCONVERT_KERNEL"


@dataclass(frozen=True)
class Implementation:
    """One way to compute a layer: whether it can serve here, and why or why not."""

    name: str
    available: bool
    reason: str


@cache
def _cpu_kernel() -> Implementation:
    """The CPU kernel, built and loaded when first asked for."""
    try:
        cpu.load()
    except cpu.Unavailable as error:
        return Implementation("cpu", False, str(error))
    return Implementation("cpu", True, f"float32 and bfloat16; built as {cpu.library_path()}")


@cache
def _gpu_kernel() -> Implementation:
    if find_spec("triton") is None:
        return Implementation("gpu", False, "triton is not installed")
    if not torch.cuda.is_available():
        return Implementation("gpu", False, "PyTorch sees no GPU")
    return Implementation("gpu", True, f"where {VARIABLE}=gpu; not tried on a real GPU yet")


@cache
def _wanted() -> str:
    """What `FFFCONVERT_KERNEL` named when it was first read; a kernel that is named must be able to serve."""
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in ("auto", "reference", "cpu", "gpu"):
        raise UserError(f"{VARIABLE} is {wanted!r}; expected auto, reference, cpu or gpu")
    kernel = {"cpu": _cpu_kernel, "gpu": _gpu_kernel}.get(wanted)
    if kernel is not None and not kernel().available:
        raise UserError(
            f"{VARIABLE}={wanted}, but the {wanted.upper()} kernel cannot serve: {kernel().reason}"
        )
    return wanted


_decided: bool | None = None  # no `@cache`: the short way of `fff_forward` reads it, and Dynamo traces it


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _uses_cpu_kernel() -> bool:
    """Whether float32 and bfloat16 on a CPU go to the kernel: decided at the first call, for the process."""
    global _decided
    if _decided is None:
        asked = _wanted() != "reference"
        _decided = asked and _cpu_kernel().available
        if asked and not _decided:
            reason = _cpu_kernel().reason
            warnings.warn(f"fffconvert uses the slower PyTorch reference: {reason}", stacklevel=3)
    return _decided


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _uses_gpu_kernel() -> bool:
    return _wanted() == "gpu"


def status() -> dict[str, Implementation]:
    """Each implementation by name and whether it can serve here. Builds the CPU kernel if it never was."""
    plain = Implementation("reference", True, "plain PyTorch, any device and dtype")
    return {"reference": plain, "cpu": _cpu_kernel(), "gpu": _gpu_kernel()}


def _is_followed() -> bool:
    """Whether dual numbers or, uncompiled, `torch.func` follow the computation: a kernel would lose or refuse them."""
    if forward_ad._current_level >= 0:
        return True
    return not torch.compiler.is_dynamo_compiling() and peek_interpreter_stack() is not None


def fff_forward(x: Tensor, weights: FFFWeights, activation: str) -> Tensor:
    """A fast feedforward layer, by the fastest implementation that serves here.

    The kernels take float32 and bfloat16, on a GPU float16 too but no gates; all else, weights of several dtypes
    among it, goes to the reference. Under autocast the CPU kernel computes in the weights' dtype.

    Args:
        x: `(..., d_model)`; any number of tokens, none included.
        weights: The layer's tensors, on the device and in the dtype of `x`, or in bfloat16 where that is float32.
        activation: A name in `ACTIVATIONS`.

    Returns:
        As `x`.

    Raises:
        UserError: Where `FFFCONVERT_KERNEL` names what cannot serve, and under `torch.jit.trace` where the reference
            serves.
    """
    if (
        not torch.compiler.is_dynamo_compiling()
        and _decided
        and type(x) is Tensor
        and not torch.is_grad_enabled()
        and forward_ad._current_level < 0
        and (x.dtype == weights.leaf_in_weight.dtype or not torch.is_autocast_enabled("cpu"))
        and (y := cpu.infer(x, weights, activation)) is not None
    ):
        return y
    if _is_followed():
        return reference.fff_forward(x, weights, activation)
    dtype = weights.leaf_in_weight.dtype
    served_by_gpu = x.is_cuda and dtype == x.dtype and dtype is not torch.float64 and not weights.gated
    if served_by_gpu and _uses_gpu_kernel():
        from fffconvert.kernels import gpu  # imports Triton

        return gpu.fff_forward(x, weights, activation)
    others = [weight for weight in weights if weight.dtype != dtype]
    mixed = any(weight.numel() for weight in others)  # as where parameters are cast and routers are not
    if not x.is_cpu or dtype not in cpu.DTYPES or mixed or not _uses_cpu_kernel():
        return reference.fff_forward(x, weights, activation)
    if x.dtype != dtype and torch.is_autocast_enabled("cpu"):
        x = x.to(dtype)
    if others:  # absent parts alone
        weights = FFFWeights(*(weight.to(dtype) for weight in weights))
    return cpu.fff_forward(x, weights, activation)
