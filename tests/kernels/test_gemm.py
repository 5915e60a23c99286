"""Quantized matrix products: the law in numpy, formats by their definition, layouts that lie, bad input."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from edgetok import native
from edgetok.errors import EdgeTokError, InputError, UnsupportedError

pytestmark = pytest.mark.skipif(native.library_path() is None, reason="libedgetok is not built here: pip install .")
SEED = 7


def kernels():  # type: ignore[no-untyped-def]
    from edgetok import kernels as module

    return module


def draw(*shape: int, seed: int = SEED) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def law(x: np.ndarray, weights: np.ndarray, per: str = "row", dtype: str = "int8") -> np.ndarray:
    """x quantized by the library times the packed weights, in float64."""
    q = kernels().quantize_activations(x, per=per, dtype=dtype)
    codes = q.codes.astype(np.float64)
    scale, zero = (v.astype(np.float64) for v in (q.scale, q.zero))
    if per == "group32":
        scale = np.repeat(scale, 32, 1)[:, : x.shape[1]]
        zero = np.repeat(zero, 32, 1)[:, : x.shape[1]]
    else:
        scale, zero = scale[:, None], zero[:, None]
    return (scale * (codes - zero)) @ weights.astype(np.float64).T


def close(got: np.ndarray, want: np.ndarray, x: np.ndarray, weights: np.ndarray) -> None:
    """Within the rounding of f32 sums: 3e-7 of the sum of magnitudes, zero points counted four times."""
    allowed = 3e-7 * 4 * (np.abs(x).max(1, keepdims=True) * np.abs(weights).sum(1)[None]) + 1e-6
    assert (np.abs(got - want) <= allowed).all(), float(np.abs(got - want).max())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [0, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("symmetric", [True, False])
def test_product_follows_the_law(bits: int, group: int, symmetric: bool) -> None:
    k = kernels()
    x, weights = draw(9, 300), draw(70, 300, seed=1)
    w = k.PackedWeight.from_float(weights, bits=bits, group=group, symmetric=symmetric)
    dense = w.to_float()
    for per, dtype in (("row", "int8"), ("row", "uint8"), ("tensor", "uint8"), ("group32", "int8")):
        if per == "group32" and group == 16:
            with pytest.raises(UnsupportedError):
                k.matmul(x, w, per=per)
            continue
        close(k.matmul(x, w, per=per, dtype=dtype), law(x, dense, per, dtype), x, dense)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantized_weights_lie_within_half_a_step(bits: int, symmetric: bool) -> None:
    weights = draw(40, 128, seed=2)
    w = kernels().PackedWeight.from_float(weights, bits=bits, group=32, symmetric=symmetric)
    blocks = weights.reshape(40, 4, 32)
    top, span = np.abs(blocks).max(2), blocks.max(2).clip(0) - blocks.min(2).clip(None, 0)
    step = top / (127 if bits == 8 else 8) if symmetric else span / (255 if bits == 8 else 15)
    error = np.abs(w.to_float() - weights).reshape(40, 4, 32).max(2)
    # symmetric 4 bits: the positive end of a block whose largest value is negative is cut off by up to one step
    assert (error <= step * (1.0 if bits == 4 and symmetric else 0.5) + 1e-6).all()


def test_epilogues() -> None:
    k = kernels()
    x, weights, bias, residual = draw(7, 96), draw(50, 96, seed=1), draw(50, seed=2), draw(7, 50, seed=3)
    scale = np.abs(draw(50, seed=4)) + 0.5
    w = k.PackedWeight.from_float(weights, bits=4, group=32)
    plain = law(x, w.to_float()) * scale + bias
    from math import erf

    phi = np.vectorize(lambda v: 0.5 * (1 + erf(v / 2**0.5)))
    tanh = 0.5 * plain * (1 + np.tanh((2 / np.pi) ** 0.5 * (plain + 0.044715 * plain**3)))
    wanted = {None: plain, "gelu": plain * phi(plain), "gelu_tanh": tanh, "silu": plain / (1 + np.exp(-plain))}
    for name, want in wanted.items():
        got = k.matmul(x, w, bias=bias, out_scale=scale, residual=residual, activation=name)
        assert np.abs(got - (want + residual)).max() < 3e-5, name
    both = residual.copy()
    k.matmul(x, w, bias=bias, out_scale=scale, residual=both, activation="silu", out=both)
    np.testing.assert_array_equal(
        both, k.matmul(x, w, bias=bias, out_scale=scale, residual=residual, activation="silu")
    )


def test_activations_at_the_ends() -> None:
    k = kernels()
    w = k.PackedWeight.from_float(np.eye(8, dtype=np.float32))
    ends = np.array([np.inf, -np.inf, 3e38, -3e38, 100.0, -100.0, 0.0, np.nan], np.float32)
    for name in ("gelu", "gelu_tanh", "silu"):
        got = k.matmul(np.zeros((1, 8), np.float32), w, bias=ends, activation=name)[0]
        np.testing.assert_allclose(
            got, [np.inf, 0, np.float32(3e38), 0, 100, 0, 0, np.nan], atol=1e-30, rtol=1e-6, err_msg=name
        )


@pytest.mark.parametrize("rows", [33, 64, 130])
def test_gated_halves_need_not_be_whole_panels(rows: int) -> None:
    k = kernels()
    x, weights, bias = draw(5, 64), draw(2 * rows, 64, seed=1), draw(2 * rows, seed=2)
    w = k.PackedWeight.from_float(weights, group=32, gated=True)
    assert w.n == rows
    both = law(x, w.to_float()) + bias
    gate, up = both[:, :rows], both[:, rows:]
    got = k.matmul(x, w, bias=bias, activation="silu")
    np.testing.assert_allclose(got, gate / (1 + np.exp(-gate)) * up, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_does_not_depend_on_its_company(bits: int) -> None:
    k = kernels()
    x = draw(230, 1056)
    w = k.PackedWeight.from_float(draw(200, 1056, seed=1), bits=bits, group=32, symmetric=False, scale_dtype="float16")
    whole = k.matmul(x, w)
    for threads in (1, 2, 3):
        for at, m in ((0, 1), (3, 2), (10, 6), (20, 7), (40, 12), (60, 13), (0, 230)):
            np.testing.assert_array_equal(k.matmul(x[at : at + m], w, threads=threads), whole[at : at + m])


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_integer_product_is_exact(dtype: type) -> None:
    k = kernels()
    rng = np.random.default_rng(SEED)
    info = np.iinfo(dtype)
    a = rng.integers(info.min, info.max + 1, (11, 2050)).astype(dtype)
    a[0], a[1] = info.min, info.max
    codes = rng.integers(-128, 128, (67, 2050)).astype(np.int8)
    codes[0], codes[1] = -128, 127
    zero = rng.integers(info.min, info.max + 1, 11).astype(np.int32)
    w = k.PackedWeight.from_codes(codes, np.ones(67, np.float32))
    want = (a.astype(np.int64) - zero[:, None]) @ codes.astype(np.int64).T
    np.testing.assert_array_equal(k.matmul_integer(a, w, zero=zero), want)
    np.testing.assert_array_equal(k.matmul_integer(a, w, threads=2), a.astype(np.int64) @ codes.astype(np.int64).T)


def test_longest_integer_sum_does_not_wrap() -> None:
    k = kernels()
    a = np.full((1, 65536), 255, np.uint8)
    w = k.PackedWeight.from_codes(np.full((1, 65536), -128, np.int8), np.ones(1, np.float32))
    assert k.matmul_integer(a, w)[0, 0] == -255 * 128 * 65536
    with pytest.raises(InputError, match="dimension"):
        k.PackedWeight.from_codes(np.zeros((1, 65537), np.int8), np.ones(1, np.float32))


def test_codes_quantized_before_give_the_same_bits() -> None:
    k = kernels()
    x, w = draw(6, 100), k.PackedWeight.from_float(draw(20, 100, seed=1))
    for dtype in ("int8", "uint8"):
        np.testing.assert_array_equal(k.matmul(k.quantize_activations(x, dtype=dtype), w), k.matmul(x, w, dtype=dtype))


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_static_scale(dtype: str) -> None:
    k = kernels()
    x, w = draw(6, 100), k.PackedWeight.from_float(draw(20, 100, seed=1))
    zero = 0 if dtype == "int8" else 117
    low, high = (-127, 127) if dtype == "int8" else (0, 255)
    codes = np.clip(np.rint(x * np.float32(1 / np.float32(0.02))) + zero, low, high)
    want = ((codes - zero) * np.float64(np.float32(0.02))) @ w.to_float().astype(np.float64).T
    close(k.matmul(x, w, scale=0.02, zero=zero, dtype=dtype), want, x, w.to_float())


def test_quantizer_law() -> None:
    k = kernels()
    x = draw(4, 70)
    x[1], x[2, 3], x[2, 4], x[3, 5] = 0, np.nan, -np.inf, 1e-44
    clean = np.where(np.isnan(x), 0, x)
    top = np.abs(np.where(np.isinf(clean), 0, clean)).max(1)
    clean = np.clip(clean, -top[:, None], top[:, None])
    q = k.quantize_activations(x)
    scale = np.where(top > 0, top / np.float32(127), np.float32(1)).astype(np.float32)
    np.testing.assert_array_equal(q.scale, scale)
    np.testing.assert_array_equal(q.codes, np.clip(np.rint(clean * (1 / scale)[:, None]), -127, 127))
    u = k.quantize_activations(clean, dtype="uint8")
    back = u.scale[:, None] * (u.codes.astype(np.float32) - u.zero[:, None])
    assert (np.abs(back - clean) <= 0.51 * u.scale[:, None]).all()
    assert (u.codes[1] == u.zero[1]).all()
    g = k.quantize_activations(clean, per="group32")
    assert g.scale.shape == (4, 3)
    assert (
        np.abs(np.repeat(g.scale, 32, 1)[:, :70] * g.codes - clean) <= 0.51 * np.repeat(g.scale, 32, 1)[:, :70]
    ).all()


def gguf(kind: str, n: int, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Random blocks and their values by the definition of the format."""
    rng = np.random.default_rng(SEED)
    d = (rng.standard_normal((n, blocks)) * 0.1).astype(np.float16)
    m = rng.standard_normal((n, blocks)).astype(np.float16)
    if kind == "Q8_0":
        q = rng.integers(-128, 128, (n, blocks, 32)).astype(np.int8)
        raw = np.concatenate([d.view(np.uint8).reshape(n, blocks, 2), q.view(np.uint8)], 2)
        return raw.reshape(n, -1), (d.astype(np.float32)[..., None] * q).reshape(n, -1)
    q = rng.integers(0, 256, (n, blocks, 16)).astype(np.uint8)
    codes = np.concatenate([q & 15, q >> 4], 2).astype(np.float32)
    head = [d.view(np.uint8).reshape(n, blocks, 2)]
    if kind == "Q4_1":
        head.append(m.view(np.uint8).reshape(n, blocks, 2))
        values = d.astype(np.float64)[..., None] * codes + m.astype(np.float64)[..., None]
    else:
        values = d.astype(np.float64)[..., None] * (codes - 8)
    return np.concatenate([*head, q], 2).reshape(n, -1), values.astype(np.float32).reshape(n, -1)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_gguf_blocks_keep_their_values(kind: str) -> None:
    k = kernels()
    raw, values = gguf(kind, 70, 5)
    w = k.PackedWeight.from_gguf(raw, kind)
    np.testing.assert_array_equal(w.to_float(), values)
    x = draw(3, 160)
    close(k.matmul(x, w), law(x, values), x, values)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", ["none", "packed", "float"])
def test_matmulnbits_initializers(bits: int, zeros: str) -> None:
    k = kernels()
    rng = np.random.default_rng(SEED)
    n, width, block = 20, 96, 32
    codes = rng.integers(0, 2**bits, (n, 3, block)).astype(np.uint8)
    b = codes if bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4
    scales = rng.standard_normal(n * 3).astype(np.float32)
    points: np.ndarray | None = None
    zero = np.full((n, 3), 2.0 ** (bits - 1), np.float32)
    if zeros == "packed":
        zero = rng.integers(0, 2**bits, (n, 3)).astype(np.float32)
        z = zero.astype(np.uint8)
        points = z.reshape(-1) if bits == 8 else np.stack([z[:, 0] | z[:, 1] << 4, z[:, 2]], 1).reshape(-1)
    elif zeros == "float":
        zero = rng.standard_normal((n, 3)).astype(np.float32)
        points = zero.reshape(-1)
    w = k.PackedWeight.from_matmulnbits(b, scales, points, k=width, bits=bits, block_size=block)
    want = (codes.astype(np.float32) - zero[..., None]) * scales.reshape(n, 3, 1)
    np.testing.assert_allclose(w.to_float(), want.reshape(n, width), rtol=1e-5, atol=1e-4)
    assert w.offset == (zeros != "none")


def test_int4_codes_and_packed_agree() -> None:
    k = kernels()
    rng = np.random.default_rng(SEED)
    codes, scales = rng.integers(0, 16, (10, 35)).astype(np.uint8), rng.standard_normal((10, 2)).astype(np.float32)
    wide = np.zeros((10, 36), np.uint8)
    wide[:, :35] = codes
    packed = wide[:, 0::2] | wide[:, 1::2] << 4
    first = k.PackedWeight.from_codes(codes, scales, bits=4, group=32)
    second = k.PackedWeight.from_int4(packed, scales, k=35, group=32)
    third = k.PackedWeight.from_codes(codes.astype(np.int8) - 8, scales, bits=4, group=32)
    assert first.to_bytes() == second.to_bytes() == third.to_bytes()


def test_saved_weights_map(tmp_path: Path) -> None:
    k = kernels()
    x, w = draw(3, 64), k.PackedWeight.from_float(draw(70, 64, seed=1), bits=4, group=32)
    file = tmp_path / "w.bin"
    file.write_bytes(b"\0" * 64 + w.to_bytes())
    for other in (k.PackedWeight.map_file(file, 64), k.PackedWeight.from_bytes(w.to_bytes())):
        np.testing.assert_array_equal(k.matmul(x, other), k.matmul(x, w))
    with pytest.raises(InputError):
        k.PackedWeight.map_file(file, 32)
    with pytest.raises(InputError):
        k.PackedWeight.map_file(tmp_path / "absent", 0)


def test_damaged_headers_are_refused() -> None:
    k = kernels()
    raw = k.PackedWeight.from_float(draw(64, 64), bits=4, group=32).to_bytes()
    for size in (0, 1, 127, 128, len(raw) - 1):
        with pytest.raises(InputError):
            k.PackedWeight.from_bytes(raw[:size])
    rng = np.random.default_rng(SEED)
    for _ in range(300):
        bad = bytearray(raw)
        at = int(rng.integers(0, 128))
        bad[at] = (bad[at] + int(rng.integers(1, 256))) % 256
        try:
            other = k.PackedWeight.from_bytes(bad)
        except EdgeTokError:
            continue
        assert other.nbytes >= len(raw)
        assert (other.n, other.k) != (64, 64)


def test_empty_sizes() -> None:
    k = kernels()
    w = k.PackedWeight.from_float(draw(5, 0))
    np.testing.assert_array_equal(k.matmul(draw(3, 0), w, bias=np.ones(5, np.float32)), np.ones((3, 5)))
    assert k.matmul(draw(0, 8), k.PackedWeight.from_float(draw(5, 8))).shape == (0, 5)
    assert k.matmul(draw(2, 8), k.PackedWeight.from_float(np.empty((0, 8), np.float32))).shape == (2, 0)
    assert k.matmul(draw(2, 3, 8), k.PackedWeight.from_float(draw(5, 8))).shape == (2, 3, 5)
    assert k.matmul(draw(2, 0, 8), k.PackedWeight.from_float(draw(5, 8), group=32)).shape == (2, 0, 5)


def test_bad_input_is_named() -> None:
    k = kernels()
    w = k.PackedWeight.from_float(draw(5, 8))
    x = draw(2, 8)
    bad = [
        lambda: k.matmul(draw(2, 7), w),
        lambda: k.matmul(x.astype(np.float64), w),
        lambda: k.matmul(x, w, bias=draw(4)),
        lambda: k.matmul(x, w, activation="relu"),
        lambda: k.matmul(x, w, per="column"),
        lambda: k.matmul(x, w, scale=float("nan")),
        lambda: k.matmul(x, w, scale=1.0, zero=300),
        lambda: k.matmul(x, w, threads=0),
        lambda: k.matmul(x, w, out=np.empty((2, 6), np.float32)),
        lambda: k.matmul(x, w, residual=draw(2, 4)),
        lambda: k.matmul_integer(x, w),
        lambda: k.PackedWeight.from_float(draw(5, 8), bits=5),
        lambda: k.PackedWeight.from_float(draw(5, 8), group=24),
        lambda: k.PackedWeight.from_float(draw(5, 8), gated=True),
        lambda: k.PackedWeight.from_codes(np.full((2, 4), 16, np.uint8), np.ones(2, np.float32), bits=4),
        lambda: k.PackedWeight.from_gguf(np.zeros((2, 19), np.uint8), "Q4_0"),
        lambda: k.PackedWeight.from_gguf(np.zeros((2, 18), np.uint8), "Q6_K"),
        lambda: k.quantize_activations(x, per="group32", dtype="uint16"),
    ]
    for call in bad:
        with pytest.raises(InputError):
            call()
    with pytest.raises(UnsupportedError):
        k.quantize_activations(x, per="group32", dtype="uint8")


def test_two_python_threads_share_weights_and_plans() -> None:
    k = kernels()
    x, w = draw(20, 256), k.PackedWeight.from_float(draw(100, 256, seed=1), bits=4, group=32)
    want, wrong = k.matmul(x, w), []

    def many() -> None:
        for _ in range(50):
            if not np.array_equal(k.matmul(x, w, threads=2), want):
                wrong.append(1)

    workers = [threading.Thread(target=many) for _ in range(3)]
    for t in workers:
        t.start()
    for t in workers:
        t.join()
    assert not wrong
