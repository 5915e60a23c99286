"""Move a graph to opset 18: upgrade what is older, downgrade what is newer where the meaning is the same."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnx_ir as ir

from edgetok.converters.graph.match import add_initializer

TARGET = 18
# Newer versions of these changed what they compute, not only the types they accept.
CHANGED_MEANING = {"GroupNormalization", "RoiAlign", "AveragePool", "Resize"}
AXES_AS_INPUT = {
    "ReduceMean",
    "ReduceMax",
    "ReduceMin",
    "ReduceProd",
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceSumSquare",
}


def upgrade(model: ir.Model) -> int:
    """Raise the ONNX opset to 18 in place when it is lower. Returns how many nodes changed form.

    Raises:
        ValueError: when an operator has no conversion.
    """
    version = model.opset_imports.get("", TARGET)
    if version >= TARGET:
        return 0
    if version < 13:
        return _upgrade_by_onnx(model)
    count = 0
    for node in list(model.graph.all_nodes()):
        if node.domain in ("", "ai.onnx"):
            count += _upgrade_node(model, node)
    model.opset_imports[""] = TARGET
    return count


def _upgrade_node(model: ir.Model, node: ir.Node) -> int:
    """13..17 -> 18: reductions take axes as an input, Split names its count; the rest only gained types."""
    if node.op_type in AXES_AS_INPUT and "axes" in node.attributes:
        axes = [int(a) for a in node.attributes.pop("axes").as_ints()]
        name = "axes_" + "_".join(str(a).replace("-", "m") for a in axes)
        existing = model.graph.initializers.get(name)
        node.resize_inputs(2)
        node.replace_input_with(1, existing or add_initializer(model.graph, name, np.asarray(axes, np.int64)))
        return 1
    if node.op_type == "Split" and (len(node.inputs) < 2 or node.inputs[1] is None):
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))
        return 1
    return 0


def _upgrade_by_onnx(model: ir.Model) -> int:
    """Opsets below 13 go through onnx's own converter, initializers and all."""
    before = len(model.graph)
    proto = ir.serde.serialize_model(model)
    converted = ir.serde.deserialize_model(onnx.version_converter.convert_version(proto, TARGET))
    model.graph = converted.graph
    model.opset_imports.update(converted.opset_imports)
    return before


def downgrade(model: ir.Model) -> list[str]:
    """Lower the opset to 18 in place when every node allows it.

    Returns:
        Names of the nodes that need a higher opset, as ``name (op, since opset)``; empty when the graph is at 18.
    """
    version = model.opset_imports.get("", TARGET)
    if version <= TARGET:
        return []
    nodes = [n for n in model.graph.all_nodes() if n.domain in ("", "ai.onnx")]
    refused = [f"{n.name or n.outputs[0].name} ({n.op_type}, {why})" for n in nodes if (why := _needs(n, version))]
    if refused:
        return refused
    for node in nodes:
        _downgrade_node(node)
    model.opset_imports[""] = TARGET
    return []


@functools.cache
def _schema(op_type: str, version: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return None


def _needs(node: ir.Node, version: int) -> str:
    """Why a node cannot be said at opset 18; empty when it can."""
    old, new = _schema(node.op_type, TARGET), _schema(node.op_type, version)
    if old is None:
        return f"since opset {new.since_version}" if new is not None else "unknown operator"
    if new is None or new.since_version <= TARGET:
        return ""
    if node.op_type in CHANGED_MEANING and not _unchanged(node):
        return f"changed meaning in opset {new.since_version}"
    extra = [a for a in node.attributes if a not in old.attributes and not _is_default(node, a, new)]
    if extra:
        return f"attribute {extra[0]} of opset {new.since_version}"
    if len(node.inputs) > old.max_input or len(node.outputs) > old.max_output:
        return f"more operands than opset {old.since_version} has"
    return "" if _old_types(node, old) else f"a type of opset {new.since_version}"


def _unchanged(node: ir.Node) -> bool:
    if node.op_type == "Resize":  # 19 added half_pixel_symmetric and two policies, checked as values
        mode = node.attributes.get("coordinate_transformation_mode")
        return mode is None or mode.as_string() != "half_pixel_symmetric"
    return node.op_type == "AveragePool"


def _is_default(node: ir.Node, name: str, schema: onnx.defs.OpSchema) -> bool:
    default = schema.attributes[name].default_value if name in schema.attributes else None
    return default is not None and onnx.helper.get_attribute_value(default) == node.attributes[name].value


def _old_types(node: ir.Node, schema: onnx.defs.OpSchema) -> bool:
    """True when known input types are among those the old version accepts (bfloat16, float8 and int4 came later)."""
    allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
    for index, value in enumerate(node.inputs):
        if value is None or value.dtype is None or not schema.inputs:
            continue
        formal = schema.inputs[min(index, len(schema.inputs) - 1)]
        kinds = allowed.get(formal.type_str, {formal.type_str})
        if f"tensor({_type_text(value.dtype)})" not in kinds:
            return False
    return True


def _type_text(kind: ir.DataType) -> str:
    return {"FLOAT": "float", "DOUBLE": "double"}.get(kind.name, kind.name.lower())


def _downgrade_node(node: ir.Node) -> None:
    old = _schema(node.op_type, TARGET)
    if old is None:
        return
    for name in [a for a in node.attributes if a not in old.attributes]:
        node.attributes.pop(name)
