"""Read config.json as an enemy wrote it: counts have maxima, and no key that could change the maths is ignored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgetok.errors import ArtifactError, InputError, UnsupportedError
from edgetok.limits import MIB

MAX_CONFIG_BYTES = MIB

# Largest value accepted for each count; far above any published encoder, far below what would hurt.
MAXIMA = {
    "layers": 512,
    "heads": 512,
    "width": 65_536,
    "inner": 262_144,
    "vocab": 4_000_000,
    "positions": 1_048_576,
    "types": 1_024,
    "pixels": 16_384,
    "channels": 64,
    "registers": 256,
    "labels": 1_000_000,
}

TORCH_HINT = (
    "pip install 'edgetok[torch]' and convert again: the torch route runs transformers' own code for this model"
)

# Keys that describe training, generation, files or labels and cannot change what the encoder computes.
_HARMLESS_TEXT = """
_name_or_path _commit_hash _attn_implementation _attn_implementation_autoset architectures
model_type transformers_version torch_dtype dtype torchscript use_bfloat16 return_dict
output_attentions output_hidden_states use_cache use_return_dict attention_probs_dropout_prob
hidden_dropout_prob dropout attention_dropout qa_dropout seq_classif_dropout classifier_dropout
drop_path_rate hidden_dropout initializer_range initializer_factor layerscale_value
gradient_checkpointing chunk_size_feed_forward tie_word_embeddings tie_encoder_decoder id2label
label2id num_labels problem_type finetuning_task task_specific_params tokenizer_class prefix
bos_token_id eos_token_id sep_token_id cls_token_id mask_token_id unk_token_id
decoder_start_token_id forced_bos_token_id forced_eos_token_id bad_words_ids suppress_tokens
begin_suppress_tokens max_length min_length do_sample early_stopping num_beams num_beam_groups
diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences remove_invalid_values
exponential_decay_length_penalty output_scores return_dict_in_generate cross_attention_hidden_size
directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head
pooler_type encoder_stride out_features out_indices stage_names apply_layernorm
reshape_hidden_states use_mask_token sinusoidal_pos_embds language output_past tie_weights_
sbert_ce_default_activation_function sentence_transformers
"""
_HARMLESS = frozenset(_HARMLESS_TEXT.split())

# Keys that would change the maths, with the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "position_embedding_type": ("absolute",),
    "pruned_heads": ({},),
}


class Config:
    """config.json with typed getters; ``finish`` refuses what nobody asked for."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = dict(values)
        self.where = where
        self._read: set[str] = {"model_type"}

    def _get(self, names: Sequence[str], default: Any) -> tuple[str, Any]:
        for name in names:
            self._read.add(name)
            if self.values.get(name) is not None:
                return name, self.values[name]
        return names[0], default

    def count(self, *names: str, most: str, default: int | None = None, least: int = 1) -> int:
        """A whole number between ``least`` and the documented maximum; the first of ``names`` present.

        Raises:
            ArtifactError: missing, not a whole number, or out of range.
        """
        name, value = self._get(names, default)
        if value is None:
            raise ArtifactError(f"{name} is missing", where=self.where)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAXIMA[most]:
            raise ArtifactError(
                f"{name} is {_short(value)}; expected a whole number from {least} to {MAXIMA[most]}", where=self.where
            )
        return value

    def pair(self, name: str, *, most: str, default: int) -> tuple[int, int]:
        """One number for both sides, or [height, width]."""
        _, value = self._get([name], default)
        sides = list(value) if isinstance(value, list) else [value, value]
        ok = len(sides) == 2 and all(isinstance(s, int) and not isinstance(s, bool) for s in sides)
        if not ok or not all(1 <= s <= MAXIMA[most] for s in sides):
            raise ArtifactError(f"{name} is {_short(value)}; expected 1 to {MAXIMA[most]}", where=self.where)
        return sides[0], sides[1]

    def number(self, name: str, default: float, least: float, most: float) -> float:
        """A finite number within bounds."""
        _, value = self._get([name], default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise ArtifactError(f"{name} is {_short(value)}; expected {least} to {most}", where=self.where)
        return float(value)

    def text(self, *names: str, default: str) -> str:
        """A string."""
        name, value = self._get(names, default)
        if not isinstance(value, str):
            raise ArtifactError(f"{name} is {_short(value)}; expected a string", where=self.where)
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        _, value = self._get([name], default)
        if not isinstance(value, bool):
            raise ArtifactError(f"{name} is {_short(value)}; expected true or false", where=self.where)
        return value

    def architecture(self) -> str:
        """The class that saved the model, or an empty string."""
        names = self.values.get("architectures")
        return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""

    def finish(self) -> None:
        """Refuse keys that were not read and could change the maths.

        Raises:
            UnsupportedError: names the key.
        """
        for key in sorted(set(self.values) - self._read - _HARMLESS):
            value = self.values[key]
            if value is None or (key in _NEUTRAL and value in _NEUTRAL[key]):
                continue
            raise UnsupportedError(
                f"{key}={_short(value)} may change what the model computes, and the built-in "
                f"{self.values.get('model_type')!r} builder does not know it",
                where=self.where,
                next=TORCH_HINT,
            )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_json(path: Path, kind: type = dict) -> Any:
    """Read a small JSON file of the given top-level type.

    Raises:
        InputError: no such file.
        ArtifactError: too large, not JSON, or of another type.
    """
    if not path.is_file():
        raise InputError(
            f"no {path.name} in this folder", where=str(path.parent), next="give a Hugging Face model folder"
        )
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ArtifactError(f"larger than {MAX_CONFIG_BYTES} bytes", where=str(path))
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as exc:
        raise ArtifactError(f"not JSON: {exc}", where=str(path)) from exc
    if not isinstance(value, kind):
        raise ArtifactError(f"expected a JSON {kind.__name__} at the top", where=str(path))
    return value
