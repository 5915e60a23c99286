"""From the score product upwards: what are q, k and v, by what are they scaled, where do they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from edgetok.converters.graph.norms import norm_source
from edgetok.converters.graph.walk import PASS, VIEWS, Reader, attribute_int

# Axis letters: B batch, H heads, N tokens, D head width, C = H*D, X = B*H, M = B*N, T the q/k/v axis of a packed
# projection, P the packed 3*C, "1" an axis of one.
MERGED = {"BH": "X", "HB": "?", "HD": "C", "BN": "M", "THD": "P", "HTD": "P", "TC": "P", "HDT": "P", "1B": "B",
          "B1": "B", "1N": "N", "N1": "N", "1H": "H", "H1": "H", "1X": "X", "X1": "X"}  # fmt: skip
SPLIT = {"X": ("BH",), "C": ("HD",), "M": ("BN",), "P": ("THD", "TC")}
LAYOUTS = ("BHND", "BNHD", "BHDN", "BNC")


@dataclass
class Operand:
    """One operand of an attention product, followed up to its projection.

    Args:
        value: the operand before any scaling, in `layout`; None when no value on the way has a usable layout.
        layout: axis letters of value.
        scale: product of the scalars it was multiplied by on its way into the product.
        source: what the projection reads, number-format changes stripped; None when no projection was met.
        projection: the product with the weight.
        marks: "rope", "norm", "cache", "expand", "unknown", in the order met.
        heads: number of heads seen on the way, when an axis of heads was seen.
    """

    value: ir.Value | None = None
    layout: str = ""
    scale: float = 1.0
    source: ir.Value | None = None
    projection: ir.Node | None = None
    marks: list[str] = field(default_factory=list)
    heads: int | None = None


@dataclass
class _Climb:
    """State of a climb: where we are, what its axes are, candidates seen since the last scaling."""

    value: ir.Value
    letters: str
    found: list[tuple[str, ir.Value]] = field(default_factory=list)
    closed: bool = False


def follow(reader: Reader, value: ir.Value, letters: str, prefer: Sequence[str] = LAYOUTS) -> Operand:
    """Climb from an operand of an attention product to its projection.

    Args:
        reader: the graph.
        value: the operand.
        letters: its axes, as "BHND", or "XND" when batch and heads are one axis.
        prefer: layouts in which to report the operand, best first.

    Returns:
        The operand; `source` is None when the climb ended before a projection.
    """
    out = Operand()
    climb = _Climb(value, letters)
    for _ in range(80):
        _note(reader, climb, out)
        node = climb.value.producer()
        if node is None:
            break
        entering = reader.weight_product(node)
        if entering is not None:
            out.projection, out.source = node, reader.strip(entering)
            break
        if not _up(reader, node, climb, out):
            break
    for layout in prefer:
        match = next((v for letters, v in climb.found if letters == layout), None)
        if match is not None:
            out.value, out.layout = match, layout
            break
    return out


def _note(reader: Reader, climb: _Climb, out: Operand) -> None:
    """Remember the value as a candidate when its layout is usable and nothing but views lie below it."""
    shape = reader.shape(climb.value)
    if shape is not None and len(shape) == len(climb.letters):
        if "H" in climb.letters and out.heads is None:
            out.heads = shape[climb.letters.index("H")]
        if not climb.closed and climb.letters in LAYOUTS:
            climb.found.append((climb.letters, climb.value))


def _up(reader: Reader, node: ir.Node, climb: _Climb, out: Operand) -> bool:
    """One step up; False when the climb cannot go on."""
    op, first = node.op_type, node.inputs[0] if node.inputs else None
    if first is None:
        return False
    if op in PASS:
        climb.value = first
        return True
    if op in VIEWS or op == "Transpose":
        climb.letters = _through_view(reader, node, first, climb.letters)
        climb.value = first
        return True
    if op in ("Slice", "Split", "Gather", "Expand"):
        return _select(reader, node, first, climb, out)
    if op in ("Mul", "Div", "Add", "Sub") and len(node.inputs) > 1:
        return _arithmetic(reader, node, climb, out)
    if op in ("Concat", "RotaryEmbedding", "Neg"):
        out.marks.append(_concat_mark(reader, node) if op == "Concat" else "rope")
        climb.closed = True
        varying = reader.varying(node)
        climb.value = varying[-1] if varying else first
        return bool(varying)
    source = norm_source(reader, climb.value)
    if source is not None:
        out.marks.append("norm")
        climb.closed, climb.value = True, source
        return True
    out.marks.append("unknown")
    return False


def _arithmetic(reader: Reader, node: ir.Node, climb: _Climb, out: Operand) -> bool:
    a, b = node.inputs[0], node.inputs[1]
    if a is None or b is None:
        return False
    if node.op_type in ("Mul", "Div"):
        for main, other in ((a, b), (b, a)):
            number = reader.trace.scalar(other)
            if number is not None and not (node.op_type == "Div" and main is b):
                if not climb.closed:  # above a rotation or a selection the number belongs to what was made there
                    out.scale *= number if node.op_type == "Mul" else 1.0 / number
                    climb.found.clear()
                climb.value = main
                return True
    source = norm_source(reader, climb.value)
    if source is not None and node.op_type in ("Mul", "Div", "Add"):
        out.marks.append("norm")
        climb.closed, climb.value = True, source
        return True
    for main, other in ((a, b), (b, a)):
        if other in reader.trace.varies:
            continue
        if node.op_type == "Mul" and _turns(reader, other, climb.letters):
            out.marks.append("rope")
            climb.closed = True
        climb.value = main  # a bias, or the per-channel scale of a quantized product
        return True
    return _both_vary(reader, node, a, b, climb, out)


def _both_vary(reader: Reader, node: ir.Node, a: ir.Value, b: ir.Value, climb: _Climb, out: Operand) -> bool:
    """The scale of a dynamically quantized product, a rotation, or something unknown."""
    for main, other in ((a, b), (b, a)):
        if node.op_type == "Mul" and reader.per_channel(other, main) and not reader.per_channel(main, other):
            climb.value = main
            return True
    climb.closed = True
    turned = [v for v in (a, b) if (p := v.producer()) is not None and p.op_type == "Mul"]
    if len(turned) == 2 and node.op_type in ("Add", "Sub"):
        out.marks.append("rope")
    elif "rope" not in out.marks:
        out.marks.append("unknown")
    climb.value = b if _size(reader, b) > _size(reader, a) else a
    return True


def _size(reader: Reader, value: ir.Value) -> int:
    size = 1
    for dim in reader.shape(value) or ():
        size *= dim
    return size


def _turns(reader: Reader, value: ir.Value, letters: str) -> bool:
    """Whether a constant factor differs between tokens, as the cosines of a rotary embedding do."""
    shape = reader.shape(value)
    if shape is None or "N" not in letters:
        return False
    axis = letters.index("N") - len(letters)
    return len(shape) >= -axis and shape[axis] > 1


def _concat_mark(reader: Reader, node: ir.Node) -> str:
    """Why a Concat lies between a projection and the scores: cached keys, or halves of a rotation."""
    leaves = [v for v in node.inputs if v is not None and v.producer() is None and v in reader.trace.varies]
    return "cache" if leaves else "rope"


def _select(reader: Reader, node: ir.Node, first: ir.Value, climb: _Climb, out: Operand) -> bool:
    before, after = reader.shape(first), reader.shape(climb.value)
    if first not in reader.trace.varies:
        return False
    if node.op_type == "Expand":
        if before != after and before is not None and after is not None and len(before) == len(after):
            out.marks.append("expand")
            climb.closed = True
        climb.value = first
        return True
    climb.closed = True
    axis = attribute_int(node, "axis", 0)
    if node.op_type == "Gather" and before is not None and after is not None and len(after) == len(before) - 1:
        axis %= len(before)
        climb.letters = climb.letters[:axis] + "T" + climb.letters[axis:]
    elif node.op_type in ("Split", "Slice") and climb.letters.endswith("C"):
        climb.letters = climb.letters[:-1] + "P"
    elif node.op_type == "Slice" and before is not None and after is not None and "D" in climb.letters:
        axis = climb.letters.index("D")
        if before[axis] == 2 * after[axis]:
            out.marks.append("rope")  # a half of the head: rotate_half
    climb.value = first
    return True


def _through_view(reader: Reader, node: ir.Node, source: ir.Value, letters: str) -> str:
    """Axis letters of a view's input, given those of its output."""
    before, after = reader.shape(source), reader.shape(node.outputs[0])
    if before is None or after is None or len(after) != len(letters):
        return "?" * (len(before) if before is not None else 1)
    if node.op_type == "Transpose":
        perm = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(len(letters))[::-1]
        result = [""] * len(letters)
        for out_axis, in_axis in enumerate(perm):
            result[in_axis] = letters[out_axis]
        return "".join(result)
    if node.op_type == "Squeeze" and len(before) == len(after) + 1:
        axis = _squeezed_axis(reader, node, before, after)
        return letters[:axis] + "T" + letters[axis:]
    return regroup(before, after, letters)


def _squeezed_axis(reader: Reader, node: ir.Node, before: Sequence[int], after: Sequence[int]) -> int:
    given = node.attributes.get("axes")
    axes: list[int] | None = list(given.as_ints()) if given is not None else None
    if axes is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        array = reader.trace.data.get(node.inputs[1])
        axes = None if array is None else [int(x) for x in array.reshape(-1)]
    if axes:
        return int(axes[0]) % len(before)
    return next(i for i, size in enumerate(before) if size == 1 and [*before[:i], *before[i + 1 :]] == list(after))


def regroup(before: Sequence[int], after: Sequence[int], letters: str) -> str:
    """Axis letters of a reshape's input, given shapes and the output's letters.

    Axes are paired from the left by equal products: equal sizes keep their letter, an output axis made of several input
    axes is split ("X" into B and H), several output axes made of one input axis are merged (H and D into "C").

    Example:
        >>> regroup((2, 7, 24), (2, 7, 3, 8), "BNHD")
        'BNC'
        >>> regroup((2, 3, 7, 8), (6, 7, 8), "XND")
        'BHND'
    """
    result, i, j = "", 0, 0
    while i < len(before) or j < len(after):
        i0, j0 = i, j
        left = before[i] if i < len(before) else 1
        right = after[j] if j < len(after) else 1
        i, j = i + (i < len(before)), j + (j < len(after))
        while left != right:
            if left < right and i < len(before):
                left, i = left * before[i], i + 1
            elif right < left and j < len(after):
                right, j = right * after[j], j + 1
            else:
                return "?" * len(before)
        result += _group(i - i0, letters[j0:j], before[i0:i])
    return result


def _group(count: int, letters: str, sizes: Sequence[int]) -> str:
    """Letters of `count` input axes that become the output axes `letters`."""
    if count == len(letters):
        return letters if count == 1 else "?" * count
    if count == 0:
        return ""
    if not letters:
        return "1" * count
    if count == 1:
        return MERGED.get(letters, "?")
    if len(letters) == 1:
        for option in SPLIT.get(letters, ()):
            if len(option) == count:
                return option
        if sum(size != 1 for size in sizes) <= 1:  # only axes of one were added
            big = next((i for i, size in enumerate(sizes) if size != 1), count - 1)
            return "1" * big + letters + "1" * (count - big - 1)
    return "?" * count
