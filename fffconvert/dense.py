"""The weights of one dense FFN, free of the model family that they come from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fffconvert.errors import UserError
from fffconvert.kernels import ACTIVATIONS
from fffconvert.kernels.reference import dense_ffn, neurons

CHUNK = 8192  # tokens whose activations are held at a time


@dataclass(frozen=True)
class DenseFFN:
    """A dense feed-forward network, `activation(x @ in_weight.T + in_bias) @ out_weight + out_bias`.

    In a GLU every neuron has a gate, a further row of input weights: the neuron gives
    `activation(x . row + bias) * (x . gate + gate_bias)`.

    Attributes:
        in_weight: `(n_neurons, d_model)`, one row per neuron; in a GLU as many rows for the gates follow.
        in_bias: `(n_neurons,)`; in a GLU as many for the gates follow.
        out_weight: `(n_neurons, d_model)`, one row per neuron (the transpose of `nn.Linear`'s weight).
        out_bias: `(d_model,)`.
        activation: A name in `fffconvert.kernels.ACTIVATIONS`.
    """

    in_weight: Tensor
    in_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    activation: str

    @classmethod
    def read(cls, up: list[nn.Linear], down: nn.Linear, activation: str, name: str) -> DenseFFN:
        """Copies the weights of linear layers, in float32. A bias that they lack is 0.

        Args:
            up: From `d_model` to `n_neurons`; in a GLU followed by that to the gates, or both in one.
            down: From `n_neurons` to `d_model`.
            activation: The activation between them.
            name: What an error message calls this FFN.

        Raises:
            UserError: For an activation without a definition here, or weights that are not finite.
        """
        if activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise UserError(f"{name}: activation {activation!r} is not supported; expected one of {known}")
        tensors = {
            "in_weight": torch.cat([linear.weight for linear in up]),
            "in_bias": torch.cat([bias_of(linear) for linear in up]),
            "out_weight": down.weight.T,
            "out_bias": bias_of(down),
        }
        for part, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise UserError(
                    f"{name}: the FFN's {part} holds NaN or infinity; expected finite numbers. "
                    "Convert a checkpoint from before training diverged."
                )
        copies = {
            part: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
            for part, tensor in tensors.items()
        }
        return cls(**copies, activation=activation)

    @property
    def n_neurons(self) -> int:
        """Rows of the output weights."""
        return self.out_weight.shape[0]

    @property
    def gated(self) -> bool:
        """Whether this is a GLU."""
        return len(self.in_weight) > len(self.out_weight)

    @property
    def d_model(self) -> int:
        """Columns of the input weights."""
        return self.in_weight.shape[1]

    def inputs_of(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of input weights and biases of chosen neurons, their gates' after their own."""
        rows = torch.cat([chosen, chosen + self.n_neurons]) if self.gated else chosen
        return self.in_weight[rows], self.in_bias[rows]

    def activations(self, x: Tensor) -> Tensor:
        """What each neuron gives, `(n_tokens, n_neurons)`, for `x` `(n_tokens, d_model)`."""
        return neurons(x, self.in_weight, self.in_bias, self.activation, self.gated)

    def __call__(self, x: Tensor) -> Tensor:
        """The FFN's output, `(n_tokens, d_model)`, for `x` `(n_tokens, d_model)`."""
        parts = (self.in_weight, self.in_bias, self.out_weight)
        return dense_ffn(x, *parts, self.activation) + self.out_bias

    def in_chunks(self, x: Tensor) -> Tensor:
        """As calling it, without holding the activations of all tokens at once."""
        return torch.cat([self(chunk) for chunk in torch.split(x, CHUNK)])


def bias_of(linear: nn.Linear) -> Tensor:
    """A linear layer's bias, zeros where it has none."""
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
