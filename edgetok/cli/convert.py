"""``edgetok convert``: flags in, one report out; the work is ``edgetok.pipeline``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgetok.cli import output
from edgetok.cli.options import Device, Json, ModelFile, Quiet, Shapes, Threads, Verbose, parse_shapes, pick_source
from edgetok.errors import InputError

PRECISIONS = ("keep", "fp16", "int8", "int8-dynamic", "int4")
TARGETS = ("onnx", "tvm")


def _methods(incomplete: str) -> list[str]:
    from edgetok.converters.reduce import METHODS

    return ["0.3", *(name.replace("_", "-") for name in METHODS.names())]


def convert(
    source: Annotated[
        Path | None,
        typer.Argument(metavar="SOURCE", help=".onnx file, Hugging Face folder or artifact."),
    ] = None,
    model: ModelFile = None,
    destination: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder, or a file ending in .edgetok. [NAME-edge in this folder]"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    reduce: Annotated[
        str | None,
        typer.Option(
            "--reduce",
            metavar="0.3|METHOD:k=v,..",
            help="Fraction of tokens to remove, or a method with settings, as pitome:ratio=0.925,layers=1-11.",
            autocompletion=_methods,
        ),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            metavar="|".join(PRECISIONS),
            help="Bits of weights and activations; int8 needs --calib, int4 and fp16 are weights only.",
            autocompletion=lambda: list(PRECISIONS),
        ),
    ] = "keep",
    calib: Annotated[
        Path | None, typer.Option("--calib", help="Calibration data: image folder, .npz by input name, .txt lines.")
    ] = None,
    calib_limit: Annotated[int | None, typer.Option("--calib-limit", min=1, help="At most this many samples.")] = None,
    preprocess: Annotated[
        str | None,
        typer.Option(
            "--preprocess",
            metavar="imagenet-224|clip-224|FILE",
            help="How images become inputs; never guessed.",
            autocompletion=lambda: ["imagenet-224", "clip-224"],
        ),
    ] = None,
    shape: Shapes = None,
    outputs: Annotated[
        str | None,
        typer.Option("--outputs", metavar="restore|reduced|NAME,..", help="Per-token outputs, or cut at tensors."),
    ] = None,
    evaluate: Annotated[
        Path | None,
        typer.Option("--eval", metavar="FILE|python:M:F", help="YAML file naming an evaluator and its data."),
    ] = None,
    drop: Annotated[float, typer.Option("--drop", help="Largest loss of the --eval metric, points.")] = 0.5,
    cosine: Annotated[
        float | None, typer.Option("--cosine", help="Smallest cosine per output. [0.99, or 0.95 with --reduce]")
    ] = None,
    require_speedup: Annotated[
        float, typer.Option("--require-speedup", help="The lower end of the 95 % interval must be above this.")
    ] = 1.0,
    max_bytes: Annotated[
        str | None, typer.Option("--max-bytes", metavar="SIZE", help="Limit of the artifact's size, as 30MB.")
    ] = None,
    max_rss: Annotated[
        str | None, typer.Option("--max-rss", metavar="SIZE", help="Limit of a run's peak memory.")
    ] = None,
    device: Device = "auto",
    threads: Threads = 0,
    seed: Annotated[int, typer.Option("--seed", help="Of everything drawn at random.")] = 0,
    cleanup: Annotated[bool, typer.Option("--cleanup/--no-cleanup", help="Clean the graph up first.")] = True,
    search_seconds: Annotated[
        float, typer.Option("--search-seconds", min=0, help="Bound of the search for a schedule.")
    ] = 45.0,
    target: Annotated[
        str,
        typer.Option(
            "--target",
            metavar="|".join(TARGETS),
            help="tvm also compiles the graph and packs the library beside it.",
            autocompletion=lambda: list(TARGETS),
        ),
    ] = "onnx",
    triple: Annotated[
        str | None, typer.Option("--triple", help="Cross-compile for, as aarch64-linux-gnu (with --target tvm).")
    ] = None,
    licence: Annotated[
        Path | None,
        typer.Option("--licence", "--license", metavar="FILE", help="Licence text of the source, carried along."),
    ] = None,
    allow_hazard: Annotated[
        list[str] | None,
        typer.Option("--allow-hazard", metavar="NAME", help="Reduce in spite of a hazard inspect names; repeatable."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="FILE", help="recipe.yaml of an earlier conversion.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
    json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Make a model smaller and faster, and prove it.

    Fewer tokens, fewer bits, compared with the source in answers and in speed.

    Exits 5 when the answers differ too much and 6 when it is not faster, and then writes nothing.
    """
    out = output.setup(json, verbose, quiet)
    path = pick_source(source, model, "edgetok convert model.onnx -o edge --precision int8")
    if triple is not None and target != "tvm":
        raise InputError("--triple needs a compiler", next="add --target tvm")
    for flag, file in (("--calib", calib), ("--eval", evaluate), ("--licence", licence), ("--recipe", recipe)):
        if file is not None and not file.exists() and not (flag == "--eval" and str(file).startswith("python:")):
            raise InputError(f"no such file or folder for {flag}", where=str(file), next="check the path")
    if recipe is not None and (reduce or precision != "keep" or outputs or shape or triple or allow_hazard):
        raise InputError(
            "--recipe already decides --reduce, --precision, --shape, --outputs, --triple and --allow-hazard",
            next="leave those flags out, or edit a copy of the recipe",
        )
    from edgetok.gates import Limits
    from edgetok.pipeline import ConvertOptions, run_convert

    options = ConvertOptions(
        source=path,
        output=destination,
        force=force,
        reduce=reduce,
        precision=_choice("--precision", precision, PRECISIONS),
        calib=calib,
        calib_limit=calib_limit,
        preprocess=preprocess,
        shapes=parse_shapes(shape),
        outputs=outputs,
        eval=str(evaluate) if str(evaluate).startswith("python:") else evaluate,
        limits=Limits(
            drop=drop,
            cosine=cosine,
            speedup=require_speedup,
            max_bytes=output.parse_bytes(max_bytes, "--max-bytes"),
            max_rss_bytes=output.parse_bytes(max_rss, "--max-rss"),
        ),
        device=device,
        threads=threads,
        seed=seed,
        cleanup=cleanup,
        search_seconds=search_seconds,
        target=_choice("--target", target, TARGETS),
        triple=triple,
        licence=licence,
        allow_hazards=tuple(h.replace("_", "-") for h in allow_hazard or ()),
        dry_run=dry_run,
        recipe=recipe,
    )
    report = run_convert(options, out.progress())
    out.emit(report.to_json())


def _choice(flag: str, value: str, known: tuple[str, ...]) -> str:
    """A name out of ``known``, hyphen or underscore, any case.

    Raises:
        InputError: none of them; suggests the nearest.
    """
    name = value.strip().lower().replace("_", "-")
    if name in known:
        return name
    import difflib

    near = difflib.get_close_matches(name, known, n=1)
    raise InputError(
        f"{flag} {value!r} is not one of: {', '.join(known)}", next=f"did you mean {flag} {near[0]}?" if near else None
    )
