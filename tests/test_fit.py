"""The closed-form fit: what must come out exactly, and what must never get worse."""

from __future__ import annotations

import functools

import pytest
import torch
from fitted import D_MODEL, error, inputs_of, normal, output
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fffconvert import fit
from fffconvert.dense import DenseFFN
from fffconvert.errors import UserError
from fffconvert.fff import FFF
from fffconvert.fit import fit_layer, fit_part, neighbourhood, reduced_rank, ridge
from fffconvert.kernels import ACTIVATIONS
from fffconvert.recipe import Init
from fffconvert.tree import REMOVED, TreeShape

few = settings(max_examples=15, deadline=None)
grown = pytest.mark.parametrize("init", ["inputs", "neurons"])

N_NEURONS = 40


def dense(
    d_model: int = D_MODEL, n_neurons: int = N_NEURONS, activation: str = "gelu", seed: int = 0
) -> DenseFFN:
    weights = normal(2, n_neurons, d_model, seed=seed)
    biases = normal(n_neurons + d_model, seed=seed + 1)
    return DenseFFN(weights[0], biases[:n_neurons], weights[1], biases[n_neurons:], activation)


# ---- Identities


@grown
@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_new"])
def test_depth_zero_with_all_neurons_is_the_dense_ffn(init: Init, activation: str) -> None:
    ffn, x = dense(activation=activation), inputs_of(100)
    layer = fit_layer(ffn, x, TreeShape(0, N_NEURONS), init, seed=0)
    for ours, theirs in (
        (layer.leaf_in_weight[0, 0], ffn.in_weight),
        (layer.leaf_in_bias[0, 0], ffn.in_bias),
        (layer.leaf_out_weight[0, 0], ffn.out_weight),
        (layer.leaf_out_bias[0, 0], ffn.out_bias),
    ):
        assert torch.equal(ours, theirs)
    other = inputs_of(30, seed=3)
    assert torch.equal(output(layer, other), ffn(other))
    with torch.no_grad():
        torch.testing.assert_close(layer(other), ffn(other), rtol=1e-5, atol=1e-5)


@grown
@pytest.mark.parametrize(
    "shape",
    [
        TreeShape(3, N_NEURONS),
        TreeShape(1, N_NEURONS, trees=2),
        TreeShape(2, 3, trunk=N_NEURONS),
        TreeShape(0, N_NEURONS, emitting=True),  # no nodes, so nothing emits
    ],
    ids=["every_leaf", "two_trees", "trunk", "no_nodes"],
)
def test_part_with_all_neurons_leaves_nothing_to_explain(init: Init, shape: TreeShape) -> None:
    ffn = dense()
    layer = fit_layer(ffn, inputs_of(200), shape, init, seed=0)
    other = inputs_of(50, seed=3)
    torch.testing.assert_close(output(layer, other), ffn(other), rtol=1e-4, atol=1e-4)


@grown
@pytest.mark.parametrize(
    "shape",
    [TreeShape(0, N_NEURONS, trunk=3), TreeShape(2, N_NEURONS, emitting=True)],
    ids=["trunk_first", "nodes_first"],
)
def test_leaf_with_all_neurons_adds_only_what_earlier_parts_left(init: Init, shape: TreeShape) -> None:
    ffn, x = dense(), inputs_of(600)
    assert error(fit_layer(ffn, x, shape, init, seed=0), ffn, x) < 0.05


def test_linear_leaf_as_wide_as_a_small_dense_ffn_is_not_taken_for_it() -> None:
    ffn, x = dense(n_neurons=8), inputs_of(600)
    assert error(fit_layer(ffn, x, TreeShape(1, 8, linear=True), "inputs", seed=0), ffn, x) < 0.5


@grown
def test_removed_is_the_mean_output(init: Init) -> None:
    ffn, x = dense(), inputs_of(300)
    layer = fit_layer(ffn, x, REMOVED, init, seed=0)
    torch.testing.assert_close(layer.leaf_out_bias[0, 0], ffn(x).mean(0))
    torch.testing.assert_close(output(layer, inputs_of(5, seed=3)), ffn(x).mean(0).expand(5, -1))


def test_ffn_that_is_affine_where_it_is_used_is_fitted_by_linear_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fit, "RIDGE", 0.0)
    ffn, x = dense(activation="relu"), inputs_of(400)
    ffn.in_bias.fill_(100.0)  # every ReLU is on
    layer = fit_layer(ffn, x, TreeShape(2, D_MODEL, linear=True), "inputs", seed=0)
    other = inputs_of(50, seed=3)
    torch.testing.assert_close(output(layer, other), ffn(other), rtol=1e-3, atol=1e-2)


# ---- The parts


def applied(part: fit.Part, x: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation](x @ part.in_weight.T + part.in_bias) @ part.out_weight


@few
@given(st.integers(0, 10), st.integers(1, 200), st.integers(0, 99))
def test_refit_is_never_worse_than_the_original_output_weights(width: int, n_tokens: int, seed: int) -> None:
    ffn, x = dense(seed=seed), inputs_of(n_tokens, seed=seed + 5)
    part = fit_part(ffn, x, ffn(x), width, linear=False, first=True)
    chosen = [int((ffn.in_weight == row).all(1).nonzero()) for row in part.in_weight]
    as_it_was = part._replace(out_weight=ffn.out_weight[chosen])
    errors = [
        float((rest - rest.mean(0)).square().sum())
        for rest in (ffn(x) - applied(p, x, "gelu") for p in (part, as_it_was))
    ]
    assert errors[0] <= errors[1] * (1 + 1e-4) + 1e-4


def test_refit_is_ridge_regression() -> None:
    activity, target, toward = normal(50, 3).abs(), normal(50, D_MODEL, seed=1), normal(3, D_MODEL, seed=2)
    weights = ridge(activity, target, toward)
    # the same as least squares with a few more rows, of the penalty
    centred = activity - activity.mean(0)
    strength = (fit.RIDGE * centred.square().sum(1).mean()).sqrt()
    rows = torch.cat([centred, strength * torch.eye(3)])
    values = torch.cat([target - target.mean(0), strength * toward])
    torch.testing.assert_close(weights, torch.linalg.lstsq(rows, values).solution, rtol=1e-4, atol=1e-4)


def test_constant_regressors_leave_the_weights_as_they_were() -> None:
    toward = normal(3, D_MODEL)
    assert torch.equal(ridge(torch.ones(50, 3), normal(50, D_MODEL), toward), toward)


def test_neurons_are_those_that_move_the_output_most() -> None:
    ffn, x = dense(), inputs_of(500)
    part = fit_part(ffn, x, ffn(x), 5, linear=False, first=True)
    moved = (ffn.activations(x)[:, :, None] * ffn.out_weight).var(0).sum(1)  # (n_neurons,)
    best = moved.topk(5).indices.sort().values
    assert torch.equal(part.in_weight, ffn.in_weight[best])
    assert torch.equal(part.in_bias, ffn.in_bias[best])


def test_reduced_rank_of_full_rank_is_the_affine_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "RIDGE", 0.0)
    x, matrix, bias = inputs_of(200), normal(D_MODEL, D_MODEL), normal(D_MODEL, seed=1)
    target = x @ matrix + bias
    part = reduced_rank(x, target, D_MODEL)
    rest = target - applied(part, x, "identity")
    torch.testing.assert_close(rest, rest.mean(0).expand_as(rest), rtol=0, atol=1e-3)


@pytest.mark.parametrize("rank", [0, 1, 4, 12])
def test_reduced_rank_is_the_best_map_of_its_rank(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "RIDGE", 0.0)
    x, noise = inputs_of(200), normal(200, D_MODEL, seed=2)
    target = (x**2) @ normal(D_MODEL, D_MODEL, seed=1) + noise
    part = reduced_rank(x, target, rank)
    assert part.in_weight.shape == (rank, D_MODEL)
    rest = target - applied(part, x, "identity")
    # least squares leaves what is orthogonal to x, and what the singular values beyond the rank hold
    x, target = (x - x.mean(0)).double(), (target - target.mean(0)).double()
    fitted = x @ torch.linalg.lstsq(x, target).solution
    beyond = torch.linalg.svdvals(fitted)[rank:].square().sum()
    assert float((rest - rest.mean(0)).square().sum()) == pytest.approx(
        float((target - fitted).square().sum() + beyond), rel=1e-3
    )


def test_reduced_rank_is_the_best_map_under_its_ridge() -> None:
    x = inputs_of(300, 64)
    target = (x**2) @ normal(64, 64, seed=1) + normal(300, 64, seed=2)
    part = reduced_rank(x, target, 4)  # of 64: the decomposition is a randomized one
    x, target = (x - x.mean(0)).double(), (target - target.mean(0)).double()
    gram = x.T @ x
    strength = fit.RIDGE * gram.trace() / len(x)
    rest = target - x @ part.in_weight.double().T @ part.out_weight.double()
    lost = rest.square().sum() + strength * part.in_weight.square().sum()  # out_weight's rows are orthonormal
    root = torch.linalg.cholesky(gram + strength * torch.eye(64))
    explained = torch.linalg.svdvals(torch.linalg.solve_triangular(root, x.T @ target, upper=False))
    assert float(lost) == pytest.approx(float(target.square().sum() - explained[:4].square().sum()), rel=1e-3)


def test_one_token_has_nothing_but_a_mean() -> None:
    ffn, x = dense(), inputs_of(1)
    for shape in (TreeShape(2, 3), TreeShape(2, 3, linear=True), TreeShape(2, 3, 2, 2, emitting=True)):
        layer = fit_layer(ffn, x, shape, "inputs", seed=0)
        assert all(torch.isfinite(tensor).all() for tensor in layer.state_dict().values())
        torch.testing.assert_close(output(layer, x), ffn(x), rtol=1e-3, atol=1e-3)


# ---- The whole layer


@grown
@pytest.mark.parametrize("linear", [False, True], ids=["neurons", "linear"])
def test_bias_of_a_leaf_carries_the_mean(init: Init, linear: bool) -> None:
    ffn, x = dense(), inputs_of(512)
    layer = fit_layer(ffn, x, TreeShape(3, 4, trunk=2, linear=linear), init, seed=0)
    rest, leaf = ffn(x) - output(layer, x), layer.leaf_of(x)[:, 0]
    for number in range(8):
        assert int((leaf == number).sum()) >= fit.FEWEST_TOKENS  # else it is fitted on neighbours' tokens too
        torch.testing.assert_close(rest[leaf == number].mean(0), torch.zeros(D_MODEL), rtol=0, atol=1e-3)


@grown
@pytest.mark.parametrize(
    ("more", "less"),
    [
        (TreeShape(3, 4), TreeShape(2, 4)),
        (TreeShape(3, 5), TreeShape(3, 4)),
        (TreeShape(3, 4, trunk=6), TreeShape(3, 4)),
        (TreeShape(3, 4, trees=2), TreeShape(3, 4)),
        (TreeShape(3, 4, trees=3), TreeShape(3, 4, trees=2)),
        (TreeShape(3, 1, emitting=True), TreeShape(3, 1)),
        (TreeShape(3, 0, emitting=True), TreeShape(3, 0)),
        (TreeShape(3, 4, linear=True), TreeShape(3, 4)),
        (TreeShape(3, 4, trunk=6, linear=True), TreeShape(3, 4, linear=True)),
        (TreeShape(3, 4, trees=2, linear=True), TreeShape(3, 4, linear=True)),
        (TreeShape(3, 4, emitting=True, linear=True), TreeShape(3, 4, linear=True)),
    ],
    ids=[
        "depth", "width", "trunk", "second_tree", "third_tree", "emitting", "emitting_alone", "linear",
        "linear_trunk", "linear_second_tree", "linear_emitting",
    ],
)  # fmt: skip
def test_more_is_closer(init: Init, more: TreeShape, less: TreeShape) -> None:
    assert error_of_three(more, init) < 0.99 * error_of_three(less, init)


@functools.cache  # most shapes are compared with several others
def error_of_three(shape: TreeShape, init: Init) -> float:
    """Of three FFNs: with one, emitting nodes win or lose by luck."""
    x = inputs_of(600)
    ffns = [dense(seed=seed) for seed in range(3)]
    return sum(error(fit_layer(ffn, x, shape, init, seed=0), ffn, x) for ffn in ffns)


def test_grown_tree_is_closer_than_a_random_one_on_other_tokens() -> None:
    ffn, x, other = dense(), inputs_of(600), inputs_of(400, seed=3)
    errors = {init: error(fit_layer(ffn, x, TreeShape(3, 4), init, seed=0), ffn, other) for init in INITS}
    assert max(errors["inputs"], errors["neurons"]) < 0.6 < errors["random"]


INITS: tuple[Init, ...] = ("inputs", "neurons", "random")


def test_random_has_the_mean_output_and_otherwise_drawn_weights() -> None:
    ffn, x, shape = dense(), inputs_of(300), TreeShape(2, 3, trunk=2, trees=2)
    layer = fit_layer(ffn, x, shape, "random", seed=7)
    assert torch.equal(layer.leaf_out_bias[0], ffn(x).mean(0).expand(4, -1))
    assert torch.equal(layer.leaf_out_bias[1], torch.zeros(4, D_MODEL))
    torch.manual_seed(7)
    drawn = FFF(shape, D_MODEL, "gelu")
    for name in set(drawn.parameter_shapes()) - {"leaf_out_bias"}:
        assert torch.equal(getattr(layer, name), getattr(drawn, name))


@pytest.mark.parametrize("init", INITS)
def test_seed_decides(init: Init) -> None:
    ffn, x, shape = dense(), inputs_of(300), TreeShape(2, 3, trunk=2, trees=2, emitting=True)
    first, again, other = (fit_layer(ffn, x, shape, init, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("init", INITS)
def test_state_of_torch_and_what_was_given_are_left_alone(init: Init) -> None:
    ffn, x = dense(), inputs_of(100)
    given = (x, ffn(x), ffn.in_weight, ffn.in_bias, ffn.out_weight, ffn.out_bias)
    before = [t.clone() for t in given]
    state = torch.get_rng_state()
    fit_layer(ffn, x, TreeShape(2, 3, trunk=2), init, seed=5, target=given[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    for old, new in zip(before, given, strict=True):
        assert torch.equal(old, new)


def test_a_node_that_no_token_reached_emits_nothing() -> None:
    layer = fit_layer(dense(), inputs_of(1).repeat(50, 1), TreeShape(2, 2, emitting=True), "inputs", seed=0)
    assert not layer.node_out_weight[0, 1].any(), "all went right"


def test_second_tree_sees_a_part_of_what_the_first_one_sees() -> None:
    layer = fit_layer(dense(), inputs_of(300), TreeShape(3, 3, trees=2), "inputs", seed=0)
    first, second = (layer.router_weight[tree] != 0 for tree in range(2))  # (n_nodes, d_model)
    assert first.all()
    assert torch.equal(second, second[:1].expand_as(second))  # one subspace for all its nodes
    assert 0 < second[0].sum() < layer.d_model


def test_a_tree_that_follows_changes_nothing_in_the_first() -> None:
    """Leaves with few tokens are fitted on their neighbours' too, from which nothing is taken on the way."""
    x = inputs_of(200)
    alone = fit_layer(dense(), x, TreeShape(5, 2), "inputs", seed=0)
    first_of_two = fit_layer(dense(), x, TreeShape(5, 2, trees=2), "inputs", seed=0)
    for name in ("router_weight", "leaf_in_weight", "leaf_out_weight", "leaf_out_bias"):
        assert torch.equal(getattr(first_of_two, name)[0], getattr(alone, name)[0]), name


def test_tokens_taken_in_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ffn, x, shape = dense(), inputs_of(300), TreeShape(2, 3)
    whole = fit_layer(ffn, x, shape, "inputs", seed=0)
    for module in ("dense", "fit"):
        monkeypatch.setattr(f"fffconvert.{module}.CHUNK", 64)
    chunks = fit_layer(ffn, x, shape, "inputs", seed=0)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(chunks.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_neighbourhood_grows_until_there_are_enough() -> None:
    leaf = torch.tensor([0] * 40 + [1] * 3 + [2] * 20 + [3] * 20)
    assert neighbourhood(leaf, 0, depth=2).tolist() == list(range(40))  # its own
    assert neighbourhood(leaf, 1, depth=2).tolist() == list(range(43))  # and its sibling's
    assert neighbourhood(leaf, 3, depth=2).tolist() == list(range(43, 83))
    assert neighbourhood(leaf[:5], 3, depth=2).tolist() == list(range(5))  # never enough: all there are


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (TreeShape(1, N_NEURONS + 1), r"tree\.leaf_width is 41; expected at most 40"),
        (TreeShape(1, 2, trunk=N_NEURONS + 1), r"tree\.trunk is 41; expected at most 40"),
        (TreeShape(1, D_MODEL + 1, linear=True), r"tree\.leaf_width is 13; expected at most 12"),
        (TreeShape(1, 2, trunk=D_MODEL + 1, linear=True), r"tree\.trunk is 13; expected at most 12"),
    ],
    ids=["leaf", "trunk", "linear_leaf", "linear_trunk"],
)
def test_more_neurons_than_can_be_filled_are_refused(shape: TreeShape, message: str) -> None:
    for init in ("inputs", "neurons"):
        with pytest.raises(UserError, match=message):
            fit_layer(dense(), inputs_of(50), shape, init, seed=0)
    assert (
        fit_layer(dense(), inputs_of(50), shape, "random", seed=0).shape == shape
    )  # draws as many as it likes


# ---- What errors cost


@pytest.mark.parametrize(
    "shape",
    [
        TreeShape(1, 3, linear=True),
        TreeShape(1, 1, trunk=2, linear=True),
        TreeShape(1, 2, emitting=True, linear=True),
    ],
    ids=str,
)
def test_errors_go_where_they_cost_little(shape: TreeShape) -> None:
    ffn, x = dense(), inputs_of(2000)
    drawn = normal(D_MODEL, D_MODEL)  # no diagonal: weights left in the fit's own coordinates must show
    costs = torch.matrix_power(drawn @ drawn.T / D_MODEL, 2)
    plain, weighted = (
        torch.cat(
            [
                output(fit_layer(ffn, x, shape, "inputs", seed, sensitivity=given), x) - ffn(x)
                for seed in range(4)
            ]
        )
        for given in (None, costs)
    )
    assert (weighted @ costs * weighted).sum() < 0.75 * (plain @ costs * plain).sum()
    assert weighted.square().sum() > plain.square().sum()


@pytest.mark.parametrize("shape", [TreeShape(2, D_MODEL, linear=True), TreeShape(2, 3)], ids=str)
def test_costs_change_nothing_where_nothing_is_left_out_or_neurons_stay_theirs(shape: TreeShape) -> None:
    ffn, x = dense(), inputs_of(400)
    costs = normal(D_MODEL, D_MODEL)
    plain = fit_layer(ffn, x, shape, "inputs", seed=0)
    weighted = fit_layer(ffn, x, shape, "inputs", seed=0, sensitivity=costs @ costs.T)
    torch.testing.assert_close(output(weighted, x), output(plain, x), rtol=1e-3, atol=1e-3)
