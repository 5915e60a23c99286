"""The padding-free form of a text encoder: every layer runs on the V valid tokens of a batch, [1, V, D].

Only attention needs rows per text. Before the heads are split, q, k and v are gathered to [B, S, C] by ``unpack_idx``;
after the heads are joined, the context is gathered back by ``word_idx``; position rows are gathered by position. Pads
cost work only inside attention. Nothing is approximated: valid rows equal those of the padded graph, except where a
graph takes activation ranges from whatever is in the batch, pads included (dynamic int8).

Source: Zhai et al., ByteTransformer, IPDPS 2023; the gather form for standard operators is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from edgetok.converters.graph.blocks import Block, Finding
from edgetok.converters.graph.find import find_blocks
from edgetok.errors import UnsupportedError

WORD, UNPACK = "word_idx", "unpack_idx"
# Between a projection and the scores: what may stand on the way up to the node that splits the heads.
_THROUGH = frozenset({"Transpose", "Mul", "Div", "Cast", "QuantizeLinear", "DequantizeLinear", "Squeeze", "Split"})
_THROUGH_INDEXED = frozenset({"Gather", "Slice"})
_WHOLE = {"start": 0, "end": np.iinfo(np.int64).max}  # of Shape
_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Where"})


def pack_model(model: ir.Model, finding: Finding | None = None) -> ir.Model:
    """Make the padding-free variant of a text encoder; float or quantized, the given model is not changed.

    Inputs of the result: the ids (and type ids) of all texts one after the other, int64 [tokens]; ``word_idx`` int64
    [tokens] and ``unpack_idx`` int64 [batch, sequence] of ``edgetok.runtime.packing.pack_plan``. Outputs keep names and
    shapes; rows after a text's end are zero. Weights keep their names, so that both graphs share one file.

    Args:
        model: token counts unreduced, attention open.
        finding: of this model; made when None.

    Raises:
        UnsupportedError: not a text encoder with a key-padding mask, reduced, or causal; says which.
    """
    _refuse(model, finding or find_blocks(model))
    copy = model.clone()
    return _Packer(copy, find_blocks(copy)).pack()


def _refuse(model: ir.Model, finding: Finding) -> None:
    def no(reason: str, where: str | None = None) -> UnsupportedError:
        return UnsupportedError(f"no padding-free form: {reason}", where=where)

    if not finding.blocks:
        raise no("no attention blocks were found")
    if any(v.shape is None or len(v.shape) != 2 or v.dtype != ir.DataType.INT64 for v in model.graph.inputs):
        raise no("its inputs are not all int64 [batch, sequence]")
    changing = any(n.op_type in ("TopK", "ScatterElements", "If", "Loop", "Scan") for n in model.graph)
    if changing or len({b.tokens for b in finding.blocks}) > 1:
        raise no("its token counts change on the way (convert without --reduce)")
    for block in finding.blocks:
        if block.fused_op or block.probs is None:
            raise no(f"attention is fused ({block.fused_op})", block.name)
        if block.mask_kind != "key-padding" or block.mask is None:
            raise no(f"its attention mask is {block.mask_kind}, not one of padding", block.name)
        if block.hazards:
            raise no(f"its attention is {', '.join(block.hazards)}", block.name)


@dataclass(eq=False)
class _Packer:
    """One packing run over a copy."""

    model: ir.Model
    finding: Finding
    flat: set[ir.Value] = field(default_factory=set)
    unpacked: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def pack(self) -> ir.Model:
        self.graph = self.model.graph
        self._nodes: list[ir.Node] = []
        self._inputs()
        self._end()
        for block in self.finding.blocks:
            self._attention(block)
        self._follow()
        self.graph.sort()
        self._finish()
        return self.model

    # --- building -------------------------------------------------------------------------------------------

    def op(self, op_type: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        node = ir.node(
            op_type,
            inputs,
            attributes=attributes,  # type: ignore[arg-type]
            name=f"/packing/{op_type}_{len(self._nodes)}",
        )
        node.outputs[0].name = f"{node.name}_output"
        self._nodes.append(node)
        self.graph.append(node)  # the graph is sorted at the end
        return node.outputs[0]

    def const(self, value: object, dtype: np.dtype | type = np.int64) -> ir.Value:
        array = np.asarray(value, dtype)
        name = f"packing_{array.dtype.name}_{'x'.join(map(str, array.shape))}_" + "_".join(
            str(x) for x in array.reshape(-1)[:8].tolist()
        )
        if name not in self.graph.initializers:
            tensor = ir.tensor(array, name=name)
            found = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
            )
            self.graph.register_initializer(found)
        return self.graph.initializers[name]

    # --- inputs ---------------------------------------------------------------------------------------------

    def _inputs(self) -> None:
        """Replace the padded inputs: ids become flat, the mask is computed, shapes are read off ``unpack_idx``."""
        int64 = ir.TensorType(ir.DataType.INT64)
        self.word = ir.Value(name=WORD, type=int64, shape=ir.Shape(["tokens"]))
        self.unpack = ir.Value(name=UNPACK, type=int64, shape=ir.Shape(["batch", "sequence"]))
        count = self.op("Shape", self.word)
        valid = self.op("Less", self.unpack, count)
        # Pads of q, k, v may hold any finite row: their keys are masked and their queries dropped.
        self.index = self.op("Min", self.unpack, self.op("Sub", count, self.const([1])))
        width = self.op("Shape", self.unpack, start=1, end=2)
        self.position = self.op("Mod", self.word, width)
        kept: list[ir.Value] = []
        masked = any(not any(n.op_type == "Gather" and i == 1 for n, i in v.uses()) for v in self.graph.inputs)
        for old in list(self.graph.inputs):
            uses = [(node, i) for node, i in old.uses()]
            as_ids = [(n, i) for n, i in uses if n.op_type == "Gather" and i == 1]
            if as_ids:
                flat = ir.Value(name=old.name, type=int64, shape=ir.Shape(["tokens"]))
                kept.append(flat)
                row = self.op("Unsqueeze", flat, self.const([0]))
                self.flat.add(row)
                self._rewire(as_ids, row)
            self._rewire([(n, i) for n, i in uses if n.op_type == "Shape"], self.unpack)
            rest = [(n, i) for n, i in uses if n.op_type != "Shape" and (n, i) not in as_ids]
            if rest and as_ids:  # positions counted from the ids, as RoBERTa does: pads come last and are never read
                if not masked:
                    raise UnsupportedError(
                        f"no padding-free form: the mask is computed from {old.name!r}", where=rest[0][0].name
                    )
                self._rewire(rest, self.op("Gather", flat, self.index, axis=0))
            elif rest:
                self._rewire(rest, self.op("Cast", valid, to=int(ir.DataType.INT64)))
        if not kept:
            raise UnsupportedError("no padding-free form: no input is looked up in an embedding table")
        self.graph.inputs.clear()
        self.graph.inputs.extend([*kept, self.word, self.unpack])

    @staticmethod
    def _rewire(uses: Sequence[tuple[ir.Node, int]], value: ir.Value) -> None:
        for node, i in uses:
            node.replace_input_with(i, value)

    # --- the stream -----------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Mark what is computed from the flat ids, and gather by position what is added to it per position."""
        own = set(self._nodes)  # inside attention, and after the end, rows are per text again
        for node in list(self.graph):
            if node in own or not any(v in self.flat for v in node.inputs if v is not None):
                continue
            if node.op_type == "Shape":
                self._rewire(list(node.outputs[0].uses()), self._padded_shape(node))
                continue
            if node.op_type in _ELEMENTWISE:
                for i, value in enumerate(node.inputs):
                    if value is not None and value not in self.flat and _per_position(value):
                        node.replace_input_with(i, self._by_position(value, _width(node)))
            self.flat.update(node.outputs)
        early = [v.name for v in self.graph.outputs if v in self.flat]
        if early:
            raise UnsupportedError(f"no padding-free form: output {early[0]!r} is read between blocks")

    def _padded_shape(self, node: ir.Node) -> ir.Value:
        """What a Shape node of the stream said before: [B, S, D], from which masks and views are sized."""
        source = node.inputs[0]
        dims = list(source.shape)[2:] if source is not None and source.shape is not None else [None]
        if not all(isinstance(d, int) for d in dims):
            raise UnsupportedError("no padding-free form: a shape is computed from unknown axes", where=node.name)
        whole = self.op("Concat", self.op("Shape", self.unpack), self.const(np.array(dims, np.int64)), axis=0)
        start, end = (a.as_int() if (a := node.attributes.get(n)) is not None else d for n, d in _WHOLE.items())
        return self.op("Slice", whole, self.const([start]), self.const([end]), self.const([0]))

    def _by_position(self, value: ir.Value, width: int | None) -> ir.Value:
        """[S, D] or [1, S, D] to the rows of the valid tokens [1, V, D]; [B, S, D] likewise."""
        shape = value.shape
        if shape is None or len(shape) > 3 or width is None:
            raise UnsupportedError("no padding-free form: a term per position has no known shape", where=value.name)
        per_text = len(shape) == 3 and shape[0] != 1
        if per_text:  # the first axis may still be 1 when it runs
            whole = self.op("Concat", self.op("Shape", self.unpack), self.const([width]), axis=0)
            value = self.op("Expand", value, whole)
        rows = self.op("Reshape", value, self.const([-1, width]))
        found = self.op("Gather", rows, self.word if per_text else self.position, axis=0)
        return self.op("Unsqueeze", found, self.const([0]))

    # --- attention ------------------------------------------------------------------------------------------

    def _attention(self, block: Block) -> None:
        for part in (block.q, block.k, block.v):
            split = self._split_node(part, block)
            source = split.inputs[0]
            if source is None or source in self.unpacked.values():
                continue  # q, k and v of one packed projection share the node
            if source not in self.unpacked:
                rows = self.op("Squeeze", source, self.const([0]))
                self.unpacked[source] = self.op("Gather", rows, self.index, axis=0)
            split.replace_input_with(0, self.unpacked[source])
            dim = block.v_dim if part is block.v else block.head_dim
            self._open_reshape(split, [block.heads, dim])
        context = block.context
        node = context.producer()
        if node is None or node.op_type != "Reshape" or context.shape is None or len(context.shape) != 3:
            raise UnsupportedError("no padding-free form: the heads are not joined by a Reshape", where=block.name)
        self._open_reshape(node, [block.heads * block.v_dim])
        uses = list(context.uses())
        rows = self.op("Reshape", context, self.const([-1, block.heads * block.v_dim]))
        packed = self.op("Unsqueeze", self.op("Gather", rows, self.word, axis=0), self.const([0]))
        self._rewire([(n, i) for n, i in uses], packed)
        self.flat.add(packed)

    def _split_node(self, value: ir.Value | None, block: Block) -> ir.Node:
        """The Reshape that splits [B, N, C] into heads, at or above ``value``."""
        while value is not None:
            node = value.producer()
            if node is None:
                break
            if node.op_type == "Reshape":
                rank = len(node.outputs[0].shape) if node.outputs[0].shape is not None else 0
                if rank >= 4:
                    return node
                break
            indexed = node.op_type in _THROUGH_INDEXED and all(_is_constant(v) for v in node.inputs[1:])
            if not (node.op_type in _THROUGH or indexed):
                break
            value = node.inputs[0]
        raise UnsupportedError("no padding-free form: the heads are not split by a Reshape", where=block.name)

    def _open_reshape(self, node: ir.Node, expected: list[int]) -> None:
        """Let a Reshape copy batch and sequence, whatever numbers it had there; the rest is known or ``expected``."""
        shape = node.outputs[0].shape
        rest = list(shape)[2:] if shape is not None else expected
        if len(rest) == len(expected):
            rest = list(expected)
        if not rest or not all(isinstance(d, int) for d in rest):
            raise UnsupportedError("no padding-free form: a Reshape leaves the heads open", where=node.name)
        if "allowzero" in node.attributes:
            node.attributes.pop("allowzero")
        node.replace_input_with(1, self.const([0, 0, *rest]))

    # --- the end --------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """Lay the stream out per text again after the last block, zeros on pads."""
        last = _block_end(self.finding.blocks[-1])
        while (norm := _only_norm(last)) is not None:
            last = norm
        uses = list(last.uses())
        width = last.shape[-1] if last.shape is not None else None
        if not isinstance(width, int) or last.dtype is None:
            raise UnsupportedError("no padding-free form: the width of the last hidden state is not known")
        rows = self.op("Squeeze", last, self.const([0]))
        zero = self.const(np.zeros((1, width)), last.dtype.numpy())
        padded = self.op("Gather", self.op("Concat", rows, zero, axis=0), self.unpack, axis=0)
        padded.dtype = last.dtype
        self._rewire([(n, i) for n, i in uses], padded)
        for i, value in enumerate(list(self.graph.outputs)):
            if value is last:
                padded.name, last.name = last.name, f"{last.name}.packed"
                padded.shape = value.shape
                self.graph.outputs[i] = padded

    def _finish(self) -> None:
        kept = {v.name: v.shape for v in self.graph.outputs}
        static = self._static_sequence()
        for node in self.graph:
            for value in node.outputs:
                value.shape = None
        for value in self.graph.outputs:
            shape = kept[value.name]
            if shape is None:
                continue
            dims: list[int | str | ir.SymbolicDim] = list(shape)
            if len(dims) == 3 and dims[1] == static:
                dims[1] = "sequence"
            value.shape = ir.Shape(dims)
        RemoveUnusedNodesPass()(self.model)
        ShapeInferencePass(strict_mode=False, data_prop=True)(self.model)

    def _static_sequence(self) -> int | None:
        return self.finding.tokens


def _block_end(block: Block) -> ir.Value:
    """The stream after a block: its second residual addition, and the normalisation after it where that comes last.

    Raises:
        UnsupportedError: there is none.
    """
    if block.x_out is not None:
        return block.x_out
    stream = _only_norm(block.x_attn) or block.x_attn  # quantizers stand between a norm and the products that tell it
    adds = [n for n, _ in stream.uses() if n.op_type == "Add"]
    adds = [n for n in adds if not any(_is_constant(v) for v in n.inputs)]
    if len(adds) != 1:
        raise UnsupportedError("no padding-free form: the last block has no second residual", where=block.name)
    return adds[0].outputs[0]


def _per_position(value: ir.Value) -> bool:
    """Whether a term has rows per position: its second-last axis is not 1."""
    return value.shape is not None and len(value.shape) >= 2 and value.shape[-2] != 1


def _width(node: ir.Node) -> int | None:
    """The last axis of an elementwise node's operands, where one of them knows it."""
    values = [v for v in (*node.inputs, *node.outputs) if v is not None and v.shape is not None and len(v.shape) > 0]
    return next((v.shape[-1] for v in values if isinstance(v.shape[-1], int) and v.shape[-1] != 1), None)  # type: ignore


def _is_constant(value: ir.Value | None) -> bool:
    return value is None or value.const_value is not None


def _only_norm(value: ir.Value) -> ir.Value | None:
    """Output of the LayerNormalization that alone reads ``value``."""
    uses = list(value.uses())
    if len(uses) == 1 and uses[0][0].op_type == "LayerNormalization" and not value.is_graph_output():
        return uses[0][0].outputs[0]
    return None
