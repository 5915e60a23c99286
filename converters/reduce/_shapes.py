"""Shapes after a reduction: baked token counts are freed, stale shapes forgotten and found again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from edgetok.converters.reduce._builder import Dim
from edgetok.converters.reduce._tail import Stream, const
from edgetok.errors import UnsupportedError


def set_dims(value: ir.Value, shape: Sequence[Dim]) -> None:
    """Write a shape we know into a value."""
    value.shape = ir.Shape(list(shape))


def release_baked_counts(stream: Stream, tokens: int) -> None:
    """Let Reshape nodes inside the blocks copy the token axis instead of naming its old size.

    An entry equal to the token count, whose input axis has that size too, becomes 0 ("copy"). That says the same
    for the old graph whatever the axis means, so a head size that happens to equal the count does no harm.
    """
    for node in list(stream.inside):
        if node.op_type != "Reshape" or node.outputs[0] not in stream.segments:
            continue
        target, source = const(node.inputs[1]), node.inputs[0]
        if target is None or source is None or source.shape is None or _allowzero(node):
            continue
        fixed = [
            0 if t == tokens and i < len(source.shape) and source.shape[i] == tokens else int(t)
            for i, t in enumerate(target)
        ]
        if fixed != [int(t) for t in target] and node.graph is not None:
            name = f"{node.name}/shape_free"
            value = ir.Value(
                name=name,
                type=ir.TensorType(ir.DataType.INT64),
                shape=ir.Shape([len(fixed)]),
                const_value=ir.tensor(np.array(fixed, np.int64), name=name),
            )
            node.graph.register_initializer(value)
            node.replace_input_with(1, value)


def _allowzero(node: ir.Node) -> bool:
    attribute = node.attributes.get("allowzero")
    return attribute is not None and attribute.as_int() != 0


def shapes_again(model: ir.Model, reduced: Sequence[ir.Value], expected: Mapping[ir.Value, int]) -> None:
    """Forget the shapes of what depends on the reduced values and infer them.

    Raises:
        UnsupportedError: inference contradicts the promised token counts.
    """
    outputs = set(model.graph.outputs)
    stale = set(reduced)
    for node in model.graph:
        if any(v in stale for v in node.inputs):
            stale.update(node.outputs)
    for value in stale - outputs:
        value.shape = None
    ShapeInferencePass()(model)
    for value, tokens in expected.items():
        if (
            value.shape is not None
            and len(value.shape) == 3
            and isinstance(value.shape[1], int)
            and value.shape[1] != tokens
        ):
            raise UnsupportedError(
                f"{tokens} tokens were promised, {value.shape[1]} would come",
                where=value.name,
                next="the graph fixes its token count somewhere; clean it up first, or report it with edgetok inspect",
            )
