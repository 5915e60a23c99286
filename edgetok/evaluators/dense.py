"""Agreement of maps (saliency, depth, segmentation logits) with the truth: the mean cosine per sample.

Where no truth is given, the first model scored is the truth: in ``convert`` and ``compare`` that is the source.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgetok.errors import InputError
from edgetok.evaluators._data import load_cases, open_npz
from edgetok.evaluators.base import EvalResult, EvalSpec, Run, Step, pick, result, run_cases


class Dense:
    """Fields: ``data, output`` (the map; the first float output when left out), ``labels`` (.npz of maps [n, ...])."""

    metric = "cosine"

    def __init__(self, spec: EvalSpec) -> None:
        spec.only("labels", "output", "features", "metric")
        spec.choice("metric", ("cosine",))
        key = "output" if "output" in spec.values else "features"
        self.output = spec.text(key) if key in spec.values else None
        self.tensors = (self.output,) if self.output else ()
        self.limit = spec.limit
        self.cases = load_cases(spec)
        self.truth = self._labels(spec) if "labels" in spec.values else None

    def _labels(self, spec: EvalSpec) -> np.ndarray:
        arrays = open_npz(spec.path("labels"))
        name = self.output if self.output in arrays else next(iter(arrays), None)
        if name is None or len(arrays[name]) < self.cases.count:
            raise InputError(f"expected {self.cases.count} maps", where=spec.text("labels"))
        maps = arrays[name][: self.cases.count]
        return np.asarray(maps.reshape(len(maps), -1), np.float32)

    def readout(self, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """The map of each sample, flattened [B, P]."""
        found = pick(outputs, self.output)
        return found.reshape(len(found), -1)

    def score(self, run: Run, on_step: Step | None = None) -> EvalResult:
        """Mean cosine in points (100 = identical up to scale).

        Raises:
            InputError: a map has another size than the truth.
        """
        maps = np.stack(run_cases(run, self.cases, lambda o: self.readout(o)[0].astype(np.float32), on_step))
        if self.truth is None:
            self.truth = maps
        if maps.shape != self.truth.shape:
            raise InputError(f"a map of {maps.shape[1]} values against a truth of {self.truth.shape[1]}")
        found = np.array([_cosine(a, b) for a, b in zip(maps, self.truth, strict=True)])
        return result(self.metric, found)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    x, y = a.astype(np.float64), b.astype(np.float64)
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norm if norm else float(not x.any() and not y.any())


EVALUATOR = Dense
