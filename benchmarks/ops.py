"""Small operations on one core against copying memory, numpy, torch and onnxruntime, interleaved in one process.

    taskset -c 1 python benchmarks/ops.py [--rounds 30] [--only rmsnorm,topk]

"share" is the operation's bytes per second (each input read once, each output written once) over those of a memcpy that
moves the same number of bytes, in the same cache state: everything is called again and again on the same buffers, so
shapes below a megabyte or so stay in the second-level cache. Times are the best of all rounds: other work on the
machine only ever adds. Calls are made with buffers, bindings and argument structs prepared; each still crosses from
Python, about a microsecond, which counts against small shapes. Peers without a column's operation show "-".
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import helper
from torch.nn import functional as nnf

from edgetok.native import ops as native_ops
from edgetok.native.tensors import tensor

torch.set_num_threads(1)
torch.set_grad_enabled(False)
SEED = 5


@dataclass
class Case:
    """One operation at one shape; run values are closures that repeat the same work."""

    name: str
    shape: str
    bytes: int
    run: dict[str, Callable[[], object]]
    best: dict[str, float] = field(default_factory=dict)


def ours(name: str, *args: np.ndarray | float | None) -> Callable[[], object]:
    """A call of the library with its structs built once."""
    lib = native_ops.library()
    given = [ctypes.byref(tensor(a)) if isinstance(a, np.ndarray) else a for a in args]
    function = getattr(lib, f"etk_{name}")
    if function(*given) < 0:
        raise SystemExit(f"{name} refused its arguments")

    def run() -> None:
        function(*given)

    run.keep = args  # type: ignore[attr-defined]
    return run


def onnx_run(nodes: list[onnx.NodeProto], feeds: dict[str, np.ndarray], outputs: list[str]) -> Callable[[], object]:
    """A bound onnxruntime session on one thread."""
    kinds = {np.dtype(np.float32): 1, np.dtype(np.int64): 7, np.dtype(np.int32): 6}
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info(k, kinds[v.dtype], v.shape) for k, v in feeds.items()],
        [helper.make_empty_tensor_value_info(o) for o in outputs],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    values = {k: ort.OrtValue.ortvalue_from_numpy(v) for k, v in feeds.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    session.run_with_iobinding(_first(binding, outputs))
    for name, value in zip(outputs, binding.get_outputs()):
        binding.bind_ortvalue_output(name, value)
    return lambda: session.run_with_iobinding(binding)


def _first(binding: ort.IOBinding, outputs: list[str]) -> ort.IOBinding:
    for name in outputs:
        binding.bind_output(name)
    return binding


def node(op: str, inputs: str, outputs: str, domain: str = "", **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), domain=domain, **attributes)


MS = "com.microsoft"
Rng = np.random.Generator


def norms(rng: Rng, n: int, c: int) -> list[Case]:
    x, r = rng.normal(size=(2, n, c)).astype(np.float32)
    g, b = rng.normal(size=(2, c)).astype(np.float32)
    y, s = np.empty((2, n, c), np.float32)
    q, scale = np.empty((n, c), np.int8), np.empty(n, np.float32)
    tx, tr, tg, tb, ty = (torch.from_numpy(a) for a in (x, r, g, b, y))
    shape, each = f"{n}x{c}", x.nbytes

    def numpy_norm() -> None:
        mean = x.mean(-1, keepdims=True)
        np.subtract(x, mean, out=y)
        np.divide(y, np.sqrt((y * y).mean(-1, keepdims=True) + 1e-5), out=y)
        np.multiply(y, g, out=y)
        np.add(y, b, out=y)

    def numpy_rms() -> None:
        np.add(x, r, out=s)
        np.multiply(s, 1 / np.sqrt((s * s).mean(-1, keepdims=True) + 1e-5), out=y)
        np.multiply(y, g, out=y)

    skip = node("SkipSimplifiedLayerNormalization", "x r g", "y mean inv s", MS, epsilon=1e-5)
    return [
        Case("layernorm", shape, 2 * each, {
            "edgetok": ours("layernorm", x, None, g, b, 1e-5, y, None, None, None),
            "numpy": numpy_norm,
            "torch": lambda: nnf.layer_norm(tx, (c,), tg, tb),
            "onnxruntime": onnx_run([node("LayerNormalization", "x g b", "y")], {"x": x, "g": g, "b": b}, ["y"]),
        }),
        Case("rmsnorm+residual", shape, 4 * each, {
            "edgetok": ours("rmsnorm", x, r, g, 1e-5, y, s, None, None),
            "numpy": numpy_rms,
            "torch": lambda: nnf.rms_norm(torch.add(tx, tr, out=ty), (c,), tg, 1e-5),
            "onnxruntime": onnx_run([skip], {"x": x, "r": r, "g": g}, ["y", "s"]),
        }),
        Case("rmsnorm+residual+int8", shape, 3 * each + each // 4, {
            "edgetok": ours("rmsnorm", x, r, g, 1e-5, None, s, q, scale),
        }),
    ]  # fmt: skip


def maps(rng: Rng, n: int, c: int) -> list[Case]:
    x, u = rng.normal(size=(2, n, c)).astype(np.float32)
    y = np.empty((n, c), np.float32)
    tx, tu, ty = (torch.from_numpy(a) for a in (x, u, y))
    shape, each = f"{n}x{c}", x.nbytes
    silu = [node("Sigmoid", "x", "s"), node("Mul", "x s", "a"), node("Mul", "a u", "y")]

    def numpy_tanh() -> None:
        np.tanh(0.79788456 * (x + 0.044715 * x * x * x), out=y)
        np.multiply(0.5 * x, 1 + y, out=y)

    def numpy_silu() -> None:
        np.exp(-x, out=y)
        np.divide(x, 1 + y, out=y)

    def numpy_swiglu() -> None:
        numpy_silu()
        np.multiply(y, u, out=y)

    def numpy_softmax() -> None:
        np.exp(x - x.max(-1, keepdims=True), out=y)
        np.divide(y, y.sum(-1, keepdims=True), out=y)

    return [
        Case("add", shape, 3 * each, {
            "edgetok": ours("add_rows", x, u, y), "numpy": lambda: np.add(x, u, out=y),
            "torch": lambda: torch.add(tx, tu, out=ty),
            "onnxruntime": onnx_run([node("Add", "x u", "y")], {"x": x, "u": u}, ["y"]),
        }),
        Case("gelu", shape, 2 * each, {
            "edgetok": ours("gelu", x, 0, y), "torch": lambda: nnf.gelu(tx),
            "onnxruntime": onnx_run([node("Gelu", "x", "y")], {"x": x}, ["y"]),
        }),
        Case("gelu tanh", shape, 2 * each, {
            "edgetok": ours("gelu", x, 1, y), "numpy": numpy_tanh, "torch": lambda: nnf.gelu(tx, approximate="tanh"),
            "onnxruntime": onnx_run([node("FastGelu", "x", "y", MS)], {"x": x}, ["y"]),
        }),
        Case("silu", shape, 2 * each, {
            "edgetok": ours("silu", x, y), "numpy": numpy_silu, "torch": lambda: nnf.silu(tx),
            "onnxruntime": onnx_run([node("QuickGelu", "x", "y", MS, alpha=1.0)], {"x": x}, ["y"]),
        }),
        Case("swiglu", shape, 3 * each, {
            "edgetok": ours("swiglu", x, u, y), "numpy": numpy_swiglu, "torch": lambda: nnf.silu(tx).mul_(tu),
            "onnxruntime": onnx_run(silu, {"x": x, "u": u}, ["y"]),
        }),
        Case("softmax", shape, 2 * each, {
            "edgetok": ours("softmax", x, None, 1.0, y), "numpy": numpy_softmax, "torch": lambda: nnf.softmax(tx, -1),
            "onnxruntime": onnx_run([node("Softmax", "x", "y", axis=-1)], {"x": x}, ["y"]),
        }),
    ]  # fmt: skip


def ropes(rng: Rng, n: int, heads: int, d: int) -> list[Case]:
    x = rng.normal(size=(1, heads, n, d)).astype(np.float32)
    y, pos = np.empty_like(x), np.arange(n)[None]
    cos, sin = np.empty((2, n, d // 2), np.float32)
    native_ops.call("rope_tables", None, 10000.0, 0, 1.0, cos, sin)
    tx, tc, ts = (torch.from_numpy(a) for a in (x, np.tile(cos, 2), np.tile(sin, 2)))
    h = d // 2

    def torch_rope() -> torch.Tensor:
        return tx * tc + torch.cat((-tx[..., h:], tx[..., :h]), -1) * ts

    cases = []
    for inter in (0, 1):
        graph = [node("RotaryEmbedding", "x p c s", "y", MS, interleaved=inter)]
        run = {
            "edgetok": ours("rope", x, cos, sin, None, 0, inter, y),
            "onnxruntime": onnx_run(graph, {"x": x, "p": pos, "c": cos, "s": sin}, ["y"]),
        }
        if not inter:
            run["torch"] = torch_rope
        cases.append(Case(f"rope {'interleaved' if inter else 'half'}", f"{heads}x{n}x{d}", 2 * x.nbytes, run))
    return cases


def tops(rng: Rng, n: int, c: int, k: int) -> list[Case]:
    x = rng.normal(size=(n, c)).astype(np.float32)
    idx, values, one = np.empty((n, k), np.int32), np.empty((n, k), np.float32), np.empty(n, np.int64)
    owner, at, room = native_ops.workspace(native_ops.library().etk_topk_workspace(c, k))
    tx, count = torch.from_numpy(x), np.array([k])

    def numpy_topk() -> None:
        some = np.argpartition(-x, k, -1)[:, :k]
        np.take_along_axis(some, np.argsort(-np.take_along_axis(x, some, 1), -1), 1)

    top = ours("topk", x, k, values, idx, at, room)
    top.owner = owner  # type: ignore[attr-defined]
    return [
        Case("argmax", f"{n}x{c}", x.nbytes, {
            "edgetok": ours("argmax", x, one), "numpy": lambda: x.argmax(-1), "torch": lambda: torch.argmax(tx, -1),
            "onnxruntime": onnx_run([node("ArgMax", "x", "y", axis=-1)], {"x": x}, ["y"]),
        }),
        Case(f"topk {k}", f"{n}x{c}", x.nbytes, {
            "edgetok": top, "numpy": numpy_topk, "torch": lambda: torch.topk(tx, k, -1),
            "onnxruntime": onnx_run([node("TopK", "x k", "v i")], {"x": x, "k": count}, ["v", "i"]),
        }),
    ]  # fmt: skip


def rows(rng: Rng, n: int, c: int, m: int) -> list[Case]:
    x, idx = rng.normal(size=(n, c)).astype(np.float32), rng.permutation(n)[:m]
    y = np.empty((m, c), np.float32)
    tx, ti, ty = torch.from_numpy(x), torch.from_numpy(idx), torch.from_numpy(y)
    return [
        Case("gather rows", f"{m} of {n}x{c}", 2 * y.nbytes, {
            "edgetok": ours("gather_rows", x, idx, y), "numpy": lambda: np.take(x, idx, 0, out=y, mode="clip"),
            "torch": lambda: torch.index_select(tx, 0, ti, out=ty),
            "onnxruntime": onnx_run([node("Gather", "x i", "y", axis=0)], {"x": x, "i": idx}, ["y"]),
        }),
    ]  # fmt: skip


def torch_tome(k: torch.Tensor, x: torch.Tensor, size: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bipartite matching and weighted merge as tensor operations, row 0 protected."""
    m = k / torch.linalg.vector_norm(k, dim=-1, keepdim=True).clamp_min(1e-6)
    a, b = m[:, 2::2], m[:, 1::2]
    best, to = (a @ b.transpose(1, 2)).max(-1)
    order = torch.sort(best, stable=True, dim=-1, descending=True)[1]
    src, rest = order[:, :r, None], order[:, r:, None].sort(1)[0]
    dst = to.gather(1, src[..., 0])[..., None]
    w = x * size
    xa, xb, sa, sb = w[:, 2::2], w[:, 1::2], size[:, 2::2], size[:, 1::2]
    c = x.shape[-1]
    xb = xb.scatter_add(1, dst.expand(-1, -1, c), xa.gather(1, src.expand(-1, -1, c)))
    sb = sb.scatter_add(1, dst, sa.gather(1, src))
    y = torch.cat((w[:, :1], xa.gather(1, rest.expand(-1, -1, c)), xb), 1)
    s = torch.cat((size[:, :1], sa.gather(1, rest), sb), 1)
    return y / s, s


def merges(rng: Rng, n: int, c: int, width: int, r: int) -> list[Case]:
    k = rng.normal(size=(1, n, width)).astype(np.float32)
    x, size = rng.normal(size=(1, n, c)).astype(np.float32), np.ones((1, n), np.float32)
    y, s = np.empty((1, n - r, c), np.float32), np.empty((1, n - r), np.float32)
    owner, at, room = native_ops.workspace(native_ops.library().etk_match_workspace(n, width))
    tk, tx, ts = torch.from_numpy(k), torch.from_numpy(x), torch.from_numpy(size)[..., None]
    cases = []
    for name, kind, int8 in (
        ("tome", 0, 0), ("tome int8", 0, 1), ("pitome", 1, 0), ("pitome int8", 1, 1), ("pitome hybrid", 2, 0),
    ):  # fmt: skip
        call = ours("token_merge", kind, k, x, size, 1, r, 0.5, 1.0, int8, y, s, None, at, room)
        call.owner = owner  # type: ignore[attr-defined]
        run = {"edgetok": call}
        if name == "tome":
            run["torch"] = lambda: torch_tome(tk, tx, ts, r)
        cases.append(Case(name, f"{n}x{c} w{width} r{r}", x.nbytes + y.nbytes + k.nbytes, run))
    return cases


def all_cases() -> list[Case]:
    rng = np.random.default_rng(SEED)
    out = []
    for n, c in ((257, 384), (1024, 768), (512, 576)):
        out += norms(rng, n, c)
    for n, c in ((257, 1536), (1024, 768)):
        out += maps(rng, n, c)
    out += ropes(rng, 512, 9, 64)
    for k in (50, 1):
        out += tops(rng, 1, 49152, k)[0 if k == 50 else 1 :]
    out += rows(rng, 1024, 768, 700)
    out += merges(rng, 257, 384, 64, 16) + merges(rng, 577, 768, 64, 40)
    return out


def best_of(case: Case, rounds: int, budget_ms: float) -> None:
    """Interleave the contenders; each sample repeats a call for about ``budget_ms``."""
    half = np.empty(max(1, case.bytes // 2), np.uint8)
    other = np.ones_like(half)
    libc = ctypes.CDLL(None)
    libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    libc.memcpy.restype = ctypes.c_void_p
    at, to, size = other.ctypes.data, half.ctypes.data, half.nbytes
    contenders = {"copy": lambda: libc.memcpy(to, at, size), **case.run}
    repeats = {}
    for name, run in contenders.items():
        run()
        start = time.perf_counter()
        run()
        repeats[name] = max(1, int(budget_ms / 1000 / max(1e-7, time.perf_counter() - start)))
        case.best[name] = float("inf")
    for _ in range(rounds):
        for name, run in contenders.items():
            count = repeats[name]
            start = time.perf_counter()
            for _ in range(count):
                run()
            case.best[name] = min(case.best[name], (time.perf_counter() - start) / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--sample-ms", type=float, default=1.0)
    parser.add_argument("--only", default="", help="comma-separated beginnings of names")
    a = parser.parse_args()
    only = tuple(a.only.split(",")) if a.only else ("",)
    print(
        f"{native_ops.kernel_name()}, numpy {np.__version__}, torch {torch.__version__}, onnxruntime {ort.__version__}"
    )
    peers = ("numpy", "torch", "onnxruntime")
    print(f"{'operation':22} {'shape':20} {'us':>8} {'GB/s':>6} {'share':>6}  " + " ".join(f"{p:>12}" for p in peers))
    for case in all_cases():
        if not case.name.startswith(only):
            continue
        best_of(case, a.rounds, a.sample_ms)
        t = case.best["edgetok"]
        line = (
            f"{case.name:22} {case.shape:20} {1e6 * t:8.1f} {case.bytes / t / 1e9:6.1f} {case.best['copy'] / t:6.0%}  "
        )
        print(
            line + " ".join(f"{case.best[p] / t:11.2f}x" if p in case.best else f"{'-':>12}" for p in peers), flush=True
        )


if __name__ == "__main__":
    main()
