"""Rank statistics, ties handled."""

from __future__ import annotations

import math

import numpy as np


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties sharing their mean rank, float64 [n]."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[inverse.reshape(-1)], np.float64)


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve (Mann-Whitney): how often a positive scores above a negative, ties counting half.

    Args:
        scores: float [n].
        labels: positive where above zero, [n].

    Returns:
        0 to 1; NaN when one class is empty.
    """
    positive = np.asarray(labels) > 0
    count = int(positive.sum())
    if count in (0, len(positive)):
        return math.nan
    total = float(ranks(scores)[positive].sum()) - count * (count + 1) / 2
    return total / (count * (len(positive) - count))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of ranks, -1 to 1; NaN when one side is constant."""
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / norm if norm else math.nan
