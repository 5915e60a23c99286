"""docs/kernels.md says what is so: its programs run, its statuses are the header's, its picture is the script's."""

from __future__ import annotations

import ctypes
import re
import runpy
import shutil
from pathlib import Path

import c_build
import pytest

from edgetok import kernels, native

DOCS = c_build.ROOT / "docs"
TEXT = (DOCS / "kernels.md").read_text("utf-8")
HEADERS = c_build.ROOT / "kernels_c" / "include"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.S | re.M)


def test_python_examples_run(tmp_path: Path) -> None:
    assert len(blocks("python")) >= 4
    program = tmp_path / "examples.py"
    program.write_text("\n".join(blocks("python")))
    runpy.run_path(str(program))


def test_c_example_compiles_and_runs(tmp_path: Path) -> None:
    library = native.library_path()
    if shutil.which("cc") is None or library is None:
        pytest.skip("no C compiler here")
    (source,) = blocks("c")
    (tmp_path / "example.c").write_text(source)
    strict = ["-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{HEADERS}"]
    c_build.run(
        "cc", *strict, tmp_path / "example.c", "-o", tmp_path / "example", library, f"-Wl,-rpath,{library.parent}"
    )
    assert c_build.run(tmp_path / "example").rstrip().endswith(": ok")


def test_named_functions_exist() -> None:
    for name in re.findall(r"`(\w+)`", "\n".join(line for line in TEXT.splitlines() if line.startswith("| `"))):
        if not name.startswith("ETK_") and not name.endswith("Error"):
            assert hasattr(kernels, name), name


def test_statuses_are_those_of_the_header() -> None:
    header = (HEADERS / "edgetok" / "base.h").read_text()
    named = dict(re.findall(r"^\s+(ETK_(?:OK|NOTE_\w+|E_\w+)) = (-?\d+)", header, re.M))
    assert dict(re.findall(r"^\| `(ETK_\w+)` \| (-?\d+) \|", TEXT, re.M)) == named
    lib = native.library()
    lib.etk_strerror.restype = ctypes.c_char_p
    for name, number, meaning in re.findall(r"^\| `(ETK_\w+)` \| (-?\d+) \| [^|]+ \| (.+) \|$", TEXT, re.M):
        assert lib.etk_strerror(int(number)).decode() == meaning, name


def test_picture_is_what_the_script_draws() -> None:
    drawn = runpy.run_path(str(DOCS / "figures" / "kv_page.py"))["svg"]()
    assert drawn == (DOCS / "figures" / "kv_page.svg").read_text("utf-8")
