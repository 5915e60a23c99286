"""Decode attention over long caches: INT8, INT4 and f16 pages beside onnxruntime's GroupQueryAttention in float32.

    python benchmarks/decode_attention.py [--shapes 8/8x128x16384,...] [--threads 1,2] [--rounds 9]

Shapes are query heads / KV heads x head width x tokens, batch 1. One call appends one token and attends to the whole
cache from one query per head; onnxruntime does so in place, its past and present being one buffer. Every engine
goes round caches that together take more than twice the last-level cache, so that each call reads main memory. Equal
tokens, heads and width mean equal numbers of KV elements, so ratios of times are ratios per element. Beside the times
stands what a plain read of the same machine gives in the same run: `share` is the bytes of the cache that a call must
read, over that.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import kernel_bench as kb
import numpy as np

SHAPES = "8/8x128x16384,24/8x128x16384,8/8x128x4096,8/8x128x65536"
KINDS = ("int8", "int4", "f16")
PEER = "onnxruntime GQA fp32"
ROTATE_BYTES = 2 * 32 * 2**20  # twice the last-level cache; machine.py has no figure that holds inside a VM
BARS = {"int8": (3.0, 3.7), "int4": (5.0, 6.8)}


@dataclass(frozen=True)
class Shape:
    """heads / KV heads x width x tokens."""

    text: str
    hq: int
    hkv: int
    width: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        heads, width, tokens = text.split("x")
        hq, hkv = heads.split("/")
        return cls(text, int(hq), int(hkv), int(width), int(tokens))


def copies(bytes_each: int) -> int:
    return int(ROTATE_BYTES // bytes_each) + 2


def draw(s: Shape, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """K and V [hkv, tokens, width]."""
    rng = np.random.default_rng(5)
    return tuple(rng.standard_normal((s.hkv, tokens, s.width), np.float32) for _ in "kv")  # type: ignore[return-value]


def query(s: Shape) -> np.ndarray:
    return np.random.default_rng(6).standard_normal((1, s.hq, 1, s.width), np.float32)


def exact(s: Shape, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Float64 attention of the query over k and v."""
    out = []
    for h, row in enumerate(query(s)[0, :, 0].astype(np.float64)):
        y = k[h * s.hkv // s.hq].astype(np.float64) @ row / np.sqrt(s.width)
        p = np.exp(y - y.max())
        out.append(p @ v[h * s.hkv // s.hq].astype(np.float64) / p.sum())
    return np.array(out)


@dataclass
class Engine:
    """A call, the bytes it must read, and its first answer over k, v less the last token."""

    call: Callable[[], object]
    read_bytes: int
    answer: np.ndarray
    copies: int


def ours(s: Shape, kind: str, threads: int, k: np.ndarray, v: np.ndarray) -> Engine:
    from edgetok.kernels import KVCache

    bits = {"int8": 8, "int4": 4, "f16": 16}[kind]
    layers = copies(s.hkv * s.tokens * s.width * 2 * bits // 8)
    cache = KVCache(
        layers=layers,
        batch=1,
        hkv=s.hkv,
        d=s.width,
        max_tokens=s.tokens + 512,
        kind=kind,
        threads=threads,
        tail_pages=1,
    )
    for layer in range(layers):
        cache.append(layer, 0, k, v)
    q, turn = query(s), [0]
    new_k, new_v = k[:, -1:].copy(), v[:, -1:].copy()
    answer = cache.attend(0, q, threads=threads).o[0, :, 0]

    def call() -> None:
        layer = turn[0] = (turn[0] + 1) % layers
        cache.append(layer, 0, new_k, new_v)
        cache.attend(layer, q, threads=threads)

    return Engine(call, cache.memory().pages // layers, answer, layers)


def gqa_session(s: Shape, threads: int) -> Any:
    import onnxruntime as ort
    from onnx import TensorProto, helper

    f32, i32 = TensorProto.FLOAT, TensorProto.INT32
    past = [1, s.hkv, "S", s.width]
    inputs = [helper.make_tensor_value_info("q", f32, [1, 1, s.hq * s.width])]
    inputs += [helper.make_tensor_value_info(n, f32, [1, 1, s.hkv * s.width]) for n in "kv"]
    inputs += [helper.make_tensor_value_info(n, f32, past) for n in ("past_k", "past_v")]
    inputs += [helper.make_tensor_value_info("lens", i32, [1]), helper.make_tensor_value_info("total", i32, [1])]
    outputs = [helper.make_tensor_value_info("o", f32, [1, 1, s.hq * s.width])]
    outputs += [helper.make_tensor_value_info(n, f32, past) for n in ("now_k", "now_v")]
    names = [i.name for i in inputs]
    node = helper.make_node(
        "GroupQueryAttention",
        names,
        ["o", "now_k", "now_v"],
        domain="com.microsoft",
        num_heads=s.hq,
        kv_num_heads=s.hkv,
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "g", inputs, outputs), opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def peer(s: Shape, threads: int, k: np.ndarray, v: np.ndarray) -> Engine:
    import onnxruntime as ort

    session, rows = gqa_session(s, threads), s.tokens + 1
    bytes_each = s.hkv * s.tokens * s.width * 8
    bound, out = [], np.empty((1, 1, s.hq * s.width), np.float32)
    keep = []
    for _ in range(copies(bytes_each)):
        b = session.io_binding()
        state = [np.zeros((1, s.hkv, rows, s.width), np.float32) for _ in "kv"]
        state[0][0, :, : s.tokens], state[1][0, :, : s.tokens] = k, v
        feeds = {"q": query(s).reshape(1, 1, -1), "k": k[:, -1:].reshape(1, 1, -1), "v": v[:, -1:].reshape(1, 1, -1)}
        feeds |= {"past_k": state[0], "past_v": state[1]}
        feeds |= {"lens": np.array([s.tokens - 1], np.int32), "total": np.array([s.tokens], np.int32)}
        values = {n: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x)) for n, x in feeds.items()}
        for name, value in values.items():
            b.bind_ortvalue_input(name, value)
        result = ort.OrtValue.ortvalue_from_numpy(out)
        b.bind_ortvalue_output("o", result)
        b.bind_ortvalue_output("now_k", values["past_k"])
        b.bind_ortvalue_output("now_v", values["past_v"])
        bound.append(b)
        keep.append((values, result))
    turn = [0]

    def call() -> None:
        turn[0] = (turn[0] + 1) % len(bound)
        session.run_with_iobinding(bound[turn[0]])

    session.run_with_iobinding(bound[0])  # writes the last token over itself
    answer = keep[0][1].numpy().reshape(s.hq, s.width).copy()
    return Engine(call, bytes_each, answer, len(bound))


def reader(threads: int) -> tuple[Callable[[], object], int]:
    """Read a buffer once, ``threads`` parts side by side: a dot product of each part with itself."""
    parts = [np.ones(2**25, np.float32) for _ in range(threads)]  # 128 MiB each

    def call() -> None:
        others = [threading.Thread(target=np.dot, args=(x, x)) for x in parts[1:]]
        for t in others:
            t.start()
        np.dot(parts[0], parts[0])
        for t in others:
            t.join()

    return call, sum(x.nbytes for x in parts)


def measure(text: str, threads: int, rounds: int, only: str) -> list[dict[str, Any]]:
    s = Shape.parse(text)
    k, v = draw(s, s.tokens)
    want = exact(s, k, v)
    found = {f"libedgetok {kind}": ours(s, kind, threads, k, v) for kind in KINDS if only in kind}
    found[PEER] = peer(s, threads, k, v)
    read, read_bytes = reader(threads)
    inner = max(1, 16384 // s.tokens)
    calls: dict[str, Callable[[], object]] = {"plain read": read}
    for name, engine in found.items():

        def repeat(call: Callable[[], object] = engine.call) -> None:
            for _ in range(inner):
                call()

        calls[name] = repeat
    times = kb.timed(calls, threads=threads, rounds=rounds, seconds=25.0)
    fastest = min(times["plain read"]["samples_ms"])
    rows: list[dict[str, Any]] = [
        {"shape": text, "engine": "plain read", "gbs": read_bytes / fastest / 1e6, **times["plain read"]}
    ]
    for name, engine in found.items():
        t = {key: value / inner for key, value in times[name].items() if key in ("ms", "p90_ms")}
        samples = [x / inner for x in times[name]["samples_ms"]]
        best = min(samples)
        cosine = float(
            np.sum(want * engine.answer) / np.sqrt(np.sum(want**2) * np.sum(engine.answer.astype(np.float64) ** 2))
        )
        l1 = float(np.abs(want - engine.answer).sum() / np.abs(want).sum())
        rows.append(
            {"shape": text, "engine": name, "copies": engine.copies, "read_bytes": engine.read_bytes, "best_ms": best}
            | {"gbs": engine.read_bytes / best / 1e6, "share": engine.read_bytes / best / 1e6 / rows[0]["gbs"]}
            | {"cosine": cosine, "rel_l1": l1, "samples_ms": samples, "runs": len(samples), **t}
        )
    return rows


def report(rows: list[dict[str, Any]]) -> str:
    parts = []
    for shape, threads in dict.fromkeys((r["shape"], r["threads"]) for r in rows):
        group = {r["engine"]: r for r in rows if (r["shape"], r["threads"]) == (shape, threads)}
        read = group.pop("plain read")
        lines = []
        for name, r in group.items():
            kind = name.split()[-1]
            ratio = kb.ratio_text(group.get(PEER), r) if name != PEER else ""
            best = f"{group[PEER]['best_ms'] / r['best_ms']:.2f}" if name != PEER and PEER in group else ""
            bar = (
                f"{BARS[kind][0]:g} / {BARS[kind][1]:g}"
                if kind in BARS and threads == 2 and "x128x16384" in shape
                else ""
            )
            lines.append(
                [
                    *(name, f"{r['ms']:.3f}", f"{r['p90_ms']:.3f}", f"{r['best_ms']:.3f}", ratio, best, bar),
                    *(f"{r['read_bytes'] / 2**20:.1f}", f"{r['gbs']:.1f}", f"{100 * r['share']:.0f} %"),
                    *(f"{r['cosine']:.6f}", f"{r['rel_l1']:.1e}"),
                ]
            )
        head = [
            "engine",
            "ms",
            "p90",
            "best",
            f"x {PEER}",
            "x, best of each",
            "bar / stretch",
            "MiB read",
            "GB/s",
            "share",
        ]
        title = f"\n{shape} (query heads / KV heads x width x tokens), {threads} thread{'s' * (threads > 1)}"
        title += "; a plain read gives"
        title += f" {read['gbs']:.1f} GB/s at best; {read['runs']} runs\n"
        parts.append(title + "\n" + kb.table([*head, "cosine", "relative L1"], lines))
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="kinds of page whose name holds this")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    a = parser.parse_args()
    shapes = a.shapes.split(",")
    if a.worker:
        print(json.dumps([row for s in shapes for row in measure(s, a.worker, a.rounds, a.only)]))
        return
    rows, begun = [], time.monotonic()
    for threads in map(int, a.threads.split(",")):
        for shape in shapes:
            rows += kb.worker(__file__, threads, ["--shapes", shape, "--rounds", str(a.rounds), "--only", a.only])
    print(report(rows))
    path = kb.save("decode_attention", rows, max(map(int, a.threads.split(","))))
    print(f"\n{time.monotonic() - begun:.0f} s; {path.relative_to(path.parent.parent.parent)}")


if __name__ == "__main__":
    main()
