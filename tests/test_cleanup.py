"""Clean-up on the exports of both PyTorch exporters: same answers, one form, nothing left to compute from sizes."""

from __future__ import annotations

import collections
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from edgetok.converters.graph.cleanup import CleanupReport, clean_up
from edgetok.converters.graph.find import find_blocks
from edgetok.converters.graph.match import constant
from edgetok.converters.targets.onnx import finish

EXPORTS = Path(__file__).parent / "fixtures" / "exports"
INDEX: list[dict[str, Any]] = json.loads((EXPORTS / "index.json").read_text())
QUANTIZED = {"bert_int8_dynamic.onnx", "vit_hf_int8_qdq.onnx"}
SHAPE_WORK = {"Shape", "Size", "Range", "ConstantOfShape", "If", "Loop", "Identity", "Constant", "Dropout", "Resize"}
LAYER_NORMS = {
    "bart": 9, "bert": 5, "clip_text": 5, "clip_vision": 6, "deit_distilled": 5, "dinov2": 5, "dinov2_registers": 5,
    "distilbert": 5, "llama": 0, "roberta": 5, "siglip": 6, "swin": 6, "t5_encoder": 0, "torch_encoder": 4,
    "vit_hf": 5, "vit_timm": 5, "whisper_encoder": 5,
}  # fmt: skip
ERF_GELUS = dict.fromkeys(LAYER_NORMS, 2) | {
    "bart": 3, "clip_text": 0, "clip_vision": 0, "llama": 0, "siglip": 0, "t5_encoder": 0, "whisper_encoder": 4,
}  # fmt: skip
# Two to three layers of float32 sums in another order: a few times 1e-7 relative; an INT8 step may flip, but none does.
TOLERANCE = 5e-6


def ids(row: dict[str, Any]) -> str:
    return str(row["file"]).removesuffix(".onnx")


every = pytest.mark.parametrize("row", INDEX, ids=ids)


def golden_inputs(row: dict[str, Any]) -> dict[str, np.ndarray]:
    with np.load(EXPORTS / row["golden"]) as data:
        return {k[3:]: data[k] for k in data.files if k.startswith("in.")}


def session(model: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def to_bytes(model: ir.Model) -> bytes:
    return ir.serde.serialize_model(model).SerializeToString(deterministic=True)


def shapes_for(model: ir.Model, row: dict[str, Any]) -> dict[str, list[int | str]]:
    """The sizes of the golden inputs, the batch left open where the graph leaves it open."""
    found = {}
    golden = golden_inputs(row)
    for value in model.graph.inputs:
        sizes: list[int | str] = [int(s) for s in golden[value.name or ""].shape]
        if value.shape is not None and not isinstance(value.shape[0], int):
            sizes[0] = "batch"
        found[value.name or ""] = sizes
    return found


def run_cleanup(row: dict[str, Any]) -> tuple[bytes, CleanupReport]:
    model = ir.load(EXPORTS / row["file"])
    report = clean_up(model, shapes_for(model, row))
    return to_bytes(model), report


@functools.cache
def cached(index: int) -> tuple[bytes, CleanupReport]:
    return run_cleanup(INDEX[index])


def cleaned(row: dict[str, Any]) -> tuple[ir.Model, CleanupReport]:
    """A fresh copy of the cleaned graph and the report; the clean-up itself runs once per fixture."""
    data, report = cached(INDEX.index(row))
    return ir.serde.deserialize_model(onnx.ModelProto.FromString(data)), report


def count(model: ir.Model) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in model.graph)


def open_batch(running: ort.InferenceSession) -> bool:
    return all(not isinstance(value.shape[0], int) for value in running.get_inputs())


def assert_same(a: list[np.ndarray], b: list[np.ndarray], tolerance: float = TOLERANCE) -> None:
    for left, right in zip(a, b, strict=True):
        assert left.shape == right.shape
        scale = max(1e-6, float(np.abs(left).max()))
        assert float(np.abs(left.astype(np.float64) - right).max()) <= tolerance * scale


def two_sentences(feeds: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A second sample beside each: other pixels or tokens, and a mask with another length."""
    out = {}
    for name, array in feeds.items():
        if "mask" in name:
            other = np.ones_like(array)
            other[:, array.shape[1] // 2 :] = 0
        elif array.dtype.kind == "f":
            other = rng.standard_normal(array.shape).astype(array.dtype)
        else:
            other = rng.permuted(array, axis=-1)
        out[name] = np.concatenate([array, other])
    return out


@every
def test_cleanup_keeps_the_answers(row: dict[str, Any], rng: np.random.Generator) -> None:
    model, report = cleaned(row)
    assert report.nodes_after == len(model.graph)
    source = session((EXPORTS / row["file"]).read_bytes())
    result = session(to_bytes(model))
    names = {i.name for i in source.get_inputs()}
    feeds = {k: v for k, v in golden_inputs(row).items() if k in names}
    assert_same(source.run(None, feeds), result.run(None, feeds))
    if open_batch(source):
        feeds = two_sentences(feeds, rng)
        assert_same(source.run(None, feeds), result.run(None, feeds))


@every
def test_cleanup_writes_a_valid_graph_at_opset_18(row: dict[str, Any]) -> None:
    model, report = cleaned(row)
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
    assert not model.functions
    if row["file"] == "llama_dynamo23_sdpa_static.onnx":
        assert report.opset == 23
        assert all("RMSNormalization" in name for name in report.higher_opset)
        assert report.higher_opset
    else:
        assert (report.opset, report.higher_opset) == (18, ())


@every
def test_cleanup_leaves_nothing_that_depends_on_sizes_only(row: dict[str, Any]) -> None:
    model, _ = cleaned(row)
    left = {op for op in count(model) if op in SHAPE_WORK}
    inputs = set(model.graph.inputs)
    if all(isinstance(value.shape[0], int) for value in inputs):
        assert not left
        return
    assert left <= {"Shape"}
    assert all(n.inputs[0] in inputs for n in model.graph if n.op_type == "Shape")
    for node in model.graph:
        assert all(v.shape is not None for v in node.outputs if v.uses()), node.name


@every
def test_cleanup_recognises_norms_and_gelus(row: dict[str, Any]) -> None:
    model, _ = cleaned(row)
    ops = count(model)
    assert ops["LayerNormalization"] == LAYER_NORMS[row["model"]]
    assert ops["Erf"] == ERF_GELUS[row["model"]]
    assert {n.domain for n in model.graph} == {""}


@every
def test_cleanup_opens_every_attention_into_one_form(row: dict[str, Any]) -> None:
    model, _ = cleaned(row)
    if row["file"] in QUANTIZED or row["hazards"] or not row["blocks"]:
        pytest.skip("quantized, or not an attention tokens can be removed from")
    found = find_blocks(model)
    assert len(found.blocks) == row["blocks"]
    for block in found.blocks:
        assert block.scale == pytest.approx(row["scale"], rel=1e-6)
        assert (block.packed, block.fused_op, block.mask_kind) == (False, "", row["mask_kind"])
        assert block.anchor.op_type == "Softmax"
        logits = block.anchor.inputs[0].producer()
        if block.mask is not None:
            assert logits.op_type == "Add"
            logits = next(v.producer() for v in logits.inputs if v.producer().op_type == "MatMul")
        assert logits.op_type == "MatMul"
        scaled, keys = (v.producer() for v in logits.inputs)
        assert scaled.op_type == "Mul"
        assert chain(scaled.inputs[0]) == ["Transpose[0, 2, 1, 3]", f"Reshape[0, 0, {block.heads}, {block.head_dim}]"]
        assert chain(keys.outputs[0]) == ["Transpose[0, 2, 3, 1]", f"Reshape[0, 0, {block.heads}, {block.head_dim}]"]


def chain(value: ir.Value) -> list[str]:
    """The two nodes above a value, with the constant that matters in each."""
    out = []
    for _ in range(2):
        node = value.producer()
        if node.op_type == "Transpose":
            out.append(f"Transpose{list(node.attributes['perm'].as_ints())}")
        else:
            out.append(f"{node.op_type}{constant(node.inputs[1]).tolist()}")
        value = node.inputs[0]
    return out


@every
def test_cleanup_a_second_time_changes_nothing(row: dict[str, Any]) -> None:
    model, _ = cleaned(row)
    first = to_bytes(model)
    again = ir.serde.deserialize_model(onnx.ModelProto.FromString(first))
    report = clean_up(again)
    assert not report.modified, report.passes
    assert to_bytes(again) == first


@every
def test_cleanup_is_deterministic(row: dict[str, Any]) -> None:
    assert run_cleanup(row)[0] == cached(INDEX.index(row))[0]


@every
def test_cleanup_keeps_input_and_output_names(row: dict[str, Any]) -> None:
    source = ir.load(EXPORTS / row["file"])
    model, _ = cleaned(row)
    assert [v.name for v in model.graph.inputs] == [v.name for v in source.graph.inputs]
    assert [v.name for v in model.graph.outputs] == [v.name for v in source.graph.outputs]


@every
def test_finish_runs_linears_on_rows_with_the_same_answers(row: dict[str, Any], rng: np.random.Generator) -> None:
    model, _ = cleaned(row)
    before = session(to_bytes(model))
    report = finish(model)
    if row["file"] not in QUANTIZED | {"swin_dynamo18_sdpa_dynamic.onnx", "swin_ts17_eager_static.onnx"}:
        assert report.rows >= 6 * row["blocks"]
    after = session(to_bytes(model))
    assert [v.name for v in model.graph.outputs] == [o.name for o in before.get_outputs()]
    feeds = {k: v for k, v in golden_inputs(row).items() if k in {i.name for i in before.get_inputs()}}
    if open_batch(before):
        feeds = two_sentences(feeds, rng)
    # a quantized bias moves by half a step of the integer product, which may flip a later code of 255
    assert_same(before.run(None, feeds), after.run(None, feeds), 0.05 if row["file"] in QUANTIZED else TOLERANCE)


@pytest.mark.model
def test_cleanup_folds_the_position_table_of_a_real_vit(public_model: Callable[[str], Path]) -> None:
    path = public_model("vit-s-focus")
    model = ir.load(path)
    report = clean_up(model)
    ops = count(model)
    assert report.count("layernorm") == ops["LayerNormalization"] == 25
    assert report.count("layerscale") == 24
    assert report.count("batchnorm") == 3
    assert (ops["Softmax"], ops["Erf"], ops["Resize"], ops["Shape"]) == (12, 12, 1, 1)
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    source = session(path.read_bytes()).run(None, {"input_image": image})
    assert_same(source, session(to_bytes(model)).run(None, {"input_image": image}), 1e-5)


@pytest.mark.parametrize("file", ["bert_dynamo18_sdpa_dynseq.onnx", "bert_ts17_sdpa_dynseq.onnx"])
def test_cleanup_with_an_open_length_answers_at_every_length(file: str, rng: np.random.Generator) -> None:
    model = ir.load(EXPORTS / file)
    clean_up(model)
    source, result = session((EXPORTS / file).read_bytes()), session(to_bytes(model))
    assert finish(model).rows >= 12
    finished = session(to_bytes(model))
    for batch, length in ((1, 16), (2, 7), (3, 11)):
        feeds = {i.name: rng.integers(1, 60, (batch, length)) for i in source.get_inputs()}
        mask = np.ones((batch, length), np.int64)
        mask[-1, length // 2 :] = 0
        feeds["attention_mask"] = mask
        wanted = source.run(None, feeds)
        assert_same(wanted, result.run(None, feeds))
        assert_same(wanted, finished.run(None, feeds))
