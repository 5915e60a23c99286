"""Write what is known about values into the graph: constants, and Reshape targets that hold the batch symbol."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgetok.converters.graph import dims
from edgetok.converters.graph.dims import Dim, Shape, Size
from edgetok.converters.graph.infer import Facts, propagate
from edgetok.converters.graph.match import add_initializer, constant, is_constant, unique_name

SHAPE_INPUT = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0, "Tile": 1, "Resize": 3}


def fold_constants(model: ir.Model, facts: Facts) -> int:
    """Replace computed values that something still reads by initializers of the same name. Returns how many."""
    count = 0
    for node in list(model.graph):
        for value in node.outputs:
            if value not in facts.folded or value.is_graph_output() or not value.uses():
                continue
            if all(user.outputs and all(out in facts.folded for out in user.outputs) for user, _ in value.uses()):
                continue  # only other folded nodes read it
            replacement = _initializer_for(model.graph, value, facts.contents[value])
            _adopt(facts, value, replacement)
            value.replace_all_uses_with(replacement)
            count += 1
    return count


def _initializer_for(graph: ir.Graph, value: ir.Value, array: np.ndarray) -> ir.Value:
    """An initializer that takes the value's name; the value itself, about to go, gets another."""
    name = value.name or "constant"
    value.name = unique_name(graph, f"{name}_folded")
    return add_initializer(graph, name, array, free=True)


def _adopt(facts: Facts, old: ir.Value, new: ir.Value) -> None:
    facts.shapes[new] = facts.shapes[old]
    facts.types[new] = ir.DataType(new.dtype) if new.dtype is not None else facts.types[old]


def fold_reshapes(model: ir.Model, facts: Facts) -> int:
    """Give Reshape a constant target of 0, -1 and numbers wherever its result shape is known. Returns how many."""
    count = 0
    for node in model.graph:
        if node.op_type != "Reshape" or node.domain not in ("", "ai.onnx"):
            continue
        source, result = facts.shape(node.inputs[0]), facts.shape(node.outputs[0])
        target = reshape_target(source, result)
        if target is None:
            continue
        now = constant(node.inputs[1])
        if now is not None and now.reshape(-1).tolist() == target and "allowzero" not in node.attributes:
            continue
        shape = add_initializer(model.graph, f"{node.name or node.outputs[0].name}/shape", np.asarray(target, np.int64))
        node.replace_input_with(1, shape)
        node.attributes.pop("allowzero", None)
        count += 1
    return count


def reshape_target(source: Shape | None, result: Shape | None) -> list[int] | None:
    """A Reshape target that gives ``result`` from ``source`` without naming sizes it can copy.

    Leading sizes that stay are 0 (copied), one symbol elsewhere is -1, the rest are numbers. Sizes copied are
    not baked in, so a later change of the token count passes through.

    Returns:
        None when the result is not wholly known or two symbols would need -1.
    """
    if source is None or result is None or not dims.known(result) or any(size == 0 for size in result):
        return None
    out: list[int] = []
    prefix = True
    for axis, size in enumerate(result):
        prefix = prefix and axis < len(source) and source[axis] == size
        if prefix:
            out.append(0)
        elif isinstance(size, int):
            out.append(size)
        elif axis < len(source) and source[axis] == size:
            out.append(0)
        elif -1 in out:
            return None
        else:
            out.append(-1)
    return out


def fold_symbolic_shapes(model: ir.Model, facts: Facts) -> int:
    """Rebuild shape operands that mix numbers and input symbols from one Shape node per symbol.

    Exporters spend a dozen nodes on ``[batch, 1, 384]``; what stays is Shape(input)[axis] and one Concat.
    Returns how many operands were rebuilt.
    """
    head = Head(model)
    count = 0
    for node in list(model.graph):
        index = SHAPE_INPUT.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        value = node.inputs[index] if index is not None and len(node.inputs) > index else None
        array = facts.contents.get(value) if value is not None else None
        if index is None or value is None or array is None or array.dtype != object or _is_minimal(value):
            continue
        if any(
            isinstance(s, Dim) and (s.coef != 1 or len(s.syms) != 1 or s.syms[0] not in head.sources) for s in array
        ):
            continue
        new = head.vector(list(array))
        node.replace_input_with(index, new)
        facts.contents[new] = array
        facts.shapes[new] = (len(array),)
        facts.types[new] = ir.DataType.INT64
        count += 1
    return count


def _is_minimal(value: ir.Value) -> bool:
    """True for what ``Head.vector`` makes: a sliced Shape of a graph input, or a Concat of those and constants."""
    node = value.producer()
    if node is None:
        return False
    if node.op_type == "Shape":
        source = node.inputs[0]
        return source is not None and source.is_graph_input() and "end" in node.attributes
    return node.op_type == "Concat" and all(v is not None and (is_constant(v) or _is_minimal(v)) for v in node.inputs)


class Head:
    """Builds shape vectors at the head of the graph, each distinct part once."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.sources: dict[str, tuple[ir.Value, int]] = {}  # symbol -> first input and axis that carry it
        for value in model.graph.inputs:
            for axis, size in enumerate(dims.from_ir(value.shape) or ()):
                if isinstance(size, Dim) and size.coef == 1 and len(size.syms) == 1:
                    self.sources.setdefault(size.syms[0], (value, axis))
        self._made: dict[str, ir.Value] = {}
        self._nodes: set[ir.Node] = set()

    def vector(self, sizes: list[Size]) -> ir.Value:
        """A [len(sizes)] int64 value holding ``sizes``."""
        parts: list[ir.Value] = []
        run: list[int] = []
        for size in sizes:
            if isinstance(size, int):
                run.append(size)
                continue
            parts += [self._fixed(run)] if run else []
            run = []
            parts.append(self._symbol(size.syms[0]))
        parts += [self._fixed(run)] if run else []
        if len(parts) == 1:
            return parts[0]
        text = "x".join(map(str, sizes))
        if text not in self._made:
            self._made[text] = self._node("Concat", parts, f"sizes/{text}", [ir.AttrInt64("axis", 0)], len(sizes))
        return self._made[text]

    def _fixed(self, run: list[int]) -> ir.Value:
        key = "fixed:" + "x".join(map(str, run))
        if key not in self._made:
            self._made[key] = add_initializer(self.graph, "sizes/" + "x".join(map(str, run)), np.asarray(run, np.int64))
        return self._made[key]

    def _symbol(self, name: str) -> ir.Value:
        if name not in self._made:
            value, axis = self.sources[name]
            ends = [ir.AttrInt64("start", axis), ir.AttrInt64("end", axis + 1)]
            self._made[name] = self._node("Shape", [value], f"sizes/{name}", ends, 1)
        return self._made[name]

    def _node(self, op_type: str, inputs: list[ir.Value], name: str, attrs: list[ir.Attr], length: int) -> ir.Value:
        node = ir.Node("", op_type, inputs, attributes=attrs, name=name)
        node.outputs[0].name = unique_name(self.graph, name)
        node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        node.outputs[0].shape = ir.Shape([length])
        anchor = next(n for n in self.graph if n not in self._nodes)
        self.graph.insert_before(anchor, node)
        self._nodes.add(node)
        return node.outputs[0]


BROADCASTING = {"Add", "Sub", "Mul", "Div", "And", "Or", "Where", "Max", "Min"}


def fold_spread(model: ir.Model, facts: Facts) -> int:
    """Use a constant in place of its copy spread over the batch, where the reader broadcasts anyway.

    Returns how many operands were replaced.
    """
    made: dict[ir.Value, ir.Value] = {}
    count = 0
    for node in model.graph:
        if node.op_type not in BROADCASTING or node.domain not in ("", "ai.onnx"):
            continue
        for index, value in enumerate(node.inputs):
            if value is None or value not in facts.spread:
                continue
            full = facts.shape(value)
            others = [facts.shape(v) for i, v in enumerate(node.inputs) if i != index]
            if full is None or not any(dims.covers(other, full) for other in others):
                continue
            if value not in made:
                made[value] = add_initializer(model.graph, f"{value.name}/row", facts.spread[value])
                _adopt_row(facts, value, made[value])
            node.replace_input_with(index, made[value])
            count += 1
    return count


def _adopt_row(facts: Facts, value: ir.Value, row: ir.Value) -> None:
    facts.shapes[row] = tuple(int(s) for s in facts.spread[value].shape)
    if value in facts.types:
        facts.types[row] = facts.types[value]


def write_shapes(model: ir.Model, facts: Facts | None = None) -> None:
    """Store inferred shapes and types on every value; what is not known is left without a shape."""
    facts = facts or propagate(model)
    for node in model.graph:
        for value in node.outputs:
            shape = facts.shape(value)
            if shape is not None:
                value.shape = dims.to_ir(shape)
            if value in facts.types:
                value.type = ir.TensorType(facts.types[value])
