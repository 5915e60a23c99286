"""Every registered device keeps the contract of ``devices/base.py`` and agrees with the numpy reference."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from edgetok.devices import BACKENDS
from edgetok.devices._host import physical_cores, thread_count
from edgetok.devices.base import Availability, Backend, Executable, Options
from edgetok.errors import ArtifactError, BackendError, EdgeTokError, InputError, UnsupportedError

_spec = importlib.util.spec_from_file_location("device_cases", Path(__file__).parent / "device_cases.py")
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules["device_cases"] = _module
_spec.loader.exec_module(_module)
CASES = {case.name: case for case in _module.cases()}

REQUIRED = ("cpu_ort", "reference")  # need only required dependencies, so nothing excuses them
STATIC_ONLY = ("tvm",)  # fixes open axes when it compiles
ONE_THREAD = Options(threads=1)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What devices keep in the user cache goes to a folder of this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGETOK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(params=BACKENDS.names())
def device(request: pytest.FixtureRequest) -> Backend:
    return available(request.param)


def available(name: str) -> Backend:
    backend: Backend = BACKENDS.get(name)
    found = backend.probe()
    if not found.ok:
        assert name not in REQUIRED, found.reason
        pytest.skip(f"{name}: {found.reason}")
    return backend


def linear(rows: int | str = "batch", k: int = 8, n: int = 4, repeat: int = 1) -> bytes:
    """x [rows, k] times W, ``repeat`` times (k == n then), plus a second output y + 1."""
    rng = np.random.default_rng(0)
    names = ["x", *(f"h{i}" for i in range(repeat - 1)), "y"]
    weights = [
        numpy_helper.from_array(rng.standard_normal((k, n)).astype(np.float32) / np.sqrt(k).astype(np.float32), "w")
    ]
    weights.append(numpy_helper.from_array(np.float32(1), "one"))
    nodes = [helper.make_node("MatMul", [a, "w"], [b], name=f"mm_{b}") for a, b in itertools.pairwise(names)]
    nodes.append(helper.make_node("Add", ["y", "one"], ["z"], name="plus_one"))
    ins = [helper.make_tensor_value_info("x", T.FLOAT, [rows, k])]
    outs = [helper.make_tensor_value_info(o, T.FLOAT, [rows, n]) for o in ("y", "z")]
    graph = helper.make_graph(nodes, "linear", ins, outs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def x_of(rows: int, k: int = 8, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, k)).astype(np.float32)


def compiled(device: Backend, model: bytes | Path, options: Options = ONE_THREAD) -> Executable:
    return device.compile(model, options)


# --- agreement with the reference -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_device_agrees_with_the_reference(device: Backend, name: str) -> None:
    case = CASES[name]
    required = device.name in REQUIRED
    if not all(device.supports(n) for n in case.nodes):
        assert not required, f"{device.name} must support {name}"
        pytest.skip(f"{device.name} does not claim {[n.op_type for n in case.nodes]}")
    model = case.model().SerializeToString()
    try:
        executable = compiled(device, model)
    except UnsupportedError as exc:
        if required:
            raise
        pytest.skip(f"{device.name} refuses: {exc.message}")
    got = executable.run(case.feeds)
    want = BACKENDS.get("reference").compile(model, ONE_THREAD).run(case.feeds)
    assert list(got) == list(want)
    for key, expected in want.items():
        assert got[key].dtype == expected.dtype, key
        assert got[key].shape == expected.shape, key
        difference = np.abs(got[key].astype(np.float64) - expected.astype(np.float64)).max(initial=0.0)
        assert difference <= case.atol, f"{key} differs by {difference}"


def test_reference_matches_hand_made_numbers() -> None:
    """The judge itself: ties, duplicates and saturation on values computed by hand."""
    reference = BACKENDS.get("reference")

    def once(node: onnx.NodeProto, **feeds: np.ndarray) -> np.ndarray:
        case = _module.Case("hand", [node], feeds)
        return next(iter(reference.compile(case.model().SerializeToString(), ONE_THREAD).run(feeds).values()))

    scatter = _module.node("ScatterElements", "x i u", axis=0, reduction="add")
    got = once(scatter, x=np.zeros(3, np.float32), i=np.array([0, 0, 2]), u=np.array([1, 2, 4], np.float32))
    assert got.tolist() == [3, 0, 4]
    quantize = _module.node("QuantizeLinear", "x s z")
    x = np.array([-1e30, 0.5, 1.5, 2.5, 1e30], np.float32)
    assert once(quantize, x=x, s=np.float32(1), z=np.uint8(0)).tolist() == [0, 0, 2, 2, 255]
    per_row = _module.node("MatMulInteger", "a b za")
    got = once(
        per_row, a=np.array([[3, 3], [3, 3]], np.uint8), b=np.eye(2, dtype=np.int8), za=np.array([1, 2], np.uint8)
    )
    assert got.tolist() == [[2, 2], [1, 1]]


# --- probe, supports --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS.names())
def test_probe_answers_with_a_reason_and_never_raises(name: str) -> None:
    found = BACKENDS.get(name).probe()
    assert isinstance(found, Availability)
    assert found.reason
    assert "\n" not in found.reason
    assert found.version if found.ok else found.fix


@pytest.mark.parametrize("name", BACKENDS.names())
def test_device_is_called_as_its_file(name: str) -> None:
    assert BACKENDS.get(name).name == name


@pytest.mark.parametrize(("name", "module"), [("openvino", "openvino"), ("tvm", "tvm")])
def test_missing_extra_is_an_answer_with_the_command_to_install(
    name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name not in BACKENDS.names():
        pytest.skip(f"no device {name} in this build")
    monkeypatch.setitem(sys.modules, module, None)  # import raises ImportError
    backend = BACKENDS.get(name)
    found = backend.probe()
    assert not found.ok
    assert found.fix == f'pip install "edgetok[{name}]"'
    with pytest.raises(BackendError, match="not installed"):
        backend.compile(linear(), ONE_THREAD)


def test_supports_says_no_to_what_is_not_an_operator(device: Backend) -> None:
    assert device.supports(helper.make_node("MatMul", ["a", "b"], ["c"]))
    assert not device.supports(helper.make_node("NoSuchOperator", ["a"], ["b"]))
    assert not device.supports(helper.make_node("MatMul", ["a", "b"], ["c"], domain="no.such.domain"))


# --- compile ----------------------------------------------------------------------------------------------------------


def test_unknown_operator_is_an_error_that_names_the_node(device: Backend) -> None:
    bad = helper.make_node("Mystery", ["x"], ["y"], name="block3/mystery", domain="com.example")
    graph = helper.make_graph(
        [bad],
        "g",
        [helper.make_tensor_value_info("x", T.FLOAT, [2])],
        [helper.make_tensor_value_info("y", T.FLOAT, [2])],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.example", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    with pytest.raises(UnsupportedError, match="Mystery") as caught:
        compiled(device, model.SerializeToString())
    assert "block3/mystery" in str(caught.value)
    assert caught.value.next


@pytest.mark.parametrize("junk", [b"", b"\x00" * 64, b"not a model at all", b"\x08\x09" + b"\xff" * 40])
def test_bytes_that_are_no_model_are_rejected(device: Backend, junk: bytes) -> None:
    with pytest.raises(ArtifactError):
        compiled(device, junk)


def test_missing_file_is_an_input_error(device: Backend, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model file"):
        compiled(device, tmp_path / "gone.onnx")


def test_unknown_setting_is_refused(device: Backend) -> None:
    with pytest.raises(InputError, match="no setting"):
        compiled(device, linear(2), Options(extra=(("no_such_setting", "1"),)))


def test_negative_threads_are_refused(device: Backend) -> None:
    if device.name == "reference":
        pytest.skip("numpy decides on its threads itself")
    with pytest.raises(InputError, match="threads"):
        compiled(device, linear(2), Options(threads=-1))


def external_model(folder: Path, location: str = "weights.bin") -> Path:
    """y = x W with W [64, 64] in a file of its own."""
    model = onnx.load_model_from_string(linear(2, 64, 64))
    path = folder / "model.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="weights.bin", size_threshold=1024)
    if location != "weights.bin":
        model = onnx.load(str(path), load_external_data=False)
        model.graph.initializer[0].external_data[0].value = location
        path.write_bytes(model.SerializeToString())
    return path


def test_external_data_beside_the_file_is_used(device: Backend, tmp_path: Path) -> None:
    x = x_of(2, 64)
    got = compiled(device, external_model(tmp_path)).run({"x": x})
    want = BACKENDS.get("reference").compile(linear(2, 64, 64), ONE_THREAD).run({"x": x})
    np.testing.assert_allclose(got["y"], want["y"], atol=1e-5)


def test_bytes_with_external_data_are_refused(device: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even when a file of that name lies in the current folder."""
    content = external_model(tmp_path).read_bytes()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match="external data"):
        compiled(device, content)


def test_external_data_outside_the_folder_is_refused(device: Backend, tmp_path: Path) -> None:
    inner = tmp_path / "model"
    inner.mkdir()
    path = external_model(inner, "../weights.bin")
    (inner / "weights.bin").rename(tmp_path / "weights.bin")
    with pytest.raises(EdgeTokError):
        compiled(device, path)


# --- run --------------------------------------------------------------------------------------------------------------


def test_specs_tell_names_dtypes_and_shapes(device: Backend) -> None:
    executable = compiled(device, linear())
    (only,) = executable.inputs
    assert (only.name, only.dtype) == ("x", "float32")
    assert only.shape is not None
    assert only.shape[1] == 8
    assert [o.name for o in executable.outputs] == ["y", "z"]


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_open_batch_axis_takes_any_size(device: Backend, rows: int) -> None:
    if device.name in STATIC_ONLY:
        pytest.skip(f"{device.name} fixes the batch when it compiles")
    executable = compiled(device, linear())
    assert executable.run({"x": x_of(rows)})["y"].shape == (rows, 4)


def test_outputs_come_in_the_order_asked_for(device: Backend) -> None:
    executable = compiled(device, linear(2))
    x = x_of(2)
    assert list(executable.run({"x": x})) == ["y", "z"]
    assert list(executable.run({"x": x}, ["z", "y"])) == ["z", "y"]
    assert list(executable.run({"x": x}, ["z"])) == ["z"]


def test_outputs_of_two_runs_do_not_share_memory(device: Backend) -> None:
    executable = compiled(device, linear(2))
    first = executable.run({"x": x_of(2, seed=1)})["y"]
    before = first.copy()
    second = executable.run({"x": x_of(2, seed=2)})["y"]
    assert not np.shares_memory(first, second)
    np.testing.assert_array_equal(first, before)


def test_inputs_are_left_as_they_were_and_need_not_be_contiguous(device: Backend) -> None:
    executable = compiled(device, linear(2))
    x = np.asfortranarray(x_of(2))
    assert not x.flags.c_contiguous
    before = x.copy()
    x.flags.writeable = False
    got = executable.run({"x": x})["y"]
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(got, executable.run({"x": np.ascontiguousarray(before)})["y"])


class OnlyDlpack:
    """Any framework's tensor: nothing but the DLPack protocol."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


def test_dlpack_tensors_are_accepted(device: Backend) -> None:
    executable = compiled(device, linear(2))
    x = x_of(2)
    np.testing.assert_array_equal(executable.run({"x": OnlyDlpack(x)})["y"], executable.run({"x": x})["y"])  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("feeds", "words"),
    [
        ({}, "missing"),
        ({"x": x_of(2), "extra": x_of(2)}, "unknown input 'extra'"),
        ({"x": x_of(2).astype(np.float64)}, "expected dtype float32, got float64"),
        ({"x": x_of(2)[0]}, "expected 2 axes"),
        ({"x": x_of(2, 9)}, "axis 1 must be 8"),
        ({"x": [[1.0] * 8] * 2}, "numpy array"),
        ({"x": None}, "numpy array"),
    ],
    ids=["missing", "unknown", "dtype", "rank", "shape", "list", "none"],
)
def test_wrong_inputs_are_refused_in_words(device: Backend, feeds: dict[str, Any], words: str) -> None:
    executable = compiled(device, linear(2))
    with pytest.raises(InputError, match=words):
        executable.run(feeds)
    assert executable.run({"x": x_of(2)})["y"].shape == (2, 4)  # and the session lives on


def test_axes_of_one_name_must_agree(device: Backend) -> None:
    if device.name in STATIC_ONLY:
        pytest.skip(f"{device.name} fixes open axes when it compiles")
    ins = [helper.make_tensor_value_info(n, T.FLOAT, ["batch", 3]) for n in "ab"]
    graph = helper.make_graph(
        [helper.make_node("Add", ["a", "b"], ["c"])],
        "g",
        ins,
        [helper.make_tensor_value_info("c", T.FLOAT, ["batch", 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    executable = compiled(device, model.SerializeToString())
    with pytest.raises(InputError, match="'batch'"):
        executable.run({"a": x_of(2, 3), "b": x_of(1, 3)})


def test_unknown_output_is_refused(device: Backend) -> None:
    with pytest.raises(InputError, match="unknown output 'q'"):
        compiled(device, linear(2)).run({"x": x_of(2)}, ["q"])


def test_closed_session_refuses_to_run_and_closes_twice(device: Backend) -> None:
    executable = compiled(device, linear(2))
    executable.close()
    executable.close()
    with pytest.raises(InputError, match="closed"):
        executable.run({"x": x_of(2)})


def test_eight_threads_on_one_session_get_the_answers_of_one(device: Backend) -> None:
    executable = compiled(device, linear(4, 64, 64, repeat=4))
    batches = [x_of(4, 64, seed=s) for s in range(8)]
    alone = [executable.run({"x": x})["y"] for x in batches]

    def work(index: int) -> bool:
        return all(np.array_equal(executable.run({"x": batches[index]})["y"], alone[index]) for _ in range(20))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_python_threads_progress_during_a_run(device: Backend) -> None:
    """The GIL is free while the device computes: another thread counts in the middle half of a run."""
    size, repeat = (256, 4) if device.name in STATIC_ONLY else (1024, 24)
    executable = compiled(device, linear(size, size, size, repeat=repeat))
    x = x_of(size, size)
    executable.run({"x": x})
    span: list[float] = []

    def work() -> None:
        span.append(time.perf_counter())
        executable.run({"x": x})
        span.append(time.perf_counter())

    ticks: list[float] = []
    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.0005)
    thread.join()
    start, end = span
    quarter = (end - start) / 4
    assert sum(start + quarter < t < end - quarter for t in ticks) > 0


# --- placement, stats, host -------------------------------------------------------------------------------------------


def test_placement_counts_every_node_and_stats_tell_compile_time(device: Backend) -> None:
    executable = compiled(device, linear(2))
    executable.run({"x": x_of(2)})
    placement = executable.placement()
    assert sum(placement.nodes.values()) >= 1
    assert sum(placement.nodes.values()) == sum(placement.ops.values())
    assert executable.stats().compile_seconds > 0


def test_profile_gives_time_by_node() -> None:
    executable = BACKENDS.get("cpu_ort").compile(linear(2), Options(threads=1, profile=True))
    for _ in range(3):
        executable.run({"x": x_of(2)})
    times = executable.stats().node_us
    assert "mm_y" in " ".join(times)
    assert all(us >= 0 for us in times.values())
    executable.close()


def test_cpu_ort_counts_fused_nodes_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "linear.onnx"
    path.write_bytes(linear(2))
    fused = BACKENDS.get("cpu_ort").compile(path, ONE_THREAD).placement()
    plain = BACKENDS.get("cpu_ort").compile(path, Options(threads=1, optimize=False)).placement()
    assert set(fused.nodes) == {"CPUExecutionProvider"}
    assert plain.ops == {"MatMul": 1, "Add": 1}
    assert sum(fused.ops.values()) <= sum(plain.ops.values())


def test_cpu_ort_has_no_node_for_a_type_without_kernel_and_says_so() -> None:
    """Strict: onnxruntime has no bfloat16 MatMul on the CPU, and nothing else may take the node."""
    nodes = [
        helper.make_node("Cast", ["x"], ["b"], to=T.BFLOAT16),
        helper.make_node("MatMul", ["b", "b"], ["m"], name="block0/mlp"),
        helper.make_node("Cast", ["m"], ["y"], to=T.FLOAT),
    ]
    info = [helper.make_tensor_value_info(n, T.FLOAT, [4, 4]) for n in "xy"]
    model = helper.make_model(
        helper.make_graph(nodes, "g", info[:1], info[1:]), opset_imports=[helper.make_opsetid("", 18)], ir_version=9
    )
    with pytest.raises(UnsupportedError, match=r"MatMul\(13\) \(node 'block0/mlp'\)"):
        BACKENDS.get("cpu_ort").compile(model.SerializeToString(), ONE_THREAD)


def test_openvino_keeps_float32_unless_asked_for_less() -> None:
    backend = available("openvino")
    x = x_of(4, 256)
    model = linear(4, 256, 256)
    want = BACKENDS.get("reference").compile(model, ONE_THREAD).run({"x": x})["y"]
    plain = backend.compile(model, ONE_THREAD).run({"x": x})["y"]
    np.testing.assert_allclose(plain, want, atol=2e-5)
    half = backend.compile(model, Options(threads=1, extra=(("INFERENCE_PRECISION_HINT", "bf16"),))).run({"x": x})["y"]
    np.testing.assert_allclose(half, want, atol=5e-2)  # 8 bits of mantissa over sums of 256


def test_zero_threads_mean_physical_cores() -> None:
    assert thread_count(0) == physical_cores() >= 1
    assert thread_count(3) == 3
