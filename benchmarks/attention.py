"""Dense attention: libedgetok's INT8 and float kernels beside onnxruntime, OpenVINO and torch, in one interleaved run.

    python benchmarks/attention.py [--shapes 6x64x4096,...] [--threads 1,2] [--rounds 9]

Shapes are heads x head width x tokens, batch 1, no mask. Every call goes from float32 in to float32 out: packing,
quantizing and conversion to bfloat16 are inside it. Each engine takes the layout it prefers. Each process is pinned to
as many CPUs as it has threads. Accuracy is that of the same call against float64, on Gaussian Q, K, V and with outlier
channels in K (as language models have them): relative L1 distance and cosine over 256 rows of every head. The last
rows cap everybody at AVX2.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import kernel_bench as kb
import numpy as np

Call = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
SHAPES = "6x64x4096,6x128x4096,6x64x1024,6x128x1024"
OURS = {"int8": "libedgetok S8S8", "int8_float_pv": "libedgetok S8F", "fp32": "libedgetok F32"}
PEERS = ("OpenVINO bf16", "onnxruntime fp32", "OpenVINO fp32", "torch bf16", "torch fp32")
CHECKED_ROWS = 256


def draw(heads: int, width: int, tokens: int, outliers: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Q, K, V [1, H, N, D]; with outliers, 4 channels of K carry a common offset and 8 times the spread."""
    rng = np.random.default_rng(7)
    q, k, v = (rng.standard_normal((1, heads, tokens, width)).astype(np.float32) for _ in range(3))
    if outliers:
        channels = rng.choice(width, 4, replace=False)
        k[..., channels] = k[..., channels] * 8 + 20 * rng.standard_normal((1, heads, 1, 4)).astype(np.float32)
    return q, k, v


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Float64 attention of some query rows."""
    s = np.einsum("bhnd,bhmd->bhnm", q[:, :, rows].astype(np.float64), k.astype(np.float64)) / np.sqrt(q.shape[-1])
    p = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("bhnm,bhmd->bhnd", p / p.sum(-1, keepdims=True), v.astype(np.float64))


def accuracy(call: Call, arrays: tuple[np.ndarray, np.ndarray, np.ndarray]) -> dict[str, float]:
    rows = np.linspace(0, arrays[0].shape[2] - 1, CHECKED_ROWS).astype(np.int64)
    want, got = exact(*arrays, rows), call(*arrays)[:, :, rows].astype(np.float64)
    cosine = np.sum(want * got) / np.sqrt(np.sum(want**2) * np.sum(got**2))
    return {"rel_l1": float(np.abs(got - want).sum() / np.abs(want).sum()), "cosine": float(cosine)}


def edgetok_call(compute: str, threads: int) -> Call:
    import edgetok

    return lambda q, k, v: edgetok.attention(q, k, v, compute=compute, threads=threads)


def onnxruntime_call(heads: int, width: int, threads: int) -> Call:
    import onnxruntime as ort
    from onnx import TensorProto, helper

    shape = [1, "N", heads * width]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in "qkv"]
    node = helper.make_node("MultiHeadAttention", list("qkv"), ["o"], domain="com.microsoft", num_heads=heads)
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("o", TensorProto.FLOAT, shape)])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def call(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        # [B, H, N, D] that lies in memory as [B, N, H, D] is this operator's own layout, without a copy.
        feeds = {n: x.transpose(0, 2, 1, 3).reshape(1, -1, heads * width) for n, x in zip("qkv", (q, k, v))}
        out = session.run(None, feeds)[0]
        return out.reshape(1, -1, heads, width).transpose(0, 2, 1, 3)

    return call


def openvino_call(heads: int, width: int, tokens: int, threads: int, precision: str) -> Call:
    import openvino as ov
    from openvino import opset13 as ops

    q, k, v = (ops.parameter([1, heads, tokens, width], ov.Type.f32, name=n) for n in "qkv")
    model = ov.Model([ops.scaled_dot_product_attention(q, k, v)], [q, k, v])
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    settings |= {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": threads > 1}
    compiled = ov.Core().compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()

    def call(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        return request.infer([q, k, v], share_inputs=True, share_outputs=True)[0]

    return call


def torch_call(threads: int, dtype: str) -> Call:
    import torch

    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)

    def call(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            a, b, c = (torch.from_numpy(x).to(kind) for x in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(a, b, c).float().numpy()

    return call


def engines(heads: int, width: int, tokens: int, threads: int, avx2: bool) -> dict[str, Call]:
    """Name to call. onnxruntime and bfloat16 cannot be held to AVX2, so they have no row there."""
    found: dict[str, Call] = {name: edgetok_call(compute, threads) for compute, name in OURS.items()}
    if not avx2:
        found["onnxruntime fp32"] = onnxruntime_call(heads, width, threads)
        found["OpenVINO bf16"] = openvino_call(heads, width, tokens, threads, "bf16")
        found["torch bf16"] = torch_call(threads, "bfloat16")
    found["OpenVINO fp32"] = openvino_call(heads, width, tokens, threads, "f32")
    found["torch fp32"] = torch_call(threads, "float32")
    return found


def measure(shape: str, threads: int, rounds: int, avx2: bool, only: str) -> list[dict[str, Any]]:
    heads, width, tokens = map(int, shape.split("x"))
    plain, hard = draw(heads, width, tokens, False), draw(heads, width, tokens, True)
    found = {n: c for n, c in engines(heads, width, tokens, threads, avx2).items() if only in n}
    inner = max(1, round((2048 / tokens) ** 2))  # short problems are repeated inside a sample
    rows = []
    calls: dict[str, Callable[[], object]] = {}
    for name, call in found.items():
        errors = {"gaussian": accuracy(call, plain), "outliers": accuracy(call, hard)}
        rows.append({"shape": shape, "engine": name, "accuracy": errors})
        arrays = plain
        if name.startswith("onnxruntime"):
            arrays = tuple(np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in plain)

        def repeat(call: Call = call, arrays: Any = arrays) -> None:
            for _ in range(inner):
                call(*arrays)

        calls[name] = repeat
    times = kb.timed(calls, threads=threads, rounds=rounds, seconds=45.0)
    gop = 4.0 * heads * tokens * tokens * width / 1e9
    for row in rows:
        t = times[row["engine"]]
        for key in ("ms", "p90_ms"):
            t[key] /= inner
        t["samples_ms"] = [s / inner for s in t["samples_ms"]]
        row |= t | {"gops": gop / t["ms"] * 1e3}
    return rows


def report(rows: list[dict[str, Any]]) -> str:
    """One table per shape, thread count and cap: time, rate, speed-ups of each of our rows, accuracy."""
    parts = []
    for shape, threads, avx2 in dict.fromkeys((r["shape"], r["threads"], r["avx2_only"]) for r in rows):
        group = [r for r in rows if (r["shape"], r["threads"], r["avx2_only"]) == (shape, threads, avx2)]
        by_name = {r["engine"]: r for r in group}
        peers = [
            p
            for p in ("OpenVINO bf16", "onnxruntime fp32", "OpenVINO fp32", "torch bf16", "torch fp32")
            if p in by_name
        ]
        if avx2:
            peers.append("libedgetok F32")
        head = ["engine", "ms", "p90", "GOP/s", *(f"x {p}" for p in peers)]
        head += ["relative L1", "cosine", "relative L1, outliers", "cosine, outliers"]
        lines = []
        for r in group:
            ours = r["engine"].startswith("libedgetok")
            ratios = [kb.ratio_text(by_name[p], r) if ours and p != r["engine"] else "" for p in peers]
            a, b = r["accuracy"]["gaussian"], r["accuracy"]["outliers"]
            errors = [f"{a['rel_l1']:.2e}", f"{a['cosine']:.6f}", f"{b['rel_l1']:.2e}", f"{b['cosine']:.6f}"]
            lines.append([r["engine"], f"{r['ms']:.2f}", f"{r['p90_ms']:.2f}", f"{r['gops']:.0f}", *ratios, *errors])
        cap = ", everybody capped at AVX2" if avx2 else ""
        title = (
            f"\n{shape} (heads x width x tokens), {threads} thread{'s' * (threads > 1)}{cap}, {group[0]['runs']} runs\n"
        )
        parts.append(title + "\n" + kb.table(head, lines))
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="engines whose name holds this")
    parser.add_argument("--no-avx2", action="store_true", help="leave out the rows capped at AVX2")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--capped", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    shapes = a.shapes.split(",")
    if a.worker:
        print(json.dumps([row for s in shapes for row in measure(s, a.worker, a.rounds, a.capped, a.only)]))
        return
    more = ["--rounds", str(a.rounds), "--only", a.only]
    rows = []
    for threads in map(int, a.threads.split(",")):
        for shape in shapes:  # a process each, so that no engine's leftovers reach the next shape
            rows += kb.worker(__file__, threads, ["--shapes", shape, *more])
    if not a.no_avx2:
        for shape in shapes[:2]:
            rows += kb.worker(__file__, 1, ["--shapes", shape, *more, "--capped"], avx2=True)
    print(report(rows))
    print(f"\nwritten to {kb.save('attention', rows, max(map(int, a.threads.split(','))))}")


if __name__ == "__main__":
    main()
