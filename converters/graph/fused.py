"""Open fused nodes into the elementary operators every later step and every backend knows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from edgetok.converters.graph.infer import Facts
from edgetok.converters.graph.match import (
    add_initializer,
    array_of,
    attr_float,
    attr_int,
    attr_ints,
    emit,
    is_constant,
    take_over,
)

LOWEST = float(np.finfo(np.float32).min)
MICROSOFT = "com.microsoft"
ELEMENTWISE_SKIP_OUTPUTS = 3  # SkipLayerNormalization: output, mean, inverse deviation, sum


def open_fused(model: ir.Model, facts: Facts) -> int:
    """Replace Attention (both domains), MultiHeadAttention, SkipLayerNormalization, BiasGelu and their kin.

    A node with a cache, rotary embedding, soft cap or another extra stays as it is. Returns how many were opened.
    """
    count = 0
    for node in list(model.graph):
        rule = _RULES.get((node.domain if node.domain != "ai.onnx" else "", node.op_type))
        if rule is not None and rule(_Opener(model, node, facts)):
            count += 1
    return count


class _Opener:
    """Emits nodes before a fused one and replaces it."""

    def __init__(self, model: ir.Model, node: ir.Node, facts: Facts) -> None:
        self.graph = model.graph
        self.opset = model.opset_imports.get("", 18)
        self.node = node
        self.facts = facts
        self.base = node.name or node.outputs[0].name or node.op_type
        first = node.inputs[0] if node.inputs else None
        self.dtype = facts.types.get(first, ir.DataType.FLOAT) if first is not None else ir.DataType.FLOAT

    def input(self, index: int) -> ir.Value | None:
        return self.node.inputs[index] if len(self.node.inputs) > index else None

    def uses(self, first: int) -> bool:
        """True when an output from ``first`` on is read."""
        return any(out.uses() or out.is_graph_output() for out in self.node.outputs[first:])

    def op(self, op_type: str, inputs: Sequence[ir.Value | None], tag: str, *attributes: ir.Attr) -> ir.Value:
        kind = ir.DataType.BOOL if op_type == "Less" else self.dtype
        return emit(
            self.graph, self.node, op_type, inputs, name=f"{self.base}/{tag}", attributes=attributes, dtype=kind
        )

    def constant(self, array: np.ndarray | float, tag: str) -> ir.Value:
        if isinstance(array, float):
            array = np.asarray(array, self.dtype.numpy())
        return add_initializer(self.graph, f"{self.base}/{tag}", array)

    def finish(self, new: ir.Value, output: int = 0) -> bool:
        take_over(self.node.outputs[output], new)
        return True

    def remove(self) -> bool:
        self.graph.remove(self.node, safe=True)
        return True

    def heads(self, value: ir.Value, count: int, width: int, tag: str, perm: Sequence[int] = (0, 2, 1, 3)) -> ir.Value:
        target = self.constant(np.asarray([0, 0, count, width], np.int64), f"{tag}/shape")
        tall = self.op("Reshape", [value, target], f"{tag}/Reshape")
        return self.op("Transpose", [tall], f"{tag}/Transpose", ir.AttrInt64s("perm", list(perm)))

    def attend(self, q: ir.Value, keys: ir.Value, v: ir.Value, scale: float, masks: Sequence[ir.Value]) -> ir.Value:
        """softmax(scale q keys + masks) v with q [B,H,N,Dh], keys [B,H,Dh,N], v [B,H,N,Dv]."""
        scaled = self.op("Mul", [q, self.constant(scale, "scale")], "scaled")
        logits = self.op("MatMul", [scaled, keys], "logits")
        for index, mask in enumerate(masks):
            logits = self.op("Add", [logits, mask], f"masked_{index}")
        probs = self.op("Softmax", [logits], "Softmax", ir.AttrInt64("axis", -1))
        return self.op("MatMul", [probs, v], "context")

    def join(self, context: ir.Value, width: int) -> ir.Value:
        turned = self.op("Transpose", [context], "join/Transpose", ir.AttrInt64s("perm", [0, 2, 1, 3]))
        target = self.constant(np.asarray([0, 0, width], np.int64), "join/shape")
        return self.op("Reshape", [turned, target], "join/Reshape")

    def causal(self, tokens: int) -> ir.Value:
        mask = np.triu(np.full((1, 1, tokens, tokens), LOWEST, np.float32), 1)
        return self.constant(mask.astype(self.dtype.numpy()), "causal")


def _attention(o: _Opener) -> bool:
    """ONNX Attention (opset 23): inputs [B,H,N,Dh], or [B,N,D] with head counts as attributes."""
    node = o.node
    q, k, v, mask = (o.input(i) for i in range(4))
    shapes = [o.facts.shape(x) for x in (q, k, v)]
    if q is None or k is None or v is None or any(s is None for s in shapes) or len(node.inputs) > 4 or o.uses(1):
        return False
    if attr_float(node, "softcap", 0.0) or "softmax_precision" in node.attributes:
        return False
    three = len(shapes[0] or ()) == 3
    if three:
        heads, kv_heads = attr_int(node, "q_num_heads", 0), attr_int(node, "kv_num_heads", 0)
        widths = [s[2] for s in shapes if s]
        if not heads or heads != kv_heads or not all(isinstance(w, int) for w in widths):
            return False
        sizes = [int(w) // heads for w in widths]  # type: ignore[arg-type]
        tokens = shapes[0][1] if shapes[0] else None
    else:
        if any(s is None or len(s) != 4 or s[1] != (shapes[0] or (0, 0))[1] for s in shapes):
            return False
        heads, tokens = 0, shapes[0][2] if shapes[0] else None
        sizes = [s[3] for s in shapes if s]  # type: ignore[misc]
    if not isinstance(sizes[0], int) or (attr_int(node, "is_causal", 0) and not isinstance(tokens, int)):
        return False
    masks = [] if mask is None else [_additive(o, mask)]
    if attr_int(node, "is_causal", 0) and isinstance(tokens, int):
        masks.append(o.causal(tokens))
    if three:
        q, v = o.heads(q, heads, sizes[0], "q"), o.heads(v, heads, sizes[2], "v")
        keys = o.heads(k, heads, sizes[1], "k", (0, 2, 3, 1))
    else:
        keys = o.op("Transpose", [k], "k/Transpose", ir.AttrInt64s("perm", [0, 1, 3, 2]))
    out = o.attend(q, keys, v, attr_float(node, "scale", 1 / math.sqrt(sizes[0])), masks)
    o.finish(o.join(out, heads * sizes[2]) if three else out)
    return o.remove()


def _additive(o: _Opener, mask: ir.Value) -> ir.Value:
    """A mask to add to logits: a boolean one keeps what is true; onnxruntime uses the lowest float for the rest."""
    if o.facts.types.get(mask) != ir.DataType.BOOL:
        return mask
    return o.op("Where", [mask, o.constant(0.0, "visible"), o.constant(LOWEST, "hidden")], "mask")


def _packed_attention(o: _Opener) -> bool:
    """com.microsoft.Attention: x [B,N,D], weights [D, Dq+Dk+Dv], bias, mask, -, attention bias."""
    node = o.node
    x, weight, bias = o.input(0), o.input(1), o.input(2)
    heads = attr_int(node, "num_heads", 0)
    shape = o.facts.shape(x)
    extra = o.input(4) is not None or o.input(6) is not None or attr_int(node, "do_rotary", 0) or o.uses(1)
    if x is None or weight is None or not is_constant(weight) or not heads or extra or shape is None:
        return False
    if bias is not None and not is_constant(bias):
        return False
    array = array_of(weight)
    parts = attr_ints(node, "qkv_hidden_sizes") or [array.shape[1] // 3] * 3
    masks = _microsoft_masks(o, o.input(3), o.input(5), shape[1])
    if masks is None:
        return False
    edges = np.cumsum([0, *parts])
    numbers = array_of(bias) if bias is not None else None
    projected = []
    for index, tag in enumerate("qkv"):
        rows = slice(int(edges[index]), int(edges[index + 1]))
        part = o.op("MatMul", [x, o.constant(array[:, rows], f"{tag}/weight")], f"{tag}/MatMul")
        if numbers is not None:
            part = o.op("Add", [part, o.constant(numbers[rows], f"{tag}/bias")], f"{tag}/Add")
        projected.append(part)
    return _finish_heads(o, projected, parts, heads, masks)


def _multi_head(o: _Opener) -> bool:
    """com.microsoft.MultiHeadAttention with q, k, v [B,N,D]."""
    node = o.node
    q, k, v, bias = (o.input(i) for i in range(4))
    heads = attr_int(node, "num_heads", 0)
    shapes = [o.facts.shape(x) for x in (q, k, v)]
    if q is None or k is None or v is None or not heads or any(s is None or len(s) != 3 for s in shapes):
        return False
    if any(o.input(i) is not None for i in range(6, 10)) or o.uses(1) or (bias is not None and not is_constant(bias)):
        return False
    widths = [s[2] for s in shapes if s]
    masks = _microsoft_masks(o, o.input(4), o.input(5), (shapes[1] or (0, None))[1])
    if masks is None or not all(isinstance(w, int) for w in widths):
        return False
    parts = [int(w) for w in widths]  # type: ignore[arg-type]
    projected = [q, k, v]
    if bias is not None:
        edges, numbers = np.cumsum([0, *parts]), array_of(bias)
        projected = [
            o.op("Add", [x, o.constant(numbers[int(edges[i]) : int(edges[i + 1])], f"{t}/bias")], f"{t}/Add")
            for i, (x, t) in enumerate(zip(projected, "qkv", strict=True))
        ]
    return _finish_heads(o, projected, parts, heads, masks)


def _finish_heads(
    o: _Opener, projected: Sequence[ir.Value], parts: Sequence[int], heads: int, masks: Sequence[ir.Value]
) -> bool:
    sizes = [p // heads for p in parts]
    q, v = o.heads(projected[0], heads, sizes[0], "q"), o.heads(projected[2], heads, sizes[2], "v")
    keys = o.heads(projected[1], heads, sizes[1], "k", (0, 2, 3, 1))
    scale = attr_float(o.node, "scale", 0.0) or 1 / math.sqrt(sizes[0])
    o.finish(o.join(o.attend(q, keys, v, scale, masks), parts[2]))
    return o.remove()


def _microsoft_masks(o: _Opener, mask: ir.Value | None, bias: ir.Value | None, tokens: object) -> list[ir.Value] | None:
    """Additive masks of the com.microsoft nodes, or None for a form that is not opened."""
    out: list[ir.Value] = []
    hidden = attr_float(o.node, "mask_filter_value", -10000.0)
    if mask is not None:
        shape = o.facts.shape(mask)
        if shape is None or len(shape) not in (1, 2) or not isinstance(tokens, int):
            return None
        visible = _visible(o, mask, len(shape), tokens)
        out.append(o.op("Where", [visible, o.constant(0.0, "visible"), o.constant(hidden, "hidden")], "mask"))
    if bias is not None:
        out.append(bias)
    if attr_int(o.node, "unidirectional", 0):
        if not isinstance(tokens, int):
            return None
        out.append(o.causal(tokens))
    return out


def _visible(o: _Opener, mask: ir.Value, rank: int, tokens: int) -> ir.Value:
    """[B,1,1,N] truth values from a raw mask [B,N], or from lengths [B]."""
    kind = o.facts.types.get(mask, ir.DataType.INT32)
    axes = o.constant(np.asarray([1, 2] if rank == 2 else [1, 2, 3], np.int64), "mask/axes")
    wide = emit(o.graph, o.node, "Unsqueeze", [mask, axes], name=f"{o.base}/mask/Unsqueeze", dtype=kind)
    if rank == 2:
        return o.op("Less", [o.constant(np.asarray(0, kind.numpy()), "mask/zero"), wide], "mask/Less")
    row = o.constant(np.arange(tokens, dtype=kind.numpy()).reshape(1, 1, 1, -1), "mask/positions")
    return o.op("Less", [row, wide], "mask/Less")


def _skip_layernorm(o: _Opener) -> bool:
    """com.microsoft.SkipLayerNormalization: LayerNormalization(x + skip + bias); the sum may be read too."""
    x, skip, gamma, beta, bias = (o.input(i) for i in range(5))
    node = o.node
    if x is None or skip is None or gamma is None:
        return False
    if any(out.uses() or out.is_graph_output() for out in node.outputs[1:ELEMENTWISE_SKIP_OUTPUTS]):
        return False
    if bias is not None:
        x = o.op("Add", [x, bias], "bias")
    total = o.op("Add", [x, skip], "sum")
    inputs = [total, gamma] if beta is None else [total, gamma, beta]
    attributes = [ir.AttrInt64("axis", -1), ir.AttrFloat32("epsilon", attr_float(node, "epsilon", 1e-12))]
    normed = o.op("LayerNormalization", inputs, "norm", *attributes)
    if len(node.outputs) > ELEMENTWISE_SKIP_OUTPUTS and o.uses(ELEMENTWISE_SKIP_OUTPUTS):
        o.finish(total, ELEMENTWISE_SKIP_OUTPUTS)
    o.finish(normed)
    return o.remove()


def _bias_activation(o: _Opener) -> bool:
    """BiasGelu and FastGelu: Add, then a Gelu the next pass spells out."""
    x, bias = o.input(0), o.input(1)
    if x is None:
        return False
    if bias is not None:
        x = o.op("Add", [x, bias], "bias")
    mode = "tanh" if o.node.op_type == "FastGelu" else "none"
    new = ir.Node("", "Gelu", [x], attributes=[ir.AttrString("approximate", mode)], name=f"{o.base}/Gelu")
    new.outputs[0].type = ir.TensorType(o.dtype)
    new.outputs[0].shape = o.node.outputs[0].shape
    o.graph.insert_before(o.node, new)
    o.finish(new.outputs[0])
    return o.remove()


def _quick_gelu(o: _Opener) -> bool:
    """QuickGelu: x sigmoid(alpha x)."""
    x = o.input(0)
    if x is None:
        return False
    inner = o.op("Mul", [x, o.constant(attr_float(o.node, "alpha", 1.702), "alpha")], "Mul")
    o.finish(o.op("Mul", [x, o.op("Sigmoid", [inner], "Sigmoid")], "Mul_1"))
    return o.remove()


def _fused_matmul(o: _Opener) -> bool:
    """FusedMatMul: optional Transposes, MatMul, and the factor on the first operand."""
    node, alpha = o.node, attr_float(o.node, "alpha", 1.0)
    if attr_int(node, "transBatchA", 0) or attr_int(node, "transBatchB", 0):
        return False
    operands: list[ir.Value] = []
    for index, flag in enumerate(("transA", "transB")):
        value = o.input(index)
        shape = o.facts.shape(value)
        if value is None or (attr_int(node, flag, 0) and (shape is None or len(shape) < 2)):
            return False
        if attr_int(node, flag, 0) and shape is not None:
            axes = list(range(len(shape)))
            axes[-2:] = axes[-1], axes[-2]
            value = o.op("Transpose", [value], f"{flag}/Transpose", ir.AttrInt64s("perm", axes))
        operands.append(value)
    if alpha != 1.0:
        operands[0] = o.op("Mul", [operands[0], o.constant(alpha, "alpha")], "Mul")
    o.finish(o.op("MatMul", operands, "MatMul"))
    return o.remove()


def _embed_layernorm(o: _Opener) -> bool:
    """EmbedLayerNormalization: word, position and segment rows added, then LayerNormalization."""
    ids, segments, words, positions, kinds, gamma, beta, mask = (o.input(i) for i in range(8))
    shape = o.facts.shape(ids)
    if ids is None or words is None or positions is None or shape is None or not isinstance(shape[1], int):
        return False
    if o.input(8) is not None or not is_constant(positions) or gamma is None or beta is None:
        return False
    o.dtype = o.facts.types.get(words, ir.DataType.FLOAT)
    total = o.op("Gather", [words, ids], "words", ir.AttrInt64("axis", 0))
    rows = o.constant(array_of(positions)[: shape[1]][None], "positions")
    total = o.op("Add", [total, rows], "position_sum")
    if kinds is not None and segments is not None:
        total = o.op("Add", [total, o.op("Gather", [kinds, segments], "segments", ir.AttrInt64("axis", 0))], "sum")
    attributes = [ir.AttrInt64("axis", -1), ir.AttrFloat32("epsilon", attr_float(o.node, "epsilon", 1e-12))]
    normed = o.op("LayerNormalization", [total, gamma, beta], "norm", *attributes)
    if len(o.node.outputs) > 1 and (o.node.outputs[1].uses() or o.node.outputs[1].is_graph_output()):
        return _dummy_lengths(o, normed) if mask is None else _lengths(o, normed, mask)
    o.finish(normed)
    return o.remove()


def _lengths(o: _Opener, normed: ir.Value, mask: ir.Value) -> bool:
    """With a mask the second output counts its ones: the length of each sentence, padded on the right."""
    axes = o.constant(np.asarray([1], np.int64), "lengths/axes")
    total = emit(
        o.graph,
        o.node,
        "ReduceSum",
        [mask, axes],
        name=f"{o.base}/lengths",
        attributes=[ir.AttrInt64("keepdims", 0)],
        dtype=ir.DataType.INT32,
    )
    o.finish(total, 1)
    o.finish(normed)
    return o.remove()


def _dummy_lengths(o: _Opener, normed: ir.Value) -> bool:
    """Without a mask the second output is zero for every sentence; attention then hides all keys alike: no mask."""
    readers = [node for node, _ in o.node.outputs[1].uses()]
    if o.node.outputs[1].is_graph_output() or any(r.op_type != "Attention" or r.domain != MICROSOFT for r in readers):
        return False
    for node, index in tuple(o.node.outputs[1].uses()):
        node.replace_input_with(index, None)
    o.finish(normed)
    return o.remove()


_RULES: dict[tuple[str, str], Callable[[_Opener], bool]] = {
    ("", "Attention"): _attention,
    (MICROSOFT, "Attention"): _packed_attention,
    (MICROSOFT, "MultiHeadAttention"): _multi_head,
    (MICROSOFT, "SkipLayerNormalization"): _skip_layernorm,
    (MICROSOFT, "BiasGelu"): _bias_activation,
    (MICROSOFT, "FastGelu"): _bias_activation,
    (MICROSOFT, "QuickGelu"): _quick_gelu,
    (MICROSOFT, "FusedMatMul"): _fused_matmul,
    (MICROSOFT, "EmbedLayerNormalization"): _embed_layernorm,
}
