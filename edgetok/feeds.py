"""Inputs for a model when nobody gives any: random, seeded, of the right names, dtypes and shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from edgetok.errors import InputError


class Spec(Protocol):
    """One graph input: ``edgetok.devices.base.TensorSpec`` and its like."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int | str | None, ...] | None: ...


def fixed_shape(spec: Spec, shapes: Mapping[str, Sequence[int]], batch: int | None) -> tuple[int, ...]:
    """The shape to feed an input with.

    Args:
        spec: open axes are strings or None.
        shapes: name to shape, as given by ``--shape``.
        batch: size of an open first axis; None leaves what ``shapes`` says.

    Raises:
        InputError: an axis stays open, or ``shapes`` contradicts the graph; names the flag to add.
    """
    given = shapes.get(spec.name)
    declared = spec.shape
    if declared is None:
        if given is None:
            raise InputError(f"input {spec.name!r} has no shape", next=f"add --shape {spec.name}=1x3x224x224")
        return tuple(given)
    if given is not None and len(given) != len(declared):
        raise InputError(f"input {spec.name!r} has {len(declared)} axes, --shape gives {len(given)}")
    sizes: list[int] = []
    for axis, size in enumerate(declared):
        wanted = given[axis] if given is not None else None
        if isinstance(size, int):
            if wanted is not None and wanted != size:
                raise InputError(f"axis {axis} of input {spec.name!r} is {size}, --shape says {wanted}")
            sizes.append(size)
        elif axis == 0 and batch is not None:
            sizes.append(batch)
        elif wanted is not None:
            sizes.append(wanted)
        elif axis == 0:
            sizes.append(1)
        else:
            shown = "x".join(str(s) if isinstance(s, int) else ("1" if i == 0 else "N") for i, s in enumerate(declared))
            raise InputError(
                f"axis {axis} ({size or 'unnamed'}) of input {spec.name!r} is open",
                next=f"add --shape {spec.name}={shown} with a number for N",
            )
    return tuple(sizes)


def can_batch(specs: Sequence[Spec], batch: int) -> bool:
    """Whether every input's first axis is open or already ``batch``."""
    return all(s.shape is None or (s.shape and (not isinstance(s.shape[0], int) or s.shape[0] == batch)) for s in specs)


def random_feeds(
    specs: Sequence[Spec],
    *,
    batch: int | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    rows: Mapping[str, int] | None = None,
) -> dict[str, np.ndarray]:
    """Inputs drawn at random: floats normal, ids small, masks ones, type ids zeros, positions ascending.

    Args:
        specs: the graph's inputs.
        batch: size of an open first axis.
        shapes: name to shape, for open axes.
        seed: of the draws.
        rows: name to the number of rows of the table an id input looks up (32 when not given).

    Raises:
        InputError: an axis is open and not given, a dtype has no random values, or ``shapes`` names no input.
    """
    shapes = shapes or {}
    unknown = sorted(set(shapes) - {s.name for s in specs})
    if unknown:
        raise InputError(
            f"--shape names {unknown[0]!r}, which is no input", next=f"inputs: {', '.join(s.name for s in specs)}"
        )
    rng = np.random.default_rng(seed)
    rows = rows or {}
    return {s.name: _draw(s, fixed_shape(s, shapes, batch), rng, rows.get(s.name, 32)) for s in specs}


def _draw(spec: Spec, shape: tuple[int, ...], rng: np.random.Generator, ids: int) -> np.ndarray:
    lower = spec.name.lower()
    if spec.dtype == "bool":
        return np.ones(shape, np.bool_)
    if spec.dtype.startswith(("int", "uint")):
        if "mask" in lower:
            return np.ones(shape, spec.dtype)
        if "type" in lower or "segment" in lower:
            return np.zeros(shape, spec.dtype)
        if "position" in lower and shape:
            return np.broadcast_to(np.arange(shape[-1]), shape).astype(spec.dtype)
        return rng.integers(min(1, ids - 1), ids, shape).astype(spec.dtype)
    if spec.dtype == "bfloat16":
        import ml_dtypes

        return rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
    if spec.dtype.startswith("float"):
        return rng.standard_normal(shape, np.float32).astype(spec.dtype)
    raise InputError(f"no random values for input {spec.name!r} of type {spec.dtype or 'unknown'}")
