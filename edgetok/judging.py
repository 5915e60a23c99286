"""The gates of one conversion, run on the stages it left: answers, a user's metric, speed, memory, size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np

from edgetok.devices._host import thread_count
from edgetok.devices.base import Executable
from edgetok.errors import BudgetError, EdgeTokError, GateError
from edgetok.fresh import child_cost
from edgetok.gates import (
    Agreement,
    Check,
    agreement,
    aligned,
    check_agreement,
    check_drop,
    check_memory,
    check_size,
    check_speed,
    check_worth,
)
from edgetok.measuring import Ratio, Timing, interleave, ratio
from edgetok.registry import canonical
from edgetok.sampling import fixed_batch
from edgetok.searching import WORTH
from edgetok.stages import Feeds, Outputs, compile_stage, input_specs, run_samples

if TYPE_CHECKING:
    from edgetok.conversion import Conversion
    from edgetok.evaluators.base import EvalResult

WORST_LAYERS = 3
GOLDEN = 2  # runs of the source stored in the artifact
STAGES = ("source", "clean", "reduced", "final")


@dataclass
class Verdict:
    """Everything measured about the result.

    Args:
        found: agreement per output, on held-out samples.
        golden: (feeds, source outputs) to store.
        accuracy: of ``--eval``, or None: (source result, artifact result, difference, low, high).
        times: per stage, interleaved.
        speedup: source over final.
        gains: "graph", "tokens", "bits".
        rss_bytes: peak of a run less an empty interpreter.
    """

    found: list[Agreement] = field(default_factory=list)
    golden: Sequence[tuple[Mapping[str, np.ndarray], Outputs]] = field(default_factory=list)
    accuracy: tuple[EvalResult, EvalResult, float, float, float] | None = None
    times: dict[str, Timing] = field(default_factory=dict)
    speedup: Ratio | None = None
    gains: dict[str, float] = field(default_factory=dict)
    rss_bytes: int | None = None


def interval(low: float, high: float) -> list[float] | None:
    """The ends, or None where there is none."""
    return [low, high] if isfinite(low) and isfinite(high) else None


class Judge:
    """Runs the gates of a conversion."""

    def __init__(self, conversion: Conversion) -> None:
        self.c = conversion
        self.options = conversion.options
        self.verdict = Verdict()

    def judge(self) -> Verdict:
        """Measure everything, report each line, then refuse if a gate failed.

        Raises:
            GateError: answers differ too much.
            BudgetError: not faster, too large, or too much memory.
        """
        checks: list[Check] = []
        source, final = self.open("source"), self.open("final")
        try:
            checks.append(self.answers(source, final))
            if self.options.eval is not None:
                checks.append(self.metric(source, final))
            checks.append(self.speed(source, final))
        finally:
            source.close()
            final.close()
        checks += self.budgets()
        for check in checks:
            self.c.say("check" if check.code == 5 else check.name, check.text, "pass" if check.passed else "FAIL")
        failed = sorted((c for c in checks if not c.passed), key=lambda c: c.code)
        if failed:
            self.refuse(failed[0])
        return self.verdict

    def open(self, stage: str) -> Executable:
        return compile_stage(self.c.stages[stage], self.options.device, self.options.threads)

    def answers(self, source: Executable, final: Executable) -> Check:
        held = self.c.held
        self.c.progress.start("answers", 2 * len(held))
        theirs = run_samples(source, self._for(source, held), self.c.progress.advance)
        ours = run_samples(final, held, self.c.progress.advance)
        self.c.progress.done()
        rows = [aligned(t, o) for t, o in zip(theirs, ours, strict=True)]
        self.verdict.found = agreement(rows, ours)
        self.verdict.golden = list(zip(held, theirs, strict=True))[:GOLDEN]
        decides = self.options.eval is None
        check = check_agreement(
            self.verdict.found, self.options.limits, reduced=self.c.reduced is not None, decides=decides
        )
        if self.verdict.found:
            worst = min(self.verdict.found, key=lambda a: a.cosine)
            self.c.report.agreement = {"cosine": worst.cosine, "max_abs": worst.max_abs, "output": worst.name}
        limit = self.options.limits.cosine_limit(self.c.reduced is not None)
        cosine = self.c.report.agreement.get("cosine")
        if decides and cosine is not None:
            self.c.report.check = {
                "metric": "cosine", "source": 1.0, "artifact": cosine, "drop": 1 - cosine,
                "limit": 1 - limit, "pass": check.passed,
            }  # fmt: skip
        return check

    @staticmethod
    def _for(run: Executable, samples: Sequence[Mapping[str, np.ndarray]]) -> list[Mapping[str, np.ndarray]]:
        """The inputs a graph has: a cut graph may need fewer."""
        names = {s.name for s in run.inputs}
        return [{n: v for n, v in sample.items() if n in names} for sample in samples]

    # -- the user's metric

    def metric(self, source: Executable, final: Executable) -> Check:
        from edgetok.evaluators.base import paired_difference

        evaluator = self.c.evaluator()
        limit = evaluator.limit if evaluator.limit is not None else self.options.limits.drop
        results: list[EvalResult] = []
        for label, run in (("source", source), ("artifact", final)):
            self.c.progress.start(f"evaluate {label}", None)
            one = self._one_at_a_time(run)
            results.append(evaluator.score(one, on_step=lambda d, t: self.c.progress.advance(to=d, total=t)))
            self.c.progress.done()
        theirs, ours = results
        difference, low, high = paired_difference(theirs, ours)
        self.verdict.accuracy = (theirs, ours, difference, low, high)
        check = check_drop(theirs.metric, theirs.value, ours.value, limit)
        self.c.report.check = {
            "metric": theirs.metric, "source": theirs.value, "artifact": ours.value,
            "drop": theirs.value - ours.value, "ci95": interval(low, high), "n": theirs.n or None, "limit": limit,
            "pass": check.passed,
        }  # fmt: skip
        if interval(low, high) is None:
            text = f"{check.text}, no interval: the evaluator gives no values per sample"
        else:
            text = f"{check.text}, n {theirs.n}, paired 95 % CI {low:+.2f} to {high:+.2f}"
        return Check(check.name, check.passed, text, check.code)

    def _one_at_a_time(self, run: Executable) -> Callable[[Feeds], Mapping[str, np.ndarray]]:
        """Evaluators give one sample; a graph of a fixed batch gets it repeated, and one answer is kept."""
        size = fixed_batch(input_specs(self.c.model))
        if size == 1:
            return run.run

        def call(feeds: Feeds) -> Mapping[str, np.ndarray]:
            rows = len(next(iter(feeds.values())))
            if rows == size:
                return run.run(feeds)
            found = run.run({n: np.repeat(v[:1], size, axis=0) for n, v in feeds.items()})
            return {n: v[:1] if v.ndim and len(v) == size else v for n, v in found.items()}

        return call

    # -- speed, memory, size

    def speed(self, source: Executable, final: Executable) -> Check:
        feeds = self.c.held[0]
        self.verdict.times = times = self._timed(source, final, feeds)
        found = ratio(times["source"], times["final"], seed=self.options.seed)
        self.verdict.speedup = found
        steps = {"graph": ("source", "clean"), "tokens": ("clean", "reduced"), "bits": ("reduced", "final")}
        self.verdict.gains = {k: ratio(times[a], times[b]).value for k, (a, b) in steps.items()}
        check = check_speed(found, self.options.limits)
        threads = thread_count(self.options.threads)
        batch = next((len(v) for v in feeds.values() if v.ndim), 1)
        a, b = times["source"].p50_ms, times["final"].p50_ms
        split = ", ".join(f"{k} {v:.2f}x" for k, v in self.verdict.gains.items())
        self.c.report.speed = {
            "device": self.device.replace("_", "-"), "threads": threads, "batch": batch,
            "source_ms": a, "artifact_ms": b, "ratio": found.value, "ci95": [found.low, found.high],
            **{f"from_{k}": v for k, v in self.verdict.gains.items()}, "pass": check.passed,
        }  # fmt: skip
        place = f"{self.device.replace('_', '-')}, {threads} thread{'s' * (threads != 1)}, batch {batch}"
        return Check("speed", check.passed, f"{place}: {a:.1f} -> {b:.1f} ms, {check.text}; {split}", 6)

    def _timed(self, source: Executable, final: Executable, feeds: Feeds) -> dict[str, Timing]:
        """Every stage in turn; a stage that changed nothing has the time of the one before it."""
        opened = {"source": source, "final": final}
        for name in ("clean", "reduced"):
            before = STAGES[: STAGES.index(name)]
            same = next((n for n in before if self.c.stages[n] == self.c.stages[name]), None)
            opened[name] = opened[same] if same else self.open(name)
        # "final" is never shared: what writes the same file as "source" is still timed against it.
        first = {name: next(n for n in STAGES if opened[n] is opened[name]) for name in STAGES}
        calls = {name: self._call(opened[name], feeds) for name in STAGES if first[name] == name}
        rounds = self.options.timing_rounds
        self.c.progress.start("speed", rounds)
        try:
            times = interleave(calls, rounds=rounds, on_round=lambda d, _: self.c.progress.advance(to=d))
        finally:
            self.c.progress.done()
            for name in ("clean", "reduced"):
                if first[name] == name:
                    opened[name].close()
        return {name: times[first[name]] for name in STAGES}

    def _call(self, run: Executable, feeds: Mapping[str, np.ndarray]) -> Any:
        mine = self._for(run, [feeds])[0]
        return lambda: run.run(mine)

    @property
    def device(self) -> str:
        """The device compared on: ``auto`` is ``cpu_ort`` here."""
        given = canonical(self.options.device)
        return "cpu_ort" if given in ("auto", "cpu") else given

    def budgets(self) -> list[Check]:
        self.verdict.rss_bytes, _ = child_cost(
            "edgetok", self.c.stages["final"], self.device, self.options.threads, self.c.held[0]
        )
        self.c.report.peak_rss_bytes = self.verdict.rss_bytes
        limits = self.options.limits
        found = [check_size(self.c.final_bytes, limits), check_memory(self.verdict.rss_bytes, limits)]
        if self.c.reduced is not None and any(self.c.reduced.counts):
            found.append(check_worth(self.verdict.gains["tokens"], WORTH, limits))
        return [c for c in found if c is not None]

    # -- the bad day

    def refuse(self, check: Check) -> None:
        """Name the layers at fault and the next flag, then raise."""
        if check.code == 6:
            raise BudgetError(f"{check.name}: {check.text}", next=self._next_for_speed(check))
        faults = self.faults()
        for line in faults:
            self.c.say("fault", line)
        raise GateError(f"{check.text}", where="; ".join(faults) or None, next=self._next_for_accuracy())

    def _next_for_speed(self, check: Check) -> str:
        if check.name == "size":
            return "try --precision int8 or int4"
        if check.name == "memory":
            return "try --precision int8"
        gains = self.verdict.gains
        if self.c.reduced is not None and gains.get("tokens", 1) < WORTH:
            return "do not reduce this model here: leave out --reduce (--require-speedup 0 keeps it all the same)"
        if self.options.precision in ("keep", "fp16", "int4"):
            return "try --precision int8 with --calib, or --require-speedup 0 to accept it"
        return "try --reduce 0.3, or --require-speedup 0 to accept it"

    def _next_for_accuracy(self) -> str:
        if self.c.reduced is not None and self._tokens_error() > 0.5 * self._whole_error():
            share = max(0.05, round(self.c.reduced.removed * 0.6, 2))
            asked = self.c.spec()
            how = f"{asked.method}:removed={share}" if asked is not None and asked.method else str(share)
            return f"remove fewer tokens: --reduce {how}"
        if self.options.precision in ("int8", "int8-dynamic", "int4"):
            other = "int8" if self.options.precision != "int8" else "fp16"
            return f"give more calibration samples, or --precision {other}"
        return "leave out --reduce, or raise the limit with --drop or --cosine"

    def _whole_error(self) -> float:
        return max((a.relative for a in self.verdict.found), default=0.0)

    def _tokens_error(self) -> float:
        """Relative error of the float graph with fewer tokens, on the held-out samples."""
        source, short = self.open("source"), self.open("reduced")
        held = self.c.held[:4]
        try:
            ours = run_samples(short, held)
            theirs = run_samples(source, self._for(source, held))
            found = agreement([aligned(t, o) for t, o in zip(theirs, ours, strict=True)], ours)
        except EdgeTokError:
            return float("inf")
        finally:
            source.close()
            short.close()
        return max((a.relative for a in found), default=0.0)

    def faults(self) -> list[str]:
        """One line for tokens and one for bits: the layers with the largest share of the error."""
        lines = []
        if self.c.reduced is not None:
            shares = self.c.blame_tokens()[:WORST_LAYERS]
            if shares:
                lines.append("tokens: " + ", ".join(f"block {i} {100 * s:.0f} %" for i, s in shares))
        if self.c.quantized is not None:
            worst = self.c.quantized.worst(WORST_LAYERS)
            if worst:
                lines.append("bits: " + ", ".join(f"{r.name} {100 * (r.share or 0):.0f} %" for r in worst))
        return lines
