"""Sizes that may be symbols: integers times named dimensions, with exact arithmetic only.

A symbol stands for an integer of at least 1 (a batch, a sequence length). What cannot be decided for
every such integer raises ``Undecidable``: the caller then leaves the graph as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir


class Undecidable(Exception):
    """The answer depends on the value of a symbol."""


@dataclass(frozen=True)
class Dim:
    """``coef`` times the product of ``syms`` (sorted names, repeats allowed)."""

    coef: int
    syms: tuple[str, ...]

    def __str__(self) -> str:
        head = [] if self.coef == 1 else [str(self.coef)]
        return "*".join([*head, *self.syms])


Size = int | Dim
Shape = tuple[Size | None, ...]


def make(coef: int, syms: Iterable[str]) -> Size:
    """A ``Dim``, or a plain integer when no symbol is left."""
    names = tuple(sorted(syms))
    return Dim(int(coef), names) if names and coef else int(coef)


def _parts(value: Size) -> tuple[int, tuple[str, ...]]:
    return (value.coef, value.syms) if isinstance(value, Dim) else (int(value), ())


def mul(a: Size, b: Size) -> Size:
    (ca, sa), (cb, sb) = _parts(a), _parts(b)
    return make(ca * cb, sa + sb)


def add(a: Size, b: Size) -> Size:
    (ca, sa), (cb, sb) = _parts(a), _parts(b)
    if ca == 0 or cb == 0:
        return b if ca == 0 else a
    if sa != sb:
        raise Undecidable(f"{a} + {b}")
    return make(ca + cb, sa)


def sub(a: Size, b: Size) -> Size:
    return add(a, mul(b, -1))


def div(a: Size, b: Size) -> Size:
    """Exact division, or floor division of two non-negative integers."""
    (ca, sa), (cb, sb) = _parts(a), _parts(b)
    if not sa and not sb and ca >= 0 and cb > 0:
        return ca // cb
    rest = list(sa)
    for name in sb:
        if name not in rest:
            raise Undecidable(f"{a} / {b}")
        rest.remove(name)
    if cb == 0 or ca % cb:
        raise Undecidable(f"{a} / {b}")
    return make(ca // cb, rest)


def mod(a: Size, b: Size) -> Size:
    if isinstance(a, int) and isinstance(b, int) and a >= 0 and b > 0:
        return a % b
    return sub(a, mul(b, div(a, b)))


def equal(a: Size, b: Size) -> bool:
    (ca, sa), (cb, sb) = _parts(a), _parts(b)
    if sa == sb:
        return ca == cb
    if (not sa and _never(b, ca)) or (not sb and _never(a, cb)):
        return False
    raise Undecidable(f"{a} == {b}")


def _never(dim: Size, number: int) -> bool:
    """True when ``dim`` cannot be ``number``: another sign, or smaller than its least absolute value."""
    coef, _ = _parts(dim)
    return number * coef <= 0 or abs(number) < abs(coef) or number % coef != 0


def less(a: Size, b: Size) -> bool:
    """a < b, when that holds or fails for all values of the symbols."""
    (ca, sa), (cb, sb) = _parts(a), _parts(b)
    if sa == sb:
        return ca < cb
    if not sa and cb > 0:  # the least value of b is its coefficient
        if ca < cb:
            return True
    elif not sb and ca > 0 and cb <= ca:
        return False
    raise Undecidable(f"{a} < {b}")


def product(sizes: Iterable[Size | None]) -> Size | None:
    """The product, or None when one is unknown."""
    total: Size = 1
    for size in sizes:
        if size is None:
            return None
        total = mul(total, size)
    return total


def known(shape: Shape | None) -> bool:
    """True when every size is an integer or a symbol."""
    return shape is not None and all(size is not None for size in shape)


def static(shape: Shape | None) -> bool:
    """True when every size is an integer."""
    return shape is not None and all(isinstance(size, int) for size in shape)


def covers(shape: Shape | None, full: Shape) -> bool:
    """True when an operand of ``shape`` makes the sizes of ``full`` superfluous in broadcasting."""
    if shape is None or len(shape) < len(full):
        return False
    return all(a == b or b == 1 for a, b in zip(shape[len(shape) - len(full) :], full, strict=True))


def to_ir(shape: Shape) -> ir.Shape:
    """An onnx_ir shape with symbols by their text."""
    return ir.Shape([str(size) if isinstance(size, Dim) else size for size in shape])


def parse(text: str) -> Size:
    """Read back what ``str(Dim)`` wrote; any other text is one symbol."""
    parts = text.split("*")
    if len(parts) > 1 and all(part and (part.isdigit() or part.isidentifier()) for part in parts):
        coef = 1
        for part in parts:
            coef *= int(part) if part.isdigit() else 1
        return make(coef, [part for part in parts if not part.isdigit()])
    return Dim(1, (text,))


def from_ir(shape: ir.Shape | None) -> Shape | None:
    """The sizes of an onnx_ir shape; anonymous dimensions become None."""
    if shape is None:
        return None
    out: list[Size | None] = []
    for dim in shape:
        if isinstance(dim, int):
            out.append(dim)
        else:
            text = dim.value
            out.append(parse(str(text)) if text else None)
    return tuple(out)


def reshape(source: Shape | None, wanted: Sequence[Size], allowzero: bool = False) -> Shape:
    """The result shape of an ONNX Reshape to ``wanted`` (0 copies, one -1 is inferred)."""
    out: list[Size | None] = []
    hole: int | None = None
    for axis, size in enumerate(wanted):
        if size == 0 and not allowzero:
            out.append(source[axis] if source is not None and axis < len(source) else None)
        elif size == -1:
            hole = axis
            out.append(None)
        else:
            out.append(size)
    if hole is not None and source is not None:
        rest = product(size for axis, size in enumerate(out) if axis != hole)
        total = product(source)
        if rest is not None and total is not None:
            try:
                out[hole] = div(total, rest)
            except Undecidable:
                out[hole] = None
    return tuple(out)
