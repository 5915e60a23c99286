"""Padding masks gathered element by element over an index grid are views of the mask: say so."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from edgetok.converters.graph import dims, views
from edgetok.converters.graph.dims import Dim
from edgetok.converters.graph.infer import Facts, content
from edgetok.converters.graph.match import (
    add_initializer,
    attr_int,
    consumers,
    emit,
    is_constant,
    scalar,
    take_over,
)

PROBES = (1, 2, 3)  # the index arithmetic allowed below is affine in the batch, so three points settle it


def open_grids(model: ir.Model, facts: Facts) -> int:
    """Replace Gather / GatherND over an index grid made of Range, when it only inserts axes of size 1.

    transformers builds its masks by indexing mask[b, n] with broadcast index vectors; exporters write that as
    GatherND over [B,1,1,N,2] or Gather over the flattened mask. Returns how many were replaced by Unsqueeze.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type not in ("Gather", "GatherND") or node.inputs[0] is None or node.inputs[1] is None:
            continue
        if node.inputs[0].const_value is not None or attr_int(node, "axis", 0) or attr_int(node, "batch_dims", 0):
            continue
        base, steps = views.climb(node.inputs[0])
        axes = _inserted_axes(node, base, steps, facts)
        if axes is None:
            continue
        out = node.outputs[0]
        name = node.name or out.name or "mask"
        axes_value = add_initializer(model.graph, f"{name}/axes", np.asarray(axes, np.int64))
        new = emit(model.graph, node, "Unsqueeze", [base, axes_value], name=f"{name}/Unsqueeze", dtype=base.dtype)
        facts.shapes[new] = facts.shapes[out]
        facts.types[new] = facts.types[base]
        take_over(out, new)
        model.graph.remove(node, safe=True)
        count += 1
    return count


def _inserted_axes(node: ir.Node, base: ir.Value, steps: list[tuple[ir.Node, int]], facts: Facts) -> list[int] | None:
    """Axes of size 1 the gather inserts into ``base``, when that is all it does at every probed batch."""
    shape = facts.shape(base)
    if shape is None or not dims.known(shape) or facts.shape(node.outputs[0]) is None:
        return None
    names = sorted({name for size in shape if isinstance(size, Dim) for name in size.syms})
    found: list[int] | None = None
    for probe in PROBES:
        symbols = {name: probe + index for index, name in enumerate(names)}
        numbers = views.sizes(shape, symbols)
        start = views.iota(numbers) if numbers is not None else None
        data = views.run(steps, start, facts, symbols) if start is not None else None
        index = _evaluate(node.inputs[1], facts, symbols, 24)
        if data is None or index is None or numbers is None or start is None:
            return None
        try:
            out = data[tuple(np.moveaxis(index, -1, 0))] if node.op_type == "GatherND" else data[index]
        except IndexError:
            return None
        if out.size != start.size or not np.array_equal(out.reshape(-1), start.reshape(-1)):
            return None
        axes = _match_axes(numbers, out.shape)
        if axes is None:
            return None
        if probe > 1:  # at 1 the batch itself looks like an inserted axis
            if found is not None and found != axes:
                return None
            found = axes
    return found


def _match_axes(numbers: tuple[int, ...], shape: tuple[int, ...]) -> list[int] | None:
    axes, position = [], 0
    for axis, size in enumerate(shape):
        if position < len(numbers) and size == numbers[position]:
            position += 1
        elif size == 1:
            axes.append(axis)
        else:
            return None
    return axes if position == len(numbers) else None


def _evaluate(value: ir.Value | None, facts: Facts, symbols: dict[str, int], depth: int) -> np.ndarray | None:
    """An index value at given symbols, if it is affine index arithmetic over constants and sizes."""
    if value is None or depth == 0:
        return None
    array = content(facts, value)
    if array is not None:
        if array.dtype != object:
            return array
        flat = views.sizes(tuple(i if isinstance(i, Dim) else int(i) for i in array.reshape(-1)), symbols)
        return None if flat is None else np.asarray(flat, np.int64).reshape(array.shape)
    node = value.producer()
    rule = _AFFINE.get(node.op_type) if node is not None else None
    if node is None or rule is None:
        return None
    arrays = [_evaluate(v, facts, symbols, depth - 1) for v in node.inputs]
    if any(a is None for a in arrays):
        return None
    try:
        return rule(node, [a for a in arrays if a is not None])
    except (ValueError, IndexError):
        return None


def _unsqueeze(node: ir.Node, a: list[np.ndarray]) -> np.ndarray:
    return np.expand_dims(a[0], tuple(int(i) for i in a[1].reshape(-1)))


def _expand(node: ir.Node, a: list[np.ndarray]) -> np.ndarray:
    return np.broadcast_to(a[0], np.broadcast_shapes(a[0].shape, tuple(int(i) for i in a[1])))


def _reshape(node: ir.Node, a: list[np.ndarray]) -> np.ndarray:
    return a[0].reshape([a[0].shape[i] if s == 0 else int(s) for i, s in enumerate(a[1])])


def _range(node: ir.Node, a: list[np.ndarray]) -> np.ndarray:
    return np.arange(int(a[0]), int(a[1]), int(a[2]))


def _concat(node: ir.Node, a: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(a, axis=attr_int(node, "axis", 0))


_AFFINE: dict[str, Callable[[ir.Node, list[np.ndarray]], np.ndarray]] = {
    "Range": _range,
    "Unsqueeze": _unsqueeze,
    "Expand": _expand,
    "Reshape": _reshape,
    "Concat": _concat,
    "Add": lambda node, a: a[0] + a[1],
    "Mul": lambda node, a: a[0] * a[1],
    "Cast": lambda node, a: a[0],
    "Identity": lambda node, a: a[0],
    "Squeeze": lambda node, a: np.squeeze(a[0], tuple(int(i) for i in a[1].reshape(-1)) if len(a) > 1 else None),
}


def drop_broadcast_and(model: ir.Model, facts: Facts) -> int:
    """Drop And with an all-true constant that only broadcasts a mask which broadcasts by itself later on."""
    count = 0
    for node in list(model.graph):
        if node.op_type != "And" or node.graph is None or node.outputs[0].is_graph_output():
            continue
        for index in (0, 1):
            array = content(facts, node.inputs[index])
            source = node.inputs[1 - index]
            out = node.outputs[0]
            if array is None or array.dtype != np.bool_ or not bool(array.all()) or source is None:
                continue
            if is_constant(source) or not _absorbed(out, source, facts, 6):
                continue
            out.replace_all_uses_with(source)
            model.graph.remove(node, safe=True)
            count += 1
            break
    return count


def _absorbed(value: ir.Value, source: ir.Value, facts: Facts, depth: int) -> bool:
    """True when every reader of ``value`` broadcasts it against something as big, directly or element by element."""
    full, rank = facts.shape(value), facts.shape(source)
    if full is None or rank is None or len(full) != len(rank) or depth == 0 or value.is_graph_output():
        return False
    for node in consumers(value):
        others = [v for v in node.inputs if v is not None and v is not value]
        if node.op_type in ("Add", "Mul", "Where") and any(dims.covers(facts.shape(v), full) for v in others):
            continue
        elementwise = node.op_type in ("Where", "Not", "Cast", "Mul", "Sub", "Add")
        if not elementwise or any(scalar(v) is None for v in others):
            return False
        if not _absorbed(node.outputs[0], source, facts, depth - 1):
            return False
    return True
