"""Evaluate one node on small known arrays: the arithmetic of shapes, position ids and masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir

Arrays = Sequence[np.ndarray | None]

_BINARY: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Pow": np.power, "Equal": np.equal, "Less": np.less,
    "LessOrEqual": np.less_equal, "Greater": np.greater, "GreaterOrEqual": np.greater_equal, "And": np.logical_and,
    "Or": np.logical_or, "Xor": np.logical_xor,
}  # fmt: skip
_UNARY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Identity": lambda a: a, "Not": np.logical_not, "Neg": np.negative, "Abs": np.abs, "Sqrt": np.sqrt,
    "Floor": np.floor, "Ceil": np.ceil, "Exp": np.exp, "Log": np.log, "Sign": np.sign, "IsNaN": np.isnan,
    "Reciprocal": np.reciprocal, "Sin": np.sin, "Cos": np.cos,
}  # fmt: skip
# The long tail goes through onnx's reference evaluator: slower, but the same definition as the standard.
_REFERENCE = {
    "ReduceProd", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceMean", "CumSum", "Trilu", "Tile", "IsInf", "ScatterND",
    "ScatterElements", "GatherND", "GatherElements", "OneHot", "ArgMax", "ArgMin", "Split", "EyeLike", "CastLike",
    "Clip", "Round", "BitwiseAnd", "BitwiseOr", "BitwiseNot", "Mod", "Min", "Max", "Flatten", "NonZero", "TopK", "Pad",
    "Einsum", "Dropout", "ReduceL2", "ReduceSumSquare", "Tanh", "Sigmoid",
}  # fmt: skip
_TABLE = {"Cast", "Gather", "Unsqueeze", "Squeeze", "Concat", "Slice", "Reshape", "Transpose", "Expand", "Div", "Where",
          "ConstantOfShape", "Range"}  # fmt: skip
SMALL_OPS = frozenset({*_BINARY, *_UNARY, *_REFERENCE, *_TABLE})


def evaluate(node: ir.Node, inputs: Arrays, opset: int) -> list[np.ndarray] | None:
    """Compute the node's outputs.

    Args:
        node: an operator of the default domain listed in SMALL_OPS.
        inputs: one array per input, None for absent optional ones.
        opset: version of the default domain.

    Returns:
        The outputs, or None when this form of the operator is not supported here.
    """
    op = node.op_type
    with np.errstate(all="ignore"):
        if op in _BINARY:
            a, b = inputs[0], inputs[1]
            result = _BINARY[op](a, b)  # type: ignore[arg-type]
            return [result.astype(a.dtype) if op in ("Add", "Sub", "Mul", "Pow") else result]  # type: ignore[union-attr]
        if op in _UNARY:
            return [np.asarray(_UNARY[op](inputs[0]))]  # type: ignore[arg-type]
        if op in _TABLE:
            made = _table(node, op, inputs)
            return None if made is None else [np.asarray(made)]
        return _reference(node, inputs, opset)


def _table(node: ir.Node, op: str, inputs: Arrays) -> np.ndarray | None:
    a = inputs[0]
    if a is None:
        return None
    if op == "Cast":
        return a.astype(ir.DataType(node.attributes["to"].as_int()).numpy())
    if op == "Gather":
        axis = node.attributes.get("axis")
        return np.take(a, inputs[1], axis=axis.as_int() if axis else 0)  # type: ignore[arg-type]
    if op in ("Squeeze", "Unsqueeze"):
        return _squeeze(node, op, inputs)
    if op == "Concat":
        return np.concatenate([x for x in inputs if x is not None], axis=node.attributes["axis"].as_int())
    if op == "Slice":
        return None if len(inputs) < 3 else _slice(a, inputs)
    if op == "Reshape":
        return _reshape(node, a, inputs[1])
    if op == "Transpose":
        perm = node.attributes.get("perm")
        return np.transpose(a, perm.as_ints() if perm else None)
    if op == "Expand":
        target = tuple(int(d) for d in inputs[1])  # type: ignore[union-attr]
        return np.broadcast_to(a, np.broadcast_shapes(a.shape, target))
    if op == "Div":
        quotient = np.true_divide(a, inputs[1])  # type: ignore[arg-type]
        return (np.trunc(quotient) if a.dtype.kind in "iu" else quotient).astype(a.dtype)
    if op == "Where":
        return np.asarray(np.where(a, inputs[1], inputs[2]))  # type: ignore[arg-type]
    if op == "Range":
        start, limit, delta = (x.reshape(-1)[0] for x in inputs if x is not None)
        return np.arange(start, limit, delta, dtype=a.dtype)
    fill = node.attributes.get("value")
    value = fill.as_tensor().numpy().reshape(-1)[0] if fill else np.float32(0)
    return np.full(tuple(int(d) for d in a), value)


def _squeeze(node: ir.Node, op: str, inputs: Arrays) -> np.ndarray:
    a, given = inputs[0], node.attributes.get("axes")
    second = inputs[1] if len(inputs) > 1 else None
    axes = [int(x) for x in second] if second is not None else list(given.as_ints()) if given else []
    if op == "Unsqueeze":
        return np.expand_dims(a, tuple(axes))  # type: ignore[arg-type]
    return np.squeeze(a, tuple(axes) if axes else None)  # type: ignore[arg-type]


def _slice(a: np.ndarray, inputs: Arrays) -> np.ndarray:
    starts, ends = inputs[1], inputs[2]
    axes = inputs[3] if len(inputs) > 3 and inputs[3] is not None else np.arange(len(starts))  # type: ignore[arg-type]
    steps = inputs[4] if len(inputs) > 4 and inputs[4] is not None else np.ones(len(starts), np.int64)  # type: ignore[arg-type]
    index: list[slice] = [slice(None)] * a.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps):  # type: ignore[arg-type]
        stop: int | None = int(end)
        if step < 0 and end < -a.shape[axis]:
            stop = None  # python would wrap a very negative end around
        index[int(axis)] = slice(int(start), stop, int(step))
    return a[tuple(index)]


def _reshape(node: ir.Node, a: np.ndarray, target: np.ndarray | None) -> np.ndarray | None:
    if target is None:
        return None
    allow = node.attributes.get("allowzero")
    dims = [int(d) for d in target]
    if not (allow and allow.as_int()):
        dims = [a.shape[i] if d == 0 else d for i, d in enumerate(dims)]
    return a.reshape(dims)


def _reference(node: ir.Node, inputs: Arrays, opset: int) -> list[np.ndarray]:
    from onnx.reference import ReferenceEvaluator

    proto = onnx.NodeProto(op_type=node.op_type)
    proto.input.extend("" if x is None else f"i{i}" for i, x in enumerate(inputs))
    proto.output.extend(f"o{i}" for i, _ in enumerate(node.outputs))
    proto.attribute.extend(ir.serde.serialize_attribute(x) for x in node.attributes.values() if isinstance(x, ir.Attr))
    typed = [
        onnx.helper.make_tensor_value_info(f"i{i}", onnx.helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for i, x in enumerate(inputs)
        if x is not None
    ]
    outs = [onnx.helper.make_empty_tensor_value_info(f"o{i}") for i, _ in enumerate(node.outputs)]
    graph = onnx.helper.make_graph([proto], "g", typed, outs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    feeds = {f"i{i}": x for i, x in enumerate(inputs) if x is not None}
    return list(ReferenceEvaluator(model).run(None, feeds))
