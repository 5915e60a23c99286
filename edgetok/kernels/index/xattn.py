"""Strided antidiagonal scores: XAttention's block estimate."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgetok.kernels.index import law
from edgetok.kernels.index.blocks import BLOCK, BlockIndex, block_count
from edgetok.native import index as native
from edgetok.native.index import Csr


def from_xattn(
    q: Any,
    k: Any,
    *,
    threshold: float = 0.9,
    stride: int = 16,
    min_keep: int = 0,
    causal: bool = False,
    scale: float | None = None,
    threads: int = 1,
) -> BlockIndex:
    """Index of the key blocks whose antidiagonals carry the mass.

    Args:
        q: float [B, H, N, d].
        k: float [B, Hkv, M, d].
        threshold: mass to reach, above 0, at most 1.
        stride: every stride-th antidiagonal is summed; 4, 8, 16, 32 or 64. Larger is faster and coarser.
        min_keep: blocks a row keeps at least.
        causal: bottom-right causality.
        scale: of the logits; 1/sqrt(d) when None.
        threads: of the library's pool; heads are the tasks.

    Raises:
        InputError: shapes that do not fit, or a parameter out of range.

    Source: XAttention (2025). Departures: 64 x 64 blocks, INT8 codes with K less its mean, first block and diagonal
        kept without causality as well.
    """
    q32, k32 = law.pair_from(q, k)
    values = {"causal": causal, "scale": scale or 0.0, "threshold": threshold, "stride": stride, "min_keep": min_keep}
    csr = native.xattn(q32, k32, threads, **values)
    return BlockIndex(csr, q32.shape[2], k32.shape[2], q32.shape[0], q32.shape[1], causal)


def xattn_reference(q: np.ndarray, k: np.ndarray, *, threshold: float, stride: int, min_keep: int, causal: bool) -> Csr:
    """The law of :func:`from_xattn` at the default scale."""
    batch, heads, n, width = q.shape
    m, group = k.shape[2], heads // k.shape[1]
    kept = np.zeros((batch, heads, block_count(n), block_count(m)), np.bool_)
    tau = np.float32(1) / np.sqrt(np.float32(width)) * law.LOG2E / np.float32(stride)
    first, last = law.diagonal_blocks(n, m)
    for b in range(batch):
        for h in range(heads):
            keys = k[b, h // group]
            codes_k, scale_k = law.block_codes(keys, law.mean_row(keys))
            codes_q, scale_q = law.block_codes(q[b, h], None)
            for r, seen in enumerate(law.visible_blocks(n, m, causal)):
                mass = _block_mass(codes_q[r], codes_k, scale_q[r] * tau, scale_k, r * BLOCK, n, m, stride, causal)
                kept[b, h, r, :seen] = _choose(mass[:seen], int(first[r]), int(last[r]), threshold, min_keep)
    return law.csr_of_map(kept, n, m, causal)


def _block_mass(
    codes_q: np.ndarray,
    codes_k: np.ndarray,
    a: np.float32,
    scale_k: np.ndarray,
    start: int,
    n: int,
    m: int,
    stride: int,
    causal: bool,
) -> np.ndarray:
    """float64 [key blocks]: softmax mass of one query block, by strided rows."""
    per = BLOCK // stride
    width = codes_q.shape[1]
    rows = codes_q.reshape(per, stride, width)[:, ::-1].reshape(per, -1)
    keys = codes_k.reshape(-1, stride * width)[: -(-m // stride)]
    dots = rows @ keys.T
    mass = np.zeros(len(codes_k), np.float64)
    for i in range(per):
        at = start + i * stride
        if at >= n:
            break
        end = min(at + stride, n) - 1 + (m - n)
        count = len(keys) if not causal else 0 if end < 0 else end // stride + 1
        w = np.zeros(len(codes_k) * per, np.int64)
        w[:count] = law.weights(dots[i, :count], a, np.repeat(scale_k, per)[:count])
        if count:
            mass = mass + w.reshape(-1, per).sum(1).astype(np.float64) * (1.0 / np.float64(w.sum()))
    return mass


def _choose(mass: np.ndarray, first: int, last: int, threshold: float, min_keep: int) -> np.ndarray:
    weight = (mass * 1048576.0).astype(np.int64) + 1
    block = np.arange(len(mass))
    kept = (block == 0) | ((block >= first) & (block <= last))
    goal = max(law.target_of(threshold, int(weight.sum())) - int(weight[kept].sum()), 0)
    least = max(min(min_keep, len(mass)) - int(kept.sum()), 0)
    kept[law.select(np.where(kept, 0, weight), goal, least)] = True
    return kept
