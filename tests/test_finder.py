"""The block finder over small exports of fifteen architectures: what each must be read as, what must be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from edgetok.converters.graph.blocks import Block, Finding
from edgetok.converters.graph.find import find_blocks
from edgetok.converters.graph.roles import regroup

EXPORTS = Path(__file__).parent / "fixtures" / "exports"
INDEX: list[dict[str, Any]] = json.loads((EXPORTS / "index.json").read_text())
OPEN = [row for row in INDEX if row["blocks"]]


def ids(row: dict[str, Any]) -> str:
    return str(row["file"]).removesuffix(".onnx")


def finding(row: dict[str, Any]) -> Finding:
    return find_blocks(ir.load(EXPORTS / row["file"]))


@pytest.mark.parametrize("row", INDEX, ids=ids)
def test_finder_counts_blocks_and_names_refusals(row: dict[str, Any]) -> None:
    found = finding(row)
    assert len(found.blocks) == row["blocks"], [r.sentence for r in found.refused]
    assert [r.reason for r in found.refused] == row["refused"]
    assert [b.index for b in found.blocks] == list(range(row["blocks"]))
    assert all(r.name in r.sentence and len(r.sentence) > 30 for r in found.refused)


@pytest.mark.parametrize("row", OPEN, ids=ids)
def test_finder_reads_heads_widths_scale_and_masks(row: dict[str, Any]) -> None:
    for block in finding(row).blocks:
        assert (block.heads, block.head_dim, block.v_dim, block.width) == (
            row["heads"],
            row["head_dim"],
            row["head_dim"],
            row["width"],
        )
        assert block.scale == pytest.approx(row["scale"], abs=1e-6)
        assert (block.norm, block.mask_kind, block.packed) == (row["norm"], row["mask_kind"], row["packed"])
        assert sorted(block.hazards) == sorted(row["hazards"])


@pytest.mark.parametrize("row", OPEN, ids=ids)
def test_finder_reads_the_layout_of_the_stream(row: dict[str, Any]) -> None:
    found = finding(row)
    tokens = None if row["batch"] == "dynseq" else row["tokens"]
    assert (found.family, found.leading, found.tokens) == (row["family"], row["leading"], tokens)
    assert found.grid == (tuple(row["grid"]) if row["grid"] else None)
    for before, after in zip(found.blocks, found.blocks[1:], strict=False):
        assert before.x_out is after.x_in


@pytest.mark.parametrize("row", OPEN, ids=ids)
def test_insertion_point_feeds_the_mlp_and_the_second_residual(row: dict[str, Any]) -> None:
    """Everything a block computes after the attention passes through x_attn: cutting there changes the token count."""
    for block in finding(row).blocks:
        if block.x_out is None:
            assert row["file"] == "vit_timm_ort_extended.onnx", "only a fused final Add+LayerNorm hides the sum"
            continue
        reached = {block.x_attn}
        blocked = {block.x_in, block.context}
        stack = [block.x_out]
        sources: set[ir.Value] = set()
        seen: set[ir.Value] = set()
        while stack:
            value = stack.pop()
            if value in seen or value in reached:
                continue
            seen.add(value)
            assert value not in blocked, f"{value.name} reaches x_out around {block.x_attn.name}"
            node = value.producer()
            if node is None:
                sources.add(value)
                continue
            sums = [block.x_attn] if block.x_attn in node.outputs else []
            stack += [v for v in node.inputs if v is not None and not sums]


def to_bhnd(array: np.ndarray, layout: str, heads: int) -> np.ndarray:
    """Bring a q, k or v as found to [B,H,N,D]."""
    if layout == "BNC":
        array = array.reshape(*array.shape[:2], heads, -1)
        layout = "BNHD"
    return array.transpose([layout.index(letter) for letter in "BHND"])


def run_with(path: Path, names: list[str], feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a graph and also return inner values."""
    ort = pytest.importorskip("onnxruntime")
    model = onnx.load(path)
    have = {o.name for o in model.graph.output}
    model.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in dict.fromkeys(names) if n not in have)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, feeds), strict=True))


def rebuilt(block: Block, values: dict[str, np.ndarray]) -> np.ndarray:
    """softmax(q k^T scale + mask) v as [B,N,H*Dv], in float64."""
    assert block.q is not None
    assert block.k is not None
    assert block.v is not None
    q, k, v = (
        to_bhnd(values[str(x.name)].astype(np.float64), layout, block.heads)
        for x, layout in ((block.q, block.q_layout), (block.k, block.k_layout), (block.v, block.v_layout))
    )
    logits = q @ k.swapaxes(-1, -2) * block.scale
    if block.mask is not None:
        mask = values[str(block.mask.name)]
        if mask.dtype == bool:
            logits = np.where(mask if block.mask_keeps else ~mask, logits, -1e30)
        else:
            logits = logits + mask
    elif block.mask_kind == "causal":  # the attribute of a fused node
        logits = np.where(np.tril(np.ones(logits.shape[-2:], bool)), logits, -1e30)
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    context = probs / probs.sum(-1, keepdims=True) @ v
    return context.swapaxes(1, 2).reshape(*context.shape[:1], context.shape[2], -1)


REBUILT = [
    row for row in OPEN if row["family"] != "t5" and not row["file"].endswith(("ort_attention.onnx", "ort_mha.onnx"))
]


@pytest.mark.parametrize("row", REBUILT, ids=ids)
def test_attention_rebuilt_from_the_record_equals_the_graphs(row: dict[str, Any]) -> None:
    """Not for T5 (its bias is a hazard, not part of the record) nor for nodes that hold the projections themselves."""
    path = EXPORTS / row["file"]
    blocks = find_blocks(ir.load(path)).blocks
    names = [str(v.name) for b in blocks for v in (b.q, b.k, b.v, b.mask, b.context) if v is not None]
    data = np.load(EXPORTS / row["golden"])
    wanted = {i.name for i in onnx.load(path).graph.input}
    feeds = {k[3:]: data[k] for k in data.files if k.startswith("in.") and k[3:] in wanted}
    values = run_with(path, names, feeds)
    for block in blocks:
        context = values[str(block.context.name)]
        if context.ndim == 4:
            context = context.reshape(*context.shape[:2], -1)
        got = rebuilt(block, values)
        # 1e-5 of the values' size for float32 sums; quantize-dequantize pairs on the probabilities round to 1/255
        tolerance = (3e-2 if "qdq" in row["file"] else 1e-5) * max(1.0, float(np.abs(context).max()))
        np.testing.assert_allclose(context, got.reshape(context.shape), atol=tolerance, rtol=0)


@pytest.mark.parametrize("row", INDEX, ids=ids)
def test_finder_leaves_the_model_as_it_was(row: dict[str, Any]) -> None:
    model = ir.load(EXPORTS / row["file"])
    before = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    find_blocks(model)
    assert ir.serde.serialize_model(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("row", INDEX[::4], ids=ids)
def test_finder_says_the_same_twice(row: dict[str, Any]) -> None:
    def told(found: Finding) -> list[object]:
        def plain(value: object) -> object:
            return value.name if isinstance(value, ir.Value | ir.Node) else value

        return [[plain(v) for v in vars(b).values()] for b in found.blocks] + [r.sentence for r in found.refused]

    assert told(finding(row)) == told(finding(row))


@pytest.mark.parametrize("row", [r for r in OPEN if r["exporter"] not in ("ort", "int8")], ids=ids)
def test_finder_reads_cleaned_graphs_alike(row: dict[str, Any]) -> None:
    cleanup = pytest.importorskip("edgetok.converters.graph.cleanup")
    model = ir.load(EXPORTS / row["file"])
    cleanup.clean_up(model)
    found = find_blocks(model)
    assert [(b.heads, b.head_dim, b.width, b.norm) for b in found.blocks] == [
        (row["heads"], row["head_dim"], row["width"], row["norm"])
    ] * row["blocks"]
    assert (found.leading, found.grid) == (row["leading"], tuple(row["grid"]) if row["grid"] else None)
    assert all(sorted(b.hazards) == sorted(row["hazards"]) for b in found.blocks)


def graph(
    nodes: list[onnx.NodeProto], inputs: dict[str, list[Any]], outputs: list[str], **weights: np.ndarray
) -> ir.Model:
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_empty_tensor_value_info(n) for n in outputs],
        [onnx.numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    return ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


def weight(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_a_classifier_without_attention_has_no_blocks() -> None:
    node = helper.make_node
    model = graph(
        [node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"], ["r"]), node("Softmax", ["r"], ["y"], axis=-1)],
        {"x": ["batch", 8]},
        ["y"],
        w=weight(8, 4),
    )
    found = find_blocks(model)
    assert (found.blocks, found.refused, found.family, found.tokens) == ((), (), "unknown", None)


def test_expert_routing_is_not_attention() -> None:
    node = helper.make_node
    model = graph(
        [
            node("MatMul", ["x", "route"], ["scores"]),
            node("Softmax", ["scores"], ["gate"], axis=-1),
            node("MatMul", ["gate", "experts"], ["y"]),
        ],
        {"x": [1, 7, 8]},
        ["y"],
        route=weight(8, 4),
        experts=weight(4, 8),
    )
    assert find_blocks(model).blocks == ()


def test_an_empty_graph_and_unknown_operators_are_survived() -> None:
    assert find_blocks(graph([], {"x": ["a"]}, ["x"])).blocks == ()
    odd = graph([helper.make_node("Mystery", ["x"], ["y"], domain="org.nowhere")], {"x": [None, None]}, ["y"])
    assert find_blocks(odd).blocks == ()


def attention_nodes(kv: str, scale: str = "s") -> list[onnx.NodeProto]:
    """One pre-LN block with a residual; keys and values from `kv`."""
    node = helper.make_node
    split = [
        node("MatMul", ["n", "wq"], ["q0"]), node("MatMul", [kv, "wk"], ["k0"]), node("MatMul", [kv, "wv"], ["v0"]),
        *[node("Reshape", [f"{x}0", "heads"], [f"{x}1"]) for x in "qkv"],
        node("Transpose", ["q1"], ["q"], perm=[0, 2, 1, 3]), node("Transpose", ["k1"], ["kt"], perm=[0, 2, 3, 1]),
        node("Transpose", ["v1"], ["v"], perm=[0, 2, 1, 3]),
    ]  # fmt: skip
    return [
        node("LayerNormalization", ["x", "g", "b"], ["n"]), *split,
        node("MatMul", ["q", "kt"], ["l0"]), node("Div", ["l0", scale], ["l"]), node("Softmax", ["l"], ["p"], axis=-1),
        node("MatMul", ["p", "v"], ["o"]), node("Transpose", ["o"], ["ot"], perm=[0, 2, 1, 3]),
        node("Reshape", ["ot", "merge"], ["c"]), node("MatMul", ["c", "wo"], ["a"]), node("Add", ["x", "a"], ["y"]),
    ]  # fmt: skip


WEIGHTS = {
    "wq": weight(8, 8), "wk": weight(8, 8), "wv": weight(8, 8), "wo": weight(8, 8), "g": weight(8), "b": weight(8),
    "heads": np.array([0, 0, 2, 4]), "merge": np.array([0, 0, 8]), "s": np.array(2.0, np.float32),
}  # fmt: skip


def test_cross_attention_is_refused_in_words() -> None:
    found = find_blocks(graph(attention_nodes("other"), {"x": [1, 7, 8], "other": [1, 9, 8]}, ["y"], **WEIGHTS))
    assert found.blocks == ()
    assert [r.reason for r in found.refused] == ["cross"]
    assert "cross-attention" in found.refused[0].sentence


def test_division_by_the_scale_is_read() -> None:
    block = find_blocks(graph(attention_nodes("n"), {"x": ["b", "t", 8]}, ["y"], **WEIGHTS)).blocks[0]
    assert block.scale == pytest.approx(0.5)
    assert (block.tokens, block.x_out, block.norm) == (None, None, "pre")
    assert block.k is not None
    assert (block.k.name, block.k_layout) == ("k1", "BNHD")


def test_a_second_stream_of_another_length_is_refused() -> None:
    first = attention_nodes("n")
    node = helper.make_node
    again = [helper.make_node("Slice", ["y", "from", "to", "axis"], ["x_2"])]
    keep = {*WEIGHTS, "from", "to", "axis"}
    for original in attention_nodes("n"):
        copy = onnx.NodeProto()
        copy.CopyFrom(original)
        copy.input[:] = [i if i in keep else f"{i}_2" for i in original.input]
        copy.output[:] = [f"{o}_2" for o in original.output]
        again.append(copy)
    third = [onnx.NodeProto.FromString(n.SerializeToString()) for n in first]
    for n in third:
        n.input[:] = [i if i in keep else ("y" if i == "x" else f"{i}_3") for i in n.input]
        n.output[:] = [f"{o}_3" for o in n.output]
    ends = {"from": np.array([0]), "to": np.array([3]), "axis": np.array([1])}
    tail = [node("Identity", ["y_2"], ["z"])]
    found = find_blocks(graph(first + again + third + tail, {"x": [1, 7, 8]}, ["z", "y_3"], **WEIGHTS, **ends))
    assert (len(found.blocks), [r.reason for r in found.refused]) == (2, ["other-stream"])


@pytest.mark.parametrize(
    ("before", "after", "letters", "expected"),
    [
        ((2, 7, 24), (2, 7, 3, 8), "BNHD", "BNC"),
        ((2, 3, 7, 8), (6, 7, 8), "XND", "BHND"),
        ((1, 3, 7, 8), (3, 7, 8), "XND", "BHND"),
        ((14, 24), (2, 7, 24), "BNC", "MC"),
        ((2, 7, 72), (2, 7, 3, 3, 8), "BNTHD", "BNP"),
        ((2, 7, 24), (7, 2, 24), "NBC", "??C"),
    ],
)
def test_regroup_names_axes_through_reshapes(before: tuple, after: tuple, letters: str, expected: str) -> None:
    assert regroup(before, after, letters) == expected


@pytest.mark.model
def test_the_public_vit_has_twelve_blocks(public_model: Any) -> None:
    found = find_blocks(ir.load(public_model("vit-s-focus")))
    assert (len(found.blocks), found.family, found.leading, found.grid, found.tokens) == (12, "vit", 1, (16, 16), 257)
    assert {(b.heads, b.head_dim, b.width, b.norm) for b in found.blocks} == {(6, 64, 384, "pre")}
    assert all(b.scale == pytest.approx(0.125, abs=1e-6) and not b.hazards for b in found.blocks)
