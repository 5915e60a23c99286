"""Timing that can be trusted on a shared machine: interleaved runs, medians, bootstrap intervals.

Callables are timed in an order that is reversed every round (ABBA), so that a slow phase of the machine
hits all of them alike. Ratios are taken per round and then summarised, never from two separate runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call of one callable.

    Args:
        samples_ms: one number per round, in order.
    """

    samples_ms: tuple[float, ...]

    @property
    def p50_ms(self) -> float:
        return float(np.percentile(self.samples_ms, 50))

    @property
    def p90_ms(self) -> float:
        return float(np.percentile(self.samples_ms, 90))

    @property
    def p99_ms(self) -> float:
        return float(np.percentile(self.samples_ms, 99))


@dataclass(frozen=True)
class Ratio:
    """How many times faster B is than A: the median over rounds of a/b, with a 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 30,
    warmup: int = 3,
    max_seconds: float = 60.0,
    settle: int = 0,
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Time several callables in turn.

    Args:
        calls: name to callable; each call is one sample.
        rounds: samples per callable.
        warmup: calls of each before the first sample.
        settle: untimed calls right before each sample. With 1, a runtime whose threads still spin after its own turn
            does not slow down the next one's sample; needed when several runtimes are compared.
        max_seconds: stop early after this long, but never before 5 rounds.
        on_round: told (round, rounds) after each round.

    Returns:
        name to ``Timing``; all have the same number of samples.
    """
    for _ in range(warmup):
        for call in calls.values():
            call()
    order = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in order}
    start = time.perf_counter()
    for done in range(rounds):
        for name in order if done % 2 == 0 else reversed(order):
            for _ in range(settle):
                calls[name]()
            before = time.perf_counter_ns()
            calls[name]()
            samples[name].append((time.perf_counter_ns() - before) / 1e6)
        if on_round:
            on_round(done + 1, rounds)
        if done >= 4 and time.perf_counter() - start > max_seconds:
            break
    return {name: Timing(tuple(s)) for name, s in samples.items()}


def bootstrap_ci(samples: np.ndarray, *, level: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the median of ``samples`` [n] (Efron 1979)."""
    rng = np.random.default_rng(seed)
    values = np.asarray(samples, dtype=np.float64)
    medians = np.median(values[rng.integers(0, len(values), (draws, len(values)))], axis=1)
    tail = (1 - level) / 2
    return float(np.quantile(medians, tail)), float(np.quantile(medians, 1 - tail))


def ratio(slow: Timing, fast: Timing, *, seed: int = 0) -> Ratio:
    """How many times faster ``fast`` is than ``slow``, from rounds timed together."""
    per_round = np.asarray(slow.samples_ms) / np.asarray(fast.samples_ms)
    low, high = bootstrap_ci(per_round, seed=seed)
    return Ratio(float(np.median(per_round)), low, high)
