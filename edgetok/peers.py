"""Other engines on the source model, at their own recommended settings, to be timed in the same run.

A peer is opened on the source file and closed after; it says its version and what it was told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgetok.devices.base import TensorSpec
from edgetok.errors import ArtifactError, BackendError, EdgeTokError, InputError

Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Engine:
    """Something that runs one model.

    Args:
        name: as in reports ("edgetok", "onnxruntime", "openvino").
        version: of the library underneath.
        note: settings worth a word in the table, as "bf16".
        inputs: of the model.
        call: one run, name to array in and out.
        prepare: told the shapes of the feeds before the first run, so that an engine that wants them can compile.
        close: frees it.
        device: as in reports.
    """

    name: str
    version: str
    note: str
    inputs: Sequence[TensorSpec]
    call: Callable[[Feeds], dict[str, np.ndarray]]
    prepare: Callable[[Feeds], None]
    close: Callable[[], None]
    device: str = "cpu"


def _nothing(*_: object) -> None:
    return None


def open_onnxruntime(model: Path, threads: int) -> Engine:
    """Stock onnxruntime: full graph optimisation, CPU provider, sequential.

    Its worker threads stop spinning when a run ends, so that they take nothing from whoever is timed next.

    Raises:
        BackendError: not installed.
        ArtifactError: onnxruntime refuses the model.
    """
    from edgetok.devices import BACKENDS

    found = BACKENDS.get("cpu_ort").probe()
    if not found.ok:
        raise BackendError(found.reason, where="peer onnxruntime", next=found.fix or None)
    import onnxruntime as ort

    so = ort.SessionOptions()
    so.log_severity_level = 3
    so.intra_op_num_threads = threads
    so.inter_op_num_threads = 1
    so.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    so.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = ort.InferenceSession(str(model), so, providers=["CPUExecutionProvider"])
    except Exception as exc:  # onnxruntime's own classes have no common public base
        raise ArtifactError(f"onnxruntime refuses the model: {exc}", where=str(model)) from exc
    names = [o.name for o in session.get_outputs()]

    def call(feeds: Feeds) -> dict[str, np.ndarray]:
        return dict(zip(names, session.run(None, dict(feeds)), strict=True))

    inputs = [_ort_spec(a) for a in session.get_inputs()]
    return Engine("onnxruntime", ort.__version__, "stock", inputs, call, _nothing, _nothing)


def _ort_spec(arg: Any) -> TensorSpec:
    kinds = {"float": "float32", "double": "float64", "string": "str"}
    kind = arg.type.removeprefix("tensor(").removesuffix(")")
    shape = tuple(s if isinstance(s, int | str) and s != "" else None for s in arg.shape)
    return TensorSpec(arg.name, kinds.get(kind, kind), shape)


def open_openvino(model: Path, threads: int) -> Engine:
    """OpenVINO on the CPU at its latency hint, at the precision it chooses itself (bf16 where the CPU has it).

    Raises:
        BackendError: not installed.
        ArtifactError: OpenVINO refuses the model.
    """
    try:
        import openvino as ov
    except ImportError as exc:
        raise BackendError(
            f"openvino cannot be imported: {exc}", where="peer openvino", next="pip install 'edgetok[openvino]'"
        ) from exc
    core = ov.Core()
    try:
        graph = core.read_model(str(model))
    except RuntimeError as exc:
        raise ArtifactError(f"OpenVINO refuses the model: {_first(exc)}", where=str(model)) from exc
    state: dict[str, Any] = {}
    inputs = [_ov_spec(p) for p in graph.inputs]

    def prepare(feeds: Feeds) -> None:
        fixed = graph.clone()
        fixed.reshape({name: list(array.shape) for name, array in feeds.items()})
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        try:
            compiled = core.compile_model(fixed, "CPU", settings)
        except RuntimeError as exc:
            raise ArtifactError(f"OpenVINO refuses the model: {_first(exc)}", where=str(model)) from exc
        state["names"] = [o.get_any_name() for o in compiled.outputs]
        state["request"] = compiled.create_infer_request()

    def call(feeds: Feeds) -> dict[str, np.ndarray]:
        if not state:
            prepare(feeds)
        found = state["request"].infer(dict(feeds), share_inputs=True)
        return dict(zip(state["names"], found.values(), strict=True))

    precision = str(core.get_property("CPU", "INFERENCE_PRECISION_HINT")).split("'")
    note = "latency hint, " + {"bfloat16": "bf16", "float": "fp32", "f32": "fp32"}.get(
        precision[1] if len(precision) > 1 else "", "own precision"
    )
    return Engine("openvino", ov.__version__.split("-")[0], note, inputs, call, prepare, state.clear)


def _first(exc: Exception) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0][:300]


def _ov_spec(port: Any) -> TensorSpec:
    shape = port.get_partial_shape()
    axes = None if shape.rank.is_dynamic else tuple(d.get_length() if d.is_static else None for d in shape)
    return TensorSpec(port.get_any_name(), port.get_element_type().to_dtype().name, axes)


PEERS: dict[str, Callable[[Path, int], Engine]] = {
    "onnxruntime": open_onnxruntime,
    "openvino": open_openvino,
}


def open_peer(name: str, model: Path, threads: int) -> Engine:
    """Open a peer by name on an ONNX file.

    Raises:
        InputError: no such peer.
        EdgeTokError: it is not installed or refuses the model.
    """
    if name not in PEERS:
        raise InputError(f"unknown peer {name!r}", next=f"choose one of: {', '.join(PEERS)}")
    try:
        return PEERS[name](model, threads)
    except EdgeTokError:
        raise
    except Exception as exc:
        raise BackendError(f"{type(exc).__name__}: {_first(exc)}", where=f"peer {name}") from exc


def open_session(path: Path, device: str, threads: int, *, native: bool = False) -> Engine:
    """An artifact or model on one of our devices, as an engine to be timed.

    Raises:
        EdgeTokError: it cannot be loaded there.
    """
    from edgetok.runtime.session import load

    session = load(path, device=device, threads=threads, allow_native_code=native)
    name = str(getattr(session, "device", device)).replace("_", "-")
    return Engine(
        "edgetok",
        "",
        "",
        tuple(session.inputs),
        lambda values: session.run(values),
        lambda values: None,
        session.close,
        device=name,
    )
