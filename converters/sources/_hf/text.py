"""BERT-shaped text encoders (BERT, MiniLM, RoBERTa, DistilBERT) as canonical graphs.

Departures from the model's own code, none of which changes a valid row: RoBERTa positions count rows instead of
non-pad ids (the same for right padding); a table of one token type is added to the positions; masked logits get -10000.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgetok.converters.graph.builder import GraphBuilder
from edgetok.converters.sources._hf.config import Config
from edgetok.converters.sources._hf.weights import Weights
from edgetok.errors import ArtifactError

IGNORED_HEADS = ("cls.", "lm_head.", "qa_outputs.", "vocab_", "mlm", "nsp", "discriminator_predictions.", "decoder.")


@dataclass(frozen=True)
class Names:
    """Where an architecture keeps its tensors: ``{i}`` is the layer."""

    query: str
    key: str
    value: str
    out: str
    norm1: str
    fc1: str
    fc2: str
    norm2: str


BERT_NAMES = Names(
    query="encoder.layer.{i}.attention.self.query",
    key="encoder.layer.{i}.attention.self.key",
    value="encoder.layer.{i}.attention.self.value",
    out="encoder.layer.{i}.attention.output.dense",
    norm1="encoder.layer.{i}.attention.output.LayerNorm",
    fc1="encoder.layer.{i}.intermediate.dense",
    fc2="encoder.layer.{i}.output.dense",
    norm2="encoder.layer.{i}.output.LayerNorm",
)
DISTILBERT_NAMES = Names(
    query="transformer.layer.{i}.attention.q_lin",
    key="transformer.layer.{i}.attention.k_lin",
    value="transformer.layer.{i}.attention.v_lin",
    out="transformer.layer.{i}.attention.out_lin",
    norm1="transformer.layer.{i}.sa_layer_norm",
    fc1="transformer.layer.{i}.ffn.lin1",
    fc2="transformer.layer.{i}.ffn.lin2",
    norm2="transformer.layer.{i}.output_layer_norm",
)


@dataclass(frozen=True)
class TextShape:
    """The counts of one encoder."""

    layers: int
    heads: int
    width: int
    inner: int
    vocab: int
    positions: int
    types: int
    first_position: int
    eps: float
    act: str
    names: Names


def bert_shape(config: Config) -> TextShape:
    """Counts of a BERT or RoBERTa config.json."""
    roberta = config.values.get("model_type") != "bert"
    pad = config.count("pad_token_id", most="vocab", default=1 if roberta else 0, least=0)
    return TextShape(
        layers=config.count("num_hidden_layers", most="layers"),
        heads=config.count("num_attention_heads", most="heads"),
        width=config.count("hidden_size", most="width"),
        inner=config.count("intermediate_size", most="inner"),
        vocab=config.count("vocab_size", most="vocab"),
        positions=config.count("max_position_embeddings", most="positions"),
        types=config.count("type_vocab_size", most="types", default=2),
        first_position=pad + 1 if roberta else 0,
        eps=config.number("layer_norm_eps", 1e-12, 0.0, 1.0),
        act=config.text("hidden_act", default="gelu"),
        names=BERT_NAMES,
    )


def distilbert_shape(config: Config) -> TextShape:
    """Counts of a DistilBERT config.json."""
    config.count("pad_token_id", most="vocab", default=0, least=0)
    return TextShape(
        layers=config.count("n_layers", "num_hidden_layers", most="layers"),
        heads=config.count("n_heads", "num_attention_heads", most="heads"),
        width=config.count("dim", "hidden_size", most="width"),
        inner=config.count("hidden_dim", most="inner"),
        vocab=config.count("vocab_size", most="vocab"),
        positions=config.count("max_position_embeddings", most="positions"),
        types=0,
        first_position=0,
        eps=1e-12,
        act=config.text("activation", default="gelu"),
        names=DISTILBERT_NAMES,
    )


@dataclass(frozen=True)
class TextStream:
    """What the heads need: the last hidden state [B,N,D] and the caller's mask [B,N]."""

    hidden: ir.Value
    attention_mask: ir.Value


def build_encoder(g: GraphBuilder, config: Config, w: Weights, shape: TextShape) -> TextStream:
    """Emit the encoder from ids to the last hidden state.

    Raises:
        ArtifactError: heads do not divide the width, or a tensor is missing or has another shape.
    """
    if shape.width % shape.heads:
        raise ArtifactError(f"width {shape.width} is not a multiple of {shape.heads} heads", where=config.where)
    if shape.positions <= shape.first_position:
        raise ArtifactError("no positions are left after the padding offset", where=config.where)
    axes = ("batch", "sequence")
    ids = g.input("input_ids", ir.DataType.INT64, axes)
    mask = g.input("attention_mask", ir.DataType.INT64, axes)
    types = g.input("token_type_ids", ir.DataType.INT64, axes) if shape.types > 1 else None
    with g.scope("embeddings"):
        x = _embeddings(g, w, shape, ids, types)
    with g.scope("mask"):
        bias = g.key_mask(mask)
    for i in range(shape.layers):
        with g.scope(f"layer.{i}"):
            x = _layer(g, w, shape, x, bias, i)
    return TextStream(x, mask)


def _embeddings(g: GraphBuilder, w: Weights, shape: TextShape, ids: ir.Value, types: ir.Value | None) -> ir.Value:
    words = w.tensor("embeddings.word_embeddings.weight", (shape.vocab, shape.width))
    x = g.op("Gather", g.weight("embeddings.word_embeddings.weight", words), ids, axis=0)
    if types is not None:
        table = w.tensor("embeddings.token_type_embeddings.weight", (shape.types, shape.width))
        kind = g.op("Gather", g.weight("embeddings.token_type_embeddings.weight", table), types, axis=0)
        x = g.op("Add", x, kind)
    length = g.op("Shape", ids, start=1, end=2)
    positions = g.weight("embeddings.position_embeddings.weight", _positions(w, shape))
    rows = g.op("Slice", positions, g.const([0], np.int64), length, g.const([0], np.int64))
    return _norm(g, w, "embeddings.LayerNorm", g.op("Add", x, rows), shape)


def _positions(w: Weights, shape: TextShape) -> ir.LazyTensor:
    name, first = "embeddings.position_embeddings.weight", shape.first_position
    kept = (shape.positions - first, shape.width)
    if shape.types != 1:
        table = w.tensor(name, (shape.positions, shape.width), change=lambda a: a[first:], result=kept)
        return table
    kind = w.tensor("embeddings.token_type_embeddings.weight", (1, shape.width))
    return w.tensor(name, (shape.positions, shape.width), change=lambda a: a[first:] + kind.numpy(), result=kept)


def _norm(g: GraphBuilder, w: Weights, name: str, x: ir.Value, shape: TextShape) -> ir.Value:
    scale = g.weight(f"{name}.weight", w.tensor(f"{name}.weight", (shape.width,)))
    bias = g.weight(f"{name}.bias", w.tensor(f"{name}.bias", (shape.width,)))
    return g.layer_norm(x, scale, bias, shape.eps)


def linear(g: GraphBuilder, w: Weights, name: str, x: ir.Value, inputs: int, outputs: int) -> ir.Value:
    """One linear layer of the folder, nodes named after it."""
    weight, bias = w.linear(name, inputs, outputs)
    bias_value = g.weight(f"{name}.bias", bias) if bias is not None else None
    with g.scope(name.rsplit(".", 1)[-1]):
        return g.linear(x, g.weight(f"{name}.weight", weight), bias_value)


def _layer(g: GraphBuilder, w: Weights, shape: TextShape, x: ir.Value, bias: ir.Value, index: int) -> ir.Value:
    def name(template: str) -> str:
        return template.format(i=index)

    d, n = shape.width, shape.names
    with g.scope("attention"):
        q, k, v = (linear(g, w, name(t), x, d, d) for t in (n.query, n.key, n.value))
        context = g.attention(q, k, v, shape.heads, d // shape.heads, bias)
        x = g.op("Add", linear(g, w, name(n.out), context, d, d), x)
        x = _norm(g, w, name(n.norm1), x, shape)
    with g.scope("mlp"):
        y = linear(g, w, name(n.fc1), x, d, shape.inner)
        y = linear(g, w, name(n.fc2), g.activation(shape.act, y), shape.inner, d)
        return _norm(g, w, name(n.norm2), g.op("Add", y, x), shape)


def add_outputs(g: GraphBuilder, config: Config, w: Weights, shape: TextShape, stream: TextStream) -> None:
    """``last_hidden_state``, then what the folder has weights for: ``pooler_output``, ``logits``."""
    hidden, d = stream.hidden, shape.width
    g.output("last_hidden_state", hidden, ("batch", "sequence", d))
    pooled = None
    with g.scope("pooler"):
        if "pooler.dense.weight" in w:
            pooled = g.op("Tanh", linear(g, w, "pooler.dense", g.row(hidden, 0), d, d))
            g.output("pooler_output", pooled, ("batch", d))
    with g.scope("classifier"):
        _classifier(g, config, w, shape, hidden, pooled)


def _classifier(
    g: GraphBuilder, config: Config, w: Weights, shape: TextShape, hidden: ir.Value, pooled: ir.Value | None
) -> None:
    d, per_token = shape.width, config.architecture().endswith("ForTokenClassification")
    name = "classifier.out_proj" if "classifier.out_proj.weight" in w else "classifier"
    if f"{name}.weight" not in w:
        return
    labels = w.shape(f"{name}.weight")[0]
    if per_token:
        x: ir.Value | None = hidden
    elif "classifier.dense.weight" in w:  # RoBERTa
        x = g.op("Tanh", linear(g, w, "classifier.dense", g.row(hidden, 0), d, d))
    elif "pre_classifier.weight" in w:  # DistilBERT
        x = g.op("Relu", linear(g, w, "pre_classifier", g.row(hidden, 0), d, d))
    else:
        x = pooled
    if x is None:
        raise ArtifactError("a classifier without the pooler it reads", where=config.where)
    axes = ("batch", "sequence", labels) if per_token else ("batch", labels)
    g.output("logits", linear(g, w, name, x, d, labels), axes)
