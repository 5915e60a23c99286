"""Every exit code, reached by the real command; and what a conversion leaves behind when it is killed."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import IO

import onnx
import pytest
from command import VIT, edgetok, start
from onnx import TensorProto, helper

from edgetok.errors import EXIT_CODES

REACHED: set[int] = set()
# The tiny model runs in 0.1 ms: the gate on speed would judge the call, not the model.
PLAIN = ["--precision", "keep", "--require-speedup", "0", "-d", "cpu", "-t", "1"]
SHAPE = ["--shape", "pixel_values=1x3x32x32"]


def reach(code: int, *arguments: object, **settings: object) -> str:
    """Run, expect this code, and a sentence about it; returns stderr."""
    done = edgetok(*arguments, **settings)  # type: ignore[arg-type]
    assert done.code == code, done.out + done.err
    if code:
        assert done.err.startswith("error ") or "\nerror " in done.err
        assert "Traceback" not in done.err
    REACHED.add(code)
    return done.err


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "vit"
    reach(0, "convert", VIT, "-o", path, *SHAPE, *PLAIN)
    return path


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(artifact, tmp_path / "copy"))


def small_model(path: Path, nodes: list[onnx.NodeProto], opsets: list[onnx.OperatorSetIdProto] | None = None) -> Path:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
    graph = helper.make_graph(nodes, "small", [x], [y])
    model = helper.make_model(graph, opset_imports=opsets or [helper.make_opsetid("", 18)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def test_0_fine(artifact: Path) -> None:
    reach(0, "verify", artifact, "-d", "cpu")
    reach(0, "inspect", artifact)


def test_1_a_defect_of_ours() -> None:
    assert "-vv" in reach(1, "devices", env={"EDGETOK_FAULT": "internal"})


def test_2_an_existing_output_without_force(artifact: Path) -> None:
    assert "--force" in reach(2, "convert", VIT, "-o", artifact, *SHAPE, *PLAIN)


def test_2_int8_without_calibration_names_the_flag(tmp_path: Path) -> None:
    assert "--calib" in reach(2, "convert", VIT, "-o", tmp_path / "o", "--precision", "int8", *SHAPE)


@pytest.mark.parametrize("verb", [["convert"], ["inspect"], ["run", "--random"], ["bench"]])
def test_3_a_file_that_is_no_model(verb: list[str], tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(VIT.read_bytes()[:5000])
    reach(3, *verb[:1], broken, *verb[1:])


def test_3_a_damaged_manifest(copy: Path) -> None:
    (copy / "edgetok.json").write_text("{")
    reach(3, "verify", copy)


def test_4_an_operator_nobody_knows(tmp_path: Path) -> None:
    node = helper.make_node("Frobnicate", ["x"], ["y"], domain="example.com")
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("example.com", 1)]
    reach(4, "convert", small_model(tmp_path / "m.onnx", [node], opsets), "-o", tmp_path / "o", *PLAIN)


def test_4_a_reduction_of_a_model_without_attention(tmp_path: Path) -> None:
    model = small_model(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])])
    reach(4, "convert", model, "-o", tmp_path / "o", "--reduce", "tome:r=1", *PLAIN)


def test_5_answers_that_differ(tmp_path: Path) -> None:
    output = tmp_path / "o"
    reach(5, "convert", VIT, "-o", output, *SHAPE, *PLAIN, "--precision", "int8-dynamic", "--cosine", "1")
    assert list(tmp_path.iterdir()) == []


def test_6_not_fast_enough(tmp_path: Path) -> None:
    reach(6, "convert", VIT, "-o", tmp_path / "o", *SHAPE, *PLAIN, "--require-speedup", "1000")
    assert list(tmp_path.iterdir()) == []


def test_6_too_large(tmp_path: Path) -> None:
    reach(6, "convert", VIT, "-o", tmp_path / "o", *SHAPE, *PLAIN, "--max-bytes", "1kB")


def test_7_a_device_that_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "openvino").mkdir()
    (tmp_path / "openvino" / "__init__.py").write_text("raise ImportError('not installed')")
    import os

    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    reach(7, "run", VIT, "--random", *SHAPE, "-d", "openvino", env={"PYTHONPATH": path})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_8_no_space() -> None:
    with open("/dev/full", "w") as full:
        reach(8, "models", stdout=full.fileno())


@pytest.mark.skipif(sys.platform != "linux", reason="address-space limits are enforced by Linux")
def test_8_not_enough_memory() -> None:
    reach(8, "inspect", VIT, "--memory", "1kB")


def test_9_a_changed_file(copy: Path) -> None:
    model = copy / "model.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    reach(9, "verify", copy)


def test_9_another_source(artifact: Path) -> None:
    reach(9, "verify", artifact, "--source", VIT.with_name("vit_hf_dynamo23_eager_static.onnx"), "--no-replay")


def test_10_a_recipe_that_gives_other_bytes(artifact: Path, tmp_path: Path) -> None:
    """The artifact says it was made without clean-up, which is not how its graph was made."""
    import msgspec

    from edgetok.artifact import Artifact, ArtifactContent, write_artifact

    with Artifact.open(artifact) as made:
        recipe = {**made.recipe(), "cleanup": False}
        content = ArtifactContent(
            model=made.read("model.onnx"),
            source=made.manifest.source,
            recipe=recipe,
            golden=made.golden(),
            agreement=made.manifest.agreement,
            precision=msgspec.structs.replace(made.manifest).precision,
        )
        write_artifact(tmp_path / "other", content).close()
    assert "model.onnx" in reach(10, "verify", tmp_path / "other", "--reproduce", VIT, "-d", "cpu", "-t", 1)


def test_0_a_recipe_that_gives_the_same_bytes(artifact: Path) -> None:
    reach(0, "verify", artifact, "--reproduce", VIT, "-d", "cpu", "-t", 1)


def wait_for(stream: IO[str] | None, word: str) -> None:
    """Read lines until one begins with ``word``: the process is where it should be, however slow the machine."""
    for line in stream or ():
        if line.startswith(word):
            return
    raise AssertionError(f"the process ended before it said {word!r}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_130_interrupted(number: signal.Signals) -> None:
    """Ctrl-C, or a polite kill, in the middle of a bench."""
    process = start("bench", VIT, *SHAPE, "--rounds", 1_000_000, "--max-seconds", 200, "--no-memory", "-d", "cpu")
    wait_for(process.stderr, "single-stream")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert "Traceback" not in err
    REACHED.add(130)


def _convert(output: Path) -> list[object]:
    return ["convert", VIT, "-o", output, *SHAPE, *PLAIN, "--precision", "int8-dynamic", "--cosine", "0.5"]


def test_a_killed_convert_leaves_no_partial_artifact(tmp_path: Path) -> None:
    """SIGKILL at moments all through a conversion: the output is whole or not there, and the next one cleans up."""
    before = time.monotonic()
    reach(0, *_convert(tmp_path / "whole"))
    took = time.monotonic() - before
    output = tmp_path / "killed" / "out"
    for share in (0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95):
        process = start(*_convert(output), env={"TMPDIR": str(tmp_path)})
        time.sleep(share * took)
        process.kill()
        process.communicate(timeout=30)
        if output.exists():
            assert edgetok("verify", output, "--no-replay").code == 0
            break
    reach(0, *_convert(output), "--force")
    assert [p.name for p in output.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_convert_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    output = tmp_path / "here" / "out"
    process = start(*_convert(output))
    wait_for(process.stdout, "graph")
    process.send_signal(number)
    process.communicate(timeout=60)
    left = [p.name for p in output.parent.iterdir()] if output.parent.exists() else []
    assert left in ([], ["out"])
    assert process.returncode == (0 if left else 130)


def test_every_exit_code_was_reached(request: pytest.FixtureRequest) -> None:
    """Last in this file: fails when a code of the table has no test."""
    ran = sum(1 for item in request.session.items if item.path == request.path)
    if ran < 20:
        pytest.skip("only some tests of this file were run")
    assert {*EXIT_CODES} == REACHED
