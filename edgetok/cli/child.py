"""Run one function on a file nobody has vouched for, in a process of its own with memory and time limits.

``call(name, request)`` starts ``python -P -m edgetok.cli.child``: no module is taken from the current folder, nothing
is written, no core is dumped. The child answers with one JSON document, a result or an error of ours.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgetok.errors import EXIT_CODES, ArtifactError, EdgeTokError, InternalError, ResourceError, error_from

MEMORY_BYTES = 4 << 30
SECONDS = 120
_STARVED = ("MemoryError", "bad_alloc", "annot allocate memory", "ut of memory")  # as Python, C++ and libc say it
_NO_MEMORY = json.dumps({"error": error_from(MemoryError()).to_json()})  # made while there is some


def call(name: str, request: Mapping[str, Any], *, memory_bytes: int = MEMORY_BYTES, seconds: int = SECONDS) -> Any:
    """Run the function registered as ``name`` in a child.

    Args:
        request: JSON values, given to the function as keyword arguments.
        memory_bytes: address space the child may take beyond its own code.
        seconds: of processor time, and of waiting.

    Raises:
        EdgeTokError: what the child raised; or it ran out of memory or time, or crashed.
    """
    body = json.dumps({"name": name, "request": dict(request), "memory_bytes": memory_bytes, "seconds": seconds})
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))}
    command = [sys.executable, "-P", "-B", "-m", "edgetok.cli.child"]
    try:
        done = subprocess.run(command, input=body, capture_output=True, text=True, timeout=seconds + 5, env=environment)
    except subprocess.TimeoutExpired as exc:
        raise _too_long(seconds) from exc
    if done.returncode < 0:
        raise _killed(-done.returncode, memory_bytes, seconds)
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["no words"])[-1]
        if any(word in done.stderr for word in _STARVED):
            raise _too_big(memory_bytes) from None
        raise InternalError(f"the child process failed: {last}", next="run again with -vv and report this") from None
    if "error" in answer:
        raise _error(answer["error"], memory_bytes)
    return answer["result"]


def _too_long(seconds: int) -> ResourceError:
    return ResourceError(
        f"reading the file took longer than {seconds} s", next=f"--timeout {2 * seconds} if you trust the file"
    )


def _too_big(memory_bytes: int) -> ResourceError:
    return ResourceError(
        f"reading the file takes more than {memory_bytes / 1e6:,.0f} MB of memory",
        next="--memory 8GiB if you trust the file",
    )


def _killed(number: int, memory_bytes: int, seconds: int) -> EdgeTokError:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    if number == getattr(signal, "SIGXCPU", -1):
        return _too_long(seconds)
    if number in (signal.SIGKILL, signal.SIGABRT):
        return _too_big(memory_bytes)
    return ArtifactError(
        f"the file crashes its reader (signal {number})", next="do not use it; report it if you trust it"
    )


def _error(fields: Mapping[str, Any], memory_bytes: int) -> EdgeTokError:
    code = int(fields["code"])
    if code == ResourceError.code and fields["message"] == "not enough memory":
        return _too_big(memory_bytes)
    kinds = [EdgeTokError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    kind = next((k for k in kinds if k.code == code and k is not EdgeTokError), InternalError)
    if code not in EXIT_CODES:
        kind = InternalError
    return kind(str(fields["message"]), where=fields.get("where"), next=fields.get("next"))


def _limit(memory_bytes: int, seconds: int) -> None:
    """Set what this process may take. Where the system has no such limits, the parent's timeout remains."""
    try:
        import resource
    except ImportError:
        return
    for name, value in (
        ("RLIMIT_AS", memory_bytes),
        ("RLIMIT_CPU", seconds),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_FSIZE", 0),
    ):
        number = getattr(resource, name, None)
        if number is None:
            continue
        _, hard = resource.getrlimit(number)
        new = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(number, (new, new))
        except (ValueError, OSError):
            continue  # macOS refuses some of them


def _own_bytes() -> int:
    """Address space this process has already taken (its code and libraries)."""
    try:
        with open("/proc/self/statm", "rb") as stream:
            return int(stream.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 1 << 30


def _functions() -> dict[str, Callable[..., Any]]:
    """What can be called; our own code and libraries are loaded here, before the limits are set."""
    import edgetok.converters.graph.summary
    import edgetok.converters.sources.onnx  # noqa: F401
    from edgetok.cli.inspecting import inspect_file
    from edgetok.converters.reduce import METHODS

    for name in METHODS.names():
        METHODS.get(name)
    return {"inspect": inspect_file}


def main() -> None:
    """The child: read a request, answer it."""
    asked = json.loads(sys.stdin.read())
    function = _functions()[asked["name"]]
    _limit(_own_bytes() + asked["memory_bytes"], asked["seconds"])
    try:
        text = json.dumps({"result": function(**asked["request"])})
    except MemoryError:
        text = _NO_MEMORY
    except Exception as exc:  # the parent turns it into an exit code
        text = json.dumps({"error": error_from(exc).to_json()})
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
