"""``python -m edgetok`` is the command ``edgetok``."""

from edgetok.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
