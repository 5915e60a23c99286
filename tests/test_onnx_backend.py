"""``edgetok.onnx_backend`` as a tool for ONNX backends uses it. The node tests proper are in tests/backend."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.backend.base
import pytest
from onnx import TensorProto as T
from onnx import helper

from edgetok import onnx_backend
from edgetok.errors import InputError


def subtract() -> onnx.ModelProto:
    """d = a - b and s = b - a."""
    info = {n: helper.make_tensor_value_info(n, T.FLOAT, [2]) for n in "abds"}
    nodes = [helper.make_node("Sub", ["a", "b"], ["d"]), helper.make_node("Sub", ["b", "a"], ["s"])]
    graph = helper.make_graph(nodes, "g", [info["a"], info["b"]], [info["d"], info["s"]])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


A, B = np.array([5, 7], np.float32), np.array([1, 2], np.float32)


@pytest.mark.parametrize("device", ["CPU", "CPU:0", "reference", "cpu-ort"])
def test_prepared_model_runs_on_lists_and_mappings(device: str) -> None:
    rep = onnx_backend.prepare(subtract(), device)
    assert isinstance(rep, onnx.backend.base.BackendRep)
    got = rep.run([A, B])
    assert got[0].tolist() == [4, 5]
    assert got["s"].tolist() == [-4, -5]
    assert rep.run({"b": B, "a": A}).d.tolist() == [4, 5]


def test_run_model_takes_one_value_for_one_input() -> None:
    info = [helper.make_tensor_value_info(n, T.FLOAT, [2]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", info[:1], info[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    assert onnx_backend.run_model(model, A)[0].tolist() == [-5, -7]


@pytest.mark.parametrize("device", ["reference", "cpu_ort"])
def test_run_node_finds_the_output_types_itself(device: str) -> None:
    node = helper.make_node("TopK", ["x", "k"], ["values", "places"], axis=0)
    values, places = onnx_backend.run_node(
        node, [np.array([3, 9, 5], np.float32), np.array([2])], device, opset_version=18
    )
    assert values.tolist() == [9, 5]
    assert places.tolist() == [1, 2]


def test_run_node_skips_inputs_left_out() -> None:
    node = helper.make_node("Clip", ["x", "", "high"], ["y"])
    got = onnx_backend.run_node(node, [A, np.float32(6)], opset_version=18)
    assert got[0].tolist() == [5, 6]


def test_keyword_goes_before_environment_and_environment_before_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert onnx_backend.EdgetokBackend.backend("CPU").name == "cpu_ort"
    monkeypatch.setenv("EDGETOK_ONNX_DEVICE", "reference")
    assert onnx_backend.EdgetokBackend.backend("CPU").name == "reference"
    assert onnx_backend.EdgetokBackend.backend("CPU", "cpu-ort").name == "cpu_ort"


def test_devices_are_answered_for_by_name() -> None:
    assert onnx_backend.supports_device("CPU")
    assert onnx_backend.supports_device("reference")
    assert not onnx_backend.supports_device("CUDA")
    assert not onnx_backend.supports_device("CUDA:1")


def test_unknown_device_and_wrong_number_of_inputs_are_refused() -> None:
    with pytest.raises(InputError, match="unknown device"):
        onnx_backend.prepare(subtract(), edgetok_device="abacus")
    with pytest.raises(InputError, match="2 inputs"):
        onnx_backend.prepare(subtract()).run([A])


def test_compatible_means_every_operator_is_claimed() -> None:
    assert onnx_backend.is_compatible(subtract())
    model = subtract()
    model.graph.node[0].op_type = "Mystery"
    assert not onnx_backend.is_compatible(model)
