"""Dynamic INT8: activation scale and zero point from the values themselves, at run time.

Emitted as DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul, standard operators that onnxruntime fuses to
DynamicQuantizeMatMul or MatMulIntegerToFloat. Needs no calibration; samples, if given, are used for smoothing only.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgetok.converters.quantize.building import Editor, take_over
from edgetok.converters.quantize.linears import Group, Linear
from edgetok.converters.quantize.settings import QuantizeSettings
from edgetok.converters.quantize.static_int8 import quantize_weight


def emit(editor: Editor, group: Group, settings: QuantizeSettings) -> None:
    """Replace the group's linears; one DynamicQuantizeLinear serves them all."""
    first = group.linears[0].node
    dynamic = editor.node(first, "DynamicQuantizeLinear", [group.x], f"{group.name}/dynamic", outputs=3)
    for linear in group.linears:
        _emit_one(editor, linear, dynamic, settings)


def _emit_one(editor: Editor, linear: Linear, dynamic: ir.Node, settings: QuantizeSettings) -> None:
    codes, scales = quantize_weight(linear.matrix(), reduce_range=settings.reduce_range)
    node, name = linear.node, linear.name
    q, scale, zero = dynamic.outputs
    weight, weight_scale = editor.const(f"{name}/w_q", codes), editor.const(f"{name}/w_scale", scales)
    weight_zero = editor.const(f"{name}/w_zero", np.zeros(len(scales), np.int8))
    product = editor.node(node, "MatMulInteger", [q, weight, zero, weight_zero], f"{name}/integer").outputs[0]
    cast = editor.node(node, "Cast", [product], f"{name}/cast", {"to": int(ir.DataType.FLOAT)}).outputs[0]
    both = editor.node(node, "Mul", [scale, weight_scale], f"{name}/scales").outputs[0]
    out = editor.node(node, "Mul", [cast, both], f"{name}/scaled").outputs[0]
    if node.op_type == "Gemm" and linear.bias is not None:
        out = editor.node(node, "Add", [out, linear.bias], f"{name}/add").outputs[0]
    take_over(node.outputs[0], out)
