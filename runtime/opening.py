"""What a session reads from disk: an artifact, or an ONNX file with its neighbours, checked before it is used."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgetok.errors import InputError
from edgetok.limits import DEFAULT, LoadLimits

if TYPE_CHECKING:
    from edgetok.artifact import Artifact

PACKED_NAME = "model.packed.onnx"


@dataclass(frozen=True)
class ModelFiles:
    """What a session needs of a model on disk.

    Args:
        model: the graph, weights beside it.
        packed: path of the padding-free graph, None when there is none.
        read: bytes of a file that travels with the model, None when there is none.
        golden: inputs of a recorded run, None when none was recorded.
        close: frees what was opened.
        artifact: None for a plain ONNX file.
    """

    model: Path
    packed: Callable[[], Path | None]
    read: Callable[[str], bytes | None]
    golden: Callable[[], Mapping[str, np.ndarray] | None]
    close: Callable[[], None]
    artifact: Artifact | None


def open_model(path: Path, verify: bool, limits: LoadLimits) -> ModelFiles:
    """Open whatever ``path`` names.

    Raises:
        InputError: nothing there.
        ArtifactError, IntegrityError: a rule is broken, or a file was changed.
    """
    if path.suffix.lower() == ".onnx" and not path.is_dir():
        return _open_file(path, limits)
    if _is_weights_folder(path):
        return _open_weights(path, limits)
    from edgetok.artifact import Artifact

    artifact = Artifact.open(path, verify=verify, limits=limits)

    def golden() -> Mapping[str, np.ndarray] | None:
        cases = artifact.golden()
        return cases[0].inputs if cases else None

    return ModelFiles(
        model=artifact.model_path(),
        packed=lambda: artifact.model_path(PACKED_NAME) if PACKED_NAME in artifact.names() else None,
        read=lambda name: artifact.read(name) if name in artifact.names() else None,
        golden=golden,
        close=artifact.close,
        artifact=artifact,
    )


@contextmanager
def as_onnx(path: Path, limits: LoadLimits = DEFAULT) -> Iterator[Path]:
    """The path as it is, or for a Hugging Face folder an ONNX file of its unchanged graph, there inside the block."""
    if not _is_weights_folder(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="edgetok-") as folder:
        yield _write_graph(path, Path(folder) / "model.onnx", limits)


def _is_weights_folder(path: Path) -> bool:
    return path.is_dir() and not (path / "edgetok.json").is_file() and (path / "config.json").is_file()


def _write_graph(folder: Path, path: Path, limits: LoadLimits) -> Path:
    import onnx_ir as ir

    from edgetok.converters.sources.loader import load_source
    from edgetok.weights import proto_bytes

    path.write_bytes(proto_bytes(ir.serde.serialize_model(load_source(folder, limits).model)))
    return path


def _open_weights(path: Path, limits: LoadLimits) -> ModelFiles:
    """A Hugging Face folder: its graph is written anew into a temporary folder, which goes when the session closes."""
    folder = tempfile.TemporaryDirectory(prefix="edgetok-")
    try:
        model = _write_graph(path, Path(folder.name) / "model.onnx", limits)
    except BaseException:
        folder.cleanup()
        raise
    return ModelFiles(model, lambda: None, _reader(path, limits), lambda: None, folder.cleanup, None)


def _reader(folder: Path, limits: LoadLimits) -> Callable[[str], bytes | None]:
    def read(name: str) -> bytes | None:
        file = folder / name
        if not file.is_file():
            return None
        limits.check("text_bytes", file.stat().st_size, "file size", where=str(file))
        return file.read_bytes()

    return read


def _open_file(path: Path, limits: LoadLimits) -> ModelFiles:
    """A plain ONNX file has no hashes to leave unchecked: its structure is always held against the rules."""
    if not path.is_file():
        raise InputError("no such file", where=str(path), next="check the path")
    beside = path.with_name(path.stem + ".packed.onnx")
    _check_file(path, limits)

    def packed() -> Path | None:
        if not beside.is_file():
            return None
        _check_file(beside, limits)
        return beside

    return ModelFiles(path, packed, _reader(path.parent, limits), lambda: None, lambda: None, None)


def _check_file(path: Path, limits: LoadLimits) -> None:
    """Hold an ONNX file against the rules, its external data inside its folder.

    Raises:
        ArtifactError: a rule is broken.
    """
    from edgetok.onnx_rules import parse_onnx
    from edgetok.onnx_tensors import check_extents
    from edgetok.paths import open_beneath, opened_folder

    where = path.name
    limits.check("model_bytes", path.stat().st_size, "size of the file in bytes", where=where)
    _, checked = parse_onnx(path.read_bytes(), limits, where=where, schemas=False)
    sizes = {}
    with opened_folder(path.resolve().parent) as folder:
        for name in sorted({e.location for e in checked.external}):
            fd, sizes[name] = open_beneath(folder, name, limits, where=where)
            os.close(fd)
    check_extents(checked.external, sizes, where=where)
