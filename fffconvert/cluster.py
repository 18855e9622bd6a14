"""Hierarchical k-means: from the inputs of an FFN, or from its neurons, to the routers of a tree.

At every node the points there are split in two by 2-means. Two centres are told apart by a hyperplane,
and that hyperplane is the router. The split is balanced: the threshold is near the median of the
calibration inputs at the node, so all leaves see about equally many of them.

- `inputs` clusters the FFN's calibration inputs.
- `neurons` clusters the rows of its input weights, as MoEfication (arXiv 2110.01786) does for experts;
  a router points from the mean of one half of a node's neurons to that of the other.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
import torch
from sklearn.cluster import KMeans
from threadpoolctl import ThreadpoolController
from torch import Tensor

from fffconvert.tree import child, goes_right

Clustered = Literal["inputs", "neurons"]

START_POINTS = 512  # points of a node that k-means starts from
BALANCING_POINTS = 4096  # points that balance it: more find the same direction; thresholds use all of them
POINTS_AT_ONCE = 2048  # points scored at a time: gathered, they stay in the cache
ROUNDING = 1e-5  # of scores, which are sums over d_model
BALANCING_ROUNDS = 5  # enough for the split to settle; it moves little after the third


def two_means(points: Tensor, seed: int) -> Tensor:
    """The direction from one centre of 2-means to the other.

    Args:
        points: `(n_points, n_features)`.
        seed: Where k-means starts.

    Returns:
        `(n_features,)`; zeros where there are not two distinct points.
    """
    sample = points.index_select(0, random_subset(len(points), START_POINTS, seed))
    if (sample == sample[:1]).all():
        return torch.zeros(points.shape[1])
    # each thread adds up a part of its own, so their number would decide too
    with thread_pools().limit(limits=1, user_api="openmp"):
        centers = KMeans(2, n_init=1, max_iter=10, random_state=seed).fit(sample.numpy()).cluster_centers_
    return torch.from_numpy(centers[1] - centers[0]).to(points.dtype)


def random_subset(n_points: int, most: int, seed: int) -> Tensor:
    """The numbers of some points at random, of all if they are no more than `most`: `(n_chosen,)`."""
    return torch.from_numpy(np.random.default_rng(seed).permutation(n_points)[:most])


@cache
def thread_pools() -> ThreadpoolController:
    """The thread pools of this process; to find them takes longer than a small k-means."""
    return ThreadpoolController()


def balanced_two_means(points: Tensor, seed: int) -> Tensor:
    """As `two_means`, under the constraint that both clusters have as many points.

    With two centres the best balanced assignment is to cut the projections on their difference at the
    median, so the rounds of k-means stay nearly exact.
    """
    direction = two_means(points, seed)
    for _ in range(BALANCING_ROUNDS):
        scores = points @ direction
        right = goes_right(scores - cut(scores))
        n_right = int(right.sum())
        if n_right == len(points):
            break
        moved = torch.where(right, 1 / n_right, -1 / (len(points) - n_right)) @ points  # of the two means
        if torch.equal(moved, direction):
            break
        direction = moved
    return direction


def grow(
    clustered: Clustered, inputs: Tensor, in_weight: Tensor, depth: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Grows the routers of one tree, node by node from the root.

    Args:
        clustered: What is clustered (see the module's text).
        inputs: Calibration inputs, `(n_tokens, d_model)`; they set every threshold.
        in_weight: The dense neurons, `(n_neurons, d_model)`.
        depth: Levels of routers.
        seed: Decides every draw.

    Returns:
        Router weights `(n_nodes, d_model)` and biases `(n_nodes,)`. Scores of a node's calibration inputs
        have a standard deviation of 1.
    """
    weights = torch.zeros(2**depth - 1, inputs.shape[1])
    biases = torch.zeros(2**depth - 1)
    node_of_token = torch.zeros(len(inputs), dtype=torch.long)
    node_of_neuron = torch.zeros(len(in_weight), dtype=torch.long)
    for node in range(len(weights)):
        here = (node_of_token == node).nonzero()[:, 0]
        if clustered == "inputs":
            chosen = here[random_subset(len(here), BALANCING_POINTS, seed + node)]
            direction = balanced_two_means(inputs.index_select(0, chosen), seed + node)
        else:
            neurons_here = (node_of_neuron == node).nonzero()[:, 0]
            neurons = in_weight[neurons_here]
            direction = neuron_direction(neurons, weights[(node - 1) // 2], seed + node)
            along = neurons @ direction
            right = goes_right(along - cut(along))
            node_of_neuron[neurons_here] = child(node, right.long())
        scores = project(inputs, here, direction)
        spread = spread_of(scores)
        scores /= spread
        weights[node], biases[node] = direction / spread, -cut(scores)
        node_of_token[here] = child(node, goes_right(scores + biases[node]).long())
    return weights, biases


def neuron_direction(neurons: Tensor, parent: Tensor, seed: int) -> Tensor:
    """From one half of a node's neurons to the other; a lone neuron's own weights; none: the parent's."""
    if len(neurons) > 1:
        return balanced_two_means(neurons, seed)
    return neurons[0] if len(neurons) else parent


def project(inputs: Tensor, rows: Tensor, direction: Tensor) -> Tensor:
    """The scores of some inputs along a direction, `(n_rows,)`."""
    return torch.cat([inputs.index_select(0, part) @ direction for part in rows.split(POINTS_AT_ONCE)])


def spread_of(scores: Tensor) -> Tensor:
    """The standard deviation of scores; 1 where they have none but what rounding makes."""
    if len(scores) < 2:
        return scores.new_ones(())
    spread = scores.std()
    return spread if spread > ROUNDING * scores.abs().max() else scores.new_ones(())


def cut(scores: Tensor) -> Tensor:
    """Where to cut scores in halves: in the gap nearest to the middle that rounding does not bridge; 0 for no scores.

    Copies of a token that recurs have scores which rounding alone tells apart. They stay on one side, and where there
    is nothing else all go right: a router that rounds otherwise would send some where no leaf was fitted on them.
    """
    if len(scores) < 2:
        return scores.sum()
    ordered = scores.sort().values
    margin = len(scores) // 100  # without the few that are far out
    usual = torch.maximum(ordered[margin].abs(), ordered[len(scores) - 1 - margin].abs())
    gaps = (ordered.diff() > ROUNDING * usual).nonzero()[:, 0]  # gap n is between the values n and n + 1
    if len(gaps) == 0:
        return ordered[0] - usual
    gap = gaps[(gaps - (len(scores) // 2 - 1)).abs().argmin()]
    return (ordered[gap] + ordered[gap + 1]) / 2
