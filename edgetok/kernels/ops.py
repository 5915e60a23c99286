"""Small operations of a transformer: numpy arrays or DLPack tensors (float32, on the CPU) in, numpy arrays out.

Rows are the last axis. Inputs of other element types, or whose last axis is not dense, are refused rather than copied
in silence. ``out`` arrays may be one of the inputs where the text says "in place".
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgetok.errors import InputError
from edgetok.native import ops as native_ops
from edgetok.native.tensors import numpy_from


def _maybe(value: Any, name: str) -> np.ndarray | None:
    return None if value is None else numpy_from(value, name)


def _like(x: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    return np.empty(x.shape, np.float32) if out is None else out


def layernorm(
    x: Any, gamma: Any = None, beta: Any = None, *, eps: float = 1e-5, residual: Any = None,
    out: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Normalize rows: ``(h - mean) / sqrt(var + eps) * gamma + beta`` with ``h = x + residual``.

    Args:
        x: [..., C]. gamma, beta: [C] or None. residual: as x, or None.
        out: as x; may be x or residual.

    Returns:
        float32 as x.

    Raises:
        InputError: shapes, element types or strides that do not fit.
    """
    source = numpy_from(x, "x")
    y = _like(source, out)
    more, g, b = _maybe(residual, "residual"), _maybe(gamma, "gamma"), _maybe(beta, "beta")
    native_ops.call("layernorm", source, more, g, b, eps, y, None, None, None)
    return y


def rmsnorm(
    x: Any, gamma: Any = None, *, eps: float = 1e-6, residual: Any = None, out: np.ndarray | None = None
) -> np.ndarray:
    """Normalize rows: ``h / sqrt(mean(h^2) + eps) * gamma`` with ``h = x + residual``. Arguments as ``layernorm``."""
    source = numpy_from(x, "x")
    y = _like(source, out)
    native_ops.call("rmsnorm", source, _maybe(residual, "residual"), _maybe(gamma, "gamma"), eps, y, None, None, None)
    return y


def add_norm_quantize(
    x: Any, gamma: Any = None, beta: Any = None, *, rms: bool = False, eps: float = 1e-5, residual: Any = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One pass from the residual stream to the codes of the next matrix product.

    Args:
        x: [..., C]. gamma, beta (not with rms): [C] or None. residual: as x, or None.

    Returns:
        h float32 [..., C] = x + residual; codes int8 [..., C]; scale float32 [...], with norm(h) = codes * scale.

    Raises:
        InputError: shapes, element types or strides that do not fit; beta together with rms.
    """
    source = numpy_from(x, "x")
    h = np.empty(source.shape, np.float32)
    codes, scale = np.empty(source.shape, np.int8), np.empty(source.shape[:-1], np.float32)
    more, g, b = _maybe(residual, "residual"), _maybe(gamma, "gamma"), _maybe(beta, "beta")
    if rms and b is not None:
        raise InputError("beta is given, but RMSNorm has none")
    head = (source, more, g, eps) if rms else (source, more, g, b, eps)
    native_ops.call("rmsnorm" if rms else "layernorm", *head, None, h, codes, scale)
    return h, codes, scale


def softmax(x: Any, *, mask: Any = None, scale: float = 1.0, out: np.ndarray | None = None) -> np.ndarray:
    """Softmax over the last axis of ``scale * x + mask``.

    Args:
        x: [..., M].
        mask: float32 to add, or bool where False hides; dimensions align at the end and may be 1 (not the last).
        out: as x; may be x.

    Returns:
        float32 as x; rows with nothing to see are 0.
    """
    source = numpy_from(x, "x")
    y = _like(source, out)
    native_ops.call("softmax", source, _maybe(mask, "mask"), scale, y)
    return y


def gelu(x: Any, *, tanh: bool = False, out: np.ndarray | None = None) -> np.ndarray:
    """GELU by the error function (within 3e-7 max(1, abs(x))), or by its tanh approximation. In place."""
    source = numpy_from(x, "x")
    y = _like(source, out)
    native_ops.call("gelu", source, int(tanh), y)
    return y


def silu(x: Any, *, out: np.ndarray | None = None) -> np.ndarray:
    """``x / (1 + exp(-x))``. In place."""
    source = numpy_from(x, "x")
    y = _like(source, out)
    native_ops.call("silu", source, y)
    return y


def swiglu(gate: Any, up: Any, *, out: np.ndarray | None = None) -> np.ndarray:
    """``silu(gate) * up``; both of one shape, as the two halves of a projection's columns. In place."""
    g, u = numpy_from(gate, "gate"), numpy_from(up, "up")
    y = _like(g, out)
    native_ops.call("swiglu", g, u, y)
    return y


def add(a: Any, b: Any, *, out: np.ndarray | None = None) -> np.ndarray:
    """``a + b`` of one shape. In place."""
    x, y = numpy_from(a, "a"), numpy_from(b, "b")
    z = _like(x, out)
    native_ops.call("add_rows", x, y, z)
    return z


def rope_tables(
    positions: int, width: int, *, base: float = 10000.0, first: int = 0, inv_freq: Any = None, amplitude: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines for ``rope``: float32 [positions, width / 2] each.

    Args:
        positions: rows, for positions ``first``, ``first + 1``, ... width: rotated columns, even.
        base: of the frequencies ``base ** (-2i / width)``. inv_freq: float32 [width / 2] frequencies instead of base.
        amplitude: multiplies both (attention scaling of some long-context models).
    """
    if width < 0 or width % 2 or positions < 0:
        raise InputError(f"positions={positions}, width={width}: need counts of zero or more and an even width")
    cos, sin = np.empty((2, positions, width // 2), np.float32)
    native_ops.call("rope_tables", _maybe(inv_freq, "inv_freq"), base, first, amplitude, cos, sin)
    return cos, sin


def rope(
    x: Any, cos: Any, sin: Any, *, positions: Any = None, first: int = 0, interleaved: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Rotary position embedding.

    Args:
        x: [B, H, N, D] or [H, N, D], any strides with a dense last axis.
        cos, sin: float32 [P, width / 2]; columns from ``width`` on are copied.
        positions: int32 or int64 [N] or [B, N], rows of the tables; None = first, first + 1, ...
        interleaved: pair columns (2i, 2i + 1) instead of (i, i + width / 2).
        out: as x; may be x.

    Returns:
        float32 as x.

    Raises:
        InputError: a position without a row in the tables; shapes that do not fit.
    """
    source = numpy_from(x, "x")
    y = _like(source, out)
    c, s = numpy_from(cos, "cos"), numpy_from(sin, "sin")
    native_ops.call("rope", source, c, s, _maybe(positions, "positions"), first, int(interleaved), y)
    return y


def argmax(x: Any) -> np.ndarray:
    """int64 [...] of x [..., M]: where each row is largest; NaN counts as largest, equals give the lowest index."""
    source = numpy_from(x, "x")
    index = np.empty(source.shape[:-1], np.int64)
    native_ops.call("argmax", source, index)
    return index


def topk(x: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest of each row, falling; equals by rising index, NaN first.

    Args:
        x: [..., M]. k: 1..M.

    Returns:
        values float32 [..., k], indices int32 [..., k].
    """
    source = numpy_from(x, "x")
    if source.ndim == 0 or not 1 <= k <= source.shape[-1]:
        raise InputError(f"k={k} of rows of shape {source.shape}", next="choose k from 1 to the row's length")
    shape = (*source.shape[:-1], k)
    values, index = np.empty(shape, np.float32), np.empty(shape, np.int32)
    owner, at, size = native_ops.workspace(native_ops.library().etk_topk_workspace(source.shape[-1], k))
    native_ops.call("topk", source, k, values, index, at, size)
    del owner
    return values, index


def gather_rows(x: Any, index: Any) -> np.ndarray:
    """``y[b, m] = x[b, index[b, m]]``.

    Args:
        x: [B, N, C] or [N, C] of any element type. index: int32 or int64 [B, M] or [M], 0 <= index < N.

    Returns:
        [B, M, C] or [M, C].
    """
    source, rows = numpy_from(x, "x"), numpy_from(index, "index")
    y = np.empty((*rows.shape, source.shape[-1] if source.ndim else 0), source.dtype)
    native_ops.call("gather_rows", source, rows, y)
    return y


def scatter_rows(x: Any, index: Any, out: np.ndarray) -> np.ndarray:
    """``out[b, index[b, m]] = x[b, m]``; other rows of out stay; of equal indices the last wins. Returns out."""
    native_ops.call("scatter_rows", numpy_from(x, "x"), numpy_from(index, "index"), out)
    return out
