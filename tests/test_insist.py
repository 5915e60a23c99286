"""Reducing in spite of a hazard: operands laid out by source place follow the tokens that are kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto as T
from onnx import helper

from edgetok.converters.graph.cleanup import clean_up
from edgetok.converters.graph.find import find_blocks
from edgetok.converters.reduce._builder import Builder
from edgetok.converters.reduce._insist import follow_places
from edgetok.converters.reduce._tail import Stream
from edgetok.converters.reduce.apply import reduce_model
from edgetok.converters.reduce.spec import parse_reduce
from edgetok.errors import UnsupportedError

EXPORTS = Path(__file__).parent / "fixtures" / "exports"


def placed(shape: list[int], stream_shape: list[int | str]) -> tuple[ir.Model, Stream]:
    """x + table, x on the stream behind one reduction."""
    nodes = [helper.make_node("Add", ["x", "table"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "placed",
        [
            helper.make_tensor_value_info("x", T.FLOAT, stream_shape),
            helper.make_tensor_value_info("table", T.FLOAT, shape),
            helper.make_tensor_value_info("kept", T.INT64, ["batch", 3]),
        ],
        [helper.make_tensor_value_info("y", T.FLOAT, None)],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))
    add = model.graph[0]
    return model, Stream({add}, segments={model.graph.inputs[0]: 1, add.outputs[0]: 1})


@pytest.mark.parametrize(
    ("shape", "x_shape", "pick"),
    [
        ([1, 1, 5, 5], ["batch", 2, 3, 3], lambda t, k: t[0, 0][np.ix_(k, k)]),  # a causal mask
        ([1, 2, 5, 5], ["batch", 2, 3, 3], lambda t, k: t[0][:, k][:, :, k]),  # a bias per head
        ([1, 1, 5, 4], ["batch", 2, 3, 4], lambda t, k: t[0, 0][k]),  # a rotary table
        ([1, 5, 1, 4], ["batch", 3, 2, 4], lambda t, k: t[0][k]),  # the same, tokens before heads
        ([5, 4], ["batch", 3, 4], lambda t, k: t[k]),
    ],
)
def test_a_table_by_place_is_read_at_the_kept_rows(shape, x_shape, pick) -> None:  # type: ignore[no-untyped-def]
    model, stream = placed(shape, x_shape)
    builder = Builder(model, "batch")
    kept = model.graph.inputs[2]
    assert follow_places(builder, stream, [None, kept], 5) == 1
    builder.finish()
    rng = np.random.default_rng(0)
    x = rng.standard_normal([2 if d == "batch" else d for d in x_shape]).astype(np.float32)
    table = rng.standard_normal(shape).astype(np.float32)
    rows = np.array([[0, 2, 3], [1, 3, 4]])
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    found = session.run(None, {"x": x, "table": table, "kept": rows})[0]
    for i in range(2):
        np.testing.assert_array_equal(found[i], x[i] + pick(table, rows[i]))


def test_a_soft_assignment_has_no_place() -> None:
    model, stream = placed([1, 1, 5, 5], ["batch", 2, 3, 3])
    with pytest.raises(UnsupportedError, match="no single place"):
        follow_places(Builder(model, "batch"), stream, [None, None], 5)


@pytest.mark.parametrize("name", ["clip_text_dynamo18_sdpa_dynamic", "t5_encoder_ts17_eager_dynamic"])
def test_insisting_reduces_a_causal_or_biased_graph(name: str) -> None:
    model = ir.load(EXPORTS / f"{name}.onnx")
    clean_up(model)
    spec = parse_reduce("tome:r=1")
    with pytest.raises(UnsupportedError):
        reduce_model(model.clone(), find_blocks(model), spec)
    whole = ir.to_proto(model).SerializeToString()
    assert spec.settings is not None
    spec = replace(spec, settings=replace(spec.settings, insist=True))
    reduce_model(model, find_blocks(model), spec)
    with np.load(EXPORTS / f"{name.split('_ts')[0].split('_dynamo')[0]}.npz") as file:
        feeds = {v.name: file[f"in.{v.name}"] for v in model.graph.inputs}
    before, after = (
        ort.InferenceSession(data).run(None, feeds)[0] for data in (whole, ir.to_proto(model).SerializeToString())
    )
    assert after.shape == before.shape
    # One of 16 tokens is merged in each of two layers: most of the answer must be left.
    assert np.sum(before * after) / np.linalg.norm(before) / np.linalg.norm(after) > 0.9
