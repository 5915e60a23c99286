"""How long work tells its caller where it is: one object, passed down, with nothing to import from above.

Library code calls a ``Progress``; ``NullProgress`` ignores it, the command line shows bars on a terminal and
plain lines elsewhere.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Told about one task at a time; a task started inside another ends before it."""

    def start(self, task: str, total: int | None = None) -> None:
        """A task begins. ``task`` is a word or two for people; ``total`` counts its steps, None when unknown."""
        ...

    def advance(self, steps: int = 1, *, to: int | None = None, total: int | None = None) -> None:
        """Some steps are done; ``to`` sets the count instead; ``total`` corrects the total."""
        ...

    def done(self) -> None:
        """The newest task ended."""
        ...

    def line(self, label: str, text: str, status: str = "") -> None:
        """One line of the report: a word of at most nine letters, what happened, "pass", "FAIL" or nothing."""
        ...


class NullProgress:
    """Ignores everything."""

    def start(self, task: str, total: int | None = None) -> None: ...

    def advance(self, steps: int = 1, *, to: int | None = None, total: int | None = None) -> None: ...

    def done(self) -> None: ...

    def line(self, label: str, text: str, status: str = "") -> None: ...


class RecordProgress(NullProgress):
    """Keeps the lines, as (label, text, status)."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, str]] = []

    def line(self, label: str, text: str, status: str = "") -> None:
        self.lines.append((label, text, status))


class BarsOnly(NullProgress):
    """Passes tasks on and keeps report lines to itself: for work done inside other work.

    Args:
        outer: told about the tasks.
    """

    def __init__(self, outer: Progress) -> None:
        self._outer = outer
        self.start, self.advance, self.done = outer.start, outer.advance, outer.done  # type: ignore[method-assign]
