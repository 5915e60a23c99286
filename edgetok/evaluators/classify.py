"""Accuracy of a model that already is a classifier: the largest logit against the label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgetok.errors import InputError
from edgetok.evaluators._data import load_cases
from edgetok.evaluators.base import EvalResult, EvalSpec, Run, Step, pick, result, run_cases


class Classify:
    """Fields: ``data, labels, output`` (logits [B, classes]; ``logits`` or the only float output when left out)."""

    metric = "accuracy"

    def __init__(self, spec: EvalSpec) -> None:
        spec.only("labels", "output", "metric")
        spec.choice("metric", ("accuracy", "top1"))
        self.output = spec.text("output") if "output" in spec.values else None
        self.tensors = (self.output,) if self.output else ()
        self.limit = spec.limit
        self.cases = load_cases(spec)
        self.labels = self.cases.need_labels(spec.where).astype(np.int64)

    def readout(self, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Logits [B, classes]."""
        name = self.output or ("logits" if "logits" in outputs else None)
        logits = pick(outputs, name)
        if logits.ndim != 2:
            raise InputError(f"logits must be [B, classes], not {list(logits.shape)}", next="name them with output:")
        return logits

    def score(self, run: Run, on_step: Step | None = None) -> EvalResult:
        """Accuracy in points."""
        logits: list[Any] = run_cases(run, self.cases, lambda o: self.readout(o)[0], on_step)
        predictions = np.argmax(np.stack(logits), axis=1)
        return result(self.metric, predictions == self.labels, self.labels, predictions)


EVALUATOR = Classify
