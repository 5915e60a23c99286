"""Instructions that scalar and AVX2 kernels execute on small fixed workloads, against a committed table.

Times on shared machines say little; counts are the same every time. They belong to a compiler, so the table has a
column for each one it was made with, and the test skips under others. To make the column of the compiler at hand::

    EDGETOK_REFRESH_COUNTS=1 python -m pytest tests/kernels/test_instruction_counts.py

Valgrind does not execute AVX-512: those kernels are guarded by their disassembly instead.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import c_build
import pytest

TABLE = Path(__file__).with_name("instruction_counts.json")
TOLERANCE = 0.03  # a count is exact; this lets harmless edits around a kernel pass
ENV = {"EDGETOK_MAX_ISA": "avx2"}
REFRESH = os.environ.get("EDGETOK_REFRESH_COUNTS", "") not in ("", "0")
pytestmark = pytest.mark.slow


@cache
def compiler() -> str:
    """The compiler as the table names it, as ``cc (Debian 12.2.0-14) 12.2.0 x86_64``."""
    done = subprocess.run(["cc", "--version"], capture_output=True, text=True, check=False)
    return f"{done.stdout.splitlines()[0] if done.stdout else '?'} {os.uname().machine}"


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program with the workloads, or a skip that says what is missing."""
    if shutil.which("valgrind") is None:
        pytest.skip("no valgrind here")
    if shutil.which("cc") is None:
        pytest.skip("no C compiler here")
    if not REFRESH and compiler() not in json.loads(TABLE.read_text()):
        pytest.skip(f"the table holds no counts for {compiler()}; EDGETOK_REFRESH_COUNTS=1 adds them")
    folder = c_build.build(tmp_path_factory.mktemp("counts"), "-DEDGETOK_TESTS=ON", targets=("work",))
    return folder / "kernels_c" / "work"


def count(work: Path, item: str) -> int:
    """Instructions inside the item's counted part."""
    tool = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", "--toggle-collect=counted_work"]
    text = c_build.run(*tool, work, item, env=ENV, timeout=300)
    found = re.search(r"Collected : (\d+)", text)
    assert found, text
    return int(found[1])


def test_no_workload_takes_more_instructions_than_recorded(work: Path) -> None:
    items = c_build.run("valgrind", "--tool=none", "-q", work, env=ENV).split()
    assert any("_scalar_" in item for item in items)
    counts = {item: count(work, item) for item in items}
    table = json.loads(TABLE.read_text())
    if REFRESH:
        table[compiler()] = counts
        TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    known = table[compiler()]
    assert set(counts) == set(known), "workloads came or went: refresh the table (see the head of this file)"
    more = {i: (known[i], n) for i, n in counts.items() if n > known[i] * (1 + TOLERANCE)}
    assert not more, f"instructions (recorded, now): {more}"


def test_a_count_is_the_same_twice(work: Path) -> None:
    item = c_build.run("valgrind", "--tool=none", "-q", work, env=ENV).split()[0]
    assert count(work, item) == count(work, item) > 1000
