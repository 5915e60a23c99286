"""Preprocessing and calibration samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgetok.errors import ArtifactError, InputError
from edgetok.preprocess import NAMED, InputSpec, Preprocess, load_preprocess, load_samples

IMAGE = InputSpec("x", "float32", ("batch", 3, 8, 8))
PLAIN = Preprocess(8, 8)


def folder(tmp_path: Path, count: int = 5) -> Path:
    for i in range(count):
        Image.fromarray(np.full((10, 12, 3), 10 * i, np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_constant_image_becomes_the_normalised_constant() -> None:
    pre = Preprocess(4, 6, mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))
    x = pre.apply(np.full((9, 9, 3), 255, np.uint8))
    assert x.shape == (3, 4, 6)
    assert x.dtype == np.float32
    # 255 * (1/255) differs from 1 by at most one float32 ulp.
    np.testing.assert_allclose(x[:, 0, 0], [1.0, 0.75, 0.5], rtol=2e-7)


def test_shorter_side_then_centre_crop() -> None:
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 15:25] = 200
    x = Preprocess(10, 10, "shorter", 10, interpolation="nearest", scale=1.0).apply(image)
    assert x.shape == (3, 10, 10)
    assert x[0, 5].tolist() == [0, 0, 0, 200, 200, 200, 200, 200, 0, 0] or x[0, 5].sum() == 1000


def test_presets_survive_a_round_trip() -> None:
    for pre in NAMED.values():
        assert load_preprocess(pre.to_dict()) == pre


def test_file_with_an_unknown_field_names_it(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("height: 8\nwidth: 8\nresise: exact\n")
    with pytest.raises(InputError, match="resise"):
        load_preprocess(file)


def test_images_without_preprocess_are_refused_with_the_flag(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="never guessed") as caught:
        load_samples(folder(tmp_path), [IMAGE])
    assert "--preprocess" in str(caught.value.next)


def test_limit_spreads_over_the_folder(tmp_path: Path) -> None:
    samples = load_samples(folder(tmp_path, 6), [IMAGE], preprocess=PLAIN, limit=3)
    assert [round(float(s["x"].max()) * 255) for s in samples] == [0, 20, 40]
    assert samples[0]["x"].shape == (1, 3, 8, 8)


def test_broken_image_names_the_file(tmp_path: Path) -> None:
    (folder(tmp_path) / "9.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match="readable image") as caught:
        load_samples(tmp_path, [IMAGE], preprocess=PLAIN)
    assert "9.png" in str(caught.value.where)


def test_empty_folder_and_missing_path_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no samples"):
        load_samples(tmp_path, [IMAGE], preprocess=PLAIN)
    with pytest.raises(InputError, match="no such"):
        load_samples(tmp_path / "nothing", [IMAGE], preprocess=PLAIN)


def test_npz_is_split_by_sample_and_cast(tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", x=np.arange(2 * 3 * 8 * 8, dtype=np.float64).reshape(2, 3, 8, 8))
    samples = load_samples(tmp_path / "c.npz", [IMAGE])
    assert len(samples) == 2
    assert samples[1]["x"].dtype == np.float32
    with pytest.raises(InputError, match="no array for input 'y'"):
        load_samples(tmp_path / "c.npz", [InputSpec("y", "float32", ("batch", 3))])


def test_pickled_npz_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "p.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ArtifactError, match="readable"):
        load_samples(tmp_path / "p.npz", [IMAGE])
