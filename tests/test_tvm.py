"""The ``tvm`` target and device: same answers as onnxruntime, cross-compiled files, and whose native code is loaded."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from edgetok.artifact import Artifact
from edgetok.converters.graph.cleanup import clean_up
from edgetok.converters.graph.find import find_blocks
from edgetok.converters.reduce import METHODS
from edgetok.converters.reduce.apply import reduce_model
from edgetok.converters.reduce.spec import parse_reduce
from edgetok.converters.targets.tvm import TvmReport, compile_tvm
from edgetok.devices import BACKENDS
from edgetok.devices.base import Executable, Options
from edgetok.errors import ArtifactError, InputError, IntegrityError, UnsupportedError
from edgetok.gates import Limits
from edgetok.pipeline import ConvertOptions, run_convert
from edgetok.runtime.session import load
from edgetok.tvm_build import host_triple, linker
from edgetok.tvm_graph import check_graph, static_graph

EXPORTS = Path(__file__).parent / "fixtures" / "exports"
AARCH64 = "aarch64-linux-gnu"
EM_AARCH64 = 183
found = BACKENDS.get("tvm").probe()
needs_tvm = pytest.mark.skipif(not found.ok, reason=found.reason)
needs_linker = pytest.mark.skipif(linker(host_triple()) is None, reason="no C compiler to link a library with")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGETOK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def cleaned(name: str, reduce: str | None = None) -> onnx.ModelProto:
    """A small exported model after clean-up, and with a reduction when asked for."""
    model = ir.load(EXPORTS / f"{name}.onnx")
    clean_up(model)
    if reduce:
        reduce_model(model, find_blocks(model), parse_reduce(reduce))
    return ir.serde.serialize_model(model)


def feeds_for(executable: Executable, rng: np.random.Generator) -> dict[str, np.ndarray]:
    feeds = {}
    for spec in executable.inputs:
        shape = tuple(int(s or 0) for s in spec.shape or ())
        if spec.dtype.startswith("float"):
            feeds[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
        elif "mask" in spec.name:
            feeds[spec.name] = np.ones(shape, spec.dtype)
        else:
            feeds[spec.name] = rng.integers(0, 2, shape).astype(spec.dtype)
    return feeds


def assert_same_as_cpu_ort(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    content = model.SerializeToString()
    device = BACKENDS.get("tvm").compile(content, Options())
    feeds = feeds_for(device, rng)
    got = device.run(feeds)
    want = BACKENDS.get("cpu_ort").compile(content, Options(threads=1)).run(feeds)
    assert list(got) == list(want)
    for name, expected in want.items():
        # float32 sums in another order; the limit the project promises for this device
        np.testing.assert_allclose(got[name], expected, atol=1e-4, rtol=0, err_msg=name)


@needs_tvm
@pytest.mark.parametrize("name", ["vit_timm_dynamo18_sdpa_static", "bert_ts17_sdpa_dynamic", "vit_hf_int8_qdq"])
def test_tvm_matches_cpu_ort_on_encoders(name: str, rng: np.random.Generator) -> None:
    assert_same_as_cpu_ort(cleaned(name), rng)


@needs_tvm
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.names())
def test_tvm_matches_cpu_ort_on_every_reduction(method: str, rng: np.random.Generator) -> None:
    assert_same_as_cpu_ort(cleaned("vit_timm_dynamo18_eager_dynamic", f"{method}:removed=0.25"), rng)


@needs_tvm
def test_tvm_matches_cpu_ort_on_merged_tokens(rng: np.random.Generator) -> None:
    assert_same_as_cpu_ort(cleaned("vit_timm_dynamo18_eager_dynamic", "tome:removed=0.25"), rng)


@needs_tvm
def test_batch_is_fixed_to_the_one_asked_for(rng: np.random.Generator) -> None:
    content = cleaned("vit_timm_ts17_sdpa_dynamic").SerializeToString()
    device = BACKENDS.get("tvm").compile(content, Options(extra=(("batch", "2"),)))
    feeds = feeds_for(device, rng)
    assert next(iter(feeds.values())).shape[0] == 2
    want = BACKENDS.get("cpu_ort").compile(content, Options(threads=1)).run(feeds)
    for name, array in device.run(feeds).items():
        np.testing.assert_allclose(array, want[name], atol=1e-4)
    with pytest.raises(InputError, match="axis 0 must be 2"):
        device.run({name: array[:1] for name, array in feeds.items()})


# --- the target -------------------------------------------------------------------------------------------------------


def elf_header(content: bytes) -> tuple[str, int]:
    """(object or shared, machine number) of an ELF file (System V ABI, figure 4-3)."""
    assert content[:4] == b"\x7fELF"
    assert content[4] == 2, "64 bit"
    assert content[5] == 1, "little endian"
    kind, machine = struct.unpack_from("<HH", content, 16)
    return {1: "object", 3: "shared"}[kind], machine


def objects(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]


def linear(batch: int | str = "batch") -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(4, 3), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")],
        "linear",
        [helper.make_tensor_value_info("x", T.FLOAT, [batch, 4])],
        [helper.make_tensor_value_info("y", T.FLOAT, [batch, 3])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


@needs_tvm
def test_cross_compiled_files_are_aarch64(tmp_path: Path) -> None:
    report = compile_tvm(cleaned("vit_timm_dynamo18_sdpa_static"), triple=AARCH64, out_dir=tmp_path)
    library = tmp_path / report.files[0].name
    if shutil.which(f"{AARCH64}-gcc"):
        assert report.kind == "shared library"
        assert elf_header(library.read_bytes()) == ("shared", EM_AARCH64)
    else:
        assert report.kind == "object archive"
        found = objects(library)
        assert len(found) >= 2
        assert all(elf_header(content) == ("object", EM_AARCH64) for content in found.values())
        assert any(f"{AARCH64}-gcc" in note for note in report.notes)
    assert report.triple == AARCH64


@needs_tvm
def test_report_says_untuned_and_lists_files_with_their_hash(tmp_path: Path) -> None:
    report = compile_tvm(linear(), triple=AARCH64, mcpu="cortex-a76", out_dir=tmp_path, batch=3)
    assert "untuned" in report.notes[0]
    assert "slower than onnxruntime" in report.notes[0]
    assert any("batch is fixed to 3" in note for note in report.notes)
    for entry in report.files:
        content = (tmp_path / entry.name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry.bytes, entry.sha256)
    about = json.loads((tmp_path / "build.json").read_text())
    assert (about["triple"], about["mcpu"], about["batch"]) == (AARCH64, "cortex-a76", 3)
    assert about["inputs"] == [{"name": "x", "dtype": "float32", "shape": [3, 4]}]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f.name for f in report.files)


@needs_tvm
@pytest.mark.parametrize("triple", [None, AARCH64])
def test_same_graph_gives_the_same_bytes(tmp_path: Path, triple: str | None) -> None:
    model = cleaned("vit_timm_dynamo18_sdpa_static")
    one = compile_tvm(model, triple=triple, out_dir=folder(tmp_path / "one"))
    two = compile_tvm(model, triple=triple, out_dir=folder(tmp_path / "another-name"))
    assert one.files == two.files


@needs_tvm
@pytest.mark.parametrize("triple", ["pdp11-unix", "aarch64 -lfoo", "../../x", "aarch64-linux-gnu;ls"])
def test_unknown_triple_is_refused(tmp_path: Path, triple: str) -> None:
    with pytest.raises(InputError, match="triple"):
        compile_tvm(linear(), triple=triple, out_dir=tmp_path)
    assert not list(tmp_path.iterdir())


# --- what it refuses --------------------------------------------------------------------------------------------------


def graph_of(nodes: list[onnx.NodeProto], shape: list[int | str], **weights: np.ndarray) -> onnx.ModelProto:
    inits = [numpy_helper.from_array(a, n) for n, a in weights.items()]
    outs = [helper.make_empty_tensor_value_info(n) for n in nodes[-1].output]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", T.FLOAT, shape)], outs, inits)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


@needs_tvm
def test_fused_operator_is_refused_by_name() -> None:
    node = helper.make_node("Gelu", ["x"], ["y"], name="block0/gelu", domain="com.microsoft")
    with pytest.raises(UnsupportedError, match=r"com\.microsoft\.Gelu") as caught:
        check_graph(static_graph(graph_of([node], [2, 3]), 1))
    assert "--target tvm" in str(caught.value)


@needs_tvm
def test_topk_with_a_computed_count_is_refused() -> None:
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Cast", ["s"], ["i"], to=T.INT64),
        helper.make_node("Reshape", ["i", "one"], ["k"]),
        helper.make_node("TopK", ["x", "k"], ["v", "w"], name="pick"),
    ]
    model = graph_of(nodes, [2, 3], one=np.array([1]))
    with pytest.raises(UnsupportedError, match="constant TopK count"):
        check_graph(static_graph(model, 1))


def test_second_open_axis_is_refused_with_the_flag_to_add() -> None:
    with pytest.raises(UnsupportedError, match="fixed shapes") as caught:
        static_graph(graph_of([helper.make_node("Relu", ["x"], ["y"])], ["batch", "tokens"]), 1)
    assert "--shape x=" in str(caught.value)


def test_fixed_batch_folds_what_followed_from_it() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["b"]),
        helper.make_node("Concat", ["b", "three"], ["target"], axis=0),
        helper.make_node("Expand", ["row", "target"], ["rows"]),
        helper.make_node("Add", ["x", "rows"], ["y"]),
    ]
    weights = {"zero": np.array([0]), "three": np.array([3]), "row": np.ones((1, 3), np.float32)}
    fixed = static_graph(graph_of(nodes, ["batch", 3], **weights), 2)
    assert [n.op_type for n in fixed.graph.node] == ["Add"]


@pytest.mark.parametrize("index", [3, -4])
def test_constant_index_outside_its_axis_is_refused(index: int) -> None:
    model = graph_of([helper.make_node("Gather", ["x", "i"], ["y"], name="pick", axis=1)], [2, 3], i=np.array([index]))
    with pytest.raises(ArtifactError, match="leaves its axis"):
        static_graph(model, 1)


def lookup() -> onnx.ModelProto:
    """Token ids into a table of 5 rows, and the same ids computed (times 3) into it."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["y"]),
        helper.make_node("Mul", ["ids", "three"], ["far"]),
        helper.make_node("Gather", ["table", "far"], ["z"]),
        helper.make_node("Concat", ["y", "z"], ["out"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "lookup",
        [helper.make_tensor_value_info("ids", T.INT64, [1, 4])],
        [helper.make_empty_tensor_value_info("out")],
        [numpy_helper.from_array(np.eye(5, dtype=np.float32), "table"), numpy_helper.from_array(np.array(3), "three")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@needs_tvm
@pytest.mark.parametrize("bad", [5, -6, 2**40])
def test_ids_outside_the_table_are_an_error_and_never_a_wild_read(bad: int) -> None:
    device = BACKENDS.get("tvm").compile(lookup().SerializeToString(), Options())
    with pytest.raises(InputError, match="must be below 5"):
        device.run({"ids": np.array([[0, 1, bad, 2]])})
    got = device.run({"ids": np.array([[0, 1, 4, -1]])})["out"][0]
    assert got[:4].argmax(1).tolist() == [0, 1, 4, 4]
    assert got[4:].argmax(1).tolist() == [0, 3, 4, 2]  # 12 is held to the last row, -3 counts from the end


# --- cache and packed libraries ---------------------------------------------------------------------------------------


@needs_tvm
@needs_linker
def test_library_is_kept_in_the_user_cache_and_made_again_when_broken(own_cache: Path) -> None:
    content, x = linear().SerializeToString(), np.ones((1, 4), np.float32)
    want = BACKENDS.get("tvm").compile(content, Options()).run({"x": x})["y"]
    (library,) = own_cache.glob("tvm/*/model.so")
    before = library.stat().st_mtime_ns
    BACKENDS.get("tvm").compile(content, Options())
    assert library.stat().st_mtime_ns == before
    library.unlink()  # not overwritten in place: the old one is still mapped
    library.write_bytes(b"broken")
    again = BACKENDS.get("tvm").compile(content, Options()).run({"x": x})["y"]
    np.testing.assert_array_equal(again, want)
    assert library.read_bytes()[:4] == b"\x7fELF"


@needs_tvm
def test_without_a_linker_the_code_stays_in_memory(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    device = BACKENDS.get("tvm").compile(linear().SerializeToString(), Options())
    assert device.run({"x": np.ones((1, 4), np.float32)})["y"].shape == (1, 3)
    assert not own_cache.exists()


def packed(path: Path, *, batch: int = 1) -> tuple[Path, TvmReport]:
    """A folder as an artifact is: graph, library for this machine, manifest with hashes."""
    model_path = folder(path) / "model.onnx"
    model_path.write_bytes(linear().SerializeToString())
    name = f"targets/tvm/{host_triple()}"
    report = compile_tvm(linear(), out_dir=folder(path / name), batch=batch)
    files = [{"name": f"{name}/{f.name}", "bytes": f.bytes, "sha256": f.sha256} for f in report.files]
    (path / "edgetok.json").write_text(json.dumps({"files": files}))
    return model_path, report


@needs_tvm
@needs_linker
def test_packed_library_is_loaded_only_when_allowed(tmp_path: Path) -> None:
    model, _ = packed(tmp_path / "artifact")
    x = {"x": np.ones((1, 4), np.float32)}
    plain = BACKENDS.get("tvm").compile(model, Options())
    allowed = BACKENDS.get("tvm").compile(model, Options(allow_native_code=True))
    assert not any("library of the artifact" in note for note in plain.placement().notes)
    assert any("library of the artifact" in note for note in allowed.placement().notes)
    np.testing.assert_array_equal(plain.run(x)["y"], allowed.run(x)["y"])


@needs_tvm
@needs_linker
def test_packed_library_with_other_bytes_is_not_loaded(tmp_path: Path) -> None:
    model, report = packed(tmp_path / "artifact")
    library = model.parent / "targets" / "tvm" / host_triple() / report.files[0].name
    library.write_bytes(library.read_bytes() + b"\0")
    with pytest.raises(IntegrityError, match="not the one the manifest lists"):
        BACKENDS.get("tvm").compile(model, Options(allow_native_code=True))
    BACKENDS.get("tvm").compile(model, Options())  # and is not even looked at otherwise


@needs_tvm
@needs_linker
def test_packed_library_of_another_batch_is_passed_over(tmp_path: Path) -> None:
    model, _ = packed(tmp_path / "artifact", batch=4)
    device = BACKENDS.get("tvm").compile(model, Options(allow_native_code=True))
    assert any("is for batch 4" in note for note in device.placement().notes)
    assert device.run({"x": np.ones((1, 4), np.float32)})["y"].shape == (1, 3)


@needs_tvm
@pytest.mark.parametrize("text", ["", "[]", "{}", '{"library": "/bin/sh"}', "\x00"])
def test_malformed_description_of_a_packed_library_is_refused(tmp_path: Path, text: str) -> None:
    model = folder(tmp_path / "artifact") / "model.onnx"
    model.write_bytes(linear().SerializeToString())
    (folder(model.parent / "targets" / "tvm" / host_triple()) / "build.json").write_text(text)
    (model.parent / "edgetok.json").write_text('{"files": []}')
    with pytest.raises(ArtifactError):
        BACKENDS.get("tvm").compile(model, Options(allow_native_code=True))


@needs_tvm
@needs_linker
def test_convert_packs_a_library_held_against_onnxruntime(tmp_path: Path) -> None:
    source = EXPORTS / "vit_hf_dynamo18_sdpa_dynamic.onnx"
    limits = Limits(speedup=0.0, cosine=0.5)
    report = run_convert(
        ConvertOptions(
            source, tmp_path / "edge", reduce="tome:r=2", target="tvm", limits=limits, threads=1, timing_rounds=5
        )
    )
    assert report.target["max_abs"] < 1e-4
    assert report.target["ms"] > 0
    with (
        load(tmp_path / "edge", device="tvm", allow_native_code=True) as session,
        Artifact.open(tmp_path / "edge") as a,
    ):
        assert f"targets/tvm/{host_triple()}/model.so" in a.names()
        found = session.run(a.golden()[0].inputs)
    with load(tmp_path / "edge", device="cpu", threads=1) as session, Artifact.open(tmp_path / "edge") as a:
        expected = session.run(a.golden()[0].inputs)
    np.testing.assert_allclose(found["logits"], expected["logits"], atol=1e-4)
