"""Shapes and small values followed without running equal what onnxruntime computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from edgetok.converters.graph.trace import MAX_ELEMENTS, input_sizes, trace

EXPORTS = Path(__file__).parent / "fixtures" / "exports"
INDEX: list[dict[str, Any]] = json.loads((EXPORTS / "index.json").read_text())


def run_all(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every value of a graph, from onnxruntime without optimizations."""
    ort = pytest.importorskip("onnxruntime")
    model = onnx.load(path)
    have = {o.name for o in model.graph.output}
    names = [o for n in model.graph.node for o in n.output if o and o not in have]
    model.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in names)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names += sorted(have)
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.mark.parametrize("row", INDEX, ids=lambda row: str(row["file"]).removesuffix(".onnx"))
def test_trace_predicts_shapes_and_small_values(row: dict[str, Any]) -> None:
    path = EXPORTS / row["file"]
    model = ir.load(path)
    data = np.load(EXPORTS / row["golden"])
    feeds = {str(v.name): data[f"in.{v.name}"] for v in model.graph.inputs}
    seen = trace(model, {name: array.shape for name, array in feeds.items()})
    real = run_all(path, feeds)
    for node in model.graph:
        for value in node.outputs:
            if value.name not in real:
                continue
            assert seen.shape(value) == real[value.name].shape, value.name
            if value in seen.data:
                assert value not in seen.varies
                np.testing.assert_allclose(seen.data[value], real[value.name], rtol=1e-6, atol=1e-7, err_msg=value.name)


def test_values_that_follow_the_input_are_marked() -> None:
    model = ir.load(EXPORTS / "bert_ts14_eager_dynamic.onnx")
    seen = trace(model)
    outputs = model.graph.outputs
    assert all(v in seen.varies for v in outputs)
    assert all(seen.constant(v) for v in model.graph.initializers.values())
    shapes = [n.outputs[0] for n in model.graph if n.op_type == "Shape"]
    assert shapes
    assert all(seen.constant(v) and v in seen.data for v in shapes), "a shape is known without knowing contents"


def test_feeding_a_mask_computes_what_becomes_of_it() -> None:
    model = ir.load(EXPORTS / "bert_dynamo18_sdpa_dynamic.onnx")
    sizes = input_sizes(model)
    mask = np.ones(sizes["attention_mask"], np.int64)
    mask[:, -2:] = 0
    seen = trace(model, sizes, {"attention_mask": mask})
    float_masks = [a for v, a in seen.data.items() if v in seen.varies and a.dtype == np.float32 and a.ndim == 4]
    assert any(bool((a[..., -2:] < -1e3).all() and (a[..., :-2] == 0).all()) for a in float_masks)


@pytest.mark.parametrize("batch", [1, 3])
def test_input_sizes_fill_open_axes_only(batch: int) -> None:
    model = ir.load(EXPORTS / "bert_dynamo18_sdpa_dynseq.onnx")
    assert set(input_sizes(model, batch=batch, sequence=5).values()) == {(batch, 5)}
    assert set(input_sizes(model, dims={"batch": 9, "sequence": 4}).values()) == {(9, 4)}
    static = ir.load(EXPORTS / "vit_timm_ts17_eager_static.onnx")
    assert input_sizes(static, batch=batch) == {"image": (1, 3, 32, 32)}


def test_a_small_file_that_asks_for_huge_arrays_is_not_computed() -> None:
    node = helper.make_node
    nodes = [
        node("ConstantOfShape", ["far"], ["c"]),
        node("Expand", ["one", "far"], ["e"]),
        node("Add", ["e", "one"], ["a"]),
        node("Tile", ["one", "far"], ["t"]),
        node("Pad", ["one", "pads"], ["p"]),
        node("Range", ["zero", "end", "step"], ["r"]),
        node("Gather", ["row", "many"], ["g"]),
    ]
    weights = {
        "far": np.array([1 << 20, 1 << 20]),
        "one": np.ones((1, 1), np.float32),
        "pads": np.array([0, 0, 1 << 20, 1 << 20]),
        "zero": np.array(0),
        "end": np.array(1 << 40),
        "step": np.array(1),
        "row": np.ones((1, 1 << 12), np.float32),
        "many": np.zeros((1 << 10,), np.int64),
    }
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_empty_tensor_value_info(n.output[0]) for n in nodes],
        [onnx.numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))
    seen = trace(model)
    assert not any(v in seen.data for n in model.graph for v in n.outputs)
    assert all(a.size <= MAX_ELEMENTS for a in seen.data.values())
