"""Token merging: which rows go where (ToMe, PiToMe), and the size-weighted mean. Numpy or DLPack in, numpy out.

The laws are those of the reduction methods ``tome`` and ``pitome``; a plan is data, as there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgetok.errors import InputError
from edgetok.native import ops as native_ops
from edgetok.native.tensors import numpy_from

KINDS = {"tome": 0, "pitome": 1, "pitome-hybrid": 2, "pitome-text": 3}


@dataclass(frozen=True, eq=False)
class Matching:
    """Which rows merge.

    Args:
        kept: int64 [B, N - r], the input row behind each output row.
        removed: int64 [B, r].
        target: int64 [B, r], the output row that each removed row goes into.
    """

    kept: np.ndarray
    removed: np.ndarray
    target: np.ndarray


@dataclass(frozen=True, eq=False)
class Merged:
    """Merged tokens.

    Args:
        x: float32 [B, M, C].
        size: float32 [B, M], how many source tokens each row stands for.
        map: int64 [B, N], the output row of each input row.
    """

    x: np.ndarray
    size: np.ndarray
    map: np.ndarray


def _kind(kind: str) -> int:
    if kind not in KINDS:
        raise InputError(f"kind={kind!r}", next=f"choose one of: {', '.join(KINDS)}")
    return KINDS[kind]


def _metric(metric: Any) -> tuple[np.ndarray, int, int, int]:
    m = numpy_from(metric, "metric")
    if m.ndim not in (3, 4):
        raise InputError(f"metric has shape {m.shape}", next="give [B, N, c] or [B, H, N, c]")
    return m, m.shape[0], m.shape[-2], m.shape[-1]


def _workspace(tokens: int, width: int) -> tuple[np.ndarray, int, int]:
    return native_ops.workspace(native_ops.library().etk_match_workspace(tokens, width))


def match_tokens(
    metric: Any, r: int, *, kind: str = "tome", keep: int = 0, size: Any = None, margin: float = 0.0,
    alpha: float = 1.0, int8: bool = False,
) -> Matching:  # fmt: skip
    """Choose r rows of each sample to merge into others.

    Args:
        metric: float32 [B, N, c], or keys [B, H, N, c], whose mean over H is taken.
        r: rows to remove, at most half of the free ones.
        kind: "tome"; "pitome" (within the 2r rows of highest energy), "pitome-hybrid" (all rows in energy order),
            "pitome-text".
        keep: leading rows that never move.
        size: float32 [B, N]; rows of size 0 are padding and merge among themselves first.
        margin, alpha: of PiToMe's energy.
        int8: similarities from INT8 codes of the unit rows.

    Raises:
        InputError: an r, keep or shape that does not fit.

    Source: Bolya et al., ICLR 2023; Tran et al., NeurIPS 2024.
    """
    number = _kind(kind)
    m, batch, tokens, width = _metric(metric)
    if not 0 <= r <= tokens:
        raise InputError(f"r={r} of {tokens} tokens")
    kept, removed = np.empty((batch, tokens - r), np.int64), np.empty((batch, r), np.int64)
    target = np.empty_like(removed)
    sizes = None if size is None else numpy_from(size, "size")
    owner, at, room = _workspace(tokens, width)
    native_ops.call("match", number, m, sizes, keep, r, margin, alpha, int(int8), kept, removed, target, at, room)
    del owner
    return Matching(kept, removed, target)


def pitome_energy(
    metric: Any, *, kind: str = "pitome", keep: int = 0, margin: float = 0.0, alpha: float = 1.0, int8: bool = False
) -> np.ndarray:
    """float32 [B, N - keep]: mean over all rows of ELU(cosine - margin), or of the Gaussian of "pitome-text".

    Arguments as ``match_tokens``.
    """
    number = _kind(kind)
    m, batch, tokens, width = _metric(metric)
    out = np.empty((batch, max(0, tokens - keep)), np.float32)
    owner, at, room = _workspace(tokens, width)
    native_ops.call("pitome_energy", number, m, keep, margin, alpha, int(int8), out, at, room)
    del owner
    return out


def merge_rows(x: Any, matching: Matching, *, size: Any = None) -> Merged:
    """Apply a matching: the size-weighted mean of each kept row and the removed rows that go into it.

    Args:
        x: float32 [B, N, C]. matching: all indices in range. size: float32 [B, N] or None for ones.

    Returns:
        Rows without a partner are copied bit for bit; the sum of size is kept.
    """
    source = numpy_from(x, "x")
    if source.ndim != 3 or matching.kept.ndim != 2 or matching.removed.ndim != 2:
        raise InputError(f"x has shape {source.shape}", next="give [B, N, C] and lists [B, M], [B, R]")
    (batch, tokens, width), m = source.shape, matching.kept.shape[1]
    y, sizes = np.empty((batch, m, width), np.float32), np.empty((batch, m), np.float32)
    where = np.empty((batch, tokens), np.int64)
    given = None if size is None else numpy_from(size, "size")
    room = native_ops.library().etk_merge_workspace(m, matching.removed.shape[1])
    owner, at, bytes_ = native_ops.workspace(room)
    lists = (matching.kept, matching.removed, matching.target)
    native_ops.call("merge_rows", source, given, *lists, y, sizes, where, at, bytes_)
    del owner
    return Merged(y, sizes, where)


def token_merge(
    x: Any, metric: Any, r: int, *, kind: str = "tome", keep: int = 0, size: Any = None, margin: float = 0.0,
    alpha: float = 1.0, int8: bool = False,
) -> Merged:  # fmt: skip
    """``match_tokens`` and ``merge_rows`` in one call.

    Args:
        x: float32 [B, N, C]. The others as ``match_tokens``.
    """
    number = _kind(kind)
    source = numpy_from(x, "x")
    m, batch, tokens, width = _metric(metric)
    if source.ndim != 3 or not 0 <= r <= tokens:
        raise InputError(f"r={r}, x of shape {source.shape}", next="give x as [B, N, C] and r from 0 to half of N")
    y, sizes = np.empty((batch, tokens - r, source.shape[2]), np.float32), np.empty((batch, tokens - r), np.float32)
    where = np.empty((batch, tokens), np.int64)
    given = None if size is None else numpy_from(size, "size")
    owner, at, room = _workspace(tokens, width)
    native_ops.call(
        "token_merge", number, m, source, given, keep, r, margin, alpha, int(int8), y, sizes, where, at, room
    )
    del owner
    return Merged(y, sizes, where)
