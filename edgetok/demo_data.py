"""Images for a machine that has none: drawn by program, the same on every machine, good enough to calibrate a demo.

Photographs have a 1/f amplitude spectrum, correlated colours, edges and smooth shading. ``scene`` draws all four: a
1/f field per opponent colour channel (Field 1987: amplitude falls as 1/f), shaded ellipses and polygons with textured
insides laid over each other, then a crop and a random light. They are no substitute for one's own images: figures
measured with them say how fast an artifact is, not how accurate.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

# Opponent channels (light, red-green, blue-yellow) to RGB; most of a photograph's variance is in the first.
_OPPONENT = np.array([[0.577, 0.707, 0.408], [0.577, -0.707, 0.408], [0.577, 0.0, -0.816]])
_STRENGTH = np.array([1.0, 0.28, 0.2])


def pink(rng: np.random.Generator, height: int, width: int, *, power: float = 1.0) -> np.ndarray:
    """A field [height, width] float64 of mean 0 and deviation 1 whose amplitude spectrum falls as f**-power."""
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :]
    radius = np.hypot(fy, fx)
    radius[0, 0] = np.inf
    noise = rng.standard_normal((height, width))
    field = np.fft.irfft2(np.fft.rfft2(noise) / radius**power, s=(height, width))
    return np.asarray(field / field.std(), dtype=np.float64)


def _colours(rng: np.random.Generator, height: int, width: int, power: float) -> np.ndarray:
    fields = np.stack([pink(rng, height, width, power=power) for _ in range(3)], axis=-1)
    return np.asarray((fields * _STRENGTH) @ _OPPONENT.T)


def _shape(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coverage [H, W] in 0..1 and shading [H, W] of one ellipse or convex polygon; y, x run over 0..1."""
    cy, cx = rng.uniform(0.1, 0.9, 2)
    angle = rng.uniform(0, np.pi)
    ry, rx = rng.uniform(0.08, 0.35, 2)
    v = ((y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)) / ry
    u = ((y - cy) * np.sin(angle) + (x - cx) * np.cos(angle)) / rx
    if rng.random() < 0.5:
        distance = np.hypot(u, v)
    else:
        turns = np.linspace(0, 2 * np.pi, int(rng.integers(3, 7)), endpoint=False) + rng.uniform(0, 1)
        distance = np.max([u * np.cos(t) + v * np.sin(t) for t in turns], axis=0)
    soft = 1 / (min(ry, rx) * 0.5 * y.shape[0])  # half a pixel of the drawing
    return np.clip((1 - distance) / soft, 0, 1), 1 - 0.35 * v


def scene(seed: int, *, height: int = 256, width: int = 256) -> np.ndarray:
    """One image, uint8 [height, width, 3].

    Args:
        seed: the same seed gives the same image.
    """
    rng = np.random.default_rng([0xED6E, seed])
    image = 0.45 + 0.14 * _colours(rng, height, width, rng.uniform(1.0, 1.5))
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    for _ in range(int(rng.integers(2, 7))):
        cover, shade = _shape(rng, y, x)
        inside = rng.uniform(0.1, 0.9, 3) + 0.08 * _colours(rng, height, width, rng.uniform(0.7, 1.3))
        image += cover[..., None] * (inside * shade[..., None] - image)
    light = 1 + rng.uniform(-0.25, 0.25) * (y - 0.5) + rng.uniform(-0.25, 0.25) * (x - 0.5)
    return np.asarray(np.clip(image * light[..., None], 0, 1) * 255 + 0.5).astype(np.uint8)


def crops(count: int, *, seed: int = 0, side: int = 256) -> list[np.ndarray]:
    """``count`` images uint8 [side, side, 3]: per scene one whole view and three crops, some mirrored.

    Args:
        seed: of everything drawn.
        side: pixels.
    """
    from PIL import Image

    rng = np.random.default_rng([0xC40B, seed])
    images: list[np.ndarray] = []
    while len(images) < count:
        big = scene(seed * 100_003 + len(images), height=side * 3 // 2, width=side * 3 // 2)
        for scale in (1.0, *rng.uniform(0.35, 0.9, 3)):
            size = round(scale * len(big))
            top, left = rng.integers(0, len(big) - size + 1, 2)
            crop = big[top : top + size, left : left + size]
            if rng.random() < 0.5:
                crop = crop[:, ::-1]
            resized = Image.fromarray(np.ascontiguousarray(crop)).resize((side, side), Image.Resampling.BICUBIC)
            images.append(np.asarray(resized))
    return images[:count]


def write_images(folder: Path, count: int, *, seed: int = 0, side: int = 256) -> Path:
    """Write ``crops`` as PNG files ``000.png`` ... into ``folder`` and return it."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(crops(count, seed=seed, side=side)):
        Image.fromarray(image).save(folder / f"{i:03d}.png", optimize=False)
    return folder
