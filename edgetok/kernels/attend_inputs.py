"""What attention takes beside q, k and v, checked and turned into fields and arrays of the library's structs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgetok.errors import InputError
from edgetok.kernels.index.blocks import BlockIndex
from edgetok.native import attn as native
from edgetok.native.index import Bsr
from edgetok.native.tensors import numpy_from


@dataclass(frozen=True)
class AttentionOptions:
    """The rarer inputs and switches of attention. Everything is off by default.

    Args:
        q_pos: int [B or 1, N], positions of queries; default i + (keys - N). Packed: [tokens].
        k_pos: int [B or 1, Hkv or 1, M], positions of keys; default j. Packed: [tokens].
        q_perm: int32 [B or 1, H or 1, N]: row r of the problem is row q_perm[r] of the tensor.
        k_perm: int32 [B or 1, Hkv or 1, M], the same for keys and values.
        o_perm: int32, as q_perm: row r is written to row o_perm[r]; default q_perm, which undoes the order.
        gather: int32 [B, Hkv or 1, n]: attend only to these keys; -1 is padding.
        cu_q: int [B + 1], starts of the sequences in packed q [tokens, H, d]; with cu_k.
        cu_k: int [B + 1], the same for packed k and v.
        seq_k: int32 [B]: keys that count, of M.
        alibi_slopes: float32 [H]: bias slope * (key position - query position).
        sink_logit: float32 [H]: one more logit per row, whose value is zero.
        gate: float32 [B, H, N, 1 or dv]: multiplies the output.
        clip: (gamma, zeta), p = clip((zeta - gamma) p + gamma, 0, 1), gamma <= 0, zeta >= 1; two passes.
        k_mean: float32 [B or 1, Hkv, d]: subtracted from K before INT8 (undone exactly); default the mean of all keys.
        smooth_k: subtract k_mean at all.
        smooth_v: subtract the mean of V before INT8 and add it back.
        tile_skip_log2: leave out tiles whose maxima lie this many powers of two below the running ones; 0 = off.
        check_finite: refuse NaN and infinity; otherwise NaN counts as 0 and infinity as the largest finite value.
        empty_rows_nan: rows that see no key give NaN, not 0.
        isa: cap of the instruction set, as ``avx2``.
    """

    q_pos: Any = None
    k_pos: Any = None
    q_perm: Any = None
    k_perm: Any = None
    o_perm: Any = None
    gather: Any = None
    cu_q: Any = None
    cu_k: Any = None
    seq_k: Any = None
    alibi_slopes: Any = None
    sink_logit: Any = None
    gate: Any = None
    clip: tuple[float, float] | None = None
    k_mean: Any = None
    smooth_k: bool = True
    smooth_v: bool = False
    tile_skip_log2: float = 0.0
    check_finite: bool = False
    empty_rows_nan: bool = False
    isa: str | None = None


@dataclass(frozen=True)
class Attended:
    """What attention gave.

    Args:
        o: float32, the shape of q with the width of v.
        lse: float32 [B, H, N] (packed: [tokens, H]): natural log of each row's sum; -inf where no key is seen.
        colmass: float32 [B, H or Hkv, M]: sum over rows of p.
        scores: float32 [B, H, rows, M]: logits of the last rows, -inf where masked.
        nonfinite: NaN or infinity was met in an input and replaced.
        empty_rows: at least one row saw no key.
    """

    o: np.ndarray
    lse: np.ndarray | None
    colmass: np.ndarray | None
    scores: np.ndarray | None
    nonfinite: bool
    empty_rows: bool


DEFAULT = AttentionOptions()
_SAME_NAME = (
    "q_pos",
    "k_pos",
    "q_perm",
    "k_perm",
    "o_perm",
    "gather",
    "cu_q",
    "cu_k",
    "seq_k",
    "sink_logit",
    "gate",
    "k_mean",
)


def _float_array(value: Any, name: str, rank: int) -> np.ndarray:
    array = numpy_from(value, name)
    if array.dtype not in (np.float32, np.float16):
        raise InputError(f"{name} is {array.dtype}, expected float32 or float16", next=f"{name}.astype('float32')")
    if array.ndim != rank:
        axes = "[B, H, tokens, width]" if rank == 4 else "[tokens, H, width] (cu_q is given)"
        raise InputError(f"{name} has shape {array.shape}, expected {axes}")
    if array.size and array.shape[-1] > 1 and array.strides[-1] != array.itemsize:
        raise InputError(
            f"the last axis of {name} is not dense (strides {array.strides})", next=f"np.ascontiguousarray({name})"
        )
    return array


def limits(window: int | tuple[int, int] | None, sink: int) -> dict[str, int]:
    if window is None:
        if sink:
            raise InputError("sink needs a window", next="pass window=(left, right)")
        return {}
    left, right = (window, window) if isinstance(window, int) else window
    if min(left, right, sink) < 0:
        raise InputError(f"window {window!r} with sink {sink}: expected counts of at least 0")
    return {"win_left": left, "win_right": right, "sink": sink}


def bsr(index: BlockIndex | None, arrays: dict[str, np.ndarray], b: int, h: int, n: int, m: int) -> Bsr | None:
    if index is None:
        return None
    if (index.n, index.m) != (n, m) or index.batch not in (1, b) or index.heads not in (1, h):
        got = f"{index.batch} x {index.heads} heads, {index.n} x {index.m} tokens"
        raise InputError(f"the block index is for {got}; the arrays have {b} x {h} heads, {n} x {m} tokens")
    for name in ("q_perm", "k_perm"):
        if (perm := getattr(index, name)) is not None:
            arrays.setdefault(name, perm)
    return index.bsr()


def mask_kind(causal: bool, window: object, bsr: object, gather: object) -> int:
    kind = native.CAUSAL if causal else 0
    for given, bit in ((window, native.WINDOW), (bsr, native.BSR), (gather, native.GATHER)):
        kind |= bit if given is not None else 0
    return kind


def flags(options: AttentionOptions, lse: bool, column_mass: str | None, score_rows: int) -> int:
    chosen = (
        (lse, native.RETURN_LSE),
        (column_mass is not None, native.RETURN_COLMASS),
        (column_mass == "key", native.COLMASS_PER_KV_HEAD),
        (score_rows > 0, native.RETURN_SCORES),
        (options.check_finite, native.CHECK_FINITE),
        (not options.smooth_k, native.NO_SMOOTH_K),
        (options.smooth_v, native.SMOOTH_V),
        (options.empty_rows_nan, native.EMPTY_ROWS_NAN),
    )
    return sum(bit for on, bit in chosen if on)


def inputs(q: Any, k: Any, v: Any, key_bias: Any, options: AttentionOptions) -> dict[str, np.ndarray]:
    rank = 3 if options.cu_q is not None else 4
    arrays = {name: _float_array(x, name, rank) for name, x in (("q", q), ("k", k), ("v", v))}
    for name in _SAME_NAME:
        if (value := getattr(options, name)) is not None:
            arrays[name] = numpy_from(value, name)
    if options.alibi_slopes is not None:
        arrays["alibi_slope"] = numpy_from(options.alibi_slopes, "alibi_slopes")
    if key_bias is not None:
        arrays["key_bias"] = numpy_from(key_bias, "key_bias")
    return arrays


def fields(
    arrays: dict[str, np.ndarray], compute: str, scale: float | None, softcap: float, options: AttentionOptions
) -> dict[str, Any]:
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    if compute not in native.COMPUTE:
        raise InputError(f"compute {compute!r} is not known", next=f"one of: {', '.join(native.COMPUTE)}")
    if options.isa not in native.ISA:
        raise InputError(f"isa {options.isa!r} is not known", next=f"one of: {', '.join(k for k in native.ISA if k)}")
    packed = "cu_q" in arrays
    if packed:
        batch, hq, hkv = len(arrays["cu_q"]) - 1, q.shape[1], k.shape[1]
        longest = [int(np.diff(arrays[c]).max(initial=0)) for c in ("cu_q", "cu_k") if c in arrays]
        n, m = max(longest[0], 0), max(longest[-1], 0)
    else:
        batch, hq, n, hkv, m = q.shape[0], q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    _agree(q, k, v)
    if hkv == 0 or hq % hkv:
        raise InputError(f"q has {hq} heads and k {hkv}: expected a whole number of query heads for each key head")
    gamma, zeta = options.clip or (0.0, 0.0)
    gathered = arrays["gather"].shape[-1] if "gather" in arrays else 0
    return {
        "batch": batch, "hq": hq, "hkv": hkv, "d": q.shape[-1], "dv": v.shape[-1],
        "max_n": n, "max_m": max(m, gathered),
        "compute": native.COMPUTE[compute], "scale": scale or 0.0, "softcap": softcap, "clip_gamma": gamma,
        "clip_zeta": zeta, "tile_skip_log2": options.tile_skip_log2, "isa_cap": native.ISA[options.isa],
    }  # fmt: skip


def check_threads(threads: int) -> None:
    if not 1 <= threads <= 256:
        raise InputError(f"threads is {threads}, expected 1 to 256")


def _agree(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    """Sizes that q, k and v share, so that a message can name the argument; the library checks the rest."""
    if k.shape[:-1] != v.shape[:-1]:
        raise InputError(f"v has shape {v.shape}, k {k.shape}: all axes but the last must be the same")
    if q.shape[-1] != k.shape[-1]:
        raise InputError(f"k has width {k.shape[-1]}, q {q.shape[-1]}: they must be the same")
    if q.ndim == 4 and q.shape[0] != k.shape[0]:
        raise InputError(f"k has a batch of {k.shape[0]}, q of {q.shape[0]}: they must be the same")


def outputs(
    arrays: dict[str, np.ndarray], out: np.ndarray | None, lse: bool, column_mass: str | None, score_rows: int
) -> None:
    """Allocate what is asked for into ``arrays``; packed tensors have no batch axis, heads follow tokens."""
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    shape = (*q.shape[:-1], v.shape[-1])
    if out is not None and (out.shape != shape or out.dtype != np.float32 or not out.flags.writeable):
        raise InputError(f"out is {out.dtype} {out.shape}, expected writable float32 {shape}")
    arrays["o"] = np.empty(shape, np.float32) if out is None else out
    if lse:
        arrays["lse"] = np.empty(q.shape[:-1], np.float32)
    if column_mass is not None:
        heads = q.shape[1] if column_mass == "query" else k.shape[1]
        arrays["colmass"] = np.empty(
            (k.shape[0], heads, k.shape[2]) if q.ndim == 4 else (k.shape[0], heads), np.float32
        )
    if score_rows:
        arrays["scores"] = np.empty((*q.shape[:2], score_rows, k.shape[2]), np.float32)
