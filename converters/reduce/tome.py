"""ToMe: bipartite soft matching on keys, size-weighted merging.

After a block's attention residual, rows are split by parity (even rows A, odd rows B); each unprotected A row links to
the most similar unprotected B row by the cosine of its head-mean key, and the ``r`` strongest links merge. Output rows
are [protected, unlinked A, B].

Source: Bolya et al., ICLR 2023. Departure: any number of protected leading rows (the paper knows CLS and distillation),
and padding rows merge among themselves first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np

from edgetok.converters.reduce import core
from edgetok.converters.reduce._bipartite import emit_match, match
from edgetok.converters.reduce._builder import Builder
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


@dataclass(frozen=True)
class ToMeSettings(Settings):
    """Args:
    r: tokens merged per layer: one number for all layers, or one per block (13, or 0/0/4/8/14).
    inflection: -1 falling to +1 rising over the layers, around a single ``r``.
    prop_attn: a merged token counts as its size in later attention (off for MAE models without fine-tuning).
    """

    r: tuple[int, ...] = (13,)
    inflection: float = 0.0
    prop_attn: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("inflection", self.inflection, -1.0, 1.0)
        if not self.r or min(self.r) < 0:
            raise InputError("r: give counts of zero or more, as 13 or 0/0/4/8")
        if self.inflection and len(self.r) > 1:
            raise InputError("inflection bends a single r; with one r per layer leave it out")


def inflected(r: int, inflection: float, layers: int) -> list[int]:
    """``int(lo + (hi-lo)/(L-1)*i)`` with lo = int(r(1-inflection)), hi = 2r-lo; truncation loses tokens."""
    low = int(r * (1 - inflection))
    step = (2 * r - low - low) / (layers - 1) if layers > 1 else 0
    return [int(low + step * i) for i in range(layers)]


def parity(tokens: int, protected: int) -> tuple[range, range]:
    """The unprotected even rows (A) and odd rows (B)."""
    return range(protected + protected % 2, tokens, 2), range(protected + (protected + 1) % 2, tokens, 2)


class ToMe(Method):
    """See the module."""

    name = "tome"
    settings = ToMeSettings
    kind = "merge"
    needs = frozenset({"k"})

    def limit(self, tokens: int, protected: int) -> int:
        a, b = parity(tokens, protected)
        return min(len(a), (tokens - protected) // 2) if len(b) else 0

    def counts(self, settings: Settings, tokens: int, protected: int, layers: int) -> Counts:
        s = cast(ToMeSettings, settings)
        if s.inflection:
            wanted = [r if s.allowed(i) else 0 for i, r in enumerate(inflected(s.r[0], s.inflection, layers))]
        else:
            wanted = per_layer(s.r, s, layers)
        return clamp(wanted, tokens, protected, self)

    def plan(self, view: TokenView, count: int, settings: Settings) -> Plan:
        a, b = parity(view.tokens, view.protected)
        metric = core.unit(view.k.mean(1))
        scores = metric[:, a] @ np.swapaxes(metric[:, b], 1, 2)
        scores = scores + core.pad_penalty(view.pad[:, a], view.pad[:, b])
        links = match(scores, count, sort_rest=view.protected > 0)
        batch = len(scores)
        lead = np.broadcast_to(np.arange(view.protected), (batch, view.protected))
        rest = links.rest * 2 + a.start
        kept = np.concatenate([lead, rest, np.broadcast_to(np.array(b), (batch, len(b)))], 1)
        return Plan(
            self.kind, view.tokens, view.protected, kept, links.src * 2 + a.start,
            links.dst + view.protected + len(a) - count,
        )  # fmt: skip

    def emit(self, b: Builder, site: Site, count: int, settings: Settings) -> Emitted:
        rows_a, rows_b = parity(site.tokens, site.protected)
        metric = core.emit_unit(b, core.emit_key_metric(b, site))
        left = b.slice(metric, 1, rows_a.start, site.tokens, 2)
        right = b.slice(metric, 1, rows_b.start, site.tokens, 2)
        scores = b.matmul(left, b.transpose(right, 0, 2, 1))
        pad = site.pad(b)
        if pad is not None:
            pad_a = b.slice(pad, 1, rows_a.start, site.tokens, 2)
            pad_b = b.slice(pad, 1, rows_b.start, site.tokens, 2)
            scores = b.binary("Add", scores, core.emit_pad_penalty(b, pad_a, pad_b))
        links = emit_match(b, scores, count, sort_rest=site.protected > 0)
        kept = [b.per_batch(np.arange(site.protected))] if site.protected else []
        if links.rest is not None:
            kept.append(b.lookup(np.array(rows_a), links.rest))
        kept.append(b.per_batch(np.array(rows_b)))
        source = b.lookup(np.array(rows_a), links.src)
        target = b.binary("Add", links.dst, site.protected + len(rows_a) - count)
        return Emitted(self.kind, site.tokens - count, b.concat(kept, 1), source, target)


METHOD = ToMe()
