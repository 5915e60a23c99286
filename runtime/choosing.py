"""``device="auto"``: a short measured trial among the devices that are there, and a sentence that says who won."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgetok.devices import BACKENDS
from edgetok.devices.base import Backend, Executable, Options
from edgetok.errors import BackendError, EdgeTokError, InputError
from edgetok.measuring import interleave
from edgetok.registry import canonical

# What "auto" considers, in order of preference when times are equal.
CANDIDATES = ("cpu_ort", "openvino")
_ALIASES = {"cpu": "cpu_ort"}
_MIN_COSINE = 0.999  # a faster device that answers differently is not the same model
_CLEARLY = 1.05  # a trial of a few runs cannot tell devices closer than this apart


@dataclass(frozen=True)
class Choice:
    """Which device runs the model and why.

    Args:
        device: its registered name.
        reason: one sentence.
        trial_ms: median milliseconds per device that was tried; empty when none was.
    """

    device: str
    reason: str
    trial_ms: Mapping[str, float] = field(default_factory=dict)


def named(name: str) -> Backend:
    """A device by name, checked to be available.

    Raises:
        InputError: no such device.
        BackendError: it is not available here; says why and how to get it.
    """
    key = _ALIASES.get(canonical(name), canonical(name))
    backend: Backend = BACKENDS.get(key)
    found = backend.probe()
    if not found.ok:
        raise BackendError(f"device {key!r} is not available: {found.reason}", next=found.fix or "edgetok devices")
    return backend


def compile_on(
    device: str, model: Path, options: Options, feeds: Callable[[Executable], Mapping[str, np.ndarray] | None]
) -> tuple[Executable, Choice]:
    """Compile on a named device, or on the fastest that agrees when ``device`` is "auto".

    Args:
        device: registered name, "cpu", or "auto".
        model: the ONNX file.
        options: given to the backend.
        feeds: makes the inputs of the trial; None when it cannot.

    Raises:
        EdgeTokError: it cannot be compiled there.
    """
    if canonical(device) != "auto":
        backend = named(device)
        return backend.compile(model, options), Choice(backend.name, "asked for")
    available = {n: b for n in CANDIDATES if n in BACKENDS.names() and (b := BACKENDS.get(n)).probe().ok}
    first = next(iter(available), None)
    if first is None:
        backend = named(CANDIDATES[0])  # raises with the reason
        return backend.compile(model, options), Choice(backend.name, "the default")
    default = available.pop(first).compile(model, options)
    if not available or options.extra:
        why = "the only one installed" if not available else "the default, as settings of one device were given"
        return default, Choice(first, why)
    sample = feeds(default)
    if sample is None:
        return default, Choice(first, "the default; an input has open axes, so nothing could be tried")
    return _trial(first, default, available, model, options, sample)


def _trial(
    first: str,
    default: Executable,
    others: Mapping[str, Backend],
    model: Path,
    options: Options,
    feeds: Mapping[str, np.ndarray],
) -> tuple[Executable, Choice]:
    running, refused = {first: default}, []
    try:
        expected = default.run(feeds)
    except InputError as exc:
        return default, Choice(first, f"the default; nothing could be tried ({exc.message[:120]})")
    for name, backend in others.items():
        try:
            executable = backend.compile(model, options)
            if _agrees(expected, executable.run(feeds)):
                running[name] = executable
            else:
                executable.close()
                refused.append(f"{name} answered differently")
        except EdgeTokError as exc:
            refused.append(f"{name} refused it ({exc.message})")
    times = {first: 0.0}
    if len(running) > 1:
        calls = {n: (lambda e=e: e.run(feeds)) for n, e in running.items()}
        found = interleave(calls, rounds=9, warmup=2, max_seconds=2.0)
        times = {n: t.p50_ms for n, t in found.items()}
    best = min(times, key=lambda n: times[n])
    if times[first] <= times[best] * _CLEARLY:
        best = first
    for name, executable in running.items():
        if name != best:
            executable.close()
    if len(times) == 1:
        return running[best], Choice(best, "; ".join(refused))
    shown = ", ".join(f"{n} {t:.1f} ms" for n, t in times.items())
    return running[best], Choice(best, "; ".join([f"trial: {shown}", *refused]), times)


def _agrees(expected: Mapping[str, np.ndarray], got: Mapping[str, np.ndarray]) -> bool:
    for name, want in expected.items():
        have = got.get(name)
        if have is None or have.shape != want.shape:
            return False
        if np.issubdtype(want.dtype, np.floating):
            a, b = want.astype(np.float64).ravel(), have.astype(np.float64).ravel()
            scale = np.sqrt((a @ a) * (b @ b))
            if not (scale == 0 or a @ b >= _MIN_COSINE * scale):
                return False
    return True
