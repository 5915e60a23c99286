"""Run the real command in a process of its own, as a user does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXPORTS = Path(__file__).resolve().parent / "fixtures" / "exports"
VIT = EXPORTS / "vit_hf_dynamo18_sdpa_dynamic.onnx"  # 2 blocks, 16 patches + CLS, open batch
BERT = EXPORTS / "bert_ts17_sdpa_dynseq.onnx"
COMMAND = [sys.executable, "-P", "-m", "edgetok"]


@dataclass(frozen=True)
class Result:
    """Exit code and what was printed."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """stdout as the one JSON document it must be."""
        return json.loads(self.out)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a user without a terminal: no colour forced, no settings of ours."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("EDGETOK") and k not in ("FORCE_COLOR", "CI")}
    # In a checkout without an installation the package is found through the root; installed, through the environment.
    if not _installed():
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH", "")]))
    return {**kept, **(extra or {})}


def _installed() -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("edgetok")
    except PackageNotFoundError:
        return False
    return True


def edgetok(
    *args: object,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdout: int | None = None,
    timeout: float = 300,
) -> Result:
    """Run ``edgetok`` with these arguments."""
    done = subprocess.run(
        [*COMMAND, *map(str, args)],
        stdout=subprocess.PIPE if stdout is None else stdout,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env=environment(env),
        cwd=cwd,
        timeout=timeout,
    )
    return Result(done.returncode, done.stdout or "", done.stderr)


def start(*args: object, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> subprocess.Popen[str]:
    """Start ``edgetok`` without waiting, with Ctrl-C meaning what it means in a terminal."""

    def default_interrupt() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        [*COMMAND, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env=environment(env),
        cwd=cwd,
        preexec_fn=default_interrupt,
    )
