"""Sessions: what they load, run from threads, DLPack, buckets, packed batches, encoding, closing, choosing a device."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgetok
from edgetok.converters.graph.builder import GraphBuilder
from edgetok.converters.sources.hf import load_hf
from edgetok.devices.base import Options
from edgetok.errors import ArtifactError, BackendError, InputError
from edgetok.runtime import choosing
from edgetok.runtime.packing import pack_mask, pack_plan, plan_groups
from edgetok.runtime.session import load
from edgetok.runtime.text import bucket_of

HF = Path(__file__).parent / "fixtures" / "hf"
TEXTS = ["ab c", "d", "abcd efg h i", "x y z"]


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vit") / "vit.onnx"
    ir.save(load_hf(HF / "vit").model, path)
    return path


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("minilm")
    source = load_hf(HF / "minilm")
    ir.save(source.model, folder / "model.onnx", external_data="model.onnx.data")
    for name in ("tokenizer.json", "sentence_bert_config.json", "config.json"):
        (folder / name).write_bytes(source.files[name])
    return folder / "model.onnx"


@pytest.fixture(scope="module")
def bucketed(minilm: Path) -> Path:
    """The same encoder at one fixed length of 12."""
    model = onnx.load(minilm)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[1].dim_value = 12
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 12
    path = minilm.with_name("bucket.onnx")
    onnx.save(model, path)
    return path


def pixels(batch: int = 2) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, 3, 16, 16)).astype(np.float32)


def test_load_and_run_name_inputs_and_outputs(vit: Path) -> None:
    with load(vit, device="cpu", threads=1) as session:
        assert [s.name for s in session.inputs] == ["pixel_values"]
        assert [s.name for s in session.outputs] == ["last_hidden_state", "pooler_output"]
        assert session.device == "cpu_ort"
        found = session.run({"pixel_values": pixels()})
        assert found["last_hidden_state"].shape == (2, 17, 16)
        assert list(session.run({"pixel_values": pixels()}, ["pooler_output"])) == ["pooler_output"]
        assert sum(session.placement().nodes.values()) > 0
        assert session.stats().compile_seconds > 0


def test_face_offers_load(vit: Path) -> None:
    with edgetok.load(str(vit), device="cpu_ort", threads=1) as session:
        assert isinstance(session, edgetok.Session)


def test_dlpack_inputs_are_accepted(vit: Path) -> None:
    class Capsule:
        def __init__(self, array: np.ndarray) -> None:
            self.array = array

        def __dlpack__(self, **kwargs: object) -> object:
            return self.array.__dlpack__(**kwargs)  # type: ignore[arg-type]

        def __dlpack_device__(self) -> tuple[int, int]:
            return self.array.__dlpack_device__()  # type: ignore[return-value]

    with load(vit, device="cpu_ort", threads=1) as session:
        plain = session.run({"pixel_values": pixels()})["pooler_output"]
        capsule = session.run({"pixel_values": Capsule(pixels())})["pooler_output"]
    np.testing.assert_array_equal(plain, capsule)


def test_wrong_feeds_are_usage_errors(vit: Path) -> None:
    with load(vit, device="cpu_ort", threads=1) as session:
        for feeds in (
            {},
            {"pixel_values": pixels()[0]},
            {"pixel_values": pixels().astype(np.float64)},
            {"pixel_values": pixels(), "more": pixels()},
            {"pixel_values": "text"},
        ):
            with pytest.raises(InputError):
                session.run(feeds)
        with pytest.raises(InputError):
            session.run({"pixel_values": pixels()}, ["nothing"])


def test_one_session_serves_many_threads(vit: Path) -> None:
    with load(vit, device="cpu_ort", threads=1) as session:
        inputs = [np.random.default_rng(i).standard_normal((1, 3, 16, 16)).astype(np.float32) for i in range(8)]
        want = [session.run({"pixel_values": x})["pooler_output"] for x in inputs]
        wrong: list[int] = []

        def work(i: int) -> None:
            for _ in range(20):
                got = session.run({"pixel_values": inputs[i]})["pooler_output"]
                if not np.array_equal(got, want[i]):
                    wrong.append(i)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert not wrong


def test_run_releases_the_gil(tmp_path: Path) -> None:
    """While one thread computes for a while, another one keeps counting."""
    g = GraphBuilder("slow")
    x = g.input("x", ir.DataType.FLOAT, (700, 700))
    y = x
    for _ in range(12):
        y = g.op("MatMul", y, x)
    g.output("y", y, (700, 700))
    ir.save(g.model(), tmp_path / "slow.onnx")
    ticks, done = [], threading.Event()

    def count() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    with load(tmp_path / "slow.onnx", device="cpu_ort", threads=1) as session:
        feeds = {"x": np.full((700, 700), 1e-3, np.float32)}
        session.run(feeds)
        thread = threading.Thread(target=count)
        thread.start()
        start = time.perf_counter()
        session.run(feeds)
        end = time.perf_counter()
        done.set()
        thread.join()
    inside = [t for t in ticks if start < t < end]
    assert len(inside) >= 3, f"{len(inside)} ticks in {end - start:.3f} s"


def test_closed_session_says_so(vit: Path) -> None:
    session = load(vit, device="cpu_ort", threads=1)
    session.close()
    session.close()
    with pytest.raises(InputError, match="closed"):
        session.run({"pixel_values": pixels()})
    with pytest.raises(InputError, match="closed"):
        session.placement()


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        load(tmp_path / "nothing.onnx")
    with pytest.raises(InputError):
        load(tmp_path / "nothing")
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(ArtifactError):
        load(tmp_path / "bad.onnx")


def test_external_data_outside_the_folder_is_refused(minilm: Path, tmp_path: Path) -> None:
    model = onnx.load(minilm, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../model.onnx.data"
    (tmp_path / "in").mkdir()
    (tmp_path / "model.onnx.data").write_bytes(minilm.with_name("model.onnx.data").read_bytes())
    (tmp_path / "in" / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError):
        load(tmp_path / "in" / "model.onnx", device="cpu_ort")


def test_hugging_face_folder_runs_unchanged_and_leaves_no_file(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = tmp_path / "model.onnx"
    ir.save(load_hf(HF / "minilm").model, written)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    ids = rng.integers(3, 20, (2, 5))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    with load(HF / "minilm", device="cpu_ort") as folder, load(written, device="cpu_ort") as file:
        for name, want in file.run(feeds).items():
            np.testing.assert_array_equal(folder.run(feeds)[name], want)
        assert folder.tokenizer().encode(["a b"])
    assert list((tmp_path / "temporary").iterdir()) == []


def test_unknown_device_lists_the_known(vit: Path) -> None:
    with pytest.raises(InputError, match="cpu_ort"):
        load(vit, device="abacus")


# --- text -------------------------------------------------------------------------------------------------------


def test_encode_gives_unit_vectors_in_order(minilm: Path) -> None:
    with load(minilm, device="cpu_ort", threads=1) as session:
        vectors = session.encode(TEXTS)
        assert vectors.shape == (4, 16)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
        for i, text in enumerate(TEXTS):  # batching and order change nothing
            np.testing.assert_allclose(session.encode([text])[0], vectors[i], atol=1e-6)
        np.testing.assert_allclose(session.encode(TEXTS, batch=1), vectors, atol=1e-6)
        np.testing.assert_allclose(session.encode(TEXTS, batch=3), vectors, atol=1e-6)
        assert session.encode([]).shape == (0, 16)


def test_encode_cuts_texts_to_what_the_folder_says(minilm: Path) -> None:
    with load(minilm, device="cpu_ort", threads=1) as session:
        assert session.tokenizer().limit == 20  # sentence_bert_config.json, below the 24 positions
        long, cut = "a b c d e " * 20, session.tokenizer().encode(["a b c d e " * 20])[0]
        assert len(cut) == 20
        assert session.encode([long]).shape == (1, 16)


def test_encode_needs_a_list_and_a_known_output(minilm: Path) -> None:
    with load(minilm, device="cpu_ort", threads=1) as session:
        with pytest.raises(InputError, match="list"):
            session.encode("one text")
        with pytest.raises(InputError, match="unknown output"):
            session.encode(TEXTS, output="nothing")
        with pytest.raises(InputError, match="packed"):
            session.encode(TEXTS, packed=True)


def test_encode_without_tokenizer_or_embedding_says_so(vit: Path, minilm: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.onnx"
    ir.save(load_hf(HF / "minilm").model, bare)
    with load(bare, device="cpu_ort", threads=1) as session, pytest.raises(InputError, match=r"tokenizer\.json"):
        session.encode(TEXTS)
    (tmp_path / "tokenizer.json").write_text("{}")
    with load(bare, device="cpu_ort", threads=1) as session, pytest.raises(ArtifactError):
        session.encode(TEXTS)
    with load(vit, device="cpu_ort", threads=1) as session, pytest.raises(InputError):
        session.encode(TEXTS)


def test_shorter_inputs_of_a_bucketed_graph_are_padded_and_cut_back(minilm: Path, bucketed: Path) -> None:
    ids = np.array([[2, 5, 6, 3], [2, 7, 3, 0]])
    feeds = {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64), "token_type_ids": np.zeros_like(ids)}
    with load(minilm, device="cpu_ort", threads=1) as session:
        want = session.run(feeds)
    with load(bucketed, device="cpu_ort", threads=1) as session:
        got = session.run(feeds)
        encoded = session.encode(TEXTS)
        with pytest.raises(InputError):
            session.run({k: np.pad(v, ((0, 0), (0, 20))) for k, v in feeds.items()})
    assert got["last_hidden_state"].shape == want["last_hidden_state"].shape
    valid = ids > 0
    np.testing.assert_allclose(got["last_hidden_state"][valid], want["last_hidden_state"][valid], atol=1e-6)
    np.testing.assert_allclose(got["sentence_embedding"], want["sentence_embedding"], atol=1e-6)
    with load(minilm, device="cpu_ort", threads=1) as session:
        np.testing.assert_allclose(encoded, session.encode(TEXTS), atol=1e-6)


def test_bucket_needs_one_width_and_a_mask(minilm: Path, bucketed: Path, vit: Path) -> None:
    found = {}
    for path in (minilm, bucketed, vit):
        with load(path, device="cpu_ort", threads=1) as session:
            found[path] = bucket_of(session.inputs)
    assert list(found.values()) == [None, 12, None]


# --- planning of packed batches ------------------------------------------------------------------------------


def test_pack_plan_golden() -> None:
    plan = pack_mask(np.array([[1, 1, 0, 0], [1, 1, 1, 0]]))
    assert plan.word_idx.tolist() == [0, 1, 4, 5, 6]
    assert plan.cu_seqlens.tolist() == [0, 2, 5]
    assert plan.unpack_idx.tolist() == [[0, 1, 5, 5], [2, 3, 4, 5]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum), st.integers(0, 3))
def test_unpack_of_pack_is_identity_on_valid_rows_and_zero_on_pads(lengths: list[int], extra: int) -> None:
    width = max(lengths) + extra
    plan = pack_plan(lengths, width)
    x = np.random.default_rng(0).standard_normal((len(lengths), width, 3))
    flat = x.reshape(-1, 3)[plan.word_idx]
    back = np.concatenate([flat, np.zeros((1, 3))])[plan.unpack_idx]
    valid = np.arange(width)[None, :] < np.array(lengths)[:, None]
    np.testing.assert_array_equal(back, np.where(valid[..., None], x, 0))
    assert plan.cu_seqlens[-1] == len(plan.word_idx) == sum(lengths)


def test_pack_plan_refuses_what_cannot_be_packed() -> None:
    for bad in ([], [0, 0], [-1, 3]):
        with pytest.raises(InputError):
            pack_plan(bad)
    with pytest.raises(InputError):
        pack_plan([5], 4)
    with pytest.raises(InputError):
        pack_mask(np.array([[0, 1]]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=200), st.integers(1, 5000))
def test_groups_partition_the_texts_within_the_budget(lengths: list[int], budget: int) -> None:
    groups = plan_groups(lengths, max_tokens=budget, spread=2.0)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
    for group in groups:
        padded = len(group) * max(lengths[i] for i in group)
        assert padded <= budget or len(group) == 1


# --- choosing a device ----------------------------------------------------------------------------------------


class FakeExecutable:
    def __init__(self, inner: object, delay: float = 0.0, shift: float = 0.0) -> None:
        self.inner, self.delay, self.shift, self.closed = inner, delay, shift, False
        self.inputs, self.outputs = inner.inputs, inner.outputs  # type: ignore[attr-defined]

    def run(self, feeds: object, outputs: object = None) -> dict[str, np.ndarray]:
        time.sleep(self.delay)
        found = self.inner.run(feeds, outputs)  # type: ignore[attr-defined]
        return {
            n: a + np.float32(self.shift) * np.arange(a.size, dtype=np.float32).reshape(a.shape)
            for n, a in found.items()
        }

    def close(self) -> None:
        self.closed = True


def choose(monkeypatch: pytest.MonkeyPatch, path: Path, backends: dict[str, object]) -> choosing.Choice:
    class Registry:
        def names(self) -> tuple[str, ...]:
            return tuple(backends)

        def get(self, name: str) -> object:
            return backends[name]

    monkeypatch.setattr(choosing, "BACKENDS", Registry())
    with load(path, device="auto", threads=1) as session:
        return session.choice


def fake_backend(name: str, **kwargs: float) -> object:
    from edgetok.devices import BACKENDS
    from edgetok.devices.base import Availability

    real = BACKENDS.get("cpu_ort")

    class Backend:
        def __init__(self) -> None:
            self.name = name
            self.ok = True

        def probe(self) -> Availability:
            return Availability(self.ok, "not here")

        def compile(self, model: Path | bytes, options: Options) -> FakeExecutable:
            return FakeExecutable(real.compile(model, options), **kwargs)

    return Backend()


def test_auto_takes_the_only_device_without_a_trial(monkeypatch: pytest.MonkeyPatch, vit: Path) -> None:
    choice = choose(monkeypatch, vit, {"cpu_ort": fake_backend("cpu_ort")})
    assert (choice.device, dict(choice.trial_ms)) == ("cpu_ort", {})
    assert "only" in choice.reason


def test_auto_takes_the_faster_device_and_says_so(monkeypatch: pytest.MonkeyPatch, vit: Path) -> None:
    backends = {"cpu_ort": fake_backend("cpu_ort", delay=0.02), "openvino": fake_backend("openvino")}
    choice = choose(monkeypatch, vit, backends)
    assert choice.device == "openvino"
    assert set(choice.trial_ms) == {"cpu_ort", "openvino"}
    assert "cpu_ort" in choice.reason


def test_auto_refuses_a_faster_device_that_answers_differently(monkeypatch: pytest.MonkeyPatch, vit: Path) -> None:
    backends = {"cpu_ort": fake_backend("cpu_ort", delay=0.02), "openvino": fake_backend("openvino", shift=1.0)}
    choice = choose(monkeypatch, vit, backends)
    assert choice.device == "cpu_ort"
    assert "differently" in choice.reason


def test_auto_works_on_texts_with_open_axes(monkeypatch: pytest.MonkeyPatch, minilm: Path) -> None:
    backends = {"cpu_ort": fake_backend("cpu_ort"), "openvino": fake_backend("openvino", delay=0.02)}
    assert choose(monkeypatch, minilm, backends).device == "cpu_ort"


def test_absent_device_is_an_error_not_a_detour(monkeypatch: pytest.MonkeyPatch, vit: Path) -> None:
    absent = fake_backend("openvino")
    absent.ok = False  # type: ignore[attr-defined]

    class Registry:
        def get(self, name: str) -> object:
            return absent

    monkeypatch.setattr(choosing, "BACKENDS", Registry())
    with pytest.raises(BackendError, match="not here"):
        load(vit, device="openvino")


# --- artifacts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["minilm-edge", "minilm.edgetok"])
def test_artifact_runs_encodes_and_packs(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgetok.artifact import ArtifactContent, SourceInfo, write_artifact
    from edgetok.converters.graph.packing import pack_model

    monkeypatch.setenv("EDGETOK_CACHE", str(tmp_path / "cache"))
    source = load_hf(HF / "minilm")
    info = SourceInfo(name=source.name, sha256=source.sha256, bytes=source.bytes, kind=source.kind)
    content = ArtifactContent(
        source.model, info, files=source.files, extra_models={"model.packed.onnx": pack_model(source.model)}
    )
    write_artifact(tmp_path / name, content)
    with load(tmp_path / name, device="cpu", threads=1) as session:
        assert session.artifact is not None
        assert session.has_packed
        packed, padded = session.encode(TEXTS), session.encode(TEXTS, packed=False)
    np.testing.assert_allclose(packed, padded, atol=1e-6)
    (tmp_path / "plain.onnx").write_bytes(ir.to_proto(source.model).SerializeToString())
    (tmp_path / "tokenizer.json").write_bytes(source.files["tokenizer.json"])
    (tmp_path / "sentence_bert_config.json").write_bytes(source.files["sentence_bert_config.json"])
    with load(tmp_path / "plain.onnx", device="cpu", threads=1) as session:
        np.testing.assert_allclose(session.encode(TEXTS), packed, atol=1e-6)


def test_changed_artifact_is_refused(tmp_path: Path) -> None:
    from edgetok.artifact import ArtifactContent, SourceInfo, write_artifact
    from edgetok.errors import IntegrityError

    source = load_hf(HF / "vit")
    info = SourceInfo(name=source.name, sha256=source.sha256, bytes=source.bytes, kind=source.kind)
    write_artifact(tmp_path / "a", ArtifactContent(source.model, info))
    weights = next(p for p in (tmp_path / "a" / "model.onnx.data", tmp_path / "a" / "model.onnx") if p.exists())
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(IntegrityError):
        load(tmp_path / "a", device="cpu")
