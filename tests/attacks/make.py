"""Write one broken file per rule of the loaders (long because every rule has its case here and nowhere else).

``python tests/attacks/make.py FOLDER`` writes them all, each in a folder of its own, to look at or to feed to another
reader; the tests build them in a temporary folder. Each case says which exit code the rule has and words its sentence
must hold.
"""

from __future__ import annotations

import io
import json
import os
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from edgetok.archive import write_archive
from edgetok.artifact import ArtifactContent, GoldenCase, SourceInfo, write_artifact
from edgetok.manifest import content_sha256


@dataclass(frozen=True)
class Case:
    """A broken file: how to make it, the exit code it must give, words that must be in the sentence."""

    name: str
    build: Callable[[Path], Path]
    code: int
    words: tuple[str, ...]


CASES: list[Case] = []


def case(name: str, *words: str, code: int = 3) -> Callable[[Callable[[Path], Path]], Callable[[Path], Path]]:
    def register(build: Callable[[Path], Path]) -> Callable[[Path], Path]:
        CASES.append(Case(name, build, code, words))
        return build

    return register


WEIGHT = np.arange(256, dtype=np.float32).reshape(16, 16)  # 1,024 bytes: the least that goes to a file of its own


def tiny_model() -> onnx.ModelProto:
    """y = relu(x @ w) + c: one initializer, one constant attribute, one function-free graph."""
    constant = helper.make_node(
        "Constant", [], ["c"], name="constant", value=helper.make_tensor("", T.FLOAT, [16], [1] * 16)
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="matmul"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        constant,
        helper.make_node("Add", ["r", "c"], ["y"], name="add"),
    ]
    values = [helper.make_tensor_value_info(n, T.FLOAT, ["batch", 16]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "tiny", values[:1], values[1:], [numpy_helper.from_array(WEIGHT, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10, producer_name="make")
    helper.set_model_props(model, {"author": "nobody"})
    return model


def external_model(
    folder: Path, *, location: str = "weights.bin", write: bool = True, **entries: str
) -> onnx.ModelProto:
    """The same with ``w`` outside; ``entries`` replace or add external data entries ("" removes one)."""
    model = tiny_model()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = T.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": "1024", **entries}.items():
        if value:
            tensor.external_data.add(key=key, value=value)
    if write:
        (folder / "weights.bin").write_bytes(WEIGHT.tobytes())
    return model


def save(folder: Path, model: onnx.ModelProto | bytes) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path


def changed(name: str, *words: str, code: int = 3) -> Callable[[Callable[[onnx.ModelProto], None]], None]:
    """A case that is the tiny model with one thing changed."""

    def register(change: Callable[[onnx.ModelProto], None]) -> None:
        def build(folder: Path) -> Path:
            model = tiny_model()
            change(model)
            return save(folder, model)

        CASES.append(Case(name, build, code, words))

    return register


def external(name: str, *words: str, **entries: str) -> None:
    """A case that is the model with external data, with these entries."""
    CASES.append(Case(name, lambda folder: save(folder, external_model(folder, **entries)), 3, words))


# --- the file as a whole


@case("empty_file", "empty")
def _(folder: Path) -> Path:
    return save(folder, b"")


@case("text_instead_of_model", "not an ONNX model")
def _(folder: Path) -> Path:
    return save(folder, b"<html>404 not found</html>")


@case("cut_short", "cut short")
def _(folder: Path) -> Path:
    return save(folder, tiny_model().SerializeToString()[:-40])


@case("length_beyond_the_end", "declares", "are left")
def _(folder: Path) -> Path:
    return save(folder, b"\x3a\xff\xff\xff\xff\x0f" + b"\0" * 32)


@case("endless_number", "bad number")
def _(folder: Path) -> Path:
    return save(folder, b"\x08" + b"\xff" * 40)


@case("groups_of_old_protobuf", "unknown field type")
def _(folder: Path) -> Path:
    return save(folder, b"\x0b" * 50)


@case("no_graph", "no graph")
def _(folder: Path) -> Path:
    return save(folder, onnx.ModelProto(ir_version=10).SerializeToString())


@changed("ir_version_missing", "IR version")
def _(model: onnx.ModelProto) -> None:
    model.ir_version = 0


@changed("training_graph", "training graph", code=4)
def _(model: onnx.ModelProto) -> None:
    model.training_info.add()


# --- tensors


@changed("dims_larger_than_data", "need 65,536 bytes", "holds 1,024", "'w'")
def _(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [128, 128]


@changed("dims_smaller_than_data", "need 36 bytes", "holds 1,024")
def _(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [3, 3]


@changed("dim_negative", "negative length -4")
def _(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [-4, -4]


@changed("dims_wrap_around", "outside 0..")
def _(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [1 << 30, 1 << 30, 1 << 30]


@changed("dims_wrap_hidden_by_zero", "outside 0..")
def _(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [1 << 30, 1 << 30, 1 << 30, 0]
    model.graph.initializer[0].ClearField("raw_data")


@changed("dim_over_limit", "over the limit", "dim")
def _(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [1 << 40]


@changed("rank_nine", "axes", "over the limit of 8")
def _(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [4, 4, 1, 1, 1, 1, 1, 1, 1]


@changed("value_of_rank_nine", "axes", "over the limit of 8")
def _(model: onnx.ModelProto) -> None:
    model.graph.value_info.append(helper.make_tensor_value_info("h", T.FLOAT, [1] * 9))


@changed("value_with_negative_dim", "negative length")
def _(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = -1


@changed("data_type_unknown", "unknown data type 99")
def _(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = 99


@changed("data_type_of_input_unknown", "unknown data type")
def _(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = 77


@changed("data_twice", "twice", "raw_data")
def _(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].float_data.extend([0.0] * 16)


@changed("data_in_wrong_field", "cannot be in int64_data")
def _(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].ClearField("raw_data")
    model.graph.initializer[0].int64_data.extend([0] * 16)


@changed("too_few_values", "need 256 values", "holds 3")
def _(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].ClearField("raw_data")
    model.graph.initializer[0].float_data.extend([0.0] * 3)


@changed("too_few_strings", "strings")
def _(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].ClearField("raw_data")
    model.graph.initializer[0].data_type = T.STRING


@changed("tensor_without_data", "holds 0")
def _(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].ClearField("raw_data")


@changed("tensor_in_segments", "segments")
def _(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].segment.begin = 0


@changed("constant_larger_than_data", "'constant'", "holds 16")
def _(model: onnx.ModelProto) -> None:
    model.graph.node[2].attribute[0].t.dims[:] = [1 << 20]


@changed("sparse_weights", "sparse", code=4)
def _(model: onnx.ModelProto) -> None:
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(helper.make_tensor("s", T.FLOAT, [1], [1.0]))
    sparse.indices.CopyFrom(helper.make_tensor("", T.INT64, [1], [1 << 40]))
    sparse.dims.append(1 << 50)


# --- names and strings


@changed("name_too_long", "length of the node's name", "over the limit")
def _(model: onnx.ModelProto) -> None:
    model.graph.node[0].name = "n" * 5000


@changed("name_with_nul", "NUL")
def _(model: onnx.ModelProto) -> None:
    model.graph.node[0].name = "a\0b"


@changed("string_too_long", "documentation of the model", "over the limit")
def _(model: onnx.ModelProto) -> None:
    model.doc_string = "d" * (2 << 20)


@changed("initializer_twice", "'w'", "twice")
def _(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(model.graph.initializer[0])


@changed("value_defined_twice", "'h'", "defined twice")
def _(model: onnx.ModelProto) -> None:
    model.graph.node[1].output[0] = "h"


@changed("input_twice", "graph input 'x'", "twice")
def _(model: onnx.ModelProto) -> None:
    model.graph.input.append(model.graph.input[0])


@changed("attribute_twice", "attribute 'value'", "twice")
def _(model: onnx.ModelProto) -> None:
    model.graph.node[2].attribute.append(model.graph.node[2].attribute[0])


@changed("metadata_key_twice", "'author'", "twice")
def _(model: onnx.ModelProto) -> None:
    model.metadata_props.append(model.metadata_props[0])


@changed("opset_twice", "imported twice")
def _(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("ai.onnx", 18))


@changed("function_twice", "function", "defined twice")
def _(model: onnx.ModelProto) -> None:
    function = helper.make_function(
        "local", "f", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], [helper.make_opsetid("", 18)]
    )
    model.functions.extend([function, function])


# --- the graph


@changed("input_from_nowhere", "'ghost'", "computed by no node")
def _(model: onnx.ModelProto) -> None:
    model.graph.node[1].input[0] = "ghost"


@changed("output_from_nowhere", "'ghost'", "computed by no node")
def _(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "ghost"


@changed("cycle", "has a cycle")
def _(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "r"


@changed("subgraphs_too_deep", "subgraphs inside each other")
def _(model: onnx.ModelProto) -> None:
    inner = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])], "leaf", [], [helper.make_tensor_value_info("z", T.FLOAT, [])]
    )
    for level in range(10):
        name = f"z{level}"
        node = helper.make_node("If", ["x"], [name], then_branch=inner, else_branch=inner) if level < 3 else (
            helper.make_node("If", ["x"], [name], then_branch=inner)
        )  # fmt: skip
        inner = helper.make_graph([node], f"g{level}", [], [helper.make_tensor_value_info(name, T.FLOAT, [])])
    model.graph.node.append(helper.make_node("If", ["x"], ["deep"], then_branch=inner))


@changed("axis_out_of_range", "axis 1000000")
def _(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Softmax", ["y"], ["s"], axis=1_000_000))


@changed("permutation_out_of_range", "axis -9")
def _(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Transpose", ["y"], ["s"], perm=[0, -9]))


@changed("attribute_of_two_types", "does not allow")
def _(model: onnx.ModelProto) -> None:
    model.graph.node[2].attribute[0].ints.extend([1, 2, 3])


@changed("attribute_type_unknown", "unknown attribute type")
def _(model: onnx.ModelProto) -> None:
    model.graph.node[2].attribute[0].type = 0


@changed("attribute_not_in_schema", "does not fit its operator's definition")
def _(model: onnx.ModelProto) -> None:
    model.graph.node[1].attribute.append(helper.make_attribute("evil", 1))


@changed("too_many_inputs", "does not fit its operator's definition")
def _(model: onnx.ModelProto) -> None:
    model.graph.node[1].input.extend(["x", "x"])


# --- operator sets


@changed("opset_from_the_future", "newer than", code=4)
def _(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 9999


@changed("ir_version_from_the_future", "newer than", code=4)
def _(model: onnx.ModelProto) -> None:
    model.ir_version = 1 << 40


@changed("opset_of_own_domain_too_large", "has version")
def _(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("own", 1 << 40))


@case("name_not_utf8", "not UTF-8")
def _(folder: Path) -> Path:
    return save(folder, tiny_model().SerializeToString().replace(b"matmul", b"mat\xff\xfel"))


@case("operator_not_utf8", "not UTF-8")
def _(folder: Path) -> Path:
    return save(folder, tiny_model().SerializeToString().replace(b"Relu", b"Re\xff\xfe"))


@case("external_not_utf8", "not UTF-8")
def _(folder: Path) -> Path:
    return save(folder, external_model(folder).SerializeToString().replace(b"weights.bin", b"weights\xff\xfein"))


@changed("opset_negative", "version -1")
def _(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = -1


@changed("opset_missing", "does not import operator set")
def _(model: onnx.ModelProto) -> None:
    del model.opset_import[:]


@changed("custom_operator", "library of custom operators", "evil::Run", code=4)
def _(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("evil", 1))
    model.graph.node.append(helper.make_node("Run", ["y"], ["s"], domain="evil"))


@changed("operator_unknown", "operator Frobnicate", code=4)
def _(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Frobnicate", ["y"], ["s"]))


# --- external data


external("external_parent_folder", "leaves the folder", location="../weights.bin")
external("external_hidden_parent", "leaves the folder", location="a/../../weights.bin")
external("external_absolute", "must be relative", location="/etc/passwd")
external("external_backslash", "forbidden character", location="..\\weights.bin")
external("external_nul", "forbidden character", location="weights.bin\0.txt")
external("external_no_location", "without a location", location="")
external("external_missing", "is not there", location="nothing.bin")
external("external_offset_beyond_end", "needs bytes 32 to 1,056", "holds 1,024", offset="32")
external("external_offset_wraps", "outside 0..", offset=str((1 << 63) - 8))
external("external_offset_negative", "not a whole number", offset="-64")
external("external_offset_not_a_number", "not a whole number", offset="0x10")
external("external_length_wrong", "need 1,024 bytes", "declares 32", length="32")
external("external_to_end_wrong", "needs bytes 8 to 1,032", offset="8", length="")
external("external_key_unknown", "unknown external data key", basepath="/")
external("external_name_too_long", "over the limit", location="a" * 300)
external("external_too_many_folders", "over the limit", location="a/" * 20 + "w")


@case("external_is_folder", "not a plain file")
def _(folder: Path) -> Path:
    (folder / "weights.bin").mkdir()
    return save(folder, external_model(folder, write=False))


@case("external_key_twice", "given twice")
def _(folder: Path) -> Path:
    model = external_model(folder)
    model.graph.initializer[0].external_data.add(key="offset", value="0")
    return save(folder, model)


@case("external_and_inside", "also holds data inside")
def _(folder: Path) -> Path:
    model = external_model(folder)
    model.graph.initializer[0].raw_data = WEIGHT.tobytes()
    return save(folder, model)


@case("external_not_marked", "not marked as external")
def _(folder: Path) -> Path:
    model = external_model(folder)
    model.graph.initializer[0].data_location = T.DEFAULT
    return save(folder, model)


@case("external_symlink", "symbolic link")
def _(folder: Path) -> Path:
    (folder / "secret").write_bytes(WEIGHT.tobytes())
    (folder / "link.bin").symlink_to("secret")
    return save(folder, external_model(folder, location="link.bin", write=False))


@case("external_symlinked_folder", "link")
def _(folder: Path) -> Path:
    (folder / "real").mkdir()
    (folder / "real" / "w.bin").write_bytes(WEIGHT.tobytes())
    (folder / "sub").symlink_to("real")
    return save(folder, external_model(folder, location="sub/w.bin", write=False))


@case("external_hard_link", "hard links")
def _(folder: Path) -> Path:
    (folder / "secret").write_bytes(WEIGHT.tobytes())
    os.link(folder / "secret", folder / "weights.bin")
    return save(folder, external_model(folder, write=False))


@case("external_named_pipe", "not a plain file")
def _(folder: Path) -> Path:
    os.mkfifo(folder / "weights.bin")
    return save(folder, external_model(folder, write=False))


@case("external_overlap", "overlaps that of 'v'")
def _(folder: Path) -> Path:
    model = external_model(folder)
    twin = model.graph.initializer.add()
    twin.CopyFrom(model.graph.initializer[0])
    twin.name = "v"
    model.graph.initializer[0].external_data[1].value = "1020"
    (folder / "weights.bin").write_bytes(bytes(4096))
    return save(folder, model)


@case("external_strings", "string_data")
def _(folder: Path) -> Path:
    model = external_model(folder)
    model.graph.initializer[0].data_type = T.STRING
    return save(folder, model)


# --- kinds of files never read


@case("pickle_pt", "pickle", "runs whatever code")
def _(folder: Path) -> Path:
    (folder / "model.pt").write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    return folder / "model.pt"


@case("folder_of_pickles", "pickle")
def _(folder: Path) -> Path:
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return folder


@case("gguf_decoder", "decoders come later", code=4)
def _(folder: Path) -> Path:
    (folder / "model.gguf").write_bytes(b"GGUF")
    return folder / "model.gguf"


# --- artifacts


def tiny_content(**changes: object) -> ArtifactContent:
    x = np.ones((1, 16), np.float32)
    settings: dict[str, object] = {
        "model": tiny_model(),
        "source": SourceInfo(name="tiny", kind="onnx", sha256="0" * 64, bytes=1),
        "recipe": {"precision": "keep"},
        "golden": [GoldenCase({"x": x}, {"y": np.maximum(x @ WEIGHT, 0) + 1})],
        "files": {"LICENSE": b"MIT\n"},
        "measured": {"ms": 1.0},
        "tools": {"edgetok": "test"},
        "external_from_bytes": 0,
        **changes,
    }
    return ArtifactContent(**settings)  # type: ignore[arg-type]


def tiny_artifact(path: Path, **changes: object) -> Path:
    write_artifact(path, tiny_content(**changes)).close()
    return path


def edit_manifest(folder: Path, change: Callable[[dict], None], *, rehash: bool = True) -> None:  # type: ignore[type-arg]
    """Change ``edgetok.json`` as an attacker would, its own hash made to fit."""
    path = folder / "edgetok.json"
    fields = json.loads(path.read_bytes())
    change(fields)
    if rehash:
        fields["content_sha256"] = content_sha256(fields)
    path.write_bytes(msgspec.json.encode(fields))


def manifest(name: str, *words: str, code: int = 3, rehash: bool = True) -> Callable[[Callable[[dict], None]], None]:  # type: ignore[type-arg]
    def register(change: Callable[[dict], None]) -> None:  # type: ignore[type-arg]
        def build(folder: Path) -> Path:
            path = tiny_artifact(folder / "art")
            edit_manifest(path, change, rehash=rehash)
            return path

        CASES.append(Case(name, build, code, words))

    return register


def folder_case(name: str, *words: str, code: int = 3) -> Callable[[Callable[[Path], None]], None]:
    def register(change: Callable[[Path], None]) -> None:
        def build(folder: Path) -> Path:
            path = tiny_artifact(folder / "art")
            change(path)
            return path

        CASES.append(Case(name, build, code, words))

    return register


@manifest("manifest_changed", "was changed", "content hash", code=9, rehash=False)
def _(fields: dict) -> None:  # type: ignore[type-arg]
    fields["preprocess"] = {"scale": 1.0}


@manifest("manifest_newer_major", "format 2.0", "opens every 1.x", code=4)
def _(fields: dict) -> None:  # type: ignore[type-arg]
    fields["format"] = "2.0"


@manifest("manifest_version_malformed", "MAJOR.MINOR")
def _(fields: dict) -> None:  # type: ignore[type-arg]
    fields["format"] = "latest"


@manifest("manifest_wrong_type", "not a valid edgetok.json")
def _(fields: dict) -> None:  # type: ignore[type-arg]
    fields["inputs"] = "x"


@manifest("manifest_without_files", "not listed")
def _(fields: dict) -> None:  # type: ignore[type-arg]
    del fields["files"]


@manifest("manifest_lists_parent", "leaves the folder")
def _(fields: dict) -> None:  # type: ignore[type-arg]
    fields["files"][0]["name"] = "../LICENSE"


@manifest("manifest_lists_absolute", "must be relative")
def _(fields: dict) -> None:  # type: ignore[type-arg]
    fields["files"][0]["name"] = "/etc/passwd"


@manifest("manifest_lists_itself", "cannot be listed")
def _(fields: dict) -> None:  # type: ignore[type-arg]
    fields["files"][0]["name"] = "edgetok.json"


@manifest("manifest_lists_twice", "listed twice")
def _(fields: dict) -> None:  # type: ignore[type-arg]
    fields["files"].append(fields["files"][0])


@manifest("manifest_hash_malformed", "64 hex digits")
def _(fields: dict) -> None:  # type: ignore[type-arg]
    fields["files"][0]["sha256"] = "00"


@manifest("manifest_size_negative", "negative")
def _(fields: dict) -> None:  # type: ignore[type-arg]
    fields["files"][0]["bytes"] = -1


@manifest("manifest_size_huge", "over the limit")
def _(fields: dict) -> None:  # type: ignore[type-arg]
    fields["files"][0]["bytes"] = 1 << 60


@manifest("manifest_lists_missing_file", "'ghost.txt' is missing")
def _(fields: dict) -> None:  # type: ignore[type-arg]
    fields["files"].append({"name": "ghost.txt", "sha256": "0" * 64, "bytes": 1})


@manifest("manifest_measured_elsewhere", "measured.json")
def _(fields: dict) -> None:  # type: ignore[type-arg]
    fields["measured"] = "../../secrets.json"


@folder_case("manifest_missing", "edgetok.json is missing")
def _(art: Path) -> None:
    (art / "edgetok.json").rename(art / "edgetok.txt")


@folder_case("manifest_not_json", "not a valid edgetok.json")
def _(art: Path) -> None:
    (art / "edgetok.json").write_bytes(b"{" + b'"format":"1.0",' * 2)


@folder_case("manifest_nested", "inside each other")
def _(art: Path) -> None:
    (art / "edgetok.json").write_bytes(b"[" * 100_000)


@folder_case("manifest_too_large", "over the limit", "manifest")
def _(art: Path) -> None:
    (art / "edgetok.json").write_bytes(b" " * (5 << 20))


@folder_case("artifact_unknown_file", "'evil.so' is not listed")
def _(art: Path) -> None:
    (art / "evil.so").write_bytes(b"\x7fELF")


@folder_case("artifact_symlink", "link")
def _(art: Path) -> None:
    (art / "LICENSE").unlink()
    (art / "LICENSE").symlink_to("/etc/hostname")


@folder_case("artifact_hard_link", "hard links")
def _(art: Path) -> None:
    os.link(art / "model.onnx.data", art.parent / "elsewhere")


@folder_case("artifact_file_cut_short", "the manifest says", code=9)
def _(art: Path) -> None:
    data = (art / "model.onnx").read_bytes()
    (art / "model.onnx").write_bytes(data[:-1])


@folder_case("artifact_weights_changed", "'model.onnx.data' was changed", code=9)
def _(art: Path) -> None:
    data = bytearray((art / "model.onnx.data").read_bytes())
    data[5] ^= 1
    (art / "model.onnx.data").write_bytes(data)


def _rewrite(art: Path, name: str, data: bytes) -> None:
    """Replace a file and make every hash fit: what someone who signs nothing can do."""
    import hashlib

    (art / name).write_bytes(data)

    def change(fields: dict) -> None:  # type: ignore[type-arg]
        for entry in fields["files"]:
            if entry["name"] == name:
                entry.update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))

    edit_manifest(art, change)


@folder_case("artifact_model_points_outside", "leaves the folder")
def _(art: Path) -> None:
    _rewrite(art, "model.onnx", external_model(art, location="../weights.bin", write=False).SerializeToString())


@folder_case("artifact_model_points_to_unlisted", "is not in the artifact")
def _(art: Path) -> None:
    _rewrite(art, "model.onnx", external_model(art, location="other.bin", write=False).SerializeToString())


@folder_case("artifact_interface_changed", "not those the manifest lists")
def _(art: Path) -> None:
    model = tiny_model()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 7
    _rewrite(art, "model.onnx", model.SerializeToString())


@folder_case("golden_pickle", "type object is not read", "golden.npz")
def _(art: Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **{"0/in/x": np.array([{"a": 1}], dtype=object)})
    _rewrite(art, "golden.npz", buffer.getvalue())


@folder_case("golden_declares_more_than_there", "needs", "golden.npz")
def _(art: Path) -> None:
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": (1 << 30, 1 << 10)})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("0/in/x.npy", member.getvalue() + b"\0" * 64)
    _rewrite(art, "golden.npz", buffer.getvalue())


@folder_case("golden_compression_bomb", "when unpacked", "over the limit")
def _(art: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0/in/x.npy", b"\0" * 1000)
    raw = bytearray(buffer.getvalue())
    at = raw.index(b"PK\1\2")
    raw[at + 24 : at + 28] = struct.pack("<I", (1 << 32) - 2)  # declared size in the directory
    _rewrite(art, "golden.npz", bytes(raw))


@folder_case("golden_for_another_model", "does not fit the inputs")
def _(art: Path) -> None:
    from edgetok.npz import write_npz

    _rewrite(art, "golden.npz", write_npz({"0/in/z": np.zeros(1), "0/out/y": np.zeros(1)}))


@folder_case("recipe_alias_bomb", "aliases", "recipe.yaml")
def _(art: Path) -> None:
    lines = ["a: &a [x,x,x,x,x,x,x,x]"] + [
        f"{b}: &{b} [{','.join(['*' + a] * 8)}]" for a, b in zip("abcdef", "bcdefg", strict=True)
    ]
    _rewrite(art, "recipe.yaml", "\n".join(lines).encode())


@folder_case("recipe_python_tag", "not valid YAML")
def _(art: Path) -> None:
    _rewrite(art, "recipe.yaml", b"x: !!python/object/apply:os.system ['true']\n")


@folder_case("recipe_nested", "inside each other")
def _(art: Path) -> None:
    _rewrite(art, "recipe.yaml", b"[" * 1000)


# --- packed artifacts


def packed(name: str, *words: str, code: int = 3) -> Callable[[Callable[[bytes], bytes]], None]:
    def register(change: Callable[[bytes], bytes]) -> None:
        def build(folder: Path) -> Path:
            path = tiny_artifact(folder / "art.edgetok")
            path.write_bytes(change(path.read_bytes()))
            return path

        CASES.append(Case(name, build, code, words))

    return register


def _members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {i.filename: archive.read(i) for i in archive.infolist()}


def _directory(data: bytes) -> int:
    """Offset of the first directory entry."""
    return int(struct.unpack_from("<I", data, len(data) - 6)[0])


def _repacked(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    write_archive(buffer, members)
    return buffer.getvalue()


@packed("archive_empty", "not an .edgetok file")
def _(data: bytes) -> bytes:
    return b""


@packed("archive_cut_short", "cut short")
def _(data: bytes) -> bytes:
    return data[:-10]


@packed("archive_text", "not an .edgetok file")
def _(data: bytes) -> bytes:
    return b"hello" * 100


@packed("archive_with_prefix", "does not fit")
def _(data: bytes) -> bytes:
    return b"#!/bin/sh\n" + bytes(54) + data


@packed("archive_with_comment", "not an .edgetok file")
def _(data: bytes) -> bytes:
    return data[:-2] + struct.pack("<H", 30) + b"x" * 30


@packed("archive_two_ends", "does not fit")
def _(data: bytes) -> bytes:
    return data[:-2] + struct.pack("<H", 22) + b"PK\5\6" + bytes(18)


@packed("archive_in_parts", "in parts")
def _(data: bytes) -> bytes:
    return data[:-18] + struct.pack("<H", 1) + data[-16:]


@packed("archive_too_many_members", "over the limit")
def _(data: bytes) -> bytes:
    return data[:-14] + struct.pack("<HH", 65535, 65535) + data[-10:]


@packed("archive_compressed", "compressed")
def _(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in _members(data).items():
            archive.writestr(name, content)
    return buffer.getvalue()


@packed("archive_member_outside", "leaves the folder")
def _(data: bytes) -> bytes:
    return _repacked({**_members(data), "../../evil": b"x"})


@packed("archive_member_absolute", "must be relative")
def _(data: bytes) -> bytes:
    return _repacked({**_members(data), "/etc/evil": b"x"})


@packed("archive_member_twice", "twice")
def _(data: bytes) -> bytes:
    return _repacked({**_members(data), "license": b"x"})


@packed("archive_unlisted_member", "not listed")
def _(data: bytes) -> bytes:
    return _repacked({**_members(data), "evil.so": b"x"})


@packed("archive_symlink", "not a plain file")
def _(data: bytes) -> bytes:
    at = _directory(data)
    return data[: at + 38] + struct.pack("<I", 0o120777 << 16) + data[at + 42 :]


@packed("archive_encrypted", "flags")
def _(data: bytes) -> bytes:
    at = _directory(data)
    return data[: at + 8] + struct.pack("<H", 1) + data[at + 10 :]


@packed("archive_headers_disagree", "differently")
def _(data: bytes) -> bytes:
    return data[:30] + b"E" + data[31:]


@packed("archive_unaligned", "multiple of 64")
def _(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in _members(data).items():
            archive.writestr(name, content)
    return buffer.getvalue()


@packed("archive_overlap", "overlaps")
def _(data: bytes) -> bytes:
    first = _directory(data)
    second = data.index(b"PK\1\2", first + 4)
    return data[: second + 42] + data[first + 42 : first + 46] + data[second + 46 :]


@packed("archive_weights_changed", "was changed", code=9)
def _(data: bytes) -> bytes:
    at = data.index(WEIGHT.tobytes())
    return data[: at + 7] + b"\x55" + data[at + 8 :]


def main() -> None:
    """Write every case below the folder named on the command line."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python tests/attacks/make.py FOLDER")
    for item in CASES:
        folder = Path(sys.argv[1], item.name)
        folder.mkdir(parents=True)
        item.build(folder)
        print(f"{item.name}: exit {item.code}: {', '.join(item.words)}")


if __name__ == "__main__":
    main()
