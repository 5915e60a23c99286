"""Watch the float graph on calibration samples, and choose an activation range.

A range is [low, high] with 0 inside, mapped to u8 by scale and zero point. Which rule gives the best range differs
from layer to layer, so ``static_int8`` tries them all and keeps the one with the least measured output error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgetok.converters.quantize.building import open_session
from edgetok.converters.quantize.settings import OnStep
from edgetok.errors import InputError


@dataclass(eq=False)
class ActivationStats:
    """Of one activation [..., K] over all calibration samples.

    Args:
        low, high: per channel [K], over every row seen.
        rows: float32 [R, K], sampled evenly over the samples.
        mean: per channel [K], over every row seen.
        rank: number of axes of the activation.
    """

    low: np.ndarray
    high: np.ndarray
    rows: np.ndarray
    mean: np.ndarray
    rank: int = 3

    def divide(self, s: np.ndarray) -> None:
        """Follow a smoothing of the activation by s [K]."""
        self.rows /= s
        self.low, self.high, self.mean = self.low / s, self.high / s, self.mean / s


class _Reservoir:
    """Gathers statistics of one activation; keeps ``quota`` rows of each sample."""

    def __init__(self, quota: int, seed: int) -> None:
        self.quota, self.rng = quota, np.random.default_rng(seed)
        self.low: np.ndarray | None = None
        self.high: np.ndarray | None = None
        self.kept: list[np.ndarray] = []
        self.rank = self.count = 0
        self.total: np.ndarray | float = 0.0

    def add(self, array: np.ndarray, name: str, sample: int) -> None:
        rows = array.reshape(-1, array.shape[-1])
        if len(rows) == 0:
            return
        low, high, self.rank = rows.min(0), rows.max(0), array.ndim
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise InputError(
                f"calibration sample {sample} makes {name} infinite or NaN in the float model",
                where=name,
                next="check the sample and its preprocessing, or leave it out",
            )
        self.low = low if self.low is None else np.minimum(self.low, low)
        self.high = high if self.high is None else np.maximum(self.high, high)
        self.total, self.count = self.total + rows.sum(0, dtype=np.float64), self.count + len(rows)
        take = min(self.quota, len(rows))
        self.kept.append(rows[np.sort(self.rng.choice(len(rows), take, replace=False))].astype(np.float32))

    def finish(self) -> ActivationStats:
        if self.low is None or self.high is None:
            raise InputError("the calibration samples hold no rows")
        mean = np.asarray(self.total / self.count, np.float32)
        return ActivationStats(self.low, self.high, np.concatenate(self.kept), mean, self.rank)


def collect(
    model: ir.Model,
    names: Sequence[str],
    calib: Sequence[Mapping[str, np.ndarray]],
    *,
    rows: int,
    threads: int,
    on_step: OnStep | None = None,
) -> dict[str, ActivationStats]:
    """Run the float graph over the samples and watch the values called ``names``.

    One sample is in memory at a time; about ``rows`` rows per value are kept.

    Raises:
        InputError: a sample does not fit, or gives NaN.
    """
    session = open_session(model, threads=threads, extra_outputs=names)
    quota = max(1, -(-rows // len(calib)))
    found = {name: _Reservoir(quota, seed) for seed, name in enumerate(names)}
    inputs = {i.name for i in session.get_inputs()}
    for i, feed in enumerate(calib):
        try:
            arrays = session.run(list(names), {k: v for k, v in feed.items() if k in inputs})
        except Exception as exc:  # onnxruntime has no common base for its errors
            raise InputError(
                f"calibration sample {i} does not run: {exc}", next="check its shapes and types with `edgetok inspect`"
            ) from exc
        for name, array in zip(names, arrays):
            found[name].add(array, name, i)
        if on_step:
            on_step("calibrate", i + 1, len(calib))
    return {name: r.finish() for name, r in found.items()}


def to_scale(low: float, high: float) -> tuple[np.float32, int]:
    """Scale and u8 zero point of a range; 0 is exactly representable, an empty range gets scale 1.

    Args:
        low, high: finite; widened to hold 0.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255)
    if not scale > np.finfo(np.float32).tiny:
        return np.float32(1), 0
    return scale, int(np.clip(np.rint(-low / float(scale)), 0, 255))


def fake_quantize(x: np.ndarray, scale: np.float32, zero_point: int) -> np.ndarray:
    """DequantizeLinear(QuantizeLinear(x)), u8, half to even."""
    q = np.rint(x * (np.float32(1) / scale))
    np.clip(q, -zero_point, 255 - zero_point, out=q)
    q *= scale
    return q


def choose_range(method: str, x: np.ndarray, low: float, high: float, weight_energy: np.ndarray) -> tuple[float, float]:
    """A range by one rule.

    Args:
        method: one of ``RANGE_METHODS``.
        x: sampled rows [R, K], smoothed if smoothing is on.
        low, high: the extremes over all rows seen.
        weight_energy: [K], sum of squares of the weights each channel meets; weighs errors in "mse".
    """
    if method == "minmax":
        return low, high
    if method.startswith("percentile-"):
        p = float(method.removeprefix("percentile-"))
        lo, hi = np.percentile(_thin(x, 2), [100 - p, p])
        return float(lo), float(hi)
    if method == "mse":
        return _mse_range(x, low, high, weight_energy)
    return _entropy_range(x, low, high)


_SEARCH_ELEMENTS = 200_000


def _thin(x: np.ndarray, times: int = 1) -> np.ndarray:
    """Every n-th row, so that about ``_SEARCH_ELEMENTS`` numbers are left: a range has two parameters to find."""
    return x[:: max(1, x.size // (times * _SEARCH_ELEMENTS))]


_SHRINK = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)


def _mse_range(x: np.ndarray, low: float, high: float, weight_energy: np.ndarray) -> tuple[float, float]:
    """Shrink the upper, then the lower end to the least weighted squared error."""
    x = _thin(x)

    def cost(lo: float, hi: float) -> float:
        error = fake_quantize(x, *to_scale(lo, hi)) - x
        return float(np.einsum("rk,rk,k->", error, error, weight_energy))

    best_high = min(_SHRINK, key=lambda f: cost(low, high * f)) * high
    best_low = min(_SHRINK, key=lambda f: cost(low * f, best_high)) * low
    best_high = min((f * best_high for f in (1.0, 0.95, 1.05)), key=lambda h: cost(best_low, h))
    return best_low, best_high


def _entropy_range(x: np.ndarray, low: float, high: float, bins: int = 2048, levels: int = 256) -> tuple[float, float]:
    """Shrink both ends alike to the least Kullback-Leibler divergence between the histogram and its u8 version.

    Source: Migacz, 8-bit inference with TensorRT, 2017, for a range with two ends.
    """
    if not high > low:
        return low, high
    x = _thin(x)
    best, answer = np.inf, (low, high)
    for factor in _SHRINK:
        lo, hi = low * factor, high * factor
        counts = np.histogram(x, bins=bins, range=(lo, hi))[0].astype(np.float64)
        inside = counts.reshape(levels, -1).copy()
        counts[0], counts[-1] = counts[0] + (x < lo).sum(), counts[-1] + (x > hi).sum()
        occupied = inside > 0
        filled = occupied.sum(1, keepdims=True)
        q = np.where(occupied, inside.sum(1, keepdims=True) / np.maximum(filled, 1), 0.0).reshape(-1)
        p, q = counts / counts.sum(), (q + 1e-9) / (q + 1e-9).sum()
        mask = p > 0
        divergence = float((p[mask] * np.log(p[mask] / q[mask])).sum())
        if divergence < best:
            best, answer = divergence, (lo, hi)
    return answer
