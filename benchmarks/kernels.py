"""Every table of libedgetok's kernels, one after the other; each also writes ``benchmarks/results/<name>.json``.

    python benchmarks/kernels.py [--only attention,gemm] [--list]

The scripts run alone as well, and take options of their own (``python benchmarks/attention.py --help``).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TABLES = ("attention", "sparse", "decode_attention", "gemm", "ops")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(TABLES))
    parser.add_argument("--list", action="store_true", help="name the tables and stop")
    a = parser.parse_args()
    if a.list:
        print("\n".join(TABLES))
        return
    wanted = a.only.split(",")
    if unknown := set(wanted) - set(TABLES):
        raise SystemExit(f"no table {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    failed = []
    for name in wanted:
        print(f"\n== {name}", flush=True)
        begun = time.monotonic()
        if subprocess.run([sys.executable, str(HERE / f"{name}.py")], check=False).returncode:
            failed.append(name)
        print(f"({name}: {time.monotonic() - begun:.0f} s)", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
