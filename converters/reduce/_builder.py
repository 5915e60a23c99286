"""A small writer of ONNX nodes: named by layer, constants shared, shapes known as they are written.

Everything a reduction adds goes through ``Builder``, so that names are unique and deterministic, equal constants
are stored once, and every value carries its type and shape (batch symbolic, all else static).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

Dim = int | str
FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL


class Builder:
    """Writes nodes into one graph.

    Args:
        model: the model to extend; nodes are appended to its graph and sorted by ``finish``.
        batch: the batch axis of the token stream: a number, or the symbol the graph uses.
    """

    def __init__(self, model: ir.Model, batch: Dim) -> None:
        self.graph = model.graph
        self.batch = batch
        self.scope = "reduce"
        self._names = {v.name for n in self.graph for v in n.outputs} | set(self.graph.initializers)
        self._names |= {v.name for v in self.graph.inputs}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._zero: ir.Value | None = None
        self._rows: ir.Value | None = None
        self._spread: dict[bytes, ir.Value] = {}
        self._unsqueezed: dict[tuple[ir.Value, tuple[int, ...]], ir.Value] = {}
        self.nodes: list[ir.Node] = []

    def fresh(self, stem: str) -> str:
        """A name not yet in the graph: ``<scope>/<stem>`` and a number when that is taken."""
        name, number = f"{self.scope}/{stem}", 1
        while name in self._names:
            number += 1
            name = f"{self.scope}/{stem}_{number}"
        self._names.add(name)
        return name

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        shape: Sequence[Dim] | None,
        dtype: ir.DataType = FLOAT,
        **attributes: int | float | str | Sequence[int],
    ) -> ir.Value:
        """Add one node with one output."""
        return self.op_n(op_type, inputs, [(shape, dtype)], **attributes)[0]

    def op_n(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: Sequence[tuple[Sequence[Dim] | None, ir.DataType]],
        **attributes: int | float | str | Sequence[int],
    ) -> list[ir.Value]:
        """Add one node with several outputs."""
        name = self.fresh(op_type)
        values = [
            ir.Value(
                name=f"{name}_out{i or ''}",
                type=ir.TensorType(dtype),
                shape=None if shape is None else ir.Shape(list(shape)),
            )
            for i, (shape, dtype) in enumerate(outputs)
        ]
        self._names.update(v.name for v in values)
        node = ir.Node("", op_type, list(inputs), _attributes(attributes), outputs=values, name=name)
        self.graph.append(node)
        self.nodes.append(node)
        return values

    def const(self, array: np.ndarray | Sequence[int] | float | int, dtype: type | None = None) -> ir.Value:
        """An initializer; equal ones are shared. Python ints become int64, floats float32."""
        data = np.asarray(array)
        if dtype is not None:
            data = data.astype(dtype)
        elif data.dtype == np.float64:
            data = data.astype(np.float32)
        elif data.dtype.kind == "i":
            data = data.astype(np.int64)
        key = (data.dtype.str, data.shape, data.tobytes())
        if key not in self._constants:
            name = self.fresh("const")
            value = ir.Value(
                name=name,
                type=ir.TensorType(ir.DataType.from_numpy(data.dtype)),
                shape=ir.Shape(data.shape),
                const_value=ir.tensor(data, name=name),
            )
            self.graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    # -- the batch axis without a Shape node, so that every shape stays known ----------------------------------

    def anchor_batch(self, rows: ir.Value) -> None:
        """Give the int64 value [B,K] from which an all-zero [B,1] is made the first time one is needed."""
        if self._zero is not None:
            return
        if isinstance(self.batch, int):
            self._zero = self.const(np.zeros((self.batch, 1), np.int64))
            self._rows = self.const(np.arange(self.batch, dtype=np.int64)[:, None])
            return
        first = self.op("Slice", [rows, self.const([0]), self.const([1]), self.const([1])], [self.batch, 1], INT64)
        self._zero = self.op("Mul", [first, self.const(0)], [self.batch, 1], INT64)

    def per_batch(self, values: np.ndarray) -> ir.Value:
        """A constant int64 [K] as [B,K]; equal ones are made once."""
        row = np.asarray(values, np.int64)[None]
        if self.batch == 1:
            return self.const(row)
        if self._zero is None:
            raise RuntimeError("anchor_batch comes first")
        key = row.tobytes()
        if key not in self._spread:
            self._spread[key] = self.op("Add", [self._zero, self.const(row)], [self.batch, row.shape[1]], INT64)
        return self._spread[key]

    def batch_rows(self, count: int) -> ir.Value:
        """int64 [B,count,1]: the batch index of every row."""
        if self.batch == 1:
            return self.const(np.zeros((1, count, 1), np.int64))
        if self._rows is None:
            if self._zero is None:
                raise RuntimeError("anchor_batch comes first")
            one = self.op("Add", [self._zero, self.const(1)], [self.batch, 1], INT64)
            self._rows = self.op("CumSum", [one, self.const(0)], [self.batch, 1], INT64, exclusive=1)
        column = self.unsqueeze(self._rows, 2)
        return self.op("Add", [column, self.const(np.zeros((1, count, 1), np.int64))], [self.batch, count, 1], INT64)

    # -- ops used everywhere -----------------------------------------------------------------------------------

    def slice(self, value: ir.Value, axis: int, start: int, stop: int, step: int = 1) -> ir.Value:
        """Rows start:stop:step of one axis; returns ``value`` itself when that is all of it."""
        shape = dims(value)
        size = shape[axis]
        if isinstance(size, int):
            stop = min(stop, size)
            if start == 0 and stop == size and step == 1:
                return value
        shape[axis] = len(range(start, stop, step))
        index = [self.const([n]) for n in (start, stop, axis, step)]
        return self.op("Slice", [value, *index], shape, value.dtype or FLOAT)

    def split(self, value: ir.Value, axis: int, sizes: Sequence[int]) -> list[ir.Value]:
        """Consecutive pieces; pieces of size zero are not made."""
        shapes = []
        for size in sizes:
            shape = dims(value)
            shape[axis] = size
            shapes.append((shape, value.dtype or FLOAT))
        return self.op_n("Split", [value, self.const(list(sizes))], shapes, axis=axis)

    def concat(self, values: Sequence[ir.Value], axis: int) -> ir.Value:
        """Concatenate; a single value is returned as it is."""
        if len(values) == 1:
            return values[0]
        shape = dims(values[0])
        axis %= len(shape)
        shape[axis] = sum(int(dims(v)[axis]) for v in values)
        return self.op("Concat", list(values), shape, values[0].dtype or FLOAT, axis=axis)

    def unsqueeze(self, value: ir.Value, *axes: int) -> ir.Value:
        """New axes of one; the same value is unsqueezed once."""
        if (value, axes) not in self._unsqueezed:
            shape = dims(value)
            for axis in axes:
                shape.insert(axis, 1)
            made = self.op("Unsqueeze", [value, self.const(list(axes))], shape, value.dtype or FLOAT)
            self._unsqueezed[(value, axes)] = made
        return self._unsqueezed[(value, axes)]

    def lookup(self, table: np.ndarray, index: ir.Value) -> ir.Value:
        """table[index] of a constant int64 table [K]; index [B,M] -> [B,M]."""
        return self.op("Gather", [self.const(np.asarray(table, np.int64)), index], dims(index), INT64, axis=0)

    def binary(self, op_type: str, a: ir.Value, b: ir.Value | float | int | np.ndarray) -> ir.Value:
        """Add, Sub, Mul, Div, Max, Min, Greater with numpy broadcasting."""
        right = b if isinstance(b, ir.Value) else self.const(b)
        dtype = BOOL if op_type in ("Greater", "Less", "GreaterOrEqual", "LessOrEqual", "Equal") else a.dtype or FLOAT
        return self.op(op_type, [a, right], _broadcast(dims(a), dims(right)), dtype)

    def unary(self, op_type: str, a: ir.Value) -> ir.Value:
        return self.op(op_type, [a], dims(a), a.dtype or FLOAT)

    def cast(self, a: ir.Value, dtype: ir.DataType) -> ir.Value:
        return a if a.dtype == dtype else self.op("Cast", [a], dims(a), dtype, to=int(dtype))

    def reduce(self, op_type: str, a: ir.Value, axis: int, keep: bool = False) -> ir.Value:
        """ReduceSum, ReduceMean, ReduceMax over one axis."""
        shape = dims(a)
        axis %= len(shape)
        if keep:
            shape[axis] = 1
        else:
            del shape[axis]
        return self.op(op_type, [a, self.const([axis])], shape, a.dtype or FLOAT, keepdims=int(keep))

    def matmul(self, a: ir.Value, b: ir.Value) -> ir.Value:
        left, right = dims(a), dims(b)
        return self.op("MatMul", [a, b], [*_broadcast(left[:-2], right[:-2]), left[-2], right[-1]])

    def transpose(self, a: ir.Value, *perm: int) -> ir.Value:
        shape = dims(a)
        return self.op("Transpose", [a], [shape[p] for p in perm], a.dtype or FLOAT, perm=perm)

    def topk(self, a: ir.Value, k: int, *, largest: bool = True) -> tuple[ir.Value, ir.Value]:
        """Values and int64 indices along the last axis, sorted; of equal ones the lower index comes first."""
        shape = [*dims(a)[:-1], k]
        pair = [(shape, a.dtype or FLOAT), (shape, INT64)]
        values, index = self.op_n("TopK", [a, self.const([k])], pair, axis=-1, largest=int(largest), sorted=1)
        return values, index

    def take(self, a: ir.Value, index: ir.Value) -> ir.Value:
        """a [B,N] at index [B,K] -> [B,K]."""
        return self.op("GatherElements", [a, index], dims(index), a.dtype or FLOAT, axis=1)

    def rows(self, x: ir.Value, index: ir.Value) -> ir.Value:
        """Rows of x [B,N,..] at index [B,K] -> [B,K,..].

        GatherND with one batch axis copies whole rows: 15 us at N=257, D=384, where GatherElements with an
        expanded index takes 108 and a one-hot MatMul 570.
        """
        shape = [*dims(index), *dims(x)[2:]]
        return self.op("GatherND", [x, self.unsqueeze(index, 2)], shape, x.dtype or FLOAT, batch_dims=1)

    def add_rows(self, x: ir.Value, index: ir.Value, updates: ir.Value) -> ir.Value:
        """x [B,M,D] with updates [B,R,D] added at rows index [B,R] (repeats add up)."""
        where = self.concat([self.batch_rows(int(dims(index)[1])), self.unsqueeze(index, 2)], 2)
        return self.op("ScatterND", [x, where, updates], dims(x), x.dtype or FLOAT, reduction="add")

    def finish(self) -> None:
        """Put all nodes in topological order, disturbing the others as little as possible."""
        if self.nodes:
            self.graph.sort()


def dims(value: ir.Value) -> list[Dim]:
    """The shape as a list of numbers and symbols.

    Raises:
        ValueError: the shape is unknown.
    """
    if value.shape is None:
        raise ValueError(f"value {value.name} has no shape")
    return [d if isinstance(d, int) else (d.value or "batch") for d in value.shape]


def _attributes(given: dict[str, int | float | str | Sequence[int]]) -> list[ir.Attr]:
    return [
        ir.convenience.convert_attribute(k, v if isinstance(v, int | float | str) else list(v))
        for k, v in given.items()
    ]


def _broadcast(a: Sequence[Dim], b: Sequence[Dim]) -> list[Dim]:
    size = max(len(a), len(b))
    left, right = [1] * (size - len(a)) + list(a), [1] * (size - len(b)) + list(b)
    return [y if x == 1 else x for x, y in zip(left, right, strict=True)]
