"""GGUF files of the llama, qwen2, qwen3 and gemma3 architectures: metadata and tensors to a decoder graph."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgetok.converters.sources._decoder.graph import DecoderGraph
from edgetok.converters.sources._decoder.packed import Packed, pack
from edgetok.converters.sources._decoder.shape import DecoderShape
from edgetok.converters.sources._gguf.reader import Gguf
from edgetok.converters.sources.base import Source
from edgetok.errors import ArtifactError, UnsupportedError
from edgetok.limits import DEFAULT, LoadLimits

ARCHITECTURES = ("gemma3", "llama", "qwen2", "qwen3")
_TOP = {"embed": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight"}
_PARTS = {
    "attn_norm": "attn_norm.weight",
    "attn_post_norm": "post_attention_norm.weight",
    "ffn_norm": "ffn_norm.weight",
    "ffn_post_norm": "post_ffw_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "o": "attn_output.weight",
    "q.bias": "attn_q.bias",
    "k.bias": "attn_k.bias",
    "v.bias": "attn_v.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
}


def load_gguf(path: Path, limits: LoadLimits = DEFAULT) -> Source:
    """Build the decoder graph of a GGUF file, its quantization carried over code for code.

    Raises:
        ArtifactError: malformed, over a limit, or tensors that do not fit the metadata.
        UnsupportedError: another architecture, tensor type or rotary scaling.
    """
    with Gguf(path, limits) as file:
        shape = read_shape(file)
        weights = GgufWeights(file, shape)
        model = DecoderGraph(shape, weights, path.stem).build()
        weights.check_all_used()
        sha = hashlib.sha256()
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                sha.update(chunk)
        return Source(
            model=model,
            path=path,
            kind="gguf",
            name=str(file.metadata.get("general.name") or path.stem),
            sha256=sha.hexdigest(),
            bytes=file.bytes,
            producer="gguf",
        )


def read_shape(file: Gguf) -> DecoderShape:
    """The architecture's numbers from the metadata.

    Raises:
        ArtifactError: a number is missing, of another type or out of range.
        UnsupportedError: another architecture, or rotary scaling that is not linear.
    """
    meta, where = file.metadata, file.path.name
    family = meta.get("general.architecture")
    if family not in ARCHITECTURES:
        raise UnsupportedError(
            f"architecture {family!r}; GGUF files of {', '.join(ARCHITECTURES)} are read", where=where
        )

    def number(key: str, kind: type, default: Any = None) -> Any:
        value = meta.get(f"{family}.{key}", default)
        if value is None or isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
            raise ArtifactError(f"{family}.{key} is {value!r}, expected a number", where=where)
        return kind(value)

    scaling = meta.get(f"{family}.rope.scaling.type", "none")
    if scaling not in ("none", "linear") or "rope_freqs.weight" in file.tensors:
        raise UnsupportedError(f"rotary scaling {scaling!r} with per-frequency factors is not read yet", where=where)
    width, heads = number("embedding_length", int), number("attention.head_count", int)
    head_dim = number("attention.key_length", int, width // heads if heads > 0 else 0)
    if number("attention.value_length", int, head_dim) != head_dim:
        raise UnsupportedError("keys and values of different widths are not read yet", where=where)
    embed = file.tensors.get("token_embd.weight")
    if embed is None or len(embed.shape) != 2:
        raise ArtifactError("token_embd.weight is missing or no matrix", where=where)
    gemma = family == "gemma3"
    return DecoderShape(
        family=family,
        layers=number("block_count", int),
        width=width,
        heads=heads,
        kv_heads=number("attention.head_count_kv", int, heads),
        head_dim=head_dim,
        ffn=number("feed_forward_length", int),
        vocab=embed.shape[0],
        context=number("context_length", int),
        epsilon=number("attention.layer_norm_rms_epsilon", float),
        rope_base=number("rope.freq_base", float, 1e6 if gemma else 1e4),
        rope_scale=number("rope.scaling.factor", float, 1.0) if scaling == "linear" else 1.0,
        rope_dim=number("rope.dimension_count", int, head_dim),
        act="gelu_pytorch_tanh" if gemma else "silu",
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        qk_norm=family in ("qwen3", "gemma3"),
        post_norms=gemma,
        embed_scale=float(np.float32(width**0.5)) if gemma else 1.0,
        window=number("attention.sliding_window", int, 0) if gemma else 0,
        global_every=6 if gemma else 0,
        local_rope_base=1e4 if gemma else 0.0,
    ).check(where)


class GgufWeights:
    """The tensors of a file under the decoder's names, rotary rows in half-split order."""

    def __init__(self, file: Gguf, shape: DecoderShape) -> None:
        self.file, self.shape = file, shape
        self.used: set[str] = set()

    def _stored(self, name: str) -> str:
        if name in _TOP:
            return _TOP[name]
        layer, _, part = name.partition(".")
        return f"blk.{layer}.{_PARTS.get(part, part)}"

    def has(self, name: str) -> bool:
        return self._stored(name) in self.file.tensors

    def vector(self, name: str, size: int) -> ir.TensorProtocol:
        values = self._read(name, (size,))
        order = self._order(name)
        return ir.tensor(values if order is None else values[order])

    def _read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        return self.file.floats(self._expect(name, shape))

    def _expect(self, name: str, shape: tuple[int, ...]) -> str:
        stored = self._stored(name)
        found = self.file.tensors.get(stored)
        if found is None or found.shape != shape:
            what = "is missing" if found is None else f"is {list(found.shape)}"
            raise ArtifactError(
                f"tensor {stored!r} {what}, the metadata asks for {list(shape)}", where=self.file.path.name
            )
        self.used.add(stored)
        return stored

    def matrix(self, name: str, rows: int, columns: int) -> Callable[[], np.ndarray | Packed]:
        stored = self._expect(name, (rows, columns))
        order = self._order(name)

        def read() -> np.ndarray | Packed:
            packed = pack(self.file.tensors[stored].type.name, self.file.blocks(stored))
            if packed is not None:
                return packed if order is None else packed.rows(order)
            values = self.file.floats(stored)
            return values if order is None else values[order]

        return read

    def _order(self, name: str) -> np.ndarray | None:
        """The llama converter stores the rows of Wq and Wk so that rotated pairs are neighbours; this undoes it."""
        s, part = self.shape, name.partition(".")[2]
        heads = {"q": s.heads, "k": s.kv_heads}.get(part.removesuffix(".bias"))
        if s.family != "llama" or heads is None:
            return None
        rows = np.arange(heads * s.head_dim).reshape(heads, s.head_dim)
        turned = rows.copy()
        turned[:, : s.rope_dim] = (
            rows[:, : s.rope_dim].reshape(heads, s.rope_dim // 2, 2).swapaxes(1, 2).reshape(heads, s.rope_dim)
        )
        return turned.reshape(-1)

    def check_all_used(self) -> None:
        """A tensor nobody asked for changes the answer in silence if it is left out.

        Raises:
            UnsupportedError: there is one.
        """
        left = sorted(set(self.file.tensors) - self.used)
        if left:
            raise UnsupportedError(
                f"{len(left)} tensors are not used by the {self.shape.family} graph, {left[0]!r} first",
                where=self.file.path.name,
                next="this variant of the architecture is not read yet",
            )
