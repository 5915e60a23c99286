"""Step through a graph: producers, consumers, and what the ordinary operators between two points mean."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

import onnx_ir as ir

from edgetok.converters.graph.trace import Trace

PASS = {"Cast", "Identity", "Dropout", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "BiasDropout"}
VIEWS = {"Reshape", "Squeeze", "Unsqueeze", "Flatten"}
LINEAR = {"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulNBits", "MatMulInteger", "QLinearMatMul",
          "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "Conv"}  # fmt: skip
NORMS = {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"}
SKIP_NORMS = {"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"}


def op_of(node: ir.Node | None) -> str:
    """Operator name without its domain; "" for no node."""
    return "" if node is None else node.op_type


def producer(value: ir.Value | None) -> ir.Node | None:
    """The node that makes a value."""
    return None if value is None else value.producer()


@dataclass(eq=False)
class Reader:
    """A graph with its trace: the one thing all finder functions take.

    Args:
        model: the graph; never changed.
        trace: shapes and small values at one choice of input sizes.
        order: position of each node in the graph.
    """

    model: ir.Model
    trace: Trace
    order: dict[ir.Node, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.order = {node: i for i, node in enumerate(self.model.graph)}

    def shape(self, value: ir.Value | None) -> tuple[int, ...] | None:
        return self.trace.shape(value)

    def position(self, value: ir.Value) -> int:
        """Topological position of a value; -1 for graph inputs and initializers."""
        node = value.producer()
        return -1 if node is None else self.order.get(node, -1)

    def consumers(self, value: ir.Value) -> list[ir.Node]:
        """Nodes that read the contents of a value, in graph order, each once."""
        nodes = {node for node, _ in value.uses() if node.op_type not in ("Shape", "Size") and node in self.order}
        return sorted(nodes, key=self.order.__getitem__)

    def varying(self, node: ir.Node) -> list[ir.Value]:
        """Inputs of a node that depend on what the model is fed."""
        return [v for v in node.inputs if v is not None and v in self.trace.varies]

    def weight_product(self, node: ir.Node | None) -> ir.Value | None:
        """The activation entering a product with a weight, or None when the node is no such product."""
        if node is None or node.op_type not in LINEAR:
            return None
        index = 3 if node.op_type == "QLinearMatMul" else 1
        if len(node.inputs) <= index:
            return None
        left, right = node.inputs[0], node.inputs[index]
        if self.trace.constant(right) and right is not None:
            return left
        return right if node.op_type == "MatMul" and self.trace.constant(left) else None

    def activation_product(self, node: ir.Node | None) -> bool:
        """Whether a node multiplies two values that are not weights (the right one must depend on the input)."""
        if node is None or node.op_type not in ("MatMul", "FusedMatMul", "Einsum", "QLinearMatMul"):
            return False
        index = 3 if node.op_type == "QLinearMatMul" else 1
        return len(node.inputs) > index and node.inputs[index] in self.trace.varies and node.inputs[0] is not None

    def per_channel(self, value: ir.Value | None, of: ir.Value) -> bool:
        """Whether an operand is the same for all tokens: a weight vector, a scalar, a quantization scale."""
        if value is None:
            return False
        if self.trace.constant(value):
            return True
        shape, whole = self.shape(value), self.shape(of)
        if shape is None or whole is None:
            return False
        size = 1
        for dim in shape:
            size *= dim
        return size == 1 or (bool(whole) and size == whole[-1] and shape[-1] == whole[-1])

    def strip(self, value: ir.Value) -> ir.Value:
        """Go up through operators that only change the number format or how [B,N,C] is laid out ([B*N,C], [N,B,C])."""
        while (node := value.producer()) is not None:
            source = node.inputs[0] if node.inputs else None
            if source is None:
                return value
            if node.op_type in PASS or (node.op_type in VIEWS and self._flattens(source, value)):
                value = source
            elif node.op_type == "Transpose" and permutation(node) == (1, 0, 2):
                value = source  # [B,N,C] to [N,B,C], as torch's own attention module wants it
            else:
                return value
        return value

    def _flattens(self, source: ir.Value, result: ir.Value) -> bool:
        a, b = self.shape(source), self.shape(result)
        if a is None or b is None:
            return False
        if a == b:
            return True
        return {len(a), len(b)} == {2, 3} and a[-1] == b[-1] and (len(a) == 3 or a[0] == b[0] * b[1])

    def reaches(self, value: ir.Value, target: ir.Value, limit: int = 60) -> bool:
        """Whether target is value itself or one of its nearest `limit` ancestors."""
        queue, seen = [value], {value}
        while queue and limit:
            current = queue.pop(0)
            if current is target:
                return True
            limit -= 1
            node = current.producer()
            if node is None:
                continue
            sums = node.outputs[3:4] if node.op_type in SKIP_NORMS and current is node.outputs[0] else ()
            for above in (*sums, *node.inputs):
                if above is not None and above not in seen and above in self.trace.varies:
                    seen.add(above)
                    queue.append(above)
        return False


def permutation(node: ir.Node) -> tuple[int, ...] | None:
    """The perm attribute of a Transpose, or None when it reverses all axes by default."""
    attribute = node.attributes.get("perm")
    return tuple(attribute.as_ints()) if attribute is not None else None


def attribute_int(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute, or its default."""
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else default


def attribute_float(node: ir.Node, name: str, default: float) -> float:
    """A float attribute, or its default."""
    attribute = node.attributes.get(name)
    return attribute.as_float() if attribute is not None else default


def scope(node: ir.Node) -> str:
    """A readable place for reports: the exporter's module path when it left one, else the node's name."""
    noted = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if noted:
        try:
            parts = [str(p) for p in ast.literal_eval(noted) if p]
        except (ValueError, SyntaxError):
            parts = []
        modules = [p for p in parts[:-1] if p]
        if modules:
            return modules[-1]
    name = node.name or ""
    if name.startswith("/") and name.count("/") > 1:
        return ".".join(name.strip("/").split("/")[:-1])
    return name or f"{node.op_type} without a name"
