"""The cluster index: libedgetok against the numpy law, k-means, permutations, bad input."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from edgetok.errors import InputError
from edgetok.kernels.index import density_and_recall, from_clusters
from edgetok.kernels.index.clusters import Clusters, clusters_reference, kmeans_reference
from edgetok.native.index import Csr

SETTINGS = {"q_clusters": 7, "k_clusters": 11, "p": 0.7, "min_ratio": 0.1, "iterations": 5}


def groups(seed: int, batch: int, heads: int, kv_heads: int, n: int, m: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries and keys scattered around a few common centres, in random order."""
    rng = np.random.default_rng(seed)
    centre = rng.standard_normal((9, d)) * 2

    def side(h: int, tokens: int) -> np.ndarray:
        x = centre[rng.integers(0, 9, (batch, h, tokens))] + rng.standard_normal((batch, h, tokens, d)) * 0.5
        return x.astype(np.float32)

    return side(heads, n), side(kv_heads, m)


def assert_same(found: Clusters, law: Clusters) -> None:
    for name in ("q_labels", "k_labels", "q_inverse", "k_inverse"):
        np.testing.assert_array_equal(getattr(found, name), getattr(law, name), err_msg=name)
    for name in ("q_ptr", "k_ptr", "q_perm", "k_perm"):
        np.testing.assert_array_equal(getattr(found.index, name), getattr(law.index, name), err_msg=name)
    for field in dataclasses.fields(Csr):
        np.testing.assert_array_equal(
            getattr(found.index.csr, field.name), getattr(law.index.csr, field.name), err_msg=field.name
        )


def assert_postconditions(found: Clusters) -> None:
    index = found.index
    index.check()
    assert index.q_ptr is not None
    assert index.k_ptr is not None
    assert index.q_perm is not None
    assert index.k_perm is not None
    height = np.diff(index.q_ptr).reshape(index.batch, index.heads, -1)
    width = np.diff(index.k_ptr).reshape(index.batch, index.heads, -1)
    mask = index.mask()
    assert (mask.any(3) == ((height > 0) & (index.m > 0))).all()
    assert not mask[np.broadcast_to(width[:, :, None] == 0, mask.shape)].any()
    for perm, inverse in ((index.q_perm, found.q_inverse), (index.k_perm, found.k_inverse)):
        order = np.broadcast_to(np.arange(perm.shape[-1]), perm.shape)
        np.testing.assert_array_equal(np.take_along_axis(inverse, perm, -1), order)
    sorted_labels = np.take_along_axis(found.q_labels, index.q_perm, -1)
    assert (np.diff(sorted_labels, axis=-1) >= 0).all()


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 300, 300, 16), (2, 4, 2, 150, 333, 40), (1, 2, 1, 5, 70, 24), (1, 1, 1, 1, 1, 8)]
)
@pytest.mark.parametrize(
    "change",
    [{}, {"p": 0.0, "min_ratio": 0.0}, {"p": 1.0}, {"q_clusters": 1, "k_clusters": 1},
     {"k_clusters": 100, "iterations": 1},
     {"q_clusters": 40, "k_clusters": 65, "p": 0.95, "min_ratio": 0.5}],
)  # fmt: skip
def test_clusters_equal_their_law(shape: tuple[int, ...], change: dict[str, float]) -> None:
    q, k = groups(sum(shape), *shape)
    settings = SETTINGS | change
    found = from_clusters(q, k, **settings)
    assert_same(found, clusters_reference(q, k, **settings))
    assert_postconditions(found)


def test_clusters_go_on_from_earlier_labels() -> None:
    q, k = groups(3, 1, 2, 2, 400, 400, 32)
    short = SETTINGS | {"iterations": 1}
    first = from_clusters(q, k, **short)
    second = from_clusters(q, k, **short, start=first)
    assert_same(second, clusters_reference(q, k, **short, start=first))
    assert (second.q_labels != first.q_labels).any()
    np.testing.assert_array_equal(second.q_labels, from_clusters(q, k, **(SETTINGS | {"iterations": 2})).q_labels)


def test_clusters_are_the_same_on_every_isa_and_thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = groups(4, 1, 4, 2, 500, 500, 72)
    settings = SETTINGS | {"q_clusters": 33, "k_clusters": 70}
    whole = from_clusters(q, k, **settings)
    assert_same(from_clusters(q, k, **settings, threads=3), whole)
    for isa in ("scalar", "avx2"):
        monkeypatch.setenv("EDGETOK_MAX_ISA", isa)
        assert_same(from_clusters(q, k, **settings), whole)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38, 0.0])
def test_clusters_of_wild_values_equal_their_law(value: float) -> None:
    q, k = groups(5, 1, 2, 1, 200, 200, 16)
    for x in (q, k):
        x[np.random.default_rng(0).random(x.shape) < 0.02] = value
    if value == 0:
        q[:], k[:] = 0, 0  # one cluster takes all tokens, the others stay empty
    found = from_clusters(q, k, **SETTINGS)
    assert_same(found, clusters_reference(q, k, **SETTINGS))
    assert_postconditions(found)


def test_kmeans_golden() -> None:
    """Four points on a line, two clusters: seeds are tokens 1 and 3; one round settles it."""
    codes = np.array([[0, 0], [4, 0], [40, 0], [44, 0]])
    label, size, centroid = kmeans_reference(codes, 2, 10, None)
    assert label.tolist() == [0, 0, 1, 1]
    assert size.tolist() == [2, 2]
    assert centroid.tolist() == [[16, 0], [336, 0]]  # 8 x mean


def test_clusters_find_mass_that_is_scattered() -> None:
    """Groups in random order: blocks of neighbours would need everything, clusters need little."""
    q, k = groups(6, 1, 1, 1, 1000, 1000, 32)
    found = from_clusters(q, k, q_clusters=20, k_clusters=20, p=0.9, min_ratio=0.05)
    quality = density_and_recall(q, k, found.index)
    assert quality.recall[0, 0] > 0.9
    assert quality.density[0, 0] < 0.5
    assert quality.density[0, 0] == pytest.approx(found.index.density())


@pytest.mark.parametrize(
    "bad",
    [{"q_clusters": 0}, {"k_clusters": 65537}, {"p": -1.0}, {"p": float("nan")}, {"min_ratio": 2.0}, {"iterations": 0},
     {"iterations": 1001}, {"threads": 0}],
)  # fmt: skip
def test_clusters_refuse_bad_parameters(bad: dict[str, float]) -> None:
    q, k = groups(0, 1, 1, 1, 64, 64, 16)
    with pytest.raises(InputError):
        from_clusters(q, k, **(SETTINGS | bad))


def test_clusters_refuse_labels_that_do_not_fit() -> None:
    q, k = groups(0, 1, 1, 1, 64, 64, 16)
    found = from_clusters(q, k, **SETTINGS)
    for labels in (found.q_labels + 7, found.q_labels - 7, found.q_labels[:, :, :5]):
        with pytest.raises(InputError):
            from_clusters(q, k, **SETTINGS, start=dataclasses.replace(found, q_labels=labels))


def test_clusters_of_nothing() -> None:
    for n, m in ((0, 10), (10, 0), (0, 0)):
        found = from_clusters(np.ones((1, 1, n, 8), np.float32), np.ones((1, 1, m, 8), np.float32), **SETTINGS)
        assert_postconditions(found)
        assert len(found.index.csr.col) == (1 if n * m else 0)
