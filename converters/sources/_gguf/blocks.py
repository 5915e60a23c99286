"""The tensor types of GGUF: how many bytes a block takes, and the numbers it stands for.

Every type is an array of blocks along a row; a row's length is a multiple of the block's. Codes are those of the
format's definition: nibbles 0..15 of the first half of a block lie in the low four bits, those of the second half in
the high four. K-types group eight (16) sub-blocks of 32 (16) under one half-precision scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Blocks = np.ndarray  # uint8 [blocks, bytes of one block]


@dataclass(frozen=True)
class TensorType:
    """One tensor type.

    Args:
        number: as stored in the file.
        name: as "Q4_1".
        size: elements of a block.
        bytes: of a block.
        decode: uint8 [n, bytes] to float32 [n, size].
    """

    number: int
    name: str
    size: int
    bytes: int
    decode: Callable[[Blocks], np.ndarray]


def _half(blocks: Blocks, at: int) -> np.ndarray:
    """The half-precision number at byte ``at`` of each block, float32 [n, 1]."""
    return blocks[:, at : at + 2].copy().view("<f2").astype(np.float32)


def nibbles(codes: np.ndarray) -> np.ndarray:
    """uint8 [n, k] to the 2k codes 0..15: all low nibbles, then all high ones."""
    return np.concatenate([codes & 15, codes >> 4], -1)


def fifth_bits(blocks: Blocks, at: int) -> np.ndarray:
    """The 32 high bits stored as one little-endian word, uint8 [n, 32] of 0 or 16."""
    word = blocks[:, at : at + 4].copy().view("<u4")
    return (((word >> np.arange(32, dtype=np.uint32)) & 1) << 4).astype(np.uint8)


def _q4_0(b: Blocks) -> np.ndarray:
    return _half(b, 0) * (nibbles(b[:, 2:18]).astype(np.float32) - 8)


def _q4_1(b: Blocks) -> np.ndarray:
    return _half(b, 0) * nibbles(b[:, 4:20]).astype(np.float32) + _half(b, 2)


def _q5_0(b: Blocks) -> np.ndarray:
    return _half(b, 0) * ((nibbles(b[:, 6:22]) | fifth_bits(b, 2)).astype(np.float32) - 16)


def _q5_1(b: Blocks) -> np.ndarray:
    return _half(b, 0) * (nibbles(b[:, 8:24]) | fifth_bits(b, 4)).astype(np.float32) + _half(b, 2)


def _q8_0(b: Blocks) -> np.ndarray:
    return _half(b, 0) * b[:, 2:34].copy().view(np.int8).astype(np.float32)


def six_bits(b: Blocks, at: int) -> tuple[np.ndarray, np.ndarray]:
    """The eight 6-bit scales and minima of Q4_K and Q5_K, packed in 12 bytes; each float32 [n, 8].

    Bytes 0-3 and 4-7 hold the first four of each in their low six bits; the last four take their low nibbles from
    bytes 8-11 and their high two bits from what the first eight bytes have left.
    """
    first, second, third = (b[:, at + i : at + i + 4] for i in (0, 4, 8))
    scale = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], 1)
    minimum = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], 1)
    return scale.astype(np.float32), minimum.astype(np.float32)


def _k_blocks(b: Blocks, codes: np.ndarray) -> np.ndarray:
    """d * scale * code - dmin * minimum, codes [n, 8, 32]."""
    scale, minimum = six_bits(b, 4)
    value = (_half(b, 0) * scale)[:, :, None] * codes.astype(np.float32) - (_half(b, 2) * minimum)[:, :, None]
    return value.reshape(len(b), 256)


def _q4_k(b: Blocks) -> np.ndarray:
    return _k_blocks(b, nibbles(b[:, 16:144].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(b: Blocks) -> np.ndarray:
    low = nibbles(b[:, 48:176].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    high = (b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1  # bit j belongs to sub-block j
    return _k_blocks(b, low | (high << 4))


def _q6_k(b: Blocks) -> np.ndarray:
    low = nibbles(b[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = (b[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    codes = (low | (high << 4)).astype(np.float32) - 32
    scale = b[:, 192:208].copy().view(np.int8).astype(np.float32).reshape(-1, 16, 1)
    return (_half(b, 208)[:, :, None] * scale * codes.reshape(-1, 16, 16)).reshape(len(b), 256)


def _f32(b: Blocks) -> np.ndarray:
    return b.copy().view("<f4")


def _f16(b: Blocks) -> np.ndarray:
    return b.copy().view("<f2").astype(np.float32)


def _bf16(b: Blocks) -> np.ndarray:
    return (b.copy().view("<u2").astype(np.uint32) << 16).view(np.float32)


TYPES: dict[int, TensorType] = {
    t.number: t
    for t in (
        TensorType(0, "F32", 1, 4, _f32),
        TensorType(1, "F16", 1, 2, _f16),
        TensorType(2, "Q4_0", 32, 18, _q4_0),
        TensorType(3, "Q4_1", 32, 20, _q4_1),
        TensorType(6, "Q5_0", 32, 22, _q5_0),
        TensorType(7, "Q5_1", 32, 24, _q5_1),
        TensorType(8, "Q8_0", 32, 34, _q8_0),
        TensorType(12, "Q4_K", 256, 144, _q4_k),
        TensorType(13, "Q5_K", 256, 176, _q5_k),
        TensorType(14, "Q6_K", 256, 210, _q6_k),
        TensorType(30, "BF16", 1, 2, _bf16),
    )
}
