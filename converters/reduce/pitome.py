"""PiToMe: merge where energy is high, protect what stands alone.

Every unprotected token gets an energy, the mean of ELU(similarity - margin) over the others: high energy means many
near neighbours. "pure" layers merge only within the top 2r tokens of the energy order (odd places to even places);
"hybrid" layers match even against odd places of the whole order and take the r strongest links, as ToMe does. Output
rows are [protected, energy order, destinations].

Source: Tran et al., NeurIPS 2024. Departures: any number of protected leading rows; padding rows come first in the
energy order and merge among themselves, so that short texts lose padding before words; proportional attention is an
option (the published patch tracks sizes and never uses them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import onnx_ir as ir

from edgetok.converters.reduce import core
from edgetok.converters.reduce._bipartite import emit_match, match
from edgetok.converters.reduce._builder import INT64, Builder, dims
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

_FORMS = ("hybrid-first", "hybrid-last", "pure", "hybrid", "text")
_PAD_ENERGY = 1e3


@dataclass(frozen=True)
class PiToMeSettings(Settings):
    """Args:
    ratio: share of tokens a layer keeps, 0.5 to 1.
    r: tokens merged per layer instead of ``ratio``: one number, or one per block.
    margin: at the first layer; it falls to zero at the last (0.75 for DeiT and MAE, 0.9 for AugReg).
    alpha: of the ELU.
    form: "hybrid-first" (DeiT: hybrid in the first half), "hybrid-last" (MAE), "pure", "hybrid", or "text"
        (Gaussian energy; the first r of the order merge into the next r).
    prop_attn: a merged token counts as its size in later attention.
    """

    ratio: float = 0.925
    r: tuple[int, ...] = ()
    margin: float = 0.75
    alpha: float = 1.0
    form: str = "hybrid-first"
    prop_attn: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("ratio", self.ratio, 0.0, 1.0)
        check_range("margin", self.margin, -1.0, 1.0)
        check_range("alpha", self.alpha, 0.0, 100.0)
        if self.form not in _FORMS:
            raise InputError(f"form={self.form!r}", next=f"choose one of: {', '.join(_FORMS)}")
        if self.r and min(self.r) < 0:
            raise InputError("r: give counts of zero or more")

    def hybrid(self, layer: int, layers: int) -> bool:
        """Whether a layer matches over all tokens."""
        half = -(-layers // 2)
        return {"hybrid-first": layer < half, "hybrid-last": layer >= layers - half}.get(
            self.form, self.form == "hybrid"
        )

    def margin_at(self, layer: int, layers: int) -> float:
        if self.form == "text":
            return self.margin - 0.25 * layer / layers
        return self.margin * (1 - layer / layers)


def energy(metric: np.ndarray, margin: float, alpha: float) -> np.ndarray:
    """Mean over j of ELU_alpha(cos(i,j) - margin); metric [B,T,C] of unit rows -> [B,T]. Counts the self term."""
    z = metric @ np.swapaxes(metric, 1, 2) - margin
    return np.where(z >= 0, z, alpha * np.expm1(np.minimum(z, 0))).mean(2)


def energy_text(metric: np.ndarray, margin: float) -> np.ndarray:
    """Mean over j of a Gaussian of the cosine distance, width 1 - margin."""
    sigma = max(1 - margin, 1e-3)
    far = (1 - metric @ np.swapaxes(metric, 1, 2)) / sigma
    return np.exp(-(far**2) / 2).mean(2) / (sigma * np.sqrt(2 * np.pi))


class PiToMe(Method):
    """See the module."""

    name = "pitome"
    settings = PiToMeSettings
    kind = "merge"
    needs = frozenset({"k"})

    def counts(self, settings: Settings, tokens: int, protected: int, layers: int) -> Counts:
        s = cast(PiToMeSettings, settings)
        wanted, free = [], tokens - protected
        given = s.r * layers if len(s.r) == 1 else (*s.r, *(0,) * (layers - len(s.r)))
        if len(s.r) > layers:
            raise InputError(f"{len(s.r)} counts given, but the model has {layers} blocks")
        for layer in range(layers):
            count = given[layer] if s.r else free - kept_count(free, s.ratio)
            wanted.append(count if s.allowed(layer) else 0)
            free -= min(wanted[-1], self.limit(free, 0))
        return clamp(wanted, tokens, protected, self)

    def plan(self, view: TokenView, count: int, settings: Settings) -> Plan:
        s, p = cast(PiToMeSettings, settings), view.protected
        metric = core.unit(view.k.mean(1)[:, p:])
        margin, pad = s.margin_at(view.layer, view.layers), view.pad[:, p:]
        score = energy_text(metric, margin) if s.form == "text" else energy(metric, margin, s.alpha)
        order = core.order_by(score + _PAD_ENERGY * pad)
        a, b, rest = _groups(order, count, s, view.layer, view.layers)
        take = lambda rows: np.take_along_axis(metric, rows[..., None], 1)  # noqa: E731
        scores = take(a) @ np.swapaxes(take(b), 1, 2)
        scores = scores + core.pad_penalty(np.take_along_axis(pad, a, 1), np.take_along_axis(pad, b, 1))
        if s.hybrid(view.layer, view.layers):
            links = match(scores, count, sort_rest=True)
            src = np.take_along_axis(a, links.src, 1)
            before, to = np.take_along_axis(a, links.rest, 1), links.dst
        else:
            src, before, to = a, rest, scores.argmax(2)
        lead = np.broadcast_to(np.arange(p), (len(order), p))
        kept = np.concatenate([lead, before + p, b + p], 1)
        return Plan(self.kind, view.tokens, p, kept, src + p, to + p + before.shape[1])

    def emit(self, b: Builder, site: Site, count: int, settings: Settings) -> Emitted:
        s, p, free = cast(PiToMeSettings, settings), site.protected, site.tokens - site.protected
        metric = core.emit_unit(b, b.slice(core.emit_key_metric(b, site), 1, p, site.tokens))
        score = _emit_energy(b, metric, s, s.margin_at(site.layer, site.layers))
        pad = site.pad(b)
        if pad is not None:
            pad = b.slice(pad, 1, p, site.tokens)
            score = b.binary("Add", score, b.binary("Mul", pad, _PAD_ENERGY))
        _, order = b.topk(score, free)
        b.anchor_batch(order)
        a_rows, b_rows, rest = _emit_groups(b, order, free, count, s, site)
        scores = b.matmul(b.rows(metric, a_rows), b.transpose(b.rows(metric, b_rows), 0, 2, 1))
        if pad is not None:
            scores = b.binary("Add", scores, core.emit_pad_penalty(b, b.take(pad, a_rows), b.take(pad, b_rows)))
        if s.hybrid(site.layer, site.layers):
            links = emit_match(b, scores, count, sort_rest=True)
            src, to = b.take(a_rows, links.src), links.dst
            rest = None if links.rest is None else b.take(a_rows, links.rest)
        else:
            src = a_rows
            to = b.op("ArgMax", [scores], [b.batch, count], INT64, axis=2, keepdims=0, select_last_index=0)
        kept = [b.per_batch(np.arange(p))] if p else []
        kept += [b.binary("Add", rows, p) if p else rows for rows in (rest, b_rows) if rows is not None]
        offset = p + (int(dims(rest)[1]) if rest is not None else 0)
        return Emitted(
            self.kind, site.tokens - count, b.concat(kept, 1),
            b.binary("Add", src, p) if p else src, b.binary("Add", to, offset),
        )  # fmt: skip


def _groups(
    order: np.ndarray, count: int, s: PiToMeSettings, layer: int, layers: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sources a, destinations b, and the rows left alone, all as rows of the unprotected tokens."""
    if s.hybrid(layer, layers):
        return order[:, ::2], order[:, 1::2], order[:, :0]
    top, rest = order[:, : 2 * count], order[:, 2 * count :]
    if s.form == "text":
        return top[:, :count], top[:, count:], rest
    return top[:, ::2], top[:, 1::2], rest


def _emit_groups(
    b: Builder, order: ir.Value, free: int, count: int, s: PiToMeSettings, site: Site
) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    if s.hybrid(site.layer, site.layers):
        return b.slice(order, 1, 0, free, 2), b.slice(order, 1, 1, free, 2), None
    rest = b.slice(order, 1, 2 * count, free) if 2 * count < free else None
    if s.form == "text":
        return b.slice(order, 1, 0, count), b.slice(order, 1, count, 2 * count), rest
    return b.slice(order, 1, 0, 2 * count, 2), b.slice(order, 1, 1, 2 * count, 2), rest


def _emit_energy(b: Builder, metric: ir.Value, s: PiToMeSettings, margin: float) -> ir.Value:
    similarity = b.matmul(metric, b.transpose(metric, 0, 2, 1))
    shape = dims(similarity)
    if s.form == "text":
        sigma = max(1 - margin, 1e-3)
        far = b.binary("Mul", b.op("Sub", [b.const(1.0), similarity], shape), 1 / sigma)
        close = b.unary("Exp", b.binary("Mul", b.binary("Mul", far, far), -0.5))
        return b.binary("Mul", b.reduce("ReduceMean", close, 2), 1 / (sigma * float(np.sqrt(2 * np.pi))))
    raised = b.op("Elu", [b.binary("Sub", similarity, margin)], shape, alpha=s.alpha)
    return b.reduce("ReduceMean", raised, 2)


METHOD = PiToMe()
