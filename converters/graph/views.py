"""What a chain of view operators (Reshape, Transpose, Slice, ...) does, found by pushing indices through it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from edgetok.converters.graph import dims
from edgetok.converters.graph.dims import Dim, Shape
from edgetok.converters.graph.infer import Facts, content
from edgetok.converters.graph.match import attr_int, attr_ints, ints

VIEWS = {"Reshape", "Transpose", "Slice", "Split", "Squeeze", "Unsqueeze", "Gather", "Flatten", "Identity"}
MAX_ELEMENTS = 1 << 24
SYMBOL_SIZES = (2, 3)  # a batch or length is probed at these values; views are linear in their sizes


def climb(value: ir.Value) -> tuple[ir.Value, list[tuple[ir.Node, int]]]:
    """Go up from ``value`` through view nodes.

    Returns:
        (the value the views start from, the (node, output index) steps from there down to ``value``).
    """
    steps: list[tuple[ir.Node, int]] = []
    while True:
        node = value.producer()
        if node is None or node.op_type not in VIEWS or node.domain not in ("", "ai.onnx"):
            break
        if node.inputs[0] is None or node.inputs[0].const_value is not None:
            break
        if node.op_type == "Gather" and not _constant_index(node):
            break
        steps.append((node, value.index() or 0))
        value = node.inputs[0]
    return value, steps[::-1]


def _constant_index(node: ir.Node) -> bool:
    return len(node.inputs) == 2 and node.inputs[1] is not None and node.inputs[1].const_value is not None


def sizes(shape: Shape | None, symbols: Mapping[str, int]) -> tuple[int, ...] | None:
    """Numbers for a shape, symbols replaced; None when something is unknown."""
    if shape is None or not dims.known(shape):
        return None
    out = []
    for size in shape:
        number = size.coef if isinstance(size, Dim) else int(size)  # type: ignore[arg-type]
        for name in size.syms if isinstance(size, Dim) else ():
            number *= symbols.setdefault(name, SYMBOL_SIZES[0]) if isinstance(symbols, dict) else symbols[name]
        out.append(number)
    return tuple(out)


def run(
    steps: list[tuple[ir.Node, int]], array: np.ndarray, facts: Facts, symbols: dict[str, int]
) -> np.ndarray | None:
    """Push ``array`` through the steps in numpy; None when a step cannot be followed."""
    try:
        for node, index in steps:
            step = _step(node, index, array, facts, symbols)
            if step is None:
                return None
            array = step
    except (ValueError, IndexError):
        return None
    return array


def _numbers(value: ir.Value | None, facts: Facts, symbols: dict[str, int]) -> list[int] | None:
    array = content(facts, value)
    if array is None:
        return None
    found = sizes(tuple(i if isinstance(i, Dim) else int(i) for i in array.reshape(-1)), symbols)
    return None if found is None else list(found)


def _step(node: ir.Node, index: int, array: np.ndarray, facts: Facts, symbols: dict[str, int]) -> np.ndarray | None:
    kind = node.op_type
    if kind == "Identity":
        return array
    if kind == "Transpose":
        return np.transpose(array, attr_ints(node, "perm"))
    if kind == "Flatten":
        axis = attr_int(node, "axis", 1) % (array.ndim + 1)
        return array.reshape(int(np.prod(array.shape[:axis])), -1)
    if kind == "Reshape":
        wanted = _numbers(node.inputs[1], facts, symbols)
        if wanted is None:
            return None
        zero = bool(attr_int(node, "allowzero", 0))
        return array.reshape([array.shape[i] if s == 0 and not zero else s for i, s in enumerate(wanted)])
    if kind == "Split":
        return _split(node, index, array)
    if kind == "Gather":
        where = content(facts, node.inputs[1])
        return None if where is None else np.take(array, where.astype(np.int64), axis=attr_int(node, "axis", 0))
    axes = ints(node, 3 if kind == "Slice" else 1, "axes")
    if kind == "Unsqueeze" and axes is not None:
        return np.expand_dims(array, tuple(axes))
    if kind == "Squeeze":
        return np.squeeze(array, None if axes is None else tuple(axes))
    return _slice(node, axes, array, facts, symbols) if kind == "Slice" else None


def _split(node: ir.Node, index: int, array: np.ndarray) -> np.ndarray:
    axis, given = attr_int(node, "axis", 0), ints(node, 1)
    if given is None:
        size = -(-array.shape[axis] // len(node.outputs))
        given = [size] * (len(node.outputs) - 1)
        given.append(array.shape[axis] - sum(given))
    return np.split(array, np.cumsum(given)[:-1], axis=axis)[index]


def _slice(
    node: ir.Node, axes: list[int] | None, array: np.ndarray, facts: Facts, symbols: dict[str, int]
) -> np.ndarray | None:
    starts, ends = _numbers(node.inputs[1], facts, symbols), _numbers(node.inputs[2], facts, symbols)
    steps = ints(node, 4) or [1] * len(starts or ())
    if starts is None or ends is None or any(s < 1 for s in steps):
        return None
    out = array
    for axis, start, end, step in zip(axes or range(len(starts)), starts, ends, steps, strict=True):
        index: list[slice] = [slice(None)] * array.ndim
        index[axis] = slice(start, end, step)
        out = out[tuple(index)]
    return out


def iota(shape: tuple[int, ...]) -> np.ndarray | None:
    """0, 1, 2, ... in ``shape``; None when that would be too big to push around."""
    total = int(np.prod(shape))
    return np.arange(total, dtype=np.int32).reshape(shape) if 0 < total <= MAX_ELEMENTS else None
