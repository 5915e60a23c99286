"""One conversion, step by step; ``pipeline.run_convert`` is the way in.

Just over 400 lines: one method per step, in the order they run; the work itself is elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from edgetok.compiling import compile_target
from edgetok.converters.graph.blocks import Finding
from edgetok.converters.graph.cleanup import clean_up
from edgetok.converters.graph.find import find_blocks
from edgetok.converters.graph.outputs import cut_outputs
from edgetok.converters.quantize.quantize import quantize_model
from edgetok.converters.quantize.settings import QuantizeReport, QuantizeSettings
from edgetok.converters.reduce.apply import ReduceReport, reduce_model
from edgetok.converters.reduce.spec import ReduceSpec, parse_reduce
from edgetok.converters.sources.base import Source
from edgetok.converters.sources.loader import load_source
from edgetok.converters.targets.onnx import finish
from edgetok.errors import InputError, InternalError, UnsupportedError
from edgetok.judging import Judge, Verdict
from edgetok.pipeline import DEFAULT_CALIB, TEXT_BUCKET, ConvertOptions, ConvertReport
from edgetok.planning import plan
from edgetok.preprocess import Preprocess, load_preprocess
from edgetok.progress import Progress
from edgetok.recipe import Recipe
from edgetok.sampling import gather, is_text, text_limit
from edgetok.searching import WORTH, Readout, Trials, all_outputs, blame, choose, insist
from edgetok.stages import Feeds, has_external_data, input_specs, open_axes, save_stage

if TYPE_CHECKING:
    from edgetok.evaluators.base import Evaluator

_KEEP = ("restore", "reduced")


class Conversion:
    """State of one conversion; every step reads what the ones before left."""

    def __init__(self, options: ConvertOptions, progress: Progress, folder: Path) -> None:
        self.options = options
        self.progress = progress
        self.folder = folder
        self.stages: dict[str, Path] = {}
        self.report = ConvertReport(precision=options.precision)
        self.reduced: ReduceReport | None = None
        self.quantized: QuantizeReport | None = None
        self._evaluator: Evaluator | None = None
        self.packed: ir.Model | None = None
        self._compiled: dict[str, bytes] = {}

    # -- reporting

    def say(self, label: str, text: str, status: str = "") -> None:
        self.report.lines.append((label, text, status))
        self.progress.line(label, text, status)

    # -- the steps

    def run(self) -> ConvertReport:
        self.load()
        self.clean()
        self.look()
        if self.options.dry_run:
            self.sample()
            plan(self)
            return self.report
        self.sample()
        self.reduce()
        self.quantize()
        self.export()
        verdict = Judge(self).judge()
        self._compiled = compile_target(self, verdict)
        self.write(verdict)
        return self.report

    def load(self) -> None:
        o = self.options
        self.source: Source = load_source(o.source)
        self.model: ir.Model = self.source.model
        if o.outputs and o.outputs not in _KEEP:
            cut_outputs(self.model, [n.strip() for n in o.outputs.split(",") if n.strip()])
        self.stages["source"] = save_stage(self.model, self.folder / "source.onnx")
        self.report.source = {"sha256": self.source.sha256, "bytes": self.source.bytes, "name": self.source.name}

    def save(self, stage: str) -> Path:
        """A stage gets the target's last rewrites too, so that their gain is not taken for one of bits."""
        copy = self.model.clone()
        finish(copy)
        return save_stage(copy, self.folder / f"{stage}.onnx")

    def shapes(self) -> dict[str, list[int | str]]:
        """Sizes for the clean-up: what the user gave (an open batch stays open), and the text bucket."""
        specs = {s.name: s for s in input_specs(self.model)}
        found: dict[str, list[int | str]] = {}
        for name, given in self.options.shapes.items():
            sizes: list[int | str] = list(given)
            if name in specs and specs[name].shape and not isinstance(specs[name].shape[0], int):
                sizes[0] = "batch"
            found[name] = sizes
        listed = list(specs.values())
        if self.wants_reduction() and is_text(listed) and not found and open_axes(listed):
            bucket = min(TEXT_BUCKET, text_limit(self.source, listed) or TEXT_BUCKET)
            found = {name: ["batch", bucket] for name in specs}
        if self.preprocess is not None and not found and len(specs) == 1 and open_axes(list(specs.values())):
            p, name = self.preprocess, next(iter(specs))
            found = {name: ["batch", 3, p.height, p.width] if p.layout == "chw" else ["batch", p.height, p.width, 3]}
        return found

    @property
    def preprocess(self) -> Preprocess | None:
        given = self.options.preprocess
        return load_preprocess(given) if given is not None else None

    def spec(self) -> ReduceSpec | None:
        return parse_reduce(self.options.reduce) if self.options.reduce is not None else None

    def wants_reduction(self) -> bool:
        spec = self.spec()
        return spec is not None and not spec.nothing

    def clean(self) -> None:
        self.cleanup_lines: list[str] = []
        self.fixed: dict[str, list[int | str]] = {n: list(v) for n, v in self.options.shapes.items()}
        if not self.options.cleanup:
            self.stages["clean"] = self.stages["source"]
            return
        self.fixed = self.shapes()
        done = clean_up(self.model, self.fixed)
        self.cleanup_lines = [p.sentence for p in done.passes]
        self.notes = list(done.notes)
        try:
            self.stages["clean"] = self.save("clean")
        except InternalError as exc:
            if not self.fixed:
                raise
            given = " ".join(f"{n}={'x'.join(map(str, v))}" for n, v in self.fixed.items())
            raise InputError(
                f"the graph does not take the sizes {given}: {exc.message[:300]}",
                where=str(self.options.source),
                next="say which it takes, as --shape " + " --shape ".join(f"{n}=1x64" for n in self.fixed)
                if is_text(input_specs(self.model))
                else "say with --shape which it takes",
            ) from exc
        self.nodes = (done.nodes_before, done.nodes_after)

    def look(self) -> None:
        self.finding: Finding = find_blocks(self.model)
        f = self.finding
        tokens = f"{f.tokens} tokens" if f.tokens else "open token count"
        blocks = f"{len(f.blocks)} blocks, {tokens}" if f.blocks else "no attention blocks found"
        self.say("source", f"{self.source.name}, {f.family}, {blocks}, {self.source.bytes / 1e6:.1f} MB")
        if f.tokens:
            self.report.tokens = {"before": f.tokens, "after": f.tokens, "removed": 0.0}
        if self.options.cleanup:
            self.say("graph", f"{self.nodes[0]} -> {self.nodes[1]} nodes; {len(self.cleanup_lines)} kinds of clean-up")
        if self.wants_reduction():
            self.check_hazards()

    def check_hazards(self) -> None:
        if not self.finding.blocks:
            why = "; ".join(dict.fromkeys(r.sentence for r in self.finding.refused)) or "no softmax attention in it"
            raise UnsupportedError(
                f"no block to reduce tokens in: {why}", where=str(self.options.source), next="leave out --reduce"
            )
        met = {h for b in self.finding.blocks for h in b.hazards}
        hazards = met - set(self.options.allow_hazards)
        if hazards:
            name = sorted(hazards)[0]
            raise UnsupportedError(
                f"token reduction is refused: {', '.join(sorted(hazards))} attention",
                where=str(self.options.source),
                next=f"leave out --reduce, or insist with --allow-hazard {name}",
            )

    # -- samples

    def sample(self) -> None:
        """Calibration samples, and the held-out ones that answers are compared on."""
        found = gather(self.options, self.source, self.model, self.preprocess)
        self.calib: list[Feeds] = found.calib
        self.held: list[Feeds] = found.held
        if found.note:
            self.say("inputs", found.note)

    def tokenizer(self) -> bytes | None:
        return self.source.files.get("tokenizer.json")

    def evaluator(self) -> Evaluator:
        """The one ``--eval`` names, built once."""
        if self._evaluator is None:
            if self.options.eval is None:
                raise InputError("no evaluator was named", next="add --eval FILE")
            from edgetok.evaluators.base import load_evaluator

            self._evaluator = load_evaluator(
                self.options.eval,
                inputs=input_specs(self.model),
                preprocess=self.preprocess,
                tokenizer=self.tokenizer(),
            )
        return self._evaluator

    def calib_sha256(self) -> str:
        digest = hashlib.sha256()
        for sample in [*self.calib, *self.held]:
            for name in sorted(sample):
                digest.update(name.encode() + str(sample[name].dtype).encode() + sample[name].tobytes())
        return digest.hexdigest()

    # -- tokens and bits

    def reduce(self) -> None:
        spec = self.spec()
        counts: tuple[int, ...] | None = self.options.counts
        if spec is not None and not spec.nothing and spec.method is None:
            spec, counts = self.choose(spec.removed or 0.0)
        if spec is None or spec.nothing:
            self.stages["reduced"] = self.stages["clean"]
            return
        spec = insist(spec) if self.options.allow_hazards else spec
        self.clean_model = self.model.clone()
        self.reduced = reduce_model(self.model, self.finding, spec, counts=counts, outputs=self.outputs_mode())
        self.reduced_spec = spec
        try:
            self.stages["reduced"] = self.save("reduced")
        except InternalError as exc:
            if not self.options.allow_hazards:
                raise
            raise UnsupportedError(
                f"this attention does not survive fewer tokens: {exc.message}",
                where=str(self.options.source),
                next="leave out --reduce and --allow-hazard",
            ) from exc
        r = self.reduced
        self.report.tokens = {"before": r.tokens_in, "after": r.tokens[-1], "removed": r.removed}
        self.report.tokens["per_layer"] = list(r.tokens)
        self.report.reduce = {"method": r.method, "settings": r.spec, "counts": list(r.counts)}
        self.report.reduce["flops"] = r.flops_ratio
        layers = sum(1 for c in r.counts if c)
        self.say(
            "reduce",
            f"{r.method}, {r.tokens_in} -> {r.tokens[-1]} tokens over {layers} layers, "
            f"removed {100 * r.removed:.0f} %, FLOPs of the blocks {100 * r.flops_ratio:.0f} %",
        )
        for note in r.notes:
            self.say("", note)

    def outputs_mode(self) -> str:
        return self.options.outputs if self.options.outputs in _KEEP else "restore"

    def trials(self, model: ir.Model) -> Trials:
        readout: Readout = all_outputs
        if self.options.eval is not None:
            readout = getattr(self.evaluator(), "readout", None) or all_outputs
        return Trials(
            model,
            self.calib or self.held,
            readout=readout,
            threads=self.options.threads,
            outputs=self.outputs_mode(),
            insisted=bool(self.options.allow_hazards),
        )

    def choose(self, removed: float) -> tuple[ReduceSpec | None, tuple[int, ...] | None]:
        """Method and schedule by trial; none when the gain is too small to be worth it."""
        trials = self.trials(self.model)
        o = self.options
        found = choose(trials, self.finding, removed, seconds=o.search_seconds, seed=o.seed, progress=self.progress)
        self.say(
            "search",
            f"{found.spec.method}, agreement {found.score:.4f}, best of {found.tried} tried in {found.seconds:.0f} s",
        )
        gain = trials.gain(found.spec, found.counts)
        if gain.value < WORTH:
            self.say(
                "reduce",
                f"do not reduce this model on this device: {found.spec.method} gained {gain.value:.2f}x "
                f"(95 % CI {gain.low:.2f}-{gain.high:.2f}); kept all tokens",
            )
            return None, None
        return found.spec, found.counts

    def blame_tokens(self) -> list[tuple[int, float]]:
        """(block, share of the error) with each block reducing alone."""
        if self.reduced is None:
            return []
        return blame(self.trials(self.clean_model), self.reduced_spec, self.reduced.counts)

    # -- bits

    def quantize(self) -> None:
        o = self.options
        settings = self.quantize_settings()
        if o.precision == "keep":
            return
        current = o.precision
        self.progress.start(current, None)

        def step(name: str, done: int, total: int) -> None:
            nonlocal current
            if name != current:  # each step counts its own units: one bar for all would jump back
                self.progress.done()
                self.progress.start(name, total)
                current = name
            self.progress.advance(to=done, total=total)

        self.model, self.quantized = quantize_model(self.model, o.precision, self.calib, settings, step)
        self.progress.done()
        q = self.quantized
        if all(r.precision == "float" for r in q.layers) and o.precision != "fp16":
            raise UnsupportedError(
                f"nothing in this model can be made {o.precision}: {'; '.join(q.notes) or 'no linear layer'}",
                where=str(o.source),
                next="use --precision keep or fp16",
            )
        many = "layer" if len(q.kept_float) == 1 else "layers"
        kept = f", {len(q.kept_float)} {many} kept float" if q.kept_float else ""
        data = f", {q.samples} calibration samples" if q.samples else ""
        sizes = f"{q.bytes_before / 1e6:.1f} -> {q.bytes_after / 1e6:.1f} MB"
        self.say("quantize", f"{o.precision}{data}{kept}, {sizes}")
        for note in q.notes:
            self.say("", note)

    def quantize_settings(self) -> QuantizeSettings:
        threads = self.options.threads
        return QuantizeSettings(threads=threads) if threads else QuantizeSettings()

    def untouched(self) -> bool:
        """Nothing was asked for that changes the graph: the source's own bytes are written."""
        o = self.options
        asked = o.cleanup or self.reduced is not None or o.precision != "keep" or o.outputs not in (None, *_KEEP)
        return not asked and self.source.kind == "onnx" and not has_external_data(self.source.path)

    def export(self) -> None:
        final = self.folder / "final.onnx"
        self.stages["final"] = final
        self.exported: ir.Model | bytes = self.model
        if self.untouched():
            raw = self.source.path.read_bytes()
            self.exported = raw
            final.write_bytes(raw)
            notes: Sequence[str] = ("the source's own bytes",)
        else:
            self.packed = self.packed_model()  # from the open graph: the target's rewrites come after
            notes = finish(self.model).notes
            save_stage(self.model, final)
        self.final_bytes = final.stat().st_size
        custom = sorted({n.domain for n in self.model.graph if n.domain not in ("", "ai.onnx")})
        ops = f"operators of {', '.join(custom)}" if custom else "no custom operators"
        self.say("export", f"model.onnx, opset {self.model.opset_imports.get('', 0)}, {ops}")
        for note in notes:
            self.say("", note)

    # -- the artifact

    def recipe(self) -> Recipe:
        o = self.options
        calib: dict[str, Any] = {}
        if self.calib:
            calib = {"samples": len(self.calib) + len(self.held), "limit": o.calib_limit or DEFAULT_CALIB}
            calib["sha256"] = self.calib_sha256()
        return Recipe(
            reduce=self.reduced.spec if self.reduced else None,
            counts=list(self.reduced.counts) if self.reduced else None,
            precision=o.precision,
            shapes=self.fixed,
            outputs=o.outputs,
            cleanup=o.cleanup,
            preprocess=self.preprocess.to_dict() if self.preprocess else None,
            calib=calib,
            seed=o.seed,
            target=o.target,
            triple=o.triple,
            allow_hazards=list(o.allow_hazards),
        )

    def packed_model(self) -> ir.Model | None:
        """The padding-free form of a text encoder, when the graph allows it."""
        if self.reduced is not None or self.untouched() or not is_text(input_specs(self.model)):
            return None
        if not self.finding.blocks or any(b.hazards for b in self.finding.blocks):
            return None
        from edgetok.converters.graph.packing import pack_model

        try:
            packed = pack_model(self.model)
        except UnsupportedError as exc:
            self.say("", exc.message)
            return None
        finish(packed)
        self.say("packed", "model.packed.onnx beside it: batches of texts run without work on pads")
        return packed

    def target_files(self) -> dict[str, bytes]:
        """Compiled libraries of other targets, by artifact name."""
        return self._compiled

    def write(self, verdict: Verdict) -> None:
        from edgetok.writing import write

        write(self, verdict)
