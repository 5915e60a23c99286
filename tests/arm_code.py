"""Count ARM instructions: the hot loops in the disassembly, and a whole strip executed under qemu-user.

As a program it prints both for every attention kernel; nothing here is a time::

    cmake -S . -B build/aarch64 -DCMAKE_TOOLCHAIN_FILE=$PWD/kernels_c/cmake/aarch64-linux-gnu.cmake -DEDGETOK_TESTS=ON
    cmake --build build/aarch64 && python tests/arm_code.py build/aarch64/kernels_c
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

OBJDUMP = "aarch64-linux-gnu-objdump"
SYSROOT = "/usr/aarch64-linux-gnu"
# What counts as a multiply-accumulate, by kernel.
MACS = {
    "neon": ("smull", "smull2", "smlal", "smlal2", "sadalp"),
    "neondot": ("sdot",),
    "neoni8mm": ("smmla", "usmmla"),
    "f32": ("fmla",),
}
STORES = ("str", "stp", "stur", "st1")
LINE = re.compile(r"^\s+([0-9a-f]+):\s+(\S+)\s*(.*)$")
TRACED = re.compile(r"\[[0-9a-f]+/([0-9a-f]+)/[0-9a-f]+/[0-9a-f]+\] ?(\S*)")


@dataclass(frozen=True)
class Instruction:
    """One line of the disassembly."""

    address: int
    name: str
    operands: str


def disassembly(file: Path, function: str = "") -> list[Instruction]:
    """The instructions of an object or program, or of one function in it."""
    only = [f"--disassemble={function}"] if function else ["-d"]
    text = subprocess.run(
        [OBJDUMP, "--no-show-raw-insn", *only, str(file)], capture_output=True, text=True, check=True
    ).stdout
    found = (LINE.match(line) for line in text.splitlines())
    return [Instruction(int(m[1], 16), m[2], m[3]) for m in found if m]


def innermost_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Bodies of the loops that hold no other loop: what lies between a backward branch and its target."""
    spans = []
    for i in code:
        target = re.search(r"\b([0-9a-f]+) <", i.operands) if i.name.startswith(("b.", "cbnz", "tbnz")) else None
        if target and int(target[1], 16) <= i.address:
            spans.append((int(target[1], 16), i.address))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [[i for i in code if low <= i.address <= high] for low, high in inner]


def hottest(code: list[Instruction], macs: tuple[str, ...]) -> list[Instruction]:
    """The innermost loop with the most multiply-accumulates, the shortest of those."""
    return max(innermost_loops(code), key=lambda body: (sum(i.name in macs for i in body), -len(body)))


def executed(program: Path, item: str, cpu: str = "max") -> dict[str, Counter[str]]:
    """Instructions that `work ITEM` executes inside its counted part, by function and mnemonic.

    qemu translates one instruction at a time and logs each; its log names the function.
    """
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None:
        raise FileNotFoundError("qemu-aarch64")
    names = {i.address & 0xFFFFFF: i.name for i in disassembly(program)}
    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [emulator, "-L", SYSROOT, "-cpu", cpu, "-singlestep", "-d", "exec,nochain", "-D", str(log)]
        subprocess.run([*command, str(program), item], check=True, timeout=300)
        counting = False
        with log.open() as lines:
            for line in lines:
                found = TRACED.search(line)
                if not found:
                    continue
                counting = counting or found[2] == "counted_work"
                if counting and found[2] == "attn_items":
                    break
                if counting and found[2]:
                    counts.setdefault(found[2], Counter())[names[int(found[1], 16) & 0xFFFFFF]] += 1
    return counts


def main(folder: str) -> None:
    """Print hot loops and executed instructions of a cross-build's attention kernels."""
    built = Path(folder)
    objects = built / "CMakeFiles" / "edgetok_objects.dir" / "src"
    print("hot loops: kernel, function, instructions, multiply-accumulates, share, loads, stores")
    for isa in ("neon", "neondot", "neoni8mm"):
        parts = {
            f"attn_s8_{isa}_8x64": ("qk_s8", "pv_rows", "qk_f32", "pv_scaled_f32"),
            f"gemm_s8_{isa}_8x16": ("tile_f32", "tile_s32"),
        }
        for name, function in ((name, function) for name, functions in parts.items() for function in functions):
            macs = MACS["f32"] if name.startswith("attn") and function.endswith("f32") else MACS[isa]
            body = hottest(disassembly(objects / f"{name}.c.o", function), macs)
            n = sum(i.name in macs for i in body)
            loads = sum(i.name.startswith("ld") for i in body)
            stores = sum(i.name in STORES for i in body)
            print(f"{name:22} {function:14} {len(body):4} {n:4} {n / len(body):5.0%} {loads:3} {stores:3}")
    print("\nexecuted for one strip of 8 rows x 64 keys, d = dv = 64 (mean of four)")
    for isa in ("neon", "neondot", "neoni8mm"):
        for step in ("strip_s8", "strip_f32"):
            counts = executed(built / "work", f"attn_s8_{isa}_8x64/{step}")
            macs = MACS["f32"] if step == "strip_f32" else MACS[isa]
            total = sum(sum(c.values()) for c in counts.values())
            n = sum(c[mac] for c in counts.values() for mac in macs)
            parts = ", ".join(f"{f} {sum(c.values()) // 4}" for f, c in counts.items() if sum(c.values()) > 400)
            print(f"attn_s8_{isa}_8x64 {step}: {total // 4}, of them {n / total:.0%} multiply-accumulates ({parts})")


if __name__ == "__main__":
    main(sys.argv[1])
