"""The library's thread pool as Python uses it: one pool per thread count, made on first use, freed at exit."""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
from functools import cache
from typing import Any

from edgetok import native
from edgetok.errors import InputError
from edgetok.native.tensors import check

MAX_THREADS = 256
_made: dict[tuple[int, int], int] = {}
_lock = threading.Lock()


@cache
def _functions() -> tuple[Any, Any]:
    lib = native.library()
    lib.etk_pool_create.restype = ctypes.c_int32
    lib.etk_pool_create.argtypes = [ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p)]
    lib.etk_pool_free.restype = None
    lib.etk_pool_free.argtypes = [ctypes.c_void_p]
    return lib.etk_pool_create, lib.etk_pool_free


def _free_all() -> None:
    _, free = _functions()
    while _made:
        _, address = _made.popitem()
        free(address)


def _after_fork() -> None:
    """In a child: its parent's pools have no threads here, and the lock may be held by a thread that is not here."""
    global _lock
    _lock = threading.Lock()
    _made.clear()


@cache
def _at_exit_and_fork() -> None:
    atexit.register(_free_all)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_after_fork)


def pool(threads: int) -> int | None:
    """The address of the ``etk_pool`` with ``threads`` threads, the caller included; None for 1 (no pool is needed).

    The same count gives the same pool for as long as the process lives. Two Python threads may use one pool: a call
    that finds it busy runs on its own thread alone, with the same result.

    Args:
        threads: 1..256.

    Raises:
        InputError: another number.
        ResourceError: the threads cannot be started.
        BackendError: no library.
    """
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= MAX_THREADS:
        raise InputError(f"threads must be a whole number from 1 to {MAX_THREADS}, got {threads!r}")
    if threads == 1:
        return None
    key = (os.getpid(), threads)
    if (address := _made.get(key)) is not None:
        return address
    create, _ = _functions()
    with _lock:
        if key not in _made:
            _at_exit_and_fork()
            out = ctypes.c_void_p()
            check(create(threads, 0, ctypes.byref(out)), f"a pool of {threads} threads", native.library())
            _made[key] = out.value or 0
        return _made[key]
