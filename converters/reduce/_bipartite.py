"""Bipartite soft matching of two groups of rows, shared by ToMe, tomesd and the hybrid half of PiToMe.

Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgetok.converters.reduce import core
from edgetok.converters.reduce._builder import INT64, Builder, dims


@dataclass(frozen=True, eq=False)
class Links:
    """The strongest links. All int64, group-local: src [B,R] of group A, rest [B,A-R] of A, dst [B,R] of B."""

    src: np.ndarray
    rest: np.ndarray
    dst: np.ndarray


def match(scores: np.ndarray, count: int, *, sort_rest: bool) -> Links:
    """Each row of A links to its best column of B; the ``count`` strongest links are taken.

    Args:
        scores: [B,A,Bn].
        count: R.
        sort_rest: give the unlinked rows by rising index, else by falling score.
    """
    best, to = scores.max(2), scores.argmax(2)
    order = core.order_by(best)
    src, rest = order[:, :count], order[:, count:]
    if sort_rest:
        rest = np.sort(rest, axis=1)
    return Links(src, rest, np.take_along_axis(to, src, 1))


@dataclass(frozen=True, eq=False)
class LinkValues:
    """The graph's side of ``Links``; ``rest`` is None when nothing is left."""

    src: ir.Value
    rest: ir.Value | None
    dst: ir.Value


def emit_match(b: Builder, scores: ir.Value, count: int, *, sort_rest: bool) -> LinkValues:
    """Write ``match``."""
    batch, rows, _ = dims(scores)
    best = b.reduce("ReduceMax", scores, 2)
    to = b.op("ArgMax", [scores], [batch, rows], INT64, axis=2, keepdims=0, select_last_index=0)
    _, order = b.topk(best, int(rows))
    b.anchor_batch(order)
    left = int(rows) - count
    if left == 0:
        return LinkValues(order, None, b.take(to, order))
    src, rest = b.split(order, 1, [count, left])
    if sort_rest:
        rest, _ = b.topk(rest, left, largest=False)
    return LinkValues(src, rest, b.take(to, src))
