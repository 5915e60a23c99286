"""An artifact opened for reading: hashes, limits and structure are checked before anything in it is used."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from edgetok.atomic import disk_errors, recover, staging
from edgetok.errors import ArtifactError, InputError, IntegrityError
from edgetok.limits import DEFAULT, LoadLimits, effective
from edgetok.manifest import (
    MANIFEST_NAME,
    MEASURED_NAME,
    FileEntry,
    Manifest,
    TensorInfo,
    decode_manifest,
    load_json,
    load_yaml,
)
from edgetok.npz import read_npz
from edgetok.paths import cache_dir, opened_folder, write_beneath
from edgetok.store import Store, open_store
from edgetok.weights import proto_bytes

if TYPE_CHECKING:
    import onnx

    from edgetok.onnx_rules import Checked

MODEL_NAME = "model.onnx"
RECIPE_NAME = "recipe.yaml"
GOLDEN_NAME = "golden.npz"
SUFFIX = ".edgetok"
SIGNATURE_NAME = "model.sig"  # OpenSSF model signing puts it beside the files it signs
UNLISTED = frozenset({MANIFEST_NAME, MEASURED_NAME, SIGNATURE_NAME})  # files the manifest does not list
_AGAIN = "convert again, or fetch the artifact again"
_log = logging.getLogger("edgetok")


@dataclass(frozen=True)
class GoldenCase:
    """One run of the source model: feeds by input name, and the answers by output name."""

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]


class Artifact:
    """An opened artifact; use :meth:`open`, and close it or use ``with``.

    Attributes:
        path: as opened.
        manifest: of :mod:`edgetok.manifest`.
        sha256: the content hash.
        limits: it was opened under.
    """

    def __init__(self, path: Path, store: Store, manifest: Manifest, limits: LoadLimits) -> None:
        self.path, self.manifest, self.limits = path, manifest, limits
        self.sha256 = manifest.content_sha256
        self._store = store
        self._verified = True
        self._checked: set[str] = set()

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True, limits: LoadLimits = DEFAULT) -> Artifact:
        """Open a folder or an ``.edgetok`` file.

        Args:
            path: either form.
            verify: check every file's sha256; off, sizes and structure are still checked, and a warning is logged
                every time its graph is handed out.
            limits: lowered further by ``EDGETOK_LIMITS``.

        Raises:
            InputError: nothing there.
            ArtifactError: not an artifact, damaged, over a limit, or holding files the manifest does not list.
            IntegrityError: a file does not match its hash; names the file.
            UnsupportedError: written in another major format version.
        """
        path, limits = Path(path), effective(limits)
        if not path.exists():
            recover(path.resolve())
        store = open_store(path, limits)
        try:
            if MANIFEST_NAME not in store.names():
                raise ArtifactError(f"not an artifact: {MANIFEST_NAME} is missing", where=str(path), next=_AGAIN)
            limits.check("manifest_bytes", store.names()[MANIFEST_NAME], "size of the manifest", where=path.name)
            manifest = decode_manifest(bytes(store.map(MANIFEST_NAME)), limits, where=f"{path.name}/{MANIFEST_NAME}")
            artifact = cls(path, store, manifest, limits)
            artifact.check_listing()
            artifact._verified = verify
            if verify:
                for entry in manifest.files:
                    artifact._check_hash(entry)
        except BaseException:
            store.close()
            raise
        return artifact

    def check_listing(self) -> None:
        """Hold the files present, by name and size, against the manifest's list; raises as :meth:`open`."""
        present = self._store.names()
        listed = {entry.name: entry.bytes for entry in self.manifest.files}
        allowed = UNLISTED if self.manifest.measured else UNLISTED - {MEASURED_NAME}
        for name in present:
            if name not in listed and name not in allowed:
                raise ArtifactError(
                    f"file {name[:80]!r} is not listed in the manifest", where=self.path.name, next="move it elsewhere"
                )
        for name, size in listed.items():
            if name not in present:
                raise ArtifactError(f"file {name[:80]!r} is missing", where=self.path.name, next=_AGAIN)
            if present[name] != size:
                raise IntegrityError(
                    f"file {name[:80]!r} has {present[name]:,} bytes, the manifest says {size:,}",
                    where=self.path.name,
                    next=_AGAIN,
                )
        if MODEL_NAME not in listed:
            raise ArtifactError(f"the manifest lists no {MODEL_NAME}", where=self.path.name, next=_AGAIN)

    def _check_hash(self, entry: FileEntry) -> None:
        found = hashlib.sha256(self._store.map(entry.name)).hexdigest()
        if found != entry.sha256:
            raise IntegrityError(
                f"file {entry.name!r} was changed: its sha256 is {found[:12]}..., "
                f"the manifest says {entry.sha256[:12]}...",
                where=self.path.name,
                next=_AGAIN,
            )

    def names(self) -> tuple[str, ...]:
        """Files the manifest lists."""
        return tuple(entry.name for entry in self.manifest.files)

    def map(self, name: str) -> memoryview:
        """Read-only view of a file's bytes, mapped and aligned to 64 bytes.

        Raises:
            InputError: the artifact has no such file.
        """
        if name not in self._store.names():
            raise InputError(
                f"the artifact has no file {name!r}; it has {', '.join(self.names())}", where=str(self.path)
            )
        return self._store.map(name)

    def read(self, name: str) -> bytes:
        """A file's bytes; raises as :meth:`map`."""
        return bytes(self.map(name))

    def check_model(self, name: str = MODEL_NAME, *, schemas: bool = False) -> Checked:
        """Hold a graph of the artifact against the rules for ONNX files, its weights inside the listed files.

        Raises:
            ArtifactError, UnsupportedError: a rule is broken.
        """
        from edgetok.onnx_rules import parse_onnx
        from edgetok.onnx_tensors import check_extents

        where = f"{self.path.name}/{name}"
        model, checked = parse_onnx(self.read(name), self.limits, where=where, schemas=schemas)
        sizes = {entry.name: entry.bytes for entry in self.manifest.files}
        for extent in checked.external:
            if extent.location not in sizes:
                raise ArtifactError(f"external data {extent.location[:80]!r} is not in the artifact", where=where)
        check_extents(checked.external, sizes, where=where)
        if name == MODEL_NAME and interface(model) != (self.manifest.inputs, self.manifest.outputs):
            raise ArtifactError("inputs or outputs of the graph are not those the manifest lists", where=where)
        self._checked.add(name)
        return checked

    def model_bytes(self, name: str = MODEL_NAME) -> bytes:
        """The graph as one message with its weights inside, ready for a runtime that takes bytes.

        Raises:
            ArtifactError: a rule is broken, or the weights do not fit in one message (use :meth:`model_path`).
        """
        self._warn()
        checked = self.check_model(name)
        data = self.read(name)
        if not checked.external:
            return data
        self.limits.check("model_bytes", len(data) + checked.bytes, "graph and weights in one message", where=name)
        import onnx

        model = onnx.ModelProto()
        model.ParseFromString(data)
        outside = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        if len(outside) != len(checked.external):  # a runtime would look for the rest by itself, anywhere
            raise ArtifactError("tensors inside nodes have external data; only initializers may", where=name)
        for tensor in outside:
            entries = {e.key: e.value for e in tensor.external_data}
            offset, view = int(entries.get("offset", "0")), self.map(entries["location"])
            end = offset + int(entries["length"]) if "length" in entries else len(view)
            tensor.raw_data = bytes(view[offset:end])
            del tensor.external_data[:]
            tensor.data_location = onnx.TensorProto.DEFAULT
        return proto_bytes(model)

    def model_path(self, name: str = MODEL_NAME) -> Path:
        """Path of a graph with its weights beside it: in the folder itself, or unpacked once into the user cache.

        Raises:
            ArtifactError: a rule is broken.
            ResourceError: the cache cannot be written.
        """
        self._warn()
        if name not in self._checked:
            self.check_model(name)
        if self.path.is_dir():
            return self.path / name
        target = cache_dir() / "unpacked" / self.sha256
        wanted = {e.name: e for e in self.manifest.files if e.name.endswith((".onnx", ".data"))}
        if not _is_unpacked(target, wanted):
            with disk_errors(), staging(target, folder=True, replace=True) as temp, opened_folder(temp) as fd:
                for entry in wanted:
                    write_beneath(fd, entry, self.map(entry))
        return target / name

    def _warn(self) -> None:
        if not self._verified:
            _log.warning("%s: hashes were not checked; its files may not be what was converted", self.path)

    def golden(self) -> list[GoldenCase]:
        """The recorded runs of the source model; empty when none were recorded.

        Raises:
            ArtifactError: the file is malformed.
        """
        if GOLDEN_NAME not in self.names():
            return []
        arrays = read_npz(self.map(GOLDEN_NAME), self.limits, where=f"{self.path.name}/{GOLDEN_NAME}")
        cases: dict[int, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = {}
        for key, array in arrays.items():
            index, _, rest = key.partition("/")
            side, _, name = rest.partition("/")
            if not (index.isascii() and index.isdigit() and len(index) < 7) or side not in ("in", "out") or not name:
                raise ArtifactError(f"array {key[:80]!r} is neither input nor output", where=GOLDEN_NAME)
            cases.setdefault(int(index), ({}, {}))[side == "out"][name] = array
        return [GoldenCase(*cases[i]) for i in sorted(cases)]

    def recipe(self) -> dict[str, Any]:
        """The settings that make this artifact again.

        Raises:
            ArtifactError: the file is malformed.
        """
        if RECIPE_NAME not in self.names():
            return {}
        value = load_yaml(self.read(RECIPE_NAME), self.limits, where=f"{self.path.name}/{RECIPE_NAME}")
        if not isinstance(value, dict):
            raise ArtifactError("the recipe is not a mapping", where=f"{self.path.name}/{RECIPE_NAME}")
        return value

    def measured(self) -> dict[str, Any]:
        """Times, memory and machine as last written; not covered by any hash.

        Raises:
            ArtifactError: the file is malformed.
        """
        if MEASURED_NAME not in self._store.names():
            return {}
        where = f"{self.path.name}/{MEASURED_NAME}"
        self.limits.check("manifest_bytes", self._store.names()[MEASURED_NAME], "size in bytes", where=where)
        value = load_json(self.read(MEASURED_NAME), self.limits, where=where)
        if not isinstance(value, dict):
            raise ArtifactError("the measurements are not a mapping", where=where)
        return value

    def close(self) -> None:
        """Drop the maps; views handed out stay valid while they are held."""
        self._store.close()

    def __enter__(self) -> Artifact:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Artifact({str(self.path)!r}, sha256={self.sha256[:12]})"


def interface(model: onnx.ModelProto) -> tuple[list[TensorInfo], list[TensorInfo]]:
    """Inputs (without those that only give initializers a default) and outputs of a graph, for the manifest."""
    import onnx

    weights = {t.name for t in model.graph.initializer}

    def info(value: onnx.ValueInfoProto) -> TensorInfo:
        tensor = value.type.tensor_type
        try:
            dtype = str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        except (KeyError, TypeError):
            dtype = ""
        shape: list[int | str | None] = [
            dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None) for dim in tensor.shape.dim
        ]
        return TensorInfo(name=value.name, dtype=dtype, shape=shape)

    inputs = [info(v) for v in model.graph.input if v.name not in weights]
    return inputs, [info(v) for v in model.graph.output]


def _is_unpacked(folder: Path, entries: Mapping[str, FileEntry]) -> bool:
    """Whether the cache holds these files, unchanged."""
    for name, entry in entries.items():
        path = folder / name
        try:
            if path.is_symlink() or path.stat().st_size != entry.bytes:
                return False
            with path.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != entry.sha256:
                    return False
        except OSError:
            return False
    return True
