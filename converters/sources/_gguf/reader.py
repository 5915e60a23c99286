"""A GGUF file's header, read as an enemy wrote it: every count is held against the bytes that are there.

Layout (versions 2 and 3, little-endian): magic, version, tensor count, key count; keys with typed values; tensor
names with dims, type and offset; padding to the alignment; data. Nothing is allocated from a count before the bytes it
needs have been seen to exist, data extents are sorted, inside the file and free of overlap, and tensors are read from
the memory map one at a time.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from edgetok.converters.sources._gguf.blocks import TYPES, TensorType
from edgetok.errors import ArtifactError, UnsupportedError
from edgetok.limits import DEFAULT, LoadLimits, checked_add, checked_mul

MAGIC = b"GGUF"
MAX_KEYS = 4096
MAX_ARRAY = 4_000_000  # a vocabulary has a few hundred thousand entries
MAX_RANK = 4
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies.

    Args:
        name: as in the file.
        shape: row-major, rows first: the file's dims reversed.
        type: its tensor type.
        start: offset in the file. bytes: its length.
    """

    name: str
    shape: tuple[int, ...]
    type: TensorType
    start: int
    bytes: int


class _Cursor:
    """Reads forward and never past the end."""

    def __init__(self, view: memoryview, where: str, limits: LoadLimits) -> None:
        self.view, self.where, self.limits, self.at = view, where, limits, 0

    def take(self, count: int, what: str) -> memoryview:
        if count > len(self.view) - self.at:
            raise ArtifactError(
                f"{what} at byte {self.at:,} needs {count:,} bytes, {len(self.view) - self.at:,} are left",
                where=self.where,
                next="fetch the file again: it is cut short or malformed",
            )
        self.at += count
        return self.view[self.at - count : self.at]

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def string(self, what: str, limit: str = "string_bytes") -> str:
        size = self.number("<Q", what)
        self.limits.check(limit, size, f"length of {what}", where=self.where)
        try:
            return str(self.take(size, what), "utf-8")
        except UnicodeDecodeError:
            raise ArtifactError(f"{what} at byte {self.at - size:,} is not UTF-8", where=self.where) from None

    def value(self, kind: int, what: str) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            raise ArtifactError(f"{what} has the unknown value type {kind}", where=self.where)
        inner, count = self.number("<I", what), self.number("<Q", what)
        if count > MAX_ARRAY:
            raise ArtifactError(f"{what} has {count:,} entries, over the limit of {MAX_ARRAY:,}", where=self.where)
        if inner in _SCALARS:
            form = np.dtype("?" if inner == 7 else _SCALARS[inner])
            return np.frombuffer(self.take(count * form.itemsize, what), form).copy()
        if inner != _STRING:
            raise ArtifactError(f"{what} is an array of value type {inner}", where=self.where)
        if count * 8 > len(self.view) - self.at:
            raise ArtifactError(f"{what} says {count:,} strings; the file is too short", where=self.where)
        return [self.string(f"{what}[{i}]") for i in range(count)]


class Gguf:
    """An opened GGUF file; close it, or use ``with``.

    Attributes:
        metadata: key to number, string, bool, numpy array or list of strings.
        tensors: by name, in file order.
        bytes: size of the file.
    """

    def __init__(self, path: Path, limits: LoadLimits = DEFAULT) -> None:
        """Read the header.

        Raises:
            ArtifactError: not a GGUF file, malformed, or over a limit.
            UnsupportedError: a version or tensor type this build does not read.
        """
        self.path, self.limits = path, limits
        where = path.name
        self.bytes = limits.check("file_bytes", path.stat().st_size, "file size", where=where)
        if self.bytes < 24:
            raise ArtifactError(f"{self.bytes} bytes are too few for a GGUF file", where=where)
        with path.open("rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._view = memoryview(self._map)
        try:
            self._read(_Cursor(self._view, where, limits))
        except BaseException:
            self.close()
            raise

    def _read(self, c: _Cursor) -> None:
        if bytes(c.take(4, "magic")) != MAGIC:
            raise ArtifactError("not a GGUF file: it does not begin with GGUF", where=c.where)
        version = c.number("<I", "version")
        if version not in (2, 3):
            raise UnsupportedError(
                f"GGUF version {version}; versions 2 and 3 are read", where=c.where, next="convert the file anew"
            )
        tensors, keys = c.number("<Q", "tensor count"), c.number("<Q", "key count")
        self.limits.check("tensors", tensors, "tensor count", where=c.where)
        if keys > MAX_KEYS:
            raise ArtifactError(f"{keys:,} keys, over the limit of {MAX_KEYS:,}", where=c.where)
        self.metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = c.string("key", "name_chars")
            if key in self.metadata:
                raise ArtifactError(f"key {key!r} is there twice", where=c.where)
            self.metadata[key] = c.value(c.number("<I", key), key)
        align = self.metadata.get("general.alignment", 32)
        if type(align) is not int or not 8 <= align <= 4096 or align & (align - 1):
            raise ArtifactError(f"general.alignment {align!r} is not a power of two from 8 to 4096", where=c.where)
        infos = [self._info(c) for _ in range(tensors)]
        start = -(-c.at // align) * align
        self.tensors = {t.name: t for t in self._placed(infos, start, align, c.where)}
        if len(self.tensors) != tensors:
            raise ArtifactError("two tensors have the same name", where=c.where)

    def _info(self, c: _Cursor) -> tuple[str, tuple[int, ...], TensorType, int]:
        name = c.string("tensor name", "name_chars")
        rank = c.number("<I", f"rank of {name}")
        if not 1 <= rank <= MAX_RANK:
            raise ArtifactError(f"tensor {name!r} has rank {rank}; 1 to {MAX_RANK} are allowed", where=c.where)
        dims = [c.number("<Q", f"dims of {name}") for _ in range(rank)]
        for d in dims:
            self.limits.check("dim", d, f"a dimension of {name!r}", where=c.where)
        number, offset = c.number("<I", f"type of {name}"), c.number("<Q", f"offset of {name}")
        if number not in TYPES:
            raise UnsupportedError(
                f"tensor {name!r} has the tensor type {number}; read are {', '.join(t.name for t in TYPES.values())}",
                where=c.where,
            )
        kind = TYPES[number]
        if dims[0] % kind.size:
            raise ArtifactError(
                f"rows of {name!r} have {dims[0]} elements, no multiple of {kind.size} ({kind.name})", where=c.where
            )
        return name, tuple(reversed(dims)), kind, offset

    def _placed(
        self, infos: list[tuple[str, tuple[int, ...], TensorType, int]], start: int, align: int, where: str
    ) -> Iterator[GgufTensor]:
        """Extents, checked to lie inside the file and apart from each other."""
        ends: list[tuple[int, int, str]] = []
        for name, shape, kind, offset in infos:
            what = f"size of {name!r}"
            count = checked_mul(*shape, what=what, where=where)
            size = checked_mul(count // kind.size, kind.bytes, what=what, where=where)
            if offset % align:
                raise ArtifactError(f"offset {offset} of {name!r} is no multiple of {align}", where=where)
            first = checked_add(start, offset, what=f"offset of {name!r}", where=where)
            if checked_add(first, size, what=what, where=where) > self.bytes:
                raise ArtifactError(
                    f"tensor {name!r} ends at byte {first + size:,}, the file at {self.bytes:,}",
                    where=where,
                    next="fetch the file again: it is cut short or malformed",
                )
            ends.append((first, first + size, name))
            yield GgufTensor(name, shape, kind, first, size)
        ends.sort()
        for (_, end, one), (begin, _, two) in pairwise(ends):
            if begin < end:
                raise ArtifactError(f"tensors {one!r} and {two!r} overlap", where=where)

    def blocks(self, name: str) -> np.ndarray:
        """The stored bytes as uint8 [rows.., blocks of a row, bytes of a block]; a view of the file.

        Raises:
            ArtifactError: no such tensor.
        """
        t = self._known(name)
        raw = np.frombuffer(self._view[t.start : t.start + t.bytes], np.uint8)
        return raw.reshape(*t.shape[:-1], t.shape[-1] // t.type.size, t.type.bytes)

    def floats(self, name: str) -> np.ndarray:
        """The tensor as float32.

        Raises:
            ArtifactError: no such tensor.
        """
        t = self._known(name)
        return t.type.decode(self.blocks(name).reshape(-1, t.type.bytes)).reshape(t.shape)

    def _known(self, name: str) -> GgufTensor:
        if name not in self.tensors:
            raise ArtifactError(f"tensor {name!r} is missing", where=self.path.name)
        return self.tensors[name]

    def close(self) -> None:
        """Let the file go; arrays from ``blocks`` keep its memory alive."""
        self._view.release()
        with suppress(BufferError):  # views are still in use; the map goes with the last of them
            self._map.close()

    def __enter__(self) -> Gguf:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
