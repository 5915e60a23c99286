"""Dense outputs: the saliency map of ``vit-s-focus`` with fewer tokens against the unreduced model's map.

    python benchmarks/saliency.py [--images 64] [SPEC ...]

Cosine per test image (the unreduced map is the truth), removed share, FLOPs of the blocks and measured speed-up of the
whole model in fp32, batch 1, against the cleaned-up graph in the same interleaved run.
"""

from __future__ import annotations

import argparse

import datasets
import numpy as np
import onnx_ir as ir
import vit

from edgetok.converters.graph.cleanup import clean_up
from edgetok.converters.graph.find import find_blocks
from edgetok.converters.reduce.apply import reduce_model
from edgetok.converters.reduce.spec import parse_reduce
from edgetok.converters.sources.loader import load_source
from edgetok.devices.base import Executable
from edgetok.gates import cosine
from edgetok.measuring import interleave, ratio
from edgetok.preprocess import load_preprocess
from edgetok.stages import compile_stage
from edgetok.weights import proto_bytes

SPECS = (
    "tomesd:removed=0.1",
    "tomesd:removed=0.3",
    "expedit:sharpness=10",
    "expedit:alpha=6,sharpness=10",
    "tome:removed=0.3,schedule=increasing",
)


def compiled(model: ir.Model, threads: int) -> Executable:
    """On cpu-ort, from memory."""
    return compile_stage(proto_bytes(ir.serde.serialize_model(model)), "cpu_ort", threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("specs", nargs="*", default=SPECS)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    a = parser.parse_args()
    model = load_source(vit.model_file()).model
    clean_up(model)
    preprocess = load_preprocess(vit.PREPROCESS)
    images, _ = datasets.cifar_arrays("test", 0, a.images)
    feeds = [{"input_image": preprocess.apply(image)[None]} for image in images]
    whole = compiled(model, a.threads)
    name = whole.outputs[0].name
    truth = [whole.run(x)[name] for x in feeds]
    print(f"saliency map, {a.images} test images, {a.threads} threads")
    print(f"{'':40} {'removed':>8} {'FLOPs':>7} {'cosine':>8} {'worst':>8} {'speed-up':>9}   95 % CI")
    for spec in a.specs:
        copy = model.clone()
        report = reduce_model(copy, find_blocks(copy), parse_reduce(spec))
        short = compiled(copy, a.threads)
        found = [cosine(t, short.run(x)[name]) for t, x in zip(truth, feeds)]
        times = interleave(
            {"whole": lambda: whole.run(feeds[0]), "short": lambda s=short: s.run(feeds[0])}, rounds=a.rounds
        )
        gain = ratio(times["whole"], times["short"])
        print(
            f"{spec:40} {report.removed:8.3f} {report.flops_ratio:7.3f} {np.mean(found):8.4f} {min(found):8.4f}"
            f" {gain.value:8.2f}x   {gain.low:.2f}-{gain.high:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
