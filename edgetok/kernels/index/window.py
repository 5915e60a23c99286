"""Window and sink: every query sees its neighbours and the first keys."""

from __future__ import annotations

import numpy as np

from edgetok.kernels.index.blocks import BlockIndex
from edgetok.kernels.index.mask import csr_of_tokens
from edgetok.native import index as native
from edgetok.native.index import Csr


def from_window(n: int, m: int, *, left: int, right: int = 0, sink: int = 0, causal: bool = False) -> BlockIndex:
    """Index of a sliding window with sink keys.

    Args:
        n: query tokens.
        m: key tokens; query i stands at position i + (m - n).
        left: keys before the query's position that it sees.
        right: keys after it.
        sink: first keys that every query sees.
        causal: no key past the query's position.

    Raises:
        InputError: a negative number.
    """
    return BlockIndex(native.window(n, m, left, right, sink, causal), n, m)


def window_reference(n: int, m: int, left: int, right: int, sink: int, causal: bool) -> Csr:
    """The law of :func:`from_window` over the full token mask."""
    position = np.arange(n)[:, None] + (m - n)
    key = np.arange(m)[None]
    seen = ((key >= position - left) & (key <= position + right)) | (key < sink)
    if causal:
        seen &= key <= position
    csr = csr_of_tokens(seen[None], None)
    tiles: dict[bytes, int] = {}
    bits_idx = np.array(
        [-1 if i < 0 else tiles.setdefault(csr.bits[i].tobytes(), len(tiles)) for i in csr.bits_idx], np.int32
    )
    bits = np.frombuffer(b"".join(tiles), np.uint64).reshape(-1, 64)
    return Csr(csr.row_ptr, csr.col, csr.kind, bits, bits_idx)
