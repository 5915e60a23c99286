"""What a model costs in a process of its own: peak memory of loading and running it, and the time to load.

``python -m edgetok.fresh`` is that process: it reads one JSON request on stdin and answers with one document.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np

from edgetok.errors import EdgeTokError
from edgetok.machine import peak_rss_bytes
from edgetok.peers import open_peer, open_session


@cache
def empty_rss_bytes() -> int | None:
    """Peak memory of an interpreter that imports nothing of ours, bytes."""
    code = "print(next((int(s.split()[1]) * 1024 for s in open('/proc/self/status') if s.startswith('VmHWM')), 0))"
    try:
        done = subprocess.run(
            [sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=30, check=True
        )
        return int(done.stdout) or None
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def child_cost(
    engine: str, path: Path, device: str, threads: int, feeds: Mapping[str, np.ndarray], *, native: bool = False
) -> tuple[int | None, float | None]:
    """Load and run in a fresh process.

    Args:
        engine: "edgetok" or a peer's name.
        path: the artifact or model.
        device: as chosen, not "auto": a trial would load more than it runs.
        threads: for the engine.
        feeds: of one call.
        native: load libraries packed in the artifact.

    Returns:
        Peak resident bytes less those of an empty interpreter, and milliseconds to load; None where not measurable.
    """
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder, "feeds.npz"), **dict(feeds))  # type: ignore[arg-type]
        request = {
            "engine": engine,
            "path": str(path.resolve()),
            "device": device,
            "threads": threads,
            "native": native,
            "feeds": str(Path(folder, "feeds.npz")),
        }
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", "edgetok.fresh"],
                input=json.dumps(request),
                capture_output=True,
                text=True,
                timeout=600,
                check=True,
            )
            found = json.loads(done.stdout)
        except (OSError, ValueError, subprocess.SubprocessError):
            return None, None
    empty = empty_rss_bytes()
    peak = found["peak_rss_bytes"]
    return (peak - empty if peak and empty else None), found["load_ms"]


def _child() -> None:
    """The fresh process: reads a request on stdin, answers on stdout."""
    request = json.loads(sys.stdin.read())
    with np.load(request["feeds"], allow_pickle=False) as data:
        feeds = {n: data[n] for n in data.files}
    before = time.perf_counter()
    path = Path(request["path"])
    if request["engine"] == "edgetok":
        engine = open_session(path, request["device"], request["threads"], native=request["native"])
    else:
        engine = open_peer(request["engine"], path, request["threads"])
    engine.prepare(feeds)
    load_ms = (time.perf_counter() - before) * 1000
    for _ in range(3):
        engine.call(feeds)
    print(json.dumps({"peak_rss_bytes": peak_rss_bytes(), "load_ms": load_ms}))
    engine.close()


if __name__ == "__main__":
    try:
        _child()
    except EdgeTokError as error:
        raise SystemExit(error.code) from error
