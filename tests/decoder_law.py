"""A decoder in plain float64 numpy, straight from a GGUF's own tensors and conventions: the judge of the graphs."""

from __future__ import annotations

import numpy as np

from edgetok.converters.sources._gguf.reader import Gguf


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def rotate(x: np.ndarray, positions: np.ndarray, base: float, interleaved: bool) -> np.ndarray:
    """x [S, H, D]; pairs (2i, 2i+1) when interleaved, else (i, i + D/2)."""
    d = x.shape[-1]
    angle = positions[:, None] * base ** (-np.arange(0, d, 2) / d)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    out = np.empty_like(x)
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., : d // 2], x[..., d // 2 :])
    one, two = a * cos - b * sin, a * sin + b * cos
    if interleaved:
        out[..., 0::2], out[..., 1::2] = one, two
    else:
        out[..., : d // 2], out[..., d // 2 :] = one, two
    return out


def act(name: str, x: np.ndarray) -> np.ndarray:
    if name == "gemma3":
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return x / (1 + np.exp(-x))


def logits(file: Gguf, ids: list[int]) -> np.ndarray:
    """[S, V] for one sequence."""
    meta = file.metadata
    family = meta["general.architecture"]

    def m(key: str, default: float | None = None) -> float:
        return meta.get(f"{family}.{key}", default)

    def w(name: str) -> np.ndarray:
        return file.floats(name).astype(np.float64)

    eps, heads, kv = (
        m("attention.layer_norm_rms_epsilon"),
        int(m("attention.head_count")),
        int(m("attention.head_count_kv")),
    )
    d = int(m("attention.key_length", m("embedding_length") / heads))
    x = w("token_embd.weight")[ids]
    if family == "gemma3":
        x = x * float(np.float32(x.shape[1] ** 0.5))
    places = np.arange(len(ids))
    for layer in range(int(m("block_count"))):
        p = f"blk.{layer}."
        local = family == "gemma3" and (layer + 1) % 6 != 0
        y = norm(x, w(p + "attn_norm.weight"), eps)
        parts = []
        for part, n in (("q", heads), ("k", kv), ("v", kv)):
            z = y @ w(f"{p}attn_{part}.weight").T
            if f"{p}attn_{part}.bias" in file.tensors:
                z = z + w(f"{p}attn_{part}.bias")
            z = z.reshape(len(ids), n, d)
            if part != "v":
                if f"{p}attn_{part}_norm.weight" in file.tensors:
                    z = norm(z, w(f"{p}attn_{part}_norm.weight"), eps)
                z = rotate(z, places, 1e4 if local else m("rope.freq_base"), family == "llama")
            parts.append(z)
        q, k, v = parts
        k, v = (np.repeat(t, heads // kv, 1) for t in (k, v))
        s = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(d)
        hidden = places[None] > places[:, None]
        if local:
            hidden |= places[:, None] - places[None] >= m("attention.sliding_window")
        s = np.where(hidden, -np.inf, s)
        prob = np.exp(s - s.max(-1, keepdims=True))
        prob /= prob.sum(-1, keepdims=True)
        y = np.einsum("hij,jhd->ihd", prob, v).reshape(len(ids), -1) @ w(p + "attn_output.weight").T
        if family == "gemma3":
            y = norm(y, w(p + "post_attention_norm.weight"), eps)
        x = x + y
        y = norm(x, w(p + "ffn_norm.weight"), eps)
        y = act(family, y @ w(p + "ffn_gate.weight").T) * (y @ w(p + "ffn_up.weight").T)
        y = y @ w(p + "ffn_down.weight").T
        if family == "gemma3":
            y = norm(y, w(p + "post_ffw_norm.weight"), eps)
        x = x + y
    head = "output.weight" if "output.weight" in file.tensors else "token_embd.weight"
    return norm(x, w("output_norm.weight"), eps) @ w(head).T
