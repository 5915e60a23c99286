"""``onnx.backend.base.Backend`` over any edgetok device, so that tools and tests written for ONNX backends run on it.

The device is the keyword ``edgetok_device``, else the environment variable ``EDGETOK_ONNX_DEVICE``, else the ONNX
device string when it names one of ours, else ``cpu_ort``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.backend.base as base
import onnx.checker
import onnx.shape_inference
from onnx import helper

from edgetok.devices import BACKENDS
from edgetok.devices.base import Backend, Executable, Options
from edgetok.errors import BackendError, InputError
from edgetok.registry import canonical

ENV = "EDGETOK_ONNX_DEVICE"
DEFAULT = "cpu_ort"


def _device_name(device: str, chosen: str | None) -> str:
    name = canonical(device)
    if chosen:
        return canonical(chosen)
    if name in BACKENDS.names():
        return name
    return canonical(os.environ.get(ENV) or DEFAULT)


class EdgetokRep(base.BackendRep):
    """A compiled model."""

    def __init__(self, executable: Executable) -> None:
        self.executable = executable

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Run once.

        Args:
            inputs: a mapping by name, a sequence in graph order, or one value for a model with one input.
            kwargs: ``outputs``, the names wanted.

        Returns:
            The outputs as a named tuple, in graph order (or the order asked for).
        """
        names = [spec.name for spec in self.executable.inputs]
        if isinstance(inputs, Mapping):
            feeds = dict(inputs)
        else:
            values = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
            if len(values) != len(names):
                raise InputError(f"the model has {len(names)} inputs, {len(values)} were given")
            feeds = dict(zip(names, values, strict=True))
        result = self.executable.run(feeds, kwargs.get("outputs"))
        return base.namedtupledict("Outputs", list(result))(*result.values())  # type: ignore[return-value]


class EdgetokBackend(base.Backend):
    """The ONNX backend interface; every method is a class method, as ONNX wants it."""

    @classmethod
    def backend(cls, device: str, chosen: str | None = None) -> Backend:
        """The edgetok backend that stands for an ONNX device string.

        Raises:
            InputError: unknown name.
            BackendError: it cannot run here; the message holds the probe's words.
        """
        name = _device_name(device, chosen)
        backend: Backend = BACKENDS.get(name)
        found = backend.probe()
        if not found.ok:
            raise BackendError(f"device {name} is not available: {found.reason}", next=found.fix or None)
        return backend

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """Whether ``device`` is ``CPU`` or an edgetok device that works here."""
        kind = device.split(":")[0]
        if kind == "CPU":
            return True
        name = canonical(kind)
        return name in BACKENDS.names() and bool(BACKENDS.get(name).probe().ok)

    @classmethod
    def is_compatible(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> bool:
        """Whether the device claims every operator of the top-level graph."""
        backend = cls.backend(device, kwargs.get("edgetok_device"))
        local = {(f.domain, f.name) for f in model.functions}
        return all((n.domain, n.op_type) in local or backend.supports(n) for n in model.graph.node)

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> EdgetokRep:
        """Compile a model.

        Args:
            model: with its weights inside.
            device: ``CPU``, or an edgetok device.
            kwargs: ``edgetok_device`` (name) and ``options`` (``Options``); others are ignored, as the interface asks.

        Raises:
            EdgeTokError: see ``Backend.compile``.
        """
        backend = cls.backend(device, kwargs.get("edgetok_device"))
        options = kwargs.get("options") or Options(threads=1)
        return EdgetokRep(backend.compile(model.SerializeToString(), options))

    @classmethod
    def run_model(cls, model: onnx.ModelProto, inputs: Any, device: str = "CPU", **kwargs: Any) -> tuple[Any, ...]:
        """Compile, run once, close."""
        rep = cls.prepare(model, device, **kwargs)
        try:
            return rep.run(inputs)
        finally:
            rep.executable.close()

    @classmethod
    def run_node(
        cls,
        node: onnx.NodeProto,
        inputs: Any,
        device: str = "CPU",
        outputs_info: Sequence[tuple[np.dtype, tuple[int, ...]]] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Run one operator on arrays given in the order of the node's named inputs.

        Raises:
            InputError: output types are neither given nor found by shape inference.
        """
        version = int(kwargs.pop("opset_version", 0)) or _known_version(node.domain)
        values = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
        model = _node_model(node, [np.asarray(v) for v in values], outputs_info, version)
        return cls.run_model(model, values, device, **kwargs)


def _known_version(domain: str) -> int:
    return onnx.defs.onnx_opset_version() if domain in ("", "ai.onnx") else 1


def _value_info(name: str, dtype: Any, shape: Sequence[int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def _node_model(
    node: onnx.NodeProto,
    arrays: Sequence[np.ndarray],
    outputs_info: Sequence[tuple[np.dtype, tuple[int, ...]]] | None,
    version: int,
) -> onnx.ModelProto:
    """A model of one node."""
    names = [n for n in node.input if n]
    if len(names) != len(arrays):
        raise InputError(f"{node.op_type} names {len(names)} inputs, {len(arrays)} were given")
    ins = [_value_info(n, a.dtype, a.shape) for n, a in zip(names, arrays, strict=True)]
    present = [n for n in node.output if n]
    opset = helper.make_opsetid(node.domain, version)
    if outputs_info is not None:
        outs = [_value_info(n, *info) for n, info in zip(present, outputs_info, strict=True)]
    else:
        found = _infer(node, ins, opset)
        missing = [n for n in present if n not in found]
        if missing:
            raise InputError(
                f"the type of output {missing[0]!r} of {node.op_type} is unknown", next="pass outputs_info"
            )
        outs = [helper.make_value_info(n, found[n]) for n in present]
    graph = helper.make_graph([node], "node", ins, outs)
    return helper.make_model(graph, opset_imports=[opset], ir_version=min(onnx.IR_VERSION, 10))


def _infer(
    node: onnx.NodeProto, ins: Sequence[onnx.ValueInfoProto], opset: onnx.OperatorSetIdProto
) -> Mapping[str, onnx.TypeProto]:
    schema = onnx.defs.get_schema(node.op_type, opset.version, node.domain)
    types = {v.name: v.type for v in ins}
    return onnx.shape_inference.infer_node_outputs(schema, node, types, opset_imports=[opset], ir_version=10)


prepare = EdgetokBackend.prepare
run_model = EdgetokBackend.run_model
run_node = EdgetokBackend.run_node
supports_device = EdgetokBackend.supports_device
is_compatible = EdgetokBackend.is_compatible
