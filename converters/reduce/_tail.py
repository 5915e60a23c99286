"""What reads the token stream besides the blocks: outputs, heads, taps on inner layers; and how each is served.

The stream is followed forward from the first reduction. Inside the blocks everything adapts. Outside, nodes that treat
every token alike (normalization, linear layers, activations) are passed through; whatever comes after them is a sink:
reading protected rows needs nothing, a mean over tokens becomes size-weighted, anything else gets the tokens restored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

# fmt: off
_UNARY = frozenset(
    ["Abs", "Cast", "Ceil", "Celu", "Clip", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish",
     "Identity", "LeakyRelu", "Log", "Mish", "Neg", "Reciprocal", "Relu", "Selu", "Sigmoid", "Sign", "Softplus",
     "Softsign", "Sqrt", "Tanh"]
)
# fmt: on
_BINARY = frozenset(["Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "PRelu"])


@dataclass(frozen=True, eq=False)
class Sink:
    """One use of a reduced value that is not token by token.

    Args:
        value: the reduced value.
        segment: how many reductions lie before it.
        node, index: the use; None for a graph output, whose position is ``index``.
        kind: "protected", "mean", "shape", "output" or "restore".
    """

    value: ir.Value
    segment: int
    node: ir.Node | None
    index: int
    kind: str


@dataclass(eq=False)
class Stream:
    """Where reduced tokens flow.

    Args:
        inside: nodes of the blocks (what the end of the last block depends on).
        sinks: in graph order.
        segments: reductions before each reduced value.
    """

    inside: set[ir.Node]
    sinks: list[Sink] = field(default_factory=list)
    segments: dict[ir.Value, int] = field(default_factory=dict)


def upstream(value: ir.Value) -> set[ir.Node]:
    """All nodes a value depends on."""
    found: set[ir.Node] = set()
    stack = [value.producer()]
    while stack:
        node = stack.pop()
        if node is None or node in found:
            continue
        found.add(node)
        stack.extend(v.producer() for v in node.inputs if v is not None)
    return found


def follow(
    graph: ir.Graph, sites: Sequence[ir.Value], end: ir.Value, protected: int, *, through: bool = True
) -> Stream:
    """Follow the stream.

    Args:
        sites: the values reduced, in order; inside readers see the reduced form.
        end: what the last block gives out.
        protected: rows that never move.
        through: pass token-wise nodes behind the blocks; False restores right at ``end``.
    """
    stream = Stream(upstream(end))
    level = {value: i + 1 for i, value in enumerate(sites)}
    outputs = {value: i for i, value in enumerate(graph.outputs)}
    for node in graph:
        inside = node in stream.inside
        used = [(i, v, _segment(stream, level, v, inside)) for i, v in enumerate(node.inputs) if v is not None]
        reduced = [(i, v, s) for i, v, s in used if s]
        if not reduced:
            continue
        segment = max(s for _, _, s in reduced)
        if inside or (through and _alike(node, reduced, segment)):
            stream.segments.update(dict.fromkeys(node.outputs, segment))
            continue
        for index, value, at in reduced:
            stream.sinks.append(Sink(value, at, node, index, _kind(node, index, protected)))
    for value, index in outputs.items():
        if stream.segments.get(value, 0):
            stream.sinks.append(Sink(value, stream.segments[value], None, index, "output"))
    return stream


def _segment(stream: Stream, level: dict[ir.Value, int], value: ir.Value, inside: bool) -> int:
    if inside and value in level:
        return level[value]
    return stream.segments.get(value, 0)


def _alike(node: ir.Node, reduced: list[tuple[int, ir.Value, int]], segment: int) -> bool:
    """Whether the node treats every token of [B,N,..] alike."""
    if any(s != segment for _, _, s in reduced):
        return False
    indices = {i for i, _, _ in reduced}
    others = [v for i, v in enumerate(node.inputs) if v is not None and i not in indices]
    if node.op_type in _UNARY:
        return indices == {0}
    if node.op_type in _BINARY:
        return all(_per_channel(v) for v in others)
    if node.op_type == "LayerNormalization":
        return indices == {0} and _int(node, "axis", -1) in (-1, 2)
    if node.op_type == "MatMul":
        rank = others[0].shape if others else None
        return indices == {0} and rank is not None and len(rank) == 2
    if node.op_type in ("ReduceMean", "ReduceSum", "ReduceL2", "ReduceMax"):
        return indices == {0} and _axes(node) in ([-1], [2]) and _int(node, "keepdims", 1) == 1
    return False


def _per_channel(value: ir.Value) -> bool:
    """A constant that does not vary along the tokens: at most one axis longer than 1, the last one."""
    return value.const_value is not None and value.shape is not None and all(d == 1 for d in value.shape[:-1])


def _kind(node: ir.Node, index: int, protected: int) -> str:
    if index:
        return "restore"
    if node.op_type == "Gather" and _int(node, "axis", 0) == 1:
        rows = const(node.inputs[1])
        if rows is not None and rows.size and rows.min() >= 0 and rows.max() < protected:
            return "protected"
    if node.op_type == "Slice" and _slices_protected(node, protected):
        return "protected"
    if node.op_type == "ReduceMean" and _axes(node) == [1]:
        return "mean"
    return "shape" if node.op_type == "Shape" else "restore"


def _slices_protected(node: ir.Node, protected: int) -> bool:
    starts, stops, axes, steps = (const(v) for v in [*node.inputs[1:], *[None] * (5 - len(node.inputs))])
    if starts is None or stops is None or axes is None:
        return False
    for i, axis in enumerate(axes.ravel()):
        if axis == 1:
            step = 1 if steps is None else int(steps.ravel()[i])
            return step > 0 and starts.ravel()[i] >= 0 and 0 <= stops.ravel()[i] <= protected
    return True  # other axes only


def _axes(node: ir.Node) -> list[int] | None:
    if "axes" in node.attributes:
        return list(node.attributes["axes"].as_ints())
    axes = const(node.inputs[1]) if len(node.inputs) > 1 else None
    return None if axes is None else [int(a) for a in axes.ravel()]


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def const(value: ir.Value | None) -> np.ndarray | None:
    """The numbers behind an initializer or Constant node."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def sources(node: ir.Node) -> Iterator[ir.Value]:
    """Inputs that are there."""
    return (v for v in node.inputs if v is not None)
