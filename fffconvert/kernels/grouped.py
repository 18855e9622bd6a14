"""Hard-routed training by grouped matrix products: tokens sorted by leaf, no weights gathered per token.

It serves on a GPU, and has not run on one yet: the tests run it on a CPU, where the compiled kernel is better.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fffconvert.kernels.reference import ACTIVATIONS, FFFWeights, dense_ffn


def _grouped_ffn(
    x: Tensor, group: Tensor, in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, activation: str
) -> Tensor:
    """Each token through the FFN of its group.

    Args:
        x: `(n_tokens, d_model)`, in the order of their groups.
        group: `(n_tokens,)`, ascending.
        in_weight: `(n_groups, width, d_model)`; `out_weight` likewise.
        in_bias: `(n_groups, width)`.
        out_weight: As `in_weight`.
        activation: A name in `ACTIVATIONS`.
    """
    n_groups, width, d = in_weight.shape
    ends = torch.bincount(group, minlength=n_groups).cumsum(0).int()
    rows = -width % 8 if width else 8  # grouped products want strides of whole 16 bytes, not 0
    columns = -d % 8
    ups, downs = (F.pad(w, (0, columns, 0, rows)) for w in (in_weight, out_weight))
    h = F.grouped_mm(F.pad(x, (0, columns)), ups.transpose(1, 2), offs=ends)  # (n_tokens, width + rows)
    a = ACTIVATIONS[activation](h + F.pad(in_bias, (0, rows))[group])
    return F.grouped_mm(a, downs, offs=ends)[:, :d]


def fff_forward(x: Tensor, weights: FFFWeights, activation: str, leaves: list[Tensor]) -> Tensor:
    """`reference.fff_forward` by grouped products, differentiable as the reference is.

    Args:
        x: `(n_tokens, d_model)`, one token or more.
        weights: The layer's tensors, in the dtype and on the device of `x`; float32, bfloat16 or float16.
        activation: A name in `ACTIVATIONS`.
        leaves: For each tree the leaf of each token, `(n_tokens,)`.
    """
    w, depth = weights, weights.depth
    y = torch.zeros_like(x)
    for tree, leaf in enumerate(leaves):
        order = leaf.argsort(stable=True)
        tokens, sorted_leaf = x[order], leaf[order]
        in_weight, in_bias, out_weight, out_bias = w.leaves(tree)
        out = _grouped_ffn(tokens, sorted_leaf, in_weight, in_bias, out_weight, activation)
        out = out + out_bias[sorted_leaf]
        for level in range(depth if w.emitting else 0):  # an FFN of one neuron for every node of the level
            nodes = slice(2**level - 1, 2 ** (level + 1) - 1)
            ffn = (w.router_weight[tree, nodes, None], w.router_bias[tree, nodes, None],
                   w.node_out_weight[tree, nodes, None])  # fmt: skip
            out = out + _grouped_ffn(tokens, sorted_leaf >> (depth - level), *ffn, activation)
        y = y + out[order.argsort()]
    if len(w.trunk_in_weight):
        y = y + dense_ffn(x, *w.trunk, activation)
    return y
