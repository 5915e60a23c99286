"""libedgetok as Python sees it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import edgetok
from edgetok import native
from edgetok.errors import BackendError

pytestmark = pytest.mark.skipif(native.library_path() is None, reason="libedgetok is not built here: pip install .")


def isa_with(cap: str) -> subprocess.CompletedProcess[str]:
    code = "from edgetok import native; c = native.caps(); print(c.isa, *c.usable)"
    env = {**os.environ, "EDGETOK_MAX_ISA": cap}
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=env, check=False)


def test_version_is_the_packages() -> None:
    assert native.caps().version == edgetok.__version__


def test_best_isa_is_usable_and_usable_is_found() -> None:
    caps = native.caps()
    assert set(caps.usable) <= set(caps.cpu)
    assert caps.isa == "scalar" or caps.isa in caps.usable


def test_probe_agrees_with_the_kernel() -> None:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        pytest.skip("no /proc/cpuinfo on this system")
    flags = {word for line in text.splitlines() if line.startswith("flags") for word in line.split()}
    if not flags:
        pytest.skip("no x86 flags line")
    assert ("avx2" in native.caps().cpu) == ({"avx2", "fma", "f16c"} <= flags)
    need = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}
    assert ("avx512vnni" in native.caps().cpu) == (need <= flags)


def test_cap_clears_what_is_above() -> None:
    out = isa_with("scalar")
    assert out.stdout.split() == ["scalar"]
    if "avx512vnni" in native.caps().cpu:
        assert isa_with("avx2").stdout.split() == ["avx2", "avx2"]


def test_mistyped_cap_is_an_error_not_no_cap() -> None:
    out = isa_with("avx3")
    assert out.returncode != 0
    assert "EDGETOK_MAX_ISA" in out.stderr
    assert "avx512vnni" in out.stderr


def test_foreign_abi_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    native.library.cache_clear()
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    with pytest.raises(BackendError, match="ABI"):
        native.library()
    monkeypatch.undo()
    native.library.cache_clear()
    native.library()
