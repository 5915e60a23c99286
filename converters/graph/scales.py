"""Merge the scalar factors of an attention into one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgetok.converters.graph.infer import Facts
from edgetok.converters.graph.match import (
    add_initializer,
    emit,
    only_user,
    producer,
    scalar,
)

THROUGH = ("Transpose", "Reshape")


def merge_scales(model: ir.Model, facts: Facts) -> int:
    """Replace scalar factors on q, on k and on the logits by one Mul on q. Returns how many blocks changed.

    softmax((a q)(b k)^T c) = softmax((abc q) k^T). Scalars commute with Transpose and Reshape, so factors are
    looked for behind those as well.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type == "Softmax" and node.graph is not None:
            product = logits_matmul(node)
            if product is not None:
                count += _merge(model, product, facts)
    return count


def logits_matmul(softmax: ir.Node) -> ir.Node | None:
    """The q k^T MatMul above a Softmax, through scalar factors, additive masks and Casts."""
    value = softmax.inputs[0]
    for _ in range(8):
        node = value.producer() if value is not None else None
        if node is None:
            return None
        if node.op_type == "MatMul":
            return node if all(v is not None and v.const_value is None for v in node.inputs) else None
        if node.op_type not in ("Add", "Mul", "Div", "Where", "Cast", "Max"):
            return None
        value = next((v for v in node.inputs if v is not None and _leads_to_matmul(v)), None)
    return None


def _leads_to_matmul(value: ir.Value) -> bool:
    node: ir.Node | None = value.producer()
    for _ in range(8):
        if node is None:
            return False
        if node.op_type == "MatMul":
            return True
        if node.op_type not in ("Mul", "Div", "Add", "Cast"):
            return False
        before = [v.producer() for v in node.inputs if v is not None and v.const_value is None]
        node = before[0] if before else None
    return False


def _factors(value: ir.Value | None) -> tuple[list[tuple[ir.Node, float]], ir.Value | None]:
    """Scalar Mul/Div nodes met going up from ``value`` through single-use views, and where the walk ended."""
    found: list[tuple[ir.Node, float]] = []
    while value is not None:
        node = producer(value, "Mul", "Div", *THROUGH)
        if node is None or only_user(value) is None:
            break
        if node.op_type in THROUGH:
            value = node.inputs[0]
            continue
        number, source = _number(node)
        if number is None or source is None:
            break
        found.append((node, number))
        value = source
    return found, value


def _number(node: ir.Node) -> tuple[float | None, ir.Value | None]:
    a, b = node.inputs[0], node.inputs[1]
    if node.op_type == "Div":
        divisor = scalar(b)
        return (None, None) if not divisor else (1.0 / divisor, a)
    if scalar(b) is not None:
        return scalar(b), a
    return (scalar(a), b) if scalar(a) is not None else (None, None)


def _after(product: ir.Node) -> list[tuple[ir.Node, float]]:
    """Scalar Mul/Div nodes right after the logits MatMul."""
    found: list[tuple[ir.Node, float]] = []
    value = product.outputs[0]
    while True:
        node = only_user(value)
        if (
            node is None
            or node.op_type not in ("Mul", "Div")
            or (node.op_type == "Div" and node.inputs[0] is not value)
        ):
            return found
        number, _ = _number(node)
        if number is None:
            return found
        found.append((node, number))
        value = node.outputs[0]


def _snapped(total: float, product: ir.Node, facts: Facts) -> float:
    """1/sqrt(Dh) itself when the product of rounded factors is within float32 rounding of it."""
    shape = facts.shape(product.inputs[0])
    head = shape[-1] if shape else None
    exact = 1 / np.sqrt(head) if isinstance(head, int) else total
    return float(exact) if abs(total - exact) <= 1e-6 * abs(exact) else total


def _merge(model: ir.Model, product: ir.Node, facts: Facts) -> bool:
    on_q, _ = _factors(product.inputs[0])
    on_k, _ = _factors(product.inputs[1])
    after = _after(product)
    everything = [*on_q, *on_k, *after]
    direct = len(on_q) == 1 and on_q[0][0] is producer(product.inputs[0], "Mul")
    if not everything or (direct and len(everything) == 1 and scalar(on_q[0][0].inputs[1]) is not None):
        return False
    total = _snapped(float(np.prod([np.float64(number) for _, number in everything])), product, facts)
    graph = model.graph
    for node, _ in everything:
        _, source = _number(node)
        if source is None:
            return False
    for node, _ in everything:
        _, source = _number(node)
        if source is not None:
            node.outputs[0].replace_all_uses_with(source, replace_graph_outputs=False)
            graph.remove(node, safe=True)
    q = product.inputs[0]
    if q is None:
        return False
    base = product.name or product.outputs[0].name or "attention"
    factor = add_initializer(
        graph, f"{base}/scale", np.asarray(total, q.dtype.numpy() if q.dtype is not None else np.float32)
    )
    scaled = emit(graph, product, "Mul", [q, factor], name=f"{base}/scaled", dtype=q.dtype, shape=q.shape)
    product.replace_input_with(0, scaled)
    return True
