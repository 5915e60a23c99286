"""Every error a user can meet, and the one table from error to exit code.

Four branches by whose fault it is: ``InputError`` (the caller), ``ArtifactError`` (the file),
``UnsupportedError`` (this device or build), ``InternalError`` (us). Gates, budgets, resources and
reproducibility have codes of their own. Say what was expected, what came, where, and the next step.
"""

from __future__ import annotations


class EdgeTokError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: what is wrong and why, one or two sentences, no trailing next step.
        where: the place: file, value name, node, byte offset.
        next: the next command or flag to try.

    Attributes:
        report: what was measured before it failed, printed beside the error with ``--json``.
    """

    code = 1
    kind = "internal"

    def __init__(self, message: str, *, where: str | None = None, next: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.next = next
        self.report: dict[str, object] | None = None

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}\nnext: {self.next}" if self.next else text

    def to_json(self) -> dict[str, object]:
        """The object printed under ``error`` with ``--json``."""
        return {
            "code": self.code,
            "kind": self.kind,
            "message": self.message,
            "where": self.where,
            "next": self.next,
        }


class InternalError(EdgeTokError):
    """A defect of edgetok."""


class InputError(EdgeTokError):
    """A bad flag, an unknown name, an existing output, runs that cannot be compared."""

    code = 2
    kind = "usage"


class ArtifactError(EdgeTokError):
    """The file is malformed or over a limit."""

    code = 3
    kind = "rejected"


class UnsupportedError(EdgeTokError):
    """An operator, architecture or setting this build does not handle."""

    code = 4
    kind = "unsupported"


class GateError(EdgeTokError):
    """The artifact's answers differ from the source's by more than the limit."""

    code = 5
    kind = "accuracy"


class BudgetError(EdgeTokError):
    """The artifact is not faster, or not smaller, than asked for."""

    code = 6
    kind = "budget"


class BackendError(UnsupportedError):
    """A backend is missing, or would have fallen back."""

    code = 7
    kind = "backend"


class ResourceError(EdgeTokError):
    """Out of memory, disk or time."""

    code = 8
    kind = "resource"


class IntegrityError(ArtifactError):
    """A hash or signature does not match."""

    code = 9
    kind = "integrity"


class ReproducibilityError(EdgeTokError):
    """The same inputs and recipe gave other bytes."""

    code = 10
    kind = "reproducibility"


INTERRUPTED = 130

EXIT_CODES: dict[int, str] = {
    0: "fine",
    1: "internal error: a defect of edgetok",
    2: "usage: bad flag, unknown name, existing output",
    3: "model or artifact rejected: malformed or over a limit",
    4: "unsupported operator or architecture",
    5: "accuracy gate failed",
    6: "speed or memory budget missed",
    7: "backend missing or fallback forbidden",
    8: "out of memory, disk or time",
    9: "hash or signature mismatch",
    10: "not reproducible",
    INTERRUPTED: "interrupted",
}


def error_from(exc: BaseException) -> EdgeTokError:
    """Map any exception to one of ours, so that every exit has a code, a cause and a next step."""
    if isinstance(exc, EdgeTokError):
        return exc
    # The loader of libraries says so when there is no address space left for one.
    unmapped = isinstance(exc, ImportError) and "failed to map segment" in str(exc)
    starved = isinstance(exc, OSError) and exc.errno == 12  # ENOMEM, from an import or a mapping
    if isinstance(exc, MemoryError) or unmapped or starved:
        return ResourceError(
            "not enough memory", next="close other programs, or use a smaller batch or calibration set"
        )
    if isinstance(exc, OSError) and exc.errno in (28, 122):  # ENOSPC, EDQUOT
        return ResourceError(
            "no space left on the disk",
            where=exc.filename and str(exc.filename),
            next="free some space and run the same command again",
        )
    if isinstance(exc, FileNotFoundError):
        return InputError("no such file or folder", where=str(exc.filename), next="check the path")
    if isinstance(exc, PermissionError):
        return InputError("permission denied", where=str(exc.filename), next="check who owns the path")
    return InternalError(
        f"{type(exc).__name__}: {exc}",
        next="run again with -vv and report the trace: this is a defect of edgetok",
    )
