"""Growing trees: one answer made by hand, then what must hold for any points."""

from __future__ import annotations

import pytest
import torch
from fitted import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits
from torch import Tensor

from fffconvert.cluster import ROUNDING, Clustered, balanced_two_means, cut, grow, two_means
from fffconvert.tree import child, goes_right

few = settings(max_examples=15, deadline=None)
kinds = pytest.mark.parametrize("clustered", ["inputs", "neurons"])


def tokens_by_node(inputs: Tensor, routers: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The numbers of the inputs that reach each node and then each leaf, by the rule of the tree."""
    weights, biases = routers
    members = [torch.arange(len(inputs))] + [torch.empty(0, dtype=torch.long)] * (2 * len(weights))
    for node in range(len(weights)):
        right = goes_right(inputs[members[node]] @ weights[node] + biases[node])
        for side in (0, 1):
            members[child(node, side)] = members[node][right == bool(side)]
    return members


# ---- Answers made by hand

CORNERS = torch.tensor([[-10.0, -1.0], [-10.0, 1.0], [10.0, -1.0], [10.0, 1.0]])


def four_blobs(n_each: int = 32) -> tuple[Tensor, Tensor]:
    """Points close to the four corners of a flat rectangle, in any order, and each one's corner."""
    corner = torch.arange(4).repeat(n_each)[
        torch.randperm(4 * n_each, generator=torch.Generator().manual_seed(0))
    ]
    return CORNERS[corner] + 0.05 * normal(4 * n_each, 2), corner


def test_four_blobs_are_the_four_leaves() -> None:
    points, corner = four_blobs()
    routers = grow("inputs", points, normal(6, 2), depth=2, seed=0)
    _, _, _, *leaves = tokens_by_node(points, routers)
    assert sorted(corner[leaf].unique().tolist() for leaf in leaves) == [[0], [1], [2], [3]]
    # the long side is cut first, and the short one by both nodes below
    along = routers[0].abs()
    assert along[0, 0] > 10 * along[0, 1]
    assert (along[1:, 1] > 10 * along[1:, 0]).all()


def test_neurons_are_halved_wherever_they_lie() -> None:
    neurons = CORNERS.repeat(8, 1) + 0.05 * normal(32, 2, seed=1) + 100
    weights, _ = grow("neurons", normal(64, 2), neurons, depth=2, seed=0)
    along = weights.abs()
    assert along[0, 0] > 10 * along[0, 1]
    assert (along[1:, 1] > 10 * along[1:, 0]).all()


def test_neurons_decide_the_directions_and_inputs_the_thresholds() -> None:
    # neurons lie along the second feature first, inputs are spread along the first
    neurons = CORNERS.flip(1).repeat(8, 1) + 0.05 * normal(32, 2, seed=1)
    points, _ = four_blobs()
    weights, biases = grow("neurons", points + 100, neurons, depth=1, seed=0)
    assert weights[0, 1].abs() > 10 * weights[0, 0].abs()
    assert int(goes_right((points + 100) @ weights[0] + biases[0]).sum()) == 64


def test_two_means_points_from_one_centre_to_the_other() -> None:
    points = torch.cat([torch.zeros(30, 3), torch.tensor([3.0, 0.0, 4.0]).expand(10, 3)])
    direction = two_means(points, seed=0)
    torch.testing.assert_close(direction.abs(), torch.tensor([3.0, 0.0, 4.0]))


def test_the_number_of_threads_does_not_decide() -> None:
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads, user_api="openmp"):
            found.append(two_means(normal(400, 16), seed=0))
    assert torch.equal(*found)


def test_balanced_two_means_cuts_an_uneven_pair_in_halves() -> None:
    # 45 points at 0 and 15 at 8 along the first feature; the second only tells the 45 apart
    points = torch.cat([torch.zeros(45), torch.full((15,), 8.0)])[:, None] * torch.tensor([1.0, 0.0])
    points = points + 0.1 * normal(60, 2)
    scores = points @ balanced_two_means(points, seed=0)
    assert int(goes_right(scores - cut(scores)).sum()) == 30


@pytest.mark.parametrize(
    ("values", "middle"), [([], 0.0), ([3.0], 3.0), ([4.0, 1.0], 2.5), ([9.0, 1.0, 2.0], 1.5)], ids=str
)
def test_cut_in_the_middle(values: list[float], middle: float) -> None:
    assert float(cut(torch.tensor(values))) == middle


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 5.0, 5.0, 5.0, 7.0, 8.0], 6.0),  # beside the copies, where it is nearer
        ([1.0, 2.0, 5.0, 5.0, 5.0, 8.0], 3.5),
        ([5.0, 5.0, 5.0, 5.0, 7.0], 6.0),
        ([1.0, 5.0, 5.0, 5.0, 5.0], 3.0),
        ([5.0, 5.0, 5.0], 0.0),  # below them all
        ([0.0, 0.0], 0.0),
    ],
    ids=str,
)
def test_copies_are_not_cut(values: list[float], expected: float) -> None:
    scores = torch.tensor(values)
    for moved in (scores, scores.flip(0), scores * (1 + 1e-7 * normal(len(scores)))):
        assert float(cut(moved)) == pytest.approx(expected, abs=1e-4)


def test_many_points_are_cut_in_a_gap_near_the_middle() -> None:
    scores = normal(131_072)
    for points in (scores, scores.index_fill(0, torch.tensor([7]), 1e5)):  # one far out moves nothing
        threshold = cut(points)
        assert abs(float(goes_right(points - threshold).float().mean()) - 0.5) < 1e-3
        assert float((points - threshold).abs().min()) > ROUNDING


def test_copies_of_a_token_stay_on_one_side_however_a_router_rounds() -> None:
    common = 3 * normal(3, 64)
    inputs = torch.cat([common.repeat(100, 1), 3 * normal(700, 64, seed=1)])
    inputs += 1e-7 * inputs.abs() * normal(1000, 64, seed=2)
    weights, biases = grow("inputs", inputs, normal(8, 64), 4, seed=0)
    for node, members in enumerate(tokens_by_node(inputs, (weights, biases))[:15]):
        scores = inputs[members].double() @ weights[node].double() + biases[node].double()
        assert scores.abs().min() > 1e-5


# ---- What must hold for any points


@few
@given(
    st.sampled_from(["inputs", "neurons"]),
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(0, 99),
)
def test_children_get_equally_many_inputs(
    clustered: Clustered, depth: int, n_tokens: int, d_model: int, seed: int
) -> None:
    inputs = normal(n_tokens, d_model, seed=seed)  # drawn from a continuum: no two scores are equal
    members = tokens_by_node(inputs, grow(clustered, inputs, normal(9, d_model, seed=seed + 1), depth, seed))
    for node in range(2**depth - 1):
        left, right = members[child(node, 0)], members[child(node, 1)]
        assert len(left) + len(right) == len(members[node])
        assert abs(len(left) - len(right)) <= 1


@kinds
def test_leaves_of_a_power_of_two_have_the_same_size(clustered: Clustered) -> None:
    inputs = normal(256, 5)
    members = tokens_by_node(inputs, grow(clustered, inputs, normal(64, 5, seed=1), 4, seed=0))
    assert [len(leaf) for leaf in members[-16:]] == [16] * 16


@kinds
def test_scores_at_a_node_have_unit_spread_around_its_median(clustered: Clustered) -> None:
    inputs = 50 * normal(200, 5) + 30
    weights, biases = grow(clustered, inputs, normal(64, 5, seed=1), depth=3, seed=0)
    members = tokens_by_node(inputs, (weights, biases))
    for node in range(7):
        scores = inputs[members[node]] @ weights[node] + biases[node]
        assert float(scores.std()) == pytest.approx(1, rel=1e-3)
        assert float(cut(scores)) == pytest.approx(0, abs=1e-3)


@kinds
def test_seed_decides(clustered: Clustered) -> None:
    inputs, neurons = normal(300, 8), normal(80, 8, seed=1)
    first, again = (grow(clustered, inputs, neurons, 3, seed=4) for _ in range(2))
    other = grow(clustered, inputs, neurons, 3, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@kinds
def test_random_state_outside_neither_decides_nor_changes(clustered: Clustered) -> None:
    inputs, neurons = normal(100, 4), normal(20, 4, seed=1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = grow(clustered, inputs, neurons, 2, seed=0)[0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(first, grow(clustered, inputs, neurons, 2, seed=0)[0])


@pytest.mark.parametrize("limit", ["START_POINTS", "BALANCING_POINTS", "POINTS_AT_ONCE"])
def test_more_points_than_are_taken(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"fffconvert.cluster.{limit}", 32)
    points, corner = four_blobs(100)
    _, _, _, *leaves = tokens_by_node(points, grow("inputs", points, normal(6, 2), depth=2, seed=0))
    assert sorted(corner[leaf].unique().tolist() for leaf in leaves) == [[0], [1], [2], [3]]


@kinds
def test_depth_zero_has_no_routers(clustered: Clustered) -> None:
    weights, biases = grow(clustered, normal(10, 4), normal(6, 4), depth=0, seed=0)
    assert weights.shape == (0, 4)
    assert biases.shape == (0,)


@kinds
@pytest.mark.parametrize("n_tokens", [1, 2, 5])
def test_fewer_points_than_leaves(clustered: Clustered, n_tokens: int) -> None:
    inputs = normal(n_tokens, 4)
    routers = grow(clustered, inputs, normal(40, 4, seed=1), depth=4, seed=0)
    assert all(torch.isfinite(part).all() for part in routers)
    leaves = tokens_by_node(inputs, routers)[-16:]
    assert max(len(leaf) for leaf in leaves) == 1
    assert sum(len(leaf) for leaf in leaves) == n_tokens


@kinds
def test_points_that_are_all_the_same(clustered: Clustered) -> None:
    inputs = torch.full((50, 4), 0.3)
    routers = grow(clustered, inputs, torch.full((20, 4), 0.7), depth=3, seed=0)
    assert all(torch.isfinite(part).all() for part in routers)
    assert sum(len(leaf) for leaf in tokens_by_node(inputs, routers)[-8:]) == 50


def test_rounding_is_no_spread() -> None:
    inputs = torch.full((50, 16), 0.3) * (1 + 1e-7 * normal(50, 1))
    weights, _ = grow("neurons", inputs, normal(20, 16, seed=1), depth=2, seed=0)
    assert weights.norm(dim=1).max() < 100


def test_two_distinct_points_many_times() -> None:
    inputs = torch.tensor([[1.0, 2.0], [3.0, -1.0]]).repeat_interleave(20, dim=0)
    members = tokens_by_node(inputs, grow("inputs", inputs, normal(5, 2), depth=2, seed=0))
    assert [len(members[1]), len(members[2])] == [20, 20]
    assert sum(len(leaf) for leaf in members[-4:]) == 40


def test_more_leaves_than_neurons() -> None:
    inputs = normal(320, 4)
    weights, biases = grow("neurons", inputs, normal(3, 4, seed=1), depth=5, seed=0)
    assert torch.isfinite(weights).all()
    # nodes without neurons of their own still split their inputs in halves
    assert [len(leaf) for leaf in tokens_by_node(inputs, (weights, biases))[-32:]] == [10] * 32


def test_lone_neuron_is_the_direction_of_its_node() -> None:
    inputs, neurons = normal(64, 4), normal(1, 4, seed=1)
    weights, _ = grow("neurons", inputs, neurons, depth=1, seed=0)
    assert float(torch.cosine_similarity(weights, neurons)) == pytest.approx(1, abs=1e-6)


def test_router_of_inputs_without_spread_keeps_its_direction() -> None:
    # a lone neuron is its node's direction
    weights, biases = grow("neurons", torch.ones(5, 2), torch.tensor([[2.0, 0.0]]), depth=1, seed=0)
    assert weights[0].tolist() == [2.0, 0.0]
    assert float(biases[0]) == 0.0, "so all go right, and none near the threshold"
