"""apache-tvm (extra ``tvm``), untuned: correct and slow. It is the check of what the ``tvm`` target ships.

The graph is compiled from the ONNX and the library kept in the user cache, keyed by content and CPU. A library that
came with an artifact is native code of somebody else's: it is loaded only with ``allow_native_code``, and after its
hash was checked.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgetok.atomic import staging
from edgetok.devices._feeds import check_feeds, graph_specs, pick_outputs, show_shape
from edgetok.devices._host import thread_count
from edgetok.devices._models import op_name, read_model, where_of
from edgetok.devices.base import Availability, Options, Placement, Stats, TensorSpec
from edgetok.errors import ArtifactError, BackendError, InputError, IntegrityError, UnsupportedError
from edgetok.paths import cache_dir
from edgetok.tvm_build import (
    FIX,
    UNTUNED,
    build,
    export,
    file_sha256,
    host_cpu,
    host_triple,
    linker,
    require_tvm,
)
from edgetok.tvm_graph import check_graph, lookup_inputs, operators, static_graph

_MANIFEST = "edgetok.json"
_BUILD = "build.json"


def _settings(options: Options) -> int:
    """The batch asked for.

    Raises:
        InputError: an unknown setting, or a batch that is no number.
    """
    thread_count(options.threads)  # refuses a negative count; the untuned code runs on the calling thread
    batch = "1"
    for key, value in options.extra:
        if key != "batch":
            raise InputError(f"tvm has no setting {key!r}", next="use batch=N")
        batch = value
    if not batch.isascii() or not batch.isdigit() or int(batch) < 1:
        raise InputError(f"batch must be a whole number of 1 or more, got {batch!r}")
    return int(batch)


def shipped_library(model: Path, batch: int) -> tuple[Path | None, str]:
    """(library beside the model that fits this machine and batch, or None, and why not).

    Raises:
        IntegrityError: the manifest does not list it, or its bytes are not those listed.
        ArtifactError: its description is malformed.
    """
    name = f"targets/tvm/{host_triple()}"
    folder = model.parent / name
    if not (folder / _BUILD).is_file():
        return None, f"the artifact has no {name}"
    try:
        about = json.loads((folder / _BUILD).read_bytes())
        listed = {f["name"]: f["sha256"] for f in json.loads((model.parent / _MANIFEST).read_bytes())["files"]}
        library, cpu, size, kind = about["library"], about["mcpu"], about["batch"], about["kind"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ArtifactError(f"the description of the packed library is malformed: {exc}", where=str(folder)) from exc
    if library not in ("model.so", "model.tar"):
        raise ArtifactError(f"unexpected library name {str(library)[:80]!r}", where=str(folder / _BUILD))
    path = folder / library
    if listed.get(f"{name}/{library}") != file_sha256(path):
        raise IntegrityError("the packed library is not the one the manifest lists", where=str(path))
    if kind != "shared library":
        return None, "the packed library is an archive of objects, not linked"
    if cpu != host_cpu() and cpu not in ("generic", "x86-64"):
        return None, f"the packed library is for a {cpu}, this is a {host_cpu()}"
    if size != batch:
        return None, f"the packed library is for batch {size}, {batch} was asked for"
    return path, ""


def _cached(fixed: onnx.ModelProto, version: str) -> Path | None:
    """The library for this graph from the user cache, compiled and kept there first when it is new.

    None when there is no C compiler to link it: the caller then compiles in memory.
    """
    if linker(host_triple()) is None:
        return None
    key = hashlib.sha256(version.encode() + b"\0" + fixed.SerializeToString(deterministic=True)).hexdigest()
    folder = cache_dir() / "tvm" / f"{key}-{host_cpu()}"
    library, note = folder / "model.so", folder / _BUILD
    try:
        if json.loads(note.read_bytes())["sha256"] == file_sha256(library):
            return library
    except (OSError, ValueError, KeyError, TypeError):
        pass  # new, or left broken: made again below
    with staging(folder, folder=True, replace=True) as temp:
        temp.chmod(0o700)
        written = export(build(fixed), temp)
        (temp / _BUILD).write_text(json.dumps({"sha256": file_sha256(written), "tvm": version}), encoding="utf-8")
    return library


def _fits(shape: tuple[int, ...], declared: tuple[int | str | None, ...] | None) -> bool:
    """Whether a shape is the declared one, where that is a number."""
    if declared is None:
        return True
    return len(shape) == len(declared) and all(
        have == want or not isinstance(want, int) for have, want in zip(shape, declared, strict=True)
    )


class TvmExecutable:
    """One relax virtual machine. Runs are serialised: it has one frame."""

    def __init__(self, model: Path | bytes, options: Options) -> None:
        version = require_tvm()
        import tvm
        from tvm import relax

        start = time.perf_counter()
        batch = _settings(options)
        proto = read_model(model)
        fixed = static_graph(proto, batch)
        check_graph(fixed)
        self.inputs, optional, self.outputs = graph_specs(fixed.graph)
        if optional:
            raise ArtifactError(
                f"input {optional[0].name!r} has a default value, which TVM drops", where=where_of(model)
            )
        self._ops = Counter(op_name(n.domain, n.op_type) for n in fixed.graph.node)
        self._notes = [UNTUNED, f"batch {batch}, one thread"]
        library: Path | None = None
        if options.allow_native_code and isinstance(model, Path):
            library, why = shipped_library(model, batch)
            self._notes.append(f"library of the artifact: {library}" if library else f"compiled here: {why}")
        library = library or _cached(fixed, version)
        code = tvm.runtime.load_module(str(library)) if library else build(fixed).executable
        self._device = tvm.cpu()
        self._machine: Any = relax.VirtualMachine(code, self._device)
        self._slots = [tvm.runtime.empty(tuple(s.shape or ()), s.dtype, self._device) for s in self.inputs]
        self._tables = lookup_inputs(fixed.graph)
        self._lock = threading.Lock()
        self._stats = Stats(compile_seconds=time.perf_counter() - start)

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Run once; see ``Executable.run``. Shapes are fixed.

        Raises:
            InputError: closed, or wrong inputs.
        """
        names = pick_outputs(self.outputs, outputs)
        checked = check_feeds(self.inputs, feeds)
        for name, size in self._tables.items():
            if checked[name].size and not -size <= checked[name].min() <= checked[name].max() < size:
                raise InputError(
                    f"values must be below {size}", where=f"input {name!r}", next="use the right tokenizer"
                )
        with self._lock:
            if self._machine is None:
                raise InputError("this session is closed", next="load the model again")
            for slot, spec in zip(self._slots, self.inputs, strict=True):
                slot.copyfrom(np.asarray(checked[spec.name], order="C"))
            try:
                result = self._machine["main"](*self._slots)
            except Exception as exc:  # TVM raises many kinds, with a long C++ trail
                last = (str(exc).strip().splitlines() or [type(exc).__name__])[-1]
                raise InputError(f"the graph cannot run on these inputs: {last[:300]}") from exc
        values = [result] if hasattr(result, "numpy") else list(result)
        arrays = {spec.name: self._array(spec, values, i) for i, spec in enumerate(self.outputs)}
        return {name: arrays[name] for name in names}

    def _array(self, spec: TensorSpec, values: list[Any], index: int) -> np.ndarray:
        """An output as numpy, held against its spec: the front end is known to make other types for some graphs."""
        value: Any = values[index] if index < len(values) else None
        array = value.numpy() if hasattr(value, "numpy") else None
        if array is None or array.dtype.name != spec.dtype or not _fits(array.shape, spec.shape):
            found = "nothing" if array is None else f"{array.dtype.name} {show_shape(array.shape)}"
            expected = f"{spec.dtype} {show_shape(spec.shape or ())}"
            raise UnsupportedError(
                f"TVM gives {found} where the graph says {expected}",
                where=f"output {spec.name!r}",
                next="try --device cpu_ort",
            )
        return array

    def placement(self) -> Placement:
        """Nodes of the ONNX graph, all compiled to native code."""
        return Placement({"tvm": sum(self._ops.values())}, tuple(self._notes), dict(self._ops.most_common()))

    def stats(self) -> Stats:
        return self._stats

    def close(self) -> None:
        """Drop the machine; a second call does nothing."""
        with self._lock:
            self._machine = None
            self._slots = []


class TvmBackend:
    """TVM's virtual machine on the CPU."""

    name = "tvm"

    def probe(self) -> Availability:
        """Yes when apache-tvm imports; the reason says that it is slow."""
        try:
            version = require_tvm()
        except BackendError as exc:
            return Availability(False, exc.message, FIX)
        return Availability(True, f"apache-tvm {version}, untuned: far slower than cpu_ort", version=version)

    def supports(self, node: onnx.NodeProto) -> bool:
        """Whether the front end converts the operator (with fixed shapes, and a constant count for TopK)."""
        try:
            require_tvm()
        except BackendError:
            return False
        return node.domain in ("", "ai.onnx") and node.op_type in operators()

    def compile(self, model: Path | bytes, options: Options) -> TvmExecutable:
        """Compile, or take from the user cache.

        Raises:
            BackendError: apache-tvm is missing.
            InputError: no such file, or an unknown setting.
            UnsupportedError: an operator or an open axis that TVM cannot take.
            ArtifactError: the file is malformed.
            IntegrityError: a packed library is not the one listed.
        """
        require_tvm()
        return TvmExecutable(model, options)


BACKEND = TvmBackend()
