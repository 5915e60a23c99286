"""Quantization: the arithmetic of Q/DQ, what is touched and what is not, and that the float function survives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from edgetok.converters.quantize import int4, static_int8
from edgetok.converters.quantize.building import Editor
from edgetok.converters.quantize.calibrate import ActivationStats, choose_range, fake_quantize, to_scale
from edgetok.converters.quantize.linears import find_linears, group_by_input
from edgetok.converters.quantize.quantize import quantize_model
from edgetok.converters.quantize.settings import RANGE_METHODS, QuantizeSettings
from edgetok.converters.quantize.smooth import apply_fold, find_fold, smoothing_scale
from edgetok.errors import InputError

WIDTH, HEADS, TOKENS = 32, 2, 10
FAST = QuantizeSettings(rows=256, sensitivity_samples=2)


def encoder(seed: int = 0, *, outlier: float = 1.0, reduce_node: bool = False, batch: int | str = "batch") -> ir.Model:
    """One pre-norm block in the canonical form; ``outlier`` multiplies two channels of each norm's gain."""
    rng = np.random.default_rng(seed)
    nodes, consts = [], []

    def const(name: str, array: np.ndarray) -> str:
        consts.append(onnx.numpy_helper.from_array(np.asarray(array), name))
        return name

    def op(kind: str, inputs: Sequence[str], out: str, **attributes: object) -> str:
        nodes.append(onnx.helper.make_node(kind, list(inputs), [out], name=f"/{out}/{kind}", **attributes))
        return out

    def linear(x: str, k: int, n: int, out: str) -> str:
        w = const(f"{out}.w", rng.normal(0, k**-0.5, (k, n)).astype(np.float32))
        return op(
            "Add", [op("MatMul", [x, w], f"{out}.mm"), const(f"{out}.b", rng.normal(0, 0.1, n).astype("f4"))], out
        )

    def norm(x: str, out: str) -> str:
        gain = rng.normal(1, 0.1, WIDTH).astype(np.float32)
        gain[:2] *= outlier
        bias = const(f"{out}.b", rng.normal(0, 0.1, WIDTH).astype(np.float32))
        return op("LayerNormalization", [x, const(f"{out}.g", gain), bias], out, axis=-1, epsilon=1e-6)

    const("heads", np.array([0, -1, HEADS, WIDTH // HEADS]))
    const("merge", np.array([0, -1, WIDTH]))
    y = norm("x", "ln1")
    for name, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        op("Transpose", [op("Reshape", [linear(y, WIDTH, WIDTH, name), "heads"], f"{name}r")], f"{name}h", perm=perm)
    logits = op("Mul", [op("MatMul", ["qh", "kh"], "qk"), const("scale", np.float32(0.25))], "logits")
    context = op("MatMul", [op("Softmax", [logits], "p", axis=-1), "vh"], "pv")
    context = op("Reshape", [op("Transpose", [context], "pvt", perm=[0, 2, 1, 3]), "merge"], "ctx")
    x1 = op("Add", ["x", linear(context, WIDTH, WIDTH, "o")], "x1")
    if reduce_node:
        w = const("metric.w", np.eye(WIDTH, dtype=np.float32))
        nodes.append(onnx.helper.make_node("MatMul", [x1, w], ["metric"], name="edgetok/reduce/0/metric"))
        x1 = op("Add", [x1, "metric"], "x1m")
    fc1 = linear(norm(x1, "ln2"), WIDTH, 4 * WIDTH, "fc1")
    erf = op("Erf", [op("Div", [fc1, const("sqrt2", np.float32(2**0.5))], "gd")], "ge")
    gelu = op("Mul", [fc1, op("Add", [erf, const("one", np.float32(1))], "ga")], "gm")
    gelu = op("Mul", [gelu, const("half", np.float32(0.5))], "gelu")
    op("Add", [x1, linear(gelu, 4 * WIDTH, WIDTH, "fc2")], "y")
    info = onnx.helper.make_tensor_value_info
    shape = [batch, TOKENS, WIDTH]
    graph = onnx.helper.make_graph(nodes, "block", [info("x", 1, shape)], [info("y", 1, shape)], consts)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def samples(count: int = 24, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(1, TOKENS, WIDTH)).astype(np.float32)} for _ in range(count)]


def run(model: ir.Model, feed: Mapping[str, np.ndarray]) -> np.ndarray:
    onnx.checker.check_model(ir.to_proto(model))
    data = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, dict(feed))[0]


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def optimized_ops(model: ir.Model, tmp_path: object) -> list[str]:
    options = ort.SessionOptions()
    options.optimized_model_filepath = f"{tmp_path}/optimized.onnx"
    options.log_severity_level = 3
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node]


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def stats_of(rows: np.ndarray) -> ActivationStats:
    return ActivationStats(rows.min(0), rows.max(0), rows, rows.mean(0), 3)


# arithmetic


def test_scale_holds_zero_exactly_golden() -> None:
    assert to_scale(-1.0, 1.55) == (np.float32(0.01), 100)
    assert to_scale(0.5, 2.55) == (np.float32(0.01), 0)  # widened to hold zero
    assert to_scale(-2.55, -1.0) == (np.float32(0.01), 255)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (-0.0, 0.0), (0.0, 1e-44)])
def test_empty_range_gets_a_safe_scale(low: float, high: float) -> None:
    scale, zero_point = to_scale(low, high)
    assert (float(scale), zero_point) == (1.0, 0)


def test_weight_codes_and_scales_per_channel_golden() -> None:
    matrix = np.array([[1.27, -0.5, 0.0], [-0.635, 0.25, 0.0]], np.float32)
    codes, scales = static_int8.quantize_weight(matrix)
    np.testing.assert_allclose(scales, [0.01, 0.5 / 127, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(codes, [[127, -127, 0], [-64, 64, 0]])  # -63.5 and 63.5 round to even


def test_reduced_range_keeps_pairs_below_saturation() -> None:
    codes, _ = static_int8.quantize_weight(np.random.default_rng(0).normal(size=(64, 8)), reduce_range=True)
    assert np.abs(codes.astype(int)).max() == 64
    assert 2 * 255 * 64 < 2**15  # two products summed in 16 bits, as vpmaddubsw does


def test_fake_quantize_is_what_onnxruntime_computes() -> None:
    x = np.random.default_rng(0).normal(size=(7, 9)).astype(np.float32) * 3
    scale, zero = to_scale(-2.0, 4.0)
    info = onnx.helper.make_tensor_value_info
    q = onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])
    d = onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])
    consts = [onnx.numpy_helper.from_array(np.asarray(scale), "s")]
    consts.append(onnx.numpy_helper.from_array(np.uint8(zero), "z"))
    graph = onnx.helper.make_graph([q, d], "g", [info("x", 1, [7, 9])], [info("y", 1, [7, 9])], consts)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    got = ort.InferenceSession(proto.SerializeToString()).run(None, {"x": x})[0]
    # a value on a rounding boundary may go either way: one multiplies by 1/scale, the other divides
    close = np.isclose(fake_quantize(x, scale, zero), got, rtol=0, atol=1e-6)
    assert close.mean() > 0.98
    assert np.abs(fake_quantize(x, scale, zero) - got).max() <= float(scale) * 1.001


@pytest.mark.parametrize("method", RANGE_METHODS)
def test_every_range_rule_stays_inside_what_was_seen(method: str) -> None:
    x = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
    low, high = choose_range(method, x, float(x.min()), float(x.max()), np.ones(16))
    assert x.min() * 1.06 <= low < 0 < high <= x.max() * 1.06


def test_percentiles_cut_a_lone_outlier() -> None:
    x = np.random.default_rng(0).normal(size=(1000, 16)).astype(np.float32)
    x[0, 0] = 300
    assert choose_range("percentile-99.9", x, float(x.min()), 300.0, np.ones(16))[1] < 5


def test_mse_cuts_where_clipping_costs_less_than_coarse_steps() -> None:
    x = np.random.default_rng(0).normal(size=(1000, 16)).astype(np.float32)
    x[:, 0] *= 100  # the channel meets no weight: clipping it costs nothing
    energy = np.ones(16)
    energy[0] = 0
    assert choose_range("mse", x, float(x.min()), float(x.max()), energy)[1] < 0.5 * x.max()


def test_int8_linear_matches_a_numpy_reference() -> None:
    settings = replace(FAST, smooth="off", bias_correction=False, range_methods=("minmax",))
    model = encoder()
    quantized, report = quantize_model(model, "int8", samples(), settings)
    names = {r.name: r for r in report.layers}
    record = names["/fc2.mm/MatMul"]
    feed = samples(1, seed=9)[0]
    proto = ir.to_proto(quantized)
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(n, 1, None) for n in ("gelu", "fc2"))
    _, gelu, got = ort.InferenceSession(proto.SerializeToString()).run(None, feed)
    w = next(item for item in find_linears(model.graph) if item.name == "/fc2.mm/MatMul")
    codes, scales = static_int8.quantize_weight(w.matrix())
    q = np.clip(np.rint(gelu / np.float32(record.scale)) + record.zero_point, 0, 255)  # type: ignore[operator]
    want = ((q - record.zero_point).astype(np.int64) @ codes) * (np.float64(record.scale) * scales) + w.bias_array()
    # integer sums are exact; float32 scaling costs a few ULP, and a tie in Q may move one code by one step
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=float(record.scale or 0) * float(np.abs(w.matrix()).max()))


# the whole int8 step


def test_int8_stays_close_and_quarters_the_weights() -> None:
    model, feed = encoder(), samples(1, seed=7)[0]
    quantized, report = quantize_model(model, "int8", samples(), FAST)
    assert relative(run(quantized, feed), run(model, feed)) < 0.02  # 8 bits: about 1 % per layer
    assert report.bytes_after < 0.35 * report.bytes_before  # norms, biases and scales stay float
    assert not report.kept_float
    assert {r.precision for r in report.layers} == {"int8"}
    assert sum(
        {id(r): r.share or 0 for r in report.layers if r.name not in ("/k.mm/MatMul", "/v.mm/MatMul")}.values()
    ) == (pytest.approx(1, abs=1e-6))
    assert report.output_error["y"] < 0.02


def test_int8_does_not_change_its_input() -> None:
    model = encoder()
    before = ir.to_proto(model).SerializeToString()
    quantize_model(model, "int8", samples(), FAST)
    assert ir.to_proto(model).SerializeToString() == before


def test_int8_is_deterministic() -> None:
    first, second = (quantize_model(encoder(outlier=20), "int8", samples(), FAST)[0] for _ in range(2))
    assert ir.to_proto(first).SerializeToString() == ir.to_proto(second).SerializeToString()


def test_one_quantize_serves_q_k_and_v() -> None:
    quantized, _ = quantize_model(encoder(), "int8", samples(), FAST)
    assert ops(quantized).count("QuantizeLinear") == 4  # for q/k/v, o, fc1, fc2
    assert ops(quantized).count("MatMul") == 6 + 2  # attention products stay float


@pytest.mark.parametrize("batch", ["batch", 1])
def test_onnxruntime_runs_every_linear_in_integers(batch: int | str, tmp_path: object) -> None:
    quantized, _ = quantize_model(encoder(batch=batch), "int8", samples(), FAST)
    found = optimized_ops(quantized, tmp_path)
    assert found.count("MatMulIntegerToFloat") == 6
    assert "DequantizeLinear" not in found
    assert "Gemm" not in found


def test_gemm_on_matrices_runs_in_integers(tmp_path: object) -> None:
    rng = np.random.default_rng(0)
    info = onnx.helper.make_tensor_value_info
    consts = [
        onnx.numpy_helper.from_array(rng.normal(size=s).astype(np.float32), n)
        for n, s in (("w", (24, 32)), ("b", (24,)))
    ]
    node = onnx.helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="head", transB=1)
    graph = onnx.helper.make_graph([node], "g", [info("x", 1, ["n", 32])], [info("y", 1, ["n", 24])], consts)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    model = ir.from_proto(proto)
    calib = [{"x": rng.normal(size=(5, 32)).astype(np.float32)} for _ in range(8)]
    quantized, _ = quantize_model(model, "int8", calib, FAST)
    assert relative(run(quantized, calib[0]), run(model, calib[0])) < 0.02
    assert "MatMulIntegerToFloat" in optimized_ops(quantized, tmp_path)


def test_nodes_of_token_reduction_are_left_alone() -> None:
    for precision in ("int8", "int8-dynamic", "int4"):
        quantized, report = quantize_model(encoder(reduce_node=True), precision, samples(), FAST)
        node = next(n for n in quantized.graph if n.name == "edgetok/reduce/0/metric")
        assert node.op_type == "MatMul"
        assert node.inputs[0].name == "x1"
        assert node.inputs[1].const_value.dtype == ir.DataType.FLOAT
        assert not any("edgetok/reduce" in r.name for r in report.layers)


def test_named_layers_stay_float() -> None:
    quantized, report = quantize_model(encoder(), "int8", samples(), replace(FAST, keep_float=("/fc*",)))
    assert set(report.kept_float) == {"/fc1.mm/MatMul", "/fc2.mm/MatMul"}
    assert ops(quantized).count("QuantizeLinear") == 2


def test_the_worst_layer_is_kept_float_when_the_aim_asks() -> None:
    settings = replace(FAST, max_error=1e-6, max_float_macs=0.4, smooth="off")
    _, report = quantize_model(encoder(outlier=60), "int8", samples(), settings)
    assert report.kept_float
    kept = [r for r in report.layers if r.precision == "float"]
    assert all("% of the output error" in r.reason for r in kept)
    assert sum(r.macs for r in kept) <= 0.4 * sum(r.macs for r in report.layers)
    assert "was missed" in report.notes[0]


def test_nothing_is_kept_float_when_the_aim_is_met() -> None:
    _, report = quantize_model(encoder(), "int8", samples(), replace(FAST, max_error=0.5))
    assert not report.kept_float
    assert not report.notes


def test_progress_reaches_the_end_of_every_step() -> None:
    seen: dict[str, tuple[int, int]] = {}
    quantize_model(encoder(), "int8", samples(), FAST, lambda name, done, total: seen.__setitem__(name, (done, total)))
    assert list(seen) == ["calibrate", "smooth", "choose ranges", "sensitivity", "write int8"]
    assert all(done == total for done, total in seen.values())


# smoothing


def test_smoothing_scale_golden() -> None:
    s = smoothing_scale(np.array([-4.0, 0.0]), np.array([1.0, 1.0]), [np.array([[1.0], [1.0]], np.float32)], 0.5)
    np.testing.assert_allclose(s, [2**0.5, 2**-0.5], rtol=1e-6)  # sqrt(4), sqrt(1), geometric mean 1


def test_smoothing_leaves_dead_channels_alone() -> None:
    s = smoothing_scale(np.zeros(3), np.array([0.0, 1.0, 1.0]), [np.array([[1.0], [0.0], [1.0]], np.float32)], 0.5)
    np.testing.assert_array_equal(s, np.ones(3))


def test_folding_leaves_the_float_function_unchanged() -> None:
    model, feed = encoder(), samples(1)[0]
    want = run(model, feed)
    editor = Editor(model.graph)
    groups = group_by_input(find_linears(model.graph))
    carriers = {id((x.add or x.node).outputs[0]): x for g in groups for x in g.linears}
    kinds = []
    for i, group in enumerate(groups):
        fold = find_fold(group, carriers)
        kinds.append(fold.kind)
        k = group.linears[0].shape[0]
        apply_fold(editor, fold, group, np.exp(np.random.default_rng(i).normal(size=k)).astype(np.float32))
    assert kinds == ["norm", "value", "norm", "insert"]
    assert relative(run(model, feed), want) < 1e-5


def test_a_norm_that_others_read_is_not_folded_into() -> None:
    model = encoder()
    ln1 = next(n for n in model.graph if n.outputs[0].name == "ln1")
    model.graph.outputs.append(ln1.outputs[0])
    groups = group_by_input(find_linears(model.graph))
    assert find_fold(groups[0], {}).kind == "insert"


def test_smoothing_lowers_the_error_of_outlier_channels() -> None:
    model, feed = encoder(outlier=40), samples(1, seed=5)[0]
    want = run(model, feed)
    errors = {}
    for smooth in ("auto", "off"):
        quantized, report = quantize_model(model, "int8", samples(), replace(FAST, smooth=smooth))
        errors[smooth] = relative(run(quantized, feed), want)
        assert any(r.smooth for r in report.layers) == (smooth == "auto")
    assert errors["auto"] < 0.8 * errors["off"]


# other precisions


def test_dynamic_int8_needs_no_samples(tmp_path: object) -> None:
    model, feed = encoder(), samples(1)[0]
    quantized, report = quantize_model(model, "int8-dynamic", [])
    assert relative(run(quantized, feed), run(model, feed)) < 0.03
    found = optimized_ops(quantized, tmp_path)
    assert found.count("DynamicQuantizeMatMul") + found.count("MatMulIntegerToFloat") == 6
    assert {r.precision for r in report.layers} == {"int8-dynamic"}


@pytest.mark.parametrize("k", [16, 31, 32, 33, 100])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_blocks_match_onnxruntime_for_any_width(k: int, symmetric: bool) -> None:
    rng = np.random.default_rng(k)
    w = rng.normal(size=(k, 24)).astype(np.float32)
    info = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")
    consts = [onnx.numpy_helper.from_array(w, "w")]
    graph = onnx.helper.make_graph([node], "g", [info("x", 1, ["n", k])], [info("y", 1, ["n", 24])], consts)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    settings = QuantizeSettings(block=32, symmetric=symmetric, accuracy_level=0)
    quantized, report = quantize_model(ir.from_proto(proto), "int4", [], settings)
    codes, scales, zeros = int4.quantize_blocks(w, 32, symmetric=symmetric)
    x = rng.normal(size=(5, k)).astype(np.float32)
    got = ort.InferenceSession(ir.to_proto(quantized).SerializeToString()).run(None, {"x": x})[0]
    # float32 sums of at most 100 products
    np.testing.assert_allclose(got, x @ int4.dequantize_blocks(codes, scales, zeros, k), rtol=1e-4, atol=1e-4)
    assert (report.layers[0].error or 1) < 0.15  # 4 bits over 32 normal weights


def test_int4_packs_the_even_code_low() -> None:
    assert int4.pack_nibbles(np.array([[1, 2, 3]], np.uint8)).tolist() == [[0x21, 0x03]]


def test_int4_symmetric_gives_the_larger_end_the_extra_code() -> None:
    w = np.zeros((16, 2), np.float32)
    w[0], w[1] = (-1.0, 1.0), (0.2, -0.2)
    codes, scales, zeros = int4.quantize_blocks(w, 16, symmetric=True)
    assert zeros is None
    np.testing.assert_allclose(int4.dequantize_blocks(codes, scales, zeros, 16)[0], [-1.0, 1.0], atol=1e-6)


def test_int4_zero_block_is_zero() -> None:
    codes, scales, zeros = int4.quantize_blocks(np.zeros((20, 3), np.float32), 16, symmetric=False)
    assert np.isfinite(scales).all()
    assert not int4.dequantize_blocks(codes, scales, zeros, 20).any()


def test_fp16_halves_the_file_and_keeps_what_does_not_fit() -> None:
    model, feed = encoder(), samples(1)[0]
    quantized, report = quantize_model(model, "fp16", [])
    assert relative(run(quantized, feed), run(model, feed)) < 2e-3  # 11 bits of mantissa
    assert report.bytes_after < 0.6 * report.bytes_before
    big = encoder()
    value = big.graph.initializers["fc1.w"]
    value.const_value = ir.tensor(np.full((WIDTH, 4 * WIDTH), 1e6, np.float32), name="fc1.w")
    _, report = quantize_model(big, "fp16", [])
    assert report.kept_float == ("fc1.w",)


def test_large_tables_go_to_8_bits_per_row() -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(9000, 32)).astype(np.float32) * rng.uniform(0.01, 5, (9000, 1)).astype(np.float32)
    info = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Gather", ["table", "ids"], ["y"], name="words")
    consts = [onnx.numpy_helper.from_array(table, "table")]
    graph = onnx.helper.make_graph([node], "g", [info("ids", 7, ["n", 4])], [info("y", 1, ["n", 4, 32])], consts)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    quantized, report = quantize_model(ir.from_proto(proto), "int8-dynamic", [])
    ids = np.array([[0, 5, 8999, 17]])
    got = ort.InferenceSession(ir.to_proto(quantized).SerializeToString()).run(None, {"ids": ids})[0]
    assert (np.abs(got - table[ids]) <= np.abs(table[ids]).max(-1, keepdims=True) / 254 + 1e-6).all()
    assert report.layers[0].precision == "int8-table"
    assert report.bytes_after < 0.3 * report.bytes_before


def test_keep_returns_the_model_itself() -> None:
    model = encoder()
    assert quantize_model(model, "keep", [])[0] is model


# bad input


def test_int8_without_samples_says_what_to_add() -> None:
    with pytest.raises(InputError, match="no") as caught:
        quantize_model(encoder(), "int8", [])
    assert "--calib" in (caught.value.next or "")


def test_a_sample_with_nan_is_named() -> None:
    bad = samples(3)
    bad[1]["x"][0, 3, 4] = np.nan
    with pytest.raises(InputError, match="calibration sample 1"):
        quantize_model(encoder(), "int8", bad, FAST)


def test_a_missing_input_is_named() -> None:
    with pytest.raises(InputError, match="'x'"):
        quantize_model(encoder(), "int8", [{"z": np.zeros(3, np.float32)}], FAST)


def test_a_sample_of_the_wrong_shape_is_named() -> None:
    with pytest.raises(InputError, match="calibration sample 0"):
        quantize_model(encoder(), "int8", [{"x": np.zeros((1, TOKENS, 5), np.float32)}], FAST)


def test_constant_samples_give_finite_answers() -> None:
    zeros = [{"x": np.zeros((1, TOKENS, WIDTH), np.float32)}]
    quantized, _ = quantize_model(encoder(), "int8", zeros, FAST)
    assert np.isfinite(run(quantized, zeros[0])).all()


def test_unknown_precision_lists_the_known() -> None:
    with pytest.raises(InputError) as caught:
        quantize_model(encoder(), "int3", [])
    assert "int8-dynamic" in (caught.value.next or "")


@pytest.mark.parametrize("bad", [{"range_methods": ("best",)}, {"smooth": "maybe"}, {"block": 24}, {"alphas": (0.0,)}])
def test_bad_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(InputError):
        QuantizeSettings(**bad)  # type: ignore[arg-type]
