"""A block index as Python holds it: CSR arrays, block boundaries, row orders."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgetok.native import index as native
from edgetok.native.index import Bsr, Csr

BLOCK = 64


def block_count(tokens: int) -> int:
    """Blocks of 64 that hold ``tokens`` tokens."""
    return -(-tokens // BLOCK)


@dataclass(frozen=True)
class BlockIndex:
    """Which tiles of Q K^T are computed.

    Args:
        csr: row_ptr int64 [rows + 1], col int32 [nnz] ascending in a row, kind uint8 [nnz] (0 full, 1 partial), bits
            uint64 [nbits, 64] (bit j of word i: key j visible to query i of the tile), bits_idx int32 [nnz] (-1 none).
        n: query tokens.
        m: key tokens.
        batch: batches with rows of their own; 1 = shared.
        heads: query heads with rows of their own; 1 = shared.
        causal: partial tiles without bits hold a causal edge: run attention with causal=True.
        q_ptr: int32 [batch * heads, blocks + 1], boundaries of variable query blocks; None = blocks of 64.
        k_ptr: the same for keys.
        q_perm: int32 [batch, heads, n]: row r of the problem is row perm[r] of the tensor; None = identity.
        k_perm: int32 [batch, key heads, m], the same for keys and values.
    """

    csr: Csr
    n: int
    m: int
    batch: int = 1
    heads: int = 1
    causal: bool = False
    q_ptr: np.ndarray | None = None
    k_ptr: np.ndarray | None = None
    q_perm: np.ndarray | None = None
    k_perm: np.ndarray | None = None

    @property
    def nqb(self) -> int:
        """Query blocks of one head."""
        return block_count(self.n) if self.q_ptr is None else self.q_ptr.shape[1] - 1

    @property
    def nkb(self) -> int:
        """Key blocks of one head."""
        return block_count(self.m) if self.k_ptr is None else self.k_ptr.shape[1] - 1

    def bsr(self) -> Bsr:
        """``etk_bsr`` over this object's arrays; keep the object alive while it is used."""
        return native.bsr(
            self.csr,
            self.nqb,
            self.nkb,
            stride_b=self.heads * self.nqb if self.batch > 1 else 0,
            stride_h=self.nqb if self.heads > 1 else 0,
            q_ptr=self.q_ptr,
            k_ptr=self.k_ptr,
            var_stride=(0, 0) if self.q_ptr is None else (self.nqb + 1, self.nkb + 1),
        )

    def check(self, batch: int | None = None, heads: int | None = None) -> None:
        """Check the arrays, as attention would with ``validate``.

        Raises:
            InputError: columns unsorted, out of range or doubled, sizes that do not match n and m.
        """
        native.check_bsr(self.bsr(), batch or self.batch, heads or self.heads, self.n, self.m)

    def density(self) -> float:
        """Tiles listed / tiles that hold a visible pair (pairs of tokens with variable blocks)."""
        listed, visible = native.count_bsr(self.bsr(), self.batch, self.heads, self.n, self.m, self.causal)
        return listed / visible if visible else 0.0

    def mask(self) -> np.ndarray:
        """bool [batch, heads, nqb, nkb]: True = computed."""
        out = np.zeros((self.batch * self.heads * self.nqb, self.nkb), np.bool_)
        out[np.repeat(np.arange(len(out)), np.diff(self.csr.row_ptr)), self.csr.col] = True
        return out.reshape(self.batch, self.heads, self.nqb, self.nkb)
