"""Attention through ctypes: the structs, plans kept by shape, and a workspace for each thread.

A plan and a workspace are made for the first call of a shape; later calls allocate nothing but their outputs. Plans are
shared between Python threads (they are immutable), workspaces are not.
"""

from __future__ import annotations

import ctypes
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from edgetok import native
from edgetok.native.index import Bsr
from edgetok.native.pool import pool
from edgetok.native.tensors import Tensor, aligned_empty, check, tensor

COMPUTE = {"fp32": 0, "int8": 2, "int8_float_pv": 3}
CAUSAL, WINDOW, BSR, GATHER = 1, 2, 4, 8
RETURN_LSE, RETURN_COLMASS, RETURN_SCORES, CHECK_FINITE = 1, 2, 4, 16
NO_SMOOTH_K, SMOOTH_V, EMPTY_ROWS_NAN, COLMASS_PER_KV_HEAD = 64, 128, 512, 1024
NOTE_NONFINITE, NOTE_EMPTY_ROWS = 1, 2
ISA = {None: 0, "scalar": 1, "avx2": 2, "avxvnni": 3, "avx512vnni": 4, "avx512vbmi": 5, "neon": 18, "neondot": 19}
ISA |= {"neoni8mm": 20}
_KEPT_PLANS = 64
_KEPT_WORKSPACE = 1 << 28  # bytes; a larger one is given back when its call ends


class Desc(ctypes.Structure):
    """``etk_attn_desc``."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("version", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("batch", "hq", "hkv", "d", "dv")),
        ("max_n", ctypes.c_int64),
        ("max_m", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("phase", "compute", "kv_layout", "mask_kind")),
        *((name, ctypes.c_float) for name in ("scale", "softcap", "clip_gamma", "clip_zeta")),
        *((name, ctypes.c_int64) for name in ("win_left", "win_right", "sink")),
        ("softmax_mode", ctypes.c_int32),
        ("flags", ctypes.c_uint32),
        ("tile_skip_log2", ctypes.c_float),
        ("isa_cap", ctypes.c_int32),
    )


class Io(ctypes.Structure):
    """``etk_attn_io``."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        *((name, Tensor) for name in ("q", "k", "v", "o")),
        ("kv", ctypes.c_void_p),
        ("kv_layer", ctypes.c_int32),
        ("kv_seq", ctypes.c_int32),
        ("bsr", Bsr),
        *((name, Tensor) for name in ("gather", "cu_q", "cu_k", "seq_k", "key_bias", "alibi_slope", "q_pos", "k_pos")),
        *((name, Tensor) for name in ("q_perm", "k_perm", "o_perm", "sink_logit", "gate", "k_mean")),
        *((name, Tensor) for name in ("lse", "colmass", "scores")),
        ("score_rows", ctypes.c_int64),
    )


class ColmassDesc(ctypes.Structure):
    """``etk_colmass_desc``."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("temperature", ctypes.c_float),
        ("seed", ctypes.c_uint64),
        ("layer", ctypes.c_int32),
        ("sum_group", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Plan:
    """An ``etk_attn_plan`` that lives as long as the process keeps it."""

    address: int
    workspace: int
    kernel: str


@cache
def _lib() -> ctypes.CDLL:
    lib = native.library()
    ptr, size = ctypes.c_void_p, ctypes.c_uint64
    lib.etk_attn_plan_create.argtypes = [ptr, ptr, ctypes.c_int32, ptr]
    lib.etk_attn_plan_free.argtypes = [ptr]
    lib.etk_attn_plan_free.restype = None
    lib.etk_attn_workspace.argtypes = [ptr, ptr, ptr]
    lib.etk_attn_run.argtypes = [ptr, ptr, ptr, size, ptr]
    lib.etk_attn_validate.argtypes = [ptr, ptr]
    lib.etk_attn_merge.argtypes = [ctypes.c_int32, ptr, ptr, ptr, ptr]
    lib.etk_attn_colmass.argtypes = [ptr, ptr, ptr, ptr, ptr, ptr, size, ptr]
    lib.etk_attn_plan_kernel.argtypes = [ptr]
    lib.etk_attn_plan_kernel.restype = ctypes.c_char_p
    return lib


class _Plans:
    """The last plans made, by descriptor. A plan put out is freed by its last user, never while it runs."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kept: OrderedDict[tuple[bytes, int], _Owner] = OrderedDict()

    def get(self, desc: Desc, threads: int, io: Io | None) -> _Owner:
        key = (bytes(desc), threads)
        with self.lock:
            if io is None and (owner := self.kept.get(key)) is not None:
                self.kept.move_to_end(key)
                return owner
        owner = _Owner(desc, threads, io)
        if io is None:
            with self.lock:
                self.kept[key] = owner
                while len(self.kept) > _KEPT_PLANS:
                    self.kept.popitem(last=False)
        return owner


class _Owner:
    """Frees its plan when the last reference goes."""

    def __init__(self, desc: Desc, threads: int, io: Io | None) -> None:
        lib = _lib()
        out, size, align = ctypes.c_void_p(), ctypes.c_uint64(), ctypes.c_uint64()
        shape = None if io is None else ctypes.byref(io)
        check(lib.etk_attn_plan_create(ctypes.byref(desc), shape, threads, ctypes.byref(out)), "attention", lib)
        self._free = lib.etk_attn_plan_free
        address = out.value or 0
        check(lib.etk_attn_workspace(address, ctypes.byref(size), ctypes.byref(align)), "attention", lib)
        self.plan = Plan(address, size.value, lib.etk_attn_plan_kernel(address).decode())

    def __del__(self) -> None:
        if plan := getattr(self, "plan", None):
            self._free(plan.address)


_plans = _Plans()
_own = threading.local()


def _workspace(size: int) -> np.ndarray:
    """A buffer of this thread with at least ``size`` bytes; small ones are kept and grow."""
    kept: np.ndarray | None = getattr(_own, "buffer", None)
    if kept is not None and len(kept) >= size:
        return kept
    buffer = aligned_empty(size)
    if size <= _KEPT_WORKSPACE:
        _own.buffer = buffer
    return buffer


def plan_of(fields: dict[str, Any], threads: int) -> _Owner:
    """A kept plan for these ``etk_attn_desc`` fields; it lives as long as the caller holds what is returned."""
    return _plans.get(Desc(struct_size=ctypes.sizeof(Desc), **fields), threads, None)


def describe(threads: int, **values: Any) -> str:
    """The name of the kernel that a plan of these ``etk_attn_desc`` fields uses."""
    return _plans.get(Desc(struct_size=ctypes.sizeof(Desc), **values), threads, None).plan.kernel


def fill_io(
    arrays: dict[str, np.ndarray], bsr: Bsr | None, score_rows: int, kv: tuple[int, int, int] | None = None
) -> Io:
    """``etk_attn_io`` over arrays that the caller keeps alive. ``kv``: address of a cache, layer, first sequence."""
    io = Io(struct_size=ctypes.sizeof(Io), score_rows=score_rows)
    if kv is not None:
        io.kv, io.kv_layer, io.kv_seq = kv
    for name, array in arrays.items():
        setattr(io, name, tensor(array))
    if bsr is not None:
        io.bsr = bsr
    return io


def run(
    fields: dict[str, Any],
    arrays: dict[str, np.ndarray],
    bsr: Bsr | None = None,
    score_rows: int = 0,
    threads: int = 1,
    kv: tuple[int, int, int] | None = None,
) -> int:
    """Run attention; outputs are among ``arrays``.

    Args:
        fields: of ``etk_attn_desc``, less struct_size.
        arrays: tensors of ``etk_attn_io`` by name.
        bsr: the block index when mask_kind holds BSR; its arrays are kept alive by the caller.
        score_rows: rows of ``scores``.
        threads: 1..256.
        kv: address of an ``etk_kv_cache``, layer and first sequence, for ``kv_layout`` PAGED.

    Returns:
        The notes of the run: 0, NOTE_NONFINITE or NOTE_EMPTY_ROWS.

    Raises:
        InputError: a shape, dtype, stride, index or parameter that the library refuses.
        UnsupportedError: valid, but not offered by this version or this CPU.
    """
    lib = _lib()
    io = fill_io(arrays, bsr, score_rows, kv)
    packed = "cu_q" in arrays  # the workspace then follows the totals, not batch x the longest
    owner = _plans.get(Desc(struct_size=ctypes.sizeof(Desc), **fields), threads, io if packed else None)
    ws = _workspace(owner.plan.workspace)
    status = lib.etk_attn_run(owner.plan.address, ctypes.byref(io), ws.ctypes.data, owner.plan.workspace, pool(threads))
    return check(status, "attention", lib)


def colmass(
    fields: dict[str, Any],
    arrays: dict[str, np.ndarray],
    out: np.ndarray,
    weight: np.ndarray | None,
    bsr: Bsr | None = None,
    threads: int = 1,
    **settings: Any,
) -> int:
    """``etk_attn_colmass``; ``settings`` are the fields of ``etk_colmass_desc``."""
    lib = _lib()
    io = fill_io(arrays, bsr, 0)
    owner = _plans.get(Desc(struct_size=ctypes.sizeof(Desc), **fields), threads, None)
    ws = _workspace(owner.plan.workspace)
    desc = ColmassDesc(struct_size=ctypes.sizeof(ColmassDesc), **settings)
    rows, target = tensor(weight), tensor(out)
    status = lib.etk_attn_colmass(
        owner.plan.address, ctypes.byref(io), ctypes.byref(desc), ctypes.byref(rows), ctypes.byref(target),
        ws.ctypes.data, owner.plan.workspace, pool(threads),
    )  # fmt: skip
    return check(status, "column masses", lib)


def merge(o: list[np.ndarray], lse: list[np.ndarray], o_out: np.ndarray, lse_out: np.ndarray) -> None:
    """``etk_attn_merge``."""
    lib = _lib()
    parts, sums = (Tensor * len(o))(*map(tensor, o)), (Tensor * len(lse))(*map(tensor, lse))
    out, total = tensor(o_out), tensor(lse_out)
    check(lib.etk_attn_merge(len(o), parts, sums, ctypes.byref(out), ctypes.byref(total)), "merge", lib)


def validate(fields: dict[str, Any], io: Io) -> int:
    """The status of ``etk_attn_validate``, as it is."""
    desc = Desc(struct_size=ctypes.sizeof(Desc), **fields)
    return int(_lib().etk_attn_validate(ctypes.byref(desc), ctypes.byref(io)))
