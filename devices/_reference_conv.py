"""Transposed convolution for the numpy reference: the onnx package's version takes minutes on a decoder head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun


def _padding(total: Sequence[int], auto_pad: str) -> tuple[list[int], list[int]]:
    """Split what is cut per axis; the odd one goes to the start unless SAME_UPPER (ONNX, ConvTranspose)."""
    half = [t // 2 for t in total]
    rest = [t - h for t, h in zip(total, half, strict=True)]
    return (half, rest) if auto_pad == "SAME_UPPER" else (rest, half)


def _crop(full: np.ndarray, begin: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """``full`` [N, C, *] from ``begin`` on, ``size`` long; positions outside are zero."""
    for axis, (first, length) in enumerate(zip(begin, size, strict=True), start=2):
        before, after = max(0, -first), max(0, first + length - full.shape[axis])
        widths = [(0, 0)] * full.ndim
        widths[axis] = (before, after)
        full = np.pad(full, widths).take(range(first + before, first + before + length), axis=axis)
    return full


class ConvTranspose(OpRun):
    """X [N, C, *in] with W [C, M/group, *kernel]: each input element adds its scaled kernel to the output."""

    def _run(  # type: ignore[override]
        self,
        x: np.ndarray,
        w: np.ndarray,
        b: np.ndarray | None = None,
        auto_pad: str = "NOTSET",
        dilations: Any = None,
        group: int = 1,
        kernel_shape: Any = None,
        output_padding: Any = None,
        output_shape: Any = None,
        pads: Any = None,
        strides: Any = None,
    ) -> tuple[np.ndarray]:
        n, inner, kernel = x.ndim - 2, x.shape[2:], w.shape[2:]
        ones, zeros = [1] * n, [0] * n
        step, spread, extra = strides or ones, dilations or ones, output_padding or zeros
        reach = [s * (i - 1) + d * (k - 1) + 1 for s, i, d, k in zip(step, inner, spread, kernel, strict=True)]
        size = [r + e for r, e in zip(reach, extra, strict=True)]
        wanted = list(output_shape[-n:]) if output_shape else None
        if wanted is None and auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            wanted = [i * s for i, s in zip(inner, step, strict=True)]
        if wanted is not None:
            begin, _ = _padding([s - o for s, o in zip(size, wanted, strict=True)], auto_pad)
        else:
            edges = list(pads) if pads is not None and auto_pad == "NOTSET" else zeros * 2
            begin = edges[:n]
            wanted = [s - p - q for s, p, q in zip(size, begin, edges[n:], strict=True)]
        full = _spread_kernels(x, w, group, reach, step, spread)
        y = _crop(full, begin, wanted)
        if b is not None:
            y = y + b.reshape(1, -1, *ones)
        return (y.astype(x.dtype),)


def _spread_kernels(
    x: np.ndarray, w: np.ndarray, group: int, reach: Sequence[int], step: Sequence[int], spread: Sequence[int]
) -> np.ndarray:
    """The uncropped sum [N, M, *reach], one matrix product per kernel element."""
    wide = np.float64 if x.dtype == np.float64 else np.float32
    batch, inner = x.shape[0], x.shape[2:]
    rows = x.reshape(batch, group, x.shape[1] // group, -1).astype(wide)
    kernels = w.reshape(group, w.shape[0] // group, *w.shape[1:]).swapaxes(1, 2).astype(wide)
    full = np.zeros((batch, group * w.shape[1], *reach), wide)
    for place in np.ndindex(*w.shape[2:]):
        part = np.matmul(kernels[(slice(None),) * 3 + place], rows).reshape(batch, -1, *inner)
        where = tuple(
            slice(p * d, p * d + s * (i - 1) + 1, s) for p, d, s, i in zip(place, spread, step, inner, strict=True)
        )
        full[(slice(None), slice(None), *where)] += part
    return full
