"""What a fast feedforward layer computes, in plain PyTorch. Every other path is tested equal to this.

For one token `x` and one tree: start at the root; at each node take the sign of the router's score
`w . x + b` to go left or right; at the leaf reached, compute the small dense FFN stored there. A node
that emits adds `activation(score)` times its output weights on the way. Trees are summed, and the
trunk, a small dense FFN for every token, is added. Where neurons have gates, a neuron's activation is
multiplied by `gate . x + bias`.

Autograd differentiates it as it stands. The choice of the path is hard, so routers that do not emit
get no gradient. Tokens are taken leaf by leaf: time and memory grow with the leaves that are used,
not with those that exist. Weights that are stored in fewer bits than `x` has are computed with in its dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fffconvert.errors import UserError
from fffconvert.tree import child, goes_right

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}
"""Activations by the names that `transformers` configurations use."""


class FFFWeights(NamedTuple):
    """The tensors of one fast feedforward layer. Parts that the shape lacks have a dimension of 0.

    Where neurons have gates there are twice as many rows of input weights and biases as of output weights:
    first the neurons' own, in a leaf or the trunk, then their gates'.
    """

    router_weight: Tensor  # (n_trees, n_nodes, d_model)
    router_bias: Tensor  # (n_trees, n_nodes)
    node_out_weight: Tensor  # (n_trees, n_nodes, d_model) where nodes emit, else (n_trees, 0, d_model)
    leaf_in_weight: Tensor  # (n_trees, n_leaves, leaf_width, d_model)
    leaf_in_bias: Tensor  # (n_trees, n_leaves, leaf_width)
    leaf_out_weight: Tensor  # (n_trees, n_leaves, leaf_width, d_model)
    leaf_out_bias: Tensor  # (n_trees, n_leaves, d_model)
    trunk_in_weight: Tensor  # (trunk, d_model)
    trunk_in_bias: Tensor  # (trunk,)
    trunk_out_weight: Tensor  # (trunk, d_model)

    @property
    def depth(self) -> int:
        """Levels of routers, read off the number of leaves."""
        return int(self.leaf_in_weight.shape[1]).bit_length() - 1

    @property
    def n_trees(self) -> int:
        """Parallel trees."""
        return self.leaf_in_weight.shape[0]

    @property
    def emitting(self) -> bool:
        """Whether nodes are neurons too."""
        return self.node_out_weight.shape[1] > 0

    @property
    def gated(self) -> bool:
        """Whether neurons of leaves or trunk have gates."""
        return (
            self.leaf_in_weight.shape[2] > self.leaf_out_weight.shape[2]
            or self.trunk_in_weight.shape[0] > self.trunk_out_weight.shape[0]
        )

    @property
    def trunk(self) -> tuple[Tensor, Tensor, Tensor]:
        """The trunk's input weights and biases, and output weights."""
        return self.trunk_in_weight, self.trunk_in_bias, self.trunk_out_weight

    def leaves(self, tree: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Input weights and biases, output weights and biases of a tree's leaves."""
        return (
            self.leaf_in_weight[tree],
            self.leaf_in_bias[tree],
            self.leaf_out_weight[tree],
            self.leaf_out_bias[tree],
        )


def neurons(x: Tensor, in_weight: Tensor, in_bias: Tensor, activation: str, gated: bool) -> Tensor:
    """What each neuron of a dense FFN gives before its output weights.

    Args:
        x: `(n_tokens, d_model)`.
        in_weight: `(n_neurons, d_model)`; where `gated`, as many rows for the gates follow.
        in_bias: `(n_neurons,)`; where `gated`, as many for the gates follow.
        activation: A name in `ACTIVATIONS`.
        gated: Whether neurons have gates.

    Returns:
        `(n_tokens, n_neurons)`.
    """
    scores = F.linear(x, in_weight, in_bias)
    if not gated:
        return ACTIVATIONS[activation](scores)
    scores, gates = scores.chunk(2, dim=-1)
    return ACTIVATIONS[activation](scores) * gates


def dense_ffn(x: Tensor, in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, activation: str) -> Tensor:
    """A dense FFN without output bias.

    Args:
        x: `(n_tokens, d_model)`.
        in_weight: `(n_neurons, d_model)`, or twice as many rows where neurons have gates (see `neurons`).
        in_bias: `(n_neurons,)`, or twice as many.
        out_weight: `(n_neurons, d_model)`, one row per neuron.
        activation: A name in `ACTIVATIONS`.

    Returns:
        `(n_tokens, d_model)`.
    """
    gated = len(in_weight) > len(out_weight)
    in_weight, in_bias, out_weight = (w.to(x.dtype) for w in (in_weight, in_bias, out_weight))
    return neurons(x, in_weight, in_bias, activation, gated) @ out_weight


def score(x: Tensor, weights: FFFWeights, tree: int, node: Tensor) -> Tensor:
    """The score of one node per token: `(n_tokens,)` from `x` `(n_tokens, d_model)` and `node` `(n_tokens,)`."""
    wide = torch.promote_types(x.dtype, torch.float32)  # rounding changes paths
    routers = weights.router_weight[tree].index_select(0, node).to(wide)  # (n_tokens, d_model)
    return (x * routers).sum(-1) + weights.router_bias[tree, node]


def route(x: Tensor, weights: FFFWeights, tree: int = 0) -> Tensor:
    """The leaf that each token reaches in one tree: `(n_tokens,)`, from `x` `(n_tokens, d_model)`."""
    node = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
    for _ in range(weights.depth):
        node = child(node, goes_right(score(x, weights, tree, node)).long())
    return node - (2**weights.depth - 1)


def leaves_forward(x: Tensor, leaf: Tensor, weights: FFFWeights, tree: int, activation: str) -> Tensor:
    """Each token through its own leaf: `(n_tokens, d_model)`, from `leaf` `(n_tokens,)`."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise UserError("torch.jit.trace keeps to the path of its example; use torch.export")
    order = leaf.argsort(stable=True)
    used, counts = torch.unique_consecutive(leaf[order], return_counts=True)
    outputs = [
        dense_ffn(tokens, in_weight, in_bias, out_weight, activation) + out_bias
        for tokens, in_weight, in_bias, out_weight, out_bias in zip(
            x[order].split(counts.tolist()),
            *(table[used].unbind() for table in weights.leaves(tree)),
            strict=True,
        )
    ]
    return torch.cat(outputs)[order.argsort()]


def emissions(x: Tensor, weights: FFFWeights, tree: int, activation: str) -> Tensor:
    """What the emitting nodes on each token's path add: `(n_tokens, d_model)`."""
    total = torch.zeros_like(x)
    node = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
    for _ in range(weights.depth):
        scores = score(x, weights, tree, node)
        emitted = ACTIVATIONS[activation](scores)[:, None].to(x.dtype)
        total = total + emitted * weights.node_out_weight[tree, node]
        node = child(node, goes_right(scores).long())
    return total


Leaves = Callable[[Tensor, Tensor, FFFWeights, int, str], Tensor]


def fff_forward(x: Tensor, weights: FFFWeights, activation: str, leaves: Leaves = leaves_forward) -> Tensor:
    """A fast feedforward layer.

    Args:
        x: `(..., d_model)`; any number of tokens, none included.
        weights: The layer's tensors, on the device and in the dtype of `x` or in a narrower one.
        activation: A name in `ACTIVATIONS`.
        leaves: How tokens are taken through their leaves; what can run no loop has another way.

    Returns:
        As `x`.
    """
    tokens = x.reshape(-1, x.shape[-1])  # (n_tokens, d_model)
    if tokens.shape[0] == 0:
        return x + 0 * sum(weight.sum() for weight in weights)  # gradients are 0, not absent
    parts = []
    for tree in range(weights.n_trees):
        parts.append(leaves(tokens, route(tokens, weights, tree), weights, tree, activation))
        if weights.emitting:
            parts.append(emissions(tokens, weights, tree, activation))
    if len(weights.trunk_in_weight):
        parts.append(dense_ffn(tokens, *weights.trunk, activation))
    return (torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]).reshape(x.shape)
