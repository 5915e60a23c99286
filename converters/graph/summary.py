"""What a graph is and what could be gained, from the file alone: nothing is executed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import onnx_ir as ir

from edgetok.converters.graph.blocks import Block, Finding
from edgetok.converters.graph.cost import node_macs
from edgetok.converters.graph.find import read_at
from edgetok.converters.graph.gains import MethodRow, hazard_sentence, method_rows
from edgetok.converters.graph.trace import graph_inputs
from edgetok.converters.graph.walk import Reader

LENGTHS = ((224, 128), (384, 16), (256, 77), (336, 3000), (448, 64), (512, 7), (518, 197), (32, 32), (64, 1500))


@dataclass(frozen=True)
class TensorRow:
    """An input or output: name, element type, dims as written (open axes by name), dims assumed for the counts."""

    name: str
    dtype: str
    dims: tuple[int | str, ...] | None
    assumed: tuple[int, ...] | None


@dataclass(frozen=True)
class BlockRow:
    """One attention block, for a table.

    Args:
        index, name, heads, head_dim, width, norm, mask, packed, fused, hazards: as in `Block`.
        tokens: N at the assumed input sizes.
        mlp_ratio: weights of the MLP / (2 D^2), None when the MLP was not found.
        macs: multiply-accumulates for one sample.
    """

    index: int
    name: str
    heads: int
    head_dim: int
    width: int
    tokens: int
    mlp_ratio: float | None
    macs: int
    norm: str
    mask: str
    packed: bool
    fused: str
    hazards: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """A graph at a glance.

    Args:
        opset, ir_version, producer: of the file.
        inputs, outputs: see TensorRow.
        assumed: open axes and the size taken for them, "name=size" each; empty when all sizes are in the file.
        nodes: operators, those inside functions and branches included.
        op_counts: by operator, most frequent first; operators of other domains as "domain::Op".
        parameters: elements of all weights.
        weight_bytes: their bytes. bytes_by_type: the same by element type.
        family, leading, grid: as in `Finding`.
        blocks, refused: what the block finder said; refused as (name, reason, sentence).
        tokens_per_layer: tokens entering each block at the assumed sizes.
        macs: multiply-accumulates of all matrix products and convolutions, for one sample.
        macs_blocks: of the blocks alone, by the cost model.
        uncounted: products whose shape is not known and that are missing in macs.
        hazards: a sentence for each kind of hazard met.
        methods: what each reduction method could do here.
    """

    opset: int
    ir_version: int
    producer: str
    inputs: tuple[TensorRow, ...]
    outputs: tuple[TensorRow, ...]
    assumed: tuple[str, ...]
    nodes: int
    op_counts: dict[str, int]
    parameters: int
    weight_bytes: int
    bytes_by_type: dict[str, int]
    family: str
    leading: int
    grid: tuple[int, int] | None
    blocks: tuple[BlockRow, ...]
    refused: tuple[tuple[str, str, str], ...]
    tokens_per_layer: tuple[int, ...]
    macs: int
    macs_blocks: int
    uncounted: int
    hazards: tuple[str, ...]
    methods: tuple[MethodRow, ...]

    def to_json(self) -> dict[str, object]:
        """Plain lists, dicts, numbers and strings."""
        return asdict(self)


def summarize(
    model: ir.Model,
    finding: Finding,
    *,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
    removed: float = 0.3,
) -> Summary:
    """Describe a graph without running it.

    Args:
        model: any graph, transformer or not; not modified.
        finding: `find_blocks(model)`.
        shapes: sizes by input name that win over the file's open axes; axes that are not numbers stay open.
        removed: share of tokens for which gains are estimated (decision: 1 - tokens entering MLPs / all).

    Returns:
        The summary. Counts are for one sample; open axes are taken as in `assumed` (length 128, image side 224).
    """
    reader, sizes = read_at(model, LENGTHS, batch=1, shapes=shapes)
    rows = tuple(_block_row(reader, block) for block in finding.blocks)
    total, uncounted = _macs(reader)
    batch = _batch(reader, finding)
    params, size_bytes, by_type = _weights(model)
    counts = Counter(_label(node) for node in all_nodes(model))
    blocks = sum(row.macs for row in rows)
    return Summary(
        opset=model.opset_imports.get("", 0), ir_version=model.ir_version or 0,
        producer=" ".join(p for p in (model.producer_name, model.producer_version) if p),
        inputs=tuple(_tensor_row(v, sizes.get(v.name or "")) for v in graph_inputs(model.graph)),
        outputs=tuple(_tensor_row(v, reader.shape(v)) for v in model.graph.outputs),
        assumed=_assumed(model, sizes), nodes=sum(counts.values()), op_counts=dict(counts.most_common()),
        parameters=params, weight_bytes=size_bytes, bytes_by_type=by_type, family=finding.family,
        leading=finding.leading, grid=finding.grid, blocks=rows,
        refused=tuple((r.name, r.reason, r.sentence) for r in finding.refused),
        tokens_per_layer=tuple(row.tokens for row in rows), macs=total // batch, macs_blocks=blocks,
        uncounted=uncounted, hazards=tuple(hazard_sentence(h) for h in _hazards(finding)),
        methods=method_rows(reader, finding, rows[0].tokens if rows else 0, _ratio(rows), total // batch, removed),
    )  # fmt: skip


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Every operator of the main graph, of branches and of local functions."""
    stack: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    while stack:
        for node in stack.pop():
            yield node
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.GRAPH:
                    stack.append(attribute.as_graph())
                elif attribute.type == ir.AttributeType.GRAPHS:
                    stack.extend(attribute.as_graphs())


def mlp_ratio(reader: Reader, block: Block) -> float | None:
    """Weights of the products between x_attn and x_out divided by 2 D^2; None when there are none."""
    if block.x_out is None or block.width == 0:
        return None
    total, stack, seen = 0, [block.x_out], {block.x_attn}
    stops = {block.x_attn, block.x_in, block.context}
    while stack and len(seen) < 400:
        node = stack.pop().producer()
        if node is None or any(output in stops for output in node.outputs):
            continue
        if reader.weight_product(node) is not None:
            index = 3 if node.op_type == "QLinearMatMul" else 1
            total += _weight_size(reader, node, index)
        for value in node.inputs:
            if value is not None and value in reader.trace.varies and value not in seen:
                seen.add(value)
                stack.append(value)
    return total / (2 * block.width**2) if total else None


def _weight_size(reader: Reader, node: ir.Node, index: int) -> int:
    if node.op_type == "MatMulNBits":
        return node.attributes["N"].as_int() * node.attributes["K"].as_int()
    sizes = [reader.shape(node.inputs[i]) for i in (0, index)]
    constant = [s for i, s in zip((0, index), sizes) if reader.trace.constant(node.inputs[i])]
    shape = constant[0] if constant else None
    size = 1
    for dim in shape or (0,):
        size *= dim
    return size


def _block_row(reader: Reader, block: Block) -> BlockRow:
    from edgetok.converters.graph.cost import macs

    shape = reader.shape(block.x_in)
    tokens = block.tokens or (shape[1] if shape is not None and len(shape) == 3 else 0)
    ratio = mlp_ratio(reader, block)
    cost = macs(tokens, tokens, block.width, 0.0 if ratio is None else ratio)
    return BlockRow(
        block.index,
        block.name,
        block.heads,
        block.head_dim,
        block.width,
        tokens,
        ratio,
        cost,
        block.norm,
        block.mask_kind,
        block.packed,
        block.fused_op,
        block.hazards,
    )


def _ratio(rows: Sequence[BlockRow]) -> float:
    """The network's MLP ratio: the mean over its blocks."""
    known = [row.mlp_ratio for row in rows if row.mlp_ratio is not None]
    return sum(known) / len(known) if known else 4.0


def _macs(reader: Reader) -> tuple[int, int]:
    """All multiply-accumulates at the traced sizes, and how many products could not be counted."""
    total = uncounted = 0
    for node in reader.model.graph:
        if all(reader.trace.constant(v) for v in node.outputs):
            continue  # folded at load, as weights that are dequantized
        count = node_macs(node, [reader.shape(v) for v in node.inputs], reader.shape(node.outputs[0]))
        total, uncounted = total + (count or 0), uncounted + (count is None)
    return total, uncounted


def _batch(reader: Reader, finding: Finding) -> int:
    shapes = [reader.shape(b.x_in) for b in finding.blocks[:1]]
    shapes += [reader.shape(v) for v in graph_inputs(reader.model.graph)]
    return next((s[0] for s in shapes if s and s[0] > 0), 1)


def _weights(model: ir.Model) -> tuple[int, int, dict[str, int]]:
    """Elements, bytes, and bytes by element type of all weights, Constant nodes included."""
    elements = total = 0
    by_type: Counter[str] = Counter()
    tensors = [v.const_value for v in model.graph.initializers.values()]
    tensors += [n.attributes["value"].as_tensor() for n in all_nodes(model)
                if n.op_type == "Constant" and "value" in n.attributes]  # fmt: skip
    for tensor in tensors:
        if tensor is None or tensor.dtype == ir.DataType.STRING:
            continue
        size, bytes_ = int(tensor.size), int(tensor.nbytes)
        elements, total = elements + size, total + bytes_
        by_type[tensor.dtype.name.lower()] += bytes_
    return elements, total, dict(by_type.most_common())


def _label(node: ir.Node) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"


def _dims(value: ir.Value) -> tuple[int | str, ...] | None:
    if value.shape is None:
        return None
    return tuple(d if isinstance(d, int) else (d.value or "?") for d in value.shape)


def _tensor_row(value: ir.Value, assumed: tuple[int, ...] | None) -> TensorRow:
    return TensorRow(value.name or "", value.dtype.name.lower() if value.dtype else "?", _dims(value), assumed)


def _assumed(model: ir.Model, sizes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Open axes with the size taken, each name once."""
    found: dict[str, int] = {}
    for value in graph_inputs(model.graph):
        for i, (dim, size) in enumerate(zip(_dims(value) or (), sizes.get(value.name or "", ()))):
            if isinstance(dim, str):
                found.setdefault(dim if dim != "?" else f"{value.name}[{i}]", size)
    return tuple(f"{name}={size}" for name, size in found.items())


def _hazards(finding: Finding) -> list[str]:
    return list(dict.fromkeys(h for block in finding.blocks for h in block.hazards))
