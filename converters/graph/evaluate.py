"""Compute a node from known inputs: small integer tensors that may hold symbols, and plain constants.

Two ways: ``symbolic`` knows the few operators exporters build shapes from, in numpy, on arrays that may hold
``Dim`` objects; ``concrete`` runs any operator once on onnxruntime with every optimisation off, so that a
folded constant is bit for bit what the source model computes at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from edgetok.converters.graph import dims
from edgetok.converters.graph.dims import Dim, Undecidable

Array = np.ndarray
INTEGERS = (np.dtype(np.int64), np.dtype(np.int32), np.dtype(np.bool_), np.dtype(object))
RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}


def tidy(array: Array) -> Array:
    """int64 when no symbol is left in an object array (bool when all are truth values)."""
    if array.dtype != object or any(isinstance(item, Dim) for item in array.reshape(-1)):
        return array
    if array.size and all(isinstance(item, (bool, np.bool_)) for item in array.reshape(-1)):
        return array.astype(np.bool_)
    return array.astype(np.int64)


def _pointwise(function: Callable[..., object]) -> Callable[..., Array]:
    def run(*arrays: Array) -> Array:
        plain = [np.asarray([_item(i) for i in a.reshape(-1)], dtype=object).reshape(a.shape) for a in arrays]
        out = np.frompyfunc(function, len(arrays), 1)(*plain)
        return tidy(np.asarray(out, dtype=object))

    return run


def _item(value: object) -> object:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    return value if isinstance(value, Dim) else int(value)  # type: ignore[call-overload]


def _minmax(a: dims.Size, b: dims.Size, smaller: bool) -> dims.Size:
    return a if dims.less(a, b) == smaller else b


_BINARY: dict[str, Callable[..., Array]] = {
    "Add": _pointwise(dims.add),
    "Sub": _pointwise(dims.sub),
    "Mul": _pointwise(dims.mul),
    "Div": _pointwise(dims.div),
    "Mod": _pointwise(dims.mod),
    "Equal": _pointwise(dims.equal),
    "Less": _pointwise(dims.less),
    "Greater": _pointwise(lambda a, b: dims.less(b, a)),
    "LessOrEqual": _pointwise(lambda a, b: not dims.less(b, a)),
    "GreaterOrEqual": _pointwise(lambda a, b: not dims.less(a, b)),
    "Min": _pointwise(lambda a, b: _minmax(a, b, True)),
    "Max": _pointwise(lambda a, b: _minmax(a, b, False)),
}


def _flat_ints(array: Array) -> list[int]:
    out = []
    for item in array.reshape(-1):
        if isinstance(item, Dim):
            raise Undecidable("a symbol where a number is needed")
        out.append(int(item))
    return out


def _axes(node: ir.Node, inputs: Sequence[Array | None], index: int = 1) -> list[int] | None:
    if "axes" in node.attributes:
        return [int(a) for a in node.attributes["axes"].as_ints()]
    given = inputs[index] if len(inputs) > index else None
    return _flat_ints(given) if given is not None else None


def _slice(node: ir.Node, inputs: Sequence[Array | None]) -> Array:
    data, starts, ends = inputs[0], inputs[1], inputs[2]
    if data is None or starts is None or ends is None:
        raise Undecidable("Slice bounds")
    axes_in = inputs[3] if len(inputs) > 3 else None
    steps_in = inputs[4] if len(inputs) > 4 else None
    axes = _flat_ints(axes_in) if axes_in is not None else list(range(starts.size))
    steps = _flat_ints(steps_in) if steps_in is not None else [1] * starts.size
    index: list[slice] = [slice(None)] * data.ndim
    for axis, start, end, step in zip(axes, _flat_ints(starts), _flat_ints(ends), steps, strict=True):
        size = data.shape[axis]
        if step < 0:
            stop: int | None = end + size if end < 0 else end
            index[axis] = slice(start, None if stop is not None and stop < 0 else stop, step)
        else:
            index[axis] = slice(start, end, step)
    return data[tuple(index)]


def _reshape(node: ir.Node, inputs: Sequence[Array | None]) -> Array:
    data, shape = inputs[0], inputs[1]
    if data is None or shape is None:
        raise Undecidable("Reshape shape")
    wanted = dims.reshape(data.shape, _flat_ints(shape), bool(_int(node, "allowzero", 0)))
    return data.reshape([int(s) for s in wanted if isinstance(s, int)])


def _int(node: ir.Node, name: str, default: int) -> int:
    return int(node.attributes[name].as_int()) if name in node.attributes else default


def _unsqueeze(node: ir.Node, inputs: Sequence[Array | None]) -> Array:
    data, axes = inputs[0], _axes(node, inputs)
    if data is None or axes is None:
        raise Undecidable("Unsqueeze axes")
    rank = data.ndim + len(axes)
    return np.expand_dims(data, tuple(a % rank for a in axes))


def _squeeze(node: ir.Node, inputs: Sequence[Array | None]) -> Array:
    data, axes = inputs[0], _axes(node, inputs)
    if data is None:
        raise Undecidable("Squeeze")
    return np.squeeze(data, None if axes is None else tuple(axes))


def _expand(node: ir.Node, inputs: Sequence[Array | None]) -> Array:
    data, shape = inputs[0], inputs[1]
    if data is None or shape is None:
        raise Undecidable("Expand shape")
    return np.broadcast_to(data, np.broadcast_shapes(data.shape, tuple(_flat_ints(shape))))


def _where(node: ir.Node, inputs: Sequence[Array | None]) -> Array:
    cond, yes, no = inputs
    if cond is None or yes is None or no is None or cond.dtype != np.bool_:
        raise Undecidable("Where condition")
    return tidy(np.where(cond, yes.astype(object), no.astype(object)))


def _reduce_prod(node: ir.Node, inputs: Sequence[Array | None]) -> Array:
    data, axes = inputs[0], _axes(node, inputs)
    if data is None or data.ndim != 1 or axes not in (None, [0], [-1]):
        raise Undecidable("ReduceProd")
    total = dims.product(list(data))
    keep = _int(node, "keepdims", 1)
    return tidy(np.asarray([total] if keep else total, dtype=object))


def _gather(node: ir.Node, inputs: Sequence[Array | None]) -> Array:
    if inputs[0] is None or inputs[1] is None or inputs[1].dtype == object:
        raise Undecidable("Gather index")
    return np.take(inputs[0], inputs[1], axis=_int(node, "axis", 0))


def _concat(node: ir.Node, inputs: Sequence[Array | None]) -> Array:
    arrays = [a for a in inputs if a is not None]
    return tidy(np.concatenate([a.astype(object) for a in arrays], axis=_int(node, "axis", 0)))


def _cast(node: ir.Node, inputs: Sequence[Array | None]) -> Array:
    if inputs[0] is None or _int(node, "to", 0) not in (ir.DataType.INT64, ir.DataType.INT32):
        raise Undecidable("Cast of a symbol")
    return inputs[0]


_RULES: dict[str, Callable[[ir.Node, Sequence[Array | None]], Array]] = {
    "Slice": _slice,
    "Reshape": _reshape,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Expand": _expand,
    "Where": _where,
    "ReduceProd": _reduce_prod,
    "Gather": _gather,
    "Concat": _concat,
    "Cast": _cast,
}


def symbolic(node: ir.Node, inputs: Sequence[Array | None]) -> Array | None:
    """The node's first output on arrays that may hold symbols, or None when it cannot be decided.

    Args:
        node: a node of the ONNX domain.
        inputs: contents; None for an absent optional input. int64, bool, or object arrays holding ``Dim``.
    """
    if node.domain not in ("", "ai.onnx") or any(a is not None and a.dtype not in INTEGERS for a in inputs):
        return None
    try:
        if node.op_type == "Identity":
            return inputs[0]
        rule = _RULES.get(node.op_type)
        if rule is not None:
            return tidy(np.asarray(rule(node, inputs)))
        if node.op_type in _BINARY and len(inputs) == 2 and all(i is not None for i in inputs):
            return _BINARY[node.op_type](*inputs)
        if node.op_type == "Neg" and inputs[0] is not None:
            return _BINARY["Mul"](inputs[0], np.asarray(-1))
    except (Undecidable, ValueError, IndexError, TypeError):
        return None
    return None


def concrete(node: ir.Node, inputs: Sequence[Array | None], opsets: dict[str, int]) -> list[Array] | None:
    """Every output of a node with constant inputs, or None when it cannot be run.

    Args:
        node: no subgraph attributes.
        inputs: one array per input of the node; None for an absent one.
        opsets: domain to version, of the model the node is in.
    """
    if node.op_type in RANDOM or any(
        a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()
    ):
        return None
    quick = _quick(node, inputs)
    if quick is not None:
        return [quick]
    return _run_once(node, inputs, opsets)


def _quick(node: ir.Node, inputs: Sequence[Array | None]) -> Array | None:
    """Pure data movement, in numpy (exact by nature); everything with arithmetic goes to onnxruntime."""
    data = inputs[0] if inputs else None
    if data is None or node.domain not in ("", "ai.onnx"):
        return None
    try:
        if node.op_type == "Transpose":
            perm = node.attributes["perm"].as_ints() if "perm" in node.attributes else None
            return np.transpose(data, perm)
        if node.op_type == "Identity":
            return data
        if node.op_type in ("Reshape", "Unsqueeze", "Squeeze"):
            return _RULES[node.op_type](node, inputs)
        integers = all(a is None or a.dtype in (np.int64, np.bool_) for a in inputs) and data.size <= 64
        if integers and node.op_type in ("Slice", "Gather", "Concat", "Where", "Equal", "Add", "Sub", "Mul"):
            out = symbolic(node, inputs)
            return None if out is None or out.dtype == object else out
    except (Undecidable, ValueError, IndexError):
        return None
    return None


def _run_once(node: ir.Node, inputs: Sequence[Array | None], opsets: dict[str, int]) -> list[Array] | None:
    import onnxruntime as ort

    feeds = {f"i{k}": np.array(a, order="C") for k, a in enumerate(inputs) if a is not None}
    try:
        elements = {k: int(ir.tensor(a).dtype) for k, a in feeds.items()}
        proto = ir.serde.serialize_node(node)
        del proto.input[:]
        proto.input.extend(f"i{k}" if a is not None else "" for k, a in enumerate(inputs))
        outputs = [name for name in proto.output if name]
        graph = onnx.helper.make_graph(
            [proto],
            "fold",
            [onnx.helper.make_tensor_value_info(k, elements[k], a.shape) for k, a in feeds.items()],
            [onnx.ValueInfoProto(name=name) for name in outputs],
        )
        model = onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in opsets.items()], ir_version=10
        )
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return [np.asarray(a) for a in session.run(None, feeds)]
    except Exception:  # an operator that does not run here is simply not folded
        return None
