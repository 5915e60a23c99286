"""Linear layers: one spelling (MatMul, then Add), and constant factors folded into their weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgetok.converters.graph.infer import Facts
from edgetok.converters.graph.match import (
    add_initializer,
    array_of,
    attr_float,
    attr_int,
    constant,
    emit,
    is_constant,
    only_user,
    producer,
    remove_unused,
    split_constant,
    take_over,
)


def open_gemm(model: ir.Model, facts: Facts) -> int:
    """Gemm with constant weights becomes MatMul and Add; alpha, beta and transB go into the constants."""
    count = 0
    for node in list(model.graph):
        if node.op_type != "Gemm" or attr_int(node, "transA", 0) or not is_constant(node.inputs[1]):
            continue
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        shape = facts.shape(node.outputs[0])
        if bias is not None and (not is_constant(bias) or bias.shape is None or len(bias.shape) > 1):
            continue
        x, w = node.inputs[0], node.inputs[1]
        if x is None or w is None or shape is None or len(shape) != 2:
            continue
        weight = _weight(model, w, attr_float(node, "alpha", 1.0), bool(attr_int(node, "transB", 0)))
        out = node.outputs[0]
        base = node.name or out.name or "linear"
        new = emit(model.graph, node, "MatMul", [x, weight], name=f"{base}/MatMul", dtype=out.dtype, shape=out.shape)
        if bias is not None:
            beta = attr_float(node, "beta", 1.0)
            if beta != 1.0:
                bias = add_initializer(model.graph, f"{bias.name}_scaled", array_of(bias) * np.float32(beta))
            new = emit(model.graph, node, "Add", [new, bias], name=f"{base}/Add", dtype=out.dtype, shape=out.shape)
        take_over(out, new)
        remove_unused(model.graph, [node])
        count += 1
    return count


def _weight(model: ir.Model, value: ir.Value, alpha: float, transposed: bool) -> ir.Value:
    if alpha == 1.0 and not transposed:
        return value
    name = f"{value.name}_kn"
    if name in model.graph.initializers and alpha == 1.0:
        return model.graph.initializers[name]
    array = array_of(value)
    array = array.T if transposed else array
    return add_initializer(model.graph, name, np.ascontiguousarray(array * np.asarray(alpha, array.dtype)))


def fold_layer_scale(model: ir.Model) -> int:
    """Fold a constant per-channel (or scalar) factor after a linear layer into its weight and bias.

    Source: LayerScale, Touvron et al. 2021: y = gamma * (x W + b) = x (W gamma) + gamma b.
    """
    count = 0
    for node in list(model.graph):
        if node.graph is None or node.op_type != "Mul" or node.domain not in ("", "ai.onnx"):
            continue
        parts = split_constant(node)
        linear = _linear(parts[0]) if parts is not None else None
        if parts is None or linear is None or not _fits(parts[1], linear[0]):
            continue
        _scale_linear(model, linear[0], linear[1], array_of(parts[1]).reshape(-1))
        out = node.outputs[0]
        take_over(out, parts[0])
        remove_unused(model.graph, [node])
        count += 1
    return count


def _linear(value: ir.Value) -> tuple[ir.Node, ir.Node | None] | None:
    """(MatMul, bias Add or None) behind ``value`` when nothing else reads either."""
    if len(value.uses()) != 1 or value.is_graph_output():
        return None
    add = producer(value, "Add")
    parts = split_constant(add) if add is not None else None
    inner = parts[0] if parts is not None else value
    product = producer(inner, "MatMul")
    if product is None or not is_constant(product.inputs[1]) or is_constant(product.inputs[0]):
        return None
    if inner is not value and (only_user(inner) is not add):
        return None
    return product, add if parts is not None else None


def _fits(gamma: ir.Value, product: ir.Node) -> bool:
    weight = product.inputs[1]
    if weight is None or weight.const_value is None or gamma.const_value is None:
        return False
    shape = tuple(weight.const_value.shape)
    sizes = gamma.const_value.shape.numpy()
    leading_ones = all(s == 1 for s in sizes[:-1])
    if len(shape) != 2 or len(sizes) > 3 or not leading_ones or gamma.const_value.dtype != weight.const_value.dtype:
        return False
    return not sizes or sizes[-1] in (1, shape[1])


def _scale_linear(model: ir.Model, product: ir.Node, add: ir.Node | None, gamma: np.ndarray) -> None:
    """Multiply output columns of the weight, and the bias, by gamma [N] or [1]. Shared constants are copied."""
    factor = gamma.astype(np.float64)
    weight = product.inputs[1]
    if weight is None:
        return
    product.replace_input_with(1, _scaled(model, weight, factor))
    if add is not None:
        index = 1 if is_constant(add.inputs[1]) else 0
        bias = add.inputs[index]
        if bias is not None:
            add.replace_input_with(index, _scaled(model, bias, factor))


def _scaled(model: ir.Model, value: ir.Value, factor: np.ndarray) -> ir.Value:
    array = array_of(value)
    result = (array.astype(np.float64) * factor).astype(array.dtype)
    name = value.name or "scaled"
    if len(value.uses()) == 1:  # the old constant goes: keep its name for people who look for it
        old = model.graph.initializers.pop(name, None)
        if old is not None:
            tensor = ir.tensor(result, name=name)
            new = ir.Value(
                name=name, shape=ir.Shape(result.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            model.graph.register_initializer(new)
            return new
    return add_initializer(model.graph, f"{name}_scaled", result)


def fold_batchnorm(model: ir.Model) -> int:
    """Fold an inference BatchNormalization into the Conv or ConvTranspose before it.

    y = g (conv(x) + b - mean) / sqrt(var + eps) + beta; per output channel. Returns how many were folded.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type != "BatchNormalization" or attr_int(node, "training_mode", 0) or node.inputs[0] is None:
            continue
        conv = producer(node.inputs[0], "Conv", "ConvTranspose")
        if conv is None or only_user(conv.outputs[0]) is not node or not is_constant(conv.inputs[1]):
            continue
        numbers = [constant(v) for v in node.inputs[1:5]]
        old_bias = conv.inputs[2] if len(conv.inputs) > 2 else None
        if any(n is None for n in numbers) or (old_bias is not None and not is_constant(old_bias)):
            continue
        _fold_batchnorm(model, node, conv, [n.astype(np.float64) for n in numbers if n is not None], old_bias)
        count += 1
    return count


def _fold_batchnorm(
    model: ir.Model, node: ir.Node, conv: ir.Node, numbers: list[np.ndarray], old_bias: ir.Value | None
) -> None:
    gain, beta, mean, variance = numbers
    factor = gain / np.sqrt(variance + attr_float(node, "epsilon", 1e-5))
    weight_value = conv.inputs[1]
    if weight_value is None:
        return
    weight = array_of(weight_value)
    groups = attr_int(conv, "group", 1)
    if conv.op_type == "Conv":
        scaled = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
    else:  # [C_in, C_out/groups, ...]: output channels of group g belong to the g-th slice of C_in
        grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        shape = (groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))
        scaled = (grouped * factor.reshape(shape)).reshape(weight.shape)
    bias = array_of(old_bias).astype(np.float64) if old_bias is not None else np.zeros_like(mean)
    new_bias = (bias - mean) * factor + beta
    base = conv.name or conv.outputs[0].name
    conv.replace_input_with(1, add_initializer(model.graph, f"{weight_value.name}_bn", scaled.astype(weight.dtype)))
    conv.resize_inputs(3)
    bias_name = f"{old_bias.name}_bn" if old_bias is not None else f"{base}_bias"
    conv.replace_input_with(2, add_initializer(model.graph, bias_name, new_bias.astype(weight.dtype)))
    take_over(node.outputs[0], conv.outputs[0])
    remove_unused(model.graph, [node])


def columns(model: ir.Model, value: ir.Value, cols: np.ndarray, name: str) -> ir.Value | None:
    """A linear layer that computes only the output columns ``cols`` of the one behind ``value``.

    Args:
        value: [B,N,C], MatMul with constant weight [K,C], with or without an Add of a constant bias [C].
        cols: [M] indices into C.
        name: of the new nodes.

    Returns:
        [B,N,M], or None when ``value`` is not such a layer.
    """
    add = producer(value, "Add")
    parts = split_constant(add) if add is not None else None
    product = producer(parts[0] if parts is not None else value, "MatMul")
    node = value.producer()
    if product is None or node is None or not is_constant(product.inputs[1]) or product.inputs[0] is None:
        return None
    weight = array_of(product.inputs[1]) if product.inputs[1] is not None else None
    bias = array_of(parts[1]) if parts is not None else None
    if weight is None or weight.ndim != 2 or (bias is not None and bias.shape != (weight.shape[1],)):
        return None
    graph = model.graph
    part = add_initializer(graph, f"{name}/weight", weight[:, cols])
    anchor = _following(graph, node)
    out = emit(graph, anchor, "MatMul", [product.inputs[0], part], name=f"{name}/MatMul", dtype=value.dtype)
    if bias is None:
        return out
    bias_value = add_initializer(graph, f"{name}/bias", bias[cols])
    return emit(graph, anchor, "Add", [out, bias_value], name=f"{name}/Add", dtype=value.dtype)


def _following(graph: ir.Graph, node: ir.Node) -> ir.Node:
    """The node after ``node`` in the graph's order."""
    nodes = iter(graph)
    for other in nodes:
        if other is node:
            break
    return next(nodes)
