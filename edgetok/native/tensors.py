"""How numpy arrays and the library's structs meet: ``etk_tensor``, status codes as errors, aligned buffers."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from edgetok.errors import EdgeTokError, InputError, InternalError, ResourceError, UnsupportedError

F32, F16, BF16, S8, U8, S4X2, U4X2, I32, I64, BOOL, U64 = range(11)
_DTYPES = {
    np.dtype(np.float32): F32,
    np.dtype(np.float16): F16,
    np.dtype(np.int8): S8,
    np.dtype(np.uint8): U8,
    np.dtype(np.int32): I32,
    np.dtype(np.int64): I64,
    np.dtype(np.bool_): BOOL,
    np.dtype(np.uint64): U64,
}


class Tensor(ctypes.Structure):
    """``etk_tensor``: a view; whoever builds one keeps the array alive."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("dim", ctypes.c_int64 * 5),
        ("stride", ctypes.c_int64 * 5),
        ("capacity", ctypes.c_uint64),
    )


def tensor(array: np.ndarray | None, dtype: int | None = None) -> Tensor:
    """Describe ``array`` to the library; None is "absent".

    Args:
        array: any strides that are not negative, rank at most 5.
        dtype: an ``etk_dtype`` number when it is not the array's own (packed 4-bit codes in a uint8 array).

    Raises:
        InputError: a rank, dtype or stride that the library cannot describe.
    """
    out = Tensor()
    if array is None:
        return out
    code = _DTYPES.get(array.dtype) if dtype is None else dtype
    if code is None:
        raise InputError(f"arrays of {array.dtype} are not taken", next="use float32")
    if array.ndim > 5 or any(s < 0 for s in array.strides):
        raise InputError(f"an array of rank {array.ndim} with strides {array.strides} is not taken", next="pass a copy")
    out.data, out.dtype, out.rank = array.ctypes.data, code, array.ndim
    for axis, (size, stride) in enumerate(zip(array.shape, array.strides)):
        out.dim[axis], out.stride[axis] = size, stride
    out.capacity = (
        0 if array.size == 0 else sum((n - 1) * s for n, s in zip(array.shape, array.strides)) + array.itemsize
    )
    return out


def numpy_from(value: Any, name: str) -> np.ndarray:
    """A numpy view of a numpy array or of anything with ``__dlpack__`` on the CPU, without a copy.

    Raises:
        InputError: neither, or memory of another device.
    """
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "__dlpack__"):
        try:
            return np.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError, ValueError) as exc:
            raise InputError(f"{name}: cannot be viewed as a numpy array ({exc})", next="move it to the CPU") from exc
    raise InputError(f"{name} is a {type(value).__name__}", next="pass a numpy array or a DLPack tensor")


def aligned_empty(size: int, align: int = 64) -> np.ndarray:
    """``size`` uninitialised bytes that start at a multiple of ``align``."""
    raw = np.empty(size + align, np.uint8)
    start = -raw.ctypes.data % align
    return raw[start : start + size]


def check(status: int, what: str, lib: ctypes.CDLL) -> int:
    """Turn a status below zero into the error of its kind; return notes.

    Raises:
        InputError: what the caller passed is wrong (null, shape, stride, dtype, range, alias, non-finite).
        UnsupportedError: valid, but not offered here or by this CPU.
        ResourceError: no memory, or a full KV cache.
        InternalError: anything else.
    """
    if status >= 0:
        return status
    lib.etk_strerror.restype = ctypes.c_char_p
    text = f"{what}: {lib.etk_strerror(status).decode()} (status {status})"
    kinds: dict[int, type[EdgeTokError]] = {-10: UnsupportedError, -11: UnsupportedError, -16: ResourceError}
    kinds |= {-17: ResourceError, -2: InternalError, -9: InternalError, -14: InternalError, -15: InternalError}
    raise kinds.get(status, InputError)(text)
