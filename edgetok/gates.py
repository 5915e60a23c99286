"""What a conversion must pass: agreement with the source, a user's metric, speed, peak memory, size.

A gate compares in the direction that fails on NaN. Failing gates raise ``GateError`` (exit 5) or ``BudgetError``
(exit 6); when accuracy and speed both fail, accuracy is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgetok.errors import InputError
from edgetok.measuring import Ratio
from edgetok.structure import KEPT_SUFFIX

COSINE_PLAIN = 0.99
COSINE_REDUCED = 0.95


@dataclass(frozen=True)
class Limits:
    """What is still acceptable.

    Args:
        drop: largest loss of the ``--eval`` metric, points.
        cosine: smallest cosine per output; None means 0.99, or 0.95 with token reduction.
        speedup: the lower end of the 95 % interval of source time / artifact time must exceed this.
        max_bytes: size of the artifact's model files, bytes.
        max_rss_bytes: peak memory of a run, less that of an empty interpreter, bytes.
    """

    drop: float = 0.5
    cosine: float | None = None
    speedup: float = 1.0
    max_bytes: int | None = None
    max_rss_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.drop >= 0:
            raise InputError(f"--drop {self.drop}: a loss in points, 0 or more")
        if self.cosine is not None and not -1 <= self.cosine <= 1:
            raise InputError(f"--cosine {self.cosine}: between -1 and 1")
        if not self.speedup >= 0:
            raise InputError(f"--require-speedup {self.speedup}: a ratio, 0 or more")

    def cosine_limit(self, reduced: bool) -> float:
        """The cosine limit in force."""
        if self.cosine is not None:
            return self.cosine
        return COSINE_REDUCED if reduced else COSINE_PLAIN


@dataclass(frozen=True)
class Agreement:
    """How close one output is to the source's, over samples.

    Args:
        name: output name.
        cosine: mean over samples of the cosine of the flattened output, computed in float64; of labels (integers),
            the share that is equal, which is the cosine of their one-hot forms.
        worst: the smallest of them.
        max_abs: largest absolute difference.
        relative: norm of the difference over norm of the source's output.
    """

    name: str
    cosine: float
    worst: float
    max_abs: float
    relative: float


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two arrays of equal size, flattened; 1.0 when both are zero, 0.0 when one is."""
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    nx, ny = float(np.sqrt(x @ x)), float(np.sqrt(y @ y))
    if nx == 0 or ny == 0:
        return 1.0 if nx == ny else 0.0
    return float(x @ y / (nx * ny))


def aligned(source: Mapping[str, np.ndarray], artifact: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The source's outputs, of those cut short by ``--outputs reduced`` only the rows that were kept.

    Args:
        source: output name to array; per-token outputs are [B, N, ...].
        artifact: the same names, and ``<name>.kept``, int64 [B, K], for outputs cut to [B, K, ...].
    """
    found = dict(source)
    for name, value in source.items():
        kept = artifact.get(name + KEPT_SUFFIX)
        if kept is not None and name in artifact and artifact[name].shape != value.shape:
            rows = kept.reshape(*kept.shape, *[1] * (value.ndim - kept.ndim))
            found[name] = np.take_along_axis(value, rows, axis=kept.ndim - 1)
    return found


def agreement(
    source: Sequence[Mapping[str, np.ndarray]], artifact: Sequence[Mapping[str, np.ndarray]]
) -> list[Agreement]:
    """Compare outputs sample by sample.

    Args:
        source, artifact: one mapping of output name to array per sample; only shared names are compared.

    Returns:
        One record per floating-point output, in the source's order; when there is none, one per integer output.

    Raises:
        InputError: an output changed its shape.
    """
    shared = [name for name in source[0] if name in artifact[0]]
    floats = [name for name in shared if np.issubdtype(source[0][name].dtype, np.floating)]
    found = []
    for name in floats or shared:
        cosines, largest, difference, norm = [], 0.0, 0.0, 0.0
        for a, b in zip(source, artifact, strict=True):
            x, y = a[name], b[name]
            if x.shape != y.shape:
                raise InputError(
                    f"output {name!r} is {list(y.shape)} in the artifact and {list(x.shape)} in the source",
                    next="convert without --outputs reduced, or compare with --eval",
                )
            cosines.append(cosine(x, y) if floats else float((x == y).mean()) if x.size else 1.0)
            delta = np.abs(x.astype(np.float64) - y.astype(np.float64))
            # max() of Python drops NaN depending on the order; numpy's keeps it.
            largest = float(np.maximum(largest, delta.max(initial=0.0)))
            difference += float((delta**2).sum())
            norm += float((x.astype(np.float64) ** 2).sum())
        relative = float(np.sqrt(difference / norm)) if norm else float(difference > 0)
        found.append(Agreement(name, float(np.mean(cosines)), float(np.min(cosines)), largest, relative))
    return found


@dataclass(frozen=True)
class Check:
    """One gate's outcome.

    Args:
        name: "agreement", the metric's name, "speed", "memory", "size".
        passed: whether it passed.
        text: one line for people, with the limit.
        code: exit code when it did not.
    """

    name: str
    passed: bool
    text: str
    code: int


def check_agreement(found: Sequence[Agreement], limits: Limits, *, reduced: bool, decides: bool) -> Check:
    """Gate on the smallest mean cosine of the outputs; only reported when ``--eval`` decides."""
    if not found:
        return Check("agreement", not decides, "the outputs have nothing in common with the source's", 5)
    worst = min(found, key=lambda a: a.cosine if a.cosine == a.cosine else -2.0)
    limit = limits.cosine_limit(reduced)
    text = f"cosine {worst.cosine:.4f} to the source ({worst.name}"
    if not decides:
        return Check("agreement", worst.cosine == worst.cosine, text + ", reported only)", 5)
    return Check("agreement", worst.cosine >= limit, f"{text}, limit {limit:g})", 5)


def check_drop(metric: str, source: float, artifact: float, limit: float) -> Check:
    """Gate on the loss of a metric given in points."""
    drop = source - artifact
    text = f"{metric} {source:.2f} -> {artifact:.2f} ({artifact - source:+.2f} pt, limit {limit:g})"
    return Check(metric, drop <= limit, text, 5)


def check_speed(ratio: Ratio, limits: Limits) -> Check:
    """Gate on the lower end of the interval of the speed-up."""
    text = f"{ratio.value:.2f}x (95 % CI {ratio.low:.2f}-{ratio.high:.2f}, required > {limits.speedup:g})"
    return Check("speed", ratio.low > limits.speedup, text, 6)


def check_worth(gain: float, least: float, limits: Limits) -> Check | None:
    """Gate on what a reduction asked for gains by itself; off with ``--require-speedup 0``.

    Args:
        gain: time without over time with it, everything else equal.
        least: the smallest gain worth its risk.
    """
    if limits.speedup <= 0:
        return None
    return Check("reduce", gain >= least, f"fewer tokens gained {gain:.2f}x (worth it from {least:g}x)", 6)


def check_size(size_bytes: int, limits: Limits) -> Check | None:
    """Gate on bytes on disk, when a limit was given."""
    if limits.max_bytes is None:
        return None
    text = f"{size_bytes / 1e6:.1f} MB on disk (limit {limits.max_bytes / 1e6:.1f} MB)"
    return Check("size", size_bytes <= limits.max_bytes, text, 6)


def check_memory(rss_bytes: int | None, limits: Limits) -> Check | None:
    """Gate on peak memory, when a limit was given."""
    if limits.max_rss_bytes is None:
        return None
    if rss_bytes is None:
        return Check("memory", False, "peak memory is not measurable here", 6)
    text = f"{rss_bytes / 1e6:.0f} MB peak in a run (limit {limits.max_rss_bytes / 1e6:.0f} MB)"
    return Check("memory", rss_bytes <= limits.max_rss_bytes, text, 6)
