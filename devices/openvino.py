"""OpenVINO's CPU plugin (extra ``openvino``). One device, no heterogeneous mode: what it cannot convert is an error.

Precision is float32 unless ``INFERENCE_PRECISION_HINT`` says otherwise: OpenVINO's own default may be bfloat16.
"""

from __future__ import annotations

import queue
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from edgetok.devices._feeds import check_feeds, graph_specs, pick_outputs
from edgetok.devices._host import thread_count
from edgetok.devices._models import node_label, read_model, where_of
from edgetok.devices.base import Availability, Options, Placement, Stats
from edgetok.errors import ArtifactError, BackendError, EdgeTokError, InputError, UnsupportedError

FIX = 'pip install "edgetok[openvino]"'
DEVICE = "CPU"

# What ``Options.extra`` may set; values are checked by OpenVINO.
SETTINGS = (
    "INFERENCE_PRECISION_HINT",
    "INFERENCE_NUM_THREADS",
    "PERFORMANCE_HINT",
    "EXECUTION_MODE_HINT",
    "NUM_STREAMS",
    "ENABLE_CPU_PINNING",
    "ENABLE_HYPER_THREADING",
    "SCHEDULING_CORE_TYPE",
    "CPU_DENORMALS_OPTIMIZATION",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE",
    "KV_CACHE_PRECISION",
)
_NOT_WORK = {"Input", "Output", "Const"}


@cache
def _core() -> Any:
    import openvino

    return openvino.Core()


def _properties(options: Options) -> dict[str, Any]:
    """OpenVINO's properties for these options.

    Raises:
        InputError: a setting that is not in ``SETTINGS``.
    """
    properties: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": thread_count(options.threads),
        "PERFORMANCE_HINT": "LATENCY",
        "PERF_COUNT": options.profile,
    }
    for key, value in options.extra:
        if key.upper() not in SETTINGS:
            raise InputError(f"openvino has no setting {key!r}", next=f"use one of: {', '.join(SETTINGS)}")
        properties[key.upper()] = value
    return properties


def _message(exc: BaseException) -> str:
    """OpenVINO's message without the trail of C++ places."""
    lines = [line.strip() for line in str(exc).splitlines()]
    kept = [x for x in lines if x and not x.startswith(("Exception from", "Check ", "FrontEnd API failed"))]
    return " ".join(kept)[:500] or type(exc).__name__


_NO_RULE = re.compile(r"No conversion rule found for operations: ([^\s,]+)")


def _compile_error(exc: Exception, proto: onnx.ModelProto, where: str) -> EdgeTokError:
    hit = _NO_RULE.search(str(exc))
    if hit:
        op = hit[1].rpartition(".")[2]
        node = next((n for n in proto.graph.node if n.op_type == op), None)
        label = node_label(node) if node is not None else hit[1]
        return UnsupportedError(f"openvino cannot convert {label}", where=where, next="try --device cpu_ort")
    text = _message(exc)
    if "Unsupported property" in text or "for property key" in text:
        return InputError(f"openvino refuses a setting: {text}")
    return UnsupportedError(f"openvino cannot take this model: {text}", where=where, next="try --device cpu_ort")


class OpenVinoExecutable:
    """One compiled model; each run borrows an infer request, so that threads do not wait for one another's inputs."""

    def __init__(self, model: Path | bytes, options: Options) -> None:
        where = where_of(model)
        proto = read_model(model, weights=False)
        self.inputs, self._optional, self.outputs = graph_specs(proto.graph)
        properties = _properties(options)
        start = time.perf_counter()
        try:
            read = _core().read_model(model if isinstance(model, bytes) else str(model))
            self._compiled: Any = _core().compile_model(read, DEVICE, properties)
        except Exception as exc:  # OpenVINO raises RuntimeError for everything
            raise _compile_error(exc, proto, where) from exc
        used = list(self._compiled.get_property("EXECUTION_DEVICES"))
        if used != [DEVICE]:
            raise BackendError(f"openvino would run on {used}, not only on {DEVICE}", where=where)
        if len(self._compiled.outputs) != len(self.outputs):
            raise ArtifactError("openvino found another number of outputs than the graph declares", where=where)
        self._port = {spec.name: i for i, spec in enumerate(self.outputs)}
        self._stats = Stats(compile_seconds=time.perf_counter() - start)
        self._profile = options.profile
        self._judged = not options.optimize
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._total_us: defaultdict[str, float] = defaultdict(float)
        self._runs = 0

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Run once; see ``Executable.run``. The GIL is free while OpenVINO computes.

        Raises:
            InputError: closed, or wrong inputs.
        """
        compiled = self._compiled
        if compiled is None:
            raise InputError("this session is closed", next="load the model again")
        names = pick_outputs(self.outputs, outputs)
        checked = check_feeds(self.inputs, feeds, self._optional)
        dense = {name: np.asarray(value, order="C") for name, value in checked.items()}
        try:
            request = self._idle.get_nowait()
        except queue.Empty:
            request = compiled.create_infer_request()
        try:
            request.infer(dense, share_inputs=True, share_outputs=True)
            result = {name: np.array(request.get_output_tensor(self._port[name]).data) for name in names}
            if self._profile:
                self._collect(request)
        except Exception as exc:  # OpenVINO raises RuntimeError for everything
            raise InputError(
                f"the graph cannot run on these inputs: {_message(exc)}", next="check values and shapes of the inputs"
            ) from exc
        self._idle.put(request)
        return result

    def _collect(self, request: Any) -> None:
        with self._lock:
            self._runs += 1
            for info in request.get_profiling_info():
                self._total_us[info.node_name] += info.real_time.total_seconds() * 1e6

    def placement(self) -> Placement:
        """Nodes of the graph the plugin executes, by kernel family (first word of its implementation name)."""
        if self._compiled is None:
            raise InputError("this session is closed", next="load the model again")
        kernels: Counter[str] = Counter()
        ops: Counter[str] = Counter()
        for node in self._compiled.get_runtime_model().get_ordered_ops():
            info = node.get_rt_info()
            kind = str(info["layerType"].value)
            if kind in _NOT_WORK:
                continue
            ops[kind] += 1
            kernels[str(info["primitiveType"].value).split("_")[0] or "unknown"] += 1
        notes = ["openvino's own rewrites cannot be switched off"] if self._judged else []
        slow = kernels.get("ref", 0)
        if slow:
            notes.append(f"{slow} nodes run on plain reference kernels")
        return Placement(dict(kernels.most_common()), tuple(notes), dict(ops.most_common()))

    def stats(self) -> Stats:
        """Compile time; with ``Options.profile`` also mean microseconds per run by node."""
        with self._lock:
            if self._runs:
                self._stats.node_us = {name: us / self._runs for name, us in self._total_us.items() if us}
        return self._stats

    def close(self) -> None:
        """Drop the model; a second call does nothing."""
        self._compiled = None
        self._idle = queue.SimpleQueue()


class OpenVinoBackend:
    """The CPU plugin."""

    name = "openvino"

    def probe(self) -> Availability:
        """Yes when openvino imports and lists a CPU device."""
        try:
            import openvino

            if DEVICE not in _core().available_devices:
                return Availability(False, "openvino has no CPU plugin here", FIX, str(openvino.__version__))
            can = ", ".join(_core().get_property(DEVICE, "OPTIMIZATION_CAPABILITIES"))
            version = str(openvino.__version__).split("-")[0]
            return Availability(True, f"openvino {version}, CPU plugin ({can})", version=version)
        except ImportError:
            return Availability(False, "openvino is not installed", FIX)
        except Exception as exc:  # a probe never raises: a broken installation is an answer, too
            return Availability(False, f"openvino does not start: {_message(exc)}", FIX)

    def supports(self, node: onnx.NodeProto) -> bool:
        """Whether the ONNX front end has a rule for the operator (asked by converting a model of this one node)."""
        opsets = [helper.make_opsetid("", 18)]
        if node.domain not in ("", "ai.onnx"):
            opsets.append(helper.make_opsetid(node.domain, 1))
        ins = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in dict.fromkeys(node.input) if n]
        outs = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in node.output if n]
        graph = helper.make_graph([node], "probe", ins, outs)
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        try:
            _core().read_model(model.SerializeToString())
        except ImportError:
            return False
        except Exception as exc:  # a rule that dislikes the probe's float inputs is still a rule
            return _NO_RULE.search(str(exc)) is None
        return True

    def compile(self, model: Path | bytes, options: Options) -> OpenVinoExecutable:
        """Convert and compile.

        Raises:
            BackendError: openvino is missing, or would use another device.
            InputError: no such file, or a setting it does not know.
            UnsupportedError: an operator cannot be converted.
            ArtifactError: the file is malformed.
        """
        found = self.probe()
        if not found.ok:
            raise BackendError(found.reason, next=found.fix or None)
        return OpenVinoExecutable(model, options)


BACKEND = OpenVinoBackend()
