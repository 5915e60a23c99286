"""Token Transforming: every token spreads over the M most informative ones, Y = W X with dense rows.

The informative tokens are those the CLS row attends to most (or, without a CLS, those attended to most on average).
Each unprotected token spreads its mass over them by a softmax of key similarity; the same weights restore dense
outputs.

Source: Zeng et al., NeurIPS 2025. The authors' code is not public: the matrix is our reconstruction from the abstract
and figure, and agreement with the paper's table is not claimed. Departure: dense outputs are restored by the composed
matrix without the optional residual of the pre-reduction features.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import cast

import numpy as np
import onnx_ir as ir

from edgetok.converters.reduce import core
from edgetok.converters.reduce._builder import FLOAT, Builder, dims
from edgetok.converters.reduce.base import (
    Counts,
    Emitted,
    Method,
    Plan,
    Settings,
    Site,
    TokenView,
    check_range,
    clamp,
    kept_count,
)
from edgetok.errors import InputError


@dataclass(frozen=True)
class TokenTransformingSettings(Settings):
    """Args:
    ratio: share of the unprotected tokens each stage keeps.
    stages: blocks where tokens are transformed; empty means at a quarter, a half and three quarters of the depth.
    r: tokens removed per block instead of ``ratio`` and ``stages``.
    tau: temperature of the spreading, 0.02 (nearly hard) to 0.5.
    importance: "auto" (CLS row when there is one), "cls" or "mean" (column mean of attention).
    self_anchor: an informative token keeps all of itself.
    prop_attn: a token counts as its mass in later attention.
    """

    ratio: float = 0.7
    stages: tuple[int, ...] = ()
    r: tuple[int, ...] = ()
    tau: float = 0.02
    importance: str = "auto"
    self_anchor: bool = True
    prop_attn: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("ratio", self.ratio, 0.0, 1.0)
        check_range("tau", self.tau, 1e-4, 100.0)
        if self.importance not in ("auto", "cls", "mean"):
            raise InputError(f"importance={self.importance!r}", next="choose auto, cls or mean")

    def by_cls(self, protected: int) -> bool:
        return self.importance == "cls" or (self.importance == "auto" and protected > 0)


def spread(
    f: np.ndarray, targets: np.ndarray, tau: float, *, self_anchor: bool, pad: np.ndarray | None = None
) -> np.ndarray:
    """P [B,T,M]: softmax over targets of cos(f_i, f_c)/tau.

    Args:
        f: features [B,T,C].
        targets: int64 [B,M], rows of f.
        self_anchor: a target's own row becomes one-hot.
        pad: [B,T], 1 for padding: no real token spreads to a padding target.
    """
    unit = core.unit(f)
    centres = np.take_along_axis(unit, targets[..., None], 1)
    logits = unit @ np.swapaxes(centres, 1, 2) / tau
    if pad is not None:
        logits = logits + core.PAD_LOGIT * np.take_along_axis(pad, targets, 1)[:, None, :]
    if self_anchor:
        own = targets[:, None, :] == np.arange(f.shape[1])[None, :, None]
        logits = np.where(own.any(2, keepdims=True), np.where(own, 0.0, 2 * core.PAD_LOGIT), logits)
    e = np.exp(logits - logits.max(2, keepdims=True))
    return (e / e.sum(2, keepdims=True)).astype(np.float32)


class TokenTransforming(Method):
    """See the module."""

    name = "token_transforming"
    settings = TokenTransformingSettings
    kind = "transform"
    needs = frozenset({"k", "probs"})
    max_share = Fraction(9, 10)

    def counts(self, settings: Settings, tokens: int, protected: int, layers: int) -> Counts:
        s = cast(TokenTransformingSettings, settings)
        if s.r:
            if len(s.r) > layers:
                raise InputError(f"{len(s.r)} counts given, but the model has {layers} blocks")
            given = list(s.r * layers if len(s.r) == 1 else (*s.r, *(0,) * (layers - len(s.r))))
            return clamp([r if s.allowed(i) else 0 for i, r in enumerate(given)], tokens, protected, self)
        stages = s.stages or tuple(sorted({layers // 4, layers // 2, 3 * layers // 4}))
        if max(stages) >= layers:
            raise InputError(f"stages: block {max(stages)} of {layers} (numbered from 0)")
        wanted, free = [], tokens - protected
        for layer in range(layers):
            go = layer in stages and s.allowed(layer)
            wanted.append(free - kept_count(free, s.ratio) if go else 0)
            free -= wanted[-1]
        return clamp(wanted, tokens, protected, self)

    def plan(self, view: TokenView, count: int, settings: Settings) -> Plan:
        s, p = cast(TokenTransformingSettings, settings), view.protected
        if view.probs is None:
            raise ValueError("token transforming reads attention probabilities")
        heads = view.probs.mean(1)
        score = (heads[:, 0] if s.by_cls(p) else heads.mean(1))[:, p:]
        pad = view.pad[:, p:]
        order = core.order_by(score + core.MASKED * pad)
        targets = order[:, : order.shape[1] - count]
        matrix = core.protected_matrix(
            spread(view.k.mean(1)[:, p:], targets, s.tau, self_anchor=s.self_anchor, pad=pad), p
        )
        lead = np.broadcast_to(np.arange(p), (len(order), p))
        kept = np.concatenate([lead, targets + p], 1)
        removed = order[:, order.shape[1] - count :] + p
        return Plan(self.kind, view.tokens, p, kept, removed, removed[:, :0], matrix, matrix)

    def emit(self, b: Builder, site: Site, count: int, settings: Settings) -> Emitted:
        s, p, free = cast(TokenTransformingSettings, settings), site.protected, site.tokens - site.protected
        keep = free - count
        score = b.slice(_importance(b, site, cls=s.by_cls(p)), 1, p, site.tokens)
        pad = site.pad(b)
        if pad is not None:
            pad = b.slice(pad, 1, p, site.tokens)
            score = b.binary("Add", score, b.binary("Mul", pad, core.MASKED))
        _, targets = b.topk(score, keep)
        b.anchor_batch(targets)
        metric = core.emit_unit(b, b.slice(core.emit_key_metric(b, site), 1, p, site.tokens))
        centres = b.rows(metric, targets)
        logits = b.matmul(metric, b.transpose(b.binary("Mul", centres, 1 / s.tau), 0, 2, 1))
        if pad is not None:
            hidden = b.binary("Mul", b.take(pad, targets), core.PAD_LOGIT)
            logits = b.binary("Add", logits, b.unsqueeze(hidden, 1))
        if s.self_anchor:
            logits = _anchored(b, logits, targets, free, keep)
        matrix = b.op("Softmax", [logits], dims(logits), axis=2)
        kept = b.binary("Add", targets, p)
        if p:
            kept = b.concat([b.per_batch(np.arange(p)), kept], 1)
        return Emitted(self.kind, keep + p, kept=kept, assign=matrix, restore=matrix)


def _importance(b: Builder, site: Site, *, cls: bool) -> ir.Value:
    """float [B,N]: attention from row 0, or the mean over rows, averaged over heads."""
    if site.probs is None:
        raise ValueError("token transforming reads attention probabilities")
    if cls:
        row = b.slice(site.probs, 2, 0, 1)
        return b.reduce("ReduceMean", b.op("Squeeze", [row, b.const([2])], [b.batch, site.heads, site.tokens]), 1)
    return b.reduce("ReduceMean", b.reduce("ReduceMean", site.probs, 2), 1)


def _anchored(b: Builder, logits: ir.Value, targets: ir.Value, free: int, keep: int) -> ir.Value:
    """Rows of targets become one-hot: a new row replaces theirs before the softmax."""
    eye = np.full((1, keep, keep), 2 * core.PAD_LOGIT, np.float32)
    eye[0, range(keep), range(keep)] = 0.0
    rows = b.binary("Add", b.cast(b.unsqueeze(b.per_batch(np.zeros(keep)), 2), FLOAT), eye)
    where = b.concat([b.batch_rows(keep), b.unsqueeze(targets, 2)], 2)
    return b.op("ScatterND", [logits, where, rows], [b.batch, free, keep])


METHOD = TokenTransforming()
