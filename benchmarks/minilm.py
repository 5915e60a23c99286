"""The main figures for ``minilm-l6``: INT8 against fp32, MRPC answers, and batches without padding.

    python benchmarks/minilm.py [--rounds 40] [--processor-time] [--json results.json]

Runs the real command: ``edgetok convert`` with MRPC as gate, calibrated on SST-2 sentences. Then times source and
artifact in turn. ``--processor-time`` counts processor time of one thread instead of the wall clock: what to use on a
machine that is busy with other work. Needs the ``bench`` extra.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import yaml

from edgetok import Session, load
from edgetok.converters.graph.packing import pack_model
from edgetok.converters.sources.loader import load_source
from edgetok.machine import conditions
from edgetok.measuring import Timing, interleave, ratio
from edgetok.models import pull
from edgetok.stages import save_stage

TOKENS, BATCH = 128, 64


def table(task: str) -> dict[str, list]:
    """Columns of a GLUE validation set."""
    return pa.ipc.open_stream(str(datasets.glue(task))).read_all().to_pydict()


def sentences() -> list[str]:
    """SST-2 and MRPC sentences, in their order."""
    mrpc = table("mrpc")
    return [s.strip() for s in (*table("sst2")["sentence"], *mrpc["sentence1"], *mrpc["sentence2"])]


def write_data(folder: Path) -> tuple[Path, Path]:
    """Calibration lines (SST-2) and the eval file (MRPC)."""
    calib, pairs, evaluation = folder / "calib.txt", folder / "mrpc.jsonl", folder / "mrpc.yaml"
    calib.write_text("\n".join(s.strip() for s in table("sst2")["sentence"][:128]), "utf-8")
    mrpc = table("mrpc")
    rows = zip(mrpc["sentence1"], mrpc["sentence2"], mrpc["label"], strict=True)
    lines = [json.dumps({"text_a": a, "text_b": b, "label": label}) for a, b, label in rows]
    pairs.write_text("\n".join(lines), "utf-8")
    values = {"kind": "pairs", "data": str(pairs), "metric": "auc", "limit": 1.0}
    evaluation.write_text(yaml.safe_dump(values), "utf-8")
    return calib, evaluation


def convert(folder: Path, out: Path, threads: int) -> dict:
    """Run ``edgetok convert``; returns its JSON."""
    calib, evaluation = write_data(folder)
    command = [sys.executable, "-P", "-m", "edgetok", "convert", str(pull("minilm-l6")), "-o", str(out), "--force"]
    command += ["--json", "--precision", "int8", "--calib", str(calib), "--eval", str(evaluation), "-t", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr + done.stdout)
    return json.loads(done.stdout)


def source_files(folder: Path) -> Path:
    """The source graph in fp32 with its padding-free form and tokenizer beside it."""
    source = load_source(pull("minilm-l6"))
    save_stage(pack_model(source.model), folder / "source.packed.onnx")
    for name in ("tokenizer.json", "config.json"):
        (folder / name).write_bytes(source.files[name])
    return save_stage(source.model, folder / "source.onnx")


def measure(calls: dict[str, Callable[[], object]], rounds: int, processor: bool) -> dict[str, Timing]:
    """Timings in turn, by the wall clock or by processor time."""
    if not processor:
        return interleave(calls, rounds=rounds, warmup=3, max_seconds=120)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-1, rounds):
        for name in list(calls) if turn % 2 else reversed(list(calls)):
            before = time.process_time()
            calls[name]()
            if turn >= 0:
                samples[name].append((time.process_time() - before) * 1e3)
    return {name: Timing(tuple(s)) for name, s in samples.items()}


def show(title: str, rows: list[tuple[str, str, dict[str, Timing]]]) -> list[dict]:
    """Print p50 of two engines and their ratio per row."""
    print(f"\n{title}\n{'':34} {'slow ms':>9} {'fast ms':>9} {'ratio':>7}   95 % CI")
    found = []
    for slow, fast, times in rows:
        r = ratio(times[slow], times[fast])
        a, b = times[slow].p50_ms, times[fast].p50_ms
        print(f"{slow + ' / ' + fast:34} {a:9.1f} {b:9.1f} {r.value:6.2f}x   {r.low:.2f}-{r.high:.2f}")
        found.append(
            {"slow": slow, "fast": fast, "slow_ms": a, "fast_ms": b, "ratio": r.value, "ci95": [r.low, r.high]}
        )
    return found


def single(source: Session, artifact: Session, rounds: int, processor: bool) -> dict[str, Timing]:
    """Batch 1 of 128 real tokens."""
    ids = np.concatenate(source.tokenizer().encode(sentences()[:20]))[:TOKENS]
    feeds = source.tokenizer().pad_batch([ids], source.inputs)
    calls = {"fp32": lambda: source.run(feeds), "int8": lambda: artifact.run(feeds)}
    return measure(calls, rounds, processor)


def mixed(sessions: dict[str, Session], rounds: int, processor: bool) -> tuple[dict[str, Timing], str]:
    """64 sentences drawn from SST-2 and MRPC: one padded batch against the padding-free form."""
    texts = sentences()
    chosen = [texts[i] for i in np.random.default_rng(0).choice(len(texts), BATCH, replace=False)]
    calls: dict[str, Callable[[], object]] = {}
    for name, session in sessions.items():
        ids = session.tokenizer().encode(chosen)
        feeds = session.tokenizer().pad_batch(ids, session.inputs)
        calls[f"{name} padded"] = lambda s=session, f=feeds: s.run(f, ["sentence_embedding"])
        calls[f"{name} packed"] = lambda s=session, i=ids: s.run_packed(i, ["sentence_embedding"])
    lengths = [len(i) for i in ids]
    share = max(lengths) * len(lengths) / sum(lengths)
    note = f"{BATCH} sentences of {min(lengths)}-{max(lengths)} tokens, mean {statistics.mean(lengths):.1f}"
    return measure(calls, rounds, processor), f"{note}; padding makes {share:.2f}x the rows"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processor-time", action="store_true", help="one thread, processor time")
    parser.add_argument("--artifact", type=Path, help="use this artifact instead of converting")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    threads = 1 if a.processor_time else a.threads
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        out = a.artifact or folder / "minilm-edge"
        found = {} if a.artifact else convert(folder, out, a.threads)
        if found:
            check = found["check"]
            print(f"MRPC AUC {check['source']:.2f} -> {check['artifact']:.2f} points, 408 pairs,", end=" ")
            print(f"95 % CI of the paired difference {check['ci95'][0]:+.2f} to {check['ci95'][1]:+.2f}")
        source = load(source_files(folder), device="cpu-ort", threads=threads)
        artifact = load(out, device="cpu-ort", threads=threads)
        clock = "processor time of 1 thread" if a.processor_time else f"{threads} threads, wall clock"
        times = single(source, artifact, a.rounds, a.processor_time)
        rows = show(f"batch 1, {TOKENS} tokens, {clock}, interleaved", [("fp32", "int8", times)])
        both = {"fp32": source, "int8": artifact}
        times, note = mixed(both, max(5, a.rounds // 3), a.processor_time)
        pairs = [(f"{n} padded", f"{n} packed", times) for n in both]
        rows += show(f"{note}, {clock}, interleaved", [*pairs, ("fp32 padded", "int8 packed", times)])
        source.close()
        artifact.close()
    if a.json:
        a.json.write_text(json.dumps({"convert": found, "rows": rows, "conditions": conditions(threads)}, indent=1))


if __name__ == "__main__":
    main()
