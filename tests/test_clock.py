"""Whose turn it is and how often; how long anything takes is no matter of tests."""

from __future__ import annotations

import pytest

from fffconvert import clock


def test_what_is_quick_is_called_several_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for milliseconds, calls in ((0.001, clock.MOST_CALLS), (4, 3), (9, 2), (11, 1)):
        readings = iter(n * milliseconds / 1000 for n in (0, 1, 1, 2, 2, 3))
        monkeypatch.setattr(clock.time, "perf_counter", lambda readings=readings: next(readings))
        assert clock.enough_calls(lambda: None) == calls


def test_the_clock_takes_turns_and_full_rounds():
    order: list[str] = []
    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = clock.time_in_turn(list(runs.values()), seconds=0.0)
    assert len(times[0]) == len(times[1]) == clock.FEWEST_ROUNDS
    assert order.count("a") == order.count("b") > clock.FEWEST_ROUNDS
    assert "ab" in "".join(order)
    assert "ba" in "".join(order)
