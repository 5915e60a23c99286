"""Serialize graphs: the same graph gives the same bytes, and large weights go to one file at multiples of 64 bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from edgetok.errors import InputError
from edgetok.limits import INT64_MAX, checked_add

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

ALIGN = 64
DATA_NAME = "model.onnx.data"
EXTERNAL_FROM_BYTES = 8 << 20  # a model with less than this in weights stays one file
TENSOR_FROM_BYTES = 1024  # smaller tensors stay in the graph: runtimes fold them at load


def serialize(
    models: Mapping[str, ir.Model],
    write: Callable[[bytes | memoryview], None],
    *,
    external_from_bytes: int = EXTERNAL_FROM_BYTES,
) -> tuple[dict[str, bytes], int]:
    """Serialize models that may share weights.

    Args:
        models: file name -> model; equal tensors of different models are written once.
        write: takes the bytes of the data file, in order; not called when everything stays in the graphs.
        external_from_bytes: weights of a single model below this stay inside.

    Returns:
        file name -> graph bytes, and the size of the data file (0 when there is none).

    Raises:
        InputError: a graph is over the 2 GiB that protobuf allows.
    """
    import onnx_ir as ir

    placer = _Placer(write)
    large = {name: list(_large_initializers(model)) for name, model in models.items()}
    total = sum(tensor.nbytes for values in large.values() for tensor in (_tensor(v) for v in values))
    outside = len(models) > 1 or total >= external_from_bytes
    graphs: dict[str, bytes] = {}
    for name, model in models.items():
        kept = [(value, _tensor(value)) for value in large[name]] if outside else []
        placer.next_model()
        try:
            for value, tensor in kept:
                offset = placer.place(tensor)
                value.const_value = ir.ExternalTensor(
                    DATA_NAME, offset, tensor.nbytes, tensor.dtype,
                    shape=ir.Shape(tensor.shape.numpy()), name=value.name or "",
                )  # fmt: skip
            graphs[name] = proto_bytes(ir.serde.serialize_model(model))
        finally:
            for value, tensor in kept:
                value.const_value = tensor
    return graphs, placer.bytes


def proto_bytes(model: onnx.ModelProto) -> bytes:
    """Serialize a message; equal messages give equal bytes.

    Raises:
        InputError: over the 2 GiB that protobuf allows.
    """
    try:
        return model.SerializeToString(deterministic=True)
    except Exception as exc:  # EncodeError or ValueError, by protobuf version
        raise InputError(
            f"the graph cannot be serialized: {exc}",
            next="give an onnx_ir model, whose weights go to a file of their own",
        ) from exc


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    tensor = value.const_value
    if tensor is None:
        raise InputError(f"initializer {value.name!r} has no data")
    return tensor


def _large_initializers(model: ir.Model) -> Iterator[ir.Value]:
    import onnx_ir as ir

    for value in model.graph.initializers.values():
        tensor = _tensor(value)
        if tensor.dtype != ir.DataType.STRING and tensor.nbytes >= TENSOR_FROM_BYTES:
            yield value


class _Placer:
    """Gives each tensor an offset and writes it there; a tensor of an earlier model with equal bytes is shared.

    Within one model nothing is shared: readers refuse tensors that overlap.
    """

    def __init__(self, write: Callable[[bytes | memoryview], None]) -> None:
        self._write = write
        self._earlier: dict[tuple[str, int], int] = {}
        self._own: dict[tuple[str, int], int] = {}
        self._taken: set[int] = set()
        self.bytes = 0

    def next_model(self) -> None:
        self._earlier |= self._own
        self._own, self._taken = {}, set()

    def place(self, tensor: ir.TensorProtocol) -> int:
        data = tensor.tobytes()
        key = (hashlib.sha256(data).hexdigest(), len(data))
        offset = self._earlier.get(key)
        if offset is None or offset in self._taken:
            pad = -self.bytes % ALIGN
            if pad:
                self._write(bytes(pad))
            offset = self.bytes + pad
            self._write(data)
            self.bytes = checked_add(offset, len(data), what="size of the data file", maximum=INT64_MAX)
            self._own.setdefault(key, offset)
        self._taken.add(offset)
        return offset
