"""Each limit admits exactly what it says: a file at the limit loads, one above is refused naming the limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import onnx
import pytest
from attacks.make import external_model, save, tiny_artifact, tiny_model
from onnx import TensorProto as T
from onnx import helper

from edgetok.artifact import Artifact
from edgetok.converters.sources.loader import load_source
from edgetok.errors import ArtifactError, InputError
from edgetok.limits import (
    DEFAULT,
    INT64_MAX,
    LoadLimits,
    checked_add,
    checked_cast,
    checked_mul,
    effective,
    packed_bytes,
    parse_limits,
)
from edgetok.onnx_scan import scan

HF = Path(__file__).resolve().parent.parent / "fixtures" / "hf" / "minilm"
Load = Callable[[Path, LoadLimits], object]


def _open(path: Path, limits: LoadLimits) -> None:
    with Artifact.open(path, limits=limits) as artifact:
        artifact.golden()
        artifact.recipe()


def _model(change: Callable[[onnx.ModelProto], None] = lambda _: None) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        model = tiny_model()
        change(model)
        return save(folder, model)

    return build


def _functions(model: onnx.ModelProto) -> None:
    for name in ("f", "g"):
        node = helper.make_node("Relu", ["a"], ["b"])
        model.functions.append(helper.make_function("local", name, ["a"], ["b"], [node], [helper.make_opsetid("", 18)]))


def _ints(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["k"], value_ints=list(range(10))))


def _nested(model: onnx.ModelProto) -> None:
    def graph(node: onnx.NodeProto) -> onnx.GraphProto:
        return helper.make_graph([node], "g", [], [helper.make_tensor_value_info(node.output[0], T.FLOAT, None)])

    inner = graph(helper.make_node("Identity", ["x"], ["z1"]))
    middle = graph(helper.make_node("If", ["x"], ["z2"], then_branch=inner, else_branch=inner))
    model.graph.node.append(helper.make_node("If", ["x"], ["z3"], then_branch=middle, else_branch=middle))


def _opset(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def _two_files(folder: Path) -> Path:
    model = external_model(folder)
    twin = model.graph.initializer.add()
    twin.CopyFrom(model.graph.initializer[0])
    twin.name, twin.external_data[0].value = "v", "other.bin"
    (folder / "other.bin").write_bytes(bytes(1024))
    return save(folder, model)


def _deep_file(folder: Path) -> Path:
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "w.bin").write_bytes(bytes(1024))
    return save(folder, external_model(folder, location="a/b/w.bin"))


def _size(name: str) -> Callable[[Path], int]:
    return lambda path: (path / name if path.is_dir() else path.parent / name).stat().st_size


def _artifact(**changes: object) -> Callable[[Path], Path]:
    return lambda folder: tiny_artifact(folder / "art", **changes)


def _fields_of(path: Path) -> int:
    return scan(path.read_bytes(), DEFAULT, where="").fields


# limit -> (build, what the file holds of it, how it is loaded)
TABLE: dict[str, tuple[Callable[[Path], Path], int | Callable[[Path], int], Load]] = {
    "model_bytes": (_model(), _size("model.onnx"), load_source),
    "file_bytes": (lambda f: save(f, external_model(f)), 1024, load_source),
    "total_bytes": (_model(), 1024 + 64, load_source),
    "external_files": (_two_files, 2, load_source),
    "fields": (_model(), _fields_of, load_source),
    "nodes": (_model(), 4, load_source),
    "tensors": (_model(), 2, load_source),
    "functions": (_model(_functions), 2, load_source),
    "values": (_model(), 2, load_source),
    "rank": (_model(), 2, load_source),
    "dim": (_model(), 16, load_source),
    "name_chars": (_model(lambda m: setattr(m.graph.node[0], "name", "n" * 50)), 50, load_source),
    "string_bytes": (_model(lambda m: setattr(m, "doc_string", "d" * 90)), 90, load_source),
    "entries": (_model(lambda m: helper.set_model_props(m, {str(i): "" for i in range(9)})), 9, load_source),
    "attribute_values": (_model(_ints), 10, load_source),
    "opset_imports": (_model(_opset), 2, load_source),
    "nesting": (_model(_nested), 2, load_source),
    "path_chars": (lambda f: save(f, external_model(f)), len("weights.bin"), load_source),
    "path_parts": (_deep_file, 3, load_source),
    "folder_files": (_artifact(), 7, _open),
    "manifest_bytes": (_artifact(), _size("edgetok.json"), _open),
    "json_nesting": (_artifact(recipe={"a": [[[[[[1]]]]]]}), 8, _open),
    "golden_bytes": (_artifact(), _size("golden.npz"), _open),
    "golden_arrays": (_artifact(), 2, _open),
    "text_bytes": (lambda _: HF, lambda p: max(f.stat().st_size for f in p.glob("*.json")), load_source),
    "header_bytes": (
        lambda _: HF,
        lambda p: int.from_bytes((p / "model.safetensors").read_bytes()[:8], "little"),
        load_source,
    ),
}


def test_every_limit_is_in_the_table() -> None:
    assert set(TABLE) == {f.name for f in fields(LoadLimits)}


@pytest.mark.parametrize("name", TABLE)
def test_limit_admits_exactly_what_it_says(name: str, tmp_path: Path) -> None:
    build, amount, load = TABLE[name]
    path = build(tmp_path)
    count = amount if isinstance(amount, int) else amount(path)
    load(path, DEFAULT.raised(**{name: count}))
    with pytest.raises(ArtifactError, match=name) as caught:
        load(path, DEFAULT.raised(**{name: count - 1}))
    assert f"{count:,}" in str(caught.value)
    assert f"{count - 1:,}" in str(caught.value)


def test_two_gib_graph_is_refused_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "huge.onnx"
    with path.open("wb") as stream:
        stream.truncate(1 << 31)  # a hole: nothing is written or read
    with pytest.raises(ArtifactError, match="2,147,483,648") as caught:
        load_source(path)
    assert "external data" in str(caught.value.next)


def test_small_file_that_asks_for_many_nodes_is_refused_before_parsing(tmp_path: Path) -> None:
    nodes = b"\x0a\x00" * 300_000  # each two bytes here, over a hundred in memory
    size = len(nodes)
    varint = bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14])
    with pytest.raises(ArtifactError, match="nodes in the model: 200,001"):
        load_source(save(tmp_path, b"\x08\x0a\x3a" + varint + nodes))


def test_environment_lowers_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = save(tmp_path, tiny_model())
    monkeypatch.setenv("EDGETOK_LIMITS", "nodes=3, total-bytes=5000")
    with pytest.raises(ArtifactError, match=r"4 is over the limit of 3 \(nodes\)"):
        load_source(path)
    assert effective(DEFAULT.raised(nodes=2)).nodes == 2


def test_environment_cannot_raise_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGETOK_LIMITS", "nodes=999999999")
    with pytest.raises(InputError, match="only lower"):
        effective()
    assert DEFAULT.raised(nodes=999_999_999).nodes == 999_999_999


@pytest.mark.parametrize("text", ["nodes", "nodes=-1", "nodes=1e9", "nodes=0x10", "ghost=1", "nodes=" + "9" * 30])
def test_limits_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        DEFAULT.lowered(parse_limits(text))


def test_limits_are_whole_numbers() -> None:
    for value in (-1, 1.5, True, 1 << 63):
        with pytest.raises(InputError):
            DEFAULT.raised(nodes=value)  # type: ignore[arg-type]


def test_checked_arithmetic_refuses_what_would_wrap() -> None:
    assert checked_mul(3, 4, 5, what="x") == 60
    assert checked_mul(what="x") == 1
    assert checked_mul(7, 0, 9, what="x") == 0
    assert checked_add(INT64_MAX - 1, 1, what="x") == INT64_MAX
    assert packed_bytes([3], 4, "x") == 2
    for wrong in (
        lambda: checked_mul(1 << 32, 1 << 31, what="x"),
        lambda: checked_mul(1 << 40, 1 << 40, 0, what="x"),
        lambda: checked_mul(-1, -1, what="x"),
        lambda: checked_add(INT64_MAX, 1, what="x"),
        lambda: checked_add(5, -1, what="x"),
        lambda: checked_cast(-1, "x"),
        lambda: packed_bytes([INT64_MAX], 8, "x"),
    ):
        with pytest.raises(ArtifactError, match="outside"):
            wrong()


def test_security_document_states_the_limits_as_they_are() -> None:
    text = (Path(__file__).resolve().parents[2] / "SECURITY.md").read_text("utf-8")
    for field in fields(LoadLimits):
        assert f"| `{field.name}` | {field.default:,} |" in text, field.name
