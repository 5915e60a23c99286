"""Which reduction suits this model: methods and schedules tried on calibration samples, the best by agreement.

Every candidate removes the same share of tokens, so ranking by agreement is ranking by agreement per FLOP. No label
is used. What is found is written into the recipe as a method, its settings and counts per layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from edgetok.converters.graph.blocks import Finding
from edgetok.converters.graph.find import find_blocks
from edgetok.converters.reduce import METHODS
from edgetok.converters.reduce.apply import Outputs, reduce_model
from edgetok.converters.reduce.schedule import SearchSpace, Trial, removed_share, search
from edgetok.converters.reduce.spec import ReduceSpec, parse_reduce
from edgetok.devices.base import Executable
from edgetok.errors import ArtifactError, EdgeTokError, InputError, UnsupportedError
from edgetok.measuring import Ratio, interleave, ratio
from edgetok.progress import NullProgress, Progress
from edgetok.stages import Feeds, batched, compile_stage, run_samples
from edgetok.weights import proto_bytes

Readout = Callable[[Mapping[str, np.ndarray]], np.ndarray]
SAMPLES = 24
BATCH = 8
FEW = 7  # schedules tried per method in the second round
# Successive halving: (schedules tried per method, batches each is scored on). Methods whose error is more than CLOSE
# times the best one's drop out; the best is then searched further on all samples for the rest of the time.
ROUNDS = ((1, 1), (FEW, 2))
CLOSE = 1.5
SHORT = 0.02  # by how much less than the share asked for a schedule may remove, beside a token per layer
WORTH = 1.05  # a reduction that gains less than this is not worth its risk


@dataclass(frozen=True)
class Choice:
    """What the search found.

    Args:
        spec: the method with its settings.
        counts: tokens removed per layer.
        score: 1 - relative error against the unreduced model, on the search samples.
        tried: candidates scored.
        refused: method and reason, for those that cannot be used here.
        seconds: spent.
    """

    spec: ReduceSpec
    counts: tuple[int, ...]
    score: float
    tried: int
    refused: tuple[tuple[str, str], ...]
    seconds: float


def all_outputs(outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Floating-point outputs, each scaled to unit norm per sample, side by side [B, ...]."""
    parts = []
    for value in outputs.values():
        if np.issubdtype(value.dtype, np.floating) and value.ndim:
            flat = value.reshape(len(value), -1).astype(np.float64)
            parts.append(flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12))
    return np.concatenate(parts, axis=1)


def insist(spec: ReduceSpec) -> ReduceSpec:
    """The same method, told to go on where the block finder warns."""
    return spec if spec.settings is None else replace(spec, settings=replace(spec.settings, insist=True))


class Trials:
    """Scores candidates against the unreduced model on the same samples.

    Args:
        model: the clean graph; never changed.
        samples: of batch 1.
        readout: what of the outputs counts.
        threads: of the runs.
        outputs: as ``reduce_model`` takes it.
        insisted: reduce in spite of hazards.
    """

    def __init__(
        self,
        model: ir.Model,
        samples: Sequence[Feeds],
        *,
        readout: Readout,
        threads: int,
        outputs: Outputs = "restore",
        insisted: bool = False,
    ) -> None:
        self.model, self.threads, self.readout, self.outputs = model, threads, readout, outputs
        self.insisted, self.one = insisted, samples[0]
        self.feeds = batched(samples[:SAMPLES], BATCH if _open_batch(model) else 1)
        whole = self.compile(model)
        self.reference = [readout(o) for o in run_samples(whole, self.feeds)]
        whole.close()

    def compile(self, model: ir.Model) -> Executable:
        return compile_stage(proto_bytes(ir.serde.serialize_model(model)), "cpu_ort", self.threads)

    def reduced(self, spec: ReduceSpec, counts: Sequence[int] | None) -> ir.Model:
        copy = self.model.clone()
        spec = insist(spec) if self.insisted else spec
        reduce_model(copy, find_blocks(copy), spec, counts=counts, outputs=self.outputs)
        return copy

    def score(self, spec: ReduceSpec, counts: Sequence[int] | None, batches: int | None = None) -> float:
        """1 - relative error over the first ``batches``; -inf when the outputs are not finite."""
        run = self.compile(self.reduced(spec, counts))
        found = [self.readout(o) for o in run_samples(run, self.feeds[:batches])]
        run.close()
        reference = self.reference[:batches]
        difference = sum(float(((a - b) ** 2).sum()) for a, b in zip(found, reference, strict=True))
        norm = sum(float((b**2).sum()) for b in reference)
        error = (difference / norm) ** 0.5 if norm else difference
        return 1 - error if np.isfinite(error) else float("-inf")

    def gain(self, spec: ReduceSpec, counts: Sequence[int]) -> Ratio:
        """Measured speed-up of the reduction alone, on one sample."""
        feeds = self.one
        whole, short = self.compile(self.model), self.compile(self.reduced(spec, counts))
        times = interleave({"whole": lambda: whole.run(feeds), "short": lambda: short.run(feeds)}, rounds=15)
        whole.close()
        short.close()
        return ratio(times["whole"], times["short"])


def _open_batch(model: ir.Model) -> bool:
    return all(v.shape is not None and len(v.shape) > 0 and not isinstance(v.shape[0], int) for v in model.graph.inputs)


def choose(
    trials: Trials,
    finding: Finding,
    removed: float,
    *,
    methods: Sequence[str] | None = None,
    seconds: float = 45.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Choice:
    """Try methods and schedules that remove the same share of tokens; the best agreement wins.

    Args:
        trials: scores candidates.
        finding: of the clean graph.
        removed: share of tokens to remove (decision 24's x in ``converters.reduce.schedule``).
        methods: names to try; None tries all.
        seconds: bound; one candidate is always scored.

    Raises:
        InputError: the network's size is open.
        UnsupportedError: no method can be used; gives each one's reason.
    """
    if finding.tokens is None:
        raise InputError("the number of tokens is open in this graph", next="fix the input size with --shape")
    hunt = _Hunt(trials, finding, removed, seconds, seed, progress or NullProgress())
    return hunt.run(methods or METHODS.names())


class _Hunt:
    """One search: methods are dropped round by round, the schedules of the best are refined."""

    def __init__(
        self, trials: Trials, finding: Finding, removed: float, seconds: float, seed: int, progress: Progress
    ) -> None:
        self.trials, self.removed, self.seconds, self.seed = trials, removed, seconds, seed
        self.progress = progress
        self.space = SearchSpace(
            finding.tokens or 0, finding.leading, len(finding.blocks), finding.blocks[0].width, removed
        )
        self.start = time.monotonic()
        self.best: dict[str, Trial] = {}
        self.refused: list[tuple[str, str]] = []
        self.known: dict[str, tuple[tuple[int, ...], ...]] = {}
        self.tried = 0

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)

    def run(self, methods: Sequence[str]) -> Choice:
        self.progress.start("search", None)
        names = list(methods)
        try:
            for samples, batches in ROUNDS:
                self.look(names, samples, batches)
                names = sorted(self.best, key=lambda n: -self.best[n].score)
                limit = CLOSE * (1 - self.best[names[0]].score)
                names = [n for n in names if not 1 - self.best[n].score > limit]
            self.look(names[:1], 1000, None)
        finally:
            self.progress.done()
        name = names[0]
        found = self.best[name]
        spent = time.monotonic() - self.start
        return Choice(self.spec(name), found.counts, found.score, self.tried, tuple(self.refused), spent)

    def spec(self, name: str) -> ReduceSpec:
        return parse_reduce(f"{name}:removed={self.removed}")

    def look(self, names: Sequence[str], samples: int, batches: int | None) -> None:
        """Score up to ``samples`` schedules of each method; only scores on the same samples are compared."""
        before, self.best = self.best, {}
        for i, name in enumerate(names):
            if self.best and self.left() <= 0:
                break
            try:
                self.best[name] = self.try_schedules(name, samples, batches, self.left() / (len(names) - i))
            except (UnsupportedError, InputError) as exc:
                self.refused.append((name, exc.message))
        if not self.best:
            self.best = before
        if not self.best:
            raise UnsupportedError(
                "no reduction method can be used here: " + "; ".join(f"{n}: {why}" for n, why in self.refused),
                next="leave out --reduce",
            )

    def try_schedules(self, name: str, samples: int, batches: int | None, seconds: float) -> Trial:
        """The best schedule of one method.

        Raises:
            UnsupportedError: none of them removes the share asked for, or none runs.
        """
        failed: list[str] = []
        found = search(
            lambda counts: self.score(name, counts, batches, failed),
            self.space,
            METHODS.get(name),
            samples=samples,
            seconds=max(0.0, seconds),
            seed=self.seed,
            first=self.known.get(name, ()) if samples > FEW else (),
            on_trial=lambda *_: self.progress.advance(),
        )
        self.tried += len(found)
        if not found or found[0].score == float("-inf"):
            if samples < FEW:  # the method's own shape does not fit here; another may
                return self.try_schedules(name, FEW, batches, seconds)
            raise UnsupportedError(failed[0] if failed else "its outputs are not finite")
        self.known[name] = tuple(t.counts for t in found[:3])
        return found[0]

    def score(self, name: str, counts: tuple[int, ...], batches: int | None, failed: list[str]) -> float:
        """-inf for a schedule that cannot be used: one that removes too little would win by agreement alone."""
        share = removed_share(counts, self.space.tokens, where=METHODS.get(name).where)
        if share < self.removed - SHORT - 1 / self.space.tokens:
            failed.append(f"it can remove {100 * share:.0f} % of the tokens at most, not {100 * self.removed:.0f} %")
            return float("-inf")
        try:
            return self.trials.score(self.spec(name), counts, batches)
        except (UnsupportedError, InputError, ArtifactError) as exc:
            failed.append(exc.message)
            return float("-inf")


def blame(trials: Trials, spec: ReduceSpec, counts: Sequence[int]) -> list[tuple[int, float]]:
    """(layer, share of the squared error) with each layer reducing alone, largest first."""
    errors = []
    for layer, count in enumerate(counts):
        if count:
            alone = [count if i == layer else 0 for i in range(len(counts))]
            try:
                errors.append((layer, max(0.0, 1 - trials.score(spec, alone)) ** 2))
            except EdgeTokError:
                continue
    total = sum(e for _, e in errors) or 1.0
    return sorted(((layer, e / total) for layer, e in errors), key=lambda p: -p[1])
