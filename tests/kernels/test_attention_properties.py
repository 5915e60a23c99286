"""What holds for any attention kernel whatever its arithmetic, odd values, views, threads, column masses."""

from __future__ import annotations

import threading

import attention_law as law
import numpy as np
import pytest

from edgetok import attention
from edgetok.errors import InputError
from edgetok.kernels import AttentionOptions, attention_outputs, column_masses, merge_attention

COMPUTES = ("fp32", "int8", "int8_float_pv")


@pytest.mark.parametrize("compute", COMPUTES)
def test_listing_every_block_is_dense_attention_bit_for_bit(compute: str) -> None:
    q, k, v = law.draw(1, 2, 1, 190, 300, 64, 64)
    full = np.ones((3, 5), bool)
    for causal in (False, True):
        dense = attention(q, k, v, compute=compute, causal=causal)
        assert (attention(q, k, v, compute=compute, causal=causal, block_mask=full) == dense).all()


@pytest.mark.parametrize("compute", COMPUTES)
def test_masked_and_unmasked_tiles_agree_bit_for_bit(compute: str) -> None:
    """A window that hides nothing sends every tile through masks that are all ones, or through none."""
    q, k, v = law.draw(1, 2, 1, 70, 128, 64, 64)
    seen = np.ones((1, 1, 70, 128), bool)
    from edgetok.kernels.index import from_mask

    assert (attention(q, k, v, compute=compute, index=from_mask(seen)) == attention(q, k, v, compute=compute)).all()
    # rows that see all keys do not notice that others in their strip do not
    limited = attention(
        q, k, v, compute=compute, options=AttentionOptions(q_pos=np.r_[np.full(69, 500), 40][None]), causal=True
    )
    assert (limited[:, :, :69] == attention(q, k, v, compute=compute)[:, :, :69]).all()


@pytest.mark.parametrize("compute", COMPUTES)
def test_equal_heads_of_a_group_give_equal_bits(compute: str) -> None:
    q, k, v = law.draw(1, 1, 1, 70, 130, 64, 64)
    out = attention(np.repeat(q, 4, 1), np.repeat(k, 2, 1), np.repeat(v, 2, 1), compute=compute, causal=True)
    assert (out == out[:, :1]).all()


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("threads", [2, 3])
def test_thread_count_and_repetition_change_no_bit(compute: str, threads: int) -> None:
    q, k, v = law.draw(2, 4, 2, 190, 300, 64, 64)
    mask = law.rng(1).uniform(size=(4, 3, 5)) < 0.6
    for settings in ({"causal": True}, {"block_mask": mask}):
        one = attention_outputs(q, k, v, compute=compute, column_mass="key", score_rows=2, **settings)
        for _ in range(3):
            many = attention_outputs(
                q, k, v, compute=compute, column_mass="key", score_rows=2, threads=threads, **settings
            )
            for field in ("o", "lse", "colmass", "scores"):
                assert (getattr(many, field) == getattr(one, field)).all()


@pytest.mark.parametrize("compute", COMPUTES)
def test_packed_sequences_equal_each_alone_bit_for_bit(compute: str) -> None:
    queries, keys = [0, 5, 130, 1, 64, 0], [3, 64, 70, 200, 0, 0]
    parts = [law.draw(1, 4, 2, n, m, 40, 48, key=i) for i, (n, m) in enumerate(zip(queries, keys))]
    q, k, v = (np.concatenate([p[at][0].transpose(1, 0, 2) for p in parts]) for at in range(3))
    options = AttentionOptions(cu_q=np.cumsum([0, *queries]), cu_k=np.cumsum([0, *keys], dtype=np.int32))
    got = attention_outputs(q, k, v, compute=compute, causal=True, options=options, column_mass="query")
    at = at_k = 0
    for (a, b, c), n, m in zip(parts, queries, keys):
        alone = attention_outputs(a, b, c, compute=compute, causal=True, column_mass="query")
        assert (got.o[at : at + n].transpose(1, 0, 2) == alone.o[0]).all()
        assert (alone.lse[0] == got.lse[at : at + n].T).all()
        assert (alone.colmass[0] == got.colmass[at_k : at_k + m].T).all()
        at, at_k = at + n, at_k + m


@pytest.mark.parametrize("compute", COMPUTES)
def test_parts_merged_equal_the_whole(compute: str) -> None:
    q, k, v = law.draw(1, 4, 2, 70, 320, 64, 64)
    whole, lse = attention(q, k, v, compute=compute, return_lse=True)
    cuts = [(0, 64), (64, 256), (256, 320)]
    parts = [attention(q, k[:, :, a:b], v[:, :, a:b], compute=compute, return_lse=True) for a, b in cuts]
    parts.append((np.full_like(whole, 7), np.full_like(lse, -np.inf)))  # an empty part, whatever its O
    o, total = merge_attention(parts)
    exact = law.attend(q, k, v)
    if compute == "fp32":
        np.testing.assert_allclose(o, whole, rtol=0, atol=1e-5)
        np.testing.assert_allclose(total, lse, rtol=0, atol=1e-5)
    else:  # each part has a mean of its own: codes differ, and lse must have the smoothing put back
        assert law.rel_l1(o, exact.o) <= 0.035
        assert (np.abs(total - exact.lse) <= law.logit_bound(q, k, 0.125) + 0.02).all()
    same = np.broadcast_to(np.float32(3.0), (1, 4, 320, 64))
    np.testing.assert_allclose(attention(q, k, same.copy()[:, :2], compute=compute), 3.0, rtol=0, atol=3.0 / 250)


@pytest.mark.parametrize("compute", COMPUTES)
def test_a_vector_added_to_all_keys_moves_only_lse(compute: str) -> None:
    q, k, v = law.draw(1, 2, 2, 70, 130, 64, 64)
    x = law.rng(2).normal(size=64).astype(np.float32) * 3
    base, lse = attention(q, k, v, compute=compute, return_lse=True)
    moved, lse2 = attention(q, k + x, v, compute=compute, return_lse=True)
    # the same keys after the mean is gone, but for float32 rounding of k + x: a code may fall to the other side
    assert law.rel_l1(moved, base.astype(np.float64)) <= (1e-5 if compute == "fp32" else 5e-3)
    assert np.abs(lse2 - lse - q @ x / 8).max() <= (2e-5 if compute == "fp32" else 5e-3)


@pytest.mark.parametrize("compute", COMPUTES)
def test_output_stays_among_the_values(compute: str) -> None:
    q, k, v = law.draw(1, 2, 2, 70, 130, 64, 64)
    v = np.abs(v)
    out = attention(q, k, v, compute=compute)
    step = v.max(2, keepdims=True) / 254 + 1e-5
    assert (out >= v.min(2, keepdims=True) - step).all()
    assert (out <= v.max(2, keepdims=True) + step).all()


def test_smoothing_keeps_a_common_offset_of_v_exact() -> None:
    q, k, v = law.draw(1, 2, 2, 70, 130, 64, 64)
    want = law.attend(q, k, v + 50)
    rough = np.abs(attention(q, k, v + 50) - want.o).max()
    fine = np.abs(attention(q, k, v + 50, options=AttentionOptions(smooth_v=True)) - want.o).max()
    assert fine <= 0.1
    assert rough > 2 * fine


@pytest.mark.parametrize("compute", COMPUTES)
def test_removing_a_tile_removes_its_columns(compute: str) -> None:
    q, k, v = law.draw(1, 1, 1, 64, 256, 64, 64)
    mask = np.ones((1, 4), bool)
    mask[0, 2] = False
    got = attention_outputs(q, k, v, compute=compute, block_mask=mask, column_mass="query", score_rows=64)
    assert (got.colmass[..., 128:192] == 0).all()
    assert np.isneginf(got.scores[..., 128:192]).all()
    assert np.isfinite(got.scores[..., :128]).all()
    s = got.scores.astype(np.float64)
    top = s.max(-1, keepdims=True)
    again = (top + np.log(np.exp(s - top).sum(-1, keepdims=True)))[..., 0]
    np.testing.assert_allclose(got.lse, again, rtol=0, atol=1e-5 if compute != "int8" else 0.02)


@pytest.mark.parametrize("compute", COMPUTES)
def test_strided_half_and_broadcast_inputs(compute: str) -> None:
    q, k, v = law.draw(2, 4, 2, 70, 130, 64, 64)
    want = attention(q, k, v, compute=compute)
    apart = [np.full((2, x.shape[2], x.shape[1], 64 + 9), np.nan, np.float32) for x in (q, k, v)]
    for buffer, x in zip(apart, (q, k, v)):
        buffer[..., 3:67] = x.transpose(0, 2, 1, 3)  # [B, tokens, H, d] with poison between rows
    views = [buffer[..., 3:67].transpose(0, 2, 1, 3) for buffer in apart]
    out = np.full((2, 70, 4, 70), 9.0, np.float32)
    assert (attention(*views, compute=compute, out=out[..., 2:66].transpose(0, 2, 1, 3)) == want).all()
    assert (out[..., :2] == 9).all()
    assert (out[..., 66:] == 9).all()
    half = [x.astype(np.float16) for x in (q, k, v)]
    wide = [x.astype(np.float32) for x in half]
    assert (attention(*half, compute=compute) == attention(*wide, compute=compute)).all()
    shared = np.broadcast_to(k[:1], k.shape)
    assert (attention(q, shared, v, compute=compute) == attention(q, shared.copy(), v, compute=compute)).all()


@pytest.mark.parametrize("compute", COMPUTES)
def test_empty_problems(compute: str) -> None:
    for n, m in ((0, 5), (5, 0), (0, 0)):
        q, k, v = law.draw(1, 2, 1, n, m, 16, 16)
        got = attention_outputs(q, k, v, compute=compute, column_mass="query")
        assert (got.o == 0).all()
        assert np.isneginf(got.lse).all()
        assert got.empty_rows == (n > 0)
    q, k, v = law.draw(1, 1, 1, 4, 2, 16, 16)
    nan = attention(q, k, v, compute=compute, causal=True, options=AttentionOptions(empty_rows_nan=True))
    assert np.isnan(nan[:, :, :2]).all()
    assert np.isfinite(nan[:, :, 2:]).all()
    assert attention(q[:0], k[:0], v[:0], compute=compute).shape == (0, 1, 4, 16)


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_and_infinity_become_finite_values(compute: str, where: str) -> None:
    arrays = dict(zip("qkv", law.draw(1, 2, 1, 70, 130, 64, 64)))
    clean = {name: x.copy() for name, x in arrays.items()}
    bad = arrays[where]
    bad[0, 0, 3, 5], bad[0, 0, 4, 0], bad[0, 0, 69, 63] = np.nan, np.inf, -np.inf
    got = attention_outputs(**arrays, compute=compute)
    assert got.nonfinite
    assert np.isfinite(got.o).all()
    assert np.isfinite(got.lse).all()
    if where == "q":  # other rows do not notice
        rows = [i for i in range(70) if i not in (3, 4, 69)]
        assert (got.o[:, :, rows] == attention(**clean, compute=compute)[:, :, rows]).all()
    out = np.full_like(got.o, 5.0)
    with pytest.raises(InputError, match="NaN or infinity"):
        attention(**arrays, compute=compute, options=AttentionOptions(check_finite=True), out=out)
    assert (out == 5).all()


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-20, 1e15, 3e38])
def test_extreme_magnitudes_stay_finite(compute: str, size: float) -> None:
    q, k, v = law.draw(1, 2, 1, 70, 130, 64, 64)
    got = attention_outputs(q, (k * np.float32(size)).clip(-3e38, 3e38), v, compute=compute)
    assert not np.isnan(got.o).any() or (compute == "fp32" and size > 1e20)
    if size < 1e-10:  # all keys alike
        assert law.rel_l1(got.o, np.broadcast_to(v.mean(2, keepdims=True), got.o.shape).astype(np.float64)) <= 0.03


def test_two_python_threads_at_once() -> None:
    problems = [law.draw(1, 2, 2, 130, 200 + 64 * i, 64, 64) for i in range(4)]
    want = [attention(*p) for p in problems]
    wrong: list[int] = []

    def work(first: int) -> None:
        for i in range(20):
            at = (first + i) % 4
            if not (attention(*problems[at], threads=1 + i % 2) == want[at]).all():
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def gumbel(seed: int, layer: int, heads: int, q_pos: np.ndarray, k_pos: np.ndarray) -> np.ndarray:
    """[H, N, M] noise of the header's generator."""

    def mix(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    def step(x: np.ndarray) -> np.ndarray:
        return np.uint64(0x9E3779B97F4A7C15) * (x.astype(np.uint64) + np.uint64(1))

    with np.errstate(over="ignore"):
        x = mix(np.array([seed], np.uint64) + step(np.array([layer])))
        x = mix(x + step(np.arange(heads)))[:, None]
        x = mix(x + step(q_pos)[None])[..., None]
        x = mix(x + step(k_pos)[None, None])
    u = ((x >> np.uint64(40)).astype(np.float64) + 0.5) * 2.0**-24
    return -np.log(-np.log(u))


@pytest.mark.parametrize(("temperature", "seed", "sum_group"), [(1.0, 0, False), (0.7, 0, True), (1.3, 99, False)])
def test_weighted_column_masses(temperature: float, seed: int, sum_group: bool) -> None:
    q, k, _ = law.draw(2, 4, 2, 70, 130, 64, 64)
    weight = law.rng(20).uniform(size=70).astype(np.float32)
    got = column_masses(
        q,
        k,
        row_weight=weight,
        temperature=temperature,
        seed=seed,
        layer=3,
        sum_group=sum_group,
        compute="fp32",
        causal=True,
    )
    noise = gumbel(seed, 3, 4, np.arange(70) + 60, np.arange(130)) if seed else 0.0
    want = law.attend(q / np.float32(1), k, k, law.causal(70, 130), bias=noise)
    s = want.logits / temperature
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    mass = np.einsum("n,bhnm->bhm", weight.astype(np.float64), p).reshape(2, 2, 2, 130)
    np.testing.assert_allclose(got, mass.sum(2) if sum_group else mass.mean(2), rtol=0, atol=1e-3)
