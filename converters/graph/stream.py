"""The residual stream around an attention: where a block begins, where a reduction goes, where it ends."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from edgetok.converters.graph.norms import norm_after, norm_source
from edgetok.converters.graph.walk import PASS, SKIP_NORMS, VIEWS, Reader


@dataclass
class Stream:
    """See the fields of the same names in `Block`; context is the last value before the output projection."""

    context: ir.Value
    x_in: ir.Value
    x_attn: ir.Value
    x_out: ir.Value | None
    norm: str
    marks: tuple[str, ...] = ()


def follow_stream(reader: Reader, attended: ir.Value, source: ir.Value) -> Stream | str:
    """Go down from the attention's output to the residual addition and past the MLP.

    Args:
        reader: the graph.
        attended: output of probs x v, or of a fused attention node.
        source: what the projections of q, k, v read.

    Returns:
        The stream, or a word saying why there is none: "no-projection", "no-residual".
    """
    current, context, marks = attended, None, []
    for _ in range(40):
        node, following, kind = _down(reader, current, source)
        if node is None or following is None:
            return "no-projection" if context is None else "no-residual"
        if kind == "linear" and context is None:
            context = reader.strip(current) if node.op_type != "Gemm" else _unflattened(reader, current)
        if kind == "parallel" or kind == "gated":
            marks.append(kind)
        if kind == "residual":
            if context is None:
                return "no-projection"
            return _close(reader, node, current, context, source, tuple(marks))
        current = following
    return "no-residual"


def _unflattened(reader: Reader, value: ir.Value) -> ir.Value:
    """The [B,N,C] value behind the [B*N,C] one that a Gemm reads."""
    node = value.producer()
    while node is not None and (node.op_type in PASS or node.op_type in VIEWS) and node.inputs[0] is not None:
        shape = reader.shape(value)
        if shape is not None and len(shape) > 2:
            return value
        value = node.inputs[0]
        node = value.producer()
    return value


def _down(reader: Reader, value: ir.Value, source: ir.Value) -> tuple[ir.Node | None, ir.Value | None, str]:
    """One step down: the node, its output, and what kind of step it is."""
    users = reader.consumers(value)
    for node in users:
        if node.op_type in ("Add", *SKIP_NORMS):
            other = next((v for v in node.inputs[:2] if v is not None and v is not value), None)
            if other is None or reader.per_channel(other, value):
                continue
            if reader.reaches(source, other) or reader.strip(other) is source:
                return node, node.outputs[0], "residual"
    for node in users:
        if reader.weight_product(node) is not None:
            return node, node.outputs[0], "linear"
        if node.op_type in PASS or node.op_type in VIEWS or node.op_type in ("Transpose", "IsNaN"):
            return node, node.outputs[0], "view"
    for node in users:
        if node.op_type in ("Add", "Mul", "Div", "Sub", "Where", "BiasAdd"):
            others = [v for v in node.inputs if v is not None and v is not value]
            if all(reader.per_channel(v, value) for v in others):
                return node, node.outputs[0], "channel"
    after = norm_after(reader, value)
    if after is not None:
        return after.producer(), after, "norm"
    for node in users:
        if node.op_type in ("Add", "Mul") and reader.shape(node.outputs[0]) == reader.shape(value):
            return node, node.outputs[0], "parallel" if node.op_type == "Add" else "gated"
    return None, None, ""


def _close(
    reader: Reader, node: ir.Node, arriving: ir.Value, context: ir.Value, source: ir.Value, marks: tuple[str, ...]
) -> Stream | str:
    """Fill the record once the residual addition is known."""
    x_in = next(v for v in node.inputs[:2] if v is not None and v is not arriving)
    origin = norm_source(reader, source)
    post = reader.strip(x_in) is source or source is x_in
    if origin is not None and reader.strip(origin) is reader.strip(x_in):
        post = False
    if reader.shape(reader.strip(x_in)) == reader.shape(x_in):
        x_in = reader.strip(x_in)  # the stream itself, not this block's copy in another number format
    if post and _leaving(reader, node.outputs[0], post=False) is not None:
        post = False  # pre-LN whose first norm is left out: the second residual reads the sum, not its normalization
    x_attn = _after_add(reader, node, post)
    if x_attn is None:
        return "no-residual"
    return Stream(context, x_in, x_attn, _leaving(reader, x_attn, post), "post" if post else "pre", marks)


def _after_add(reader: Reader, node: ir.Node, post: bool) -> ir.Value | None:
    """The value a block hands on after a residual addition: the sum, or its normalization (post-LN).

    None when a fused node adds and normalizes without handing out the sum that a pre-LN block needs.
    """
    if node.op_type in SKIP_NORMS:
        kept = len(node.outputs) > 3 and bool(node.outputs[3].uses() or node.outputs[3].is_graph_output())
        return node.outputs[0] if post else node.outputs[3] if kept else None
    total = node.outputs[0]
    if not post:
        return total
    return norm_after(reader, total) or total


def _leaving(reader: Reader, x_attn: ir.Value, post: bool) -> ir.Value | None:
    """The stream after the block's second residual addition, or None."""
    for value in (x_attn, *_formats(reader, x_attn)):
        for node in reader.consumers(value):
            if node.op_type not in ("Add", *SKIP_NORMS):
                continue
            other = next((v for v in node.inputs[:2] if v is not None and v is not value), None)
            if other is None or other not in reader.trace.varies or reader.shape(other) != reader.shape(value):
                continue
            if _mlp_between(reader, other, value):
                return _after_add(reader, node, post)
    return None


def _mlp_between(reader: Reader, end: ir.Value, start: ir.Value, limit: int = 120) -> bool:
    """Whether end is computed from start token by token: no product of two activations lies between."""
    queue, seen, met = [end], {end}, False
    while queue and limit:
        current, limit = queue.pop(0), limit - 1
        if current is start:
            met = True
            continue
        node = current.producer()
        if node is None:
            continue
        if reader.activation_product(node):
            return False
        fused = node.op_type in SKIP_NORMS and current is node.outputs[0]
        sums = [v for v in node.outputs[3:4] if fused and v.uses()]
        for above in sums or node.inputs:
            if above is not None and above not in seen and above in reader.trace.varies:
                seen.add(above)
                queue.append(above)
    return met


def _formats(reader: Reader, value: ir.Value) -> list[ir.Value]:
    """Copies of a value in another number format, behind a quantize-dequantize pair for instance."""
    found, queue = [], [value]
    while queue:
        for node in reader.consumers(queue.pop()):
            if node.op_type in PASS:
                found.append(node.outputs[0])
                queue.append(node.outputs[0])
    return found
