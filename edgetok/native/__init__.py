"""libedgetok through ctypes: the only place that touches it.

The library is found inside the installed package, or, in a checkout laid over an installed wheel, through the
distribution's file list. A library of another ABI is refused: a stale build under newer Python is worse than none.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from pathlib import Path

from edgetok.errors import BackendError

ABI = 2

_BITS = {
    "avx2": 1 << 0,
    "avxvnni": 1 << 1,
    "avx512vnni": 1 << 2,
    "avx512vbmi": 1 << 3,
    "avx512bf16": 1 << 4,
    "neon": 1 << 8,
    "neondot": 1 << 9,
    "neoni8mm": 1 << 10,
}


class _Caps(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        ("abi", ctypes.c_uint32),
        ("cpu", ctypes.c_uint32),
        ("usable", ctypes.c_uint32),
    ]


@dataclass(frozen=True)
class Caps:
    """What libedgetok found on this CPU.

    Args:
        version: the library's version.
        isa: best ISA token usable, after ``EDGETOK_MAX_ISA``.
        cpu: every feature found.
        usable: the features left after the cap.
    """

    version: str
    isa: str
    cpu: tuple[str, ...]
    usable: tuple[str, ...]


def _file_name() -> str:
    return {"win32": "edgetok.dll", "darwin": "libedgetok.dylib"}.get(sys.platform, "libedgetok.so")


def library_path() -> Path | None:
    """The library's file, or None when this installation has none.

    ``EDGETOK_LIBRARY`` names another build (a sanitizer's, a debugger's), as LD_PRELOAD would.
    """
    if named := os.environ.get("EDGETOK_LIBRARY"):
        return Path(named)
    name = _file_name()
    found = resources.files("edgetok").joinpath("_lib", name)
    if found.is_file():
        return Path(str(found))
    try:
        listed = metadata.files("edgetok") or []
    except metadata.PackageNotFoundError:
        return None
    for file in listed:
        path = Path(str(file.locate()))
        if path.name == name and path.is_file():
            return path
    return None


@cache
def library() -> ctypes.CDLL:
    """Load libedgetok once.

    Raises:
        BackendError: it is not installed, cannot be loaded, or has another ABI.
    """
    path = library_path()
    if path is None:
        raise BackendError(
            "libedgetok is not installed", next="pip install . (it compiles the library; needs a C compiler)"
        )
    try:
        lib = ctypes.CDLL(str(path))
        lib.etk_abi.restype = ctypes.c_uint32
        abi = lib.etk_abi()
    except (OSError, AttributeError) as exc:
        raise BackendError(
            f"cannot load libedgetok: {exc}", where=str(path), next="pip install --force-reinstall ."
        ) from exc
    if abi != ABI:
        raise BackendError(
            f"libedgetok has ABI {abi}, this Python code needs {ABI}",
            where=str(path),
            next="pip install --force-reinstall . (the compiled library is older than the sources)",
        )
    lib.etk_version.restype = ctypes.c_char_p
    lib.etk_isa_name.restype = ctypes.c_char_p
    lib.etk_isa_name.argtypes = [ctypes.c_uint32]
    lib.etk_get_caps.restype = ctypes.c_int32
    lib.etk_get_caps.argtypes = [ctypes.POINTER(_Caps)]
    return lib


def caps() -> Caps:
    """Probe the CPU.

    Raises:
        BackendError: no library, or ``EDGETOK_MAX_ISA`` names no known ISA.
    """
    lib = library()
    raw = _Caps(struct_size=ctypes.sizeof(_Caps))
    status = lib.etk_get_caps(ctypes.byref(raw))
    if status != 0:
        raise BackendError(
            f"libedgetok refused the CPU probe (status {status}): EDGETOK_MAX_ISA is not a known ISA",
            next="set it to one of: scalar avx2 avxvnni avx512vnni avx512vbmi neon neondot neoni8mm, or unset it",
        )

    def names(bits: int) -> tuple[str, ...]:
        return tuple(name for name, bit in _BITS.items() if bits & bit)

    return Caps(lib.etk_version().decode(), lib.etk_isa_name(raw.usable).decode(), names(raw.cpu), names(raw.usable))
