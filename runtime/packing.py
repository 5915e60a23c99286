"""Padding-free batches, the host's part: from lengths to the index inputs of a packed graph.

A packed graph runs its linear layers on the V valid tokens of a batch, [V, D], and lays them out as [B, S] only inside
attention. Axes: B texts, S longest length, V tokens in all.

Source: Zhai et al., ByteTransformer, IPDPS 2023 (word_idx and prefix sums); the portable gather form is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgetok.errors import InputError

PACKED_INPUTS = ("word_idx", "unpack_idx")


@dataclass(frozen=True, eq=False)
class PackPlan:
    """Index arrays of one packed batch.

    Args:
        word_idx: int64 [V], row of each valid token in the padded batch flattened to [B*S].
        unpack_idx: int64 [B, S], row in the packed tokens of each position; pads point to V, one past the end.
        cu_seqlens: int64 [B+1], prefix sums of the lengths.
    """

    word_idx: np.ndarray
    unpack_idx: np.ndarray
    cu_seqlens: np.ndarray


def pack_plan(lengths: Sequence[int] | np.ndarray, width: int | None = None) -> PackPlan:
    """Plan a batch from its lengths.

    Args:
        lengths: tokens per text, each 0 or more, together at least 1.
        width: S; the longest length when None.

    Raises:
        InputError: no tokens, a negative length, or one over ``width``.
    """
    counts = np.asarray(lengths, np.int64).reshape(-1)
    if counts.size == 0 or counts.min() < 0 or counts.sum() == 0:
        raise InputError("a packed batch needs at least one token, and no negative length")
    span = int(counts.max()) if width is None else width
    if counts.max() > span:
        raise InputError(f"a text of {int(counts.max())} tokens does not fit in rows of {span}")
    ends = np.cumsum(counts)
    starts = ends - counts
    column = np.arange(span, dtype=np.int64)[None, :]
    valid = column < counts[:, None]
    unpack = np.where(valid, starts[:, None] + column, ends[-1])
    return PackPlan(np.flatnonzero(valid), unpack, np.concatenate([[0], ends]))


def pack_mask(mask: np.ndarray) -> PackPlan:
    """Plan a batch from a mask of ones and zeros [B, S], valid tokens first in each row.

    Raises:
        InputError: a row has a valid token after a pad.
    """
    keep = np.asarray(mask).astype(bool)
    if keep.ndim != 2 or (keep[:, 1:] & ~keep[:, :-1]).any():
        raise InputError("a packed batch needs a mask [B, S] with the pads on the right")
    return pack_plan(keep.sum(axis=1), keep.shape[1])


def plan_groups(lengths: Sequence[int] | np.ndarray, *, max_tokens: int, spread: float) -> list[np.ndarray]:
    """Split texts into groups of like length, longest first: attention inside a group still pads to its longest.

    Args:
        lengths: tokens per text.
        max_tokens: a group is closed when its padded size would exceed this.
        spread: a group is closed at a text shorter than the group's longest divided by this, if it holds enough
            tokens to keep the matrix products efficient.

    Returns:
        Index arrays that partition ``range(len(lengths))``.
    """
    counts = np.asarray(lengths, np.int64)
    order = np.argsort(-counts, kind="stable")
    groups: list[list[int]] = []
    tokens = 0
    for index in order.tolist():
        longest = int(counts[groups[-1][0]]) if groups else 0
        full = groups and (len(groups[-1]) + 1) * longest > max_tokens
        apart = groups and counts[index] * spread < longest and tokens >= _ENOUGH_TOKENS
        if not groups or full or apart:
            groups.append([])
            tokens = 0
        groups[-1].append(index)
        tokens += int(counts[index])
    return [np.asarray(g, np.int64) for g in groups]


_ENOUGH_TOKENS = 256  # rows below which a matrix product of a few hundred columns no longer fills the cores
