"""Image encoders (ViT, DeiT, DINOv2 with or without registers) as canonical graphs.

The image size is the one of config.json, and the position table is used as stored. Only a DINOv2 folder whose own
preprocessor_config.json names another size gets open image axes and the model's own resizing of the table, which the
clean-up folds once a size is fixed: such models are trained at 518 pixels and mostly used at 224.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgetok.converters.graph.builder import GraphBuilder
from edgetok.converters.sources._hf.config import Config, read_json
from edgetok.converters.sources._hf.text import linear
from edgetok.converters.sources._hf.weights import Weights
from edgetok.errors import ArtifactError, UnsupportedError
from edgetok.limits import LoadLimits

_IGNORED = ("decoder.", "embeddings.mask_token")


@dataclass(frozen=True)
class ImageShape:
    """The counts of one encoder.

    Args:
        special: learned rows at the start that have a position (CLS, distillation).
        registers: learned rows after CLS that have none.
        dino: DINOv2 layout: LayerScale, other names, CLS as pooled output.
        open: any image size, with the position table resized in the graph.
    """

    layers: int
    heads: int
    width: int
    inner: int
    channels: int
    image: tuple[int, int]
    patch: tuple[int, int]
    special: int
    registers: int
    eps: float
    act: str
    bias: bool
    dino: bool
    swiglu: bool
    open: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        return self.image[0] // self.patch[0], self.image[1] // self.patch[1]


def read_shape(config: Config) -> ImageShape:
    """Counts of a ViT, DeiT or DINOv2 config.json.

    Raises:
        ArtifactError: a count is missing or out of range.
        UnsupportedError: the patches do not tile the image.
    """
    kind = str(config.values["model_type"])
    dino = kind.startswith("dinov2")
    width = config.count("hidden_size", most="width", default=768)
    swiglu = dino and config.flag("use_swiglu_ffn", False)
    if dino:
        inner = int(width * config.number("mlp_ratio", 4, 0.01, 64))
        if swiglu:
            inner = (int(inner * 2 / 3) + 7) // 8 * 8
    else:
        inner = config.count("intermediate_size", most="inner", default=3072)
    shape = ImageShape(
        layers=config.count("num_hidden_layers", most="layers", default=12),
        heads=config.count("num_attention_heads", most="heads", default=12),
        width=width,
        inner=inner,
        channels=config.count("num_channels", most="channels", default=3),
        image=config.pair("image_size", most="pixels", default=224),
        patch=config.pair("patch_size", most="pixels", default=14 if dino else 16),
        special=2 if kind == "deit" else 1,
        registers=config.count("num_register_tokens", most="registers", default=4, least=0)
        if kind == "dinov2_with_registers"
        else 0,
        eps=config.number("layer_norm_eps", 1e-6 if dino else 1e-12, 0.0, 1.0),
        act=config.text("hidden_act", default="gelu"),
        bias=config.flag("qkv_bias", True),
        dino=dino,
        swiglu=swiglu,
    )
    if shape.width % shape.heads:
        raise ArtifactError(f"width {width} is not a multiple of {shape.heads} heads", where=config.where)
    if any(i % p for i, p in zip(shape.image, shape.patch, strict=True)):
        raise UnsupportedError(f"patches of {shape.patch} do not tile an image of {shape.image}", where=config.where)
    return shape


def build(g: GraphBuilder, config: Config, folder: Path, limits: LoadLimits) -> None:
    """Emit the encoder and what heads the folder has weights for."""
    shape = read_shape(config)
    if shape.dino and _other_size(folder, shape.image):
        shape = replace(shape, open=True)
    pooler_act = config.text("pooler_act", default="tanh")
    pooled_width = config.count("pooler_output_size", most="width", default=shape.width)
    config.finish()
    w = Weights(folder, ("vit.", "deit.", "dinov2_with_registers.", "dinov2."), limits)
    with g.scope("embeddings"):
        x = _embeddings(g, w, shape)
    for i in range(shape.layers):
        with g.scope(f"layer.{i}"):
            x = _layer(g, w, shape, x, f"encoder.layer.{i}.")
    hidden = _norm(g, w, "layernorm", x, shape)
    rows: int | str = shape.special + shape.registers + shape.grid[0] * shape.grid[1]
    rows = "tokens" if shape.open else rows
    g.output("last_hidden_state", hidden, ("batch", rows, shape.width))
    if shape.dino:
        g.output("pooler_output", g.row(hidden, 0), ("batch", shape.width))
    elif "pooler.dense.weight" in w:
        with g.scope("pooler"):
            pooled = linear(g, w, "pooler.dense", g.row(hidden, 0), shape.width, pooled_width)
            g.output("pooler_output", g.activation(pooler_act, pooled), ("batch", pooled_width))
    with g.scope("classifier"):
        _classifiers(g, w, shape, hidden)
    w.refuse_leftover(_IGNORED)


def _other_size(folder: Path, image: tuple[int, int]) -> bool:
    """Whether the folder's own preprocessing makes images of another size than config.json's."""
    if not (folder / "preprocessor_config.json").is_file():
        return False
    values = read_json(folder / "preprocessor_config.json")
    key = "crop_size" if values.get("do_center_crop", True) and "crop_size" in values else "size"
    size = values.get(key)
    if isinstance(size, int):
        return (size, size) != image
    if not isinstance(size, dict) or not {"height", "width"} <= set(size):
        return False
    return (size["height"], size["width"]) != image


def _embeddings(g: GraphBuilder, w: Weights, s: ImageShape) -> ir.Value:
    d, c, (ph, pw) = s.width, s.channels, s.patch
    sides: tuple[int | str, ...] = ("height", "width") if s.open else s.image
    image = g.input("pixel_values", ir.DataType.FLOAT, ("batch", c, *sides))
    name = "embeddings.patch_embeddings.projection"
    kernel = g.weight(f"{name}.weight", w.tensor(f"{name}.weight", (d, c, ph, pw)))
    bias = g.weight(f"{name}.bias", w.tensor(f"{name}.bias", (d,)))
    x = g.op("Conv", image, kernel, bias, kernel_shape=[ph, pw], strides=[ph, pw])
    positions = _resized(g, w, s, x) if s.open else _stored(g, w, s)
    x = g.op("Reshape", x, g.const([0, d, -1], np.int64))
    x = g.op("Transpose", x, perm=[0, 2, 1])
    learned = ["embeddings.cls_token", "embeddings.distillation_token"][: s.special]
    first = [_per_sample(g, image, g.weight(n, w.tensor(n, (1, 1, d)))) for n in learned]
    x = g.op("Add", g.op("Concat", *first, x, axis=1), positions)
    if not s.registers:
        return x
    registers = w.tensor("embeddings.register_tokens", (1, s.registers, d))
    extra = _per_sample(g, image, g.weight("embeddings.register_tokens", registers))
    return g.op("Concat", g.rows(x, 0, 1), extra, g.rows(x, 1, None), axis=1)


_TABLE = "embeddings.position_embeddings"


def _stored(g: GraphBuilder, w: Weights, s: ImageShape) -> ir.Value:
    return g.weight(_TABLE, w.tensor(_TABLE, (1, s.special + s.grid[0] * s.grid[1], s.width)))


def _resized(g: GraphBuilder, w: Weights, s: ImageShape, patches: ir.Value) -> ir.Value:
    """The position table bicubically resized to the patch grid of the image, as DINOv2's own code does.

    Args:
        patches: [B, D, rows, columns].

    Source: torch's bicubic interpolation; a is -0.75, and -0.5 where it is antialiased (DINOv2 with registers).
    """
    (rows, cols), d = s.grid, s.width
    stored = (1, 1 + rows * cols, d)

    def grid(table: np.ndarray) -> np.ndarray:
        return table[:, 1:].reshape(1, rows, cols, d).transpose(0, 3, 1, 2)

    table = g.weight(f"{_TABLE}.grid", w.tensor(_TABLE, stored, change=grid, result=(1, d, rows, cols)))
    first = g.weight(f"{_TABLE}.cls", w.tensor(_TABLE, stored, change=lambda t: t[:, :1], result=(1, 1, d)))
    sides = g.op("Shape", patches, start=2, end=4)
    sizes = g.op("Concat", g.const([1, d], np.int64), sides, axis=0)
    smooth = s.registers > 0
    table = g.op(
        "Resize",
        table,
        None,
        None,
        sizes,
        mode="cubic",
        coordinate_transformation_mode="half_pixel",
        cubic_coeff_a=-0.5 if smooth else -0.75,
        antialias=1 if smooth else None,
        exclude_outside=1 if smooth else None,
    )
    table = g.op("Transpose", g.op("Reshape", table, g.const([0, d, -1], np.int64)), perm=[0, 2, 1])
    return g.op("Concat", first, table, axis=1)


def _per_sample(g: GraphBuilder, image: ir.Value, token: ir.Value) -> ir.Value:
    """Repeat a learned row [1, R, D] for every image: [B, R, D]."""
    batch = g.op("Shape", image, start=0, end=1)
    shape = g.op("Concat", batch, g.const([1, 1], np.int64), axis=0)
    return g.op("Expand", token, shape)


def _norm(g: GraphBuilder, w: Weights, name: str, x: ir.Value, s: ImageShape) -> ir.Value:
    scale = g.weight(f"{name}.weight", w.tensor(f"{name}.weight", (s.width,)))
    bias = g.weight(f"{name}.bias", w.tensor(f"{name}.bias", (s.width,)))
    return g.layer_norm(x, scale, bias, s.eps)


def _scaled(g: GraphBuilder, w: Weights, name: str, x: ir.Value, s: ImageShape) -> ir.Value:
    if not s.dino:
        return x
    return g.op("Mul", x, g.weight(f"{name}.lambda1", w.tensor(f"{name}.lambda1", (s.width,))))


def _layer(g: GraphBuilder, w: Weights, s: ImageShape, x: ir.Value, at: str) -> ir.Value:
    d = s.width
    norms = ("norm1", "norm2") if s.dino else ("layernorm_before", "layernorm_after")
    with g.scope("attention"):
        y = _norm(g, w, at + norms[0], x, s)
        q, k, v = (linear(g, w, f"{at}attention.attention.{part}", y, d, d) for part in ("query", "key", "value"))
        y = linear(g, w, f"{at}attention.output.dense", g.attention(q, k, v, s.heads, d // s.heads, None), d, d)
        x = g.op("Add", _scaled(g, w, f"{at}layer_scale1", y, s), x)
    with g.scope("mlp"):
        y = _mlp(g, w, s, _norm(g, w, at + norms[1], x, s), at)
        return g.op("Add", _scaled(g, w, f"{at}layer_scale2", y, s), x)


def _mlp(g: GraphBuilder, w: Weights, s: ImageShape, x: ir.Value, at: str) -> ir.Value:
    d, inner = s.width, s.inner
    if s.swiglu:
        both = linear(g, w, f"{at}mlp.weights_in", x, d, 2 * inner)
        gate = g.activation("silu", g.rows(both, 0, inner, axis=2))
        return linear(g, w, f"{at}mlp.weights_out", g.op("Mul", gate, g.rows(both, inner, None, axis=2)), inner, d)
    first, second = ("mlp.fc1", "mlp.fc2") if s.dino else ("intermediate.dense", "output.dense")
    return linear(g, w, at + second, g.activation(s.act, linear(g, w, at + first, x, d, inner)), inner, d)


def _classifiers(g: GraphBuilder, w: Weights, s: ImageShape, hidden: ir.Value) -> None:
    d = s.width
    if "cls_classifier.weight" in w:  # DeiT with teacher: the mean of both heads
        heads = ("cls_classifier", "distillation_classifier")
        labels = w.shape("cls_classifier.weight")[0]
        both = [linear(g, w, name, g.row(hidden, i), d, labels) for i, name in enumerate(heads)]
        g.output("cls_logits", both[0], ("batch", labels))
        g.output("distillation_logits", both[1], ("batch", labels))
        g.output("logits", g.op("Mul", g.op("Add", *both), g.const(0.5)), ("batch", labels))
    elif "classifier.weight" in w:
        labels = w.shape("classifier.weight")[0]
        x = g.row(hidden, 0)
        if s.dino:
            patches = g.rows(hidden, 1 + s.registers, None)
            mean = g.op("ReduceMean", patches, g.const([1], np.int64), keepdims=0)
            x, d = g.op("Concat", x, mean, axis=-1), 2 * d
        g.output("logits", linear(g, w, "classifier", x, d, labels), ("batch", labels))
