"""Embedding tables to 8 bits: Gather reads s8 rows and their scales, and the rows are multiplied out.

Only the rows that are looked up are expanded, so this costs nothing to speak of and takes a table to a quarter.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgetok.converters.quantize.building import Editor, take_over
from edgetok.converters.quantize.linears import constant, is_float_constant, protected
from edgetok.converters.quantize.settings import LayerRecord

MIN_BYTES = 1 << 20


def quantize_tables(editor: Editor) -> list[LayerRecord]:
    """Replace Gather(table, ids) on axis 0 for tables of at least 1 MiB that only Gathers read."""
    records = []
    for node in list(editor.graph):
        if node.op_type != "Gather" or node.domain != "" or protected(node):
            continue
        table, axis = node.inputs[0], node.attributes.get("axis")
        if not is_float_constant(table, 2) or table is None or (axis is not None and axis.value != 0):
            continue
        if table.const_value is None or table.const_value.nbytes < MIN_BYTES or not _only_gathers(table):
            continue
        records.append(_emit(editor, node, table))
    return records


def _only_gathers(table: ir.Value) -> bool:
    return all(use.node.op_type == "Gather" and use.idx == 0 for use in table.uses()) and not table.is_graph_output()


def _emit(editor: Editor, node: ir.Node, table: ir.Value) -> LayerRecord:
    rows = constant(table)
    peak = np.abs(rows).max(1, keepdims=True)
    scale = np.where(peak > 0, peak / 127, 1).astype(np.float32)
    codes = np.clip(np.rint(rows / scale), -127, 127).astype(np.int8)
    error = float(np.linalg.norm(codes * scale - rows) / max(float(np.linalg.norm(rows)), 1e-30))
    name = node.name or "table"
    ids = node.inputs[1]
    picked = editor.node(node, "Gather", [editor.const(f"{name}/rows_q", codes), ids], f"{name}/q", {"axis": 0})
    factor = editor.node(node, "Gather", [editor.const(f"{name}/row_scale", scale), ids], f"{name}/s", {"axis": 0})
    cast = editor.node(node, "Cast", [picked.outputs[0]], f"{name}/cast", {"to": int(ir.DataType.FLOAT)})
    out = editor.node(node, "Mul", [cast.outputs[0], factor.outputs[0]], f"{name}/rows").outputs[0]
    take_over(node.outputs[0], out)
    shape = (int(rows.shape[0]), int(rows.shape[1]))
    return LayerRecord(name, "Gather", "int8-table", shape, 0, error=error)
