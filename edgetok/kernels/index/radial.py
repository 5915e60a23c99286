"""Radial attention: frames see each other through windows that shrink with their distance in time."""

from __future__ import annotations

import numpy as np

from edgetok.kernels.index.blocks import BLOCK, BlockIndex, block_count
from edgetok.native import index as native
from edgetok.native.index import Csr


def from_radial(frames: int, tokens: int, *, text: int = 0, decay: float = 1.0, sink_frame: bool = False) -> BlockIndex:
    """Index of radial attention over ``frames * tokens`` video tokens followed by text tokens.

    Args:
        frames: frames.
        tokens: tokens of one frame.
        text: text tokens at the end; their blocks are always kept.
        decay: factor of the window width, in steps of 1/256, 1/256 to 256.
        sink_frame: every query sees frame 0.

    Raises:
        InputError: a number out of range, or more than 2^20 tokens.

    Source: Radial Attention (2025); its 128-blocks are 64-blocks here.
    """
    total = frames * tokens + text
    return BlockIndex(native.radial(frames, tokens, text, max(1, round(decay * 256)), sink_frame), total, total)


def radial_reference(frames: int, tokens: int, text: int, decay_q8: int, sink_frame: bool) -> Csr:
    """The law of :func:`from_radial`, through the full token mask."""
    video = frames * tokens
    total = video + text
    token = np.arange(video)
    frame, place = token // max(tokens, 1), token % max(tokens, 1)
    seen = np.zeros((video, video), np.bool_)
    for i in range(frames):
        for j in range(frames):
            seen[np.ix_(frame == i, frame == j)] = _frame_pair(place[:tokens], i, j, decay_q8, sink_frame)
    blocks = block_count(total)
    kept = np.ones((blocks, blocks), np.bool_)
    for r in range(video // BLOCK if text else blocks):
        for c in range(video // BLOCK if text else blocks):
            tile = seen[r * BLOCK : (r + 1) * BLOCK, c * BLOCK : (c + 1) * BLOCK]
            count = tile.sum(0)
            kept[r, c] = r == c or 5 * (3 * count > tile.shape[0]).sum() > 3 * (count > 0).sum()
    rows, cols = np.nonzero(kept)
    row_ptr = np.concatenate([[0], np.cumsum(kept.sum(1))]).astype(np.int64)
    none = np.zeros((0, BLOCK), np.uint64)
    return Csr(row_ptr, cols.astype(np.int32), np.zeros(len(rows), np.uint8), none, np.full(len(rows), -1, np.int32))


def _frame_pair(place: np.ndarray, i: int, j: int, decay_q8: int, sink_frame: bool) -> np.ndarray:
    tokens, distance = len(place), abs(i - j)
    if distance <= 1 or (sink_frame and j == 0):
        return np.ones((tokens, tokens), np.bool_)
    e = tokens.bit_length() - distance.bit_length()
    if e < 6 and distance % (1 << (6 - e)):
        return np.zeros((tokens, tokens), np.bool_)
    width = max(int(decay_q8 * 2.0**e) >> 8 if e >= 0 else (decay_q8 >> (8 - e)), BLOCK)
    return np.abs(place[:, None] - place[None]) <= width
