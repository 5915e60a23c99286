"""Run linear layers on rows: [B,N,C] as [B*N,C], with Gemm taking the bias along.

onnxruntime adds the bias of a 3-D MatMul in a pass of its own, and turns a quantized MatMul + Add of matrices into a
float Gemm; a Gemm on rows keeps bias and product in one kernel (QGemm when both sides are quantized). The stretches
between attentions (norm, linear, GELU, residual) stay in rows, so that the Reshapes needed are few and free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgetok.converters.graph import dims
from edgetok.converters.graph.dims import Dim, Shape, Size
from edgetok.converters.graph.fold import Head, reshape_target
from edgetok.converters.graph.infer import Facts
from edgetok.converters.graph.match import (
    add_initializer,
    array_of,
    attr_int,
    consumers,
    emit,
    is_constant,
    only_user,
    producer,
    scalar,
    unique_name,
)

BINARY = {"Add", "Sub", "Mul", "Div", "Pow"}
UNARY = {"Erf", "Tanh", "Sigmoid", "Relu", "Gelu", "QuickGelu"}
QUANTIZE = {"QuantizeLinear", "DequantizeLinear"}
INT32_LIMIT = float(2**30)


@dataclass(frozen=True)
class _Linear:
    """A MatMul on the token stream and the Add of its bias (None without one)."""

    product: ir.Node
    add: ir.Node | None
    bias: ir.Value | None
    quantized: bool


def to_rows(model: ir.Model, facts: Facts) -> int:
    """Rewrite, in place, every stretch of token-wise layers that holds a linear layer. Returns how many linears."""
    linears = {lin.product: lin for node in model.graph if (lin := _linear(node, facts)) is not None}
    nodes = _worthwhile([n for n in model.graph if n in linears or _pointwise(n, facts)], linears)
    if not nodes:
        return 0
    writer = _Writer(model, facts, nodes)
    absorbed = {lin.add for lin in linears.values() if lin.add is not None}
    for node in list(model.graph):
        if node in nodes and node not in absorbed:
            writer.convert(node, linears.get(node))
    return sum(lin.product in nodes for lin in linears.values())


def _stream(value: ir.Value | None, facts: Facts) -> Shape | None:
    """The shape of a token-wise value [B,N,C] when B*N rows can be put back into it, else None."""
    shape = facts.shape(value)
    if value is None or is_constant(value) or shape is None or len(shape) != 3 or shape[0] is None:
        return None
    if not isinstance(shape[2], int) or shape[1] is None or shape[1] == 1:
        return None
    return shape if isinstance(shape[0], int) or isinstance(shape[1], int) or shape[1] in facts.symbols else None


def _row_constant(value: ir.Value | None, width: object) -> bool:
    """True for a constant that is one number or one row [C], with any number of leading ones."""
    if value is None or not is_constant(value) or value.const_value is None:
        return False
    sizes = value.const_value.shape.numpy()
    return all(s == 1 for s in sizes[:-1]) and len(sizes) <= 3 and (not sizes or sizes[-1] in (1, width))


def _weight_shape(value: ir.Value | None) -> tuple[tuple[int, ...], bool] | None:
    """(shape, quantized) of a constant weight, plain or behind DequantizeLinear."""
    node = producer(value, "DequantizeLinear")
    source = node.inputs[0] if node is not None else value
    if source is None or not is_constant(source) or source.const_value is None:
        return None
    if node is not None and not all(is_constant(v) for v in node.inputs):
        return None
    return tuple(source.const_value.shape.numpy()), node is not None


def _linear(node: ir.Node, facts: Facts) -> _Linear | None:
    if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx") or _stream(node.inputs[0], facts) is None:
        return None
    weight = _weight_shape(node.inputs[1])
    if weight is None or len(weight[0]) != 2 or _stream(node.outputs[0], facts) is None:
        return None
    quantized = weight[1] and producer(node.inputs[0], "DequantizeLinear") is not None
    if weight[1] != quantized:
        return None
    add = only_user(node.outputs[0])
    if add is None or add.op_type != "Add" or _stream(add.outputs[0], facts) is None:
        return _Linear(node, None, None, quantized)
    bias = add.inputs[1] if add.inputs[0] is node.outputs[0] else add.inputs[0]
    if not _row_constant(bias, weight[0][1]) or bias is None or array_of(bias).size != weight[0][1]:
        return _Linear(node, None, None, quantized)
    if quantized and _integer_bias(node, array_of(bias)) is None:
        return None
    return _Linear(node, add, bias, quantized)


def _integer_bias(product: ir.Node, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """(int32 codes, float32 scales) of a bias at the scale of the integer product; None when they do not fit."""
    left, right = producer(product.inputs[0], "DequantizeLinear"), producer(product.inputs[1], "DequantizeLinear")
    if left is None or right is None or scalar(left.inputs[1]) is None or not is_constant(right.inputs[1]):
        return None
    weight_scale = right.inputs[1]
    if weight_scale is None or len(left.inputs) < 2:
        return None
    scale = np.float32(scalar(left.inputs[1]) or 0.0) * array_of(weight_scale).reshape(-1).astype(np.float32)
    scale = np.broadcast_to(scale, bias.reshape(-1).shape).astype(np.float32)
    if not np.all(scale > 0):
        return None
    codes = np.rint(bias.reshape(-1).astype(np.float64) / scale)
    return (codes.astype(np.int32), scale) if np.all(np.abs(codes) < INT32_LIMIT) else None


def _pointwise(node: ir.Node, facts: Facts) -> bool:
    """True for a node that treats every token alike and whose output is a token-wise value."""
    if node.domain not in ("", "ai.onnx", "com.microsoft") or not node.outputs:
        return False
    shape = _stream(node.outputs[0], facts)
    if shape is None:
        return False
    if node.op_type in UNARY:
        return _stream(node.inputs[0], facts) == shape
    if node.op_type in QUANTIZE:
        scale = node.inputs[1]
        one = scale is not None and is_constant(scale) and scalar(scale) is not None
        return _stream(node.inputs[0], facts) == shape and one
    if node.op_type == "LayerNormalization":
        same = _stream(node.inputs[0], facts) == shape and attr_int(node, "axis", -1) in (-1, 2)
        return same and all(is_constant(v) for v in node.inputs[1:]) and not any(o.uses() for o in node.outputs[1:])
    if node.op_type in BINARY:
        return all(_stream(v, facts) == shape or _row_constant(v, shape[2]) for v in node.inputs)
    return False


def _worthwhile(nodes: list[ir.Node], linears: dict[ir.Node, _Linear]) -> set[ir.Node]:
    """The nodes connected to a linear layer through nodes of the list."""
    inside = set(nodes)
    kept: set[ir.Node] = set()
    queue = [n for n in nodes if n in linears]
    while queue:
        node = queue.pop()
        if node in kept:
            continue
        kept.add(node)
        around = [v.producer() for v in node.inputs if v is not None]
        around += [user for out in node.outputs for user in consumers(out)]
        queue += [n for n in around if n is not None and n in inside and n not in kept]
    return kept


class _Writer:
    """Turns the chosen nodes to rows, and builds the Reshapes at the border of each stretch once."""

    def __init__(self, model: ir.Model, facts: Facts, nodes: set[ir.Node]) -> None:
        self.graph = model.graph
        self.head = Head(model)
        self.facts = facts
        self.nodes = nodes
        self.rows: dict[ir.Value, ir.Value] = {}
        self.flat: dict[ir.Value, ir.Value] = {}

    def convert(self, node: ir.Node, linear: _Linear | None) -> None:
        """Give a node row inputs; its last output then holds rows, and other readers get [B,N,C] back."""
        last = node
        inputs = [self._rows_of(v, node) if _stream(v, self.facts) else self._flat_constant(v) for v in node.inputs]
        if linear is not None and linear.add is not None and linear.bias is not None:
            last = linear.add
            old = last.outputs[0]
            gemm = self._gemm(linear, inputs, last)
            shape = self.facts.shape(old)
            old.replace_all_uses_with(gemm, replace_graph_outputs=True)
            self.facts.shapes[gemm] = shape or ()
            name, old.name = old.name, unique_name(self.graph, f"{old.name}_open")
            gemm.name = name
            self.graph.remove([linear.add, linear.product], safe=True)
            self._hand_back(gemm)
            return
        for index, value in enumerate(inputs):
            node.replace_input_with(index, value)
        self._hand_back(last.outputs[0])

    def _gemm(self, linear: _Linear, inputs: list[ir.Value | None], before: ir.Node) -> ir.Value:
        name = linear.product.name or linear.product.outputs[0].name or "linear"
        bias: ir.Value | None = None
        if linear.quantized:
            self._name_zero_point(producer(linear.product.inputs[1], "DequantizeLinear"), name)
        if linear.bias is not None and linear.quantized:
            found = _integer_bias(linear.product, array_of(linear.bias))
            if found is not None:
                codes = add_initializer(self.graph, f"{name}/bias_q", found[0])
                scale = add_initializer(self.graph, f"{name}/bias_scale", found[1])
                bias = emit(
                    self.graph,
                    before,
                    "DequantizeLinear",
                    [codes, scale],
                    name=f"{name}/bias_dq",
                    attributes=[ir.AttrInt64("axis", 0)],
                    dtype=ir.DataType.FLOAT,
                )
        elif linear.bias is not None:
            bias = self._flat_constant(linear.bias)
        dtype = linear.product.outputs[0].dtype
        return emit(self.graph, before, "Gemm", [inputs[0], inputs[1], bias], name=f"{name}/Gemm", dtype=dtype)

    def _name_zero_point(self, weight: ir.Node | None, name: str) -> None:
        """Spell out a weight's zero point of 0: onnxruntime makes a QGemm only of those that have one."""
        if weight is None or (len(weight.inputs) > 2 and weight.inputs[2] is not None):
            return
        codes, scale = weight.inputs[0], weight.inputs[1]
        if codes is None or scale is None or codes.dtype is None:
            return
        zeros = np.zeros(array_of(scale).shape, codes.dtype.numpy())
        weight.resize_inputs(3)
        weight.replace_input_with(2, add_initializer(self.graph, f"{name}/zero_point", zeros))

    def _flat_constant(self, value: ir.Value | None) -> ir.Value | None:
        """A row constant with leading ones as [C]; anything else as it is."""
        if value is None or not is_constant(value) or value.const_value is None:
            return value
        sizes = value.const_value.shape.numpy()
        if len(sizes) < 2 or any(s != 1 for s in sizes[:-1]):
            return value
        if value not in self.flat:
            self.flat[value] = add_initializer(self.graph, f"{value.name}/row", array_of(value).reshape(-1))
        return self.flat[value]

    def _rows_of(self, value: ir.Value | None, before: ir.Node) -> ir.Value | None:
        if value is None or value in self.rows:
            return self.rows.get(value) if value is not None else None
        shape = self.facts.shape(value) or ()
        source = value
        view = producer(value, "Reshape")
        if view is not None and view.inputs[0] is not None:
            source = view.inputs[0]
        target = self._target([-1, shape[2]])
        rows = emit(self.graph, before, "Reshape", [source, target], name=f"{value.name}/rows", dtype=value.dtype)
        self.rows[value] = rows
        return rows

    def _target(self, sizes: Sequence[Size | None]) -> ir.Value:
        """A Reshape target: the first open size is left to Reshape as -1, a further one is read from the inputs."""
        wanted: list[Size] = [-1 if s is None else s for s in sizes]
        first = next((i for i, s in enumerate(wanted) if isinstance(s, Dim)), None)
        if first is not None:
            wanted[first] = -1
        if any(isinstance(s, Dim) for s in wanted):
            return self.head.vector(wanted)
        name = "rows/" + "x".join("all" if s == -1 else str(s) for s in wanted)
        found = self.graph.initializers.get(name)
        return found if found is not None else add_initializer(self.graph, name, np.asarray(wanted, np.int64))

    def _hand_back(self, out: ir.Value) -> None:
        """Let readers outside the stretch see [B,N,C] again (a Reshape that follows is pointed at the rows)."""
        shape = self.facts.shape(out)
        if shape is None:
            return
        self.rows[out] = out
        outside = [(node, i) for node, i in out.uses() if node not in self.nodes]
        wide: ir.Value | None = None
        for node, index in outside:
            target = self._direct(node, shape) if node.op_type == "Reshape" and index == 0 else None
            if target is not None:
                node.replace_input_with(1, target)
                node.attributes.pop("allowzero", None)
                continue
            wide = wide or self._wide(out, shape)
            node.replace_input_with(index, wide)
        if out.is_graph_output():
            wide = wide or self._wide(out, shape)
            self._rename_output(out, wide)
        out.shape = None

    def _direct(self, node: ir.Node, shape: Shape) -> ir.Value | None:
        """The target of a Reshape that read [B,N,C], for rows instead; None when it cannot be said."""
        result = self.facts.shape(node.outputs[0])
        target = reshape_target((dims.product(shape[:2]), shape[2]), result)
        if target is not None:
            return self._target(target)
        if result is None or not dims.known(result) or 0 in result:
            return None
        open_sizes = [s for s in result if isinstance(s, Dim)]
        return self._target(result) if all(s in self.facts.symbols for s in open_sizes[1:]) else None

    def _wide(self, out: ir.Value, shape: Shape) -> ir.Value:
        node = out.producer()
        following = _after(self.graph, node) if node is not None else None
        target = self._target(shape if any(isinstance(s, Dim) for s in shape) else (-1, *shape[1:]))
        made = ir.Node("", "Reshape", [out, target], name=f"{out.name}/tokens")
        made.outputs[0].name = unique_name(self.graph, f"{out.name}/tokens")
        made.outputs[0].type = out.type
        if following is None:
            self.graph.append(made)
        else:
            self.graph.insert_before(following, made)
        self.facts.shapes[made.outputs[0]] = shape
        return made.outputs[0]

    def _rename_output(self, out: ir.Value, wide: ir.Value) -> None:
        name = out.name
        for index, value in enumerate(self.graph.outputs):
            if value is out:
                self.graph.outputs[index] = wide
        out.name = unique_name(self.graph, f"{name}/rows")
        wide.name = name


def _after(graph: ir.Graph, node: ir.Node) -> ir.Node | None:
    nodes = iter(graph)
    for other in nodes:
        if other is node:
            return next(nodes, None)
    return None
