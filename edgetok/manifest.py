"""``edgetok.json``: what an artifact is, where it came from, what is in it, and what was measured about its answers.

The promise about versions: a reader opens every artifact of its own major format version, whatever the minor (fields
it does not know are ignored), and refuses another major with a sentence saying so.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from edgetok.errors import ArtifactError, InputError, IntegrityError, UnsupportedError
from edgetok.limits import DEFAULT, LoadLimits
from edgetok.paths import split_relative

MANIFEST_NAME = "edgetok.json"
MEASURED_NAME = "measured.json"
MAJOR, MINOR = 1, 0
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
_SHA256 = re.compile(r"[0-9a-f]{64}")


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One file of the artifact: relative name, lower-case hex sha256, size in bytes."""

    name: str
    sha256: str
    bytes: int


class SourceInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Where the model came from.

    Args:
        name: short name for reports.
        kind: "onnx", "hf", "artifact".
        sha256: of the source (a file, or the sorted lines of a folder).
        bytes: its size.
        producer: exporter and version, as the source says.
        licence: SPDX name or first line of the licence text, when known.
    """

    name: str
    kind: str
    sha256: str
    bytes: int
    producer: str = ""
    licence: str = ""


class TensorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An input or output: name, numpy dtype name, shape with names for open axes."""

    name: str
    dtype: str
    shape: list[int | str | None]


class LayerTokens(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens entering and leaving the reduction of one block (counted from 0)."""

    layer: int
    before: int
    after: int


class PrecisionGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Tensors of one precision: a name for the group, the dtype, how many, and their bytes."""

    group: str
    dtype: str
    tensors: int
    bytes: int


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """One measured figure of quality, source against artifact, with the conditions it holds under.

    Args:
        metric: what, as "probe accuracy".
        source, artifact, drop, limit: in the metric's ``unit``.
        passed: whether the gate let it through.
        n: samples.
        ci95: interval of the paired difference.
        conditions: device, threads, data set, split, seed.
    """

    metric: str
    source: float
    artifact: float
    drop: float
    unit: str = ""
    limit: float | None = None
    passed: bool = True
    n: int = 0
    ci95: tuple[float, float] | None = None
    conditions: dict[str, str | int | float | bool] = {}


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The whole of ``edgetok.json``; field order is the order in the file.

    ``measured.json`` (times, memory, machine) is named but neither sized nor hashed: it may be added to later and is
    outside the promise of equal bytes. ``content_sha256`` covers every listed file and every other field here.
    """

    format: str = f"{MAJOR}.{MINOR}"
    content_sha256: str = ""
    source: SourceInfo
    recipe: dict[str, Any] = {}
    tools: dict[str, str] = {}
    inputs: list[TensorInfo] = []
    outputs: list[TensorInfo] = []
    tokens: list[LayerTokens] = []
    precision: list[PrecisionGroup] = []
    preprocess: dict[str, Any] | None = None
    agreement: dict[str, float] = {}
    accuracy: list[Accuracy] = []
    files: list[FileEntry] = []
    measured: str | None = None


class _Version(msgspec.Struct):
    format: str


def content_sha256(fields: Mapping[str, Any]) -> str:
    """The artifact's identity: sha256 over the sorted ``sha256  name`` lines of its files and the rest of the manifest.

    ``measured`` and the field itself are left out, so later measurements do not change what the artifact is. Fields of
    later minor versions are covered as they stand.

    Args:
        fields: the manifest as plain values.
    """
    rest = {k: v for k, v in fields.items() if k not in ("content_sha256", "measured", "files")}
    own = hashlib.sha256(msgspec.json.encode(rest, order="sorted")).hexdigest()
    lines = sorted(f"{entry['sha256']}  {entry['name']}\n" for entry in fields.get("files", ()))
    return hashlib.sha256("".join([*lines, f"{own}  {MANIFEST_NAME}\n"]).encode()).hexdigest()


def encode_manifest(manifest: Manifest) -> bytes:
    """Serialize for the file, content hash filled in: the fields in their order, two spaces, a newline at the end.

    Raises:
        InputError: a number that JSON cannot hold (NaN, infinity), or a value of no plain type.
    """
    try:
        raw = msgspec.to_builtins(manifest)
        _finite(raw, "manifest")
        raw["content_sha256"] = content_sha256(raw)
        return msgspec.json.format(msgspec.json.encode(raw), indent=2) + b"\n"
    except (TypeError, msgspec.MsgspecError) as exc:
        raise InputError(f"the manifest cannot be written: {exc}") from exc


def _finite(value: object, path: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{path} is {value}: only finite numbers are recorded")
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, item in items:
        _finite(item, f"{path}.{key}")


def decode_manifest(data: bytes, limits: LoadLimits = DEFAULT, *, where: str) -> Manifest:
    """Read and check ``edgetok.json``.

    Raises:
        ArtifactError: too large, nested too deeply, not JSON, of the wrong form, or names a file twice or outside.
        UnsupportedError: written in another major format version.
        IntegrityError: the content hash does not follow from the fields.
    """
    check_json(data, limits, where=where)
    version = _decode(data, _Version, where).format
    match = re.fullmatch(r"(\d{1,6})\.(\d{1,6})", version)
    if match is None:
        raise ArtifactError(f"format version {version[:40]!r} is not MAJOR.MINOR", where=where)
    if int(match[1]) != MAJOR:
        newer = int(match[1]) > MAJOR
        raise UnsupportedError(
            f"the artifact has format {version}; this edgetok opens every {MAJOR}.x "
            f"and no {'newer' if newer else 'older'} one",
            where=where,
            next="pip install --upgrade edgetok" if newer else "convert the source model again",
        )
    manifest: Manifest = _decode(data, Manifest, where)
    _check_files(manifest, limits, where)
    if manifest.measured not in (None, MEASURED_NAME):
        raise ArtifactError(f"measurements can only be in {MEASURED_NAME!r}", where=where)
    found = _found_sha256(data, where)
    if found != manifest.content_sha256:
        raise IntegrityError(
            f"{MANIFEST_NAME} was changed: its content hash is {found[:12]}..., "
            f"it says {manifest.content_sha256[:12] or 'nothing'}...",
            where=where,
            next="convert again, or fetch the artifact again",
        )
    return manifest


def _found_sha256(data: bytes, where: str) -> str:
    fields = _decode(data, dict, where)
    try:
        return content_sha256(fields)
    except (msgspec.MsgspecError, OverflowError, ValueError, TypeError, RecursionError) as exc:
        raise ArtifactError(f"not a valid {MANIFEST_NAME}: {exc}"[:400], where=where) from exc


def _check_files(manifest: Manifest, limits: LoadLimits, where: str) -> None:
    limits.check("folder_files", len(manifest.files), "files in the artifact", where=where)
    seen: set[str] = set()
    for entry in manifest.files:
        parts = split_relative(entry.name, limits, where=where)
        if "/".join(parts) != entry.name or entry.name in (MANIFEST_NAME, MEASURED_NAME):
            raise ArtifactError(f"file name {entry.name[:80]!r} cannot be listed", where=where)
        if entry.name.casefold() in seen:
            raise ArtifactError(f"file {entry.name[:80]!r} is listed twice", where=where)
        seen.add(entry.name.casefold())
        if _SHA256.fullmatch(entry.sha256) is None:
            raise ArtifactError(f"sha256 of {entry.name[:80]!r} is not 64 hex digits", where=where)
        if entry.bytes < 0:
            raise ArtifactError(f"size of {entry.name[:80]!r} is negative", where=where)
        limits.check("file_bytes", entry.bytes, f"size of {entry.name[:80]!r} in bytes", where=where)
    limits.check("total_bytes", sum(e.bytes for e in manifest.files), "size of all files in bytes", where=where)


def _decode(data: bytes, kind: type[Any], where: str) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, ValueError) as exc:
        raise ArtifactError(f"not a valid {MANIFEST_NAME}: {exc}"[:400], where=where) from exc


def check_json(data: bytes, limits: LoadLimits = DEFAULT, *, where: str, limit: str = "manifest_bytes") -> None:
    """Check size and nesting of JSON before it is parsed.

    Raises:
        ArtifactError: over a limit, or not UTF-8.
    """
    limits.check(limit, len(data), "size in bytes", where=where)
    try:
        data.decode()
    except UnicodeDecodeError as exc:
        raise ArtifactError(f"byte {exc.start:,} is not UTF-8", where=where) from exc
    depth = 0
    for char in re.findall(rb"[\[\]{}]", _STRING.sub(b"", data)):
        depth += 1 if char in (b"[", b"{") else -1
        limits.check("json_nesting", depth, "lists and objects inside each other", where=where)


def load_json(data: bytes, limits: LoadLimits = DEFAULT, *, where: str, limit: str = "manifest_bytes") -> Any:
    """Parse JSON from a file of unknown origin.

    Raises:
        ArtifactError: over a limit, or not JSON.
    """
    check_json(data, limits, where=where, limit=limit)
    try:
        return msgspec.json.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, ValueError) as exc:
        raise ArtifactError(f"not valid JSON: {exc}"[:400], where=where) from exc


def load_yaml(data: bytes, limits: LoadLimits = DEFAULT, *, where: str) -> Any:
    """Parse YAML of plain values: no tags, no anchors (a few bytes could stand for gigabytes), bounded nesting.

    Raises:
        ArtifactError: over a limit, not YAML, or uses what is not allowed.
    """
    import yaml

    limits.check("manifest_bytes", len(data), "size in bytes", where=where)
    depth = 0
    try:
        for event in yaml.parse(data, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise ArtifactError("anchors and aliases are not read", where=where)
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                limits.check("json_nesting", depth, "lists and mappings inside each other", where=where)
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
        return yaml.safe_load(data)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, OverflowError) as exc:
        raise ArtifactError(f"not valid YAML: {exc}"[:400], where=where) from exc


def dump_yaml(value: Mapping[str, Any]) -> bytes:
    """Serialize plain values as YAML, keys in their order.

    Raises:
        InputError: a value of no plain type.
    """
    import yaml

    try:
        plain = msgspec.to_builtins(dict(value))
        _finite(plain, "recipe")
        text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)
    except (TypeError, yaml.YAMLError) as exc:
        raise InputError(f"the recipe cannot be written: {exc}") from exc
    return text.encode()
