"""The ``[torch]`` route: encoders of other Hugging Face types, exported by torch from transformers' own code.

Local files only, safetensors only, and never code from the model folder.
"""

from __future__ import annotations

import logging
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgetok.errors import UnsupportedError

_NEEDED = ("torch", "transformers", "onnxscript")
_TEXT_LENGTH = 16  # of the example input; the exported axis stays open


def missing() -> tuple[str, ...]:
    """Packages of the ``[torch]`` extra that are not installed."""
    return tuple(n for n in _NEEDED if find_spec(n) is None)


def export_folder(folder: Path) -> ir.Model:
    """Export the encoder in ``folder`` with ``torch.onnx.export`` (dynamo).

    The batch axis, and the sequence axis of text, stay open. An encoder-decoder gives its encoder.

    Args:
        folder: config.json and safetensors; any ``auto_map`` code beside them is never run.

    Raises:
        UnsupportedError: an extra is missing, transformers does not know the type, or torch cannot export it.
    """
    absent = missing()
    if absent:
        raise UnsupportedError(
            f"this model needs the torch route, and {absent[0]} is not installed",
            where=str(folder),
            next="pip install 'edgetok[torch]'",
        )
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    try:
        model = transformers.AutoModel.from_pretrained(
            str(folder),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="eager",
            dtype=torch.float32,
        ).eval()
    except (ValueError, OSError, KeyError, ImportError) as exc:
        raise UnsupportedError(f"transformers cannot load this folder: {exc}", where=str(folder)) from exc
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    inputs, dynamic = _example(model)
    outputs = _wrap(model, list(inputs))
    try:
        program = _export(outputs, inputs, dynamic)
    except Exception as exc:  # torch raises many kinds; all mean the same to a user
        raise UnsupportedError(
            f"torch could not export it: {type(exc).__name__}: {exc}",
            where=str(folder),
            next="export it to ONNX yourself and convert the .onnx file",
        ) from exc
    result: ir.Model = program.model
    result.metadata_props["edgetok.source"] = f"hf-torch:{model.config.model_type}"
    return result


def _example(model: Any) -> tuple[dict[str, Any], dict[str, dict[int, Any]]]:
    import torch

    config, batch, main = model.config, torch.export.Dim("batch", min=1, max=4096), model.main_input_name
    if main == "pixel_values":
        side = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        return {main: torch.zeros(2, config.num_channels, side, side)}, {main: {0: batch}}
    if main == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 1500)
        bins = getattr(config, "num_mel_bins", 80)
        return {main: torch.zeros(2, bins, frames)}, {main: {0: batch}}
    if main != "input_ids":
        raise UnsupportedError(f"the input {main!r} is not known to the torch route")
    most = min(int(getattr(config, "max_position_embeddings", 512)), 1 << 20)
    length = torch.export.Dim("sequence", min=2, max=most)
    ids = torch.ones(2, min(_TEXT_LENGTH, most), dtype=torch.int64)
    axes = {0: batch, 1: length}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {"input_ids": axes, "attention_mask": axes}


def _wrap(model: Any, names: list[str]) -> Any:
    """A module with positional inputs and plain tensor outputs, named for the graph."""
    import torch

    class Encoder(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, *args: Any) -> tuple[Any, ...]:
            out = self.inner(**dict(zip(names, args, strict=True)), return_dict=True)
            return tuple(v for v in (out.get("last_hidden_state"), out.get("pooler_output")) if v is not None)

    return Encoder()


def _export(module: Any, inputs: dict[str, Any], dynamic: dict[str, Any]) -> Any:
    import torch

    with torch.no_grad():
        count = len(module(*inputs.values()))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.onnx.export(
            module,
            tuple(inputs.values()),
            dynamo=True,
            opset_version=18,
            input_names=list(inputs),
            output_names=["last_hidden_state", "pooler_output"][:count],
            dynamic_shapes=(tuple(dynamic.values()),),
            verbose=False,
        )
