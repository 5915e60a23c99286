"""The two forms of an artifact, read alike: names, sizes and bytes, each file opened once."""

from __future__ import annotations

import mmap
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from edgetok.archive import Member, read_archive
from edgetok.errors import ArtifactError, InputError
from edgetok.limits import LoadLimits
from edgetok.paths import open_beneath, opened_folder


class Store(Protocol):
    """Files of an artifact; ``map`` gives the same bytes every time, whatever happens on disk meanwhile."""

    def names(self) -> dict[str, int]:
        """Relative name -> size in bytes, sorted."""
        ...

    def map(self, name: str) -> memoryview: ...

    def close(self) -> None: ...


def open_store(path: Path, limits: LoadLimits) -> Store:
    """Open a folder or a single file.

    Raises:
        InputError: nothing there, or neither form.
        ArtifactError: damaged or over a limit.
    """
    if not path.exists():
        raise InputError("no such artifact", where=str(path), next="check the path, or make one: edgetok convert")
    return FolderStore(path, limits) if path.is_dir() else ArchiveStore(path, limits)


class FolderStore:
    """An artifact folder. Links anywhere below it are refused; the folder itself is resolved once."""

    def __init__(self, path: Path, limits: LoadLimits) -> None:
        self._limits, self._where = limits, path.name or str(path)
        self._views: dict[str, memoryview] = {}
        with opened_folder(path) as fd:
            self._fd = os.dup(fd)
        try:
            self._names = dict(sorted(self._list(self._fd, "", 0).items()))
        except BaseException:
            os.close(self._fd)
            raise

    def _list(self, fd: int, prefix: str, depth: int) -> dict[str, int]:
        self._limits.check("path_parts", depth, "folders inside each other", where=self._where)
        found: dict[str, int] = {}
        names = os.listdir(fd)
        self._limits.check("folder_files", len(names), "files in the artifact", where=self._where)
        for name in names:
            info = os.stat(name, dir_fd=fd, follow_symlinks=False)
            if stat.S_ISDIR(info.st_mode):
                below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
                try:
                    found |= self._list(below, f"{prefix}{name}/", depth + 1)
                finally:
                    os.close(below)
            elif stat.S_ISREG(info.st_mode):
                found[prefix + name] = info.st_size
            else:
                raise ArtifactError(
                    f"{(prefix + name)[:80]!r} is a link or no plain file; an artifact holds plain files only",
                    where=self._where,
                )
            self._limits.check("folder_files", len(found), "files in the artifact", where=self._where)
        return found

    def names(self) -> dict[str, int]:
        return self._names

    def map(self, name: str) -> memoryview:
        if name not in self._views:
            fd, size = open_beneath(self._fd, name, self._limits, where=self._where)
            try:
                self._views[name] = memoryview(mmap.mmap(fd, size, prot=mmap.PROT_READ) if size else b"")
            finally:
                os.close(fd)
        return self._views[name]

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        _release(self._views)


class ArchiveStore:
    """A packed artifact, mapped whole."""

    def __init__(self, path: Path, limits: LoadLimits) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise InputError("expected a plain file", where=str(path), next="check the path")
            limits.check("file_bytes", info.st_size, "size of the file in bytes", where=path.name)
            self._map = mmap.mmap(fd, info.st_size, prot=mmap.PROT_READ) if info.st_size else None
        finally:
            os.close(fd)
        self._view = memoryview(self._map or b"")
        self._views: dict[str, memoryview] = {}
        try:
            self._members: dict[str, Member] = read_archive(self._view, limits, where=path.name)
        except BaseException:
            self.close()
            raise

    def names(self) -> dict[str, int]:
        return {name: member.bytes for name, member in sorted(self._members.items())}

    def map(self, name: str) -> memoryview:
        member = self._members.get(name)
        if member is None:
            raise ArtifactError(f"{name[:80]!r} is not there")
        if name not in self._views:
            self._views[name] = self._view[member.offset : member.offset + member.bytes]
        return self._views[name]

    def close(self) -> None:
        _release(self._views)
        with suppress(BufferError):
            self._view.release()
        if self._map is not None:
            with suppress(BufferError):
                self._map.close()


def _release(views: dict[str, memoryview]) -> None:
    """Drop maps; one still viewed by an array stays alive until the array goes."""
    for view in views.values():
        with suppress(BufferError):
            view.release()
    views.clear()
