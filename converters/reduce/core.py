"""The four primitives every method is made of, in numpy and as ONNX nodes: select, merge, transform, restore.

Sizes are float32. In numpy they are [B,N,1] as in the papers; in the graph [B,N], which gathers cheaply.

Source: specification of the common core; Bolya et al., ICLR 2023 for size-weighted merging and proportional attention.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgetok.converters.reduce._builder import FLOAT, INT64, Builder, dims
from edgetok.converters.reduce.base import Emitted, Plan, Site

TINY = 1e-12
PAD_LOGIT = -1e4  # what a padding key adds to a logit; representable in fp16
MASKED = -1e3  # below any cosine, energy or importance, safe in fp16


# ---------------------------------------------------------------------------------------------- numpy


def select(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows of x [B,N,D] at rows [B,M] -> [B,M,D]."""
    return np.take_along_axis(x, rows[..., None], 1)


def merge(
    x: np.ndarray, size: np.ndarray, kept: np.ndarray, removed: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Size-weighted mean of each kept row and the removed rows that go into it.

    Args:
        x: [B,N,D]. size: [B,N,1]. kept: [B,M]. removed: [B,R]. target: [B,R], output rows.

    Returns:
        y [B,M,D] and size' [B,M,1]; sum(size') == sum(size) and sum(size'*y) == sum(size*x) up to rounding.
    """
    total, new_size = select(x * size, kept), select(size, kept)
    for b in range(len(x)):
        np.add.at(total[b], target[b], (x[b] * size[b])[removed[b]])
        np.add.at(new_size[b], target[b], size[b][removed[b]])
    y = np.where(new_size > TINY, total / np.maximum(new_size, TINY), select(x, kept))
    return y.astype(x.dtype), new_size.astype(size.dtype)


def transform(x: np.ndarray, size: np.ndarray, assign: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Y = W X with W = (assign * size)^T / mass, mass = assign^T size.

    Args:
        x: [B,N,D]. size: [B,N,1]. assign: [B,N,M], rows sum to one.

    Returns:
        y [B,M,D], mass [B,M,1].
    """
    weighted = np.swapaxes(assign * size, 1, 2)
    mass = weighted.sum(2, keepdims=True)
    return (weighted @ x / np.maximum(mass, TINY)).astype(x.dtype), mass.astype(size.dtype)


def restore(y: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Full resolution again: hard by rows (origin int [B,N0]) or soft (origin float [B,N0,M])."""
    return select(y, origin) if origin.ndim == 2 else (origin @ y).astype(y.dtype)


def apply_plan(plan: Plan, x: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and sizes after a plan."""
    if plan.kind == "merge":
        return merge(x, size, plan.kept, plan.removed, plan.target)
    if plan.kind == "prune":
        return select(x, plan.kept), select(size, plan.kept)
    if plan.assign is None:
        raise ValueError("a transform plan without its matrix")
    return transform(x, size, plan.assign)


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of unit length; the floor keeps a zero row from becoming NaN."""
    return x / np.maximum(np.sqrt((x * x).sum(-1, keepdims=True)), 1e-6)


def order_by(score: np.ndarray) -> np.ndarray:
    """Indices by falling score, equal ones by rising index (as TopK)."""
    return np.argsort(-score, axis=-1, kind="stable")


def pad_penalty(pad_a: np.ndarray, pad_b: np.ndarray) -> np.ndarray:
    """Added to similarities [.., A, B]: padding pairs first, padding with a real token last."""
    return -4 * pad_a[..., None] - 4 * pad_b[..., None, :] + 10 * pad_a[..., None] * pad_b[..., None, :]


def protected_matrix(inner: np.ndarray, protected: int) -> np.ndarray:
    """[B,N-P,M-P] -> [B,N,M] with identity for the protected rows."""
    batch, n, m = inner.shape
    full = np.zeros((batch, n + protected, m + protected), np.float32)
    full[:, range(protected), range(protected)] = 1
    full[:, protected:, protected:] = inner
    return full


# ---------------------------------------------------------------------------------------------- ONNX


def emit_unit(b: Builder, x: ir.Value) -> ir.Value:
    """Rows of unit length. Not by LpNormalization, which some importers lack and which has no floor."""
    return b.binary("Div", x, b.binary("Max", b.reduce("ReduceL2", x, -1, keep=True), 1e-6))


def emit_key_metric(b: Builder, site: Site) -> ir.Value:
    """Mean over heads of the keys -> [B,N,Dh]."""
    k = site.k
    if k is None:
        raise ValueError("this method reads keys")
    if site.k_layout == "BNC":
        width = int(dims(k)[2])
        shape = [b.batch, site.tokens, site.heads, width // site.heads]
        k = b.op("Reshape", [k, b.const([0, -1, site.heads, width // site.heads])], shape)
    mean = b.reduce("ReduceMean", k, {"BHND": 1, "BHDN": 1}.get(site.k_layout, 2))
    return b.transpose(mean, 0, 2, 1) if site.k_layout == "BHDN" else mean


def emit_pad_penalty(b: Builder, pad_a: ir.Value, pad_b: ir.Value) -> ir.Value:
    """Same as ``pad_penalty``: (-4 + 10 pad_b) pad_a - 4 pad_b."""
    column, row = b.unsqueeze(pad_a, 2), b.unsqueeze(pad_b, 1)
    slope = b.binary("Add", b.binary("Mul", row, 10.0), -4.0)
    return b.binary("Add", b.binary("Mul", column, slope), b.binary("Mul", row, -4.0))


def emit_ones(b: Builder, tokens: int) -> ir.Value:
    """float [B,N] of ones, the batch axis as it comes."""
    return b.cast(b.per_batch(np.ones(tokens, np.int64)), FLOAT)


def emit_merge(
    b: Builder, x: ir.Value, size: ir.Value | None, done: Emitted, *, padded: bool
) -> tuple[ir.Value, ir.Value]:
    """Size-weighted merge, touching only the rows that change.

    y_t = x_t + sum over removed s going to t of (x_s - x_t) * size_s / size'_t, which equals
    (size_t x_t + sum size_s x_s) / size'_t and leaves all other rows bit for bit as they were.
    """
    kept, removed, target = _hard(done)
    count = int(dims(removed)[1])
    if size is None:
        before, size_src = emit_ones(b, done.outputs), emit_ones(b, count)
    else:
        before, size_src = b.take(size, kept), b.take(size, removed)
    shape = dims(before)
    after = b.op("ScatterElements", [before, target, size_src], shape, FLOAT, axis=1, reduction="add")
    rows = b.rows(x, kept)
    size_dst = b.take(after, target)
    if padded:
        size_dst = b.binary("Max", size_dst, TINY)
    weight = b.unsqueeze(b.binary("Div", size_src, size_dst), 2)
    change = b.binary("Mul", b.binary("Sub", b.rows(x, removed), b.rows(rows, target)), weight)
    return b.add_rows(rows, target, change), after


def emit_select(b: Builder, x: ir.Value, size: ir.Value | None, done: Emitted) -> tuple[ir.Value, ir.Value | None]:
    """Keep rows."""
    if done.kept is None:
        raise ValueError("a prune without rows")
    return b.rows(x, done.kept), None if size is None else b.take(size, done.kept)


def emit_transform(
    b: Builder, x: ir.Value, size: ir.Value | None, done: Emitted, protected: int
) -> tuple[ir.Value, ir.Value]:
    """Y = W X on the unprotected rows; protected rows pass."""
    if done.assign is None:
        raise ValueError("a transform without its matrix")
    n = int(dims(done.assign)[1])
    assign = done.assign
    if size is not None:
        assign = b.binary("Mul", assign, b.unsqueeze(b.slice(size, 1, protected, protected + n), 2))
    mass = b.reduce("ReduceSum", assign, 1)
    y = b.matmul(b.transpose(assign, 0, 2, 1), b.slice(x, 1, protected, protected + n))
    y = b.binary("Div", y, b.unsqueeze(b.binary("Max", mass, TINY), 2))
    if protected:
        y = b.concat([b.slice(x, 1, 0, protected), y], 1)
        head = b.slice(size, 1, 0, protected) if size is not None else None
        if head is None:
            # ones with the right batch axis: a probability row's own mass is not at hand, so use 0 * mass + 1
            head = b.binary("Add", b.binary("Mul", b.slice(mass, 1, 0, 1), 0.0), np.ones((1, protected), np.float32))
        mass = b.concat([head, mass], 1)
    return y, mass


def emit_origin(b: Builder, done: Emitted, tokens: int, origin: ir.Value | None) -> ir.Value:
    """Follow every source token into this layer's output rows: origin' [B,N0]."""
    kept, removed, target = _hard(done)
    order = b.per_batch(np.arange(done.outputs))
    zeros = b.per_batch(np.zeros(tokens))
    where = b.concat([kept, removed], 1)
    rows = b.concat([order, target], 1)
    moved = b.op("ScatterElements", [zeros, where, rows], [b.batch, tokens], INT64, axis=1)
    return moved if origin is None else b.take(moved, origin)


def emit_bias(b: Builder, size: ir.Value, *, prop: bool, padded: bool) -> ir.Value | None:
    """What each key adds to the logits [B,1,1,N]: log(size) and, for padding, -1e4."""
    if not prop and not padded:
        return None
    if not padded:
        bias = b.unary("Log", size)
    else:
        real = b.binary("Greater", size, 1e-6)
        value = b.unary("Log", b.binary("Max", size, 1e-6)) if prop else b.binary("Mul", size, 0.0)
        bias = b.op("Where", [real, value, b.const(PAD_LOGIT)], dims(size))
    return b.unsqueeze(bias, 1, 2)


def _hard(done: Emitted) -> tuple[ir.Value, ir.Value, ir.Value]:
    if done.kept is None or done.removed is None or done.target is None:
        raise ValueError("a merge needs kept, removed and target rows")
    return done.kept, done.removed, done.target
