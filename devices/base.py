"""The contract every backend keeps.

``probe() -> Availability`` never raises and never guesses yes; ``supports(node)`` answers for one node;
``compile(model, options) -> Executable``. Strict by default: a node that would run elsewhere is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import onnx


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run here.

    Args:
        ok: yes or no.
        reason: what was found, or why not, one line.
        fix: the command that would make it available, when there is one.
        version: of the library underneath.
    """

    ok: bool
    reason: str
    fix: str = ""
    version: str = ""


@dataclass(frozen=True)
class TensorSpec:
    """Name, numpy dtype name and shape of one input or output.

    Args:
        name: of the graph input or output.
        dtype: numpy's name (``float32``, ``bfloat16`` from ml_dtypes), ``str`` for strings,
            empty for what is no tensor.
        shape: open axes are strings or None; the whole is None when the rank is unknown.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None

    @property
    def rank(self) -> int | None:
        return None if self.shape is None else len(self.shape)


@dataclass(frozen=True)
class Options:
    """How to compile.

    Args:
        threads: 0 means one per physical core.
        strict: refuse a node that would run on another provider than asked for.
        profile: let the executable collect per-node times.
        optimize: let the runtime rewrite the graph (off only to judge it).
        allow_native_code: load libraries packed in the artifact (off: compile from the ONNX instead).
        extra: backend-specific settings, as ("INFERENCE_PRECISION_HINT", "bf16").
    """

    threads: int = 0
    strict: bool = True
    profile: bool = False
    optimize: bool = True
    allow_native_code: bool = False
    extra: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Placement:
    """Who runs what, after the backend's own rewrites.

    Args:
        nodes: node counts by provider (or kernel library).
        notes: what is worth reading.
        ops: node counts by operator, as ``com.microsoft.FusedMatMul``.
    """

    nodes: Mapping[str, int]
    notes: tuple[str, ...] = ()
    ops: Mapping[str, int] = field(default_factory=dict)


@dataclass
class Stats:
    """Seconds to compile, and mean microseconds per run by node when profiling was asked for."""

    compile_seconds: float = 0.0
    node_us: dict[str, float] = field(default_factory=dict)


class Executable(Protocol):
    """A compiled graph. ``run`` is safe to call from several threads at once."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Run once; returns the outputs asked for (all, in graph order, when None)."""
        ...

    def placement(self) -> Placement: ...

    def stats(self) -> Stats: ...

    def close(self) -> None: ...


@runtime_checkable
class Backend(Protocol):
    """One device. ``compile`` takes an ONNX file (external data beside it) or serialized bytes."""

    name: str

    def probe(self) -> Availability: ...

    def supports(self, node: onnx.NodeProto) -> bool: ...

    def compile(self, model: Path | bytes, options: Options) -> Executable: ...
