"""What the score-based index builders compute, in numpy: codes, pooled codes, weights, selection.

The same law as ``kernels_c/src/index_kernel.h``, written independently of it: integers and single float32
operations, so that the library must agree exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgetok.errors import InputError
from edgetok.kernels.index.blocks import BLOCK, block_count
from edgetok.native.index import Csr
from edgetok.native.tensors import numpy_from

F = np.float32
LOG2E = F(1.44269504)
# 2^f on [-1, 0], lowest power first.
EXP2 = [
    F(c)
    for c in (
        1.0,
        0.6931437253952026,
        0.2401801496744156,
        0.0552973598241806,
        0.009205798618495464,
        0.0009449036442674696,
    )
]


def pair_from(q: Any, k: Any) -> tuple[np.ndarray, np.ndarray]:
    """Views of q [B, H, N, d] and k [B, Hkv, M, d] in float32 with a dense last axis.

    Raises:
        InputError: another rank, or shapes that do not fit.
    """
    found = []
    for name, value in (("q", q), ("k", k)):
        array = numpy_from(value, name)
        if array.ndim != 4:
            raise InputError(f"{name} has shape {array.shape}", next="pass [batch, heads, tokens, width]")
        array = array if array.dtype == np.float32 else array.astype(np.float32)
        dense = array.size == 0 or (array.strides[-1] == 4 and all(s >= 0 for s in array.strides))
        found.append(array if dense else np.ascontiguousarray(array))
    q32, k32 = found
    if q32.shape[0] != k32.shape[0] or q32.shape[3] != k32.shape[3]:
        raise InputError(f"q {q32.shape} and k {k32.shape} do not fit: batch and width must be equal")
    if k32.shape[1] == 0 or q32.shape[1] % k32.shape[1]:
        raise InputError(f"{q32.shape[1]} query heads over {k32.shape[1]} key heads", next="pass a multiple")
    return q32, k32


def finite(x: np.ndarray) -> np.ndarray:
    """``x`` with 0 for NaN and infinities."""
    return np.where(np.isfinite(x), x, F(0))


def mean_row(x: np.ndarray) -> np.ndarray:
    """float32 [d]: rows added in float32 within blocks of 64, blocks in float64."""
    with np.errstate(all="ignore"):
        total = np.zeros(x.shape[1], np.float64)
        for start in range(0, len(x), BLOCK):
            part = np.zeros(x.shape[1], np.float32)
            for row in finite(x[start : start + BLOCK]):
                part = part + row
            total = total + part.astype(np.float64)
        return finite((total / len(x)).astype(np.float32)) if len(x) else np.zeros(x.shape[1], np.float32)


def block_codes(x: np.ndarray, mu: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """int codes [blocks, 64, d] (rows past the end 0) and float32 scales [blocks]."""
    blocks, width = block_count(len(x)), x.shape[1]
    codes = np.zeros((blocks, BLOCK, width), np.int64)
    scales = np.zeros(blocks, np.float32)
    for i in range(blocks):
        y = centred(x[i * BLOCK : (i + 1) * BLOCK], mu)
        codes[i, : len(y)], scales[i] = codes_of(y)
    return codes, scales


def centred(x: np.ndarray, mu: np.ndarray | None) -> np.ndarray:
    """``finite(finite(x) - mu)`` in float32."""
    with np.errstate(all="ignore"):
        return finite(x) if mu is None else finite(finite(x) - mu)


def codes_of(y: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """Codes of finite rows with one scale."""
    top = np.abs(y).max(initial=F(0))
    if top < F(1e-30):
        return np.zeros(y.shape, np.int64), F(0)
    return np.rint(y * (F(127) / top)).astype(np.int64), top / F(127)


def pooled_blocks(codes: np.ndarray, scales: np.ndarray, tokens: int, theta: float) -> tuple[np.ndarray, ...]:
    """Pooled codes [blocks, d], float32 scale of a pooled code [blocks], bool [blocks]: rows are alike."""
    rows = np.minimum(BLOCK, tokens - np.arange(len(codes)) * BLOCK)
    pooled = (codes.sum(1) + 4) >> 3
    square = (codes**2).sum(2).astype(np.float32)
    unit = np.where(square > 0, F(4096) / np.sqrt(np.maximum(square, F(1))), F(0))
    own = (np.rint(codes.astype(np.float32) * unit[:, :, None]).astype(np.int64).sum(1) ** 2).sum(1)
    alike = own.astype(np.float64) >= np.float64(F(theta)) * (rows.astype(np.float64) ** 2 * 16777216.0)
    return pooled, scales * F(8) / rows.astype(np.float32), alike


def weights(dot: np.ndarray, a: np.float32, b: np.ndarray) -> np.ndarray:
    """Integer softmax weights of one row of exact products, about 2^24 for the largest; never 0."""
    if len(dot) == 0:
        return np.zeros(0, np.int64)
    with np.errstate(all="ignore"):
        g = a * b
        s = dot.astype(np.float32) * np.where(g < F(1e25), g, F(1e25))
    x = np.maximum(s - s.max(), F(-64))
    whole = np.trunc(x)
    f = x - whole
    p = np.full_like(f, EXP2[-1])
    for c in EXP2[-2::-1]:
        p = c + p * f
    return np.ldexp(p, whole.astype(np.int32) + 24).astype(np.int64) + 1


def select(weight: np.ndarray, target: int, count: int) -> np.ndarray:
    """Indices of the fewest weights (largest first, ties by lower index) that reach both goals; zeros take no part."""
    order = np.lexsort((np.arange(len(weight)), -weight))
    order = order[weight[order] > 0]
    mass = np.cumsum(weight[order])
    enough = np.nonzero((mass >= target) & (np.arange(1, len(order) + 1) >= count))[0]
    if target == 0 and count <= 0:
        return order[:0]
    return order[: enough[0] + 1] if len(enough) else order


def target_of(p: float, mass: int) -> int:
    """``ceil(p * mass)`` in float64, p in float32."""
    return int(np.ceil(np.float64(F(p)) * np.float64(mass)))


def visible_blocks(n: int, m: int, causal: bool) -> np.ndarray:
    """Key blocks that each query block may see: a prefix of this length."""
    if not causal:
        return np.full(block_count(n), block_count(m))
    last = np.minimum(np.arange(block_count(n)) * BLOCK + BLOCK, n) - 1 + (m - n)
    return np.where(last < 0, 0, last // BLOCK + 1)


def diagonal_blocks(n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last key block at the positions of each query block; last -1 when all lie before the first key."""
    first = np.arange(block_count(n)) * BLOCK + (m - n)
    last = np.minimum(np.arange(block_count(n)) * BLOCK + BLOCK, n) - 1 + (m - n)
    return np.maximum(first, 0) // BLOCK, np.where(last < 0, -1, last // BLOCK)


def csr_of_map(kept: np.ndarray, n: int, m: int, causal: bool) -> Csr:
    """CSR of bool [.., nqb, nkb] over 64-blocks; tiles that causality cuts are partial."""
    rows, cols = np.nonzero(kept.reshape(-1, kept.shape[-1]))
    first_query = rows % max(kept.shape[-2], 1) * BLOCK + (m - n)
    last_key = np.minimum(cols * BLOCK + BLOCK, m) - 1
    kind = (last_key > first_query) & causal
    count = kept.reshape(-1, kept.shape[-1]).sum(1) if kept.size else np.zeros(int(np.prod(kept.shape[:-1])))
    row_ptr = np.concatenate([[0], np.cumsum(count)]).astype(np.int64)
    none = np.zeros((0, BLOCK), np.uint64)
    return Csr(row_ptr, cols.astype(np.int32), kind.astype(np.uint8), none, np.full(len(cols), -1, np.int32))
