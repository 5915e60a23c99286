"""The worked examples of the token-reduction specification, to the digits given there, and its section tests."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reduce_models import Shape, build, run

from edgetok.converters.graph.cost import macs
from edgetok.converters.reduce import METHODS, core
from edgetok.converters.reduce.apply import reduce_model
from edgetok.converters.reduce.base import Plan, TokenView
from edgetok.converters.reduce.expedit import ExpeditSettings, cluster, rebuild_weights
from edgetok.converters.reduce.pitome import PiToMeSettings, energy
from edgetok.converters.reduce.schedule import total_macs
from edgetok.converters.reduce.spec import parse_reduce
from edgetok.converters.reduce.token_transforming import TokenTransformingSettings, spread
from edgetok.converters.reduce.tome import ToMeSettings, inflected
from edgetok.converters.reduce.tomesd import TomesdSettings, destinations
from edgetok.converters.reduce.zero_tprune import (
    ZeroTPruneSettings,
    heads_heard,
    over_heads,
    similar_rows,
    start_weights,
    vote,
)


def view(x, k=None, *, probs=None, size=None, protected=0, grid=None, layer=0, layers=1):
    """A view of one sample; x [N] or [N,D], keys [N,C] of one head."""
    x = np.asarray(x, float)
    x = x[None, :, None] if x.ndim == 1 else x[None]
    k = np.zeros((1, 1, x.shape[1], 1)) if k is None else np.asarray(k, float)[None, None]
    size = np.ones((1, x.shape[1], 1)) if size is None else np.asarray(size, float).reshape(1, -1, 1)
    return TokenView(
        x, k, None if probs is None else np.asarray(probs, float)[None], size, protected, layer, layers, grid
    )


# ------------------------------------------------------------------------------------------------- 0 and 1: ToMe


def test_tome_schedule_with_inflection_truncates():
    got = inflected(13, -1, 12)
    assert got == [26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0]
    assert sum(got) == 151
    assert inflected(13, 0, 12) == [13] * 12


def test_tome_constant_13_on_197_ends_at_41_and_a_short_list_is_padded():
    tome = METHODS.get("tome")
    assert 197 - sum(tome.counts(ToMeSettings(), 197, 1, 12).removed) == 41
    assert tome.counts(ToMeSettings(r=(0, 5)), 197, 1, 4).removed == (0, 5, 0, 0)


@pytest.mark.parametrize(
    ("tokens", "width", "layers", "r", "cost", "ratio", "final"),
    [
        (197, 384, 12, 0, 4540695552, 1.0, 197),
        (197, 384, 12, 8, 3358270464, 0.7396, 101),
        (197, 384, 12, 13, 2644514304, 0.5824, 41),
        (197, 384, 12, 16, 2225587200, 0.4901, 5),
        (577, 1024, 24, 0, 190612291584, 1.0, 577),
        (577, 1024, 24, 23, 95787229184, 0.5025, 25),
    ],
)
def test_cost_model(tokens, width, layers, r, cost, ratio, final):
    got = total_macs([r] * layers, tokens, width)
    assert got == cost
    assert round(got / total_macs([0] * layers, tokens, width), 4) == ratio
    assert tokens - r * layers == final


def test_one_deit_s_block_costs_378_million():
    assert round(macs(197, 197, 384) / 1e6) == 378


def test_tome_two_steps_and_composed_unmerge():
    tome, settings = METHODS.get("tome"), ToMeSettings()
    k = [(1, 0), (1, 0), (0, 1), (0.6, 0.8), (0.8, 0.6), (0, 1)]
    first = view([0, 10, 20, 30, 40, 50], k, protected=1)
    plan = tome.plan(first, 2, settings)
    x, size = core.apply_plan(plan, first.x, first.size)
    np.testing.assert_allclose(x[0, :, 0], [0, 10, 35, 35])
    np.testing.assert_array_equal(size[0, :, 0], [1, 1, 2, 2])
    np.testing.assert_array_equal(plan.origin()[0], [0, 1, 3, 2, 2, 3])
    second = TokenView(x, np.array([[[(1, 0), (1, 0), (0.6, 0.8), (0, 1)]]], float), None, size, 1)
    plan2 = tome.plan(second, 1, settings)
    x2, size2 = core.apply_plan(plan2, x, size)
    np.testing.assert_allclose(x2[0, :, 0], [0, 10, 35])
    np.testing.assert_array_equal(size2[0, :, 0], [1, 1, 4])
    origin = np.take_along_axis(plan2.origin(), plan.origin(), 1)
    np.testing.assert_array_equal(origin[0], [0, 1, 2, 2, 2, 2])
    np.testing.assert_allclose(core.restore(x2, origin)[0, :, 0], [0, 10, 35, 35, 35, 35])


def test_tome_scores_of_the_example():
    k = core.unit(np.array([[(1, 0), (1, 0), (0, 1), (0.6, 0.8), (0.8, 0.6), (0, 1)]], float))
    np.testing.assert_allclose(
        k[:, [2, 4]] @ np.swapaxes(k[:, [1, 3, 5]], 1, 2), [[[0, 0.8, 1], [0.8, 0.96, 0.6]]], atol=1e-9
    )


def test_tome_sums_by_size_and_never_repeats_a_plain_mean():
    kept, removed, target = np.array([[0]]), np.array([[1]]), np.array([[0]])
    x, size = core.merge(np.array([[[0.0], [3.0]]]), np.array([[[2.0], [1.0]]]), kept, removed, target)
    assert x.item() == pytest.approx(1.0)
    assert size.item() == 3


def test_merged_token_counts_as_its_size_in_attention():
    """softmax with log(size) on one key equals softmax over that many equal keys."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(5, 4)), rng.normal(size=(3, 4)), rng.normal(size=(3, 4))
    rows = [0, 1, 1, 1, 2]
    size = np.array([1, 3, 1])

    def answer(keys, values, bias):
        e = np.exp(q @ keys.T + bias)
        return (e / e.sum(1, keepdims=True)) @ values

    np.testing.assert_allclose(answer(k, v, np.log(size)), answer(k[rows], v[rows], 0.0), rtol=1e-12)


# ------------------------------------------------------------------------------------------------- 1.8: tomesd


def test_tomesd_destinations_are_the_top_left_of_each_whole_cell():
    into, others = destinations((4, 5), 2, 2)
    assert into.tolist() == [0, 2, 10, 12]
    assert sorted([*into, *others]) == list(range(20))


def test_tomesd_unmerge_of_merge():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 6))
    law = METHODS.get("tomesd")
    v = view(x, grid=(4, 4))
    settings = TomesdSettings(ratio=0.5)
    count = law.counts(settings, 16, 0, 1).removed[0]
    assert count == 8  # N' = N - int(N * share removed)
    plan = law.plan(v, count, settings)
    y, _ = core.apply_plan(plan, v.x, v.size)
    back = core.restore(y, plan.origin())[0]
    into = {int(r) for r in plan.kept[0, plan.target[0]]}
    alone = [n for n in range(16) if n not in set(plan.removed[0]) and n not in into]
    np.testing.assert_allclose(back[alone], x[alone])
    for src, dst in zip(plan.removed[0], plan.target[0], strict=True):
        np.testing.assert_allclose(back[src], y[0, dst])
    constant = view(np.ones((16, 6)), grid=(4, 4))
    plan = law.plan(constant, 8, settings)
    y, _ = core.apply_plan(plan, constant.x, constant.size)
    np.testing.assert_array_equal(core.restore(y, plan.origin()), constant.x)


def test_tomesd_keeps_at_most_a_quarter_away():
    counts = METHODS.get("tomesd").counts(TomesdSettings(ratio=0.1), 65, 1, 2)
    assert counts.removed == (48, 48)
    assert len(counts.notes) == 2


# ------------------------------------------------------------------------------------------------- 2: Zero-TPrune

A = np.array([[[[0.2, 0.5, 0.3], [0.1, 0.6, 0.3], [0.4, 0.4, 0.2]]]])


@pytest.mark.parametrize(
    ("steps", "expected"), [(1, [0.2333, 0.5, 0.2667]), (2, [0.2033, 0.5233, 0.2733]), (60, [0.2020, 0.5253, 0.2727])]
)
def test_votes_of_the_example(steps, expected):
    np.testing.assert_allclose(vote(A, start_weights(3, boost=False), steps)[0, 0], expected, atol=5e-5)


def test_votes_of_three_steps_are_near_the_fixpoint():
    three, fixpoint = (vote(A, start_weights(3, boost=False), n)[0, 0] for n in (3, 200))
    assert np.abs(three - fixpoint).max() <= 4e-4


def test_boosted_vote_of_the_example():
    np.testing.assert_allclose(vote(A, start_weights(3, boost=True), 1)[0, 0], [0.2821, 0.6220, 0.3399], atol=5e-5)


def test_heads_are_joined_by_root_mean_square():
    s = np.array([[[0.9, 0.05, 0.05], [0.1, 0.45, 0.45]]])
    np.testing.assert_allclose(over_heads(s, np.ones((1, 2)))[0], [0.6403, 0.3202, 0.3202], atol=5e-5)


def test_similarity_stage_of_the_example():
    keys = core.unit(np.array([[(1, 0), (0.98, 0.199), (0, 1), (0.6, 0.8)]]))
    gone = similar_rows(np.array([[0.4, 0.1, 0.3, 0.2]]), keys, 1, np.zeros((1, 4)))
    assert gone.tolist() == [[1]]


def test_variance_of_one_hot_scores_passes_only_after_scaling():
    hot = np.zeros((1, 1, 197))
    hot[0, 0, 3] = 1
    assert hot.var() == pytest.approx(0.00505, abs=5e-6)
    assert heads_heard(hot, np.ones((1, 197)), 0.01, 0.0).tolist() == [[1.0]]
    uniform = np.full((1, 2, 197), 1 / 197)
    assert heads_heard(uniform, np.ones((1, 197)), 0.01, 0.0).tolist() == [[1.0, 1.0]]  # none in range: all are heard


def _stochastic(rng, *shape):
    a = rng.random(shape)
    return a / a.sum(-1, keepdims=True)


def test_votes_preserve_the_sum_and_follow_a_permutation():
    rng = np.random.default_rng(0)
    a, perm = _stochastic(rng, 1, 2, 9, 9), rng.permutation(9)
    start = start_weights(9, boost=False)
    for steps in range(1, 5):
        np.testing.assert_allclose(vote(a, start, steps).sum(-1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(vote(a[:, :, perm][..., perm], start, 4), vote(a, start, 4)[..., perm], rtol=1e-12)


def test_votes_stay_uniform_on_a_doubly_stochastic_matrix():
    a = np.array([[[[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.3, 0.2, 0.5]]]])
    np.testing.assert_allclose(vote(a, start_weights(3, boost=False), 7), 1 / 3)


def test_zero_tprune_is_equivariant_and_keeps_cls():
    rng = np.random.default_rng(0)
    law, settings = METHODS.get("zero_tprune"), ZeroTPruneSettings()
    x, k, probs = rng.normal(size=(12, 4)), rng.normal(size=(12, 5)), _stochastic(rng, 3, 12, 12)
    perm = np.concatenate([[0], 1 + rng.permutation(11)])
    plain = law.plan(view(x, k, probs=probs, protected=1), 5, settings)
    moved = law.plan(view(x[perm], k[perm], probs=probs[:, perm][..., perm], protected=1), 5, settings)
    assert set(perm[moved.kept[0]]) == set(plain.kept[0])
    assert plain.kept[0, 0] == 0
    assert np.all(np.diff(plain.kept[0]) > 0)


# ----------------------------------------------------------------------------------------------3: Token Transforming


def test_token_transforming_example():
    f = np.array([[(1, 0), (0, 1), (0.6, 0.8), (0.8, 0.6)]])
    p = spread(f, np.array([[0, 1]]), 0.1, self_anchor=False)
    np.testing.assert_allclose(p[0], [[1, 0], [0, 1], [0.1192, 0.8808], [0.8808, 0.1192]], atol=5e-5)
    w = (p / p.sum(1, keepdims=True))[0].T
    np.testing.assert_allclose(w, [[0.5, 0, 0.0596, 0.4404], [0, 0.5, 0.4404, 0.0596]], atol=5e-5)
    y, mass = core.transform(f, np.ones((1, 4, 1)), p)
    np.testing.assert_allclose(y[0], [[0.8881, 0.3119], [0.3119, 0.8881]], atol=5e-5)
    np.testing.assert_allclose(mass[0, :, 0], [2, 2], atol=1e-6)


def test_cold_spreading_is_the_nearest_target():
    rng = np.random.default_rng(0)
    f = rng.normal(size=(1, 9, 4))
    targets = np.array([[2, 5, 7]])
    p = spread(f, targets, 1e-4, self_anchor=False)
    near = (core.unit(f) @ np.swapaxes(core.unit(f)[:, [2, 5, 7]], 1, 2)).argmax(2)
    np.testing.assert_allclose(p[0], np.eye(3)[near[0]], atol=1e-6)


def test_matrices_reproduce_pruning_and_tome():
    rng = np.random.default_rng(1)
    x, size = rng.normal(size=(1, 8, 3)), rng.integers(1, 4, (1, 8, 1)).astype(float)
    onehot = np.zeros((1, 8, 2))
    onehot[0, [3, 6], [0, 1]] = 1
    np.testing.assert_allclose(core.transform(x, size, onehot)[0], x[:, [3, 6]])
    plan = METHODS.get("tome").plan(view(x[0], rng.normal(size=(8, 4)), size=size, protected=1), 3, ToMeSettings())
    w = np.zeros((1, 8, 5))
    w[0, np.arange(8), plan.origin()[0]] = 1
    for got, want in zip(core.transform(x, size, w), core.apply_plan(plan, x, size), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_spreading_conserves_mass_and_is_equivariant():
    rng = np.random.default_rng(2)
    law, settings = METHODS.get("token_transforming"), TokenTransformingSettings()
    x, k, probs = rng.normal(size=(10, 3)), rng.normal(size=(10, 4)), _stochastic(rng, 2, 10, 10)
    plan = law.plan(view(x, k, probs=probs, protected=1), 4, settings)
    np.testing.assert_allclose(plan.assign.sum(2), 1, atol=1e-6)
    assert core.apply_plan(plan, x[None], np.ones((1, 10, 1)))[1].sum() == pytest.approx(10, abs=1e-5)
    perm = np.concatenate([[0], 1 + rng.permutation(9)])
    moved = law.plan(view(x[perm], k[perm], probs=probs[:, perm][..., perm], protected=1), 4, settings)
    y, _ = core.apply_plan(plan, x[None], np.ones((1, 10, 1)))
    z, _ = core.apply_plan(moved, x[None, perm], np.ones((1, 10, 1)))
    np.testing.assert_allclose(np.sort(y[0], 0), np.sort(z[0], 0), atol=1e-6)


def test_all_tokens_kept_and_cold_is_the_identity_up_to_order():
    rng = np.random.default_rng(3)
    f = rng.normal(size=(1, 6, 4))
    order = np.array([[3, 1, 0, 5, 4, 2]])
    p = spread(f, order, 1e-3, self_anchor=False)
    np.testing.assert_allclose(core.transform(f, np.ones((1, 6, 1)), p)[0], f[:, order[0]], atol=1e-6)


# ------------------------------------------------------------------------------------------------- 4: PiToMe

K4 = np.array([(1, 0), (0.8, 0.6), (0, 1), (0.6, 0.8), (-1, 0), (0.96, 0.28)])


def test_pitome_energies_of_the_example():
    e = energy(core.unit(K4[None]), 0.5, 1.0)
    np.testing.assert_allclose(e[0], [0.0316, 0.1781, -0.0141, 0.1655, -0.4721, 0.1218], atol=5e-5)
    assert core.order_by(e)[0].tolist() == [1, 3, 5, 0, 2, 4]


def test_pitome_pure_example():
    settings = PiToMeSettings(margin=0.5, form="pure")
    v = view([0, 10, 20, 30, 40, 50], K4)
    plan = METHODS.get("pitome").plan(v, 2, settings)
    x, size = core.apply_plan(plan, v.x, v.size)
    np.testing.assert_allclose(x[0, :, 0], [20, 40, 20, 25])
    assert size[0, :, 0].tolist() == [1, 1, 2, 2]
    assert plan.kept[0].tolist() == [2, 4, 3, 0]
    assert plan.removed[0].tolist() == [1, 5]


def test_pitome_counts_are_exact_where_floats_are_not():
    assert METHODS.get("pitome").counts(PiToMeSettings(ratio=0.9), 197, 1, 1).removed == (19,)


def test_pitome_orthogonal_tokens_have_equal_energy_and_the_promised_count_is_left_alone():
    v = view(np.eye(8), np.eye(8))
    e = energy(core.unit(np.eye(8)[None]), 0.5, 1.0)
    np.testing.assert_allclose(e, e[0, 0])
    plan = METHODS.get("pitome").plan(v, 2, PiToMeSettings(form="pure"))
    touched = {*plan.removed[0], *plan.kept[0, plan.target[0]]}
    assert len(plan.kept[0]) == 6
    assert len(set(range(8)) - touched) >= 8 - 2 * 2


def test_pitome_merges_only_within_the_cluster():
    k = np.concatenate([np.tile([[1.0, 0, 0, 0, 0]], (6, 1)), np.eye(5)[1:]])
    plan = METHODS.get("pitome").plan(view(np.arange(10.0), k), 3, PiToMeSettings(form="pure"))
    assert max(plan.removed[0]) < 6
    assert max(plan.kept[0, plan.target[0]]) < 6


@pytest.mark.parametrize("form", ["pure", "hybrid", "text"])
def test_pitome_is_equivariant(form):
    rng = np.random.default_rng(0)
    x, k, perm = rng.normal(size=(14, 3)), rng.normal(size=(14, 5)), rng.permutation(14)
    law, settings = METHODS.get("pitome"), PiToMeSettings(form=form)
    results = []
    for rows in (np.arange(14), perm):
        v = view(x[rows], k[rows])
        y, size = core.apply_plan(law.plan(v, 4, settings), v.x, v.size)
        assert size.sum() == 14
        results.append(y[0][np.lexsort(y[0].T)])
    np.testing.assert_allclose(results[0], results[1], atol=1e-12)


# ------------------------------------------------------------------------------------------------- 5: Expedit


def test_expedit_clustering_example():
    f, mu = np.array([[[0.0], [1], [4], [5]]]), np.array([[[0.5], [4.5]]])
    q, after = cluster(f, mu, np.ones((4, 2)), 1.0, 5)
    np.testing.assert_allclose(q[0], [[1, 0], [1, 0], [0, 1], [0, 1]], atol=1e-5)
    np.testing.assert_allclose(after, mu, atol=1e-4)


@pytest.mark.parametrize(("norm", "expected"), [("l1", 15.0), ("l2", 21.2132)])
def test_expedit_reconstruction_example(norm, expected):
    w = rebuild_weights(np.array([[[2.5]]]), np.array([[[0.5], [4.5]]]), 1.0, 20, norm)
    assert (w @ np.array([[[10.0], [20.0]]])).item() == pytest.approx(expected, abs=5e-5)


def _expedit(x, grid, clusters, **settings):
    law = METHODS.get("expedit")
    v = view(x, grid=grid)
    return v, law.plan(v, x.shape[0] - clusters[0] * clusters[1], ExpeditSettings(grid=clusters, **settings))


def test_expedit_constant_field_stays_constant():
    v, plan = _expedit(np.full((16, 3), 2.5), (4, 4), (2, 2))
    y, _ = core.apply_plan(plan, v.x, v.size)
    np.testing.assert_allclose(core.restore(y, plan.restore), v.x, atol=1e-6)


def test_expedit_as_many_clusters_as_tokens_and_hot_is_the_identity():
    x = np.random.default_rng(0).normal(size=(9, 4))
    v, plan = _expedit(x, (3, 3), (3, 3), temperature=1e4, k=9)
    y, _ = core.apply_plan(plan, v.x, v.size)
    np.testing.assert_allclose(core.restore(y, plan.restore), v.x, atol=1e-6)


def test_expedit_rows_sum_to_one_and_smoothing_stays_within_the_cluster_radius():
    x = np.random.default_rng(1).normal(size=(36, 3))
    v, plan = _expedit(x, (6, 6), (3, 3), k=4)
    np.testing.assert_allclose(plan.restore.sum(2), 1, atol=1e-6)
    y, _ = core.apply_plan(plan, v.x, v.size)
    back = core.restore(y, plan.restore)
    assert back.shape == v.x.shape
    radius = np.sqrt(((x[:, None] - y[0][None]) ** 2).sum(2)).max()
    assert np.sqrt(((back[0] - x) ** 2).sum(1)).max() <= radius


# ------------------------------------------------------------------------------------------------- the whole network


def test_tome_13_per_layer_matches_an_independent_numpy_run():
    s = Shape(tokens=70, width=48, heads=4, layers=4, protected=1)
    model, finding = build(s)
    x = np.random.default_rng(5).standard_normal((2, s.tokens, s.width)).astype(np.float32)
    report = reduce_model(model, finding, parse_reduce("tome:r=13"))
    assert report.tokens == (57, 44, 31, 18)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    got = session.run(None, {"x": x})[0]
    want = run(s, x, "tome", report.counts)["y"]
    # float32 against float64 over four layers of unit-sized values
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(want - run(s, x)["y"]).max() > 0.1  # merging itself moves the answer


def test_plan_survives_a_save_with_everything_in_it():
    none = np.zeros((1, 0), int)
    plan = Plan("transform", 3, 0, none, none, none, np.eye(3)[None], np.eye(3)[None])
    again = Plan.load(plan.save())
    np.testing.assert_array_equal(again.assign, plan.assign)
    assert (again.kind, again.tokens) == ("transform", 3)
