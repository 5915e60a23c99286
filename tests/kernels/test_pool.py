"""The thread pool through Python; the C tests hold its behaviour, this holds the cache around it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading

import pytest

from edgetok import native
from edgetok.errors import InputError
from edgetok.native.pool import pool

pytestmark = pytest.mark.skipif(native.library_path() is None, reason="libedgetok is not built here: pip install .")

TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)


class Pool(ctypes.Structure):
    _fields_ = (
        ("ctx", ctypes.c_void_p),
        ("nthreads", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)),
        ("parallel_for", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, TASK, ctypes.c_void_p, ctypes.c_int64)),
        ("cancelled", ctypes.c_void_p),
    )


def run(address: int, ntasks: int) -> list[int]:
    """How often each task ran."""
    counts = [0] * ntasks
    face = Pool.from_address(address)

    def task(_arg: int, index: int, worker: int) -> None:
        assert 0 <= worker < face.nthreads(face.ctx)
        counts[index] += 1

    assert face.parallel_for(face.ctx, TASK(task), None, ntasks) == 0
    return counts


def test_one_thread_needs_no_pool() -> None:
    assert pool(1) is None


def test_same_count_gives_the_same_pool_and_it_runs() -> None:
    address = pool(3)
    assert address
    assert pool(3) == address != pool(2)
    assert Pool.from_address(address).nthreads(Pool.from_address(address).ctx) == 3
    assert run(address, 200) == [1] * 200


def test_made_once_by_many_threads() -> None:
    got: list[int | None] = []
    threads = [threading.Thread(target=lambda: got.append(pool(7))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    assert len(set(got)) == 1


@pytest.mark.parametrize("threads", [0, -1, 257, 2.0, True, "2"])
def test_other_counts_are_refused(threads: object) -> None:
    with pytest.raises(InputError, match="1 to 256"):
        pool(threads)  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_child_of_fork_gets_its_own_pool_and_ends() -> None:
    code = (
        "import os, sys\n"
        "from edgetok.native.pool import _made, pool\n"
        "first = pool(2)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    assert not _made\n"
        "    assert pool(2) and list(_made) == [(os.getpid(), 2)]\n"
        "    sys.exit(0)\n"
        "_, status = os.waitpid(child, 0)\n"
        "sys.exit(os.waitstatus_to_exitcode(status))\n"
    )
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert out.returncode == 0, out.stderr
