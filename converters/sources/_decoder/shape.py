"""What a decoder looks like, whatever file it came from."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgetok.errors import ArtifactError
from edgetok.limits import checked_mul


@dataclass(frozen=True)
class DecoderShape:
    """A pre-norm decoder of the llama kind and its relatives.

    Args:
        family: "llama", "qwen2", "qwen3" or "gemma3".
        layers, width, heads, kv_heads, head_dim, ffn, vocab, context: counts.
        epsilon: of every RMSNorm.
        rope_base: of the global layers. rope_scale: positions are divided by it. rope_dim: rotated part of a head.
        act: "silu" or "gelu_pytorch_tanh", of the gate.
        qkv_bias: biases on the three projections (qwen2).
        qk_norm: RMSNorm over each head of Q and K before the rotation (qwen3, gemma3).
        post_norms: RMSNorm on what attention and MLP give back, before it is added (gemma3).
        embed_scale: multiplies the embeddings (gemma3: the root of the width).
        attn_scale: of Q K^T; 0 means 1/sqrt(head_dim).
        window: keys a local layer sees, 0 for none; every ``global_every``-th layer is global.
        local_rope_base: of the local layers.
    """

    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int
    epsilon: float
    rope_base: float
    rope_scale: float = 1.0
    rope_dim: int = 0
    act: str = "silu"
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    embed_scale: float = 1.0
    attn_scale: float = 0.0
    window: int = 0
    global_every: int = 0
    local_rope_base: float = 0.0

    def check(self, where: str) -> DecoderShape:
        """Hold the numbers against each other, since they come from a file.

        Raises:
            ArtifactError: one is out of range, or two contradict.
        """
        ranges = {
            "layers": (self.layers, 512),
            "width": (self.width, 65536),
            "heads": (self.heads, 1024),
            "kv_heads": (self.kv_heads, 1024),
            "head_dim": (self.head_dim, 1024),
            "ffn": (self.ffn, 1 << 20),
            "vocab": (self.vocab, 1 << 21),
            "context": (self.context, 1 << 24),
        }
        for name, (value, most) in ranges.items():
            if not 1 <= value <= most:
                raise ArtifactError(f"{name} is {value}; 1 to {most} are allowed", where=where)
        if self.heads % self.kv_heads:
            raise ArtifactError(f"{self.heads} heads cannot share {self.kv_heads} key heads evenly", where=where)
        if not 0 < self.rope_dim <= self.head_dim or self.rope_dim % 2:
            raise ArtifactError(f"{self.rope_dim} rotated elements do not fit heads of {self.head_dim}", where=where)
        for name in ("epsilon", "rope_base", "rope_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ArtifactError(f"{name} is {value}", where=where)
        checked_mul(self.layers, self.width, self.ffn, what="parameters", where=where)
        return self

    def local(self, layer: int) -> bool:
        """Whether a layer sees only a window of keys."""
        return self.window > 0 and bool(self.global_every) and (layer + 1) % self.global_every != 0
