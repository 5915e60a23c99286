"""The kernels compiled into the library, and which of them this CPU takes."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from edgetok import native
from edgetok.errors import BackendError


class _Info(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("usable", ctypes.c_int32),
        ("op", ctypes.c_char_p),
        ("isa", ctypes.c_char_p),
        ("name", ctypes.c_char_p),
    )


_RANGE = -7


@dataclass(frozen=True)
class Kernel:
    """One kernel of the library.

    Args:
        op: ``attn``, ``gemm``, ...
        isa: the instruction set it was compiled for, as ``avx512vnni``.
        name: ``<op>_<element types>_<isa>_<rows>x<columns>``.
        usable: this CPU may run it, after ``EDGETOK_MAX_ISA``.
    """

    op: str
    isa: str
    name: str
    usable: bool

    @property
    def work(self) -> str:
        """What it computes, whatever the instruction set: ``attn_s8``."""
        return self.name.partition(f"_{self.isa}")[0]


def kernels() -> tuple[Kernel, ...]:
    """Every kernel compiled into the library, best first within one kind of work.

    Raises:
        BackendError: no library, or ``EDGETOK_MAX_ISA`` names no known ISA.
    """
    lib = native.library()
    lib.etk_kernel_at.restype = ctypes.c_int32
    lib.etk_kernel_at.argtypes = [ctypes.c_int32, ctypes.POINTER(_Info)]
    found: list[Kernel] = []
    while True:
        info = _Info(struct_size=ctypes.sizeof(_Info))
        status = lib.etk_kernel_at(len(found), ctypes.byref(info))
        if status == _RANGE:
            return tuple(found)
        if status != 0:
            raise BackendError(
                f"libedgetok refused to list its kernels (status {status}): is EDGETOK_MAX_ISA a known ISA?"
            )
        found.append(Kernel(info.op.decode(), info.isa.decode(), info.name.decode(), bool(info.usable)))


def chosen() -> tuple[Kernel, ...]:
    """The kernel that this CPU takes for each kind of work.

    Raises:
        BackendError: no library, or ``EDGETOK_MAX_ISA`` names no known ISA.
    """
    best: dict[str, Kernel] = {}
    for kernel in kernels():
        if kernel.usable:
            best.setdefault(kernel.work, kernel)
    return tuple(best.values())
