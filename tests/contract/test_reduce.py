"""What every reduction method must keep, over all registered names: the law in numpy and the graph it becomes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reduce_models import Shape, build, run

from edgetok.converters.reduce import METHODS, core
from edgetok.converters.reduce.apply import reduce_model
from edgetok.converters.reduce.base import Plan, TokenView
from edgetok.converters.reduce.schedule import (
    SHAPES,
    SearchSpace,
    candidates,
    removed_share,
    schedule,
    search,
    tokens_per_layer,
)
from edgetok.converters.reduce.spec import format_spec, make_settings, parse_reduce
from edgetok.errors import InputError, UnsupportedError

NAMES = METHODS.names()
PROTECTED = (0, 1, 2, 5)


def tokens_view(protected=1, batch=2, side=4, seed=0, **change):
    rng = np.random.default_rng(seed)
    n = side * side + protected
    probs = rng.random((batch, 3, n, n))
    parts = {
        "x": rng.normal(size=(batch, n, 12)),
        "k": rng.normal(size=(batch, 3, n, 4)),
        "probs": probs / probs.sum(-1, keepdims=True),
        "size": np.ones((batch, n, 1)),
        "protected": protected,
        "layer": 1,
        "layers": 4,
        "grid": (side, side),
    } | change
    return TokenView(**parts)


def settings_of(name):
    return METHODS.get(name).settings()


def count_for(name):
    """A number of tokens every method can remove from a 4 x 4 grid (for clusters: what leaves a 3 x 3 grid)."""
    return 7 if name == "expedit" else 5


def session(model):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    data = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def counts_of(name, layers=3):
    return [0, 7, 0][:layers] if METHODS.get(name).where == "input" else [4, 0, 3][:layers]


def outputs_mode(name):
    return "reduced" if METHODS.get(name).kind == "prune" else "restore"


def tolerance(name):
    """float32 against float64 over three layers; five rounds of a sharp softmax amplify rounding further."""
    return 1e-4 if name == "expedit" else 1e-5


def reduced(name, shape, counts=None, **options):
    """The reduced model's session, its report, the model."""
    model, finding = build(shape)
    report = reduce_model(
        model,
        finding,
        parse_reduce(name),
        counts=counts or counts_of(name),
        **({"outputs": outputs_mode(name)} | options),
    )
    return session(model), report, model


def feed_of(shape, batch=2, seed=3):
    return np.random.default_rng(seed).standard_normal((batch, shape.tokens, shape.width)).astype(np.float32)


# ---------------------------------------------------------------------------------------------------- the law


@pytest.mark.parametrize("protected", PROTECTED)
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_partitioned_and_protected_ones_stay_in_front(name, protected):
    law, view = METHODS.get(name), tokens_view(protected)
    plan = law.plan(view, count_for(name), settings_of(name))
    assert plan.outputs == view.tokens - count_for(name)
    if plan.assign is not None:
        np.testing.assert_allclose(plan.assign.sum(2), 1, atol=1e-6)
        np.testing.assert_array_equal(
            plan.assign[:, :protected, :protected], np.broadcast_to(np.eye(protected), (2, protected, protected))
        )
        assert not plan.assign[:, protected:, :protected].any()
        if not plan.kept.size:
            return
    for b in range(2):
        rows = [*plan.kept[b], *plan.removed[b]]
        assert sorted(rows) == list(range(view.tokens))
        assert list(plan.kept[b, :protected]) == list(range(protected))
        if plan.target.size:
            assert plan.target[b].min() >= protected
            assert plan.target[b].max() < plan.outputs


@pytest.mark.parametrize("name", NAMES)
def test_sizes_and_sums_are_conserved(name):
    law, view = METHODS.get(name), tokens_view(size=np.random.default_rng(1).integers(1, 5, (2, 17, 1)).astype(float))
    y, size = core.apply_plan(law.plan(view, count_for(name), settings_of(name)), view.x, view.size)
    np.testing.assert_array_equal(y[:, :1], view.x[:, :1])
    np.testing.assert_array_equal(size[:, :1], view.size[:, :1])
    if law.kind == "prune":
        return
    np.testing.assert_allclose(size.sum(1), view.size.sum(1), rtol=1e-6)
    np.testing.assert_allclose((size * y).sum(1), (view.size * view.x).sum(1), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_same_input_gives_the_same_plan_and_samples_do_not_mix(name):
    law, view = METHODS.get(name), tokens_view()
    plan = law.plan(view, count_for(name), settings_of(name))
    for b in range(2):
        alone = law.plan(view.one(b), count_for(name), settings_of(name))
        np.testing.assert_array_equal(alone.kept[0], plan.kept[b])
        np.testing.assert_array_equal(alone.removed[0], plan.removed[b])
        if plan.assign is not None:
            np.testing.assert_allclose(alone.assign[0], plan.assign[b], atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_plan_survives_a_save(name):
    plan = METHODS.get(name).plan(tokens_view(), count_for(name), settings_of(name))
    again = Plan.load(plan.save())
    for part in ("kept", "removed", "target", "assign", "restore"):
        np.testing.assert_array_equal(getattr(again, part), getattr(plan, part))
    assert (again.kind, again.tokens, again.protected) == (plan.kind, plan.tokens, plan.protected)


@pytest.mark.parametrize("name", NAMES)
def test_constant_tokens_give_numbers(name):
    view = tokens_view(x=np.ones((2, 17, 12)), k=np.zeros((2, 3, 17, 4)), probs=np.full((2, 3, 17, 17), 1 / 17))
    plan = METHODS.get(name).plan(view, count_for(name), settings_of(name))
    y, size = core.apply_plan(plan, view.x, view.size)
    assert np.isfinite(y).all()
    assert np.isfinite(size).all()


@pytest.mark.parametrize("name", [n for n in NAMES if "grid" not in METHODS.get(n).needs])
def test_padding_goes_first_and_never_changes_a_word(name):
    real = 11
    size = np.ones((2, 17, 1))
    size[:, real:] = 0
    probs = tokens_view().probs.copy()
    probs[..., real:] = 0
    view = tokens_view(size=size, probs=probs / probs.sum(-1, keepdims=True))
    count = 2  # there is more padding than this on both sides of any split
    y, after = core.apply_plan(METHODS.get(name).plan(view, count, settings_of(name)), view.x, view.size)
    words = {tuple(np.round(row, 9)) for row in view.x[0, :real]}
    kept = {tuple(np.round(row, 9)) for row, s in zip(y[0], after[0, :, 0], strict=True) if s > 0}
    assert after[0].sum() == pytest.approx(real)
    assert kept == words


# ---------------------------------------------------------------------------------------------------- the graph


@pytest.mark.parametrize("protected", PROTECTED)
@pytest.mark.parametrize("name", NAMES)
def test_graph_answers_as_the_law(name, protected):
    shape = Shape(tokens=16 + protected, protected=protected)
    runner, report, _ = reduced(name, shape)
    x = feed_of(shape)
    got = runner.run(None, {"x": x})[0]
    want = run(shape, x, name, report.counts)
    want = want["reduced" if outputs_mode(name) == "reduced" else "y"]
    np.testing.assert_allclose(got, want, atol=tolerance(name))


@pytest.mark.parametrize("head", ["mean", "cls"])
@pytest.mark.parametrize("name", NAMES)
def test_heads_are_served(name, head):
    shape = Shape(head=head)
    runner, report, _ = reduced(name, shape, outputs="restore")
    x = feed_of(shape)
    np.testing.assert_allclose(
        runner.run(None, {"x": x})[0], run(shape, x, name, report.counts)["y"], atol=tolerance(name)
    )


@pytest.mark.parametrize("name", [n for n in NAMES if "grid" not in METHODS.get(n).needs])
def test_masks_follow_the_tokens(name):
    shape = Shape(style="bert", tokens=17)
    mask = np.zeros((3, 1, 1, 17), np.float32)
    mask[1, ..., 9:] = mask[2, ..., 4:] = np.finfo(np.float32).min
    runner, report, _ = reduced(name, shape)
    x = feed_of(shape, 3)
    got = runner.run(None, {"x": x, "mask": mask})[0]
    want = run(shape, x, name, report.counts, mask=mask)
    if outputs_mode(name) == "reduced":
        live, want = want["size"] > 0, want["reduced"]
    else:
        live, want = mask[:, 0, 0] > -1, want["y"]
    np.testing.assert_allclose(got[live], want[live], atol=1e-5)


@pytest.mark.parametrize("name", [n for n in NAMES if "grid" not in METHODS.get(n).needs])
def test_padding_does_not_reach_the_words(name):
    shape = Shape(style="bert", tokens=17, head="cls")
    mask = np.zeros((1, 1, 1, 17), np.float32)
    mask[..., 9:] = np.finfo(np.float32).min
    runner, _, _ = reduced(name, shape, outputs="restore")
    x = feed_of(shape, 1)
    other = x.copy()
    other[:, 9:] = np.random.default_rng(9).standard_normal(other[:, 9:].shape) * 3
    a, b = (runner.run(None, {"x": v, "mask": mask})[0] for v in (x, other))
    # more padding (8) than is removed (7), so no word is merged, and what padding holds must not show
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("spec", ["0", *NAMES])
def test_removing_nothing_leaves_the_bytes_alone(spec):
    shape = Shape()
    model, finding = build(shape)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    report = reduce_model(model, finding, parse_reduce(spec), counts=None if spec == "0" else [0, 0, 0])
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert (report.removed, report.flops_ratio, report.nodes_added) == (0.0, 1.0, 0)


@pytest.mark.parametrize("name", NAMES)
def test_emission_is_deterministic(name):
    first, second = (ir.to_proto(reduced(name, Shape())[2]).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", NAMES)
def test_samples_of_a_batch_do_not_mix(name):
    shape = Shape()
    runner, _, _ = reduced(name, shape)
    x = feed_of(shape, 4)
    together = runner.run(None, {"x": x})[0]
    for b in range(4):
        np.testing.assert_allclose(runner.run(None, {"x": x[b : b + 1]})[0][0], together[b], atol=tolerance(name))


@pytest.mark.parametrize("name", NAMES)
def test_every_shape_is_known_but_for_the_batch(name):
    _, report, model = reduced(name, Shape())
    for node in model.graph:
        for value in node.outputs:
            assert value.shape is not None, f"{node.op_type} {value.name}"
            loose = [d for i, d in enumerate(value.shape) if i and not isinstance(d, int)]
            assert not loose, f"{node.op_type} {value.name} {value.shape}"
    blocks = tokens_per_layer(report.counts, 17, where=METHODS.get(name).where)
    assert report.tokens == blocks


@pytest.mark.parametrize("name", NAMES)
def test_constant_input_gives_numbers_in_the_graph(name):
    shape = Shape()
    runner, _, _ = reduced(name, shape)
    for value in (0.0, 1.0):
        assert np.isfinite(runner.run(None, {"x": np.full((2, 17, 24), value, np.float32)})[0]).all()


@pytest.mark.parametrize("name", NAMES)
def test_fixed_batch_works_as_well(name):
    shape = Shape()
    model, finding = build(shape)
    for value in (model.graph.inputs[0], finding.blocks[0].x_in):
        value.shape = ir.Shape([1, 17, 24])
    report = reduce_model(model, finding, parse_reduce(name), counts=counts_of(name), outputs=outputs_mode(name))
    x = feed_of(shape, 1)
    key = "reduced" if outputs_mode(name) == "reduced" else "y"
    np.testing.assert_allclose(
        session(model).run(None, {"x": x})[0], run(shape, x, name, report.counts)[key], atol=tolerance(name)
    )


@pytest.mark.parametrize("name", [n for n in NAMES if METHODS.get(n).where == "attn"])
def test_reduced_outputs_tell_their_rows(name):
    shape = Shape()
    runner, report, _ = reduced(name, shape, outputs="reduced")
    x = feed_of(shape)
    got = dict(zip([o.name for o in runner.get_outputs()], runner.run(None, {"x": x}), strict=True))
    assert got["y"].shape == (2, report.tokens[-1], 24)
    assert got["y.kept"].dtype == np.int64
    assert got["y.kept"].shape == (2, report.tokens[-1])
    assert (got["y.kept"][:, 0] == 0).all()
    if METHODS.get(name).kind == "prune":
        assert "y.size" not in got
    else:
        np.testing.assert_allclose(got["y.size"].sum(1), 17, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- refusals


def test_pruning_refuses_an_output_of_every_token():
    model, finding = build(Shape())
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with pytest.raises(UnsupportedError, match="reads every token") as caught:
        reduce_model(model, finding, parse_reduce("zero_tprune:r=3"))
    assert "--outputs reduced" in (caught.value.next or "")
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hazards": ("rope",)}, "rope"),
        ({"mask_kind": "causal"}, "causal"),
        ({"logits": None, "fused_op": "::Attention"}, "Attention"),
    ],
)
def test_blocks_that_cannot_be_reduced_are_refused_before_any_change(change, words):
    from dataclasses import replace

    model, finding = build(Shape())
    blocks = (finding.blocks[0], replace(finding.blocks[1], **change), finding.blocks[2])
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with pytest.raises(UnsupportedError, match=words):
        reduce_model(model, replace(finding, blocks=blocks), parse_reduce("tome:r=2"))
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_open_token_count_is_refused():
    from dataclasses import replace

    model, finding = build(Shape())
    with pytest.raises(InputError, match="open"):
        reduce_model(model, replace(finding, tokens=None), parse_reduce("tome"))


def test_outputs_can_be_cut_at_named_tensors():
    shape = Shape()
    model, finding = build(shape)
    name = finding.blocks[1].x_out.name
    report = reduce_model(model, finding, parse_reduce("tome:r=3"), counts=[3, 0, 0], outputs=(name,))
    out = session(model).get_outputs()
    assert [o.name for o in out] == [name]
    assert report.restored == (name,)
    assert out[0].shape[1] == 17
    with pytest.raises(InputError, match="no tensor"):
        reduce_model(*build(shape), parse_reduce("tome"), outputs=("nowhere",))


# ---------------------------------------------------------------------------------------------------- the text


@pytest.mark.parametrize(
    ("text", "method", "expected"),
    [
        ("tome", "tome", {}),
        ("tome:r=13", "tome", {"r": (13,)}),
        ("tome:r=0/0/4/8/14", "tome", {"r": (0, 0, 4, 8, 14)}),
        ("tome:prop_attn=no,inflection=-1", "tome", {"prop_attn": False, "inflection": -1.0}),
        ("pitome:ratio=0.925,layers=1-11", "pitome", {"ratio": 0.925, "layers": tuple(range(1, 12))}),
        ("expedit:alpha=6,grid=12x12", "expedit", {"alpha": 6, "grid": (12, 12)}),
        ("zero-tprune:s-share=0.2,layers=3+6+9", "zero_tprune", {"s_share": 0.2, "layers": (3, 6, 9)}),
        ("tomesd:ratio=0.4", "tomesd", {"ratio": 0.4}),
        ("token_transforming:tau=0.05,removed=0.3", "token_transforming", {"tau": 0.05, "removed": 0.3}),
    ],
)
def test_specs_are_read_and_written_back(text, method, expected):
    spec = parse_reduce(text)
    assert spec.method == method
    for key, value in expected.items():
        assert getattr(spec.settings, key) == value
    assert parse_reduce(format_spec(method, spec.settings)).settings == spec.settings


def test_a_number_is_a_share_of_any_method():
    spec = parse_reduce(" 0.3 ")
    assert (spec.method, spec.settings, spec.removed) == (None, None, 0.3)
    assert parse_reduce("0").nothing


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("1", r"outside \[0, 1\)"),
        ("-0.1", "outside"),
        ("nan", "outside"),
        ("tom", "unknown reduction method 'tom'"),
        ("tome:", "ends after the colon"),
        ("tome:r", "not name=value"),
        ("tome:r=x", "not a list of ints"),
        ("tome:r=1,r=2", "given twice"),
        ("tome:speed=9", "no setting 'speed'"),
        ("tome:r=-3", "zero or more"),
        ("tome:inflection=2", "outside"),
        ("pitome:ratio=1.5", "outside"),
        ("pitome:form=round", "form"),
        ("pitome:layers=5-2", "list of blocks"),
        ("expedit:grid=12", "rows x columns"),
        ("tome:prop_attn=perhaps", "true or false"),
        ("tomesd:sx=1,sy=1", "leaves no token"),
    ],
)
def test_wrong_specs_say_what_is_wrong(text, words):
    with pytest.raises(InputError, match=words):
        parse_reduce(text)


def test_unknown_method_names_a_near_one():
    with pytest.raises(InputError) as caught:
        parse_reduce("tomee")
    assert "tome" in (caught.value.next or "")


# ---------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("name", [n for n in NAMES if METHODS.get(n).where != "input"])
@pytest.mark.parametrize("removed", [0.05, 0.3])
def test_schedules_meet_the_share(name, shape, removed):
    law = METHODS.get(name)
    counts = schedule(removed, 257, 1, 12, law, shape=shape)
    got = removed_share(counts.removed, 257, where=law.where)
    assert got >= removed - 1e-9 or counts.notes
    if not counts.notes:
        assert got <= removed + 1 / 257  # at most one token too many per layer
    left = 257
    for count in counts.removed:
        assert 0 <= count <= law.limit(left, 1)
        left -= count if law.where != "module" else 0


def test_a_share_out_of_reach_is_reported():
    counts = schedule(0.95, 197, 1, 12, METHODS.get("tome"))
    assert counts.notes
    assert "is the most" in counts.notes[0]


def test_layers_restrict_a_schedule_and_unknown_shapes_are_refused():
    counts = schedule(0.2, 257, 1, 12, METHODS.get("tome"), allowed=range(6, 12)).removed
    assert not any(counts[:6])
    with pytest.raises(InputError, match="unknown schedule"):
        schedule(0.2, 257, 1, 12, METHODS.get("tome"), shape="zigzag")


def test_clamps_are_reported():
    law = METHODS.get("tome")
    counts = law.counts(make_settings(law, {"r": "120"}), 197, 1, 3)
    assert counts.removed == (98, 49, 24)
    assert len(counts.notes) == 3
    with pytest.raises(InputError, match="12 blocks"):
        law.counts(make_settings(law, {"r": "/".join(["1"] * 13)}), 197, 1, 12)


def test_share_through_reduce_model():
    for name in NAMES:
        model, finding = build(Shape(tokens=65, layers=4))
        report = reduce_model(model, finding, parse_reduce(f"{name}:removed=0.25"), outputs=outputs_mode(name))
        assert 0.25 <= report.removed <= 0.34, name


def test_search_finds_the_layer_that_does_no_harm_and_repeats():
    space, law = SearchSpace(65, 1, 6, 48, removed=0.2), METHODS.get("tome")

    def harm(counts):
        return -sum(c * w for c, w in zip(counts, (5, 4, 3, 2, 0.1, 1), strict=True))

    trials = search(harm, space, law, samples=30, seconds=60)
    again = search(harm, space, law, samples=30, seconds=60)
    assert [t.counts for t in trials] == [t.counts for t in again]
    assert trials[0].score == max(t.score for t in trials)
    assert trials[0].score > max(harm(c) for _, c in candidates(space, law))
    for trial in trials:
        assert 0.2 - 1e-9 <= removed_share(trial.counts, 65) <= 0.2 + 1 / 65


def test_search_can_hold_the_cost_instead_of_the_share():
    space, law = SearchSpace(257, 1, 12, 384, cost=0.7), METHODS.get("tome")
    for _, counts in candidates(space, law):
        assert space.ratio(counts, law) <= 0.7
        assert space.ratio(counts, law) >= 0.69
