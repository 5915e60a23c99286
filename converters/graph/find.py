"""Find the attention blocks of a graph, from any exporter, and say why a place was refused.

The search starts at the scores (a softmax, or a fused attention node) and reads semantics, not operator names: scalars
on either side multiply into one scale, views and transposes are undone by their axes, masks are judged by contents.
Shapes come from one trace with concrete input sizes, so run-time shape arithmetic of the exporters does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from edgetok.converters.graph.anchors import FUSED, Attention, open_fused, open_softmax
from edgetok.converters.graph.blocks import Block, Finding, Refusal
from edgetok.converters.graph.layout import family_of, leading_rows, patch_grid
from edgetok.converters.graph.masks import MaskReader
from edgetok.converters.graph.stream import Stream, follow_stream
from edgetok.converters.graph.trace import BATCH, Trace, graph_inputs, input_sizes, trace
from edgetok.converters.graph.walk import Reader, scope

SIDES = ((224, 7), (384, 16), (256, 128), (336, 3000), (448, 64), (512, 77), (518, 197), (32, 32), (64, 1500))

SENTENCES = {
    "cross": "queries and keys come from different tensors (cross-attention), so one side cannot be shortened alone",
    "windowed": "attention runs inside windows of {k} tokens, so removing tokens would break the window grid",
    "pooling": "a query of {q} learned or selected tokens pools the sequence; it is a head, not a block of the stream",
    "subsampled": "{q} queries look at {k} keys (spatially reduced attention), so their rows do not correspond",
    "no-projection": "the projections of q, k and v could not be followed to one tensor",
    "no-residual": "no residual addition was found after it, so there is no token stream to shorten here",
    "not-attention": "a softmax over square scores that does not stand between a product q k^T and a product with v",
    "layout": "its token stream is laid out as [tokens, batch, channels]; export with the batch first",
    "rows": "its token stream is kept as rows [batch * tokens, channels], as conversions write it; reduce their source",
    "picture": "its residual stream is a picture [B, rows, columns, C] and not a list of tokens",
    "other-stream": "it belongs to another token stream ({n} tokens) than the {m} blocks of the main one",
    "function": "it lies inside a local function or a control-flow branch; clean-up opens these first",
    "unknown-form": "the fused node {op} is in a form that is not understood",
    "cache": "it reads keys and values of earlier calls (a cache), so its keys are not the tokens of this call",
}


@dataclass(eq=False)
class _Place:
    """An attention with its stream."""

    attention: Attention
    stream: Stream
    hazards: list[str]


def find_blocks(model: ir.Model) -> Finding:
    """Find self-attention blocks on the main token stream.

    Args:
        model: any graph; exporter output or cleaned up. Not modified.

    Returns:
        Blocks in graph order (those with hazards included), refusals with a sentence each, the number of protected
        leading rows, the patch grid and the token count. A graph without attention gives an empty finding.
    """
    reader, sizes = read(model)
    places: list[_Place] = []
    refused: list[Refusal] = []
    for node in list(model.graph):
        found = _read_anchor(reader, node, refused)
        if found is None:
            continue
        place = _place(reader, found)
        if isinstance(place, Refusal):
            refused.append(place)
        else:
            places.append(place)
    refused += _hidden_places(model)
    masks = MaskReader(reader, sizes)
    open_axes = _open_tokens(model, reader, places)
    every = [_block(reader, masks, place, i, place.stream.x_in in open_axes) for i, place in enumerate(places)]
    blocks, others = _main_stream(reader, every)
    refused += others
    if not blocks:
        return Finding((), tuple(refused), "unknown", 0, None, None)
    family = family_of(reader, blocks)
    rows = leading_rows(reader, blocks[0].x_in)
    leading = 1 if family == "bert" else rows
    grid = patch_grid(reader, blocks[0].x_in, _tokens(reader, blocks[0].x_in), rows) if family == "vit" else None
    return Finding(blocks, tuple(refused), family, leading, grid, blocks[0].tokens)


def read(model: ir.Model) -> tuple[Reader, dict[str, tuple[int, ...]]]:
    """Trace a model at sizes that fit it, small where they are open."""
    return read_at(model, SIDES)


def read_at(
    model: ir.Model,
    choices: Sequence[tuple[int, int]],
    *,
    batch: int = BATCH,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
) -> tuple[Reader, dict[str, tuple[int, ...]]]:
    """Trace a model at the first sizes that give every value a shape.

    Args:
        model: any graph.
        choices: (image side, text length) to try for open axes, in order.
        batch: for an open first axis.
        shapes: sizes by input name that win; entries that are not numbers stay open.

    Returns:
        The reader and the sizes by input name; the attempt with fewest unknown shapes when none fits.
    """
    best: tuple[int, Trace, dict[str, tuple[int, ...]]] | None = None
    fixed = all(isinstance(d, int) for v in graph_inputs(model.graph) for d in list(v.shape or ())[1:])
    for side, length in choices[:1] if fixed else choices:
        sizes = input_sizes(model, batch=batch, side=side, sequence=length)
        sizes = {name: _given(size, (shapes or {}).get(name)) for name, size in sizes.items()}
        result = trace(model, sizes)
        missing = sum(1 for node in model.graph for v in node.outputs if v.name != "" and v not in result.shapes)
        if best is None or missing < best[0]:
            best = (missing, result, sizes)
        if missing == 0:
            break
    if best is None:
        raise ValueError("no input sizes to try")
    return Reader(model, best[1]), best[2]


def _given(size: tuple[int, ...], wanted: Sequence[int | str] | None) -> tuple[int, ...]:
    """A guessed shape with the numbers a user gave put over it."""
    if wanted is None or len(wanted) != len(size):
        return size
    return tuple(w if isinstance(w, int) and w > 0 else s for s, w in zip(size, wanted))


def _read_anchor(reader: Reader, node: ir.Node, refused: list[Refusal]) -> Attention | None:
    if node.op_type == "Softmax" and node.domain in ("", "ai.onnx"):
        opened = open_softmax(reader, node)
        if opened is None and _square(reader, node):
            refused.append(_refusal(node, "not-attention"))
        return opened
    if node.op_type in FUSED:
        found = open_fused(reader, node)
        if found is None:
            refused.append(_refusal(node, "unknown-form", op=node.op_type))
        return found
    return None


def _square(reader: Reader, node: ir.Node) -> bool:
    """Whether a softmax runs over scores between as many queries as keys, which only attention has."""
    shape = reader.shape(node.outputs[0])
    return shape is not None and len(shape) in (3, 4) and shape[-1] == shape[-2] > 1


def _refusal(node: ir.Node, reason: str, **facts: object) -> Refusal:
    return Refusal(scope(node), reason, f"{scope(node)}: {SENTENCES[reason].format(**facts)}")


def _place(reader: Reader, found: Attention) -> _Place | Refusal:
    """Decide whether an attention is a block, and find its stream."""
    node, sizes = found.anchor, {"q": found.q_len, "k": found.k_len}
    if "query-constant" in found.marks or (found.q_len == 1 and found.k_len > 1):
        return _refusal(node, "pooling", **sizes)
    if "cache" in found.marks:
        return _refusal(node, "cache")
    if found.source is None:
        return _refusal(node, "no-projection")
    if found.q_len != found.k_len:
        return _refusal(node, "cross" if "cross" in found.marks else "subsampled", **sizes)
    if "cross" in found.marks:
        return _refusal(node, "cross")
    stream = follow_stream(reader, found.output, found.source)
    if isinstance(stream, str):
        if _windows(reader, found):
            return _refusal(node, "windowed", k=found.k_len)
        return _refusal(node, stream)
    shape = reader.shape(stream.x_in)
    if shape is None or len(shape) != 3 or shape[1] != found.q_len or shape[0] != found.batch:
        tokens = 1
        for dim in (shape or (1, 1, 1))[1:-1]:
            tokens *= dim
        if shape is not None and len(shape) == 3 and shape[:2] == (found.q_len, found.batch):
            return _refusal(node, "layout")
        if shape is not None and len(shape) == 2 and shape[0] == found.batch * found.q_len:
            return _refusal(node, "rows")
        if shape is not None and len(shape) == 4 and tokens == found.q_len:
            return _refusal(node, "picture")
        if tokens != found.q_len:
            return _refusal(node, "windowed", k=found.k_len)
        return _refusal(node, "no-residual")
    hazards = [m for m in dict.fromkeys(found.marks) if m in ("rope", "causal", "softcap", "head-scale")]
    hazards += ["windowed"] if _windows(reader, found) else []
    return _Place(found, stream, hazards + list(stream.marks))


def _windows(reader: Reader, found: Attention) -> bool:
    """Whether the batch axis of an attention is a multiple of the model's: windows, or another split of the tokens."""
    shapes = [reader.shape(value) for value in graph_inputs(reader.model.graph)]
    firsts = {shape[0] for shape in shapes if shape and len(shape) > 1}
    return found.batch not in firsts and any(found.batch % first == 0 for first in firsts if first)


def _main_stream(reader: Reader, blocks: list[Block]) -> tuple[tuple[Block, ...], list[Refusal]]:
    """Keep the blocks of one stream; a graph can hold two encoders, a decoder, several resolutions.

    Blocks are chained by the nearest block output above their input. Among chains of equal token count and width, one
    without hazards wins, then the longest, then the first.
    """
    if not blocks:
        return (), []
    leaders: dict[int, int] = {}
    for block in blocks:
        before = _predecessor(reader, block, blocks)
        same = before is not None and reader.shape(before.x_in) == reader.shape(block.x_in)
        leaders[block.index] = leaders.get(before.index, before.index) if same and before is not None else block.index
    chains: dict[int, list[Block]] = {}
    for block in blocks:
        chains.setdefault(leaders[block.index], []).append(block)
    main = max(chains.values(), key=lambda c: (not any(b.hazards for b in c), len(c), -c[0].index))
    others = [
        _refusal(b.anchor, "other-stream", n=(reader.shape(b.x_in) or (0, 0))[1], m=len(main))
        for b in blocks
        if b not in main
    ]
    return tuple(replace(block, index=i) for i, block in enumerate(main)), others


def _predecessor(reader: Reader, block: Block, blocks: list[Block]) -> Block | None:
    """The block whose output is the nearest one above a block's input."""
    outputs = {b.x_out or b.x_attn: b for b in blocks if b is not block}
    queue, seen, limit = [block.x_in], {block.x_in}, 120
    while queue and limit:
        value, limit = queue.pop(0), limit - 1
        if value in outputs:
            return outputs[value]
        node = value.producer()
        for above in node.inputs if node is not None else ():
            if above is not None and above not in seen and above in reader.trace.varies:
                seen.add(above)
                queue.append(above)
    return None


def _hidden_places(model: ir.Model) -> list[Refusal]:
    """Attention inside local functions and branches: counted, not opened."""
    places = [list(function) for function in model.functions.values()]
    for node in model.graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                places.append(list(attribute.as_graph()))
    found = []
    for nodes in places:
        products = sum(node.op_type == "MatMul" for node in nodes)
        found += [n for n in nodes if n.op_type in FUSED or (n.op_type == "Softmax" and products > 1)]
    return [_refusal(node, "function") for node in found]


def _tokens(reader: Reader, value: ir.Value) -> int | None:
    shape = reader.shape(value)
    return shape[1] if shape is not None and len(shape) == 3 else None


def _open_tokens(model: ir.Model, reader: Reader, places: list[_Place]) -> set[ir.Value]:
    """The streams whose token count follows an open input axis."""
    open_axes = any(not isinstance(d, int) for v in graph_inputs(model.graph) for d in list(v.shape or ())[1:])
    if not open_axes or not places:
        return set()
    other = trace(model, input_sizes(model, sequence=11, side=448))
    found = set()
    for place in places:
        now, then = reader.shape(place.stream.x_in), other.shape(place.stream.x_in)
        if now is not None and then is not None and now[1] != then[1]:
            found.add(place.stream.x_in)
    return found


def _block(reader: Reader, masks: MaskReader, place: _Place, index: int, open_axes: bool) -> Block:
    found, stream = place.attention, place.stream
    hazards, kind, mask, keeps = list(place.hazards), "none", None, True
    for value, how in found.terms:
        this = "key-padding" if how == "index" else masks.kind(value, how, found.heads, found.batch)
        if this in ("relative-bias", "windowed", "causal") and this not in hazards:
            hazards.append(this)
        if this == "relative-bias" and kind == "none":
            kind = _bias_mask_kind(masks, value, how)
        elif this != "relative-bias" and (kind == "none" or this != "none"):
            kind = this
        mask, keeps = value, how != "hide"
    if "causal" in hazards:
        kind = "causal"
    if len(found.terms) > 1 and "relative-bias" not in hazards:
        hazards.append("several-masks")
    softmax = not found.fused
    empty = (None, "BHND")
    (q, ql), (k, kl), (v, vl) = ((o.value, o.layout or "BHND") if o else empty for o in (found.q, found.k, found.v))
    shape = reader.shape(stream.x_in) or (0, 0, 0)
    return Block(
        index=index, name=scope(found.anchor), heads=found.heads, head_dim=found.head_dim, v_dim=found.v_dim,
        width=shape[2], tokens=None if open_axes else shape[1], scale=found.scale, q=q, k=k, v=v,
        logits=found.anchor.inputs[0] if softmax else None, probs=found.anchor.outputs[0] if softmax else None,
        context=stream.context, anchor=found.anchor, x_in=stream.x_in, x_attn=stream.x_attn, x_out=stream.x_out,
        norm=stream.norm, mask=mask, mask_kind=kind, packed=found.packed, fused_op=found.fused, hazards=tuple(hazards),
        k_layout=kl, q_layout=ql, v_layout=vl, mask_keeps=keeps,
    )  # fmt: skip


def _bias_mask_kind(masks: MaskReader, value: ir.Value, how: str) -> str:
    """A relative bias often comes already summed with the padding mask (T5): say so when entries hide keys."""
    padded = masks.contents(value, padded=True)
    if padded is None:
        return "full" if value in masks.reader.trace.varies else "none"
    return "key-padding" if bool((padded < -1e3).any()) else "none"


def without_hazards(finding: Finding) -> Finding:
    """The same finding with only the blocks that carry no hazard."""
    return replace(finding, blocks=tuple(b for b in finding.blocks if not b.hazards))
