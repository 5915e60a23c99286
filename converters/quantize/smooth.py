"""SmoothQuant: move outliers from activation channels into the weights that read them.

x W = (x / s) (s W) for any positive s [K]. Dividing x is free where its producer can absorb 1/s: the gain and bias of
a LayerNormalization, or the columns of the value projection when x is the attention context. Behind a GELU nothing
absorbs it; there one Mul is inserted, if that pays.

Source: Xiao et al., SmoothQuant, ICML 2023, eq. 4; the value fold as in Wei et al., Outlier Suppression+, 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgetok.converters.quantize.building import Editor
from edgetok.converters.quantize.linears import Group, Linear, constant, is_float_constant


@dataclass(frozen=True, eq=False)
class Fold:
    """Where 1/s can go.

    Args:
        kind: "norm" (LayerNormalization), "value" (value projection) or "insert" (a new Mul).
        node: the node that absorbs it; None for "insert".
        linear: the value projection, for "value".
        offset: first column of v in a packed projection.
    """

    kind: str
    node: ir.Node | None = None
    linear: Linear | None = None
    offset: int = 0

    @property
    def label(self) -> str:
        return "inserted" if self.node is None else f"folded into {self.node.name}"


def find_fold(group: Group, producers: dict[int, Linear]) -> Fold:
    """Find what can absorb a scale of the group's input.

    Args:
        group: linears reading one activation.
        producers: linears by id of the value that carries their result (after the bias).
    """
    readers = {id(linear.node) for linear in group.linears}
    node = group.x.producer()
    free = node is not None and not group.x.is_graph_output() and all(id(u.node) in readers for u in group.x.uses())
    if node is None or not free:
        return Fold("insert")
    if node.op_type == "LayerNormalization" and node.domain == "" and _last_axis(node):
        scale, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
        if is_float_constant(scale, 1) and (bias is None or is_float_constant(bias, 1)):
            return Fold("norm", node)
    value = _value_projection(group.x, producers)
    return Fold("insert") if value is None else Fold("value", value[0].node, *value)


def _last_axis(node: ir.Node) -> bool:
    axis = node.attributes.get("axis")
    rank = None if node.inputs[0] is None or node.inputs[0].shape is None else len(node.inputs[0].shape)
    return axis is None or axis.value == -1 or (rank is not None and axis.value == rank - 1)


def _value_projection(x: ir.Value, producers: dict[int, Linear]) -> tuple[Linear, int] | None:
    """Walk context <- Reshape <- Transpose <- MatMul(probs, v) <- Transpose <- Reshape <- linear."""
    width = None
    value: ir.Value | None = x
    for op in ("Reshape", "Transpose", "MatMul", "Transpose", "Reshape"):
        node = value.producer() if value is not None else None
        if node is None or node.op_type != op or node.domain != "":
            return None
        if value is not x and len(value.uses()) != 1:  # type: ignore[union-attr]
            return None
        if op == "Transpose" and list(node.attributes["perm"].value) != [0, 2, 1, 3]:
            return None
        if op == "Reshape" and not _const_shape(node.inputs[1]):
            return None
        if op == "Reshape":
            dims = constant(node.inputs[1])  # type: ignore[arg-type]
            if value is x:
                width = int(dims[-1])
            elif len(dims) != 4 or min(dims[-2:]) <= 0 or int(dims[-2] * dims[-1]) != width:
                return None
        value = node.inputs[1 if op == "MatMul" else 0]
    return None if value is None or width is None else _through_split(value, width, producers)


def _through_split(value: ir.Value, width: int, producers: dict[int, Linear]) -> tuple[Linear, int] | None:
    offset = 0
    node = value.producer()
    if len(value.uses()) != 1 or value.is_graph_output() or node is None:
        return None
    if node.op_type == "Split":
        axis = node.attributes.get("axis")
        linear = producers.get(id(node.inputs[0]))
        index = list(node.outputs).index(value)
        if axis is None or axis.value not in (-1, 2) or linear is None or linear.shape[1] != width * len(node.outputs):
            return None
        if (
            len(node.inputs) > 1
            and node.inputs[1] is not None
            and (not _const_shape(node.inputs[1]) or set(constant(node.inputs[1]).tolist()) != {width})
        ):
            return None
        return linear, index * width
    linear = producers.get(id(value))
    if linear is None or linear.shape[1] != width:
        return None
    return linear, offset


def _const_shape(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and value.const_value.dtype == ir.DataType.INT64


def smoothing_scale(low: np.ndarray, high: np.ndarray, weights: list[np.ndarray], alpha: float) -> np.ndarray:
    """s_k = max|x_k|^alpha / max|w_k|^(1 - alpha), scaled to geometric mean 1; 1 for dead channels.

    Args:
        low, high: [K], extremes of the activation.
        weights: matrices [K, N] reading it.
        alpha: migration strength, above 0 to 1.

    Returns:
        [K] float32.
    """
    x = np.maximum(np.abs(low), np.abs(high)).astype(np.float64)
    w = np.max([np.abs(m).max(1) for m in weights], axis=0).astype(np.float64)
    alive = (x > 1e-8) & (w > 1e-8)
    s = np.ones_like(x)
    if alive.any():
        s[alive] = x[alive] ** alpha / w[alive] ** (1 - alpha)
        s[alive] /= np.exp(np.log(s[alive]).mean())
    return np.clip(s, 1e-3, 1e3).astype(np.float32)


def apply_fold(editor: Editor, fold: Fold, group: Group, s: np.ndarray) -> None:
    """Divide the group's input by s and multiply its weights' rows; the float function stays the same."""
    if fold.kind == "norm" and fold.node is not None:
        _scale_norm(editor, fold.node, s)
    elif fold.kind == "value" and fold.linear is not None:
        _scale_columns(editor, fold.linear, s, fold.offset)
    else:
        first = group.linears[0].node
        factor = editor.const(f"{group.name}/smooth", (1 / s).astype(np.float32))
        new = editor.node(first, "Mul", [group.x, factor], f"{group.name}/smoothed").outputs[0]
        new.type, new.shape = ir.TensorType(ir.DataType.FLOAT), group.x.shape
        for linear in group.linears:
            linear.node.replace_input_with(0, new)
            linear.x = new
        group.x = new
    for linear in group.linears:
        set_weight(editor, linear, linear.matrix() * s[:, None])


def set_weight(editor: Editor, linear: Linear, matrix: np.ndarray) -> None:
    """Give the linear a weight of its own; the old initializer stays for others that read it."""
    stored = matrix.T if linear.transposed else matrix
    linear.weight = editor.const(f"{linear.name}/w", stored.astype(np.float32))
    linear.node.replace_input_with(1, linear.weight)


def set_bias(editor: Editor, linear: Linear, bias: np.ndarray) -> None:
    """Replace the bias of a linear that has one."""
    if linear.bias is None:
        raise ValueError(f"{linear.name} has no bias")
    old, linear.bias = linear.bias, editor.const(f"{linear.name}/b", bias.astype(np.float32))
    node = linear.add if linear.add is not None else linear.node
    for i, value in enumerate(node.inputs):
        if value is old:
            node.replace_input_with(i, linear.bias)


def _scale_norm(editor: Editor, node: ir.Node, s: np.ndarray) -> None:
    for i in (1, 2):
        old = node.inputs[i] if len(node.inputs) > i else None
        if old is not None:
            node.replace_input_with(i, editor.const(f"{node.name}/{'gb'[i - 1]}", constant(old) / s))


def _scale_columns(editor: Editor, linear: Linear, s: np.ndarray, offset: int) -> None:
    columns = slice(offset, offset + len(s))
    matrix = linear.matrix()
    matrix[:, columns] /= s
    set_weight(editor, linear, matrix)
    bias = linear.bias_array()
    if bias is not None:
        bias = bias.copy()
        bias[columns] /= s
        set_bias(editor, linear, bias)
