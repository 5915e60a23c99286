"""Each builder's index given to attention: the same as float64 softmax over the keys that the index names."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from edgetok.kernels import attention
from edgetok.kernels.index import (
    BlockIndex,
    from_clusters,
    from_mask,
    from_paro,
    from_radial,
    from_topp,
    from_window,
    from_xattn,
)
from edgetok.kernels.index.quality import _keeper

FRAMES, HEIGHT, WIDTH, TEXT = 4, 6, 11, 20
N = TEXT + FRAMES * HEIGHT * WIDTH


def tokens(heads: int, kv_heads: int, n: int, m: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = [(1, heads, n, 32), (1, kv_heads, m, 32), (1, kv_heads, m, 24)]
    q, k, v = (rng.standard_normal(s).astype(np.float32) for s in shapes)
    return q, k, v


def masked(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, index: BlockIndex, causal: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Float64 attention over the index's pairs, and which rows see a key."""
    heads, n, m, group = q.shape[1], q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    out, sees = np.zeros((1, heads, n, v.shape[3])), np.zeros((heads, n), np.bool_)
    for h in range(heads):
        keep = _keeper(index, 0, h, n, m).of(np.arange(n))
        if causal:
            keep &= np.arange(m)[None] <= np.arange(n)[:, None] + (m - n)
        sees[h] = keep.any(1)
        s = q[0, h].astype(np.float64) @ k[0, h // group].astype(np.float64).T / np.sqrt(q.shape[3])
        p = np.where(keep, np.exp(s - s.max(1, keepdims=True)), 0)
        out[0, h] = p @ v[0, h // group] / np.maximum(p.sum(1, keepdims=True), 1e-300)
    return out, sees


def random_mask() -> BlockIndex:
    rng = np.random.default_rng(1)
    mask = rng.random((4, N, N)) < 0.3
    mask[:, 64:128, 64:192] = True
    mask[:, :, 192:256] = False
    return from_mask(mask)


BUILDERS: dict[str, tuple[int, int, bool, Callable[[np.ndarray, np.ndarray], BlockIndex]]] = {
    "window": (4, 2, False, lambda q, k: from_window(N, N, left=50, right=30, sink=5)),
    "causal window": (4, 2, True, lambda q, k: from_window(N, N, left=100, sink=70, causal=True)),
    "mask": (4, 2, False, lambda q, k: random_mask()),
    "causal mask": (4, 4, True, lambda q, k: from_mask(np.tri(N, dtype=np.bool_), causal=True)),
    "radial": (4, 4, False, lambda q, k: from_radial(FRAMES, HEIGHT * WIDTH, text=TEXT)),
    "topp": (4, 2, False, lambda q, k: from_topp(q, k, p=0.4, theta=-1)),
    "causal topp": (4, 2, True, lambda q, k: from_topp(q, k, p=0.4, theta=-1, causal=True)),
    "causal xattn": (4, 2, True, lambda q, k: from_xattn(q, k, threshold=0.4, causal=True)),
    "clusters": (4, 4, False, lambda q, k: from_clusters(q, k, q_clusters=9, k_clusters=23, p=0.5).index),
    "grouped clusters": (4, 2, False, lambda q, k: from_clusters(q, k, q_clusters=5, k_clusters=7, p=0.3).index),
    "clusters, most of them empty": (
        2,
        2,
        False,
        lambda q, k: from_clusters(q, k, q_clusters=400, k_clusters=300, p=0.3).index,
    ),
    "paro": (4, 4, False, lambda q, k: from_paro(q, k, FRAMES, HEIGHT, WIDTH, text=TEXT, density=0.5).index),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_attention_over_an_index_is_softmax_over_its_pairs(name: str) -> None:
    heads, kv_heads, causal, build = BUILDERS[name]
    q, k, v = tokens(heads, kv_heads, N, N)
    index = build(q, k)
    assert index.density() < 1 or name in ("causal mask", "radial")
    expected, sees = masked(q, k, v, index, causal)
    assert sees.all()
    exact = attention(q, k, v, index=index, causal=causal, compute="fp32")
    np.testing.assert_allclose(exact, expected, atol=2e-5)  # float32 sums of a few hundred terms of size 1
    quick = attention(q, k, v, index=index, causal=causal, compute="int8")
    assert np.abs(quick - expected).mean() < 0.03 * np.abs(expected).mean()  # INT8 of Gaussian data: about 1 %


def test_attention_over_an_index_of_other_lengths() -> None:
    q, k, v = tokens(3, 1, 130, 300)
    for index, causal in (
        (from_window(130, 300, left=70, sink=3, causal=True), True),
        (from_topp(q, k, p=0.5, theta=-1, causal=True), True),
        (from_xattn(q, k, threshold=0.5), False),
        (from_clusters(q, k, q_clusters=3, k_clusters=5, p=0.3).index, False),
    ):
        expected, _ = masked(q, k, v, index, causal)
        np.testing.assert_allclose(attention(q, k, v, index=index, causal=causal, compute="fp32"), expected, atol=2e-5)
