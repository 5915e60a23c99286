"""Small canonical encoders with random weights: as ONNX with a hand-made ``Finding``, and as an independent numpy run.

The numpy network knows nothing of the ONNX emission: it calls a method's law (``plan``), merges by the weighted sum of
the definition, and carries sizes itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from edgetok.converters.graph.blocks import Block, Finding
from edgetok.converters.reduce import METHODS, core
from edgetok.converters.reduce.base import Settings, TokenView


@dataclass(frozen=True)
class Shape:
    """Sizes of a small encoder. ``style`` is "vit" (pre-norm) or "bert" (post-norm, key-padding mask)."""

    tokens: int = 17
    width: int = 24
    heads: int = 3
    layers: int = 3
    protected: int = 1
    style: str = "vit"
    seed: int = 0
    head: str = "tokens"  # "tokens", "mean", "cls"

    @property
    def dh(self) -> int:
        return self.width // self.heads


def weights(s: Shape) -> dict[str, np.ndarray]:
    """Random weights, large enough that attention is far from uniform."""
    rng = np.random.default_rng(s.seed)
    w: dict[str, np.ndarray] = {}
    for i in range(s.layers):
        for n in ("q", "k", "v", "o"):
            w[f"{i}.{n}.w"] = rng.normal(0, 1.2 / np.sqrt(s.width), (s.width, s.width))
            w[f"{i}.{n}.b"] = rng.normal(0, 0.1, s.width)
        w[f"{i}.1.w"] = rng.normal(0, 1 / np.sqrt(s.width), (s.width, 2 * s.width))
        w[f"{i}.1.b"] = rng.normal(0, 0.1, 2 * s.width)
        w[f"{i}.2.w"] = rng.normal(0, 1 / np.sqrt(2 * s.width), (2 * s.width, s.width))
        w[f"{i}.2.b"] = rng.normal(0, 0.1, s.width)
        for n in ("n1", "n2"):
            w[f"{i}.{n}.g"] = rng.normal(1, 0.1, s.width)
            w[f"{i}.{n}.b"] = rng.normal(0, 0.1, s.width)
    w["nf.g"], w["nf.b"] = rng.normal(1, 0.1, s.width), rng.normal(0, 0.1, s.width)
    return {k: v.astype(np.float32) for k, v in w.items()}


class _Graph:
    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.inits: dict[str, ir.Value] = {}

    def const(self, name: str, array: np.ndarray) -> ir.Value:
        if name not in self.inits:
            t = ir.tensor(array, name=name)
            self.inits[name] = ir.Value(
                name=name, type=ir.TensorType(t.dtype), shape=ir.Shape(array.shape), const_value=t
            )
        return self.inits[name]

    def op(self, kind: str, inputs: Sequence[ir.Value], name: str, **attrs: object) -> ir.Value:
        attributes = [ir.convenience.convert_attribute(k, v) for k, v in attrs.items()]  # type: ignore[arg-type]
        out = ir.Value(name=name + "_o", type=ir.TensorType(ir.DataType.FLOAT))
        self.nodes.append(ir.Node("", kind, list(inputs), attributes, outputs=[out], name=name))
        return out


def build(s: Shape) -> tuple[ir.Model, Finding]:
    """The canonical graph: input ``x`` [batch,N,D] (and ``mask`` float [batch,1,1,N]), output ``y``."""
    g, w = _Graph(), weights(s)
    x0 = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", s.tokens, s.width]))
    inputs = [x0]
    mask = None
    if s.style == "bert":
        mask = ir.Value(name="mask", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", 1, 1, s.tokens]))
        inputs.append(mask)
    x, blocks = g.op("Identity", [x0], "embed"), []
    for i in range(s.layers):
        block = _block(g, w, s, i, x, mask)
        blocks.append(block)
        x = block.x_out
    y = _norm(g, w, "nf", x, "final") if s.style == "vit" else x
    if s.head == "mean":
        y = g.op("ReduceMean", [y, g.const("axis1", np.array([1]))], "pool", keepdims=0)
    elif s.head == "cls":
        y = g.op("Gather", [y, g.const("zero", np.array(0))], "cls", axis=1)
    y.name = "y"
    y.shape = ir.Shape(["batch", s.tokens, s.width] if s.head == "tokens" else ["batch", s.width])
    graph = ir.Graph(inputs, [y], nodes=g.nodes, initializers=list(g.inits.values()), opset_imports={"": 18}, name="g")
    model = ir.Model(graph, ir_version=9)
    ShapeInferencePass()(model)
    side = round((s.tokens - s.protected) ** 0.5)
    grid = (side, side) if side * side == s.tokens - s.protected and s.style == "vit" else None
    return model, Finding(tuple(blocks), (), s.style, s.protected, grid, s.tokens)


def _norm(g: _Graph, w: dict[str, np.ndarray], key: str, x: ir.Value, name: str) -> ir.Value:
    scale, bias = g.const(f"{key}.g", w[f"{key}.g"]), g.const(f"{key}.b", w[f"{key}.b"])
    return g.op("LayerNormalization", [x, scale, bias], name, axis=-1, epsilon=1e-6)


def _linear(g: _Graph, w: dict[str, np.ndarray], key: str, x: ir.Value, name: str) -> ir.Value:
    y = g.op("MatMul", [x, g.const(f"{key}.w", w[f"{key}.w"])], f"{name}/MatMul")
    return g.op("Add", [y, g.const(f"{key}.b", w[f"{key}.b"])], f"{name}/Add")


def _block(g: _Graph, w: dict[str, np.ndarray], s: Shape, i: int, x: ir.Value, mask: ir.Value | None) -> Block:
    pre = s.style == "vit"
    h = _norm(g, w, f"{i}.n1", x, f"b{i}/n1") if pre else x
    split = g.const("split", np.array([0, -1, s.heads, s.dh]))
    heads = {n: g.op("Reshape", [_linear(g, w, f"{i}.{n}", h, f"b{i}/{n}"), split], f"b{i}/{n}/split") for n in "qkv"}
    q = g.op("Transpose", [heads["q"]], f"b{i}/q/t", perm=[0, 2, 1, 3])
    kt = g.op("Transpose", [heads["k"]], f"b{i}/k/t", perm=[0, 2, 3, 1])
    v = g.op("Transpose", [heads["v"]], f"b{i}/v/t", perm=[0, 2, 1, 3])
    scaled = g.op("Mul", [q, g.const("scale", np.array(s.dh**-0.5, np.float32))], f"b{i}/scale")
    logits = g.op("MatMul", [scaled, kt], f"b{i}/qk")
    if mask is not None:
        logits = g.op("Add", [logits, mask], f"b{i}/mask")
    probs = g.op("Softmax", [logits], f"b{i}/softmax", axis=-1)
    anchor = g.nodes[-1]
    mixed = g.op("Transpose", [g.op("MatMul", [probs, v], f"b{i}/pv")], f"b{i}/mix", perm=[0, 2, 1, 3])
    context = g.op("Reshape", [mixed, g.const("join", np.array([0, -1, s.width]))], f"b{i}/join")
    added = g.op("Add", [x, _linear(g, w, f"{i}.o", context, f"b{i}/o")], f"b{i}/res1")
    x_attn = added if pre else _norm(g, w, f"{i}.n1", added, f"b{i}/n1")
    h = _norm(g, w, f"{i}.n2", x_attn, f"b{i}/n2") if pre else x_attn
    h = g.op("Relu", [_linear(g, w, f"{i}.1", h, f"b{i}/fc1")], f"b{i}/act")
    out = g.op("Add", [x_attn, _linear(g, w, f"{i}.2", h, f"b{i}/fc2")], f"b{i}/res2")
    x_out = out if pre else _norm(g, w, f"{i}.n2", out, f"b{i}/n2")
    return Block(
        index=i, name=f"b{i}", heads=s.heads, head_dim=s.dh, v_dim=s.dh, width=s.width, tokens=s.tokens,
        scale=s.dh**-0.5, q=q, k=heads["k"], v=v, logits=logits, probs=probs, context=context, anchor=anchor,
        x_in=x, x_attn=x_attn, x_out=x_out, norm="pre" if pre else "post", mask=mask,
        mask_kind="none" if mask is None else "key-padding", packed=False, fused_op="", k_layout="BNHD",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- the numpy network


def layer_norm(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-6) * gamma + beta


def attention(
    w: dict[str, np.ndarray], s: Shape, i: int, x: np.ndarray, bias: np.ndarray, *, normed: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Attention module output [B,N,D], keys [B,H,N,Dh], probabilities."""
    h = layer_norm(x, w[f"{i}.n1.g"], w[f"{i}.n1.b"]) if s.style == "vit" and not normed else x
    batch, n, _ = x.shape
    q, k, v = (
        (h @ w[f"{i}.{m}.w"] + w[f"{i}.{m}.b"]).reshape(batch, n, s.heads, s.dh).transpose(0, 2, 1, 3) for m in "qkv"
    )
    logits = q @ k.transpose(0, 1, 3, 2) * s.dh**-0.5 + bias[:, None, None, :]
    e = np.exp(logits - logits.max(-1, keepdims=True))
    probs = e / e.sum(-1, keepdims=True)
    context = (probs @ v).transpose(0, 2, 1, 3).reshape(batch, n, s.width)
    return context @ w[f"{i}.o.w"] + w[f"{i}.o.b"], k, probs


def mlp(w: dict[str, np.ndarray], s: Shape, i: int, x: np.ndarray) -> np.ndarray:
    h = layer_norm(x, w[f"{i}.n2.g"], w[f"{i}.n2.b"]) if s.style == "vit" else x
    y = x + np.maximum(h @ w[f"{i}.1.w"] + w[f"{i}.1.b"], 0) @ w[f"{i}.2.w"] + w[f"{i}.2.b"]
    return y if s.style == "vit" else layer_norm(y, w[f"{i}.n2.g"], w[f"{i}.n2.b"])


def run(
    s: Shape,
    x: np.ndarray,
    method: str = "",
    counts: Sequence[int] = (),
    settings: Settings | None = None,
    mask: np.ndarray | None = None,
    on_plan: Callable[[int, object], None] | None = None,
) -> dict[str, np.ndarray]:
    """The whole network in numpy, reduced by a method's law.

    Returns:
        "reduced" [B,M,D] tokens at the end (after the final norm for a ViT), "size" [B,M], and "y" as the graph
        must answer: restored tokens, size-weighted mean, or row 0.
    """
    w = {k: v.astype(np.float64) for k, v in weights(s).items()}
    law = METHODS.get(method) if method else None
    settings = settings or (law.settings() if law else None)
    x = x.astype(np.float64)
    batch = len(x)
    real = np.ones((batch, s.tokens)) if mask is None else (mask.reshape(batch, -1) > -100).astype(float)
    real[:, : s.protected] = 1
    size, origin, merged = real[..., None], None, False
    counts = list(counts) or [0] * s.layers
    for i, count in enumerate(counts):
        prop = bool(law and merged and law.prop_attn(settings))
        if law and count and law.where == "input":
            view = TokenView(
                x, np.zeros((batch, s.heads, x.shape[1], 1)), None, size, s.protected, i, s.layers, _grid(s)
            )
            x, size, origin = _step(law, view, count, settings, origin, on_plan)
            merged, prop = True, law.prop_attn(settings)
        bias = np.where(size[..., 0] > 1e-6, np.log(np.maximum(size[..., 0], 1e-6)) if prop else 0.0, -1e4)
        if law and count and law.where == "module":
            x = _modules(law, s, w, i, x, size, count, settings)
            continue
        out, k, probs = attention(w, s, i, x, bias)
        x = x + out
        if s.style == "bert":
            x = layer_norm(x, w[f"{i}.n1.g"], w[f"{i}.n1.b"])
        if law and count and law.where == "attn":
            view = TokenView(x, k, probs, size, s.protected, i, s.layers, _grid(s))
            x, size, origin = _step(law, view, count, settings, origin, on_plan)
            merged = True
        x = mlp(w, s, i, x)
    return _answer(s, w, x, size, origin, law)


def _modules(law, s, w, i, x, size, count, settings):  # type: ignore[no-untyped-def]
    """Pre-norm block with merging before and unmerging after each module, by plain means."""
    plan = law.plan(
        TokenView(x, np.zeros((len(x), s.heads, x.shape[1], 1)), None, size, s.protected, i, s.layers, _grid(s)),
        count,
        settings,
    )
    rows = plan.origin()
    mean = np.zeros((len(x), plan.outputs, x.shape[1]))
    for b in range(len(x)):
        for n, m in enumerate(rows[b]):
            mean[b, m, n] = 1
    mean /= mean.sum(2, keepdims=True)
    if settings.attn:
        h = mean @ layer_norm(x, w[f"{i}.n1.g"], w[f"{i}.n1.b"])
        x = x + core.select(attention(w, s, i, h, np.zeros(h.shape[:2]), normed=True)[0], rows)
    else:
        x = x + attention(w, s, i, x, np.zeros(x.shape[:2]))[0]
    if settings.mlp:
        h = mean @ layer_norm(x, w[f"{i}.n2.g"], w[f"{i}.n2.b"])
        y = np.maximum(h @ w[f"{i}.1.w"] + w[f"{i}.1.b"], 0) @ w[f"{i}.2.w"] + w[f"{i}.2.b"]
        return x + core.select(y, rows)
    return mlp(w, s, i, x)


def _grid(s: Shape) -> tuple[int, int]:
    side = round((s.tokens - s.protected) ** 0.5)
    return side, side


def _step(law, view, count, settings, origin, on_plan):  # type: ignore[no-untyped-def]
    plan = law.plan(view, count, settings)
    if on_plan:
        on_plan(view.layer, plan)
    batch = len(view.x)
    # the definition, with a dense matrix: rows are outputs, columns inputs
    if plan.kind == "transform":
        spread, back = plan.assign.astype(np.float64), plan.restore
        origin = back if origin is None else origin @ back
    else:
        spread = np.zeros((batch, view.tokens, plan.outputs))
        rows = plan.origin()
        for b in range(batch):
            for n, m in enumerate(rows[b]):
                if m >= 0:
                    spread[b, n, m] = 1
        origin = rows if origin is None else np.take_along_axis(rows, origin, 1)
    if plan.kind == "prune":
        return core.select(view.x, plan.kept), core.select(view.size, plan.kept), origin
    mass = (spread * view.size).sum(1)[..., None]
    total = np.swapaxes(spread * view.size, 1, 2) @ view.x
    y = np.where(mass > 1e-9, total / np.maximum(mass, 1e-12), 0)
    if plan.kind == "merge":  # rows made of padding only keep their content
        y = np.where(mass > 1e-9, y, core.select(view.x, plan.kept))
    return y, mass, origin


def _answer(s, w, x, size, origin, law):  # type: ignore[no-untyped-def]
    early = law is not None and law.where == "input" and origin is not None
    if early:
        x = core.restore(x, origin)
    final = layer_norm(x, w["nf.g"], w["nf.b"]) if s.style == "vit" else x
    full = final
    if origin is not None and not early and law.kind != "prune":
        full = core.restore(final, origin)
    if s.head == "cls":
        y = final[:, 0]
    elif s.head == "mean":
        y = full.mean(1) if law is not None and law.kind != "prune" else final.mean(1)
    else:
        y = full
    return {"reduced": final, "size": size[..., 0], "y": y}
