"""Small GGUF files for tests: a writer that can also be told to lie."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

ALIGN = 32


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(v: Any) -> bytes:
    """A typed value: bool, int (u32), float, str, list of str or of int."""
    if isinstance(v, bool):
        return struct.pack("<IB", 7, v)
    if isinstance(v, int):
        return struct.pack("<II", 4, v)
    if isinstance(v, float):
        return struct.pack("<If", 6, v)
    if isinstance(v, str):
        return struct.pack("<I", 8) + string(v)
    if v and isinstance(v[0], str):
        return struct.pack("<IIQ", 9, 8, len(v)) + b"".join(map(string, v))
    if v and isinstance(v[0], float):
        return struct.pack("<IIQ", 9, 6, len(v)) + struct.pack(f"<{len(v)}f", *v)
    return struct.pack("<IIQ", 9, 5, len(v)) + struct.pack(f"<{len(v)}i", *v)


def info(name: str, dims: Sequence[int], kind: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def padded(data: bytes, align: int = ALIGN) -> bytes:
    return data + bytes(-len(data) % align)


def gguf(
    metadata: Mapping[str, Any] = {},
    tensors: Sequence[tuple[str, Sequence[int], int, bytes]] = (),
    *,
    version: int = 3,
    infos: bytes | None = None,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A whole file. ``tensors``: (name, dims with the row length first, type number, data); ``infos`` and ``counts``
    replace what would be true."""
    at, table, data = 0, b"", b""
    for name, dims, kind, content in tensors:
        table += info(name, dims, kind, at)
        data += padded(content)
        at = len(data)
    n_tensors, n_keys = counts or (len(tensors), len(metadata))
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys)
    head += b"".join(string(k) + value(v) for k, v in metadata.items())
    return padded(head + (table if infos is None else infos)) + data
