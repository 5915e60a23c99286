"""tomesd: merge before a module and unmerge right after, so that resolution never changes.

Destinations are the top-left token of every sy x sx cell, all others may go; the ``r`` most similar to a destination
(by the cosine of the block's input) are averaged into it, the module runs on what is left, and every merged token gets
its destination's answer. No sizes, no proportional attention: nothing carries over to the next block.

Source: Bolya and Hoffman, CVPR workshop 2023. Departures: destinations are never random; ``ratio`` is the share kept
(decision 23), so the published ratio 0.5 is ratio 0.5 and 0.6 is 0.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import cast

import numpy as np

from edgetok.converters.graph.cost import macs
from edgetok.converters.reduce import core
from edgetok.converters.reduce._bipartite import emit_match, match
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
    clamp,
    kept_count,
    per_layer,
)
from edgetok.errors import InputError


@dataclass(frozen=True)
class TomesdSettings(Settings):
    """Args:
    ratio: share of the unprotected tokens kept inside a module, at least 1/(sx*sy).
    r: tokens merged per block instead of ``ratio``.
    sx, sy: cell size; one destination per cell.
    attn, mlp: which modules run on merged tokens.
    """

    ratio: float = 0.5
    r: tuple[int, ...] = ()
    sx: int = 2
    sy: int = 2
    attn: bool = True
    mlp: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("ratio", self.ratio, 0.0, 1.0)
        check_range("sx", self.sx, 1, 64)
        check_range("sy", self.sy, 1, 64)
        if self.sx * self.sy < 2:
            raise InputError("sx=1,sy=1 leaves no token to merge", next="give a larger cell, as sx=2,sy=2")
        if not (self.attn or self.mlp):
            raise InputError("attn=no,mlp=no leaves nothing to reduce")


def destinations(grid: tuple[int, int], sx: int, sy: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows that receive (top-left of every whole cell) and all others; a border that fills no cell gives."""
    rows, columns = np.indices(grid)
    whole = (rows < grid[0] // sy * sy) & (columns < grid[1] // sx * sx)
    corner = whole & (rows % sy == 0) & (columns % sx == 0)
    flat = corner.ravel()
    return np.flatnonzero(flat), np.flatnonzero(~flat)


class Tomesd(Method):
    """See the module."""

    name = "tomesd"
    settings = TomesdSettings
    kind = "merge"
    where = "module"
    needs = frozenset({"grid"})
    max_share = Fraction(3, 4)
    shape = "constant"

    def counts(self, settings: Settings, tokens: int, protected: int, layers: int) -> Counts:
        s, free = cast(TomesdSettings, settings), tokens - protected
        wanted = per_layer(s.r or (free - kept_count(free, s.ratio),), s, layers)
        return clamp(wanted, tokens, protected, self)

    def macs(self, settings: Settings, counts: Sequence[int], tokens: int, width: int) -> int:
        s = cast(TomesdSettings, settings)
        return sum(
            macs(tokens - count if s.attn else tokens, tokens - count if s.mlp else tokens, width) for count in counts
        )

    def tokens_in_mlp(self, settings: Settings, counts: Sequence[int], tokens: int) -> tuple[int, ...]:
        return tuple(tokens - count if cast(TomesdSettings, settings).mlp else tokens for count in counts)

    def plan(self, view: TokenView, count: int, settings: Settings) -> Plan:
        s, p = cast(TomesdSettings, settings), view.protected
        into, others = _cells(view.grid, count, s)
        metric = core.unit(view.x[:, p:])
        links = match(metric[:, others] @ np.swapaxes(metric[:, into], 1, 2), count, sort_rest=True)
        batch = len(metric)
        lead = np.broadcast_to(np.arange(p), (batch, p))
        dst = np.broadcast_to(into + p, (batch, len(into)))
        rest = others[links.rest] + p
        kept = np.concatenate([lead, rest, dst], 1)
        return Plan(self.kind, view.tokens, p, kept, others[links.src] + p, links.dst + p + rest.shape[1])

    def emit(self, b: Builder, site: Site, count: int, settings: Settings) -> Emitted:
        s, p, n = cast(TomesdSettings, settings), site.protected, site.tokens
        into, others = _cells(site.grid, count, s)
        metric = core.emit_unit(b, site.x)
        shape = [b.batch, len(others), dims(site.x)[2]]
        left = b.op("Gather", [metric, b.const(others + p)], shape, axis=1)
        right = b.op("Gather", [metric, b.const(into + p)], [b.batch, len(into), shape[2]], axis=1)
        links = emit_match(b, b.matmul(left, b.transpose(right, 0, 2, 1)), count, sort_rest=True)
        kept = [b.per_batch(np.arange(p))] if p else []
        source = b.lookup(others + p, links.src)
        if links.rest is not None:
            kept.append(b.lookup(others + p, links.rest))
        kept.append(b.per_batch(into + p))
        target = b.binary("Add", links.dst, p + len(others) - count)
        return Emitted(self.kind, n - count, b.concat(kept, 1), source, target)


def _cells(grid: tuple[int, int] | None, count: int, s: TomesdSettings) -> tuple[np.ndarray, np.ndarray]:
    """Destinations and the rest.

    Raises:
        InputError: no grid, or more tokens to merge than are not destinations.
    """
    if grid is None:
        raise InputError("tomesd needs a grid of tokens")
    into, others = destinations(grid, s.sx, s.sy)
    if not len(into) or count > len(others):
        raise InputError(
            f"{count} tokens to merge, but cells of {s.sy}x{s.sx} leave {len(others)}",
            next="use larger cells, or a larger ratio",
        )
    return into, others


METHOD = Tomesd()
