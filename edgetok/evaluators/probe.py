"""A linear head on a frozen backbone: accuracy of the probe on labelled images.

The head is an ``.npz`` with ``weight`` [classes, F] and ``bias`` [classes], trained once on the unreduced model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgetok.errors import InputError
from edgetok.evaluators._data import load_cases, open_npz
from edgetok.evaluators.base import EvalResult, EvalSpec, Run, Step, pick, result, run_cases

POOLS = ("cls+mean", "cls", "mean")


class Probe:
    """Fields: ``data, labels, head, features`` (tensor [B, N, D] or [B, D]), ``pool``, ``leading``.

    ``pool`` is "cls+mean" (row 0 beside the mean of the patch rows), "cls" or "mean"; ``leading`` rows (1) are no
    patches. Where tokens were merged, ``<features>.size`` [B, N] or [B, N, 1] weighs the mean.
    """

    metric = "accuracy"

    def __init__(self, spec: EvalSpec) -> None:
        spec.only("labels", "head", "features", "pool", "leading", "metric")
        spec.choice("metric", ("accuracy", "top1"))
        self.features = spec.text("features")
        self.pool = spec.choice("pool", POOLS)
        self.leading = int(spec.number("leading", 1) or 0)
        self.limit = spec.limit
        self.tensors = (self.features,)
        head = open_npz(spec.path("head"))
        if not {"weight", "bias"} <= set(head) or head["weight"].ndim != 2:
            raise InputError("a head holds weight [classes, F] and bias [classes]", where=spec.text("head"))
        self.weight = head["weight"].astype(np.float64)
        self.bias = head["bias"].astype(np.float64)
        self.cases = load_cases(spec)
        self.labels = self.cases.need_labels(spec.where).astype(np.int64)

    def pooled(self, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Features of each sample, float64 [B, F]."""
        x = pick(outputs, self.features).astype(np.float64)
        if x.ndim == 2:
            return x
        if x.ndim != 3:
            raise InputError(f"{self.features!r} has {x.ndim} axes; a probe reads [B, N, D] or [B, D]")
        if self.pool == "cls":
            return x[:, 0]
        size = outputs.get(f"{self.features}.size")
        weight = np.ones(x.shape[:2]) if size is None else size.reshape(x.shape[:2]).astype(np.float64)
        weight = weight[:, self.leading :, None]
        mean = (x[:, self.leading :] * weight).sum(axis=1) / weight.sum(axis=1)
        return mean if self.pool == "mean" else np.concatenate([x[:, 0], mean], axis=1)

    def readout(self, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Logits [B, classes].

        Raises:
            InputError: the head is of another width.
        """
        features = self.pooled(outputs)
        if features.shape[1] != self.weight.shape[1]:
            raise InputError(f"the head takes {self.weight.shape[1]} features, {self.pool} gives {features.shape[1]}")
        return np.asarray(features @ self.weight.T + self.bias)

    def score(self, run: Run, on_step: Step | None = None) -> EvalResult:
        """Accuracy in points."""
        logits: list[Any] = run_cases(run, self.cases, lambda o: self.readout(o)[0], on_step)
        predictions = np.argmax(np.stack(logits), axis=1)
        return result(self.metric, predictions == self.labels, self.labels, predictions)


EVALUATOR = Probe
