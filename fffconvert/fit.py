"""The closed-form fit: from a dense FFN and its calibration inputs to the weights of an FFF layer.

The parts are fitted one after the other, each to what the earlier ones left over: the trunk, then tree
after tree, and in a tree the emitting nodes from the root down, then the leaves. A part takes the dense
neurons whose contribution varies most on its own inputs (a neuron may serve several leaves) and refits
their output weights by ridge regression toward the original ones. A linear part is the best linear map
of its rank on its own inputs (reduced-rank regression; Izenman 1975). The mean of what is left out goes
into the leaf's output bias.

What counts as an error is weighted by what it does to the model's outputs, where that is known: most
directions of an FFN's output hardly move them. It is as if the outputs were fitted in other coordinates.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fffconvert.cluster import Clustered, grow
from fffconvert.dense import CHUNK, DenseFFN
from fffconvert.errors import UserError
from fffconvert.fff import FFF
from fffconvert.kernels import ACTIVATIONS
from fffconvert.kernels.reference import dense_ffn, neurons, score
from fffconvert.recipe import Init
from fffconvert.tree import TreeShape, child, goes_right

RIDGE = 1.0  # of the mean squared length of the regressors; on MNLI 1.3 and 2.7 do as well, 5.3 does not
LEAST_SENSITIVITY = 0.1  # of the mean: the outputs are not all that later layers need
SPARE_VECTORS = 12  # beside those asked for, in a randomized decomposition (Halko et al., arXiv 0909.4061)
FEWEST_TOKENS = 32  # a leaf with fewer is fitted on its closest ancestor that has as many


class Part(NamedTuple):
    """A small FFN without output bias: a leaf's neurons or the trunk."""

    in_weight: Tensor  # (width, d_model), then as many rows of gates where neurons have gates
    in_bias: Tensor  # (width,), then as many
    out_weight: Tensor  # (width, d_model)


def fit_layer(
    ffn: DenseFFN,
    inputs: Tensor,
    shape: TreeShape,
    init: Init,
    seed: int,
    target: Tensor | None = None,
    sensitivity: Tensor | None = None,
) -> FFF:
    """Fits a whole layer.

    Args:
        ffn: The dense FFN.
        inputs: Calibration inputs, `(n_tokens, d_model)`.
        shape: The shape of the layer.
        init: What is clustered to grow the trees; `random` draws all weights as `nn.Linear` would and only
            sets the leaves' biases to the mean output: the control.
        seed: Decides every draw.
        target: What the layer should give, `(n_tokens, d_model)`; not given, what the dense FFN gives.
        sensitivity: What errors cost (see `fffconvert.sensitivity.sensitivities`), `(d_model, d_model)`; not
            given, all directions count alike. A linear shape uses it.

    Returns:
        The layer, float32 on the CPU.

    Raises:
        UserError: For more neurons in a leaf or in the trunk than the dense FFN can fill.
    """
    check_width(shape, init, ffn)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        layer = FFF(shape, ffn.d_model, ffn.activation)
        if target is None:
            target = ffn.in_chunks(inputs)
        if init == "random":
            layer.leaf_out_bias[0] = target.mean(0)
        elif shape.linear and sensitivity is not None:
            there, back = square_roots(sensitivity)
            seen = replace(ffn, out_weight=ffn.out_weight @ there, out_bias=ffn.out_bias @ there)
            fit_parts(seen, inputs, target @ there, layer, init, seed)
            for name in ("node_out_weight", "leaf_out_weight", "leaf_out_bias", "trunk_out_weight"):
                getattr(layer, name).copy_(getattr(layer, name) @ back)
        else:
            fit_parts(ffn, inputs, target.clone(), layer, init, seed)
    return layer


def check_width(shape: TreeShape, init: Init, ffn: DenseFFN) -> None:
    """Raises a `UserError` for more neurons in a leaf or in the trunk than the dense FFN can fill."""
    limit = ffn.d_model if shape.linear else ffn.n_neurons
    for name in ("leaf_width", "trunk"):
        if init != "random" and getattr(shape, name) > limit:
            raise UserError(f"tree.{name} is {getattr(shape, name)}; expected at most {limit} for this model")


def fit_parts(
    ffn: DenseFFN,
    inputs: Tensor,
    rest: Tensor,
    layer: FFF,
    init: Clustered,
    seed: int,
) -> None:
    """Fits the trunk and tree after tree to `rest`, `(n_tokens, d_model)`: what is still to be explained; used up."""
    fit_trunk(ffn, inputs, rest, layer)
    for tree in range(layer.shape.trees):
        fit_tree(ffn, inputs, rest, layer, tree, init, seed + tree)


def square_roots(sensitivity: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a sensitivity and its inverse, every direction counting a little."""
    raised = sensitivity.double() + LEAST_SENSITIVITY * torch.eye(len(sensitivity), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(raised)  # (d_model,), (d_model, d_model)
    values = values.clamp_min(LEAST_SENSITIVITY)  # below it by rounding alone
    roots = values.sqrt()
    return ((vectors * roots) @ vectors.T).float(), ((vectors / roots) @ vectors.T).float()


def fit_trunk(ffn: DenseFFN, inputs: Tensor, rest: Tensor, layer: FFF) -> None:
    """Fits the trunk and takes what it explains off `rest`, in place."""
    if layer.shape.trunk:
        trunk = fit_part(ffn, inputs, rest, layer.shape.trunk, layer.shape.linear, first=True)
        for name, tensor in trunk._asdict().items():
            getattr(layer, f"trunk_{name}").copy_(tensor)
        rest -= dense_ffn(inputs, *trunk, layer.activation)


def fit_tree(
    ffn: DenseFFN,
    inputs: Tensor,
    rest: Tensor,
    layer: FFF,
    tree: int,
    init: Clustered,
    seed: int,
) -> None:
    """Grows one tree and fits its nodes and leaves; takes what it explains off `rest` where another tree follows."""
    seen, in_weight = inputs, ffn.in_weight[: ffn.n_neurons]
    if tree > 0:  # the same view would grow the same tree: a random subspace each (Ho 1998)
        half = torch.full((ffn.d_model,), 0.5)
        view = torch.bernoulli(half, generator=torch.Generator().manual_seed(seed))
        seen, in_weight = inputs * view, in_weight * view
    grown = grow(init, seen, in_weight, layer.shape.depth, seed)
    layer.router_weight[tree], layer.router_bias[tree] = grown
    if layer.shape.emitting:
        fit_nodes(inputs, rest, layer, tree)
    fit_leaves(ffn, inputs, rest, layer, tree)


def fit_nodes(inputs: Tensor, rest: Tensor, layer: FFF, tree: int) -> None:
    """Fits the output weights of emitting nodes from the root down, each on the tokens that reach it."""
    node_of_token = torch.zeros(len(inputs), dtype=torch.long)
    for node in range(layer.shape.n_nodes):
        here = (node_of_token == node).nonzero()[:, 0]
        if len(here) == 0:
            layer.node_out_weight[tree, node] = 0
            continue
        scores = score(inputs[here], layer.weights, tree, node_of_token[here])
        activity = ACTIVATIONS[layer.activation](scores)[:, None]  # (n_here, 1)
        out_weight = ridge(activity, rest[here], torch.zeros(1, layer.d_model))[0]
        layer.node_out_weight[tree, node] = out_weight
        rest[here] -= activity * out_weight
        node_of_token[here] = child(node, goes_right(scores).long())


def fit_leaves(ffn: DenseFFN, inputs: Tensor, rest: Tensor, layer: FFF, tree: int) -> None:
    """Fits the leaves of one tree, each on the tokens that reach it, and takes what they explain off for the next."""
    shape = layer.shape
    first = tree == 0 and shape.trunk == 0 and not (shape.emitting and shape.depth > 0)
    last = tree == shape.trees - 1
    leaf_of_token = layer.leaf_of(inputs)[:, tree]
    # neighbours lend their tokens, so the targets must not change on the way
    targets = rest if last else rest.clone()
    for leaf in range(shape.n_leaves):
        near = neighbourhood(leaf_of_token, leaf, shape.depth)
        x, target = inputs.index_select(0, near), targets.index_select(0, near)
        part = fit_part(ffn, x, target, shape.leaf_width, shape.linear, first)
        bias = (target - dense_ffn(x, *part, layer.activation)).mean(0)
        if first and shape.leaf_width == ffn.n_neurons and not shape.linear:
            bias = ffn.out_bias  # nothing is left out, so this is the dense FFN itself
        for name, tensor in part._asdict().items():
            getattr(layer, f"leaf_{name}")[tree, leaf] = tensor
        layer.leaf_out_bias[tree, leaf] = bias
        if not last:
            here = (leaf_of_token == leaf).nonzero()[:, 0]
            rest[here] -= dense_ffn(inputs[here], *part, layer.activation) + bias


def neighbourhood(leaf_of_token: Tensor, leaf: int, depth: int) -> Tensor:
    """The tokens to fit a leaf on: its own, or those below its closest ancestor that has enough."""
    for height in range(depth + 1):
        near = (leaf_of_token >> height == leaf >> height).nonzero()[:, 0]
        if len(near) >= FEWEST_TOKENS:
            break
    return near


def fit_part(ffn: DenseFFN, x: Tensor, target: Tensor, width: int, linear: bool | None, first: bool) -> Part:
    """The best small FFN found for `target` `(n_tokens, d_model)` at `x` `(n_tokens, d_model)`.

    Where it is the `first` part, `target` is all that the dense FFN gives; else what earlier parts left
    over, which the original output weights say little of.
    """
    if linear:
        return reduced_rank(x, target, width)
    if first and width == ffn.n_neurons:
        return Part(ffn.in_weight, ffn.in_bias, ffn.out_weight)
    chosen = contributions(ffn, x).topk(width).indices.sort().values
    in_weight, in_bias = ffn.inputs_of(chosen)
    activity = neurons(x, in_weight, in_bias, ffn.activation, ffn.gated)  # (n_tokens, width)
    toward = ffn.out_weight[chosen] if first else torch.zeros(width, ffn.d_model)
    return Part(in_weight, in_bias, ridge(activity, target, toward))


def contributions(ffn: DenseFFN, x: Tensor) -> Tensor:
    """How much each dense neuron moves the output on `x`: `(n_neurons,)`, variance times squared length."""
    total, squares = torch.zeros(2, ffn.n_neurons, dtype=torch.float64)
    for chunk in torch.split(x, CHUNK):
        activity = ffn.activations(chunk).double()
        total += activity.sum(0)
        squares += activity.square().sum(0)
    variance = squares / len(x) - (total / len(x)).square()
    return (variance * ffn.out_weight.square().sum(1)).float()


def ridge(activity: Tensor, target: Tensor, toward: Tensor) -> Tensor:
    """Output weights `(width, d_model)` that predict `target` from `activity`, both centred.

    Args:
        activity: `(n_tokens, width)`.
        target: `(n_tokens, d_model)`.
        toward: `(width, d_model)`, where the weights stay as far as the data do not say otherwise.
    """
    activity = activity - activity.mean(0)
    gap = target - target.mean(0) - activity @ toward
    gram = activity.T @ activity  # (width, width)
    return toward + torch.linalg.solve(regularized(gram, len(activity)), activity.T @ gap)


def reduced_rank(x: Tensor, target: Tensor, rank: int) -> Part:
    """The linear map of `rank` that predicts `target` best from `x`, both centred, under the same ridge.

    With `R = L @ L.T` the regularized Gram matrix and `C = x.T @ target`, an orthonormal basis `B` of the outputs takes
    the trace of `B.T @ C.T @ R^-1 @ C @ B` off the error: the best are the first right singular vectors of `L^-1 @ C`.
    """
    mean = x.mean(0)
    x, target = x - mean, target - target.mean(0)
    root = torch.linalg.cholesky(regularized(x.T @ x, len(x)))  # (d_model, d_model)
    whitened = torch.linalg.solve_triangular(root, x.T @ target, upper=False)  # (d_model, d_model)
    n_vectors = min(rank + SPARE_VECTORS, len(mean))
    basis = torch.svd_lowrank(whitened, n_vectors)[2][:, :rank]  # (d_model, rank)
    in_weight = torch.linalg.solve_triangular(root.T, whitened @ basis, upper=True).T
    return Part(in_weight, -in_weight @ mean, basis.T)


def regularized(gram: Tensor, n_tokens: int) -> Tensor:
    """The Gram matrix of centred regressors `(width, width)` with the ridge on its diagonal.

    In every direction the ridge counts as much as one token of mean length that points there: about as
    much as the tokens do where there are as many of them as regressors. The matrix is invertible even where
    all regressors are constant.
    """
    strength = RIDGE * gram.trace() / n_tokens
    return gram + (strength + torch.finfo(gram.dtype).tiny) * torch.eye(len(gram))
