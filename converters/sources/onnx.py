"""Read an ONNX file as an enemy wrote it.

Size before reading, counts before parsing, declared sizes against bytes present before any tensor is made. External
data is walked from the model's folder without following links, opened once, and mapped from that descriptor.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from edgetok.converters.sources.base import Source
from edgetok.errors import ArtifactError, InputError
from edgetok.limits import DEFAULT, LoadLimits, effective
from edgetok.onnx_rules import Checked, parse_onnx, printable
from edgetok.onnx_tensors import BITS, External, check_extents
from edgetok.paths import open_beneath, opened_folder, read_all, read_beneath

# Files beside a model that travel with it into the artifact, when they are there.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json", "preprocessor_config.json",
    "generation_config.json", "chat_template.jinja", "LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "NOTICE",
)  # fmt: skip


def load_onnx(path: Path | str, limits: LoadLimits = DEFAULT) -> Source:
    """Load an ONNX file, with its external data and the files that travel beside it.

    Args:
        path: the file; resolved once, so a link typed by the user is followed.
        limits: what the file may ask for, lowered further by ``EDGETOK_LIMITS``.

    Returns:
        the source; its initializers view the file's bytes or a read-only map of the external data.

    Raises:
        InputError: no such file, or a folder.
        ArtifactError: the file is malformed or over a limit; the sentence names what, where and why.
        UnsupportedError: operators or operator sets this build does not know.
    """
    path, limits = Path(path), effective(limits)
    where = path.name
    data = read_user_file(path, limits, "model_bytes", hint=_TOO_BIG)
    model, checked = parse_onnx(data, limits, where=where)
    hashes = {where: hashlib.sha256(data).hexdigest()}
    size = len(data)
    del data
    with opened_folder(path.resolve().parent) as folder:
        maps = _open_external(folder, checked, limits, where)
        for name, view in maps.items():
            hashes[name] = hashlib.sha256(view).hexdigest()
            size += len(view)
        files = dict(companions(folder, limits))
    graph = build_ir(model, checked, maps, where=where)
    return Source(
        model=graph,
        path=path,
        kind="onnx",
        name=model.graph.name if _is_telling(model.graph.name) else path.stem,
        sha256=combined_sha256(hashes),
        bytes=size,
        files=files,
        config=_config(files),
        producer=" ".join(filter(None, (model.producer_name, model.producer_version))),
    )


_TOO_BIG = "save the weights as external data: onnx.save(model, path, save_as_external_data=True)"


def read_user_file(path: Path, limits: LoadLimits, limit: str, *, hint: str | None = None) -> bytes:
    """Read a file the user named, its size checked on the open descriptor before reading.

    Raises:
        InputError: not there, a folder, or not a plain file.
        ArtifactError: over the limit, or cut short while it was read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError as exc:
        raise InputError("no such file", where=str(path), next="check the path") from exc
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise InputError("expected a plain file", where=str(path), next="check the path")
        try:
            limits.check(limit, info.st_size, "size of the file in bytes", where=path.name)
        except ArtifactError as exc:
            raise ArtifactError(exc.message, where=exc.where, next=hint) from None
        return read_all(fd, info.st_size, where=path.name)
    finally:
        os.close(fd)


def parse_with_data(
    data: bytes, files: Mapping[str, memoryview | bytes], limits: LoadLimits, *, where: str
) -> ir.Model:
    """Build a model from a serialized graph and its external data already in memory (as from a packed artifact).

    Raises:
        ArtifactError, UnsupportedError: as :func:`load_onnx`.
    """
    model, checked = parse_onnx(data, limits, where=where)
    maps: dict[str, memoryview] = {}
    for extent in checked.external:
        if extent.location not in files:
            raise ArtifactError(f"external data {extent.location[:80]!r} is not in the artifact", where=where)
        maps[extent.location] = memoryview(files[extent.location])
    check_extents(checked.external, {name: len(view) for name, view in maps.items()}, where=where)
    return build_ir(model, checked, maps, where=where)


def combined_sha256(hashes: Mapping[str, str]) -> str:
    """A file's own hash, or that of the sorted ``sha256  name`` lines of several."""
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def companions(folder: int, limits: LoadLimits) -> Iterator[tuple[str, bytes]]:
    """Files beside a model worth carrying: plain, small, in the folder itself; others are left where they are."""
    for name in COMPANIONS:
        try:
            data = read_beneath(folder, name, limits, where="beside the model", limit="text_bytes")
        except ArtifactError:  # missing, a link, or too large: not part of this model
            continue
        if not name.endswith(".json") or _parsed(data) is not None:
            yield name, data


def _parsed(data: bytes) -> object:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _config(files: Mapping[str, bytes]) -> dict[str, object]:
    value = _parsed(files.get("config.json", b"null"))
    return value if isinstance(value, dict) else {}


def _is_telling(name: str) -> bool:
    return bool(name) and name not in ("main_graph", "main", "torch_jit", "torch-jit-export", "graph", "model", "g")


def _open_external(folder: int, checked: Checked, limits: LoadLimits, where: str) -> dict[str, memoryview]:
    """Map each file of external data once, after checking every extent against the sizes of the open descriptors."""
    names = sorted({e.location for e in checked.external})
    limits.check("external_files", len(names), "files of external data", where=where)
    maps: dict[str, memoryview] = {}
    with ExitStack() as stack:
        sizes: dict[str, int] = {}
        opened: dict[str, int] = {}
        seen: dict[tuple[int, int], str] = {}
        for name in names:
            fd, sizes[name] = open_beneath(folder, name, limits, where=where)
            stack.callback(os.close, fd)
            info = os.fstat(fd)
            if (info.st_dev, info.st_ino) in seen:
                twin = seen[info.st_dev, info.st_ino]
                raise ArtifactError(f"external data {name!r} and {twin!r} are one file", where=where)
            seen[info.st_dev, info.st_ino] = name
            opened[name] = fd
        check_extents(checked.external, sizes, where=where)
        for name, fd in opened.items():
            # The map keeps the opened file alive; a file replaced on disk afterwards is not seen.
            maps[name] = memoryview(mmap.mmap(fd, sizes[name], prot=mmap.PROT_READ) if sizes[name] else b"")
    return maps


def build_ir(model: onnx.ModelProto, checked: Checked, maps: Mapping[str, memoryview], *, where: str) -> ir.Model:
    """Turn a checked message into an ``onnx_ir`` model whose external tensors view ``maps``.

    Raises:
        ArtifactError: the graph has a cycle, or is otherwise no graph.
    """
    inline_attributes(model, maps)
    try:
        result = ir.serde.deserialize_model(model)
        graphs: list[ir.Graph | ir.Function] = [result.graph, *result.functions.values()]
        _map_initializers(result.graph, maps)
        for graph in graphs:
            if _unsorted(graph):
                _sort(graph, where)
    except (ArtifactError, MemoryError):
        raise
    except Exception as exc:  # onnx_ir reports malformed graphs with several builtin exceptions
        raise ArtifactError(f"the graph cannot be built: {printable(str(exc))[:300]}", where=where) from exc
    return result


def inline_attributes(model: onnx.ModelProto, maps: Mapping[str, memoryview]) -> None:
    """Copy external data of tensors inside nodes and subgraphs into the message: few and small in any real model."""

    def fill(tensor: onnx.TensorProto) -> None:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return
        extent = _extent(tensor)
        tensor.raw_data = bytes(maps[extent.location][extent.offset : extent.offset + extent.bytes])
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.DEFAULT

    def attributes(items: Iterable[onnx.AttributeProto]) -> None:
        for attribute in items:
            for tensor in (*attribute.tensors, *([attribute.t] if attribute.HasField("t") else ())):
                fill(tensor)
            for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())):
                for tensor in graph.initializer:
                    fill(tensor)
                nodes(graph.node)

    def nodes(items: Iterable[onnx.NodeProto]) -> None:
        for node in items:
            attributes(node.attribute)

    if maps:
        nodes(model.graph.node)
        for function in model.functions:
            nodes(function.node)
            attributes(function.attribute_proto)


def _extent(tensor: onnx.TensorProto) -> External:
    entries = {e.key: e.value for e in tensor.external_data}
    elements = int(np.prod(tensor.dims, dtype=object)) if tensor.dims else 1
    size = (elements * BITS[tensor.data_type] + 7) // 8
    return External(tensor.name, entries["location"], int(entries.get("offset", "0")), size, "length" not in entries)


def _map_initializers(graph: ir.Graph, maps: Mapping[str, memoryview]) -> None:
    for value in graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = _mapped(tensor, maps)


def _mapped(tensor: ir.ExternalTensor, maps: Mapping[str, memoryview]) -> ir.TensorProtocol:
    shape = tensor.shape.numpy()
    bits = BITS[tensor.dtype.value]
    elements = int(np.prod(shape, dtype=object)) if shape else 1
    size = (elements * bits + 7) // 8
    offset = tensor.offset or 0
    view = maps[str(tensor.location)][offset : offset + size]
    raw = np.frombuffer(view, dtype=np.uint8)
    if bits < 8:
        return ir.PackedTensor(raw, tensor.dtype, shape=tensor.shape, name=tensor.name)
    dtype = tensor.dtype.numpy().newbyteorder("<") if bits > 8 else tensor.dtype.numpy()
    return ir.Tensor(raw.view(dtype).reshape(shape), tensor.dtype, shape=tensor.shape, name=tensor.name)


def _sort(graph: ir.Graph | ir.Function, where: str) -> None:
    try:
        graph.sort()
    except ValueError as exc:
        raise ArtifactError("the graph has a cycle: some value is computed from itself", where=where) from exc


def _unsorted(graph: ir.Graph | ir.Function) -> bool:
    seen: set[ir.Node] = set()
    for node in graph:
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and producer.graph is graph and producer not in seen:
                return True
        seen.add(node)
    return False
