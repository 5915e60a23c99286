"""Reduce in spite of a hazard: whatever is laid out by source place follows the tokens that are kept.

A causal mask, a rotary table, a bias for each pair of places has one row (and one column) per source token. Behind a
reduction each token stands at the place of its kept source row, so every such operand T of the blocks becomes
T'[.., i, ..] = T[.., kept[i], ..] along each axis as long as the source. What a merged token should see is not
defined by any paper: that is why these graphs are refused unless the user insists, and the gates judge the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from edgetok.converters.reduce._builder import INT64, Builder, dims
from edgetok.converters.reduce._tail import Stream
from edgetok.errors import UnsupportedError

_ELEMENTWISE = frozenset(["Add", "Sub", "Mul", "Div", "Where", "Max", "Min", "And", "Or"])


def follow_places(b: Builder, stream: Stream, kepts: Sequence[ir.Value | None], tokens: int) -> int:
    """Gather every operand laid out by source place, for each reduced segment; returns how many were.

    Args:
        kepts: per segment, int64 [B,N'] source rows behind the rows; entry 0 is unused.
        tokens: N of the source.

    Raises:
        UnsupportedError: a segment's rows have no single source row (soft assignments).
    """
    made = set(b.nodes)
    done: dict[tuple[ir.Value, int], ir.Value] = {}
    for node in [n for n in b.graph if n in stream.inside and n.op_type in _ELEMENTWISE]:
        segment = stream.segments.get(node.outputs[0], 0)
        if not segment:
            continue
        for index, value in enumerate(node.inputs):
            if value is None or stream.segments.get(value, 0) or value.producer() in made:
                continue
            axes = _place_axes(value, tokens)
            if not axes:
                continue
            kept = kepts[segment]
            if kept is None:
                raise UnsupportedError(
                    "rows of this method stand at no single place", where=node.name, next="use tome or pitome"
                )
            if (value, segment) not in done:
                done[value, segment] = _gathered(b, value, axes, kept)
            node.replace_input_with(index, done[value, segment])
    return len(done)


def _place_axes(value: ir.Value, tokens: int) -> list[int]:
    """Axes as long as the source: of [B,H,N,N] the last two, of [B,N,1,D] the second; a width only if nothing else."""
    if value.shape is None:
        return []
    shape = dims(value)
    if len(shape) < 2:
        return []
    axes = [i for i, d in enumerate(shape) if d == tokens]
    square = axes[-2:] == [len(shape) - 2, len(shape) - 1]
    return axes[-2:] if square else [a for a in axes if a < len(shape) - 1 or len(axes) == 1][:1]


def _gathered(b: Builder, value: ir.Value, axes: Sequence[int], kept: ir.Value) -> ir.Value:
    """T[.., kept, ..] along the axes, one batch row at a time (the kept rows differ between samples)."""
    rank, shape = len(dims(value)), dims(value)
    wide = rank if rank > 2 else 3
    if rank < wide:
        value = b.unsqueeze(value, 0)
        axes, shape = [a + 1 for a in axes], [1, *shape]
    batch = b.op("Expand", [value, _batched(b, kept, wide)], [b.batch, *shape[1:]], value.dtype or ir.DataType.FLOAT)
    for axis in axes:
        order = [0, axis, *(a for a in range(1, wide) if a != axis)]
        back = [order.index(a) for a in range(wide)]
        batch = b.transpose(b.rows(b.transpose(batch, *order), kept), *back)
    return batch


def _batched(b: Builder, kept: ir.Value, rank: int) -> ir.Value:
    """The shape [B,1,..,1] as int64 [rank], for Expand."""
    size = b.op("Shape", [kept], [1], INT64, start=0, end=1)
    return b.concat([size, b.const([1] * (rank - 1))], 0)
