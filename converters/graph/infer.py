"""Shapes and contents of every value of a graph, as far as they follow from input sizes and constants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir

from edgetok.converters.graph import dims, evaluate
from edgetok.converters.graph.dims import Dim, Shape, Size
from edgetok.converters.graph.match import SMALL_ELEMENTS, is_constant

MIB = 1024 * 1024
FOLD_FLOOR_BYTES = 16 * MIB  # a folded constant may always be this big
FOLD_GROWTH = 8  # or this many times its inputs (int8 weights stored for float grow by 4)
FOLD_CEILING_BYTES = 1024 * MIB


@dataclass(eq=False)
class Facts:
    """What is known.

    Args:
        shapes: sizes of a value, None for an unknown one; absent when even the rank is unknown.
        types: element type.
        contents: the array in a value; object arrays hold ``Dim`` items and stand for int64.
        folded: values whose content was computed from constants (a subset of ``contents``, without symbols).
        spread: arrays that, broadcast to a value's shape, equal it (an Expand of a constant over the batch, and what
            is computed from such values alone).
        symbols: sizes that are symbols of a graph input, so that a node can read them at run time.
    """

    shapes: dict[ir.Value, Shape] = field(default_factory=dict)
    types: dict[ir.Value, ir.DataType] = field(default_factory=dict)
    contents: dict[ir.Value, np.ndarray] = field(default_factory=dict)
    folded: set[ir.Value] = field(default_factory=set)
    spread: dict[ir.Value, np.ndarray] = field(default_factory=dict)
    symbols: set[Size] = field(default_factory=set)

    def shape(self, value: ir.Value | None) -> Shape | None:
        return self.shapes.get(value) if value is not None else None

    def same_shape(self, a: ir.Value | None, b: ir.Value | None) -> bool:
        """True when both shapes are wholly known and equal."""
        left, right = self.shape(a), self.shape(b)
        return dims.known(left) and left == right


def propagate(model: ir.Model) -> Facts:
    """One pass over the main graph in execution order. Nothing in the model is changed."""
    facts = Facts()
    opsets = dict(model.opset_imports)
    for value in model.graph.inputs:
        _declare(facts, value)
        facts.symbols |= {s for s in facts.shapes.get(value, ()) if isinstance(s, Dim) and s == Dim(1, s.syms[:1])}
    for value in model.graph.initializers.values():
        if is_constant(value):
            tensor = value.const_value
            facts.shapes[value] = tuple(int(d) for d in tensor.shape)  # type: ignore[union-attr, arg-type]
            facts.types[value] = tensor.dtype  # type: ignore[union-attr]
    for node in model.graph:
        _visit(node, facts, opsets)
    return facts


def _declare(facts: Facts, value: ir.Value) -> None:
    shape = dims.from_ir(value.shape)
    if shape is not None:
        facts.shapes[value] = shape
    if value.dtype is not None:
        facts.types[value] = value.dtype


def content(facts: Facts, value: ir.Value | None) -> np.ndarray | None:
    """The array in ``value`` when known and small, else None."""
    if value is None:
        return None
    if value in facts.contents:
        return facts.contents[value]
    if is_constant(value) and value.const_value is not None and value.const_value.size <= SMALL_ELEMENTS:
        return value.const_value.numpy()
    return None


def _visit(node: ir.Node, facts: Facts, opsets: dict[str, int]) -> None:
    _infer(node, facts, opsets)
    known = [value is None or value in facts.folded or is_constant(value) for value in node.inputs]
    if all(known) and node.inputs:
        _fold(node, facts, opsets)
        return
    if _shape_of(node, facts):
        return
    _spread(node, facts, opsets)
    arrays = [content(facts, value) for value in node.inputs]
    if any(a is None and v is not None for a, v in zip(arrays, node.inputs, strict=True)):
        return
    out = evaluate.symbolic(node, arrays)
    if out is not None and out.size <= SMALL_ELEMENTS:
        _set_content(facts, node.outputs[0], out)


def _set_content(facts: Facts, value: ir.Value, array: np.ndarray) -> None:
    if array.dtype == np.int64 and facts.types.get(value) == ir.DataType.INT32:
        array = array.astype(np.int32)
    facts.contents[value] = array
    facts.shapes[value] = tuple(int(s) for s in array.shape)
    if array.dtype != object:
        facts.folded.add(value)


def _shape_of(node: ir.Node, facts: Facts) -> bool:
    """Shape and Size: contents from sizes. True when the node was one of them."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in ("Shape", "Size"):
        return False
    shape = facts.shape(node.inputs[0])
    if shape is None:
        return True
    if node.op_type == "Size":
        total = dims.product(shape)
        if total is not None:
            _set_content(facts, node.outputs[0], evaluate.tidy(np.asarray(total, dtype=object)))
        return True
    start = node.attributes["start"].as_int() if "start" in node.attributes else 0
    end = node.attributes["end"].as_int() if "end" in node.attributes else len(shape)
    part = shape[start:end]
    if dims.known(part):
        array = np.empty(len(part), dtype=object)
        array[:] = list(part)
        _set_content(facts, node.outputs[0], evaluate.tidy(array))
    return True


def _fold(node: ir.Node, facts: Facts, opsets: dict[str, int]) -> None:
    """Compute a node whose inputs are all constant, within the size limits."""
    in_bytes = sum(_nbytes(facts, value) or 0 for value in node.inputs if value is not None)
    limit = min(max(FOLD_FLOOR_BYTES, FOLD_GROWTH * in_bytes), FOLD_CEILING_BYTES)
    for out in node.outputs:
        size = _nbytes(facts, out)
        if size is None or size > limit:
            return
    arrays = [_array(facts, value) for value in node.inputs]
    results = evaluate.concrete(node, arrays, opsets)
    if results is None:
        return
    for value, array in zip([o for o in node.outputs if o.name], results):
        facts.contents[value] = array
        facts.folded.add(value)
        facts.shapes[value] = tuple(int(s) for s in array.shape)


SPREAD_POINTWISE = {
    "Add",
    "Sub",
    "Mul",
    "Div",
    "And",
    "Or",
    "Not",
    "Where",
    "Cast",
    "Equal",
    "Less",
    "Greater",
    "Max",
    "Min",
}


def _spread(node: ir.Node, facts: Facts, opsets: dict[str, int]) -> None:
    """Note when the first output is a small array broadcast over sizes that are not all known numbers."""
    out, shape = node.outputs[0], facts.shape(node.outputs[0])
    if shape is None or node.domain not in ("", "ai.onnx"):
        return
    arrays = [_small(facts, node, v) for v in node.inputs if v is not None]
    result: np.ndarray | None = None
    if node.op_type == "ConstantOfShape":
        fill = node.attributes["value"].as_tensor().numpy() if "value" in node.attributes else np.zeros(1, np.float32)
        result = np.broadcast_to(fill.reshape(-1)[:1], (1,) * len(shape)).copy()
    elif not arrays or arrays[0] is None or arrays[0].dtype == object:
        return
    elif node.op_type == "Expand":
        result = arrays[0].reshape((1,) * (len(shape) - arrays[0].ndim) + arrays[0].shape)
    elif any(a is None or a.dtype == object for a in arrays) or not any(v in facts.spread for v in node.inputs):
        return
    elif node.op_type in SPREAD_POINTWISE or node.op_type == "Unsqueeze" or _is_row_gather(node, facts):
        outputs = evaluate.concrete(node, arrays, opsets)
        result = outputs[0] if outputs else None
    if result is not None and result.ndim == len(shape) and result.nbytes <= FOLD_FLOOR_BYTES:
        facts.spread[out] = result


def _small(facts: Facts, node: ir.Node, value: ir.Value) -> np.ndarray | None:
    if value in facts.spread:
        return facts.spread[value]
    if node.op_type == "Gather" and is_constant(value) and node.inputs[1] in facts.spread:
        return value.const_value.numpy() if value.const_value is not None else None  # a table: only rows are taken
    return content(facts, value)


def _is_row_gather(node: ir.Node, facts: Facts) -> bool:
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    return node.op_type == "Gather" and axis == 0 and node.inputs[0] not in facts.spread


def _array(facts: Facts, value: ir.Value | None) -> np.ndarray | None:
    if value is None:
        return None
    if value in facts.contents:
        return facts.contents[value]
    return value.const_value.numpy() if value.const_value is not None else None


def _nbytes(facts: Facts, value: ir.Value) -> int | None:
    shape, kind = facts.shape(value), facts.types.get(value)
    if not dims.static(shape) or shape is None or kind is None or kind == ir.DataType.STRING:
        return None
    total = dims.product(shape)
    return int(total * kind.bitwidth // 8) if isinstance(total, int) else None


# ---------------------------------------------------------------- shapes of one node


def _infer(node: ir.Node, facts: Facts, opsets: dict[str, int]) -> None:
    rule = _SHAPE_RULES.get(node.op_type)
    _schema_rule(node, facts, opsets)
    if rule is not None:
        shape = rule(node, facts)
        if shape is not None:
            facts.shapes[node.outputs[0]] = shape
        if node.outputs[0] not in facts.types and node.inputs and node.inputs[0] in facts.types:
            facts.types[node.outputs[0]] = facts.types[node.inputs[0]]
    for out in node.outputs:
        if out not in facts.types and out.dtype is not None:
            facts.types[out] = out.dtype
        if out not in facts.shapes and out.shape is not None and out.shape.is_static():
            facts.shapes[out] = dims.from_ir(out.shape) or ()


def _schema_rule(node: ir.Node, facts: Facts, opsets: dict[str, int]) -> None:
    """Shape inference of the onnx package for one node, with symbols as dimension names."""
    version = opsets.get(node.domain, opsets.get("", 18))
    try:
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)
        types = {v.name: _proto_type(facts, v) for v in node.inputs if v is not None and v.name}
        data = {}
        for value in node.inputs:
            array = content(facts, value)
            if value is not None and value.name and array is not None and array.dtype != object:
                data[value.name] = onnx.numpy_helper.from_array(np.asarray(array), value.name)
        proto = ir.serde.serialize_node(node)
        found = onnx.shape_inference.infer_node_outputs(
            schema,
            proto,
            types,
            data,
            opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in opsets.items()],
            ir_version=10,
        )
    except Exception:  # no schema, no types, or a node the inference refuses: nothing is known then
        return
    for out in node.outputs:
        kind = found.get(out.name or "")
        if kind is None or not kind.HasField("tensor_type"):
            continue
        tensor = kind.tensor_type
        if tensor.elem_type:
            facts.types[out] = ir.DataType(tensor.elem_type)
        if tensor.HasField("shape"):
            facts.shapes[out] = tuple(_size(d) for d in tensor.shape.dim)


def _size(dim: onnx.TensorShapeProto.Dimension) -> Size | None:
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    name = dim.dim_param
    return dims.parse(name) if name and not name.startswith("unk__") else None


def _proto_type(facts: Facts, value: ir.Value) -> onnx.TypeProto:
    kind = facts.types.get(value)
    shape = facts.shape(value)
    wanted = None if shape is None else [str(s) if isinstance(s, Dim) else s for s in shape]
    return onnx.helper.make_tensor_type_proto(int(kind) if kind is not None else 0, wanted)


def _sizes(facts: Facts, value: ir.Value | None) -> list[Size] | None:
    array = content(facts, value)
    if array is None:
        return None
    return [item if isinstance(item, Dim) else int(item) for item in array.reshape(-1)]


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def _reshape_shape(node: ir.Node, facts: Facts) -> Shape | None:
    wanted = _sizes(facts, _input(node, 1))
    if wanted is None:
        return None
    zero = "allowzero" in node.attributes and bool(node.attributes["allowzero"].as_int())
    return dims.reshape(facts.shape(node.inputs[0]), wanted, zero)


def _expand_shape(node: ir.Node, facts: Facts) -> Shape | None:
    data, wanted = facts.shape(node.inputs[0]), _sizes(facts, _input(node, 1))
    if data is None or wanted is None:
        return None
    rank = max(len(data), len(wanted))
    left: Shape = (1,) * (rank - len(data)) + data
    right: Shape = (1,) * (rank - len(wanted)) + tuple(wanted)
    return tuple(b if a == 1 else (a if b == 1 or a == b else None) for a, b in zip(left, right, strict=True))


def _filled_shape(node: ir.Node, facts: Facts) -> Shape | None:
    wanted = _sizes(facts, _input(node, 0))
    if wanted is not None and "value" not in node.attributes:
        facts.types[node.outputs[0]] = ir.DataType.FLOAT
    return None if wanted is None else tuple(wanted)


def _range_shape(node: ir.Node, facts: Facts) -> Shape | None:
    parts = [_sizes(facts, value) for value in node.inputs]
    if any(p is None for p in parts) or parts[0] != [0] or parts[2] != [1]:
        return None
    return (parts[1][0],)  # type: ignore[index]


def _tile_shape(node: ir.Node, facts: Facts) -> Shape | None:
    data, repeats = facts.shape(node.inputs[0]), _sizes(facts, _input(node, 1))
    if data is None or repeats is None:
        return None
    return tuple(None if s is None else dims.mul(s, r) for s, r in zip(data, repeats, strict=True))


def _resize_shape(node: ir.Node, facts: Facts) -> Shape | None:
    wanted = _sizes(facts, _input(node, 3))
    if wanted is None or "axes" in node.attributes:
        return None
    policy = node.attributes.get("keep_aspect_ratio_policy")
    return tuple(wanted) if policy is None or policy.as_string() == "stretch" else None


def _slice_shape(node: ir.Node, facts: Facts) -> Shape | None:
    """Slices from 0 to a symbol, as [:, :length] of a position table; the rest is left to the onnx package.

    A table shorter than the symbol would be cut at its own size, but then the source fails where the rows meet.
    """
    data, starts, ends = facts.shape(node.inputs[0]), _sizes(facts, _input(node, 1)), _sizes(facts, _input(node, 2))
    if data is None or starts is None or ends is None or not any(isinstance(e, Dim) for e in ends):
        return None
    axes = _sizes(facts, _input(node, 3)) or list(range(len(starts)))
    steps = _sizes(facts, _input(node, 4)) or [1] * len(starts)
    out = list(data)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if not isinstance(axis, int) or start != 0 or step != 1 or data[axis] == 1:
            return None
        if isinstance(end, Dim):
            out[axis] = end
        elif end < (1 << 31):
            return None
    return tuple(out)


def _same_shape(node: ir.Node, facts: Facts) -> Shape | None:
    return facts.shape(node.outputs[0]) or facts.shape(node.inputs[0])


_SHAPE_RULES: dict[str, Callable[[ir.Node, Facts], Shape | None]] = {
    "Reshape": _reshape_shape,
    "Expand": _expand_shape,
    "ConstantOfShape": _filled_shape,
    "Range": _range_shape,
    "Tile": _tile_shape,
    "Slice": _slice_shape,
    "Resize": _resize_shape,
    "BiasGelu": _same_shape,
    "FastGelu": _same_shape,
    "QuickGelu": _same_shape,
    "SkipLayerNormalization": _same_shape,
}
