"""The layer against a loop that takes one token at a time and knows only floats."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils import parametrize

from fffconvert.errors import UserError
from fffconvert.fff import FFF
from fffconvert.kernels import FFFWeights, reference
from fffconvert.tree import GatedTreeShape, TreeShape

few = settings(max_examples=25, deadline=None)
sizes = {
    "depth": st.integers(0, 4),
    "leaf_width": st.integers(0, 3),
    "trunk": st.integers(0, 3),
    "trees": st.integers(1, 3),
    "emitting": st.booleans(),
}
shapes = st.builds(TreeShape, **sizes) | st.builds(GatedTreeShape, **sizes)
NAMED = {
    "removed": TreeShape(0, 0),
    "dense": TreeShape(0, 6),
    "tree": TreeShape(3, 2),
    "biases": TreeShape(3, 0),
    "trunk": TreeShape(2, 2, trunk=3),
    "forest": TreeShape(2, 2, trees=3),
    "emitting": TreeShape(3, 1, emitting=True),
    "all": TreeShape(2, 2, trunk=3, trees=2, emitting=True),
    "gated": GatedTreeShape(3, 2),
    "gated_all": GatedTreeShape(2, 2, trunk=3, trees=2, emitting=True),
}
named = pytest.mark.parametrize("shape", NAMED.values(), ids=NAMED)


def layer_of(shape: TreeShape, d_model: int = 6, activation: str = "gelu", seed: int = 0) -> FFF:
    """A layer with every number drawn, biases of leaves too."""
    layer = FFF(shape, d_model, activation)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in layer.parameter_shapes():
            getattr(layer, name).normal_(generator=generator)
    return layer


def tokens(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def test_replicas_of_data_parallel_have_their_weights() -> None:
    """They have plain tensors for parameters, as `Trainer` makes them where there are several GPUs."""
    layer, x = layer_of(NAMED["tree"]), tokens(4, 6)
    expected = layer(x)
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer.named_parameters():
        setattr(replica, name, parameter.detach() * 1)
    assert torch.equal(replica(x), expected)


def test_a_skeleton_on_meta_takes_the_weights_that_are_stored() -> None:
    layer, x = layer_of(TreeShape(2, 3)), tokens(5, 6)
    with torch.device("meta"):
        skeleton = FFF(layer.shape, layer.d_model, layer.activation)
    skeleton.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(skeleton(x), layer(x))


def test_parameters_alone_may_be_in_bfloat16() -> None:
    """As what casts parameters and no buffers leaves them; routers stay in float32, and the weights decide."""
    layer, x = layer_of(TreeShape(2, 3)), tokens(40, 6)
    expected = layer(x)
    for parameter in layer.parameters():
        parameter.data = parameter.data.bfloat16()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(layer(x), expected, atol=0.1, rtol=0.1)
    layer = layer_of(TreeShape(2, 3))
    layer.load_state_dict(
        {name: tensor.bfloat16() for name, tensor in layer.state_dict().items()}, assign=True
    )
    torch.testing.assert_close(layer(x), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("routers_stay", [False, True])
def test_a_token_takes_the_leaf_that_is_named_in_bfloat16_too(routers_stay: bool) -> None:
    layer, x = layer_of(TreeShape(5, 1)).bfloat16(), tokens(500, 6).bfloat16()
    if routers_stay:
        layer.router_weight, layer.router_bias = (
            layer.router_weight.float() * 1.003,
            layer.router_bias.float(),
        )
    number = torch.arange(32.0)[:, None].expand(32, 6)
    with torch.no_grad():
        for name in ("leaf_in_weight", "leaf_in_bias", "leaf_out_weight"):
            getattr(layer, name).zero_()
        layer.leaf_out_bias.copy_(number)
        assert torch.equal(layer(x)[:, 0].long(), layer.leaf_of(x)[:, 0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.jit")
def test_a_trace_serves_any_number_of_tokens() -> None:
    layer = layer_of(TreeShape(2, 3))
    with torch.no_grad():
        traced = torch.jit.trace(layer, tokens(5, 6))
        assert torch.equal(traced(tokens(3, 6)), layer(tokens(3, 6)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.jit")
def test_the_reference_is_not_traced() -> None:
    """A trace would go on with the leaves of its example, whatever it is given."""
    layer = layer_of(TreeShape(2, 3)).double()
    with torch.no_grad(), pytest.raises(UserError, match=r"torch\.jit\.trace keeps to the path"):
        torch.jit.trace(layer, tokens(5, 6).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["tree", "trunk"])
def test_no_tokens_have_gradients_of_zero(name: str, dtype: torch.dtype) -> None:
    layer = layer_of(NAMED[name]).to(dtype)
    x = torch.zeros(0, 6, dtype=dtype, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


class Doubled(torch.nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_a_part_may_have_a_parametrization() -> None:
    layer, x = layer_of(TreeShape(2, 3, linear=True)), tokens(5, 6)
    layer.leaf_out_bias.data.zero_()
    expected = 2 * layer(x)
    parametrize.register_parametrization(layer, "leaf_out_weight", Doubled())
    torch.testing.assert_close(layer(x), expected)


# ---- A loop over tokens, in plain Python


def gelu(x: float) -> float:
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def one_token(layer: FFF, x: list[float]) -> tuple[list[float], list[int]]:
    """The output for one token, and the leaf of each tree, from the numbers of the layer as lists."""
    part = {name: getattr(layer, name).tolist() for name in layer.parameter_shapes()}
    shape = layer.shape
    output = [0.0] * layer.d_model
    leaves = []

    def add(scale: float, vector: list[float]) -> None:
        for i, value in enumerate(vector):
            output[i] += scale * value

    def add_ffn(weights: list[list[float]], biases: list[float], out: list[list[float]]) -> None:
        for neuron, vector in enumerate(out):
            gate = neuron + len(out)
            factor = dot(weights[gate], x) + biases[gate] if shape.gated else 1.0
            add(gelu(dot(weights[neuron], x) + biases[neuron]) * factor, vector)

    for tree in range(shape.trees):
        below, leaf = 0, 0  # nodes in the levels above, and the place from the left in this level
        for level in range(shape.depth):
            node = below + leaf
            score = dot(part["router_weight"][tree][node], x) + part["router_bias"][tree][node]
            if shape.emitting:
                add(gelu(score), part["node_out_weight"][tree][node])
            below += 2**level
            leaf = 2 * leaf + (1 if score >= 0 else 0)
        leaves.append(leaf)
        add_ffn(*(part[f"leaf_{name}"][tree][leaf] for name in ("in_weight", "in_bias", "out_weight")))
        add(1.0, part["leaf_out_bias"][tree][leaf])
    add_ffn(*(part[f"trunk_{name}"] for name in ("in_weight", "in_bias", "out_weight")))
    return output, leaves


@few
@given(shapes, st.integers(1, 7), st.integers(0, 1000))
def test_layer_is_the_loop_over_tokens(shape: TreeShape, d_model: int, seed: int) -> None:
    layer, x = layer_of(shape, d_model, seed=seed), tokens(9, d_model, seed=seed + 1)
    output, leaves = zip(*(one_token(layer, row) for row in x.tolist()), strict=True)
    assert layer.leaf_of(x).tolist() == list(leaves)
    torch.testing.assert_close(layer(x), torch.tensor(output), rtol=1e-5, atol=1e-5)


@named
def test_three_dimensions_are_tokens_in_a_row(shape: TreeShape) -> None:
    layer, x = layer_of(shape), tokens(4, 5, 6)
    y = layer(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y.flatten(0, 1), layer(x.flatten(0, 1)), rtol=0, atol=0)
    assert layer.leaf_of(x).shape == (20, shape.trees)


@named
@pytest.mark.parametrize("size", [(0, 6), (0, 7, 6), (3, 0, 6)], ids=str)
def test_no_tokens(shape: TreeShape, size: tuple[int, ...]) -> None:
    layer = layer_of(shape)
    assert layer(torch.empty(size)).shape == size
    assert layer.leaf_of(torch.empty(size)).shape == (0, shape.trees)


@named
def test_input_that_is_not_contiguous(shape: TreeShape) -> None:
    layer, x = layer_of(shape), tokens(6, 10).T
    assert not x.is_contiguous()
    torch.testing.assert_close(layer(x), layer(x.contiguous()), rtol=1e-5, atol=1e-5)


def test_scores_of_zero_go_right() -> None:
    layer = layer_of(TreeShape(3, 1))
    with torch.no_grad():
        layer.router_weight.zero_()
        layer.router_bias.zero_()
    assert layer.leaf_of(tokens(2, 6)).tolist() == [[7], [7]]


# ---- What is stored and trained


@named
def test_state_holds_only_the_parts_that_the_shape_has(shape: TreeShape) -> None:
    stored = set(FFF(shape, 6, "gelu").state_dict())
    expected = {"leaf_out_bias"}
    if shape.depth:
        expected |= {"router_weight", "router_bias"}
    if shape.depth and shape.emitting:
        expected |= {"node_out_weight"}
    if shape.leaf_width:
        expected |= {"leaf_in_weight", "leaf_in_bias", "leaf_out_weight"}
    if shape.trunk:
        expected |= {"trunk_in_weight", "trunk_in_bias", "trunk_out_weight"}
    assert stored == expected


@named
def test_routers_are_trained_only_where_they_emit(shape: TreeShape) -> None:
    for name, parameter in FFF(shape, 6, "gelu").named_parameters():
        assert parameter.requires_grad == (shape.emitting or not name.startswith("router_"))


@named
def test_every_trained_part_in_use_gets_a_gradient(shape: TreeShape) -> None:
    layer = layer_of(shape)
    layer(tokens(200, 6)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_leaf_that_no_token_reaches_gets_no_gradient() -> None:
    layer, x = layer_of(TreeShape(4, 2)), tokens(3, 6)
    layer(x).sum().backward()
    unused = sorted(set(range(16)) - set(layer.leaf_of(x)[:, 0].tolist()))
    assert layer.leaf_in_weight.grad[0, unused].abs().max() == 0
    assert layer.leaf_out_bias.grad[0, unused].abs().max() == 0


@named
def test_state_copy_and_pickle_give_the_same_output(shape: TreeShape) -> None:
    layer, other, x = layer_of(shape), FFF(shape, 6, "gelu"), tokens(20, 6)
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@named
def test_other_dtypes_stay_what_they_are(shape: TreeShape, dtype: torch.dtype) -> None:
    layer, x = layer_of(shape), tokens(20, 6)
    expected = copy.deepcopy(layer).to(dtype).double()  # the rounded weights, computed exactly
    y = layer.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    same_leaf = (layer.leaf_of(x.to(dtype)) == expected.leaf_of(x.to(dtype).double())).all(1)
    assert same_leaf.sum() >= 15  # rounding moves a token across a router here and there
    epsilon = 40 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        y.double()[same_leaf], expected(x.to(dtype).double())[same_leaf], rtol=epsilon, atol=epsilon
    )


def test_linear_shape_has_linear_leaves() -> None:
    layer = layer_of(TreeShape(0, 3, linear=True))
    a, b = tokens(5, 6), tokens(5, 6, seed=2)
    torch.testing.assert_close(
        layer(a) + layer(b), layer(a + b) + layer(torch.zeros(5, 6)), rtol=1e-4, atol=1e-4
    )


def test_printed_with_its_shape() -> None:
    assert "d_model=6, depth=3, leaf_width=2" in repr(FFF(TreeShape(3, 2), 6, "relu"))


# ---- The layout of UltraFastBERT's checkpoints


def ultrafastbert(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, trees: int, depth: int) -> Tensor:
    """What its nodes compute, one token at a time: every node on the path emits, the last level too.

    `w1` and `w2` are `(trees * nodes, d_model)` and `b1` `(trees * nodes,)`, with the `2^(depth + 1) - 1`
    nodes of each tree in the order of a heap.
    """
    nodes = 2 ** (depth + 1) - 1
    rows = []
    for token in x.tolist():
        y = [0.0] * len(token)
        for tree in range(trees):
            node = 0
            for _ in range(depth + 1):
                row = tree * nodes + node
                score = dot(w1[row].tolist(), token) + float(b1[row])
                y = [value + gelu(score) * out for value, out in zip(y, w2[row].tolist(), strict=True)]
                node = 2 * node + (2 if score >= 0 else 1)
        rows.append(y)
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("trees", "depth"), [(1, 3), (4, 2), (1, 0)], ids=["one_tree", "four_trees", "one_node"]
)
def test_ultrafastbert_weights_fit_the_emitting_shape(trees: int, depth: int) -> None:
    d_model, nodes = 8, 2 ** (depth + 1) - 1
    w1, w2, b1 = tokens(trees * nodes, d_model), tokens(trees * nodes, d_model, seed=2), tokens(trees * nodes)
    shape = TreeShape(depth, leaf_width=1, trees=trees, emitting=True)
    inner = shape.n_nodes  # the last level of its nodes are our leaves
    by_tree = [w.unflatten(0, (trees, nodes)) for w in (w1, b1, w2)]
    (router_weight, router_bias, node_out), (leaf_in, leaf_bias, leaf_out) = (
        [w[:, :inner] for w in by_tree],
        [w[:, inner:] for w in by_tree],
    )
    weights = FFFWeights(
        router_weight,
        router_bias,
        node_out,
        leaf_in[:, :, None],
        leaf_bias[:, :, None],
        leaf_out[:, :, None],
        torch.zeros(trees, shape.n_leaves, d_model),
        torch.empty(0, d_model),
        torch.empty(0),
        torch.empty(0, d_model),
    )
    layer = FFF(shape, d_model, "gelu")
    layer.load_state_dict(weights._asdict(), strict=False)  # which knows no empty parts
    x = tokens(12, d_model, seed=3)
    expected = ultrafastbert(x, w1, b1, w2, trees, depth)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reference.fff_forward(x, weights, "gelu"), expected, rtol=1e-5, atol=1e-5)


def test_ultrafastbert_has_4095_neurons_and_12_active() -> None:
    shape = TreeShape(11, leaf_width=1, emitting=True)
    sizes = FFF(shape, 2, "gelu").parameter_shapes()
    assert sizes["router_weight"][1] + sizes["leaf_in_weight"][1] == 4095
    assert shape.active_neurons == 12


def test_an_activation_without_a_definition_is_refused() -> None:
    with pytest.raises(UserError, match="activation is 'swish'; expected one of gelu, gelu_new"):
        FFF(TreeShape(1, 1), 4, "swish")
    FFF(TreeShape(1, 1, linear=True), 4, "swish")  # which asks for none
