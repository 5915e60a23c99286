"""What edgetok itself costs: start-up, and time and peak memory of converting ``vit-s-focus``.

    python benchmarks/cost.py [--no-convert]

Limits of the project: ``import edgetok`` under 0.2 s, ``edgetok --help`` under 0.3 s, converting (without --eval)
under 90 s and 1.5 GB.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def wall_seconds(command: list[str], runs: int = 11) -> float:
    """Median over runs of the whole process."""
    times = []
    for _ in range(runs):
        before = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def run_measured(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident bytes of one process and its children."""
    before = time.perf_counter()
    pid = os.spawnvp(os.P_NOWAIT, command[0], command)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed with status {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - before, usage.ru_maxrss * 1024.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-convert", action="store_true")
    parser.add_argument("--reduce", default="0.3")
    a = parser.parse_args()
    python = [sys.executable, "-P"]
    empty = wall_seconds([*python, "-c", "pass"])
    imported = wall_seconds([*python, "-c", "import edgetok"])
    helped = wall_seconds([*python, "-m", "edgetok", "--help"])
    print(f"python -c pass      {1000 * empty:6.0f} ms")
    print(f"import edgetok      {1000 * (imported - empty):6.0f} ms   limit 200")
    print(f"edgetok --help      {1000 * helped:6.0f} ms   limit 300")
    if a.no_convert:
        return
    import datasets
    import vit

    command = [*python, "-m", "edgetok", "convert", str(vit.model_file()), "--outputs", vit.FEATURES, "-t", "2"]
    command += ["--calib", str(datasets.cifar_folder(*vit.CALIB)), "--preprocess", str(vit.PREPROCESS)]
    command += ["--reduce", a.reduce, "--precision", "int8", "-q"]
    with tempfile.TemporaryDirectory() as folder:
        seconds, peak = run_measured([*command, "-o", str(Path(folder) / "edge")])
    print(f"convert             {seconds:6.1f} s    limit 90")
    print(f"convert, peak       {peak / 1e6:6.0f} MB   limit 1500")


if __name__ == "__main__":
    main()
