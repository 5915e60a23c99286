"""The publishable number: single-stream latency and batch throughput, peers interleaved, conditions recorded.

What is timed is one call from arrays to arrays; reading files, tokenizing and image decoding are excluded. All
engines of a row get the same inputs and are timed in turn (``edgetok.measuring``), after each has warmed up until
its time no longer changes. Peak memory and load time come from a fresh process per engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgetok import feeds as feeds_
from edgetok.errors import InputError
from edgetok.fresh import child_cost
from edgetok.gates import agreement
from edgetok.machine import conditions
from edgetok.measuring import Ratio, Timing, bootstrap_ci, interleave, ratio
from edgetok.peers import PEERS, Engine, open_peer, open_session
from edgetok.progress import NullProgress, Progress

ROWS = {"single-stream": 1, "batch8": 8}
STEADY = 0.03  # medians of two successive windows closer than this: warm
_WINDOW = 5


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Args:
        target: an artifact, an ONNX file or a Hugging Face folder.
        source: the source model, an ONNX file or a Hugging Face folder, for the peers and for agreement.
        rows: names from ``ROWS``.
        peers: names from ``edgetok.peers.PEERS``, run on ``source`` (or on ``target`` when it is no artifact).
        device, threads: for the target; peers get the same number of threads.
        rounds: samples per engine and row.
        max_seconds: stop a row early after this long.
        shapes: name to shape for open axes.
        seed: of random inputs.
        memory: measure peak memory and load time in a fresh process per engine.
        allow_native_code: load libraries packed in the artifact.
    """

    target: Path
    source: Path | None = None
    rows: tuple[str, ...] = ("single-stream", "batch8")
    peers: tuple[str, ...] = ()
    device: str = "auto"
    threads: int = 0
    rounds: int = 50
    max_seconds: float = 30.0
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    seed: int = 0
    memory: bool = True
    allow_native_code: bool = False

    def __post_init__(self) -> None:
        for row in self.rows:
            if row not in ROWS:
                raise InputError(f"unknown row {row!r}", next=f"--rows {','.join(ROWS)}")
        for peer in self.peers:
            if peer not in PEERS:
                raise InputError(f"unknown peer {peer!r}", next=f"choose one of: {', '.join(PEERS)}")
        if not (self.rows and self.rounds >= 5 and self.max_seconds > 0):
            raise InputError("a bench needs a row, at least 5 rounds and some seconds")


@dataclass(frozen=True)
class Row:
    """One engine in one row; times in milliseconds per call, ``value`` in ``unit``."""

    name: str
    engine: str
    device: str
    threads: int
    batch: int
    value: float
    unit: str
    timing: Timing
    ci95: tuple[float, float]
    warmup: int
    steady: bool
    note: str = ""
    peak_rss_bytes: int | None = None
    load_ms: float | None = None
    speedup: Ratio | None = None
    cosine: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The row of the bench contract; fields may be added, never renamed."""
        t = self.timing
        return {
            "name": self.name,
            "engine": self.engine,
            "device": self.device,
            "threads": self.threads,
            "batch": self.batch,
            "value": self.value,
            "unit": self.unit,
            "p50_ms": t.p50_ms,
            "p90_ms": t.p90_ms,
            "p99_ms": t.p99_ms,
            "n": len(t.samples_ms),
            "ci95": list(self.ci95),
            "peak_rss_bytes": self.peak_rss_bytes,
            "load_ms": self.load_ms,
            "speedup": None
            if self.speedup is None
            else {"value": self.speedup.value, "ci95": [self.speedup.low, self.speedup.high]},
            "cosine": self.cosine,
            "warmup": self.warmup,
            "steady": self.steady,
            "note": self.note,
            "samples_ms": [round(s, 4) for s in t.samples_ms],
        }


@dataclass(frozen=True)
class BenchReport:
    """All rows of one run, and the conditions they were measured under."""

    conditions: Mapping[str, Any]
    rows: tuple[Row, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "conditions": dict(self.conditions),
            "rows": [r.to_json() for r in self.rows],
            "skipped": [{"name": n, "reason": r} for n, r in self.skipped],
        }


def warm_up(call: Callable[[], object], *, max_seconds: float = 5.0) -> tuple[int, bool]:
    """Call until the median of five calls is within 3 % of the median of the five before.

    Returns:
        Calls made, and whether the time became steady.
    """
    times: list[float] = []
    start = time.perf_counter()
    while True:
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
        if len(times) >= 2 * _WINDOW:
            old, new = np.median(times[-2 * _WINDOW : -_WINDOW]), np.median(times[-_WINDOW:])
            if abs(new - old) <= STEADY * old:
                return len(times), True
        if time.perf_counter() - start > max_seconds and len(times) >= 3:
            return len(times), False


def target_feeds(
    path: Path,
    inputs: Sequence[feeds_.Spec],
    *,
    batch: int,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    seed: int = 0,
    golden: bool = True,
) -> dict[str, np.ndarray]:
    """Inputs for one call: an artifact's golden inputs repeated to ``batch``, else random ones.

    Raises:
        InputError: an open axis needs ``--shape``.
    """
    real = golden_inputs(path) if golden and not shapes else {}
    if real and set(real) == {s.name for s in inputs}:
        found = {n: np.resize(a, (batch, *a.shape[1:])) if a.ndim else a for n, a in real.items()}
        if all(_fits(s, found[s.name]) for s in inputs):
            return found
    return feeds_.random_feeds(inputs, batch=batch, shapes=shapes, seed=seed)


def _fits(spec: feeds_.Spec, array: np.ndarray) -> bool:
    if spec.shape is None:
        return True
    return array.ndim == len(spec.shape) and all(
        not isinstance(want, int) or want == have for want, have in zip(spec.shape, array.shape, strict=True)
    )


def is_artifact(path: Path) -> bool:
    """Whether a path is an artifact, by its form alone."""
    from edgetok.artifact import SUFFIX
    from edgetok.manifest import MANIFEST_NAME

    return (path / MANIFEST_NAME).is_file() if path.is_dir() else path.suffix == SUFFIX


def golden_inputs(path: Path) -> dict[str, np.ndarray]:
    """The first golden inputs an artifact carries; empty when it is no artifact or has none."""
    from edgetok.artifact import Artifact

    if not is_artifact(path):
        return {}
    with Artifact.open(path) as artifact:
        cases = artifact.golden()
    return dict(cases[0].inputs) if cases else {}


def run_bench(options: BenchOptions, progress: Progress | None = None) -> BenchReport:
    """Measure every row.

    Raises:
        InputError: peers without a source model to run.
        EdgeTokError: the target or a peer cannot be loaded.
    """
    from edgetok.runtime.opening import as_onnx

    _check_source(options)
    with as_onnx(options.target) as target, as_onnx(options.source or target) as source:
        return _run(replace(options, target=target), source, progress or NullProgress())


def _run(options: BenchOptions, source: Path, progress: Progress) -> BenchReport:
    from edgetok.devices._host import thread_count

    threads = thread_count(options.threads)
    load_before = conditions(threads)
    engines = [open_session(options.target, options.device, threads, native=options.allow_native_code)]
    try:
        for name in options.peers:
            engines.append(open_peer(name, source, threads))
        rows: list[Row] = []
        skipped: list[tuple[str, str]] = []
        for row in options.rows:
            reason = _cannot(engines, ROWS[row])
            if reason:
                skipped.append((row, reason))
                continue
            rows += _measure(row, engines, options, source, threads, progress)
    finally:
        for engine in engines:
            engine.close()
    return BenchReport(load_before, tuple(rows), tuple(skipped))


def _check_source(options: BenchOptions) -> None:
    """Peers run the source, which an artifact does not hold."""
    if options.source is not None and is_artifact(options.source):
        raise InputError("--source names an artifact", where=str(options.source), next="give its source model")
    if options.source is None and options.peers and is_artifact(options.target):
        raise InputError("a peer runs the source model, and none was given", next="add --source model.onnx")


def _cannot(engines: Sequence[Engine], batch: int) -> str:
    for engine in engines:
        if batch > 1 and not feeds_.can_batch(engine.inputs, batch):
            return f"{engine.name}: the model's batch axis is fixed"
    return ""


def _measure(
    name: str, engines: Sequence[Engine], options: BenchOptions, source: Path, threads: int, progress: Progress
) -> list[Row]:
    batch = ROWS[name]
    feeds = target_feeds(options.target, engines[0].inputs, batch=batch, shapes=options.shapes, seed=options.seed)
    calls: dict[str, Callable[[], object]] = {}
    warm: dict[str, tuple[int, bool]] = {}
    outputs: dict[str, dict[str, np.ndarray]] = {}
    progress.start(name, options.rounds)
    for engine in engines:
        _same_inputs(engine, feeds)
        engine.prepare(feeds)
        outputs[engine.name] = engine.call(feeds)
        calls[engine.name] = bind_call(engine, feeds)
        warm[engine.name] = warm_up(calls[engine.name], max_seconds=options.max_seconds / 4)
    timings = interleave(
        calls,
        rounds=options.rounds,
        warmup=1,
        settle=1,
        max_seconds=options.max_seconds,
        on_round=lambda done, total: progress.advance(to=done, total=total),
    )
    progress.done()
    rows = []
    for engine in engines:
        timing = timings[engine.name]
        ours = engine is engines[0]
        memory, load_ms = (
            child_cost(
                engine.name,
                options.target if ours else source,
                engine.device,
                threads,
                feeds,
                native=options.allow_native_code,
            )
            if options.memory
            else (None, None)
        )
        low, high = bootstrap_ci(np.asarray(timing.samples_ms))
        per_second = 1000 * batch / timing.p50_ms
        single = batch == 1
        rows.append(
            Row(
                name,
                engine.name,
                engine.device,
                threads,
                batch,
                timing.p50_ms if single else per_second,
                "ms" if single else "samples/s",
                timing,
                (low, high) if single else (1000 * batch / high, 1000 * batch / low),
                *warm[engine.name],
                note=" ".join(filter(None, (engine.version, engine.note))),
                peak_rss_bytes=memory,
                load_ms=load_ms,
                speedup=None if ours else ratio(timing, timings[engines[0].name]),
                cosine=None if ours else _cosine(outputs[engine.name], outputs[engines[0].name]),
            )
        )
    return rows


def bind_call(engine: Engine, feeds: Mapping[str, np.ndarray]) -> Callable[[], object]:
    return lambda: engine.call(feeds)


def _same_inputs(engine: Engine, feeds: Mapping[str, np.ndarray]) -> None:
    names = {s.name for s in engine.inputs}
    if names != set(feeds):
        raise InputError(
            f"{engine.name} takes inputs {', '.join(sorted(names))}; the target takes {', '.join(sorted(feeds))}",
            next="give the source the artifact was made from",
        )


def _cosine(theirs: Mapping[str, np.ndarray], ours: Mapping[str, np.ndarray]) -> float | None:
    """Smallest cosine over the shared outputs; None when none is shared in name and shape."""
    shared = {n: a for n, a in theirs.items() if n in ours and ours[n].shape == a.shape}
    found = agreement([shared], [{n: ours[n] for n in shared}]) if shared else []
    return min((a.cosine for a in found), default=None)
