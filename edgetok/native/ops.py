"""The small operations of libedgetok through ctypes: arrays in, arrays out, no policy.

``call`` and the ``etk_*`` signatures here are all there is; shapes are checked by the library.
"""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np

from edgetok import native
from edgetok.native.tensors import Tensor, aligned_empty, check, tensor

_T = ctypes.POINTER(Tensor)
_I32, _I64, _U64, _F32, _F64, _P = (
    ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64, ctypes.c_float, ctypes.c_double, ctypes.c_void_p,
)  # fmt: skip
SIGNATURES: dict[str, list[type]] = {
    "etk_layernorm": [_T, _T, _T, _T, _F32, _T, _T, _T, _T],
    "etk_rmsnorm": [_T, _T, _T, _F32, _T, _T, _T, _T],
    "etk_softmax": [_T, _T, _F32, _T],
    "etk_gelu": [_T, _I32, _T],
    "etk_silu": [_T, _T],
    "etk_swiglu": [_T, _T, _T],
    "etk_add_rows": [_T, _T, _T],
    "etk_rope_tables": [_T, _F64, _I64, _F32, _T, _T],
    "etk_rope": [_T, _T, _T, _T, _I64, _I32, _T],
    "etk_argmax": [_T, _T],
    "etk_topk": [_T, _I64, _T, _T, _P, _U64],
    "etk_gather_rows": [_T, _T, _T],
    "etk_scatter_rows": [_T, _T, _T],
    "etk_match": [_I32, _T, _T, _I64, _I64, _F32, _F32, _I32, _T, _T, _T, _P, _U64],
    "etk_pitome_energy": [_I32, _T, _I64, _F32, _F32, _I32, _T, _P, _U64],
    "etk_merge_rows": [_T, _T, _T, _T, _T, _T, _T, _T, _P, _U64],
    "etk_token_merge": [_I32, _T, _T, _T, _I64, _I64, _F32, _F32, _I32, _T, _T, _T, _P, _U64],
}  # fmt: skip


@cache
def library() -> ctypes.CDLL:
    """The library, with the signatures of its small operations."""
    lib = native.library()
    for name, types in SIGNATURES.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = types, _I32
    lib.etk_ops_kernel_name.restype = ctypes.c_char_p
    for name in ("etk_topk_workspace", "etk_match_workspace", "etk_merge_workspace"):
        function = getattr(lib, name)
        function.argtypes, function.restype = [_I64, _I64], _U64
    return lib


def kernel_name() -> str | None:
    """The variant in use; None when ``EDGETOK_MAX_ISA`` names no ISA."""
    name = library().etk_ops_kernel_name()
    return None if name is None else name.decode()


def call(name: str, *args: np.ndarray | float | None) -> int:
    """Run ``etk_<name>`` on arrays (None = absent) and numbers; its note.

    Raises:
        InputError, UnsupportedError: as ``tensors.check``.
    """
    lib = library()
    types = SIGNATURES[f"etk_{name}"]
    given: list[object] = []
    for value, kind in zip(args, types, strict=True):
        given.append(ctypes.byref(tensor(value)) if kind is _T and isinstance(value, np.ndarray) else value)
    return check(getattr(lib, f"etk_{name}")(*given), name, lib)


def workspace(size: int) -> tuple[np.ndarray, int, int]:
    """A 64-byte aligned buffer: the array that owns it, its address, its bytes."""
    owner = aligned_empty(max(1, size))
    return owner, owner.ctypes.data, owner.nbytes
