"""The inputs of a conversion: calibration samples, and held-out ones that answers are compared on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgetok.converters.sources.base import Source
from edgetok.devices.base import TensorSpec
from edgetok.errors import InputError
from edgetok.feeds import random_feeds
from edgetok.pipeline import DEFAULT_CALIB, ConvertOptions
from edgetok.preprocess import InputSpec, Preprocess, load_samples
from edgetok.runtime.text import TextInput
from edgetok.stages import Feeds, batched, input_specs, open_axes, table_rows

HELD_OUT = 8  # one sample in eight is kept from calibration and search, for agreement and golden runs
RANDOM_SAMPLES = 4
RANDOM_TOKENS = 16  # length of random text when the graph leaves it open


@dataclass(frozen=True)
class Samples:
    """What a conversion runs on.

    Args:
        calib: for ranges and search; empty when none was given.
        held: for agreement and golden runs, kept from ``calib`` when there are enough.
        note: what a reader of the report should know about them, or "".
    """

    calib: list[Feeds]
    held: list[Feeds]
    note: str = ""


def is_text(specs: Sequence[InputSpec]) -> bool:
    """Every input is [batch, length] of integers."""
    return bool(specs) and all(len(s.shape) == 2 and np.issubdtype(np.dtype(s.dtype), np.integer) for s in specs)


def text_limit(source: Source, specs: Sequence[InputSpec]) -> int | None:
    """Tokens kept of a text by what travels with the source; None when nothing says."""
    if "tokenizer.json" not in source.files or not is_text(specs):
        return None
    tensors = [TensorSpec(s.name, s.dtype, s.shape) for s in specs]
    return TextInput(source.files.get, tensors, str(source.path)).limit


def gather(options: ConvertOptions, source: Source, model: ir.Model, preprocess: Preprocess | None) -> Samples:
    """Read or draw the samples.

    Raises:
        InputError: no sample, too few for a graph of a fixed batch, or feeds that do not fit the inputs.
    """
    specs = input_specs(model)
    if options.calib is None:
        return _random(options, model, specs)
    limit = options.calib_limit or DEFAULT_CALIB
    if isinstance(options.calib, Path):
        found: Sequence[Feeds] = load_samples(
            options.calib,
            specs,
            preprocess=preprocess,
            tokenizer=source.files.get("tokenizer.json"),
            limit=limit,
            longest=text_limit(source, specs),
        )
    else:
        found = _checked(list(options.calib)[:limit], specs)
    if not found:
        raise InputError("the calibration data holds no sample", next="give at least one")
    samples = fit_batch(found, specs)
    if len(samples) < 2 * HELD_OUT:
        few = f"{len(samples)} samples: too few to hold any out; 64 or more are better"
        return Samples(list(samples), list(samples), few)
    held = list(samples[HELD_OUT - 1 :: HELD_OUT])
    return Samples([s for i, s in enumerate(samples) if i % HELD_OUT != HELD_OUT - 1], held)


def _random(options: ConvertOptions, model: ir.Model, specs: Sequence[InputSpec]) -> Samples:
    shapes = {n: tuple(1 if isinstance(d, str) else d for d in shape) for n, shape in options.shapes.items()}
    if not shapes and is_text(specs) and open_axes(specs):
        shapes = {s.name: (1, RANDOM_TOKENS) for s in specs}
    shapes = {n: shape for n, shape in shapes.items() if any(s.name == n and _is_open(s) for s in specs)}
    rows = table_rows(model)
    held: list[Feeds] = [
        random_feeds(specs, batch=1, shapes=shapes, seed=options.seed + i, rows=rows) for i in range(RANDOM_SAMPLES)
    ]
    return Samples([], held, "random, as no --calib was given: agreement on them says little about real data")


def _is_open(spec: InputSpec) -> bool:
    return any(not isinstance(d, int) for d in spec.shape[1:])


def _checked(samples: list[Feeds], specs: Sequence[InputSpec]) -> list[Feeds]:
    """Feeds given from Python: every input there, as arrays of its type."""
    found: list[Feeds] = []
    for i, sample in enumerate(samples):
        missing = [s.name for s in specs if s.name not in sample]
        if missing:
            raise InputError(
                f"calibration sample {i} has no {missing[0]!r}; it has: {', '.join(sample) or 'nothing'}",
                next=f"name the arrays as the model names its inputs: {', '.join(s.name for s in specs)}",
            )
        arrays = {s.name: np.asarray(sample[s.name]) for s in specs}
        for s in specs:
            if arrays[s.name].ndim != len(s.shape):
                raise InputError(
                    f"calibration sample {i}: input {s.name!r} takes {len(s.shape)} axes, the array has "
                    f"{arrays[s.name].ndim}",
                    next="give arrays with a batch axis of 1",
                )
        found.append({s.name: arrays[s.name].astype(s.dtype, copy=False) for s in specs})
    return found


def fixed_batch(specs: Sequence[InputSpec]) -> int:
    """The batch a graph insists on; 1 when it is open."""
    sizes = {s.shape[0] for s in specs if s.shape and isinstance(s.shape[0], int)}
    return sizes.pop() if len(sizes) == 1 and all(s.shape for s in specs) else 1  # type: ignore[return-value]


def fit_batch(samples: Sequence[Feeds], specs: Sequence[InputSpec]) -> Sequence[Feeds]:
    """Samples of batch 1 joined to the batch a graph insists on; a rest that does not fill one is left out.

    Raises:
        InputError: fewer samples than one batch.
    """
    size = fixed_batch(specs)
    if size == 1 or any(len(v) != 1 for v in samples[0].values()):
        return samples
    if len(samples) < size:
        raise InputError(
            f"the graph takes batches of {size}, the calibration data has {len(samples)} samples",
            next=f"give {size} or more, or export the model with an open batch",
        )
    return batched(samples[: len(samples) // size * size], size)
