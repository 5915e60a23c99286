"""The inner loops of the matrix products, counted in the disassembly of the library.

Times on shared machines say little, and Valgrind does not execute AVX-512; but the loop in which a kernel spends its
time is the same instructions every time. A loop is found as the span of a backward jump that holds the dot products.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache

import pytest

from edgetok import native

OBJDUMP = shutil.which("objdump")
pytestmark = [
    pytest.mark.skipif(native.library_path() is None, reason="libedgetok is not built here: pip install ."),
    pytest.mark.skipif(OBJDUMP is None, reason="no objdump here: apt install binutils"),
]
LINE = re.compile(r"^\s*([0-9a-f]+):\s+(\S.*)$")
JUMP = re.compile(r"^j\w+\s+([0-9a-f]+)")
COPIES = 6  # in 4 k, register to register, which processors do by renaming: gcc 12 has them in the smaller tiles
VECTOR = re.compile(r"%[xyz]mm")


@dataclass(frozen=True)
class Loop:
    """Counts over the instructions of one loop body."""

    dots: int
    stores: int  # of vectors
    stack: int  # vectors to or from the stack: spills
    copies: int  # register to register
    others: int  # vector instructions that are none of these, loads included


@cache
def functions() -> dict[str, list[list[tuple[int, str]]]]:
    """Instructions by function; a name may belong to several files (one static function for each instruction set)."""
    path = native.library_path()
    assert OBJDUMP
    text = subprocess.run(
        [OBJDUMP, "-d", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, list[list[tuple[int, str]]]] = {}
    body: list[tuple[int, str]] = []
    for line in text.splitlines():
        if head := re.match(r"^[0-9a-f]+ <([\w.]+)>:", line):
            body = []
            found.setdefault(head[1], []).append(body)
        elif match := LINE.match(line):
            body.append((int(match[1], 16), match[2]))
    return found


def body_of(name: str, register: str) -> list[tuple[int, str]]:
    """The function of that name whose dot products use ``register`` (zmm or ymm)."""
    known = functions()
    if not any(key.startswith("s32_8_") for key in known):
        pytest.skip("the library is stripped or was not built for x86")
    fits = [b for b in known.get(name, []) if any("vpdpbusd" in i and register in i for _, i in b)]
    assert len(fits) == 1, f"{len(fits)} functions {name} with vpdpbusd on {register}"
    return fits[0]


def hot_loop(name: str, register: str) -> Loop:
    """The innermost loop with the most dot products."""
    body = body_of(name, register)
    spans = []
    for at, text in body:
        if (jump := JUMP.match(text)) and (to := int(jump[1], 16)) < at:
            inside = [t for where, t in body if to <= where <= at]
            dots = sum("vpdpbusd" in t for t in inside)
            if dots:
                spans.append((len(inside), inside))
    assert spans, f"no loop with vpdpbusd in {name}"
    inside = min(spans)[1]  # the shortest loop that holds any is the innermost
    vectors = [t for t in inside if VECTOR.search(t) and not t.startswith("prefetch")]
    dots = sum("vpdpbusd" in t for t in vectors)
    stores = sum(t.startswith("vmov") and t.rstrip().endswith(")") for t in vectors)
    stack = sum("(%rsp" in t or "(%rbp" in t for t in vectors)
    copies = sum(re.match(r"vmov\w+\s+%[xyz]mm\d+,%[xyz]mm\d+$", t) is not None for t in vectors)
    return Loop(dots, stores, stack, copies, len(vectors) - dots - stores - copies)


@pytest.mark.parametrize("kind", ["s32", "f32"])
@pytest.mark.parametrize("rows", range(1, 7))
def test_int8_loop_is_dot_products_and_loads(kind: str, rows: int) -> None:
    loop = hot_loop(f"{kind}_8_{rows}", "%zmm")
    # 4 vectors of weights, a broadcast for each row, rows x 4 dot products, perhaps unrolled
    steps = loop.dots // (4 * rows)
    assert loop.dots == 4 * rows * steps >= 4 * rows
    assert (loop.stores, loop.stack) == (0, 0)
    assert loop.copies <= (0 if rows == 6 else COPIES * steps)
    assert loop.others <= steps * (4 + rows)


@pytest.mark.parametrize("kind", ["s32", "f32"])
@pytest.mark.parametrize("rows", range(1, 7))
def test_int4_loop_is_dot_products_masks_and_shifts(kind: str, rows: int) -> None:
    loop = hot_loop(f"{kind}_4_{rows}", "%zmm")
    # 8 k: 4 loads of nibbles, each an and, a shift and an and; up to 2 broadcasts for each row (none: inside vpdpbusd)
    steps = loop.dots // (8 * rows)
    assert loop.dots == 8 * rows * steps >= 8 * rows
    assert (loop.stores, loop.stack) == (0, 0)
    assert loop.copies <= 2 * COPIES * steps
    assert loop.others <= steps * (4 * 4 + 2 * rows)


@pytest.mark.parametrize("name", ["s32_8_6", "f32_8_6"])
def test_avx_vnni_loop_does_not_spill(name: str) -> None:
    loop = hot_loop(name, "%ymm")
    steps = loop.dots // 12
    assert loop.dots == 12 * steps >= 12
    assert (loop.stores, loop.stack) == (0, 0)
    assert loop.copies <= COPIES * steps
    assert loop.others <= steps * (2 + 6)


def test_eight_bit_products_of_avx2_do_not_saturate() -> None:
    """Codes of 8 bits go through vpmaddwd only; vpmaddubsw, which saturates, is for codes of 4 bits."""
    known = functions()
    avx2 = [b for b in known.get("s32_8_4", []) if not any("vpdpbusd" in t for _, t in b)]
    if not avx2:
        pytest.skip("no AVX2 kernel in this library")
    assert len(avx2) == 1
    loops = []
    for at, text in avx2[0]:
        if (jump := JUMP.match(text)) and (to := int(jump[1], 16)) < at:
            loops.append([t for where, t in avx2[0] if to <= where <= at])
    wide = [x for x in loops if any("vpmovzxbw" in t for t in x) and len(x) < 80]
    assert wide, "no loop that widens 8-bit codes"
    inner = min(wide, key=len)
    assert not any("vpmaddubsw" in t for t in inner)
    assert sum("vpmaddwd" in t for t in inner) % 8 == 0
