"""Expedit: cluster the token grid into a coarser one, run the remaining blocks on the clusters, reconstruct at the end.

Soft superpixels: centres start as averages of grid cells; each token spreads over the centres of its neighbourhood by a
softmax of squared feature distance, centres move, a few times. After the last block every token is rebuilt from the
``k`` centres nearest to what it was before clustering. Protected rows pass by both.

Source: Liang, Yuan et al., NeurIPS 2022 / TPAMI 2023. Departures: reconstruction weights sum to one (the release
normalises by the L2 norm, which amplifies a constant field; ``norm=l2`` reproduces it); the temperature follows the
model, ``sharpness`` over the mean squared distance within the neighbourhood, unless ``temperature`` is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import isqrt
from typing import cast

import numpy as np
import onnx_ir as ir

from edgetok.converters.reduce import core
from edgetok.converters.reduce._builder import Builder, dims
from edgetok.converters.reduce.base import (
    Counts,
    Emitted,
    Method,
    Plan,
    Settings,
    Site,
    TokenView,
    check_range,
)
from edgetok.errors import InputError

_FAR = -1e4


@dataclass(frozen=True)
class ExpeditSettings(Settings):
    """Args:
    alpha: blocks at full resolution; -1 chooses a third of the depth.
    grid: rows x columns of clusters; by default three quarters of each side.
    iterations: clustering steps.
    window: neighbourhood in cells, odd.
    k: centres used to rebuild a token.
    sharpness: temperature times the mean squared distance.
    temperature: fixed, multiplies squared feature distances; 0 means from ``sharpness``.
    norm: "l1" or "l2" (as released).
    prop_attn: a cluster counts as its mass in attention.
    """

    alpha: int = -1
    grid: tuple[int, int] | None = None
    iterations: int = 5
    window: int = 5
    k: int = 20
    sharpness: float = 10.0
    temperature: float = 0.0
    norm: str = "l1"
    prop_attn: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("iterations", self.iterations, 1, 50)
        check_range("window", self.window, 1, 999)
        check_range("k", self.k, 1, 100_000)
        check_range("sharpness", self.sharpness, 0.0, 1e6)
        check_range("temperature", self.temperature, 0.0, 1e9)
        if self.norm not in ("l1", "l2"):
            raise InputError(f"norm={self.norm!r}", next="choose l1 or l2")

    def start(self, layers: int) -> int:
        return self.alpha if self.alpha >= 0 else max(1, layers // 3)


def pooling(grid: tuple[int, int], cells: tuple[int, int]) -> np.ndarray:
    """Adaptive average pooling as a matrix [cells, tokens]: cell i covers floor(iH/h) to ceil((i+1)H/h)."""

    def side(full: int, small: int) -> np.ndarray:
        rows = np.zeros((small, full))
        for i in range(small):
            low, high = i * full // small, -(-(i + 1) * full // small)
            rows[i, low:high] = 1 / (high - low)
        return rows

    return np.kron(side(grid[0], cells[0]), side(grid[1], cells[1])).astype(np.float32)


def neighbourhood(grid: tuple[int, int], cells: tuple[int, int], window: int) -> np.ndarray:
    """float32 [tokens, cells], 1 where a token may join a cluster: its cell is at most window//2 away on both axes."""

    def side(full: int, small: int) -> np.ndarray:
        own = np.arange(full) * small // full
        return np.abs(own[:, None] - np.arange(small)[None]) <= window // 2

    rows, columns = side(grid[0], cells[0]), side(grid[1], cells[1])
    near = rows[:, None, :, None] & columns[None, :, None, :]
    return near.reshape(grid[0] * grid[1], cells[0] * cells[1]).astype(np.float32)


def squared_distance(f: np.ndarray, mu: np.ndarray) -> np.ndarray:
    """[B,T,C] from f [B,T,D] and mu [B,C,D]."""
    cross = f @ np.swapaxes(mu, 1, 2)
    return np.maximum((f * f).sum(2)[..., None] + (mu * mu).sum(2)[:, None] - 2 * cross, 0)


def cluster(
    f: np.ndarray, mu: np.ndarray, near: np.ndarray, temperature: np.ndarray | float, iterations: int
) -> tuple[np.ndarray, np.ndarray]:
    """Soft assignment Q [B,T,C] (rows sum to one) and centres [B,C,D] after ``iterations`` steps."""
    q = np.zeros((*f.shape[:2], mu.shape[1]))
    for _ in range(iterations):
        q = _softmax(np.where(near > 0, -temperature * squared_distance(f, mu), _FAR))
        mu = np.swapaxes(q, 1, 2) @ f / np.maximum(q.sum(1)[..., None], 1e-16)
    return q, mu


def rebuild_weights(f: np.ndarray, mu: np.ndarray, temperature: np.ndarray | float, k: int, norm: str) -> np.ndarray:
    """[B,T,C]: exp(-T d), the k largest per token, normalised."""
    logits = -temperature * squared_distance(f, mu)
    if k < logits.shape[2]:
        kth = -np.sort(-logits, axis=2)[..., k - 1 : k]
        logits = np.where(logits >= kth, logits, -np.inf)
    e = np.exp(logits - logits.max(2, keepdims=True))
    return e / (e.sum(2, keepdims=True) if norm == "l1" else np.sqrt((e * e).sum(2, keepdims=True)))


def auto_temperature(f: np.ndarray, mu: np.ndarray, near: np.ndarray, sharpness: float) -> np.ndarray:
    """[B,1,1]: sharpness over the mean squared distance of tokens to the centres near them."""
    mean = (squared_distance(f, mu) * near).sum((1, 2), keepdims=True) / near.sum()
    return sharpness / np.maximum(mean, 1e-6)


def _softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


class Expedit(Method):
    """See the module."""

    name = "expedit"
    settings = ExpeditSettings
    kind = "transform"
    where = "input"
    needs = frozenset({"grid"})
    max_share = Fraction(99, 100)

    def counts(self, settings: Settings, tokens: int, protected: int, layers: int) -> Counts:
        s, free = cast(ExpeditSettings, settings), tokens - protected
        if s.start(layers) >= layers:
            raise InputError(f"alpha={s.alpha}, but the model has {layers} blocks")
        if s.grid is not None:
            clusters = s.grid[0] * s.grid[1]
        else:
            side = isqrt(free)
            clusters = round(side * 0.75) ** 2
        if clusters >= free:
            raise InputError(f"{clusters} clusters asked for, but there are {free} tokens to cluster")
        return Counts(_at(s.start(layers), free - clusters, layers))

    def share(self, settings: Settings, removed: float, tokens: int, protected: int, layers: int) -> Counts | None:
        s, free = cast(ExpeditSettings, settings), tokens - protected
        if removed <= 0:
            return Counts((0,) * layers)
        for alpha in [s.start(layers), *range(s.start(layers) - 1, -1, -1)]:
            clusters = free - removed * layers * tokens / (layers - alpha)
            side = int(max(clusters, 0) ** 0.5)
            if side * side >= free / 5 or (alpha == 0 and side):
                return Counts(_at(alpha, free - side * side, layers))
        return Counts(_at(0, free - 1, layers), (f"removed {removed:.3f} is more than clustering can do",))

    def plan(self, view: TokenView, count: int, settings: Settings) -> Plan:
        s, p = cast(ExpeditSettings, settings), view.protected
        grid, cells = _grids(view.grid, view.tokens - p - count, s)
        f = view.x[:, p:]
        near, mu = neighbourhood(grid, cells, s.window), pooling(grid, cells)[None] @ f
        hot = s.temperature or auto_temperature(f, mu, near, s.sharpness)
        q, mu = cluster(f, mu, near, hot, s.iterations)
        assign = core.protected_matrix(q, p)
        restore = core.protected_matrix(rebuild_weights(f, mu, hot, s.k, s.norm), p)
        empty = np.zeros((len(f), 0), np.int64)
        return Plan(self.kind, view.tokens, p, empty, empty, empty, assign, restore)

    def emit(self, b: Builder, site: Site, count: int, settings: Settings) -> Emitted:
        s, p, n = cast(ExpeditSettings, settings), site.protected, site.tokens
        grid, cells = _grids(site.grid, n - p - count, s)
        near = neighbourhood(grid, cells, s.window)
        f = b.slice(site.x, 1, p, n)
        f = b.binary("Sub", f, b.reduce("ReduceMean", f, 1, keep=True))  # distances stay, cancellation goes
        far = b.const(np.where(near > 0, 0.0, _FAR)[None].astype(np.float32))
        mu = b.matmul(b.const(pooling(grid, cells)[None]), f)
        hot: ir.Value | float = s.temperature
        if not s.temperature:
            d = _emit_distance(b, f, mu)
            inside = b.binary("Mul", d, b.const((near / near.sum())[None].astype(np.float32)))
            mean = b.reduce("ReduceSum", b.reduce("ReduceSum", inside, 2, keep=True), 1, keep=True)
            hot = b.op("Div", [b.const(s.sharpness), b.binary("Max", mean, 1e-6)], [b.batch, 1, 1])
        q = f
        for _ in range(s.iterations):
            q = b.op("Softmax", [b.binary("Add", _emit_logits(b, f, mu, hot), far)], [b.batch, *near.shape], axis=2)
            mass = b.binary("Max", b.reduce("ReduceSum", q, 1), core.TINY)
            mu = b.binary("Div", b.matmul(b.transpose(q, 0, 2, 1), f), b.unsqueeze(mass, 2))
        return Emitted(self.kind, n - count, assign=q, restore=_emit_rebuild(b, _emit_logits(b, f, mu, hot), s))


def _at(layer: int, count: int, layers: int) -> tuple[int, ...]:
    return tuple(count if i == layer else 0 for i in range(layers))


def _grids(grid: tuple[int, int] | None, clusters: int, s: ExpeditSettings) -> tuple[tuple[int, int], tuple[int, int]]:
    """The token grid and the cluster grid.

    Raises:
        InputError: no grid, or the number of clusters is not a grid.
    """
    if grid is None:
        raise InputError("expedit needs a grid of tokens")
    if s.grid is not None and s.grid[0] * s.grid[1] == clusters:
        return grid, s.grid
    fits = [(h, clusters // h) for h in range(1, clusters + 1) if clusters % h == 0]
    best = min(fits, key=lambda g: abs(g[0] * grid[1] - g[1] * grid[0]))
    if best[0] > grid[0] or best[1] > grid[1]:
        raise InputError(f"{clusters} clusters do not form a grid within {grid[0]}x{grid[1]}", next="give grid=12x12")
    return grid, best


def _emit_distance(b: Builder, f: ir.Value, mu: ir.Value) -> ir.Value:
    own = b.reduce("ReduceSum", b.binary("Mul", f, f), 2, keep=True)
    other = b.unsqueeze(b.reduce("ReduceSum", b.binary("Mul", mu, mu), 2), 1)
    cross = b.matmul(f, b.transpose(mu, 0, 2, 1))
    return b.binary("Max", b.binary("Add", b.binary("Add", b.binary("Mul", cross, -2.0), own), other), 0.0)


def _emit_logits(b: Builder, f: ir.Value, mu: ir.Value, hot: ir.Value | float) -> ir.Value:
    """-T |f - mu|^2 without |f|^2, which is the same for all clusters of a token and cancels in the softmax."""
    other = b.unsqueeze(b.reduce("ReduceSum", b.binary("Mul", mu, mu), 2), 1)
    cross = b.matmul(f, b.transpose(b.binary("Mul", mu, 2.0), 0, 2, 1))
    return b.binary("Mul", b.binary("Sub", cross, other), hot)


def _emit_rebuild(b: Builder, logits: ir.Value, s: ExpeditSettings) -> ir.Value:
    clusters = int(dims(logits)[2])
    if s.k < clusters:
        top, _ = b.topk(logits, s.k)
        kth = b.slice(top, 2, s.k - 1, s.k)
        # the same shift for a whole row changes nothing, and makes -1e4 low whatever the scale of the logits
        logits = b.binary("Sub", logits, b.slice(top, 2, 0, 1))
        keep = b.binary("GreaterOrEqual", logits, b.binary("Sub", kth, b.slice(top, 2, 0, 1)))
        logits = b.op("Where", [keep, logits, b.const(_FAR)], dims(logits))
    weights = b.op("Softmax", [logits], dims(logits), axis=2)
    if s.norm == "l1":
        return weights
    length = b.unary("Sqrt", b.reduce("ReduceSum", b.binary("Mul", weights, weights), 2, keep=True))
    return b.binary("Div", weights, length)


METHOD = Expedit()
