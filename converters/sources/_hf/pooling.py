"""sentence-transformers folders: from the last hidden state to one embedding per text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgetok.converters.graph.builder import GraphBuilder
from edgetok.converters.sources._hf.config import read_json
from edgetok.converters.sources._hf.text import TextStream
from edgetok.errors import ArtifactError, UnsupportedError

_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
}


@dataclass(frozen=True)
class Sentence:
    """What modules.json asks for.

    Args:
        transformer: sub-folder of the encoder, "" for the folder itself.
        modes: of "cls", "mean", "max"; several are concatenated.
        normalize: divide by the Euclidean length.
        files: the JSON files read, relative to the folder.
    """

    transformer: str
    modes: tuple[str, ...]
    normalize: bool
    files: tuple[str, ...]


def read_sentence(folder: Path) -> Sentence | None:
    """Read modules.json; None when the folder has none.

    Raises:
        UnsupportedError: a module or pooling mode that is not built in.
        ArtifactError: malformed.
    """
    if not (folder / "modules.json").is_file():
        return None
    transformer, normalize, files = "", False, ["modules.json"]
    modes: tuple[str, ...] = ()
    for module in read_json(folder / "modules.json", list):
        path, kind = _module(folder, module)
        if kind == "Transformer":
            transformer = path
        elif kind == "Pooling":
            modes = _pooling(read_json(folder / path / "config.json"), folder / path / "config.json")
            files.append(f"{path}/config.json")
        elif kind == "Normalize":
            normalize = True
        else:
            raise UnsupportedError(
                f"module {kind!r} is not built in (Transformer, Pooling and Normalize are)",
                where=str(folder / "modules.json"),
                next="convert the encoder alone: point at a copy of the folder without modules.json",
            )
    return Sentence(transformer, modes, normalize, tuple(files)) if modes else None


def _module(folder: Path, module: Any) -> tuple[str, str]:
    where = str(folder / "modules.json")
    if not isinstance(module, dict) or not all(isinstance(module.get(k), str) for k in ("path", "type")):
        raise ArtifactError("each module needs a path and a type", where=where)
    path, kind = module["path"], module["type"].rsplit(".", 1)[-1]
    if path and (Path(path).name != path or path in (".", "..")):
        raise ArtifactError(f"module path {path!r} is not a plain folder name", where=where)
    return path, kind


def _pooling(values: dict[str, Any], path: Path) -> tuple[str, ...]:
    on = [k for k, v in values.items() if k.startswith("pooling_mode_") and v is True]
    named = values.get("pooling_mode")
    if isinstance(named, str):
        modes: tuple[str, ...] = (named,)
        on = [] if named in _MODES.values() else [named]
    else:
        modes = tuple(mode for key, mode in _MODES.items() if key in on)
        on = [k for k in on if k not in _MODES]
    if on or not modes:
        raise UnsupportedError(f"pooling mode {on[0] if on else 'none'!r} is not built in", where=str(path))
    return modes


def add_embedding(g: GraphBuilder, sentence: Sentence, stream: TextStream, width: int) -> None:
    """Outputs ``last_hidden_state`` [B,N,D] and ``sentence_embedding`` [B, D * modes]."""
    g.output("last_hidden_state", stream.hidden, ("batch", "sequence", width))
    with g.scope("pooling"):
        parts = [_pool(g, mode, stream) for mode in sentence.modes]
        x = parts[0] if len(parts) == 1 else g.op("Concat", *parts, axis=-1)
        if sentence.normalize:
            square = g.op("ReduceSum", g.op("Mul", x, x), g.const([-1], np.int64), keepdims=1)
            x = g.op("Div", x, g.op("Max", g.op("Sqrt", square), g.const(1e-12)))
        g.output("sentence_embedding", x, ("batch", width * len(parts)))


def _pool(g: GraphBuilder, mode: str, stream: TextStream) -> ir.Value:
    if mode == "cls":
        return g.row(stream.hidden, 0)
    keep = g.op("Cast", stream.attention_mask, to=int(ir.DataType.FLOAT))
    keep = g.op("Unsqueeze", keep, g.const([2], np.int64))
    rows = g.const([1], np.int64)
    if mode == "max":
        lowered = g.op("Mul", g.op("Sub", g.const(1.0), keep), g.const(-1e9))
        return g.op("ReduceMax", g.op("Add", stream.hidden, lowered), rows, keepdims=0)
    total = g.op("ReduceSum", g.op("Mul", stream.hidden, keep), rows, keepdims=0)
    count = g.op("Max", g.op("ReduceSum", keep, rows, keepdims=0), g.const(1e-9))
    return g.op("Div", total, count)
