"""What an index costs and what it keeps: density and recall against exact attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgetok.errors import InputError
from edgetok.kernels.index.blocks import BLOCK, BlockIndex, block_count
from edgetok.native.tensors import numpy_from


@dataclass(frozen=True)
class DensityRecall:
    """Per batch and query head.

    Args:
        density: float64 [B, H], tiles computed / tiles with a visible pair (pairs of tokens with variable blocks).
        recall: float64 [B, H], mean over queries of the attention mass on keys that the index computes.
        worst: float64 [B, H], the smallest mass of any query.
    """

    density: np.ndarray
    recall: np.ndarray
    worst: np.ndarray


def density_and_recall(
    q: Any,
    k: Any,
    index: BlockIndex | np.ndarray,
    *,
    scale: float | None = None,
    causal: bool = False,
    rows: np.ndarray | None = None,
) -> DensityRecall:
    """Measure a block mask or an index on given Q and K, in float64.

    Args:
        q: [B, H, N, d], any float dtype.
        k: [B, Hkv, M, d]; query head h reads key head h // (H / Hkv).
        index: a :class:`BlockIndex`, or bool [B or 1, H or 1, ceil(N/64), ceil(M/64)] (the batch axis may be absent).
        scale: of the logits; 1/sqrt(d) when None.
        causal: bottom-right causality, in the exact attention and on the index.
        rows: queries to measure recall on, int [any]; all when None.

    Raises:
        InputError: shapes that do not fit each other.
    """
    q64, k64 = numpy_from(q, "q"), numpy_from(k, "k")
    if rows is not None and len(rows) and not 0 <= np.min(rows) <= np.max(rows) < q64.shape[-2]:
        raise InputError(f"rows reach from {np.min(rows)} to {np.max(rows)}, there are {q64.shape[-2]} queries")
    if q64.ndim != 4 or k64.ndim != 4 or q64.shape[3] != k64.shape[3] or q64.shape[0] != k64.shape[0]:
        raise InputError(f"q {q64.shape} and k {k64.shape} do not fit", next="pass [B, H, N, d] and [B, Hkv, M, d]")
    if k64.shape[1] == 0 or q64.shape[1] % k64.shape[1]:
        raise InputError(f"{q64.shape[1]} query heads over {k64.shape[1]} key heads", next="pass a multiple")
    batch, heads, n, width = q64.shape
    m, group = k64.shape[2], heads // k64.shape[1]
    tau = width**-0.5 if scale is None else scale
    found = np.zeros((3, batch, heads))
    for b in range(batch):
        for h in range(heads):
            keep = _keeper(index, b, h, n, m)
            found[:, b, h] = _one_head(
                q64[b, h].astype(np.float64) * tau, k64[b, h // group].astype(np.float64), keep, causal, rows
            )
    return DensityRecall(*found)


class _Keeper:
    """Token-level view of one head's rows, a block of queries at a time."""

    def __init__(
        self, rows: np.ndarray, columns: np.ndarray, tiles: np.ndarray, bits: dict[tuple[int, int], np.ndarray]
    ):
        self.rows, self.columns, self.tiles, self.bits = rows, columns, tiles, bits

    def of(self, tokens: np.ndarray) -> np.ndarray:
        """bool [len(tokens), M]: keys that the index computes for these queries."""
        out = self.tiles[self.rows[tokens]][:, self.columns]
        for (r, c), tile in self.bits.items():
            hit = np.nonzero(self.rows[tokens] == r)[0]
            width = min(BLOCK, len(self.columns) - c * BLOCK)
            out[hit, c * BLOCK : c * BLOCK + width] &= tile[tokens[hit] % BLOCK, :width]
        return out


def _keeper(index: BlockIndex | np.ndarray, b: int, h: int, n: int, m: int) -> _Keeper:
    rows, columns = np.arange(n) // BLOCK, np.arange(m) // BLOCK
    if not isinstance(index, BlockIndex):
        mask = np.asarray(index, np.bool_)
        mask = mask[None] if mask.ndim == 3 else mask
        if (
            mask.ndim != 4
            or mask.shape[2:] != (block_count(n), block_count(m))
            or b >= mask.shape[0] > 1
            or h >= mask.shape[1] > 1
        ):
            raise InputError(
                f"a block mask of shape {mask.shape} for {n} queries and {m} keys", next="blocks are 64 x 64"
            )
        return _Keeper(rows, columns, mask[b % mask.shape[0], h % mask.shape[1]], {})
    if (index.n, index.m) != (n, m):
        raise InputError(f"an index of {index.n} x {index.m} tokens for {n} queries and {m} keys")
    pattern = (b % index.batch) * index.heads + h % index.heads
    if index.q_ptr is not None and index.k_ptr is not None:
        rows = np.repeat(np.arange(index.nqb), np.diff(index.q_ptr[pattern]))
        columns = np.repeat(np.arange(index.nkb), np.diff(index.k_ptr[pattern]))
    if index.q_perm is not None:
        rows = _unpermuted(rows, index.q_perm[b % len(index.q_perm), h % index.q_perm.shape[1]])
    if index.k_perm is not None:
        per = index.k_perm.shape[1]
        columns = _unpermuted(columns, index.k_perm[b % len(index.k_perm), h * per // max(index.heads, per)])
    bits = {}
    for r in range(index.nqb):
        row = pattern * index.nqb + r
        for i in range(index.csr.row_ptr[row], index.csr.row_ptr[row + 1]):
            if index.csr.bits_idx[i] >= 0:
                words = np.ascontiguousarray(index.csr.bits[index.csr.bits_idx[i]]).view(np.uint8).reshape(BLOCK, 8)
                bits[r, int(index.csr.col[i])] = np.unpackbits(words, axis=1, bitorder="little").astype(np.bool_)
    return _Keeper(rows, columns, index.mask().reshape(-1, index.nqb, index.nkb)[pattern], bits)


def _unpermuted(block_of_row: np.ndarray, perm: np.ndarray) -> np.ndarray:
    out = np.empty_like(block_of_row)
    out[perm] = block_of_row
    return out


def _one_head(
    q: np.ndarray, k: np.ndarray, keep: _Keeper, causal: bool, rows: np.ndarray | None
) -> tuple[float, float, float]:
    n, m = len(q), len(k)
    mass = np.zeros(n)
    seen = np.zeros(n, np.bool_)
    asked = np.arange(n) if rows is None else np.unique(rows)
    for start in range(0, len(asked), 256):
        tokens = asked[start : start + 256]
        s = q[tokens] @ k.T
        if causal:
            s[np.arange(m)[None] > tokens[:, None] + (m - n)] = -np.inf
        top = s.max(1, initial=-np.inf)
        seen[tokens] = np.isfinite(top)
        p = np.exp(s - np.where(np.isfinite(top), top, 0.0)[:, None])
        mass[tokens] = (p * keep.of(tokens)).sum(1) / np.maximum(p.sum(1), 1e-300)
    mass = mass[seen]
    density = _density(keep, n, m, causal)
    return density, float(mass.mean()) if len(mass) else 1.0, float(mass.min()) if len(mass) else 1.0


def _density(keep: _Keeper, n: int, m: int, causal: bool) -> float:
    height, width = (np.bincount(x, minlength=size) for x, size in zip((keep.rows, keep.columns), keep.tiles.shape))
    regular = np.array_equal(keep.rows, np.arange(n) // BLOCK) and np.array_equal(keep.columns, np.arange(m) // BLOCK)
    if not regular:
        pairs = float(n) * m
        return float((keep.tiles * np.outer(height, width)).sum()) / pairs if pairs else 0.0
    visible = np.ones(keep.tiles.shape, np.bool_)
    if causal:
        last = np.minimum(np.arange(len(height)) * BLOCK + BLOCK, n) - 1 + (m - n)
        visible = np.arange(len(width))[None] * BLOCK <= last[:, None]
    count = int(visible.sum())
    return float((keep.tiles & visible).sum()) / count if count else 0.0
