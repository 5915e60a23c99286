"""Attention in float64 numpy, with everything the kernels offer: what they are held against."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SEED = 20250114


def rng(*key: int) -> np.random.Generator:
    return np.random.default_rng([SEED, *key])


def draw(
    batch: int, heads: int, kv_heads: int, n: int, m: int, d: int, dv: int, kind: str = "gauss", key: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v. ``outlier``: 4 channels of K with an offset, 5 times as wide; ``sink``: key 0 takes half the mass."""
    g = rng(batch, heads, n, m, d, dv, key)
    q = g.normal(size=(batch, heads, n, d))
    k = g.normal(size=(batch, kv_heads, m, d))
    v = g.normal(size=(batch, kv_heads, m, dv))
    if kind == "outlier":
        channels = g.choice(d, min(4, d), replace=False)
        k[..., channels] = k[..., channels] * 5 + 20 * g.normal(size=(batch, kv_heads, 1, len(channels)))
    if kind == "sink" and m:
        direction = g.normal(size=(batch, kv_heads, 1, d))
        direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
        lift = np.repeat(direction, heads // kv_heads, 1)
        q += lift * (2.0 - (q * lift).sum(-1, keepdims=True))  # every query has 2 along it
        k[:, :, :1] = direction * (np.log(max(m, 2)) + 0.5) * np.sqrt(d) / 2.0  # half of the mass, more or less
    return tuple(x.astype(np.float32) for x in (q, k, v))  # type: ignore[return-value]


@dataclass(frozen=True)
class Exact:
    o: np.ndarray
    lse: np.ndarray
    p: np.ndarray
    logits: np.ndarray


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    visible: np.ndarray | bool = True,
    bias: np.ndarray | float = 0.0,
    scale: float | None = None,
    softcap: float = 0.0,
    clip: tuple[float, float] | None = None,
    sink_logit: np.ndarray | None = None,
    gate: np.ndarray | float = 1.0,
) -> Exact:
    """[B, H, N, d] float64 attention; ``visible`` and ``bias`` broadcast to [B, H, N, M]."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    s = q @ k.swapaxes(-1, -2) * (1 / np.sqrt(q.shape[-1]) if scale is None else scale)
    if softcap:
        s = softcap * np.tanh(s / softcap)
    s = np.where(np.broadcast_to(visible, s.shape), s + bias, -np.inf)
    top = s.max(-1, keepdims=True, initial=-np.inf)
    extra = np.full((*s.shape[:3], 1), -np.inf)
    if sink_logit is not None:
        extra = np.broadcast_to(sink_logit.astype(np.float64)[None, :, None, None], extra.shape)
    top = np.maximum(top, extra)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        total = np.exp(s - top).sum(-1, keepdims=True) + np.exp(extra - top)
        lse = (top + np.log(total))[..., 0]
    p = np.exp(s - top) / np.where(total > 0, total, 1.0)
    if clip is not None:
        p = np.clip((clip[1] - clip[0]) * p + clip[0], 0.0, 1.0)
    return Exact((p @ v) * gate, lse, p, s)


def causal(n: int, m: int) -> np.ndarray:
    return np.arange(m)[None] <= np.arange(n)[:, None] + (m - n)


def rel_l1(got: np.ndarray, want: np.ndarray) -> float:
    size = np.abs(want).sum()
    return float(np.abs(got - want).sum() / size) if size else float(np.abs(got).sum())


def cosine(got: np.ndarray, want: np.ndarray) -> float:
    got = got.astype(np.float64)
    return float((got * want).sum() / np.sqrt((got * got).sum() * (want * want).sum()))


def logit_bound(q: np.ndarray, k: np.ndarray, scale: float, smooth: bool = True) -> np.ndarray:
    """[B, H, N]: how far INT8 can move a logit: codes of Q by row and of K by page of 64, each off by half a step."""
    k = k.astype(np.float64)
    if smooth and k.shape[2]:
        k = k - k.mean(2, keepdims=True)
    k = np.repeat(k, q.shape[1] // k.shape[1], 1)
    sq = np.abs(q).max(-1, initial=0) / 127
    out = np.zeros(q.shape[:3])
    for at in range(0, k.shape[2], 64):
        page = k[:, :, at : at + 64]
        sk = np.abs(page).max((-1, -2)) / 127
        step = (
            np.abs(q.astype(np.float64)).sum(-1) * sk[..., None] / 2 + sq * np.abs(page).sum(-1).max(-1)[..., None] / 2
        )
        out = np.maximum(out, scale * (step + q.shape[-1] * sq * sk[..., None] / 4))
    return out


def gap(got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference where the law is finite."""
    at = np.isfinite(want)
    return float(np.abs(got[at] - want[at]).max(initial=0))
