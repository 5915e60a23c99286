"""The index builders of libedgetok through ctypes: arrays in, arrays out, no policy.

Each builder runs twice: once for the sizes, once to fill arrays of exactly those sizes. Builders that must compute
scores to know a size get arrays for the worst case instead, and the tails are cut.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgetok.native import library
from edgetok.native.pool import pool
from edgetok.native.tensors import aligned_empty, check, tensor

_own = threading.local()
_KEPT_WORKSPACE = 1 << 26  # bytes


class Bsr(ctypes.Structure):
    """``etk_bsr``."""

    _fields_ = (
        ("bq", ctypes.c_int32),
        ("bk", ctypes.c_int32),
        ("nqb", ctypes.c_int64),
        ("nkb", ctypes.c_int64),
        ("row_ptr", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("col", ctypes.c_void_p),
        ("nnz", ctypes.c_int64),
        ("kind", ctypes.c_void_p),
        ("bits", ctypes.c_void_p),
        ("nbits", ctypes.c_int64),
        ("bits_idx", ctypes.c_void_p),
        ("q_block_ptr", ctypes.c_void_p),
        ("k_block_ptr", ctypes.c_void_p),
        ("var_stride_q", ctypes.c_int64),
        ("var_stride_k", ctypes.c_int64),
        ("stride_b", ctypes.c_int64),
        ("stride_h", ctypes.c_int64),
        ("head_pattern", ctypes.c_void_p),
    )


class Arrays(ctypes.Structure):
    """``etk_index_arrays``."""

    _fields_ = (
        ("row_ptr", ctypes.c_void_p),
        ("row_cap", ctypes.c_int64),
        ("col", ctypes.c_void_p),
        ("kind", ctypes.c_void_p),
        ("bits_idx", ctypes.c_void_p),
        ("nnz_cap", ctypes.c_int64),
        ("bits", ctypes.c_void_p),
        ("bits_cap", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("nnz", ctypes.c_int64),
        ("nbits", ctypes.c_int64),
    )


class WindowDesc(ctypes.Structure):
    """``etk_window_desc``."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("causal", ctypes.c_int32),
        ("n", ctypes.c_int64),
        ("m", ctypes.c_int64),
        ("left", ctypes.c_int64),
        ("right", ctypes.c_int64),
        ("sink", ctypes.c_int64),
    )


class RadialDesc(ctypes.Structure):
    """``etk_radial_desc``."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("sink_frame", ctypes.c_int32),
        ("frames", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("text", ctypes.c_int64),
        ("decay_q8", ctypes.c_int32),
    )


class ToppDesc(ctypes.Structure):
    """``etk_topp_desc``."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("causal", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("theta", ctypes.c_float),
        ("p", ctypes.c_float),
        ("topk", ctypes.c_float),
        ("min_keep", ctypes.c_int32),
        ("sink_blocks", ctypes.c_int32),
        ("local_blocks", ctypes.c_int32),
    )


class XattnDesc(ctypes.Structure):
    """``etk_xattn_desc``."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("causal", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("threshold", ctypes.c_float),
        ("stride", ctypes.c_int32),
        ("min_keep", ctypes.c_int32),
    )


class ClustersDesc(ctypes.Structure):
    """``etk_clusters_desc``."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("q_clusters", ctypes.c_int32),
        ("k_clusters", ctypes.c_int32),
        ("iterations", ctypes.c_int32),
        ("warm", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("p", ctypes.c_float),
        ("min_ratio", ctypes.c_float),
    )


class ParoDesc(ctypes.Structure):
    """``etk_paro_desc``."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("frames", ctypes.c_int64),
        ("height", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("text", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("alpha", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("density", ctypes.c_float),
        ("mass", ctypes.c_float),
    )


class ParoArrays(ctypes.Structure):
    """``etk_paro_arrays``."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("order", "quant", "sparse", "perm", "inverse"))


_CLUSTER_FIELDS = (
    "q_labels",
    "k_labels",
    "q_perm",
    "q_inverse",
    "k_perm",
    "k_inverse",
    "q_block_ptr",
    "k_block_ptr",
)


class ClusterArrays(ctypes.Structure):
    """``etk_cluster_arrays``."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in _CLUSTER_FIELDS)


@dataclass(frozen=True)
class Csr:
    """Arrays of one index as the library filled them; ``kind`` 0 full, 1 partial, ``bits_idx`` -1 = no bits."""

    row_ptr: np.ndarray
    col: np.ndarray
    kind: np.ndarray
    bits: np.ndarray
    bits_idx: np.ndarray


def desc_of(kind: type[ctypes.Structure], **values: Any) -> ctypes.Structure:
    """A versioned struct with its size set."""
    return kind(struct_size=ctypes.sizeof(kind), **values)


def _allocate(rows: int, nnz: int, nbits: int) -> tuple[Arrays, Csr]:
    csr = Csr(
        np.zeros(rows + 1, np.int64),
        np.empty(nnz, np.int32),
        np.empty(nnz, np.uint8),
        np.empty((nbits, 64), np.uint64),
        np.full(nnz, -1, np.int32),
    )
    arrays = Arrays(
        row_ptr=csr.row_ptr.ctypes.data,
        row_cap=rows + 1,
        col=csr.col.ctypes.data,
        kind=csr.kind.ctypes.data,
        bits_idx=csr.bits_idx.ctypes.data,
        nnz_cap=nnz,
        bits=csr.bits.ctypes.data,
        bits_cap=nbits,
    )
    return arrays, csr


def build(call: Callable[[Arrays, Bsr], int], what: str, worst: tuple[int, int] | None = None) -> Csr:
    """Run a builder.

    Args:
        call: given the arrays and the struct to describe them in, returns the status.
        what: the builder's name, for errors.
        worst: rows and entries at most; None asks the builder first.
    """
    lib = library()
    out = Bsr()
    if worst is None:
        sizes = Arrays()
        check(call(sizes, out), what, lib)
        arrays, csr = _allocate(sizes.rows, sizes.nnz, sizes.nbits)
    else:
        arrays, csr = _allocate(*worst, 0)
    check(call(arrays, out), what, lib)
    n = arrays.nnz
    return csr if n == len(csr.col) else Csr(csr.row_ptr, csr.col[:n], csr.kind[:n], csr.bits, csr.bits_idx[:n])


def window(n: int, m: int, left: int, right: int, sink: int, causal: bool) -> Csr:
    """``etk_bsr_from_window``."""
    lib = library()
    desc = desc_of(WindowDesc, causal=causal, n=n, m=m, left=left, right=right, sink=sink)
    return build(
        lambda a, b: lib.etk_bsr_from_window(ctypes.byref(desc), ctypes.byref(a), ctypes.byref(b)), "window index"
    )


def mask(array: np.ndarray, m: int, causal: bool) -> Csr:
    """``etk_bsr_from_mask``; bool or uint8 [.., N, M], or uint64 words [.., N, ceil(M/64)]."""
    lib = library()
    view = tensor(array)
    bytes_ = ctypes.c_uint64()
    size = ctypes.c_int64(m)
    check(lib.etk_bsr_from_mask_workspace(ctypes.byref(view), size, ctypes.byref(bytes_)), "mask index", lib)
    ws = aligned_empty(bytes_.value)

    def call(a: Arrays, b: Bsr) -> int:
        return lib.etk_bsr_from_mask(
            ctypes.byref(view),
            size,
            ctypes.c_int32(causal),
            ctypes.byref(a),
            ctypes.byref(b),
            ctypes.c_void_p(ws.ctypes.data),
            bytes_,
        )

    return build(call, "mask index")


def radial(frames: int, tokens: int, text: int, decay_q8: int, sink_frame: bool) -> Csr:
    """``etk_bsr_from_radial``."""
    lib = library()
    desc = desc_of(RadialDesc, sink_frame=sink_frame, frames=frames, tokens=tokens, text=text, decay_q8=decay_q8)
    return build(
        lambda a, b: lib.etk_bsr_from_radial(ctypes.byref(desc), ctypes.byref(a), ctypes.byref(b)), "radial index"
    )


def workspace(function: str, *args: Any) -> np.ndarray:
    """At least as many bytes as the builder's ``*_workspace`` function asks; small ones are kept by the thread."""
    lib = library()
    bytes_ = ctypes.c_uint64()
    check(getattr(lib, f"{function}_workspace")(*args, ctypes.byref(bytes_)), function, lib)
    kept: np.ndarray | None = getattr(_own, "buffer", None)
    if kept is not None and len(kept) >= bytes_.value:
        return kept
    buffer = aligned_empty(bytes_.value)
    if len(buffer) <= _KEPT_WORKSPACE:
        _own.buffer = buffer
    return buffer


def worst_case(q: np.ndarray, k: np.ndarray) -> tuple[int, int]:
    """Rows of an index over q [B, H, N, d] and k [B, Hkv, M, d], and entries at most."""
    rows = q.shape[0] * q.shape[1] * -(-q.shape[2] // 64)
    return rows, rows * -(-k.shape[2] // 64)


def from_scores(function: str, what: str, desc: ctypes.Structure, q: np.ndarray, k: np.ndarray, threads: int) -> Csr:
    """A builder of the form (desc, q, k, arrays, out, ws, bytes, pool)."""
    lib = library()
    lent = ctypes.c_void_p(pool(threads))
    views = [ctypes.byref(tensor(q)), ctypes.byref(tensor(k))]
    ws = workspace(function, ctypes.byref(desc), *views, lent)
    call = getattr(lib, function)

    def run(a: Arrays, b: Bsr) -> int:
        space = (ctypes.c_void_p(ws.ctypes.data), ctypes.c_uint64(len(ws)))
        return int(call(ctypes.byref(desc), *views, ctypes.byref(a), ctypes.byref(b), *space, lent))

    return build(run, what, worst_case(q, k))


def topp(q: np.ndarray, k: np.ndarray, threads: int, **values: Any) -> Csr:
    """``etk_bsr_from_topp``; ``values`` are the fields of ``etk_topp_desc``."""
    return from_scores("etk_bsr_from_topp", "top-p index", desc_of(ToppDesc, **values), q, k, threads)


def xattn(q: np.ndarray, k: np.ndarray, threads: int, **values: Any) -> Csr:
    """``etk_bsr_from_xattn``; ``values`` are the fields of ``etk_xattn_desc``."""
    return from_scores("etk_bsr_from_xattn", "antidiagonal index", desc_of(XattnDesc, **values), q, k, threads)


def clusters(
    q: np.ndarray, k: np.ndarray, threads: int, labels: tuple[np.ndarray, np.ndarray] | None, **values: Any
) -> tuple[Csr, dict[str, np.ndarray]]:
    """``etk_bsr_from_clusters``; ``values`` are the fields of ``etk_clusters_desc``, ``labels`` a warm start."""
    desc = desc_of(ClustersDesc, warm=labels is not None, **values)
    lib = library()
    lent = ctypes.c_void_p(pool(threads))
    views = [ctypes.byref(tensor(q)), ctypes.byref(tensor(k))]
    ws = workspace("etk_bsr_from_clusters", ctypes.byref(desc), *views, lent)
    of_q, of_k = q.shape[:3], k.shape[:3]
    sizes = (of_q, of_k, of_q, of_q, of_k, of_k)
    found = {name: np.zeros(size, np.int32) for name, size in zip(_CLUSTER_FIELDS, sizes)}
    found["q_block_ptr"] = np.zeros((of_q[0] * of_q[1], values["q_clusters"] + 1), np.int32)
    found["k_block_ptr"] = np.zeros((of_q[0] * of_q[1], values["k_clusters"] + 1), np.int32)
    if labels is not None:
        found["q_labels"][...], found["k_labels"][...] = labels
    to = ClusterArrays(**{name: array.ctypes.data for name, array in found.items()})

    def run(a: Arrays, b: Bsr) -> int:
        space = (ctypes.c_void_p(ws.ctypes.data), ctypes.c_uint64(len(ws)))
        out = (ctypes.byref(to), ctypes.byref(a), ctypes.byref(b))
        return int(lib.etk_bsr_from_clusters(ctypes.byref(desc), *views, *out, *space, lent))

    rows = of_q[0] * of_q[1] * values["q_clusters"]
    return build(run, "cluster index", (rows, rows * values["k_clusters"])), found


def paro(q: np.ndarray, k: np.ndarray, threads: int, **values: Any) -> tuple[Csr, dict[str, np.ndarray]]:
    """``etk_bsr_from_paro``; ``values`` are the fields of ``etk_paro_desc``."""
    lib = library()
    desc = desc_of(ParoDesc, **values)
    lent = ctypes.c_void_p(pool(threads))
    views = [ctypes.byref(tensor(q)), ctypes.byref(tensor(k))]
    ws = workspace("etk_bsr_from_paro", ctypes.byref(desc), *views, lent)
    heads, n = q.shape[1], q.shape[2]
    found: dict[str, np.ndarray] = {
        "order": np.zeros(heads, np.int32),
        "quant": np.zeros((heads, 6), np.float64),
        "sparse": np.zeros((heads, 6), np.float64),
        "perm": np.zeros((heads, n), np.int32),
        "inverse": np.zeros((heads, n), np.int32),
    }
    to = ParoArrays(**{name: array.ctypes.data for name, array in found.items()})

    def run(a: Arrays, b: Bsr) -> int:
        space = (ctypes.c_void_p(ws.ctypes.data), ctypes.c_uint64(len(ws)))
        out = (ctypes.byref(to), ctypes.byref(a), ctypes.byref(b))
        return int(lib.etk_bsr_from_paro(ctypes.byref(desc), *views, *out, *space, lent))

    rows, entries = worst_case(q[:1], k[:1])
    return build(run, "axis-order index", (rows, entries)), found


def bsr(
    csr: Csr,
    nqb: int,
    nkb: int,
    stride_b: int = 0,
    stride_h: int = 0,
    q_ptr: np.ndarray | None = None,
    k_ptr: np.ndarray | None = None,
    var_stride: tuple[int, int] = (0, 0),
) -> Bsr:
    """``etk_bsr`` over arrays that the caller keeps alive; with ``q_ptr`` and ``k_ptr`` blocks are variable."""
    size = 64 if q_ptr is None else 0
    has_bits = len(csr.bits) > 0
    return Bsr(
        bq=size,
        bk=size,
        nqb=nqb,
        nkb=nkb,
        row_ptr=csr.row_ptr.ctypes.data,
        rows=len(csr.row_ptr) - 1,
        col=csr.col.ctypes.data,
        nnz=len(csr.col),
        kind=csr.kind.ctypes.data,
        bits=csr.bits.ctypes.data if has_bits else None,
        nbits=len(csr.bits),
        bits_idx=csr.bits_idx.ctypes.data if has_bits else None,
        q_block_ptr=None if q_ptr is None else q_ptr.ctypes.data,
        k_block_ptr=None if k_ptr is None else k_ptr.ctypes.data,
        var_stride_q=var_stride[0],
        var_stride_k=var_stride[1],
        stride_b=stride_b,
        stride_h=stride_h,
    )


def check_bsr(index: Bsr, batch: int, heads: int, n: int, m: int) -> None:
    """``etk_bsr_check``.

    Raises:
        InputError: the content is wrong.
    """
    lib = library()
    sizes = [ctypes.c_int64(x) for x in (batch, heads, n, m)]
    check(lib.etk_bsr_check(ctypes.byref(index), *sizes), "block index", lib)


def count_bsr(index: Bsr, batch: int, heads: int, n: int, m: int, causal: bool) -> tuple[int, int]:
    """``etk_bsr_count``: listed and visible tiles (pairs with variable blocks)."""
    lib = library()
    listed, visible = ctypes.c_int64(), ctypes.c_int64()
    sizes = [ctypes.c_int64(x) for x in (batch, heads, n, m)]
    status = lib.etk_bsr_count(
        ctypes.byref(index), *sizes, ctypes.c_int32(causal), ctypes.byref(listed), ctypes.byref(visible)
    )
    check(status, "block index", lib)
    return listed.value, visible.value


__all__ = [
    "Arrays",
    "Bsr",
    "Csr",
    "bsr",
    "build",
    "check_bsr",
    "clusters",
    "count_bsr",
    "mask",
    "paro",
    "radial",
    "topp",
    "window",
    "worst_case",
    "xattn",
]
