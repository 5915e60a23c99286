"""The main figures for ``vit-s-focus``: answers on CIFAR-10, speed against onnxruntime and OpenVINO in one run.

    python benchmarks/vit.py [--reduce 0.3] [--samples 2000] [--json results.json]

Runs the real commands: ``edgetok convert`` with the CIFAR-10 probe as gate (calibration and schedule from training
images only), then times source, artifact and peers in turn. Needs the ``bench`` extra and npm for the images.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import numpy as np
import yaml

from edgetok import load
from edgetok.converters.graph.outputs import cut_outputs
from edgetok.converters.sources.loader import load_source
from edgetok.machine import conditions
from edgetok.measuring import interleave, ratio
from edgetok.models import pull
from edgetok.peers import open_peer
from edgetok.preprocess import load_preprocess
from edgetok.stages import save_stage

HERE = Path(__file__).parent
FEATURES = "/backbone/layernorm/Add_1_output_0"
PREPROCESS = HERE / "data" / "cifar-224.yaml"
PROBE = HERE / "data" / "cifar10_probe_vit_s_focus.npz"
CALIB = ("train", 10000, 11024)  # the probe was trained on training images 0-5999


def model_file() -> Path:
    """The pinned public model."""
    folder = pull("vit-s-focus")
    return folder if folder.is_file() else next(folder.rglob("*.onnx"))


def eval_file(folder: Path, samples: int) -> Path:
    """An ``--eval`` file for the probe on test images 0 to ``samples``."""
    cifar = datasets.cifar()
    file = folder / "probe.yaml"
    values = {
        "kind": "probe",
        "data": str(cifar / "test_batch.png"),
        "labels": str(cifar / "test_lables.json"),
        "samples": samples,
        "head": str(PROBE),
        "features": FEATURES,
        "pool": "cls+mean",
        "limit": 0.5,
    }
    file.write_text(yaml.safe_dump(values), "utf-8")
    return file


def convert(out: Path, evaluation: Path | None, arguments: list[str], outputs: str = FEATURES) -> dict:
    """Run ``edgetok convert``; returns its JSON (also when a gate fails)."""
    command = [sys.executable, "-P", "-m", "edgetok", "convert", str(model_file()), "-o", str(out), "--force", "--json"]
    command += ["--calib", str(datasets.cifar_folder(*CALIB)), "--preprocess", str(PREPROCESS), "-t", "2"]
    command += ["--outputs", outputs] if outputs else []
    command += ["--eval", str(evaluation)] if evaluation else []
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    try:
        found = json.loads(done.stdout)
    except json.JSONDecodeError:
        raise SystemExit(done.stderr) from None
    found["exit"] = done.returncode
    return found


def peers(artifact: Path, rounds: int, threads: int) -> list[tuple[str, float, float, float, float]]:
    """(name, p50 ms, speed-up of the artifact over it, low, high), all timed in turn on one image."""
    images, _ = datasets.cifar_arrays("test", 0, 1)
    x = {"input_image": load_preprocess(PREPROCESS).apply(images[0])[None]}
    with tempfile.TemporaryDirectory() as folder:
        model = load_source(model_file()).model
        cut_outputs(model, [FEATURES])
        source = save_stage(model, Path(folder) / "source.onnx")
        engines = {"onnxruntime fp32": open_peer("onnxruntime", source, threads)}
        openvino = {"openvino fp32": "f32", "openvino bf16": "bf16"}
        calls = {}
        for name, hint in openvino.items():
            calls[name] = openvino_call(source, hint, threads, x)
        for name, engine in engines.items():
            engine.prepare(x)
            calls[name] = lambda e=engine: e.call(x)
        with load(artifact, device="cpu-ort", threads=threads) as session:
            calls["edgetok"] = lambda: session.run(x)
            times = interleave(calls, rounds=rounds, warmup=5, max_seconds=120, settle=1)
    rows = []
    for name, timing in times.items():
        r = ratio(timing, times["edgetok"])
        rows.append((name, timing.p50_ms, r.value, r.low, r.high))
    return sorted(rows, key=lambda row: -row[1])


def openvino_call(source: Path, hint: str, threads: int, x: dict[str, np.ndarray]):
    """A bound OpenVINO request in the given precision."""
    import openvino as ov

    core = ov.Core()
    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    model = core.read_model(str(source))
    model.reshape({name: list(value.shape) for name, value in x.items()})
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return lambda: request.infer(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reduce", default="0.3")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="keep the artifact here")
    parser.add_argument("--json", type=Path)
    parser.add_argument("extra", nargs="*", help="further flags of edgetok convert, after --")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = a.keep or Path(folder) / "vit-edge"
        evaluation = eval_file(Path(folder), a.samples) if a.samples else None
        found = convert(out, evaluation, ["--reduce", a.reduce, "--precision", "int8", *a.extra])
        print(json.dumps({k: v for k, v in found.items() if k != "recipe"}, indent=1))
        if found["exit"]:
            raise SystemExit(found["exit"])
        rows = peers(out, a.rounds, a.threads)
    print(f"\nvit-s-focus backbone, 257 tokens, batch 1, {a.threads} threads, interleaved, {a.rounds} rounds")
    print(f"{'engine':20} {'p50 ms':>8} {'edgetok is':>11}   95 % CI")
    for name, p50, value, low, high in rows:
        print(f"{name:20} {p50:8.1f} {value:10.2f}x   {low:.2f}-{high:.2f}")
    if a.json:
        a.json.write_text(json.dumps({"convert": found, "rows": rows, "conditions": conditions(a.threads)}, indent=1))


if __name__ == "__main__":
    main()
