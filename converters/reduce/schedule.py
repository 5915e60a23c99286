"""From a removed share to tokens per layer: shapes, the model of cost, and a search for the best schedule.

"Removed" is decision 24: x = 1 - (sum over blocks of tokens entering the MLP) / (blocks x source tokens), protected
tokens included. Cost is in multiply-accumulates of the blocks only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgetok.converters.graph.cost import macs
from edgetok.converters.reduce.base import Counts, Method, clamp
from edgetok.errors import InputError

Weights = Callable[[int], np.ndarray]


def _constant(layers: int) -> np.ndarray:
    return np.ones(layers)


def _decreasing(layers: int) -> np.ndarray:
    return np.arange(layers, 0, -1, dtype=float)


def _increasing(layers: int) -> np.ndarray:
    return np.arange(1, layers + 1, dtype=float)


def _bell(layers: int) -> np.ndarray:
    """A hump over the second half, nothing in the first sixth."""
    at = (np.arange(layers) + 0.5) / layers
    return np.where(at < 1 / 6, 0.0, np.exp(-(((at - 0.62) / 0.25) ** 2)))


def _late(layers: int) -> np.ndarray:
    """Nothing in the first third, constant after."""
    return (np.arange(layers) >= layers // 3).astype(float)


def _middle(layers: int) -> np.ndarray:
    """A hump in the middle, nothing in the last layer (its merge saves only one MLP)."""
    at = (np.arange(layers) + 0.5) / layers
    hump = np.exp(-(((at - 0.55) / 0.3) ** 2))
    hump[-1] = 0.0 if layers > 1 else 1.0
    return hump


def _staged(layers: int) -> np.ndarray:
    """Three equal steps at a quarter, a half and three quarters: few matchings, little overhead."""
    steps = np.zeros(layers)
    steps[sorted({layers // 4, layers // 2, (3 * layers) // 4})] = 1.0
    return steps


SHAPES: Mapping[str, Weights] = {
    "constant": _constant,
    "decreasing": _decreasing,
    "increasing": _increasing,
    "bell": _bell,
    "late": _late,
    "middle": _middle,
    "staged": _staged,
}


def tokens_per_layer(counts: Sequence[int], tokens: int, *, where: str = "attn") -> tuple[int, ...]:
    """Tokens entering the MLP of each block (with "module", nothing carries over to the next block)."""
    if where == "module":
        return tuple(tokens - count for count in counts)
    left, out = tokens, []
    for count in counts:
        left -= count
        out.append(left)
    return tuple(out)


def removed_share(counts: Sequence[int], tokens: int, *, where: str = "attn") -> float:
    """Decision 24's x."""
    return 1 - sum(tokens_per_layer(counts, tokens, where=where)) / (len(counts) * tokens)


def total_macs(counts: Sequence[int], tokens: int, width: int, mlp_ratio: float = 4.0, *, where: str = "attn") -> int:
    """MACs of all blocks.

    Args:
        counts: tokens removed by each layer.
        where: "attn": between attention and MLP; "input": in front of the block, so its attention is cheaper too;
            "module": inside each block on its own, nothing carries over to the next.
    """
    total, left = 0, tokens
    for count in counts:
        if where == "module":
            total += macs(tokens - count, tokens - count, width, mlp_ratio)
            continue
        after = left - count
        total += macs(after if where == "input" else left, after, width, mlp_ratio)
        left = after
    return total


def counts_from_weights(
    weights: Sequence[float] | np.ndarray, removed: float, tokens: int, protected: int, method: Method
) -> Counts:
    """Scale a shape until the removed share is met, as nearly as whole tokens allow.

    Args:
        weights: one number >= 0 per block.
        removed: decision 24's x, 0 to below 1.

    Returns:
        counts; a note tells when the share cannot be reached with this shape.
    """
    shape = np.asarray(weights, float)
    layers = len(shape)
    if removed <= 0 or not shape.any():
        return Counts((0,) * layers, () if removed <= 0 else ("no layer may reduce",))

    def at(scale: float) -> tuple[int, ...]:
        return clamp([int(w) for w in np.floor(shape * scale + 0.5)], tokens, protected, method).removed

    low, high = 0.0, float(tokens) / float(shape[shape > 0].min())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if removed_share(at(middle), tokens, where=method.where) < removed else (low, middle)
    best = _nudge(at(high), shape, removed, tokens, protected, method)
    reached = removed_share(best, tokens, where=method.where)
    notes: tuple[str, ...] = ()
    if reached < removed - 0.5 / tokens:
        notes = (f"removed {removed:.3f} asked for, {reached:.3f} is the most this schedule can remove",)
    return Counts(best, notes)


def _nudge(
    counts: tuple[int, ...], shape: np.ndarray, removed: float, tokens: int, protected: int, method: Method
) -> tuple[int, ...]:
    """Take single tokens back, from the last layers on, while the share stays at or above the target."""
    best = list(counts)
    for layer in sorted(np.flatnonzero(shape), reverse=True):
        while best[layer] > 0:
            trial = [*best]
            trial[layer] -= 1
            if removed_share(trial, tokens, where=method.where) < removed - 1e-12:
                break
            best = trial
    return clamp(best, tokens, protected, method).removed


def schedule(
    removed: float,
    tokens: int,
    protected: int,
    layers: int,
    method: Method,
    *,
    shape: str = "",
    allowed: Sequence[int] | None = None,
) -> Counts:
    """Counts per layer for a removed share and a named shape.

    Raises:
        InputError: no such shape.
    """
    name = shape or method.shape
    if name not in SHAPES:
        raise InputError(f"unknown schedule {name!r}", next=f"choose one of: {', '.join(SHAPES)}")
    weights = SHAPES[name](layers)
    if allowed is not None:
        mask = np.array([i in set(allowed) for i in range(layers)])
        weights = weights * mask if (weights * mask).any() else mask.astype(float)
    return counts_from_weights(weights, removed, tokens, protected, method)


@dataclass(frozen=True)
class Trial:
    """One schedule tried in a search.

    Args:
        counts: tokens removed per layer.
        score: agreement with the unreduced model, higher is better.
        cost: MACs relative to unreduced.
        label: the shape's name, or "search".
    """

    counts: tuple[int, ...]
    score: float
    cost: float
    label: str


@dataclass(frozen=True)
class SearchSpace:
    """What a search may vary: the network's size, and how much must go.

    Args:
        tokens, protected, layers, width, mlp_ratio: of the network.
        removed: share to remove; candidates meet it to within a token per layer.
        cost: if given, a ratio of MACs to meet instead of ``removed``.
    """

    tokens: int
    protected: int
    layers: int
    width: int
    removed: float = 0.3
    cost: float | None = None
    mlp_ratio: float = 4.0
    allowed: tuple[int, ...] | None = None

    def ratio(self, counts: Sequence[int], method: Method) -> float:
        """MACs relative to unreduced."""
        full = total_macs([0] * self.layers, self.tokens, self.width, self.mlp_ratio)
        return total_macs(counts, self.tokens, self.width, self.mlp_ratio, where=method.where) / full

    def fit(self, weights: np.ndarray, method: Method) -> tuple[int, ...]:
        """Counts of this shape that meet the target."""
        if self.allowed is not None:
            weights = weights * np.array([i in self.allowed for i in range(self.layers)])
        if self.cost is None:
            return counts_from_weights(weights, self.removed, self.tokens, self.protected, method).removed
        low, high = 0.0, 0.95
        for _ in range(12):
            middle = (low + high) / 2
            counts = counts_from_weights(weights, middle, self.tokens, self.protected, method).removed
            low, high = (middle, high) if self.ratio(counts, method) > self.cost else (low, middle)
        return counts_from_weights(weights, high, self.tokens, self.protected, method).removed


def candidates(space: SearchSpace, method: Method) -> list[tuple[str, tuple[int, ...]]]:
    """The named shapes at the target, without doubles, the method's own first."""
    seen: dict[tuple[int, ...], str] = {}
    for name in sorted(SHAPES, key=lambda n: n != method.shape):
        seen.setdefault(space.fit(SHAPES[name](space.layers), method), name)
    return [(name, counts) for counts, name in seen.items()]


def search(
    score: Callable[[tuple[int, ...]], float],
    space: SearchSpace,
    method: Method,
    *,
    samples: int = 40,
    seconds: float = 45.0,
    seed: int = 0,
    first: Sequence[tuple[int, ...]] = (),
    on_trial: Callable[[int, int, Trial], None] | None = None,
) -> list[Trial]:
    """Random search over counts per layer, ranked by agreement, then by cost.

    First the named shapes, then the best so far with every layer's weight multiplied by random factors (and now and
    then switched off), always scaled back to the target. Every candidate has the same cost to within a token per
    layer, so ranking by agreement is ranking by agreement per FLOP.

    Args:
        score: agreement of a schedule with the unreduced model, on data that no accuracy is reported on.
        samples: most schedules to score.
        seconds: stop after this long, but not before one shape is scored.
        seed: of the random draws.
        first: schedules to score instead of the named shapes, as the best of an earlier search.
        on_trial: told (done, samples, trial) after each.

    Returns:
        all trials, best first.

    Source: Zero-TPrune (Wang et al., CVPR 2024) searches its per-layer counts this way.
    """
    rng = np.random.default_rng(seed)
    start, tried = time.monotonic(), dict[tuple[int, ...], Trial]()

    def attempt(counts: tuple[int, ...], label: str) -> None:
        if counts in tried or not any(counts):
            return
        trial = Trial(counts, float(score(counts)), space.ratio(counts, method), label)
        tried[counts] = trial
        if on_trial:
            on_trial(len(tried), samples, trial)

    def open_() -> bool:
        return len(tried) < samples and time.monotonic() - start < seconds

    for name, counts in [("first", c) for c in first] or candidates(space, method):
        if not tried or open_():
            attempt(counts, name)
    for _ in range(20 * samples):
        if not open_():
            break
        best = sorted(tried.values(), key=_rank)[: 1 + int(rng.integers(0, 3))][-1]
        attempt(space.fit(_mutate(np.array(best.counts, float), rng), method), "search")
    return sorted(tried.values(), key=_rank)


def _rank(trial: Trial) -> tuple[float, float, tuple[int, ...]]:
    return -trial.score, trial.cost, trial.counts


def _mutate(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    spread = rng.choice([0.15, 0.3, 0.5])  # small steps refine, large ones leave a poor shape
    weights = (weights + 0.03 * weights.mean()) * np.exp(rng.normal(0, spread, len(weights)))
    weights[rng.random(len(weights)) < 0.25 * spread] = 0.0
    if not weights.any():
        weights[:] = 1.0
    return weights
