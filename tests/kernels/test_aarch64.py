"""The C tests cross-compiled for 64-bit ARM and run under qemu-user, and the cross-built wheel."""

from __future__ import annotations

import importlib.util
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import arm_code
import c_build
import pytest

TOOLCHAIN = c_build.ROOT / "kernels_c" / "cmake" / "aarch64-linux-gnu.cmake"
SYSROOT = Path("/usr/aarch64-linux-gnu")
COMPILER = "aarch64-linux-gnu-gcc"
# What each imitated processor has, hence what the library must choose there.
CPUS = {"max": "neoni8mm", "neoverse-n1": "neondot", "cortex-a72": "neon"}
BELOW = {"neoni8mm": ("neoni8mm", "neondot", "neon"), "neondot": ("neondot", "neon"), "neon": ("neon",)}
# Hot loops as GCC 12 compiles them: instructions of the loop, multiply-accumulates among them.
LOOPS = {
    ("attn_s8_neon_8x64", "qk_s8"): (62, 48),
    ("attn_s8_neon_8x64", "pv_rows"): (63, 48),
    ("attn_s8_neondot_8x64", "qk_s8"): (82, 64),
    ("attn_s8_neondot_8x64", "pv_rows"): (85, 64),
    ("attn_s8_neoni8mm_8x64", "qk_s8"): (26, 16),
    ("attn_s8_neoni8mm_8x64", "pv_rows"): (26, 16),
    ("attn_s8_neondot_8x64", "qk_f32"): (82, 64),
    ("attn_s8_neondot_8x64", "pv_scaled_f32"): (85, 64),
    ("gemm_s8_neon_8x16", "tile_f32"): (68, 48),
    ("gemm_s8_neondot_8x16", "tile_f32"): (41, 32),
    ("gemm_s8_neondot_8x16", "tile_s32"): (41, 32),
    ("gemm_s8_neoni8mm_8x16", "tile_f32"): (24, 16),
    ("gemm_s8_neoni8mm_8x16", "tile_s32"): (24, 16),
}
# Instructions executed by four strips of 8 rows x 64 keys, d = dv = 64, tests/arm_code.py prints them by part.
EXECUTED = {
    "attn_s8_neon_8x64/strip_s8": 87600,
    "attn_s8_neondot_8x64/strip_s8": 36310,
    "attn_s8_neoni8mm_8x64/strip_s8": 29100,
    "attn_s8_neondot_8x64/strip_f32": 104190,
}
TOLERANCE = 0.03  # a count is exact; this lets harmless edits around a kernel pass
EM_AARCH64 = 183  # e_machine of ELF
PROBE = """#include <edgetok/edgetok.h>
#include <stdio.h>
int main(void) {
  etk_caps caps = {.struct_size = sizeof caps};
  if (etk_get_caps(&caps) != ETK_OK) return 1;
  printf("%s %u\\n", etk_isa_name(caps.usable), (unsigned)etk_abi());
  return 0;
}
"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER} here: apt install gcc-aarch64-linux-gnu"),
]


def qemu(cpu: str, program: Path, env: dict[str, str] | None = None) -> str:
    """Run an ARM program on an imitated processor; its output."""
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None:
        pytest.skip("no qemu-aarch64 here: apt install qemu-user")
    env = {"EDGETOK_EMULATED": "1", **(env or {})}
    settings = [part for name, value in env.items() for part in ("-E", f"{name}={value}")]
    return c_build.run(emulator, "-L", SYSROOT, "-cpu", cpu, *settings, program, timeout=600)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the cross-compiled library and C tests."""
    folder = tmp_path_factory.mktemp("aarch64")
    c_build.build(folder, f"-DCMAKE_TOOLCHAIN_FILE={TOOLCHAIN}", f"-DCMAKE_C_COMPILER={COMPILER}", "-DEDGETOK_TESTS=ON")
    return folder / "kernels_c"


@pytest.fixture(scope="session")
def probe(built: Path) -> Path:
    """A program linked to the cross-compiled library that prints what it would choose."""
    source = built / "probe.c"
    source.write_text(PROBE)
    include = c_build.ROOT / "kernels_c" / "include"
    c_build.run(
        COMPILER,
        "-std=c11",
        f"-I{include}",
        source,
        f"-L{built}",
        "-ledgetok",
        "-Wl,-rpath,$ORIGIN",
        "-o",
        built / "probe",
    )
    return built / "probe"


def machine(head: bytes) -> int:
    assert head[:6] == b"\x7fELF\x02\x01", "not a little-endian 64-bit ELF file"
    return int(struct.unpack_from("<H", head, 18)[0])


@pytest.mark.parametrize("name", c_build.C_TESTS)
@pytest.mark.parametrize("cpu", CPUS)
def test_c_program_passes(built: Path, cpu: str, name: str) -> None:
    qemu(cpu, built / name)


@pytest.mark.parametrize("cpu", CPUS)
def test_best_isa_is_chosen_at_run_time(probe: Path, cpu: str) -> None:
    best = CPUS[cpu]
    assert qemu(cpu, probe).split()[0] == best
    for cap in BELOW["neoni8mm"]:
        want = cap if cap in BELOW[best] else best
        assert qemu(cpu, probe, {"EDGETOK_MAX_ISA": cap}).split()[0] == want
    assert qemu(cpu, probe, {"EDGETOK_MAX_ISA": "scalar"}).split()[0] == "scalar"


@pytest.fixture(scope="session")
def counted(built: Path) -> Path:
    """The build folder, where the compiler is the one whose counts stand above."""
    version = c_build.run(COMPILER, "-dumpversion").strip()
    if version.split(".")[0] != "12":
        pytest.skip(f"the counts are those of {COMPILER} 12, this is {version}")
    return built


@pytest.mark.parametrize(("kernel", "function"), LOOPS)
def test_hot_loop_multiplies_and_spills_nothing(counted: Path, kernel: str, function: str) -> None:
    """Nothing ARM is timed, so what can be held is that the loop is made of what it should be made of."""
    code = counted / "CMakeFiles" / "edgetok_objects.dir" / "src" / f"{kernel}.c.o"
    isa = "f32" if kernel.startswith("attn") and function.endswith("f32") else kernel.split("_")[2]
    body = arm_code.hottest(arm_code.disassembly(code, function), arm_code.MACS[isa])
    length, multiplies = LOOPS[kernel, function]
    assert sum(i.name in arm_code.MACS[isa] for i in body) == multiplies
    assert not [i for i in body if i.name in arm_code.STORES]
    assert len(body) <= length * (1 + TOLERANCE)


@pytest.mark.parametrize("item", EXECUTED)
def test_strip_executes_no_more_instructions_than_recorded(counted: Path, item: str) -> None:
    if not (shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")):
        pytest.skip("no qemu-aarch64 here: apt install qemu-user")
    counts = arm_code.executed(counted / "work", item)
    total = sum(sum(c.values()) for c in counts.values())
    assert total <= EXECUTED[item] * (1 + TOLERANCE)
    assert total > EXECUTED[item] * 0.5, "half of the work is missing, or the table is stale"


def test_wheel_cross_builds_for_linux_aarch64(tmp_path: Path) -> None:
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("scikit_build_core") else []
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", *isolation, "-w", tmp_path, c_build.ROOT],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={
            **os.environ,
            "CMAKE_ARGS": f"-DCMAKE_TOOLCHAIN_FILE={TOOLCHAIN}",
            "_PYTHON_HOST_PLATFORM": "linux-aarch64",
        },
    )
    text = done.stdout + done.stderr
    if "No matching distribution found for scikit-build-core" in text:
        pytest.skip("scikit-build-core cannot be installed here: no package index")
    assert done.returncode == 0, text[-6000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-linux_aarch64.whl")
    with zipfile.ZipFile(wheel) as archive:
        (library,) = (name for name in archive.namelist() if name.endswith("libedgetok.so"))
        assert machine(archive.read(library)) == EM_AARCH64
        (tags,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        assert "Tag: py3-none-linux_aarch64" in archive.read(tags).decode()
