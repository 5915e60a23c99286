"""What the clean-up and the onnx target's last rewrites gain on a model, in float, answers checked first.

    python benchmarks/graph.py [MODEL] [--outputs NAME] [--threads 2] [--rounds 40] [--no-spin]

MODEL is a pinned name (default vit-s-focus) or a path. Times are interleaved in one process; CPU time is given beside
wall time because it is steady on a busy machine (one thread: --threads 1).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from edgetok.converters.graph.cleanup import clean_up
from edgetok.converters.graph.outputs import cut_outputs
from edgetok.converters.targets.onnx import finish


def session(model: ir.Model, threads: int, spin: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    data = ir.serde.serialize_model(model).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def stages(path: Path, outputs: list[str]) -> dict[str, ir.Model]:
    """The graph as it came, cleaned up, and finished for onnxruntime."""
    found = {}
    for name in ("source", "clean", "finish"):
        model = ir.load(path)
        if outputs:
            cut_outputs(model, outputs)
        if name != "source":
            clean_up(model)
        if name == "finish":
            finish(model)
        found[name] = model
    return found


def feeds_of(running: ort.InferenceSession) -> dict[str, np.ndarray]:
    """Seeded noise for float inputs; token ids, or ones for masks, for integer ones; open sizes 1, then 128."""
    rng = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {}
    for spec in running.get_inputs():
        shape = [d if isinstance(d, int) else (1 if i == 0 else 128) for i, d in enumerate(spec.shape)]
        if "int" in spec.type:
            ids = spec.name == "input_ids"
            feeds[spec.name] = (
                rng.integers(1000, 20000, shape) if ids else np.full(shape, "mask" in spec.name, np.int64)
            )
        else:
            feeds[spec.name] = rng.standard_normal(shape).astype(np.float32)
    return feeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="vit-s-focus")
    parser.add_argument("--outputs", default="")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--no-spin", action="store_true")
    a = parser.parse_args()
    if Path(a.model).exists():
        path = Path(a.model)
    else:
        from edgetok.models import pull

        path = pull(a.model)
    models = stages(path, [n for n in a.outputs.split(",") if n])
    running = {name: session(model, a.threads, not a.no_spin) for name, model in models.items()}
    feeds = feeds_of(running["source"])
    wanted = running["source"].run(None, feeds)
    wall: dict[str, list[float]] = {name: [] for name in running}
    cpu: dict[str, list[float]] = {name: [] for name in running}
    for name, one in running.items():
        for left, right in zip(wanted, one.run(None, feeds), strict=True):
            np.testing.assert_allclose(left, right, atol=1e-4 * float(np.abs(left).max()), err_msg=name)
    for done in range(a.rounds):
        for name in running if done % 2 else list(running)[::-1]:
            before, used = time.perf_counter(), time.process_time()
            running[name].run(None, feeds)
            cpu[name].append(1e3 * (time.process_time() - used))
            wall[name].append(1e3 * (time.perf_counter() - before))
    print(f"{path.name}, {a.threads} threads, {a.rounds} rounds, onnxruntime {ort.__version__}")
    print("stage   nodes  opset   wall p50   ratio   CPU p50   ratio")
    for name, model in models.items():
        ratios = [float(np.median(np.divide(t["source"], t[name]))) for t in (wall, cpu)]
        p50 = [float(np.median(t[name])) for t in (wall, cpu)]
        size = f"{len(model.graph):5}  {model.opset_imports['']:5}"
        print(f"{name:7} {size} {p50[0]:7.1f} ms  {ratios[0]:.3f} {p50[1]:7.1f} ms  {ratios[1]:.3f}")


if __name__ == "__main__":
    main()
