"""What really changed between two artifacts, two models, or two recorded benches.

Models are timed interleaved on the same inputs, with a bootstrap interval of the change; recorded benches are compared
from their samples. A line says "real" when the interval excludes no change, else "within noise". Models with the
same inputs are also compared in what they answer: speed without accuracy beside it means nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgetok.benching import bind_call, golden_inputs, target_feeds, warm_up
from edgetok.errors import ArtifactError, InputError
from edgetok.fresh import child_cost
from edgetok.gates import agreement
from edgetok.machine import conditions
from edgetok.measuring import Timing, interleave
from edgetok.peers import Engine, open_session
from edgetok.progress import NullProgress, Progress

_PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0}
_RULE = re.compile(r"^(?P<metric>[a-z0-9_-]+)\s*(?P<sign>[<>])\s*(?P<value>[+-]?\d+(?:\.\d+)?)\s*(?P<unit>%?)$")
_MAX_JSON = 64 << 20


@dataclass(frozen=True)
class Line:
    """One compared quantity.

    Args:
        row: the bench row, as "single-stream".
        metric: "p50", "p90", "p99" (ms), "memory" (bytes), "size" (bytes), "cosine".
        a, b: the two values; None where not measurable.
        unit: "ms", "B", or "".
        change: b / a - 1; None for "cosine".
        ci95: of ``change``.
        verdict: "real", "within noise", "exact" (not a timing), or "unknown".
    """

    row: str
    metric: str
    a: float | None
    b: float | None
    unit: str
    change: float | None = None
    ci95: tuple[float, float] | None = None
    verdict: str = "exact"

    def to_json(self) -> dict[str, Any]:
        return {
            "row": self.row,
            "metric": self.metric,
            "a": self.a,
            "b": self.b,
            "unit": self.unit,
            "change": self.change,
            "ci95": None if self.ci95 is None else list(self.ci95),
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Comparison:
    """All lines, in reading order, and the conditions."""

    a: str
    b: str
    lines: tuple[Line, ...]
    conditions: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "a": self.a,
            "b": self.b,
            "lines": [line.to_json() for line in self.lines],
            "conditions": dict(self.conditions),
            "notes": list(self.notes),
        }

    def cells(self) -> list[tuple[str, str, str, str, str, str]]:
        """The lines for people: row, metric, a, b, change, verdict."""
        return [(x.row, x.metric, _show(x.a, x.unit), _show(x.b, x.unit), _change(x), x.verdict) for x in self.lines]

    def to_markdown(self) -> str:
        """A table to paste into a review."""
        head = f"| row | metric | {self.a} | {self.b} | change (95 % CI) | verdict |\n|---|---|---:|---:|---:|---|\n"
        return head + "\n".join("| " + " | ".join(c) + " |" for c in self.cells()) + "\n"


@dataclass(frozen=True)
class Rule:
    """``p50>+5%``: fail when the change of a metric is above (or below) a bound.

    Args:
        metric: as in ``Line``.
        above: True for ``>``.
        value: a fraction for a change in percent, else the bound of ``b`` itself.
        relative: whether ``value`` is a change.
        text: as given.
    """

    metric: str
    above: bool
    value: float
    relative: bool
    text: str


def parse_rule(text: str) -> Rule:
    """Read one ``--fail-on``.

    Raises:
        InputError: not METRIC>VALUE or METRIC<VALUE, or an unknown metric.
    """
    found = _RULE.match(text.strip())
    known = (*_PERCENTILES, "memory", "size", "cosine")
    if found is None or found["metric"].replace("-", "_") not in known:
        raise InputError(
            f"--fail-on {text!r} is not METRIC>VALUE; metrics: {', '.join(known)}", next="--fail-on 'p50>+5%'"
        )
    relative = found["unit"] == "%"
    if relative and found["metric"] == "cosine":
        raise InputError("--fail-on cosine takes a plain number", next="--fail-on 'cosine<0.99'")
    value = float(found["value"]) / (100 if relative else 1)
    return Rule(found["metric"], found["sign"] == ">", value, relative, text.strip())


def broken(comparison: Comparison, rules: Sequence[Rule]) -> list[str]:
    """Sentences about the rules that are broken. A change within the noise breaks no rule.

    Raises:
        InputError: a rule names a metric that was not measured.
    """
    sentences = []
    for rule in rules:
        lines = [x for x in comparison.lines if x.metric == rule.metric]
        measured = [x for x in lines if (x.change if rule.relative else x.b) is not None]
        if not measured:
            raise InputError(f"--fail-on {rule.text!r}: {rule.metric} was not measured here")
        for line in measured:
            value = line.change if rule.relative else line.b
            if value is None or line.verdict == "within noise":
                continue
            inside = value <= rule.value if rule.above else value >= rule.value  # NaN is outside
            if not inside:
                sentences.append(
                    f"{line.row} {line.metric} {_show(line.a, line.unit)} -> {_show(line.b, line.unit)} "
                    f"({_change(line)}) breaks {rule.text}"
                )
    return sentences


def compare(
    a: Path | str,
    b: Path | str,
    *,
    device: str = "auto",
    threads: int = 0,
    rounds: int = 50,
    max_seconds: float = 30.0,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    seed: int = 0,
    memory: bool = True,
    progress: Progress | None = None,
) -> Comparison:
    """Compare ``b`` with the baseline ``a``: both models or artifacts, or both bench JSON files.

    Raises:
        InputError: they cannot be compared (different kinds, inputs or conditions).
        ArtifactError: a bench file is corrupt.
    """
    a, b = Path(a), Path(b)
    kinds = {p.suffix == ".json" and p.is_file() for p in (a, b)}
    if kinds == {True}:
        return _compare_records(a, b, seed)
    if len(kinds) == 2:
        raise InputError("one is a bench record and one is a model", next="edgetok bench MODEL --json > b.json first")
    from edgetok.runtime.opening import as_onnx

    with as_onnx(a) as first, as_onnx(b) as second:
        found = _compare_models(
            first, second, device, threads, rounds, max_seconds, shapes or {}, seed, memory, progress or NullProgress()
        )
    return replace(found, a=str(a), b=str(b))


def _compare_models(
    a: Path,
    b: Path,
    device: str,
    threads: int,
    rounds: int,
    max_seconds: float,
    shapes: Mapping[str, tuple[int, ...]],
    seed: int,
    memory: bool,
    progress: Progress,
) -> Comparison:
    from edgetok.devices._host import thread_count

    threads = thread_count(threads)
    engines: list[Engine] = []
    try:
        for path in (a, b):
            engines.append(open_session(path, device, threads))
        inputs = [{s.name: s for s in e.inputs} for e in engines]
        if set(inputs[0]) != set(inputs[1]):
            raise InputError(
                f"they take different inputs: {', '.join(sorted(inputs[0]))} and {', '.join(sorted(inputs[1]))}",
                next="compare two conversions of one source",
            )
        # The artifact's golden inputs are real ones: prefer whichever side has them.
        feeds = _shared_feeds((b, a), list(reversed(engines)), shapes, seed)
        outputs = [e.call(feeds) for e in engines]
        calls = {name: bind_call(e, feeds) for name, e in zip("ab", engines, strict=True)}
        progress.start("compare", rounds)
        for call in calls.values():
            warm_up(call, max_seconds=max_seconds / 4)
        timed = interleave(
            calls,
            rounds=rounds,
            warmup=1,
            settle=1,
            max_seconds=max_seconds,
            on_round=lambda done, total: progress.advance(to=done, total=total),
        )
        progress.done()
        costs = [
            child_cost(e.name, p, e.device, threads, feeds) if memory else (None, None)
            for e, p in zip(engines, (a, b), strict=True)
        ]
    finally:
        for engine in engines:
            engine.close()
    lines = _timing_lines("single-stream", timed["a"], timed["b"], paired=True, seed=seed)
    peaks = [c[0] for c in costs]
    lines.append(_exact("single-stream", "memory", peaks[0], peaks[1], "B"))
    lines.append(_exact("single-stream", "size", size_bytes(a), size_bytes(b), "B"))
    notes, agreeing = _answers(outputs[0], outputs[1])
    return Comparison(str(a), str(b), tuple(lines + agreeing), conditions(threads), tuple(notes))


def _shared_feeds(
    paths: Sequence[Path], engines: Sequence[Engine], shapes: Mapping[str, tuple[int, ...]], seed: int
) -> dict[str, np.ndarray]:
    """Inputs both sides take: golden ones of either side, else random; open axes of one may be fixed by the other."""
    fixed = dict(shapes)
    for spec in engines[0].inputs:
        other = next(s for s in engines[1].inputs if s.name == spec.name)
        if spec.shape and other.shape and len(spec.shape) == len(other.shape) and spec.name not in fixed:
            merged = [x if isinstance(x, int) else y for x, y in zip(spec.shape, other.shape, strict=True)]
            merged[0] = merged[0] if isinstance(merged[0], int) else 1
            if all(isinstance(m, int) for m in merged):
                fixed[spec.name] = tuple(int(m) for m in merged if isinstance(m, int))
    for path, engine in zip(paths, engines, strict=True):
        if golden_inputs(path) and not shapes:
            return target_feeds(path, engine.inputs, batch=1, seed=seed)
    return target_feeds(paths[0], engines[0].inputs, batch=1, shapes=fixed, seed=seed)


def _answers(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> tuple[list[str], list[Line]]:
    shared = [n for n in a if n in b and a[n].shape == b[n].shape]
    notes = [f"output {n!r} is in only one of them, or has another shape" for n in {*a, *b} if n not in shared]
    found = agreement([{n: a[n] for n in shared}], [{n: b[n] for n in shared}]) if shared else []
    return sorted(notes), [Line(x.name, "cosine", 1.0, x.cosine, "") for x in found]


def _timing_lines(row: str, a: Timing, b: Timing, *, paired: bool, seed: int) -> list[Line]:
    rng = np.random.default_rng(seed)
    xs, ys = np.asarray(a.samples_ms), np.asarray(b.samples_ms)
    i = rng.integers(0, len(xs), (2000, len(xs)))
    j = i if paired else rng.integers(0, len(ys), (2000, len(ys)))
    lines = []
    for metric, q in _PERCENTILES.items():
        before, after = float(np.percentile(xs, q)), float(np.percentile(ys, q))
        draws = np.percentile(ys[j], q, axis=1) / np.percentile(xs[i], q, axis=1) - 1
        low, high = (float(v) for v in np.quantile(draws, [0.025, 0.975]))
        verdict = "real" if low > 0 or high < 0 else "within noise"
        lines.append(Line(row, metric, before, after, "ms", after / before - 1, (low, high), verdict))
    return lines


def _exact(row: str, metric: str, a: float | None, b: float | None, unit: str) -> Line:
    known = a is not None and b is not None and a > 0
    change = b / a - 1 if known and a and b is not None else None
    return Line(row, metric, a, b, unit, change, None, "exact" if known else "unknown")


def size_bytes(path: Path) -> int | None:
    """Bytes on disk of a model with its external data, or of an artifact."""
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    if path.suffix == ".onnx":
        import onnx

        try:
            model = onnx.load(str(path), load_external_data=False)
        except Exception:  # the size is a side line; loading it for real has already been checked
            return path.stat().st_size
        names = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
        return path.stat().st_size + sum((path.parent / n).stat().st_size for n in names if (path.parent / n).is_file())
    return path.stat().st_size


# ---- recorded benches


def read_record(path: Path) -> dict[str, Any]:
    """A file written by ``bench --json``.

    Raises:
        ArtifactError: not JSON, or not of that form.
    """
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ArtifactError("a bench record of more than 64 MB", where=str(path))
        record = json.loads(path.read_text("utf-8"))
        for row in record["rows"]:
            str(row["name"]), str(row["engine"]), float(row["p50_ms"])
            if not all(isinstance(s, int | float) and s > 0 for s in row["samples_ms"]) or not row["samples_ms"]:
                raise ValueError("samples_ms must hold positive numbers")
        dict(record["conditions"])
    except (ValueError, KeyError, TypeError, UnicodeDecodeError, RecursionError) as exc:
        raise ArtifactError(
            f"not a bench record: {type(exc).__name__}: {exc}",
            where=str(path),
            next="edgetok bench MODEL --json > FILE",
        ) from exc
    return dict(record)


def _compare_records(a: Path, b: Path, seed: int) -> Comparison:
    before, after = read_record(a), read_record(b)
    notes = []
    for key in ("cpu", "isa", "threads"):
        x, y = before["conditions"].get(key), after["conditions"].get(key)
        if x != y:
            raise InputError(
                f"they were measured under different conditions: {key} {x!r} and {y!r}", next="bench again"
            )
    x, y = before["conditions"].get("versions"), after["conditions"].get("versions")
    if x != y:
        notes.append(f"library versions differ: {x} and {y}")
    theirs = {(r["name"], r["engine"], r.get("device")): r for r in after["rows"]}
    lines: list[Line] = []
    for row in before["rows"]:
        other = theirs.get((row["name"], row["engine"], row.get("device")))
        if other is None:
            notes.append(f"{row['name']} of {row['engine']} is in only one of them")
            continue
        name = f"{row['name']} {row['engine']}" if len({r["engine"] for r in before["rows"]}) > 1 else row["name"]
        pair = (Timing(tuple(map(float, row["samples_ms"]))), Timing(tuple(map(float, other["samples_ms"]))))
        lines += _timing_lines(name, *pair, paired=False, seed=seed)
        if row.get("peak_rss_bytes") and other.get("peak_rss_bytes"):
            lines.append(_exact(name, "memory", row["peak_rss_bytes"], other["peak_rss_bytes"], "B"))
    if not lines:
        raise InputError("the two records have no row in common", next="bench both with the same --rows")
    notes.append("measured in two runs: drift of the machine between them is not in the interval")
    return Comparison(str(a), str(b), tuple(lines), after["conditions"], tuple(notes))


def _show(value: float | None, unit: str) -> str:
    if value is None:
        return "not measurable here"
    if unit == "ms":
        return f"{value:.2f} ms" if value >= 1 else f"{value:.3f} ms"
    return f"{value / 1e6:.1f} MB" if unit == "B" else f"{value:.5f}"


def _change(line: Line) -> str:
    if line.change is None:
        return ""
    ci = f" ({100 * line.ci95[0]:+.1f} to {100 * line.ci95[1]:+.1f} %)" if line.ci95 else ""
    return f"{100 * line.change:+.1f} %{ci}"
