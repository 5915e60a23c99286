"""Top-p or top-k over pooled blocks: SpargeAttention's prediction."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgetok.kernels.index import law
from edgetok.kernels.index.blocks import BlockIndex, block_count
from edgetok.native import index as native
from edgetok.native.index import Csr


def from_topp(
    q: Any,
    k: Any,
    *,
    p: float = 0.0,
    topk: float = 0.0,
    theta: float = 0.5,
    min_keep: int = 1,
    sink_blocks: int = 1,
    local_blocks: int = 1,
    causal: bool = False,
    scale: float | None = None,
    threads: int = 1,
) -> BlockIndex:
    """Index of the key blocks that pooled scores predict to carry the mass.

    Args:
        q: float [B, H, N, d].
        k: float [B, Hkv, M, d].
        p: mass to reach, 0..1; 0 = off.
        topk: with p = 0, share of the visible blocks to keep, 0..1.
        theta: blocks whose rows' mean cosine is lower are computed wholly, -1..1.
        min_keep: predicted blocks a row keeps at least.
        sink_blocks: first columns that every row keeps.
        local_blocks: blocks around the diagonal that every row keeps; 1 is the diagonal.
        causal: bottom-right causality.
        scale: of the logits; 1/sqrt(d) when None.
        threads: of the library's pool; heads are the tasks.

    Raises:
        InputError: shapes that do not fit, or a parameter out of range.

    Source: SpargeAttention (2025), first stage. Departures: 64 x 64 blocks; pooling works on INT8 codes, K less its
        mean; self-similarity is the squared norm of the mean unit row; ties go to the lower block.
    """
    q32, k32 = law.pair_from(q, k)
    csr = native.topp(
        q32,
        k32,
        threads,
        causal=causal,
        scale=scale or 0.0,
        theta=theta,
        p=p,
        topk=topk,
        min_keep=min_keep,
        sink_blocks=sink_blocks,
        local_blocks=local_blocks,
    )
    return BlockIndex(csr, q32.shape[2], k32.shape[2], q32.shape[0], q32.shape[1], causal)


def topp_reference(
    q: np.ndarray,
    k: np.ndarray,
    *,
    p: float,
    topk: float,
    theta: float,
    min_keep: int,
    sink_blocks: int,
    local_blocks: int,
    causal: bool,
) -> Csr:
    """The law of :func:`from_topp` at the default scale."""
    batch, heads, n, width = q.shape
    m, group = k.shape[2], heads // k.shape[1]
    kept = np.zeros((batch, heads, block_count(n), block_count(m)), np.bool_)
    tau = np.float32(1) / np.sqrt(np.float32(width)) * law.LOG2E
    visible = law.visible_blocks(n, m, causal)
    first, last = law.diagonal_blocks(n, m)
    for b in range(batch):
        for h in range(heads):
            keys = k[b, h // group]
            pooled_k, scale_k, alike_k = law.pooled_blocks(*law.block_codes(keys, law.mean_row(keys)), m, theta)
            pooled_q, scale_q, alike_q = law.pooled_blocks(*law.block_codes(q[b, h], None), n, theta)
            for r, seen in enumerate(visible):
                row = kept[b, h, r, :seen]
                row[:] = ~alike_k[:seen] | ~alike_q[r]
                rivals = np.nonzero(alike_k[:seen])[0]
                if alike_q[r] and len(rivals):
                    w = law.weights(pooled_k[rivals] @ pooled_q[r], scale_q[r] * tau, scale_k[rivals])
                    share = 0 if p else int(np.ceil(np.float64(np.float32(topk)) * seen))
                    least = min(max(min_keep, 1, share), len(rivals))
                    goal = law.target_of(p, int(w.sum())) if p else 0
                    row[rivals[law.select(w, goal, least)]] = True
                if alike_q[r]:
                    row[:sink_blocks] = True
                    if local_blocks:
                        row[max(first[r] - local_blocks + 1, 0) : max(last[r] + local_blocks, 0)] = True
    return law.csr_of_map(kept, n, m, causal)
