"""The artifact: plain ONNX with a manifest, golden inputs and outputs, and the licence of where it came from.

A folder, or the same packed as one ``.edgetok`` file. Same content, same bytes; written whole or not at all; and
nothing that could not be opened is ever published.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgetok.archive import write_archive
from edgetok.atomic import disk_errors, recover, staging, temporary
from edgetok.errors import ArtifactError, EdgeTokError, InputError
from edgetok.limits import DEFAULT
from edgetok.manifest import (
    MANIFEST_NAME,
    MEASURED_NAME,
    Accuracy,
    FileEntry,
    LayerTokens,
    Manifest,
    PrecisionGroup,
    SourceInfo,
    TensorInfo,
    decode_manifest,
    dump_yaml,
    encode_manifest,
)
from edgetok.npz import write_npz
from edgetok.paths import create_beneath, opened_folder, split_relative, write_all, write_beneath
from edgetok.reading import (
    GOLDEN_NAME,
    MODEL_NAME,
    RECIPE_NAME,
    SUFFIX,
    UNLISTED,
    Artifact,
    GoldenCase,
    interface,
)
from edgetok.store import open_store
from edgetok.structure import StructureReport, verify_artifact
from edgetok.weights import DATA_NAME, EXTERNAL_FROM_BYTES, serialize

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = [
    "Accuracy",
    "Artifact",
    "ArtifactContent",
    "GoldenCase",
    "LayerTokens",
    "Manifest",
    "PrecisionGroup",
    "SourceInfo",
    "StructureReport",
    "TensorInfo",
    "check_output",
    "installed_tools",
    "pack",
    "unpack",
    "verify_artifact",
    "write_artifact",
]
_OWN = frozenset({*UNLISTED, RECIPE_NAME, GOLDEN_NAME, DATA_NAME})


@dataclass(frozen=True)
class ArtifactContent:
    """What to write.

    Args:
        model: the graph; bytes are written as they are.
        source: where it came from.
        recipe: settings that make it again; also written as recipe.yaml.
        golden: runs of the source model.
        tokens, precision, preprocess, agreement, accuracy: for the manifest; precision is read off the graph when None.
        measured: times, memory, machine: measured.json, outside the content hash.
        files: other files by relative name: tokenizer.json, LICENSE, targets/tvm/<triple>/lib.so.
        extra_models: further graphs by file name, as model.packed.onnx; they share the weights.
        tools: names and versions; the installed ones when None.
        external_from_bytes: weights below this stay in model.onnx.
    """

    model: ir.Model | onnx.ModelProto | bytes
    source: SourceInfo
    recipe: Mapping[str, Any] = field(default_factory=dict)
    golden: Sequence[GoldenCase] = ()
    tokens: Sequence[LayerTokens] = ()
    precision: Sequence[PrecisionGroup] | None = None
    preprocess: Mapping[str, Any] | None = None
    agreement: Mapping[str, float] = field(default_factory=dict)
    accuracy: Sequence[Accuracy] = ()
    measured: Mapping[str, Any] | None = None
    files: Mapping[str, bytes | memoryview] = field(default_factory=dict)
    extra_models: Mapping[str, ir.Model] = field(default_factory=dict)
    tools: Mapping[str, str] | None = None
    external_from_bytes: int = EXTERNAL_FROM_BYTES


def write_artifact(path: Path | str, content: ArtifactContent, *, force: bool = False) -> Artifact:
    """Write an artifact and open it.

    Args:
        path: a folder, or a single file when it ends in ``.edgetok``.
        content: what to write.
        force: replace an existing artifact; anything else that is there is never touched.

    Raises:
        InputError: the output exists, or what is there is not an artifact; a name or value cannot be written.
        ArtifactError: the model breaks a rule for ONNX files, so that nobody could open the artifact.
        ResourceError: out of disk or memory.
    """
    target = Path(path).resolve()
    packed = target.suffix == SUFFIX
    check_output(target, force=force)
    with disk_errors():
        if not packed:
            with staging(target, folder=True, replace=force) as temp:
                _fill(temp, content)
        else:
            with staging(target, folder=False, replace=force) as temp, temporary(target, folder=True) as folder:
                _fill(folder, content)
                _pack_into(folder, temp)
    return Artifact.open(path)


def check_output(path: Path | str, *, force: bool = False) -> None:
    """Say before any work whether :func:`write_artifact` would accept the output.

    Raises:
        InputError: it exists without ``force``, or is something other than an artifact.
    """
    target = Path(path).resolve()
    recover(target)
    if not os.path.lexists(target):
        return
    if not force:
        raise InputError("the output exists already", where=str(path), next="add --force, or name another output")
    if target.is_dir() != (target.suffix != SUFFIX):
        raise InputError(
            "the output exists and is not of the form asked for", where=str(path), next="name another output"
        )
    if target.is_dir() and os.listdir(target):
        _check_replaceable(target, path)


def _check_replaceable(target: Path, shown: Path | str) -> None:
    """A folder may only be replaced when everything in it is the artifact's own."""
    advice = "move them elsewhere, or name another output"
    try:
        with opened_folder(target) as fd:
            del fd
        store = open_store(target, DEFAULT)
        try:
            names = set(store.names())
            manifest = decode_manifest(bytes(store.map(MANIFEST_NAME)), where=MANIFEST_NAME)
        finally:
            store.close()
    except EdgeTokError as exc:
        raise InputError(
            f"the output exists and is not an artifact ({exc.message})", where=str(shown), next="name another output"
        ) from exc
    foreign = sorted(names - {e.name for e in manifest.files} - UNLISTED)
    if foreign:
        raise InputError(
            f"the output holds files that are not the artifact's: {', '.join(foreign[:5])}",
            where=str(shown),
            next=advice,
        )


def pack(folder: Path | str, target: Path | str, *, force: bool = False) -> Artifact:
    """Pack an artifact folder into one ``.edgetok`` file, checked first.

    Raises:
        InputError: the target exists or does not end in ``.edgetok``; others as :meth:`Artifact.open`.
    """
    if Path(target).suffix != SUFFIX:
        raise InputError(f"a packed artifact's name ends in {SUFFIX}", where=str(target))
    return _copy(folder, target, force)


def unpack(file: Path | str, target: Path | str, *, force: bool = False) -> Artifact:
    """Unpack an ``.edgetok`` file into a folder, checked first; raises as :func:`pack`."""
    if Path(target).suffix == SUFFIX:
        raise InputError(f"an artifact folder's name must not end in {SUFFIX}", where=str(target))
    return _copy(file, target, force)


def _copy(origin: Path | str, path: Path | str, force: bool) -> Artifact:
    check_output(path, force=force)
    target = Path(path).resolve()
    with Artifact.open(origin) as artifact, disk_errors():
        names = [n for n in (*artifact.names(), *sorted(UNLISTED)) if n in artifact._store.names()]
        views = {name: artifact._store.map(name) for name in names}
        if target.suffix == SUFFIX:
            with staging(target, folder=False, replace=force) as temp, temp.open("wb") as stream:
                write_archive(stream, {name: views[name] for name in _member_order(views)})
        else:
            with staging(target, folder=True, replace=force) as temp, opened_folder(temp) as fd:
                for name, view in views.items():
                    write_beneath(fd, name, view)
    return Artifact.open(path)


def installed_tools() -> dict[str, str]:
    """Versions of the packages that decide what the bytes are."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("edgetok", "numpy", "onnx", "onnx-ir", "onnxruntime"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class _Writer:
    """Writes files into an empty folder and remembers what to list."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.listed: list[FileEntry] = []

    def put(self, name: str, data: bytes | memoryview) -> None:
        write_beneath(self.fd, name, data)
        self.listed.append(FileEntry(name=name, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data)))

    @contextlib.contextmanager
    def stream(self, name: str) -> Iterator[Callable[[bytes | memoryview], None]]:
        """A file written in pieces; not created when nothing is written."""
        digest, size, fd = hashlib.sha256(), 0, -1

        def write(data: bytes | memoryview) -> None:
            nonlocal fd, size
            if fd < 0:
                fd = create_beneath(self.fd, name, where=name)
            write_all(fd, data)
            digest.update(data)
            size += len(data)

        try:
            yield write
        finally:
            if fd >= 0:
                os.close(fd)
        if fd >= 0:
            self.listed.append(FileEntry(name=name, sha256=digest.hexdigest(), bytes=size))


def _fill(folder: Path, content: ArtifactContent) -> None:
    """Write all files of an artifact into an empty folder and check that they can be opened."""
    with opened_folder(folder) as fd:
        writer = _Writer(fd)
        graphs = _write_models(writer, content)
        for name, data in sorted(content.files.items()):
            if name in graphs or name in _OWN:
                raise InputError(f"file name {name!r} is taken by the artifact itself")
            _check_name(name)
            writer.put(name, data)
        writer.put(RECIPE_NAME, dump_yaml(content.recipe))
        if content.golden:
            writer.put(GOLDEN_NAME, _golden_bytes(content.golden))
        manifest = _manifest(content, graphs[MODEL_NAME], sorted(writer.listed, key=lambda e: e.name))
        data = encode_manifest(manifest)
        write_beneath(fd, MANIFEST_NAME, data)
        if content.measured is not None:
            write_beneath(fd, MEASURED_NAME, json_bytes(content.measured))
    store = open_store(folder, DEFAULT)
    try:
        artifact = Artifact(folder, store, decode_manifest(data, where=MANIFEST_NAME), DEFAULT)
        artifact.check_listing()
        for name in graphs:
            artifact.check_model(name)
    finally:
        store.close()


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Plain values as indented JSON.

    Raises:
        InputError: a value of no plain type.
    """
    try:
        return msgspec.json.format(msgspec.json.encode(dict(value)), indent=2) + b"\n"
    except (TypeError, msgspec.MsgspecError) as exc:
        raise InputError(f"cannot be written as JSON: {exc}") from exc


def _check_name(name: str) -> None:
    try:
        if "/".join(split_relative(name)) == name:
            return
    except ArtifactError as exc:
        raise InputError(exc.message) from exc
    raise InputError(f"file name {name!r} is not in its plain form")


def _write_models(writer: _Writer, content: ArtifactContent) -> dict[str, bytes]:
    """Write the graphs and their shared weights; returns the graphs as written."""
    import onnx_ir as ir

    for name in content.extra_models:
        if not name.endswith(".onnx") or name == MODEL_NAME or "/" in name:
            raise InputError(f"a further graph needs a plain name ending in .onnx, not {name!r}")
    if isinstance(content.model, bytes):
        if content.extra_models:
            raise InputError("a graph given as bytes cannot share its weights with further graphs")
        graphs = {MODEL_NAME: content.model}
    else:
        main = content.model if isinstance(content.model, ir.Model) else ir.serde.deserialize_model(content.model)
        with writer.stream(DATA_NAME) as write:
            graphs, _ = serialize(
                {MODEL_NAME: main, **content.extra_models}, write, external_from_bytes=content.external_from_bytes
            )
    for name, data in graphs.items():
        writer.put(name, data)
    return graphs


def _manifest(content: ArtifactContent, graph: bytes, files: list[FileEntry]) -> Manifest:
    import onnx

    model = onnx.ModelProto()
    model.ParseFromString(graph)
    inputs, outputs = interface(model)
    return Manifest(
        source=content.source,
        recipe=msgspec.to_builtins(dict(content.recipe)),
        tools=dict(sorted((installed_tools() if content.tools is None else content.tools).items())),
        inputs=inputs,
        outputs=outputs,
        tokens=list(content.tokens),
        precision=_precision(model) if content.precision is None else list(content.precision),
        preprocess=None if content.preprocess is None else dict(content.preprocess),
        agreement=dict(content.agreement),
        accuracy=list(content.accuracy),
        files=files,
        measured=None if content.measured is None else MEASURED_NAME,
    )


def _precision(model: onnx.ModelProto) -> list[PrecisionGroup]:
    """Initializers by dtype."""
    import onnx

    from edgetok.onnx_tensors import BITS

    tensors: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        dtype = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
        elements = 1
        for dim in tensor.dims:
            elements *= dim
        tensors[dtype] += 1
        size[dtype] += (elements * BITS.get(tensor.data_type, 0) + 7) // 8
    return [PrecisionGroup(group="initializers", dtype=d, tensors=tensors[d], bytes=size[d]) for d in sorted(tensors)]


def _golden_bytes(cases: Sequence[GoldenCase]) -> bytes:
    arrays = {}
    for index, case in enumerate(cases):
        for side, values in (("in", case.inputs), ("out", case.outputs)):
            arrays.update({f"{index}/{side}/{name}": values[name] for name in sorted(values)})
    return write_npz(arrays)


def _member_order(names: Mapping[str, object]) -> list[str]:
    """The manifest first, so that it can be read from the start of a stream; the rest sorted."""
    return sorted(names, key=lambda name: (name != MANIFEST_NAME, name))


def _pack_into(folder: Path, file: Path) -> None:
    store = open_store(folder, DEFAULT)
    try:
        with file.open("wb") as stream:
            write_archive(stream, {name: store.map(name) for name in _member_order(store.names())})
    finally:
        store.close()
