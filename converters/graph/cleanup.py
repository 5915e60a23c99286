"""Bring an exporter's graph to one plain form: fixed sizes, folded constants, known operators, opset 18."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    InlinePass,
    LiftConstantsToInitializersPass,
    RemoveInitializersFromInputsPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)

from edgetok.converters.graph import (
    branches,
    flatten,
    fold,
    fused,
    gelu,
    grids,
    layernorm,
    linear,
    noops,
    openform,
    opset,
    scales,
)
from edgetok.converters.graph.infer import Facts, propagate
from edgetok.converters.graph.match import name_nodes_apart
from edgetok.converters.graph.shapes import fix_shapes

MAX_ROUNDS = 8


@dataclass(frozen=True)
class PassCount:
    """What one pass did: its name, how often, and a sentence for people."""

    name: str
    count: int
    sentence: str


@dataclass(eq=False)
class CleanupReport:
    """What the clean-up did.

    Args:
        passes: every pass that changed something, in order of first use.
        nodes_before, nodes_after: of the main graph.
        opset: the ONNX opset of the result.
        higher_opset: nodes that keep the graph above opset 18, with the reason.
        notes: sentences about what was left as it is.
    """

    passes: list[PassCount] = field(default_factory=list)
    nodes_before: int = 0
    nodes_after: int = 0
    opset: int = 0
    higher_opset: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def modified(self) -> bool:
        return any(p.count for p in self.passes)

    def count(self, name: str) -> int:
        """How often the pass ``name`` did something."""
        return sum(p.count for p in self.passes if p.name == name)

    def add(self, name: str, count: int, sentence: str) -> None:
        """Add to a pass's count; ``sentence`` holds one ``{n}``."""
        total = self.count(name) + count
        self.passes = [p for p in self.passes if p.name != name or not count]
        if count:
            self.passes.append(PassCount(name, total, sentence.format(n=total)))


def clean_up(model: ir.Model, shapes: Mapping[str, Sequence[int | str]] | None = None) -> CleanupReport:
    """Clean the graph in place; the answers stay those of the source up to rounding.

    Args:
        model: any opset; local functions are inlined.
        shapes: input name to sizes (see ``fix_shapes``); the batch stays symbolic unless fixed here.

    Returns:
        What was done, pass by pass.

    Raises:
        InputError: sizes that contradict the graph.
    """
    report = CleanupReport(nodes_before=len(model.graph))
    model.graph.meta.pop("edgetok.names", None)
    ranks = {v: len(v.shape) for v in model.graph.outputs if v.shape is not None}
    _prepare(model, shapes, report)
    for _ in range(MAX_ROUNDS):
        if not _round(model, report):
            break
    _finish(model, report)
    for value, rank in ranks.items():
        if value.shape is None:  # inference did not reach it; a graph output needs a rank
            value.shape = ir.Shape([None] * rank)
    model.graph.meta.pop("edgetok.names", None)
    report.nodes_after = len(model.graph)
    return report


def _prepare(model: ir.Model, shapes: Mapping[str, Sequence[int | str]] | None, report: CleanupReport) -> None:
    RemoveInitializersFromInputsPass()(model)
    changed = fix_shapes(model, shapes)
    report.add("shapes", len(changed), "Fixed the sizes of {n} inputs: " + "; ".join(changed) + ".")
    if model.functions:
        calls = sum(n.op_identifier() in model.functions for n in model.graph.all_nodes())
        InlinePass()(model)
        report.add("inline", calls, "Inlined {n} calls of local functions.")
    report.add("constants", _lift_constants(model), "Turned {n} Constant nodes into initializers.")
    report.add("opset", opset.upgrade(model), "Rewrote {n} nodes for opset 18.")


def _lift_constants(model: ir.Model) -> int:
    before = len(model.graph)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return before - len(model.graph)


Step = tuple[str, Callable[[ir.Model, Facts], int], str]

STEPS: tuple[Step, ...] = (
    ("branches", branches.inline_branches, "Replaced {n} If nodes by the branch they always take."),
    ("fused", fused.open_fused, "Opened {n} fused nodes into elementary operators."),
    ("fold", fold.fold_constants, "Computed {n} values that depend only on constants and fixed sizes."),
    ("reshape", fold.fold_reshapes, "Gave {n} Reshape nodes a constant target."),
    ("sizes", fold.fold_symbolic_shapes, "Rebuilt {n} size operands from one Shape node."),
    ("spread", fold.fold_spread, "Used {n} constants in place of their copies over the batch."),
    ("noop", noops.drop_noops, "Removed {n} nodes that change nothing."),
    ("views", noops.merge_views, "Merged {n} chained Transpose or Reshape nodes."),
    ("gemm", linear.open_gemm, "Opened {n} Gemm nodes into MatMul and Add."),
    ("flatten", flatten.sink_flatten, "Moved {n} flattenings of tokens behind the layers they fed."),
    ("layernorm", layernorm.fuse_layernorm, "Recognised {n} layer normalizations."),
    ("gelu", lambda model, facts: gelu.normalize_gelu(model), "Rewrote {n} GELUs into the form onnxruntime fuses."),
    ("batchnorm", lambda model, facts: linear.fold_batchnorm(model), "Folded {n} batch normalizations into weights."),
    ("scale", scales.merge_scales, "Merged the attention scale of {n} blocks into one factor."),
    ("layerscale", lambda model, facts: linear.fold_layer_scale(model), "Folded {n} channel factors into weights."),
    ("mask", grids.open_grids, "Recognised {n} gathered masks as views."),
    ("mask-and", grids.drop_broadcast_and, "Dropped {n} constant all-true masks."),
    ("guard", openform.drop_nan_guards, "Dropped {n} guards against NaN that cannot arise."),
    ("attention", openform.open_form, "Brought {n} attentions to the open form."),
)


def _round(model: ir.Model, report: CleanupReport) -> bool:
    """Apply every step once, on facts that are found again after each change. True when something changed."""
    changed = False
    facts = _learn(model)
    for name, step, sentence in STEPS:
        count = step(model, facts)
        report.add(name, count, sentence)
        if count:
            changed = True
            RemoveUnusedNodesPass()(model)
            facts = _learn(model)
    return changed


def _learn(model: ir.Model) -> Facts:
    """Infer, and store types and shapes on the values, where the passes look for them."""
    facts = propagate(model)
    fold.write_shapes(model, facts)
    return facts


def _finish(model: ir.Model, report: CleanupReport) -> None:
    before = len(model.graph.initializers)
    DeduplicateInitializersPass()(model)
    report.add("initializers", before - len(model.graph.initializers), "Removed {n} repeated constants.")
    before = len(model.graph)
    CommonSubexpressionEliminationPass()(model)
    report.add("duplicates", before - len(model.graph), "Merged {n} nodes that computed the same value.")
    model.graph.sort()
    fold.write_shapes(model)
    report.higher_opset = tuple(opset.downgrade(model))
    RemoveUnusedNodesPass()(model)
    RemoveUnusedOpsetsPass()(model)
    name_nodes_apart(model.graph)
    report.opset = model.opset_imports.get("", 0)


MAX_CHECK_BYTES = 4096


def without_weights(model: ir.Model, limit: int) -> onnx.ModelProto:
    """The model as a proto whose initializers above ``limit`` bytes are inputs, so that checking copies no weights."""
    graph = model.graph
    everything = list(graph.initializers.values())
    big = {v: v.const_value for v in everything if v.const_value is not None and v.const_value.nbytes > limit}
    inputs = list(graph.inputs)
    try:
        for value in big:
            graph.initializers.pop(value.name or "")
            value.const_value = None
            graph.inputs.append(value)
        return ir.serde.serialize_model(model)
    finally:
        graph.inputs.clear()
        graph.inputs.extend(inputs)
        graph.initializers.clear()
        for value in everything:
            value.const_value = big.get(value, value.const_value)
            graph.register_initializer(value)
