"""Target ``tvm``: the same reduced graph, compiled to a native library for this machine or another one."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx

from edgetok.tvm_build import UNTUNED, build, export, file_sha256, linker, require_tvm, target_of
from edgetok.tvm_graph import static_graph

BUILD_NAME = "build.json"


@dataclass(frozen=True)
class TvmFile:
    """A written file: its name in the output folder, size and digest."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class TvmReport:
    """What was compiled.

    Args:
        files: the library and ``build.json``, in that order.
        triple: the machine it runs on.
        mcpu: the CPU it may assume.
        kind: ``shared library``, or ``object archive`` when no linker for the machine was found.
        batch: the one batch size it takes.
        compile_seconds: import and compile time, without linking.
        notes: what a reader of the report must know.
    """

    files: tuple[TvmFile, ...]
    triple: str
    mcpu: str
    kind: str
    batch: int
    compile_seconds: float
    notes: tuple[str, ...]


def _specs(values: list[onnx.ValueInfoProto]) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for value in values:
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        found.append({"name": value.name, "dtype": dtype, "shape": [d.dim_value for d in tensor.shape.dim]})
    return found


def _notes(triple: str, batch: int, kind: str, open_batch: bool) -> tuple[str, ...]:
    notes = [UNTUNED]
    if open_batch:
        notes.append(f"the batch is fixed to {batch} in the library; the ONNX file beside it keeps it open")
    if kind == "object archive":
        notes.append(
            f"no C compiler that links for {triple} was found, so the library is a tar of object files: link it on a "
            f"machine that has one ({triple}-gcc -shared -fPIC -o model.so *.o)"
        )
    return tuple(notes)


def compile_tvm(
    model: onnx.ModelProto, *, triple: str | None = None, mcpu: str | None = None, out_dir: Path, batch: int = 1
) -> TvmReport:
    """Compile a converted graph and write ``model.so`` (or ``model.tar``) and ``build.json``.

    Args:
        model: cleaned up, attention open, opset 18, weights inside; its batch may be open.
        triple: the machine to compile for, as ``aarch64-linux-gnu``; this one when None.
        mcpu: LLVM's name of the CPU it may assume; this CPU, or the plainest of another machine, when None.
        out_dir: an existing folder, as ``targets/tvm/<triple>`` of the artifact.
        batch: the size an open batch axis is fixed to.

    Raises:
        BackendError: apache-tvm is not installed.
        InputError: unknown triple or CPU, batch below 1.
        UnsupportedError: the graph has an operator or an open axis that TVM cannot take.
    """
    version = require_tvm()
    machine, cpu = target_of(triple, mcpu)
    defaults = {t.name for t in model.graph.initializer}
    dims = [d for v in model.graph.input if v.name not in defaults for d in v.type.tensor_type.shape.dim]
    fixed = static_graph(model, batch)
    built = build(fixed, triple=machine, mcpu=cpu)
    library = export(built, out_dir)
    kind = "shared library" if linker(machine) else "object archive"
    notes = _notes(machine, batch, kind, any(not d.HasField("dim_value") for d in dims))
    digest = file_sha256(library)
    about = {
        "triple": machine,
        "mcpu": cpu,
        "kind": kind,
        "batch": batch,
        "tvm": version,
        "library": library.name,
        "sha256": digest,
        "inputs": _specs([v for v in fixed.graph.input if v.name not in defaults]),
        "outputs": _specs(list(fixed.graph.output)),
        "notes": list(notes),
    }
    note_file = out_dir / BUILD_NAME
    note_file.write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    files = tuple(TvmFile(p.name, p.stat().st_size, file_sha256(p)) for p in (library, note_file))
    return TvmReport(files, machine, cpu, kind, batch, built.seconds, notes)


def report_json(report: TvmReport) -> dict[str, object]:
    """The report as plain values, for ``--json``."""
    return asdict(report)
