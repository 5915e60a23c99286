"""The single-file form: an uncompressed zip whose members start at multiples of 64 bytes, so that it can be mapped.

Written and read with the standard library; on top of it the reader refuses whatever the writer never writes:
compression, encryption, comments, holes, overlap, links, names that leave the folder.
"""

from __future__ import annotations

import os
import stat
import struct
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

from edgetok.errors import ArtifactError, InputError
from edgetok.limits import DEFAULT, LoadLimits, checked_add
from edgetok.paths import split_relative

ALIGN = 64
_LOCAL = struct.Struct("<4s5H3I2H")  # local file header
_END = struct.Struct("<4s4H2IH")  # end of central directory
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_PAD_FIELD = 0xD935  # the extra field that Android's zipalign pads with
_ZIP64_EXTRA = 20  # bytes the standard library adds to a local header for a large member


@dataclass(frozen=True)
class Member:
    """Where a member's bytes lie in the archive."""

    offset: int
    bytes: int


def timestamp() -> tuple[int, int, int, int, int, int]:
    """Date of every member: ``SOURCE_DATE_EPOCH`` when set, else the first a zip can hold.

    Raises:
        InputError: the variable is not a whole number of seconds.
    """
    text = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not text:
        return (1980, 1, 1, 0, 0, 0)
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise InputError(f"SOURCE_DATE_EPOCH={text!r} is not a whole number of seconds since 1970")
    year, month, day, hour, minute, second = time.gmtime(int(text))[:6]
    if not 1980 <= year <= 2107:
        return (1980, 1, 1, 0, 0, 0)
    return (year, month, day, hour, minute, second - second % 2)


def write_archive(stream: BinaryIO, files: Mapping[str, bytes | memoryview]) -> None:
    """Write members in the order given, each starting at a multiple of 64 bytes."""
    date = timestamp()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name, date)
            info.create_system = 3
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            info.file_size = len(data)
            large = len(data) * 1.05 > zipfile.ZIP64_LIMIT
            begin = stream.tell() + _LOCAL.size + len(name.encode()) + (_ZIP64_EXTRA if large else 0)
            pad = -begin % ALIGN
            if 0 < pad < 4:  # an extra field takes at least four bytes
                pad += ALIGN
            info.extra = struct.pack("<HH", _PAD_FIELD, pad - 4) + bytes(pad - 4) if pad else b""
            with archive.open(info, "w") as member:
                view = memoryview(data)
                for at in range(0, len(view), 1 << 24):
                    member.write(view[at : at + (1 << 24)])


def read_archive(view: memoryview, limits: LoadLimits = DEFAULT, *, where: str) -> dict[str, Member]:
    """List the members of an archive after checking that it is one this module could have written.

    Args:
        view: the whole file, mapped.

    Returns:
        name -> place, in file order.

    Raises:
        ArtifactError: damaged, over a limit, or not of this form; names the member.
    """
    directory = _check_end(view, limits, where)
    try:
        with zipfile.ZipFile(_Reader(view)) as archive:
            infos = archive.infolist()
    except MemoryError:
        raise
    except Exception as exc:  # zipfile reports damage with several unrelated types
        raise ArtifactError(f"not a valid .edgetok file: {exc}"[:300], where=where) from exc
    limits.check("folder_files", len(infos), "members of the archive", where=where)
    members: dict[str, Member] = {}
    folded: set[str] = set()
    at = 0
    for info in sorted(infos, key=lambda i: i.header_offset):
        name = info.filename
        parts = split_relative(name, limits, where=where)
        inside = f"{where}: member {name[:80]!r}"
        if "/".join(parts) != name or name.casefold() in folded:
            raise ArtifactError("the name is there twice, or is not in its plain form", where=inside)
        folded.add(name.casefold())
        _check_info(info, inside)
        limits.check("file_bytes", info.file_size, "size in bytes", where=inside)
        begin = _check_local(view, info, at, inside)
        at = checked_add(begin, info.file_size, what="end of the member", where=inside)
        if at > directory:
            raise ArtifactError("its bytes reach past the end of the members", where=inside)
        members[name] = Member(begin, info.file_size)
    if at != directory:
        raise ArtifactError(f"{directory - at:,} bytes belong to no member", where=where)
    return members


def _check_end(view: memoryview, limits: LoadLimits, where: str) -> int:
    """Offset of the central directory, from the fixed-size records at the end of the file."""
    size = len(view)
    if size < _END.size or bytes(view[size - _END.size :][:4]) != b"PK\5\6":
        raise ArtifactError(
            "not an .edgetok file, or cut short: the directory at its end is missing",
            where=where,
            next="fetch the file again; if it is a model and no artifact: edgetok inspect FILE",
        )
    _, disk, first, here, count, length, offset, comment = _END.unpack_from(view, size - _END.size)
    end = size - _END.size
    if end >= _LOCATOR64.size and bytes(view[end - _LOCATOR64.size :][:4]) == b"PK\6\7":
        _, _, at, _ = _LOCATOR64.unpack_from(view, end - _LOCATOR64.size)
        if at != end - _LOCATOR64.size - _END64.size or at < 0 or bytes(view[at : at + 4]) != b"PK\6\6":
            raise ArtifactError("the directory for large files is damaged", where=where)
        _, _, _, _, disk, first, here, count, length, offset = _END64.unpack_from(view, at)
        end = at
    if disk or first or comment or here != count:
        raise ArtifactError("archives in parts or with comments are not read", where=where)
    limits.check("folder_files", count, "members of the archive", where=where)
    per_member = 46 + 4 * limits.path_chars + 2 * ALIGN + 64  # header, name in UTF-8, padding, large sizes
    limits_bytes = count * per_member
    if length > limits_bytes or offset + length != end:
        raise ArtifactError("the directory at the end of the archive does not fit the file", where=where)
    return int(offset)


def _check_info(info: zipfile.ZipInfo, where: str) -> None:
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise ArtifactError("is compressed; members are stored as they are", where=where)
    if info.flag_bits & ~0x800:  # only "the name is UTF-8" is known
        raise ArtifactError(f"has the unknown flags {info.flag_bits:#x} (encrypted or streamed)", where=where)
    if info.is_dir() or stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
        raise ArtifactError("is not a plain file", where=where)


def _check_local(view: memoryview, info: zipfile.ZipInfo, at: int, where: str) -> int:
    """Where the member's bytes begin; its header must be at ``at``, so that there are no holes and no overlap."""
    if info.header_offset != at or at + _LOCAL.size > len(view):
        raise ArtifactError("overlaps the member before it, or leaves a hole after it", where=where)
    magic, _, flags, method, _, _, crc, _, _, name_bytes, extra_bytes = _LOCAL.unpack_from(view, at)
    begin = at + _LOCAL.size + name_bytes + extra_bytes
    name = bytes(view[at + _LOCAL.size : at + _LOCAL.size + name_bytes])
    same = (magic, flags, method, crc) == (b"PK\3\4", info.flag_bits, zipfile.ZIP_STORED, info.CRC)
    if not same or name != info.filename.encode():
        raise ArtifactError("is described differently at the start and at the end of the archive", where=where)
    if begin % ALIGN:
        raise ArtifactError(f"does not start at a multiple of {ALIGN} bytes; pack the folder with edgetok", where=where)
    return begin


class _Reader:
    """A read-only file over a memoryview, without copying it."""

    def __init__(self, view: memoryview) -> None:
        self._view, self._at = view, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self._at, len(self._view))[whence]
        if base + offset < 0:
            raise ValueError("seek before the start")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = len(self._view) if size is None or size < 0 else min(self._at + size, len(self._view))
        data = bytes(self._view[self._at : end])
        self._at += len(data)
        return data

    def close(self) -> None:
        pass
