"""A matrix as MatMulNBits stores it, and the tensor types of GGUF carried over code for code.

w[n, k] = (code[n, k] - zero[n, b]) * scale[n, b], b the block of k. Codes of 5 and 6 bits widen to 8; an offset m
(w = d code + m) becomes the float zero point -m/d, and where d is 0 the scale is 1, the codes 0 and the zero point -m.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgetok.converters.sources._gguf import blocks as b


@dataclass(frozen=True)
class Packed:
    """Codes of one matrix.

    Args:
        codes: uint8 [N, blocks, block], one code an element.
        scales: float32 [N, blocks].
        zeros: float32 [N, blocks], or None for the middle of the range (8 or 128).
        bits: 4 or 8.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    bits: int

    @property
    def block(self) -> int:
        return int(self.codes.shape[2])

    def stored(self) -> np.ndarray:
        """The codes as bytes [N, blocks, block * bits / 8], the even element of a pair in the low nibble."""
        return self.codes if self.bits == 8 else self.codes[..., 0::2] | (self.codes[..., 1::2] << 4)

    def floats(self) -> np.ndarray:
        """The matrix [N, K], float32."""
        zero = np.float32(1 << (self.bits - 1)) if self.zeros is None else self.zeros[..., None]
        return ((self.codes.astype(np.float32) - zero) * self.scales[..., None]).reshape(len(self.codes), -1)

    def rows(self, order: np.ndarray) -> Packed:
        """Whole rows in another order: exact, since no block crosses a row."""
        return Packed(
            self.codes[order], self.scales[order], None if self.zeros is None else self.zeros[order], self.bits
        )


def _affine(codes: np.ndarray, d: np.ndarray, m: np.ndarray, bits: int) -> Packed:
    """w = d code + m with one d and m per block."""
    flat = d == 0
    scales = np.where(flat, 1, d).astype(np.float32)
    codes = np.where(flat[..., None], 0, codes).astype(np.uint8)
    return Packed(codes, scales, (-m / scales).astype(np.float32), bits)


def _half(raw: np.ndarray, at: int) -> np.ndarray:
    return raw[..., at : at + 2].copy().view("<f2")[..., 0].astype(np.float32)


def _q4_0(raw: np.ndarray) -> Packed:
    return Packed(b.nibbles(raw[..., 2:18]), _half(raw, 0), None, 4)


def _q4_1(raw: np.ndarray) -> Packed:
    return _affine(b.nibbles(raw[..., 4:20]), _half(raw, 0), _half(raw, 2), 4)


def _fifth(raw: np.ndarray, at: int) -> np.ndarray:
    return b.fifth_bits(raw.reshape(-1, raw.shape[-1]), at).reshape(*raw.shape[:-1], 32)


def _q5_0(raw: np.ndarray) -> Packed:
    codes = b.nibbles(raw[..., 6:22]) | _fifth(raw, 2)
    return Packed(codes, _half(raw, 0), np.full(raw.shape[:-1], 16, np.float32), 8)


def _q5_1(raw: np.ndarray) -> Packed:
    return _affine(b.nibbles(raw[..., 8:24]) | _fifth(raw, 4), _half(raw, 0), _half(raw, 2), 8)


def _q8_0(raw: np.ndarray) -> Packed:
    return Packed(raw[..., 2:34] ^ 0x80, _half(raw, 0), None, 8)  # s8 + 128 flips the top bit


def _k_scales(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset of each sub-block of 32, [N, blocks * 8]."""
    scale, low = b.six_bits(raw.reshape(-1, raw.shape[-1]), 4)
    shape = (raw.shape[0], raw.shape[1] * 8)
    d, m = _half(raw, 0)[..., None], _half(raw, 2)[..., None]
    return (d * scale.reshape(*raw.shape[:-1], 8)).reshape(shape), -(m * low.reshape(*raw.shape[:-1], 8)).reshape(shape)


def _q4_k(raw: np.ndarray) -> Packed:
    codes = b.nibbles(raw[..., 16:144].reshape(len(raw), -1, 4, 32)).reshape(len(raw), -1, 32)
    return _affine(codes, *_k_scales(raw), 4)


def _q5_k(raw: np.ndarray) -> Packed:
    low = b.nibbles(raw[..., 48:176].reshape(len(raw), -1, 4, 32)).reshape(len(raw), -1, 8, 32)
    high = (raw[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    return _affine((low | (high << 4)).reshape(len(raw), -1, 32), *_k_scales(raw), 8)


def _q6_k(raw: np.ndarray) -> Packed:
    low = b.nibbles(raw[..., :128].reshape(len(raw), -1, 2, 64)).reshape(len(raw), -1, 2, 4, 32)
    high = (raw[..., 128:192].reshape(len(raw), -1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    scale = raw[..., 192:208].copy().view(np.int8).astype(np.float32)
    scales = (_half(raw, 208)[..., None] * scale).reshape(len(raw), -1)
    codes = (low | (high << 4)).reshape(len(raw), -1, 16)
    return Packed(codes, scales, np.full(scales.shape, 32, np.float32), 8)


_PACK: dict[str, Callable[[np.ndarray], Packed]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


def pack(kind: str, raw: np.ndarray) -> Packed | None:
    """A matrix's stored blocks uint8 [N, blocks, bytes] as codes; None for float types."""
    make = _PACK.get(kind)
    return None if make is None else make(raw)
