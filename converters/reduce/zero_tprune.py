"""Zero-TPrune: prune by similarity, then by importance voted over the attention graph (weighted page rank).

At a pruning layer: one vote gives a first importance; the less important half of the tokens is compared with the more
important half, and the ``s`` most similar of it go (S-stage); then votes on what is left rank the rest, and the lowest
go (I-stage). Removed tokens are dropped, not merged. Per-layer counts come from a search (``schedule.search``).

Source: Wang, Dedhia, Jha, CVPR 2024; the authors' code was not available. Departures: the variance head filter works
on scores scaled to mean one (the published range rejects every head on scores that sum to one) with a fallback to all
heads; votes have fixed, small numbers of steps; any number of protected rows; padding is removed first.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import cast

import numpy as np
import onnx_ir as ir

from edgetok.converters.reduce import core
from edgetok.converters.reduce._builder import FLOAT, Builder, Dim, dims
from edgetok.converters.reduce.base import (
    Counts,
    Emitted,
    Method,
    Plan,
    Settings,
    Site,
    TokenView,
    check_range,
    clamp,
    per_layer,
)
from edgetok.errors import InputError

_FLOOR = 1e-12


@dataclass(frozen=True)
class ZeroTPruneSettings(Settings):
    """Args:
    r: tokens removed per layer, both stages together: one number, or one per block.
    s_share: share of them removed by similarity.
    votes: voting steps per block; empty means 6 in the first quarter, 1 in the last, 3 between.
    v_min, v_max: heads whose score variance (mean one) lies outside are not heard; v_max 0 means no upper end.
    boost_cls: row 0 starts with sqrt(N) times the weight of the others.
    """

    r: tuple[int, ...] = (13,)
    s_share: float = 0.3
    votes: tuple[int, ...] = ()
    v_min: float = 0.01
    v_max: float = 0.0
    boost_cls: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("s_share", self.s_share, 0.0, 1.0)
        if not self.r or min(self.r) < 0:
            raise InputError("r: give counts of zero or more, as 13 or 0/0/4/8")
        if self.votes and not 1 <= min(self.votes) <= max(self.votes) <= 100:
            raise InputError("votes: give 1 to 100 steps per block")

    def steps(self, layer: int, layers: int) -> int:
        if self.votes:
            return self.votes[min(layer, len(self.votes) - 1)]
        return 6 if layer < layers / 4 else 1 if layer >= layers * 3 / 4 else 3

    def similar(self, count: int, free: int) -> int:
        """Tokens the S-stage removes."""
        return min(round(count * self.s_share), free // 2, count)


def start_weights(tokens: int, *, boost: bool) -> np.ndarray:
    """[N]: 1/N each; row 0 sqrt(N)/N when boosted."""
    start = np.full(tokens, 1 / tokens)
    if boost:
        start[0] *= np.sqrt(tokens)
    return start


def vote(probs: np.ndarray, start: np.ndarray, steps: int, live: np.ndarray | None = None) -> np.ndarray:
    """Weighted page rank per head: s <- A^T s, ``steps`` times.

    Args:
        probs: A [B,H,N,N], rows sum to one.
        start: [N].
        live: [B,N] of 0 and 1; others neither vote nor are voted for (the rows and columns left out).

    Returns:
        [B,H,N].
    """
    mask = np.ones((len(probs), probs.shape[-1])) if live is None else live
    s = np.broadcast_to((start * mask)[:, None, None, :], (*probs.shape[:2], 1, probs.shape[-1]))
    for _ in range(steps):
        s = (s @ probs) * mask[:, None, None, :]
    return s[:, :, 0]


def over_heads(s: np.ndarray, heard: np.ndarray) -> np.ndarray:
    """Root mean square over the heard heads: s [B,H,N], heard [B,H] of 0 and 1 -> [B,N]."""
    return np.sqrt((heard[..., None] * s * s).sum(1) / heard.sum(1)[:, None])


def heads_heard(s: np.ndarray, live: np.ndarray, v_min: float, v_max: float) -> np.ndarray:
    """[B,H]: 1 where the variance of the scores, at mean one over the live tokens, is in range; all if none is."""
    count = live.sum(1)[:, None]
    mean = np.maximum(s.sum(2) / count, _FLOOR)
    variance = (s * s).sum(2) / count / mean**2 - 1
    heard = ((variance >= v_min) & ((variance <= v_max) | (v_max <= 0))).astype(s.dtype)
    return np.where(heard.sum(1, keepdims=True) > 0, heard, 1.0)


def similar_rows(importance: np.ndarray, metric: np.ndarray, count: int, pad: np.ndarray) -> np.ndarray:
    """S-stage: the ``count`` rows of the lower half most similar to a row of the upper half.

    Args:
        importance: [B,T]. metric: [B,T,C], unit rows. pad: [B,T].

    Returns:
        int64 [B,count].
    """
    order = core.order_by(importance)
    half = -(-order.shape[1] // 2)
    upper, lower = order[:, :half], order[:, half:]
    take = lambda rows: np.take_along_axis(metric, rows[..., None], 1)  # noqa: E731
    best = (take(lower) @ np.swapaxes(take(upper), 1, 2)).max(2) + 4 * np.take_along_axis(pad, lower, 1)
    return np.take_along_axis(lower, core.order_by(best)[:, :count], 1)


class ZeroTPrune(Method):
    """See the module."""

    name = "zero_tprune"
    settings = ZeroTPruneSettings
    kind = "prune"
    needs = frozenset({"k", "probs"})
    max_share = Fraction(9, 10)

    def counts(self, settings: Settings, tokens: int, protected: int, layers: int) -> Counts:
        s = cast(ZeroTPruneSettings, settings)
        return clamp(per_layer(s.r, s, layers), tokens, protected, self)

    def plan(self, view: TokenView, count: int, settings: Settings) -> Plan:
        s, p, n = cast(ZeroTPruneSettings, settings), view.protected, view.tokens
        if view.probs is None:
            raise ValueError("Zero-TPrune reads attention probabilities")
        real, pad = 1 - view.pad.astype(float), view.pad[:, p:].astype(float)
        probs = view.probs * real[:, None, None, :]
        probs = probs / np.maximum(probs.sum(-1, keepdims=True), _FLOOR)
        boost = s.boost_cls and p > 0
        live, similar = real, s.similar(count, n - p)
        if similar:
            first = self._importance(probs, start_weights(n, boost=boost), 1, live, s)[:, p:] - pad
            gone = similar_rows(first, core.unit(view.k.mean(1))[:, p:], similar, pad) + p
            live = live.copy()
            np.put_along_axis(live, gone, 0.0, 1)
        else:
            gone = np.zeros((len(real), 0), np.int64)
        start = start_weights(n - similar, boost=boost)
        start = np.concatenate([start, np.full(similar, start[-1])])
        score = self._importance(probs, start, s.steps(view.layer, view.layers), live, s)
        np.put_along_axis(score, gone, -2.0, 1)
        order = core.order_by(score[:, p:] - pad)
        kept = np.sort(order[:, : n - p - count], axis=1) + p
        lead = np.broadcast_to(np.arange(p), (len(order), p))
        removed = np.sort(order[:, n - p - count :], axis=1) + p
        return Plan(self.kind, n, p, np.concatenate([lead, kept], 1), removed, removed[:, :0])

    def _importance(
        self, probs: np.ndarray, start: np.ndarray, steps: int, live: np.ndarray, s: ZeroTPruneSettings
    ) -> np.ndarray:
        votes = vote(probs, start, steps, live)
        return over_heads(votes, heads_heard(votes, live, s.v_min, s.v_max))

    def emit(self, b: Builder, site: Site, count: int, settings: Settings) -> Emitted:
        s, p, n = cast(ZeroTPruneSettings, settings), site.protected, site.tokens
        boost, similar = s.boost_cls and p > 0, s.similar(count, n - p)
        pad = site.pad(b)
        real = None if pad is None else b.op("Sub", [b.const(1.0), pad], dims(pad))
        pad_free = None if pad is None else b.slice(pad, 1, p, n)
        live, gone = real, None
        if similar:
            first = _emit_importance(b, site, start_weights(n, boost=boost), 1, live, n, s)
            gone = _emit_similar(b, site, first, similar, pad_free)
            ones = core.emit_ones(b, n) if live is None else live
            zeros = b.cast(b.per_batch(np.zeros(similar)), FLOAT)
            live = b.op("ScatterElements", [ones, gone, zeros], [b.batch, n], axis=1)
        start = start_weights(n - similar, boost=boost)
        start = np.concatenate([start, np.full(similar, start[-1])])
        score = _emit_importance(b, site, start, s.steps(site.layer, site.layers), live, n - similar, s)
        if gone is not None:
            low = b.binary("Sub", b.cast(b.per_batch(np.zeros(similar)), FLOAT), 2.0)
            score = b.op("ScatterElements", [score, gone, low], [b.batch, n], axis=1)
        if pad is not None:
            score = b.binary("Sub", score, pad)
        _, order = b.topk(b.slice(score, 1, p, n), n - p - count)
        b.anchor_batch(order)
        kept, _ = b.topk(order, n - p - count, largest=False)
        if p:
            kept = b.concat([b.per_batch(np.arange(p)), b.binary("Add", kept, p)], 1)
        return Emitted(self.kind, n - count, kept=kept)


def _emit_importance(
    b: Builder, site: Site, start: np.ndarray, steps: int, live: ir.Value | None, count: int, s: ZeroTPruneSettings
) -> ir.Value:
    """float [B,N]. Ranking needs no square root; rows out of ``live`` come out as 0."""
    n, heads = site.tokens, site.heads
    if site.probs is None:
        raise ValueError("Zero-TPrune reads attention probabilities")
    shape: list[Dim] = [b.batch, heads, 1, n]
    mask = None if live is None else b.unsqueeze(live, 1, 2)
    weights = b.const(start[None, None, None].astype(np.float32))
    votes = b.binary("Mul", mask, weights) if mask is not None else weights
    for _ in range(steps):
        votes = b.op("MatMul", [votes, site.probs], shape)
        votes = votes if mask is None else b.binary("Mul", votes, mask)
    votes = b.op("Squeeze", [votes, b.const([2])], [b.batch, heads, n])
    square = b.binary("Mul", votes, votes)
    if s.v_min <= 0 and s.v_max <= 0:
        return b.unary("Sqrt", b.reduce("ReduceSum", square, 1))
    heard = _emit_heard(b, votes, square, live, count, s, padded=site.padded)
    total = b.reduce("ReduceSum", heard, 1)
    return b.unary("Sqrt", b.binary("Div", b.reduce("ReduceSum", b.binary("Mul", square, heard), 1), total))


def _emit_heard(
    b: Builder,
    votes: ir.Value,
    square: ir.Value,
    live: ir.Value | None,
    count: int,
    s: ZeroTPruneSettings,
    *,
    padded: bool,
) -> ir.Value:
    """float [B,H,1] of 0 and 1."""
    number: ir.Value = b.const(float(count))
    if padded and live is not None:
        number = b.unsqueeze(b.reduce("ReduceSum", live, 1, keep=True), 1)
    mean = b.binary("Max", b.binary("Div", b.reduce("ReduceSum", votes, 2, keep=True), number), _FLOOR)
    second = b.binary("Div", b.reduce("ReduceSum", square, 2, keep=True), number)
    variance = b.binary("Sub", b.binary("Div", second, b.binary("Mul", mean, mean)), 1.0)
    heard = b.cast(b.binary("GreaterOrEqual", variance, s.v_min), FLOAT)
    if s.v_max > 0:
        heard = b.binary("Mul", heard, b.cast(b.binary("LessOrEqual", variance, s.v_max), FLOAT))
    none = b.binary("Less", b.reduce("ReduceSum", heard, 1, keep=True), 0.5)
    return b.op("Where", [none, b.const(1.0), heard], dims(heard))


def _emit_similar(b: Builder, site: Site, importance: ir.Value, count: int, pad: ir.Value | None) -> ir.Value:
    """S-stage: int64 [B,count] rows of the whole stream."""
    p, n = site.protected, site.tokens
    free = b.slice(importance, 1, p, n)
    if pad is not None:
        free = b.binary("Sub", free, pad)
    _, order = b.topk(free, n - p)
    b.anchor_batch(order)
    half = -(-(n - p) // 2)
    upper, lower = b.split(order, 1, [half, n - p - half])
    metric = core.emit_unit(b, b.slice(core.emit_key_metric(b, site), 1, p, n))
    best = b.reduce("ReduceMax", b.matmul(b.rows(metric, lower), b.transpose(b.rows(metric, upper), 0, 2, 1)), 2)
    if pad is not None:
        best = b.binary("Add", best, b.binary("Mul", b.take(pad, lower), 4.0))
    _, top = b.topk(best, count)
    gone = b.take(lower, top)
    return b.binary("Add", gone, p) if p else gone


METHOD = ZeroTPrune()
