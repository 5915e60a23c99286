"""Every broken file is refused with its code and a sentence that says what, where and why; nothing else is raised."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from attacks.make import CASES, Case, external_model, save, tiny_artifact, tiny_model

from edgetok.artifact import verify_artifact
from edgetok.converters.sources.loader import load_source
from edgetok.errors import ArtifactError, EdgeTokError


def _load(path: Path) -> None:
    """What any command does with a file it is given, and then what verify does."""
    load_source(path)
    if path.suffix != ".onnx":
        verify_artifact(path).raise_first()


@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_broken_file_is_refused(case: Case, tmp_path: Path) -> None:
    path = case.build(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(EdgeTokError) as caught:
        _load(path)
    error = caught.value
    assert error.code == case.code, f"{error!r}"
    for word in case.words:
        assert word in str(error), str(error)
    assert error.where, f"no place named: {error}"
    assert len(error.message) < 600
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 200 << 20, "a refusal must not allocate what the file asked for"


def test_case_names_are_unique() -> None:
    assert len({c.name for c in CASES}) == len(CASES)


def test_unbroken_files_load(tmp_path: Path) -> None:
    for name, model in (("inside", tiny_model()), ("outside", external_model(tmp_path))):
        path = save(tmp_path, model)
        assert load_source(path).model.graph.initializers["w"].const_value is not None, name
    _load(tiny_artifact(tmp_path / "art"))
    _load(tiny_artifact(tmp_path / "art.edgetok"))


def test_link_typed_by_the_user_is_followed(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    save(real, external_model(real))
    (tmp_path / "shortcut.onnx").symlink_to(real / "model.onnx")
    (tmp_path / "folder").symlink_to(real)
    assert load_source(tmp_path / "shortcut.onnx").bytes == load_source(tmp_path / "folder").bytes


def test_external_data_replaced_after_loading_is_not_seen(tmp_path: Path) -> None:
    path = save(tmp_path, external_model(tmp_path))
    source = load_source(path)
    (tmp_path / "new").write_bytes(bytes(1024))
    (tmp_path / "new").replace(tmp_path / "weights.bin")
    assert source.model.graph.initializers["w"].const_value.numpy().sum() == 255 * 128


def test_two_names_for_one_external_file_are_refused(tmp_path: Path) -> None:
    model = external_model(tmp_path)
    twin = model.graph.initializer.add()
    twin.CopyFrom(model.graph.initializer[0])
    twin.name, twin.external_data[0].value = "v", "./weights.bin"
    with pytest.raises(ArtifactError, match="are one file"):
        load_source(save(tmp_path, model))
