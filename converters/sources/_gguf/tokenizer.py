"""``tokenizer.json`` from GGUF metadata, for a written list of models and pre-tokenizers.

Byte-level BPE ("gpt2") takes its merges from the file; SentencePiece BPE ("llama") has scores, from which the merges
follow: every way to split a piece into two pieces, the best-scored piece first. What a pre-tokenizer does is not in the
file, only its name: an unknown name is refused, since a near guess gives plausible but wrong ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgetok.errors import ArtifactError, UnsupportedError

CONTROL, USER_DEFINED, BYTE = 3, 4, 6
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    "qwen2": _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,
    "llama-bpe": _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,
}
PRE_TOKENIZERS = ("smollm", *_SPLITS)


def build_tokenizer(metadata: Mapping[str, Any], where: str) -> bytes | None:
    """The bytes of ``tokenizer.json``; None when the file holds no tokenizer.

    Raises:
        UnsupportedError: another tokenizer model or pre-tokenizer.
        ArtifactError: the vocabulary is malformed.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        return None
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ArtifactError("tokenizer.ggml.tokens is missing or no list of strings", where=where)
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ArtifactError("two tokens of the vocabulary are the same", where=where)
    if kind == "gpt2":
        made = _byte_level(metadata, vocab, where)
    elif kind == "llama":
        made = _sentence_piece(metadata, vocab, tokens, where)
    else:
        raise UnsupportedError(f"tokenizer model {kind!r}; gpt2 and llama are read", where=where)
    _add_special(made, metadata, tokens, where)
    return str(made.to_str()).encode()


def _byte_level(metadata: Mapping[str, Any], vocab: dict[str, int], where: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = metadata.get("tokenizer.ggml.pre")
    if name not in PRE_TOKENIZERS:
        raise UnsupportedError(f"pre-tokenizer {name!r}; {', '.join(PRE_TOKENIZERS)} are known", where=where)
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise ArtifactError("tokenizer.ggml.merges is missing or no list of strings", where=where)
    pairs = [tuple(m.split(" ")) for m in merges]
    for pair in pairs:
        if len(pair) != 2 or pair[0] not in vocab or pair[1] not in vocab or "".join(pair) not in vocab:
            raise ArtifactError(f"merge {' '.join(pair)!r} is not of two known tokens", where=where)
    made = Tokenizer(models.BPE(vocab, pairs, ignore_merges=name == "llama-bpe"))  # type: ignore[arg-type]
    if name == "smollm":
        split: Any = pre_tokenizers.Digits(individual_digits=True)
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        split = pre_tokenizers.Split(Regex(_SPLITS[name]), "isolated")
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, last])
    if name == "qwen2":
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    return made


def _sentence_piece(metadata: Mapping[str, Any], vocab: dict[str, int], tokens: list[str], where: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or scores.shape != (len(tokens),) or not np.isfinite(scores).all():
        raise ArtifactError("tokenizer.ggml.scores does not give every token a finite score", where=where)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    if not isinstance(unknown, int) or not 0 <= unknown < len(tokens):
        raise ArtifactError(f"tokenizer.ggml.unknown_token_id {unknown!r} is no token", where=where)
    made = Tokenizer(
        models.BPE(vocab, _merges(vocab, scores), unk_token=tokens[unknown], byte_fallback=True, fuse_unk=True)
    )
    space = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    steps = [normalizers.Prepend("▁")] if space else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*back, *([decoders.Strip(" ", 1, 0)] if space else [])])
    return made


def _merges(vocab: dict[str, int], scores: np.ndarray) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, by the made piece's score, then by the ids of its parts."""
    found: list[tuple[float, int, int, str, str]] = []
    for piece, number in vocab.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                found.append((-float(scores[number]), vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _add_special(made: Any, metadata: Mapping[str, Any], tokens: list[str], where: str) -> None:
    """Control tokens, tokens matched before anything else, and the token that begins a text."""
    from tokenizers import AddedToken, processors

    types = metadata.get("tokenizer.ggml.token_type")
    if types is not None:
        if not isinstance(types, np.ndarray) or types.shape != (len(tokens),):
            raise ArtifactError("tokenizer.ggml.token_type does not give every token a type", where=where)
        for wanted in (CONTROL, USER_DEFINED):
            added = [
                AddedToken(tokens[i], normalized=False, special=wanted == CONTROL) for i in np.where(types == wanted)[0]
            ]
            if wanted == CONTROL:
                made.add_special_tokens(added)
            else:
                made.add_tokens(added)
    if made.get_vocab_size(with_added_tokens=True) != len(tokens):
        raise ArtifactError("the special tokens do not fit the vocabulary", where=where)
    # As llama.cpp: without the key, SentencePiece models begin with this token and byte-level ones do not.
    begin = metadata.get("tokenizer.ggml.add_bos_token", metadata["tokenizer.ggml.model"] == "llama")
    first = metadata.get("tokenizer.ggml.bos_token_id")
    if begin and isinstance(first, int) and 0 <= first < len(tokens):
        made.post_processor = processors.TemplateProcessing(
            single=f"{tokens[first]} $A", special_tokens=[(tokens[first], first)]
        )
