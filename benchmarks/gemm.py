"""INT8 and INT4 matrix products: libedgetok beside torch and onnxruntime, in one interleaved run.

    python benchmarks/gemm.py [--threads 1,2] [--rounds 15] [--only int8,int4,gemv]

One multiply-add is two operations. Shares are of what this machine does at most, measured in the same run by
``benchmarks/peak.c``: vpdpbusd on registers, and reading memory once with prefetch (so a share above 1 is noise).
Weights of products with one row rotate over buffers larger than twice 32 MiB. onnxruntime's MatMulNBits runs with
``accuracy_level=4`` (INT8 activations) at the block size and symmetry of the row. Each process is pinned to as many
CPUs as it has threads. Both median and best of the rounds are given: on a shared machine the best is what the code
can do, and ratios are taken round by round.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kernel_bench as kb
import numpy as np

from edgetok.kernels import PackedWeight
from edgetok.native import gemm as native
from edgetok.native.pool import pool
from edgetok.native.tensors import F32, I32, S8, aligned_empty, tensor

HERE = Path(__file__).resolve().parent
CACHE_BYTES = 2 * (32 << 20)
INNER = 10  # products with one row to a sample


@dataclass(frozen=True)
class Case:
    """One table row: M x N x K, bits of the weights, block (0 = one scale per row), zero points or not."""

    kind: str
    m: int
    n: int
    k: int
    bits: int = 8
    block: int = 0
    symmetric: bool = True

    @property
    def name(self) -> str:
        form = f"INT{self.bits}" + (f" block {self.block}" if self.block else "")
        return f"{form} {'symmetric' if self.symmetric else 'zero points'}, {self.m} x {self.n} x {self.k}"


CASES = (
    Case("int8", 2048, 2048, 2048),
    *(Case("int4", 512, 4096, 4096, 4, block, s) for block, s in ((128, True), (32, True), (32, False))),
    *(Case("gemv", 1, 4096, 4096, 4, block, s) for block, s in ((128, True), (32, True), (32, False))),
)


def peak_library(folder: Path) -> ctypes.CDLL | None:
    """``peak.c``, compiled; None without a compiler or the instructions."""
    compiler = shutil.which("cc")
    if compiler is None or "avx512_vnni" not in Path("/proc/cpuinfo").read_text():
        return None
    flags = ["-O3", "-mavx512f", "-mavx512bw", "-mavx512vnni", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, HERE / "peak.c", "-o", folder / "peak.so"], check=True)
    lib = ctypes.CDLL(str(folder / "peak.so"))
    lib.int8_operations.restype, lib.int8_operations.argtypes = ctypes.c_double, [ctypes.c_int64]
    lib.read_all.restype, lib.read_all.argtypes = None, [ctypes.c_void_p, ctypes.c_int64]
    return lib


def weights_of(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Codes 0..15 [N, K], float16-exact scales [N, blocks], zero points."""
    rng = np.random.default_rng(11)
    blocks = case.k // case.block
    codes = rng.integers(0, 16, (case.n, case.k)).astype(np.uint8)
    scales = (rng.random((case.n, blocks)) * 0.01 + 0.005).astype(np.float16)
    zeros = None if case.symmetric else rng.integers(0, 16, (case.n, blocks)).astype(np.uint8)
    return codes, scales, zeros


def ours_packed(case: Case) -> PackedWeight:
    """Packed as the artifact would: float32 scales, those of Q4_1 (offsets, blocks of 32) as float16, as in GGUF."""
    if case.bits == 8:
        codes = np.random.default_rng(11).integers(-127, 128, (case.n, case.k)).astype(np.int8)
        return PackedWeight.from_codes(codes, np.ones(case.n, np.float32))
    codes, scales, zeros = weights_of(case)
    if zeros is None:
        return PackedWeight.from_codes(codes, scales.astype(np.float32), bits=4, group=case.block)
    offsets = (-scales.astype(np.float32) * zeros).astype(np.float16)
    return PackedWeight.from_codes(codes, scales, bits=4, group=case.block, offsets=offsets)


def ours(case: Case, threads: int, copies: int) -> tuple[Callable[[], object], int]:
    """A prepared call, and the bytes of one packed matrix."""
    first = ours_packed(case)
    packed = [first] + [PackedWeight.from_bytes(first.to_bytes()) for _ in range(copies - 1)]
    exact = case.bits == 8
    rng = np.random.default_rng(3)
    a = rng.integers(-127, 128, (case.m, case.k)).astype(np.int8) if exact else rng.standard_normal((case.m, case.k))
    a = a if exact else a.astype(np.float32)
    out = np.empty((case.m, case.n), np.int32 if exact else np.float32)
    desc = native.Desc(max_m=case.m, a_dtype=S8 if exact else F32, out_dtype=I32 if exact else F32)
    n, k, bits, group, offset, gated, scale, layout = first.fields
    desc.weight = native.weight(
        n, k, bits=bits, group=group, offset=offset, gated=gated, scale_dtype=scale, layout=layout
    )
    plan = native.Plan(desc, threads)
    space, lent, size = aligned_empty(plan.workspace_bytes), pool(threads), ctypes.sizeof(native.Io)
    ios = [native.Io(struct_size=size, a=tensor(a), w=w.address, w_bytes=w.nbytes, out=tensor(out)) for w in packed]
    at = space.ctypes.data

    def call(keep: Any = (a, out, packed, space)) -> None:
        for i in range(INNER if copies > 1 else 1):
            plan.run(ios[i % copies], at, lent)

    return call, first.nbytes


def nbits_session(case: Case, threads: int) -> Callable[[], object]:
    """onnxruntime's MatMulNBits on a prepared binding."""
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    codes, scales, zeros = weights_of(case)
    blocks = case.k // case.block
    b = (codes[:, 0::2] | codes[:, 1::2] << 4).reshape(case.n, blocks, case.block // 2)
    initial = [numpy_helper.from_array(b, "b"), numpy_helper.from_array(scales.astype(np.float32).reshape(-1), "s")]
    if zeros is not None:
        initial.append(numpy_helper.from_array((zeros[:, 0::2] | zeros[:, 1::2] << 4).reshape(-1), "z"))
    attributes = {"K": case.k, "N": case.n, "bits": 4, "block_size": case.block, "accuracy_level": 4}
    node = helper.make_node(
        "MatMulNBits", ["x", *(t.name for t in initial)], ["y"], domain="com.microsoft", **attributes
    )
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [case.m, case.k])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [case.m, case.n])
    return bound_call(ort, onnx, helper.make_graph([node], "g", [x], [y], initial), threads, case, np.float32)


def integer_session(case: Case, threads: int) -> Callable[[], object]:
    """onnxruntime's MatMulInteger, u8 by s8."""
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    codes = np.random.default_rng(11).integers(-127, 128, (case.k, case.n)).astype(np.int8)
    node = helper.make_node("MatMulInteger", ["x", "b"], ["y"])
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [case.m, case.k])
    y = helper.make_tensor_value_info("y", TensorProto.INT32, [case.m, case.n])
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(codes, "b")])
    return bound_call(ort, onnx, graph, threads, case, np.uint8)


def bound_call(ort: Any, onnx: Any, graph: Any, threads: int, case: Case, dtype: type) -> Callable[[], object]:
    helper = onnx.helper
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    a = np.random.default_rng(3).integers(0, 255, (case.m, case.k)).astype(dtype)
    binding = session.io_binding()
    binding.bind_cpu_input("x", a)
    binding.bind_output("y")
    return lambda: session.run_with_iobinding(binding)


def torch_calls(case: Case, threads: int) -> dict[str, Callable[[], object]]:
    import torch

    torch.set_num_threads(threads)
    calls: dict[str, Callable[[], object]] = {}
    if case.bits == 8:
        a = torch.randint(-127, 128, (case.m, case.k), dtype=torch.int8)
        b = torch.randint(-127, 128, (case.n, case.k), dtype=torch.int8).t()
        calls["torch._int_mm"] = lambda: torch._int_mm(a, b)
    if case.m > 1:
        for name, dtype in (("torch fp32", torch.float32), ("torch bf16", torch.bfloat16)):
            x, w = torch.randn(case.m, case.k).to(dtype), torch.randn(case.n, case.k).to(dtype).t()
            calls[name] = lambda x=x, w=w: torch.mm(x, w)  # type: ignore[misc]
    return calls


def peers(case: Case, threads: int, copies: int) -> dict[str, Callable[[], object]]:
    calls = torch_calls(case, threads)
    if case.bits == 8:
        return calls | {"onnxruntime MatMulInteger": integer_session(case, threads)}
    sessions = [nbits_session(case, threads) for _ in range(copies)]

    def many() -> None:
        for i in range(INNER if copies > 1 else 1):
            sessions[i % copies]()

    return calls | {"onnxruntime MatMulNBits": many}


def limits(lib: ctypes.CDLL | None, memory: np.ndarray) -> dict[str, Callable[[], object]]:
    if lib is None:
        return {}
    return {
        "peak": lambda: lib.int8_operations(400_000),
        "read": lambda: lib.read_all(memory.ctypes.data, memory.nbytes),
    }


def measure(case: Case, threads: int, rounds: int, folder: Path) -> list[dict[str, Any]]:
    copies = 1 if case.m > 1 else -(-CACHE_BYTES // (case.n * case.k * case.bits // 8)) + 1
    call, packed_bytes = ours(case, threads, copies)
    memory = np.ones(96 << 20, np.uint8)
    calls = {"libedgetok": call} | peers(case, threads, copies) | limits(peak_library(folder), memory)
    found = kb.timed(calls, threads=threads, rounds=rounds, seconds=25.0)
    per = INNER if copies > 1 else 1
    operations = 2.0 * case.m * case.n * case.k
    rows = []
    for name, times in found.items():
        row = {"case": case.name, "name": name, **times, "best_ms": min(times["samples_ms"]), "per": per}
        if name == "peak":
            row["gops"] = 12 * 128 * 400_000 / row["best_ms"] / 1e6
        elif name == "read":
            row["gbs"] = memory.nbytes / row["best_ms"] / 1e6
        else:
            row["gops"] = operations * per / times["ms"] / 1e6
            row["best_gops"] = operations * per / row["best_ms"] / 1e6
            if copies > 1 and name == "libedgetok":
                row["best_gbs"] = packed_bytes * per / row["best_ms"] / 1e6
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]], threads: int) -> None:
    for case in dict.fromkeys(row["case"] for row in rows):
        of = {row["name"]: row for row in rows if row["case"] == case and row["threads"] == threads}
        mine, lines = of["libedgetok"], []
        for name, row in of.items():
            if name in ("peak", "read"):
                continue
            share = "-"
            if "best_gbs" in row and "read" in of and threads == 1:
                share = f"{row['best_gbs'] / of['read']['gbs']:.0%} of {of['read']['gbs']:.1f} GB/s"
            elif "peak" in of and row["per"] == 1 and threads == 1:
                share = f"{row['best_gops'] / of['peak']['gops']:.0%} of {of['peak']['gops']:.0f}"
            faster = "-" if name == "libedgetok" else kb.ratio_text(row, mine)
            ms = row["ms"] / row["per"]
            lines.append((name, f"{ms:.3f}", f"{row['gops']:.0f}", f"{row['best_gops']:.0f}", share, faster))
        print(f"\n{case}, {threads} thread{'s' * (threads > 1)}\n", flush=True)
        print(kb.table(("", "ms", "GOP/s", "best GOP/s", "best, of the machine's", "libedgetok is faster by"), lines))


def versions() -> str:
    import onnxruntime
    import torch

    from edgetok.native.table import chosen

    kernel = next((k.name for k in chosen() if k.op == "gemm"), "?")
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"libedgetok {kernel}; torch {torch.__version__} ({capability}, oneDNN picks its own ISA); "
        f"onnxruntime {onnxruntime.__version__} (MLAS picks its own ISA)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="int8,int4,gemv", help="kinds of rows")
    parser.add_argument("--worker", type=int)
    a = parser.parse_args()
    kinds = a.only.split(",")
    if unknown := set(kinds) - {case.kind for case in CASES}:
        raise SystemExit(f"no rows of kind {', '.join(sorted(unknown))}; there are int8, int4, gemv")
    cases = [case for case in CASES if case.kind in kinds]
    if a.worker:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps([row for case in cases for row in measure(case, a.worker, a.rounds, Path(folder))]))
        return
    print(versions())
    rows: list[dict[str, Any]] = []
    for threads in map(int, a.threads.split(",")):
        rows += kb.worker(__file__, threads, ["--rounds", str(a.rounds), "--only", a.only])
        show(rows, threads)
    kb.save("gemm", rows, max(map(int, a.threads.split(","))))


if __name__ == "__main__":
    main()
