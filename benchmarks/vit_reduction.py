"""Token reduction on a real ViT: removed share, FLOPs, time, probe accuracy and agreement, method by method.

    python benchmarks/vit_reduction.py table  [--model M.onnx] [--cifar DIR] [--images 2000] [--no-time]
    python benchmarks/vit_reduction.py search --method tome --cost 0.7 [--images 200] [--seconds 600]

The model is ``vit-s-focus`` cleaned up, cut at the backbone's last norm, fp32. Accuracy is that of the CIFAR-10 probe
in ``data/cifar10_probe_vit_s_focus.npz`` on concat(CLS, mean of patch tokens). Schedules are searched on training
images (the probe saw 0-5999; 10000 on are used) and reported on test images. Times are interleaved with the unreduced
clean graph.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from PIL import Image

from edgetok.converters.graph.cleanup import clean_up
from edgetok.converters.graph.find import find_blocks
from edgetok.converters.graph.outputs import cut_outputs
from edgetok.converters.reduce import METHODS
from edgetok.converters.reduce.apply import ReduceReport, reduce_model
from edgetok.converters.reduce.schedule import SearchSpace, Trial, search
from edgetok.converters.reduce.spec import parse_reduce
from edgetok.converters.sources.onnx import load_onnx
from edgetok.measuring import interleave, ratio

HERE = Path(__file__).resolve().parent
FEATURES = "/backbone/layernorm/Add_1_output_0"
MEAN = np.array([0.485, 0.456, 0.406], np.float32)[:, None, None]
STD = np.array([0.229, 0.224, 0.225], np.float32)[:, None, None]

# Found by ``search`` on training images; see docs/methods.md.
SCHEDULES: dict[str, tuple[str, tuple[int, ...] | None]] = {
    "tome, searched, 0.70": ("tome", (0, 4, 10, 19, 9, 25, 30, 0, 17, 23, 29, 18)),
    "pitome hybrid, searched, 0.70": (
        "pitome:form=hybrid,margin=0.9,prop_attn=true",
        (6, 4, 7, 15, 0, 30, 20, 18, 22, 19, 20, 33),
    ),
    "pitome hybrid, searched, 0.60": (
        "pitome:form=hybrid,margin=0.9,prop_attn=true",
        (8, 6, 10, 21, 0, 41, 28, 25, 30, 26, 28, 0),
    ),
    "tome, searched, 0.60": ("tome", (0, 6, 14, 26, 12, 34, 41, 0, 23, 32, 34, 7)),
    "tome, increasing, 0.85": ("tome", (1, 3, 4, 5, 7, 8, 9, 10, 12, 13, 14, 14)),
    "tome, increasing, 0.70": ("tome", (3, 5, 8, 11, 13, 16, 19, 21, 24, 26, 29, 27)),
    "tome, increasing, 0.60": ("tome", (4, 7, 11, 15, 19, 22, 26, 30, 33, 37, 26, 13)),
    "tome, increasing, 0.50": ("tome", (5, 11, 16, 22, 27, 32, 38, 43, 31, 15, 8, 3)),
    "expedit": ("expedit:sharpness=10", (0, 0, 0, 0, 112, 0, 0, 0, 0, 0, 0, 0)),
    "token_transforming": ("token_transforming:tau=0.02", (3, 5, 8, 11, 13, 16, 19, 21, 24, 26, 29, 27)),
    "tomesd": ("tomesd", (72, 72, 72, 72, 72, 72, 72, 72, 72, 72, 72, 71)),
    "zero_tprune": ("zero_tprune:s_share=0.8", (3, 5, 8, 11, 13, 16, 19, 21, 24, 26, 29, 27)),
    "pitome as published": ("pitome:form=hybrid-first", (3, 5, 8, 11, 13, 16, 19, 21, 24, 26, 29, 27)),
    "tome, constant, 0.70": ("tome", (12, 12, 12, 12, 12, 12, 12, 12, 12, 12, 12, 6)),
}


def images(cifar: Path, split: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n,3,224,224] (resized once, kept under benchmarks/cache) and labels [n]."""
    file = HERE / "cache" / f"cifar-{split}-{start}-{stop}.npy"
    labels = json.loads((cifar / f"{split}_lables.json").read_text("utf-8"))[start:stop]
    if not file.is_file():
        file.parent.mkdir(exist_ok=True)
        out = np.empty((stop - start, 3, 224, 224), np.uint8)
        sheets: dict[str, np.ndarray] = {}
        for i in range(start, stop):
            name = "test_batch.png" if split == "test" else f"data_batch_{i // 10000 + 1}.png"
            if name not in sheets:
                sheets[name] = np.asarray(Image.open(cifar / name).convert("RGB")).reshape(-1, 32, 32, 3)
            big = Image.fromarray(sheets[name][i % 10000]).resize((224, 224), Image.Resampling.BICUBIC)
            out[i - start] = np.asarray(big).transpose(2, 0, 1)
        np.save(file, out)
    return np.load(file, mmap_mode="r"), np.asarray(labels)


def tensor(pixels: np.ndarray) -> np.ndarray:
    """float32, ImageNet mean and deviation."""
    return (pixels.astype(np.float32) / 255 - MEAN) / STD


class Probe:
    """Linear head on concat(CLS, mean of the patch rows)."""

    def __init__(self) -> None:
        with np.load(HERE / "data" / "cifar10_probe_vit_s_focus.npz") as f:
            self.weight, self.bias = f["weight"], f["bias"]

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return np.concatenate([tokens[:, 0], tokens[:, 1:].mean(1)], 1) @ self.weight.T + self.bias


class Bench:
    """Builds reduced models and runs them."""

    def __init__(self, model: Path, threads: int) -> None:
        self.threads, self.probe = threads, Probe()
        graph = load_onnx(model).model
        clean_up(graph, {graph.graph.inputs[0].name or "": ["batch", 3, 224, 224]})
        cut_outputs(graph, [FEATURES])
        self.clean = ir.to_proto(graph)

    def build(
        self, spec: str = "", counts: Sequence[int] | None = None
    ) -> tuple[ort.InferenceSession, ReduceReport | None]:
        """A session on the clean graph, reduced when a spec is given."""
        graph = ir.from_proto(self.clean)
        report = None
        if spec:
            prunes = METHODS.get(spec.split(":")[0]).kind == "prune"
            report = reduce_model(
                graph, find_blocks(graph), parse_reduce(spec), counts=counts, outputs="reduced" if prunes else "restore"
            )
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = self.threads, 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        data = ir.to_proto(graph).SerializeToString()
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]), report

    def logits(self, session: ort.InferenceSession, pixels: np.ndarray, batch: int = 8) -> np.ndarray:
        """Probe logits [n,10]."""
        name, out = session.get_inputs()[0].name, []
        for i in range(0, len(pixels), batch):
            tokens = session.run([session.get_outputs()[0].name], {name: tensor(pixels[i : i + batch])})[0]
            out.append(self.probe.logits(tokens))
        return np.concatenate(out)


def divergence(full: np.ndarray, reduced: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of the probe's answers: a finer measure of agreement than equal answers."""
    p, q = (x - x.max(1, keepdims=True) for x in (full, reduced))
    p, q = p - np.log(np.exp(p).sum(1, keepdims=True)), q - np.log(np.exp(q).sum(1, keepdims=True))
    return float((np.exp(p) * (p - q)).sum(1).mean())


def unlike(full: np.ndarray, reduced: np.ndarray) -> float:
    """Mean over images of the relative distance of centred logits: steady with few images, as a search needs it."""
    p, q = (x - x.mean(1, keepdims=True) for x in (full, reduced))
    return float((np.linalg.norm(p - q, axis=1) / np.linalg.norm(p, axis=1)).mean())


def paired_interval(full: np.ndarray, reduced: np.ndarray) -> float:
    """Half width of the 95 % interval of the mean paired difference, in points."""
    difference = reduced.astype(float) - full.astype(float)
    return float(196 * difference.std(ddof=1) / np.sqrt(len(difference)))


def run_search(bench: Bench, args: argparse.Namespace) -> list[Trial]:
    """Schedules of one method at a cost, ranked by agreement on training images."""
    pixels, _ = images(args.cifar, "train", 10000, 10000 + args.images)
    full = bench.logits(bench.build()[0], pixels)
    method = METHODS.get(args.method.split(":")[0])
    space = SearchSpace(257, 1, 12, 384, cost=args.cost)

    def score(counts: tuple[int, ...]) -> float:
        return -unlike(full, bench.logits(bench.build(args.method, counts)[0], pixels))

    def tell(done: int, most: int, trial: Trial) -> None:
        print(f"{done:3d}/{most} {trial.score:.4f} {trial.cost:.3f} {trial.label:10} {list(trial.counts)}", flush=True)

    return search(score, space, method, samples=args.samples, seconds=args.seconds, seed=args.seed, on_trial=tell)


def table(bench: Bench, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per entry of SCHEDULES."""
    pixels, labels = images(args.cifar, "test", 0, args.images)
    chosen = {n: v for n, v in SCHEDULES.items() if not args.only or args.only in n}
    base = bench.build()[0]
    full = _kept(args, "unreduced", lambda: bench.logits(base, pixels))
    right = full.argmax(1) == labels
    print(f"unreduced: {100 * right.mean():.2f} % on {len(labels)} test images", flush=True)
    rows: list[dict[str, Any]] = []
    for name, (spec, counts) in chosen.items():
        session, report = bench.build(spec, counts)
        if report is None:
            continue
        answer = _kept(args, f"{spec} {report.counts}", lambda s=session: bench.logits(s, pixels))  # type: ignore[misc]
        hit = answer.argmax(1) == labels
        row = {
            "method": name,
            "counts": list(report.counts),
            "removed": round(report.removed, 4),
            "flops": round(report.flops_ratio, 4),
            "accuracy": round(100 * float(hit.mean()), 2),
            "drop": round(100 * float(right.mean() - hit.mean()), 2),
            "interval": round(paired_interval(right, hit), 2),
            "agree": round(100 * float((answer.argmax(1) == full.argmax(1)).mean()), 2),
            "kl": round(divergence(full, answer), 5),
            "nodes": report.nodes_added,
        }
        if not args.no_time:
            row |= speed(base, session, report.flops_ratio, args.rounds)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def _kept(args: argparse.Namespace, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Answers on the test images, kept beside them, so that a run that was stopped goes on (--fresh forgets them)."""
    key = hashlib.sha256(name.encode()).hexdigest()[:12]
    file = HERE / "cache" / f"logits-{key}-test-0-{args.images}.npy"
    if args.fresh or not file.is_file():
        np.save(file, make())
    return np.load(file)


def speed(base: ort.InferenceSession, session: ort.InferenceSession, flops: float, rounds: int) -> dict[str, float]:
    """Speed-up at batch 1 over the unreduced clean graph, and as a share of what the FLOPs promise."""
    feed = {base.get_inputs()[0].name: np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)}
    times = interleave(
        {"base": lambda: base.run(None, feed), "reduced": lambda: session.run(None, feed)}, rounds=rounds
    )
    gain = ratio(times["base"], times["reduced"])
    return {
        "speedup": round(gain.value, 3),
        "low": round(gain.low, 3),
        "high": round(gain.high, 3),
        "of_promise": round(gain.value * flops, 3),
        "base_ms": round(times["base"].p50_ms, 1),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["table", "search"])
    parser.add_argument("--model", type=Path, help="vit_s_focus.onnx; pulled when left out")
    parser.add_argument("--cifar", type=Path, help="folder of the CIFAR-10 sheets; fetched when left out")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--fresh", action="store_true", help="do not use kept answers")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--method", default="tome", help="method or full spec to search schedules for")
    parser.add_argument("--cost", type=float, default=0.7, help="FLOPs relative to unreduced")
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args(argv)
    if args.cifar is None:
        from datasets import cifar

        args.cifar = cifar()
    if args.model is None:
        from edgetok.models import pull

        args.model = pull("vit-s-focus")
    bench, start = Bench(args.model, args.threads), time.monotonic()
    if args.what == "search":
        for trial in run_search(bench, args)[:5]:
            print(f"{trial.score:.5f} {trial.cost:.3f} {trial.label} {','.join(map(str, trial.counts))}")
    else:
        rows = table(bench, args)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1), "utf-8")
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
