"""GGUF to a decoder graph: stock onnxruntime gives what the file's own tensors mean, at once and token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import decoder_law
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from gguf_files import gguf

from edgetok.converters.sources._gguf.blocks import TYPES
from edgetok.converters.sources._gguf.reader import Gguf
from edgetok.converters.sources.gguf import load_gguf
from edgetok.errors import ArtifactError, UnsupportedError

WIDTH, HEADS, KV, D, FFN, VOCAB, LAYERS = 64, 4, 2, 16, 96, 64, 2


def stored(rng: np.random.Generator, kind: str, rows: int, columns: int) -> tuple[int, bytes]:
    """A random matrix of a tensor type whose numbers stay near 1/sqrt(columns)."""
    number = next(t.number for t in TYPES.values() if t.name == kind)
    scale = 1 / np.sqrt(columns)
    if kind == "F32":
        return number, (rng.standard_normal((rows, columns)) * scale).astype("<f4").tobytes()
    t = TYPES[number]
    blocks = rng.integers(0, 256, (rows * columns // t.size, t.bytes), dtype=np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(scale / (60 if kind == "Q8_0" else 5)).tobytes(), np.uint8)
    if kind == "Q4_1":
        blocks[:, 2:4] = np.frombuffer(np.float16(-1.5 * scale).tobytes(), np.uint8)
    return number, blocks.tobytes()


def tiny(family: str, *, layers: int = LAYERS, kind: str = "F32", tied: bool = True, **changes: Any) -> bytes:
    """A small model of a family, its matrices of one tensor type."""
    rng = np.random.default_rng(5)
    meta: dict[str, Any] = {
        "general.architecture": family,
        "general.name": "tiny",
        f"{family}.block_count": layers,
        f"{family}.embedding_length": WIDTH,
        f"{family}.attention.head_count": HEADS,
        f"{family}.attention.head_count_kv": KV,
        f"{family}.attention.key_length": D,
        f"{family}.attention.value_length": D,
        f"{family}.feed_forward_length": FFN,
        f"{family}.context_length": 32,
        f"{family}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{family}.rope.freq_base": 1000.0,
    }
    if family == "gemma3":
        meta["gemma3.attention.sliding_window"] = 4
    meta |= {k.replace("__", "."): v for k, v in changes.items()}
    tensors: list[tuple[str, list[int], int, bytes]] = []

    def vector(name: str, size: int, around: float = 1.0) -> None:
        tensors.append((name, [size], 0, (around + 0.3 * rng.standard_normal(size)).astype("<f4").tobytes()))

    def matrix(name: str, rows: int, columns: int, as_kind: str = kind) -> None:
        tensors.append((name, [columns, rows], *stored(rng, as_kind, rows, columns)))

    matrix("token_embd.weight", VOCAB, WIDTH, "Q8_0" if kind != "F32" else "F32")
    for i in range(layers):
        p = f"blk.{i}."
        for name in (
            "attn_norm",
            "ffn_norm",
            *(("post_attention_norm", "post_ffw_norm") if family == "gemma3" else ()),
        ):
            vector(f"{p}{name}.weight", WIDTH)
        for part, n in (("q", HEADS), ("k", KV), ("v", KV)):
            matrix(f"{p}attn_{part}.weight", n * D, WIDTH)
            if family == "qwen2":
                vector(f"{p}attn_{part}.bias", n * D, 0.0)
        if family in ("qwen3", "gemma3"):
            vector(f"{p}attn_q_norm.weight", D)
            vector(f"{p}attn_k_norm.weight", D)
        matrix(f"{p}attn_output.weight", WIDTH, HEADS * D)
        matrix(f"{p}ffn_gate.weight", FFN, WIDTH)
        matrix(f"{p}ffn_up.weight", FFN, WIDTH)
        matrix(f"{p}ffn_down.weight", WIDTH, FFN)
    vector("output_norm.weight", WIDTH)
    if not tied:
        matrix("output.weight", VOCAB, WIDTH)
    return gguf(meta, tensors)


def session(path: Path) -> ort.InferenceSession:
    """The graph with float activations inside MatMulNBits, so that only the graph is judged."""
    proto = ir.to_proto(load_gguf(path).model)
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    return ort.InferenceSession(proto.SerializeToString())


def run(s: ort.InferenceSession, ids: list[int], start: int = 0, past: dict[str, np.ndarray] | None = None):  # type: ignore[no-untyped-def]
    """Logits [S, V] and the new past."""
    feeds: dict[str, np.ndarray] = {
        "input_ids": np.array([ids]),
        "attention_mask": np.ones((1, start + len(ids)), np.int64),
        "position_ids": start + np.arange(len(ids))[None],
    }
    for value in s.get_inputs():
        if value.name.startswith("past"):
            empty = np.zeros((1, KV, 0, D), np.float32)
            feeds[value.name] = empty if past is None else past[value.name]
    out = s.run(None, feeds)
    names = [o.name.replace("present", "past_key_values") for o in s.get_outputs()]
    return out[0][0], dict(zip(names[1:], out[1:]))


IDS = [3, 60, 7, 7, 21, 0, 44, 12, 9]


@pytest.mark.parametrize(
    ("family", "kind", "tied"),
    [
        ("llama", "F32", True),
        ("llama", "Q4_1", True),
        ("llama", "Q8_0", False),
        ("qwen2", "Q4_0", True),
        ("qwen3", "F32", False),
        ("gemma3", "F32", True),
        ("gemma3", "Q8_0", True),
    ],
)
def test_the_graph_is_what_the_file_means(family: str, kind: str, tied: bool, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny(family, kind=kind, tied=tied, layers=7 if family == "gemma3" else LAYERS))
    with Gguf(path) as file:
        expected = decoder_law.logits(file, IDS)
    s = session(path)
    whole, _ = run(s, IDS)
    # float32 against float64 through a few layers of norms: 1e-4 of the largest logit leaves a factor of ten
    np.testing.assert_allclose(whole, expected, atol=1e-4 * np.abs(expected).max())
    head, past = run(s, IDS[:4])
    rows = [head]
    for i in range(4, len(IDS)):
        row, past = run(s, IDS[i : i + 1], i, past)
        rows.append(row)
    np.testing.assert_allclose(np.concatenate(rows), expected, atol=1e-4 * np.abs(expected).max())


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny("llama", llama__block_count=3))
    with pytest.raises(ArtifactError, match=r"blk\.2\.attn_norm\.weight' is missing"):
        load_gguf(path)
    path.write_bytes(tiny("llama", llama__feed_forward_length=128))
    with pytest.raises(ArtifactError, match="the metadata asks for"):
        load_gguf(path)


def test_a_tensor_nobody_reads_is_not_left_out_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny("llama", llama__block_count=1))
    with pytest.raises(UnsupportedError, match="not used"):
        load_gguf(path)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"general__architecture": "mamba"}, UnsupportedError, "gemma3, llama, qwen2, qwen3"),
        ({"llama__attention__head_count": 0}, ArtifactError, "heads is 0"),
        ({"llama__attention__head_count_kv": 3}, ArtifactError, "share 3"),
        ({"llama__block_count": 100_000}, ArtifactError, "layers is 100000"),
        ({"llama__context_length": "long"}, ArtifactError, "expected a number"),
        ({"llama__attention__layer_norm_rms_epsilon": float("nan")}, ArtifactError, "epsilon is nan"),
        ({"llama__rope__scaling__type": "yarn"}, UnsupportedError, "yarn"),
        ({"llama__rope__dimension_count": 15}, ArtifactError, "15 rotated"),
    ],
)
def test_metadata_that_lies_is_refused(
    changes: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny("llama", **changes))
    with pytest.raises(error, match=words):
        load_gguf(path)
