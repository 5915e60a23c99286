"""The recipe: everything that decides an artifact's bytes, as one small YAML file.

What a timed choice decided (the schedule found by trial, the layers kept in float) is written down here, so that
the recipe together with the same source and calibration data gives the same bytes on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from edgetok.errors import ArtifactError, InputError
from edgetok.manifest import load_yaml

FORMAT = 1


@dataclass(frozen=True)
class Recipe:
    """How an artifact was, or is to be, made.

    Args:
        reduce: method with settings, as ``tome:removed=0.3``; None for none.
        counts: tokens removed by each block, as found by trial or following from the settings.
        precision: keep, fp16, int8, int8-dynamic, int4.
        shapes: input name to shape; "batch" stays open.
        outputs: what ``--outputs`` said.
        cleanup: whether the graph was cleaned up first.
        preprocess: fields of ``Preprocess``, or None.
        calib: how many samples, and the sha256 over them.
        seed: of every random draw.
        target: onnx or tvm.
        triple: of the tvm target.
        allow_hazards: hazards the user insisted on.
    """

    reduce: str | None = None
    counts: list[int] | None = None
    precision: str = "keep"
    shapes: dict[str, list[int | str]] = field(default_factory=dict)
    outputs: str | None = None
    cleanup: bool = True
    preprocess: dict[str, Any] | None = None
    calib: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    target: str = "onnx"
    triple: str | None = None
    allow_hazards: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ``format`` first."""
        return {"format": FORMAT, **asdict(self)}


def recipe_from(values: Mapping[str, Any], *, where: str) -> Recipe:
    """Check and read a recipe's values.

    Raises:
        InputError: not a recipe, of a newer format, or with an unknown field.
    """
    values = dict(values)
    version = values.pop("format", None)
    if version != FORMAT:
        raise InputError(f"recipe format {version!r}; this edgetok reads {FORMAT}", where=where)
    unknown = sorted(set(values) - {f.name for f in fields(Recipe)})
    if unknown:
        raise InputError(f"unknown recipe field {unknown[0]!r}", where=where)
    import msgspec

    try:
        return msgspec.convert(values, Recipe)
    except msgspec.ValidationError as exc:
        raise InputError(f"a recipe field has the wrong type: {exc}", where=where) from exc


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file (YAML or JSON)."""
    try:
        values = load_yaml(path.read_bytes(), where=str(path))
    except FileNotFoundError as exc:
        raise InputError("no such recipe file", where=str(path)) from exc
    except IsADirectoryError as exc:
        raise InputError("a recipe is a file", where=str(path), next=f"--recipe {path / 'recipe.yaml'}") from exc
    except ArtifactError as exc:
        raise InputError(exc.message, where=str(path)) from exc
    if not isinstance(values, dict):
        raise InputError("a recipe is a mapping", where=str(path))
    return recipe_from(values, where=str(path))
