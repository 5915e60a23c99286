"""A loaded source: the graph and what travels beside it."""

from __future__ import annotations

import builtins
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir


@dataclass(eq=False)
class Source:
    """A model as it came.

    Args:
        model: the graph; initializers may be memory-mapped.
        path: what the user named.
        kind: "onnx", "hf", "artifact".
        name: a short name for reports, as "ViT-S/14" or the file's stem.
        sha256: of the source: a file's own hash, or of the sorted (name, sha256) lines of a folder.
        bytes: size of the source's weights and graph on disk.
        files: other files to carry into the artifact, by artifact name (tokenizer.json, LICENSE, ...).
        config: parsed config.json of a Hugging Face folder.
        producer: producer_name and version from the model.
    """

    model: ir.Model
    path: Path
    kind: str
    name: str
    sha256: str
    bytes: int
    files: dict[str, builtins.bytes] = field(default_factory=dict)
    config: dict[str, object] = field(default_factory=dict)
    producer: str = ""
