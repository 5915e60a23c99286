"""What the verbs print with: one object that knows about ``--json``, ``-v``, ``-q``, colour and terminals.

People read stdout (tables, report lines); programs read exactly one JSON document there with ``--json``; errors,
logs and progress go to stderr. rich is imported when the first coloured thing or table is printed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetok.errors import EdgeTokError, InputError

if TYPE_CHECKING:
    from rich.console import Console

LABEL = 9
_STYLES = {"pass": "green", "ok": "green", "yes": "green", "real": "bold", "FAIL": "bold red", "no": "yellow"}


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: paths and enums as text, numpy as Python, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


class Output:
    """Where a verb's words go.

    Args:
        json: stdout holds one JSON document; report lines move to stderr when ``verbose``, else they are dropped.
        verbose: 0; 1 adds details; 2 adds logs and traces.
        quiet: only results asked for by name, and errors.
    """

    def __init__(self, json: bool = False, verbose: int = 0, quiet: bool = False) -> None:
        self.json = json
        self.verbose = verbose
        self.quiet = quiet
        self._emitted = False
        self._progress: Any = None

    # ---- documents

    def emit(self, document: Mapping[str, Any]) -> None:
        """Print the one JSON document; without ``--json`` nothing.

        A verb that fails its gate raises an error carrying its report (``error.report``) instead of calling this.
        """
        if self.json:
            self._emitted = True
            print(json.dumps(plain(document), indent=2, ensure_ascii=False, allow_nan=False))

    def error(self, error: EdgeTokError) -> None:
        """Print cause, place and next step on stderr; with ``--json`` also the document, unless one is out already."""
        if hasattr(self._progress, "close"):
            self._progress.close()
        if self.json and not self._emitted:
            self.emit({**(error.report or {}), "error": error.to_json()})
        console = self.console(stderr=True)
        for label, text, style in (
            ("error", error.message, "bold red"),
            ("where", error.where, "cyan"),
            ("next", error.next, "green"),
        ):
            if text:
                first, *rest = str(text).splitlines() or [""]
                console.print(f"{label:<6}", style=style, end="", markup=False)
                console.print(first, markup=False)
                for more in rest:
                    console.print(" " * 6 + more, markup=False)

    # ---- lines and tables for people

    def console(self, *, stderr: bool = False) -> Console:
        """A rich console that never wraps: a line cut in two cannot be searched for."""
        from rich.console import Console

        return Console(stderr=stderr, soft_wrap=True, highlight=False, emoji=False)

    def line(self, label: str, text: str, status: str = "") -> None:
        """One report line: ``label     text      status``."""
        if self.quiet or (self.json and not self.verbose):
            return
        console = self.console(stderr=self.json)
        console.print(f"{label:<{LABEL}} ", style="bold", end="", markup=False)
        if not status:
            console.print(text, markup=False)
            return
        width = min(shutil.get_terminal_size((100, 24)).columns, 110) - LABEL - 8
        console.print(f"{text:<{width}} ", end="", markup=False)
        console.print(status, style=_STYLES.get(status, ""), markup=False)

    def say(self, text: str = "") -> None:
        """A line of text on stdout for people; nothing with ``--json`` or ``-q``."""
        if not (self.json or self.quiet):
            print(text)

    def note(self, text: str) -> None:
        """A remark on stderr; nothing with ``-q``."""
        if not self.quiet:
            print(text, file=sys.stderr)

    def detail(self, text: str) -> None:
        """A remark on stderr with ``-v``."""
        if self.verbose and not self.quiet:
            print(text, file=sys.stderr)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[int] = ()) -> None:
        """A table on stdout without borders, cut to fit a terminal only; ``right``: columns aligned right."""
        if self.json:
            return
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        aligned = set(right)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for i, name in enumerate(columns):
            table.add_column(name, justify="right" if i in aligned else "left", no_wrap=i < len(columns) - 1)
        for row in rows:
            cells = [str(c) for c in row]
            table.add_row(*(Text(c, style=_STYLES.get(c, "")) for c in cells))
        console = Console(emoji=False, highlight=False, width=None if sys.stdout.isatty() else 1000)
        if sys.stdout.isatty():
            console.print(table)
            return
        with console.capture() as capture:
            console.print(table)
        print("\n".join(s.rstrip() for s in capture.get().splitlines()))

    def progress(self) -> Any:
        """A ``edgetok.progress.Progress``: bars on a terminal, lines elsewhere, nothing with ``-q``."""
        from edgetok.cli.bars import make_progress

        self._progress = make_progress(self)
        return self._progress


_current = Output()


def current() -> Output:
    """The output in force; before a verb starts, what the raw arguments ask for."""
    return _current


def scan(args: Sequence[str]) -> None:
    """Look for ``--json -v -q`` before parsing, so that complaints about the arguments come in the right form."""
    global _current
    words = list(args[: args.index("--")] if "--" in args else args)
    verbose = words.count("--verbose") + sum(w.count("v") for w in words if w.startswith("-v") and set(w[1:]) == {"v"})
    _current = Output("--json" in words, verbose, "-q" in words or "--quiet" in words)


def setup(json: bool, verbose: int, quiet: bool) -> Output:
    """Called first by each verb with its parsed flags."""
    global _current
    if quiet and verbose:
        raise InputError("-q and -v contradict each other", next="give one of them")
    _current = Output(json, verbose, quiet)
    import logging

    if verbose < 2:  # onnx_ir warns, with a trace, about graphs that are refused with a sentence of ours
        logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    else:
        logging.basicConfig(stream=sys.stderr, level=logging.DEBUG, format="%(levelname).1s %(name)s: %(message)s")
    return _current


def interactive() -> bool:
    """Whether stderr is a terminal a bar can be drawn on; CI logs are not, whatever they claim."""
    return sys.stderr.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"


def mb(count: float) -> str:
    """Bytes for people, decimal: ``26.1 MB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def parse_bytes(text: str | None, flag: str) -> int | None:
    """``26MB``, ``1.5 GiB``, ``1000``: a size in bytes.

    Raises:
        InputError: not a positive size.
    """
    if text is None:
        return None
    units = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    cleaned = text.strip().lower()
    number = cleaned.rstrip("bgikm ")
    try:
        size = float(number) * units[cleaned[len(number) :].strip()]
    except (KeyError, ValueError):
        size = -1.0
    if not 0 < size < 2**63:
        raise InputError(f"{flag} {text!r} is not a size", next=f"{flag} 26MB (units: kB MB GB KiB MiB GiB)")
    return int(size)


def short(path: Path) -> str:
    """A path for people: relative to here when it is below."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
