"""Interleaved timing and its statistics."""

from __future__ import annotations

import numpy as np

from edgetok.measuring import Timing, bootstrap_ci, interleave, ratio


def test_interleave_reverses_the_order_every_round() -> None:
    calls: list[str] = []
    timings = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=4, warmup=1)
    assert calls == ["a", "b"] + ["a", "b", "b", "a"] * 2
    assert {name: len(t.samples_ms) for name, t in timings.items()} == {"a": 4, "b": 4}


def test_interleave_never_stops_before_five_rounds() -> None:
    timings = interleave({"a": lambda: None}, rounds=50, warmup=0, max_seconds=0.0)
    assert len(timings["a"].samples_ms) == 5


def test_ratio_is_taken_per_round() -> None:
    # Both slow down together in round two: the ratio does not notice.
    slow, fast = Timing((10.0, 40.0, 10.0)), Timing((5.0, 20.0, 5.0))
    found = ratio(slow, fast)
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)


def test_bootstrap_interval_covers_the_median_and_repeats() -> None:
    samples = np.random.default_rng(1).normal(10, 1, 200)
    low, high = bootstrap_ci(samples)
    assert low <= np.median(samples) <= high
    assert high - low < 1.0  # the standard error of the median here is 0.09
    assert (low, high) == bootstrap_ci(samples)


def test_settling_calls_come_right_before_each_sample() -> None:
    calls: list[str] = []
    interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, warmup=0, settle=1)
    assert calls == ["a", "a", "b", "b", "b", "b", "a", "a"]
