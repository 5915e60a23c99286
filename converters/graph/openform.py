"""Bring self-attention to the one open form the later steps work on.

q, k, v come from linear layers of their own by Reshape [0,0,H,Dh] and Transpose (k straight to [B,H,Dh,N]);
one Mul scales q; MatMul, optional Add of a mask, Softmax, MatMul; Transpose and Reshape [0,0,D] leave [B,N,D].
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgetok.converters.graph import scales, views
from edgetok.converters.graph.dims import Shape
from edgetok.converters.graph.infer import Facts
from edgetok.converters.graph.linear import columns
from edgetok.converters.graph.match import add_initializer, attr_int, attr_ints, emit, only_user, producer, take_over

TO_HEADS = [0, 2, 1, 3]
TO_KEYS = [0, 2, 3, 1]


def open_form(model: ir.Model, facts: Facts) -> int:
    """Rewrite q, k, v and the way out of every Softmax attention whose views can be followed.

    Returns how many attentions changed. One that does not fit (rotary, relative, windowed, quantized between the
    projection and the split) is left as it is, piece by piece.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type != "Softmax" or node.graph is None or not _last_axis(node, facts):
            continue
        product = scales.logits_matmul(node)
        context = _context_matmul(node)
        if product is None or context is None:
            continue
        q_scale = producer(product.inputs[0], "Mul")
        changed = _rebuild(model, facts, q_scale or product, 0, TO_HEADS)
        changed |= _rebuild(model, facts, product, 1, TO_KEYS)
        changed |= _rebuild(model, facts, context, 1, TO_HEADS)
        changed |= _rebuild_out(model, facts, context)
        count += changed
    return count


def _last_axis(node: ir.Node, facts: Facts) -> bool:
    shape = facts.shape(node.inputs[0])
    axis = attr_int(node, "axis", -1)
    return shape is not None and len(shape) == 4 and axis in (-1, 3)


def _context_matmul(softmax: ir.Node) -> ir.Node | None:
    """The MatMul that reads the probabilities as its first operand, through a NaN guard or a Cast."""
    value = softmax.outputs[0]
    for _ in range(4):
        users = [n for n, _ in value.uses() if n.op_type != "IsNaN"]
        if len(users) != 1:
            return None
        node = users[0]
        if node.op_type == "MatMul":
            return node if node.inputs[0] is value else None
        if node.op_type not in ("Where", "Cast", "Identity", "Dropout"):
            return None
        value = node.outputs[0]
    return None


def _rebuild(model: ir.Model, facts: Facts, user: ir.Node, operand: int, perm: list[int]) -> bool:
    """Give one operand of an attention its canonical Reshape and Transpose from a linear layer of its own."""
    value = user.inputs[operand]
    shape = facts.shape(value)
    if value is None or shape is None or len(shape) != 4:
        return False
    base, steps = views.climb(value)
    base_shape = facts.shape(base)
    if not steps or base_shape is None or len(base_shape) != 3 or _is_canonical(steps, perm, facts):
        return False
    cols = _column_map(steps, base_shape, perm, facts)
    if cols is None:
        return False
    heads, width = cols.shape
    flat = cols.reshape(-1)
    if base_shape[2] != flat.size or not np.array_equal(flat, np.arange(flat.size)):
        part = columns(model, base, flat, f"{user.name or value.name}/{'qkv'[operand] if perm == TO_HEADS else 'k'}")
        if part is None:
            return False
        base = part
    name = user.name or value.name or "attention"
    tag = "heads" if perm == TO_HEADS else "keys"
    target = add_initializer(model.graph, f"{name}/{tag}/shape", np.asarray([0, 0, heads, width], np.int64))
    tall = emit(model.graph, user, "Reshape", [base, target], name=f"{name}/{tag}/Reshape", dtype=value.dtype)
    turned = emit(
        model.graph,
        user,
        "Transpose",
        [tall],
        name=f"{name}/{tag}/Transpose",
        dtype=value.dtype,
        attributes=[ir.AttrInt64s("perm", perm)],
    )
    facts.shapes[turned] = shape
    user.replace_input_with(operand, turned)
    return True


def _is_canonical(steps: list[tuple[ir.Node, int]], perm: list[int], facts: Facts) -> bool:
    if [node.op_type for node, _ in steps] != ["Reshape", "Transpose"]:
        return False
    source, middle = facts.shape(steps[0][0].inputs[0]), facts.shape(steps[0][0].outputs[0])
    same = source is not None and middle is not None and len(middle) == 4 and middle[:2] == source[:2]
    return same and attr_ints(steps[1][0], "perm") == perm


def _column_map(steps: list[tuple[ir.Node, int]], base: Shape, perm: list[int], facts: Facts) -> np.ndarray | None:
    """cols [H,Dh]: value[b,h,n,d] (before ``perm`` of keys) is base[b,n,cols[h,d]]; None when it is not so."""
    symbols: dict[str, int] = {}
    concrete = views.sizes(base, symbols)
    start = views.iota(concrete) if concrete is not None else None
    if concrete is None or start is None:
        return None
    end = views.run(steps, start, facts, symbols)
    if end is None or end.ndim != 4:
        return None
    end = np.transpose(end, np.argsort(perm))  # [B,N,H,Dh]
    if end.shape[:2] != concrete[:2]:
        return None
    cols = end[0, 0]
    rows = np.arange(concrete[0] * concrete[1], dtype=np.int64).reshape(concrete[0], concrete[1], 1, 1) * concrete[2]
    return cols if np.array_equal(end, rows + cols) else None


def _rebuild_out(model: ir.Model, facts: Facts, context: ir.Node) -> bool:
    """Replace the views after the context MatMul by Transpose and Reshape when they amount to them."""
    start_shape = facts.shape(context.outputs[0])
    chain: list[ir.Node] = []
    value = context.outputs[0]
    while True:
        node = only_user(value)
        if node is None or node.op_type not in ("Reshape", "Transpose", "Identity") or node.inputs[0] is not value:
            break
        chain.append(node)
        value = node.outputs[0]
        shape = facts.shape(value)
        swapped = _joins_heads(chain, start_shape, facts) if shape is not None and len(shape) == 3 else None
        if swapped is not None:
            return _join(model, facts, context, chain, swapped)
    return False


def _joins_heads(chain: list[ir.Node], start_shape: Shape | None, facts: Facts) -> bool | None:
    """False when the chain makes [B,N,D] of [B,H,N,Dh], True when it makes [N,B,D], None otherwise."""
    symbols: dict[str, int] = {}
    concrete = views.sizes(start_shape, symbols)
    start = views.iota(concrete) if concrete is not None and len(concrete) == 4 else None
    end = views.run([(node, 0) for node in chain], start, facts, symbols) if start is not None else None
    if start is None or concrete is None or end is None:
        return None
    wanted = start.transpose(0, 2, 1, 3).reshape(concrete[0], concrete[2], -1)
    for swapped, form in ((False, wanted), (True, wanted.transpose(1, 0, 2))):
        if end.shape == form.shape and np.array_equal(end, form):
            return swapped
    return None


def _join(model: ir.Model, facts: Facts, context: ir.Node, chain: list[ir.Node], swapped: bool) -> bool:
    if [node.op_type for node in chain] == ["Transpose", "Reshape"] and not swapped:
        return False
    shape, last = facts.shape(context.outputs[0]), chain[-1]
    out = last.outputs[0]
    if shape is None or not isinstance(shape[1], int) or not isinstance(shape[3], int):
        return False
    name = context.name or out.name or "attention"
    turned = emit(
        model.graph,
        last,
        "Transpose",
        [context.outputs[0]],
        name=f"{name}/join/Transpose",
        dtype=out.dtype,
        attributes=[ir.AttrInt64s("perm", TO_HEADS)],
    )
    target = add_initializer(model.graph, f"{name}/join/shape", np.asarray([0, 0, shape[1] * shape[3]], np.int64))
    joined = emit(model.graph, last, "Reshape", [turned, target], name=f"{name}/join/Reshape", dtype=out.dtype)
    if swapped:
        swap = [ir.AttrInt64s("perm", [1, 0, 2])]
        joined = emit(model.graph, last, "Transpose", [joined], name=f"{name}/swap", dtype=out.dtype, attributes=swap)
    facts.shapes[joined] = facts.shapes[out]
    take_over(out, joined)
    return True


def drop_nan_guards(model: ir.Model, facts: Facts) -> int:
    """Remove Where(IsNaN(p), 0, p) after a Softmax whose logits cannot be minus infinity over a whole row.

    The exporter guards against rows with no visible key. Without a mask, or with a mask of finite numbers, such a
    row does not give NaN; with a mask of minus infinity the guard stays.
    """
    count = 0
    for node in list(model.graph):
        probs = node.outputs[0] if node.op_type == "Softmax" and node.graph is not None else None
        guards = [n for n, _ in probs.uses() if n.op_type == "IsNaN"] if probs is not None else []
        if probs is None or len(guards) != 1 or not _finite(node.inputs[0]):
            continue
        where = only_user(guards[0].outputs[0])
        if where is None or where.op_type != "Where" or where.inputs[2] is not probs or where.graph is None:
            continue
        if where.outputs[0].is_graph_output():
            continue
        where.outputs[0].replace_all_uses_with(probs)
        model.graph.remove([where, guards[0]], safe=True)
        count += 1
    return count


def _finite(value: ir.Value | None, depth: int = 12) -> bool:
    """True when no constant minus infinity can reach ``value`` through arithmetic on the way up to a MatMul."""
    if value is None or depth == 0:
        return False
    if value.const_value is not None:
        array = value.const_value.numpy()
        return array.dtype.kind != "f" or bool(np.all(np.isfinite(array)))
    node = value.producer()
    if node is None:
        return value.dtype is None or not value.dtype.is_floating_point()
    if node.op_type in ("MatMul", "FusedMatMul", "Cast", "And", "Or", "Not", "Equal", "Greater", "Less"):
        return True
    if node.op_type == "Where":
        return all(_finite(v, depth - 1) for v in node.inputs[1:])
    if node.op_type in ("Add", "Sub", "Mul", "Div", "Reshape", "Transpose", "Unsqueeze", "Expand", "Slice"):
        operands = node.inputs if node.op_type in ("Add", "Sub", "Mul", "Div") else node.inputs[:1]
        return all(_finite(v, depth - 1) for v in operands)
    return False
