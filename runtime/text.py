"""From texts to token ids: the tokenizer that travels with the model, and how much of a text it may keep."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from edgetok.devices.base import TensorSpec
from edgetok.errors import ArtifactError, InputError

Reader = Callable[[str], bytes | None]

_KINDS = (("mask", "mask"), ("type", "types"), ("segment", "types"), ("ids", "ids"))


class TextInput:
    """Tokenizes, cuts and pads for one model.

    Args:
        read: gives a file that travels with the model, None when there is none.
        inputs: of the graph.
        where: for messages.

    Raises:
        InputError: there is no tokenizer.json.
        ArtifactError: a file is malformed.
    """

    def __init__(self, read: Reader, inputs: Sequence[TensorSpec], where: str) -> None:
        from tokenizers import Tokenizer

        data = read("tokenizer.json")
        if data is None:
            raise InputError(
                "there is no tokenizer.json beside the model", where=where, next="pass token ids to run or run_packed"
            )
        try:
            self._tokenizer = Tokenizer.from_str(data.decode("utf-8"))
            own = json.loads(data)
        except Exception as exc:  # the library raises plain Exception
            raise ArtifactError(f"tokenizer.json cannot be read: {exc}", where=where) from exc
        self.pad = _pad_id(own)
        self.roles = {s.name: role for s in inputs if (role := role_of(s.name)) is not None}
        self.bucket = bucket_of(inputs)
        self.limit = self._limit(read, own)
        self._tokenizer.no_padding()
        if self.limit:
            self._tokenizer.enable_truncation(self.limit)

    def _limit(self, read: Reader, own: Mapping[str, Any]) -> int | None:
        """Tokens kept of a text: what the folder's files say, never more than the graph takes."""
        sentence = _json(read("sentence_bert_config.json")).get("max_seq_length")
        truncation = own.get("truncation")
        cut = truncation.get("max_length") if isinstance(truncation, dict) else None
        wanted = sentence if _count(sentence) else cut
        found = [n for n in (wanted, position_limit(read), self.bucket) if isinstance(n, int) and _count(n)]
        return min(found) if found else None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int64 [n], special tokens included, cut to ``limit``."""
        if isinstance(texts, str) or not all(isinstance(t, str) for t in texts):
            raise InputError("encode takes a list of texts")
        return [np.asarray(e.ids, np.int64) for e in self._tokenizer.encode_batch(list(texts))]

    def pad_batch(self, ids: Sequence[np.ndarray], specs: Sequence[TensorSpec]) -> dict[str, np.ndarray]:
        """Feeds [B, S] for a graph that takes padded batches."""
        width = self.bucket or max(len(i) for i in ids)
        lengths = np.array([len(i) for i in ids])
        if lengths.max() > width:
            raise InputError(f"a text of {lengths.max()} tokens does not fit in the graph's {width}")
        mask = np.arange(width)[None, :] < lengths[:, None]
        padded = np.full(mask.shape, self.pad, np.int64)
        padded[mask] = np.concatenate(ids)
        arrays = {"ids": padded, "mask": mask.astype(np.int64), "types": np.zeros_like(padded)}
        return {s.name: arrays[fill(s)].astype(s.dtype, copy=False) for s in specs}


def position_limit(read: Reader) -> int | None:
    """Positions the model's config.json names, less the offset RoBERTa keeps for padding."""
    config = _json(read("config.json"))
    positions, pad = config.get("max_position_embeddings"), config.get("pad_token_id")
    if not isinstance(positions, int) or not _count(positions):
        return None
    offset = pad + 1 if "roberta" in str(config.get("model_type")) and isinstance(pad, int) else 0
    return max(1, positions - offset)


def role_of(name: str) -> str | None:
    """What a text input holds, by its name: "ids", "mask", "types", or None."""
    lower = name.lower()
    return next((role for key, role in _KINDS if key in lower), None)


def fill(spec: TensorSpec) -> str:
    """Role of an input that must have one.

    Raises:
        InputError: its name does not say.
    """
    role = role_of(spec.name)
    if role is None:
        raise InputError(f"do not know how to fill input {spec.name!r} from text", next="call run with all inputs")
    return role


def bucket_of(inputs: Sequence[TensorSpec]) -> int | None:
    """The fixed length of a text graph: the second axis shared by all its inputs, a mask among them; else None."""
    if not inputs or any(s.shape is None or len(s.shape) != 2 or not s.dtype.startswith("int") for s in inputs):
        return None
    widths = {s.shape[1] for s in inputs if s.shape is not None}
    width = widths.pop()
    fixed = not widths and isinstance(width, int) and any(role_of(s.name) == "mask" for s in inputs)
    return width if fixed and isinstance(width, int) else None


def _pad_id(own: Mapping[str, Any]) -> int:
    padding = own.get("padding")
    if isinstance(padding, dict) and isinstance(padding.get("pad_id"), int):
        return int(padding["pad_id"])
    for token in own.get("added_tokens") or []:
        if isinstance(token, dict) and token.get("content") in ("[PAD]", "<pad>", "<|pad|>"):
            return int(token["id"])
    return 0


def _json(data: bytes | None) -> dict[str, Any]:
    try:
        value = json.loads(data) if data else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 24
