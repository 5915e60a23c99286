"""Target ``onnx``: the last choices for onnxruntime's CPU provider, in standard operators, and the check.

Measured with ``benchmarks/forms.py`` (ViT-S blocks of 257 tokens, one thread, CPU time, onnxruntime 1.31), against the
open form at opset 18 with 3-D MatMul and Add, in fp32 / in static INT8 with float outputs: rows with Gemm 1.01 / 1.04,
opset-23 Attention 1.02 / 1.03, both 1.03 / 1.08, packed q, k, v with Split 0.99 in fp32. At 128 tokens rows gain 1.10
(MiniLM, fp32, ``benchmarks/graph.py``). Rows are used; Attention stays open, so that the graph stays at opset 18 for
every device and a reduction can add log-sizes to its logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import DeduplicateInitializersPass, RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

from edgetok.converters.graph.cleanup import MAX_CHECK_BYTES, without_weights
from edgetok.converters.graph.fold import write_shapes
from edgetok.converters.graph.infer import propagate
from edgetok.converters.graph.match import name_nodes_apart
from edgetok.converters.graph.rows import to_rows
from edgetok.errors import InternalError


@dataclass(frozen=True)
class TargetReport:
    """What the target did.

    Args:
        opset: of the result.
        notes: sentences for people.
        rows: linear layers that run as Gemm on rows.
    """

    opset: int
    notes: tuple[str, ...] = ()
    rows: int = 0


def finish(model: ir.Model, *, rows: bool = True) -> TargetReport:
    """Make the last rewrites for onnxruntime on CPU and check the graph, in place.

    Args:
        model: the graph to write; changed in place.
        rows: run token-wise layers on [B*N,C] with Gemm (see ``graph/rows.py``).

    Raises:
        InternalError: the graph that was made is not valid ONNX.
    """
    count = to_rows(model, propagate(model)) if rows else 0
    RemoveUnusedNodesPass()(model)
    DeduplicateInitializersPass()(model)
    RemoveUnusedOpsetsPass()(model)
    model.graph.sort()
    name_nodes_apart(model.graph)
    write_shapes(model)
    check(model)
    notes = (f"{count} linear layers run as Gemm on rows.",) if count else ()
    return TargetReport(model.opset_imports.get("", 0), notes, count)


def check(model: ir.Model) -> None:
    """Run the onnx checker with full shape inference on the graph.

    Raises:
        InternalError: the graph is not valid ONNX.
    """
    try:
        onnx.checker.check_model(without_weights(model, MAX_CHECK_BYTES), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as exc:
        raise InternalError(f"the converted graph is not valid ONNX: {exc}") from exc
