"""The passes of the clean-up one by one: the forms they know, and what they must leave alone."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgetok.converters.graph import dims
from edgetok.converters.graph.cleanup import CleanupReport, clean_up
from edgetok.converters.graph.dims import Dim, Undecidable
from edgetok.converters.graph.fold import reshape_target
from edgetok.converters.graph.outputs import cut_outputs
from edgetok.converters.graph.shapes import fix_shapes
from edgetok.converters.targets.onnx import finish
from edgetok.errors import InputError, InternalError

BATCH = Dim(1, ("batch",))
Shape = Sequence[int | str | None]


class Net:
    """A small graph written node by node; ``x`` [shape] is the input, the last value the output."""

    def __init__(self, shape: Shape, kind: int = TensorProto.FLOAT, opset: int = 18) -> None:
        self.inputs = [helper.make_tensor_value_info("x", kind, shape)]
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.opset = opset

    def const(self, array: Any, name: str = "") -> str:
        name = name or f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(array), name))
        return name

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op_type.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [name], name=f"n_{name}", **attributes))
        return name

    def model(self, *outputs: str, kind: int = TensorProto.FLOAT) -> ir.Model:
        infos = [helper.make_tensor_value_info(o, kind, None) for o in outputs]
        graph = helper.make_graph(self.nodes, "g", self.inputs, infos, self.constants)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        return ir.serde.deserialize_model(proto)


def run(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    proto = ir.serde.serialize_model(model).SerializeToString()
    return [np.asarray(a) for a in ort.InferenceSession(proto, options, ["CPUExecutionProvider"]).run(None, {"x": x})]


def ops(model: ir.Model) -> collections.Counter[str]:
    return collections.Counter(n.op_type for n in model.graph)


def check(model: ir.Model, x: np.ndarray, tolerance: float = 1e-6, **shapes: Any) -> CleanupReport:
    """Clean up and hold the answers against those before."""
    before = run(model, x)
    report = clean_up(model, shapes or None)
    for left, right in zip(before, run(model, x), strict=True):
        np.testing.assert_allclose(left, right, atol=tolerance * max(1.0, float(np.abs(left).max())))
    return report


# ---------------------------------------------------------------- sizes


def test_dims_multiply_and_divide_exactly() -> None:
    twelve = dims.mul(BATCH, 12)
    assert str(twelve) == "12*batch"
    assert dims.div(twelve, 4) == Dim(3, ("batch",))
    assert dims.div(twelve, BATCH) == 12
    assert dims.mul(BATCH, 0) == 0
    assert dims.parse("12*batch") == twelve
    assert dims.parse("odd name") == Dim(1, ("odd name",))
    with pytest.raises(Undecidable):
        dims.div(twelve, 5)


def test_dims_compare_only_when_every_value_agrees() -> None:
    assert not dims.equal(BATCH, -1)
    assert not dims.equal(BATCH, 0)
    assert not dims.equal(dims.mul(BATCH, 4), 6)
    assert dims.less(0, BATCH)
    assert not dims.less(dims.mul(BATCH, 3), 3)
    for undecided in (lambda: dims.equal(BATCH, 1), lambda: dims.less(BATCH, 2), lambda: dims.add(BATCH, 1)):
        with pytest.raises(Undecidable):
            undecided()


def test_reshape_target_copies_leading_sizes_and_bakes_no_token_count() -> None:
    assert reshape_target((BATCH, 257, 384), (BATCH, 257, 6, 64)) == [0, 0, 6, 64]
    assert reshape_target((BATCH, 257, 6, 64), (BATCH, 257, 384)) == [0, 0, 384]
    assert reshape_target((dims.mul(BATCH, 257), 384), (BATCH, 257, 384)) == [-1, 257, 384]
    assert reshape_target((4,), (BATCH, Dim(1, ("s",)))) is None
    assert reshape_target((BATCH, 4), (None, 4)) is None


def test_fix_shapes_names_the_batch_and_ties_shared_symbols() -> None:
    net = Net(["n", "len"])
    net.inputs.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "len"]))
    model = net.model(net.op("Add", "x", "y"))
    fix_shapes(model, {"x": ["batch", 128]})
    assert [[str(d) for d in v.shape or ()] for v in model.graph.inputs] == [["batch", "128"]] * 2


def test_fix_shapes_keeps_symbols_of_different_names_apart() -> None:
    net = Net(["images", None])
    net.inputs.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["texts", "images"]))
    model = net.model(net.op("Relu", "x"), net.op("Relu", "y"))
    fix_shapes(model)
    assert [[str(d) for d in v.shape or ()] for v in model.graph.inputs] == [["batch", "x_1"], ["texts", "batch"]]


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"z": [1, 2]}, "no input 'z'"),
        ({"x": [1, 2, 3]}, "expected 2 sizes"),
        ({"x": [1, 9]}, "fixes this size to 4"),
        ({"x": [0, 4]}, "at least 1"),
    ],
)
def test_fix_shapes_refuses_what_contradicts_the_graph(shapes: dict[str, list[int]], words: str) -> None:
    net = Net(["n", 4])
    with pytest.raises(InputError, match=words):
        clean_up(net.model(net.op("Relu", "x")), shapes)


# ---------------------------------------------------------------- folding


def test_fold_computes_the_resize_of_a_constant_once() -> None:
    net = Net(["batch", 3, 4, 4])
    table = net.const(np.arange(18, dtype=np.float32).reshape(1, 2, 3, 3))
    tail = net.op("Slice", net.op("Shape", "x"), net.const([2]), net.const([4]))
    sizes = net.op("Concat", net.const([1, 2]), tail, axis=0)
    resized = net.op("Resize", table, "", "", sizes, mode="cubic")
    model = net.model(net.op("Mul", net.op("ReduceMean", "x", net.const([1])), resized))
    check(model, np.ones((2, 3, 4, 4), np.float32), tolerance=0)
    assert ops(model) == {"ReduceMean": 1, "Mul": 1}


def test_fold_keeps_float_branches_of_where_float() -> None:
    net = Net([2])
    picked = net.op("Where", net.const([True, False]), net.const([0.25, 0.5]), net.const([1.5, 2.5]))
    model = net.model(net.op("Add", "x", net.op("Cast", picked, to=TensorProto.FLOAT)))
    check(model, np.zeros(2, np.float32), tolerance=0)
    assert ops(model) == {"Add": 1}


def test_fold_leaves_huge_and_random_constants_alone() -> None:
    net = Net([1])
    huge = net.op("ConstantOfShape", net.const([1 << 28]), value=helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0]))
    total = net.op("ReduceSum", huge, net.const([0]))
    noise = net.op("RandomUniformLike", net.const(np.zeros(1, np.float32)))
    model = net.model(net.op("Add", net.op("Add", "x", total), noise))
    clean_up(model)
    assert ops(model)["ConstantOfShape"] == 1
    assert ops(model)["RandomUniformLike"] == 1


def test_fold_replaces_an_if_that_goes_one_way() -> None:
    def branch(name: str, op_type: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(op_type, ["x"], [f"{name}_out"])], name, [], [out])

    net = Net(["batch", 4])
    rank = net.op("Size", net.op("Shape", "x"))
    chosen = net.op(
        "If",
        net.op("Equal", rank, net.const(2)),
        then_branch=branch("yes", "Relu"),
        else_branch=branch("no", "Neg"),
    )
    model = net.model(net.op("Abs", chosen))
    check(model, np.array([[-1, 2, -3, 4]], np.float32), tolerance=0)
    assert ops(model) == {"Relu": 1, "Abs": 1}


def test_fold_sizes_of_an_open_batch_come_from_one_shape_node() -> None:
    net = Net(["batch", 5, 8])
    first = net.op("Unsqueeze", net.op("Gather", net.op("Shape", "x"), net.const(0), axis=0), net.const([0]))
    token = net.op(
        "Expand", net.const(np.ones((1, 1, 8), np.float32)), net.op("Concat", first, net.const([1, 8]), axis=0)
    )
    model = net.model(net.op("Concat", token, "x", axis=1))
    check(model, np.zeros((3, 5, 8), np.float32), tolerance=0)
    assert ops(model) == {"Shape": 1, "Concat": 2, "Expand": 1}
    assert [str(d) for d in model.graph.outputs[0].shape or ()] == ["batch", "6", "8"]


def test_cleanup_drops_views_that_undo_each_other() -> None:
    net = Net(["batch", 5, 8])
    y = net.op("Transpose", net.op("Transpose", "x", perm=[0, 2, 1]), perm=[0, 2, 1])
    y = net.op("Reshape", net.op("Reshape", y, net.const([-1, 8])), net.const([-1, 5, 8]))
    y = net.op("Cast", net.op("Identity", net.op("Mul", y, net.const(np.float32(1)))), to=TensorProto.FLOAT)
    model = net.model(net.op("Relu", net.op("Dropout", y)))
    check(model, np.arange(80, dtype=np.float32).reshape(2, 5, 8), tolerance=0)
    assert ops(model) == {"Relu": 1}


def test_cleanup_keeps_a_reversing_slice_and_a_broadcasting_add() -> None:
    net = Net([4])
    y = net.op("Slice", "x", net.const([-1]), net.const([-9]), net.const([0]), net.const([-1]))
    model = net.model(net.op("Add", y, net.const(np.zeros((3, 1), np.float32))))
    check(model, np.arange(4, dtype=np.float32), tolerance=0)
    assert ops(model) == {"Slice": 1, "Add": 1}


# ---------------------------------------------------------------- norms, activations, weights


@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize("form", ["pow-div", "mul-reciprocal", "no-affine", "gamma-only"])
def test_layernorm_is_recognised_in_each_form(form: str, kind: type, rng: np.random.Generator) -> None:
    code = TensorProto.FLOAT if kind is np.float32 else TensorProto.FLOAT16
    net = Net(["batch", 5, 8], code)
    axes = net.const([-1])
    diff = net.op("Sub", "x", net.op("ReduceMean", "x", axes))
    square = net.op("Mul", diff, diff) if form == "mul-reciprocal" else net.op("Pow", diff, net.const(kind(2)))
    root = net.op("Sqrt", net.op("Add", net.op("ReduceMean", square, axes), net.const(kind(1e-3))))
    y = net.op("Mul", diff, net.op("Reciprocal", root)) if form == "mul-reciprocal" else net.op("Div", diff, root)
    if form != "no-affine":
        y = net.op("Mul", y, net.const(rng.standard_normal(8).astype(kind)))
    if form in ("pow-div", "mul-reciprocal"):
        y = net.op("Add", y, net.const(rng.standard_normal(8).astype(kind)))
    model = net.model(y, kind=code)
    # float16: the spelled-out form rounds after every node (2^-11 each), the operator once
    check(model, rng.standard_normal((2, 5, 8)).astype(kind), tolerance=1e-6 if kind is np.float32 else 1e-2)
    assert ops(model) == {"LayerNormalization": 1}


def test_layernorm_over_another_axis_or_with_a_shared_variance_is_left_alone(rng: np.random.Generator) -> None:
    net = Net(["batch", 5, 8])
    axes = net.const([1])
    diff = net.op("Sub", "x", net.op("ReduceMean", "x", axes))
    variance = net.op("ReduceMean", net.op("Pow", diff, net.const(np.float32(2))), axes)
    y = net.op("Div", diff, net.op("Sqrt", net.op("Add", variance, net.const(np.float32(1e-5)))))
    model = net.model(y)
    check(model, rng.standard_normal((2, 5, 8)).astype(np.float32))
    assert ops(model)["LayerNormalization"] == 0


def gelu_forms(net: Net, form: str) -> str:
    x, half, one = "x", net.const(np.float32(0.5)), net.const(np.float32(1))
    if form.startswith("erf"):
        inner = net.op("Mul", x, net.const(np.float32(2**-0.5)))
        if form == "erf-div":
            inner = net.op("Div", x, net.const(np.float32(1.4142)))
        plus = net.op("Add", one, net.op("Erf", inner))
        if form == "erf-half-first":
            return net.op("Mul", net.op("Mul", half, x), plus)
        return net.op("Mul", x, net.op("Mul", half, plus))
    cube = net.op("Mul", net.op("Mul", x, x), x) if form == "tanh-mul" else net.op("Pow", x, net.const(np.float32(3)))
    total = net.op("Add", net.op("Mul", net.const(np.float32(0.044715)), cube), x)
    tanh = net.op("Tanh", net.op("Mul", net.const(np.float32(0.7978845608)), total))
    return net.op("Mul", net.op("Mul", net.op("Add", tanh, one), x), half)


@pytest.mark.parametrize("form", ["erf", "erf-div", "erf-half-first", "tanh", "tanh-mul"])
def test_gelu_forms_become_what_onnxruntime_fuses(form: str, rng: np.random.Generator, tmp_path: Any) -> None:
    net = Net(["batch", 5, 8])
    model = net.model(net.op("Neg", gelu_forms(net, form)))
    # 1.4142 for sqrt(2) is off by 1e-5
    check(model, rng.standard_normal((2, 5, 8)).astype(np.float32), tolerance=2e-5 if form == "erf-div" else 1e-6)
    assert not clean_up(model).modified
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 4
    ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString(), options, ["CPUExecutionProvider"])
    fused = {n.op_type for n in onnx.load(tmp_path / "fused.onnx").graph.node}
    assert fused == {"Neg", "FastGelu" if form.startswith("tanh") else "Gelu"}


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_operator_of_opset_20_is_opened_and_the_graph_lowered_to_18(
    approximate: str, rng: np.random.Generator
) -> None:
    net = Net(["batch", 8], opset=20)
    model = net.model(net.op("Gelu", "x", approximate=approximate))
    report = check(model, rng.standard_normal((2, 8)).astype(np.float32))
    assert (report.opset, ops(model)["Gelu"]) == (18, 0)


def test_opset_that_cannot_be_lowered_names_the_node() -> None:
    net = Net(["batch", 8], opset=23)
    model = net.model(net.op("RMSNormalization", "x", net.const(np.ones(8, np.float32))))
    report = clean_up(model)
    assert report.opset == 23
    assert report.higher_opset == ("n_rmsnormalization0 (RMSNormalization, since opset 23)",)


@pytest.mark.parametrize("opset", [11, 13])
def test_old_opsets_are_raised(opset: int, rng: np.random.Generator) -> None:
    net = Net(["batch", 4, 8], opset=opset)
    y = net.op("Softmax", net.op("ReduceMean", "x", axes=[1], keepdims=0), axis=-1 if opset == 13 else 1)
    model = net.model(y)
    assert check(model, rng.standard_normal((2, 4, 8)).astype(np.float32)).opset == 18


def test_layer_scale_goes_into_the_weights_unless_the_layer_is_shared(rng: np.random.Generator) -> None:
    net = Net(["batch", 5, 8])
    weight = net.const(rng.standard_normal((8, 6)).astype(np.float32), "w")
    bias = net.const(rng.standard_normal(6).astype(np.float32), "b")
    gamma = net.const(rng.standard_normal(6).astype(np.float32), "gamma")
    alone = net.op("Mul", net.op("Add", net.op("MatMul", "x", weight), bias), gamma)
    shared = net.op("Add", net.op("MatMul", net.op("Neg", "x"), weight), bias)
    model = net.model(alone, net.op("Add", net.op("Mul", shared, gamma), shared))
    report = check(model, rng.standard_normal((2, 5, 8)).astype(np.float32))
    assert report.count("layerscale") == 1
    assert ops(model)["Mul"] == 1


@pytest.mark.parametrize(("op_type", "groups"), [("Conv", 1), ("Conv", 2), ("ConvTranspose", 1), ("ConvTranspose", 2)])
def test_batchnorm_goes_into_the_convolution(op_type: str, groups: int, rng: np.random.Generator) -> None:
    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    net = Net(["batch", 4, 5, 5])
    weight = net.const(draw(6, 4 // groups, 3, 3) if op_type == "Conv" else draw(4, 6 // groups, 3, 3))
    y = net.op(op_type, "x", weight, group=groups)
    numbers = [net.const(draw(6)), net.const(draw(6)), net.const(draw(6)), net.const(np.abs(draw(6)) + 0.5)]
    model = net.model(net.op("BatchNormalization", y, *numbers, epsilon=1e-3))
    check(model, draw(2, 4, 5, 5), tolerance=2e-6)
    assert ops(model) == {op_type: 1}


def test_gemm_becomes_matmul_and_add(rng: np.random.Generator) -> None:
    net = Net(["batch", 8])
    weight, bias = net.const(rng.standard_normal((6, 8)).astype(np.float32)), net.const(np.ones(6, np.float32))
    model = net.model(net.op("Gemm", "x", weight, bias, transB=1, alpha=0.5, beta=2.0))
    check(model, rng.standard_normal((2, 8)).astype(np.float32))
    assert ops(model) == {"MatMul": 1, "Add": 1}


# ---------------------------------------------------------------- attention


def attention(net: Net, mask_value: float | None, rng: np.random.Generator, guard: bool = True) -> str:
    """Two heads of 4 over [batch,5,8], scaled by sqrt on both sides; keys from 3 on are masked for even batches."""

    def heads(perm: list[int]) -> str:
        weight = net.const(rng.standard_normal((8, 8)).astype(np.float32))
        split = net.op("Reshape", net.op("MatMul", "x", weight), net.const([0, 0, 2, 4]))
        return net.op("Transpose", split, perm=perm)

    root = net.const(np.float32(0.5**0.5))
    q, k, v = net.op("Mul", heads([0, 2, 1, 3]), root), net.op("Mul", heads([0, 2, 3, 1]), root), heads([0, 2, 1, 3])
    logits = net.op("MatMul", q, k)
    if mask_value is not None:
        first = net.op("Slice", "x", net.const([0]), net.const([1]), net.const([2]))
        keep = net.op("Greater", net.op("Transpose", first, perm=[0, 2, 1]), net.const(np.float32(0)))
        wide = net.op("Unsqueeze", keep, net.const([1]))
        hidden = net.op("Where", wide, net.const(np.float32(0)), net.const(np.float32(mask_value)))
        logits = net.op("Add", logits, hidden)
    probs = net.op("Softmax", logits, axis=-1)
    if guard:
        probs = net.op("Where", net.op("IsNaN", probs), net.const(np.float32(0)), probs)
    joined = net.op("Transpose", net.op("MatMul", probs, v), perm=[0, 2, 1, 3])
    return net.op("Reshape", joined, net.const([0, 0, 8]))


def test_nan_guard_goes_when_the_mask_is_finite_and_stays_when_it_is_infinite(rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 5, 8)).astype(np.float32)
    for value, stays in ((None, 0), (-3.4028235e38, 0), (-np.inf, 1)):
        net = Net(["batch", 5, 8])
        model = net.model(attention(net, value, rng))
        check(model, x)
        assert ops(model)["IsNaN"] == stays


def test_infinite_masks_keep_rows_without_a_visible_key_at_zero(rng: np.random.Generator) -> None:
    x = -np.abs(rng.standard_normal((2, 5, 8))).astype(np.float32)
    net = Net(["batch", 5, 8])
    model = net.model(attention(net, -np.inf, rng))
    check(model, x)
    assert not run(model, x)[0].any()


def test_scales_of_both_sides_become_one_power_of_two(rng: np.random.Generator) -> None:
    net = Net(["batch", 5, 8])
    model = net.model(attention(net, None, rng))
    report = check(model, rng.standard_normal((2, 5, 8)).astype(np.float32))
    assert report.count("scale") == 1
    muls = [n for n in model.graph if n.op_type == "Mul"]
    assert [n.inputs[1].const_value.numpy().item() for n in muls] == [0.5]


# ---------------------------------------------------------------- outputs and target


def test_cut_outputs_keeps_only_what_is_needed() -> None:
    net = Net(["batch", 4])
    inner = net.op("Relu", "x")
    model = net.model(net.op("Exp", inner))
    assert cut_outputs(model, [inner]) == 1
    assert [v.name for v in model.graph.outputs] == [inner]
    with pytest.raises(InputError, match="no tensor 'relu9'") as caught:
        cut_outputs(model, ["relu9"])
    assert "relu0" in str(caught.value.next)


def quantized_linear(net: Net, x: str, rng: np.random.Generator) -> str:
    codes = net.const(rng.integers(-127, 128, (8, 8)).astype(np.int8))
    weight = net.op("DequantizeLinear", codes, net.const(np.full(8, 0.01, np.float32)), axis=1)
    scale, zero = net.const(np.float32(0.02)), net.const(np.uint8(128))
    act = net.op("DequantizeLinear", net.op("QuantizeLinear", x, scale, zero), scale, zero)
    bias = net.const(rng.standard_normal((1, 1, 8)).astype(np.float32))
    return net.op("Add", net.op("MatMul", act, weight), bias)


def test_finish_makes_quantized_linears_run_as_qgemm(rng: np.random.Generator, tmp_path: Any) -> None:
    net = Net(["batch", 5, 8])
    first = quantized_linear(net, "x", rng)
    model = net.model(net.op("Add", quantized_linear(net, net.op("Relu", first), rng), first))
    x = rng.standard_normal((2, 5, 8)).astype(np.float32)
    before = run(model, x)[0]
    assert finish(model).rows == 2
    # a step of the bias is 2e-4; the second layer's input steps by 0.02 and weighs up to 1.27 over 8 channels
    np.testing.assert_allclose(before, run(model, x)[0], atol=0.05)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "o.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString(), options, ["CPUExecutionProvider"])
    assert collections.Counter(n.op_type for n in onnx.load(tmp_path / "o.onnx").graph.node)["QGemm"] == 2


def test_finish_leaves_a_graph_without_token_layers_as_it_is(rng: np.random.Generator) -> None:
    net = Net(["batch", 8])
    model = net.model(net.op("MatMul", "x", net.const(rng.standard_normal((8, 4)).astype(np.float32))))
    report = finish(model)
    assert (report.rows, report.notes) == (0, ())
    assert ops(model) == {"MatMul": 1}


def test_finish_refuses_an_invalid_graph() -> None:
    net = Net([2, 3])
    model = net.model(net.op("MatMul", "x", net.const(np.ones((4, 4), np.float32))))
    with pytest.raises(InternalError, match="not valid ONNX"):
        finish(model)
