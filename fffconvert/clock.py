"""What is compared is timed in turn, so that what slows one slows all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

Run = Callable[[], object]

FEWEST_ROUNDS, MOST_ROUNDS = 5, 200
LONG_ENOUGH = 1e-2  # seconds; what is quicker is called several times
MOST_CALLS = 100


def thread_counts() -> list[int]:
    """One thread, and all of PyTorch's."""
    return sorted({1, torch.get_num_threads()})


@contextmanager
def using_threads(threads: int) -> Iterator[None]:
    """Sets PyTorch's number of threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_in_turn(runs: Sequence[Run], seconds: float) -> list[list[float]]:
    """Times each of `runs` in turn, round after round, until `seconds` are over; milliseconds a call.

    All rounds are full, and there are `FEWEST_ROUNDS` at least. A run that is timed over several calls has one before
    them that is not: it loads the run's code, and waits for the caches to write out what other runs left in them,
    which in a model only one layer of many does.
    """
    repeats = [enough_calls(run) for run in runs]
    times: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + seconds
    while len(times[0]) < FEWEST_ROUNDS or (time.perf_counter() < end and len(times[0]) < MOST_ROUNDS):
        for run, n, taken in zip(runs, repeats, times, strict=True):
            if n > 1:
                run()
            start = time.perf_counter()
            for _ in range(n):
                run()
            taken.append(1000 * (time.perf_counter() - start) / n)
    return times


def enough_calls(run: Run) -> int:
    """Warms up, and says how many calls are long enough to time."""
    run()
    shortest = LONG_ENOUGH
    for _ in range(3):
        start = time.perf_counter()
        run()
        took = time.perf_counter() - start
        if took >= LONG_ENOUGH:
            break
        shortest = min(shortest, took)
    return min(MOST_CALLS, math.ceil(LONG_ENOUGH / shortest))
