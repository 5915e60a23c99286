"""Small helpers to edit graphs and to run them while quantizing."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgetok.errors import InputError, UnsupportedError

_IN_MEMORY_BYTES = 1_500_000_000  # protobuf messages end at 2 GiB


class Editor:
    """Adds nodes and initializers with unique, repeatable names to one graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.names = {v.name for v in graph.inputs} | set(graph.initializers)
        for node in graph:
            self.names.update(v.name for v in node.outputs)

    def unique(self, name: str) -> str:
        """``name``, or ``name_1`` and so on if it is taken."""
        candidate, count = name, 0
        while candidate in self.names:
            count += 1
            candidate = f"{name}_{count}"
        self.names.add(candidate)
        return candidate

    def const(self, name: str, array: np.ndarray) -> ir.Value:
        """A new initializer."""
        name = self.unique(name)
        tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)  # 0-d stays 0-d
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def node(
        self,
        before: ir.Node,
        op: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        attributes: Mapping[str, Any] | None = None,
        *,
        outputs: int = 1,
        domain: str = "",
    ) -> ir.Node:
        """A new node placed before another; its outputs are called ``name``, ``name.1`` and so on."""
        new = ir.node(op, inputs, attributes or {}, domain=domain, num_outputs=outputs, name=name)
        for i, value in enumerate(new.outputs):
            value.name = self.unique(name if i == 0 else f"{name}.{i}")
        self.graph.insert_before(before, new)
        return new


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of ``old`` read ``new``, remove the node of ``old``, and give ``new`` its name and type."""
    node, name = old.producer(), old.name
    new.type, new.shape = old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if node is not None and node.graph is not None:
        node.graph.remove(node, safe=True)  # type: ignore[union-attr]
    new.name = name


def drop_unused(model: ir.Model) -> None:
    """Remove nodes and initializers nothing reads any more."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
    for name in [n for n, v in model.graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
        if not model.graph.initializers[name].is_graph_input():
            del model.graph.initializers[name]


def open_session(model: ir.Model, *, threads: int, extra_outputs: Iterable[str] = ()) -> Any:
    """An onnxruntime CPU session of the model, with more values as outputs.

    Raises:
        UnsupportedError: onnxruntime cannot run the graph.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    proto = ir.to_proto(model)
    have = {o.name for o in proto.graph.output}
    for name in extra_outputs:
        if name not in have:
            proto.graph.output.add().name = name
    try:
        if proto.ByteSize() < _IN_MEMORY_BYTES:
            data = proto.SerializeToString()
            del proto
            return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        return _open_large(proto, options)
    except Exception as exc:  # onnxruntime has no common base for its errors
        if type(exc).__module__.startswith("onnxruntime"):
            raise UnsupportedError(
                f"onnxruntime cannot run the graph to calibrate it: {exc}",
                next="run `edgetok inspect` on the source to see what it holds",
            ) from exc
        raise


def _open_large(proto: Any, options: Any) -> Any:
    import onnx
    import onnxruntime as ort

    with tempfile.TemporaryDirectory(prefix="edgetok-") as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(proto, path, save_as_external_data=True, location="model.data")
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def check_feeds(model: ir.Model, calib: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Refuse an empty or ill-fitting calibration set.

    Raises:
        InputError: nothing to calibrate on, or an input is missing.
    """
    if not calib:
        raise InputError(
            "int8 needs calibration samples to choose its scales, and there are none",
            next="add --calib FOLDER (images), FILE.npz or FILE.txt, or use --precision int8-dynamic",
        )
    need = {v.name for v in model.graph.inputs if not v.is_initializer()}
    for i, feed in enumerate(calib):
        missing = sorted(str(n) for n in need - set(feed))
        if missing:
            raise InputError(
                f"calibration sample {i} has no input {missing[0]!r}",
                next=f"give every input: {', '.join(sorted(str(n) for n in need))}",
            )
