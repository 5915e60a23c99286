"""How many cores this process may use."""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup/cpu.max")


def _allowed() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _core_of(cpu: int) -> tuple[str, str]:
    """(package, core) of a logical CPU: hyper-threads of one core share it. Unknown: a core of its own."""
    folder = _CPUS / f"cpu{cpu}" / "topology"
    try:
        return (folder / "physical_package_id").read_text().strip(), (folder / "core_id").read_text().strip()
    except OSError:
        return "", f"cpu{cpu}"


def _quota() -> float:
    """CPUs a container may use (cgroup v2), infinity when unlimited or unknown."""
    try:
        quota, period = _CGROUP.read_text().split()[:2]
        return float("inf") if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return float("inf")


def _darwin_cores() -> int:
    import ctypes

    value, size = ctypes.c_int32(0), ctypes.c_size_t(4)
    try:
        ctypes.CDLL(None).sysctlbyname(b"hw.physicalcpu", ctypes.byref(value), ctypes.byref(size), None, 0)
    except (OSError, AttributeError):
        return 0
    return value.value


@cache
def physical_cores() -> int:
    """Physical cores this process may run on: affinity and container quota counted, at least 1."""
    if sys.platform == "darwin":
        cores = _darwin_cores() or len(_allowed())
    else:
        cores = len({_core_of(cpu) for cpu in _allowed()})
    return max(1, int(min(cores, _quota())))


def thread_count(threads: int) -> int:
    """``threads``, or one per physical core when 0.

    Raises:
        InputError: negative.
    """
    from edgetok.errors import InputError

    if threads < 0:
        raise InputError(f"threads must be 0 (all physical cores) or more, got {threads}")
    return threads or physical_cores()
