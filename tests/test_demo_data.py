"""Drawn images: the same everywhere, and like photographs in the one statistic they claim."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest

from edgetok.demo_data import crops, pink, scene, write_images


def test_same_seed_same_images() -> None:
    np.testing.assert_array_equal(crops(5, seed=1, side=64), crops(5, seed=1, side=64))
    assert not np.array_equal(crops(1, seed=1, side=64)[0], crops(1, seed=2, side=64)[0])


def test_images_differ_from_each_other() -> None:
    assert len({hashlib.sha256(image.tobytes()).hexdigest() for image in crops(16, side=48)}) == 16


def test_scene_is_an_rgb_image_with_contrast() -> None:
    image = scene(0, height=96, width=64)
    assert (image.shape, image.dtype) == ((96, 64, 3), np.uint8)
    assert image.std() > 15


@pytest.mark.parametrize("power", [0.7, 1.0, 1.5])
def test_pink_amplitude_falls_as_the_power_of_frequency(power: float) -> None:
    field = pink(np.random.default_rng(0), 256, 256, power=power)
    amplitude = np.abs(np.fft.fft2(field))
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(256), np.fft.fftfreq(256)))
    rings = np.geomspace(4 / 256, 0.5, 12)
    means = [amplitude[(radius >= a) & (radius < b)].mean() for a, b in itertools.pairwise(rings)]
    slope = np.polyfit(np.log(np.sqrt(rings[:-1] * rings[1:])), np.log(means), 1)[0]
    # Rings of finite width at low frequency hold few values: the fit is good to a few percent.
    assert slope == pytest.approx(-power, abs=0.1)


def test_write_images_writes_readable_files(tmp_path: Path) -> None:
    from PIL import Image

    folder = write_images(tmp_path / "images", 3, side=32)
    files = sorted(folder.iterdir())
    assert [f.name for f in files] == ["000.png", "001.png", "002.png"]
    assert all(Image.open(f).size == (32, 32) for f in files)
