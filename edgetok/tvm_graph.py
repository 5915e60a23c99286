"""Make an ONNX graph fit for TVM: one fixed batch, standard operators only, and indices that cannot leave their axis.

TVM's gathers and scatters read and write wherever an index points, so each index that is not a constant is limited
here, and what the caller feeds straight into a lookup is listed for checking before a run.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgetok.errors import ArtifactError, InputError, UnsupportedError

_FUSED = "convert the source model with --target tvm, which keeps attention open and uses standard operators"
_SMALL = 4096  # elements
_FOLDED = frozenset(
    {
        "Add",
        "Cast",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "Div",
        "Equal",
        "Expand",
        "Gather",
        "Greater",
        "Identity",
        "Less",
        "Max",
        "Min",
        "Mul",
        "Neg",
        "Not",
        "Range",
        "ReduceMax",
        "ReduceMin",
        "ReduceProd",
        "ReduceSum",
        "Reshape",
        "Slice",
        "Squeeze",
        "Sub",
        "Transpose",
        "Unsqueeze",
        "Where",
    }
)
# Operator to (position of the indices, whether the last axis of the indices holds coordinates).
_INDEXED = {
    "Gather": (1, False),
    "GatherElements": (1, False),
    "ScatterElements": (1, False),
    "Scatter": (1, False),
    "GatherND": (1, True),
    "ScatterND": (1, True),
}


def static_graph(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """A copy with every open axis of the inputs set to ``batch``, and shapes inferred again.

    Raises:
        InputError: ``batch`` is below 1.
        UnsupportedError: inputs have more than one kind of open axis, or an open axis that is not the first.
    """
    if batch < 1:
        raise InputError(f"the batch must be 1 or more, got {batch}")
    fixed = onnx.ModelProto()
    fixed.CopyFrom(onnx.inliner.inline_local_functions(model) if model.functions else model)
    defaults = {t.name for t in fixed.graph.initializer}
    names: set[str] = set()
    for value in fixed.graph.input:
        if value.name in defaults:
            continue
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.HasField("dim_value"):
                continue
            names.add(dim.dim_param)
            if axis or len(names) > 1:
                name = dim.dim_param or "unnamed"
                raise UnsupportedError(
                    f"axis {axis} of input {value.name!r} ({name}) is open, and TVM needs fixed shapes",
                    where=f"input {value.name!r}",
                    next=f"fix it when converting: --shape {value.name}=...",
                )
            dim.dim_value = batch
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    del fixed.graph.value_info[:]
    _cast_one_hot(fixed.graph)
    fixed = onnx.shape_inference.infer_shapes(fixed, data_prop=True)
    while _fold(fixed):
        del fixed.graph.value_info[:]
        fixed = onnx.shape_inference.infer_shapes(fixed, data_prop=True)
    _limit_indices(fixed.graph)
    return fixed


def _fold(model: onnx.ModelProto) -> bool:
    """Compute small values that no longer depend on an input, now that every axis is fixed; whether there were any."""
    graph, shapes = model.graph, _shapes(model.graph)
    known = {t.name: numpy_helper.to_array(t) for t in graph.initializer if np.prod(t.dims) <= _SMALL}
    outputs = {v.name for v in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        value = None
        if len(node.output) == 1 and node.output[0] not in outputs:
            value = _constant_of(node, shapes, known, model)
        if value is None:
            kept.append(node)
            continue
        known[node.output[0]] = value
        graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
    folded = len(kept) < len(graph.node)
    del graph.node[:]
    graph.node.extend(kept)
    return folded


def _constant_of(
    node: onnx.NodeProto,
    shapes: dict[str, tuple[int, ...]],
    known: dict[str, np.ndarray],
    model: onnx.ModelProto,
) -> np.ndarray | None:
    """The value of a node that depends on nothing but constants and fixed shapes, or None."""
    if node.op_type == "Shape" and node.input[0] in shapes and not node.attribute:
        return np.asarray(shapes[node.input[0]], np.int64)
    size = np.prod(shapes.get(node.output[0], (_SMALL + 1,)))
    if node.op_type not in _FOLDED or size > _SMALL or not all(n in known or not n for n in node.input):
        return None
    opsets = {o.domain: o.version for o in model.opset_import}
    graph = helper.make_graph([node], "fold", [], [helper.make_empty_tensor_value_info(node.output[0])])
    feeds = {n: known[n] for n in node.input if n}
    graph.input.extend(helper.make_empty_tensor_value_info(n) for n in feeds)
    try:
        value: Any = ReferenceEvaluator(graph, opsets=opsets).run(None, feeds)
        return np.asarray(value[0])
    except Exception:  # a node that cannot be computed stays where it is, and TVM says what is wrong with it
        return None


def _cast_one_hot(graph: onnx.GraphProto) -> None:
    """Cast what OneHot gives to the type of its values: TVM's front end makes float64 of float32."""
    types = {t.name: t.data_type for t in graph.initializer}
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type == "OneHot" and node.input[2] in types:
            name, node.output[0] = node.output[0], f"{node.output[0]}/wide"
            cast = helper.make_node("Cast", [node.output[0]], [name], to=types[node.input[2]])
            nodes.append(cast)
    del graph.node[:]
    graph.node.extend(nodes)


# Rules of the front end that give another answer than ONNX (by the ONNX node tests), or that read an operator of
# onnxruntime's domain under a standard name.
_WRONG = {
    "AllClassNMS",
    "Attention",
    "BiasGelu",
    "BitShift",
    "ConcatFromSequence",
    "EmbedLayerNormalization",
    "FastGelu",
    "IsInf",
    "Mish",
    "NonMaxSuppression",
    "Optional",
    "OptionalGetElement",
    "OptionalHasElement",
    "RoiAlign",
    "SequenceAt",
    "SequenceConstruct",
    "SequenceEmpty",
    "SequenceErase",
    "SequenceInsert",
    "SequenceLength",
    "SkipLayerNormalization",
    "SpaceToDepth",
    "SplitToSequence",
}
_DTYPES = {"bool", "float16", "float32", "float64"} | {f"{s}int{b}" for s in ("", "u") for b in (8, 16, 32, 64)}


@cache
def operators() -> frozenset[str]:
    """Operators of the standard domain that TVM's ONNX front end converts right."""
    from tvm.relax.frontend.onnx import onnx_frontend

    return frozenset(onnx_frontend._get_convert_map()) - _WRONG


def _check_type(elem_type: int, name: str) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(elem_type).name if elem_type else "no tensor"
    if dtype not in _DTYPES:
        raise UnsupportedError(f"TVM does not take {name!r}: {dtype}", next="use --precision int8 or keep")


def check_graph(model: onnx.ModelProto) -> None:
    """Refuse by name what TVM cannot take.

    Raises:
        UnsupportedError: an operator without a rule, a TopK whose count is not constant, a type it lacks.
    """
    constants = {t.name for t in model.graph.initializer}
    constants |= {n.output[0] for n in model.graph.node if n.op_type == "Constant"}
    for node in model.graph.node:
        where = f"node {node.name!r}"
        if node.domain not in ("", "ai.onnx") or node.op_type not in operators():
            name = f"{node.domain or 'ai.onnx'}.{node.op_type}"
            raise UnsupportedError(f"TVM's ONNX front end has no {name} ({where})", where=where, next=_FUSED)
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            raise UnsupportedError(
                f"a graph with branches or loops is not compiled ({where})", where=where, next=_FUSED
            )
        if node.op_type == "LayerNormalization" and any(node.output[1:]):
            raise UnsupportedError(f"TVM gives only the first output of LayerNormalization ({where})", where=where)
        if node.op_type == "TopK" and node.input[1] not in constants:
            raise UnsupportedError(f"TVM needs a constant TopK count ({where})", where=where, next=_FUSED)
    for tensor in model.graph.initializer:
        if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
            raise UnsupportedError(
                f"TVM does not read 4-bit weights ({tensor.name!r})", next="use --precision int8 or keep"
            )


def _shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    """Name to shape of every value whose shape is known in full."""
    found = {t.name: tuple(t.dims) for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            found.setdefault(value.name, tuple(d.dim_value for d in dims))
    return found


def _constants(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    found = {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = node.attribute[0].t
    return {name: numpy_helper.to_array(t) for name, t in found.items() if t.data_type in (6, 7)}  # int32, int64


def index_limits(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> np.ndarray | None:
    """Sizes of the axes that the indices of a node run over: scalar, or one per coordinate; None when not indexed.

    Raises:
        UnsupportedError: a shape is not known.
    """
    if node.op_type not in _INDEXED:
        return None
    position, coordinates = _INDEXED[node.op_type]
    attributes = {a.name: a.i for a in node.attribute}
    data, indices = shapes.get(node.input[0]), shapes.get(node.input[position])
    if data is None or (coordinates and not indices):
        raise UnsupportedError(
            f"TVM needs fixed shapes, and that of {node.input[0]!r} is not known (node {node.name!r})", next=_FUSED
        )
    if not coordinates:
        return np.asarray(data[attributes.get("axis", 0)], np.int64)
    first = attributes.get("batch_dims", 0)
    count = indices[-1] if indices else 0
    return np.asarray(data[first : first + count], np.int64)


def _limit_indices(graph: onnx.GraphProto) -> None:
    """Refuse constant indices outside their axis, and limit computed ones to it."""
    shapes, constants = _shapes(graph), _constants(graph)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        limits = index_limits(node, shapes)
        if limits is not None:
            position = _INDEXED[node.op_type][0]
            name = node.input[position]
            if name in constants:
                if ((constants[name] < -limits) | (constants[name] >= limits)).any():
                    raise ArtifactError(f"a constant index leaves its axis (node {node.name!r})", where=name)
            else:
                nodes.extend(_clamp(graph, name, limits, tag := f"{name}/in_range_{len(nodes)}"))
                node.input[position] = tag
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _clamp(graph: onnx.GraphProto, name: str, limits: np.ndarray, out: str) -> list[onnx.NodeProto]:
    """Nodes that give ``out``: ``name`` as int64, held to -limits .. limits - 1."""
    graph.initializer.append(numpy_helper.from_array(-limits, f"{out}/low"))
    graph.initializer.append(numpy_helper.from_array(limits - 1, f"{out}/high"))
    return [
        helper.make_node("Cast", [name], [f"{out}/wide"], to=onnx.TensorProto.INT64),
        helper.make_node("Max", [f"{out}/wide", f"{out}/low"], [f"{out}/above"]),
        helper.make_node("Min", [f"{out}/above", f"{out}/high"], [out]),
    ]


def lookup_inputs(graph: onnx.GraphProto) -> dict[str, int]:
    """Inputs that are looked up in a table as they come (token ids): name to the smallest table's size."""
    shapes = _shapes(graph)
    origin = {v.name: v.name for v in graph.input}
    found: dict[str, int] = {}
    for node in graph.node:
        source = origin.get(node.input[0], "") if node.input else ""
        if node.op_type in ("Cast", "Max", "Min") and source:  # of the model, or of _clamp
            origin[node.output[0]] = source
        elif node.op_type in ("Gather", "GatherElements") and node.input[1] in origin:
            name, limits = origin[node.input[1]], index_limits(node, shapes)
            size = 0 if limits is None else int(limits)
            found[name] = min(found.get(name, size), size)
    return found
