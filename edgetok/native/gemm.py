"""Quantized matrix products of libedgetok through ctypes: packed weights, plans, runs. No policy."""

from __future__ import annotations

import ctypes
import weakref
from functools import cache
from typing import Any

import numpy as np

from edgetok import native
from edgetok.native.tensors import Tensor, aligned_empty, check, tensor

_I32, _I64, _U32, _U64, _F32, _P = (
    ctypes.c_int32, ctypes.c_int64, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_float, ctypes.c_void_p,
)  # fmt: skip

CODES, FLOAT, Q4_0, Q4_1, Q8_0 = range(5)  # etk_gemm_source.format
ROW, TENSOR, GROUP32, STATIC = range(4)  # a_quant
NONE, GELU_ERF, GELU_TANH, SILU = range(4)  # act
NONFINITE = 1  # ETK_NOTE_NONFINITE


class Weight(ctypes.Structure):
    """``etk_gemm_weight``."""

    _fields_ = (
        ("struct_size", _U32), ("version", _U32), ("n", _I64), ("k", _I64), ("bits", _I32), ("group", _I32),
        ("offset", _I32), ("gated", _I32), ("scale_dtype", _I32), ("layout", _I32), ("isa_cap", _I32),
    )  # fmt: skip


class Source(ctypes.Structure):
    """``etk_gemm_source``."""

    _fields_ = (
        ("struct_size", _U32), ("format", _I32), ("codes", Tensor), ("scales", Tensor), ("zeros", Tensor),
        ("offsets", Tensor),
    )  # fmt: skip


class Desc(ctypes.Structure):
    """``etk_gemm_desc``."""

    _fields_ = (
        ("struct_size", _U32), ("version", _U32), ("weight", Weight), ("max_m", _I64), ("a_dtype", _I32),
        ("a_code", _I32), ("a_quant", _I32), ("a_scale", _F32), ("a_zero", _I32), ("out_dtype", _I32), ("act", _I32),
        ("flags", _U32),
    )  # fmt: skip


class Io(ctypes.Structure):
    """``etk_gemm_io``."""

    _fields_ = (
        ("struct_size", _U32), ("reserved", _U32), ("a", Tensor), ("w", _P), ("w_bytes", _U64), ("a_scale", Tensor),
        ("a_zero", Tensor), ("out_scale", Tensor), ("bias", Tensor), ("residual", Tensor), ("out", Tensor),
    )  # fmt: skip


@cache
def library() -> ctypes.CDLL:
    """The library, with the signatures of its matrix products."""
    lib = native.library()
    pointer = ctypes.POINTER
    signatures: dict[str, list[Any]] = {
        "etk_gemm_packed_size": [pointer(Weight), pointer(_U64)],
        "etk_gemm_pack": [pointer(Weight), pointer(Source), _P, _U64, _P],
        "etk_gemm_packed_info": [_P, _U64, pointer(Weight)],
        "etk_gemm_unpack": [_P, _U64, pointer(Tensor)],
        "etk_gemm_plan_create": [pointer(Desc), _I32, pointer(_P)],
        "etk_gemm_workspace": [_P, pointer(_U64), pointer(_U64)],
        "etk_gemm_run": [_P, pointer(Io), _P, _U64, _P],
        "etk_gemm_quantize": [pointer(Tensor), _I32, pointer(Tensor), pointer(Tensor), pointer(Tensor)],
    }
    for name, types in signatures.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = types, _I32
    lib.etk_gemm_plan_free.argtypes, lib.etk_gemm_plan_free.restype = [_P], None
    lib.etk_gemm_plan_kernel.argtypes, lib.etk_gemm_plan_kernel.restype = [_P], ctypes.c_char_p
    return lib


def weight(n: int, k: int, **fields: int) -> Weight:
    """An ``etk_gemm_weight``."""
    return Weight(struct_size=ctypes.sizeof(Weight), n=n, k=k, **fields)


def pack(
    of: Weight,
    kind: int,
    codes: np.ndarray,
    code_dtype: int | None = None,
    scales: np.ndarray | None = None,
    zeros: np.ndarray | None = None,
    offsets: np.ndarray | None = None,
    zero_dtype: int | None = None,
    columns: int | None = None,
    pool: int | None = None,
) -> tuple[np.ndarray, int]:
    """Packed weights in an aligned buffer, and the note.

    Args:
        code_dtype: an ``etk_dtype`` number when it is not the array's own; ``columns`` codes to a row then.

    Raises:
        InputError: shapes, types or values that the library refuses.
    """
    lib = library()
    source = Source(struct_size=ctypes.sizeof(Source), format=kind, codes=tensor(codes, code_dtype))
    if columns is not None:
        source.codes.dim[1] = columns
    for name, array in (("scales", scales), ("zeros", zeros), ("offsets", offsets)):
        setattr(source, name, tensor(array))
    if zeros is not None and zero_dtype is not None:
        source.zeros = tensor(zeros, zero_dtype)
        source.zeros.dim[1] = 0 if scales is None else scales.shape[1]
    size = _U64()
    check(lib.etk_gemm_packed_size(ctypes.byref(of), ctypes.byref(size)), "packed weights", lib)
    packed = aligned_empty(size.value)
    status = lib.etk_gemm_pack(ctypes.byref(of), ctypes.byref(source), packed.ctypes.data, size.value, pool)
    return packed, check(status, "packing weights", lib)


def info(packed: np.ndarray) -> Weight:
    """The checked header of packed weights.

    Raises:
        InputError: not packed weights, cut off, or not aligned to 64 bytes.
        UnsupportedError: a layout that no kernel here reads.
    """
    lib = library()
    out = Weight(struct_size=ctypes.sizeof(Weight))
    status = lib.etk_gemm_packed_info(packed.ctypes.data, packed.nbytes, ctypes.byref(out))
    check(-3 if status == -2 else status, "packed weights", lib)  # a header that is none is the file's fault, not ours
    return out


def unpack(packed: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Packed weights as float32 [rows, columns]."""
    lib = library()
    out = np.empty((rows, columns), np.float32)
    view = tensor(out)
    check(lib.etk_gemm_unpack(packed.ctypes.data, packed.nbytes, ctypes.byref(view)), "unpacking weights", lib)
    return out


def quantize(x: np.ndarray, how: int, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> int:
    """``etk_gemm_quantize``; its note."""
    lib = library()
    views = [ctypes.byref(tensor(array)) for array in (codes, scale, zero)]
    return check(lib.etk_gemm_quantize(ctypes.byref(tensor(x)), how, *views), "quantizing activations", lib)


class Plan:
    """An ``etk_gemm_plan`` for at most ``desc.max_m`` rows and ``threads`` workers; freed with the object."""

    def __init__(self, desc: Desc, threads: int) -> None:
        lib = library()
        desc.struct_size, desc.weight.struct_size = ctypes.sizeof(Desc), ctypes.sizeof(Weight)
        handle, size, align = _P(), _U64(), _U64()
        check(lib.etk_gemm_plan_create(ctypes.byref(desc), threads, ctypes.byref(handle)), "matrix product", lib)
        self._lib, self.handle = lib, handle.value
        self._free = weakref.finalize(self, lib.etk_gemm_plan_free, self.handle)
        check(lib.etk_gemm_workspace(self.handle, ctypes.byref(size), ctypes.byref(align)), "matrix product", lib)
        self.workspace_bytes = size.value

    @property
    def kernel(self) -> str:
        """The kernel's name."""
        return str(self._lib.etk_gemm_plan_kernel(self.handle).decode())

    def run(self, io: Io, workspace: int, pool: int | None) -> int:
        """One product; ``workspace`` is the address of at least ``workspace_bytes`` aligned bytes. Its note."""
        status = self._lib.etk_gemm_run(self.handle, ctypes.byref(io), workspace, self.workspace_bytes, pool)
        return status if status >= 0 else check(status, "matrix product", self._lib)
