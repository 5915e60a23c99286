"""Fix the sizes of a graph's inputs; the batch stays a symbol unless the caller names a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from edgetok.errors import InputError

BATCH = "batch"


def fix_shapes(model: ir.Model, shapes: Mapping[str, Sequence[int | str]] | None = None) -> list[str]:
    """Set input sizes in place and drop every stale inner shape.

    Args:
        model: its inputs may have named, unnamed or fixed sizes.
        shapes: input name to sizes; a string keeps (or makes) a symbol. A symbol fixed through one input is
            fixed in all. Without an entry, the leading symbol of an input becomes ``batch``, other symbols stay.

    Returns:
        One sentence per input whose sizes changed.

    Raises:
        InputError: an unknown input, another rank, or a size that contradicts the graph.
    """
    inputs = {value.name or "": value for value in model.graph.inputs}
    before = {name: _text(value) for name, value in inputs.items()}
    bound: dict[str, int | str] = {}
    for name, wanted in (shapes or {}).items():
        if name not in inputs:
            raise InputError(
                f"the model has no input {name!r}",
                where=", ".join(sorted(inputs)),
                next="name one of these inputs in --shape",
            )
        _apply(inputs[name], list(wanted), bound)
    leading = _leading_symbol(model, bound)
    for value in inputs.values():
        if value.shape is not None:
            sizes = [_settled(value, axis, dim, bound, leading) for axis, dim in enumerate(value.shape)]
            value.shape = ir.Shape(sizes)
    changed = [f"{name}: {before[name]} -> {_text(v)}" for name, v in inputs.items() if _text(v) != before[name]]
    if changed:
        forget_inner_shapes(model)
    return changed


def forget_inner_shapes(model: ir.Model) -> None:
    """Drop the shapes of all values that nodes make (they are found again by inference)."""
    for node in model.graph:
        for out in node.outputs:
            out.shape = None


def _text(value: ir.Value) -> str:
    return "?" if value.shape is None else "x".join(str(d) if d is not None else "?" for d in value.shape)


def _symbol(dim: int | ir.SymbolicDim) -> str | None:
    return None if isinstance(dim, int) else dim.value


def _apply(value: ir.Value, wanted: list[int | str], bound: dict[str, int | str]) -> None:
    where = f"input {value.name!r}"
    if value.shape is None:
        value.shape = ir.Shape(wanted)
        return
    if len(value.shape) != len(wanted):
        raise InputError(
            f"expected {len(value.shape)} sizes, got {len(wanted)}",
            where=where,
            next=f"give {len(value.shape)} sizes, as {_text(value)}",
        )
    sizes: list[int | str | None] = []
    for old, new in zip(value.shape, wanted, strict=True):
        if isinstance(new, int) and new < 1:
            raise InputError(f"a size must be at least 1, got {new}", where=where, next="give positive sizes")
        name = _symbol(old)
        if isinstance(old, int):
            if isinstance(new, int) and new != old:
                raise InputError(
                    f"the graph fixes this size to {old}, got {new}",
                    where=where,
                    next=f"use the graph's own sizes, {_text(value)}",
                )
            sizes.append(old)
            continue
        if name is not None and bound.setdefault(name, new) != new:
            raise InputError(
                f"size {name!r} is given twice, as {bound[name]} and {new}",
                where=where,
                next="give inputs that share a size the same number",
            )
        sizes.append(new)
    value.shape = ir.Shape(sizes)


def _leading_symbol(model: ir.Model, bound: Mapping[str, int | str]) -> str | None:
    """The symbol to be called ``batch``: the first input's leading one, unless that name is taken or it was given."""
    shapes = [value.shape for value in model.graph.inputs if value.shape is not None]
    names = {_symbol(dim) for shape in shapes for dim in shape}
    if BATCH in names or not shapes or not len(shapes[0]) or isinstance(shapes[0][0], int):
        return None
    name = _symbol(shapes[0][0])
    return None if name in bound else name or ""


def _settled(
    value: ir.Value, axis: int, dim: int | ir.SymbolicDim, bound: Mapping[str, int | str], leading: str | None
) -> int | str:
    """The size to use for one axis: bound symbols replaced, the leading symbol named ``batch``, none left unnamed."""
    if isinstance(dim, int):
        return dim
    name = dim.value
    if name is not None and name in bound:
        return bound[name]
    first = value.graph is None or value is value.graph.inputs[0]
    if leading is not None and (name == leading if leading else name is None and axis == 0 and first):
        return BATCH
    return name if name is not None else f"{value.name}_{axis}"
