"""Files named by a model or an artifact: one helper to read and to write them.

A name is relative and walked part by part from an open folder, never through a symlink; the file is opened once,
must be a plain file with one link, and is then used only by its descriptor. Names typed by the user are another
matter: those are resolved once, as any program does.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgetok.errors import ArtifactError, InputError, UnsupportedError
from edgetok.limits import DEFAULT, LoadLimits, checked_cast

_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
# O_NONBLOCK: opening a named pipe must not wait for a writer; it is refused right after by its type.
_FILE = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


def split_relative(name: str, limits: LoadLimits = DEFAULT, *, where: str | None = None) -> tuple[str, ...]:
    """Split a relative file name into its parts.

    Raises:
        ArtifactError: it is empty, absolute, too long, leaves the folder, or holds a character that is a
            separator or a terminator on some system.
    """
    shown = repr(name if len(name) <= 80 else f"{name[:77]}...")
    limits.check("path_chars", len(name), f"length of the file name {shown}", where=where)
    if not name or name.startswith("/"):
        raise ArtifactError(f"file name {shown} must be relative and not empty", where=where)
    bad = [c for c in name if ord(c) < 32 or c in "\\:\x7f" or 0xD800 <= ord(c) <= 0xDFFF]
    if bad:
        raise ArtifactError(f"file name {shown} holds the forbidden character {bad[0]!r}", where=where)
    parts = tuple(p for p in name.split("/") if p != ".")
    if any(p in ("", "..") for p in parts) or not parts:
        raise ArtifactError(f"file name {shown} leaves the folder it is in, or has an empty part", where=where)
    limits.check("path_parts", len(parts), f"folders in the file name {shown}", where=where)
    return parts


@contextmanager
def opened_folder(path: Path) -> Iterator[int]:
    """Descriptor of a folder the user named (resolved once, symlinks allowed).

    Raises:
        InputError: it is not there or is no folder.
        UnsupportedError: this system cannot open files relative to a folder.
    """
    if os.open not in os.supports_dir_fd:
        raise UnsupportedError("this system cannot open files relative to a folder safely (needs openat)")
    try:
        fd = os.open(os.path.realpath(path), _FOLDER)
    except FileNotFoundError as exc:
        raise InputError("no such folder", where=str(path), next="check the path") from exc
    except NotADirectoryError as exc:
        raise InputError("expected a folder", where=str(path), next="check the path") from exc
    try:
        yield fd
    finally:
        os.close(fd)


def _walk(folder_fd: int, parts: tuple[str, ...], where: str, *, create: bool = False) -> int:
    """Descriptor of the folder that holds ``parts[-1]``; the caller closes it."""
    fd = os.dup(folder_fd)
    try:
        for part in parts[:-1]:
            if create:
                with suppress(FileExistsError):
                    os.mkdir(part, 0o777, dir_fd=fd)
            below = os.open(part, _FOLDER, dir_fd=fd)
            os.close(fd)
            fd = below
        return fd
    except OSError as exc:
        os.close(fd)
        raise ArtifactError(_reason(exc, "/".join(parts)), where=where) from exc


def _reason(exc: OSError, name: str) -> str:
    import errno

    if exc.errno in (errno.ELOOP, errno.EMLINK):
        return f"{name!r} is a symbolic link or lies behind one; a model may only name plain files in its own folder"
    if exc.errno == errno.ENOTDIR:
        return f"{name!r} lies behind something that is no plain folder; a symbolic link is not followed"
    if exc.errno == errno.ENOENT:
        return f"{name!r} is not there"
    return f"{name!r} cannot be opened: {exc.strerror}"


def open_beneath(
    folder_fd: int, name: str, limits: LoadLimits = DEFAULT, *, where: str, limit: str = "file_bytes"
) -> tuple[int, int]:
    """Open a plain file below a folder for reading.

    Args:
        folder_fd: descriptor of the folder.
        name: relative name, as written in the model or manifest.
        where: for messages.
        limit: the field of ``limits`` that bounds its size.

    Returns:
        descriptor (the caller closes it) and size in bytes.

    Raises:
        ArtifactError: the name leaves the folder, a part is a symlink, the file is missing, is not a plain file,
            has more than one link, or is too large.
    """
    parts = split_relative(name, limits, where=where)
    parent = _walk(folder_fd, parts, where)
    try:
        fd = os.open(parts[-1], _FILE, dir_fd=parent)
    except OSError as exc:
        raise ArtifactError(_reason(exc, name), where=where) from exc
    finally:
        os.close(parent)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise ArtifactError(f"{name!r} is not a plain file", where=where)
        if info.st_nlink != 1:
            raise ArtifactError(
                f"{name!r} has {info.st_nlink} hard links; it could be another file under a new name", where=where
            )
        checked_cast(info.st_size, f"size of {name!r}", where=where)
        limits.check(limit, info.st_size, f"size of {name!r} in bytes", where=where)
    except BaseException:
        os.close(fd)
        raise
    return fd, info.st_size


def create_beneath(folder_fd: int, name: str, limits: LoadLimits = DEFAULT, *, where: str) -> int:
    """Create a new file below a folder, with the folders above it; returns a read-write descriptor.

    Raises:
        ArtifactError: the name leaves the folder, a part is a symlink, or the file is there already.
    """
    parts = split_relative(name, limits, where=where)
    parent = _walk(folder_fd, parts, where, create=True)
    try:
        return os.open(parts[-1], _NEW, 0o666, dir_fd=parent)
    except FileExistsError as exc:
        raise ArtifactError(f"{name!r} is there already", where=where) from exc
    finally:
        os.close(parent)


def read_all(fd: int, size: int, *, where: str) -> bytes:
    """Read exactly ``size`` bytes from the start of a descriptor.

    Raises:
        ArtifactError: the file became shorter while it was read.
    """
    parts: list[bytes] = []
    done = 0
    while done < size:
        piece = os.pread(fd, min(size - done, 1 << 26), done)
        if not piece:
            raise ArtifactError(f"the file ends at byte {done:,}, expected {size:,}", where=where)
        parts.append(piece)
        done += len(piece)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_beneath(
    folder_fd: int, name: str, limits: LoadLimits = DEFAULT, *, where: str, limit: str = "text_bytes"
) -> bytes:
    """Read a whole small file below a folder; the rules are those of :func:`open_beneath`."""
    fd, size = open_beneath(folder_fd, name, limits, where=where, limit=limit)
    try:
        return read_all(fd, size, where=f"{where}: {name}")
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of ``data`` at the descriptor's position; a full disk raises OSError."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(fd, view[: 1 << 26]) :]


def write_beneath(folder_fd: int, name: str, data: bytes | memoryview) -> None:
    """Create a new file below a folder with these bytes; the rules are those of :func:`create_beneath`."""
    fd = create_beneath(folder_fd, name, where=name)
    try:
        write_all(fd, data)
    finally:
        os.close(fd)


def cache_dir() -> Path:
    """Where pulled models and unpacked artifacts are kept: ``EDGETOK_CACHE``, else the user's cache folder."""
    chosen = os.environ.get("EDGETOK_CACHE", "")
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("edgetok", appauthor=False))
