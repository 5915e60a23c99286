"""Hot loops of the AVX-512 and AVX-VNNI attention kernels, counted in their disassembly.

Valgrind cannot execute these instructions and times on shared machines say little, so the guard reads the code: a loop
around ``vpdpbusd`` may hold the loads its tile needs and nothing that a spilled or copied accumulator would add.
"""

from __future__ import annotations

import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import c_build
import pytest

pytestmark = pytest.mark.slow

TILES = {  # (kernel, function): multiply-adds in a step of its tile, vector loads in that step, such loops at least
    ("attn_s8_avx512vbmi_6x64", "strip_6"): (24, 4 + 6, 2),
    ("attn_s8_avx512vnni_6x64", "strip_6"): (24, 4 + 6, 2),
    ("attn_s8_avx512vbmi_6x64", "block_s8"): (16, 4 + 4, 5),
    ("attn_s8_avx512vnni_6x64", "block_s8"): (16, 4 + 4, 5),
    ("attn_s8_avxvnni_6x16", "strip_6"): (12, 2 + 6, 2),
}
LINE = re.compile(r"^\s*([0-9a-f]+):\t(?:\{\w+\} )?(\S+)\s*(.*)$")
VECTOR = re.compile(r"%[xyz]mm")
MEMORY = re.compile(r"-?(?:0x[0-9a-f]+)?\([^)]*\)")


@dataclass(frozen=True)
class Instruction:
    """One line of objdump: address, mnemonic, operands in AT&T order."""

    at: int
    name: str
    args: str

    @property
    def target(self) -> int | None:
        """Where a jump goes, if this is one."""
        found = re.match(r"([0-9a-f]+) <", self.args) if self.name.startswith("j") else None
        return int(found[1], 16) if found else None

    @property
    def stores(self) -> bool:
        """Whether it writes memory: the last operand is an address and it does not just compare."""
        last = re.split(r",(?![^(]*\))", self.args)[-1].strip()  # commas outside of parentheses part operands
        return bool(MEMORY.fullmatch(last)) and not self.name.startswith(("cmp", "test", "j", "prefetch"))

    @property
    def loads_vector(self) -> bool:
        """Whether it reads memory into a vector register."""
        return bool(MEMORY.search(self.args)) and bool(VECTOR.search(self.args)) and not self.stores


def loops(text: str) -> dict[str, list[list[Instruction]]]:
    """Innermost loops of every function: what lies from the target of a backward jump to the jump."""
    out: dict[str, list[list[Instruction]]] = {}
    for part in re.split(r"^[0-9a-f]+ <", text, flags=re.MULTILINE)[1:]:
        name = part[: part.index(">")]
        code = [
            Instruction(int(m[1], 16), m[2], m[3].split("#")[0].strip())
            for m in map(LINE.match, part.splitlines())
            if m
        ]
        spans = [(i.target, i.at) for i in code if i.target is not None and i.target <= i.at]
        inner = [(a, b) for a, b in spans if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans)]
        out[name] = [[i for i in code if a <= i.at <= b] for a, b in inner]
    return out


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The disassembly of each kernel's object file, or a skip that says what is missing."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("these kernels are for x86")
    if shutil.which("objdump") is None:
        pytest.skip("no objdump here")
    folder = c_build.build(tmp_path_factory.mktemp("hot"), targets=("edgetok_objects",))
    found: dict[str, Path] = {path.name.split(".")[0]: path for path in folder.rglob("attn_*.o")}
    return {name: c_build.run("objdump", "-d", "--no-show-raw-insn", found[name]) for name, _ in TILES}


@pytest.mark.parametrize(("kernel", "function"), sorted(TILES))
def test_full_strip_loops_hold_only_multiply_adds_and_their_loads(
    objects: dict[str, str], kernel: str, function: str
) -> None:
    products, loads, least = TILES[kernel, function]
    body = loops(objects[kernel])[function]
    hot = [loop for loop in body if sum(i.name == "vpdpbusd" for i in loop) >= products]
    assert len(hot) >= least, "QK and PV"
    for loop in hot:
        text = "\n".join(f"{i.name} {i.args}" for i in loop)
        done = sum(i.name == "vpdpbusd" for i in loop)
        assert done % products == 0, text
        assert sum(i.loads_vector for i in loop) <= loads * done // products, text
        assert not any(i.stores for i in loop), f"a store, as of a spilled accumulator:\n{text}"
        copies = [i for i in loop if i.name.startswith("vmov") and not MEMORY.search(i.args)]
        assert not copies, f"copies between registers:\n{text}"
        assert not any(
            re.search(r"\(%r[sb]p", i.args) for i in loop if VECTOR.search(i.args) and i.name != "vpbroadcastd"
        ), text
        assert len(loop) <= (products + loads + 8) * done // products, text


def test_the_reader_sees_stores_copies_and_loads() -> None:
    line = "   {}:\t{}\n"
    code = [
        "vmovdqa64 %zmm1,0x40(%rsp)",
        "vmovdqa64 %zmm1,%zmm2",
        "vpbroadcastd (%rax,%rcx,4),%zmm3",
        "vpdpbusd (%rax),%zmm1,%zmm2",
        "cmp %rax,(%rdx)",
    ]
    text = (
        "0 <f>:\n"
        + "".join(line.format(f"{16 * (n + 1):x}", c) for n, c in enumerate(code))
        + line.format("70", "jne    10 <f+0x10>")
    )
    (loop,) = loops(text)["f"]
    assert [i.stores for i in loop] == [True, False, False, False, False, False]
    assert [i.loads_vector for i in loop] == [False, False, True, True, False, False]
    assert sum(i.name == "vpdpbusd" for i in loop) == 1
