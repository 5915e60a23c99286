"""``edgetok run``: feed a model or artifact once and keep what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetok.cli import output
from edgetok.cli.options import (
    Device,
    Json,
    ModelFile,
    NativeCode,
    Quiet,
    Shapes,
    Threads,
    Verbose,
    parse_shapes,
    pick_source,
)
from edgetok.errors import ArtifactError, InputError

if TYPE_CHECKING:
    import numpy as np

    from edgetok.feeds import Spec
    from edgetok.preprocess import Preprocess
    from edgetok.runtime.session import Session

_IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm"})


def run(
    target: Annotated[
        Path | None, typer.Argument(metavar="ARTIFACT|MODEL", help="Artifact, .onnx file or Hugging Face folder.")
    ] = None,
    model: ModelFile = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", "-i", metavar="[NAME=]FILE", help="A .npy, .npz or image file; may be repeated."),
    ] = None,
    text: Annotated[list[str] | None, typer.Option("--text", help="A sentence; may be repeated for a batch.")] = None,
    random: Annotated[bool, typer.Option("--random", help="Random inputs instead.")] = False,
    destination: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write all outputs to this .npz (or the only one to a .npy).")
    ] = None,
    outputs: Annotated[str | None, typer.Option("--outputs", metavar="NAME,..", help="Only these outputs.")] = None,
    preprocess: Annotated[
        str | None,
        typer.Option(
            "--preprocess", metavar="imagenet-224|clip-224|FILE", help="For images. Default: what the artifact records."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output file.")] = False,
    device: Device = "auto",
    threads: Threads = 0,
    shape: Shapes = None,
    seed: Annotated[int, typer.Option("--seed", help="Of random inputs.")] = 0,
    allow_native_code: NativeCode = False,
    json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Run a model once and print what comes out."""
    out = output.setup(json, verbose, quiet)
    path = pick_source(target, model, "edgetok run ARTIFACT --random")
    ways = [bool(inputs), bool(text), random]
    if sum(ways) != 1:
        raise InputError(
            "one kind of input is needed: --input, --text or --random", next="edgetok run ARTIFACT --input x.npy"
        )
    if destination is not None:
        _check_destination(destination, force)
    import time

    from edgetok.runtime.session import load

    with load(path, device=device, threads=threads, allow_native_code=allow_native_code) as session:
        specs = tuple(session.inputs)
        if random:
            from edgetok.benching import target_feeds

            feeds = target_feeds(path, specs, batch=1, shapes=parse_shapes(shape), seed=seed, golden=False)
        elif text:
            feeds = _text_feeds(session, path, text)
        else:
            feeds = _file_feeds(path, specs, inputs or [], preprocess)
        names = [n.strip() for n in outputs.split(",") if n.strip()] if outputs else None
        before = time.perf_counter()
        found = session.run(feeds, names)
        elapsed_ms = (time.perf_counter() - before) * 1000
        where = str(getattr(session, "device", device)).replace("_", "-")
    rows = [describe(name, array) for name, array in found.items()]
    if not out.quiet:
        out.table(
            ["output", "dtype", "shape", "min", "mean", "max"],
            [
                (
                    r["name"],
                    r["dtype"],
                    "x".join(map(str, r["shape"])),
                    *(_number(r[k]) for k in ("min", "mean", "max")),
                )
                for r in rows
            ],
            right=[3, 4, 5],
        )
    if destination is not None:
        _write(destination, found)
        out.line("wrote", str(destination))
    out.emit({"device": where, "ms": elapsed_ms, "outputs": rows, "file": destination})


def describe(name: str, array: np.ndarray) -> dict[str, Any]:
    """Name, dtype, shape and the range of an array (None where it has no numbers)."""
    import numpy as np

    row: dict[str, Any] = {"name": name, "dtype": str(array.dtype), "shape": list(array.shape)}
    if array.size and array.dtype.kind in "fiub":
        wide = array.astype(np.float64)
        return row | {"min": float(wide.min()), "mean": float(wide.mean()), "max": float(wide.max())}
    return row | {"min": None, "mean": None, "max": None}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def _check_destination(path: Path, force: bool) -> None:
    if path.suffix not in (".npz", ".npy"):
        raise InputError("outputs are written as .npz or .npy", where=str(path), next="--output y.npz")
    if path.exists() and not force:
        raise InputError("the output exists", where=str(path), next="add --force, or name another file")
    if not path.parent.is_dir():
        raise InputError("the folder of the output does not exist", where=str(path.parent), next="make it first")


def _write(path: Path, found: dict[str, np.ndarray]) -> None:
    """Write through a temporary name, so that nothing half written stays."""
    import os

    import numpy as np

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            if path.suffix == ".npz":
                np.savez(stream, **found)  # type: ignore[arg-type]
            elif len(found) == 1:
                np.save(stream, next(iter(found.values())), allow_pickle=False)
            else:
                raise InputError(f"a .npy holds one output, the model has {len(found)}", next="--output y.npz")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _text_feeds(session: Session, path: Path, text: list[str]) -> dict[str, np.ndarray]:
    try:
        tokenizer = session.tokenizer()
    except InputError as exc:
        raise InputError(exc.message, where=str(path), next="give token ids: --input") from exc
    return tokenizer.pad_batch(tokenizer.encode(text), session.inputs)


def companion(path: Path, name: str) -> bytes | None:
    """A file that travels with a model: inside an artifact, or beside the model in its folder."""
    from edgetok.benching import is_artifact

    if is_artifact(path):
        from edgetok.artifact import Artifact

        with Artifact.open(path) as artifact:
            return artifact.read(name) if name in artifact.names() else None
    beside = (path if path.is_dir() else path.parent) / name
    return beside.read_bytes() if beside.is_file() and beside.stat().st_size < 1 << 28 else None


def _file_feeds(path: Path, specs: tuple[Spec, ...], texts: list[str], preprocess: str | None) -> dict[str, np.ndarray]:
    feeds: dict[str, np.ndarray] = {}
    names = [s.name for s in specs]
    for text in texts:
        name, equals, file = text.rpartition("=")
        if equals and name not in names and Path(text).is_file():
            name, file = "", text
        given = Path(file)
        if not given.is_file():
            raise InputError("no such input file", where=file, next="check the path given to --input")
        for key, array in _read(given, path, preprocess).items():
            target = name or key or next((n for n in names if n not in feeds), "")
            if target not in names:
                raise InputError(f"the model has no input {target!r}", next=f"inputs: {', '.join(names)}")
            dtype = next(s.dtype for s in specs if s.name == target)
            feeds[target] = array.astype(dtype, casting="same_kind") if _safe(array, dtype) else array
    return feeds


def _safe(array: np.ndarray, dtype: str) -> bool:
    """Whether turning the array into the input's dtype keeps its kind (float64 to float32, int32 to int64)."""
    import numpy as np

    try:
        return array.dtype != np.dtype(dtype) and np.can_cast(array.dtype, np.dtype(dtype), "same_kind")
    except TypeError:
        return False


def _read(file: Path, model: Path, preprocess: str | None) -> dict[str, np.ndarray]:
    import numpy as np

    suffix = file.suffix.lower()
    try:
        if suffix == ".npy":
            return {"": np.load(file, allow_pickle=False)}
        if suffix == ".npz":
            with np.load(file, allow_pickle=False) as data:
                return {n: data[n] for n in data.files}
    except (ValueError, OSError, EOFError) as exc:
        raise ArtifactError(f"not a readable {suffix}: {exc}", where=str(file)) from exc
    if suffix not in _IMAGES:
        raise InputError("inputs are .npy, .npz or image files", where=str(file))
    from PIL import Image, UnidentifiedImageError

    how = _preprocess(model, preprocess)
    try:
        with Image.open(file) as image:
            return {"": how.apply(image)[None]}
    except (UnidentifiedImageError, OSError, ValueError) as exc:
        raise ArtifactError(f"not a readable image: {exc}", where=str(file)) from exc


def _preprocess(model: Path, given: str | None) -> Preprocess:
    from edgetok.benching import is_artifact
    from edgetok.preprocess import load_preprocess

    if given is not None:
        return load_preprocess(given)
    if is_artifact(model):
        from edgetok.artifact import Artifact

        with Artifact.open(model) as artifact:
            if artifact.manifest.preprocess is not None:
                return load_preprocess(artifact.manifest.preprocess)
    raise InputError(
        "images need a preprocessing, and none is recorded (it is never guessed)", next="add --preprocess imagenet-224"
    )
