"""Flags that several verbs share, each defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgetok.errors import InputError


def _devices(incomplete: str) -> list[str]:
    from edgetok.devices import BACKENDS

    return ["auto", "cpu", *(name.replace("_", "-") for name in BACKENDS.names())]


Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document on stdout.")]
Verbose = Annotated[int, typer.Option("--verbose", "-v", count=True, help="More; -vv adds logs and traces.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors.")]
Device = Annotated[
    str,
    typer.Option("--device", "-d", help="Where to run: see `edgetok devices`.", autocompletion=_devices),
]
Threads = Annotated[int, typer.Option("--threads", "-t", min=0, help="0 means one per physical core.")]
NativeCode = Annotated[
    bool,
    typer.Option("--allow-native-code", help="Load libraries packed in the artifact (only if you trust who made it)."),
]
Shapes = Annotated[
    list[str] | None,
    typer.Option("--shape", metavar="NAME=1x3x224x224", help="Fix an input's shape; may be repeated."),
]
ModelFile = Annotated[Path | None, typer.Option("--model", "-m", help="The model, instead of the first argument.")]


def pick_source(argument: Path | None, model: Path | None, what: str) -> Path:
    """The one model named, as argument or as ``-m``.

    Raises:
        InputError: none or both were given, or it does not exist.
    """
    if argument is not None and model is not None and argument != model:
        raise InputError(f"two models given: {argument} and -m {model}", next="give one of them")
    source = model if model is not None else argument
    if source is None:
        raise InputError("no model given", next=what)
    if not source.exists():
        raise InputError("no such file or folder", where=str(source), next="check the path")
    return source


def parse_shapes(texts: list[str] | None) -> dict[str, tuple[int, ...]]:
    """``input=1x3x224x224`` to {"input": (1, 3, 224, 224)}; axes at least 1.

    Raises:
        InputError: not of that form, or a name twice.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts or ():
        name, equals, axes = text.rpartition("=")
        parts = axes.lower().split("x")
        if not (equals and name and all(p.isascii() and p.isdigit() and 0 < int(p) < 2**31 for p in parts)):
            raise InputError(f"--shape {text!r} is not NAME=AxBxC", next="--shape input=1x3x224x224")
        if name in shapes:
            raise InputError(f"--shape names {name!r} twice")
        shapes[name] = tuple(int(p) for p in parts)
    return shapes
