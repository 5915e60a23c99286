"""Write transformer graphs in the canonical form that the rest of the converter reads.

Opset 18, standard operators only. Linear layers are MatMul + Add, GELU is its five Erf nodes, attention is open
(MatMul, Mul, Add, Softmax, MatMul) and Reshape never bakes the token count, so that a reduction may change it.
Axes: B batch, N tokens, D width, H heads, Dh head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from edgetok.errors import InternalError, UnsupportedError

OPSET = 18


class GraphBuilder:
    """Collects nodes, weights and inputs of one graph.

    Names follow ``scope``: a node made inside ``with g.scope("encoder.layer.0")`` is called
    ``/encoder.layer.0/MatMul``, which is what reports show.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._scope: list[str] = []
        self._used: dict[str, int] = {}

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of nodes made inside."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    def _unique(self, stem: str) -> str:
        name = "/" + "/".join([*self._scope, stem])
        count = self._used.get(name, 0)
        self._used[name] = count + 1
        return f"{name}_{count}" if count else name

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """Declare a graph input; strings name open axes."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self._inputs.append(value)
        return value

    def output(self, name: str, value: ir.Value, shape: Sequence[int | str]) -> None:
        """Declare a graph output; ``value`` takes this name."""
        if value in self._outputs:  # one tensor under two names needs a node of its own
            value = self.op("Identity", value)
        value.name = name
        value.type = ir.TensorType(value.dtype or ir.DataType.FLOAT)
        value.shape = ir.Shape(shape)
        self._outputs.append(value)

    def weight(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """Register a weight under its own name; asking for the same name twice gives the same value."""
        if name not in self._initializers:
            tensor.name = name
            self._initializers[name] = ir.Value(
                name=name,
                type=ir.TensorType(tensor.dtype),
                shape=ir.Shape(tensor.shape.numpy()),
                const_value=tensor,
            )
        return self._initializers[name]

    def const(self, value: object, dtype: type | np.dtype = np.float32) -> ir.Value:
        """A small constant, shared between all users of the same bytes."""
        array = np.asarray(value, dtype=dtype)
        digest = "_".join(str(x) for x in array.reshape(-1).tolist())
        name = f"const_{array.dtype.name}_{'x'.join(map(str, array.shape)) or 'scalar'}_{digest}"
        return self.weight(name, ir.tensor(array, name=name))

    def op(self, op_type: str, *inputs: ir.Value | None, outputs: int = 1, **attributes: object) -> ir.Value:
        """Append a node and return its first output. ``domain`` names an operator set other than the standard one."""
        return self.ops(op_type, inputs, outputs, **attributes)[0]  # type: ignore[arg-type]

    def ops(
        self, op_type: str, inputs: Sequence[ir.Value | None], outputs: int, *, domain: str = "", **attributes: object
    ) -> list[ir.Value]:
        """Append a node and return all its outputs; those of another domain are taken to be float32."""
        node = ir.node(
            op_type,
            inputs,
            attributes={k: v for k, v in attributes.items() if v is not None},  # type: ignore[misc]
            domain=domain,
            num_outputs=outputs,
            name=self._unique(op_type),
        )
        for i, out in enumerate(node.outputs):
            out.name = f"{node.name}_output_{i}"
            if domain:
                out.type = ir.TensorType(ir.DataType.FLOAT)
        self._nodes.append(node)
        return list(node.outputs)

    # --- layers ---------------------------------------------------------------------------------------------

    def linear(self, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
        """x [.., K] times weight [K, M] plus bias [M]."""
        y = self.op("MatMul", x, weight)
        return self.op("Add", y, bias) if bias is not None else y

    def layer_norm(self, x: ir.Value, weight: ir.Value, bias: ir.Value, epsilon: float) -> ir.Value:
        """Normalise the last axis."""
        return self.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=float(epsilon))

    def activation(self, name: str, x: ir.Value) -> ir.Value:
        """Apply an activation by its Hugging Face name.

        Raises:
            UnsupportedError: the name is not known.
        """
        if name not in _ACTIVATIONS:
            raise UnsupportedError(
                f"activation {name!r} is not known; known: {', '.join(sorted(_ACTIVATIONS))}",
                where="config.json: hidden_act",
            )
        return _ACTIVATIONS[name](self, x)

    def attention(
        self, q: ir.Value, k: ir.Value, v: ir.Value, heads: int, head_dim: int, mask: ir.Value | None
    ) -> ir.Value:
        """Open multi-head attention.

        Args:
            q, k, v: projections [B, N, H*Dh].
            heads, head_dim: H and Dh.
            mask: added to the scaled logits, broadcast to [B, H, N, N]; None for none.

        Returns:
            The context [B, N, H*Dh], before the output projection.
        """
        split = self.const([0, 0, heads, head_dim], np.int64)
        q4, k4, v4 = (self.op("Reshape", x, split) for x in (q, k, v))
        q4 = self.op("Transpose", q4, perm=[0, 2, 1, 3])
        k4 = self.op("Transpose", k4, perm=[0, 2, 3, 1])
        v4 = self.op("Transpose", v4, perm=[0, 2, 1, 3])
        logits = self.op("Mul", self.op("MatMul", q4, k4), self.const(head_dim**-0.5))
        if mask is not None:
            logits = self.op("Add", logits, mask)
        context = self.op("MatMul", self.op("Softmax", logits, axis=-1), v4)
        context = self.op("Transpose", context, perm=[0, 2, 1, 3])
        return self.op("Reshape", context, self.const([0, 0, heads * head_dim], np.int64))

    def key_mask(self, attention_mask: ir.Value) -> ir.Value:
        """From a mask of ones and zeros [B, N] to what is added to the logits, [B, 1, 1, N].

        Masked keys get -10000, which gives a probability of exactly zero in float32 and still fits float16.
        """
        keep = self.op("Cast", attention_mask, to=int(ir.DataType.FLOAT))
        keep = self.op("Unsqueeze", keep, self.const([1, 2], np.int64))
        return self.op("Mul", self.op("Sub", self.const(1.0), keep), self.const(-10000.0))

    def rows(self, x: ir.Value, start: int, stop: int | None, axis: int = 1) -> ir.Value:
        """Slice ``[start:stop]`` on one axis."""
        end = np.iinfo(np.int64).max if stop is None else stop
        bounds = [self.const([v], np.int64) for v in (start, end, axis)]
        return self.op("Slice", x, *bounds)

    def row(self, x: ir.Value, index: int) -> ir.Value:
        """Row ``index`` of axis 1: [B, N, D] to [B, D]."""
        return self.op("Gather", x, self.const(index, np.int64), axis=1)

    # --- result ---------------------------------------------------------------------------------------------

    def model(
        self, producer: str = "edgetok", *, opset: int = OPSET, domains: Mapping[str, int] | None = None
    ) -> ir.Model:
        """The finished model, shapes inferred.

        Args:
            domains: versions of further operator sets that nodes come from.

        Raises:
            InternalError: the nodes do not form a valid graph.
        """
        declared = {v.name: v.shape for v in self._outputs}
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": opset, **(domains or {})},
            name=self._name,
        )
        model = ir.Model(graph, ir_version=10, producer_name=producer)
        ShapeInferencePass(strict_mode=True, data_prop=True)(model)
        for value in graph.outputs:
            value.shape = declared[value.name]
        unknown = [n.name for n in graph if any(v.dtype is None for v in n.outputs)]
        if unknown:
            raise InternalError("shape inference failed on a graph of ours", where=unknown[0])
        return model


def _gelu_erf(g: GraphBuilder, x: ir.Value) -> ir.Value:
    inner = g.op("Add", g.op("Erf", g.op("Div", x, g.const(math.sqrt(2)))), g.const(1.0))
    return g.op("Mul", g.op("Mul", x, inner), g.const(0.5))


def _gelu_tanh(g: GraphBuilder, x: ir.Value) -> ir.Value:
    cubic = g.op("Mul", g.op("Pow", x, g.const(3.0)), g.const(0.044715))
    inner = g.op("Tanh", g.op("Mul", g.op("Add", x, cubic), g.const(math.sqrt(2 / math.pi))))
    return g.op("Mul", g.op("Mul", x, g.const(0.5)), g.op("Add", inner, g.const(1.0)))


def _quick_gelu(g: GraphBuilder, x: ir.Value) -> ir.Value:
    return g.op("Mul", x, g.op("Sigmoid", g.op("Mul", x, g.const(1.702))))


def _silu(g: GraphBuilder, x: ir.Value) -> ir.Value:
    return g.op("Mul", x, g.op("Sigmoid", x))


def _plain(op_type: str) -> Callable[[GraphBuilder, ir.Value], ir.Value]:
    return lambda g, x: g.op(op_type, x)


_ACTIVATIONS: dict[str, Callable[[GraphBuilder, ir.Value], ir.Value]] = {
    "gelu": _gelu_erf,
    "gelu_python": _gelu_erf,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": _plain("Relu"),
    "tanh": _plain("Tanh"),
    "sigmoid": _plain("Sigmoid"),
    "silu": _silu,
    "swish": _silu,
}
