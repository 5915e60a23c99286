"""Recognise a normalization over the channel axis, whether it is one operator or a dozen."""

from __future__ import annotations

import onnx_ir as ir

from edgetok.converters.graph.walk import NORMS, PASS, SKIP_NORMS, Reader, op_of

_ROOT = {"Sqrt", "Reciprocal", "Cast", "Identity", "Pow", "Add", "Div", "Mul", "ReduceMean", "ReduceSum",
         "ReduceSumSquare", "ReduceL2", "Sub", "Max", "Clip", "Abs"}  # fmt: skip
_STEP = {"ReduceMean", "Sub", "Pow", "Mul", "Add", "Sqrt", "Div", "Cast", "Reciprocal", "Identity", "ReduceSum",
         "QuantizeLinear", "DequantizeLinear"}  # fmt: skip


def norm_source(reader: Reader, value: ir.Value) -> ir.Value | None:
    """The value a normalization reads, given its output.

    Handles LayerNormalization, RMSNormalization, onnxruntime's fused forms (for SkipLayerNormalization the sum, when
    the graph keeps it) and the decomposed forms (mean, difference, square, mean, root, quotient; with or without mean).

    Args:
        reader: the graph.
        value: [.., C], maybe the output of a normalization.

    Returns:
        The normalized tensor's origin [.., C], or None when value is not a normalization's output.
    """
    current = value
    for _ in range(8):
        node = current.producer()
        op = op_of(node)
        if node is None:
            return None
        if op in NORMS:
            return node.inputs[0]
        if op in SKIP_NORMS:
            kept = len(node.outputs) > 3 and current is node.outputs[0] and bool(node.outputs[3].uses())
            return node.outputs[3] if kept else None
        if op in PASS:
            following = node.inputs[0]
        elif op in ("Add", "Mul", "Div", "Sub"):
            following, done = _elementwise_source(reader, node)
            if done:
                return following
        else:
            return None
        if following is None:
            return None
        current = following
    return None


def _elementwise_source(reader: Reader, node: ir.Node) -> tuple[ir.Value | None, bool]:
    """One step up through the tail of a decomposed norm; True when its source has been reached."""
    a, b = node.inputs[0], node.inputs[1]
    if a is None or b is None:
        return None, True
    if reader.trace.constant(b):
        return a, False
    if reader.trace.constant(a):
        return b, False
    for full, column in ((a, b), (b, a)):
        shape, whole = reader.shape(column), reader.shape(full)
        if not shape or not whole or shape[-1] != 1 or len(shape) != len(whole) or whole[-1] == 1:
            continue
        if node.op_type in ("Div", "Mul"):
            return _normalized(reader, full, column), True
    return None, True


def _normalized(reader: Reader, full: ir.Value, root: ir.Value) -> ir.Value | None:
    """Source of full / root when root is computed from it: full itself (RMS) or what its mean was taken from."""
    source = reader.strip(full)
    node = source.producer()
    if op_of(node) == "Sub" and node is not None and node.inputs[0] is not None and node.inputs[1] is not None:
        mean = node.inputs[1].producer()
        if op_of(mean) == "ReduceMean" and mean is not None and mean.inputs[0] is not None:
            return reader.strip(mean.inputs[0])
    queue, limit = [root], 12
    while queue and limit:
        limit -= 1
        current = queue.pop(0)
        if current is full or reader.strip(current) is source:
            return source
        above = current.producer()
        if above is not None and above.op_type in _ROOT:
            queue.extend(v for v in above.inputs if v is not None and not reader.trace.constant(v))
    return None


def norm_after(reader: Reader, value: ir.Value) -> ir.Value | None:
    """The output of the normalization that reads a value, or None when there is none.

    With several, the first in graph order.
    """
    for node in reader.consumers(value):
        if node.op_type in NORMS:
            return node.outputs[0]
    origin, shape = reader.strip(value), reader.shape(value)
    frontier, seen, best = [value], {value}, None
    for _ in range(40):
        if not frontier:
            break
        current = frontier.pop(0)
        for node in reader.consumers(current):
            if node.op_type not in _STEP:
                continue
            result = node.outputs[0]
            if result in seen:
                continue
            seen.add(result)
            if reader.shape(result) == shape and node.op_type in ("Mul", "Div", "Add"):
                source = norm_source(reader, result)
                if source is not None and reader.strip(source) is origin:
                    best = result
                elif best is not None:
                    continue  # beyond the norm
            frontier.append(result)
    return best
