"""The whole conversion on small exporter graphs: what is promised about answers, recipes, bytes and refusals."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgetok.artifact import Artifact
from edgetok.conversion import Conversion
from edgetok.converters.reduce import METHODS
from edgetok.converters.reduce.schedule import removed_share
from edgetok.demo_data import write_images
from edgetok.errors import BudgetError, GateError, InputError, UnsupportedError
from edgetok.gates import Limits
from edgetok.pipeline import ConvertOptions, convert, default_output, run_convert
from edgetok.progress import NullProgress, RecordProgress
from edgetok.recipe import Recipe, read_recipe, recipe_from
from edgetok.searching import choose
from edgetok.verifying import VerifyOptions, verify

EXPORTS = Path(__file__).parent / "fixtures" / "exports"
VIT = EXPORTS / "vit_hf_ts14_eager_dynamic.onnx"
DINO = EXPORTS / "dinov2_ts14_sdpa_dynamic.onnx"
T5 = EXPORTS / "t5_encoder_ts17_eager_dynamic.onnx"
MINILM = EXPORTS.parent / "hf" / "minilm"
BERT = EXPORTS / "bert_dynamo18_sdpa_dynseq.onnx"
SLOW_IS_FINE = Limits(speedup=0.0, cosine=-1.0)  # graphs this small gain nothing; speed is not what is tested


def feeds(model: Path, count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Random samples of batch 1 of the right shape."""
    rng = np.random.default_rng(seed)
    value = onnx.load(model).graph.input[0]
    shape = [d.dim_value or 1 for d in value.type.tensor_type.shape.dim]
    return [{value.name: rng.normal(size=(1, *shape[1:])).astype(np.float32)} for _ in range(count)]


def options(tmp_path: Path, **changes: object) -> ConvertOptions:
    base = ConvertOptions(
        source=VIT, output=tmp_path / "edge", calib=feeds(VIT, 24), limits=SLOW_IS_FINE, threads=1, timing_rounds=5
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def test_plain_conversion_gives_the_sources_answers(tmp_path: Path) -> None:
    report = run_convert(options(tmp_path))
    assert report.agreement["cosine"] > 1 - 1e-6  # float rounding of the cleaned graph
    with Artifact.open(tmp_path / "edge") as artifact:
        assert artifact.sha256 == report.sha256
        assert artifact.manifest.agreement
        assert len(artifact.golden()) == 2


def test_int8_and_reduction_are_reported_per_stage(tmp_path: Path) -> None:
    lines = RecordProgress()
    report = run_convert(options(tmp_path, reduce="tome:removed=0.2", precision="int8"), lines)
    data = report.to_json()
    assert data["precision"] == "int8"
    assert data["tokens"]["before"] > data["tokens"]["after"]
    assert {"from_graph", "from_tokens", "from_bits", "ci95"} <= set(data["speed"])
    assert [label for label, _, _ in lines.lines if label in ("reduce", "quantize", "speed", "wrote")]
    with Artifact.open(tmp_path / "edge") as artifact:
        assert [t.after for t in artifact.manifest.tokens] == data["tokens"]["per_layer"]
        assert artifact.recipe()["counts"] == data["reduce"]["counts"]


def test_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    settings = {"reduce": "tome:removed=0.2", "precision": "int8"}
    first = run_convert(options(tmp_path, output=tmp_path / "a", **settings))
    second = run_convert(options(tmp_path, output=tmp_path / "b", **settings))
    assert first.sha256 == second.sha256


def test_recipe_makes_the_same_artifact_again(tmp_path: Path) -> None:
    first = run_convert(options(tmp_path, output=tmp_path / "a", reduce="0.2", search_seconds=1.0))
    again = options(tmp_path, output=tmp_path / "b", recipe=tmp_path / "a" / "recipe.yaml")
    second = run_convert(again)
    assert second.sha256 == first.sha256


def test_nothing_asked_for_writes_the_sources_bytes(tmp_path: Path) -> None:
    run_convert(options(tmp_path, cleanup=False, reduce="0"))
    assert (tmp_path / "edge" / "model.onnx").read_bytes() == VIT.read_bytes()


def test_zero_reduction_is_the_graph_without_it(tmp_path: Path) -> None:
    run_convert(options(tmp_path, output=tmp_path / "a", reduce="tome:r=0"))
    run_convert(options(tmp_path, output=tmp_path / "b"))
    assert (tmp_path / "a" / "model.onnx").read_bytes() == (tmp_path / "b" / "model.onnx").read_bytes()


def test_wrong_answers_exit_5_and_write_nothing(tmp_path: Path) -> None:
    strict = Limits(cosine=1.0, speedup=0.0)
    with pytest.raises(GateError) as caught:
        run_convert(options(tmp_path, reduce="tome:removed=0.4", precision="int8", limits=strict))
    assert caught.value.code == 5
    assert "block" in str(caught.value.where)  # the layers at fault, with their share
    assert "%" in str(caught.value.where)
    assert caught.value.next
    assert not (tmp_path / "edge").exists()


def test_too_slow_exits_6_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(BudgetError) as caught:
        run_convert(options(tmp_path, limits=Limits(speedup=1e6, cosine=-1)))
    assert caught.value.code == 6
    assert not (tmp_path / "edge").exists()


def test_accuracy_is_reported_first_when_both_fail(tmp_path: Path) -> None:
    with pytest.raises(GateError):
        run_convert(options(tmp_path, reduce="tome:removed=0.4", limits=Limits(speedup=1e6, cosine=1.0)))


def test_size_limit(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="size"):
        run_convert(options(tmp_path, limits=replace(SLOW_IS_FINE, max_bytes=10)))


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    report = run_convert(options(tmp_path, dry_run=True, reduce="0.3"))
    assert report.artifact is None
    assert not (tmp_path / "edge").exists()


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"precision": "int8", "calib": None}, "--calib"),
        ({"reduce": "0.3", "calib": None}, "--calib"),
        ({"precision": "int3"}, "choose"),
        ({"reduce": "tomm:r=3"}, "did you mean"),
    ],
)
def test_bad_request_names_the_next_step(tmp_path: Path, changes: dict[str, object], hint: str) -> None:
    with pytest.raises(InputError) as caught:
        run_convert(options(tmp_path, **changes))
    assert hint in str(caught.value)


@pytest.mark.parametrize("name", ["llama_ts17_eager_static", "swin_ts17_eager_static", "t5_encoder_ts17_eager_dynamic"])
def test_unsuitable_architectures_are_refused_with_a_reason(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        run_convert(options(tmp_path, source=EXPORTS / f"{name}.onnx", calib=None, reduce="tome:removed=0.3"))
    assert caught.value.next
    assert "--reduce" in str(caught.value.next)


def test_existing_output_needs_force(tmp_path: Path) -> None:
    run_convert(options(tmp_path))
    with pytest.raises(InputError, match="exist"):
        run_convert(options(tmp_path))
    run_convert(options(tmp_path, force=True))


def conv_net(path: Path, batch: int | str, *, half: bool = False, labels: bool = False) -> Path:
    """A network without attention: convolution, mean, linear layer; logits [B, 10], or only their argmax."""
    rng = np.random.default_rng(0)
    kind, dtype = (TensorProto.FLOAT16, np.float16) if half else (TensorProto.FLOAT, np.float32)
    weights = {"W": (16, 3, 3, 3), "L": (16, 10)}
    nodes = [
        helper.make_node("Conv", ["x", "W"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["c"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("MatMul", ["f", "L"], ["logits"]),
    ]
    output = helper.make_tensor_value_info("logits", kind, [batch, 10])
    if labels:
        nodes.append(helper.make_node("ArgMax", ["logits"], ["label"], axis=1, keepdims=0))
        output = helper.make_tensor_value_info("label", TensorProto.INT64, [batch])
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", kind, [batch, 3, 8, 8])],
        [output],
        [numpy_helper.from_array(rng.normal(size=shape).astype(dtype), name) for name, shape in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("batch", ["N", 4])
def test_a_graph_of_any_batch_is_converted_and_judged(tmp_path: Path, batch: int | str) -> None:
    net = conv_net(tmp_path / "net.onnx", batch)
    samples = [{"x": np.full((1, 3, 8, 8), i, np.float32)} for i in range(9)]

    def half_right(run: Callable[..., Mapping[str, np.ndarray]]) -> tuple[float, list[float]]:
        rows = [len(run(sample)["logits"]) for sample in samples[:2]]
        assert rows == [1, 1]  # an evaluator gives single samples, whatever the graph's batch
        return 50.0, [0.0, 1.0]

    report = run_convert(options(tmp_path, source=net, calib=samples, eval=half_right))
    assert report.speed["batch"] == (1 if batch == "N" else 4)
    assert report.check["metric"] == "half_right"
    assert report.check["drop"] == 0.0


def test_too_few_samples_for_a_fixed_batch(tmp_path: Path) -> None:
    net = conv_net(tmp_path / "net.onnx", 4)
    with pytest.raises(InputError, match="batches of 4"):
        run_convert(options(tmp_path, source=net, calib=[{"x": np.zeros((1, 3, 8, 8), np.float32)}]))


def test_labels_alone_are_compared_too(tmp_path: Path) -> None:
    report = run_convert(options(tmp_path, source=conv_net(tmp_path / "n.onnx", "N", labels=True), calib=None))
    assert report.agreement == {"cosine": 1.0, "max_abs": 0.0, "output": "label"}


def test_images_become_the_inputs_type(tmp_path: Path) -> None:
    net = conv_net(tmp_path / "net.onnx", "N", half=True)
    write_images(tmp_path / "images", 3, side=8)
    run_convert(options(tmp_path, source=net, calib=tmp_path / "images", preprocess={"height": 8, "width": 8}))
    with Artifact.open(tmp_path / "edge") as artifact:
        assert artifact.golden()[0].inputs["x"].dtype == np.float16


def test_int8_of_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    samples = [{"x": np.ones((1, 3, 8, 8), np.float32)}] * 20
    with pytest.raises(UnsupportedError, match="int8"):
        run_convert(options(tmp_path, source=pool_net(tmp_path / "n.onnx"), calib=samples, precision="int8"))


def pool_net(path: Path) -> Path:
    """A network that holds no weight at all."""
    shape = ["N", 3, 8, 8]
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_feeds_without_an_input_say_which(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pixel_values"):
        run_convert(options(tmp_path, calib=[{"image": np.zeros((1, 3, 32, 32), np.float32)}]))


def test_external_data_converts_like_one_file(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "m.onnx"
    onnx.save(onnx.load(VIT), path, save_as_external_data=True, location="m.data", size_threshold=9)
    run_convert(options(tmp_path, output=tmp_path / "a", source=path))
    run_convert(options(tmp_path, output=tmp_path / "b"))
    assert (tmp_path / "a" / "model.onnx").read_bytes() == (tmp_path / "b" / "model.onnx").read_bytes()


def test_a_folder_with_one_graph_is_that_graph(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(VIT, tmp_path / "in")
    run_convert(options(tmp_path, source=tmp_path / "in", cleanup=False))
    assert (tmp_path / "edge" / "model.onnx").read_bytes() == VIT.read_bytes()


def test_an_artifact_is_a_source(tmp_path: Path) -> None:
    run_convert(options(tmp_path))
    report = run_convert(options(tmp_path, source=tmp_path / "edge", output=tmp_path / "again", precision="int8"))
    assert report.agreement["cosine"] > 0.98  # int8 of a random network of width 24
    with Artifact.open(tmp_path / "again") as artifact:
        assert artifact.manifest.source.kind == "artifact"


def test_a_reduction_asked_for_that_gains_nothing_exits_6(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="fewer tokens") as caught:  # 17 tokens: merging costs more than it saves
        run_convert(options(tmp_path, reduce="tome:r=1", limits=Limits(speedup=1e-6, cosine=-1)))
    assert "leave out --reduce" in str(caught.value.next)


def test_a_reduction_by_trial_that_gains_nothing_is_dropped_and_can_be_made_again(tmp_path: Path) -> None:
    heard = RecordProgress()
    first = run_convert(options(tmp_path, output=tmp_path / "a", reduce="0.2", search_seconds=0.5), heard)
    assert any("do not reduce this model" in text for _, text, _ in heard.lines)
    assert first.reduce["method"] is None
    assert first.tokens == {"before": 17, "after": 17, "removed": 0.0}
    second = run_convert(options(tmp_path, output=tmp_path / "b", recipe=tmp_path / "a" / "recipe.yaml"))
    assert second.sha256 == first.sha256


def test_accuracy_failure_of_a_named_method_says_how_much_less(tmp_path: Path) -> None:
    with pytest.raises(GateError) as caught:
        run_convert(options(tmp_path, reduce="tome:removed=0.4", limits=Limits(cosine=1.0, speedup=0.0)))
    assert "--reduce tome:removed=0." in str(caught.value.next)


@pytest.mark.parametrize("method", ["tome:r=2", "zero_tprune:removed=0.2"])
def test_outputs_cut_short_are_held_against_the_rows_that_were_kept(tmp_path: Path, method: str) -> None:
    report = run_convert(options(tmp_path, source=DINO, calib=None, reduce=method, outputs="reduced"))
    assert report.agreement["output"] == "last_hidden_state"
    assert 0.5 < report.agreement["cosine"] < 1
    assert verify(VerifyOptions(tmp_path / "edge", device="cpu", threads=1, source=DINO)).errors == []


def test_a_search_keeps_to_the_share_asked_for(tmp_path: Path) -> None:
    conversion = Conversion(options(tmp_path, reduce="0.6"), NullProgress(), tmp_path)
    for step in (conversion.load, conversion.clean, conversion.look, conversion.sample):
        step()
    trials = conversion.trials(conversion.model)
    found = choose(trials, conversion.finding, 0.6, seconds=1.0)
    # Removing only in the last block, where the class token has read all others, would agree perfectly.
    assert removed_share(found.counts, 17, where=METHODS.get(found.spec.method or "").where) > 0.5
    with pytest.raises(UnsupportedError, match="at most"):
        choose(trials, conversion.finding, 0.9, methods=["pitome"], seconds=0.2)


def test_hazards_are_gone_through_only_when_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        run_convert(options(tmp_path, source=T5, calib=None, reduce="tome:r=1"))
    assert "--allow-hazard relative-bias" in str(caught.value.next)
    insisted = options(tmp_path, source=T5, calib=None, reduce="tome:r=1", allow_hazards=("relative-bias",))
    assert run_convert(insisted).tokens["after"] == 14
    llama = EXPORTS / "llama_ts17_eager_static.onnx"
    both = replace(insisted, source=llama, allow_hazards=("causal", "rope"), output=tmp_path / "llama")
    with pytest.raises(UnsupportedError, match="causal"):
        run_convert(replace(both, allow_hazards=("rope",)))
    assert run_convert(both).tokens["after"] == 14


def test_text_calibration_is_cut_to_what_the_model_takes(tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join("fox dog the quick brown " * n for n in range(1, 20)))
    text = options(tmp_path, source=MINILM, calib=lines, precision="int8")
    run_convert(text)
    run_convert(replace(text, output=tmp_path / "short", reduce="tome:removed=0.2"))
    assert sequence_axis(tmp_path / "short") == 20  # its own limit, as it is below the bucket of 128


def test_dry_run_says_what_would_be_done(tmp_path: Path) -> None:
    heard = RecordProgress()
    report = run_convert(options(tmp_path, dry_run=True, reduce="tome:r=2", precision="int8"), heard)
    text = " ".join(line for label, line, _ in heard.lines if label == "plan")
    assert "17 -> 13 tokens" in text
    assert "removed per block: 2, 2" in text
    assert "memory" in text
    assert 0 < report.plan["weight_bytes"] < VIT.stat().st_size / 2
    assert report.reduce["counts"] == [2, 2]


def test_speed_names_the_threads_used(tmp_path: Path) -> None:
    assert run_convert(options(tmp_path, threads=0)).speed["threads"] >= 1


def test_a_metric_without_samples_has_no_interval(tmp_path: Path) -> None:
    def always(run: object) -> float:
        return 70.0

    report = run_convert(options(tmp_path, eval=always))
    assert report.check["ci95"] is None
    with Artifact.open(tmp_path / "edge") as artifact:
        assert artifact.manifest.accuracy[0].ci95 is None


def test_sizes_the_graph_cannot_take_are_a_usage_error(tmp_path: Path) -> None:
    names = [i.name for i in onnx.load(BERT).graph.input]
    with pytest.raises(InputError, match="does not take the sizes") as caught:
        run_convert(options(tmp_path, source=BERT, calib=None, shapes=dict.fromkeys(names, (1, 9999))))
    assert "--shape" in str(caught.value.next)


@pytest.mark.parametrize("text", ["a: &x [1]\nb: *x\n", "!!python/object:os.system {}\n", "[" * 200 + "]" * 200])
def test_hostile_yaml_is_refused_wherever_a_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    for change in ({"recipe": path}, {"preprocess": str(path)}, {"eval": path}):
        with pytest.raises(InputError):
            run_convert(options(tmp_path, **change))


def test_a_licence_travels_along(tmp_path: Path) -> None:
    (tmp_path / "L").write_text("Some Licence 2.0\nwords")
    run_convert(options(tmp_path, licence=tmp_path / "L"))
    with Artifact.open(tmp_path / "edge") as artifact:
        assert artifact.read("LICENSE") == b"Some Licence 2.0\nwords"
        assert artifact.manifest.source.licence == "Some Licence 2.0"


def sequence_axis(artifact: Path) -> int | str:
    dim = onnx.load(artifact / "model.onnx").graph.input[0].type.tensor_type.shape.dim[1]
    return dim.dim_value or dim.dim_param


def test_text_encoder_gets_a_bucket_only_when_asked_or_reduced(tmp_path: Path) -> None:
    names = [i.name for i in onnx.load(BERT).graph.input]
    open_ = options(tmp_path, source=BERT, calib=None, output=tmp_path / "open", precision="int8-dynamic")
    run_convert(open_)
    assert isinstance(sequence_axis(tmp_path / "open"), str)
    run_convert(replace(open_, output=tmp_path / "fixed", shapes=dict.fromkeys(names, (1, 16))))
    assert sequence_axis(tmp_path / "fixed") == 16
    graph = onnx.load(tmp_path / "fixed" / "model.onnx").graph
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_python_face_returns_an_open_artifact(tmp_path: Path) -> None:
    heard: list[str] = []
    with convert(
        VIT,
        output=tmp_path / "edge",
        calib=feeds(VIT, 4),
        limits=SLOW_IS_FINE,
        timing_rounds=5,
        on_line=lambda label, text, status: heard.append(label),
    ) as artifact:
        assert artifact.manifest.source.kind == "onnx"
    assert "wrote" in heard


def test_default_output_is_named_after_the_source() -> None:
    assert default_output(Path("a/vit_s_focus.onnx")) == Path("vit-s-focus-edge")


def test_recipe_refuses_unknown_fields_and_formats(tmp_path: Path) -> None:
    assert recipe_from(Recipe(reduce="tome").to_dict(), where="x") == Recipe(reduce="tome")
    with pytest.raises(InputError, match="format 9"):
        recipe_from({"format": 9}, where="x")
    with pytest.raises(InputError, match="'reduse'"):
        recipe_from({"format": 1, "reduse": "tome"}, where="x")
    with pytest.raises(InputError, match="counts"):
        recipe_from({"format": 1, "counts": "many"}, where="x")
    (tmp_path / "r.yaml").write_text("- 1")
    with pytest.raises(InputError, match="mapping"):
        read_recipe(tmp_path / "r.yaml")
