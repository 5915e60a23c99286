"""The main job: a source goes in, an artifact that was compared and timed comes out, or nothing does.

source -> clean-up -> token reduction -> quantization -> target -> gates -> artifact
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgetok.errors import BudgetError, GateError, InputError, UnsupportedError
from edgetok.gates import Limits
from edgetok.progress import NullProgress, Progress

if TYPE_CHECKING:
    from edgetok.artifact import Artifact

DEFAULT_CALIB = 128
TEXT_BUCKET = 128  # tokens; text encoders are reduced at one length per graph


@dataclass(frozen=True)
class ConvertOptions:
    """Everything ``edgetok convert`` takes.

    Args:
        source: an ONNX file, a Hugging Face folder or an artifact.
        output: a folder, or a file ending in ``.edgetok``; None makes one beside the working folder.
        force: replace an existing artifact.
        reduce: "0.3", "tome:r=13", ...; None or "0" removes nothing.
        counts: tokens removed by each block, instead of what ``reduce`` says.
        precision: keep, fp16, int8, int8-dynamic, int4.
        calib: image folder, ``.npz`` or ``.txt``; needed by int8 and by a reduction chosen by trial.
        calib_limit: at most this many samples (128).
        preprocess: preset, file or fields; needed with images.
        shapes: input name to shape, for open axes.
        outputs: "restore", "reduced", or tensor names to cut the graph at, comma between.
        eval: YAML file naming an evaluator and its data, ``python:module:function``, or a function that scores a run.
        limits: of the gates.
        device: where speed and answers are compared; "auto" is cpu-ort.
        threads: 0 is one per physical core.
        seed: of every random draw.
        cleanup: clean the graph up first.
        search_seconds: bound of the search for a schedule.
        target: onnx or tvm.
        triple: to cross-compile for, with tvm.
        licence: a file to carry along.
        allow_hazards: hazards to reduce in spite of.
        dry_run: stop before anything is run.
        recipe: recipe.yaml of an earlier conversion; its settings replace those of the flags above.
        timing_rounds: rounds of the speed comparison.
    """

    source: Path
    output: Path | None = None
    force: bool = False
    reduce: str | None = None
    counts: tuple[int, ...] | None = None
    precision: str = "keep"
    calib: Path | Sequence[Mapping[str, np.ndarray]] | None = None
    calib_limit: int | None = None
    preprocess: str | Mapping[str, Any] | None = None
    shapes: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    outputs: str | None = None
    eval: Path | str | Callable[..., Any] | None = None
    limits: Limits = field(default_factory=Limits)
    device: str = "auto"
    threads: int = 0
    seed: int = 0
    cleanup: bool = True
    search_seconds: float = 45.0
    target: str = "onnx"
    triple: str | None = None
    licence: Path | None = None
    allow_hazards: tuple[str, ...] = ()
    dry_run: bool = False
    recipe: Path | None = None
    timing_rounds: int = 30


@dataclass
class ConvertReport:
    """What a conversion did; ``to_json`` is the contract of ``convert --json``.

    Args:
        lines: the report for people, as (label, text, status).
    """

    artifact: str | None = None
    sha256: str | None = None
    source: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, Any] = field(default_factory=lambda: {"before": None, "after": None, "removed": 0.0})
    reduce: dict[str, Any] = field(default_factory=lambda: {"method": None, "settings": None})
    precision: str = "keep"
    check: dict[str, Any] = field(default_factory=dict)
    agreement: dict[str, Any] = field(default_factory=dict)
    speed: dict[str, Any] = field(default_factory=dict)
    bytes: int | None = None
    peak_rss_bytes: int | None = None
    seconds: float = 0.0
    recipe: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    target: dict[str, Any] = field(default_factory=lambda: {"name": "onnx"})
    lines: list[tuple[str, str, str]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Fields may be added, never renamed."""
        return {k: v for k, v in vars(self).items() if k != "lines"}


def run_convert(options: ConvertOptions, progress: Progress | None = None) -> ConvertReport:
    """Convert, compare, and write.

    Args:
        options: what to do.
        progress: told about every step; lines of the report arrive there as they are known.

    Returns:
        The report. With ``dry_run`` nothing was run or written.

    Raises:
        InputError: a flag, a missing file, or an output that exists.
        ArtifactError: the source is malformed or over a limit.
        UnsupportedError: the architecture or a setting is not handled.
        GateError, BudgetError: the result is not good enough; nothing was written.
    """
    from edgetok.artifact import check_output
    from edgetok.conversion import Conversion

    started = time.perf_counter()
    options = _with_recipe(options)
    _check(options)
    if options.output is None:
        options = replace(options, output=default_output(options.source))
    if not options.dry_run and options.output is not None:
        check_output(options.output, force=options.force)
    with tempfile.TemporaryDirectory(prefix="edgetok-") as folder:
        conversion = Conversion(options, progress or NullProgress(), Path(folder))
        try:
            report = conversion.run()
        except (GateError, BudgetError) as exc:
            exc.report = conversion.report.to_json()
            raise
    report.seconds = time.perf_counter() - started
    return report


def default_output(source: Path) -> Path:
    """``model.onnx`` becomes ``model-edge`` in the working folder."""
    name = source.resolve().name
    for suffix in (".onnx", ".edgetok"):
        name = name.removesuffix(suffix)
    return Path(f"{name.replace('_', '-')}-edge")


def _check(options: ConvertOptions) -> None:
    """Refuse what cannot work before anything is loaded."""
    from edgetok.converters.quantize.settings import PRECISIONS
    from edgetok.converters.reduce.spec import parse_reduce

    if options.precision not in PRECISIONS:
        raise InputError(f"unknown precision {options.precision!r}", next=f"choose one of: {', '.join(PRECISIONS)}")
    if options.target not in ("onnx", "tvm"):
        raise InputError(f"unknown target {options.target!r}", next="choose onnx or tvm")
    if options.target == "tvm" and options.precision in ("int4",):
        raise UnsupportedError(
            "int4 weights use MatMulNBits, which TVM does not import", next="--precision int8 or keep"
        )
    if options.precision == "int8" and options.calib is None:
        raise InputError(
            "int8 needs calibration data to choose activation ranges",
            next="add --calib FOLDER (images), FILE.npz or FILE.txt, or use --precision int8-dynamic",
        )
    if options.reduce is not None:
        spec = parse_reduce(options.reduce)
        if spec.method is None and not spec.nothing and options.calib is None:
            raise InputError(
                "choosing a reduction by trial needs calibration data",
                next="add --calib FOLDER, FILE.npz or FILE.txt, or name a method, as --reduce tome:removed=0.3",
            )


def _with_recipe(options: ConvertOptions) -> ConvertOptions:
    if options.recipe is None:
        return options
    from edgetok.recipe import read_recipe

    recipe = read_recipe(options.recipe)
    return replace(
        options,
        reduce=recipe.reduce,
        counts=tuple(recipe.counts) if recipe.counts is not None else None,
        precision=recipe.precision,
        shapes={k: tuple(v) for k, v in recipe.shapes.items()},
        outputs=recipe.outputs,
        cleanup=recipe.cleanup,
        preprocess=recipe.preprocess or options.preprocess,
        calib_limit=recipe.calib.get("limit", options.calib_limit),
        seed=recipe.seed,
        target=recipe.target,
        triple=recipe.triple,
        allow_hazards=tuple(recipe.allow_hazards),
    )


def convert(
    source: str | Path,
    *,
    output: str | Path | None = None,
    reduce: float | str | None = None,
    precision: str = "keep",
    calib: str | Path | Sequence[Mapping[str, np.ndarray]] | None = None,
    eval: str | Path | Callable[..., Any] | None = None,
    limits: Limits | None = None,
    on_line: Callable[[str, str, str], None] | None = None,
    **settings: Any,
) -> Artifact:
    """Convert a model and open the artifact.

    Args:
        source: an ONNX file, a Hugging Face folder or an artifact.
        output: a folder, or a file ending in ``.edgetok``.
        reduce: a share of tokens to remove, or a method, as in ``--reduce``.
        precision: keep, fp16, int8, int8-dynamic, int4.
        calib: a path as ``--calib`` takes, or feeds (input name to array [1, ...]), one mapping per sample.
        eval: the file ``--eval`` takes, or a function that takes ``run`` (feeds to outputs) and returns points.
        limits: of the gates.
        on_line: told each line of the report, as (label, text, status).
        settings: other fields of ``ConvertOptions``.

    Raises:
        EdgeTokError: as ``run_convert``.

    Example:
        >>> art = convert("vit.onnx", reduce=0.3, precision="int8", calib="photos",
        ...               preprocess="imagenet-224")  # doctest: +SKIP
    """
    from edgetok.artifact import Artifact
    from edgetok.progress import RecordProgress

    class _Lines(RecordProgress):
        def line(self, label: str, text: str, status: str = "") -> None:
            super().line(label, text, status)
            if on_line:
                on_line(label, text, status)

    options = ConvertOptions(
        source=Path(source),
        output=Path(output) if output is not None else None,
        reduce=None if reduce is None else str(reduce),
        precision=precision,
        calib=Path(calib) if isinstance(calib, str) else calib,
        eval=Path(eval) if isinstance(eval, str) and not eval.startswith("python:") else eval,
        limits=limits or Limits(),
        **settings,
    )
    report = run_convert(options, _Lines())
    if report.artifact is None:
        raise InputError("nothing was written", next="leave out dry_run")
    return Artifact.open(Path(report.artifact))
