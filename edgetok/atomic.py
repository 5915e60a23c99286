"""Write under a temporary name beside the target, then rename: the target is whole or not there.

A writer holds a lock on its temporary file or folder. The lock dies with the process, so what a killed writer left is
recognised and removed by the next one, and an artifact it had moved aside for replacing is put back.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from edgetok.errors import EdgeTokError, InputError, InternalError, ResourceError, error_from

_TEMP, _OLD = ".edgetok-tmp-", ".edgetok-old-"


@contextlib.contextmanager
def staging(target: Path, *, folder: bool, replace: bool) -> Iterator[Path]:
    """Give a temporary path beside ``target``; on leaving without an error it becomes ``target``.

    Args:
        target: where the result belongs; its parent is created.
        folder: the temporary path is a folder, else an empty file.
        replace: an existing target is replaced, and kept whole until the new one is in its place.

    Raises:
        InputError: the target exists and ``replace`` is off (checked again at the end).
    """
    with temporary(target, folder=folder) as temp:
        yield temp
        sync_tree(temp)
        _publish(temp, target, replace)


@contextlib.contextmanager
def temporary(target: Path, *, folder: bool) -> Iterator[Path]:
    """A temporary file or folder beside ``target``, locked while it is in use and removed in any case."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temp = target.parent / f".{target.name}{_TEMP}{secrets.token_hex(6)}"
    with _terminated_as_exception():
        if folder:
            temp.mkdir()
        else:
            os.close(os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
        lock = os.open(temp, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield temp
        finally:
            os.close(lock)
            _remove(temp)


def _publish(temp: Path, target: Path, replace: bool) -> None:
    if not replace and os.path.lexists(target):
        raise InputError("the output exists already", where=str(target), next="add --force, or name another output")
    if temp.is_dir() and target.exists():
        # A folder cannot be renamed over another; the old one steps aside and recover() puts it back after a kill.
        old = target.parent / f".{target.name}{_OLD}{secrets.token_hex(6)}"
        os.rename(target, old)
        try:
            os.rename(temp, target)
        except BaseException:
            os.rename(old, target)
            raise
        _sync(target.parent)
        _remove(old)
    else:
        os.replace(temp, target)
        _sync(target.parent)


def recover(target: Path) -> None:
    """Clean up after killed writers of ``target``: remove their temporaries, put back what they had moved aside."""
    try:
        names = sorted(os.listdir(target.parent or Path()))
    except OSError:
        return
    for name in names:
        path = target.parent / name
        if name.startswith(f".{target.name}{_OLD}"):
            if os.path.lexists(target):
                _remove(path)
            else:
                os.rename(path, target)
        elif name.startswith(f".{target.name}{_TEMP}") and _is_stale(path):
            _remove(path)


def _is_stale(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False  # its writer is alive
    finally:
        os.close(fd)
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(path: Path) -> None:
    """Flush a file, or a folder with all in it, to the disk."""
    if path.is_dir():
        for root, _, files in os.walk(path):
            for name in files:
                _sync(Path(root, name))
            _sync(Path(root))
    else:
        _sync(path)


@contextlib.contextmanager
def _terminated_as_exception() -> Iterator[None]:
    """Turn SIGTERM into SystemExit meanwhile, so that temporaries are removed; only possible in the main thread."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Report a full or read-only disk as an error of ours, with what to do."""
    try:
        yield
    except EdgeTokError:
        raise
    except OSError as exc:
        error = error_from(exc)
        if isinstance(error, InternalError):
            error = ResourceError(
                f"cannot write: {exc.strerror or exc}",
                where=exc.filename and str(exc.filename),
                next="choose another place",
            )
        raise error from exc
