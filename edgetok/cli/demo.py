"""``edgetok demo``: the main job on a real model, from nothing to a measured artifact."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from edgetok.cli import output
from edgetok.cli.options import Device, Json, Quiet, Threads, Verbose
from edgetok.errors import InputError
from edgetok.progress import BarsOnly, Progress

MODEL = "vit-s-focus"
IMAGES = 32
REDUCE = "0.3"
SEARCH_SECONDS = 20.0


def demo(
    keep: Annotated[
        Path | None, typer.Option("--keep", metavar="DIR", help="Keep the artifact and the images in this folder.")
    ] = None,
    reduce: Annotated[str, typer.Option("--reduce", help="As for convert.")] = REDUCE,
    precision: Annotated[str, typer.Option("--precision", help="As for convert.")] = "int8",
    images: Annotated[int, typer.Option("--images", min=4, max=512, help="Calibration images to draw.")] = IMAGES,
    force: Annotated[bool, typer.Option("--force", help="Replace what --keep already holds.")] = False,
    device: Device = "auto",
    threads: Threads = 0,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Convert and time a real model, from nothing.

    Pulls a vision transformer, converts it, and times it against onnxruntime on the source: some two minutes on two
    cores.

    The calibration images are drawn by program, so the figures say how fast the artifact is, not how accurate: use
    your own images and --eval for that.
    """
    out = output.setup(json, verbose, quiet)
    folder = keep if keep is not None else Path(tempfile.mkdtemp(prefix="edgetok-demo-"))
    if keep is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "vit-edge").exists() and not force:
            raise InputError("the folder already holds a demo", where=str(folder / "vit-edge"), next="add --force")
    try:
        result = _run(out, folder, reduce, precision, images, device, threads, seed, force)
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    result["kept"] = keep
    row = result["bench"]["rows"][1]
    low, high = row["speedup"]["ci95"]
    out.line(
        "result",
        f"{row['speedup']['value']:.2f}x as fast as onnxruntime on the source (95 % CI {low:.2f}-{high:.2f}), "
        f"cosine {row['cosine']:.4f} on a drawn image",
    )
    if keep is not None:
        out.line("kept", f"{output.short(folder / 'vit-edge')}; look into it with edgetok inspect")
    flags = f"--reduce {reduce} --precision {precision} --calib photos/ --preprocess imagenet-224"
    out.line("next", f"edgetok convert model.onnx -o edge {flags}")
    out.emit(result)


class _NotWritten(BarsOnly):
    """The conversion's lines but where it wrote to: that folder is the demo's business."""

    def __init__(self, outer: Progress) -> None:
        super().__init__(outer)
        self._lines = outer.line

    def line(self, label: str, text: str, status: str = "") -> None:
        if label not in ("wrote", "next"):
            self._lines(label, text, status)


def _run(
    out: output.Output,
    folder: Path,
    reduce: str,
    precision: str,
    images: int,
    device: str,
    threads: int,
    seed: int,
    force: bool,
) -> dict[str, Any]:
    from edgetok.benching import BenchOptions, run_bench
    from edgetok.cli.bench import print_bench
    from edgetok.cli.models import pull_shown
    from edgetok.demo_data import write_images
    from edgetok.gates import Limits
    from edgetok.pipeline import ConvertOptions, run_convert

    progress = out.progress()
    source = pull_shown(out, MODEL)
    progress.start("images")
    calib = write_images(folder / "images", images, seed=seed)
    progress.done()
    out.line("images", f"{images} drawn by program (no photographs are shipped)")
    options = ConvertOptions(
        source=source,
        output=folder / "vit-edge",
        reduce=reduce if reduce not in ("0", "none") else None,
        precision=precision,
        calib=calib,
        preprocess="imagenet-224",
        limits=Limits(),
        device=device,
        threads=threads,
        seed=seed,
        search_seconds=SEARCH_SECONDS,
        force=force,
    )
    report = run_convert(options, _NotWritten(progress))
    # Convert compares on one device, and so does the bench: the source's onnxruntime against the same runtime.
    same = "cpu" if device == "auto" else device
    bench = run_bench(
        BenchOptions(
            target=folder / "vit-edge",
            source=source,
            rows=("single-stream",),
            peers=("onnxruntime",),
            device=same,
            threads=threads,
            rounds=30,
            max_seconds=20,
            shapes={},
            seed=seed,
        ),
        progress,
    )
    print_bench(out, bench)
    return {"model": MODEL, "images": images, "convert": report.to_json(), "bench": bench.to_json()}
