"""Every C test as it is, under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import c_build
import pytest

SANITIZERS = {"plain": "", "address-undefined": "address,undefined", "thread": "thread"}
ENV = {
    # Not detect_stack_use_after_return: gcc before 14 misaligns 64-byte vectors on its stack (gcc bug 110027).
    "ASAN_OPTIONS": "strict_string_checks=1:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build folder by kind, filled on first use."""
    return {kind: tmp_path_factory.mktemp(kind) for kind in SANITIZERS}


def build(built: dict[str, Path], kind: str) -> Path:
    folder = built[kind]
    if not (folder / "kernels_c" / "done").exists():
        if kind != "plain":
            probe(SANITIZERS[kind], folder)
        c_build.build(folder, "-DEDGETOK_TESTS=ON", f"-DEDGETOK_SANITIZE={SANITIZERS[kind]}")
        (folder / "kernels_c" / "done").touch()
    return folder / "kernels_c"


def probe(sanitizer: str, folder: Path) -> None:
    """Skip where the compiler has no such sanitizer or the kernel's address layout does not suit it."""
    source = folder / "probe.c"
    source.write_text("int main(void) { return 0; }\n")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    made = subprocess.run([compiler, f"-fsanitize={sanitizer}", source, "-o", folder / "probe"], capture_output=True)
    if made.returncode:
        pytest.skip(f"the compiler has no -fsanitize={sanitizer}")
    if subprocess.run([*launcher(), folder / "probe"], capture_output=True).returncode:
        pytest.skip(f"programs under -fsanitize={sanitizer} do not start on this system")


def launcher() -> list[str]:
    """Without address randomization where that can be had: older ThreadSanitizers do not stand much of it."""
    setarch = shutil.which("setarch")
    if setarch and subprocess.run([setarch, "-R", "true"], capture_output=True).returncode == 0:
        return [setarch, "-R"]
    return []


@pytest.mark.parametrize("name", c_build.C_TESTS)
@pytest.mark.parametrize("kind", SANITIZERS)
def test_c_program_passes(built: dict[str, Path], kind: str, name: str) -> None:
    c_build.run(*launcher(), build(built, kind) / name, env=ENV, timeout=600)


@pytest.mark.parametrize(
    ("kind", "fault", "word"),
    [
        ("address-undefined", "freed", "heap-use-after-free"),
        ("address-undefined", "overflow", "signed integer overflow"),
        ("thread", "race", "data race"),
    ],
)
def test_sanitizer_build_ends_at_the_first_fault(built: dict[str, Path], kind: str, fault: str, word: str) -> None:
    program = build(built, kind) / "fault"
    done = subprocess.run(
        [*launcher(), program, fault], capture_output=True, text=True, env={**os.environ, **ENV}, timeout=60
    )
    assert done.returncode != 0
    assert word in done.stderr
    assert "went on" not in done.stdout
