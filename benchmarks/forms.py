"""Which standard form of a transformer block onnxruntime runs fastest, in float or static INT8 (u8 x s8, float out).

    python benchmarks/forms.py [--tokens 257] [--int8] [--rounds 20] [FORM ...]

CPU time of six ViT-S blocks (384 wide, 6 heads), random weights, one thread, forms in turn; the first form is the base.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

LAYERS, WIDTH, HEADS, HIDDEN = 6, 384, 6, 1536
HEAD = WIDTH // HEADS


@dataclass(frozen=True)
class Form:
    """linear: "matmul" (3-D, bias [N]), "wide" (3-D, bias [1,1,N]) or "rows" (Gemm). qkv: "three" or "packed".
    attention: "open" or "op" (opset 23). keys: transposed in "one" step or "two"."""

    linear: str = "matmul"
    attention: str = "open"
    qkv: str = "three"
    keys: str = "one"


FORMS = {
    "open": Form(),
    "wide": Form(linear="wide"),
    "two-step-keys": Form(keys="two"),
    "packed": Form(qkv="packed"),
    "rows": Form(linear="rows"),
    "op": Form(attention="op"),
    "wide-op": Form(linear="wide", attention="op"),
    "rows-op": Form(linear="rows", attention="op"),
}


class Writer:
    """Writes the blocks of one form."""

    def __init__(self, form: Form, tokens: int) -> None:
        self.form, self.tokens = form, tokens
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def const(self, array: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(array, order="C"), name))
        return name

    def op(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"{op_type}{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, name=names[0], **attributes))
        return names[0] if outputs == 1 else names

    def linear(self, x: str, inputs: int, outputs: int) -> str:
        weight = self.const((self.rng.standard_normal((inputs, outputs)) / inputs**0.5 / 2).astype(np.float32))
        bias = (self.rng.standard_normal(outputs) / 10).astype(np.float32)
        if self.form.linear == "rows":
            return self.op("Gemm", x, weight, self.const(bias))
        shape = (1, 1, -1) if self.form.linear == "wide" else (-1,)
        return self.op("Add", self.op("MatMul", x, weight), self.const(bias.reshape(shape)))

    def norm(self, x: str) -> str:
        ones, zeros = self.const(np.ones(WIDTH, np.float32)), self.const(np.zeros(WIDTH, np.float32))
        return self.op("LayerNormalization", x, ones, zeros, axis=-1)

    def reshape(self, x: str, *sizes: int) -> str:
        return self.op("Reshape", x, self.const(np.asarray(sizes, np.int64)))

    def attention(self, y: str) -> str:
        rows = self.form.linear == "rows"
        if self.form.qkv == "packed":
            q, k, v = self.op("Split", self.linear(y, WIDTH, 3 * WIDTH), outputs=3, axis=-1, num_outputs=3)
        else:
            q, k, v = (self.linear(y, WIDTH, WIDTH) for _ in range(3))
        if self.form.attention == "op":
            parts = [self.reshape(t, -1, self.tokens, WIDTH) if rows else t for t in (q, k, v)]
            out = self.op("Attention", *parts, q_num_heads=HEADS, kv_num_heads=HEADS)
            return self.reshape(out, -1, WIDTH) if rows else out
        q, k, v = (self.reshape(t, -1, self.tokens, HEADS, HEAD) for t in (q, k, v))
        q, v = (self.op("Transpose", t, perm=[0, 2, 1, 3]) for t in (q, v))
        if self.form.keys == "two":
            keys = self.op("Transpose", self.op("Transpose", k, perm=[0, 2, 1, 3]), perm=[0, 1, 3, 2])
        else:
            keys = self.op("Transpose", k, perm=[0, 2, 3, 1])
        logits = self.op("MatMul", self.op("Mul", q, self.const(np.float32(HEAD**-0.5))), keys)
        out = self.op("MatMul", self.op("Softmax", logits, axis=-1), v)
        out = self.op("Transpose", out, perm=[0, 2, 1, 3])
        return self.reshape(out, -1, WIDTH) if rows else self.reshape(out, 0, 0, WIDTH)

    def gelu(self, y: str) -> str:
        erf = self.op("Erf", self.op("Div", y, self.const(np.float32(2**0.5))))
        times = self.op("Mul", y, self.op("Add", erf, self.const(np.float32(1))))
        return self.op("Mul", times, self.const(np.float32(0.5)))

    def model(self) -> onnx.ModelProto:
        x = self.reshape("x", -1, WIDTH) if self.form.linear == "rows" else "x"
        for _ in range(LAYERS):
            x = self.op("Add", self.linear(self.attention(self.norm(x)), WIDTH, WIDTH), x)
            hidden = self.gelu(self.linear(self.norm(x), WIDTH, HIDDEN))
            x = self.op("Add", self.linear(hidden, HIDDEN, WIDTH), x)
        out = self.norm(x)
        info = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, self.tokens, WIDTH])]
        graph = helper.make_graph(
            self.nodes, "g", info, [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)], self.constants
        )
        opset = helper.make_opsetid("", 23 if self.form.attention == "op" else 18)
        return onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=[opset], ir_version=10))


def quantized(model: onnx.ModelProto, x: np.ndarray) -> onnx.ModelProto:
    """onnxruntime's static QDQ of every linear layer, per channel, outputs left in float."""
    from onnxruntime import quantization as q

    logging.disable(logging.WARNING)

    class Reader(q.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{"x": x}]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.left.pop() if self.left else None

    weights = {c.name for c in model.graph.initializer}
    linears = [n.name for n in model.graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in weights]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "s.onnx", Path(folder) / "t.onnx"
        onnx.save(model, source)
        q.quantize_static(
            source, target, Reader(), per_channel=True, activation_type=q.QuantType.QUInt8,
            weight_type=q.QuantType.QInt8, nodes_to_quantize=linears,
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
        )  # fmt: skip
        return onnx.load(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("forms", nargs="*", default=list(FORMS))
    parser.add_argument("--tokens", type=int, default=257)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--int8", action="store_true")
    a = parser.parse_args()
    x = np.random.default_rng(1).standard_normal((1, a.tokens, WIDTH)).astype(np.float32)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    running = {}
    for name in a.forms:
        model = Writer(FORMS[name], a.tokens).model()
        model = quantized(model, x) if a.int8 else model
        running[name] = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    used: dict[str, list[float]] = {name: [] for name in running}
    for done in range(a.rounds + 2):
        for name in running if done % 2 else list(running)[::-1]:
            before = time.process_time()
            running[name].run(None, {"x": x})
            used[name].append(1e3 * (time.process_time() - before))
    base = np.asarray(used[a.forms[0]][2:])
    for name, times in used.items():
        print(f"{name:14} {np.median(times[2:]):7.2f} ms  {np.median(base / np.asarray(times[2:])):.3f}")


if __name__ == "__main__":
    main()
