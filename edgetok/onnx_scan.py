"""Count what an ONNX file would make the protobuf library build, before it builds anything.

An empty node is two bytes in the file and over a hundred in memory, so a file of legal size could ask for a hundred
times its size. This walks the wire format without building anything; the parsing proper is left to the library.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgetok.errors import ArtifactError
from edgetok.limits import LoadLimits

# Message -> field number -> message inside it. Fields not listed are strings, bytes or numbers: skipped, not entered.
_SCHEMA: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 8: "Leaf", 14: "Leaf", 20: "Graphs", 25: "Function", 26: "Leaf"},
    "Graphs": {1: "Graph", 2: "Graph", 3: "Leaf", 4: "Leaf"},
    "Graph": {1: "Node", 5: "Tensor", 11: "Value", 12: "Value", 13: "Value", 14: "Quant", 15: "Sparse", 16: "Leaf"},
    "Function": {7: "Node", 9: "Leaf", 11: "Attribute", 12: "Value", 14: "Leaf"},
    "Node": {5: "Attribute", 9: "Leaf", 10: "Device"},
    "Attribute": {
        5: "Tensor",
        6: "Graph",
        10: "Tensor",
        11: "Graph",
        14: "Type",
        15: "Type",
        22: "Sparse",
        23: "Sparse",
    },
    "Tensor": {3: "Leaf", 13: "Leaf", 16: "Leaf"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Value": {2: "Type", 4: "Leaf"},
    "Type": {1: "TypeTensor", 4: "TypeSequence", 5: "TypeMap", 8: "TypeTensor", 9: "TypeSequence"},
    "TypeTensor": {2: "Shape"},
    "TypeSequence": {1: "Type"},
    "TypeMap": {2: "Type"},
    "Shape": {1: "Leaf"},
    "Quant": {2: "Leaf"},
    "Device": {2: "Shard"},
    "Shard": {3: "Leaf", 4: "ShardedDim"},
    "ShardedDim": {2: "Leaf"},
    "Leaf": {},
}
_COUNTED = {"Node": "nodes", "Tensor": "tensors", "Function": "functions", "Value": "values"}
_MAX_DEPTH = 100  # the protobuf library's own bound on messages inside each other


@dataclass
class Counts:
    """What a file holds: counts of messages, protobuf fields, and the deepest subgraph."""

    fields: int = 0
    nodes: int = 0
    tensors: int = 0
    functions: int = 0
    values: int = 0
    nesting: int = 0


def scan(data: bytes | memoryview, limits: LoadLimits, *, where: str) -> Counts:
    """Count the messages of a serialized ModelProto.

    Raises:
        ArtifactError: the bytes are no protobuf message, or a count is over its limit; names the byte offset.
    """
    if len(data) == 0:
        raise ArtifactError("the file is empty", where=where)
    counts = Counts()
    stack = [(0, len(data), "Model", 0)]  # begin, end, message, graphs above
    view = memoryview(data)
    while stack:
        begin, end, kind, nesting = stack.pop()
        _scan_message(view, begin, end, kind, nesting, counts, stack, limits, where)
    return counts


def _scan_message(
    view: memoryview,
    at: int,
    end: int,
    kind: str,
    nesting: int,
    counts: Counts,
    stack: list[tuple[int, int, str, int]],
    limits: LoadLimits,
    where: str,
) -> None:
    inside = _SCHEMA[kind]
    while at < end:
        counts.fields += 1
        if counts.fields > limits.fields:
            limits.check("fields", counts.fields, "protobuf fields in the file", where=where)
        start = at
        key, at = _varint(view, at, end, where)
        wire = key & 7
        if wire == 2:
            length, at = _varint(view, at, end, where)
            if length > end - at:
                raise ArtifactError(
                    f"a field at byte {start:,} declares {length:,} bytes, {end - at:,} are left: "
                    "the file is cut short or damaged",
                    where=where,
                )
            child = inside.get(key >> 3)
            if child is not None:
                depth = nesting + (child == "Graph")
                _count(counts, child, depth, limits, where)
                stack.append((at, at + length, child, depth))
            at += length
        elif wire == 0:
            _, at = _varint(view, at, end, where)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ArtifactError(f"not an ONNX model: unknown field type {wire} at byte {start:,}", where=where)
        if key >> 3 == 0 or at > end:
            raise ArtifactError(f"not an ONNX model, or damaged: bad field at byte {start:,}", where=where)


def _count(counts: Counts, child: str, depth: int, limits: LoadLimits, where: str) -> None:
    name = _COUNTED.get(child)
    if name is not None:
        value = getattr(counts, name) + 1
        setattr(counts, name, value)
        limits.check(name, value, f"{name} in the model", where=where)
    if child == "Graph":
        counts.nesting = max(counts.nesting, depth - 1)
        limits.check("nesting", depth - 1, "subgraphs inside each other", where=where)
    if depth > _MAX_DEPTH:
        raise ArtifactError("messages nested too deeply", where=where)


def _varint(view: memoryview, at: int, end: int, where: str) -> tuple[int, int]:
    value = shift = 0
    for i in range(10):
        if at + i >= end:
            break
        byte = view[at + i]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + i + 1
        shift += 7
    raise ArtifactError(f"not an ONNX model, or damaged: bad number at byte {at:,}", where=where)
