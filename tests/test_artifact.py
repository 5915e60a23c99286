"""The artifact: what is written is what is read, the same content is the same bytes, and nothing is ever half there.

Long: every law of the format is here, writer and reader sharing the same small artifact.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from attacks.make import WEIGHT, edit_manifest, external_model, save, tiny_artifact, tiny_content, tiny_model
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from edgetok.artifact import (
    Accuracy,
    Artifact,
    GoldenCase,
    LayerTokens,
    check_output,
    pack,
    unpack,
    verify_artifact,
    write_artifact,
)
from edgetok.atomic import staging
from edgetok.converters.sources.loader import load_source
from edgetok.errors import ArtifactError, InputError, IntegrityError, ResourceError, UnsupportedError
from edgetok.manifest import dump_yaml, load_yaml
from edgetok.npz import read_npz, write_npz

FORMS = ("art", "art.edgetok")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGETOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)


def tree(path: Path) -> dict[str, bytes]:
    """Every file at or below a path, temporaries included."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path.parent)): p.read_bytes() for p in files}


def weights_model(tensors: dict[str, np.ndarray | onnx.TensorProto]) -> onnx.ModelProto:
    protos = [t if isinstance(t, onnx.TensorProto) else numpy_helper.from_array(t, n) for n, t in tensors.items()]
    nodes = [helper.make_node("Identity", [t.name], [f"out_{t.name}"]) for t in protos]
    outputs = [helper.make_tensor_value_info(f"out_{t.name}", t.data_type, list(t.dims)) for t in protos]
    graph = helper.make_graph(nodes, "weights", [], outputs, protos)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


# --- what is written is what is read


@pytest.mark.parametrize("form", FORMS)
def test_roundtrip_keeps_everything(form: str, tmp_path: Path, rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 16)).astype(np.float32)
    cases = [GoldenCase({"x": x}, {"y": x}), GoldenCase({"x": x[:1]}, {"y": x[:1] * 2})]
    content = tiny_content(
        golden=cases,
        recipe={"reduce": {"method": "tome", "r": 13}, "seed": 7, "note": "é"},
        tokens=[LayerTokens(layer=1, before=257, after=244)],
        preprocess={"mean": [0.5], "layout": "chw"},
        agreement={"y": 0.999},
        accuracy=[Accuracy(metric="probe", source=0.91, artifact=0.9, drop=0.01, conditions={"device": "cpu-ort"})],
        files={"LICENSE": b"MIT\n", "tokenizer.json": b"{}", "targets/tvm/x86_64/lib.so": b"\x7fELF"},
    )
    with write_artifact(tmp_path / form, content) as written, Artifact.open(tmp_path / form) as art:
        assert art.sha256 == written.sha256
        assert art.manifest.recipe == art.recipe() == content.recipe
        assert art.manifest.tokens == content.tokens
        assert art.manifest.accuracy == content.accuracy
        assert art.manifest.preprocess == content.preprocess
        assert art.manifest.source == content.source
        assert art.measured() == {"ms": 1.0}
        assert art.read("targets/tvm/x86_64/lib.so") == b"\x7fELF"
        assert [t.shape for t in art.manifest.inputs] == [["batch", 16]]
        assert [(p.dtype, p.bytes) for p in art.manifest.precision] == [("float", 1024)]
        for want, got in zip(cases, art.golden(), strict=True):
            for side in ("inputs", "outputs"):
                for name, array in getattr(want, side).items():
                    np.testing.assert_array_equal(getattr(got, side)[name], array)
        with pytest.raises(InputError, match="no file"):
            art.read("ghost")
    assert verify_artifact(tmp_path / form).ok


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("external_from", [0, 1 << 30])
def test_model_runs_without_us(form: str, external_from: int, tmp_path: Path) -> None:
    import onnxruntime as ort

    path = tiny_artifact(tmp_path / form, external_from_bytes=external_from)
    with Artifact.open(path) as art:
        [case] = art.golden()
        for model in (str(art.model_path()), art.model_bytes()):
            session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
            np.testing.assert_array_equal(session.run(["y"], dict(case.inputs))[0], case.outputs["y"])


def test_every_dtype_survives_external_data(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors: dict[str, np.ndarray | onnx.TensorProto] = {}
    for dtype in ("float16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64", "uint64", "bool"):
        tensors[dtype] = rng.integers(0, 2, (3, 700)).astype(dtype)
    for name in ("BFLOAT16", "FLOAT8E4M3FN", "INT4", "UINT4"):
        bits = {"BFLOAT16": 16, "FLOAT8E4M3FN": 8, "INT4": 4, "UINT4": 4}[name]
        raw = rng.integers(0, 60, 2100 * 3 * bits // 8, dtype=np.uint8).tobytes()
        tensors[name] = onnx.TensorProto(name=name, data_type=T.DataType.Value(name), dims=[3, 2100], raw_data=raw)
    model = weights_model(tensors)
    write_artifact(tmp_path / "art", tiny_content(model=model, golden=[])).close()
    assert (tmp_path / "art" / "model.onnx.data").stat().st_size > 40_000
    loaded = load_source(tmp_path / "art").model
    again = load_source(tmp_path / "art" / "model.onnx").model
    for proto in model.graph.initializer:
        for graph in (loaded, again):
            tensor = graph.graph.initializers[proto.name].const_value
            assert tensor is not None
            assert tensor.dtype.value == proto.data_type
            assert tensor.tobytes() == ir.serde.deserialize_tensor(proto).tobytes(), proto.name


def test_further_graph_shares_the_weights(tmp_path: Path) -> None:
    main, packed = (ir.serde.deserialize_model(tiny_model()) for _ in range(2))
    packed.graph.name = "packed"
    path = tmp_path / "art"
    write_artifact(path, tiny_content(model=main, extra_models={"model.packed.onnx": packed})).close()
    assert (path / "model.onnx.data").stat().st_size == 1024
    with Artifact.open(path) as art:
        assert art.model_path("model.packed.onnx").name == "model.packed.onnx"
        inside = onnx.load_from_string(art.model_bytes("model.packed.onnx"))
    assert inside.graph.initializer[0].raw_data == WEIGHT.tobytes()


def test_equal_tensors_of_one_graph_are_not_shared(tmp_path: Path) -> None:
    twins = weights_model({"a": WEIGHT, "b": WEIGHT})
    path = tiny_artifact(tmp_path / "art", model=twins, golden=[])
    assert (path / "model.onnx.data").stat().st_size == 2048
    assert load_source(path).model.graph.initializers["b"].const_value is not None


def test_graph_given_as_bytes_is_written_unchanged(tmp_path: Path) -> None:
    data = tiny_model().SerializeToString()
    path = tiny_artifact(tmp_path / "art", model=data)
    assert (path / "model.onnx").read_bytes() == data


def test_artifact_is_a_source(tmp_path: Path) -> None:
    for form in FORMS:
        with Artifact.open(tiny_artifact(tmp_path / form)) as art:
            source = load_source(tmp_path / form)
            assert (source.kind, source.sha256, source.files) == ("artifact", art.sha256, {"LICENSE": b"MIT\n"})
        assert source.model.graph.initializers["w"].const_value.numpy().sum() == WEIGHT.sum()  # maps outlive it


def test_what_nobody_could_open_is_not_published(tmp_path: Path) -> None:
    broken = tiny_model()
    broken.graph.node[0].input[0] = "ghost"
    with pytest.raises(ArtifactError, match="ghost"):
        write_artifact(tmp_path / "art", tiny_content(model=broken.SerializeToString()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"files": {"../evil": b""}}, "leaves the folder"),
        ({"files": {"/etc/evil": b""}}, "relative"),
        ({"files": {"a//b": b""}}, "empty part"),
        ({"files": {"model.onnx": b""}}, "taken"),
        ({"files": {"edgetok.json": b""}}, "taken"),
        ({"recipe": {"x": float("nan")}}, "finite"),
        ({"recipe": {"x": object()}}, "cannot be written"),
        ({"agreement": {"y": float("inf")}}, "finite"),
        ({"extra_models": {"../packed.onnx": None}}, "plain name"),
        ({"golden": [GoldenCase({"x": np.array([{}])}, {})]}, "Python objects"),
    ],
)
def test_content_that_cannot_be_written_is_refused(change: dict, words: str, tmp_path: Path) -> None:  # type: ignore[type-arg]
    with pytest.raises(InputError, match=words):
        write_artifact(tmp_path / "art", tiny_content(**change))
    assert list(tmp_path.iterdir()) == []


# --- the same content is the same bytes


@pytest.mark.parametrize("form", FORMS)
def test_two_writes_give_the_same_bytes(form: str, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        tiny_artifact(tmp_path / folder / form)
    assert tree(tmp_path / "one" / form) == tree(tmp_path / "two" / form)


def test_content_hash_is_over_the_files_and_the_manifest(tmp_path: Path) -> None:
    with Artifact.open(tiny_artifact(tmp_path / "art")) as art:
        sha256 = art.sha256
    fields = json.loads((tmp_path / "art" / "edgetok.json").read_bytes())
    for entry in fields["files"]:
        data = (tmp_path / "art" / entry["name"]).read_bytes()
        assert (entry["sha256"], entry["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
    assert {e["name"] for e in fields["files"]} | {"edgetok.json", "measured.json"} == {
        p.name for p in (tmp_path / "art").iterdir()
    }
    for form in FORMS:
        for change in ({"recipe": {"seed": 1}}, {"files": {}}, {"preprocess": {"scale": 1.0}}):
            with Artifact.open(tiny_artifact(tmp_path / f"{next(iter(change))}-{form}", **change)) as other:
                assert other.sha256 != sha256


def test_measurements_are_outside_the_content_hash(tmp_path: Path) -> None:
    hashes = []
    for i, measured in enumerate(({"ms": 1.0}, {"ms": 2.0, "machine": "other"}, None)):
        with Artifact.open(tiny_artifact(tmp_path / f"a{i}", measured=measured)) as art:
            hashes.append(art.sha256)
    assert len(set(hashes)) == 1
    (tmp_path / "a0" / "measured.json").write_text('{"ms": 3}')
    with Artifact.open(tmp_path / "a0") as art:
        assert art.measured() == {"ms": 3}
    one, two = ((tmp_path / f"a{i}" / "edgetok.json").read_bytes() for i in (0, 1))
    assert one == two


def test_source_date_epoch_dates_the_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    with zipfile.ZipFile(tiny_artifact(tmp_path / "art.edgetok")) as archive:
        assert {i.date_time for i in archive.infolist()} == {(2023, 11, 14, 22, 13, 20)}
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(InputError, match="SOURCE_DATE_EPOCH"):
        tiny_artifact(tmp_path / "other.edgetok")
    assert {p.name for p in tmp_path.iterdir()} == {"art.edgetok"}


# --- both forms


def test_pack_and_unpack_are_each_others_inverse(tmp_path: Path) -> None:
    folder = tiny_artifact(tmp_path / "folder")
    direct = tiny_artifact(tmp_path / "direct.edgetok")
    pack(folder, tmp_path / "packed.edgetok").close()
    assert (tmp_path / "packed.edgetok").read_bytes() == direct.read_bytes()
    unpack(tmp_path / "packed.edgetok", tmp_path / "again").close()
    assert {k.split("/", 1)[1]: v for k, v in tree(folder).items()} == {
        k.split("/", 1)[1]: v for k, v in tree(tmp_path / "again").items()
    }


def test_packed_members_can_be_mapped(tmp_path: Path, rng: np.random.Generator) -> None:
    big = {f"w{i}": rng.standard_normal((7, 100 + i)).astype(np.float32) for i in range(5)}
    path = tiny_artifact(tmp_path / "art.edgetok", model=weights_model(big), golden=[])
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
            begin = info.header_offset + 30 + int.from_bytes(raw[info.header_offset + 26 :][:2], "little")
            begin += int.from_bytes(raw[info.header_offset + 28 :][:2], "little")
            assert begin % 64 == 0
            assert raw[begin : begin + info.file_size] == archive.read(info)
    with Artifact.open(path) as art:
        view = art.map("model.onnx.data")
        assert view.readonly
        assert np.frombuffer(view, np.uint8).ctypes.data % 64 == 0
        for tensor in onnx.load_from_string(art.read("model.onnx")).graph.initializer:
            extent = {e.key: e.value for e in tensor.external_data}
            assert int(extent["offset"]) % 64 == 0
            found = np.frombuffer(view, np.float32, big[tensor.name].size, int(extent["offset"]))
            np.testing.assert_array_equal(found.reshape(big[tensor.name].shape), big[tensor.name])


def test_packed_model_is_unpacked_once_and_checked_again(tmp_path: Path) -> None:
    path = tiny_artifact(tmp_path / "art.edgetok")
    with Artifact.open(path) as art:
        model = art.model_path()
        assert model.is_relative_to(tmp_path / "cache")
        before = model.stat().st_mtime_ns
        assert art.model_path().stat().st_mtime_ns == before
        (model.parent / "model.onnx.data").write_bytes(bytes(1024))  # damaged in the cache
        assert (art.model_path().parent / "model.onnx.data").read_bytes() == WEIGHT.tobytes()


# --- checked when opened


@pytest.mark.parametrize("form", FORMS)
def test_a_flipped_byte_in_any_file_is_named(form: str, tmp_path: Path) -> None:
    good = tiny_artifact(tmp_path / form)
    with Artifact.open(good) as art:
        places = {name: art.read(name) for name in art.names()}
    assert set(places) == {"LICENSE", "golden.npz", "model.onnx", "model.onnx.data", "recipe.yaml"}
    for name, data in places.items():
        bad = tmp_path / "bad" / form
        shutil.rmtree(bad.parent, ignore_errors=True)
        bad.parent.mkdir()
        if good.is_dir():
            shutil.copytree(good, bad)
            target, at = bad / name, len(data) // 2
        else:
            shutil.copy(good, bad)
            target, at = bad, good.read_bytes().index(data) + len(data) // 2
        raw = bytearray(target.read_bytes())
        raw[at] ^= 0x20
        target.write_bytes(raw)
        with pytest.raises(IntegrityError, match=name) as caught:
            Artifact.open(bad)
        assert caught.value.code == 9
        with pytest.raises(IntegrityError):
            load_source(bad)


def test_unverified_artifact_warns_every_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tiny_artifact(tmp_path / "art")
    (path / "LICENSE").write_bytes(b"GPL\n")
    with Artifact.open(path, verify=False) as art:
        art.model_path()
        art.model_path()
    assert sum("hashes were not checked" in r.message for r in caplog.records) == 2


def test_later_minor_version_opens_and_keeps_its_hash(tmp_path: Path) -> None:
    path = tiny_artifact(tmp_path / "art")
    edit_manifest(path, lambda f: f.update(format="1.7", invented_later={"x": 1}))
    with Artifact.open(path) as art:
        assert art.manifest.format == "1.7"
    edit_manifest(path, lambda f: f.update(invented_later={"x": 2}), rehash=False)
    with pytest.raises(IntegrityError):
        Artifact.open(path)


def test_newer_major_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tiny_artifact(tmp_path / "art")
    edit_manifest(path, lambda f: f.update(format="2.0", files={"another": "form"}), rehash=False)
    with pytest.raises(UnsupportedError, match=r"format 2\.0") as caught:
        Artifact.open(path)
    assert "upgrade" in str(caught.value.next)


def test_what_is_no_artifact_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such artifact"):
        Artifact.open(tmp_path / "ghost")
    with pytest.raises(ArtifactError, match="not an artifact"):
        Artifact.open(tmp_path)


def test_verify_reports_every_problem(tmp_path: Path) -> None:
    from attacks.make import _rewrite

    path = tiny_artifact(tmp_path / "art")
    _rewrite(path, "golden.npz", write_npz({"0/in/z": np.zeros(1)}))
    _rewrite(path, "recipe.yaml", b"other: 1\n")
    report = verify_artifact(path)
    assert [p.where for p in report.problems] == ["golden.npz", "recipe.yaml"]
    assert not report.ok
    with pytest.raises(ArtifactError):
        report.raise_first()


# --- whole or not there


def test_existing_output_needs_force(tmp_path: Path) -> None:
    for form in FORMS:
        path = tiny_artifact(tmp_path / form)
        before = tree(path)
        with pytest.raises(InputError, match="exists already") as caught:
            write_artifact(path, tiny_content(recipe={"seed": 9}))
        assert caught.value.code == 2
        assert "--force" in str(caught.value.next)
        assert tree(path) == before
        with write_artifact(path, tiny_content(recipe={"seed": 9}), force=True) as art:
            assert art.recipe() == {"seed": 9}
    assert {p.name for p in tmp_path.iterdir()} == set(FORMS)


def test_force_never_touches_what_is_not_an_artifact(tmp_path: Path) -> None:
    holiday = tmp_path / "photos"
    holiday.mkdir()
    (holiday / "beach.jpg").write_bytes(b"jpg")
    art = tiny_artifact(tmp_path / "art")
    (art / "notes.txt").write_text("mine")
    for path, words in ((holiday, "not an artifact"), (art, "notes.txt")):
        for attempt in (
            lambda p=path: write_artifact(p, tiny_content(), force=True),
            lambda p=path: check_output(p, force=True),
        ):
            with pytest.raises(InputError, match=words):
                attempt()
    assert (holiday / "beach.jpg").read_bytes() == b"jpg"
    assert (art / "notes.txt").read_text() == "mine"
    plain = tmp_path / "file"
    plain.write_text("text")
    with pytest.raises(InputError, match="not of the form"):
        write_artifact(plain, tiny_content(), force=True)


def test_empty_folder_may_be_filled_with_force(tmp_path: Path) -> None:
    (tmp_path / "art").mkdir()
    write_artifact(tmp_path / "art", tiny_content(), force=True).close()


def test_failed_replacement_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for form in FORMS:
        path = tiny_artifact(tmp_path / form)
        before = tree(path)
        with pytest.raises(InputError):
            write_artifact(path, tiny_content(recipe={"x": float("nan")}), force=True)
        with monkeypatch.context() as patch:
            patch.setattr("edgetok.atomic.sync_tree", _disk_full)
            with pytest.raises(ResourceError, match="no space left") as caught:
                write_artifact(path, tiny_content(), force=True)
        assert caught.value.code == 8
        assert tree(path) == before
    assert {p.name for p in tmp_path.iterdir()} == set(FORMS)


def _disk_full(path: Path) -> None:
    raise OSError(28, "No space left on device", str(path))


SCRIPT = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    import edgetok.atomic, edgetok.artifact, edgetok.paths
    from attacks.make import tiny_content

    target, where, name = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    module, _, function = where.rpartition(".")
    def die(*args, **kwargs):
        os.kill(os.getpid(), name)
        signal.pause()
    left = [int(sys.argv[4])]
    holder = sys.modules[module]
    original = getattr(holder, function)
    def counted(*args, **kwargs):
        if left[0] == 0:
            die()
        left[0] -= 1
        return original(*args, **kwargs)
    setattr(holder, function, counted)
    edgetok.artifact.write_artifact(target, tiny_content(recipe={"seed": 9}), force=True)
    """
)


def _killed(target: Path, where: str, after: int = 0, name: int = signal.SIGKILL) -> int:
    """Write in another process that kills itself on entering the function ``where``; returns its exit status."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent)}
    command = [sys.executable, "-P", "-c", SCRIPT, str(target), where, str(int(name)), str(after)]
    return subprocess.run(command, env=env, timeout=120, check=False, stderr=subprocess.DEVNULL).returncode


PLACES = [
    ("edgetok.artifact.write_beneath", 2),  # in the middle of the files
    ("edgetok.atomic.sync_tree", 0),  # all written, none published
    ("edgetok.atomic._publish", 0),
    ("edgetok.atomic._remove", 0),  # published; the old one still lies aside
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("where", "after"), PLACES, ids=[p[0].rpartition(".")[2] for p in PLACES])
def test_killed_writer_leaves_the_old_or_the_new(where: str, after: int, form: str, tmp_path: Path) -> None:
    path = tiny_artifact(tmp_path / form)
    assert _killed(path, where, after) == -signal.SIGKILL
    with Artifact.open(path) as art:
        assert art.recipe() in ({"precision": "keep"}, {"seed": 9})
    write_artifact(path, tiny_content(), force=True).close()  # the next run cleans up
    assert {p.name for p in tmp_path.iterdir()} == {form}


@pytest.mark.parametrize("form", FORMS)
def test_killed_first_writer_leaves_no_artifact(form: str, tmp_path: Path) -> None:
    path = tmp_path / form
    assert _killed(path, "edgetok.atomic.sync_tree") == -signal.SIGKILL
    assert not path.exists()
    tiny_artifact(path)
    assert {p.name for p in tmp_path.iterdir()} == {form}


def test_killed_between_the_two_renames_puts_the_old_one_back(tmp_path: Path) -> None:
    path = tiny_artifact(tmp_path / "art")
    assert _killed(path, "os.rename", 1) == -signal.SIGKILL
    assert not path.exists()  # the one moment when neither has the name
    with Artifact.open(path) as art:  # opening recovers
        assert art.recipe() == {"precision": "keep"}


def test_terminated_writer_cleans_up_itself(tmp_path: Path) -> None:
    path = tmp_path / "art"
    assert _killed(path, "edgetok.atomic.sync_tree", name=signal.SIGTERM) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_living_writer_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "art"
    with staging(target, folder=True, replace=False) as temp:
        tiny_artifact(tmp_path / "other")
        check_output(target)
        assert temp.is_dir()
        (temp / "file").write_text("x")
    assert (target / "file").read_text() == "x"


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    target = tmp_path / "art"

    def second_while_first() -> None:
        with staging(target, folder=True, replace=False) as temp:
            tiny_artifact(target)
            (temp / "file").write_text("x")

    with pytest.raises(InputError, match="exists already"):
        second_while_first()
    assert verify_artifact(target).ok
    assert {p.name for p in tmp_path.iterdir()} == {"art"}


def test_read_only_folder_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "art"))

    monkeypatch.setattr("edgetok.atomic.Path.mkdir", refuse)
    with pytest.raises(InputError, match="permission denied"):
        write_artifact(tmp_path / "art", tiny_content())


# --- small readers and writers underneath


def test_npz_roundtrip_and_numpy_reads_it(rng: np.random.Generator, tmp_path: Path) -> None:
    arrays = {
        "a/b c": rng.standard_normal((2, 3)),
        "scalar": np.float32(3.0)[()] * np.ones(()),
        "empty": np.zeros((0, 4), np.int64),
        "fortran": np.asfortranarray(rng.standard_normal((4, 5))),
        "text": np.array(["x", "yz"]),
        "flags": np.array([True, False]),
    }
    data = write_npz(arrays)
    assert data == write_npz(arrays)
    (tmp_path / "x.npz").write_bytes(data)
    theirs = np.load(tmp_path / "x.npz", allow_pickle=False)
    for name, array in arrays.items():
        for got in (read_npz(data, where="x")[name], theirs[name]):
            assert got.dtype == array.dtype
            np.testing.assert_array_equal(got, array)
    compressed = tmp_path / "y.npz"
    np.savez_compressed(compressed, **{"k": arrays["fortran"]})
    np.testing.assert_array_equal(read_npz(compressed.read_bytes(), where="y")["k"], arrays["fortran"])


def test_yaml_of_plain_values_survives() -> None:
    value = {"reduce": "tome", "list": [1, 2.5, None, True], "deep": {"a": {"b": "ü: #"}}}
    assert load_yaml(dump_yaml(value), where="x") == value


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_loading_keeps_the_weights_on_the_disk(where: str, tmp_path: Path) -> None:
    path = save(tmp_path, tiny_model() if where == "inside" else external_model(tmp_path))
    source = load_source(path)
    tensor = source.model.graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), WEIGHT)
    assert source.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert not tensor.numpy().flags.writeable


def test_source_hash_is_the_files_own_or_covers_the_external_data(tmp_path: Path) -> None:
    path = save(tmp_path, tiny_model())
    assert load_source(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    path = save(tmp_path, external_model(tmp_path))
    first = load_source(path).sha256
    (tmp_path / "weights.bin").write_bytes(bytes(1024))
    assert load_source(path).sha256 != first


def test_companions_travel_with_the_model(tmp_path: Path) -> None:
    path = save(tmp_path, tiny_model())
    (tmp_path / "LICENSE").write_text("MIT")
    (tmp_path / "config.json").write_text('{"a": 1}')
    (tmp_path / "tokenizer.json").write_text("not json")
    (tmp_path / "NOTICE").symlink_to("/etc/hostname")
    (tmp_path / "private.txt").write_text("mine")
    source = load_source(path)
    assert source.files == {"LICENSE": b"MIT", "config.json": b'{"a": 1}'}
    assert source.config == {"a": 1}
    assert source.producer == "make"


def test_unsorted_nodes_are_sorted(tmp_path: Path) -> None:
    model = tiny_model()
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    assert [n.op_type for n in load_source(save(tmp_path, model)).model.graph][-1] == "Add"


def test_bytes_for_a_runtime_never_point_outside(tmp_path: Path) -> None:
    model = external_model(tmp_path, location="model.onnx.data", write=False)
    node = model.graph.node[2]
    tensor = node.attribute[0].t
    tensor.CopyFrom(model.graph.initializer[0])
    tensor.name, tensor.dims[:] = "", [16]
    tensor.external_data[2].value = "64"
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(WEIGHT, "w"))
    content = tiny_content(model=ir.serde.deserialize_model(tiny_model()))
    path = tmp_path / "art"
    write_artifact(path, content).close()
    from attacks.make import _rewrite

    _rewrite(path, "model.onnx", model.SerializeToString())
    with Artifact.open(path) as art, pytest.raises(ArtifactError, match="inside nodes"):
        art.model_bytes()
    assert load_source(path).model.graph.num_nodes() == 4  # a reader that checks the extents may take it
