"""Hugging Face folders: config.json + safetensors to a canonical graph, tensor by tensor, without torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from edgetok.converters.graph.builder import GraphBuilder
from edgetok.converters.sources._hf import pooling, text, vision
from edgetok.converters.sources._hf.config import TORCH_HINT, Config, read_json
from edgetok.converters.sources._hf.weights import Weights, weight_files
from edgetok.converters.sources.base import Source
from edgetok.errors import UnsupportedError
from edgetok.limits import DEFAULT, LoadLimits

_TEXT: dict[str, tuple[tuple[str, ...], Callable[[Config], text.TextShape]]] = {
    "bert": (("bert.",), text.bert_shape),
    "roberta": (("roberta.",), text.bert_shape),
    "camembert": (("roberta.",), text.bert_shape),
    "xlm-roberta": (("roberta.",), text.bert_shape),
    "distilbert": (("distilbert.",), text.distilbert_shape),
}
_VISION = ("vit", "deit", "dinov2", "dinov2_with_registers")

# Carried into the artifact when present: what a tokenizer, a preprocessor or a lawyer needs.
CARRIED: tuple[str, ...] = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
_LICENCES: tuple[str, ...] = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "NOTICE")


def supported_types() -> tuple[str, ...]:
    """The ``model_type`` values built without torch."""
    return tuple(sorted([*_TEXT, *_VISION]))


def load_hf(folder: Path, limits: LoadLimits = DEFAULT) -> Source:
    """Build the graph of a Hugging Face model folder.

    Args:
        folder: with config.json and model.safetensors (or shards and their index). sentence-transformers folders
            (modules.json) get the output ``sentence_embedding``.
        limits: for files, tensors and sizes.

    Returns:
        The source; weights are read from the files when their bytes are needed, one at a time.

    Raises:
        InputError: not such a folder.
        ArtifactError: malformed, or over a limit.
        UnsupportedError: another model type, or a setting the builder does not know; says what to install. With the
            ``[torch]`` extra installed such folders are exported by torch instead.
    """
    folder = Path(folder).resolve()
    sentence = pooling.read_sentence(folder)
    inner = folder / sentence.transformer if sentence else folder
    values = read_json(inner / "config.json")
    config = Config(values, str(inner / "config.json"))
    kind = str(values.get("model_type", ""))
    try:
        model = _build(config, kind, inner, sentence, limits)
    except UnsupportedError:
        from edgetok.converters.sources import torch_export

        if torch_export.missing() or sentence:
            raise
        model = torch_export.export_folder(inner)
    files = _carried(folder, inner, sentence, limits)
    return Source(
        model=model,
        path=folder,
        kind="hf",
        name=_name(values, folder),
        sha256=_folder_hash(folder, inner, files),
        bytes=sum(f.stat().st_size for f in weight_files(inner)) + len(files["config.json"]),
        files=files,
        config=values,
        producer=model.producer_name or "",
    )


def _build(config: Config, kind: str, folder: Path, sentence: pooling.Sentence | None, limits: LoadLimits) -> ir.Model:
    builder = GraphBuilder(kind or "model")
    if kind in _TEXT:
        _text(builder, config, folder, sentence, limits)
    elif kind in _VISION:
        vision.build(builder, config, folder, limits)
    else:
        raise UnsupportedError(
            f"model type {kind or 'none'!r} is not built in; built in are {', '.join(supported_types())}",
            where=config.where,
            next=TORCH_HINT,
        )
    model = builder.model(producer="edgetok hf")
    model.metadata_props["edgetok.source"] = f"hf:{kind}"
    return model


def _text(g: GraphBuilder, config: Config, folder: Path, sentence: pooling.Sentence | None, limits: LoadLimits) -> None:
    prefixes, shape_of = _TEXT[str(config.values["model_type"])]
    shape = shape_of(config)
    config.finish()
    weights = Weights(folder, prefixes, limits)
    stream = text.build_encoder(g, config, weights, shape)
    if sentence:
        pooling.add_embedding(g, sentence, stream, shape.width)
        ignored: tuple[str, ...] = (*text.IGNORED_HEADS, "pooler.", "classifier.", "pre_classifier.")
    else:
        text.add_outputs(g, config, weights, shape, stream)
        ignored = text.IGNORED_HEADS
    weights.refuse_leftover(ignored)


def _carried(folder: Path, inner: Path, sentence: pooling.Sentence | None, limits: LoadLimits) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    wanted: list[tuple[str, Path]] = [(n, p / n) for p in (folder, inner) for n in (*CARRIED, *_LICENCES)]
    if sentence:
        wanted += [(n, folder / n) for n in sentence.files]
    for name, path in wanted:
        if path.is_file():
            limits.check("text_bytes", path.stat().st_size, "file size", where=str(path))
            files["LICENSE" if name in _LICENCES[:4] else name] = path.read_bytes()
    return files


def _folder_hash(folder: Path, inner: Path, files: dict[str, bytes]) -> str:
    """sha256 of the sorted "name sha256" lines of the files that were read."""
    lines = [f"{name} {hashlib.sha256(data).hexdigest()}" for name, data in files.items()]
    for path in weight_files(inner):
        with path.open("rb") as f:
            lines.append(f"{path.relative_to(folder).as_posix()} {hashlib.file_digest(f, 'sha256').hexdigest()}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _name(values: dict[str, object], folder: Path) -> str:
    origin = values.get("_name_or_path")
    plain = isinstance(origin, str) and 0 < len(origin) < 80 and origin.isprintable()
    return str(origin).rsplit("/", 1)[-1] if plain and origin not in (".", "./") else folder.name
