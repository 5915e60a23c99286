"""Labelled data for evaluators, one sample at a time, so that thousands of images never sit in memory as floats.

``data`` may be an ``.npz`` keyed by input name, an image folder, a sheet of images (a PNG with one square image per row
of pixels), or ``.tsv`` / ``.jsonl`` of texts.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgetok.errors import ArtifactError, InputError
from edgetok.evaluators.base import Cases, EvalSpec
from edgetok.npz import read_npz
from edgetok.preprocess import IMAGE_SUFFIXES, InputSpec, Preprocess, pad_id

_MAX_TEXT_BYTES = 256 << 20
_MAX_PIXELS = 64_000_000
_FIRST = ("text_a", "sentence1", "premise", "question1", "text", "sentence")
_SECOND = ("text_b", "sentence2", "hypothesis", "question2")


def load_cases(spec: EvalSpec) -> Cases:
    """The samples an eval file names, with its labels.

    Raises:
        InputError: nothing usable there, or labels do not fit.
        ArtifactError: a file is malformed.
    """
    path = spec.path("data")
    if path.is_dir():
        cases = _folder(spec, path)
    elif path.suffix == ".npz":
        cases = _npz(spec, path)
    elif path.suffix.lower() in IMAGE_SUFFIXES:
        cases = _sheet(spec, path)
    elif path.suffix in (".tsv", ".jsonl"):
        rows = read_rows(path)[: spec.samples]
        text = TextFeeder(spec)
        column = first_column(rows, path)
        second = next((n for n in _SECOND if n in rows[0]), None)
        cases = Cases(
            len(rows),
            lambda i: text.feed(rows[i][column], rows[i][second] if second else None),
            labels_of(rows, path) if "label" in rows[0] else None,
        )
    else:
        raise InputError("data is an image folder, a sheet of images, .npz, .tsv or .jsonl", where=str(path))
    if not cases.count:
        raise InputError("no samples found", where=str(path))
    return cases


def _npz(spec: EvalSpec, path: Path) -> Cases:
    arrays = open_npz(path)
    missing = [i.name for i in spec.inputs if i.name not in arrays]
    if missing:
        raise InputError(
            f"no array for input {missing[0]!r}; the file has: {', '.join(arrays) or 'nothing'}",
            where=str(path),
            next="name the arrays as the model names its inputs",
        )
    feeds = {i.name: arrays[i.name] for i in spec.inputs}
    counts = {len(a) if a.ndim else 0 for a in feeds.values()}
    if len(counts) != 1:
        raise InputError(f"the arrays have different sample counts: {sorted(counts)}", where=str(path))
    dtypes = {i.name: i.dtype for i in spec.inputs}
    count = min(counts.pop(), spec.samples or math.inf)
    labels = spec.values.get("labels", "labels")
    truth = arrays[labels] if isinstance(labels, str) and labels in arrays else None
    if truth is None and "labels" in spec.values:
        truth = read_labels(spec.path("labels"))
    return Cases(
        int(count),
        lambda i: {n: a[i : i + 1].astype(dtypes[n], copy=False) for n, a in feeds.items()},
        _fit(truth, int(count), path),
    )


def _folder(spec: EvalSpec, folder: Path) -> Cases:
    name, preprocess = _image_input(spec)
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    relative = [p.relative_to(folder).as_posix() for p in files]
    if "labels" in spec.values:
        table = _table(spec.path("labels"))
        chosen = [i for i, n in enumerate(relative) if n in table]
        labels: np.ndarray | None = np.asarray([table[relative[i]] for i in chosen], np.int64)
    else:  # one sub-folder per class, in sorted order
        chosen = list(range(len(files)))
        parents = [n.rpartition("/")[0] for n in relative]
        classes = {c: i for i, c in enumerate(sorted(set(parents)))}
        labels = np.asarray([classes[p] for p in parents], np.int64) if len(classes) > 1 else None
    count = len(chosen)
    if spec.samples and count > spec.samples:  # spread over the folder, which is often sorted by class
        keep = [i * count // spec.samples for i in range(spec.samples)]
        chosen = [chosen[i] for i in keep]
        labels = None if labels is None else labels[keep]
    return Cases(
        len(chosen),
        lambda i: {name: preprocess.apply(read_image(files[chosen[i]]))[None]},
        labels,
        [relative[i] for i in chosen],
    )


def _sheet(spec: EvalSpec, path: Path) -> Cases:
    """A picture whose every row of pixels is one square RGB image (CIFAR in a browser-friendly form)."""
    name, preprocess = _image_input(spec)
    pixels = read_image(path)
    side = math.isqrt(pixels.shape[1])
    if side * side != pixels.shape[1]:
        raise InputError(f"rows of {pixels.shape[1]} pixels are no square images", where=str(path))
    count = min(len(pixels), spec.samples or len(pixels))
    labels = read_labels(spec.path("labels")) if "labels" in spec.values else None
    return Cases(
        count,
        lambda i: {name: preprocess.apply(pixels[i].reshape(side, side, 3))[None]},
        _fit(labels, count, path),
    )


def _image_input(spec: EvalSpec) -> tuple[str, Preprocess]:
    if len(spec.inputs) != 1:
        raise InputError(f"the model has {len(spec.inputs)} inputs; images feed exactly one", where=spec.where)
    if spec.preprocess is None:
        raise InputError(
            "images need a preprocessing, and none was given (it is never guessed)",
            where=spec.where,
            next="add --preprocess imagenet-224 (or clip-224, or a YAML file), or preprocess: to the eval file",
        )
    return spec.inputs[0].name, spec.preprocess


def read_image(path: Path) -> np.ndarray:
    """Decode an image, uint8 [H, W, 3].

    Raises:
        InputError: not an image, or over the pixel limit.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise InputError(f"image of {image.width}x{image.height} px is over the limit", where=str(path))
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as exc:
        raise InputError(f"not a readable image: {exc}", where=str(path)) from exc


def open_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an ``.npz``, never unpickled."""
    return read_npz(path.read_bytes(), where=str(path))


def read_labels(path: Path) -> np.ndarray:
    """Labels [n] from a JSON list, an ``.npz`` with one array or one called ``labels``, or one number per line."""
    if path.suffix == ".npz":
        arrays = open_npz(path)
        if "labels" not in arrays and len(arrays) != 1:
            raise InputError("expected an array called 'labels'", where=str(path))
        return arrays.get("labels", next(iter(arrays.values())))
    text = _text(path)
    try:
        values = json.loads(text) if path.suffix == ".json" else [float(x) for x in text.split()]
    except (ValueError, RecursionError) as exc:
        raise ArtifactError(f"labels cannot be read: {exc}", where=str(path)) from exc
    numbers = isinstance(values, list) and all(isinstance(v, int | float) for v in values)
    if not numbers:
        raise ArtifactError("expected a list of numbers", where=str(path))
    return np.asarray(values)


def _table(path: Path) -> dict[str, int]:
    """File name to class: a JSON object, or CSV lines ``file,label``."""
    text = _text(path)
    try:
        if path.suffix == ".json":
            return {str(k): int(v) for k, v in dict(json.loads(text)).items()}
        rows = [r for r in csv.reader(text.splitlines()) if len(r) >= 2]
        return {r[0]: int(r[1]) for r in rows if r[1].strip().lstrip("-").isdigit()}
    except (ValueError, TypeError, RecursionError, csv.Error) as exc:
        raise ArtifactError(f"expected file names and class numbers: {exc}", where=str(path)) from exc


def _text(path: Path) -> str:
    if path.stat().st_size > _MAX_TEXT_BYTES:
        raise ArtifactError(f"over {_MAX_TEXT_BYTES} bytes", where=str(path))
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as exc:
        raise ArtifactError(f"not UTF-8: {exc}", where=str(path)) from exc


def _fit(labels: np.ndarray | None, count: int, path: Path) -> np.ndarray | None:
    if labels is None:
        return None
    if labels.ndim == 0 or len(labels) < count:
        raise InputError(f"{count} samples but {labels.size} labels", where=str(path))
    return labels[:count]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a ``.tsv`` (with a header) or ``.jsonl`` file.

    Raises:
        ArtifactError: a line cannot be read; names it.
        InputError: there is none.
    """
    lines = [s for s in _text(path).splitlines() if s.strip()]
    if path.suffix == ".tsv":
        found = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
        if any(None in row or None in row.values() for row in found):
            raise ArtifactError("a line has more or fewer columns than the header", where=str(path))
        rows: list[dict[str, Any]] = [dict(r) for r in found]
    else:
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as exc:
                raise ArtifactError(f"line {number} is not JSON: {exc}", where=str(path)) from exc
            if not isinstance(row, dict) or (rows and row.keys() != rows[0].keys()):
                raise ArtifactError(f"line {number} is not an object with the fields of line 1", where=str(path))
            rows.append(row)
    if not rows:
        raise InputError("no rows found", where=str(path))
    return rows


def first_column(rows: Sequence[Mapping[str, Any]], path: Path) -> str:
    """The column that holds the (first) text."""
    name = next((n for n in _FIRST if n in rows[0]), None)
    if name is None:
        raise InputError(f"no text column; there are {', '.join(rows[0])}", where=str(path), next="name it 'text'")
    return name


def pair_columns(rows: Sequence[Mapping[str, Any]], path: Path) -> tuple[str, str]:
    """The columns that hold the two texts."""
    second = next((n for n in _SECOND if n in rows[0]), None)
    if second is None:
        raise InputError(
            f"no second text column; there are {', '.join(rows[0])}", where=str(path), next="name them text_a, text_b"
        )
    return first_column(rows, path), second


def labels_of(rows: Sequence[Mapping[str, Any]], path: Path) -> np.ndarray:
    """The ``label`` column as numbers [n]."""
    try:
        return np.asarray([float(r["label"]) for r in rows])
    except (KeyError, TypeError, ValueError) as exc:
        raise InputError(f"column 'label' must hold a number in every row: {exc}", where=str(path)) from exc


class TextFeeder:
    """Tokenizes texts into a model's inputs, batch 1, padded and cut to the graph's own length when it has one."""

    def __init__(self, spec: EvalSpec) -> None:
        from tokenizers import Tokenizer

        if spec.tokenizer is None:
            raise InputError("texts need a tokenizer.json beside the model, and there is none", where=spec.where)
        try:
            self._tokenizer = Tokenizer.from_str(spec.tokenizer.decode("utf-8"))
        except Exception as exc:  # the library raises plain Exception
            raise ArtifactError(f"tokenizer.json cannot be read: {exc}", where=spec.where) from exc
        self._tokenizer.no_padding()
        self._inputs: Sequence[InputSpec] = spec.inputs
        widths = [i.shape[1] for i in spec.inputs if len(i.shape) == 2]
        self._width = next((w for w in widths if isinstance(w, int)), None)
        if self._width:
            self._tokenizer.enable_truncation(self._width)
        self._pad = pad_id(spec.tokenizer)
        self._roles: dict[str, Callable[[Any], list[int]]] = {}
        for i in spec.inputs:
            self._roles[i.name] = _reader(i.name)

    def feed(self, text: str, second: str | None = None) -> dict[str, np.ndarray]:
        """Feeds [1, S] of one text, or of a pair joined as the tokenizer joins pairs."""
        encoded = self._tokenizer.encode(text, second) if second is not None else self._tokenizer.encode(text)
        width = self._width or len(encoded.ids)
        feeds = {}
        for spec in self._inputs:
            read = self._roles[spec.name]
            fill = self._pad if read is _ids else 0
            row = np.full((1, width), fill, spec.dtype)
            row[0, : len(encoded.ids)] = read(encoded)
            feeds[spec.name] = row
        return feeds


def _ids(encoded: Any) -> list[int]:
    return list(encoded.ids)


def _mask(encoded: Any) -> list[int]:
    return [1] * len(encoded.ids)


def _types(encoded: Any) -> list[int]:
    return list(encoded.type_ids)


def _reader(name: str) -> Callable[[Any], list[int]]:
    lower = name.lower()
    for key, read in (("mask", _mask), ("type", _types), ("ids", _ids)):
        if key in lower:
            return read
    raise InputError(f"do not know how to fill input {name!r} from text", next="give an .npz instead")
