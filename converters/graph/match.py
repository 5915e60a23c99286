"""Small helpers to look at and edit an onnx_ir graph; every pass of the clean-up is written with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

SMALL_ELEMENTS = 4096


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes ``value`` if its type is one of ``op_types`` (ONNX domain), else None."""
    node = value.producer() if value is not None else None
    if node is None or node.domain not in ("", "ai.onnx"):
        return None
    return node if not op_types or node.op_type in op_types else None


def consumers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read ``value``, each once."""
    seen: dict[int, ir.Node] = {}
    for node, _ in value.uses():
        seen.setdefault(id(node), node)
    return list(seen.values())


def only_user(value: ir.Value) -> ir.Node | None:
    """The one node reading ``value`` when nothing else does, the graph's outputs included."""
    users = consumers(value)
    return users[0] if len(users) == 1 and not value.is_graph_output() else None


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initializer or Constant node, else None. A graph input with a default is not constant."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and not value.is_graph_input()


def small_constant(value: ir.Value | None) -> np.ndarray | None:
    """As ``constant``, only when it has at most ``SMALL_ELEMENTS`` elements (never reads big weights)."""
    if value is None or value.const_value is None or value.const_value.size > SMALL_ELEMENTS:
        return None
    return constant(value)


def scalar(value: ir.Value | None) -> float | None:
    """The number in a one-element constant, else None."""
    array = small_constant(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 and array.dtype != object else None


def split_constant(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """(variable, constant) of a two-input node with exactly one constant operand, in either order."""
    if len(node.inputs) != 2:
        return None
    a, b = node.inputs
    if a is None or b is None or is_constant(a) == is_constant(b):
        return None
    return (b, a) if is_constant(a) else (a, b)


def split_scalar(node: ir.Node) -> tuple[ir.Value, float] | None:
    """(variable, number) of a two-input node with one one-element constant operand, in either order."""
    parts = split_constant(node)
    number = scalar(parts[1]) if parts else None
    return None if parts is None or number is None else (parts[0], number)


def ints(node: ir.Node, index: int, attribute: str = "") -> list[int] | None:
    """Integers given as constant input ``index`` or, in older opsets, as ``attribute``."""
    if attribute and attribute in node.attributes:
        return [int(i) for i in node.attributes[attribute].as_ints()]
    array = small_constant(node.inputs[index]) if len(node.inputs) > index else None
    return [int(i) for i in array.reshape(-1)] if array is not None else None


def attr_int(node: ir.Node, name: str, default: int) -> int:
    return int(node.attributes[name].as_int()) if name in node.attributes else default


def attr_float(node: ir.Node, name: str, default: float) -> float:
    return float(node.attributes[name].as_float()) if name in node.attributes else default


def attr_ints(node: ir.Node, name: str) -> list[int] | None:
    return [int(i) for i in node.attributes[name].as_ints()] if name in node.attributes else None


def unique_name(graph: ir.Graph, base: str) -> str:
    """``base``, or ``base_1``, ``base_2``, ... when a value of that name exists in the main graph."""
    taken = graph.meta.get("edgetok.names")
    if taken is None:
        taken = set(graph.initializers) | {v.name for v in graph.inputs}
        taken |= {v.name for node in graph.all_nodes() for v in node.outputs}
        graph.meta["edgetok.names"] = taken
    name, count = base, 0
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    taken.add(name)
    return name


def name_nodes_apart(graph: ir.Graph) -> None:
    """Give nodes of the main graph that share a name a number each, in order (onnxruntime refuses equal names)."""
    seen = {node.name for node in graph if node.name}
    used: set[str] = set()
    for node in graph:
        name = node.name
        if not name:
            continue
        if name in used:
            count = 1
            while f"{name}_{count}" in seen:
                count += 1
            node.name = f"{name}_{count}"
            seen.add(node.name)
        used.add(node.name or name)


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray, *, free: bool = False) -> ir.Value:
    """Register a new initializer; its name is made unique unless the caller has just freed it."""
    tensor = ir.tensor(np.array(array, order="C"), name=name if free else unique_name(graph, name))
    value = ir.Value(
        name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def emit(
    graph: ir.Graph,
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    *,
    name: str,
    attributes: Sequence[ir.Attr] = (),
    outputs: int = 1,
    dtype: ir.DataType | None = None,
    shape: ir.Shape | None = None,
) -> ir.Value:
    """Insert a node of the ONNX domain before ``before`` and return its first output, named ``<name>_output_0``."""
    node = ir.Node("", op_type, inputs, attributes=attributes, num_outputs=outputs, name=name)
    for index, out in enumerate(node.outputs):
        out.name = unique_name(graph, f"{name}_output_{index}")
        if dtype is not None:
            out.type = ir.TensorType(dtype)
        out.shape = shape
    graph.insert_before(before, node)
    return node.outputs[0]


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Let ``new`` replace ``old`` everywhere and carry its name; ``old``'s node is left without users."""
    graph = old.graph
    name, shape, kind = old.name, old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if graph is not None and name:
        old.name = unique_name(graph, f"{name}_replaced")
    new.name = name
    new.shape = shape if shape is not None else new.shape
    new.type = kind if kind is not None else new.type


def bypass(node: ir.Node, source: ir.Value) -> bool:
    """Let ``source`` stand for the node's first output and remove the node; False when an output name forbids it."""
    out = node.outputs[0]
    graph = node.graph
    if graph is None or any(other.uses() or other.is_graph_output() for other in node.outputs[1:]):
        return False
    if out.is_graph_output():
        maker = source.producer()
        if maker is None or maker.graph is not graph or source.is_graph_output() or is_constant(source):
            return False
        take_over(out, source)
    else:
        out.replace_all_uses_with(source)
    graph.remove(node, safe=True)
    return True


def remove_unused(graph: ir.Graph, nodes: Iterable[ir.Node]) -> None:
    """Remove those of ``nodes`` (given in execution order) whose outputs nothing reads."""
    for node in reversed(list(nodes)):
        if node.graph is graph and not any(out.uses() or out.is_graph_output() for out in node.outputs):
            graph.remove(node, safe=True)


def array_of(value: ir.Value) -> np.ndarray:
    """The array of a value known to be constant.

    Raises:
        ValueError: when it is not.
    """
    array = constant(value)
    if array is None:
        raise ValueError(f"{value.name} is not constant")
    return array
