"""Structure-aware fuzzing: whatever is done to a valid file, a loader loads it or raises an error of ours.

``EDGETOK_FUZZ_SECONDS`` is the time for all targets together (a few seconds by default, a minute in CI); time and
memory of one load are bounded too. A failure prints its seed and the mutations that led to it.
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from attacks.make import edit_manifest, external_model, save, tiny_artifact, tiny_model
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from onnx import helper

from edgetok.artifact import verify_artifact
from edgetok.converters.sources.loader import load_source
from edgetok.errors import EdgeTokError, InternalError
from edgetok.manifest import load_yaml
from edgetok.npz import read_npz

TARGETS = 5
SECONDS = float(os.environ.get("EDGETOK_FUZZ_SECONDS", "6")) / TARGETS
SLOWEST_LOAD_SECONDS = 20.0  # a load of a kilobyte file takes milliseconds; this only catches hangs
MEMORY_BYTES = 1 << 30
fuzz = settings(
    max_examples=50,
    deadline=None,
    database=None,
    phases=(Phase.generate,),  # a failure prints its seed; shrinking is left to a run by hand
    suppress_health_check=list(HealthCheck),
)

NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 7, 8, 9, 127, 255, 256, 2**15, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63)]),
    st.integers(-(2**63), 2**63 - 1),
)
TEXTS = st.one_of(
    st.sampled_from(
        ["", ".", "..", "../x", "/etc/passwd", "w", "x", "h", "y", "\0", "a" * 5000, "weights.bin", "evil"]
    ),
    st.sampled_from(["-1", "0", "1", "64", "1024", "18446744073709551615", "9223372036854775807", "0x10", " 4", "1e3"]),
    st.text(max_size=12),
)


def run(target: Callable[[st.DataObject], None], seconds: float = SECONDS) -> None:
    """Feed ``target`` with drawn data, a batch per seed, until the time is up."""
    end, batch = time.monotonic() + seconds, int(os.environ.get("EDGETOK_FUZZ_SEED", "0"))
    while time.monotonic() < end:
        print(f"EDGETOK_FUZZ_SEED={batch}")
        seed(batch)(fuzz(given(st.data())(target)))()
        batch += 1


def load(path: Path) -> None:
    """Load as the commands do; only errors of ours, and not the one that stands for a defect, may come out."""
    begin = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        source = load_source(path)
        for value in source.model.graph.initializers.values():
            if value.const_value is not None:
                value.const_value.numpy()
        if path.suffix != ".onnx":
            verify_artifact(path)
    except InternalError:
        raise
    except EdgeTokError:
        pass
    assert time.monotonic() - begin < SLOWEST_LOAD_SECONDS
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MEMORY_BYTES, f"one load took {grown:,} bytes"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def messages(message: Message) -> list[Message]:
    """The message and every one inside it."""
    found = [message]
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for child in value if isinstance(value, (list, tuple)) or hasattr(value, "add") else [value]:
                found += messages(child)
    return found


def mutate(data: st.DataObject, message: Message) -> None:
    """Change one field of one message inside ``message``: a number, a string, a copy, a removal."""
    inside = messages(message)
    target = inside[data.draw(st.integers(0, len(inside) - 1))]
    fields = list(target.DESCRIPTOR.fields)
    field = fields[data.draw(st.integers(0, len(fields) - 1))]
    repeated = hasattr(getattr(target, field.name), "append") or hasattr(getattr(target, field.name), "add")
    how = data.draw(st.sampled_from(["set", "set", "clear", "twice"]))
    try:
        if how == "clear":
            target.ClearField(field.name)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            values = getattr(target, field.name)
            if not repeated:
                values.SetInParent()
            elif len(values) and how == "twice":
                values.add().CopyFrom(values[data.draw(st.integers(0, len(values) - 1))])
            elif len(values):
                del values[data.draw(st.integers(0, len(values) - 1))]
            else:
                values.add()
        else:
            value = scalar(data, field)
            if not repeated:
                setattr(target, field.name, value)
            elif len(getattr(target, field.name)) and how == "set":
                values = getattr(target, field.name)
                values[data.draw(st.integers(0, len(values) - 1))] = value
            else:
                getattr(target, field.name).append(value)
    except (ValueError, TypeError, UnicodeError):
        return  # the library does not let such a message exist; bytes are mutated elsewhere


def scalar(data: st.DataObject, field: FieldDescriptor) -> object:
    if field.type == FieldDescriptor.TYPE_STRING:
        return data.draw(TEXTS)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return data.draw(st.binary(max_size=80))
    if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return data.draw(st.floats())
    if field.type == FieldDescriptor.TYPE_ENUM:
        values = [v.number for v in field.enum_type.values]
        return data.draw(st.sampled_from(values))
    value = data.draw(NUMBERS)
    return value % 2**31 if field.type in (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_UINT32) else value


def rich_model() -> Message:
    """The tiny model with a function and a subgraph, so that their rules are fuzzed too."""
    model = tiny_model()
    relu = helper.make_node("Relu", ["a"], ["b"])
    model.functions.append(helper.make_function("local", "f", ["a"], ["b"], [relu], [helper.make_opsetid("", 18)]))
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.graph.node.append(helper.make_node("f", ["y"], ["s"], domain="local"))
    model.graph.node.append(helper.make_node("Softmax", ["y"], ["t"], axis=-1))
    inner = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])], "g", [], [helper.make_tensor_value_info("z", 1, None)]
    )
    model.graph.node.append(helper.make_node("If", ["x"], ["u"], then_branch=inner, else_branch=inner))
    return model


def test_fuzz_onnx_structure(folder: Path) -> None:
    def target(data: st.DataObject) -> None:
        model = rich_model() if data.draw(st.booleans()) else external_model(folder)
        for _ in range(data.draw(st.integers(1, 4))):
            mutate(data, model)
        load(save(folder, model.SerializeToString()))

    run(target)


def mutate_bytes(data: st.DataObject, raw: bytes) -> bytes:
    """Cut, flip, insert, repeat: a few times, anywhere."""
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(raw) - 1, 0)))
        how = data.draw(st.sampled_from(["cut", "flip", "insert", "repeat", "zero"]))
        if how == "cut":
            raw = raw[:at] + raw[at + data.draw(st.integers(1, 64)) :]
        elif how == "flip":
            raw = raw[:at] + bytes([raw[at] ^ 1 << data.draw(st.integers(0, 7))]) + raw[at + 1 :] if raw else raw
        elif how == "insert":
            raw = raw[:at] + data.draw(st.binary(max_size=10)) + raw[at:]
        elif how == "repeat":
            raw = raw[:at] + raw[at : at + 32] * data.draw(st.integers(2, 40)) + raw[at + 32 :]
        else:
            raw = raw[:at] + bytes(8) + raw[at + 8 :]
    return raw


def test_fuzz_onnx_bytes(folder: Path) -> None:
    good = rich_model().SerializeToString()
    run(lambda data: load(save(folder, mutate_bytes(data, good))))


def test_fuzz_manifest(folder: Path) -> None:
    art = tiny_artifact(folder / "art")
    good = (art / "edgetok.json").read_bytes()

    def target(data: st.DataObject) -> None:
        (art / "edgetok.json").write_bytes(good)
        if data.draw(st.booleans()):
            (art / "edgetok.json").write_bytes(mutate_bytes(data, good))
        else:
            edit_manifest(art, lambda fields: _mutate_json(data, fields), rehash=data.draw(st.booleans()))
        load(art)

    run(target)


def _mutate_json(data: st.DataObject, fields: dict) -> None:  # type: ignore[type-arg]
    def places(value: object) -> Iterator[tuple[object, object]]:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in list(items):
            yield value, key
            yield from places(item)

    protected = ("files", "content_sha256")  # the hash helper needs the list and its keys to be there
    found = [p for p in places(fields) if p[1] not in (*protected, "name", "sha256") and p[0] is not fields["files"]]
    for _ in range(data.draw(st.integers(1, 3))):
        holder, key = found[data.draw(st.integers(0, len(found) - 1))]
        value = data.draw(
            st.one_of(
                st.none(), st.booleans(), NUMBERS, st.floats(allow_nan=False, allow_infinity=False), TEXTS.filter(_utf8)
            )
        )
        holder[key] = data.draw(st.sampled_from([value, [value], {"a": value}]))  # type: ignore[index]


def _utf8(text: str) -> bool:
    try:
        return bool(text.encode() or True)
    except UnicodeEncodeError:
        return False


def test_fuzz_archive(folder: Path) -> None:
    path = tiny_artifact(folder / "art.edgetok")
    good = path.read_bytes()
    end = len(good) - 22
    directory = int.from_bytes(good[-6:-2], "little")

    def target(data: st.DataObject) -> None:
        raw = bytearray(good)
        if data.draw(st.booleans()):
            raw = bytearray(mutate_bytes(data, good))
        else:  # numbers of the directory and of the end record
            for _ in range(data.draw(st.integers(1, 3))):
                at = data.draw(st.integers(directory, end + 20))
                raw[at : at + 2] = data.draw(st.binary(min_size=2, max_size=2))
        path.write_bytes(raw)
        load(path)

    run(target)


def test_fuzz_golden_and_recipe(folder: Path) -> None:
    art = tiny_artifact(folder / "art2")
    golden, recipe = (art / "golden.npz").read_bytes(), b"a: {b: [1, 2], c: 'x'}\nd: |\n  text\n"

    def target(data: st.DataObject) -> None:
        for read, good in ((read_npz, golden), (load_yaml, recipe)):
            with suppress(EdgeTokError):
                read(mutate_bytes(data, good), where="fuzzed")

    run(target)


def test_starved_files_are_refused_at_every_length(folder: Path) -> None:
    """Cut after every byte: nothing but an error of ours, until the whole file loads."""
    for path in (save(folder, tiny_model()), tiny_artifact(folder / "short.edgetok")):
        good = path.read_bytes()
        for length in range(0, len(good), 1 if path.suffix == ".onnx" else 7):
            path.write_bytes(good[:length])
            load(path)
        path.write_bytes(good)
        assert load_source(path).model.graph.initializers
