"""What a conversion would do, from the graph alone: ``convert --dry-run`` runs and writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from edgetok.converters.graph.blocks import Finding
from edgetok.converters.reduce.apply import resolve
from edgetok.converters.reduce.schedule import removed_share, tokens_per_layer, total_macs
from edgetok.converters.reduce.spec import ReduceSpec
from edgetok.stages import Feeds

if TYPE_CHECKING:
    from edgetok.conversion import Conversion

# Bits kept per weight of a linear layer. int4: 4 bits, and for each 32 of them a float scale and a zero point.
_BITS = {"keep": 32.0, "fp16": 16.0, "int8": 8.0, "int8-dynamic": 8.0, "int4": 4 + (32 + 8) / 32}
# Peak memory of a conversion: interpreter and libraries, and the graph's weights held by the source, the stage being
# written and the four stages being timed (0.93 GB measured for ViT-S; an estimate, never a gate).
_BASE_BYTES = 160 << 20
_COPIES = 8


@dataclass(frozen=True)
class ReductionPlan:
    """Counts a named method would remove.

    Args:
        counts: tokens removed by each block.
        per_layer: tokens entering each block's MLP.
        removed: share of tokens removed over the network.
        flops: of the blocks, as a share of before.
    """

    counts: tuple[int, ...]
    per_layer: tuple[int, ...]
    removed: float
    flops: float


def plan_reduction(spec: ReduceSpec, finding: Finding, counts: tuple[int, ...] | None) -> ReductionPlan | None:
    """Counts per layer; None when a trial would have to choose, or the number of tokens is open.

    Raises:
        InputError: settings that do not fit this network.
    """
    if spec.method is None or not finding.tokens or not finding.blocks:
        return None
    method, _, planned = resolve(spec, finding, counts)
    where, tokens, width = method.where, finding.tokens, finding.blocks[0].width
    none = total_macs([0] * len(planned.removed), tokens, width)
    return ReductionPlan(
        tuple(planned.removed),
        tokens_per_layer(planned.removed, tokens, where=where),
        removed_share(planned.removed, tokens, where=where),
        total_macs(planned.removed, tokens, width, where=where) / none,
    )


def planned_bytes(model: ir.Model, precision: str) -> tuple[int, int]:
    """(bytes of all weights now, estimate at ``precision``); linear layers shrink, fp16 shrinks all."""
    before, after = 0, 0.0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            continue
        before += tensor.nbytes
        linear = precision == "fp16" or any(node.op_type in ("MatMul", "Gemm") and i == 1 for node, i in value.uses())
        small = linear and tensor.dtype == ir.DataType.FLOAT and (precision == "fp16" or len(tensor.shape) == 2)
        after += tensor.nbytes * (_BITS[precision] / 32 if small else 1.0)
    return before, round(after)


def planned_memory(weight_bytes: int, samples: list[Feeds]) -> int:
    """Estimate of the conversion's peak memory, bytes."""
    return _BASE_BYTES + _COPIES * weight_bytes + sum(a.nbytes for s in samples for a in s.values())


def plan(conversion: Conversion) -> None:
    """Say what would be done and note it in the report.

    Raises:
        InputError: settings of the reduction that do not fit this network.
    """
    c = conversion
    spec, precision = c.spec(), c.options.precision
    if c.wants_reduction() and spec is not None:
        _plan_tokens(c, spec)
    before, after = planned_bytes(c.model, precision)
    c.say("plan", f"precision {precision}, weights {before / 1e6:.1f} -> about {after / 1e6:.1f} MB")
    samples = [*c.calib, *c.held]
    memory = planned_memory(before, samples)
    c.say("plan", f"{len(samples)} samples, about {memory / 1e9:.1f} GB of memory at the peak")
    c.say("plan", f"to {c.options.output}; nothing was run or written")
    c.report.plan = {"output": str(c.options.output), "weight_bytes": after, "memory_bytes": memory}


def _plan_tokens(c: Conversion, spec: ReduceSpec) -> None:
    planned = plan_reduction(spec, c.finding, c.options.counts)
    if planned is None:
        c.say("plan", f"remove {spec.text}: method and schedule by trial on {len(c.calib)} samples")
        return
    tokens, last = c.finding.tokens, planned.per_layer[-1]
    c.say(
        "plan",
        f"{spec.method}, {tokens} -> {last} tokens, removed {100 * planned.removed:.0f} %, "
        f"FLOPs of the blocks {100 * planned.flops:.0f} %",
    )
    c.say("plan", f"removed per block: {', '.join(map(str, planned.counts))}")
    c.report.tokens = {
        "before": tokens, "after": last, "removed": planned.removed, "per_layer": list(planned.per_layer),
    }  # fmt: skip
    c.report.reduce = {"method": spec.method, "settings": spec.text, "counts": list(planned.counts)}
