"""A linear layer in int8, for the projections that are left when the FFNs are gone.

This is PyTorch's own dynamic quantization for CPUs (FBGEMM, oneDNN or QNNPACK, as PyTorch chooses). Weights are
stored as int8 with one scale per output; inputs are quantized as they come, with one scale per call, so a
token's output depends by a rounding error on what else is in its batch.

Weights use 7 of the 8 bits and inputs all 8: processors without VNNI add pairs of products in 16 bits, which
hold 255 * 63 * 2 and no more, so that every sum is exact; and it is the inputs, with their outliers, that need
the bit. Inputs far below 1e-3, which no LayerNorm gives, are rounded away. What is packed at the first call stays
until a state dict is loaded: what is changed in place goes unseen, and so does a scale or bias that is exchanged.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fffconvert.errors import UserError

LARGEST = 63  # of a weight's integers

_packed = WeakIdKeyDictionary()
"""Weights in the layout that the processor wants, by the int8 tensor that they were made from."""


def pack(weight: Tensor, scale: Tensor, bias: Tensor) -> Any:
    """The weights in PyTorch's layout for this processor, made when they are first used."""
    if weight not in _packed:
        if torch.backends.quantized.engine == "none":
            raise UserError("this build of PyTorch has no int8 arithmetic; use the model without --int8")
        with warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", message=".*deprecated", category=UserWarning)
            zeros = torch.zeros(len(scale), dtype=torch.long)
            quantized = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
            _packed[weight] = torch.ops.quantized.linear_prepack(quantized, bias)
    return _packed[weight]


@torch.library.custom_op("fffconvert::int8_linear", mutates_args=(), device_types="cpu")
def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """`F.linear` with an int8 weight, as an operator that `torch.compile` knows and autograd refuses.

    Args:
        x: `(..., n_in)`, float32.
        weight: `(n_out, n_in)`, int8.
        scale: `(n_out,)`, what an integer of each row of `weight` stands for.
        bias: `(n_out,)`.

    Returns:
        `(..., n_out)`, float32.
    """
    result: Tensor = torch.ops.quantized.linear_dynamic.default(x, pack(weight, scale, bias), False)
    return result


int8_linear.register_fake(lambda x, weight, _scale, _bias: x.new_empty((*x.shape[:-1], weight.shape[0])))


class Int8Linear(nn.Module):
    """`nn.Linear` for inference on a CPU, its weight stored as int8.

    Args:
        n_in: Width of the input.
        n_out: Width of the output.

    Shapes:
        Input is `(..., n_in)` of two dimensions or more, output `(..., n_out)`, both float32.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-LARGEST, LARGEST + 1, (n_out, n_in), dtype=torch.int8))
        self.register_buffer("scale", torch.full((n_out,), n_in**-0.5 / LARGEST))
        self.register_buffer("bias", torch.zeros(n_out))

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear) -> Int8Linear:
        """Rounds the weight of a float32 layer, each output by its own scale.

        Raises:
            UserError: For weights that are not finite.
        """
        weight = linear.weight.float()  # (n_out, n_in)
        if not torch.isfinite(weight).all():
            raise UserError("a projection's weight holds NaN or infinity; expected finite numbers")
        made = cls(linear.in_features, linear.out_features)
        made.scale.copy_(weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny * LARGEST) / LARGEST)
        made.weight.copy_((weight / made.scale[:, None]).round())
        if linear.bias is not None:
            made.bias.copy_(linear.bias)
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Runs the layer.

        Raises:
            UserError: In training, on a GPU, and for inputs in another dtype than float32.
        """
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise UserError(
                f"int8 projections take float32 on a CPU; got {x.dtype} on {x.device.type}. Use the float32 model there"
            )
        if torch.is_grad_enabled() and self.training:
            raise UserError("int8 projections cannot be trained; train the float32 model, then quantize it")
        followed = torch.compiler.is_compiling() or torch._C._get_tracing_state()
        if followed or (torch.is_grad_enabled() and x.requires_grad):
            return int8_linear(x, self.weight, self.scale, self.bias)  # dearer than its call
        packed = pack(self.weight, self.scale, self.bias)
        result: Tensor = torch.ops.quantized.linear_dynamic.default(x, packed, False)
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        _packed.pop(self.weight, None)

    def extra_repr(self) -> str:
        """Widths, for `print(model)`."""
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}"
