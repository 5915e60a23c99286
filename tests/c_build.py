"""Build kernels_c/ with CMake for tests that run C programs: plain, under sanitizers, with another compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
C_TESTS = sorted(path.stem for path in (ROOT / "kernels_c" / "tests").glob("test_*.c"))


def tool(name: str) -> str | None:
    """The program ``name``: beside this Python (a package of the test extra put it there) or on the path."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.is_file() else shutil.which(name)


def run(*command: str | Path, env: Mapping[str, str] | None = None, timeout: float = 900) -> str:
    """Run a program; its output, or a failed test that shows it."""
    done = subprocess.run(
        [str(c) for c in command],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        check=False,
        env={**os.environ, **(env or {})},
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0, f"{' '.join(map(str, command))}: exit {done.returncode}\n{text[-6000:]}"
    return text


def build(folder: Path, *options: str, targets: tuple[str, ...] = (), source: Path = ROOT) -> Path:
    """Configure ``source`` into ``folder`` and build it; ``folder``.

    Skips the test where there is no CMake or no C compiler.
    """
    cmake = tool("cmake")
    if cmake is None:
        pytest.skip("no CMake here: pip install cmake")
    named = any(option.startswith("-DCMAKE_C_COMPILER=") for option in options)
    if not named and shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("no C compiler here")
    ninja = tool("ninja")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    run(cmake, "-S", source, "-B", folder, *generator, "-DCMAKE_BUILD_TYPE=Release", *options)
    wanted = ["--target", *targets] if targets else []
    run(cmake, "--build", folder, "--parallel", str(os.cpu_count() or 1), *wanted)
    return folder
