"""Write a decoder as ONNX that stock onnxruntime runs: contrib operators for what the standard lacks, KV as tensors.

Inputs ``input_ids`` int64 [B,S], ``attention_mask`` int64 [B,P+S], ``position_ids`` int64 [B,S] and, for each layer,
``past_key_values.<l>.key`` and ``.value`` float [B,Hkv,P,D]; outputs ``logits`` float [B,S,V] and
``present.<l>.key``, ``.value`` [B,Hkv,P+S,D]. This is onnxruntime-genai's form, with positions explicit so that a cache
that has lost entries still rotates by true positions. RoPE is the half-split pairing everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import onnx_ir as ir

from edgetok.converters.graph.builder import GraphBuilder
from edgetok.converters.sources._decoder.packed import Packed
from edgetok.converters.sources._decoder.shape import DecoderShape

MS = "com.microsoft"
OPSET = 23  # RMSNormalization
ACCURACY_LEVEL = 4  # int8 activations inside MatMulNBits; the slower level 0 keeps them float


class DecoderWeights(Protocol):
    """Where the numbers come from. Names are ``embed``, ``norm``, ``head`` and ``<layer>.<part>``."""

    def has(self, name: str) -> bool:
        """Whether a tensor is there."""
        ...

    def vector(self, name: str, size: int) -> ir.TensorProtocol:
        """A float32 vector."""
        ...

    def matrix(self, name: str, rows: int, columns: int) -> Callable[[], np.ndarray | Packed]:
        """A matrix [rows, columns] = [outputs, inputs]: read, as floats or codes, when called."""
        ...


class DecoderGraph:
    """Builds one graph; call ``build`` once."""

    def __init__(self, shape: DecoderShape, weights: DecoderWeights, name: str) -> None:
        self.shape, self.weights = shape, weights
        self.g = GraphBuilder(name)

    def build(self) -> ir.Model:
        """The whole model."""
        s, g = self.shape, self.g
        ids = g.input("input_ids", ir.DataType.INT64, ["batch", "sequence"])
        mask = g.input("attention_mask", ir.DataType.INT64, ["batch", "total"])
        self.positions = g.input("position_ids", ir.DataType.INT64, ["batch", "sequence"])
        with g.scope("mask"):
            length = g.op("ReduceSum", mask, g.const([1], np.int64), keepdims=0)
            self.last = g.op("Cast", g.op("Sub", length, g.const([1], np.int64)), to=int(ir.DataType.INT32))
            total = g.op("Gather", g.op("Shape", mask), g.const(1, np.int64), axis=0)
            self.total = g.op("Cast", total, to=int(ir.DataType.INT32))
        x = self._embed(ids)
        for layer in range(s.layers):
            with g.scope(f"layers.{layer}"):
                x = self._layer(layer, x)
        x = self._norm(x, "norm", s.width)
        with g.scope("head"):
            logits = self._linear("head" if self.weights.has("head") else "embed", x, s.width, s.vocab)
        g.output("logits", logits, ["batch", "sequence", s.vocab])
        for name, value in self.present:
            g.output(name, value, ["batch", s.kv_heads, "total", s.head_dim])
        return g.model(opset=OPSET, domains={MS: 1})

    # -- parts -------------------------------------------------------------------------------------------------

    def _embed(self, ids: ir.Value) -> ir.Value:
        g, s = self.g, self.shape
        self.present: list[tuple[str, ir.Value]] = []
        with g.scope("embed"):
            table = self.weights.matrix("embed", s.vocab, s.width)()
            if isinstance(table, Packed):
                codes, scales, zeros = self._stored("embed", table)
                flat = g.op("Reshape", codes, g.const([s.vocab, table.codes[0].size * table.bits // 8], np.int64))
                x = g.op(
                    "GatherBlockQuantized", flat, ids, scales, zeros, domain=MS,
                    bits=table.bits, block_size=table.block, gather_axis=0, quantize_axis=1,
                )  # fmt: skip
            else:
                x = g.op("Gather", g.weight("embed.weight", ir.tensor(table)), ids, axis=0)
            return x if s.embed_scale == 1 else g.op("Mul", x, g.const(np.float32(s.embed_scale)))

    def _layer(self, layer: int, x: ir.Value) -> ir.Value:
        g, s = self.g, self.shape
        with g.scope("attn"):
            y = self._attention(layer, self._norm(x, f"{layer}.attn_norm", s.width))
            if s.post_norms:
                y = self._norm(y, f"{layer}.attn_post_norm", s.width)
        x = g.op("Add", x, y)
        with g.scope("mlp"):
            y = self._mlp(layer, self._norm(x, f"{layer}.ffn_norm", s.width))
            if s.post_norms:
                y = self._norm(y, f"{layer}.ffn_post_norm", s.width)
        return g.op("Add", x, y)

    def _attention(self, layer: int, x: ir.Value) -> ir.Value:
        g, s = self.g, self.shape
        parts = {"q": s.heads, "k": s.kv_heads, "v": s.kv_heads}
        q, k, v = (self._linear(f"{layer}.{p}", x, s.width, n * s.head_dim) for p, n in parts.items())
        if s.qk_norm:
            q, k = self._head_norm(q, f"{layer}.q_norm", s.heads), self._head_norm(k, f"{layer}.k_norm", s.kv_heads)
        cos, sin = self._tables(s.local(layer))
        q = self._rotate(q, cos, sin, s.heads)
        k = self._rotate(k, cos, sin, s.kv_heads)
        past = [
            g.input(f"past_key_values.{layer}.{n}", ir.DataType.FLOAT, ["batch", s.kv_heads, "past", s.head_dim])
            for n in ("key", "value")
        ]
        outs = g.ops(
            "GroupQueryAttention", [q, k, v, *past, self.last, self.total], 3, domain=MS,
            num_heads=s.heads, kv_num_heads=s.kv_heads, do_rotary=0,
            scale=float(s.attn_scale or s.head_dim**-0.5),
            local_window_size=s.window if s.local(layer) else -1,
        )  # fmt: skip
        self.present += [(f"present.{layer}.key", outs[1]), (f"present.{layer}.value", outs[2])]
        return self._linear(f"{layer}.o", outs[0], s.heads * s.head_dim, s.width)

    def _mlp(self, layer: int, x: ir.Value) -> ir.Value:
        g, s = self.g, self.shape
        gate = self._linear(f"{layer}.gate", x, s.width, s.ffn)
        up = self._linear(f"{layer}.up", x, s.width, s.ffn)
        return self._linear(f"{layer}.down", g.op("Mul", g.activation(s.act, gate), up), s.ffn, s.width)

    def _norm(self, x: ir.Value, name: str, size: int) -> ir.Value:
        weight = self.g.weight(f"{name}.weight", self.weights.vector(name, size))
        return self.g.op("RMSNormalization", x, weight, axis=-1, epsilon=float(self.shape.epsilon))

    def _head_norm(self, x: ir.Value, name: str, heads: int) -> ir.Value:
        """RMSNorm over the elements of each head of [B,S,H*D]."""
        g, d = self.g, self.shape.head_dim
        split = g.op("Reshape", x, g.const([0, 0, heads, d], np.int64))
        return g.op("Reshape", self._norm(split, name, d), g.const([0, 0, heads * d], np.int64))

    def _rotate(self, x: ir.Value, cos: ir.Value, sin: ir.Value, heads: int) -> ir.Value:
        s = self.shape
        part = s.rope_dim if s.rope_dim != s.head_dim else 0
        return self.g.op(
            "RotaryEmbedding", x, self.positions, cos, sin, domain=MS,
            interleaved=0, num_heads=heads, rotary_embedding_dim=part,
        )  # fmt: skip

    def _tables(self, local: bool) -> tuple[ir.Value, ir.Value]:
        """cos and sin of position x pair, float32 [context, rope_dim / 2], computed in float64."""
        s = self.shape
        base, scale = (s.local_rope_base, 1.0) if local else (s.rope_base, s.rope_scale)
        stem = "local_rope" if local else "rope"
        angle = np.arange(s.context)[:, None] / scale * base ** (-np.arange(0, s.rope_dim, 2) / s.rope_dim)
        return (
            self.g.weight(f"{stem}.cos", ir.tensor(np.cos(angle).astype(np.float32))),
            self.g.weight(f"{stem}.sin", ir.tensor(np.sin(angle).astype(np.float32))),
        )

    # -- matrices ----------------------------------------------------------------------------------------------

    def _linear(self, name: str, x: ir.Value, inputs: int, outputs: int) -> ir.Value:
        g = self.g
        matrix = self.weights.matrix(name, outputs, inputs)()
        if isinstance(matrix, Packed):
            codes, scales, zeros = self._stored(name, matrix)
            y = g.op(
                "MatMulNBits", x, codes, scales, zeros, domain=MS, K=inputs, N=outputs, bits=matrix.bits,
                block_size=matrix.block, accuracy_level=ACCURACY_LEVEL,
            )  # fmt: skip
        elif name == "embed":  # tied, stored as rows: the product reads the same numbers
            y = g.op("MatMul", x, g.op("Transpose", g.weight("embed.weight", ir.tensor(matrix)), perm=[1, 0]))
        else:
            y = g.op("MatMul", x, g.weight(f"{name}.weight", ir.tensor(np.ascontiguousarray(matrix.T))))
        if self.weights.has(f"{name}.bias"):
            y = g.op("Add", y, g.weight(f"{name}.bias", self.weights.vector(f"{name}.bias", outputs)))
        return y

    def _stored(self, name: str, matrix: Packed) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        g = self.g
        zeros = None if matrix.zeros is None else g.weight(f"{name}.zeros", ir.tensor(matrix.zeros))
        codes = g.weight(f"{name}.codes", ir.tensor(matrix.stored()))
        return codes, g.weight(f"{name}.scales", ir.tensor(matrix.scales)), zeros
