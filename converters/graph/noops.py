"""Remove nodes that change nothing, and merge chains of views."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from edgetok.converters.graph.infer import Facts, content
from edgetok.converters.graph.match import (
    attr_int,
    attr_ints,
    bypass,
    constant,
    ints,
    only_user,
    producer,
    small_constant,
)


def drop_noops(model: ir.Model, facts: Facts) -> int:
    """Bypass nodes whose output equals their first (or other variable) input. Returns how many."""
    count = 0
    for node in list(model.graph):
        if node.graph is None or node.domain not in ("", "ai.onnx") or not node.inputs:
            continue
        rule = _RULES.get(node.op_type)
        source = rule(node, facts) if rule is not None else None
        if source is not None and bypass(node, source):
            count += 1
    return count


def merge_views(model: ir.Model, facts: Facts) -> int:
    """Transpose of Transpose into one, Reshape of Reshape into the last. Returns how many nodes went."""
    count = 0
    for node in list(model.graph):
        if node.graph is None or not node.inputs or node.inputs[0] is None:
            continue
        before = producer(node.inputs[0], node.op_type) if node.op_type in ("Transpose", "Reshape") else None
        if before is None or only_user(before.outputs[0]) is not node or before.inputs[0] is None:
            continue
        if node.op_type == "Transpose":
            first, second = attr_ints(before, "perm"), attr_ints(node, "perm")
            if first is None or second is None:
                continue
            node.attributes["perm"] = ir.AttrInt64s("perm", [first[p] for p in second])
        elif not _stands_alone(node, before, facts):
            continue
        node.replace_input_with(0, before.inputs[0])
        model.graph.remove(before, safe=True)
        count += 1
    return count


def _stands_alone(node: ir.Node, before: ir.Node, facts: Facts) -> bool:
    """True when the later Reshape means the same on the earlier one's input (its copied sizes are the same)."""
    wanted = ints(node, 1)
    source, middle = facts.shape(before.inputs[0]), facts.shape(node.inputs[0])
    if wanted is None or source is None or middle is None or attr_int(node, "allowzero", 0):
        return False
    zeros = [axis for axis, size in enumerate(wanted) if size == 0]
    return all(axis < len(source) and source[axis] is not None and source[axis] == middle[axis] for axis in zeros)


def _first(node: ir.Node, facts: Facts) -> ir.Value | None:
    return node.inputs[0]


def _same_shape(node: ir.Node, facts: Facts) -> ir.Value | None:
    return node.inputs[0] if facts.same_shape(node.inputs[0], node.outputs[0]) else None


def _dropout(node: ir.Node, facts: Facts) -> ir.Value | None:
    training = node.inputs[2] if len(node.inputs) > 2 else None
    if training is None:
        return node.inputs[0]
    value = constant(training)
    return node.inputs[0] if value is not None and not bool(value.reshape(-1)[0]) else None


def _cast(node: ir.Node, facts: Facts) -> ir.Value | None:
    source = node.inputs[0]
    kind = facts.types.get(source) if source is not None else None
    return source if kind is not None and int(kind) == attr_int(node, "to", -1) else None


def _transpose(node: ir.Node, facts: Facts) -> ir.Value | None:
    perm = attr_ints(node, "perm")
    return node.inputs[0] if perm is not None and perm == list(range(len(perm))) else None


def _concat(node: ir.Node, facts: Facts) -> ir.Value | None:
    return node.inputs[0] if len(node.inputs) == 1 else None


def _slice(node: ir.Node, facts: Facts) -> ir.Value | None:
    if not facts.same_shape(node.inputs[0], node.outputs[0]):
        return None
    if len(node.inputs) < 5 or node.inputs[4] is None:
        return node.inputs[0]
    steps = ints(node, 4)
    return node.inputs[0] if steps is not None and all(s == 1 for s in steps) else None


def _neutral(number: float, *, either: bool) -> Callable[[ir.Node, Facts], ir.Value | None]:
    """x op c with a constant c, the same everywhere, that changes nothing, and no broadcasting of x."""

    def rule(node: ir.Node, facts: Facts) -> ir.Value | None:
        for index in (1, 0) if either else (1,):
            source = node.inputs[1 - index]
            array = small_constant(node.inputs[index])
            if array is None or array.dtype == object or not array.size or not bool(np.all(array == number)):
                continue
            if facts.same_shape(source, node.outputs[0]):
                return source
        return None

    return rule


def _logical(keep: bool) -> Callable[[ir.Node, Facts], ir.Value | None]:
    """And with all-true, Or with all-false constants."""

    def rule(node: ir.Node, facts: Facts) -> ir.Value | None:
        for index in (0, 1):
            array = content(facts, node.inputs[index])
            source = node.inputs[1 - index]
            if array is None or array.dtype != np.bool_ or not bool(np.all(array == keep)):
                continue
            if facts.same_shape(source, node.outputs[0]):
                return source
        return None

    return rule


def _where(node: ir.Node, facts: Facts) -> ir.Value | None:
    cond = content(facts, node.inputs[0])
    if cond is None or cond.dtype != np.bool_ or not cond.size or cond.min() != cond.max():
        return None
    source = node.inputs[1] if bool(cond.reshape(-1)[0]) else node.inputs[2]
    return source if facts.same_shape(source, node.outputs[0]) else None


def _pad(node: ir.Node, facts: Facts) -> ir.Value | None:
    pads = ints(node, 1)
    return node.inputs[0] if pads is not None and not any(pads) else None


_RULES: dict[str, Callable[[ir.Node, Facts], ir.Value | None]] = {
    "Identity": _first,
    "Dropout": _dropout,
    "Cast": _cast,
    "Reshape": _same_shape,
    "Expand": _same_shape,
    "Tile": _same_shape,
    "Squeeze": _same_shape,
    "Unsqueeze": _same_shape,
    "Flatten": _same_shape,
    "Transpose": _transpose,
    "Concat": _concat,
    "Slice": _slice,
    "Pad": _pad,
    "Add": _neutral(0.0, either=True),
    "Sub": _neutral(0.0, either=False),
    "Mul": _neutral(1.0, either=True),
    "Div": _neutral(1.0, either=False),
    "Pow": _neutral(1.0, either=False),
    "And": _logical(True),
    "Or": _logical(False),
    "Where": _where,
}
