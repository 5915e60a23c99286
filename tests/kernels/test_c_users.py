"""C programs against an installation: find_package and pkg-config, in a prefix, in a wheel's tree, and after a move."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import c_build
import pytest

from edgetok import native
from edgetok.errors import BackendError
from edgetok.kernels import c_files
from edgetok.native.table import chosen, kernels

pytestmark = pytest.mark.skipif(native.library_path() is None, reason="libedgetok is not built here: pip install .")
EXAMPLES = c_build.ROOT / "kernels_c" / "examples"
PROGRAMS = sorted(path.stem for path in EXAMPLES.glob("*.c"))


@pytest.fixture(scope="session", params=["prefix", "wheel"])
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the library, installed and then moved as a whole."""
    folder = tmp_path_factory.mktemp(f"install-{request.param}")
    wheel = request.param == "wheel"
    c_build.build(folder / "build", f"-DSKBUILD={int(wheel)}", "-DCMAKE_INSTALL_LIBDIR=lib")
    cmake = c_build.tool("cmake")
    assert cmake
    c_build.run(cmake, "--install", folder / "build", "--prefix", folder / "before")
    shutil.rmtree(folder / "build")
    (folder / "before").rename(folder / "after")
    return folder / "after" / ("_lib" if wheel else "lib")


@pytest.mark.slow
def test_programs_find_the_cmake_package(installed: Path, tmp_path: Path) -> None:
    c_build.build(tmp_path, f"-Dedgetok_DIR={installed / 'cmake' / 'edgetok'}", source=EXAMPLES)
    for name in PROGRAMS:
        c_build.run(tmp_path / name, timeout=60)


@pytest.mark.slow
def test_programs_build_with_pkg_config(installed: Path, tmp_path: Path) -> None:
    if shutil.which("pkg-config") is None:
        pytest.skip("no pkg-config here")
    env = {"PKG_CONFIG_PATH": str(installed / "pkgconfig")}
    flags = c_build.run("pkg-config", "--cflags", "--libs", "edgetok", env=env).split()
    assert c_build.run("pkg-config", "--modversion", "edgetok", env=env).strip() in native.caps().version
    for name in PROGRAMS:
        program = tmp_path / name
        c_build.run("cc", "-std=c11", EXAMPLES / f"{name}.c", "-o", program, *flags, "-lm", f"-Wl,-rpath,{installed}")
        c_build.run(program, timeout=60)


@pytest.mark.slow
def test_another_version_is_refused_by_find_package(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.20)\nproject(old LANGUAGES C)\nfind_package(edgetok 99 REQUIRED)\n"
    )
    cmake = c_build.tool("cmake")
    assert cmake
    command = [cmake, "-S", tmp_path, "-B", tmp_path / "b", f"-Dedgetok_DIR={installed / 'cmake' / 'edgetok'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "99" in done.stderr


@pytest.mark.slow
def test_headers_compile_alone_and_as_cpp(installed: Path, tmp_path: Path) -> None:
    include = installed / "include" if installed.name == "_lib" else installed.parent / "include"
    headers = sorted((include / "edgetok").glob("*.h"))
    assert len(headers) >= 6
    for header in headers:
        source = tmp_path / "one.c"
        source.write_text(f'#include "edgetok/{header.name}"\nint main(void) {{ return 0; }}\n')
        strict = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", f"-I{include}"]
        c_build.run("cc", "-std=c11", *strict, source)
        if shutil.which("c++"):
            c_build.run("c++", "-x", "c++", "-std=c++11", *strict, source)


@pytest.mark.slow
def test_shared_object_name_carries_the_abi_number(installed: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("no readelf here")
    text = c_build.run("readelf", "-d", installed / "libedgetok.so")
    expected = "libedgetok.so" if installed.name == "_lib" else f"libedgetok.so.{native.ABI}"
    assert f"soname: [{expected}]" in text


def test_only_etk_names_are_exported() -> None:
    path = native.library_path()
    if shutil.which("nm") is None or path is None or path.suffix != ".so":
        pytest.skip("needs nm and an ELF library")
    lines = c_build.run("nm", "--dynamic", "--defined-only", path).splitlines()
    names = {line.split()[-1] for line in lines if len(line.split()) == 3}
    assert {"etk_version", "etk_get_caps", "etk_pool_create"} <= names
    assert {name for name in names if not name.startswith("etk_")} - {"_init", "_fini"} == set()


def test_every_declared_function_is_exported() -> None:
    """A function that a header promises and the library lacks is found here, not by the user's linker."""
    path = native.library_path()
    if shutil.which("nm") is None or path is None or path.suffix != ".so":
        pytest.skip("needs nm and an ELF library")
    lines = c_build.run("nm", "--dynamic", "--defined-only", path).splitlines()
    names = {line.split()[-1] for line in lines if len(line.split()) == 3}
    declared = set()
    for header in (c_build.ROOT / "kernels_c" / "include" / "edgetok").glob("*.h"):
        declared |= set(re.findall(r"ETK_API\b[^;(]*?\b(etk_\w+)\s*\(", header.read_text()))
    assert len(declared) > 5
    assert declared - names == set()


def test_table_lists_every_row_of_this_family() -> None:
    text = (c_build.ROOT / "kernels_c" / "kernels.def").read_text()
    family = "ARM" if os.uname().machine in ("aarch64", "arm64") else "X86"
    rows = re.findall(rf"^ETK_(?:ANY|{family})\((\w+), *(\w+), *(\w+)\)", text, re.MULTILINE)
    assert [(k.op, k.isa, k.name) for k in kernels()] == rows


def test_usable_kernels_follow_the_probe() -> None:
    usable = set(native.caps().usable) | {"scalar"}
    for kernel in kernels():
        assert kernel.usable == (kernel.isa in usable)
    works = [kernel.work for kernel in chosen()]
    assert len(works) == len(set(works))
    assert set(works) == {kernel.work for kernel in kernels() if kernel.usable}


def test_folders_for_c_programs_exist_or_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = native.library_path()
    assert path is not None
    if (path.resolve().parent / "include").is_dir():
        assert (c_files.include_dir() / "edgetok" / "edgetok.h").is_file()
        assert (c_files.cmake_dir() / "edgetokConfig.cmake").is_file()
        assert (c_files.pkgconfig_dir() / "edgetok.pc").is_file()
        assert (c_files.library_dir() / path.name).is_file()
    monkeypatch.setenv("EDGETOK_LIBRARY", str(tmp_path / "libedgetok.so"))
    with pytest.raises(BackendError, match="no files for C programs"):
        c_files.include_dir()
