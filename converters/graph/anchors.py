"""One attention place, opened: an anchor with its operands, whatever form the graph holds it in."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from edgetok.converters.graph.roles import LAYOUTS, Operand, follow
from edgetok.converters.graph.scores import scores_above, value_product
from edgetok.converters.graph.walk import Reader, attribute_float, attribute_int

FUSED = {"Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedAttention", "QOrderedAttention", "QAttention",
         "DecoderMaskedMultiHeadAttention", "PackedMultiHeadAttention", "DecoderMaskedSelfAttention"}  # fmt: skip
V_ORDER = ("BHND", "BNHD", "BNC", "BHDN")


@dataclass(eq=False)
class Attention:
    """What was read off one anchor.

    Args:
        anchor: Softmax or fused node.
        output: attended values, before transposing back.
        q, k, v: operands; None inside a fused node that holds the projections itself.
        source: what the projections read; None when they could not be followed.
        scale: total factor on q k^T.
        terms: masks and biases with how they act (see `scores.Scores`).
        batch, heads, q_len, k_len, head_dim, v_dim: sizes at the traced input sizes.
        marks: hazards met on the way.
        fused: "domain::OpType" or "".
    """

    anchor: ir.Node
    output: ir.Value
    q: Operand | None
    k: Operand | None
    v: Operand | None
    source: ir.Value | None
    scale: float
    terms: list[tuple[ir.Value, str]]
    batch: int
    heads: int
    q_len: int
    k_len: int
    head_dim: int
    v_dim: int
    marks: list[str] = field(default_factory=list)
    fused: str = ""

    @property
    def packed(self) -> bool:
        """Whether q, k and v leave one projection."""
        if self.q is None or self.k is None or self.v is None:
            return self.q is None and bool(self.fused)
        projection = self.q.projection
        return projection is not None and projection is self.k.projection is self.v.projection


def open_softmax(reader: Reader, node: ir.Node) -> Attention | None:
    """Read an open attention; None when this softmax is not one (its output enters no product, or has no q k^T)."""
    logits, probs = node.inputs[0], node.outputs[0]
    shape = reader.shape(logits)
    if logits is None or shape is None or len(shape) not in (3, 4):
        return None
    if attribute_int(node, "axis", -1) not in (-1, len(shape) - 1):
        return None
    last = value_product(reader, probs)
    found = scores_above(reader, logits) if last is not None else None
    if last is None or found is None:
        return None
    v_index = 3 if last.op_type == "QLinearMatMul" else 1
    q_value, k_value, v_value = found.product.inputs[0], found.product.inputs[1], last.inputs[v_index]
    if q_value is None or k_value is None or v_value is None:
        return None
    head = "BH" if len(reader.shape(q_value) or ()) == 4 else "X"
    turned = attribute_int(found.product, "transB", 0) if found.product.op_type == "FusedMatMul" else 0
    q = follow(reader, q_value, head + "ND")
    k = follow(reader, k_value, head + ("ND" if turned else "DN"), LAYOUTS)
    v_head = "BH" if len(reader.shape(v_value) or ()) == 4 else "X"
    v = follow(reader, v_value, v_head + "ND", V_ORDER)
    sizes = _sizes(reader, found.product, q, v_value)
    if sizes is None:
        return None
    batch, heads, q_len, k_len, head_dim, v_dim = sizes
    marks = _operand_marks(q, k, v) + (["softcap"] if found.softcap else [])
    marks += ["head-scale"] if found.head_scale else []
    source, extra = _source(q, k, v)
    return Attention(
        node,
        last.outputs[0],
        q,
        k,
        v,
        source,
        found.scale * q.scale * k.scale,
        found.terms,
        batch,
        heads,
        q_len,
        k_len,
        head_dim,
        v_dim,
        marks + extra,
    )


def _sizes(reader: Reader, product: ir.Node, q: Operand, v: ir.Value) -> tuple[int, int, int, int, int, int] | None:
    """B, H, Sq, Skv, Dh, Dv, or None when the shapes are not those of an attention."""
    scores, left, right = reader.shape(product.outputs[0]), reader.shape(product.inputs[0]), reader.shape(v)
    if scores is None or left is None or right is None or len(scores) < 3 or len(right) < 3:
        return None
    if right[-2] != scores[-1]:
        return None
    if len(scores) == 4:
        batch, heads = scores[0], scores[1]
    else:
        heads = q.heads or 1
        batch = scores[0] // heads
    return batch, heads, scores[-2], scores[-1], left[-1], right[-1]


def _operand_marks(*operands: Operand) -> list[str]:
    marks: list[str] = []
    for operand in operands:
        marks += [m for m in operand.marks if m in ("rope", "cache") and m not in marks]
    return marks


def _source(q: Operand, k: Operand, v: Operand) -> tuple[ir.Value | None, list[str]]:
    """The common source of the three projections, and what is wrong when there is none."""
    if q.source is None and k.source is not None:
        return k.source, ["query-constant"]
    if k.source is None or v.source is None or q.source is None:
        return None, ["no-projection"]
    if q.source is not k.source or v.source is not k.source:
        return k.source, ["cross"]
    return q.source, []


def open_fused(reader: Reader, node: ir.Node) -> Attention | None:
    """Read a fused attention node; None when its shapes are unknown or its form is not one we know."""
    contrib = node.domain == "com.microsoft"
    label = f"{node.domain or 'ai.onnx'}::{node.op_type}"
    if contrib and node.op_type in ("Attention", "QAttention"):
        return _contrib_attention(reader, node, label)
    if contrib and node.op_type in ("MultiHeadAttention", "GroupQueryAttention", "DecoderMaskedMultiHeadAttention"):
        return _projected(reader, node, label)
    if not contrib and node.op_type == "Attention":
        return _standard(reader, node, label)
    return None


def _contrib_attention(reader: Reader, node: ir.Node, label: str) -> Attention | None:
    source, shape, out = node.inputs[0], reader.shape(node.inputs[0]), reader.shape(node.outputs[0])
    if source is None or shape is None or out is None or len(shape) != 3:
        return None
    heads = attribute_int(node, "num_heads", 1)
    sizes = node.attributes.get("qkv_hidden_sizes")
    width = sizes.as_ints()[0] if sizes is not None else out[-1]
    terms = [(v, how) for i, how in ((3, "index"), (5, "add")) if (v := _input(node, i)) is not None]
    if node.op_type == "QAttention":
        terms = [(v, "index")] if (v := _input(node, 5)) is not None else []
    scale = attribute_float(node, "scale", 0.0) or (width // heads) ** -0.5
    marks = (["causal"] if attribute_int(node, "unidirectional", 0) else []) + (
        ["rope"] if attribute_int(node, "do_rotary", 0) else []
    )
    return Attention(
        node,
        node.outputs[0],
        None,
        None,
        None,
        reader.strip(source),
        scale,
        terms,
        shape[0],
        heads,
        shape[1],
        shape[1],
        width // heads,
        out[-1] // heads,
        marks,
        label,
    )


def _projected(reader: Reader, node: ir.Node, label: str) -> Attention | None:
    """MultiHeadAttention and GroupQueryAttention: projections outside, split into heads inside."""
    heads = attribute_int(node, "num_heads", 1)
    values = [_input(node, i) for i in range(3)]
    shape = reader.shape(values[0])
    if values[0] is None or shape is None or len(shape) != 3 or values[1] is None or values[2] is None:
        return None
    k_shape, v_shape = reader.shape(values[1]), reader.shape(values[2])
    if k_shape is None or v_shape is None:
        return None
    q, k, v = (follow(reader, x, "BNC" if len(reader.shape(x) or ()) == 3 else "BHND") for x in values if x is not None)
    source, extra = _source(q, k, v)
    marks = _operand_marks(q, k, v) + extra
    terms: list[tuple[ir.Value, str]] = []
    if node.op_type == "GroupQueryAttention":
        marks += ["causal"] + (["rope"] if attribute_int(node, "do_rotary", 0) else [])
    else:
        marks += ["causal"] if attribute_int(node, "unidirectional", 0) else []
        terms = [(x, how) for i, how in ((4, "index"), (5, "add")) if (x := _input(node, i)) is not None]
        if _input(node, 3) is not None:  # the bias is added inside: what lies outside is not yet q, k, v
            q.value = k.value = v.value = None
    head_dim = shape[2] // heads
    scale = attribute_float(node, "scale", 0.0) or head_dim**-0.5
    return Attention(
        node,
        node.outputs[0],
        q,
        k,
        v,
        source,
        scale * q.scale * k.scale,
        terms,
        shape[0],
        heads,
        shape[1],
        k_shape[-2],
        head_dim,
        v_shape[-1] if len(v_shape) == 4 else v_shape[-1] // heads,
        marks,
        label,
    )


def _standard(reader: Reader, node: ir.Node, label: str) -> Attention | None:
    """The Attention operator of opset 23."""
    q_in, k_in, v_in = (_input(node, i) for i in range(3))
    q_shape, k_shape, v_shape = reader.shape(q_in), reader.shape(k_in), reader.shape(v_in)
    if q_in is None or k_in is None or v_in is None or q_shape is None or k_shape is None or v_shape is None:
        return None
    flat = len(q_shape) == 3
    heads = attribute_int(node, "q_num_heads", 1) if flat else q_shape[1]
    kv_heads = attribute_int(node, "kv_num_heads", heads) if flat else k_shape[1]
    head_dim = q_shape[-1] // heads if flat else q_shape[-1]
    v_dim = v_shape[-1] // kv_heads if flat else v_shape[-1]
    q, k, v = (follow(reader, x, "BNC" if flat else "BHND") for x in (q_in, k_in, v_in))
    source, extra = _source(q, k, v)
    marks = _operand_marks(q, k, v) + extra
    marks += ["causal"] if attribute_int(node, "is_causal", 0) else []
    marks += ["softcap"] if attribute_float(node, "softcap", 0.0) else []
    marks += ["cache"] if _input(node, 4) is not None else []
    mask = _input(node, 3)
    how = "keep" if mask is not None and reader.trace.types.get(mask) == ir.DataType.BOOL else "add"
    scale = attribute_float(node, "scale", 0.0) or head_dim**-0.5
    return Attention(
        node,
        node.outputs[0],
        q,
        k,
        v,
        source,
        scale * q.scale * k.scale,
        [(mask, how)] if mask else [],
        q_shape[0],
        heads,
        q_shape[-2],
        k_shape[-2],
        head_dim,
        v_dim,
        marks,
        label,
    )


def _input(node: ir.Node, index: int) -> ir.Value | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None or value.name == "" else value
