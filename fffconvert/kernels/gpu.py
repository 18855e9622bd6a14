"""The GPU's way through a layer: Triton kernels for inference, grouped products (grouped.py) for training.

It has not run on a GPU yet. The tests run the kernels through Triton's interpreter, which shows that they are
right and says nothing of their speed.

Tokens are sorted by leaf, so that a tile of tokens shares one leaf's weights, and no weights are gathered per
token. The trunk is a dense FFN, for which PyTorch's own products serve.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fffconvert.kernels import grouped, reference
from fffconvert.kernels.reference import FFFWeights, dense_ffn

TILE = 16  # tokens that share a leaf's weights, and the least that a tensor core takes
_SAME = {"gelu_pytorch_tanh": "gelu_new"}  # two names of one function


@triton.jit
def _activate(x, NAME: tl.constexpr):
    if NAME == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if NAME == "relu":
        return tl.where(x < 0, 0.0, x)
    if NAME == "silu":
        return x / (1.0 + tl.exp(-x))
    if NAME == "tanh" or NAME == "gelu_new":
        z = x if NAME == "tanh" else 0.7978845608028654 * (x + 0.044715 * x * x * x)
        e = tl.exp(-2.0 * tl.abs(z))  # never overflows
        t = (1.0 - e) / (1.0 + e)
        t = tl.where(z < 0, -t, t)
        return t if NAME == "tanh" else 0.5 * x * (1.0 + t)
    return x


@triton.jit
def _route(x, router, bias, leaf, scores, d, DEPTH: tl.constexpr, KEEP: tl.constexpr, K: tl.constexpr):
    """One token from the root to its leaf."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, K)
    node = token * 0
    for level in range(DEPTH):
        products = tl.zeros([K], tl.float32)
        for k in range(0, d, K):
            inside = k + columns < d
            a = tl.load(x + token * d + k + columns, inside, 0.0).to(tl.float32)
            b = tl.load(router + node * d + k + columns, inside, 0.0).to(tl.float32)
            products += a * b
        score = tl.sum(products) + tl.load(bias + node).to(tl.float32)
        if KEEP:
            tl.store(scores + token * DEPTH + level, score)
        node = 2 * node + 1 + (score >= 0).to(tl.int64)  # a tie goes right, NaN goes left
    tl.store(leaf + token, node - ((1 << DEPTH) - 1))


@triton.jit
def _add(y, tokens, mine, d, h, rows, live, bias, HAS_BIAS: tl.constexpr, K: tl.constexpr):
    """y[tokens] += h (T, W) times the output weights at `rows` (W,), + bias."""
    for k in range(0, d, K):
        columns = k + tl.arange(0, K)
        inside = columns < d
        w = tl.load(rows[:, None] + columns[None, :], live[:, None] & inside[None, :], 0.0)
        at = y + tokens[:, None] * d + columns[None, :]
        mask = mine[:, None] & inside[None, :]
        sums = tl.load(at, mask, 0.0) + tl.dot(h.to(w.dtype), w, input_precision="ieee")
        if HAS_BIAS:
            sums += tl.load(bias + columns, inside, 0.0).to(tl.float32)[None, :]
        tl.store(at, sums, mask)


@triton.jit
def _leaves(
    x, y, order, tile_leaf, tile_start, tile_end, in_weight, in_bias, out_weight, out_bias, scores, node_out,
    d, width,
    DEPTH: tl.constexpr, EMITTING: tl.constexpr, NAME: tl.constexpr,
    T: tl.constexpr, W: tl.constexpr, L: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One tile of at most T tokens of one leaf; W of its neurons, L levels and K columns at a time."""
    tile = tl.program_id(0)
    leaf = tl.load(tile_leaf + tile)
    position = tl.load(tile_start + tile) + tl.arange(0, T)
    mine = position < tl.load(tile_end + tile)
    tokens = tl.load(order + position, mine, 0)
    for first in range(0, width, W):
        neuron = first + tl.arange(0, W)
        live = neuron < width
        row = leaf * width + neuron
        h = tl.zeros([T, W], tl.float32)
        for k in range(0, d, K):
            columns = k + tl.arange(0, K)
            inside = columns < d
            a = tl.load(x + tokens[:, None] * d + columns[None, :], mine[:, None] & inside[None, :], 0.0)
            b = tl.load(in_weight + row[None, :] * d + columns[:, None], live[None, :] & inside[:, None], 0.0)
            h += tl.dot(a, b, input_precision="ieee")
        h += tl.load(in_bias + row, live, 0.0).to(tl.float32)[None, :]
        h = tl.where(live[None, :], _activate(h, NAME), 0.0)
        _add(y, tokens, mine, d, h, out_weight + row * d, live, out_bias, False, K)
    level = tl.arange(0, L)
    live = level < DEPTH if EMITTING else level < 0
    s = tl.zeros([T, L], tl.float32)
    node = level * leaf * 0
    if EMITTING:
        s = tl.load(scores + tokens[:, None] * DEPTH + level[None, :], mine[:, None] & live[None, :], 0.0)
        node = tl.where(live, ((leaf + (1 << DEPTH)) >> (DEPTH - tl.minimum(level, DEPTH))) - 1, 0)
    h = tl.where(live[None, :], _activate(s, NAME), 0.0)
    _add(y, tokens, mine, d, h, node_out + node * d, live, out_bias + leaf * d, True, K)


def route(x: Tensor, weights: FFFWeights, tree: int, scores: Tensor | None = None) -> Tensor:
    """`reference.route` by Triton, for contiguous tensors; fills `scores` `(n_tokens, depth)` where it is given."""
    n_tokens, d = x.shape
    leaf = torch.empty(n_tokens, dtype=torch.long, device=x.device)
    _route[(n_tokens,)](
        x, weights.router_weight[tree], weights.router_bias[tree], leaf, leaf if scores is None else scores, d,
        DEPTH=weights.depth, KEEP=scores is not None, K=min(1024, triton.next_power_of_2(d)),
    )  # fmt: skip
    return leaf


def _tiles(leaf: Tensor, n_leaves: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens in the order of their leaves, and of each tile its leaf, its first position and its last's next.

    The number of tiles is the most that can be needed, so that the GPU is not asked for it; the others are empty.
    """
    order = leaf.argsort(stable=True)
    counts = torch.bincount(leaf, minlength=n_leaves)
    tiles = (counts + TILE - 1) // TILE
    ends, tile_ends = counts.cumsum(0), tiles.cumsum(0)
    number = torch.arange(len(leaf) // TILE + min(n_leaves, len(leaf)), device=leaf.device)
    of = torch.searchsorted(tile_ends, number, right=True).clamp(max=n_leaves - 1)
    start = (ends - counts)[of] + (number - (tile_ends - tiles)[of]) * TILE
    return order, of, start, ends[of]


def fff_inference(x: Tensor, weights: FFFWeights, activation: str) -> Tensor:
    """`reference.fff_forward` by the Triton kernels, without gradients; accumulates in float32.

    Args:
        x: `(n_tokens, d_model)`, one token or more.
        weights: The layer's tensors, in the dtype and on the device of `x`; float32, bfloat16 or float16.
        activation: A name in `ACTIVATIONS`.
    """
    x = x.contiguous()
    w = FFFWeights(*(t.contiguous() for t in weights))
    (n_tokens, d), depth, emitting = x.shape, w.depth, w.emitting
    width, columns = w.leaf_in_weight.shape[2], min(64, max(16, triton.next_power_of_2(d)))
    if len(w.trunk_in_weight):
        y = dense_ffn(x, *w.trunk, activation).float()
    else:
        y = torch.zeros_like(x, dtype=torch.float32)
    scores = torch.empty(n_tokens, depth, device=x.device) if emitting else None
    for tree in range(w.n_trees):
        tiles = _tiles(route(x, w, tree, scores), 2**depth)
        _leaves[(len(tiles[1]),)](
            x, y, *tiles, *w.leaves(tree), y if scores is None else scores, w.node_out_weight[tree], d, width,
            DEPTH=depth, EMITTING=emitting, NAME=_SAME.get(activation, activation),
            T=TILE, W=16, L=max(16, triton.next_power_of_2(depth)), K=columns,
        )  # fmt: skip
    return y.to(x.dtype)


def fff_forward(x: Tensor, weights: FFFWeights, activation: str) -> Tensor:
    """`reference.fff_forward` on a GPU, with gradients where they are asked for."""
    tokens = x.reshape(-1, x.shape[-1])  # (n_tokens, d_model)
    if len(tokens) == 0:
        return reference.fff_forward(x, weights, activation)
    if torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in weights)):
        plain = FFFWeights(*(w.detach().contiguous() for w in weights))
        held = tokens.detach().contiguous()
        leaves = [route(held, plain, tree) for tree in range(weights.n_trees)]
        return grouped.fff_forward(tokens, weights, activation, leaves).reshape(x.shape)
    return fff_inference(tokens, weights, activation).reshape(x.shape)
