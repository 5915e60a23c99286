"""Move flattening of tokens ([B,N,C] -> [B*N,C]) behind the layers that do not care, where it meets its inverse."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgetok.converters.graph.infer import Facts
from edgetok.converters.graph.match import add_initializer, attr_ints, emit, is_constant, producer, unique_name

POINTWISE = {
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "Erf",
    "Tanh",
    "Sigmoid",
    "Relu",
    "Gelu",
    "MatMul",
    "LayerNormalization",
}
SWAP = [1, 0, 2]


def sink_flatten(model: ir.Model, facts: Facts) -> int:
    """Apply linear, element-wise and norm layers to [B,N,C] instead of to its flattened rows, or to [N,B,C].

    onnxruntime's own optimizer and some exporters write a linear layer as Reshape, Gemm, Reshape, which loses the
    token axis in between; torch's MultiheadAttention works on [N,B,C]. Returns how many layers were moved.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type in POINTWISE and node.domain in ("", "ai.onnx", "com.microsoft") and len(node.outputs) == 1:
            count += _sink(model, node, facts)
    return count


def _sink(model: ir.Model, node: ir.Node, facts: Facts) -> bool:
    views = [producer(v, "Reshape", "Transpose") for v in node.inputs if v is not None and not is_constant(v)]
    out = node.outputs[0]
    shape = facts.shape(out)
    if not shape or not isinstance(shape[-1], int) or out.is_graph_output() or not views:
        return False
    if any(view is None or not _same_view(view, views[0], facts) for view in views):
        return False
    for index, value in enumerate(node.inputs):
        if value is not None and is_constant(value) and value.const_value is not None:
            rows = len(value.const_value.shape) <= 1 or (node.op_type == "MatMul" and index == 1)
            if not rows:
                return False
    sources = {view: _source(model, view, facts) for view in views if view is not None}
    if any(source is None for source in sources.values()):
        return False
    for index, value in enumerate(node.inputs):
        view = value.producer() if value is not None and not is_constant(value) else None
        if view in sources:
            node.replace_input_with(index, sources[view])
    _repeat(model, node, views[0], facts)
    return True


def _same_view(view: ir.Node | None, first: ir.Node | None, facts: Facts) -> bool:
    """Two views that do the same to inputs of the same shape."""
    if view is None or first is None or view.op_type != first.op_type or _perm(view) != _perm(first):
        return False
    if facts.shape(view.inputs[0]) != facts.shape(first.inputs[0]):
        return False
    return facts.shape(view.outputs[0]) == facts.shape(first.outputs[0])


def _perm(view: ir.Node) -> list[int] | None:
    return attr_ints(view, "perm") if view.op_type == "Transpose" else None


def _source(model: ir.Model, view: ir.Node | None, facts: Facts) -> ir.Value | None:
    """The token-wise [B,N,C] value a view starts from, when it leaves the last axis alone."""
    value = view.inputs[0] if view is not None else None
    shape = facts.shape(value)
    if view is None or value is None or shape is None:
        return None
    if view.op_type == "Transpose":
        return value if _perm(view) == SWAP else None
    flat = facts.shape(view.outputs[0])
    if flat is None or len(flat) != 2:
        return None
    if len(shape) == 3 and shape[2] == flat[1]:
        return value if any(isinstance(size, int) and size > 1 for size in shape[:2]) else None
    if len(shape) == 4 and isinstance(shape[2], int) and isinstance(shape[3], int) and shape[2] * shape[3] == flat[1]:
        name = f"{view.name or view.outputs[0].name}/join"
        target = add_initializer(model.graph, f"{name}/shape", np.asarray([0, 0, flat[1]], np.int64))
        joined = emit(model.graph, view, "Reshape", [value, target], name=name, dtype=value.dtype)
        facts.shapes[joined] = (shape[0], shape[1], flat[1])
        return joined
    return None


def _repeat(model: ir.Model, node: ir.Node, view: ir.Node | None, facts: Facts) -> None:
    """Put the view behind the node, for everyone who read the node."""
    out, following = node.outputs[0], _next(model.graph, node)
    flat = facts.shape(out)
    source = facts.shape(
        node.inputs[0] if node.inputs[0] is not None and not is_constant(node.inputs[0]) else node.inputs[1]
    )
    if view is None or flat is None or source is None:
        return
    name = node.name or out.name or node.op_type
    if view.op_type == "Transpose":
        made = ir.Node("", "Transpose", [out], attributes=[ir.AttrInt64s("perm", SWAP)], name=f"{name}/swap")
    else:
        target = add_initializer(model.graph, f"{name}/rows/shape", np.asarray([-1, flat[-1]], np.int64))
        made = ir.Node("", "Reshape", [out, target], name=f"{name}/rows")
    made.outputs[0].name = unique_name(model.graph, f"{made.name}_output_0")
    made.outputs[0].type = out.type
    for user, index in tuple(out.uses()):
        if user is not made:
            user.replace_input_with(index, made.outputs[0])
    if following is None:
        model.graph.append(made)
    else:
        model.graph.insert_before(following, made)
    facts.shapes[made.outputs[0]] = flat
    facts.shapes[out] = (*source[:-1], flat[-1])
    if out in facts.types:
        facts.types[made.outputs[0]] = facts.types[out]
    out.shape = None


def _next(graph: ir.Graph, node: ir.Node) -> ir.Node | None:
    nodes = iter(graph)
    for other in nodes:
        if other is node:
            return next(nodes, None)
    return None
