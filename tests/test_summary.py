"""The cost model against the specification's integers, and the summary of a graph that is never executed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from edgetok.converters.graph.cost import macs, matching_macs, network_macs, node_macs
from edgetok.converters.graph.find import find_blocks
from edgetok.converters.graph.summary import Summary, summarize

EXPORTS = Path(__file__).parent / "fixtures" / "exports"
INDEX: list[dict[str, Any]] = json.loads((EXPORTS / "index.json").read_text())


def summary(file: str, **settings: Any) -> Summary:
    model = ir.load(EXPORTS / file)
    return summarize(model, find_blocks(model), **settings)


@pytest.mark.parametrize(
    ("width", "layers", "tokens", "r", "expected", "left"),
    [
        (384, 12, 197, 0, 4540695552, 197),
        (384, 12, 197, 8, 3358270464, 101),
        (384, 12, 197, 13, 2644514304, 41),
        (384, 12, 197, 16, 2225587200, 5),
        (1024, 24, 577, 0, 190612291584, 577),
        (1024, 24, 577, 23, 95787229184, 25),
    ],
)
def test_macs_equal_the_specifications_integers(
    width: int, layers: int, tokens: int, r: int, expected: int, left: int
) -> None:
    per_layer = [tokens - r * (i + 1) for i in range(layers)]
    assert (network_macs(per_layer, tokens, width), per_layer[-1]) == (expected, left)


def test_macs_count_attention_and_mlp_tokens_apart() -> None:
    assert macs(10, 4, 8) - macs(10, 0, 8) == 8 * 4 * 64
    assert macs(10, 4, 8, mlp_ratio=0) == 4 * 10 * 64 + 2 * 100 * 8
    assert matching_macs(197, 64, 384) == 99 * 98 * 64 + 2 * 197 * 384


def test_node_macs_know_products_and_pass_over_the_rest() -> None:
    def count(op: str, inputs: list[Any], output: Any, **attributes: Any) -> int | None:
        attrs = [ir.AttrInt64(k, v) for k, v in attributes.items()]
        return node_macs(ir.node(op, [], {a.name: a.as_int() for a in attrs}), inputs, output)

    assert count("MatMul", [(2, 3, 7, 8), (2, 3, 8, 5)], (2, 3, 7, 5)) == 2 * 3 * 7 * 5 * 8
    assert count("Gemm", [(8, 7), (8, 5)], (7, 5), transA=1) == 7 * 5 * 8
    assert count("Conv", [(1, 3, 32, 32), (24, 3, 8, 8)], (1, 24, 4, 4)) == 24 * 16 * 3 * 64
    assert count("Conv", [(1, 8, 9, 9), (8, 1, 3, 3)], (1, 8, 7, 7), group=8) == 8 * 49 * 9
    assert count("ConvTranspose", [(1, 8, 4, 4), (8, 3, 2, 2)], (1, 3, 8, 8)) == 128 * 3 * 4
    assert count("Add", [(2, 3)], (2, 3)) == 0
    assert count("MatMul", [None, (8, 5)], (7, 5)) is None


@pytest.mark.parametrize(
    ("file", "stem", "head"),
    [
        ("vit_timm_ts17_eager_static.onnx", 16 * 3 * 64 * 24, 240),
        ("vit_timm_dynamo23_sdpa_dynamic.onnx", 16 * 3 * 64 * 24, 240),
        ("bert_ts14_eager_dynamic.onnx", 0, 24 * 24),
        ("bert_ort_attention.onnx", 0, 24 * 24),
        ("bert_int8_dynamic.onnx", 0, 24 * 24),
        ("vit_hf_int8_qdq.onnx", 16 * 3 * 64 * 24, 240),
    ],
)
def test_total_is_stem_plus_blocks_plus_head(file: str, stem: int, head: int) -> None:
    """Two independent counts agree: operators from their shapes, blocks from the cost model."""
    got = summary(file)
    assert got.macs == got.macs_blocks + stem + head
    assert got.uncounted == 0


@pytest.mark.parametrize("row", INDEX, ids=lambda row: str(row["file"]))
def test_every_export_is_summarized(row: dict[str, Any]) -> None:
    got = summary(row["file"])
    assert len(got.blocks) == row["blocks"]
    assert got.tokens_per_layer == tuple(block.tokens for block in got.blocks)
    if row["blocks"] and row["batch"] != "dynseq":
        assert set(got.tokens_per_layer) == {row["tokens"]}
    assert sum(got.op_counts.values()) == got.nodes
    assert got.weight_bytes == sum(got.bytes_by_type.values())
    assert json.loads(json.dumps(got.to_json()))["family"] == row["family"]
    assert all(block.mlp_ratio in (2.0, 3.0) for block in got.blocks if block.mlp_ratio is not None)
    for method in got.methods:
        assert method.applies or method.reason
        assert not (method.applies and row["hazards"]), "hazards are refused unless insisted on"


def test_hazards_are_told_in_sentences() -> None:
    got = summary("llama_dynamo18_sdpa_dynamic.onnx")
    assert any(s.startswith("causal:") for s in got.hazards)
    assert any(s.startswith("rope:") for s in got.hazards)
    assert all(not m.applies and "insist" in m.reason for m in got.methods)


def test_methods_say_what_stands_in_their_way() -> None:
    by_name = {m.name: m for m in summary("bert_dynamo18_eager_static.onnx").methods}
    assert {"tome", "tomesd", "pitome", "zero_tprune", "token_transforming", "expedit"} <= set(by_name)
    assert by_name["tome"].applies
    assert "grid" in by_name["expedit"].reason
    assert "--outputs reduced" in by_name["zero_tprune"].reason
    assert {m.name: m.applies for m in summary("vit_timm_dynamo18_eager_dynamic.onnx").methods}["zero_tprune"]
    assert "--shape" in {m.name: m for m in summary("bert_ts17_sdpa_dynseq.onnx").methods}["tome"].reason


def test_gain_grows_with_the_share_removed() -> None:
    model = ir.load(EXPORTS / "vit_timm_dynamo18_eager_dynamic.onnx")
    found = find_blocks(model)
    rows = [{m.name: m for m in summarize(model, found, removed=r).methods}["tome"] for r in (0.1, 0.3)]
    assert 1 < rows[0].speedup < rows[1].speedup
    assert rows[1].macs_ratio < rows[0].macs_ratio < 1


def test_open_axes_are_assumed_and_can_be_given() -> None:
    model = ir.load(EXPORTS / "bert_dynamo18_sdpa_dynseq.onnx")
    found = find_blocks(model)
    got = summarize(model, found, shapes=dict.fromkeys(("input_ids", "attention_mask"), (1, 12)))
    assert got.tokens_per_layer == (12, 12)
    assert got.assumed == ("batch=1", "sequence=12")
    assert got.macs_blocks == 2 * macs(12, 12, 24, 2)


def test_summary_leaves_the_model_as_it_was() -> None:
    model = ir.load(EXPORTS / "vit_hf_ts17_sdpa_dynamic.onnx")
    before = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    summarize(model, find_blocks(model))
    assert ir.serde.serialize_model(model).SerializeToString(deterministic=True) == before


def made(nodes: list[onnx.NodeProto], shape: list[Any], **weights: np.ndarray) -> ir.Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_empty_tensor_value_info("y")],
        [onnx.numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


def test_a_graph_without_attention_is_summarized() -> None:
    node = helper.make_node
    model = made([node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"], ["y"])], ["n", 8], w=np.ones((8, 4), "f4"))
    got = summarize(model, find_blocks(model))
    assert (got.blocks, got.macs, got.parameters, got.weight_bytes) == ((), 32, 32, 128)
    assert got.op_counts == {"MatMul": 1, "Relu": 1}
    assert all(not m.applies and "no attention block" in m.reason for m in got.methods)


def test_unknown_operators_and_branches_are_counted_not_opened() -> None:
    def branch(name: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        nodes = [
            helper.make_node("MatMul", ["x", "x"], [f"{name}l"]),
            helper.make_node("Softmax", [f"{name}l"], [f"{name}p"]),
            helper.make_node("MatMul", [f"{name}p", "x"], [name]),
        ]
        return helper.make_graph(nodes, name, [], [out])

    model = made(
        [
            helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
            helper.make_node("Cast", ["s"], ["c"], to=TensorProto.BOOL),
            helper.make_node("If", ["c"], ["i"], then_branch=branch("a"), else_branch=branch("b")),
            helper.make_node("Odd", ["i"], ["o"], domain="org.nowhere"),
            helper.make_node("MatMul", ["o", "o"], ["y"]),
        ],
        ["n", "m"],
    )
    found = find_blocks(model)
    got = summarize(model, found)
    assert got.op_counts["org.nowhere::Odd"] == 1
    assert got.op_counts["Softmax"] == 2
    assert got.uncounted == 1  # the products inside the branches are not counted at all
    assert [r.reason for r in found.refused] == ["function", "function"]
