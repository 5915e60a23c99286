"""Axis orders: tokens of a video in the order in which a head's attention falls into blocks (PAROAttention)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgetok.errors import InputError
from edgetok.kernels.index import law
from edgetok.kernels.index.blocks import BLOCK, BlockIndex, block_count
from edgetok.native import index as native

ORDERS = ("FHW", "FWH", "HFW", "HWF", "WFH", "WHF")


@dataclass(frozen=True)
class AxisOrder:
    """An index over reordered tokens and why each order was chosen.

    Args:
        index: 64-blocks of the reordered tokens, ``q_perm`` = ``k_perm`` [1, H, N]; shared by the batch.
        order: int32 [H], number in ``ORDERS``, outermost axis first.
        quant: float64 [H, 6], mean over blocks of max / mean: what block quantization suffers from.
        sparse: float64 [H, 6], share of blocks whose mean is under eps.
        inverse: int32 [H, N]; inverse[perm[r]] = r.
    """

    index: BlockIndex
    order: np.ndarray
    quant: np.ndarray
    sparse: np.ndarray
    inverse: np.ndarray


def from_paro(
    q: Any,
    k: Any,
    frames: int,
    height: int,
    width: int,
    *,
    text: int = 0,
    density: float = 0.0,
    mass: float = 0.0,
    alpha: float = 0.5,
    eps: float = 0.0,
    scale: float | None = None,
    threads: int = 1,
) -> AxisOrder:
    """Choose an axis order for each head and a static mask in it, from calibration samples.

    Args:
        q: float [samples, H, N, d], N = text + frames * height * width, width fastest, after position encoding.
        k: float [samples, H, N, d].
        frames: size of the first axis; 1 for an image.
        height: size of the second.
        width: size of the third.
        text: tokens in front that are not reordered and always kept.
        density: share of the key blocks that each block row keeps, 0..1; 0 = no such goal.
        mass: attention mass that each block row keeps, 0..1; 0 = no such goal.
        alpha: weight of quantization against sparsity, 0..1.
        eps: mean probability under which a block is negligible; 0 = a tenth of uniform.
        scale: of the logits; 1/sqrt(d) when None.
        threads: of the library's pool; heads are the tasks.

    Raises:
        InputError: shapes that do not fit, or a parameter out of range.
        UnsupportedError: grouped heads; they share keys, so they would need one order.

    Source: PAROAttention (2025) for the two terms; both are divided by their sum over the six orders, which is our
        reading. Maps come from INT8 codes.
    """
    q32, k32 = law.pair_from(q, k)
    if min(frames, height, width, text) < 0 or text + frames * height * width != q32.shape[2]:
        raise InputError(f"{text} + {frames} x {height} x {width} tokens are not the {q32.shape[2]} of q")
    sizes = {"frames": frames, "height": height, "width": width, "text": text}
    goals = {"density": density, "mass": mass, "alpha": alpha, "eps": eps, "scale": scale or 0.0}
    csr, found = native.paro(q32, k32, threads, **sizes, **goals)
    perm = found["perm"][None]
    index = BlockIndex(csr, q32.shape[2], q32.shape[2], 1, q32.shape[1], q_perm=perm, k_perm=perm)
    return AxisOrder(index, found["order"], found["quant"], found["sparse"], found["inverse"])


def permutation(order: int, frames: int, height: int, width: int, text: int) -> np.ndarray:
    """int32 [N]: token at each row of order number ``order``."""
    grid = np.arange(frames * height * width).reshape(frames, height, width)
    axes = ["FHW".index(letter) for letter in ORDERS[order]]
    return np.concatenate([np.arange(text), text + grid.transpose(axes).ravel()]).astype(np.int32)


def paro_reference(
    q: np.ndarray,
    k: np.ndarray,
    frames: int,
    height: int,
    width: int,
    *,
    text: int,
    density: float,
    mass: float,
    alpha: float,
    eps: float,
) -> AxisOrder:
    """The law of :func:`from_paro` at the default scale, with whole maps."""
    samples, heads, n, _ = q.shape
    blocks = block_count(n)
    perms = [permutation(o, frames, height, width, text) for o in range(6)]
    small = np.float64(0.1) / n if eps == 0 else np.float64(np.float32(eps))
    quant, sparse = np.zeros((heads, 6)), np.zeros((heads, 6))
    order = np.zeros(heads, np.int32)
    kept = np.zeros((heads, blocks, blocks), np.bool_)
    for h in range(heads):
        maps = np.stack([_integer_map(q[b, h], k[b, h]) for b in range(samples)])
        sums = [_blocks(maps[:, p][:, :, p], np.add).sum(0) for p in perms]
        tops = [_blocks(maps[:, p][:, :, p], np.maximum).max(0) for p in perms]
        extent = np.minimum(BLOCK, n - np.arange(blocks) * BLOCK)
        area = np.outer(extent, extent) * samples
        for o in range(6):
            ratio = np.where(sums[o] > 0, tops[o] * area.astype(np.float64) / np.maximum(sums[o], 1), 1.0)
            quant[h, o] = np.cumsum(ratio)[-1] / (blocks * blocks)
            sparse[h, o] = (sums[o] < small * area * 16777216.0).sum() / (blocks * blocks)
        order[h] = _best(quant[h], sparse[h], alpha)
        kept[h] = _static_mask(sums[order[h]], n, text, density, mass)
    perm = np.stack([perms[o] for o in order])[None]
    index = BlockIndex(law.csr_of_map(kept, n, n, False), n, n, 1, heads, q_perm=perm, k_perm=perm)
    return AxisOrder(index, order, quant, sparse, np.argsort(perm[0], axis=-1).astype(np.int32))


def _integer_map(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    codes_q, scale_q = law.block_codes(q, None)
    codes_k, scale_k = law.block_codes(k, law.mean_row(k))
    tau = np.float32(1) / np.sqrt(np.float32(q.shape[1])) * law.LOG2E
    dots = codes_q.reshape(-1, q.shape[1]) @ codes_k.reshape(-1, q.shape[1])[: len(k)].T
    key_scale = np.repeat(scale_k, BLOCK)[: len(k)]
    out = np.zeros((len(q), len(k)), np.int64)
    for i in range(len(q)):
        w = law.weights(dots[i], scale_q[i // BLOCK] * tau, key_scale)
        out[i] = (w.astype(np.float32) * (np.float32(16777216) / w.sum().astype(np.float32))).astype(np.int64)
    return out


def _blocks(maps: np.ndarray, how: np.ufunc) -> np.ndarray:
    starts = np.arange(0, maps.shape[1], BLOCK)
    return how.reduceat(how.reduceat(maps, starts, axis=1), starts, axis=2)


def _best(quant: np.ndarray, sparse: np.ndarray, alpha: float) -> int:
    q, s = quant / np.cumsum(quant)[-1], np.full(6, 1 / 6)
    if sparse.sum() > 0:
        s = sparse / np.cumsum(sparse)[-1]
    weight = np.float64(np.float32(alpha))
    return int((weight * q + (1.0 - weight) * (1.0 - s)).argmin())


def _static_mask(sums: np.ndarray, n: int, text: int, density: float, mass: float) -> np.ndarray:
    blocks = len(sums)
    always = np.arange(blocks) < block_count(text)
    if n % BLOCK:
        always[-1] = True
    kept = np.zeros((blocks, blocks), np.bool_)
    least = max(int(np.ceil(np.float64(np.float32(density)) * blocks)), 1)
    for r in range(blocks):
        weight = (sums[r] >> max(int(sums[r].max()).bit_length() - 24, 0)) + 1
        goal = max(law.target_of(mass, int(weight.sum())) - int(weight[always].sum()), 0) if mass else 0
        kept[r] = always
        kept[r, law.select(np.where(always, 0, weight), goal, least - int(always.sum()))] = True
    kept[always] = True
    return kept
