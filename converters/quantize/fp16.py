"""FP16 storage: float weights are stored in half the bytes and cast to float32; onnxruntime folds the casts at load.

The arithmetic stays float32: this saves disk, not time or memory.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgetok.converters.quantize.building import Editor
from edgetok.converters.quantize.linears import constant, is_float_constant
from edgetok.converters.quantize.settings import REDUCE_PREFIX, LayerRecord, OnStep, QuantizeReport

_MIN_ELEMENTS = 64
_MAX = float(np.finfo(np.float16).max)


def store_fp16(editor: Editor, on_step: OnStep | None = None) -> QuantizeReport:
    """Store every float initializer of 64 elements or more as fp16 + Cast; those that do not fit stay float32."""
    records, notes = [], []
    values = [v for v in editor.graph.initializers.values() if is_float_constant(v) and not v.is_graph_output()]
    values = [v for v in values if v.const_value is not None and v.const_value.size >= _MIN_ELEMENTS]
    order = {id(node): i for i, node in enumerate(editor.graph)}
    for i, value in enumerate(values):
        array = constant(value)
        users = [u.node for u in value.uses()]
        name = value.name or "?"
        if (
            not users
            or any((n.name or "").startswith(REDUCE_PREFIX) for n in users)
            or any(id(n) not in order for n in users)
        ):
            continue
        shape = (int(array.shape[0]), int(array.size // array.shape[0]))
        if not float(np.abs(array).max()) <= _MAX:
            notes.append(f"{name} holds values beyond fp16 and stays float32")
            records.append(LayerRecord(name, "Initializer", "float", shape, 0, reason="beyond the range of fp16"))
            continue
        half = array.astype(np.float16)
        error = float(np.linalg.norm(half.astype(np.float32) - array) / max(float(np.linalg.norm(array)), 1e-30))
        first = min(users, key=lambda n: order[id(n)])
        stored = editor.const(f"{name}/fp16", half)
        cast = editor.node(first, "Cast", [stored], f"{name}/fp32", {"to": int(ir.DataType.FLOAT)}).outputs[0]
        cast.type, cast.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(array.shape)
        value.replace_all_uses_with(cast)
        records.append(LayerRecord(name, "Initializer", "fp16", shape, 0, error=error))
        if on_step:
            on_step("write fp16", i + 1, len(values))
    kept = tuple(r.name for r in records if r.precision == "float")
    return QuantizeReport("fp16", tuple(records), kept, notes=tuple(notes))
