"""``edgetok compare``: what really changed between two artifacts, models or recorded benches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgetok.cli import output
from edgetok.cli.options import Device, Json, Quiet, Shapes, Threads, Verbose, parse_shapes, pick_source
from edgetok.errors import BudgetError


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="The baseline: artifact, model, or file of bench --json.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="What is held against it.")],
    fail_on: Annotated[
        list[str] | None,
        typer.Option("--fail-on", metavar="RULE", help="Exit 6 when B breaks it, as 'p50>+5%' or 'cosine<0.99'."),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    device: Device = "auto",
    threads: Threads = 0,
    rounds: Annotated[int, typer.Option("--rounds", min=5, help="Samples per side.")] = 50,
    max_seconds: Annotated[float, typer.Option("--max-seconds", min=0.1, help="For the timing.")] = 30.0,
    shape: Shapes = None,
    seed: Annotated[int, typer.Option("--seed", help="Of random inputs and of the bootstrap.")] = 0,
    json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Say what really changed from A to B.

    Both are timed interleaved in one run; each change is "real" or "within noise".

    Metrics for --fail-on: p50 p90 p99 (ms), memory, size (bytes), cosine. A change within the noise breaks no rule.
    """
    out = output.setup(json, verbose, quiet)
    for path in (a, b):
        pick_source(path, None, "")
    from edgetok import comparing

    rules = [comparing.parse_rule(text) for text in fail_on or ()]
    found = comparing.compare(
        a,
        b,
        device=device,
        threads=threads,
        rounds=rounds,
        max_seconds=max_seconds,
        shapes=parse_shapes(shape),
        seed=seed,
        progress=out.progress(),
    )
    if markdown:
        out.say(found.to_markdown().rstrip("\n"))
    elif not out.quiet:
        out.table(["row", "metric", "A", "B", "change (95 % CI)", "verdict"], found.cells(), right=[2, 3, 4])
    for note in found.notes:
        out.line("note", note)
    sentences = comparing.broken(found, rules)
    if sentences:
        error = BudgetError("; ".join(sentences), where=str(b), next="find the cause, or raise the bound in --fail-on")
        error.report = found.to_json()
        raise error
    out.emit(found.to_json())
