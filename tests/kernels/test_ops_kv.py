"""Rotary embedding fused with appending to a KV cache: byte for byte the two steps one after the other."""

from __future__ import annotations

import numpy as np
import pytest

from edgetok import kernels
from edgetok.errors import InputError
from edgetok.kernels.kv import KVCache


def keys(n: int, d: int, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([3, n, d])
    return rng.normal(size=(2, n, d)).astype(dtype), rng.normal(size=(2, n, d)).astype(dtype)


def cache(kind: str, d: int, **options: object) -> KVCache:
    return KVCache(layers=1, batch=1, hkv=2, d=d, kind=kind, max_tokens=512, **options)


@pytest.mark.parametrize("kind", ["int8", "int4", "f16"])
@pytest.mark.parametrize(("d", "width"), [(64, 64), (80, 80), (96, 48), (40, 40)])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_fused_append_equals_rope_then_append(kind: str, d: int, width: int, interleaved: bool, dtype: type) -> None:
    k, v = keys(200, d, dtype)
    tables = kernels.rope_tables(300, width)
    fused, plain, stepped = cache(kind, d), cache(kind, d), cache(kind, d)
    pos = np.sort(np.random.default_rng(4).permutation(300)[:200])
    fused.append(0, 0, k, v, pos, rope=tables, interleaved=interleaved)
    turned = kernels.rope(k.astype(np.float32), *tables, positions=pos, interleaved=interleaved)
    plain.append(0, 0, turned, v.astype(np.float32), pos)
    for start, end in ((0, 1), (1, 64), (64, 130), (130, 200)):
        piece = slice(start, end)
        stepped.append(0, 0, k[:, piece], v[:, piece], pos[piece], rope=tables, interleaved=interleaved)
    assert fused.save(0) == plain.save(0)
    assert stepped.save(0) == plain.save(0)


def test_tables_may_begin_at_a_later_position() -> None:
    k, v = keys(70, 64, np.float32)
    late, whole = cache("int8", 64), cache("int8", 64)
    late.append(0, 0, k, v, np.arange(100, 170), rope=kernels.rope_tables(80, 64, first=95), first=95)
    whole.append(0, 0, k, v, np.arange(100, 170), rope=kernels.rope_tables(170, 64))
    assert late.save(0) == whole.save(0)
    late.append(0, 0, k[:, :5], v[:, :5], rope=kernels.rope_tables(5, 64, first=170), first=170)


def test_a_position_without_a_row_changes_nothing() -> None:
    k, v = keys(10, 64, np.float32)
    one = cache("int8", 64)
    one.append(0, 0, k, v, rope=kernels.rope_tables(15, 64))
    before = one.save(0)
    for bad in (
        {"rope": kernels.rope_tables(15, 64)},
        {"rope": kernels.rope_tables(100, 64), "first": 11},
        {"rope": kernels.rope_tables(100, 64), "first": -1},
        {"rope": kernels.rope_tables(100, 66)},
        {"rope": (kernels.rope_tables(100, 64)[0], kernels.rope_tables(99, 64)[1])},
    ):
        with pytest.raises(InputError):
            one.append(0, 0, k, v, **bad)
    assert one.save(0) == before
