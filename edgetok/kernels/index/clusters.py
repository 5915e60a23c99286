"""Clusters: tokens grouped by k-means, clusters of queries paired with clusters of keys (Sparse VideoGen2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgetok.errors import InputError
from edgetok.kernels.index import law
from edgetok.kernels.index.blocks import BlockIndex
from edgetok.native import index as native


@dataclass(frozen=True)
class Clusters:
    """An index over clusters and how tokens were grouped.

    Args:
        index: variable blocks, with row orders in ``q_perm`` and ``k_perm``.
        q_labels: int32 [B, H, N], cluster of each query.
        k_labels: int32 [B, Hkv, M], cluster of each key.
        q_inverse: int32 [B, H, N]; q_inverse[q_perm[r]] = r.
        k_inverse: int32 [B, Hkv, M].
    """

    index: BlockIndex
    q_labels: np.ndarray
    k_labels: np.ndarray
    q_inverse: np.ndarray
    k_inverse: np.ndarray


def from_clusters(
    q: Any,
    k: Any,
    *,
    q_clusters: int,
    k_clusters: int,
    p: float = 0.9,
    min_ratio: float = 0.1,
    iterations: int = 4,
    start: Clusters | None = None,
    scale: float | None = None,
    threads: int = 1,
) -> Clusters:
    """Group queries and keys, and keep for each group of queries the groups of keys with its mass.

    Args:
        q: float [B, H, N, d].
        k: float [B, Hkv, M, d].
        q_clusters: groups of queries of one head, 1..65536.
        k_clusters: groups of keys.
        p: mass to reach, 0..1.
        min_ratio: share of the key clusters kept at least, 0..1.
        iterations: of k-means at most, 1..1000; it stops when no token moves.
        start: labels of an earlier step to go on from (2 iterations are then enough).
        scale: of the logits; 1/sqrt(d) when None.
        threads: of the library's pool; heads are the tasks.

    Raises:
        InputError: shapes that do not fit, or a parameter out of range.

    Source: Sparse VideoGen2 (2025). Departures: INT8 codes and centroids for assignment, seeds at equal distances
        instead of random ones, so that the same input gives the same index.
    """
    q32, k32 = law.pair_from(q, k)
    if not 1 <= q_clusters <= 65536 or not 1 <= k_clusters <= 65536 or iterations < 1:
        raise InputError(f"{q_clusters} and {k_clusters} clusters, {iterations} iterations", next="pass 1..65536, >= 1")
    if start is not None and (start.q_labels.shape != q32.shape[:3] or start.k_labels.shape != k32.shape[:3]):
        raise InputError("the start has labels of other shapes", next="pass the result for the same q and k shapes")
    csr, found = native.clusters(
        q32,
        k32,
        threads,
        None if start is None else (start.q_labels, start.k_labels),
        q_clusters=q_clusters,
        k_clusters=k_clusters,
        iterations=iterations,
        scale=scale or 0.0,
        p=p,
        min_ratio=min_ratio,
    )
    index = BlockIndex(
        csr,
        q32.shape[2],
        k32.shape[2],
        q32.shape[0],
        q32.shape[1],
        q_ptr=found["q_block_ptr"],
        k_ptr=found["k_block_ptr"],
        q_perm=found["q_perm"],
        k_perm=found["k_perm"],
    )
    return Clusters(index, found["q_labels"], found["k_labels"], found["q_inverse"], found["k_inverse"])


def kmeans_reference(
    codes: np.ndarray, clusters: int, iterations: int, start: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels [n], sizes [clusters] and centroids x 8 [clusters, d] of integer codes [n, d]."""
    n = len(codes)
    centroid = np.zeros((clusters, codes.shape[1]), np.int64)
    if n:
        centroid[:] = codes[(2 * np.arange(clusters) + 1) * n // (2 * clusters)]
    label = np.full(n, -1) if start is None else start.astype(np.int64)

    def sums() -> tuple[np.ndarray, np.ndarray]:
        total = np.zeros_like(centroid)
        np.add.at(total, label, codes)
        return total, np.bincount(label, minlength=clusters)

    def moved() -> np.ndarray:
        total, size = sums()
        return np.where(size[:, None] > 0, np.rint(total / np.maximum(size, 1)[:, None]), centroid).astype(np.int64)

    if start is not None:
        centroid = moved()
    for _ in range(iterations):
        new = (2 * codes @ centroid.T - (centroid**2).sum(1)).argmax(1) if n else label
        if np.array_equal(new, label):
            break
        label = new
        centroid = moved()
    total, size = sums() if n else (np.zeros_like(centroid), np.zeros(clusters, np.int64))
    return label, size, np.rint(8.0 * total / np.maximum(size, 1)[:, None]).astype(np.int64)


def clusters_reference(
    q: np.ndarray,
    k: np.ndarray,
    *,
    q_clusters: int,
    k_clusters: int,
    p: float,
    min_ratio: float,
    iterations: int,
    start: Clusters | None = None,
) -> Clusters:
    """The law of :func:`from_clusters` at the default scale."""
    batch, heads, n, width = q.shape
    kv_heads, m = k.shape[1], k.shape[2]
    tau = np.float32(1) / np.sqrt(np.float32(width)) * law.LOG2E / np.float32(64)
    kept = np.zeros((batch, heads, q_clusters, k_clusters), np.bool_)
    q_labels, k_labels = np.zeros((batch, heads, n), np.int32), np.zeros((batch, kv_heads, m), np.int32)
    q_ptr, k_ptr = (np.zeros((batch, heads, c + 1), np.int32) for c in (q_clusters, k_clusters))
    for b in range(batch):
        for h in range(heads):
            hk = h // (heads // kv_heads)
            starts = (None, None) if start is None else (start.q_labels[b, h], start.k_labels[b, hk])
            codes, scale_k = law.codes_of(law.centred(k[b, hk], law.mean_row(k[b, hk])))
            k_labels[b, hk], size_k, mean_k = kmeans_reference(codes, k_clusters, iterations, starts[1])
            codes, scale_q = law.codes_of(law.centred(q[b, h], None))
            q_labels[b, h], size_q, mean_q = kmeans_reference(codes, q_clusters, iterations, starts[0])
            q_ptr[b, h, 1:], k_ptr[b, h, 1:] = np.cumsum(size_q), np.cumsum(size_k)
            rivals = np.nonzero(size_k)[0]
            for i in np.nonzero(size_q)[0] if len(rivals) else []:
                w = law.weights(mean_k[rivals] @ mean_q[i], scale_q * tau, np.full(len(rivals), scale_k))
                w = w * size_k[rivals]
                w = (w >> max(int(w.max()).bit_length() - 24, 0)) + 1
                least = max(int(np.ceil(np.float64(np.float32(min_ratio)) * len(rivals))), 1)
                kept[b, h, i, rivals[law.select(w, law.target_of(p, int(w.sum())), least)]] = True
    csr = law.csr_of_map(kept, 0, 0, False)
    flat_q, flat_k = q_ptr.reshape(-1, q_clusters + 1), k_ptr.reshape(-1, k_clusters + 1)
    q_perm, k_perm = (np.argsort(x, axis=-1, kind="stable").astype(np.int32) for x in (q_labels, k_labels))
    index = BlockIndex(csr, n, m, batch, heads, q_ptr=flat_q, k_ptr=flat_k, q_perm=q_perm, k_perm=k_perm)
    q_inverse, k_inverse = (np.argsort(x, axis=-1, kind="stable").astype(np.int32) for x in (q_perm, k_perm))
    return Clusters(index, q_labels, k_labels, q_inverse, k_inverse)
