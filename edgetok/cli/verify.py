"""``edgetok verify``: is this artifact what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgetok.cli import output
from edgetok.cli.options import Device, Json, ModelFile, Quiet, Threads, Verbose, pick_source


def verify(
    artifact: Annotated[
        Path | None, typer.Argument(metavar="ARTIFACT", help="An artifact folder or .edgetok file.")
    ] = None,
    model: ModelFile = None,
    source: Annotated[
        Path | None, typer.Option("--source", help="The source model: hold its hash and answers against the record.")
    ] = None,
    reproduce: Annotated[
        Path | None, typer.Option("--reproduce", metavar="SOURCE", help="Convert again from the recipe; equal bytes?")
    ] = None,
    calib: Annotated[Path | None, typer.Option("--calib", help="Calibration data, for --reproduce.")] = None,
    evaluate: Annotated[Path | None, typer.Option("--eval", metavar="FILE", help="Evaluator, for --reproduce.")] = None,
    replay: Annotated[bool, typer.Option("--replay/--no-replay", help="Replay the golden inputs.")] = True,
    device: Device = "auto",
    threads: Threads = 0,
    json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Check the hashes and the answers of an artifact.

    Structure, sha256 of every file, golden inputs replayed, and if asked the artifact made again.

    Exits 3 for a malformed artifact, 9 for a wrong hash, 5 when the answers differ, 10 when it comes out differently.
    """
    out = output.setup(json, verbose, quiet)
    path = pick_source(artifact, model, "edgetok verify ARTIFACT")
    for file in (source, reproduce, calib, evaluate):
        if file is not None:
            pick_source(file, None, "")
    from edgetok.verifying import VerifyOptions
    from edgetok.verifying import verify as check

    options = VerifyOptions(
        path=path,
        device=device,
        threads=threads,
        source=source,
        reproduce=reproduce,
        calib=calib,
        eval=evaluate,
        replay=replay,
    )
    report = check(options, out.progress())
    for name, text, passed in report.lines:
        out.line(name, text, "pass" if passed else "FAIL")
    report.raise_first()
    if report.sha256:
        out.line("sha256", report.sha256)
    out.emit(report.to_json())
