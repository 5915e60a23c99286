"""tokenizer.json from GGUF metadata: hand-made vocabularies with known answers, and metadata that lies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from edgetok.converters.sources._gguf.reader import Gguf
from edgetok.converters.sources._gguf.tokenizer import build_tokenizer
from edgetok.errors import ArtifactError, UnsupportedError

SMOLLM = Path(os.path.expanduser("~/.cache/edgetok/models/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf"))


def byte_level(pre: str = "smollm", **changes: Any) -> dict[str, Any]:
    tokens = ["<end>", "<user>", "a", "b", "c", "1", "2", "Ġ", "ab", "Ġa", "abc", "12"]
    meta: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([3, 4] + [1] * 10, np.int32),
        "tokenizer.ggml.merges": ["a b", "Ġ a", "ab c", "1 2"],
        "tokenizer.ggml.bos_token_id": 0,
    }
    return meta | {f"tokenizer.ggml.{k}": v for k, v in changes.items()}


def sentence_piece(**changes: Any) -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "<0x21>", "▁", "a", "b", "ab", "▁a"]
    scores = np.array([0, 0, 0, -9, -9, -9, -2, -1], np.float32)
    meta: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": np.array([2, 3, 6, 1, 1, 1, 1, 1], np.int32),
        "tokenizer.ggml.bos_token_id": 1,
    }
    return meta | {f"tokenizer.ggml.{k}": v for k, v in changes.items()}


def made(meta: dict[str, Any]) -> Tokenizer:
    data = build_tokenizer(meta, "m.gguf")
    assert data is not None
    return Tokenizer.from_str(data.decode())


def test_byte_level_merges_in_order_and_splits_digits_singly() -> None:
    t = made(byte_level())
    assert t.encode("abc ab").tokens == ["abc", "Ġ", "ab"]  # "a b" comes before "Ġ a"
    assert t.encode("12").tokens == ["1", "2"]  # this pre-tokenizer takes digits one by one
    assert t.encode("a<end>b").ids == [2, 0, 3]
    assert t.decode(t.encode("abc 12 ab").ids) == "abc 12 ab"


def test_llama_three_keeps_three_digits_together() -> None:
    assert made(byte_level("llama-bpe")).encode("12").tokens == ["12"]
    assert made(byte_level("qwen2")).encode("12").tokens == ["1", "2"]


def test_control_tokens_are_special_and_user_tokens_are_not() -> None:
    t = made(byte_level())
    ids = t.encode("a<user><end>").ids
    assert ids == [2, 1, 0]
    assert t.decode(ids, skip_special_tokens=True) == "a<user>"


def test_the_first_token_is_added_when_the_file_says_so() -> None:
    assert made(byte_level(add_bos_token=True)).encode("a").ids == [0, 2]
    assert made(sentence_piece()).encode("a").ids == [1, 7]
    assert made(sentence_piece(add_bos_token=False)).encode("a").ids == [7]


def test_sentence_piece_merges_by_score_and_falls_back_to_bytes() -> None:
    t = made(sentence_piece(add_bos_token=False))
    assert t.encode("ab").tokens == ["▁a", "b"]  # the score of "▁a" beats the one of "ab"
    assert t.encode("ab!").tokens == ["▁a", "b", "<0x21>"]
    assert t.decode(t.encode("ab ab!").ids) == "ab ab!"


@pytest.mark.parametrize(
    ("meta", "error", "words"),
    [
        (byte_level("mystery"), UnsupportedError, "mystery"),
        (byte_level(model="wordpiece"), UnsupportedError, "wordpiece"),
        (byte_level(tokens=["a", "a"]), ArtifactError, "the same"),
        (byte_level(tokens=[]), ArtifactError, "tokens"),
        (byte_level(merges=["a z"]), ArtifactError, "a z"),
        (byte_level(merges=["a b c"]), ArtifactError, "a b c"),
        (byte_level(merges=["b c"]), ArtifactError, "b c"),
        (byte_level(token_type=np.array([1], np.int32)), ArtifactError, "token_type"),
        (sentence_piece(scores=np.array([np.nan] * 8, np.float32)), ArtifactError, "scores"),
        (sentence_piece(unknown_token_id=99), ArtifactError, "99"),
    ],
)
def test_metadata_that_lies_is_refused(meta: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        build_tokenizer(meta, "m.gguf")


def test_no_tokenizer_is_none() -> None:
    assert build_tokenizer({}, "m.gguf") is None


@pytest.mark.model
@pytest.mark.skipif(not SMOLLM.is_file(), reason="smollm2-135m is not pulled (edgetok models pull smollm2-135m)")
def test_smollm_gives_the_ids_of_llama_cpp() -> None:
    """Ids and counts agree with llama.cpp (xllamacpp 2026.10.11549) on the same file."""
    with Gguf(SMOLLM) as file:
        data = build_tokenizer(file.metadata, "m.gguf")
    assert data is not None
    t = Tokenizer.from_str(data.decode())
    assert t.encode("Hello world").ids == [19556, 905]
    assert t.encode("<|im_start|>user\nHi<|im_end|>\n").ids == [1, 4093, 198, 26843, 2, 198]
    for text, count in {
        "naïve café – ünïcödé 漢字 🙂🙃": 20,
        "1234567890 12a34": 16,
        "don't we'll I'd they're": 8,
    }.items():
        ids = t.encode(text).ids
        assert len(ids) == count
        assert t.decode(ids) == text
