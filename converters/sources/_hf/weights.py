"""Tensors of one or more safetensors files, read one at a time through the library's memory map."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
from safetensors import SafetensorError, safe_open

from edgetok.converters.sources._hf.config import TORCH_HINT, read_json
from edgetok.errors import ArtifactError, InputError, UnsupportedError
from edgetok.limits import DEFAULT, LoadLimits

_FLOATS = {"F32", "F16", "BF16", "F64"}
_RENAMED = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))


class Weights:
    """The tensors of a model folder by name, with the common prefix (``bert.``) taken off.

    Nothing is read until a tensor's bytes are asked for, and nothing is kept after: the peak is one tensor.
    """

    def __init__(self, folder: Path, prefixes: tuple[str, ...], limits: LoadLimits = DEFAULT) -> None:
        self.files = weight_files(folder)
        limits.check("external_files", len(self.files), "safetensors files", where=str(folder))
        for file in self.files:
            limits.check("file_bytes", file.stat().st_size, "file size", where=str(file))
            with file.open("rb") as f:
                limits.check("header_bytes", int.from_bytes(f.read(8), "little"), "header size", where=str(file))
        self.bytes = sum(f.stat().st_size for f in self.files)
        limits.check("total_bytes", self.bytes, "weights", where=str(folder))
        self.folder = folder
        self._slices: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
        for file in self.files:
            self._scan(file)
        limits.check("tensors", len(self._slices), "tensors", where=str(folder))
        self.prefix = next((p for p in prefixes if any(n.startswith(p) for n in self._slices)), "")
        self.used: set[str] = set()

    def _scan(self, file: Path) -> None:
        try:
            with safe_open(file, "np") as f:
                for name in f.keys():  # noqa: SIM118 (not a dict)
                    part = f.get_slice(name)
                    if name in self._slices:
                        raise ArtifactError(f"tensor {name!r} is in two files", where=str(file))
                    self._slices[name] = (file, part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError) as exc:
            raise ArtifactError(f"not a readable safetensors file: {exc}", where=str(file)) from exc

    def _full(self, name: str) -> str | None:
        for candidate in (self.prefix + name, name):
            if candidate in self._slices:
                return candidate
            for new, old in _RENAMED:
                if candidate.endswith(new) and candidate[: -len(new)] + old in self._slices:
                    return candidate[: -len(new)] + old
        return None

    def __contains__(self, name: str) -> bool:
        return self._full(name) is not None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor.

        Raises:
            ArtifactError: no such tensor.
        """
        full = self._full(name)
        if full is None:
            raise ArtifactError(f"tensor {name!r} is missing", where=str(self.folder))
        return self._slices[full][2]

    def tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        change: Callable[[np.ndarray], np.ndarray] | None = None,
        result: tuple[int, ...] | None = None,
    ) -> ir.LazyTensor:
        """A float32 tensor, read (and changed) when its bytes are asked for.

        Args:
            name: without prefix.
            shape: what config.json says it must be.
            change: applied to the float32 array.
            result: shape after ``change``; ``shape`` when None.

        Raises:
            ArtifactError: missing, or of another shape.
            UnsupportedError: not a float type.
        """
        found = self.shape(name)
        full = self._full(name) or name
        file, dtype, _ = self._slices[full]
        if found != tuple(shape):
            raise ArtifactError(
                f"tensor {name!r} is {list(found)}, config.json asks for {list(shape)}", where=str(file)
            )
        if dtype not in _FLOATS:
            raise UnsupportedError(f"tensor {name!r} has type {dtype}; expected a float type", where=str(file))
        self.used.add(full)

        def read() -> ir.TensorProtocol:
            with safe_open(file, "np") as f:
                array = f.get_tensor(full).astype(np.float32, copy=False)
            return ir.tensor(np.ascontiguousarray(change(array) if change else array), name=name)

        return ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape(result or shape), name=name, cache=False)

    def linear(self, name: str, inputs: int, outputs: int) -> tuple[ir.LazyTensor, ir.LazyTensor | None]:
        """Weight as [inputs, outputs] (stored the other way round) and bias [outputs] when there is one."""
        weight = self.tensor(f"{name}.weight", (outputs, inputs), change=np.transpose, result=(inputs, outputs))
        bias = self.tensor(f"{name}.bias", (outputs,)) if f"{name}.bias" in self else None
        return weight, bias

    def refuse_leftover(self, ignored: tuple[str, ...]) -> None:
        """A tensor nobody asked for means a part of the model that was not built.

        Args:
            ignored: name prefixes of heads and training-only tensors.

        Raises:
            UnsupportedError: names the first such tensor.
        """
        rest = self._leftover(ignored)
        if rest:
            raise UnsupportedError(
                f"{len(rest)} tensors belong to a part that is not built in, first {rest[0]!r}",
                where=str(self.folder),
                next=TORCH_HINT,
            )

    def _leftover(self, ignore: tuple[str, ...]) -> list[str]:
        rest = []
        for name, (_, _, shape) in self._slices.items():
            short = name.removeprefix(self.prefix) if self.prefix else name
            if name in self.used or short.startswith(ignore) or name.startswith(ignore):
                continue
            if short.endswith("position_ids") or short.endswith("token_type_ids") or math.prod(shape) == 0:
                continue
            rest.append(short)
        return sorted(rest)


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards its index names.

    Raises:
        InputError: neither is there.
        ArtifactError: the index is malformed or leaves the folder.
        UnsupportedError: the weights are a pickle.
    """
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
            raise ArtifactError("weight_map must map tensor names to file names", where=str(index))
        files = sorted(set(names.values()))
        for name in files:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ArtifactError(f"{name!r} is not a plain .safetensors file name", where=str(index))
            if not (folder / name).is_file():
                raise ArtifactError(f"names {name!r}, which is not there", where=str(index))
        if not files:
            raise ArtifactError("weight_map is empty", where=str(index))
        return [folder / n for n in files]
    pickled = next((p.name for p in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))), None)
    if pickled:
        raise UnsupportedError(
            f"the weights are a pickle ({pickled}), which can run code when opened; it is not read",
            where=str(folder),
            next="save the model with safetensors (transformers: save_pretrained) and convert that folder",
        )
    raise InputError("no model.safetensors in this folder", where=str(folder), next="give a Hugging Face model folder")
