"""``python -m edgetok.kernels``: the kernels on this machine, or where a C compiler finds the library."""

from __future__ import annotations

import argparse
import sys

from edgetok.errors import EdgeTokError
from edgetok.kernels import c_files
from edgetok.native.table import chosen, kernels


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m edgetok.kernels", description=__doc__)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--include-dir", action="store_true", help="folder of edgetok/*.h")
    where.add_argument("--library-dir", action="store_true", help="folder of the library")
    where.add_argument("--cmake-dir", action="store_true", help="folder for -Dedgetok_DIR=")
    where.add_argument("--pkgconfig-dir", action="store_true", help="folder for PKG_CONFIG_PATH")
    args = parser.parse_args()
    try:
        for name in ("include", "library", "cmake", "pkgconfig"):
            if getattr(args, f"{name}_dir"):
                print(getattr(c_files, f"{name}_dir")())
                return 0
        taken = set(chosen())
        for kernel in kernels():
            state = "chosen" if kernel in taken else "usable" if kernel.usable else "needs " + kernel.isa
            print(f"{kernel.name:<40} {state}")
    except EdgeTokError as exc:
        print(f"{exc}", file=sys.stderr)
        return exc.code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
