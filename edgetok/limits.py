"""What a file may ask for before anything is allocated for it, and the arithmetic that cannot wrap.

Every reader takes a ``LoadLimits``. The environment variable ``EDGETOK_LIMITS`` (``nodes=1000,tensors=200``) and
flags can only lower a limit; raising one takes code: ``DEFAULT.raised(nodes=2_000_000)``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from edgetok.errors import ArtifactError, InputError

GIB = 1 << 30
MIB = 1 << 20
INT64_MAX = (1 << 63) - 1
ENVIRONMENT = "EDGETOK_LIMITS"


@dataclass(frozen=True)
class LoadLimits:
    """The limits table. Every field is the largest value accepted.

    Args:
        model_bytes: one ONNX graph file; protobuf itself stops at 2 GiB.
        file_bytes: one file of weights, or one packed artifact.
        total_bytes: all tensors of a model together, counted as declared.
        external_files: files of external data named by one model.
        fields: protobuf fields in a graph file, counted before it is parsed.
        nodes: nodes in all graphs and functions of a model.
        tensors: initializers and constants of a model.
        functions: model-local functions.
        values: graph inputs, outputs and value infos.
        rank: axes of a tensor.
        dim: length of one axis.
        name_chars: a name of a node, value, tensor, operator or domain.
        string_bytes: any other string: documentation, metadata, string attributes, elements of string tensors.
        entries: entries of one list: metadata, attributes of a node, inputs of a node.
        attribute_values: numbers or strings in one attribute.
        opset_imports: operator sets imported by a model or function.
        nesting: subgraphs inside subgraphs.
        path_chars: a relative file name inside a model folder or artifact.
        path_parts: folders in such a name.
        folder_files: files in an artifact or model folder.
        manifest_bytes: ``edgetok.json``, ``recipe.yaml``, ``measured.json``, each.
        text_bytes: one carried file: tokenizer, configuration, licence, template.
        json_nesting: lists and objects inside each other in JSON and YAML.
        golden_bytes: ``golden.npz``.
        golden_arrays: arrays in it.
        header_bytes: the header of a safetensors file.
    """

    model_bytes: int = 2 * GIB - 1
    file_bytes: int = 16 * GIB
    total_bytes: int = 32 * GIB
    external_files: int = 1024
    fields: int = 8_000_000
    nodes: int = 200_000
    tensors: int = 65_536
    functions: int = 4096
    values: int = 400_000
    rank: int = 8
    dim: int = (1 << 31) - 1
    name_chars: int = 1024
    string_bytes: int = MIB
    entries: int = 4096
    attribute_values: int = MIB
    opset_imports: int = 64
    nesting: int = 8
    path_chars: int = 240
    path_parts: int = 8
    folder_files: int = 4096
    manifest_bytes: int = 4 * MIB
    text_bytes: int = 64 * MIB
    json_nesting: int = 32
    golden_bytes: int = GIB
    golden_arrays: int = 1024
    header_bytes: int = 32 * MIB

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or not 0 <= value <= INT64_MAX:
                raise InputError(f"limit {field.name}={value!r} must be a whole number from 0 to 2^63-1")

    def lowered(self, changes: Mapping[str, int]) -> LoadLimits:
        """These limits with some of them lowered: what a flag or the environment may do.

        Raises:
            InputError: an unknown name, or a value above the present one.
        """
        known = {f.name for f in fields(self)}
        for name, value in changes.items():
            if name not in known:
                raise InputError(f"unknown limit {name!r}; known: {', '.join(sorted(known))}")
            if value > getattr(self, name):
                raise InputError(
                    f"limit {name}={value} is above {getattr(self, name)}; flags and {ENVIRONMENT} only lower limits",
                    next=f"raise it in Python: edgetok.limits.DEFAULT.raised({name}={value})",
                )
        return replace(self, **changes)

    def raised(self, **changes: int) -> LoadLimits:
        """These limits with some of them changed in either direction: for callers who trust their files."""
        return replace(self, **changes)

    def check(self, name: str, value: int, what: str, *, where: str | None = None) -> int:
        """Return ``value`` when it is inside the limit called ``name``.

        Raises:
            ArtifactError: it is above the limit; the sentence names what, the value and the limit.
        """
        limit = getattr(self, name)
        if value > limit:
            raise ArtifactError(f"{what}: {value:,} is over the limit of {limit:,} ({name})", where=where)
        return value


DEFAULT = LoadLimits()


def parse_limits(text: str) -> dict[str, int]:
    """Read ``nodes=1000,tensors=200``.

    Raises:
        InputError: a part is not NAME=NUMBER.
    """
    changes: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, value = part.partition("=")
        if not (value.strip().isascii() and value.strip().isdigit() and len(value) < 20):
            raise InputError(f"limit {part!r} is not NAME=NUMBER", next="for example nodes=1000,tensors=200")
        changes[name.strip().replace("-", "_")] = int(value)
    return changes


def effective(limits: LoadLimits = DEFAULT, environ: Mapping[str, str] | None = None) -> LoadLimits:
    """``limits`` lowered by ``EDGETOK_LIMITS``; a value there above a limit already lower is left alone.

    Raises:
        InputError: the variable cannot be read, or is above the default limits.
    """
    text = (os.environ if environ is None else environ).get(ENVIRONMENT, "")
    if not text:
        return limits
    asked = parse_limits(text)
    DEFAULT.lowered(asked)
    return replace(limits, **{name: min(value, getattr(limits, name)) for name, value in asked.items()})


def checked_cast(value: int, what: str, *, maximum: int = INT64_MAX, where: str | None = None) -> int:
    """Return ``value`` when it is a size: a whole number from 0 to ``maximum``.

    Raises:
        ArtifactError: it is negative or too large.
    """
    if not 0 <= value <= maximum:
        raise ArtifactError(f"{what}: {value} is outside 0..{maximum}", where=where)
    return value


def checked_add(*values: int, what: str, maximum: int = INT64_MAX, where: str | None = None) -> int:
    """Sum of sizes, refused when any is negative or the sum exceeds ``maximum`` (a C size would wrap).

    Raises:
        ArtifactError: as said.
    """
    total = 0
    for value in values:
        total = checked_cast(total + checked_cast(value, what, where=where), what, maximum=maximum, where=where)
    return total


def checked_mul(*values: int, what: str, maximum: int = INT64_MAX, where: str | None = None) -> int:
    """Product of sizes, refused when any is negative or a partial product exceeds ``maximum``.

    Partial products are checked before a later zero could hide them: ``[2^40, 2^40, 0]`` is refused.

    Raises:
        ArtifactError: as said.
    """
    total, seen_zero = 1, False
    for value in values:
        checked_cast(value, what, where=where)
        seen_zero = seen_zero or value == 0
        total = checked_cast(total * max(value, 1), what, maximum=maximum, where=where)
    return 0 if seen_zero else total


def packed_bytes(dims: Sequence[int], bits: int, what: str, *, where: str | None = None) -> int:
    """Bytes of a dense tensor of ``bits`` per element, rounded up to whole bytes.

    Raises:
        ArtifactError: the size does not fit in 63 bits.
    """
    total = checked_mul(*dims, bits, what=what, where=where)
    return checked_add(total, 7, what=what, where=where) // 8
