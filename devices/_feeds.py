"""What every backend does to inputs and outputs before and after a run: check, view, name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from edgetok.devices.base import TensorSpec
from edgetok.errors import InputError

OPAQUE = ""
"""Dtype of a spec whose values are not tensors (sequences, optionals, maps): passed on unchecked."""


def as_array(name: str, value: Any) -> np.ndarray:
    """View ``value`` as numpy without copying: an array, a numpy scalar, or anything with ``__dlpack__``.

    Raises:
        InputError: it is none of these, or its memory is not reachable from the CPU.
    """
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, np.generic):
        return np.asarray(value)
    if hasattr(value, "__dlpack__"):
        try:
            return np.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError, ValueError) as exc:
            raise InputError(
                f"its DLPack capsule cannot be read on the CPU: {exc}",
                where=f"input {name!r}",
                next="move the tensor to the CPU and detach it, or pass a numpy array",
            ) from exc
    raise InputError(
        f"expected a numpy array or a DLPack tensor, got {type(value).__name__}",
        where=f"input {name!r}",
        next="wrap it: numpy.asarray(value, dtype=...)",
    )


def dtype_name(array: np.ndarray) -> str:
    """Numpy's name of the dtype, with every string kind called ``str``."""
    return "str" if array.dtype.kind in "OUST" else array.dtype.name


def check_feed(spec: TensorSpec, value: Any, symbols: dict[str, tuple[int, str]]) -> np.ndarray:
    """Check one input against its spec.

    Args:
        spec: name, dtype, shape; a string axis must have one size across all inputs of a call.
        value: see ``as_array``.
        symbols: axis name to (size, input that set it), filled as inputs are seen.

    Raises:
        InputError: dtype, rank or an axis differs; the message shows expected and given.
    """
    array = as_array(spec.name, value)
    where = f"input {spec.name!r}"
    if dtype_name(array) != spec.dtype:
        raise InputError(
            f"expected dtype {spec.dtype}, got {dtype_name(array)}",
            where=where,
            next=f"cast it: {spec.name}.astype({spec.dtype!r})",
        )
    if spec.shape is None:
        return array
    if array.ndim != len(spec.shape):
        raise InputError(
            f"expected {len(spec.shape)} axes {show_shape(spec.shape)}, got {array.ndim}: {show_shape(array.shape)}",
            where=where,
            next="add or drop axes; a single example still has a batch axis of 1",
        )
    for axis, (want, have) in enumerate(zip(spec.shape, array.shape, strict=True)):
        if isinstance(want, int) and want != have:
            raise InputError(
                f"expected shape {show_shape(spec.shape)}, got {show_shape(array.shape)}: axis {axis} must be {want}",
                where=where,
            )
        if isinstance(want, str):
            size, first = symbols.setdefault(want, (have, spec.name))
            if size != have:
                raise InputError(
                    f"axis {axis} ({want!r}) is {have}, but input {first!r} has {want!r} = {size}", where=where
                )
    return array


def show_shape(shape: Sequence[object]) -> str:
    """A shape for people: ``[batch, 3, 224, 224]``, unnamed open axes as ``?``."""
    return "[" + ", ".join("?" if s is None else str(s) for s in shape) + "]"


def check_feeds(
    inputs: Sequence[TensorSpec], feeds: Mapping[str, Any], optional: Sequence[TensorSpec] = ()
) -> dict[str, Any]:
    """Check a whole call; returns name to array (opaque values as they came).

    Raises:
        InputError: an input is missing, unknown, or fails ``check_feed``.
    """
    known = {spec.name: spec for spec in (*inputs, *optional)}
    names = ", ".join(repr(spec.name) for spec in inputs)
    for spec in inputs:
        if spec.name not in feeds:
            raise InputError(f"input {spec.name!r} is missing", next=f"feed all of: {names}")
    symbols: dict[str, tuple[int, str]] = {}
    checked: dict[str, Any] = {}
    for name, value in feeds.items():
        spec_or_none = known.get(name)
        if spec_or_none is None:
            raise InputError(f"unknown input {name!r}", next=f"the model's inputs are: {names}")
        opaque = spec_or_none.dtype == OPAQUE
        checked[name] = value if opaque else check_feed(spec_or_none, value, symbols)
    return checked


def pick_outputs(specs: Sequence[TensorSpec], wanted: Sequence[str] | None) -> list[str]:
    """Names of the outputs to return, in the order asked for (all, in graph order, when None).

    Raises:
        InputError: a name is not an output.
    """
    known = [spec.name for spec in specs]
    if wanted is None:
        return known
    for name in wanted:
        if name not in known:
            raise InputError(f"unknown output {name!r}", next=f"the model's outputs are: {', '.join(known)}")
    return list(wanted)


def spec_of(value: onnx.ValueInfoProto) -> TensorSpec:
    """The spec of a graph input or output."""
    if not value.type.HasField("tensor_type"):
        return TensorSpec(value.name, OPAQUE, None)
    tensor = value.type.tensor_type
    shape: tuple[int | str | None, ...] | None = None
    if tensor.HasField("shape"):
        shape = tuple(d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in tensor.shape.dim)
    return TensorSpec(value.name, elem_name(tensor.elem_type), shape)


def elem_name(elem_type: int) -> str:
    """Numpy's name of an ONNX element type; ``str`` for strings, opaque when undefined."""
    if elem_type == onnx.TensorProto.UNDEFINED:
        return OPAQUE
    if elem_type == onnx.TensorProto.STRING:
        return "str"
    return onnx.helper.tensor_dtype_to_np_dtype(elem_type).name


Specs = tuple[TensorSpec, ...]


def graph_specs(graph: onnx.GraphProto) -> tuple[Specs, Specs, Specs]:
    """(inputs that must be fed, inputs with a default, outputs) of a graph."""
    defaults = {i.name for i in graph.initializer} | {i.values.name for i in graph.sparse_initializer}
    inputs = [spec_of(v) for v in graph.input]
    needed = tuple(s for s in inputs if s.name not in defaults)
    optional = tuple(s for s in inputs if s.name in defaults)
    return needed, optional, tuple(spec_of(v) for v in graph.output)
