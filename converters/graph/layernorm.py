"""Recognise a layer normalization spelled out in elementary operators."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgetok.converters.graph.infer import Facts
from edgetok.converters.graph.match import (
    add_initializer,
    attr_int,
    consumers,
    emit,
    ints,
    is_constant,
    only_user,
    producer,
    remove_unused,
    scalar,
    split_constant,
    take_over,
)


def fuse_layernorm(model: ir.Model, facts: Facts) -> int:
    """Replace (x - mean) / sqrt(var + eps) * gamma + beta over the last axis by LayerNormalization.

    Source: Ba et al. 2016; the forms are those of the TorchScript exporter (Pow or Mul squares, Div or
    Reciprocal). Returns how many were replaced.
    """
    return sum(_fuse(model, node, facts) for node in list(model.graph) if node.op_type == "Sqrt" and node.graph)


def _fuse(model: ir.Model, root: ir.Node, facts: Facts) -> bool:
    found = _variance(root, facts)
    if found is None:
        return False
    x, diff, epsilon, width, inner = found
    normal = _division(root, diff)
    if normal is None:
        return False
    last, gamma, beta, tail = _affine(normal, width)
    if any(node not in [*inner, root, *tail] for value in [diff, root.outputs[0]] for node in consumers(value)):
        return False
    graph = model.graph
    out = last.outputs[0]
    if gamma is None:
        gamma = add_initializer(graph, f"{out.name}_ones", np.ones(width, facts.types[x].numpy()))
    inputs: list[ir.Value | None] = [x, gamma] if beta is None else [x, gamma, beta]
    attributes = [ir.AttrInt64("axis", -1), ir.AttrFloat32("epsilon", epsilon)]
    new = emit(
        graph,
        last,
        "LayerNormalization",
        inputs,
        name=last.name or f"{out.name}_layernorm",
        attributes=attributes,
        dtype=facts.types[x],
    )
    facts.shapes[new] = facts.shapes[x]
    take_over(out, new)
    remove_unused(graph, [*inner, root, *tail])
    return True


def _mean_over_last(value: ir.Value | None, facts: Facts) -> ir.Node | None:
    node = producer(value, "ReduceMean")
    if node is None or attr_int(node, "keepdims", 1) != 1:
        return None
    axes, shape = ints(node, 1), facts.shape(node.inputs[0])
    if axes is None or len(axes) != 1:
        return None
    return node if axes[0] == -1 or (shape is not None and axes[0] == len(shape) - 1) else None


def _variance(root: ir.Node, facts: Facts) -> tuple[ir.Value, ir.Value, float, int, list[ir.Node]] | None:
    """From Sqrt up to x: (x, x - mean, epsilon, width, nodes in execution order)."""
    plus = producer(root.inputs[0], "Add")
    parts = split_constant(plus) if plus is not None else None
    epsilon = scalar(parts[1]) if parts else None
    mean_square = _mean_over_last(parts[0], facts) if parts else None
    if plus is None or epsilon is None or mean_square is None:
        return None
    square = producer(mean_square.inputs[0], "Pow", "Mul")
    if square is None or square.inputs[0] is None:
        return None
    diff = square.inputs[0]
    if square.op_type == "Pow" and scalar(square.inputs[1]) != 2.0:
        return None
    if square.op_type == "Mul" and square.inputs[1] is not diff:
        return None
    minus = producer(diff, "Sub")
    mean = _mean_over_last(minus.inputs[1], facts) if minus is not None else None
    if minus is None or mean is None or minus.inputs[0] is None or mean.inputs[0] is not minus.inputs[0]:
        return None
    x = minus.inputs[0]
    shape = facts.shape(x)
    if (
        not shape
        or not isinstance(shape[-1], int)
        or facts.types.get(x) not in (ir.DataType.FLOAT, ir.DataType.FLOAT16)
    ):
        return None
    return x, diff, epsilon, shape[-1], [mean, minus, square, mean_square, plus]


def _division(root: ir.Node, diff: ir.Value) -> list[ir.Node] | None:
    """The nodes that make diff / std: Div, or Reciprocal and Mul."""
    user = only_user(root.outputs[0])
    if user is None:
        return None
    if user.op_type == "Div" and user.inputs[0] is diff and user.inputs[1] is root.outputs[0]:
        return [user]
    if user.op_type == "Reciprocal":
        times = only_user(user.outputs[0])
        if times is not None and times.op_type == "Mul" and diff in times.inputs:
            return [user, times]
    return None


def _affine(normal: list[ir.Node], width: int) -> tuple[ir.Node, ir.Value | None, ir.Value | None, list[ir.Node]]:
    """Follow an optional gamma Mul and beta Add: (last node, gamma, beta, nodes)."""
    last, nodes = normal[-1], list(normal)
    gamma = beta = None
    times = only_user(last.outputs[0])
    parts = split_constant(times) if times is not None and times.op_type == "Mul" else None
    if times is not None and parts is not None and _is_row(parts[1], width):
        last, gamma = times, parts[1]
        nodes.append(times)
        plus = only_user(last.outputs[0])
        parts = split_constant(plus) if plus is not None and plus.op_type == "Add" else None
        if plus is not None and parts is not None and _is_row(parts[1], width):
            last, beta = plus, parts[1]
            nodes.append(plus)
    return last, gamma, beta, nodes


def _is_row(value: ir.Value, width: int) -> bool:
    """True for a constant vector [width]."""
    return is_constant(value) and value.const_value is not None and tuple(value.const_value.shape) == (width,)
