"""Progress for people: a bar on a terminal, a line now and then elsewhere, always on stderr."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Any

from edgetok.cli.output import Output, interactive
from edgetok.progress import NullProgress, Progress

FIRST_SECONDS = 5.0  # then twice as long each time: a log is not a film
WIDTH = 14
SHOWN_AFTER_SECONDS = 1.0


def make_progress(out: Output) -> Progress:
    """The progress that fits this output."""
    if out.quiet:
        return NullProgress()
    return BarProgress(out) if interactive() else LineProgress(out)


@dataclass
class _Task:
    name: str
    total: int | None
    count: int = 0
    started: float = field(default_factory=lambda: time.monotonic())
    said: float = field(default_factory=lambda: time.monotonic())
    wait: float = FIRST_SECONDS

    def move(self, steps: int, to: int | None, total: int | None) -> None:
        self.count = to if to is not None else self.count + steps
        self.total = total if total is not None else self.total

    def counted(self) -> str:
        """``43/128``; nothing when there is nothing to count."""
        return f"{self.count}/{self.total}" if self.total else (str(self.count) if self.count else "")

    def text(self) -> str:
        return f"{self.name:<{WIDTH}} {self.counted():>9}  {time.monotonic() - self.started:5.1f} s"


class LineProgress:
    """One line per task that takes over a second, and now and then while it lasts."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._tasks: list[_Task] = []

    def start(self, task: str, total: int | None = None) -> None:
        self._tasks.append(_Task(task, total))

    def advance(self, steps: int = 1, *, to: int | None = None, total: int | None = None) -> None:
        if not self._tasks:
            return
        task = self._tasks[-1]
        task.move(steps, to, total)
        if time.monotonic() - task.said >= task.wait:
            task.said, task.wait = time.monotonic(), 2 * task.wait
            print(task.text(), file=sys.stderr, flush=True)

    def done(self) -> None:
        if self._tasks:
            task = self._tasks.pop()
            if time.monotonic() - task.started >= SHOWN_AFTER_SECONDS:
                print(task.text(), file=sys.stderr, flush=True)

    def line(self, label: str, text: str, status: str = "") -> None:
        self._out.line(label, text, status)
        sys.stdout.flush()


class BarProgress:
    """A transient rich bar; it steps aside while a report line is printed."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._tasks: list[tuple[Any, _Task]] = []
        self._bar: Any = None

    def _live(self) -> Any:
        if self._bar is None:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("{task.description:<" + str(WIDTH) + "}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[count]:>9}"),
                TimeElapsedColumn(),
                console=self._out.console(stderr=True),
                transient=True,
            )
            self._bar.start()
        return self._bar

    def start(self, task: str, total: int | None = None) -> None:
        bar = self._live()
        self._tasks.append((bar.add_task(task, total=total, count=""), _Task(task, total)))

    def advance(self, steps: int = 1, *, to: int | None = None, total: int | None = None) -> None:
        if self._tasks:
            key, task = self._tasks[-1]
            task.move(steps, to, total)
            self._live().update(key, completed=task.count, total=task.total, count=task.counted())

    def done(self) -> None:
        if not self._tasks:
            return
        key, _ = self._tasks.pop()
        self._live().remove_task(key)
        if not self._tasks:
            self.close()

    def close(self) -> None:
        """Take the bar off the screen, whatever is still running."""
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._tasks = None, []

    def line(self, label: str, text: str, status: str = "") -> None:
        if self._bar is None:
            self._out.line(label, text, status)
            return
        self._bar.stop()
        self._out.line(label, text, status)
        sys.stdout.flush()
        self._bar.start()
