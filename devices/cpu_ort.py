"""onnxruntime's CPU provider, and only that one: a node it cannot run is an error, never a detour."""

from __future__ import annotations

import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import onnx

from edgetok.devices._feeds import OPAQUE, check_feeds, pick_outputs
from edgetok.devices._host import thread_count
from edgetok.devices._models import op_name, where_of
from edgetok.devices._ort_profile import NodeTimes, read_profile
from edgetok.devices.base import Availability, Options, Placement, Stats, TensorSpec
from edgetok.errors import ArtifactError, BackendError, EdgeTokError, InputError, ResourceError, UnsupportedError

PROVIDER = "CPUExecutionProvider"
_KEEP_BYTES = 32 << 20  # a model given as bytes is kept up to this size, so that placement() can look again

# What ``Options.extra`` may set. allow_spinning=0 lets worker threads sleep between nodes: slower alone,
# kinder when another thread pool shares the cores.
_SETTINGS = {
    "allow_spinning": "session.intra_op.allow_spinning",
    "force_spinning_stop": "session.force_spinning_stop",
    "denormal_as_zero": "session.set_denormal_as_zero",
    "dynamic_block_base": "session.dynamic_block_base",
    "qdq_cleanup": "session.enable_quant_qdq_cleanup",
    "disable_qdq": "session.disable_quant_qdq",
    "gemm_fastmath_bf16": "mlas.enable_gemm_fastmath_arm64_bfloat16",
}
_REINSTALL = "pip install --force-reinstall onnxruntime"
# Rewrites that make a graph slower on the CPU provider of onnxruntime 1.31: its SkipLayerNormalization takes about
# twice the time of the Add and LayerNormalization it replaces (7 % of a BERT of six layers in fp32, 17 % in int8).
_SLOWER = ("SkipLayerNormFusion",)
_SWITCHES = ("memory_arena", "memory_pattern")

_PASSES = {OPAQUE, "str", "bool", "float16", "float32", "float64"} | {
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}
_TYPES = {
    "float": "float32",
    "double": "float64",
    "string": "str",
    "float8e4m3fn": "float8_e4m3fn",
    "float8e4m3fnuz": "float8_e4m3fnuz",
    "float8e5m2": "float8_e5m2",
    "float8e5m2fnuz": "float8_e5m2fnuz",
}


def _ort() -> Any:
    import onnxruntime

    return onnxruntime


def _spec(arg: Any) -> TensorSpec:
    kind = re.fullmatch(r"tensor\((\w+)\)", arg.type)
    if kind is None:
        return TensorSpec(arg.name, OPAQUE, None)
    shape = tuple(s if isinstance(s, (int, str)) and s != "" else None for s in arg.shape)
    return TensorSpec(arg.name, _TYPES.get(kind[1], kind[1]), shape)


def _session_options(ort: Any, options: Options) -> Any:
    so = ort.SessionOptions()
    so.log_severity_level = 4  # errors reach the caller as exceptions
    so.intra_op_num_threads = thread_count(options.threads)
    so.inter_op_num_threads = 1
    so.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    levels = ort.GraphOptimizationLevel
    so.graph_optimization_level = levels.ORT_ENABLE_ALL if options.optimize else levels.ORT_DISABLE_ALL
    # Workers spin between nodes but not after a run: left spinning, they take a core from whoever runs next (a second
    # session timed in turn with this one measured 20 % slower on two cores; alone it makes no difference).
    so.add_session_config_entry("session.force_spinning_stop", "1")
    for key, value in options.extra:
        if key in _SETTINGS:
            so.add_session_config_entry(_SETTINGS[key], value)
        elif key in _SWITCHES:
            on = value not in ("0", "false", "off")
            setattr(so, {"memory_arena": "enable_cpu_mem_arena", "memory_pattern": "enable_mem_pattern"}[key], on)
        else:
            known = ", ".join(sorted([*_SETTINGS, *_SWITCHES]))
            raise InputError(f"cpu_ort has no setting {key!r}", next=f"use one of: {known}")
    return so


def _open(ort: Any, model: Path | bytes, so: Any) -> Any:
    if isinstance(model, bytes):
        # Without this, onnxruntime looks for external data in the current folder, whoever named the file.
        so.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", "/nonexistent-edgetok-bytes-have-no-folder"
        )
        source: str | bytes = model
    else:
        source = str(model)
    session = ort.InferenceSession(source, so, providers=[PROVIDER], disabled_optimizers=list(_SLOWER))
    session.disable_fallback()
    return session


_ELSEWHERE = "try --device openvino or --device reference, or convert the model again at opset 18"
_NO_KERNEL = re.compile(r"implementation for (?P<op>[\w.]+\(\d+\)) node with name '(?P<node>.*?)'")
_NO_TYPE = re.compile(r"Failed to find kernel for (?P<op>[\w.]+\(\d+\)) \(node:'?(?P<node>.*?)'? ep:")
_NO_OP = re.compile(r"Fatal error: (?P<op>[\w.]*:?\w+\(-?\d+\)) is not a registered")
_NO_SCHEMA = re.compile(r'In Node, \("(?P<node>.*?)", (?P<op>\w+), .*No Op registered for', re.DOTALL)


def _node_name(model: Path | bytes, op: str) -> str:
    """Name of the first node of that operator (``domain:Op(version)``), for an error that lacks it."""
    wanted = op.rpartition(":")[2].partition("(")[0]
    try:
        if isinstance(model, bytes):
            graph = onnx.load_model_from_string(model).graph
        else:
            graph = onnx.load(str(model), load_external_data=False).graph
    except Exception:  # the message is better without a name than replaced by another error
        return ""
    return next((n.name for n in graph.node if n.op_type == wanted), "")


def _compile_error(exc: Exception, model: Path | bytes, where: str) -> EdgeTokError:
    """The error to raise for what onnxruntime said while it built a session."""
    text = str(exc).strip()
    for pattern in (_NO_KERNEL, _NO_TYPE, _NO_OP, _NO_SCHEMA):
        hit = pattern.search(text)
        if hit:
            found = hit.groupdict()
            name = found.get("node") or _node_name(model, found["op"])
            node = f"node {name!r}" if name else "a node without a name"
            return UnsupportedError(
                f"onnxruntime's CPU provider has no kernel for {found['op']} ({node})",
                where=where,
                next=_ELSEWHERE,
            )
    if "Unsupported model IR version" in text or "under development and support for this is limited" in text:
        return UnsupportedError(
            f"this onnxruntime does not know the model's version: {_last_part(text)}",
            where=where,
            next="pip install --upgrade onnxruntime, or export at opset 18",
        )
    if "not supported" in text:
        return UnsupportedError(f"onnxruntime refuses the model: {_last_part(text)}", where=where, next=_ELSEWHERE)
    if isinstance(exc, MemoryError) or "Failed to allocate" in text or "bad allocation" in text:
        return ResourceError("not enough memory to load the model", where=where, next="close other programs")
    if "External data" in text or "external data" in text:
        return ArtifactError(
            f"its external data cannot be used: {_last_part(text)}",
            where=where,
            next="keep the data file beside the .onnx file and pass the path, not bytes",
        )
    return ArtifactError(
        f"onnxruntime cannot load the model: {_last_part(text)}",
        where=where,
        next="edgetok inspect shows what is in the file",
    )


def _last_part(text: str) -> str:
    """onnxruntime's message without its code prefix and C++ file names, on one line."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"/onnxruntime_src/\S+ .*?\) (?=[A-Z])", "", text)
    return " ".join(text.split())[:500]


def _run_error(exc: Exception) -> EdgeTokError:
    text = _last_part(str(exc))
    if "Failed to allocate" in text or "bad allocation" in text:
        return ResourceError(f"not enough memory to run: {text}", next="use a smaller batch")
    kind = type(exc).__name__
    if kind == "NotImplemented" or "not supported" in text:
        return UnsupportedError(f"onnxruntime's CPU provider cannot run this: {text}", next="try --device reference")
    return InputError(f"the graph cannot run on these inputs: {text}", next="check values and shapes of the inputs")


def _require_numpy_types(specs: Sequence[TensorSpec], where: str) -> None:
    for spec in specs:
        if spec.dtype not in _PASSES:
            raise UnsupportedError(
                f"onnxruntime's Python binding does not take {spec.dtype} arrays (tensor {spec.name!r})",
                where=where,
                next="cast inside the graph, so that inputs and outputs are float32, float16 or integers",
            )


class OrtExecutable:
    """One onnxruntime session. ``run`` may be called from many threads; it releases the GIL while it computes."""

    def __init__(self, model: Path | bytes, options: Options) -> None:
        ort = _ort()
        self._options = options
        self._where = where_of(model)
        keep = not isinstance(model, bytes) or len(model) <= _KEEP_BYTES
        self._model: Path | bytes | None = model if keep else None
        so = _session_options(ort, options)
        so.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        self._profile_dir = tempfile.TemporaryDirectory(prefix="edgetok-ort-") if options.profile else None
        if self._profile_dir:
            so.enable_profiling = True
            so.profile_file_prefix = str(Path(self._profile_dir.name) / "ort")
        start = time.perf_counter()
        try:
            self._session: Any = _open(ort, model, so)
        except EdgeTokError:
            raise
        except Exception as exc:  # onnxruntime's exceptions share no base of their own
            raise _compile_error(exc, model, self._where) from exc
        self._stats = Stats(compile_seconds=time.perf_counter() - start)
        self._require_cpu_only(self._session)
        self.inputs = tuple(_spec(a) for a in self._session.get_inputs())
        self.outputs = tuple(_spec(a) for a in self._session.get_outputs())
        self._optional = tuple(_spec(a) for a in self._session.get_overridable_initializers())
        _require_numpy_types((*self.inputs, *self.outputs), self._where)
        self._lock = threading.Lock()
        self._times: NodeTimes | None = None

    def _require_cpu_only(self, session: Any) -> None:
        others = [p for p in session.get_providers() if p != PROVIDER]
        if others:
            raise BackendError(f"onnxruntime added {', '.join(others)} beside {PROVIDER}", where=self._where)

    def _live(self) -> Any:
        session = self._session
        if session is None:
            raise InputError("this session is closed", next="load the model again")
        return session

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Run once.

        Args:
            feeds: input name to array or DLPack tensor of the dtype and shape in ``inputs``.
            outputs: names wanted, all in graph order when None.

        Returns:
            output name to a new array.

        Raises:
            InputError: the session is closed, an input is missing, unknown, or of a wrong dtype or shape.
            ResourceError: not enough memory.
        """
        session = self._live()
        names = pick_outputs(self.outputs, outputs)
        checked = check_feeds(self.inputs, feeds, self._optional)
        try:
            values = session.run(names, checked)
        except Exception as exc:
            raise _run_error(exc) from exc
        return dict(zip(names, values, strict=True))

    def placement(self) -> Placement:
        """Nodes after onnxruntime's rewrites: the optimised graph is built once more, written out and counted."""
        session = self._live()
        if self._model is None:
            ops = Counter(
                op_name(n.domain, n.op_type)
                for part in session.get_provider_graph_assignment_info()
                for n in part.get_nodes()
            )
            note = "counted before onnxruntime's last fusions: load from a path, not bytes, to count after them"
            return Placement({PROVIDER: sum(ops.values())}, (note,), dict(ops))
        ops = Counter(_optimised_ops(self._model, self._options))
        return Placement({PROVIDER: sum(ops.values())}, (), dict(ops.most_common()))

    def stats(self) -> Stats:
        """Compile time; with ``Options.profile`` also mean microseconds per run by node.

        The first call ends the collection: later runs are not profiled.
        """
        with self._lock:
            if self._profile_dir and self._times is None and self._session is not None:
                self._times = read_profile(Path(self._session.end_profiling()))
                self._stats.node_us = self._times.mean_us
        return self._stats

    def close(self) -> None:
        """Drop the session; a second call does nothing. Runs already started finish."""
        with self._lock:
            if self._profile_dir and self._session is not None and self._times is None:
                self._session.end_profiling()
            if self._profile_dir:
                self._profile_dir.cleanup()
            self._session = None
            self._model = None


def _optimised_ops(model: Path | bytes, options: Options) -> list[str]:
    """Operator of every node of the graph onnxruntime really runs."""
    ort = _ort()
    with tempfile.TemporaryDirectory(prefix="edgetok-ort-") as folder:
        path = Path(folder) / "optimised.onnx"
        so = _session_options(ort, options)
        so.optimized_model_filepath = str(path)
        so.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        so.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        _open(ort, model, so)
        graph = onnx.load(str(path), load_external_data=False).graph
    return [op_name(n.domain, n.op_type) for n in graph.node]


@cache
def _kernels() -> frozenset[tuple[str, str]]:
    """(domain, operator) of every kernel of the CPU provider, from onnxruntime's own registry."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return frozenset(
        ("" if k.domain == "ai.onnx" else k.domain, k.op_name)
        for k in state.get_all_opkernel_def()
        if k.provider == PROVIDER
    )


def _inlined(op_type: str, domain: str) -> bool:
    """Whether ONNX defines the operator by others that all have kernels (onnxruntime inlines those)."""
    try:
        schema: Any = onnx.defs.get_schema(op_type, domain=domain)
    except onnx.defs.SchemaError:
        return False
    if not schema.has_function:
        return False
    kernels = _kernels()
    return all(
        n.op_type == "Constant" or (n.domain, n.op_type) in kernels or _inlined(n.op_type, n.domain)
        for n in schema.function_body.node
    )


class CpuOrtBackend:
    """The default device for encoders."""

    name = "cpu_ort"

    def probe(self) -> Availability:
        """Yes when onnxruntime imports and offers its CPU provider."""
        try:
            ort = _ort()
            if PROVIDER not in ort.get_available_providers():
                return Availability(False, f"this onnxruntime has no {PROVIDER}", _REINSTALL)
            return Availability(True, f"onnxruntime {ort.__version__}, {PROVIDER}", version=str(ort.__version__))
        except Exception as exc:  # a probe never raises: a broken installation is an answer, too
            return Availability(False, f"onnxruntime does not import: {exc}", _REINSTALL)

    def supports(self, node: onnx.NodeProto) -> bool:
        """Whether the CPU provider has a kernel for the operator, in some version and for some type."""
        domain = "" if node.domain == "ai.onnx" else node.domain
        if (domain, node.op_type) in _kernels():
            return True
        return _inlined(node.op_type, domain)

    def compile(self, model: Path | bytes, options: Options) -> OrtExecutable:
        """Build a session.

        Raises:
            InputError: no such file, or an unknown setting.
            UnsupportedError: an operator has no CPU kernel, or the model is newer than this onnxruntime.
            ArtifactError: the file is malformed, or its external data is not beside it.
        """
        if isinstance(model, Path) and not model.is_file():
            raise InputError("no such model file", where=str(model), next="check the path")
        return OrtExecutable(model, options)


BACKEND = CpuOrtBackend()

__all__ = ["BACKEND", "CpuOrtBackend", "OrtExecutable"]
