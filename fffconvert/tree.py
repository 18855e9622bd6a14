"""The shape of a tree: what is counted, how a node finds its children, which way a tie goes.

Nodes are numbered as in a binary heap: the root is 0 and the children of node `i` are `2 * i + 1`
(left) and `2 * i + 2` (right). The `2**depth` leaves follow the `2**depth - 1` internal nodes, so the
leaf reached is the last node's number less the number of internal nodes. Nothing here needs torch:
the functions take whatever supports arithmetic and comparison.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any, ClassVar

from fffconvert.errors import UserError

MOST_LINEAR = 0.125  # of `d_model`: wider leaves fit better with neurons (on MNLI 27 of 384 do not, 74 do)
MAX_DEPTH = 20  # a million leaves; past it a typo is likelier than a wish


def goes_right(score: Any) -> Any:
    """The tie rule, as the kernels have it too: a score of exactly 0 goes right, NaN goes left."""
    return score >= 0


def child(node: Any, right: Any) -> Any:
    """The heap number of a node's child; `right` is 0 or 1 (or a tensor of them)."""
    return 2 * node + 1 + right


@dataclass(frozen=True)
class TreeShape:
    """The shape of one fast feedforward layer.

    Attributes:
        depth: Levels of routers; a tree has `2**depth` leaves. Depth 0 is an ordinary dense FFN.
        leaf_width: Neurons in each leaf. 0 leaves only the leaf's output bias.
        trunk: Neurons that every token uses, whatever its path.
        trees: Parallel trees whose outputs are summed.
        emitting: Whether the routers are neurons too: a node then adds the activation of its own score,
            times its own output weights. This is the shape of UltraFastBERT (arXiv 2311.10770).
        linear: Whether neurons have the identity for an activation instead of the dense model's. Not given, a
            conversion decides (see `for_width`).
        gated: Whether the dense model's neurons have a gate each (see `GatedTreeShape`).

    Raises:
        UserError: For a number that no tree can have.
    """

    depth: int
    leaf_width: int
    trunk: int = 0
    trees: int = 1
    emitting: bool = False
    linear: bool | None = None

    gated: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, lowest, highest in (
            ("depth", 0, MAX_DEPTH),
            ("leaf_width", 0, None),
            ("trunk", 0, None),
            ("trees", 1, None),
        ):
            value = getattr(self, name)
            if type(value) is not int or value < lowest or (highest is not None and value > highest):
                limits = f"from {lowest} to {highest}" if highest is not None else f"of at least {lowest}"
                raise UserError(f"tree.{name} is {value!r}; expected a whole number {limits}")
        for name in ("emitting", "linear"):
            value = getattr(self, name)
            if type(value) is not bool and (name, value) != ("linear", None):
                raise UserError(f"tree.{name} is {value!r}; expected true or false")

    def for_width(self, d_model: int) -> TreeShape:
        """The shape with `linear` decided for a model of this width.

        Inside a leaf an FFN is nearly linear, and the best linear map of a low rank beats as many neurons. Wide
        leaves, the dense FFN of depth 0, and nodes that emit keep the model's activation.
        """
        if self.linear is not None:
            return self
        narrow_leaves = self.leaf_width <= d_model * MOST_LINEAR
        return replace(self, linear=self.depth > 0 and not self.emitting and narrow_leaves)

    @property
    def n_leaves(self) -> int:
        """Leaves of one tree."""
        return int(2**self.depth)

    @property
    def n_nodes(self) -> int:
        """Internal nodes, and so routers, of one tree."""
        return self.n_leaves - 1

    @property
    def n_inputs(self) -> int:
        """Rows of input weights in one neuron of a leaf or of the trunk: its own, and its gate's."""
        return 2 if self.gated and not self.linear else 1

    @property
    def active_neurons(self) -> float:
        """Neurons that one token uses, routers included, in neurons of the dense model.

        A neuron costs two vectors of `d_model` (input and output weights), and three where it has a gate. A
        router that does not emit costs one, so it counts as half a neuron; beside a dense model with gates it
        counts as a third, and a neuron without a gate (linear or emitting) as two thirds.
        """
        neurons, nodes = self.trunk + self.trees * self.leaf_width, self.trees * self.depth
        vectors = (self.n_inputs + 1) * neurons + (2 if self.emitting else 1) * nodes
        return vectors / (3 if self.gated else 2)

    def n_parameters(self, d_model: int) -> int:
        """Numbers that one layer stores for inputs of `d_model`."""
        router = (2 if self.emitting else 1) * d_model + 1
        neuron = self.n_inputs * (d_model + 1) + d_model
        leaf = self.leaf_width * neuron + d_model
        return self.trunk * neuron + self.trees * (self.n_nodes * router + self.n_leaves * leaf)

    def to_dict(self) -> dict[str, Any]:
        """The shape as plain values, as `config.json` and recipes hold it."""
        return asdict(self)


@dataclass(frozen=True)
class GatedTreeShape(TreeShape):
    """As `TreeShape`, for a dense model that is a GLU: its neurons have a gate each, and so have the tree's.

    A gate is another row of input weights, whose product with the token multiplies the neuron's activation.
    Nobody chooses it: conversion takes it from the model's family. Linear neurons and emitting nodes have none.
    """

    gated: ClassVar[bool] = True


DEFAULT_TREE = TreeShape(depth=7, leaf_width=12)
"""About 1% of MiniLM's 1,536 neurons, 0.5% of BERT-base's 3,072."""

REMOVED = TreeShape(depth=0, leaf_width=0)
"""The control without an FFN: one bias, the mean output, for every token."""


def narrow(shape: TreeShape) -> TreeShape:
    """The control with as many dense neurons as `shape` has active, rounded up in the control's favour."""
    return type(shape)(depth=0, leaf_width=ceil(shape.active_neurons))
