"""Bring every spelling of GELU to one: the forms onnxruntime's own fusions recognise."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from edgetok.converters.graph.match import (
    add_initializer,
    emit,
    only_user,
    producer,
    remove_unused,
    scalar,
    small_constant,
    split_scalar,
    take_over,
)

NEAR = 1e-3  # exporters write sqrt(2) and sqrt(2/pi) rounded to 4 digits or to float32


def normalize_gelu(model: ir.Model) -> int:
    """Rewrite erf and tanh GELUs, and the opset-20 operator, into one node order. Returns how many changed.

    erf:  x/sqrt(2) -> Erf -> +1 -> *x -> *0.5 (onnxruntime: Gelu, and BiasGelu with the bias before it)
    tanh: x^3*0.044715 + x -> *sqrt(2/pi) -> Tanh -> +1 -> *(x*0.5) (onnxruntime: FastGelu)
    """
    count = 0
    for node in list(model.graph):
        if node.graph is None or node.domain not in ("", "ai.onnx", "com.microsoft"):
            continue
        if node.op_type == "Erf":
            count += _erf(model, node)
        elif node.op_type == "Tanh":
            count += _tanh(model, node)
        elif node.op_type == "Gelu" and node.inputs[0] is not None:
            mode = node.attributes["approximate"].as_string() if "approximate" in node.attributes else "none"
            build = _emit_tanh if mode == "tanh" else _emit_erf
            _replace(model, node, node.inputs[0], [node], build)
            count += 1
    return count


def _near(value: float | None, target: float) -> bool:
    return value is not None and abs(value - target) <= NEAR * abs(target)


def _scaled(value: ir.Value | None, factor: float) -> tuple[ir.Value, list[ir.Node]] | None:
    """x when ``value`` is x * factor (as Mul, or Div by its inverse)."""
    node = producer(value, "Mul", "Div")
    if node is None or node.inputs[0] is None:
        return None
    if node.op_type == "Div":
        return (node.inputs[0], [node]) if _near(scalar(node.inputs[1]), 1 / factor) else None
    parts = split_scalar(node)
    return (parts[0], [node]) if parts is not None and _near(parts[1], factor) else None


def _plus_one(value: ir.Value) -> ir.Node | None:
    node = only_user(value)
    parts = split_scalar(node) if node is not None and node.op_type == "Add" else None
    return node if parts is not None and parts[1] == 1.0 else None


def _half_times(value: ir.Value, x: ir.Value) -> list[ir.Node] | None:
    """The nodes that make 0.5 * x * value, in whichever order the exporter multiplied."""
    first = only_user(value)
    if first is None or first.op_type != "Mul":
        return None
    other = first.inputs[1] if first.inputs[0] is value else first.inputs[0]
    half = _scaled(other, 0.5)
    if half is not None and half[0] is x:  # value * (0.5 x)
        return [*half[1], first]
    by_half = scalar(other) == 0.5
    if not by_half and other is not x:
        return None
    second = only_user(first.outputs[0])
    if second is None or second.op_type != "Mul":
        return None
    last = second.inputs[1] if second.inputs[0] is first.outputs[0] else second.inputs[0]
    matches = last is x if by_half else scalar(last) == 0.5
    return [first, second] if matches else None


def _erf(model: ir.Model, node: ir.Node) -> bool:
    inner = _scaled(node.inputs[0], math.sqrt(0.5))
    plus = _plus_one(node.outputs[0])
    if inner is None or plus is None:
        return False
    x, before = inner
    tail = _half_times(plus.outputs[0], x)
    if tail is None or _is_canonical_erf(before[0], plus, tail, x):
        return False
    _replace(model, tail[-1], x, [*before, node, plus, *tail], _emit_erf)
    return True


def _is_canonical_erf(scale: ir.Node, plus: ir.Node, tail: list[ir.Node], x: ir.Value) -> bool:
    return (
        scale.op_type == "Div"
        and len(tail) == 2
        and x in tail[0].inputs
        and tail[0].inputs[0] is x
        and scalar(tail[1].inputs[1]) == 0.5
    )


def _tanh(model: ir.Model, node: ir.Node) -> bool:
    inner = _scaled(node.inputs[0], math.sqrt(2 / math.pi))
    plus = _plus_one(node.outputs[0])
    if inner is None or plus is None:
        return False
    cubic = _cubic(inner[0])
    tail = _half_times(plus.outputs[0], cubic[0]) if cubic is not None else None
    if cubic is None or tail is None:
        return False
    x, nodes = cubic
    if tail[0].op_type == "Mul" and split_scalar(tail[0]) is not None and nodes[0].op_type == "Pow" and len(tail) == 2:
        half_first = tail[0].inputs[0] is x
        if half_first and nodes[-1].inputs[0] is x and tail[1].inputs[0] is plus.outputs[0]:
            return False
    _replace(model, tail[-1], x, [*nodes, *inner[1], node, plus, *tail], _emit_tanh)
    return True


def _cubic(value: ir.Value) -> tuple[ir.Value, list[ir.Node]] | None:
    """x when ``value`` is x + 0.044715 x^3."""
    total = producer(value, "Add")
    if total is None:
        return None
    for index in (0, 1):
        x, term = total.inputs[1 - index], total.inputs[index]
        scaled = _scaled(term, 0.044715)
        if x is None or scaled is None:
            continue
        cube = producer(scaled[0], "Pow", "Mul")
        if cube is None:
            continue
        if cube.op_type == "Pow" and cube.inputs[0] is x and scalar(cube.inputs[1]) == 3.0:
            return x, [cube, *scaled[1], total]
        nodes = _product_of_three(cube, x)
        if nodes is not None:
            return x, [*nodes, *scaled[1], total]
    return None


def _product_of_three(node: ir.Node, x: ir.Value) -> list[ir.Node] | None:
    for index in (0, 1):
        if node.inputs[1 - index] is not x:
            continue
        square = producer(node.inputs[index], "Mul", "Pow")
        if square is None or square.inputs[0] is not x:
            continue
        if square.inputs[1] is x or (square.op_type == "Pow" and scalar(square.inputs[1]) == 2.0):
            return [square, node]
    return None


def _replace(model: ir.Model, last: ir.Node, x: ir.Value, nodes: list[ir.Node], build: object) -> None:
    out = last.outputs[0]
    new = build(model.graph, last, x, out)  # type: ignore[operator]
    take_over(out, new)
    remove_unused(model.graph, nodes)


def _number(graph: ir.Graph, name: str, value: float, kind: ir.DataType | None) -> ir.Value:
    """A scalar constant of the type computed in, shared by all GELUs of the graph."""
    kind = kind or ir.DataType.FLOAT
    name = name if kind == ir.DataType.FLOAT else f"{name}/{kind.name.lower()}"
    existing = graph.initializers.get(name)
    if existing is not None and small_constant(existing) is not None:
        return existing
    return add_initializer(graph, name, np.asarray(value, kind.numpy()))


def _emit_erf(graph: ir.Graph, before: ir.Node, x: ir.Value, out: ir.Value) -> ir.Value:
    base = before.name or out.name or "gelu"
    kind, shape = x.dtype, x.shape

    def step(op_type: str, inputs: list[ir.Value], tag: str) -> ir.Value:
        return emit(graph, before, op_type, inputs, name=f"{base}/{tag}", dtype=kind, shape=shape)

    scaled = step("Div", [x, _number(graph, "gelu/sqrt2", math.sqrt(2), kind)], "Div")
    erf = step("Erf", [scaled], "Erf")
    plus = step("Add", [erf, _number(graph, "gelu/one", 1.0, kind)], "Add")
    times = step("Mul", [x, plus], "Mul")
    return step("Mul", [times, _number(graph, "gelu/half", 0.5, kind)], "Mul_1")


def _emit_tanh(graph: ir.Graph, before: ir.Node, x: ir.Value, out: ir.Value) -> ir.Value:
    base = before.name or out.name or "gelu"
    kind, shape = x.dtype, x.shape

    def step(op_type: str, inputs: list[ir.Value], tag: str) -> ir.Value:
        return emit(graph, before, op_type, inputs, name=f"{base}/{tag}", dtype=kind, shape=shape)

    cube = step("Pow", [x, _number(graph, "gelu/three", 3.0, kind)], "Pow")
    term = step("Mul", [cube, _number(graph, "gelu/cubic", 0.044715, kind)], "Mul")
    total = step("Add", [x, term], "Add")
    inner = step("Mul", [total, _number(graph, "gelu/sqrt2pi", math.sqrt(2 / math.pi), kind)], "Mul_1")
    tanh = step("Tanh", [inner], "Tanh")
    plus = step("Add", [tanh, _number(graph, "gelu/one", 1.0, kind)], "Add_1")
    half = step("Mul", [x, _number(graph, "gelu/half", 0.5, kind)], "Mul_2")
    return step("Mul", [plus, half], "Mul_3")
