"""Read a model for a device that wants it parsed."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from edgetok.errors import ArtifactError, InputError


def where_of(model: Path | bytes) -> str:
    """The place for error messages."""
    return "model bytes" if isinstance(model, bytes) else str(model)


def read_model(model: Path | bytes, *, weights: bool = True) -> onnx.ModelProto:
    """Parse a model.

    Args:
        model: a path (external data beside it), or serialized bytes (all data inside).
        weights: also read external data into the model.

    Raises:
        InputError: no such file.
        ArtifactError: it is not ONNX, has no graph, or its external data cannot be used.
    """
    where = where_of(model)
    if isinstance(model, Path) and not model.is_file():
        raise InputError("no such model file", where=where, next="check the path")
    try:
        if isinstance(model, bytes):
            proto = onnx.load_model_from_string(model)
        else:
            proto = onnx.load(str(model), load_external_data=weights)
    except DecodeError as exc:
        raise ArtifactError(f"this is not an ONNX file: {exc}", where=where) from exc
    except (onnx.checker.ValidationError, OSError, ValueError) as exc:
        raise ArtifactError(
            f"its external data cannot be used: {exc}", where=where, next="keep the data file beside the .onnx file"
        ) from exc
    if not proto.graph.node and not proto.graph.output:
        raise ArtifactError("there is no graph in the file", where=where)
    if isinstance(model, bytes):
        _refuse_external(proto, where)
    return proto


def _refuse_external(proto: onnx.ModelProto, where: str) -> None:
    """Bytes have no folder: a runtime would look for their external data wherever the process happens to be."""
    for tensor in proto.graph.initializer:
        if onnx.external_data_helper.uses_external_data(tensor):
            raise ArtifactError(
                f"initializer {tensor.name!r} is external data, which bytes cannot have",
                where=where,
                next="pass the path",
            )


def node_label(node: onnx.NodeProto) -> str:
    """``com.microsoft.MatMulNBits (node 'name')`` for messages."""
    return f"{node.domain or 'ai.onnx'}.{node.op_type} (node {node.name!r})"


def op_name(domain: str, op_type: str) -> str:
    """``Op``, or ``domain.Op`` outside the standard domain."""
    return f"{domain}.{op_type}" if domain not in ("", "ai.onnx") else op_type
