"""What an evaluator is, how an ``--eval`` file becomes one, and how two results are compared pair by pair.

An eval file is YAML or JSON::

    kind: probe                # probe, pairs, classify, dense, or python:module:function
    data: test_batch.png       # paths are relative to this file
    labels: test_labels.json
    samples: 2000              # the first ones; all when left out
    limit: 0.5                 # largest accepted loss, points
    head: cifar10_probe.npz
    features: /backbone/layernorm/Add_1_output_0

Metrics are in points, 0 to 100, so that a loss of 0.5 means the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from edgetok.errors import ArtifactError, InputError
from edgetok.evaluators._metrics import auc, spearman
from edgetok.preprocess import InputSpec, Preprocess, load_preprocess

Run = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
Step = Callable[[int, int], None]
_MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class EvalResult:
    """One model's score.

    Args:
        metric: its name, as "accuracy".
        value: points, 0 to 100 (Spearman: -100 to 100).
        n: samples.
        per_sample: float64 [n]: 1 or 0 when right or wrong, a similarity, a cosine; None when the evaluator has none.
        labels: what the samples' truth is [n], for metrics that are no mean of ``per_sample``.
        predictions: the answer itself per sample, when there is one.
    """

    metric: str
    value: float
    n: int
    per_sample: np.ndarray | None = None
    labels: np.ndarray | None = None
    predictions: np.ndarray | None = None


@runtime_checkable
class Evaluator(Protocol):
    """Scores a model.

    Attributes:
        metric: name for reports.
        limit: largest accepted loss in points; None leaves it to the caller.
        tensors: graph outputs it reads; empty when any will do.
    """

    metric: str
    limit: float | None
    tensors: tuple[str, ...]

    def score(self, run: Run, on_step: Step | None = None) -> EvalResult:
        """Run all samples; ``on_step`` is told (done, total)."""
        ...


@dataclass(frozen=True)
class EvalSpec:
    """An eval file, read, and what the model needs.

    Args:
        values: its fields.
        folder: what relative paths start from.
        where: for messages.
        inputs: of the graph.
        preprocess: for images; the file's own wins.
        tokenizer: tokenizer.json, for text.
    """

    values: Mapping[str, Any]
    folder: Path
    where: str
    inputs: Sequence[InputSpec]
    preprocess: Preprocess | None = None
    tokenizer: bytes | None = None

    def text(self, name: str, default: str | None = None) -> str:
        """A string field.

        Raises:
            InputError: missing without default, or not a string.
        """
        value = self.values.get(name, default)
        if not isinstance(value, str) or not value:
            raise InputError(f"the eval file needs {name!r}, a string", where=self.where)
        return value

    def path(self, name: str) -> Path:
        """A file or folder named by a field; raises InputError when it is not there."""
        path = self.folder / self.text(name)
        if not path.exists():
            raise InputError(f"{name}: no such file or folder", where=str(path), next=f"fix {name!r} in {self.where}")
        return path

    def number(self, name: str, default: float | None, least: float = 0.0) -> float | None:
        """A finite number of at least ``least``, or the default."""
        value = self.values.get(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
            raise InputError(f"{name}={value!r}: a number of {least:g} or more", where=self.where)
        return float(value)

    def choice(self, name: str, known: Sequence[str]) -> str:
        """One of some words; the first when left out."""
        value = self.values.get(name, known[0])
        if value not in known:
            raise InputError(f"{name}={value!r}: choose one of {', '.join(known)}", where=self.where)
        return str(value)

    def only(self, *known: str) -> None:
        """Refuse fields nobody reads: a misspelt limit must not pass."""
        allowed = {*COMMON, *known}
        for name in self.values:
            if name not in allowed:
                raise InputError(
                    f"unknown field {name!r}", where=self.where, next=f"fields: {', '.join(sorted(allowed))}"
                )

    @property
    def limit(self) -> float | None:
        return self.number("limit", None)

    @property
    def samples(self) -> int | None:
        value = self.number("samples", None, 1)
        return None if value is None else int(value)


COMMON = ("kind", "data", "limit", "samples", "preprocess")


def load_evaluator(
    spec: str | Path | Mapping[str, Any] | Callable[..., Any],
    *,
    inputs: Sequence[InputSpec],
    preprocess: Preprocess | None = None,
    tokenizer: bytes | None = None,
) -> Evaluator:
    """Build an evaluator.

    Args:
        spec: an eval file, its fields, ``python:module:function``, or a function that scores a model.
        inputs: of the graph.
        preprocess: for images, unless the file has its own.
        tokenizer: tokenizer.json, for text.

    Raises:
        InputError: unknown kind or field, missing file; says which.
        ArtifactError: a data file is malformed.
    """
    from edgetok.evaluators import EVALUATORS

    where, folder = "eval", Path()
    if callable(spec):
        values: Mapping[str, Any] = {"kind": "python", "call": spec}
    elif isinstance(spec, Mapping):
        values = spec
    elif str(spec).startswith("python:"):
        values = {"kind": str(spec)}
    else:
        path = Path(spec)
        values, where, folder = _read(path), str(path), path.resolve().parent
    kind = values.get("kind")
    if not isinstance(kind, str):
        raise InputError("the eval file needs a kind", where=where, next=f"kinds: {', '.join(EVALUATORS.names())}")
    own = values.get("preprocess")
    if own is not None:
        named = folder / own if isinstance(own, str) and (folder / own).is_file() else own
        preprocess = load_preprocess(named)
    full = EvalSpec(values, folder, where, inputs, preprocess, tokenizer)
    build: Callable[[EvalSpec], Evaluator] = EVALUATORS.get(kind.partition(":")[0])
    return build(full)


def _read(path: Path) -> dict[str, Any]:
    from edgetok.manifest import load_yaml

    if not path.is_file():
        raise InputError("no such eval file", where=str(path), next="check the path given to --eval")
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise InputError(f"an eval file is at most {_MAX_FILE_BYTES} bytes", where=str(path))
    try:
        values = load_yaml(path.read_bytes(), where=str(path))
    except ArtifactError as exc:
        raise InputError(exc.message, where=str(path)) from exc
    if not isinstance(values, dict):
        raise InputError("expected a mapping of fields", where=str(path))
    return values


def pick(outputs: Mapping[str, np.ndarray], name: str | None) -> np.ndarray:
    """The output called ``name``, or the first floating-point one.

    Raises:
        InputError: there is no such output; says how to get it.
    """
    if name is None:
        for value in outputs.values():
            if np.issubdtype(value.dtype, np.floating):
                return value
        raise InputError("the model has no floating-point output", next=f"outputs: {', '.join(outputs)}")
    if name not in outputs:
        raise InputError(
            f"the evaluator reads {name!r}, which is no output; outputs: {', '.join(outputs)}",
            next=f"add --outputs {name} to cut the graph there",
        )
    return outputs[name]


# --- results ------------------------------------------------------------------------------------------------------


def _mean(values: np.ndarray, labels: np.ndarray | None) -> float:
    return float(values.mean())


_STATISTICS: dict[str, Callable[[np.ndarray, Any], float]] = {"auc": auc, "spearman": spearman}


def result(
    metric: str, per_sample: np.ndarray, labels: np.ndarray | None = None, predictions: np.ndarray | None = None
) -> EvalResult:
    """A result from per-sample values: the mean, AUC or Spearman of them, in points."""
    values = np.asarray(per_sample, np.float64)
    statistic = _STATISTICS.get(metric, _mean)
    return EvalResult(metric, 100 * statistic(values, labels), len(values), values, labels, predictions)


def paired_difference(
    a: EvalResult, b: EvalResult, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """By how many points ``b`` is above ``a`` on the same samples, with a paired bootstrap interval.

    Args:
        a, b: results of one evaluator on the same samples in the same order.
        level: of the interval.

    Returns:
        (b - a, low, high); the interval is NaN when there are no per-sample values.

    Raises:
        InputError: they are not of the same samples.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile interval).
    """
    if a.metric != b.metric or a.n != b.n:
        raise InputError(f"cannot pair {a.metric} of {a.n} samples with {b.metric} of {b.n}")
    difference = b.value - a.value
    if a.per_sample is None or b.per_sample is None:
        return difference, math.nan, math.nan
    rng = np.random.default_rng(seed)
    statistic = _STATISTICS.get(a.metric)
    if statistic is None:
        delta = b.per_sample - a.per_sample
        found = np.array([delta[rng.integers(0, a.n, a.n)].mean() for _ in range(draws)])
    else:
        found = np.empty(draws)
        for i in range(draws):
            rows = rng.integers(0, a.n, a.n)
            truth = None if a.labels is None else a.labels[rows]
            found[i] = statistic(b.per_sample[rows], truth) - statistic(a.per_sample[rows], truth)
        found = found[np.isfinite(found)]  # a draw without one of the classes has no AUC
    tail = (1 - level) / 2
    low, high = (np.quantile(found, tail), np.quantile(found, 1 - tail)) if len(found) else (math.nan, math.nan)
    return difference, 100 * float(low), 100 * float(high)


def mcnemar(a: EvalResult, b: EvalResult) -> float:
    """Exact two-sided McNemar test: the chance of so unequal a split of the samples only one of them got right.

    Raises:
        InputError: not right-or-wrong results of the same samples.
    """
    if a.per_sample is None or b.per_sample is None or a.n != b.n:
        raise InputError("McNemar's test needs right-or-wrong results of the same samples")
    only_a = int(((a.per_sample == 1) & (b.per_sample == 0)).sum())
    only_b = int(((a.per_sample == 0) & (b.per_sample == 1)).sum())
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


@dataclass(frozen=True, eq=False)
class Cases:
    """What an evaluator runs: feeds made one at a time, and their labels [n] (None when there are none)."""

    count: int
    feed: Callable[[int], Mapping[str, np.ndarray]]
    labels: np.ndarray | None = None
    names: Sequence[str] = field(default_factory=tuple)

    def need_labels(self, where: str) -> np.ndarray:
        """The labels; raises InputError when there are none."""
        if self.labels is None:
            raise InputError("this kind needs labels", where=where, next="add labels: FILE to the eval file")
        return self.labels


def run_cases(
    run: Run, cases: Cases, read: Callable[[Mapping[str, np.ndarray]], Any], on_step: Step | None
) -> list[Any]:
    """``read`` of the outputs of every case, in order."""
    found = []
    for i in range(cases.count):
        found.append(read(run(cases.feed(i))))
        if on_step:
            on_step(i + 1, cases.count)
    return found


__all__ = [
    "Cases",
    "EvalResult",
    "EvalSpec",
    "Evaluator",
    "load_evaluator",
    "mcnemar",
    "paired_difference",
    "pick",
    "result",
    "run_cases",
]
