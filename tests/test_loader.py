"""Which rows come when; that a resumed run goes on in its order is tested with training."""

from __future__ import annotations

from itertools import pairwise

import torch

from fffconvert.loader import EpochSampler, shared_batch_size

LENGTHS = [3 + number % 11 for number in range(100)]


def test_an_epoch_visits_every_row_once() -> None:
    assert sorted(EpochSampler(LENGTHS, 8, seed=0)) == list(range(100))


def test_epochs_differ_and_repeat() -> None:
    sampler, again = EpochSampler(LENGTHS, 8, seed=3), EpochSampler(LENGTHS, 8, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    again.set_epoch(1)
    assert first != second
    assert list(again) == second
    assert list(EpochSampler(LENGTHS, 8, seed=4)) != first


def test_batches_are_of_similar_lengths_and_do_not_run_from_long_to_short() -> None:
    lengths = [row * 37 % 101 for row in range(1603)]
    rows = list(EpochSampler(lengths, 8, seed=0))
    batches = [[lengths[row] for row in rows[start : start + 8]] for start in range(0, 1600, 8)]
    assert max(max(batch) - min(batch) for batch in batches) < 10
    shorter = [sum(second) < sum(first) for first, second in pairwise(batches)]
    assert 0.35 < sum(shorter) / len(shorter) < 0.65


def test_the_rows_that_fill_no_batch_are_of_all_lengths() -> None:
    lengths, sampler, last = list(range(1003)), EpochSampler(list(range(1003)), 8, seed=0), []
    for epoch in range(200):
        sampler.set_epoch(epoch)
        rows = list(sampler)
        assert sorted(rows) == lengths
        last += rows[1000:]
    assert abs(sum(last) / len(last) / 501 - 1) < 0.1
    assert sorted(EpochSampler([3, 1, 2], 8, seed=0)) == [0, 1, 2]


def test_order_ignores_torchs_own_generator() -> None:
    torch.manual_seed(1)
    first = list(EpochSampler(LENGTHS, 8, seed=0))
    torch.manual_seed(2)
    assert list(EpochSampler(LENGTHS, 8, seed=0)) == first


def test_a_batch_has_as_many_rows_as_processes_share_evenly() -> None:
    assert shared_batch_size(8, n_rows=92, n_processes=2) == 8
    assert shared_batch_size(8, n_rows=5, n_processes=2) == 4
    assert shared_batch_size(8, n_rows=5, n_processes=1) == 5
