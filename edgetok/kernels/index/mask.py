"""From a mask of tokens to blocks: any and all per tile, bits only where a tile is mixed."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgetok.errors import InputError
from edgetok.kernels.index.blocks import BLOCK, BlockIndex, block_count
from edgetok.native import index as native
from edgetok.native.index import Csr
from edgetok.native.tensors import numpy_from


def from_mask(mask: Any, m: int | None = None, *, causal: bool = False) -> BlockIndex:
    """Index of a token mask.

    Args:
        mask: bool [.., N, M] (True = visible), or uint64 [.., N, ceil(M / 64)] with bit j of word w for key 64 w + j;
            at most two leading axes, batch and head.
        m: key tokens; needed for uint64 words, else M.
        causal: AND with bottom-right causality; tiles that only it cuts carry no bits.

    Raises:
        InputError: a dtype or shape that fits neither form.
    """
    array = numpy_from(mask, "mask")
    if array.ndim < 2:
        raise InputError(f"mask has shape {array.shape}", next="pass [.., N, M]")
    if m is None:
        if array.dtype == np.uint64:
            raise InputError("a mask of words does not say how many keys it covers", next="pass m=")
        m = array.shape[-1]
    if any(s < 0 for s in array.strides) or (array.size and array.strides[-1] != array.itemsize):
        array = np.ascontiguousarray(array)
    lead = (1, 1, *array.shape[:-2])[-2:]
    return BlockIndex(native.mask(array, m, causal), array.shape[-2], m, lead[0], lead[1], causal)


def csr_of_tokens(seen: np.ndarray, cut: np.ndarray | None) -> Csr:
    """CSR of bool [P, N, M]; tiles equal to ``cut`` [N, M] (the causal mask) carry no bits. One bits tile per tile."""
    patterns, n, m = seen.shape
    rows, cols = block_count(n), block_count(m)
    row_ptr, col, kind, bits_idx = [0], [], [], []
    bits: list[np.ndarray] = []
    for p in range(patterns):
        for r in range(rows):
            for c in range(cols):
                part = np.s_[r * BLOCK : (r + 1) * BLOCK, c * BLOCK : (c + 1) * BLOCK]
                tile = seen[p][part]
                if not tile.any():
                    continue
                col.append(c)
                kind.append(0 if tile.all() else 1)
                if tile.all() or (cut is not None and np.array_equal(tile, cut[part])):
                    bits_idx.append(-1)
                    continue
                bits_idx.append(len(bits))
                padded = np.zeros((BLOCK, BLOCK), np.uint8)
                padded[: tile.shape[0], : tile.shape[1]] = tile
                bits.append(np.packbits(padded, axis=1, bitorder="little").view("<u8")[:, 0])
            row_ptr.append(len(col))
    return Csr(
        np.array(row_ptr, np.int64),
        np.array(col, np.int32),
        np.array(kind, np.uint8),
        np.array(bits, np.uint64).reshape(-1, BLOCK),
        np.array(bits_idx, np.int32),
    )


def mask_reference(mask: np.ndarray, causal: bool) -> Csr:
    """The law of :func:`from_mask` for bool [.., N, M]."""
    n, m = mask.shape[-2:]
    seen = mask.reshape(int(np.prod(mask.shape[:-2])), n, m)
    if not causal:
        return csr_of_tokens(seen, None)
    cut = np.arange(m)[None] <= np.arange(n)[:, None] + (m - n)
    return csr_of_tokens(seen & cut, cut)
