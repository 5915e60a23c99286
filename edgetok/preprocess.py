"""From image files, arrays or text lines to the model's inputs, and the record of how that was done.

Preprocessing is never guessed from the model: without ``--preprocess``, images are refused. What was used is
written to the recipe and the manifest, so that the artifact can say what its figures mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgetok.errors import ArtifactError, InputError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm"})
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_MAX_PIXELS = 64_000_000  # one image; a decompression bomb is refused before decoding


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes a float32 tensor.

    Args:
        height, width: of the result, pixels.
        resize: "exact" (both sides), "shorter" (shorter side to ``resize_to``, aspect kept), "none".
        resize_to: target of "shorter", pixels; 0 means max(height, width).
        interpolation: "bicubic", "bilinear", "nearest", "lanczos" (Pillow's filters).
        layout: "chw" or "hwc".
        scale: multiplies the 0..255 values first.
        mean, std: per channel, applied after ``scale``.
    """

    height: int
    width: int
    resize: str = "exact"
    resize_to: int = 0
    interpolation: str = "bicubic"
    layout: str = "chw"
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        for name, allowed in (
            ("resize", ("exact", "shorter", "none")),
            ("interpolation", ("bicubic", "bilinear", "nearest", "lanczos")),
            ("layout", ("chw", "hwc")),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"preprocess {name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        if not (0 < self.height <= 16384 and 0 < self.width <= 16384 and 0 <= self.resize_to <= 16384):
            raise InputError("preprocess sizes must be 1 to 16384 pixels")
        if len(self.mean) != len(self.std) or any(s <= 0 for s in self.std):
            raise InputError("preprocess mean and std need the same length, and std above zero")

    def apply(self, image: Image | np.ndarray) -> np.ndarray:
        """Turn one image into [C,H,W] (or [H,W,C]) float32.

        Args:
            image: a Pillow image, or uint8 [H,W,3].

        Raises:
            InputError: the array is not uint8 [H,W,3].
        """
        from PIL import Image as pil

        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise InputError(f"an image array must be uint8 [H,W,3], not {image.dtype} {list(image.shape)}")
            image = pil.fromarray(image)
        image = self._crop(self._resize(image.convert("RGB")))
        x: np.ndarray = np.asarray(image, dtype=np.float32) * np.float32(self.scale)
        x = (x - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(x.transpose(2, 0, 1) if self.layout == "chw" else x)

    def _resize(self, image: Image) -> Image:
        from PIL import Image as pil

        method = getattr(pil.Resampling, self.interpolation.upper())
        if self.resize == "exact":
            return image.resize((self.width, self.height), method)
        if self.resize == "none":
            return image
        target = self.resize_to or max(self.height, self.width)
        factor = target / min(image.size)
        return image.resize((round(image.width * factor), round(image.height * factor)), method)

    def _crop(self, image: Image) -> Image:
        if image.size == (self.width, self.height):
            return image
        if image.width < self.width or image.height < self.height:
            raise InputError(
                f"the image is {image.width}x{image.height} px, smaller than {self.width}x{self.height}",
                next="use a preprocess file with resize: exact or shorter",
            )
        left, top = (image.width - self.width) // 2, (image.height - self.height) // 2
        return image.crop((left, top, left + self.width, top + self.height))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the recipe and the manifest; ``load_preprocess`` reads them back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


NAMED = {
    "imagenet-224": Preprocess(224, 224, "shorter", 256, mean=_IMAGENET[0], std=_IMAGENET[1]),
    "clip-224": Preprocess(224, 224, "shorter", 224, mean=_CLIP[0], std=_CLIP[1]),
}


def load_preprocess(spec: str | Path | Mapping[str, Any]) -> Preprocess:
    """A preset's name, a YAML/JSON file with the fields of ``Preprocess``, or those fields themselves.

    Raises:
        InputError: unknown preset, unreadable file, unknown or missing field.
    """
    where = str(spec)
    if isinstance(spec, Mapping):
        values, where = dict(spec), "preprocess"
    elif str(spec).replace("_", "-") in NAMED:
        return NAMED[str(spec).replace("_", "-")]
    else:
        values = _read_mapping(Path(spec))
    known = {f.name for f in fields(Preprocess)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise InputError(
            f"unknown preprocess field {unknown[0]!r}",
            where=where,
            next=f"fields: {', '.join(sorted(known))}",
        )
    if not {"height", "width"} <= set(values):
        raise InputError("a preprocess file needs height and width", where=where)
    values = {k: tuple(float(x) for x in v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return Preprocess(**values)
    except TypeError as exc:
        raise InputError(f"a preprocess field has the wrong type: {exc}", where=where) from exc


def _read_mapping(path: Path) -> dict[str, Any]:
    from edgetok.manifest import load_yaml

    if not path.is_file():
        raise InputError(
            f"no preset and no file called {str(path)!r}",
            next=f"presets: {', '.join(NAMED)}; or write a YAML file",
        )
    try:
        values = load_yaml(path.read_bytes(), where=str(path))
    except ArtifactError as exc:
        raise InputError(exc.message, where=str(path)) from exc
    if not isinstance(values, dict):
        raise InputError("expected a mapping of fields", where=str(path))
    return values


@dataclass(frozen=True)
class InputSpec:
    """One graph input: name, numpy dtype name, shape (open axes are strings or None)."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


def load_samples(
    path: Path,
    inputs: Sequence[InputSpec],
    *,
    preprocess: Preprocess | None = None,
    tokenizer: bytes | None = None,
    limit: int | None = None,
    longest: int | None = None,
) -> list[dict[str, np.ndarray]]:
    """Read calibration samples as feeds of batch 1, in a stable order.

    Args:
        path: an image folder, an ``.npz`` keyed by input name (first axis: samples), or a ``.txt`` of lines.
        inputs: of the graph; text inputs with a fixed second axis are padded and cut to it.
        preprocess: needed for images.
        tokenizer: tokenizer.json, needed for text.
        limit: at most this many, evenly spread over the files so that a sorted folder does not give one class.
        longest: tokens kept of a text when the graph leaves its length open.

    Raises:
        InputError: nothing usable, or something needed is missing; says which flag to add.
    """
    if path.is_dir():
        samples = list(_images(path, inputs, preprocess, limit))
    elif path.suffix == ".npz":
        samples = _npz(path, inputs, limit)
    elif path.suffix == ".txt":
        samples = _lines(path, inputs, tokenizer, limit, longest)
    elif path.exists():
        raise InputError(
            "samples are an image folder, an .npz keyed by input name, or a .txt of lines", where=str(path)
        )
    else:
        raise InputError("no such file or folder", where=str(path), next="check the path given to --calib")
    if not samples:
        raise InputError("no samples found", where=str(path), next="give a folder with .png or .jpg files")
    return samples


def _spread(count: int, limit: int | None) -> list[int]:
    if not limit or count <= limit:
        return list(range(count))
    return [i * count // limit for i in range(limit)]


def _images(
    folder: Path, inputs: Sequence[InputSpec], preprocess: Preprocess | None, limit: int | None
) -> Iterator[dict[str, np.ndarray]]:
    from PIL import Image as pil
    from PIL import UnidentifiedImageError

    if len(inputs) != 1:
        raise InputError(
            f"the model has {len(inputs)} inputs; an image folder feeds exactly one",
            where=str(folder),
            next=f"give an .npz keyed by: {', '.join(i.name for i in inputs)}",
        )
    if preprocess is None:
        raise InputError(
            "images need a preprocessing, and none was given (it is never guessed)",
            where=str(folder),
            next="add --preprocess imagenet-224 (or clip-224, or a YAML file)",
        )
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    for i in _spread(len(files), limit):
        try:
            with pil.open(files[i]) as image:
                if image.width * image.height > _MAX_PIXELS:
                    raise InputError(f"image of {image.width}x{image.height} px is over the limit", where=str(files[i]))
                yield {inputs[0].name: preprocess.apply(image)[None].astype(inputs[0].dtype, copy=False)}
        except (UnidentifiedImageError, OSError, ValueError) as exc:
            raise InputError(f"not a readable image: {exc}", where=str(files[i])) from exc


def _npz(path: Path, inputs: Sequence[InputSpec], limit: int | None) -> list[dict[str, np.ndarray]]:
    try:
        with np.load(path, allow_pickle=False) as data:
            missing = [i.name for i in inputs if i.name not in data]
            if missing:
                raise InputError(
                    f"no array for input {missing[0]!r}; the file has: {', '.join(data.files) or 'nothing'}",
                    where=str(path),
                    next="name the arrays as the model names its inputs",
                )
            arrays = {i.name: data[i.name].astype(i.dtype, copy=False) for i in inputs}
    except (ValueError, OSError, EOFError) as exc:
        raise ArtifactError(f"not a readable .npz: {exc}", where=str(path)) from exc
    for spec in inputs:
        if arrays[spec.name].ndim != len(spec.shape):
            raise InputError(
                f"input {spec.name!r} takes {len(spec.shape)} axes (the first is samples), the array has "
                f"{arrays[spec.name].ndim}",
                where=str(path),
            )
    counts = {len(a) for a in arrays.values()}
    if len(counts) != 1:
        raise InputError(f"the arrays have different sample counts: {sorted(counts)}", where=str(path))
    return [{n: a[i : i + 1] for n, a in arrays.items()} for i in _spread(counts.pop(), limit)]


def _lines(
    path: Path, inputs: Sequence[InputSpec], tokenizer: bytes | None, limit: int | None, longest: int | None
) -> list[dict[str, np.ndarray]]:
    if tokenizer is None:
        raise InputError(
            "text lines need a tokenizer.json beside the model, and there is none",
            where=str(path),
            next="give an .npz with token ids instead",
        )
    lines = [s for s in path.read_text("utf-8", errors="strict").splitlines() if s.strip()]
    return [encode_text([lines[i]], inputs, tokenizer, longest) for i in _spread(len(lines), limit)]


def encode_text(
    texts: Sequence[str], inputs: Sequence[InputSpec], tokenizer: bytes, longest: int | None = None
) -> dict[str, np.ndarray]:
    """Tokenize ``texts`` into the model's inputs: ids, mask and type ids, [B,S] int64 each.

    S is the graph's own length when it is fixed, else the longest text; shorter texts are padded and masked.
    """
    from tokenizers import Tokenizer

    tok = Tokenizer.from_str(tokenizer.decode("utf-8"))
    pad = pad_id(tokenizer)
    fixed = next((i.shape[1] for i in inputs if len(i.shape) == 2 and isinstance(i.shape[1], int)), None)
    tok.no_padding()
    kept = [n for n in (fixed, longest) if n]
    if kept:
        tok.enable_truncation(min(int(n) for n in kept))
    encoded = [tok.encode(t) for t in texts]
    length = int(fixed) if fixed else max(len(e.ids) for e in encoded)
    ids = np.full((len(texts), length), pad, np.int64)
    mask = np.zeros((len(texts), length), np.int64)
    types = np.zeros((len(texts), length), np.int64)
    for row, e in enumerate(encoded):
        ids[row, : len(e.ids)], mask[row, : len(e.ids)], types[row, : len(e.ids)] = e.ids, 1, e.type_ids
    feeds: dict[str, np.ndarray] = {}
    for spec in inputs:
        kind = next((v for k, v in (("mask", mask), ("type", types), ("ids", ids)) if k in spec.name.lower()), None)
        if kind is None:
            raise InputError(f"do not know how to fill input {spec.name!r} from text", next="give an .npz instead")
        feeds[spec.name] = kind.astype(spec.dtype, copy=False)
    return feeds


def pad_id(tokenizer: bytes) -> int:
    """The padding id a tokenizer.json names, else 0."""
    config = json.loads(tokenizer)
    padding = config.get("padding")
    if isinstance(padding, dict) and isinstance(padding.get("pad_id"), int):
        return int(padding["pad_id"])
    for token in config.get("added_tokens") or []:
        if token.get("content") in ("[PAD]", "<pad>", "<|pad|>"):
            return int(token["id"])
    return 0
