"""What the block finder says about a graph: plain records, no logic."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True, eq=False)
class Block:
    """One self-attention block on the main token stream.

    Axes: B batch, H heads, N tokens, D width (channels), Dh head width of q and k, Dv of v.

    Args:
        index: position in the network, from 0.
        name: a name for people (a scope of the exporter when it has one, else the anchor node's name).
        heads, head_dim, v_dim, width, tokens: H, Dh, Dv, D, N; N is None when the graph leaves it open.
        scale: what q k^T is multiplied by before the softmax.
        q, k, v: [B,H,N,Dh], [B,H,N,Dh], [B,H,N,Dv] before any scaling; None where only a fused node has them.
        k_layout: axes of k as the graph has it: "BHND"; "BNHD" when the graph goes from [B,N,H,Dh] straight to the
            transposed [B,H,Dh,N] (the usual eager export, and the canonical form); "BHDN"; or "BNC" ([B,N,H*Dh]).
        q_layout, v_layout: the same for q and v; almost always "BHND".
        mask_keeps: for a boolean mask, whether True means "may be seen" (else True means "hidden").
        logits: the softmax input (scaled, masked); None for fused nodes.
        probs: the softmax output [B,H,N,N]; None for fused nodes.
        context: attention output before the output projection, as the graph has it: [B,N,H*Dv]; or
            [B,N,H,Dv] when it is flattened to [B*N,H*Dv] at once.
        anchor: the Softmax node, or the fused attention node.
        x_in: residual stream entering the block [B,N,D].
        x_attn: insertion point of a reduction [B,N,D]: the residual Add's output (pre-LN), or the output of the
            LayerNormalization after it (post-LN). The MLP and the second residual both read it.
        x_out: residual stream leaving the block [B,N,D].
        norm: "pre" or "post".
        mask: the additive or boolean mask value, or None.
        mask_kind: "none", "key-padding" ([B,1,1,N]-like), "causal", or "full" ([.., N, N], not causal).
        packed: q, k, v come from one matmul.
        fused_op: "" or "domain::OpType" of the fused anchor.
        hazards: reasons to refuse: "causal", "rope", "relative-bias", "windowed", "cross", ...
    """

    index: int
    name: str
    heads: int
    head_dim: int
    v_dim: int
    width: int
    tokens: int | None
    scale: float
    q: ir.Value | None
    k: ir.Value | None
    v: ir.Value | None
    logits: ir.Value | None
    probs: ir.Value | None
    context: ir.Value
    anchor: ir.Node
    x_in: ir.Value
    x_attn: ir.Value
    x_out: ir.Value | None
    norm: str
    mask: ir.Value | None
    mask_kind: str
    packed: bool
    fused_op: str
    hazards: tuple[str, ...] = ()
    k_layout: str = "BHND"
    q_layout: str = "BHND"
    v_layout: str = "BHND"
    mask_keeps: bool = True


@dataclass(frozen=True)
class Refusal:
    """An attention-like place that is not a block tokens can be reduced in, and why."""

    name: str
    reason: str  # one word: "cross", "windowed", "causal", "rope", "relative-bias", "pooling", "not-attention"
    sentence: str


@dataclass(frozen=True, eq=False)
class Finding:
    """The blocks of a graph, in order, and everything that was refused.

    Args:
        blocks: usable blocks; those with hazards are here too (a user may insist).
        refused: places that cannot be used at all.
        family: "vit", "bert", "t5", "causal-text", "audio", "decoder" or "unknown"; for reports only.
        leading: protected rows at the start of the stream (CLS, distillation, registers); 0 when none.
        grid: (rows, columns) of the patch tokens, or None.
        tokens: N entering block 0, or None.
    """

    blocks: tuple[Block, ...]
    refused: tuple[Refusal, ...]
    family: str
    leading: int
    grid: tuple[int, int] | None
    tokens: int | None
