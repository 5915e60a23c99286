"""Keys chosen by score alone, over dense K; ``KVCache.select`` does the same over a paged cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgetok.errors import InputError
from edgetok.native import select as native_select
from edgetok.native.tensors import numpy_from


def select_keys(
    q: Any,
    k: Any,
    count: int,
    *,
    pages: bool = False,
    n_init: int = 0,
    n_local: int = 0,
    pool_width: int = 1,
    sum_heads: bool = False,
    softmax: bool = True,
    scale: float = 0.0,
    threads: int = 1,
) -> np.ndarray:
    """Choose keys by the logits of the mean query: softmax per head, sum over the heads of a group, max-pool, top.

    Args:
        q: float32 or float16 [B, Hq, N, d].
        k: float32 or float16 [B, Hkv, M, d].
        count: keys to choose; with ``pages`` the pages of the best keys, as many as hold ``count`` keys.
        pages: give numbers of 64-key pages instead of keys.
        n_init, n_local: first and last keys that are taken beside the best.
        pool_width: odd; scores become the largest within it.
        sum_heads: one list for all KV heads.
        softmax: softmax per query head before adding up heads; False adds raw logits.
        scale: of the logits; 0 = 1/sqrt(d).
        threads: 1..256.

    Returns:
        int32 [B, Hkv or 1, n], ascending, padded with -1; equal scores go to the lower index.

    Raises:
        InputError: a shape or number that does not fit.

    Source: TokenSelect.

    Example:
        >>> import numpy as np
        >>> k = np.eye(4, dtype=np.float32)[None, None]
        >>> select_keys(k[:, :, 2:3], k, 1).tolist()
        [[[2]]]
    """
    q, k = numpy_from(q, "q"), numpy_from(k, "k")
    if q.ndim != 4 or k.ndim != 4 or 0 in q.shape or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise InputError(f"q must be [B, Hq, N, d], k [B, Hkv, M, d], Hq a multiple of Hkv: {q.shape}, {k.shape}")
    numbers = {"count": count, "n_init": n_init, "n_local": n_local, "pool_width": pool_width}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < 2**30:
            raise InputError(f"{name} must be a whole number from 0 to {2**30 - 1}, got {value!r}")
    b, hq, n, d = q.shape
    hkv, m = k.shape[1:3]
    most = count + n_init + n_local
    capacity = min(-(-most // 64) + 4, -(-m // 64)) if pages else min(most, m)
    out = np.empty((b, 1 if sum_heads else hkv, capacity), np.int32)
    fields = {"batch": b, "hq": hq, "hkv": hkv, "d": d, "dv": d, "max_n": n, "max_m": max(m, 1), "scale": scale}
    native_select.run(
        fields, {"q": q, "k": k}, out, threads, None, k=count, pool_width=pool_width, n_init=n_init, n_local=n_local,
        sum_heads=int(sum_heads), softmax=int(softmax), round_pages=int(pages),
    )  # fmt: skip
    return out
