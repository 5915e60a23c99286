"""What the kernel benchmarks share: pinned child processes, interleaved timing, tables, results as JSON.

A benchmark is a script whose ``--worker`` mode prints one JSON document, a list of rows. Thread count, instruction set
and pinning belong to a process, so the script starts itself once for each of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
# How each peer is told to use nothing above AVX2.
AVX2_ONLY = {
    "EDGETOK_MAX_ISA": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


def cpus_for(threads: int) -> list[int]:
    """The last ``threads`` CPUs this process may use: the first one is where a system runs most of its own work."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < threads:
        raise SystemExit(f"{threads} threads need as many CPUs; this process may use {len(allowed)}")
    return allowed[-threads:]


def worker(script: str, threads: int, arguments: Sequence[str], *, avx2: bool = False) -> list[dict[str, Any]]:
    """Rows of one pinned child process."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if avx2:
        env |= AVX2_ONLY
    cpus = cpus_for(threads)
    command = [sys.executable, script, "--worker", str(threads), *arguments]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
        check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, cpus),
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {done.returncode}")
    return [{**row, "threads": threads, "avx2_only": avx2} for row in json.loads(done.stdout.splitlines()[-1])]


def timed(
    calls: Mapping[str, Callable[[], object]], *, threads: int, rounds: int, seconds: float = 50.0
) -> dict[str, dict[str, Any]]:
    """Interleaved runs; for each name median, 90th percentile and count, and the samples for ratios."""
    from edgetok.measuring import interleave

    found = interleave(calls, rounds=rounds, warmup=1, max_seconds=seconds, settle=0 if threads == 1 else 1)
    return {
        name: {"ms": t.p50_ms, "p90_ms": t.p90_ms, "runs": len(t.samples_ms), "samples_ms": list(t.samples_ms)}
        for name, t in found.items()
    }


def ratio_text(slow: Mapping[str, Any] | None, fast: Mapping[str, Any]) -> str:
    """``2.31 (2.20-2.40)``: how many times faster, median over rounds and 95 % interval; ``-`` without a peer."""
    from edgetok.measuring import Timing, ratio

    if slow is None:
        return "-"
    r = ratio(Timing(tuple(slow["samples_ms"])), Timing(tuple(fast["samples_ms"])))
    return f"{r.value:.2f} ({r.low:.2f}-{r.high:.2f})"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [list(map(str, head)), ["-" * max(3, len(h)) for h in head], *([str(c) for c in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in lines)


def save(name: str, rows: Sequence[Mapping[str, Any]], threads: int) -> Path:
    """Write ``benchmarks/results/<name>.json`` with what should stand beside the numbers."""
    from edgetok.machine import conditions
    from edgetok.native.table import chosen

    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    document = {
        "conditions": conditions(threads),
        "kernels": [kernel.name for kernel in chosen()],
        "command": f"python {Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip(),
        "rows": list(rows),
    }
    path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    return path
