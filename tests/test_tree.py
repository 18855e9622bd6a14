"""The arithmetic of trees: numbering, ties, and what a shape costs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fffconvert.errors import UserError
from fffconvert.fff import FFF
from fffconvert.tree import MAX_DEPTH, REMOVED, GatedTreeShape, TreeShape, child, goes_right, narrow

few = settings(max_examples=40, deadline=None)
sizes = {
    "depth": st.integers(0, 4),
    "leaf_width": st.integers(0, 5),
    "trunk": st.integers(0, 5),
    "trees": st.integers(1, 3),
    "emitting": st.booleans(),
    "linear": st.booleans(),
}
shapes = st.builds(TreeShape, **sizes) | st.builds(GatedTreeShape, **sizes)


# ---- Numbering


def end_of(path: tuple[int, ...]) -> int:
    """The number reached from the root by a path of 0 (left) and 1 (right)."""
    node = 0
    for right in path:
        node = child(node, right)
    return node


def test_children_of_the_first_nodes() -> None:
    assert [(child(i, 0), child(i, 1)) for i in range(3)] == [(1, 2), (3, 4), (5, 6)]


@pytest.mark.parametrize("depth", range(7))
def test_every_leaf_is_reached_by_exactly_one_path(depth: int) -> None:
    shape = TreeShape(depth, leaf_width=1)
    ends = [end_of(path) for path in itertools.product((0, 1), repeat=depth)]
    # in the order of the paths, so from left to right, and right behind the nodes
    assert ends == list(range(shape.n_nodes, shape.n_nodes + shape.n_leaves))


@few
@given(st.lists(st.integers(0, 1), max_size=MAX_DEPTH))
def test_path_is_the_binary_number_of_its_leaf(path: list[int]) -> None:
    shape = TreeShape(len(path), leaf_width=0)
    assert end_of(tuple(path)) - shape.n_nodes == int("".join(map(str, path)) or "0", 2)


@few
@given(st.integers(1, 2**MAX_DEPTH))
def test_every_node_but_the_root_is_the_child_of_exactly_one(node: int) -> None:
    parents = [
        i
        for i in {(node - 1) // 2, (node - 2) // 2, node // 2}
        for right in (0, 1)
        if child(i, right) == node
    ]
    assert parents == [(node - 1) // 2]


def test_children_of_a_tensor_of_nodes() -> None:
    nodes, right = torch.tensor([0, 1, 2]), torch.tensor([1, 0, 1])
    assert child(nodes, right).tolist() == [2, 3, 6]


# ---- Ties


@pytest.mark.parametrize(
    ("score", "right"),
    [
        (0.0, True),
        (-0.0, True),
        (1e-45, True),
        (-1e-45, False),
        (math.inf, True),
        (-math.inf, False),
        (math.nan, False),
    ],
    ids=str,
)
def test_tie_goes_right_and_nan_left(score: float, right: bool) -> None:
    assert goes_right(score) is right
    assert goes_right(torch.tensor([score])).tolist() == [right]


# ---- Accounting


@pytest.mark.parametrize(
    ("shape", "active"),
    [
        (TreeShape(7, 12), 12 + 7 / 2),
        (TreeShape(11, 1, emitting=True), 12),  # UltraFastBERT, of 4,095: 2,047 nodes and 2,048 leaves
        (TreeShape(0, 3072), 3072),
        (TreeShape(3, 4, trunk=10), 10 + 4 + 3 / 2),
        (TreeShape(3, 4, trees=2), 2 * (4 + 3 / 2)),
        (TreeShape(3, 4, trunk=10, trees=2, emitting=True), 10 + 2 * (4 + 3)),
        (TreeShape(3, 4, linear=True), 4 + 3 / 2),
        (TreeShape(4, 0), 4 / 2),
        # beside a GLU, whose neurons are three vectors: a router is one, a neuron without a gate two
        (GatedTreeShape(7, 12), 12 + 7 / 3),
        (GatedTreeShape(0, 1152), 1152),
        (GatedTreeShape(3, 4, trunk=10, trees=2), 10 + 2 * (4 + 3 / 3)),
        (GatedTreeShape(3, 6, linear=True), (2 * 6 + 3) / 3),
        (GatedTreeShape(3, 4, emitting=True), 4 + 3 * 2 / 3),
        (REMOVED, 0),
    ],
    ids=lambda value: repr(value) if isinstance(value, TreeShape) else None,
)
def test_neurons_counted_by_hand(shape: TreeShape, active: float) -> None:
    assert shape.active_neurons == pytest.approx(active, rel=1e-15)


def test_parameters_counted_by_hand() -> None:
    # a trunk neuron: 5 + 5 + 1; a router: 5 + 1; a leaf: 2 * (5 + 5 + 1) + 5
    assert TreeShape(depth=2, leaf_width=2, trunk=3).n_parameters(5) == 3 * 11 + 3 * 6 + 4 * 27
    # a gate is another 5 + 1 in a neuron
    assert GatedTreeShape(depth=2, leaf_width=2, trunk=3).n_parameters(5) == 3 * 17 + 3 * 6 + 4 * 39
    assert GatedTreeShape(2, 2, linear=True).n_parameters(5) == TreeShape(2, 2).n_parameters(5)
    # a node that emits has output weights too
    assert TreeShape(depth=2, leaf_width=2, emitting=True).n_parameters(5) == 3 * 11 + 4 * 27


@few
@given(shapes, st.integers(1, 9))
def test_parameters_are_those_that_a_layer_stores(shape: TreeShape, d_model: int) -> None:
    layer = FFF(shape, d_model, "gelu")
    assert shape.n_parameters(d_model) == sum(tensor.numel() for tensor in layer.state_dict().values())


@few
@given(shapes)
def test_narrow_control_has_at_least_as_many_neurons(shape: TreeShape) -> None:
    control = narrow(shape)
    assert (control.depth, control.trunk, control.trees, control.emitting) == (0, 0, 1, False)
    assert control.gated is shape.gated
    assert 0 <= control.active_neurons - shape.active_neurons < 1


def test_narrow_rounds_up() -> None:
    assert narrow(TreeShape(7, 12)).leaf_width == 16
    assert narrow(TreeShape(11, 1, emitting=True)).leaf_width == 12


def test_removed_stores_one_bias() -> None:
    assert REMOVED.n_parameters(384) == 384


# ---- Values


@few
@given(shapes)
def test_plain_values_make_the_shape_again(shape: TreeShape) -> None:
    assert type(shape)(**shape.to_dict()) == shape


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("depth", -1),
        ("depth", MAX_DEPTH + 1),
        ("depth", 2.0),
        ("depth", "7"),
        ("depth", True),
        ("depth", None),
        ("leaf_width", -1),
        ("leaf_width", 1.5),
        ("trunk", -1),
        ("trunk", None),
        ("trees", 0),
        ("trees", [1]),
        ("emitting", 1),
        ("emitting", "yes"),
        ("linear", 0),
    ],
    ids=lambda value: str(value),
)
def test_bad_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"^tree\.{name} is .*; expected") as error:
        TreeShape(**{"depth": 2, "leaf_width": 2, name: value})
    assert repr(value) in str(error.value)


def test_shape_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        TreeShape(2, 2).depth = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("shape", "linear"),
    [
        (TreeShape(7, 12), True),
        (TreeShape(7, 65), False),
        (TreeShape(0, 12), False),
        (TreeShape(11, 1, emitting=True), False),
        (TreeShape(7, 12, linear=False), False),
        (TreeShape(0, 12, linear=True), True),
    ],
    ids=str,
)
def test_narrow_leaves_of_a_tree_are_linear_unless_asked_otherwise(shape: TreeShape, linear: bool) -> None:
    assert shape.for_width(256).linear is linear
