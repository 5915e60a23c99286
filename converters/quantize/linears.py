"""Find the linear layers and tables of a graph: what there is to quantize."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir

from edgetok.converters.quantize.settings import REDUCE_PREFIX


@dataclass(eq=False)
class Linear:
    """y = x W (+ b): a MatMul (or plain Gemm) whose weight is constant.

    Args:
        node: the MatMul or Gemm.
        x: the activation [..., K].
        weight: the initializer.
        shape: (K, N).
        add: the Add node with the bias, if it is apart and nothing else reads the product.
        bias: constant [N], or None.
        transposed: the weight is stored [N, K] (Gemm with transB).
    """

    node: ir.Node
    x: ir.Value
    weight: ir.Value
    shape: tuple[int, int]
    add: ir.Node | None = None
    bias: ir.Value | None = None
    transposed: bool = False

    @property
    def name(self) -> str:
        return self.node.name or self.node.outputs[0].name or "?"

    @property
    def macs(self) -> int:
        return self.shape[0] * self.shape[1]

    def matrix(self) -> np.ndarray:
        """The weight as float32 [K, N]."""
        w = constant(self.weight).astype(np.float32)
        return np.ascontiguousarray(w.T) if self.transposed else w

    def bias_array(self) -> np.ndarray | None:
        """The bias as float32 [N]."""
        return None if self.bias is None else constant(self.bias).astype(np.float32).reshape(-1)


@dataclass(eq=False)
class Group:
    """All linears that read one activation; it is quantized once for all of them."""

    x: ir.Value
    linears: list[Linear]

    @property
    def name(self) -> str:
        return self.x.name or "?"

    @property
    def macs(self) -> int:
        return sum(item.macs for item in self.linears)


def constant(value: ir.Value) -> np.ndarray:
    """The array of an initializer."""
    if value.const_value is None:
        raise ValueError(f"{value.name} is not a constant")
    return value.const_value.numpy()


def is_float_constant(value: ir.Value | None, rank: int | None = None) -> bool:
    """True for a float32 initializer that no caller can override, of ``rank`` if given."""
    if value is None or value.const_value is None or value.is_graph_input() or not value.is_initializer():
        return False
    tensor = value.const_value
    return tensor.dtype == ir.DataType.FLOAT and (rank is None or len(tensor.shape) == rank)


def protected(node: ir.Node, patterns: tuple[str, ...] = ()) -> bool:
    """True for nodes of the token reduction (spec 0.9) and for names the user keeps float."""
    name = node.name or ""
    return name.startswith(REDUCE_PREFIX) or any(fnmatchcase(name, p) for p in patterns)


def find_linears(graph: ir.Graph, *, min_width: int = 16) -> list[Linear]:
    """Linear layers in graph order, without those of the token reduction.

    Args:
        min_width: smaller K or N are left out: they gain nothing.
    """
    found = []
    for node in graph:
        if node.domain not in ("", "ai.onnx") or protected(node):
            continue
        linear = (
            _from_matmul(node) if node.op_type == "MatMul" else _from_gemm(node) if node.op_type == "Gemm" else None
        )
        if linear is not None and min(linear.shape) >= min_width:
            found.append(linear)
    return found


def _from_matmul(node: ir.Node) -> Linear | None:
    x, weight = node.inputs
    if x is None or weight is None or not is_float_constant(weight, 2) or x.is_initializer():
        return None
    shape = constant(weight).shape
    linear = Linear(node, x, weight, (int(shape[0]), int(shape[1])))
    out = node.outputs[0]
    uses = list(out.uses())
    if len(uses) == 1 and not out.is_graph_output():
        add = uses[0].node
        if add.op_type == "Add" and add.domain == "" and not protected(add):
            other = add.inputs[1 - uses[0].idx]
            if is_float_constant(other, 1) and other is not None and constant(other).shape == (shape[1],):
                linear.add, linear.bias = add, other
    return linear


def _from_gemm(node: ir.Node) -> Linear | None:
    def number(name: str, default: float) -> float:
        attr = node.attributes.get(name)
        return default if attr is None else float(attr.value)

    x, weight = node.inputs[0], node.inputs[1]
    if number("alpha", 1) != 1 or number("beta", 1) != 1 or number("transA", 0) != 0:
        return None
    if x is None or weight is None or x.is_initializer() or not is_float_constant(weight, 2):
        return None
    transposed = number("transB", 0) == 1
    rows, cols = constant(weight).shape
    shape = (int(cols), int(rows)) if transposed else (int(rows), int(cols))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and (not is_float_constant(bias, 1) or constant(bias).shape != (shape[1],)):
        return None
    return Linear(node, x, weight, shape, bias=bias, transposed=transposed)


def group_by_input(linears: list[Linear]) -> list[Group]:
    """Group linears by the activation they read, in graph order of the first of each."""
    groups: dict[int, Group] = {}
    for linear in linears:
        groups.setdefault(id(linear.x), Group(linear.x, [])).linears.append(linear)
    return list(groups.values())


def initializer_bytes(graph: ir.Graph) -> int:
    """Bytes of all initializers of the main graph."""
    return sum(v.const_value.nbytes for v in graph.initializers.values() if v.const_value is not None)
