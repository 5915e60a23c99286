"""Follow shapes and small values through a graph without running it.

Exporters compute reshape targets, position ids, masks and even the softmax scale at run time from ``Shape`` nodes. With
one concrete size chosen for every open axis all of that becomes plain numbers: ``trace`` walks the graph once, infers
every shape with onnx's own per-node inference and evaluates the small integer, boolean and mask arithmetic. Nothing in
the model is changed, no weight is multiplied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx.shape_inference
import onnx_ir as ir

from edgetok.converters.graph import smallmath

# A concrete size per open axis: small, different from each other and from usual widths, so that a size names an axis.
BATCH, SEQUENCE, SIDE, CHANNELS = 2, 7, 224, 3
MAX_ELEMENTS = 1 << 20
MAX_MATRIX_ELEMENTS = 1 << 16  # float matrices are mostly weights; masks and tables have a higher rank


@dataclass(eq=False)
class Trace:
    """What is known of each value at one choice of input sizes.

    Args:
        shapes: concrete shape by value.
        data: contents, for small values that could be computed.
        varies: values whose contents depend on the contents (not only the shapes) of a graph input.
        types: ONNX element type numbers by value.
    """

    shapes: dict[ir.Value, tuple[int, ...]] = field(default_factory=dict)
    data: dict[ir.Value, np.ndarray] = field(default_factory=dict)
    varies: set[ir.Value] = field(default_factory=set)
    types: dict[ir.Value, int] = field(default_factory=dict)

    def shape(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """Concrete shape, or None when unknown."""
        return None if value is None else self.shapes.get(value)

    def constant(self, value: ir.Value | None) -> bool:
        """Whether the value is the same for all inputs of these sizes (weights, and what is computed from them)."""
        return value is not None and value not in self.varies

    def scalar(self, value: ir.Value | None) -> float | None:
        """The number held by a one-element value that does not depend on inputs."""
        if value is None or value in self.varies:
            return None
        array = self.data.get(value)
        return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def input_sizes(
    model: ir.Model,
    *,
    batch: int = BATCH,
    sequence: int = SEQUENCE,
    side: int = SIDE,
    dims: Mapping[str, int] | None = None,
) -> dict[str, tuple[int, ...]]:
    """Choose a concrete shape for every graph input.

    Args:
        model: the graph.
        batch, sequence, side: sizes for an open first axis, an open second axis (text) and open image sides.
        dims: sizes by symbolic axis name, which win over the guesses.

    Returns:
        Shape by input name; inputs of unknown rank are left out.
    """
    known = dict(dims or {})
    result: dict[str, tuple[int, ...]] = {}
    for value in graph_inputs(model.graph):
        if value.shape is None or value.name is None:
            continue
        shape = []
        for axis, dim in enumerate(value.shape):
            guess = batch if axis == 0 else sequence
            if value.shape.rank() == 4 and axis:
                guess = CHANNELS if axis == 1 else side
            name = None if isinstance(dim, int) else dim.value
            shape.append(dim if isinstance(dim, int) else known.setdefault(name, guess) if name else guess)
        result[value.name] = tuple(shape)
    return result


def graph_inputs(graph: ir.Graph) -> list[ir.Value]:
    """Inputs a caller must feed (old files list initializers as inputs too)."""
    return [v for v in graph.inputs if v.const_value is None and v.name not in graph.initializers]


def trace(
    model: ir.Model,
    sizes: Mapping[str, Sequence[int]] | None = None,
    feeds: Mapping[str, np.ndarray] | None = None,
) -> Trace:
    """Infer shapes and small contents of every value of the main graph.

    Args:
        model: the graph; not changed.
        sizes: shape by input name; by default `input_sizes(model)`.
        feeds: contents of some inputs, to follow what masks and position ids become.

    Returns:
        What could be found out; unknown shapes are simply missing, nothing is raised.
    """
    out = Trace()
    known = input_sizes(model) if sizes is None else {k: tuple(int(d) for d in v) for k, v in sizes.items()}
    symbols: dict[str, int] = {}
    for value in graph_inputs(model.graph):
        out.varies.add(value)
        if value.dtype is not None:
            out.types[value] = int(value.dtype)
        if value.name in known:
            out.shapes[value] = known[value.name]
            for dim, size in zip(value.shape or (), known[value.name]):
                if not isinstance(dim, int) and dim.value:
                    symbols[dim.value] = size
        if feeds and (array := feeds.get(value.name or "")) is not None:
            out.data[value] = array
    _trace_graph(model.graph, model, out, symbols)
    return out


def _trace_graph(graph: ir.Graph, model: ir.Model, out: Trace, symbols: Mapping[str, int]) -> None:
    opsets = [onnx.helper.make_opsetid(d, v) for d, v in model.opset_imports.items()]
    for value in graph.initializers.values():
        _note_constant(value, value.const_value, out)
    for node in graph:
        try:
            _trace_node(node, model, opsets, out, symbols)
        except Exception:  # an odd node must not hide the rest of the graph: its outputs stay unknown
            for value in node.outputs:
                out.varies.add(value)
        for value in node.outputs:
            if value not in out.shapes:
                _declared(value, out, symbols)


def _declared(value: ir.Value, out: Trace, symbols: Mapping[str, int]) -> None:
    """Take the shape written in the file, with the chosen sizes for its symbols."""
    if value.dtype is not None:
        out.types.setdefault(value, int(value.dtype))
    if value.shape is None:
        return
    dims = [d if isinstance(d, int) else symbols.get(d.value or "") for d in value.shape]
    if all(d is not None for d in dims):
        out.shapes[value] = tuple(int(d) for d in dims if d is not None)


def _note_constant(value: ir.Value, tensor: ir.TensorProtocol | None, out: Trace) -> None:
    if tensor is None:
        return
    shape = tuple(tensor.shape.numpy())
    out.shapes[value] = shape
    out.types[value] = int(tensor.dtype)
    if _small(shape, tensor.dtype.is_floating_point()) and tensor.dtype != ir.DataType.STRING:
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # weights in a missing side file stay unknown
            out.data[value] = tensor.numpy()


def _small(shape: Sequence[int], floating: bool) -> bool:
    size = int(np.prod(shape, dtype=np.int64)) if shape else 1
    return size <= (MAX_MATRIX_ELEMENTS if floating and len(shape) == 2 and shape[0] != shape[1] else MAX_ELEMENTS)


def _trace_node(
    node: ir.Node, model: ir.Model, opsets: list[onnx.OperatorSetIdProto], out: Trace, symbols: Mapping[str, int]
) -> None:
    op = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
    if op == "Constant":
        tensor = constant_tensor(node)
        if tensor is not None:
            _note_constant(node.outputs[0], tensor, out)
        return
    if op == "If" and (cond := out.data.get(node.inputs[0])) is not None:  # type: ignore[arg-type]
        _trace_branch(node, bool(cond.reshape(-1)[0]), model, out, symbols)
        return
    varies = op not in ("Shape", "Size") and (
        any(v in out.varies for v in node.inputs if v is not None) or op in ("If", "Loop", "Scan") or "Random" in op
    )
    if varies:
        out.varies.update(node.outputs)
    if _evaluate(node, op, model, opsets, out):
        return
    _infer(node, model, opsets, out)


def _trace_branch(node: ir.Node, cond: bool, model: ir.Model, out: Trace, symbols: Mapping[str, int]) -> None:
    branch = node.attributes["then_branch" if cond else "else_branch"].as_graph()
    _trace_graph(branch, model, out, symbols)
    for inner, outer in zip(branch.outputs, node.outputs):
        if inner in out.shapes:
            out.shapes[outer] = out.shapes[inner]
        if inner in out.types:
            out.types[outer] = out.types[inner]
        if inner in out.data:
            out.data[outer] = out.data[inner]
        if inner in out.varies:
            out.varies.add(outer)


def constant_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor a Constant node holds, whatever attribute holds it; None for strings and sparse tensors."""
    for name, attribute in node.attributes.items():
        if name == "value":
            return attribute.as_tensor()
        if name in ("value_int", "value_ints"):
            return ir.tensor(np.asarray(attribute.value, dtype=np.int64))
        if name in ("value_float", "value_floats"):
            return ir.tensor(np.asarray(attribute.value, dtype=np.float32))
    return None


_GROWING = {"Gather", "GatherND", "GatherElements", "Pad", "OneHot", "Einsum", "EyeLike", "ScatterND", "Split"}


def _evaluate(node: ir.Node, op: str, model: ir.Model, opsets: list[onnx.OperatorSetIdProto], out: Trace) -> bool:
    """Compute the node when all its inputs are known and the result is small."""
    if op in ("Shape", "Size"):
        shape = out.shape(node.inputs[0])
        if shape is None:
            return False
        if op == "Size":
            array = np.asarray(np.prod(shape, dtype=np.int64))
        else:
            start, end = node.attributes.get("start"), node.attributes.get("end")
            array = np.asarray(shape[start.as_int() if start else None : end.as_int() if end else None], dtype=np.int64)
        _note_array(node.outputs[0], array, out)
        return True
    if op not in smallmath.SMALL_OPS or any(v is not None and v not in out.data for v in node.inputs):
        return False
    arrays = [None if v is None else out.data[v] for v in node.inputs]
    if not _result_is_small(op, arrays):
        return False
    if op in _GROWING:  # their results can be far larger than their inputs: look before computing
        _infer(node, model, opsets, out)
        shape = out.shape(node.outputs[0])
        if shape is None or not _small(shape, floating=False):
            return False
    try:
        results = smallmath.evaluate(node, arrays, model.opset_imports.get("", 18))
    except Exception:  # a form not supported here; the shape alone may still be inferred
        return False
    if results is None:
        return False
    for value, array in zip(node.outputs, results):
        _note_array(value, array, out)
    return True


def _result_is_small(op: str, arrays: list[np.ndarray | None]) -> bool:
    """Guard against a tiny file asking for a huge array."""
    shapes = [a.shape for a in arrays if a is not None]
    if op in ("ConstantOfShape", "Expand", "Tile", "Range"):
        sizes = arrays[-1] if op in ("Expand", "ConstantOfShape", "Tile") else None
        if sizes is not None:
            size = float(np.prod(np.abs(sizes).astype(np.float64)))
            return size * (float(np.prod(shapes[0])) if op == "Tile" else 1.0) <= 8 * MAX_ELEMENTS
        start, limit, delta = (float(a.reshape(-1)[0]) for a in arrays if a is not None)
        return delta != 0 and (limit - start) / delta <= MAX_ELEMENTS
    try:
        return int(np.prod(np.broadcast_shapes(*shapes), dtype=np.int64)) <= MAX_ELEMENTS
    except ValueError:
        return sum(int(np.prod(s)) for s in shapes) <= MAX_ELEMENTS


def _note_array(value: ir.Value, array: np.ndarray, out: Trace) -> None:
    array = np.asarray(array)
    out.shapes[value] = array.shape
    out.types[value] = int(ir.DataType.from_numpy(array.dtype))
    if _small(array.shape, array.dtype.kind == "f"):
        out.data[value] = array


def _infer(node: ir.Node, model: ir.Model, opsets: list[onnx.OperatorSetIdProto], out: Trace) -> None:
    if node.domain not in ("", "ai.onnx"):
        _infer_contrib(node, out)
        return
    proto = onnx.NodeProto(op_type=node.op_type)
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for i, value in enumerate(node.inputs):
        name = "" if value is None else f"i{i}"
        proto.input.append(name)
        if value is None:
            continue
        if value not in out.types:
            return
        types[name] = onnx.helper.make_tensor_type_proto(out.types[value], out.shape(value))
        array = out.data.get(value)
        if array is not None and array.ndim <= 1 and array.size <= 64:
            data[name] = onnx.numpy_helper.from_array(array)
    proto.output.extend(f"o{i}" if v.name != "" else "" for i, v in enumerate(node.outputs))
    proto.attribute.extend(ir.serde.serialize_attribute(a) for a in node.attributes.values() if isinstance(a, ir.Attr))
    schema = onnx.defs.get_schema(node.op_type, model.opset_imports.get("", 18), "")
    found = onnx.shape_inference.infer_node_outputs(
        schema, proto, types, data, opset_imports=opsets, ir_version=model.ir_version or 8
    )
    for i, value in enumerate(node.outputs):
        kind = found.get(f"o{i}")
        if kind is None or not kind.HasField("tensor_type"):
            continue
        out.types[value] = kind.tensor_type.elem_type
        dims = kind.tensor_type.shape.dim
        if kind.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            out.shapes[value] = tuple(d.dim_value for d in dims)


SAME_SHAPE = {
    "Gelu", "FastGelu", "BiasGelu", "QuickGelu", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
    "SimplifiedLayerNormalization", "RotaryEmbedding", "BiasSoftmax", "BiasSplitGelu", "QLinearSoftmax",
    "QLinearSigmoid", "QLinearAdd", "QLinearMul", "QuantizeLinear", "DequantizeLinear", "BiasAdd", "BiasDropout",
}  # fmt: skip
UNTYPED = {"DequantizeLinear": 1}


def _infer_contrib(node: ir.Node, out: Trace) -> None:
    """Shapes of the onnxruntime operators that optimized files contain."""
    shape, op = out.shape(node.inputs[0]) if node.inputs else None, node.op_type
    kind = out.types.get(node.inputs[0]) if node.inputs and node.inputs[0] is not None else None
    result: tuple[int, ...] | None = None
    if op in SAME_SHAPE:
        result, kind = shape, UNTYPED.get(op, kind)
    elif op == "EmbedLayerNormalization" and shape is not None:
        table = out.shape(node.inputs[2])
        result, kind = (*shape, table[-1]) if table else None, 1
        if len(node.outputs) > 1:
            out.shapes[node.outputs[1]], out.types[node.outputs[1]] = shape[:1], 6
    elif op == "MatMulNBits" and shape is not None:
        result = (*shape[:-1], node.attributes["N"].as_int())
    elif op in ("Attention", "QAttention") and shape is not None:
        sizes = node.attributes.get("qkv_hidden_sizes")
        weight = out.shape(node.inputs[1])
        width = sizes.as_ints()[2] if sizes else weight[-1] // 3 if weight else shape[-1]
        result, kind = (*shape[:2], width), 1 if op == "QAttention" else kind
    elif op in ("MultiHeadAttention", "GroupQueryAttention", "PackedMultiHeadAttention") and shape is not None:
        result = shape if len(shape) == 3 else (shape[0], shape[1], shape[2] * shape[4])
    elif op in ("FusedMatMul", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QLinearMatMul", "FusedGemm"):
        result, kind = _matmul_shape(node, out), kind if op.startswith("Fused") else 1
    if result is not None:
        for i, value in enumerate(node.outputs):
            statistics = i in (1, 2) and op.startswith("Skip")  # mean and inverse deviation of each row
            if (i in (0, 3) or statistics) and value.name != "":
                out.shapes[value] = (*result[:-1], 1) if statistics else result
                if kind is not None:
                    out.types[value] = kind


def _matmul_shape(node: ir.Node, out: Trace) -> tuple[int, ...] | None:
    a, b = out.shape(node.inputs[0]), out.shape(node.inputs[1])
    if a is None or b is None or len(a) < 2 or len(b) < 2:
        return None
    if (t := node.attributes.get("transA")) and t.as_int():
        a = (*a[:-2], a[-1], a[-2])
    if (t := node.attributes.get("transB")) and t.as_int():
        b = (*b[:-2], b[-1], b[-2])
    return (*np.broadcast_shapes(a[:-2], b[:-2]), a[-2], b[-1])
