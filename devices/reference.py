"""The judge: numpy, through the reference evaluator of the ``onnx`` package, slow and plain.

Operators of ``com.microsoft``, and the few standard ones to which the package is unfair, are in ``_reference_ops``.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import RuntimeContextError

from edgetok.devices._feeds import check_feeds, graph_specs, pick_outputs
from edgetok.devices._models import node_label, op_name, read_model, where_of
from edgetok.devices._reference_ops import OPS
from edgetok.devices.base import Availability, Options, Placement, Stats
from edgetok.errors import ArtifactError, EdgeTokError, InputError, UnsupportedError

_OURS = {(op.op_domain, op.__name__) for op in OPS}


def _prepare(proto: onnx.ModelProto) -> onnx.ModelProto:
    """One spelling of the standard domain, and no local functions (their order in the file is free)."""
    for opset in proto.opset_import:
        if opset.domain == "ai.onnx":
            opset.domain = ""
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    for node in proto.graph.node:
        if node.domain == "ai.onnx":
            node.domain = ""
    return proto


def _evaluator(proto: onnx.ModelProto, where: str) -> ReferenceEvaluator:
    try:
        return ReferenceEvaluator(proto, new_ops=list(OPS))
    except (NotImplementedError, onnx.defs.SchemaError) as exc:
        for node in proto.graph.node:
            if not BACKEND.supports(node):
                raise UnsupportedError(
                    f"the numpy reference has no {node_label(node)}",
                    where=where,
                    next="try --device cpu_ort",
                ) from exc
        raise UnsupportedError(f"the numpy reference cannot take this model: {exc}", where=where) from exc
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as exc:
        raise ArtifactError(f"the model is malformed: {_first_line(exc)}", where=where) from exc


def _first_line(exc: BaseException) -> str:
    cause = exc.__cause__ or exc
    return (str(cause).splitlines() or [type(cause).__name__])[0][:300]


class ReferenceExecutable:
    """One evaluator. Runs are serialised: this device is for judging, not for speed."""

    def __init__(self, model: Path | bytes, options: Options) -> None:
        start = time.perf_counter()
        if options.extra:
            raise InputError(f"the reference has no setting {options.extra[0][0]!r}")
        where = where_of(model)
        proto = _prepare(read_model(model))
        self.inputs, self._optional, self.outputs = graph_specs(proto.graph)
        self._ops = Counter(op_name(n.domain, n.op_type) for n in proto.graph.node)
        self._evaluator: ReferenceEvaluator | None = _evaluator(proto, where)
        self._stats = Stats(compile_seconds=time.perf_counter() - start)
        self._lock = threading.Lock()

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Run once; see ``Executable.run``.

        Raises:
            InputError: closed, wrong inputs, or the graph cannot run on these values.
            UnsupportedError: a form of an operator that the reference lacks.
        """
        evaluator = self._evaluator
        if evaluator is None:
            raise InputError("this session is closed", next="load the model again")
        names = pick_outputs(self.outputs, outputs)
        checked = check_feeds(self.inputs, feeds, self._optional)
        try:
            with self._lock, np.errstate(all="ignore"):
                values = evaluator.run(names, checked)
        except EdgeTokError:
            raise
        except NotImplementedError as exc:
            raise UnsupportedError(f"the numpy reference cannot run this: {_first_line(exc)}") from exc
        except Exception as exc:  # numpy and the evaluator raise many kinds for values that do not fit the graph
            raise InputError(
                f"the graph cannot run on these inputs: {_first_line(exc)}",
                next="check values and shapes of the inputs",
            ) from exc
        return dict(zip(names, values, strict=True))

    def placement(self) -> Placement:
        return Placement({"numpy": sum(self._ops.values())}, (), dict(self._ops.most_common()))

    def stats(self) -> Stats:
        return self._stats

    def close(self) -> None:
        """Drop the model; a second call does nothing."""
        self._evaluator = None


class ReferenceBackend:
    """Numpy."""

    name = "reference"

    def probe(self) -> Availability:
        """Always yes: numpy and onnx are required dependencies."""
        return Availability(True, f"numpy {np.__version__}, onnx {onnx.__version__}", version=str(onnx.__version__))

    def supports(self, node: onnx.NodeProto) -> bool:
        """Whether the evaluator's registry, or ours, has the operator in its latest version."""
        domain = "" if node.domain == "ai.onnx" else node.domain
        if (domain, node.op_type) in _OURS:
            return True
        version = onnx.defs.onnx_opset_version() if domain == "" else 1
        probe = ReferenceEvaluator.__new__(ReferenceEvaluator)
        probe.opsets_ = {domain: version}
        probe.new_ops_ = {}
        probe.functions_ = {}
        try:
            probe._load_impl(node)
        except RuntimeContextError:
            return True  # a function whose body depends on input types: expanded when those are known
        except Exception:  # the registry answers no in several ways
            return False
        return True

    def compile(self, model: Path | bytes, options: Options) -> ReferenceExecutable:
        """Parse and check that every operator is known.

        Raises:
            InputError: no such file, or a setting was given.
            UnsupportedError: an operator is unknown.
            ArtifactError: the model is malformed.
        """
        return ReferenceExecutable(model, options)


BACKEND = ReferenceBackend()
