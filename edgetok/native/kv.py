"""The KV cache of libedgetok through ctypes: structs, calls, and views of the tables. No policy."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from functools import cache
from typing import Any

import numpy as np

from edgetok.errors import ResourceError
from edgetok.native import library
from edgetok.native.tensors import Tensor, check, tensor

PER_HEAD, ROT_K, NO_SMOOTH_K = 1, 2, 4
ISA = {None: 0, "scalar": 1, "avx2": 2, "avxvnni": 3, "avx512vnni": 4, "avx512vbmi": 5, "neon": 18, "neondot": 19}
ISA |= {"neoni8mm": 20}


class Desc(ctypes.Structure):
    """``etk_kv_desc``."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("version", ctypes.c_uint32),
        ("layers", ctypes.c_int32),
        ("batch", ctypes.c_int32),
        ("hkv", ctypes.c_int32),
        ("d", ctypes.c_int32),
        ("dv", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("k_scale", ctypes.c_int32),
        ("tail_pages", ctypes.c_int32),
        ("pages", ctypes.c_int64),
        ("max_tokens", ctypes.c_int64),
        ("isa_cap", ctypes.c_int32),
        ("flags", ctypes.c_uint32),
        ("threads", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class Cache(ctypes.Structure):
    """``etk_kv_cache``; the pointers lead into the arena."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("magic", ctypes.c_uint32),
        ("desc", Desc),
        ("d_pad", ctypes.c_int32),
        ("dv_pad", ctypes.c_int32),
        ("tables", ctypes.c_int32),
        ("isa", ctypes.c_int32),
        ("layout", ctypes.c_int32),
        ("k_bias", ctypes.c_int32),
        ("page_unit", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("max_pages", ctypes.c_int64),
        ("page_bytes", ctypes.c_uint64),
        ("tail_bytes", ctypes.c_uint64),
        *((name, ctypes.c_void_p) for name in ("pages", "tails", "block_table", "seq_k", "pos", "live", "removed")),
        *((name, ctypes.c_void_p) for name in ("tail_valid", "next_pos", "mu_k", "mu_set", "refs", "free_list")),
        ("n_free", ctypes.c_int64),
        ("scratch", ctypes.c_void_p),
        ("scratch_bytes", ctypes.c_uint64),
        ("attn_kernel", ctypes.c_void_p),
        ("kv_kernel", ctypes.c_void_p),
    )


class Stats(ctypes.Structure):
    """``etk_kv_stats``."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("arena_bytes", ctypes.c_uint64),
        ("page_bytes_used", ctypes.c_uint64),
        ("tail_bytes", ctypes.c_uint64),
        ("table_bytes", ctypes.c_uint64),
        ("pages_used", ctypes.c_int64),
        ("pages_free", ctypes.c_int64),
        ("live_slots", ctypes.c_int64),
        ("slots", ctypes.c_int64),
    )


_I32, _I64, _U64, _PTR = ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64, ctypes.c_void_p
_SIGNATURES = {
    "etk_kv_size": (_PTR, _PTR, _PTR),
    "etk_kv_init": (_PTR, _PTR, _U64, _PTR),
    "etk_kv_pack": (_PTR, _I32, _I32, _PTR, _PTR, _PTR, _PTR),
    "etk_kv_pack_rope": (_PTR, _I32, _I32, _PTR, _PTR, _PTR, _PTR, _PTR, _I64, _I32, _PTR),
    "etk_kv_unpack": (_PTR, _I32, _I32, _I32, _I64, _I64, _I32, _PTR, _PTR),
    "etk_kv_truncate": (_PTR, _I32, _I64),
    "etk_kv_clear": (_PTR, _I32),
    "etk_kv_fork": (_PTR, _I32, _I32),
    "etk_kv_evict": (_PTR, _I32, _I32, _I32, _PTR, _I64),
    "etk_kv_repack": (_PTR, _I32, _I32, _I32, _PTR),
    "etk_kv_export": (_PTR, _I32, _PTR, _U64, _PTR),
    "etk_kv_import": (_PTR, _I32, _PTR, _U64),
    "etk_kv_get_stats": (_PTR, _PTR),
}


@cache
def _lib() -> Any:
    lib = library()
    for name, arguments in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = _I32, arguments
    return lib


def _huge(size: int) -> mmap.mmap:
    """Anonymous memory, committed when touched; the kernel is asked for huge pages where it can give them."""
    try:
        if hasattr(mmap, "MAP_PRIVATE"):  # the default is shared memory, which gets no huge pages
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            memory = mmap.mmap(-1, size)
    except (OSError, ValueError, OverflowError) as exc:
        raise ResourceError(f"cannot reserve {size} bytes for a KV cache", next="fewer pages or tokens") from exc
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a hint
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class Handle:
    """One cache: its struct, its arena, and the calls on it.

    Args:
        desc: as ``etk_kv_desc``; ``struct_size`` is filled in.
    """

    def __init__(self, desc: Desc) -> None:
        desc.struct_size = ctypes.sizeof(Desc)
        size, align = _U64(), _U64()
        check(_lib().etk_kv_size(ctypes.byref(desc), ctypes.byref(size), ctypes.byref(align)), "KV cache", library())
        self._memory = _huge(size.value)
        self._arena = np.frombuffer(self._memory, np.uint8)
        self.cache = Cache()
        self.address = ctypes.addressof(self.cache)
        status = _lib().etk_kv_init(ctypes.byref(desc), self._arena.ctypes.data, size.value, self.address)
        check(status, "KV cache", library())

    def call(self, name: str, *arguments: Any) -> int:
        """``etk_kv_<name>`` on this cache; notes are returned, errors raised."""
        return check(getattr(_lib(), f"etk_kv_{name}")(self.address, *arguments), f"KV cache {name}", library())

    def _table(self, field: str, dtype: Any, *shape: int) -> np.ndarray:
        start = getattr(self.cache, field) - self._arena.ctypes.data
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        view = self._arena[start : start + size].view(dtype).reshape(shape)
        view.flags.writeable = False
        return view

    @property
    def _lbt(self) -> tuple[int, int, int]:
        return self.cache.desc.layers, self.cache.desc.batch, self.cache.tables

    def seq_k(self) -> np.ndarray:
        """int32 [layers, batch, tables]: slots in use; a view that follows the cache."""
        return self._table("seq_k", np.int32, *self._lbt)

    def pos(self) -> np.ndarray:
        """int32 [layers, batch, tables, slots]: positions, valid below ``seq_k``; a view."""
        return self._table("pos", np.int32, *self._lbt, self.cache.max_pages * 64)

    def live(self) -> np.ndarray:
        """uint64 [layers, batch, tables, pages]: live masks; a view."""
        return self._table("live", np.uint64, *self._lbt, self.cache.max_pages)

    def block_table(self) -> np.ndarray:
        """int32 [layers, batch, tables, pages]; a view."""
        return self._table("block_table", np.int32, *self._lbt, self.cache.max_pages)

    def next_pos(self) -> np.ndarray:
        """int64 [layers, batch]; a view."""
        return self._table("next_pos", np.int64, *self._lbt[:2])

    def pack(self, layer: int, seq: int, k: np.ndarray, v: np.ndarray, pos: np.ndarray | None, pool: int | None) -> int:
        """Append; see ``etk_kv_pack``."""
        tensors = (tensor(k), tensor(v), tensor(pos))
        return self.call("pack", layer, seq, *(ctypes.byref(t) for t in tensors), pool)

    def pack_rope(
        self, layer: int, seq: int, k: np.ndarray, v: np.ndarray, pos: np.ndarray | None, cos: np.ndarray,
        sin: np.ndarray, first: int, interleaved: bool, pool: int | None,
    ) -> int:  # fmt: skip
        """Append with the keys rotated; see ``etk_kv_pack_rope``."""
        tensors = [ctypes.byref(tensor(a)) for a in (k, v, pos, cos, sin)]
        return self.call("pack_rope", layer, seq, *tensors, first, int(interleaved), pool)

    def unpack(
        self, layer: int, seq: int, head: int, slot: int, count: int, from_tail: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """f32 [count, d] and [count, dv]; see ``etk_kv_unpack``."""
        k = np.empty((count, self.cache.desc.d), np.float32)
        v = np.empty((count, self.cache.desc.dv), np.float32)
        kt, vt = tensor(k), tensor(v)
        self.call("unpack", layer, seq, head, slot, count, from_tail, ctypes.byref(kt), ctypes.byref(vt))
        return k, v

    def evict(self, layer: int, seq: int, head: int, keep: np.ndarray) -> None:
        """``live &= keep`` (uint64 words); see ``etk_kv_evict``."""
        words = np.ascontiguousarray(keep, np.uint64)
        self.call("evict", layer, seq, head, words.ctypes.data, words.size)

    def repack(self, layer: int, seq: int, head: int) -> int:
        """Survivors moved; see ``etk_kv_repack``."""
        moved = _I64()
        self.call("repack", layer, seq, head, ctypes.byref(moved))
        return moved.value

    def save(self, seq: int) -> bytes:
        """The sequence as portable bytes; see ``etk_kv_export``."""
        size = _U64()
        self.call("export", seq, None, 0, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self.call("export", seq, buffer, size.value, ctypes.byref(size))
        return buffer.raw[: size.value]

    def load(self, seq: int, blob: bytes) -> None:
        """The inverse of ``save``; see ``etk_kv_import``."""
        self.call("import", seq, blob, len(blob))

    def stats(self) -> Stats:
        """Counts and bytes."""
        out = Stats(struct_size=ctypes.sizeof(Stats))
        self.call("get_stats", ctypes.byref(out))
        return out


__all__ = ["ISA", "NO_SMOOTH_K", "PER_HEAD", "ROT_K", "Cache", "Desc", "Handle", "Stats", "Tensor"]
