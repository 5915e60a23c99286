"""How the token rows are laid out: protected leading rows, patch grid, and which family of models this looks like."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from edgetok.converters.graph.blocks import Block
from edgetok.converters.graph.norms import norm_source
from edgetok.converters.graph.walk import PASS, Reader, attribute_int

ELEMENTWISE = {"Add", "Mul", "Sub", "Div", "Where", "Erf", "Gelu", "Tanh", "Sigmoid", "Relu"}


def leading_rows(reader: Reader, stream: ir.Value) -> int:
    """Count the rows at the start of a token stream that are learned and not cut from the input.

    Class, distillation and register tokens are weights, expanded to the batch and put before the patches by a Concat on
    axis 1; position tables are added to all rows and do not matter.

    Args:
        reader: the graph.
        stream: [B,N,D] entering the first block.

    Returns:
        The count; 0 when there are none or the rows cannot be told apart.
    """
    rows = _rows(reader, stream, 60)
    if rows is None or all(rows) or not any(rows):
        return 0
    return rows.index(True)


def _rows(reader: Reader, value: ir.Value, depth: int) -> list[bool] | None:
    """For each row of axis 1 whether it depends on the input; None when unknown."""
    shape = reader.shape(value)
    if shape is None or len(shape) != 3 or depth == 0:
        return None
    if value not in reader.trace.varies:
        return [False] * shape[1]
    node = value.producer()
    every = [True] * shape[1]
    if node is None:
        return every
    if node.op_type == "Concat" and attribute_int(node, "axis", 0) in (1, -2):
        return _joined(reader, node, depth)
    if node.op_type == "Slice":
        return _sliced(reader, node, shape, depth) or every
    if node.op_type in PASS and node.inputs[0] is not None:
        return _rows(reader, node.inputs[0], depth - 1)
    source = norm_source(reader, value)
    if source is not None:
        return _rows(reader, source, depth - 1)
    if node.op_type in ELEMENTWISE:
        parts = [_rows(reader, v, depth - 1) for v in node.inputs if v is not None and v in reader.trace.varies]
        known = [p for p in parts if p is not None and len(p) == shape[1]]
        return [any(column) for column in zip(*known)] if known else every
    if node.op_type in ("Split", "SplitToSequence"):
        return every
    return every


def _joined(reader: Reader, node: ir.Node, depth: int) -> list[bool] | None:
    result: list[bool] = []
    for value in node.inputs:
        if value is None:
            continue
        part = _rows(reader, value, depth - 1)
        if part is None:
            return None
        result += part
    return result


def _sliced(reader: Reader, node: ir.Node, shape: Sequence[int], depth: int) -> list[bool] | None:
    source = node.inputs[0]
    whole = None if source is None else _rows(reader, source, depth - 1)
    if whole is None or len(whole) == shape[1] or len(node.inputs) < 3:
        return whole
    start = reader.trace.data.get(node.inputs[1]) if node.inputs[1] is not None else None
    first = int(start.reshape(-1)[0]) % len(whole) if start is not None and start.size == 1 else 0
    return whole[first : first + shape[1]]


def patch_grid(reader: Reader, stream: ir.Value, tokens: int | None, leading: int) -> tuple[int, int] | None:
    """Rows and columns of the patches: the spatial size of the convolution that cut them.

    Args:
        reader: the graph.
        stream: [B,N,D] entering the first block.
        tokens: N.
        leading: rows before the patches.

    Returns:
        (rows, columns) with rows * columns = N - leading, or None.
    """
    for node in _ancestors(reader, stream, 120):
        shape = reader.shape(node.outputs[0])
        if node.op_type in ("Conv", "FusedConv", "QLinearConv") and shape is not None and len(shape) == 4:
            rows, columns = shape[2], shape[3]
            if tokens is not None and rows * columns == tokens - leading:
                return rows, columns
    return None


def _ancestors(reader: Reader, value: ir.Value, limit: int) -> list[ir.Node]:
    """Nodes above a value whose results depend on the input, nearest first."""
    found: list[ir.Node] = []
    queue, seen = [value], {value}
    while queue and len(found) < limit:
        node = queue.pop(0).producer()
        if node is None:
            continue
        found.append(node)
        for above in node.inputs:
            if above is not None and above not in seen and above in reader.trace.varies:
                seen.add(above)
                queue.append(above)
    return found


def family_of(reader: Reader, blocks: Sequence[Block]) -> str:
    """A word for reports, from the stem, the norm placement and the hazards."""
    stem = _ancestors(reader, blocks[0].x_in, 200)
    ops = {node.op_type for node in stem}
    hazards = {hazard for block in blocks for hazard in block.hazards}
    ranks = {len(reader.shape(n.outputs[0]) or ()) for n in stem if n.op_type in ("Conv", "FusedConv")}
    if "rope" in hazards and "causal" in hazards:
        return "decoder"
    if 4 in ranks:
        return "vit"
    if 3 in ranks:
        return "audio"
    if "Gather" in ops or "EmbedLayerNormalization" in ops or "GatherBlockQuantized" in ops:
        if "causal" in hazards:
            return "causal-text"
        if "relative-bias" in hazards and blocks[0].norm == "pre":
            return "t5"
        return "bert"
    return "unknown"
