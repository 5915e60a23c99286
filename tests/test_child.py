"""The child that reads files nobody vouched for: limits, crashes, and nothing taken from the current folder."""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path

import pytest
from command import VIT, edgetok

from edgetok.cli import child
from edgetok.errors import ArtifactError, InputError, InternalError, ResourceError, error_from

linux = pytest.mark.skipif(sys.platform != "linux", reason="address-space limits are enforced by Linux")


def test_errors_of_the_child_come_through() -> None:
    with pytest.raises(InputError) as caught:
        child.call("inspect", {"path": "no-such-file.onnx"})
    assert caught.value.where == "no-such-file.onnx"


@linux
def test_too_little_memory_is_a_resource_error() -> None:
    done = edgetok("inspect", VIT, "--memory", "1kB")
    assert done.code == 8
    assert "--memory" in done.err


def test_a_call_that_the_system_starves_is_a_resource_error() -> None:
    """An import that finds no memory raises OSError, not MemoryError."""
    error = error_from(OSError(errno.ENOMEM, "Cannot allocate memory", "library.so"))
    assert isinstance(error, ResourceError)
    assert isinstance(child._error(error.to_json(), 1 << 30), ResourceError)


def test_a_child_that_crashes_rejects_the_file() -> None:
    error = child._killed(signal.SIGSEGV, 1 << 30, 10)
    assert isinstance(error, ArtifactError)
    assert "signal 11" in error.message


@pytest.mark.skipif(not hasattr(signal, "SIGXCPU"), reason="no processor-time limits on this system")
def test_a_child_out_of_time_is_a_resource_error() -> None:
    assert isinstance(child._killed(signal.SIGXCPU, 1 << 30, 10), ResourceError)
    assert isinstance(child._killed(signal.SIGKILL, 1 << 30, 10), ResourceError)


def test_unknown_words_of_a_child_are_a_defect() -> None:
    assert isinstance(child._error({"code": 77, "message": "?"}, 0), InternalError)


def test_modules_in_the_current_folder_are_not_taken(tmp_path: Path) -> None:
    for name in ("onnx", "numpy", "json", "edgetok"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('taken from the current folder')")
    done = edgetok("inspect", VIT, cwd=tmp_path)
    assert done.code == 0, done.err


@linux
def test_the_child_cannot_write_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    code = (
        "from edgetok.cli.child import _limit; _limit(4 << 30, 60)\n"
        "try:\n    open('x', 'w').write('a' * 100_000)\n"
        "except OSError as e: print('refused', e.errno)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.startswith("refused"), done.stderr
    assert not (tmp_path / "x").exists() or os.path.getsize(tmp_path / "x") == 0
