"""Which reduction methods could serve a graph, and what each would save by the cost model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgetok.converters.graph.blocks import Finding
from edgetok.converters.graph.cost import macs, matching_macs
from edgetok.converters.graph.walk import Reader
from edgetok.errors import EdgeTokError

if TYPE_CHECKING:
    from edgetok.converters.reduce.base import Method

_HAZARDS = {
    "causal": "causal: each token sees only earlier ones, so merging mixes tokens under different masks",
    "rope": "rope: rotary positions are tied to token places, and no merge of rotated keys is established",
    "relative-bias": "relative-bias: the scores carry a bias for each pair of places, which a merge must average",
    "windowed": "windowed: attention runs in windows, which a removal would break",
    "softcap": "softcap: scores are bounded by tanh, so the size of a merged token cannot be added exactly",
    "head-scale": "head-scale: each head scales its scores by a learned factor, which the block record does not hold",
    "parallel": "parallel: attention and MLP read the same input, so nothing lies between them to shorten",
    "gated": "gated: the attention's output is multiplied by another activation before the residual",
    "several-masks": "several-masks: more than one mask or bias is added to the scores",
}


@dataclass(frozen=True)
class MethodRow:
    """One reduction method on one graph.

    Args:
        name: as in `--reduce NAME`.
        applies: whether it can be used as the graph stands.
        reason: why not, or what to know; "" when there is nothing to say.
        removed: share of tokens the estimate is for; 0 when there is none.
        counts: tokens removed by each block in that estimate.
        macs: multiply-accumulates of the blocks after it, matching included.
        macs_ratio: relative to the blocks unreduced.
        speedup: total multiply-accumulates before / after; an upper estimate of what time can gain.
    """

    name: str
    applies: bool
    reason: str = ""
    removed: float = 0.0
    counts: tuple[int, ...] = ()
    macs: int = 0
    macs_ratio: float = 1.0
    speedup: float = 1.0


def hazard_sentence(hazard: str) -> str:
    """A sentence for a hazard's name."""
    return _HAZARDS.get(hazard, hazard)


def method_rows(
    reader: Reader, finding: Finding, tokens: int, mlp_ratio: float, total: int, removed: float
) -> tuple[MethodRow, ...]:
    """A row for each registered reduction method.

    Args:
        reader: the graph, traced.
        finding: its blocks.
        tokens: N at the traced sizes.
        mlp_ratio: of the blocks.
        total: multiply-accumulates of the whole graph for one sample.
        removed: share of tokens to estimate for.
    """
    from edgetok.converters.reduce import METHODS

    rows = []
    for name in METHODS.names():
        try:
            method = METHODS.get(name)
        except EdgeTokError as problem:
            rows.append(MethodRow(name, False, problem.message))
            continue
        reason = why_not(reader, finding, tokens, method)
        note = reason or _note(finding, method)
        if not finding.blocks or tokens <= finding.leading + 1:
            rows.append(MethodRow(name, False, note))
            continue
        counts, cost, before = _estimate(finding, tokens, mlp_ratio, method, removed)
        rows.append(
            MethodRow(name, not reason, note, removed, counts, cost, cost / before,
                      (total / (total - before + cost)) if total > before else before / cost)
        )  # fmt: skip
    return tuple(rows)


def why_not(reader: Reader, finding: Finding, tokens: int, method: Method) -> str:
    """Why a method cannot be used on this graph; "" when it can."""
    if not finding.blocks:
        return "no attention block was found" + (f" ({finding.refused[0].sentence})" if finding.refused else "")
    for block in finding.blocks:
        if block.hazards:
            return f"block {block.index} is {block.hazards[0]} attention; refused unless you insist"
    if tokens <= finding.leading + 1:
        return f"there are {tokens} tokens, {finding.leading} of them protected"
    if "grid" in method.needs and finding.grid is None:
        return "it needs the rows and columns of the patches, and no patch grid was found; give grid=ROWSxCOLUMNS"
    if method.kind == "prune" and (name := _per_token_output(reader, finding, tokens)):
        return f"output {name} has a row for every token, which pruning cannot give back; use --outputs reduced"
    return ""


def _note(finding: Finding, method: Method) -> str:
    """What to know about a method that applies."""
    fused = sorted({b.fused_op for b in finding.blocks if b.fused_op})
    if fused and (method.needs & {"k", "probs"} or method.kind != "prune"):
        return f"attention is fused ({', '.join(fused)}); clean-up opens it"
    if finding.tokens is None:
        return "the token count is open: fix it with --shape"
    return ""


def _per_token_output(reader: Reader, finding: Finding, tokens: int) -> str:
    """The name of an output with one row for each token or patch, or ""."""
    patches = tokens - finding.leading
    for value in reader.model.graph.outputs:
        shape = reader.shape(value)
        if shape is None:
            continue
        on_grid = finding.grid is not None and len(shape) == 4 and patches > 1 and shape[2] * shape[3] % patches == 0
        if tokens in shape[1:-1] or (patches > 1 and patches in shape[1:-1]) or on_grid:
            return value.name or "?"
    return ""


def _estimate(
    finding: Finding, tokens: int, mlp_ratio: float, method: Method, removed: float
) -> tuple[tuple[int, ...], int, int]:
    """Counts per block for a removed share, and the blocks' cost after and before."""
    from edgetok.converters.reduce.schedule import schedule

    layers, first = len(finding.blocks), finding.blocks[0]
    counts = schedule(removed, tokens, finding.leading, layers, method).removed
    before = layers * macs(tokens, tokens, first.width, mlp_ratio)
    total, left = 0, tokens
    for count in counts:
        after = left - count
        inside = method.where in ("input", "module")
        total += macs(after if inside else left, after, first.width, mlp_ratio)
        if count:
            channels = first.head_dim if "k" in method.needs else first.width
            total += matching_macs(left, channels, first.width)
        left = tokens if method.where == "module" else after
    return counts, total, before
