"""The stages of a conversion as files: source, clean, reduced, final. Each can be compiled and run on its own.

A stage is what its name says and everything before it, so that the gain of the graph, of the tokens and of the bits
can be told apart by running neighbours in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgetok.devices import BACKENDS
from edgetok.devices.base import Executable, Options
from edgetok.preprocess import InputSpec
from edgetok.weights import proto_bytes

Feeds = Mapping[str, np.ndarray]
Outputs = dict[str, np.ndarray]


def save_stage(model: ir.Model, path: Path) -> Path:
    """Write the graph with its weights inside, equal graphs to equal bytes."""
    path.write_bytes(proto_bytes(ir.serde.serialize_model(model)))
    return path


def has_external_data(path: Path) -> bool:
    """Whether some tensor of the ONNX file lies outside it."""
    import onnx
    from onnx.external_data_helper import uses_external_data

    if path.suffix != ".onnx":
        return False
    graph = onnx.load(str(path), load_external_data=False).graph
    return any(uses_external_data(t) for t in graph.initializer)


def input_specs(model: ir.Model) -> tuple[InputSpec, ...]:
    """Names, dtypes and shapes of the graph's inputs (initializers that are also listed as inputs left out)."""
    specs = []
    for value in model.graph.inputs:
        if value.name in model.graph.initializers:
            continue
        dims = value.shape.dims if value.shape is not None else ()
        shape = tuple(d if isinstance(d, int) else (d.value or None) for d in dims)
        dtype = value.dtype.numpy().name if value.dtype is not None else "float32"
        specs.append(InputSpec(value.name or "", dtype, shape))
    return tuple(specs)


def table_rows(model: ir.Model) -> dict[str, int]:
    """Rows of the table each integer input looks up, so that random ids stay inside it."""
    found: dict[str, int] = {}
    for value in model.graph.inputs:
        front, seen = [value], 0
        while front and seen < 32:
            seen += 1
            for node, index in front.pop().uses():
                table = node.inputs[0].const_value if node.op_type == "Gather" and node.inputs[0] else None
                if index == 1 and table is not None:
                    rows = int(table.shape.numpy()[0])
                    found[value.name or ""] = min(rows, found.get(value.name or "", rows))
                elif node.op_type in ("Cast", "Reshape", "Identity", "Squeeze", "Unsqueeze") and index == 0:
                    front.append(node.outputs[0])
    return found


def open_axes(specs: Sequence[InputSpec]) -> list[tuple[str, int]]:
    """(input, axis) of every open axis but the first of each input."""
    return [(s.name, i) for s in specs for i, d in enumerate(s.shape) if i > 0 and not isinstance(d, int)]


def compile_stage(model: Path | bytes, device: str, threads: int, **extra: Any) -> Executable:
    """Compile for a device (``auto`` is ``cpu_ort`` here: gates compare on one device, not on the best of each)."""
    name = "cpu_ort" if device.replace("-", "_") in ("auto", "cpu") else device
    return BACKENDS.get(name).compile(model, Options(threads=threads, **extra))


def run_samples(
    executable: Executable, samples: Sequence[Feeds], on_step: Callable[[], None] | None = None
) -> list[Outputs]:
    """Run every sample; one mapping of outputs each."""
    found = []
    for feeds in samples:
        found.append(executable.run(feeds))
        if on_step:
            on_step()
    return found


def batched(samples: Sequence[Feeds], size: int) -> list[Outputs]:
    """Join samples of batch 1 along the first axis, ``size`` at a time; a last partial batch stays partial."""
    return [
        {name: np.concatenate([s[name] for s in samples[i : i + size]]) for name in samples[0]}
        for i in range(0, len(samples), size)
    ]
