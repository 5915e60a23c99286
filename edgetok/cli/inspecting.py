"""What ``inspect`` finds in a file, as plain values; runs in a child process (``edgetok.cli.child``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetok.cli.output import plain

if TYPE_CHECKING:
    from edgetok.converters.graph.gains import MethodRow


def inspect_file(path: str, shapes: Mapping[str, Sequence[int]] | None = None) -> dict[str, Any]:
    """Load a model or artifact without running it and say what is in it.

    Args:
        path: ``.onnx`` file, Hugging Face folder, or artifact.
        shapes: sizes for open axes, by input name.

    Raises:
        EdgeTokError: as the loader.
    """
    from edgetok.benching import is_artifact
    from edgetok.converters.graph.find import find_blocks
    from edgetok.converters.graph.summary import summarize
    from edgetok.converters.sources.loader import load_source

    file = Path(path)
    source = load_source(file)
    summary = summarize(source.model, find_blocks(source.model), shapes=shapes)
    found = {
        "path": path,
        "kind": source.kind,
        "name": source.name,
        "sha256": source.sha256,
        "bytes": source.bytes,
        **summary.to_json(),
        "methods": [_method(m, summary.tokens_per_layer) for m in summary.methods],
        "refused": [dict(zip(("name", "reason", "sentence"), r, strict=True)) for r in summary.refused],
        "manifest": _manifest(file) if is_artifact(file) else None,
    }
    return {str(k): plain(v) for k, v in found.items()}


def _method(row: MethodRow, tokens: tuple[int, ...]) -> dict[str, Any]:
    """A method's estimate, with the tokens entering each block's MLP."""
    from edgetok.converters.reduce import METHODS

    left, entering = tokens[0] if tokens else 0, []
    for count in row.counts:
        entering.append(left - count)
        # A method around a module puts the rows back after it.
        left = left if METHODS.get(row.name).where == "module" else left - count
    return {**asdict(row), "tokens_per_layer": entering}


def _manifest(path: Path) -> dict[str, Any]:
    import msgspec

    from edgetok.artifact import Artifact

    with Artifact.open(path) as artifact:
        fields: dict[str, Any] = msgspec.to_builtins(artifact.manifest)
        return {**fields, "measured_values": artifact.measured(), "golden_cases": len(artifact.golden())}
