"""Libraries of other targets beside the ONNX file: compiled, then held against what onnxruntime answers."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgetok.devices import BACKENDS
from edgetok.devices.base import Executable, Options
from edgetok.errors import GateError
from edgetok.gates import cosine
from edgetok.stages import Feeds, compile_stage

if TYPE_CHECKING:
    from edgetok.conversion import Conversion
    from edgetok.judging import Verdict

CLOSE = 1e-4  # largest difference of a float graph, relative to its largest output
SAME = 0.99  # below this cosine the library computes something else
_RUNS, _SECONDS = 5, 3.0


def compile_target(conversion: Conversion, verdict: Verdict) -> dict[str, bytes]:
    """Compile the final graph for ``--target``.

    Returns:
        Artifact name to bytes of what travels beside the ONNX file; empty for the target ``onnx``.

    Raises:
        BackendError: the compiler is not installed.
        UnsupportedError: it cannot take the graph.
        GateError: the library answers something else.
    """
    c = conversion
    if c.options.target != "tvm":
        return {}
    from edgetok.converters.targets.tvm import compile_tvm

    c.progress.start("compile tvm", None)
    out = c.folder / "compiled"
    out.mkdir()
    done = compile_tvm(ir.serde.serialize_model(c.model), triple=c.options.triple, out_dir=out)
    c.progress.done()
    files = {f"targets/tvm/{done.triple}/{f.name}": (out / f.name).read_bytes() for f in done.files}
    c.say("tvm", f"{done.kind} for {done.triple}, compiled in {done.compile_seconds:.0f} s")
    for note in done.notes:
        c.say("", note)
    c.report.target = {"name": "tvm", "triple": done.triple, "kind": done.kind, "batch": done.batch}
    if c.options.triple is None:
        _hold_against_onnxruntime(c, files, verdict)
    else:
        c.say("tvm", f"speed and answers on {done.triple}: not measurable here")
    return files


def _hold_against_onnxruntime(c: Conversion, files: dict[str, bytes], verdict: Verdict) -> None:
    feeds = {n: v[:1] for n, v in c.held[0].items()} if c.report.target["batch"] == 1 else c.held[0]
    reference = compile_stage(c.stages["final"], "cpu_ort", c.options.threads)
    library = _open(c.folder / "beside", c.stages["final"], files)
    try:
        want, have = reference.run(feeds), library.run(feeds)
        ms = _time_ms(library, feeds)
    finally:
        reference.close()
        library.close()
    floats = [n for n in want if np.issubdtype(want[n].dtype, np.floating)]
    difference = max((float(np.abs(want[n] - have[n]).max(initial=0.0)) for n in floats), default=0.0)
    largest = max((float(np.abs(want[n]).max(initial=0.0)) for n in floats), default=1.0)
    worst = min((cosine(want[n], have[n]) for n in floats), default=1.0)
    c.report.target |= {"ms": ms, "max_abs": difference, "cosine": worst}
    slower = ms / verdict.times["final"].p50_ms
    c.say("tvm", f"{ms:.1f} ms here, {slower:.1f}x the time of the same graph on {c.report.speed['device']}")
    if not worst >= SAME:
        raise GateError(
            f"the compiled library has cosine {worst:.5f} to onnxruntime on the same graph (limit {SAME:g})",
            next="leave out --target tvm, and report this",
        )
    close = difference <= CLOSE * max(1.0, largest)
    c.say("check", f"tvm differs from onnxruntime by {difference:.1e} at most", "pass" if close else "rounding differs")


def _open(folder: Path, model: Path, files: dict[str, bytes]) -> Executable:
    """The library as it will lie in the artifact, listed with its hash."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    listed: list[dict[str, Any]] = [{"name": n, "sha256": hashlib.sha256(d).hexdigest()} for n, d in files.items()]
    (folder / "edgetok.json").write_text(json.dumps({"files": listed}))
    (folder / "model.onnx").write_bytes(model.read_bytes())
    return BACKENDS.get("tvm").compile(folder / "model.onnx", Options(allow_native_code=True))


def _time_ms(run: Executable, feeds: Feeds) -> float:
    """Median of a few runs, milliseconds."""
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < _RUNS and (not times or time.perf_counter() - start < _SECONDS):
        before = time.perf_counter()
        run.run(feeds)
        times.append((time.perf_counter() - before) * 1000)
    return float(np.median(times))
