"""What a measurement was taken under: the machine, its load, the versions.

What cannot be read is None, never a guess.
"""

from __future__ import annotations

import os
import platform
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

_CPUFREQ = Path("/sys/devices/system/cpu/cpu0/cpufreq")
_LIBRARIES = ("numpy", "onnx", "onnx-ir", "onnxruntime", "openvino", "apache-tvm")


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", errors="replace").strip()
    except OSError:
        return None


def version_of(distribution: str) -> str | None:
    """Installed version of a distribution, from its metadata (nothing is imported)."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@cache
def cpu_name() -> str:
    """The CPU's name for people."""
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "cpu model") and value.strip():
            return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def clock_mhz() -> float | None:
    """Current clock of the first core, MHz."""
    exact = _read(_CPUFREQ / "scaling_cur_freq")
    if exact and exact.isdigit():
        return int(exact) / 1000
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        if line.lower().startswith("cpu mhz"):
            try:
                return float(line.partition(":")[2])
            except ValueError:
                return None
    return None


def memory_bytes() -> tuple[int | None, int | None]:
    """(total, available) memory of the machine, bytes; a container's smaller limit counts as the total."""
    values: dict[str, int] = {}
    for line in (_read(Path("/proc/meminfo")) or "").splitlines():
        parts = line.replace(":", " ").split()
        if len(parts) >= 2 and parts[1].isdigit():
            values[parts[0]] = int(parts[1]) * 1024
    total, free = values.get("MemTotal"), values.get("MemAvailable")
    if total is None and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _read(Path("/sys/fs/cgroup/memory.max"))
    if limit and limit.isdigit() and total is not None and int(limit) < total:
        total = int(limit)
        free = min(free, total) if free is not None else None
    return total, free


def load_average() -> float | None:
    """Runnable tasks over the last minute."""
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):
        return None


def isa() -> str | None:
    """Best instruction set libedgetok found; None when the library is not there."""
    from edgetok.errors import EdgeTokError
    from edgetok.native import caps

    try:
        return caps().isa
    except EdgeTokError:
        return None


def peak_rss_bytes() -> int | None:
    """Peak resident memory of this process, bytes.

    On Linux this is VmHWM: ``ru_maxrss`` would also count what the parent held before ``exec``.
    """
    for line in (_read(Path("/proc/self/status")) or "").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def conditions(threads: int) -> dict[str, Any]:
    """Everything that should stand beside a measured number.

    Args:
        threads: as used, never 0.
    """
    from edgetok._version import __version__

    return {
        "edgetok": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "isa": isa(),
        "logical_cpus": os.cpu_count(),
        "threads": threads,
        "governor": _read(_CPUFREQ / "scaling_governor"),
        "clock_mhz": clock_mhz(),
        "load_average": load_average(),
        "versions": {name: v for name in _LIBRARIES if (v := version_of(name))},
    }
