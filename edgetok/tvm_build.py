"""Compile an ONNX graph with apache-tvm (extra ``tvm``): used by the ``tvm`` target, which packs the library, and by
the ``tvm`` device, which runs it.

The graph has open attention, constant TopK counts and one fixed batch. Untuned TVM emits plain loops: on CPUs it is
many times slower than onnxruntime, and is here to reach machines that onnxruntime does not.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import platform
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx

from edgetok.errors import BackendError, InputError, UnsupportedError
from edgetok.tvm_graph import check_graph

FIX = 'pip install "edgetok[tvm]"'
UNTUNED = (
    "this TVM code is untuned: plain loops on one thread, many times slower than onnxruntime on a CPU; use it to reach "
    "machines that onnxruntime does not"
)
_DEFAULT_CPU = {"x86_64": "x86-64", "aarch64": "generic", "riscv64": "generic-rv64"}


@dataclass(frozen=True)
class Built:
    """A compiled graph.

    Args:
        executable: TVM's, in memory.
        triple: the machine it is for, as ``aarch64-linux-gnu``.
        mcpu: LLVM's name of the CPU it may assume.
        seconds: import and compile time.
    """

    executable: Any
    triple: str
    mcpu: str
    seconds: float


def require_tvm() -> str:
    """TVM's version.

    Raises:
        BackendError: it is not installed, or does not import.
    """
    try:
        import tvm
    except ImportError as exc:
        raise BackendError("apache-tvm is not installed", next=FIX) from exc
    except Exception as exc:  # a broken shared library raises many kinds
        raise BackendError(f"apache-tvm does not import: {exc}", next=FIX) from exc
    if not hasattr(tvm, "compile"):
        raise BackendError("the installed package 'tvm' is not apache-tvm", next=f"pip uninstall tvm; {FIX}")
    return str(tvm.__version__)


def host_triple() -> str:
    """This machine, as ``x86_64-linux-gnu``."""
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    return f"{machine}-{'apple-darwin' if sys.platform == 'darwin' else 'linux-gnu'}"


@cache
def host_cpu() -> str:
    """LLVM's name of this CPU, as ``znver4``."""
    import tvm_ffi

    return str(tvm_ffi.get_global_func("target.llvm_get_system_cpu")())


def target_of(triple: str | None, mcpu: str | None) -> tuple[str, str]:
    """(triple, mcpu): the host's own CPU by default, the plainest CPU of another machine.

    Raises:
        InputError: LLVM has no such architecture or CPU.
    """
    wanted = triple or host_triple()
    arch = wanted.partition("-")[0]
    if not all(c.isalnum() or c in "-_." for c in wanted) or arch not in _DEFAULT_CPU:
        known = ", ".join(f"{a}-linux-gnu" for a in _DEFAULT_CPU)
        raise InputError(f"unknown target triple {wanted!r}", next=f"use one of: {known}")
    cpu = mcpu or (host_cpu() if wanted == host_triple() else _DEFAULT_CPU[arch])
    if not all(c.isalnum() or c in "-_.+" for c in cpu):
        raise InputError(f"unknown CPU {cpu!r}", next="use LLVM's name, as cortex-a76, or leave --mcpu out")
    return wanted, cpu


def build(model: onnx.ModelProto, *, triple: str | None = None, mcpu: str | None = None) -> Built:
    """Compile a graph of fixed shapes.

    Args:
        model: from ``static_graph``, weights inside.
        triple: for another machine; this one by default.
        mcpu: LLVM's CPU name; this CPU, or the plainest of another machine, by default.

    Raises:
        BackendError: TVM is missing.
        InputError: unknown triple or CPU.
        UnsupportedError: TVM cannot take the graph.
    """
    require_tvm()
    import tvm
    from tvm.relax.frontend.onnx import from_onnx

    machine, cpu = target_of(triple, mcpu)
    check_graph(model)
    settings: dict[str, Any] = {"kind": "llvm", "mcpu": cpu}
    if machine != host_triple():
        settings["mtriple"] = machine
    start = time.perf_counter()
    said = io.StringIO()  # the front end prints the operator it failed on
    try:
        target = tvm.target.Target(settings)
        with contextlib.redirect_stdout(said):
            executable = tvm.compile(from_onnx(model), target)
    except Exception as exc:  # TVM raises many kinds, most of them with a long C++ trail
        lines = [line.strip() for line in str(exc).splitlines() if line.strip()] or [type(exc).__name__]
        place = " ".join(said.getvalue().split())[:200]
        raise UnsupportedError(
            f"TVM cannot compile the graph: {lines[-1][:300]}", where=place or None, next="try --device cpu_ort"
        ) from exc
    return Built(executable, machine, cpu, time.perf_counter() - start)


def linker(triple: str) -> str | None:
    """The C compiler that links for this machine, or None."""
    names = ("cc", "gcc", "clang") if triple == host_triple() else (f"{triple}-gcc",)
    return next((found for name in names if (found := shutil.which(name))), None)


def export(built: Built, folder: Path, stem: str = "model") -> Path:
    """Write the compiled graph: a shared library where a linker for the machine is found, else a tar of its objects.

    Equal graphs give equal bytes: members are sorted and carry no time, and objects are linked from one folder name.

    Raises:
        UnsupportedError: the linker failed.
    """
    link = linker(built.triple)

    def shared(path: str, objects: list[str], **_: Any) -> None:
        # Relative names, so that the folder of the objects does not get into the library.
        where = Path(objects[0]).parent
        command = [str(link), "-shared", "-fPIC", "-o", str(Path(path).resolve()), *(Path(o).name for o in objects)]
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UnsupportedError(f"{link} cannot link the library: {last[:300]}", next="install a C compiler")

    def archive(path: str, objects: list[str], **_: Any) -> None:
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for name in sorted(objects, key=lambda o: Path(o).name):
                content = Path(name).read_bytes()
                member = tarfile.TarInfo(Path(name).name)
                member.size, member.mode, member.mtime = len(content), 0o644, 0
                tar.addfile(member, io.BytesIO(content))

    path = folder / f"{stem}.{'so' if link else 'tar'}"
    built.executable.export_library(str(path), fcompile=shared if link else archive)
    return path


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
