"""Between the score product and the softmax: scales, masks, biases, guards."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from edgetok.converters.graph.walk import PASS, VIEWS, Reader, attribute_float, op_of

GUARDS = PASS | {"IsNaN", "Where", "Reshape", "Squeeze", "Unsqueeze", "Expand"}


@dataclass
class Scores:
    """How a softmax's input is made.

    Args:
        product: the q k^T node.
        scale: product of all scalars applied to the scores.
        terms: what is added, or the boolean that chooses, with whether it is additive and (boolean) whether True keeps.
        softcap: whether a tanh bounds the scores.
        head_scale: whether each head has a factor of its own (not in scale).
    """

    product: ir.Node
    scale: float = 1.0
    terms: list[tuple[ir.Value, str]] = field(default_factory=list)
    softcap: bool = False
    head_scale: bool = False


def scores_above(reader: Reader, logits: ir.Value, depth: int = 24) -> Scores | None:
    """Climb from a softmax's input to the product of queries and keys.

    Args:
        reader: the graph.
        logits: the softmax input.
        depth: how many operators may lie between.

    Returns:
        The product with scales and masks, or None when there is none (a classifier's softmax, routing, pooling).
    """
    node = logits.producer()
    if node is None or depth == 0:
        return None
    if reader.activation_product(node):
        return Scores(node, attribute_float(node, "alpha", 1.0) if node.op_type == "FusedMatMul" else 1.0)
    op, first = node.op_type, node.inputs[0] if node.inputs else None
    if first is None:
        return None
    if op in PASS or op in VIEWS or op in ("Max", "Min", "Clip"):
        return scores_above(reader, first, depth - 1)
    if op == "Tanh":
        found = scores_above(reader, first, depth - 1)
        if found is not None:
            found.softcap = True
        return found
    if op in ("Mul", "Div"):
        return _scaled(reader, node, depth)
    if op in ("Add", "Sub"):
        return _added(reader, node, depth)
    if op == "Where":
        return _chosen(reader, node, depth)
    return None


def _scaled(reader: Reader, node: ir.Node, depth: int) -> Scores | None:
    a, b = node.inputs[0], node.inputs[1]
    for main, other in ((a, b), (b, a)):
        number = reader.trace.scalar(other)
        if number is None or main is None or (node.op_type == "Div" and main is b):
            continue
        found = scores_above(reader, main, depth - 1)
        if found is not None:
            found.scale *= number if node.op_type == "Mul" else 1.0 / number
            for i, (value, kind) in enumerate(found.terms):
                if kind == "add":  # a bias added before the scaling is scaled too: not representable as one mask
                    found.terms[i] = (value, "scaled-add")
        return found
    for main, other in ((a, b), (b, a)):
        if main in reader.trace.varies and reader.trace.constant(other) and other is not None and main is not None:
            found = scores_above(reader, main, depth - 1)  # a learned factor for each head
            if found is not None:
                found.head_scale = True
            return found
    return None


def _added(reader: Reader, node: ir.Node, depth: int) -> Scores | None:
    a, b = node.inputs[0], node.inputs[1]
    if a is None or b is None:
        return None
    shape = reader.shape(node.outputs[0])
    for main, other in ((a, b), (b, a)):
        if main not in reader.trace.varies or (shape is not None and reader.shape(main) != shape):
            continue
        found = scores_above(reader, main, depth - 1)
        if found is not None:
            found.terms.append((other, "add" if node.op_type == "Add" else "sub"))
            return found
    return None


def _chosen(reader: Reader, node: ir.Node, depth: int) -> Scores | None:
    """Where(condition, scores, -big) or the other way round; also the guard of a not-a-number."""
    condition, yes, no = node.inputs[0], node.inputs[1], node.inputs[2]
    if condition is None or yes is None or no is None:
        return None
    if op_of(condition.producer()) in ("IsNaN", "IsInf"):
        return scores_above(reader, yes if reader.trace.constant(no) else no, depth - 1)
    for main, fill, kind in ((yes, no, "keep"), (no, yes, "hide")):
        if main in reader.trace.varies and reader.trace.constant(fill):
            found = scores_above(reader, main, depth - 1)
            if found is not None:
                found.terms.append((condition, kind))
            return found
    return None


def value_product(reader: Reader, probs: ir.Value) -> ir.Node | None:
    """The product of the softmax's output with the values, through casts, guards and views; None when there is none."""
    frontier, seen = [probs], {probs}
    for _ in range(16):
        if not frontier:
            return None
        current = frontier.pop(0)
        for node in reader.consumers(current):
            if reader.activation_product(node) and node.inputs[0] is current:
                return node
            if node.op_type in GUARDS and node.outputs[0] not in seen:
                seen.add(node.outputs[0])
                frontier.append(node.outputs[0])
            elif node.op_type == "Mul" and any(reader.trace.scalar(v) is not None for v in node.inputs):
                frontier.append(node.outputs[0])
    return None


def reaches_product(reader: Reader, probs: ir.Value) -> bool:
    """Whether the softmax's output enters any matrix product, as a place that looks like attention."""
    return value_product(reader, probs) is not None
