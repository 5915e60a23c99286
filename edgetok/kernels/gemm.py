"""Matrix products with INT8 and INT4 weights: pack once, multiply often.

    w = PackedWeight.from_float(weights, bits=4, group=128)
    y = matmul(x, w, bias=b, activation="silu")

A row of the result does not depend on the other rows of the call, on ``threads`` or on the instruction set.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgetok.errors import InputError
from edgetok.kernels.packed import PackedWeight
from edgetok.native import gemm as native
from edgetok.native.pool import pool
from edgetok.native.tensors import F32, I32, S8, U8, aligned_empty, numpy_from, tensor

_ACTIVATIONS = {None: native.NONE, "gelu": native.GELU_ERF, "gelu_tanh": native.GELU_TANH, "silu": native.SILU}
_PER = {"row": native.ROW, "tensor": native.TENSOR, "group32": native.GROUP32}
_CODES = {"int8": S8, "uint8": U8}
_PLANS = 256  # kept at most, over all shapes


@dataclass(frozen=True)
class Quantized:
    """Activations as codes: x = scale (codes - zero).

    Args:
        codes: int8 or uint8 [M, K].
        scale: float32 [M], [1] or [M, ceil(K / 32)].
        zero: int32 like ``scale``.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray


def quantize_activations(x: Any, *, per: str = "row", dtype: str = "int8") -> Quantized:
    """Quantize by the law that :func:`matmul` applies while packing.

    Args:
        x: float32 [M, K]. NaN counts as 0, infinities as the largest finite magnitude of their group.
        per: ``row``, ``tensor`` or ``group32`` (32 values of a row; int8 only): what shares a scale.
        dtype: ``int8`` (symmetric, -127..127) or ``uint8`` (with a zero point).

    Raises:
        InputError: x is not a matrix of float32, or an unknown word.
    """
    array = numpy_from(x, "x")
    if array.ndim != 2:
        raise InputError(f"x has shape {array.shape}, expected [M, K]", next="reshape it to two axes")
    how, code = _word(_PER, per, "per"), _word(_CODES, dtype, "dtype")
    m, k = array.shape
    shape = (m, -(-k // 32)) if per == "group32" else (1,) if per == "tensor" else (m,)
    out = Quantized(
        np.empty((m, k), np.uint8 if code == U8 else np.int8), np.ones(shape, np.float32), np.zeros(shape, np.int32)
    )
    native.quantize(_dense(array, np.float32, "x"), how, out.codes, out.scale, out.zero)
    return out


def matmul(
    x: Any,
    w: PackedWeight,
    *,
    bias: Any = None,
    activation: str | None = None,
    residual: Any = None,
    out_scale: Any = None,
    per: str = "row",
    dtype: str = "int8",
    scale: float | None = None,
    zero: int = 0,
    out: np.ndarray | None = None,
    threads: int = 1,
) -> np.ndarray:
    """``activation((x W^T) out_scale + bias) + residual``; gated weights: ``activation(gate) * up``.

    Args:
        x: float32 [..., K], quantized while it is packed; or :class:`Quantized` codes per row or per tensor.
        bias, out_scale: float32 [N], or [2 N] for gated weights.
        activation: None, ``gelu`` (erf), ``gelu_tanh`` or ``silu``.
        residual: float32 [..., N].
        per, dtype: as :func:`quantize_activations`; not with ``scale``.
        scale, zero: a static scale above 0 for all of x, and its zero point.
        out: float32 [..., N] to write to; may be ``residual``.
        threads: of the library's pool.

    Returns:
        float32 [..., N].

    Raises:
        InputError: shapes that do not fit, an unknown word, a value out of range.
        UnsupportedError: ``group32`` with weights in groups of 16.
    """
    act, how, code = (
        _word(_ACTIVATIONS, activation, "activation"),
        _word(_PER, per, "per"),
        _word(_CODES, dtype, "dtype"),
    )
    a, shape, a_scale, a_zero = _operand(x, scale is not None)
    how = how if a_scale is None else native.ROW
    if a.shape[1] != w.k:
        raise InputError(f"x has {a.shape[1]} columns, the weights have k = {w.k}")
    if scale is not None:
        how = native.STATIC
        if not 2.0**-126 <= scale <= 2.0**126:
            raise InputError(f"scale must be a positive number, got {scale}")
    y = _output(out, (*shape, w.n))
    a_dtype = F32 if a_scale is None else U8 if a.dtype == np.uint8 else S8
    code = code if a_scale is None else 0
    plan = _plan(w.fields, _bucket(len(a)), a_dtype, code, how, scale or 0.0, zero, F32, act, threads)
    flat = y.reshape(len(a), w.n)
    extra = {"a_scale": a_scale, "a_zero": a_zero, "bias": _vector(bias, w, "bias")}
    extra |= {"out_scale": _vector(out_scale, w, "out_scale"), "residual": _residual(residual, (*shape, w.n))}
    _run(plan, a, w, flat, extra, threads)
    return y


def matmul_integer(a: Any, w: PackedWeight, *, zero: int | np.ndarray = 0, threads: int = 1) -> np.ndarray:
    """The exact integer product of codes, ``sum_k (a - zero) w``.

    Args:
        a: int8 or uint8 [..., K].
        w: 8-bit symmetric weights with one scale per row (which is left out).
        zero: one number, or int32 [M].

    Returns:
        int32 [..., N].

    Raises:
        InputError: another kind of weights or codes, or shapes that do not fit.
    """
    codes = numpy_from(a, "a")
    if codes.dtype not in (np.dtype(np.int8), np.dtype(np.uint8)) or codes.ndim < 1:
        raise InputError(f"a is {codes.dtype} {codes.shape}", next="pass int8 or uint8 codes")
    if w.group or w.offset or w.gated:
        raise InputError("an integer product needs symmetric, ungated weights with one scale per row")
    shape = codes.shape[:-1]
    rows = np.ascontiguousarray(codes.reshape(int(np.prod(shape)), codes.shape[-1]))
    zeros = np.ascontiguousarray(np.broadcast_to(np.asarray(zero, np.int32), (len(rows),)))
    out = np.empty((*shape, w.n), np.int32)
    code = U8 if rows.dtype == np.uint8 else S8
    plan = _plan(w.fields, _bucket(len(rows)), code, 0, native.ROW, 0.0, 0, I32, native.NONE, threads)
    _run(plan, rows, w, out.reshape(len(rows), w.n), {"a_zero": zeros}, threads)
    return out


def _word(known: dict[Any, int], word: Any, what: str) -> int:
    try:
        return known[word]
    except (KeyError, TypeError) as exc:
        raise InputError(f"{what}={word!r} is not known", next=f"one of {', '.join(map(str, known))}") from exc


def _dense(array: np.ndarray, dtype: type, what: str) -> np.ndarray:
    """The array itself when its last axis is dense, else a copy."""
    if array.dtype != dtype:
        raise InputError(f"{what} is {array.dtype}, expected {np.dtype(dtype).name}", next="convert it first")
    fit = array.ndim > 0 and (array.shape[-1] <= 1 or array.strides[-1] == array.itemsize) and min(array.strides) >= 0
    return array if fit else np.ascontiguousarray(array)


def _rows(x: Any, what: str) -> tuple[np.ndarray, tuple[int, ...]]:
    array = numpy_from(x, what)
    if array.ndim < 1:
        raise InputError(f"{what} is a scalar, expected [..., K]")
    shape = array.shape[:-1]
    flat = array if array.ndim == 2 else array.reshape(int(np.prod(shape)), array.shape[-1])
    return _dense(flat, np.float32, what), shape


def _operand(x: Any, static: bool) -> tuple[np.ndarray, tuple[int, ...], np.ndarray | None, np.ndarray | None]:
    """Rows of floats, or codes with a scale and a zero for each row; and the shape before the last axis."""
    if not isinstance(x, Quantized):
        return *_rows(x, "x"), None, None
    if x.scale.ndim != 1 or static:
        raise InputError("codes with a scale per 32 values, or with a static scale, are not taken", next="pass floats")
    shape = x.codes.shape[:-1]
    scale, zero = (np.ascontiguousarray(np.broadcast_to(v, shape)) for v in (x.scale, x.zero))
    return x.codes, shape, scale, zero


def _vector(value: Any, w: PackedWeight, what: str) -> np.ndarray | None:
    if value is None:
        return None
    array, wanted = numpy_from(value, what), w.n * (2 if w.gated else 1)
    if array.shape != (wanted,):
        raise InputError(f"{what} has shape {array.shape}, expected ({wanted},)")
    return _dense(array, np.float32, what)


def _residual(value: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    if value is None:
        return None
    array = numpy_from(value, "residual")
    if array.shape != shape:
        raise InputError(f"residual has shape {array.shape}, expected {shape}")
    return _rows(array, "residual")[0]


def _output(out: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    if out is None:
        return np.empty(shape, np.float32)
    if out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous or not out.flags.writeable:
        raise InputError(
            f"out must be a writable C-ordered float32 array of shape {shape}, got {out.dtype} {out.shape}"
        )
    return out


def _bucket(rows: int) -> int:
    """The rows a plan is made for: the next power of two, so that plans are few."""
    return 1 << max(0, rows - 1).bit_length()


@dataclass
class _Cache:
    """Plans by descriptor, the latest used last; shared by threads. Workspaces are not."""

    plans: OrderedDict[tuple[Any, ...], native.Plan] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    local: threading.local = field(default_factory=threading.local)


_cache = _Cache()


def _plan(
    fields: tuple[int, ...], rows: int, a_dtype: int, code: int, how: int, scale: float, zero: int, out: int, act: int,
    threads: int,
) -> native.Plan:  # fmt: skip
    pool(threads)  # refuses a count that is none
    key = (fields, rows, a_dtype, code, how, scale, zero, out, act, threads)
    with _cache.lock:
        if (known := _cache.plans.get(key)) is not None:
            _cache.plans.move_to_end(key)
            return known
    n, k, bits, group, offset, gated, scale_dtype, layout = fields
    desc = native.Desc(
        weight=native.weight(
            n, k, bits=bits, group=group, offset=offset, gated=gated, scale_dtype=scale_dtype, layout=layout
        ),
        max_m=rows, a_dtype=a_dtype, a_code=code, a_quant=how, a_scale=scale, a_zero=zero, out_dtype=out, act=act,
    )  # fmt: skip
    made = native.Plan(desc, threads)
    with _cache.lock:
        _cache.plans[key] = made
        while len(_cache.plans) > _PLANS:
            _cache.plans.popitem(last=False)
    return made


def _run(
    plan: native.Plan,
    a: np.ndarray,
    w: PackedWeight,
    out: np.ndarray,
    extra: dict[str, np.ndarray | None],
    threads: int,
) -> None:
    space = getattr(_cache.local, "space", None)
    if space is None or space.nbytes < plan.workspace_bytes:
        space = _cache.local.space = aligned_empty(plan.workspace_bytes)
    io = native.Io(
        struct_size=native.ctypes.sizeof(native.Io), a=tensor(a), w=w.address, w_bytes=w.nbytes, out=tensor(out)
    )
    for name, array in extra.items():
        if array is not None:
            setattr(io, name, tensor(array))
    plan.run(io, space.ctypes.data, pool(threads))
