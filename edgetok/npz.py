"""``.npz`` without surprises: no pickles, no compression bombs, equal bytes for equal arrays.

Names may hold any character a tensor name does (nothing is ever extracted to disk), and sizes are held against the
bytes present before an array is made.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgetok.errors import ArtifactError, InputError
from edgetok.limits import DEFAULT, LoadLimits, checked_mul

_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Serialize arrays, uncompressed, in the order given.

    Raises:
        InputError: an array of Python objects.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            if array.dtype.hasobject:
                raise InputError(f"array {name!r} holds Python objects; only numbers and strings are written")
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array).reshape(array.shape), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", _EPOCH), member.getvalue())
    return buffer.getvalue()


def read_npz(data: bytes | memoryview, limits: LoadLimits = DEFAULT, *, where: str) -> dict[str, np.ndarray]:
    """Parse an ``.npz`` of unknown origin, stored or deflated.

    Raises:
        ArtifactError: over a limit, damaged, or holding Python objects.
    """
    limits.check("golden_bytes", len(data), "size in bytes", where=where)
    result: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            limits.check("golden_arrays", len(members), "arrays in the file", where=where)
            total = sum(m.file_size for m in members)
            limits.check("golden_bytes", total, "size in bytes when unpacked", where=where)
            for member in members:
                name = member.filename.removesuffix(".npy")
                limits.check("name_chars", len(name), "length of an array's name", where=where)
                if name in result:
                    raise ArtifactError(f"array {name[:80]!r} is there twice", where=where)
                with archive.open(member) as stream:  # reads no more than the declared size
                    raw = stream.read(member.file_size)
                result[name] = _array(raw, limits, f"{where}: array {name[:80]!r}")
    except (ArtifactError, MemoryError):
        raise
    except Exception as exc:  # zipfile, zlib and numpy report damage with many unrelated types
        raise ArtifactError(f"not a valid .npz: {type(exc).__name__}: {exc}"[:300], where=where) from exc
    return result


def _array(raw: bytes, limits: LoadLimits, where: str) -> np.ndarray:
    stream: Any = io.BytesIO(raw)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ArtifactError(f".npy version {version} is not read", where=where)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream, max_header_size=10_000)
    if dtype.hasobject or dtype.kind not in "biufcSU":
        raise ArtifactError(f"type {dtype} is not read: only numbers and strings are", where=where)
    limits.check("rank", len(shape), "axes", where=where)
    size = checked_mul(*shape, dtype.itemsize, what="size in bytes", where=where)
    if size != len(raw) - stream.tell():
        raise ArtifactError(
            f"shape {list(shape)} of {dtype} needs {size:,} bytes, the file holds {len(raw) - stream.tell():,}",
            where=where,
        )
    array = np.frombuffer(raw, dtype, count=math.prod(shape), offset=stream.tell()) if size else np.zeros(0, dtype)
    return array.reshape(shape, order="F" if fortran else "C")
