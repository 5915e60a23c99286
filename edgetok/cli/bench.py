"""``edgetok bench``: latency and throughput of an artifact or model, peers in the same run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgetok.cli import output
from edgetok.cli.options import (
    Device,
    Json,
    ModelFile,
    NativeCode,
    Quiet,
    Shapes,
    Threads,
    Verbose,
    parse_shapes,
    pick_source,
)

if TYPE_CHECKING:
    from edgetok.benching import BenchReport


def bench(
    target: Annotated[
        Path | None, typer.Argument(metavar="ARTIFACT|MODEL", help="Artifact, .onnx file or Hugging Face folder.")
    ] = None,
    model: ModelFile = None,
    source: Annotated[Path | None, typer.Option("--source", help="The source model, run by the peers.")] = None,
    rows: Annotated[
        str, typer.Option("--rows", help="Comma-separated rows: single-stream, batch8.")
    ] = "single-stream,batch8",
    peer: Annotated[
        list[str] | None,
        typer.Option(
            "--peer",
            help="Also time onnxruntime or openvino on the source; may be repeated.",
            autocompletion=lambda: ["onnxruntime", "openvino"],
        ),
    ] = None,
    device: Device = "auto",
    threads: Threads = 0,
    rounds: Annotated[int, typer.Option("--rounds", min=5, help="Samples per engine and row.")] = 50,
    max_seconds: Annotated[float, typer.Option("--max-seconds", min=0.1, help="Per row.")] = 30.0,
    shape: Shapes = None,
    seed: Annotated[int, typer.Option("--seed", help="Of random inputs.")] = 0,
    allow_native_code: NativeCode = False,
    no_memory: Annotated[
        bool, typer.Option("--no-memory", help="Skip the fresh processes that measure memory and load time.")
    ] = False,
    json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Time a model or artifact, peers in the same run.

    p50, p90, p99, throughput, peak memory and load time, under recorded conditions.

    What is timed is one call from arrays to arrays. With --peer, the engines take turns in one run and the
    speed-up has a 95 % interval.
    """
    out = output.setup(json, verbose, quiet)
    path = pick_source(target, model, "edgetok bench ARTIFACT")
    if source is not None:
        pick_source(source, None, "")
    from edgetok.benching import BenchOptions, run_bench

    options = BenchOptions(
        target=path,
        source=source,
        rows=split(rows),
        peers=tuple(name for text in peer or () for name in split(text)),
        device=device,
        threads=threads,
        rounds=rounds,
        max_seconds=max_seconds,
        shapes=parse_shapes(shape),
        seed=seed,
        memory=not no_memory,
        allow_native_code=allow_native_code,
    )
    report = run_bench(options, out.progress())
    print_bench(out, report)
    out.emit(report.to_json())


def split(text: str) -> tuple[str, ...]:
    """Comma-separated names, hyphens for underscores."""
    return tuple(part.strip().replace("_", "-") for part in text.split(",") if part.strip())


def print_bench(out: output.Output, report: BenchReport) -> None:
    """Conditions, then one table."""
    c = report.conditions
    clock = f"{c['clock_mhz']:.0f} MHz" if c["clock_mhz"] else "clock not readable"
    governor = f"governor {c['governor']}" if c["governor"] else "governor not readable"
    out.line("machine", f"{c['cpu']}, {c['isa'] or 'isa unknown'}, {clock}, {governor}, load {c['load_average']}")
    out.line("versions", ", ".join(f"{k} {v}" for k, v in c["versions"].items() if k in ("onnxruntime", "openvino")))
    columns = ["row", "engine", "device", "thr", "p50 ms", "p90 ms", "p99 ms", "n", "value", "95 % CI", "memory",
               "load", "speed-up of edgetok", "cosine", "note"]  # fmt: skip
    cells = []
    for r in report.rows:
        t = r.timing
        speed = f"{r.speedup.value:.2f}x ({r.speedup.low:.2f}-{r.speedup.high:.2f})" if r.speedup else ""
        cells.append(
            [
                r.name,
                r.engine,
                r.device,
                r.threads,
                f"{t.p50_ms:.2f}",
                f"{t.p90_ms:.2f}",
                f"{t.p99_ms:.2f}",
                len(t.samples_ms),
                f"{r.value:.2f} {r.unit}",
                f"{r.ci95[0]:.2f}-{r.ci95[1]:.2f}",
                output.mb(r.peak_rss_bytes) if r.peak_rss_bytes else "-",
                f"{r.load_ms:.0f} ms" if r.load_ms else "-",
                speed,
                "" if r.cosine is None else f"{r.cosine:.4f}",
                r.note + ("" if r.steady else " (never became steady)"),
            ]
        )
    if not out.quiet:
        drop = {i for i in range(len(columns)) if all(str(row[i]).strip() in ("", "-") for row in cells)}
        keep = [i for i in range(len(columns)) if i not in drop]
        right = [j for j, i in enumerate(keep) if 3 <= i <= 11]
        out.table([columns[i] for i in keep], [[row[i] for i in keep] for row in cells], right=right)
    for name, reason in report.skipped:
        out.line("skipped", f"{name}: {reason}")
