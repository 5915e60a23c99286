"""Attention against float64: every mask and option, the analytic error bounds, shapes around the tile edges."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import attention_law as law
import numpy as np
import pytest

from edgetok.kernels import AttentionOptions, attention_outputs, block_index
from edgetok.kernels.index import BlockIndex, from_mask
from edgetok.native.attn import ISA, describe
from edgetok.native.index import Csr
from edgetok.native.table import kernels

COMPUTES = ("fp32", "int8", "int8_float_pv")
USABLE = [k.isa for k in kernels() if k.op == "attn" and k.usable]
# float32 sums of at most a few hundred terms of size about 1, and exp2 within 4e-6
FP32 = 2e-5


@dataclass
class Case:
    """What the kernel is given and what the float64 law is given for the same thing."""

    shape: tuple[int, int, int, int, int, int, int]  # B, H, Hkv, N, M, d, dv
    call: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    law: dict[str, Any] = field(default_factory=dict)


def case_plain() -> Case:
    return Case((2, 4, 2, 130, 200, 40, 72))


def case_causal() -> Case:
    return Case((1, 3, 1, 200, 130, 64, 64), {"causal": True}, law={"visible": law.causal(200, 130)})


def case_causal_few_queries() -> Case:
    return Case((1, 2, 2, 3, 300, 80, 96), {"causal": True}, law={"visible": law.causal(3, 300)})


def window(n: int, m: int, left: int, right: int, sink: int) -> np.ndarray:
    at, key = np.arange(n)[:, None] + (m - n), np.arange(m)[None]
    return ((key >= at - left) & (key <= at + right)) | (key < sink)


def case_window() -> Case:
    return Case((1, 2, 2, 300, 300, 64, 64), {"window": (70, 5)}, law={"visible": window(300, 300, 70, 5, 0)})


def case_window_sink_causal() -> Case:
    seen = window(200, 333, 70, 9, 65) & law.causal(200, 333)
    return Case((1, 2, 1, 200, 333, 48, 48), {"window": (70, 9), "sink": 65, "causal": True}, law={"visible": seen})


def case_key_bias() -> Case:
    bias = law.rng(1).normal(size=(2, 4, 200)).astype(np.float32) * 2
    bias[0, :, 10:140] = -np.inf  # whole pages and parts
    bias[1, 2] = -np.inf  # a head without any key
    return Case((2, 4, 2, 70, 200, 32, 32), {"key_bias": bias}, law={"bias": bias[:, :, None].astype(np.float64)})


def case_key_bias_shared() -> Case:
    bias = law.rng(2).normal(size=(1, 1, 150)).astype(np.float32)
    return Case(
        (2, 2, 1, 65, 150, 64, 64),
        {"key_bias": bias, "causal": True},
        law={"bias": bias[:, :, None].astype(np.float64), "visible": law.causal(65, 150)},
    )


def case_softcap() -> Case:
    return Case((1, 2, 1, 100, 100, 64, 64), {"softcap": 1.5, "scale": 0.4}, law={"softcap": 1.5, "scale": 0.4})


def case_alibi() -> Case:
    slopes = np.array([0.5, 0.03, 1.0, 0.0], np.float32)
    away = np.arange(90)[None] - (np.arange(70)[:, None] + 20)
    return Case(
        (1, 4, 2, 70, 90, 64, 64),
        {"causal": True},
        {"alibi_slopes": slopes},
        {"bias": slopes[None, :, None, None] * away, "visible": law.causal(70, 90)},
    )


def case_clip() -> Case:
    return Case(
        (1, 2, 2, 100, 130, 64, 64), {"scale": 0.6}, {"clip": (-0.02, 1.05)}, {"clip": (-0.02, 1.05), "scale": 0.6}
    )


def case_clip_causal_sink() -> Case:
    sink = np.array([0.3, 2.0], np.float32)
    return Case(
        (1, 2, 2, 100, 100, 64, 64),
        {"causal": True},
        {"clip": (-0.01, 1.0), "sink_logit": sink},
        {"clip": (-0.01, 1.0), "sink_logit": sink, "visible": law.causal(100, 100)},
    )


def case_sink_logit() -> Case:
    sink = np.array([1.0, -3.0, 5.0, 0.0], np.float32)
    return Case(
        (2, 4, 2, 70, 130, 64, 64),
        {"causal": True},
        {"sink_logit": sink},
        {"sink_logit": sink, "visible": law.causal(70, 130)},
    )


def case_gate_scalar() -> Case:
    gate = law.rng(3).uniform(size=(1, 2, 70, 1)).astype(np.float32)
    return Case((1, 2, 2, 70, 70, 64, 40), options={"gate": gate}, law={"gate": gate.astype(np.float64)})


def case_gate_wide_smooth_v() -> Case:
    gate = law.rng(4).uniform(size=(1, 2, 70, 48)).astype(np.float32)
    return Case(
        (1, 2, 1, 70, 70, 32, 48), options={"gate": gate, "smooth_v": True}, law={"gate": gate.astype(np.float64)}
    )


def case_seq_k() -> Case:
    keys = np.array([0, 64, 131], np.int32)
    seen = np.arange(200) < keys[:, None]
    rows = np.arange(70)[:, None] + keys[:, None, None] - 70  # bottom-right by what counts
    return Case(
        (3, 2, 2, 70, 200, 64, 64),
        {"causal": True},
        {"seq_k": keys},
        {"visible": (seen[:, None] & (np.arange(200)[None, None] <= rows))[:, None]},
    )


def case_positions() -> Case:
    g = law.rng(5)
    q_pos, k_pos = g.integers(0, 300, (2, 70)), g.integers(0, 300, (2, 1, 130)).astype(np.int32)
    seen = (k_pos[:, :, None] <= q_pos[:, None, :, None]) & (k_pos[:, :, None] >= q_pos[:, None, :, None] - 40)
    return Case(
        (2, 4, 2, 70, 130, 64, 64),
        {"causal": True, "window": (40, 0)},
        {"q_pos": q_pos, "k_pos": k_pos},
        {"visible": seen},
    )


def case_permuted() -> Case:
    g = law.rng(6)
    q_perm = np.stack([g.permutation(130) for _ in range(4)])[None].astype(np.int32)
    k_perm = np.stack([g.permutation(130) for _ in range(2)])[None].astype(np.int32)
    return Case(
        (2, 4, 2, 130, 130, 64, 64),
        {"causal": True},
        {"q_perm": q_perm, "k_perm": k_perm},
        {"visible": law.causal(130, 130)},
    )


def case_permuted_bias_seq() -> Case:
    k_perm = law.rng(7).permutation(130)[None, None].astype(np.int32)
    bias = law.rng(8).normal(size=(1, 1, 130)).astype(np.float32)
    seen = np.arange(130) < 77
    return Case(
        (1, 2, 1, 60, 130, 64, 64),
        {"key_bias": bias},
        {"k_perm": k_perm, "seq_k": np.array([77], np.int32)},
        {"visible": seen, "bias": bias[:, :, None].astype(np.float64)},
    )


def case_gather() -> Case:
    g = law.rng(9)
    chosen = np.stack([g.permutation(300)[:100] for _ in range(2)])[None].astype(np.int32)
    chosen[0, 0, 5:20] = -1
    chosen[0, 1, 64:] = -1
    seen = np.zeros((1, 2, 1, 300), bool)
    for h in range(2):
        seen[0, h, 0, chosen[0, h][chosen[0, h] >= 0]] = True
    return Case(
        (1, 4, 2, 70, 300, 64, 64),
        {"causal": True},
        {"gather": chosen},
        {"visible": np.repeat(seen, 2, 1) & law.causal(70, 300)},
    )


def expand(mask: np.ndarray, n: int, m: int) -> np.ndarray:
    return np.repeat(np.repeat(mask, 64, -2), 64, -1)[..., :n, :m]


def case_block_mask() -> Case:
    mask = law.rng(10).uniform(size=(2, 4, 3, 5)) < 0.4
    mask[1, 3, 1] = False
    return Case((2, 4, 2, 190, 300, 64, 64), {"block_mask": mask}, law={"visible": expand(mask, 190, 300)})


def case_block_mask_causal_shared() -> Case:
    mask = law.rng(11).uniform(size=(5, 5)) < 0.6
    return Case(
        (1, 2, 2, 300, 300, 32, 32),
        {"block_mask": mask, "causal": True},
        law={"visible": expand(mask, 300, 300) & law.causal(300, 300)},
    )


def case_block_mask_window_bias() -> Case:
    mask = law.rng(12).uniform(size=(2, 4, 4)) < 0.7
    bias = law.rng(13).normal(size=(1, 2, 250)).astype(np.float32)
    seen = expand(mask, 200, 250)[None] & window(200, 250, 90, 90, 10)
    return Case(
        (1, 2, 1, 200, 250, 64, 64),
        {"block_mask": mask, "window": 90, "sink": 10, "key_bias": bias},
        law={"visible": seen, "bias": bias[:, :, None].astype(np.float64)},
    )


def case_bits() -> Case:
    seen = law.rng(14).uniform(size=(1, 2, 150, 200)) < 0.3
    seen[:, :, 64:128, 64:128] = True
    seen[:, 0, 3] = False
    return Case((1, 2, 2, 150, 200, 64, 64), {"index": from_mask(seen)}, law={"visible": seen})


def case_variable_blocks() -> Case:
    """Blocks of odd sizes, some empty, different for each head, with row orders."""
    g = law.rng(15)
    n, m, heads, nq, nk = 210, 260, 2, 5, 7
    q_ptr = np.stack([np.r_[0, np.sort(g.integers(0, n, nq - 1)), n] for _ in range(heads)]).astype(np.int32)
    k_ptr = np.stack([np.r_[0, np.sort(g.integers(0, m, nk - 1)), m] for _ in range(heads)]).astype(np.int32)
    k_ptr[1, 3] = k_ptr[1, 2]
    mask = g.uniform(size=(heads, nq, nk)) < 0.5
    q_perm, k_perm = (np.stack([g.permutation(x) for _ in range(heads)])[None].astype(np.int32) for x in (n, m))
    rows = mask.reshape(heads * nq, nk)
    row_ptr = np.r_[0, np.cumsum(rows.sum(1))].astype(np.int64)
    col = np.nonzero(rows)[1].astype(np.int32)
    csr = Csr(row_ptr, col, np.ones(len(col), np.uint8), np.empty((0, 64), np.uint64), np.full(len(col), -1, np.int32))
    index = BlockIndex(csr, n, m, 1, heads, q_ptr=q_ptr, k_ptr=k_ptr, q_perm=q_perm, k_perm=k_perm)
    seen = np.zeros((1, heads, n, m), bool)
    for h in range(heads):
        of_q, of_k = np.empty(n, int), np.empty(m, int)
        of_q[q_perm[0, h]] = np.repeat(np.arange(nq), np.diff(q_ptr[h]))
        of_k[k_perm[0, h]] = np.repeat(np.arange(nk), np.diff(k_ptr[h]))
        seen[0, h] = mask[h][of_q[:, None], of_k[None]]
    return Case((1, heads, heads, n, m, 64, 64), {"index": index}, law={"visible": seen})


CASES = {name.removeprefix("case_"): make for name, make in globals().items() if name.startswith("case_")}


def prepare(case: Case, compute: str, isa: str | None = None) -> dict[str, Any]:
    return {**case.call, "compute": compute, "options": AttentionOptions(**case.options, isa=isa)}


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("name", CASES)
def test_every_mask_and_option_agrees_with_float64(name: str, compute: str) -> None:
    case = CASES[name]()
    q, k, v = law.draw(*case.shape)
    want = law.attend(q, k, v, **case.law)
    rows = min(9, q.shape[2])
    got = attention_outputs(q, k, v, **prepare(case, compute), column_mass="query", score_rows=rows)
    seen = np.isfinite(want.logits).any(-1)
    assert got.empty_rows == (not seen.all()) or "sink_logit" in case.law
    assert (got.o[~seen] == 0).all()
    finite = np.isfinite(want.lse)
    assert (np.isneginf(got.lse) == ~finite).all()
    score = want.logits[:, :, -rows:]
    assert (np.isneginf(got.scores) == np.isneginf(score)).all()
    if compute == "fp32":
        assert np.abs(got.o - want.o).max() <= FP32
        assert law.gap(got.lse, want.lse) <= FP32
        assert law.gap(got.scores, score) <= FP32
        assert np.abs(got.colmass - want.p.sum(2)).max() <= FP32 * q.shape[2]
    else:  # Gaussian gates of the specification (3.4) with room for few keys; a logit is off by a few codes' worth
        assert law.rel_l1(got.o, want.o) <= 0.035
        eps = law.logit_bound(q, k, case.law.get("scale", q.shape[-1] ** -0.5)).max()
        assert law.gap(got.scores, score) <= eps + 1e-4
        assert law.gap(got.lse, want.lse) <= eps + np.log(2) / 28
        assert np.abs(got.colmass - want.p.sum(2)).max() <= 0.05 * max(1.0, want.p.sum(2).max())
    if "clip" not in case.law and "sink_logit" not in case.law:
        np.testing.assert_allclose(got.colmass.sum(-1), seen.sum(-1), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("isa", USABLE)
@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize(
    "name", ["plain", "causal", "window_sink_causal", "block_mask", "key_bias", "clip", "variable_blocks"]
)
def test_instruction_sets_agree_with_the_scalar_kernel(name: str, compute: str, isa: str) -> None:
    case = CASES[name]()
    q, k, v = law.draw(*case.shape)
    if isa != "avx2":  # whose P has 7 bits
        scalar = attention_outputs(q, k, v, **prepare(case, compute, "scalar"))
        got = attention_outputs(q, k, v, **prepare(case, compute, isa))
        # the same integers; float sums in another order and exp2 within 4e-6. A tie in y can move P by one code where
        # logits are formed in floats
        near = 2e-5 if compute != "int8" or name not in ("key_bias", "clip") else 2e-3
        np.testing.assert_allclose(got.o, scalar.o, rtol=0, atol=near)
        np.testing.assert_allclose(got.lse, scalar.lse, rtol=2e-6, atol=2e-5)
    else:
        want = law.attend(q, k, v, **case.law)
        assert law.rel_l1(attention_outputs(q, k, v, **prepare(case, compute, isa)).o, want.o) <= 0.05


def test_plan_names_the_kernel_of_the_cap() -> None:
    fields = {"batch": 1, "hq": 1, "hkv": 1, "d": 64, "dv": 64, "max_n": 64, "max_m": 64, "compute": 2}
    for isa in USABLE:
        assert f"_{isa}_" in describe(1, **fields, isa_cap=ISA[isa])


EDGES = [1, 2, 5, 6, 7, 63, 64, 65, 127, 128, 129, 200]


@pytest.mark.parametrize("n", EDGES)
@pytest.mark.parametrize("causal", [False, True])
def test_lengths_around_the_tile_edges(n: int, causal: bool) -> None:
    for m in EDGES:
        q, k, v = law.draw(1, 2, 1, n, m, 32, 48)
        want = law.attend(q, k, v, law.causal(n, m) if causal else True)
        got = attention_outputs(q, k, v, compute="fp32", causal=causal)
        assert np.abs(got.o - want.o).max() <= FP32, (n, m)
        coarse = attention_outputs(q, k, v, causal=causal)
        assert law.rel_l1(coarse.o, want.o) <= 0.05, (n, m)


@pytest.mark.parametrize("d", [1, 3, 8, 16, 17, 32, 40, 48, 64, 72, 80, 96, 100, 112, 128, 160, 192, 256, 576, 1024])
@pytest.mark.parametrize("compute", COMPUTES)
def test_head_widths(d: int, compute: str) -> None:
    for dv in (d, 65):
        q, k, v = law.draw(1, 2, 1, 70, 130, d, dv)
        want = law.attend(q, k, v, law.causal(70, 130))
        got = attention_outputs(q, k, v, compute=compute, causal=True)
        assert law.rel_l1(got.o, want.o) <= (1e-5 if compute == "fp32" else 0.05)


@pytest.mark.parametrize("kind", ["gauss", "outlier", "sink"])
@pytest.mark.parametrize("compute", ["int8", "int8_float_pv"])
@pytest.mark.parametrize(("m", "d"), [(64, 64), (300, 64), (1024, 64), (300, 128), (1024, 40)])
def test_int8_error_is_within_the_analytic_bound(kind: str, compute: str, m: int, d: int) -> None:
    q, k, v = law.draw(1, 2, 2, 66, m, d, d, kind)
    want = law.attend(q, k, v)
    got = attention_outputs(q, k, v, compute=compute)
    eps = law.logit_bound(q, k, d**-0.5)
    # the mean that is subtracted in float32 moves logits by rounding only; its size is that of a logit's last bits
    eps = eps + 1e-5 * (1 + np.abs(want.logits).max(-1))
    middle = (v.max(2) + v.min(2)) / 2
    spread = np.abs(v - middle[:, :, None]).max(2)[:, :, None]
    bound = np.expm1(2 * eps)[..., None] * spread
    if compute == "int8":  # P against its tile's maximum, V against its channel's (7.2)
        bound = bound + 2 * (64 / 510 + 0.0125) * np.abs(v).max(2)[:, :, None] + np.abs(v).max(2)[:, :, None] / 254
    assert (np.abs(got.o - want.o) <= bound + 1e-5).all()
    table = 0.02 if compute == "int8" else 1e-5  # a table of 28 steps to the octave, P in whole codes
    assert (np.abs(got.lse - want.lse) <= eps + table).all()
    assert law.cosine(got.o, want.o) >= 0.9990
    assert law.rel_l1(got.o, want.o) <= 0.05


@pytest.mark.parametrize("kind", ["gauss", "sink"])
def test_32k_keys_keep_the_diffuse_mass_behind_a_sink(kind: str) -> None:
    q, k, v = law.draw(1, 1, 1, 12, 32768, 64, 64, kind)
    v += np.linspace(
        -1, 1, 64, dtype=np.float32
    )  # or all rows average to almost nothing, and the error is relative to that
    want = law.attend(q, k, v)
    if kind == "sink":
        assert 0.2 < np.median(want.p[..., 0]) < 0.8
    got = attention_outputs(q, k, v)
    assert law.cosine(got.o, want.o) >= 0.9990
    assert law.rel_l1(got.o, want.o) <= 0.05
    assert (np.abs(got.lse - want.lse) <= law.logit_bound(q, k, 0.125) + 0.02).all()
    assert np.abs(got.lse - want.lse).mean() <= 0.02


def test_block_index_lists_what_the_mask_says() -> None:
    mask = law.rng(21).uniform(size=(2, 3, 5)) < 0.5
    assert (block_index(mask, 190, 300).mask()[0] == mask).all()
