"""Token merging against the numpy laws of the reduction methods: the same plan, the same merged rows."""

from __future__ import annotations

import numpy as np
import pytest

from edgetok import kernels
from edgetok.converters.reduce import core
from edgetok.converters.reduce.base import Plan, TokenView
from edgetok.converters.reduce.pitome import METHOD as PITOME
from edgetok.converters.reduce.pitome import PiToMeSettings, energy, energy_text
from edgetok.converters.reduce.tome import METHOD as TOME
from edgetok.converters.reduce.tome import ToMeSettings
from edgetok.errors import InputError

# (batch, heads, tokens, head width, protected rows, merged rows)
CASES = [
    (2, 3, 197, 64, 1, 13),
    (1, 1, 6, 2, 1, 1),
    (1, 2, 33, 40, 0, 16),
    (3, 1, 64, 17, 2, 8),
    (1, 6, 577, 64, 1, 40),
]
CASES += [(1, 1, 6, 3, 4, 1), (1, 2, 50, 20, 7, 21)]
# chosen so that no two energies lie closer than 1e-7, which float32 could not order
SEEDS = {33: 34, 50: 48, 64: 26, 197: 42, 577: 19}
FORMS = {"pitome": "pure", "pitome-hybrid": "hybrid", "pitome-text": "text"}


def keys(batch: int, heads: int, tokens: int, width: int) -> np.ndarray:
    """Seeded keys in clusters, so that similarities spread widely."""
    rng = np.random.default_rng([SEEDS.get(tokens, 7), batch, heads, tokens, width])
    centres = rng.normal(size=(batch, heads, max(2, tokens // 5), width))
    pick = rng.integers(0, centres.shape[2], (batch, 1, tokens, 1))
    near = np.take_along_axis(centres, np.broadcast_to(pick, (batch, heads, tokens, 1)), 2)
    return (near + rng.uniform(0.2, 1.5, (batch, 1, tokens, 1)) * rng.normal(size=near.shape)).astype(np.float32)


def law(kind: str, k: np.ndarray, size: np.ndarray, protected: int, r: int, margin: float) -> Plan:
    """The plan of the reduction method in float64."""
    x = np.zeros((*size.shape, 1))
    view = TokenView(x, k.astype(np.float64), None, size[..., None], protected)
    if kind == "tome":
        return TOME.plan(view, r, ToMeSettings(r=(r,)))
    return PITOME.plan(view, r, PiToMeSettings(r=(r,), margin=margin, form=FORMS[kind]))


def sizes(batch: int, tokens: int, padding: int) -> np.ndarray:
    size = np.random.default_rng([8, batch, tokens]).integers(1, 5, (batch, tokens)).astype(np.float32)
    if padding:
        size[:, -padding:] = 0
    return size


@pytest.mark.parametrize("kind", ["tome", *FORMS])
@pytest.mark.parametrize("case", CASES, ids=[f"{c[2]}x{c[3]}" for c in CASES])
def test_matching_is_the_plan_of_the_numpy_law(kind: str, case: tuple[int, ...]) -> None:
    batch, heads, tokens, width, protected, r = case
    # padding energies tie in float32 (1000 + energy) and not in float64, so only ToMe is compared with padding
    padding = 9 if kind == "tome" and tokens >= 50 else 0
    k, size = keys(batch, heads, tokens, width), sizes(batch, tokens, padding)
    got = kernels.match_tokens(k, r, kind=kind, keep=protected, size=size, margin=0.45)
    want = law(kind, k, size, protected, r, 0.45)
    if kind != "tome" and tokens > 10:
        unit = core.unit(k.astype(np.float64).mean(1)[:, protected:])
        scores = energy_text(unit, 0.45) if kind == "pitome-text" else energy(unit, 0.45, 1.0)
        assert np.diff(np.sort(scores, 1), axis=1).min() > 1e-7, "these keys decide nothing in float32"
    np.testing.assert_array_equal(got.kept, want.kept)
    np.testing.assert_array_equal(got.removed, want.removed)
    np.testing.assert_array_equal(got.target, want.target)
    mean = k.mean(1, dtype=np.float32)
    again = kernels.match_tokens(mean, r, kind=kind, keep=protected, size=size, margin=0.45)
    np.testing.assert_array_equal(np.sort(again.removed), np.sort(want.removed))


@pytest.mark.parametrize("kind", ["tome", *FORMS])
@pytest.mark.parametrize("int8", [False, True])
def test_padding_merges_before_words(kind: str, int8: bool) -> None:
    k, size = keys(2, 2, 64, 16), sizes(2, 64, 20)
    got = kernels.match_tokens(k, 9, kind=kind, keep=1, size=size, int8=int8)
    assert (got.removed >= 44).all()
    assert (np.take_along_axis(got.kept, got.target, 1) >= 44).all()


@pytest.mark.parametrize("kind", ["tome", *FORMS])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("case", CASES, ids=[f"{c[2]}x{c[3]}" for c in CASES])
def test_merge_is_the_numpy_law_and_one_call_is_two(kind: str, int8: bool, case: tuple[int, ...]) -> None:
    batch, heads, tokens, width, protected, r = case
    k, size = keys(batch, heads, tokens, width), sizes(batch, tokens, 0)
    x = np.random.default_rng(9).normal(size=(batch, tokens, 37)).astype(np.float32)
    plan = kernels.match_tokens(k, r, kind=kind, keep=protected, size=size, int8=int8, margin=0.3)
    rows = np.sort(np.concatenate([plan.kept, plan.removed], 1))
    np.testing.assert_array_equal(rows, np.broadcast_to(np.arange(tokens), rows.shape))
    np.testing.assert_array_equal(plan.kept[:, :protected], np.broadcast_to(np.arange(protected), (batch, protected)))
    got = kernels.merge_rows(x, plan, size=size)
    want, want_size = core.merge(x.astype(np.float64), size[..., None], plan.kept, plan.removed, plan.target)
    # each output is a mean of at most r + 1 rows: r + 1 products and sums and a division, one rounding each
    np.testing.assert_allclose(got.x, want, rtol=0, atol=(r + 3) * np.finfo(np.float32).eps * np.abs(x).max())
    np.testing.assert_array_equal(got.size, want_size[..., 0])
    np.testing.assert_array_equal(
        got.map, Plan("merge", tokens, protected, plan.kept, plan.removed, plan.target).origin()
    )
    alone = np.ones(got.size.shape, bool)
    np.put_along_axis(alone, plan.target, False, 1)
    np.testing.assert_array_equal(got.x[alone], np.take_along_axis(x, plan.kept[..., None], 1)[alone])
    one = kernels.token_merge(x, k, r, kind=kind, keep=protected, size=size, int8=int8, margin=0.3)
    for name in ("x", "size", "map"):
        np.testing.assert_array_equal(getattr(one, name), getattr(got, name))


@pytest.mark.parametrize("kind", ["pitome", "pitome-text"])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 196, 577])
def test_energy_agrees_with_the_numpy_law(kind: str, tokens: int) -> None:
    k = keys(2, 3, tokens, 48)
    unit = core.unit(k.astype(np.float64).mean(1)[:, min(1, tokens - 1) :])
    want = energy(unit, 0.45, 0.8) if kind == "pitome" else energy_text(unit, 0.45)
    got = kernels.pitome_energy(k, kind=kind, keep=min(1, tokens - 1), margin=0.45, alpha=0.8)
    # a cosine is 48 products of rounded unit entries; the Gaussian's slope in it is below 1.2 / sigma^2 = 4
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)
    coarse = kernels.pitome_energy(k, kind=kind, keep=min(1, tokens - 1), margin=0.45, alpha=0.8, int8=True)
    # half a code in 127 on each side, spread over 48 entries, averages out: 0.02 leaves room for one-row samples
    np.testing.assert_allclose(coarse, want, rtol=0, atol=0.02)


def test_int8_links_differ_only_where_similarities_nearly_tie() -> None:
    k = keys(1, 2, 400, 64)
    exact, coarse = kernels.match_tokens(k, 50), kernels.match_tokens(k, 50, int8=True)
    unit = core.unit(k.mean(1))[0]
    best = (unit[::2] @ unit[1::2].T).max(1)
    worst_kept = np.sort(best)[-50]
    extra = set(coarse.removed[0]) - set(exact.removed[0])
    assert all(best[i // 2] > worst_kept - 0.02 for i in extra)
    assert len(extra) < 10


def test_ties_go_to_the_lower_index() -> None:
    k = np.ones((1, 8, 3), np.float32)
    got = kernels.match_tokens(k, 2)
    np.testing.assert_array_equal(got.removed, [[0, 2]])
    np.testing.assert_array_equal(np.take_along_axis(got.kept, got.target, 1), [[1, 1]])


def test_golden_of_two_layers() -> None:
    x = np.array([0, 10, 20, 30, 40, 50], np.float32).reshape(1, 6, 1)
    k = np.array([(1, 0), (1, 0), (0, 1), (0.6, 0.8), (0.8, 0.6), (0, 1)], np.float32)[None]
    one = kernels.token_merge(x, k, 2, keep=1)
    np.testing.assert_allclose(one.x.ravel(), [0, 10, 35, 35], rtol=1e-6)
    np.testing.assert_array_equal(one.size, [[1, 1, 2, 2]])
    np.testing.assert_array_equal(one.map, [[0, 1, 3, 2, 2, 3]])
    k2 = np.array([(1, 0), (1, 0), (0.6, 0.8), (0, 1)], np.float32)[None]
    two = kernels.token_merge(one.x, k2, 1, keep=1, size=one.size)
    np.testing.assert_allclose(two.x.ravel(), [0, 10, 35], rtol=1e-6)
    np.testing.assert_array_equal(two.size, [[1, 1, 4]])
    np.testing.assert_array_equal(two.map[0][one.map[0]], [0, 1, 2, 2, 2, 2])


def test_samples_do_not_depend_on_each_other() -> None:
    k = keys(3, 2, 41, 24)
    both = kernels.match_tokens(k, 7, kind="pitome-hybrid", keep=1)
    for b in range(3):
        one = kernels.match_tokens(k[b : b + 1], 7, kind="pitome-hybrid", keep=1)
        np.testing.assert_array_equal(one.kept, both.kept[b : b + 1])


def test_odd_keys_still_give_a_partition() -> None:
    k = keys(1, 1, 40, 8)[:, 0]
    k[0, 3] = np.nan
    k[0, 8] = np.inf
    k[0, 11] = 0
    for kind in ("tome", *FORMS):
        for int8 in (False, True):
            got = kernels.match_tokens(k, 10, kind=kind, int8=int8)
            rows = np.sort(np.concatenate([got.kept, got.removed], 1))[0]
            np.testing.assert_array_equal(rows, np.arange(40))
            assert ((got.target >= 0) & (got.target < 30)).all()


@pytest.mark.parametrize("kind", ["tome", *FORMS])
def test_nothing_to_merge_keeps_every_row(kind: str) -> None:
    for tokens, keep in ((0, 0), (1, 0), (1, 1), (2, 1), (5, 4), (9, 2)):
        k, x = keys(2, 1, tokens, 5), np.ones((2, tokens, 3), np.float32)
        done = kernels.token_merge(x, k, 0, kind=kind, keep=keep)
        assert done.x.shape == x.shape
        np.testing.assert_array_equal(np.sort(done.map), np.broadcast_to(np.arange(tokens), (2, tokens)))


def test_bad_numbers_are_refused() -> None:
    k, x = keys(1, 1, 10, 4), np.zeros((1, 10, 3), np.float32)
    for arguments in ({"r": 6}, {"r": -1}, {"r": 1, "keep": 11}, {"r": 1, "keep": -1}, {"r": 5, "keep": 1}):
        with pytest.raises(InputError):
            kernels.match_tokens(k, **arguments)
    for wrong in ({"kind": "nearest"}, {"kind": "pitome", "margin": 2.0}, {"kind": "pitome", "alpha": np.nan}):
        with pytest.raises(InputError):
            kernels.match_tokens(k, 1, **wrong)
    with pytest.raises(InputError):
        kernels.token_merge(x[:, :9], k, 2)
    good = kernels.match_tokens(k, 2)
    for bad in (10, -1):
        kept = good.kept.copy()
        kept[0, 0] = bad
        with pytest.raises(InputError, match="range"):
            kernels.merge_rows(x, kernels.Matching(kept, good.removed, good.target))
    with pytest.raises(InputError, match="range"):
        kernels.merge_rows(x, kernels.Matching(good.kept, good.removed, good.target + 8))
