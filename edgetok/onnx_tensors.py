"""What a tensor in an ONNX file declares, held against the bytes that are there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import onnx

from edgetok.errors import ArtifactError
from edgetok.limits import LoadLimits, checked_add, checked_mul, packed_bytes
from edgetok.paths import split_relative

T = onnx.TensorProto

# Data type -> bits per element. A type that is not here is refused.
BITS: dict[int, int] = {
    T.FLOAT: 32, T.UINT8: 8, T.INT8: 8, T.UINT16: 16, T.INT16: 16, T.INT32: 32, T.INT64: 64, T.BOOL: 8,
    T.FLOAT16: 16, T.DOUBLE: 64, T.UINT32: 32, T.UINT64: 64, T.COMPLEX64: 64, T.COMPLEX128: 128, T.BFLOAT16: 16,
    T.FLOAT8E4M3FN: 8, T.FLOAT8E4M3FNUZ: 8, T.FLOAT8E5M2: 8, T.FLOAT8E5M2FNUZ: 8, T.UINT4: 4, T.INT4: 4,
    T.FLOAT4E2M1: 4, T.FLOAT8E8M0: 8, T.UINT2: 2, T.INT2: 2,
}  # fmt: skip
# Typed field -> the data types it may hold; one value per element, two for complex, one per byte below 8 bits.
_FIELDS: dict[str, frozenset[int]] = {
    "float_data": frozenset({T.FLOAT, T.COMPLEX64}),
    "double_data": frozenset({T.DOUBLE, T.COMPLEX128}),
    "int64_data": frozenset({T.INT64}),
    "uint64_data": frozenset({T.UINT32, T.UINT64}),
    "string_data": frozenset({T.STRING}),
    "int32_data": frozenset({t for t, bits in BITS.items() if bits <= 16 or t == T.INT32}),
}
_KEYS = frozenset({"location", "offset", "length", "checksum"})  # of external data; no other key is looked at


@dataclass(frozen=True)
class External:
    """Where the bytes of a tensor lie outside the graph file.

    Args:
        tensor: its name.
        location: file name relative to the model's folder.
        offset, bytes: extent in that file.
        to_end: the model gives no length, so the extent must end with the file.
    """

    tensor: str
    location: str
    offset: int
    bytes: int
    to_end: bool


def check_tensor(tensor: onnx.TensorProto, limits: LoadLimits, *, where: str) -> tuple[int, External | None]:
    """Check rank, dims, type and size of one tensor.

    Returns:
        its size in bytes as declared, and its place when it is outside the file.

    Raises:
        ArtifactError: over a limit, unknown type, or declared size and bytes present differ.
    """
    where = f"{where}: tensor {tensor.name[:80]!r}"
    limits.check("rank", len(tensor.dims), "axes", where=where)
    for axis, dim in enumerate(tensor.dims):
        if dim < 0:
            raise ArtifactError(f"axis {axis} has the negative length {dim}", where=where)
        limits.check("dim", dim, f"length of axis {axis}", where=where)
    if tensor.HasField("segment"):
        raise ArtifactError("tensors in segments are not read", where=where)
    elements = checked_mul(*tensor.dims, what="elements", where=where)
    outside = tensor.data_location == T.EXTERNAL
    if not outside and len(tensor.external_data):
        raise ArtifactError("names external data but is not marked as external", where=where)
    if tensor.data_type == T.STRING:
        return _check_strings(tensor, elements, limits, outside, where), None
    bits = BITS.get(tensor.data_type)
    if bits is None:
        raise ArtifactError(f"unknown data type {tensor.data_type}", where=where)
    size = packed_bytes(tensor.dims, bits, "size in bytes", where=where)
    limits.check("total_bytes", size, "size in bytes", where=where)
    if outside:
        return size, _external(tensor, size, limits, where)
    _check_inside(tensor, size, elements, bits, where)
    return size, None


def _check_inside(tensor: onnx.TensorProto, size: int, elements: int, bits: int, where: str) -> None:
    filled = [name for name in _FIELDS if len(getattr(tensor, name))]
    if tensor.HasField("raw_data"):
        filled.append("raw_data")
    if len(filled) > 1 and not (elements == 0 and not tensor.raw_data):
        raise ArtifactError(f"holds its data twice, in {' and '.join(filled)}", where=where)
    field = filled[0] if filled else "raw_data"
    if field == "raw_data":
        present, expected, unit = len(tensor.raw_data), size, "bytes"
    else:
        if tensor.data_type not in _FIELDS[field]:
            raise ArtifactError(f"data type {tensor.data_type} cannot be in {field}", where=where)
        per = 2 if tensor.data_type in (T.COMPLEX64, T.COMPLEX128) else 1
        present = len(getattr(tensor, field))
        expected, unit = (size if bits < 8 else checked_mul(elements, per, what="values", where=where)), "values"
    if present != expected:
        raise ArtifactError(
            f"shape {list(tensor.dims)} and type {T.DataType.Name(tensor.data_type)} need {expected:,} {unit}, "
            f"the file holds {present:,}",
            where=where,
        )


def _check_strings(tensor: onnx.TensorProto, elements: int, limits: LoadLimits, outside: bool, where: str) -> int:
    if outside or tensor.HasField("raw_data"):
        raise ArtifactError("a tensor of strings must hold them in string_data", where=where)
    if len(tensor.string_data) != elements:
        raise ArtifactError(
            f"shape {list(tensor.dims)} needs {elements:,} strings, the file holds {len(tensor.string_data):,}",
            where=where,
        )
    for text in tensor.string_data:
        limits.check("string_bytes", len(text), "length of a string in bytes", where=where)
    return checked_add(*(len(t) for t in tensor.string_data), what="size in bytes", where=where)


def _external(tensor: onnx.TensorProto, size: int, limits: LoadLimits, where: str) -> External:
    entries: dict[str, str] = {}
    if tensor.HasField("raw_data") or any(len(getattr(tensor, f)) for f in _FIELDS):
        raise ArtifactError("is marked as external data but also holds data inside", where=where)
    limits.check("entries", len(tensor.external_data), "external data entries", where=where)
    for entry in tensor.external_data:
        if not (isinstance(entry.key, str) and isinstance(entry.value, str)):
            raise ArtifactError("an external data entry is not UTF-8", where=where)
        if entry.key not in _KEYS:
            raise ArtifactError(f"unknown external data key {entry.key[:40]!r}", where=where)
        if entry.key in entries:
            raise ArtifactError(f"external data key {entry.key!r} is given twice", where=where)
        entries[entry.key] = entry.value
    if "location" not in entries:
        raise ArtifactError("external data without a location", where=where)
    split_relative(entries["location"], limits, where=where)
    offset = _number(entries.get("offset", "0"), "external data offset", where)
    to_end = "length" not in entries
    if not to_end:
        length = _number(entries["length"], "external data length", where)
        if length != size:
            raise ArtifactError(
                f"shape {list(tensor.dims)} and type {T.DataType.Name(tensor.data_type)} need {size:,} bytes, "
                f"its external data declares {length:,}",
                where=where,
            )
    checked_add(offset, size, what="end of its external data", where=where)
    return External(tensor.name, entries["location"], offset, size, to_end)


def _number(text: str, what: str, where: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 19):
        raise ArtifactError(f"{what} {text[:40]!r} is not a whole number from 0 to 2^63-1", where=where)
    return checked_add(int(text), what=what, where=where)


def check_extents(extents: Iterable[External], sizes: dict[str, int], *, where: str) -> None:
    """Check that extents lie inside their files and share no byte.

    Args:
        extents: of all tensors of one model.
        sizes: file name -> size in bytes.

    Raises:
        ArtifactError: an extent leaves its file, or two overlap.
    """
    ordered = sorted((e for e in extents), key=lambda e: (e.location, e.offset, e.bytes))
    for e in ordered:
        size = sizes[e.location]
        end = checked_add(e.offset, e.bytes, what="end of external data", where=where)
        if end > size or (e.to_end and end != size):
            raise ArtifactError(
                f"needs bytes {e.offset:,} to {end:,} of {e.location!r}, which holds {size:,}",
                where=f"{where}: tensor {e.tensor[:80]!r}",
            )
    filled = [e for e in ordered if e.bytes]
    for first, second in pairwise(filled):
        if first.location == second.location and second.offset < first.offset + first.bytes:
            raise ArtifactError(
                f"its external data overlaps that of {first.tensor[:80]!r} in {first.location!r} "
                f"at byte {second.offset:,}",
                where=f"{where}: tensor {second.tensor[:80]!r}",
            )
