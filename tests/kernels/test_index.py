"""Index builders: libedgetok against the numpy laws, the laws themselves, and bad input."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from edgetok.errors import InputError
from edgetok.kernels.index import (
    BlockIndex,
    density_and_recall,
    from_mask,
    from_radial,
    from_topp,
    from_window,
    from_xattn,
)
from edgetok.kernels.index.mask import mask_reference
from edgetok.kernels.index.radial import radial_reference
from edgetok.kernels.index.topp import topp_reference
from edgetok.kernels.index.window import window_reference
from edgetok.kernels.index.xattn import xattn_reference
from edgetok.native.index import Csr


def assert_same(found: Csr, expected: Csr) -> None:
    for field in dataclasses.fields(Csr):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        assert a.dtype == b.dtype, field.name
        np.testing.assert_array_equal(a, b, err_msg=field.name)


def assert_postconditions(index: BlockIndex, *, every_row: bool = True) -> None:
    """What every builder promises: a valid CSR, an entry in each row that sees a key, no tile of the future."""
    index.check()
    mask = index.mask()
    if index.q_ptr is not None:
        height = np.diff(index.q_ptr).reshape(index.batch, index.heads, index.nqb)
        assert (mask.any(3) == (height > 0)).all()
        return
    last = np.minimum(np.arange(index.nqb) * 64 + 64, index.n) - 1 + (index.m - index.n)
    sees = last >= 0 if index.causal else np.full(index.nqb, index.m > 0)
    if every_row:
        assert (mask.any(3) == sees).all()
    if index.causal:
        assert not mask[..., np.arange(index.nkb)[None] * 64 > last[:, None]].any()
    assert 0 <= index.density() <= 1


WINDOWS = [
    (0, 0, 0, 0, 0, False), (1, 1, 0, 0, 0, False), (64, 64, 0, 0, 0, True), (65, 65, 3, 0, 0, True),
    (130, 130, 64, 64, 0, False), (200, 200, 10, 5, 7, False), (200, 333, 70, 0, 65, True), (333, 200, 70, 10, 4, True),
    (333, 200, 70, 10, 4, False), (640, 640, 128, 128, 64, False), (640, 640, 127, 0, 1, True),
    (500, 700, 1, 900, 0, False),
    (257, 257, 2**62, 2**62, 0, False),
    (257, 257, 2**62, 0, 0, True), (700, 700, 5, 0, 300, True), (64, 0, 1, 1, 1, False),
]  # fmt: skip


@pytest.mark.parametrize("case", WINDOWS)
def test_window_equals_its_law(case: tuple[int, int, int, int, int, bool]) -> None:
    n, m, left, right, sink, causal = case
    index = from_window(n, m, left=left, right=right, sink=sink, causal=causal)
    assert_same(index.csr, window_reference(n, m, left, right, sink, causal))
    assert_postconditions(index, every_row=False)


def test_window_of_random_parameters_equals_its_law() -> None:
    rng = np.random.default_rng(11)
    for _ in range(60):
        n, m, left, right, sink = (int(x) for x in rng.integers(0, 420, 5))
        causal = bool(rng.integers(2))
        index = from_window(n, m, left=left, right=right, sink=sink, causal=causal)
        assert_same(index.csr, window_reference(n, m, left, right, sink, causal))


def test_window_golden() -> None:
    """128 queries, 192 keys (position = query + 64), left 64, causal: worked out by hand."""
    index = from_window(128, 192, left=64, causal=True)
    assert index.csr.row_ptr.tolist() == [0, 2, 4]
    assert index.csr.col.tolist() == [0, 1, 1, 2]
    assert index.csr.kind.tolist() == [1, 1, 1, 1]
    assert index.csr.bits_idx.tolist() == [0, 1, 0, 1]
    upper = [(2**64 - 1) ^ ((1 << i) - 1) for i in range(64)]
    lower = [(1 << (i + 1)) - 1 for i in range(64)]
    assert index.csr.bits.tolist() == [upper, lower]
    assert index.density() == pytest.approx(4 / 6)


@pytest.mark.parametrize("bad", [{"left": -1}, {"left": 0, "right": -1}, {"left": 0, "sink": -5}])
def test_window_refuses_negative_widths(bad: dict[str, int]) -> None:
    with pytest.raises(InputError):
        from_window(10, 10, **bad)


def test_window_refuses_negative_lengths() -> None:
    with pytest.raises(InputError):
        from_window(-1, 10, left=1)


@pytest.mark.parametrize(
    "shape", [(1, 1), (64, 64), (65, 63), (3, 130, 70), (2, 3, 100, 129), (2, 0, 64, 64), (1, 64, 0)]
)
@pytest.mark.parametrize("causal", [False, True])
def test_mask_equals_its_law(shape: tuple[int, ...], causal: bool) -> None:
    rng = np.random.default_rng(5)
    mask = rng.random(shape) < 0.5
    mask[..., :64] |= rng.random((*shape[:-2], 1, 1)) < 0.5  # some full tiles
    mask[..., 64:] &= rng.random((*shape[:-2], 1, 1)) < 0.5  # and some empty ones
    index = from_mask(mask, causal=causal)
    assert_same(index.csr, mask_reference(mask, causal))
    index.check()
    padded = np.zeros((*shape[:-1], -(-shape[-1] // 64) * 64), np.uint8)
    padded[..., : shape[-1]] = mask
    words = np.packbits(padded, axis=-1, bitorder="little").view("<u8")
    assert_same(from_mask(words, shape[-1], causal=causal).csr, index.csr)


def test_mask_of_ones_is_full_and_causal_tiles_carry_no_bits() -> None:
    full = from_mask(np.ones((130, 130), np.bool_))
    assert full.csr.kind.tolist() == [0] * 9
    assert len(full.csr.bits) == 0
    assert full.density() == 1
    lower = from_mask(np.ones((130, 130), np.bool_), causal=True)
    assert lower.csr.kind.tolist() == [1, 0, 1, 0, 0, 1]
    assert len(lower.csr.bits) == 0
    assert_postconditions(lower)


def test_mask_reads_strided_views() -> None:
    rng = np.random.default_rng(9)
    big = rng.random((4, 200, 3, 150)) < 0.3
    view = big.transpose(0, 2, 1, 3)[::2, :, 10:140, :100]
    assert_same(from_mask(view).csr, mask_reference(np.ascontiguousarray(view), False))


@pytest.mark.parametrize(
    "bad", [np.zeros((4, 4), np.float32), np.zeros(4, np.bool_), np.zeros((1, 1, 1, 2, 2), np.bool_)]
)
def test_mask_refuses_other_arrays(bad: np.ndarray) -> None:
    with pytest.raises(InputError):
        from_mask(bad)


RADIALS = [
    (1, 1, 0, 256, False), (4, 64, 0, 256, False), (4, 64, 10, 256, True), (7, 100, 33, 128, False),
    (16, 48, 0, 256, True),
    (12, 200, 64, 512, False), (30, 20, 5, 256, False), (0, 0, 70, 256, False), (3, 0, 5, 256, False),
    (9, 300, 0, 64, True),
    (40, 3, 1, 256, False), (0, 0, 0, 256, False),
]  # fmt: skip


@pytest.mark.parametrize("case", RADIALS)
def test_radial_equals_its_law(case: tuple[int, int, int, int, bool]) -> None:
    frames, tokens, text, decay_q8, sink = case
    index = from_radial(frames, tokens, text=text, decay=decay_q8 / 256, sink_frame=sink)
    assert_same(index.csr, radial_reference(frames, tokens, text, decay_q8, sink))
    assert_postconditions(index)


def test_radial_golden() -> None:
    """8 frames of 64 tokens, one block each: e = 7 - bits(distance): 2 and 3 apart need a multiple of 2, 4-7 of 4."""
    index = from_radial(8, 64)
    distance = np.abs(np.arange(8)[:, None] - np.arange(8)[None])
    assert (index.mask()[0, 0] == np.isin(distance, [0, 1, 2, 4])).all()
    sink = from_radial(8, 64, sink_frame=True).mask()[0, 0]
    assert sink[:, 0].all()
    assert (sink[:, 1:] == index.mask()[0, 0][:, 1:]).all()


@pytest.mark.parametrize("bad", [(-1, 4), (4, -1), (2**40, 2**40), (2**11, 2**11)])
def test_radial_refuses_impossible_sizes(bad: tuple[int, int]) -> None:
    with pytest.raises(InputError):
        from_radial(*bad)


def test_check_refuses_what_attention_would_misread() -> None:
    index = from_window(200, 200, left=64, causal=True)
    index.check(batch=3, heads=5)
    for change in (
        {"col": index.csr.col[::-1].copy()},
        {"kind": index.csr.kind + 7},
        {"row_ptr": index.csr.row_ptr + 1},
    ):
        with pytest.raises(InputError):
            dataclasses.replace(index, csr=dataclasses.replace(index.csr, **change)).check()


def test_recall_of_everything_is_one_and_of_halves_adds_up() -> None:
    rng = np.random.default_rng(3)
    q, k = rng.standard_normal((2, 1, 4, 200, 32)).astype(np.float32)
    k = k[:, :2]
    full = density_and_recall(q, k, np.ones((1, 4, 4), np.bool_), causal=True)
    np.testing.assert_allclose(full.recall, 1, rtol=1e-12)
    np.testing.assert_allclose(full.density, 1, rtol=1e-12)
    half = rng.random((4, 4, 4)) < 0.5
    a, b = density_and_recall(q, k, half), density_and_recall(q, k, ~half)
    np.testing.assert_allclose(a.recall + b.recall, 1, rtol=1e-12)
    np.testing.assert_allclose(a.density + b.density, 1, rtol=1e-12)


def test_recall_of_some_rows_is_the_mean_of_those_rows() -> None:
    rng = np.random.default_rng(5)
    q, k = rng.standard_normal((2, 1, 1, 300, 16)).astype(np.float32)
    mask = rng.random((1, 5, 5)) < 0.5
    rows = [density_and_recall(q, k, mask, rows=np.array([r])).recall[0, 0] for r in range(300)]
    assert density_and_recall(q, k, mask).recall[0, 0] == pytest.approx(np.mean(rows))
    assert density_and_recall(q, k, mask).worst[0, 0] == pytest.approx(np.min(rows))
    with pytest.raises(InputError):
        density_and_recall(q, k, mask, rows=np.array([300]))


def test_recall_counts_the_bits_of_partial_tiles() -> None:
    q = np.zeros((1, 1, 100, 8), np.float32)  # every key weighs the same
    index = from_window(100, 100, left=0, right=0)
    found = density_and_recall(q, q, index)
    assert found.recall[0, 0] == pytest.approx(1 / 100)
    assert found.density[0, 0] == pytest.approx(2 / 4)


def clustered(
    seed: int, batch: int, heads: int, kv_heads: int, n: int, m: int, d: int
) -> tuple[np.ndarray, np.ndarray]:
    """Queries and keys whose blocks resemble themselves, some of them wild."""
    rng = np.random.default_rng(seed)

    def side(h: int, tokens: int) -> np.ndarray:
        centre = rng.standard_normal((batch, h, -(-tokens // 64), 1, d)) * 2
        x = (
            centre
            + rng.standard_normal((batch, h, centre.shape[2], 64, d))
            * rng.choice([0.3, 3.0], centre.shape[:3])[..., None, None]
        )
        return x.reshape(batch, h, -1, d)[:, :, :tokens].astype(np.float32) + rng.standard_normal(d).astype(np.float32)

    return side(heads, n), side(kv_heads, m)


TOPPS = [
    {"p": 0.9, "theta": 0.5}, {"p": 0.5, "theta": -1.0, "sink_blocks": 0, "local_blocks": 0}, {"p": 1.0, "theta": 0.3},
    {"topk": 0.3, "theta": 0.0}, {"topk": 0.01, "theta": -1.0, "min_keep": 3},
    {"p": 0.2, "theta": 1.0, "local_blocks": 3},
    {"p": 0.97, "theta": 0.6, "sink_blocks": 2, "local_blocks": 2},
]  # fmt: skip
SHAPES = [
    (1, 1, 1, 64, 64, 16),
    (1, 2, 1, 700, 700, 64),
    (2, 4, 2, 257, 513, 40),
    (1, 1, 1, 513, 190, 24),
    (1, 3, 3, 1, 65, 33),
]


@pytest.mark.parametrize("settings", TOPPS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
def test_topp_equals_its_law(settings: dict[str, float], shape: tuple[int, ...], causal: bool) -> None:
    q, k = clustered(sum(shape), *shape)
    full = {"p": 0.0, "topk": 0.0, "theta": 0.5, "min_keep": 1, "sink_blocks": 1, "local_blocks": 1} | settings
    index = from_topp(q, k, causal=causal, **full)
    assert_same(index.csr, topp_reference(q, k, causal=causal, **full))
    assert_postconditions(index)


def test_topp_is_the_same_on_every_isa_and_thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = clustered(1, 1, 4, 2, 600, 600, 72)
    whole = from_topp(q, k, p=0.8)
    assert_same(from_topp(q, k, p=0.8, threads=3).csr, whole.csr)
    for isa in ("scalar", "avx2"):
        monkeypatch.setenv("EDGETOK_MAX_ISA", isa)
        assert_same(from_topp(q, k, p=0.8).csr, whole.csr)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, 1e-40])
def test_topp_of_wild_values_equals_its_law(value: float) -> None:
    q, k = clustered(2, 1, 2, 1, 300, 300, 16)
    rng = np.random.default_rng(0)
    for x in (q, k):
        x[rng.random(x.shape) < 0.01] = value
        x[:, :, 64:128] = 0
    full = {"p": 0.9, "topk": 0.0, "theta": 0.4, "min_keep": 1, "sink_blocks": 1, "local_blocks": 1, "causal": False}
    index = from_topp(q, k, **full)
    assert_same(index.csr, topp_reference(q, k, **full))
    assert_postconditions(index)


def test_topp_keeps_the_mass_where_blocks_are_alike() -> None:
    """Keys in tight groups, one for each query block: a tenth of the tiles holds nearly everything."""
    rng = np.random.default_rng(4)
    centre = rng.standard_normal((16, 1, 64)) * 3
    q, k = (
        (centre + rng.standard_normal((16, 64, 64)) * 0.3).reshape(1, 1, 1024, 64).astype(np.float32) for _ in range(2)
    )
    index = from_topp(q, k, p=0.95, theta=0.3)
    found = density_and_recall(q, k, index)
    assert found.recall[0, 0] > 0.95
    assert found.density[0, 0] < 0.2
    assert found.density[0, 0] == pytest.approx(index.density())


@pytest.mark.parametrize(
    "bad",
    [{}, {"p": -0.1}, {"p": 1.5}, {"p": float("nan")}, {"topk": 2.0}, {"p": 0.5, "theta": 1.5},
     {"p": 0.5, "min_keep": -1},
     {"p": 0.5, "scale": -1.0}, {"p": 0.5, "sink_blocks": -1}, {"p": 0.5, "local_blocks": -2},
     {"p": 0.5, "threads": 0}],
)  # fmt: skip
def test_topp_refuses_bad_parameters(bad: dict[str, float]) -> None:
    q, k = clustered(0, 1, 1, 1, 64, 64, 16)
    with pytest.raises(InputError):
        from_topp(q, k, **bad)


@pytest.mark.parametrize(
    "shapes",
    [
        ((1, 2, 8, 4), (1, 3, 8, 4)),
        ((1, 2, 8, 4), (1, 2, 8, 5)),
        ((2, 8, 4), (2, 8, 4)),
        ((1, 1, 4, 2000), (1, 1, 4, 2000)),
    ],
)
def test_topp_refuses_shapes_that_do_not_fit(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(InputError):
        from_topp(*(np.zeros(s, np.float32) for s in shapes), p=0.5)


def test_topp_of_nothing() -> None:
    empty = from_topp(np.zeros((1, 2, 0, 16), np.float32), np.zeros((1, 2, 64, 16), np.float32), p=0.5)
    assert len(empty.csr.col) == 0
    no_keys = from_topp(np.zeros((1, 2, 64, 16), np.float32), np.zeros((1, 2, 0, 16), np.float32), p=0.5)
    assert no_keys.csr.row_ptr.tolist() == [0, 0, 0]


@pytest.mark.parametrize("stride", [4, 16, 64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("threshold", "min_keep", "causal"), [(0.9, 0, True), (0.5, 3, False), (1.0, 0, True), (0.01, 0, False)]
)
def test_xattn_equals_its_law(
    shape: tuple[int, ...], stride: int, threshold: float, min_keep: int, causal: bool
) -> None:
    q, k = clustered(sum(shape) + stride, *shape)
    index = from_xattn(q, k, threshold=threshold, stride=stride, min_keep=min_keep, causal=causal)
    law = xattn_reference(q, k, threshold=threshold, stride=stride, min_keep=min_keep, causal=causal)
    assert_same(index.csr, law)
    assert_postconditions(index)
    if threshold == 1:
        assert index.density() == 1


def test_xattn_is_the_same_on_every_isa_and_thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = clustered(1, 1, 4, 2, 1100, 1100, 72)
    whole = from_xattn(q, k, threshold=0.8, causal=True)
    assert_same(from_xattn(q, k, threshold=0.8, causal=True, threads=3).csr, whole.csr)
    for isa in ("scalar", "avx2"):
        monkeypatch.setenv("EDGETOK_MAX_ISA", isa)
        assert_same(from_xattn(q, k, threshold=0.8, causal=True).csr, whole.csr)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_xattn_of_wild_values_equals_its_law(value: float) -> None:
    q, k = clustered(2, 1, 2, 1, 300, 300, 16)
    for x in (q, k):
        x[np.random.default_rng(0).random(x.shape) < 0.01] = value
    index = from_xattn(q, k, threshold=0.7)
    assert_same(index.csr, xattn_reference(q, k, threshold=0.7, stride=16, min_keep=0, causal=False))


def test_xattn_finds_a_vertical_line_and_keeps_diagonal_and_first() -> None:
    """Every query loves the keys of block 5: those, the first and the diagonal, and nothing else."""
    rng = np.random.default_rng(8)
    q, k = rng.standard_normal((2, 1, 1, 1024, 32)).astype(np.float32) * 0.1
    q[..., 0] += 8
    k[:, :, 5 * 64 : 6 * 64, 0] += 8
    mask = from_xattn(q, k, threshold=0.9).mask()[0, 0]
    expected = np.eye(16, dtype=np.bool_)
    expected[:, [0, 5]] = True
    assert (mask == expected).all()


@pytest.mark.parametrize(
    "bad",
    [
        {"threshold": 0},
        {"threshold": 1.1},
        {"threshold": float("nan")},
        {"stride": 3},
        {"stride": 128},
        {"stride": -4},
        {"min_keep": -1},
    ],
)
def test_xattn_refuses_bad_parameters(bad: dict[str, float]) -> None:
    q, k = clustered(0, 1, 1, 1, 64, 64, 16)
    with pytest.raises(InputError):
        from_xattn(q, k, **({"threshold": 0.5} | bad))
