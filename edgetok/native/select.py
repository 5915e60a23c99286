"""``etk_attn_select`` through ctypes: keys or pages chosen by score."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from edgetok.native import attn, library
from edgetok.native.pool import pool
from edgetok.native.tensors import aligned_empty, check, tensor


class SelectDesc(ctypes.Structure):
    """``etk_select_desc``."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("k", "pool_width", "n_init", "n_local", "sum_heads", "softmax")),
        ("round_pages", ctypes.c_int32),
    )


def run(
    fields: dict[str, Any],
    arrays: dict[str, np.ndarray],
    out: np.ndarray,
    threads: int,
    kv: tuple[int, int, int] | None,
    **settings: int,
) -> None:
    """Fill ``out`` (int32 [B, Hkv or 1, capacity]).

    Args:
        fields: of ``etk_attn_desc``, less struct_size.
        arrays: ``q`` and, without ``kv``, ``k`` and perhaps ``seq_k``.
        out: where the lists go.
        threads: 1..256.
        kv: address of an ``etk_kv_cache``, layer and first sequence.
        settings: fields of ``etk_select_desc``.

    Raises:
        InputError, UnsupportedError: what the library refuses.
    """
    lib: Any = library()
    ptr, size = ctypes.c_void_p, ctypes.c_uint64
    lib.etk_attn_select_workspace.argtypes = [ptr, ptr, ptr]
    lib.etk_attn_select.argtypes = [ptr, ptr, ptr, ptr, ptr, size, ptr]
    owner = attn.plan_of(fields, threads)
    need, align = ctypes.c_uint64(), ctypes.c_uint64()
    status = lib.etk_attn_select_workspace(owner.plan.address, ctypes.byref(need), ctypes.byref(align))
    check(status, "selection", lib)
    io = attn.fill_io(arrays, None, 0, kv)
    desc = SelectDesc(struct_size=ctypes.sizeof(SelectDesc), **settings)
    ws, target = aligned_empty(need.value), tensor(out)
    status = lib.etk_attn_select(
        owner.plan.address, ctypes.byref(io), ctypes.byref(desc), ctypes.byref(target), ws.ctypes.data, need.value,
        pool(threads),
    )  # fmt: skip
    check(status, "selection", lib)
