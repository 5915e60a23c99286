"""Numpy laws beside those of the ``onnx`` package: the ``com.microsoft`` operators edgetok emits or meets, and the
standard ones where the package's own version departs from the specification or takes too long to judge with.

Every class is named after its operator, as ``onnx.reference`` wants it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_dequantize_linear import DequantizeLinear_25
from onnx.reference.ops.op_quantize_linear import QuantizeLinear_25

from edgetok.devices._reference_conv import ConvTranspose

MICROSOFT = "com.microsoft"


def erf(x: np.ndarray) -> np.ndarray:
    """Error function, elementwise, at float64 precision, in the dtype of ``x``."""
    return np.fromiter(map(math.erf, x.ravel().tolist()), np.float64, x.size).reshape(x.shape).astype(x.dtype)


def gelu(x: np.ndarray) -> np.ndarray:
    """0.5 x (1 + erf(x / sqrt 2)), in float64, returned in the dtype of ``x``."""
    wide = x.astype(np.float64)
    return (0.5 * wide * (1 + erf(wide / math.sqrt(2)))).astype(x.dtype)


def softmax(x: np.ndarray) -> np.ndarray:
    """Softmax over the last axis; rows that are all -inf give NaN, as the formula does."""
    shifted = np.exp(x - x.max(axis=-1, keepdims=True, initial=-np.inf))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def integer_matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a [.., M, K] times b [.., K, N] of integers up to 16 bits, exact: float64 holds every partial sum."""
    return np.matmul(a.astype(np.float64), b.astype(np.float64))


def _row_zero(a: np.ndarray, zero: np.ndarray | None) -> np.ndarray:
    """A minus its zero point: scalar, [1], one per row [M], or already broadcastable."""
    if zero is None:
        return a.astype(np.int32)
    per_row = zero.ndim == 1 and zero.size > 1
    return a.astype(np.int32) - (zero[:, None] if per_row else zero).astype(np.int32)


def _wide(a: np.ndarray) -> np.ndarray:
    """float16 and bfloat16 as float32: numpy has no BLAS for them."""
    return a.astype(np.float32) if a.dtype.itemsize == 2 and a.dtype.kind in "fV" else a


class MatMul(OpRun):
    """As the package's, but half precision is multiplied in float32."""

    def _run(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray]:  # type: ignore[override]
        return (np.asarray(np.matmul(_wide(a), _wide(b))).astype(a.dtype, copy=False),)


class Erf(OpRun):
    """The package's version returns float32 precision for float64 input."""

    def _run(self, x: np.ndarray) -> tuple[np.ndarray]:  # type: ignore[override]
        return (erf(x),)


class MatMulInteger(OpRun):
    """The package's version subtracts a per-row zero point of A along the wrong axis, and has no BLAS."""

    def _run(  # type: ignore[override]
        self, a: np.ndarray, b: np.ndarray, a_zero: np.ndarray | None = None, b_zero: np.ndarray | None = None
    ) -> tuple[np.ndarray]:
        b32 = b.astype(np.int32) - (0 if b_zero is None else b_zero.astype(np.int32))
        return (np.asarray(integer_matmul(_row_zero(a, a_zero), b32)).astype(np.int32),)


class QLinearMatMul(OpRun):
    """Integer matmul, one float32 scale, round half to even, saturate."""

    def _run(  # type: ignore[override]
        self,
        a: np.ndarray,
        a_scale: np.ndarray,
        a_zero: np.ndarray,
        b: np.ndarray,
        b_scale: np.ndarray,
        b_zero: np.ndarray,
        y_scale: np.ndarray,
        y_zero: np.ndarray,
    ) -> tuple[np.ndarray]:
        total = integer_matmul(_row_zero(a, a_zero), b.astype(np.int32) - b_zero.astype(np.int32))
        rows = a_scale[:, None] if a_scale.ndim == 1 and a_scale.size > 1 else a_scale
        y = np.rint(total * (rows.astype(np.float64) * b_scale / y_scale)) + y_zero.astype(np.int64)
        info = np.iinfo(y_zero.dtype)
        return (np.asarray(np.clip(y, info.min, info.max)).astype(y_zero.dtype),)


class QuantizeLinear(QuantizeLinear_25):
    """The package's version wraps around where x / scale leaves int32; quotients are limited before the cast."""

    def _run(self, x: np.ndarray, scale: np.ndarray, zero: Any = None, axis: int = 1, **attrs: Any) -> Any:  # type: ignore[override]
        blocked = bool(attrs.get("block_size"))
        if x.dtype.kind == "f" and not blocked and not attrs.get("precision"):
            shape = [1] * x.ndim
            if scale.size > 1:
                shape[axis] = scale.size
            limit = np.abs(scale.astype(np.float64).reshape(shape)) * 2**20
            x = np.clip(x.astype(np.float64), -limit, limit).astype(x.dtype)
        return super()._run(x, scale, zero, axis=axis, **attrs)


class DequantizeLinear(DequantizeLinear_25):
    """The latest law serves every opset; the package knows none below 19."""


class GatherElements(OpRun):
    """The package's version is limited to 64 entries on the axis and wraps indices that are out of range."""

    def _run(self, data: np.ndarray, indices: np.ndarray, axis: int = 0) -> tuple[np.ndarray]:  # type: ignore[override]
        axis %= data.ndim
        crop = tuple(slice(None) if i == axis else slice(n) for i, n in enumerate(indices.shape))
        return (np.take_along_axis(data[crop], indices.astype(np.int64), axis=axis),)


_SCATTER: dict[str, Callable[..., None]] = {
    "add": np.add.at,
    "mul": np.multiply.at,
    "max": np.maximum.at,
    "min": np.minimum.at,
}


class ScatterElements(OpRun):
    """The package's version loops over elements in Python."""

    def _run(  # type: ignore[override]
        self, data: np.ndarray, indices: np.ndarray, updates: np.ndarray, axis: int = 0, reduction: Any = None
    ) -> tuple[np.ndarray]:
        out = data.copy()
        where = list(np.ix_(*(np.arange(n) for n in indices.shape)))
        where[axis % data.ndim] = indices
        if reduction in (None, "none"):
            out[tuple(where)] = updates
        else:
            _SCATTER[reduction](out, tuple(where), updates)
        return (out,)


class Scatter(ScatterElements):
    """The operator of opset 9 and 10, now called ScatterElements; the package has no entry for it."""


def unpack_blocks(codes: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Codes of the last axis, packed low bits first, as uint8 [.., count]."""
    if bits == 8:
        return codes[..., :count]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    wide = (codes[..., None] >> shifts) & ((1 << bits) - 1)
    return wide.reshape(*codes.shape[:-1], -1)[..., :count]


def unpack_weight(
    b: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, *, n: int, k: int, bits: int, block: int
) -> np.ndarray:
    """Dequantize a MatMulNBits weight to float32 [N, K].

    Args:
        b: uint8 [N, blocks, block * bits / 8].
        scales: float [N, blocks], any shape of that size.
        zeros: uint8 packed [N, ceil(blocks * bits / 8)], or float [N, blocks], or None for 2^(bits-1).
        n, k, bits, block: attributes of the node.
    """
    blocks = -(-k // block)
    codes = unpack_blocks(b.reshape(n, blocks, -1), bits, block).astype(np.float32)
    zero: np.ndarray | float = float(1 << (bits - 1))
    if zeros is not None and zeros.dtype == np.uint8:
        zero = unpack_blocks(zeros.reshape(n, -1), bits, blocks).astype(np.float32)[:, :, None]
    elif zeros is not None:
        zero = zeros.astype(np.float32).reshape(n, blocks, 1)
    weight = (codes - zero) * scales.astype(np.float32).reshape(n, blocks, 1)
    return weight.reshape(n, blocks * block)[:, :k]


class _Microsoft(OpRun):
    """An operator of onnxruntime's domain; without this the package would take a standard schema of the same name."""

    op_domain = MICROSOFT
    op_schema = None


class MatMulNBits(_Microsoft):
    """Weight-only matmul in float: the law, whatever ``accuracy_level`` lets a kernel round."""

    def _run(  # type: ignore[override]
        self,
        a: np.ndarray,
        b: np.ndarray,
        scales: np.ndarray,
        zeros: np.ndarray | None = None,
        g_idx: np.ndarray | None = None,
        bias: np.ndarray | None = None,
        K: int = 0,
        N: int = 0,
        bits: int = 4,
        block_size: int = 32,
        **_: Any,
    ) -> tuple[np.ndarray]:
        if g_idx is not None:
            raise NotImplementedError("MatMulNBits with g_idx (act-order) is not part of the reference")
        weight = unpack_weight(b, scales, zeros, n=N, k=K, bits=bits, block=block_size)
        y = _wide(a) @ weight.T
        return ((y if bias is None else y + _wide(bias)).astype(a.dtype),)


class Gelu(_Microsoft):
    def _run(self, x: np.ndarray) -> tuple[np.ndarray]:  # type: ignore[override]
        return (gelu(x),)


class BiasGelu(_Microsoft):
    def _run(self, x: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray]:  # type: ignore[override]
        return (gelu(x + bias),)


class FastGelu(_Microsoft):
    """The tanh approximation."""

    def _run(self, x: np.ndarray, bias: np.ndarray | None = None) -> tuple[np.ndarray]:  # type: ignore[override]
        v = (x if bias is None else x + bias).astype(np.float64)
        return ((0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))).astype(x.dtype),)


class QuickGelu(_Microsoft):
    def _run(self, x: np.ndarray, alpha: float = 1.702) -> tuple[np.ndarray]:  # type: ignore[override]
        v = x.astype(np.float64)
        return ((v / (1 + np.exp(-alpha * v))).astype(x.dtype),)


class SkipLayerNormalization(_Microsoft):
    """LayerNormalization(x + skip + bias) over the last axis; output 3 is the sum."""

    def _run(  # type: ignore[override]
        self,
        x: np.ndarray,
        skip: np.ndarray,
        gamma: np.ndarray,
        beta: np.ndarray | None = None,
        bias: np.ndarray | None = None,
        epsilon: float = 1e-12,
    ) -> tuple[np.ndarray, ...]:
        total = x + skip if bias is None else x + skip + bias
        wide = total.astype(np.float64)
        mean = wide.mean(axis=-1, keepdims=True)
        inverse = 1 / np.sqrt(wide.var(axis=-1, keepdims=True) + epsilon)
        y = (wide - mean) * inverse * gamma + (0 if beta is None else beta)
        return y.astype(x.dtype), mean.astype(np.float32), inverse.astype(np.float32), total


class FusedMatMul(_Microsoft):
    """alpha * op(A) op(B), with optional transposes of the last two axes."""

    def _run(  # type: ignore[override]
        self, a: np.ndarray, b: np.ndarray, alpha: float = 1.0, transA: int = 0, transB: int = 0, **attrs: Any
    ) -> tuple[np.ndarray]:
        if attrs.get("transBatchA") or attrs.get("transBatchB"):
            raise NotImplementedError("FusedMatMul with transposed batch axes is not part of the reference")
        left = np.swapaxes(a, -1, -2) if transA else a
        right = np.swapaxes(b, -1, -2) if transB else b
        return ((alpha * np.matmul(_wide(left), _wide(right))).astype(a.dtype),)


class MatMulIntegerToFloat(_Microsoft):
    """(A - za)(B - zb) * sa * sb + bias, per column of B where its scale is a vector."""

    def _run(  # type: ignore[override]
        self,
        a: np.ndarray,
        b: np.ndarray,
        a_scale: np.ndarray,
        b_scale: np.ndarray,
        a_zero: np.ndarray | None = None,
        b_zero: np.ndarray | None = None,
        bias: np.ndarray | None = None,
    ) -> tuple[np.ndarray]:
        b32 = b.astype(np.int32) - (0 if b_zero is None else b_zero.astype(np.int32))
        y = integer_matmul(_row_zero(a, a_zero), b32) * (a_scale.astype(np.float64) * b_scale)
        return ((y if bias is None else y + bias).astype(a_scale.dtype),)


class DynamicQuantizeMatMul(_Microsoft):
    """A quantized per tensor to u8 as by DynamicQuantizeLinear, then ``MatMulIntegerToFloat``."""

    def _run(  # type: ignore[override]
        self,
        a: np.ndarray,
        b: np.ndarray,
        b_scale: np.ndarray,
        b_zero: np.ndarray | None = None,
        bias: np.ndarray | None = None,
    ) -> tuple[np.ndarray]:
        low, high = min(0.0, float(a.min(initial=0))), max(0.0, float(a.max(initial=0)))
        scale = np.float32(1.0 if high == low else np.float32(high) - np.float32(low)) / np.float32(255)
        zero = np.clip(np.rint(np.float32(-low) / scale), 0, 255).astype(np.uint8)
        codes = np.clip(np.rint(a / scale) + zero, 0, 255).astype(np.uint8)
        y = MatMulIntegerToFloat._run(self, codes, b, np.asarray(scale), b_scale, zero, b_zero, bias)  # type: ignore[arg-type]
        return (y[0].astype(a.dtype),)


class MultiHeadAttention(_Microsoft):
    """softmax(scale q k^T + bias) v for q [B, N, D], k [B, M, D], v [B, M, Dv], heads split from the last axis."""

    def _run(  # type: ignore[override]
        self,
        query: np.ndarray,
        key: np.ndarray | None = None,
        value: np.ndarray | None = None,
        bias: np.ndarray | None = None,
        padding: np.ndarray | None = None,
        attention_bias: np.ndarray | None = None,
        *past: np.ndarray | None,
        num_heads: int = 1,
        scale: float | None = None,
        mask_filter_value: float = -10000.0,
        unidirectional: int = 0,
        **_: Any,
    ) -> tuple[np.ndarray]:
        if key is None or value is None or query.ndim != 3 or key.ndim != 3 or any(p is not None for p in past):
            raise NotImplementedError("MultiHeadAttention with packed inputs or a past is not part of the reference")
        if bias is not None:
            d = query.shape[-1]
            query, key, value = query + bias[:d], key + bias[d : 2 * d], value + bias[2 * d :]
        q, k, v = (_heads(t, num_heads) for t in (query, key, value))
        logits = np.matmul(q, np.swapaxes(k, -1, -2)) * (scale or 1 / math.sqrt(q.shape[-1]))
        if padding is not None:
            if padding.ndim != 2:
                raise NotImplementedError("MultiHeadAttention: only a [batch, keys] padding mask is in the reference")
            logits = logits + np.where(padding[:, None, None, :] == 0, mask_filter_value, 0.0)
        if attention_bias is not None:
            logits = logits + attention_bias
        if unidirectional:
            logits = np.where(np.tri(*logits.shape[-2:]) > 0, logits, -np.inf)
        y = np.matmul(softmax(logits), v)
        return (np.swapaxes(y, 1, 2).reshape(*query.shape[:2], -1).astype(query.dtype),)


def _heads(t: np.ndarray, heads: int) -> np.ndarray:
    """[B, N, H*d] to [B, H, N, d] in float64."""
    return np.swapaxes(t.astype(np.float64).reshape(*t.shape[:2], heads, -1), 1, 2)


OPS: list[type[OpRun]] = [
    MatMul,
    Erf,
    MatMulInteger,
    QLinearMatMul,
    QuantizeLinear,
    DequantizeLinear,
    GatherElements,
    ConvTranspose,
    ScatterElements,
    Scatter,
    MatMulNBits,
    Gelu,
    BiasGelu,
    FastGelu,
    QuickGelu,
    SkipLayerNormalization,
    FusedMatMul,
    MatMulIntegerToFloat,
    DynamicQuantizeMatMul,
    MultiHeadAttention,
]
