"""Weights packed for the matrix products of libedgetok."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from edgetok.errors import InputError
from edgetok.native import gemm as native
from edgetok.native.pool import pool
from edgetok.native.tensors import F16, F32, S4X2, U4X2, aligned_empty, numpy_from

_GGUF = {"Q4_0": (native.Q4_0, 4, 0, 18), "Q4_1": (native.Q4_1, 4, 1, 20), "Q8_0": (native.Q8_0, 8, 0, 34)}
_CENTRE = {8: 128, 4: 8}


class PackedWeight:
    """Weights [N, K] in the layout of the kernels: one block of bytes without pointers, which may be saved and mapped.

    Make one with ``from_float``, ``from_codes``, ``from_gguf``, ``from_matmulnbits``, ``from_bytes`` or ``map_file``.
    """

    def __init__(self, data: np.ndarray) -> None:
        """
        Args:
            data: uint8, 64-byte aligned: what another one's ``data`` held.

        Raises:
            InputError: not packed weights, cut off, or not aligned.
            UnsupportedError: packed for another processor family.
        """
        if data.dtype != np.uint8 or data.ndim != 1 or not data.flags.c_contiguous:
            raise InputError("packed weights are one contiguous uint8 array")
        head = native.info(data)
        self.data = data
        self.address, self.nbytes = data.ctypes.data, data.nbytes
        self.n, self.k, self.bits, self.group = head.n, head.k, head.bits, head.group
        self.offset, self.gated, self.layout = bool(head.offset), bool(head.gated), head.layout
        self.scale_dtype = "float16" if head.scale_dtype == F16 else "float32"
        self.fields = (
            head.n, head.k, head.bits, head.group, head.offset, head.gated, head.scale_dtype, head.layout,
        )  # fmt: skip

    def __repr__(self) -> str:
        group = f"groups of {self.group}" if self.group else "one scale per row"
        kind = ("gated " if self.gated else "") + ("with offsets" if self.offset else "symmetric")
        return f"PackedWeight({self.n} x {self.k}, INT{self.bits}, {group}, {kind}, {self.nbytes} bytes)"

    @classmethod
    def from_float(
        cls,
        weights: Any,
        *,
        bits: int = 8,
        group: int = 0,
        symmetric: bool = True,
        scale_dtype: str = "float32",
        gated: bool = False,
        threads: int = 1,
    ) -> PackedWeight:
        """Quantize and pack.

        Args:
            weights: float32 [N, K]; gated: [2 N, K], the gate's rows first.
            bits: 8 or 4.
            group: values of a row that share a scale: 16, 32, 64, 128, 256, or 0 for the whole row.
            symmetric: False adds an offset per group (then 4 bits lose less on skewed weights).
            scale_dtype: ``float32`` or ``float16``; scales are rounded to it before quantizing with them.

        Raises:
            InputError: not a float32 matrix, or a number not in the lists above.
        """
        array = _matrix(weights, "weights", np.float32)
        of = _weight(array.shape[0], array.shape[1], bits, group, not symmetric, gated, scale_dtype)
        return cls(native.pack(of, native.FLOAT, array, pool=pool(threads))[0])

    @classmethod
    def from_codes(
        cls,
        codes: Any,
        scales: Any,
        *,
        bits: int = 8,
        group: int = 0,
        zeros: Any = None,
        offsets: Any = None,
        gated: bool = False,
        threads: int = 1,
    ) -> PackedWeight:
        """Pack codes: W = scale (code - zero), or scale code + offset.

        Args:
            codes: int8 or uint8 [N, K], one to a byte; with ``bits=4`` in -8..7 or 0..15.
            scales: float32 or float16 [N, groups] ([N] with one group); float16 stays float16.
            zeros: uint8 or float32 like ``scales``; None is 0 for int8 codes and the centre (128, 8) for uint8.
            offsets: float32 or float16 like ``scales``; not with ``zeros``.

        Raises:
            InputError: shapes that do not fit, codes out of range, or both zeros and offsets.
        """
        array = numpy_from(codes, "codes")
        if array.ndim != 2 or array.dtype not in (np.dtype(np.int8), np.dtype(np.uint8)):
            raise InputError(f"codes are {array.dtype} {array.shape}, expected int8 or uint8 [N, K]")
        signed = array.dtype == np.int8
        n, k = array.shape
        code_dtype = None
        if bits == 4:
            low = -8 if signed else 0
            if array.size and (array.min() < low or array.max() > low + 15):
                raise InputError(f"4-bit codes must lie in {low}..{low + 15}, got {array.min()}..{array.max()}")
            array, code_dtype = _nibbles(array), S4X2 if signed else U4X2
        return _coded(
            cls, np.ascontiguousarray(array), code_dtype, (n, k), scales, zeros, offsets, bits, group, gated, threads
        )

    @classmethod
    def from_int4(cls, packed: Any, scales: Any, *, k: int, group: int, zeros: Any = None, **more: Any) -> PackedWeight:
        """Pack two codes to a byte, the low nibble first.

        Args:
            packed: uint8 [N, ceil(K / 2)]: codes 0..15, centre 8.
            k: codes of a row.
            scales, group, zeros: as :meth:`from_codes`; ``more``: its ``offsets``, ``gated`` and ``threads``.
        """
        array = _matrix(packed, "packed", np.uint8)
        if array.shape[1] != (k + 1) // 2:
            raise InputError(f"{k} codes of 4 bits take {(k + 1) // 2} bytes a row, got {array.shape[1]}")
        offsets, gated, threads = more.pop("offsets", None), more.pop("gated", False), more.pop("threads", 1)
        if more:
            raise InputError(f"unknown options: {', '.join(sorted(more))}", next="offsets, gated and threads are taken")
        return _coded(cls, array, U4X2, (array.shape[0], k), scales, zeros, offsets, 4, group, gated, threads)

    @classmethod
    def from_matmulnbits(
        cls, b: Any, scales: Any, zero_points: Any = None, *, k: int, bits: int, block_size: int, threads: int = 1
    ) -> PackedWeight:
        """Pack the initializers of ONNX Runtime's ``MatMulNBits``, code for code.

        Args:
            b: uint8 [N, blocks, block_size bits / 8].
            scales: float32 or float16, N blocks values in any shape.
            zero_points: uint8 (packed as b is, each row padded to whole bytes) or float, or None for the centre.
        """
        raw = numpy_from(b, "b")
        blocks = -(-k // block_size) if block_size > 0 else 0
        if raw.dtype != np.uint8 or raw.ndim != 3 or raw.shape[1:] != (blocks, block_size * bits // 8):
            raise InputError(f"b is {raw.dtype} {raw.shape}, expected uint8 [N, {blocks}, {block_size * bits // 8}]")
        n = raw.shape[0]
        rows = np.ascontiguousarray(raw.reshape(n, -1)[:, : (k * bits + 7) // 8])
        zeros = None
        if zero_points is not None:
            given = numpy_from(zero_points, "zero_points")
            if given.dtype == np.uint8 and bits == 4:
                flat = given.reshape(n, -1)
                zeros = np.stack([flat & 15, flat >> 4], -1).reshape(n, -1)[:, :blocks]
            else:
                zeros = given.reshape(n, blocks)
                zeros = zeros if zeros.dtype == np.uint8 else zeros.astype(np.float32)
        scale = numpy_from(scales, "scales").reshape(n, blocks)
        code_dtype = U4X2 if bits == 4 else None
        return _coded(cls, rows, code_dtype, (n, k), scale, zeros, None, bits, block_size, False, threads)

    @classmethod
    def from_gguf(cls, blocks: Any, kind: str, *, gated: bool = False, threads: int = 1) -> PackedWeight:
        """Pack blocks of a GGUF file.

        Args:
            blocks: uint8 [N, bytes of a row], as they lie in the file.
            kind: ``Q4_0``, ``Q4_1`` or ``Q8_0``.

        Raises:
            InputError: another kind, or rows that are not whole blocks.
        """
        if kind not in _GGUF:
            raise InputError(f"GGUF type {kind!r} is not packed", next=f"one of {', '.join(_GGUF)}")
        form, bits, offset, size = _GGUF[kind]
        array = _matrix(blocks, "blocks", np.uint8)
        if array.shape[1] % size:
            raise InputError(f"a row of {array.shape[1]} bytes is not whole {kind} blocks of {size}")
        of = _weight(array.shape[0], array.shape[1] // size * 32, bits, 32, bool(offset), gated, "float16")
        return cls(native.pack(of, form, array, pool=pool(threads))[0])

    @classmethod
    def from_bytes(cls, raw: bytes | bytearray | memoryview) -> PackedWeight:
        """What :meth:`to_bytes` gave, copied to aligned memory."""
        given = np.frombuffer(raw, np.uint8)
        data = aligned_empty(given.nbytes)
        data[:] = given
        return cls(data)

    @classmethod
    def map_file(cls, path: str | os.PathLike[str], offset: int = 0) -> PackedWeight:
        """Map a file that holds ``to_bytes()`` at ``offset``, a multiple of 64; nothing is read until it is used."""
        where = Path(path)
        if offset < 0 or offset % 64 or not where.is_file() or where.stat().st_size <= offset:
            raise InputError(f"cannot map packed weights at byte {offset}", where=str(where))
        return cls(np.asarray(np.memmap(where, np.uint8, "r", offset)))

    def to_bytes(self) -> bytes:
        """The packed form."""
        return self.data.tobytes()

    def to_float(self) -> np.ndarray:
        """The weights as float32 [N, K] ([2 N, K] when gated)."""
        return native.unpack(self.data, self.n * (2 if self.gated else 1), self.k)


def _coded(
    cls: type[PackedWeight], codes: np.ndarray, code_dtype: int | None, shape: tuple[int, int], scales: Any, zeros: Any,
    offsets: Any, bits: int, group: int, gated: bool, threads: int,
) -> PackedWeight:  # fmt: skip
    n, k = shape
    groups = -(-k // group) if group else 1
    scale, zero, offset = (
        _groups(v, name, (n, groups)) for v, name in ((scales, "scales"), (zeros, "zeros"), (offsets, "offsets"))
    )
    if scale is None:
        raise InputError("scales are missing")
    if (
        zero is not None
        and zero.dtype == np.uint8
        and (zero == _CENTRE.get(bits, -1)).all()
        and code_dtype != S4X2
        and codes.dtype == np.uint8
    ):
        zero = None  # the centre: symmetric
    halves = scale.dtype == np.float16 and zero is None and (offset is None or offset.dtype == np.float16)
    has = zero is not None or offset is not None
    of = _weight(n, k, bits, group, has, gated, "float16" if halves else "float32")
    columns = k if bits == 4 else None
    made = native.pack(of, native.CODES, codes, code_dtype, scale, zero, offset, columns=columns, pool=pool(threads))
    return cls(made[0])


def _groups(value: Any, what: str, shape: tuple[int, int]) -> np.ndarray | None:
    if value is None:
        return None
    array = numpy_from(value, what)
    if array.shape != shape and (array.shape != shape[:1] or shape[1] != 1):
        raise InputError(f"{what} have shape {array.shape}, expected {shape}")
    return np.ascontiguousarray(array.reshape(shape))


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """[N, K] codes two to a byte, the low nibble first."""
    wide = np.zeros((codes.shape[0], (codes.shape[1] + 1) // 2 * 2), np.uint8)
    wide[:, : codes.shape[1]] = codes.view(np.uint8) & 15
    return np.ascontiguousarray(wide[:, 0::2] | wide[:, 1::2] << 4)


def _matrix(value: Any, what: str, dtype: type) -> np.ndarray:
    array = numpy_from(value, what)
    if array.ndim != 2 or array.dtype != dtype:
        raise InputError(f"{what} is {array.dtype} {array.shape}, expected {np.dtype(dtype).name} with two axes")
    return np.ascontiguousarray(array)


def _weight(n: int, k: int, bits: int, group: int, offset: bool, gated: bool, scale_dtype: str) -> native.Weight:
    if bits not in _CENTRE or group not in (0, 16, 32, 64, 128, 256):
        raise InputError(f"bits={bits}, group={group}", next="bits is 8 or 4; group is 16, 32, 64, 128, 256, or 0")
    if scale_dtype not in ("float32", "float16"):
        raise InputError(f"scale_dtype={scale_dtype!r}", next="float32 or float16")
    if gated and n % 2:
        raise InputError(f"gated weights have two halves, got {n} rows")
    number = F16 if scale_dtype == "float16" else F32
    return native.weight(
        n // 2 if gated else n, k, bits=bits, group=group, offset=int(offset), gated=int(gated), scale_dtype=number
    )
