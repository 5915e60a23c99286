"""Similarity of sentence embeddings against human labels: AUC for yes-or-no labels, Spearman for graded ones."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgetok.errors import InputError
from edgetok.evaluators._data import TextFeeder, labels_of, pair_columns, read_rows
from edgetok.evaluators.base import EvalResult, EvalSpec, Run, Step, pick, result


class Pairs:
    """Fields: ``data`` (.tsv or .jsonl: two texts and ``label``), ``metric`` (auc, spearman), ``features``, ``pool``.

    ``features`` is the embedding [B, D], or hidden states [B, N, D] with ``pool`` "mean" (over the mask) or "cls".
    """

    def __init__(self, spec: EvalSpec) -> None:
        spec.only("labels", "metric", "features", "pool")
        self.metric = spec.choice("metric", ("auc", "spearman"))
        self.pool = spec.choice("pool", ("mean", "cls"))
        self.features = spec.text("features") if "features" in spec.values else None
        self.tensors = (self.features,) if self.features else ()
        self.limit = spec.limit
        path = spec.path("data")
        if path.suffix not in (".tsv", ".jsonl"):
            raise InputError("pairs come from a .tsv or .jsonl file", where=str(path))
        rows = read_rows(path)[: spec.samples]
        first, second = pair_columns(rows, path)
        self.pairs = [(str(r[first]), str(r[second])) for r in rows]
        self.labels = labels_of(rows, path)
        self._text = TextFeeder(spec)
        if self.metric == "auc" and not 0 < (self.labels > 0).sum() < len(self.labels):
            raise InputError("AUC needs labels of both kinds, 0 and 1", where=str(path), next="or use metric: spearman")

    def readout(self, outputs: Mapping[str, np.ndarray], mask: np.ndarray | None = None) -> np.ndarray:
        """Embeddings of unit length, float64 [B, D]."""
        name = self.features or ("sentence_embedding" if "sentence_embedding" in outputs else None)
        x = pick(outputs, name).astype(np.float64)
        if x.ndim == 3 and self.pool == "cls":
            x = x[:, 0]
        elif x.ndim == 3:
            keep = np.ones(x.shape[:2]) if mask is None else mask[:, : x.shape[1]].astype(np.float64)
            x = (x * keep[..., None]).sum(axis=1) / keep.sum(axis=1, keepdims=True)
        return np.asarray(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12))

    def score(self, run: Run, on_step: Step | None = None) -> EvalResult:
        """AUC or Spearman in points; equal texts are run once."""
        texts = list(dict.fromkeys(t for pair in self.pairs for t in pair))
        found = {}
        for i, text in enumerate(texts):
            feeds = self._text.feed(text)
            mask = next((v for n, v in feeds.items() if "mask" in n.lower()), None)
            found[text] = self.readout(run(feeds), mask)[0]
            if on_step:
                on_step(i + 1, len(texts))
        similarity = np.array([float(found[a] @ found[b]) for a, b in self.pairs])
        return result(self.metric, similarity, self.labels)


EVALUATOR = Pairs
