"""Small graphs over which every device is held against the numpy reference. Imported by ``test_devices.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper, numpy_helper

MICROSOFT = "com.microsoft"
SEED = 20260


@dataclass(frozen=True)
class Case:
    """One graph with its feeds.

    Args:
        name: for the test id.
        nodes: the graph; all outputs of the last node are graph outputs.
        feeds: graph inputs.
        weights: initializers.
        atol: largest difference to the reference, absolute; 0 means exact.
        domain: extra opset import.
        standard: cpu_ort and reference must run it, without excuse.
    """

    name: str
    nodes: list[onnx.NodeProto]
    feeds: dict[str, np.ndarray]
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    atol: float = 0.0
    domain: str = ""

    def model(self, opset: int = 18) -> onnx.ModelProto:
        """A checked model; output types come from shape inference or from running nothing at all."""
        ins = [value(name, array) for name, array in self.feeds.items()]
        outs = [helper.make_empty_tensor_value_info(n) for n in self.nodes[-1].output]
        inits = [numpy_helper.from_array(a, n) for n, a in self.weights.items()]
        opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(self.domain, 1)] if self.domain else [])
        graph = helper.make_graph(self.nodes, self.name, ins, outs, inits)
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        return onnx.shape_inference.infer_shapes(model, data_prop=True)


def value(name: str, array: np.ndarray) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)


def node(op: str, ins: str, outs: str = "y", **attrs: object) -> onnx.NodeProto:
    return helper.make_node(op, ins.split(), outs.split(), name=f"the_{op}_{outs}", **attrs)


def _dot_bound(k: int) -> float:
    """float32 sums of k products of standard normals: a few hundred ulps of sqrt(k), far below any real defect."""
    return 2e-6 * k


def cases() -> list[Case]:
    """All cases, built from one seed."""
    rng = np.random.default_rng(SEED)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    def ints(low: int, high: int, *shape: int, dtype: type = np.int64) -> np.ndarray:
        return rng.integers(low, high, shape).astype(dtype)

    found: list[Case] = []
    for build in (_matmuls, _normalizations, _moves, _choices, _quantized, _microsoft):
        found.extend(build(normal, ints))
    return found


Normal = Callable[..., np.ndarray]


def _matmuls(normal: Normal, ints: Normal) -> list[Case]:
    out = []
    for b in (1, 2):
        w = {"w": normal(24, 40)}
        out.append(Case(f"matmul_b{b}", [node("MatMul", "x w")], {"x": normal(b, 17, 24)}, w, _dot_bound(24)))
    out += [
        Case("matmul_one_row", [node("MatMul", "x w")], {"x": normal(1, 24)}, {"w": normal(24, 1)}, _dot_bound(24)),
        Case(
            "matmul_heads",
            [node("MatMul", "q k")],
            {"q": normal(2, 3, 7, 16), "k": normal(2, 3, 16, 9)},
            atol=_dot_bound(16),
        ),
        Case("matmul_no_rows", [node("MatMul", "x w")], {"x": normal(0, 8)}, {"w": normal(8, 3)}),
        Case(
            "gemm",
            [node("Gemm", "x w b", transB=1)],
            {"x": normal(5, 24)},
            {"w": normal(7, 24), "b": normal(7)},
            _dot_bound(24),
        ),
    ]
    return out


def _normalizations(normal: Normal, ints: Normal) -> list[Case]:
    masked = normal(2, 3, 9)
    masked[0, 0, 1:] = -np.inf
    half = {"half": np.float32(0.5), "one": np.float32(1), "root": np.float32(np.sqrt(2))}
    gelu = [
        node("Div", "x root", "a"),
        node("Erf", "a", "b"),
        node("Add", "b one", "c"),
        node("Mul", "x c", "d"),
        node("Mul", "d half", "y"),
    ]
    scale = {"g": normal(24), "b": normal(24)}
    return [
        Case("softmax", [node("Softmax", "x", axis=-1)], {"x": normal(2, 3, 9)}, atol=1e-6),
        Case("softmax_with_masked_keys", [node("Softmax", "x", axis=-1)], {"x": masked}, atol=1e-6),
        Case("softmax_of_one", [node("Softmax", "x", axis=-1)], {"x": normal(2, 1)}, atol=1e-6),
        Case("softmax_large_values", [node("Softmax", "x", axis=-1)], {"x": normal(2, 8) * 1000}, atol=1e-6),
        Case("layernorm", [node("LayerNormalization", "x g b")], {"x": normal(2, 7, 24)}, scale, 2e-5),
        Case(
            "layernorm_of_a_constant_row",
            [node("LayerNormalization", "x g b", epsilon=1e-6)],
            {"x": np.ones((1, 3, 24), np.float32)},
            scale,
            1e-3,  # (x - mean) is a rounding error of about 1e-7 over sqrt(epsilon) = 1e-3
        ),
        Case("gelu_erf", gelu, {"x": normal(2, 33)}, half, 2e-6),
        Case(
            "reduce_mean",
            [node("ReduceMean", "x axes", keepdims=1)],
            {"x": normal(2, 5, 6)},
            {"axes": np.array([1])},
            1e-6,
        ),
    ]


def _moves(normal: Normal, ints: Normal) -> list[Case]:
    flat = {"shape": np.array([0, 0, 3, -1])}
    add = {"axis": 1, "reduction": "add"}
    return [
        Case("gather_axis1", [node("Gather", "x i", axis=1)], {"x": normal(2, 9, 4)}, {"i": np.array([0, 8, 3, -1])}),
        Case(
            "gather_elements_many",
            [node("GatherElements", "x i", axis=1)],
            {"x": normal(2, 150, 4), "i": ints(0, 150, 2, 30, 4)},
        ),
        Case(
            "scatter_add_with_repeats",
            [node("ScatterElements", "x i u", **add)],
            {"x": normal(2, 6, 4), "i": ints(0, 6, 2, 30, 4), "u": normal(2, 30, 4)},
            atol=1e-5,
        ),
        Case(
            "scatter_set",
            [node("ScatterElements", "x i u", axis=0)],
            {"x": normal(6, 4), "i": np.array([[0, 5, 2, 1], [3, 1, 0, 2]]), "u": normal(2, 4)},
        ),
        Case(
            "split_heads",
            [node("Reshape", "x shape", "r"), node("Transpose", "r", perm=[0, 2, 1, 3])],
            {"x": normal(2, 5, 12)},
            flat,
        ),
        Case("concat_with_empty", [node("Concat", "x e", axis=1)], {"x": normal(2, 5, 3), "e": normal(2, 0, 3)}),
        Case(
            "slice_to_nothing",
            [node("Slice", "x s e a")],
            {"x": normal(2, 5)},
            {"s": np.array([3]), "e": np.array([3]), "a": np.array([1])},
        ),
        Case("split", [node("Split", "x sizes", "a b", axis=1)], {"x": normal(2, 9)}, {"sizes": np.array([4, 5])}),
        Case("cast_to_half", [node("Cast", "x", to=T.FLOAT16)], {"x": normal(3, 4)}),
        Case("scalar_in", [node("Mul", "x s")], {"x": normal(3, 4), "s": np.asarray(np.float32(0.5))}),
        Case("scalar_out", [node("ReduceSum", "x", keepdims=0)], {"x": normal(3, 4)}, atol=1e-5),
    ]


def _choices(normal: Normal, ints: Normal) -> list[Case]:
    k = {"k": np.array([3])}
    return [
        Case("topk_largest", [node("TopK", "x k", "v i", axis=1)], {"x": normal(2, 33)}, k),
        Case("topk_smallest", [node("TopK", "x k", "v i", axis=-1, largest=0)], {"x": normal(2, 33)}, k),
        Case("topk_all", [node("TopK", "x k", "v i", axis=1)], {"x": normal(2, 3)}, k),
        Case("argmax", [node("ArgMax", "x", axis=-1, keepdims=0)], {"x": normal(2, 3, 33)}),
        Case("where", [node("Where", "c x z")], {"c": normal(4, 5) > 0, "x": normal(4, 5), "z": normal(5)}),
        Case("cumsum", [node("CumSum", "x a")], {"x": normal(2, 9)}, {"a": np.array(1)}, 1e-5),
        Case(
            "onehot",
            [node("OneHot", "i d v")],
            {"i": ints(0, 6, 5)},
            {"d": np.array(6), "v": np.array([0, 1], np.float32)},
        ),
    ]


def _quantized(normal: Normal, ints: Normal) -> list[Case]:
    zero_u8, zero_s8 = {"z": np.uint8(117)}, {"z": np.zeros(5, np.int8)}
    scale = {"s": np.float32(0.03)}
    per_channel = {"s": (np.abs(normal(5)) + 0.01).astype(np.float32)}
    u8 = {"x": ints(0, 256, 3, 8, dtype=np.uint8)}
    s8 = {"w": ints(-127, 128, 8, 5, dtype=np.int8)}
    extreme = np.array([[0.0, 0.5, 1.5, -1.5, -1e9, 1e9, 137.6, 138.4, -117.6]], np.float32) / 32
    small = {
        "xs": np.float32(0.02),
        "xz": np.uint8(131),
        "ws": np.float32(0.01),
        "wz": np.int8(0),
        "ys": np.float32(0.05),
        "yz": np.uint8(120),
    }
    return [
        Case("quantize_u8", [node("QuantizeLinear", "x s z")], {"x": normal(3, 8) * 2}, {**scale, **zero_u8}),
        Case(
            "quantize_saturates_and_rounds_to_even",
            [node("QuantizeLinear", "x s z")],
            {"x": extreme},
            {**scale, **zero_u8},
        ),
        Case(
            "dequantize_s8_per_channel",
            [node("DequantizeLinear", "x s z", axis=1)],
            {"x": ints(-128, 128, 3, 5, dtype=np.int8)},
            {**per_channel, **zero_s8},
            2e-5,
        ),
        Case(
            "qdq_per_channel",
            [node("QuantizeLinear", "x s z", "q", axis=1), node("DequantizeLinear", "q s z", axis=1)],
            {"x": normal(4, 5)},
            {**per_channel, **zero_s8},
            2e-5,  # two ulps of 127
        ),
        Case(
            "matmul_integer_u8s8", [node("MatMulInteger", "x w xz wz")], u8, {**s8, "xz": np.uint8(9), "wz": np.int8(0)}
        ),
        # A quotient that falls on a half rounds one way in float32 and the other in float64: one step.
        Case("qlinear_matmul_u8s8", [node("QLinearMatMul", "x xs xz w ws wz ys yz")], u8, {**s8, **small}, 1.0),
        Case("dynamic_quantize", [node("DynamicQuantizeLinear", "x", "y ys yz")], {"x": normal(6, 8)}, atol=1e-6),
    ]


def _microsoft(normal: Normal, ints: Normal) -> list[Case]:
    out = []
    for bits in (4, 8):
        n, k, block = 16, 80, 32
        blocks = -(-k // block)
        attrs = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": 0, "domain": MICROSOFT}
        weights = {
            "b": ints(0, 256, n, blocks, block * bits // 8, dtype=np.uint8),
            "s": (np.abs(normal(n, blocks)) * 0.1).astype(np.float32),
        }
        zeros = {"z": ints(0, 256, n, -(-blocks * bits // 8), dtype=np.uint8)}
        x = {"x": normal(3, k)}
        atol = 1e-3  # weights reach 200 * 0.3, sums of 80 products
        out.append(Case(f"matmul_nbits_{bits}", [node("MatMulNBits", "x b s", **attrs)], x, weights, atol, MICROSOFT))
        asym = {**weights, **zeros}
        out.append(
            Case(f"matmul_nbits_{bits}_zero", [node("MatMulNBits", "x b s z", **attrs)], x, asym, atol, MICROSOFT)
        )
    ln = {"g": normal(24), "b": normal(24)}
    d = {"domain": MICROSOFT}
    int8 = {"w": ints(-127, 128, 8, 5, dtype=np.int8), "ws": (np.abs(normal(5)) * 0.1).astype(np.float32)}
    out += [
        Case("ms_gelu", [node("Gelu", "x", **d)], {"x": normal(3, 9)}, atol=2e-6, domain=MICROSOFT),
        Case("ms_bias_gelu", [node("BiasGelu", "x g", **d)], {"x": normal(3, 24)}, {"g": ln["g"]}, 2e-6, MICROSOFT),
        Case("ms_fast_gelu", [node("FastGelu", "x", **d)], {"x": normal(3, 24)}, atol=2e-6, domain=MICROSOFT),
        Case(
            "ms_quick_gelu",
            [node("QuickGelu", "x", alpha=1.702, **d)],
            {"x": normal(3, 9)},
            atol=2e-6,
            domain=MICROSOFT,
        ),
        Case(
            "ms_skip_layernorm",
            [node("SkipLayerNormalization", "x t g b", epsilon=1e-5, **d)],
            {"x": normal(2, 5, 24), "t": normal(2, 5, 24)},
            ln,
            2e-5,
            MICROSOFT,
        ),
        Case(
            "ms_fused_matmul",
            [node("FusedMatMul", "x t", alpha=0.125, transB=1, **d)],
            {"x": normal(2, 3, 5, 16), "t": normal(2, 3, 6, 16)},
            atol=_dot_bound(16),
            domain=MICROSOFT,
        ),
        Case(
            "ms_multi_head_attention",
            [node("MultiHeadAttention", "q k v bias", num_heads=3, **d)],
            {"q": normal(2, 5, 48), "k": normal(2, 7, 48), "v": normal(2, 7, 48)},
            {"bias": normal(144)},
            2e-5,
            MICROSOFT,
        ),
        Case(
            "ms_matmul_integer_to_float",
            [node("MatMulIntegerToFloat", "x w xs ws xz", **d)],
            {"x": ints(0, 256, 3, 8, dtype=np.uint8)},
            {**int8, "xs": np.float32(0.02), "xz": np.uint8(100)},
            1e-4,
            MICROSOFT,
        ),
        Case(
            "ms_dynamic_quantize_matmul",
            [node("DynamicQuantizeMatMul", "x w ws", **d)],
            {"x": normal(3, 8)},
            int8,
            1.5,  # half a step of the activation quantizer (0.01) times the sum of a column's 8 weights (up to 19 each)
            MICROSOFT,
        ),
    ]
    return out
