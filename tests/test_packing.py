"""Padding-free graphs equal padded ones on valid rows, whatever made the graph and whatever is in the batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetok.converters.graph.cleanup import clean_up
from edgetok.converters.graph.find import find_blocks
from edgetok.converters.graph.packing import pack_model
from edgetok.converters.quantize.quantize import quantize_model
from edgetok.converters.reduce.apply import reduce_model
from edgetok.converters.reduce.spec import parse_reduce
from edgetok.converters.sources.hf import load_hf
from edgetok.converters.sources.onnx import load_onnx
from edgetok.errors import InputError, UnsupportedError
from edgetok.runtime.packing import pack_mask, pack_plan
from edgetok.runtime.session import load

FIXTURES = Path(__file__).parent / "fixtures"
HF = FIXTURES / "hf"
TEXT_FOLDERS = ["minilm", "bert", "roberta", "distilbert", "bert-classifier", "bert-tokens"]
EXPORTS = [
    "bert_dynamo18_eager_static",
    "bert_dynamo18_sdpa_dynamic",
    "bert_dynamo18_sdpa_dynseq",
    "bert_dynamo23_sdpa_dynamic",
    "bert_ts14_eager_dynamic",
    "bert_ts17_sdpa_dynseq",
    "distilbert_ts17_sdpa_dynamic",
    "roberta_dynamo18_sdpa_static",
    "roberta_dynamo23_sdpa_dynamic",
    "roberta_ts17_eager_dynamic",
]


class Runner:
    """A model as onnxruntime runs it."""

    def __init__(self, model: ir.Model) -> None:
        self.session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
        self.inputs = [i.name for i in self.session.get_inputs()]
        self.outputs = [o.name for o in self.session.get_outputs()]

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self.outputs, self.session.run(self.outputs, feeds), strict=True))


def batch(lengths: list[int], width: int, seed: int = 0, types: bool = True) -> dict[str, np.ndarray]:
    mask = np.arange(width)[None, :] < np.array(lengths)[:, None]
    rng = np.random.default_rng(seed)
    ids = np.where(mask, rng.integers(3, 50, mask.shape), 1)
    feeds = {"input_ids": ids, "attention_mask": mask.astype(np.int64)}
    return feeds | ({"token_type_ids": np.where(mask, rng.integers(0, 2, mask.shape), 0)} if types else {})


def packed_feeds(feeds: dict[str, np.ndarray], names: list[str], width: int | None = None) -> dict[str, np.ndarray]:
    mask = feeds["attention_mask"].astype(bool)
    plan = pack_plan(mask.sum(axis=1), width)
    indices = {"word_idx": plan.word_idx, "unpack_idx": plan.unpack_idx}
    return indices | {n: feeds[n][mask] for n in names if n not in indices}


def compare(padded: Runner, packed: Runner, feeds: dict[str, np.ndarray], atol: float = 1e-5) -> None:
    mask = feeds["attention_mask"].astype(bool)
    want = padded.run({n: feeds[n] for n in padded.inputs})
    got = packed.run(packed_feeds(feeds, packed.inputs))
    assert list(want) == list(got)
    longest = mask.sum(axis=1).max()
    for name, expected in want.items():
        if expected.ndim == 3:
            assert got[name].shape[1] == longest
            found, valid = got[name], mask[:, :longest]
            # float32 rounding: other matrix shapes add in another order
            np.testing.assert_allclose(found[valid], expected[mask], atol=atol, err_msg=name)
            if name == "last_hidden_state":
                assert not found[~valid].any(), "pads must be zero"
        else:
            np.testing.assert_allclose(got[name], expected, atol=atol, err_msg=name)


@pytest.fixture(scope="module")
def minilm() -> tuple[Runner, Runner]:
    model = load_hf(HF / "minilm").model
    return Runner(model), Runner(pack_model(model))


@pytest.mark.parametrize("name", TEXT_FOLDERS)
@pytest.mark.parametrize("form", ["as built", "cleaned", "fixed length"])
def test_packed_equals_padded_on_valid_rows(name: str, form: str) -> None:
    model = load_hf(HF / name).model
    if form != "as built":
        clean_up(model, {v.name: ("batch", 12) for v in model.graph.inputs} if form == "fixed length" else None)
    packed = pack_model(model)
    onnx.checker.check_model(ir.to_proto(packed), full_check=True)
    feeds = batch([9, 4, 1, 12], 12)
    compare(Runner(model), Runner(packed), feeds)


@pytest.mark.parametrize("name", EXPORTS)
def test_packed_equals_padded_for_exporter_graphs(name: str) -> None:
    model = load_onnx(FIXTURES / "exports" / f"{name}.onnx").model
    clean_up(model)
    shapes = [v.shape for v in model.graph.inputs]
    width = next((s[1] for s in shapes if s is not None and isinstance(s[1], int)), 16)
    one = any(s is not None and s[0] == 1 for s in shapes)
    compare(Runner(model), Runner(pack_model(model)), batch([11] if one else [7, width, 2], int(width)))


@pytest.mark.parametrize("precision", ["int8", "fp16", "int4"])
def test_quantized_graphs_pack_too(precision: str) -> None:
    model = load_hf(HF / "minilm").model
    clean_up(model)
    calib = [batch([9, 7], 9, seed) for seed in range(4)]
    quantized, _ = quantize_model(model, precision, calib)
    # A rounding step of an int8 code may fall the other way when a sum is added in another order.
    compare(
        Runner(quantized),
        Runner(pack_model(quantized)),
        batch([9, 4, 1], 9),
        atol=0.02 if precision == "int8" else 1e-5,
    )


def test_source_model_is_not_changed() -> None:
    model = load_hf(HF / "minilm").model
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    pack_model(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_weights_keep_their_names_and_bytes_so_that_one_file_serves_both() -> None:
    model = load_hf(HF / "minilm").model
    packed = pack_model(model)
    large = {
        n: v for n, v in model.graph.initializers.items() if v.const_value is not None and v.const_value.nbytes > 256
    }
    assert large
    for name, value in packed.graph.initializers.items():
        if value.const_value is not None and value.const_value.nbytes > 256:
            assert name in large
            np.testing.assert_array_equal(value.const_value.numpy(), large[name].const_value.numpy())


def test_inputs_are_flat_ids_and_indices() -> None:
    packed = pack_model(load_hf(HF / "minilm").model)
    found = {v.name: [str(d.value) if hasattr(d, "value") else d for d in v.shape] for v in packed.graph.inputs}
    assert found == {
        "input_ids": ["tokens"],
        "token_type_ids": ["tokens"],
        "word_idx": ["tokens"],
        "unpack_idx": ["batch", "sequence"],
    }


def test_full_mask_is_the_identity(minilm: tuple[Runner, Runner]) -> None:
    compare(*minilm, batch([6, 6, 6], 6))


def test_one_text_alone(minilm: tuple[Runner, Runner]) -> None:
    compare(*minilm, batch([5], 5))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(0, 100))
def test_any_lengths(minilm: tuple[Runner, Runner], lengths: list[int], seed: int) -> None:
    compare(*minilm, batch(lengths, 20, seed))


def test_order_of_texts_permutes_the_outputs(minilm: tuple[Runner, Runner]) -> None:
    feeds, order = batch([3, 9, 5, 1], 9), np.array([2, 0, 3, 1])
    packed = minilm[1]
    got = packed.run(packed_feeds(feeds, packed.inputs))["sentence_embedding"]
    turned = packed.run(packed_feeds({n: v[order] for n, v in feeds.items()}, packed.inputs))["sentence_embedding"]
    np.testing.assert_allclose(turned, got[order], atol=1e-6)


def test_token_buckets_with_a_dummy_row_give_the_same(minilm: tuple[Runner, Runner]) -> None:
    """A runtime that wants V in multiples of 16 may append a dummy text whose rows are thrown away."""
    feeds, packed = batch([3, 9, 5], 9), minilm[1]
    want = packed.run(packed_feeds(feeds, packed.inputs))["sentence_embedding"]
    used = int(feeds["attention_mask"].sum())
    spare = -used % 16 or 16
    extra = np.zeros((1, 9), np.int64)
    filled = extra.copy()
    filled[0, : min(spare, 9)] = 1
    wide = {n: np.concatenate([v, filled if n == "attention_mask" else extra]) for n, v in feeds.items()}
    got = packed.run(packed_feeds(wide, packed.inputs))["sentence_embedding"]
    np.testing.assert_allclose(got[:3], want, atol=1e-6)


def test_wider_rows_than_the_longest_text_change_nothing(minilm: tuple[Runner, Runner]) -> None:
    feeds, packed = batch([3, 9, 5], 9), minilm[1]
    want = packed.run(packed_feeds(feeds, packed.inputs))
    got = packed.run(packed_feeds(feeds, packed.inputs, 14))
    np.testing.assert_allclose(got["sentence_embedding"], want["sentence_embedding"], atol=1e-6)
    assert not got["last_hidden_state"][:, 9:].any()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("clip_text_dynamo18_sdpa_dynamic", "causal"),
        ("t5_encoder_dynamo18_eager_static", "relative-bias"),
        ("vit_hf_ts17_sdpa_dynamic", "int64"),
    ],
)
def test_graphs_that_cannot_be_packed_are_refused_by_reason(name: str, reason: str) -> None:
    model = load_onnx(FIXTURES / "exports" / f"{name}.onnx").model
    clean_up(model)
    with pytest.raises(UnsupportedError, match=reason):
        pack_model(model)


def test_reduced_graphs_are_refused() -> None:
    model = load_hf(HF / "minilm").model
    clean_up(model, {v.name: ("batch", 12) for v in model.graph.inputs})
    reduce_model(model, find_blocks(model), parse_reduce("tome:r=2"))
    with pytest.raises(UnsupportedError, match="without --reduce"):
        pack_model(model)


def test_output_between_blocks_is_refused() -> None:
    model = load_hf(HF / "minilm").model
    inner = next(n.outputs[0] for n in model.graph if n.name == "/layer.0/mlp/LayerNormalization")
    model.graph.outputs.append(inner)
    with pytest.raises(UnsupportedError, match="between blocks"):
        pack_model(model)


# --- through a session ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed")
    source = load_hf(HF / "minilm")
    ir.save(source.model, path / "model.onnx")
    ir.save(pack_model(source.model), path / "model.packed.onnx")
    for name in ("tokenizer.json", "sentence_bert_config.json", "config.json"):
        (path / name).write_bytes(source.files[name])
    return path


def test_session_encodes_packed_like_padded(folder: Path) -> None:
    texts = ["a b c", "d", "a b c d e f g h i j k l m n o", "x y", "q w e r t"] * 3
    with load(folder / "model.onnx", device="cpu_ort", threads=1) as session:
        assert session.has_packed
        packed = session.encode(texts, packed=True)
        np.testing.assert_allclose(packed, session.encode(texts, packed=False), atol=1e-6)
        np.testing.assert_allclose(packed, session.encode(texts), atol=1e-6)


def test_session_run_packed_keeps_order_and_zeroes_pads_across_groups(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr("edgetok.runtime.session._GROUP_TOKENS", 16)
    feeds = batch([3, 20, 5, 1, 7], 20, types=False)
    ids = [row[keep.astype(bool)] for row, keep in zip(feeds["input_ids"], feeds["attention_mask"])]
    with load(folder / "model.onnx", device="cpu_ort", threads=1) as session:
        got = session.run_packed(ids)
        want = session.run(feeds | {"token_type_ids": np.zeros_like(feeds["input_ids"])})
        mask = feeds["attention_mask"].astype(bool)
        np.testing.assert_allclose(got["sentence_embedding"], want["sentence_embedding"], atol=1e-6)
        np.testing.assert_allclose(got["last_hidden_state"][mask], want["last_hidden_state"][mask], atol=1e-5)
        assert not got["last_hidden_state"][~mask].any()
        assert list(session.run_packed(ids, ["sentence_embedding"])) == ["sentence_embedding"]
        for bad in ([], [[]], [[1], []]):
            with pytest.raises(InputError):
                session.run_packed(bad)


def test_mask_and_lengths_plan_alike() -> None:
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    a, b = pack_mask(mask), pack_plan([2, 1], 3)
    np.testing.assert_array_equal(a.unpack_idx, b.unpack_idx)
    np.testing.assert_array_equal(a.word_idx, b.word_idx)


@pytest.mark.parametrize("precision", ["keep", "int8"])
def test_convert_writes_the_packed_graph_beside_the_other_on_shared_weights(tmp_path: Path, precision: str) -> None:
    from edgetok import Limits, convert

    (tmp_path / "lines.txt").write_text("a b c d\nx y\nq w e r t y\n" * 8)
    with convert(
        HF / "minilm",
        output=tmp_path / "edge",
        precision=precision,
        calib=tmp_path / "lines.txt",
        limits=Limits(speedup=0, cosine=0.9),  # a model this small is not made to be faster
    ) as artifact:
        assert "model.packed.onnx" in artifact.names()
        data = [e for e in artifact.manifest.files if e.name.endswith(".data")]
        assert len(data) <= 1
    texts = ["a b c", "d", "x y z w v u t s r"]
    with load(tmp_path / "edge", device="cpu", threads=1) as session:
        packed, padded = session.encode(texts, packed=True), session.encode(texts, packed=False)
    np.testing.assert_allclose(packed, padded, atol=0.02 if precision == "int8" else 1e-6)
