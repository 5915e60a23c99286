"""The small operations against float64 numpy, and their behaviour on odd values, views and bad input."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from edgetok import kernels
from edgetok.errors import InputError

SHAPES = [(1, 1), (3, 15), (2, 16), (2, 17), (2, 3, 31), (5, 257), (257, 384), (4, 1024), (0, 8), (1, 1, 2, 3, 33)]
EPS = float(np.finfo(np.float32).eps)
erf = np.vectorize(math.erf, otypes=[np.float64])


def rng(*key: int) -> np.random.Generator:
    return np.random.default_rng([20240607, *key])


def gelu_tanh64(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def normal(shape: tuple[int, ...], key: int = 0) -> np.ndarray:
    return rng(key, *shape).normal(size=shape).astype(np.float32)


def norm64(h: np.ndarray, gamma: np.ndarray, beta: np.ndarray, eps: float, rms: bool) -> np.ndarray:
    centred = h if rms else h - h.mean(-1, keepdims=True)
    return centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps) * gamma + beta


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rms", [False, True])
def test_norm_agrees_with_float64(shape: tuple[int, ...], rms: bool) -> None:
    x, residual, gamma, beta = normal(shape, 1), normal(shape, 2), normal(shape[-1:], 3), normal(shape[-1:], 4)
    h = x.astype(np.float64) + residual
    want = norm64(h, gamma.astype(np.float64), 0 if rms else beta.astype(np.float64), 1e-5, rms)
    if rms:
        got = kernels.rmsnorm(x, gamma, eps=1e-5, residual=residual)
    else:
        got = kernels.layernorm(x, gamma, beta, residual=residual)
    # h, mean, rstd, and three products carry a rounding each; the mean cancels against h, whose size is about 1.5 x 4
    np.testing.assert_allclose(got, want, rtol=8 * EPS, atol=32 * EPS)


@pytest.mark.parametrize("rms", [False, True])
def test_fused_quantization_gives_the_codes_of_the_norm(rms: bool) -> None:
    x, residual, gamma = normal((37, 391), 1), normal((37, 391), 2), normal((391,), 3)
    h, codes, scale = kernels.add_norm_quantize(x, gamma, rms=rms, residual=residual, eps=1e-5)
    y = kernels.rmsnorm(h, gamma, eps=1e-5) if rms else kernels.layernorm(h, gamma)
    np.testing.assert_array_equal(h, x + residual)
    top = np.abs(y).max(-1)
    np.testing.assert_array_equal(scale, top / np.float32(127))
    np.testing.assert_array_equal(codes, np.rint(y * (np.float32(1) / scale)[:, None]).clip(-127, 127))
    assert np.abs(codes * scale[:, None] - y).max() <= 0.501 * scale.max()


def test_norm_of_constant_and_zero_rows_is_finite() -> None:
    x = np.stack([np.zeros(40), np.full(40, 3.0)]).astype(np.float32)
    np.testing.assert_array_equal(kernels.layernorm(x), 0)
    _, codes, scale = kernels.add_norm_quantize(x)
    assert not codes.any()
    np.testing.assert_array_equal(scale, 1)


def test_norm_in_place_and_of_strided_rows() -> None:
    wide = normal((9, 50), 5)
    x = wide[:, 3:43]
    want = kernels.layernorm(x.copy())
    np.testing.assert_array_equal(kernels.layernorm(x), want)
    np.testing.assert_array_equal(kernels.layernorm(x, out=x), want)
    rows = np.broadcast_to(normal((1, 40), 6), (9, 40))
    np.testing.assert_array_equal(kernels.layernorm(rows)[3], kernels.layernorm(rows[:1])[0])


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    x = normal((33, 77), 7)
    for op in (kernels.layernorm, kernels.rmsnorm, kernels.softmax, kernels.gelu, kernels.silu):
        all_rows = op(x)
        np.testing.assert_array_equal(all_rows[13:14], op(x[13:14]), err_msg=op.__name__)


@pytest.mark.parametrize(
    ("op", "law"),
    [
        (kernels.gelu, lambda x: x * 0.5 * (1 + erf(x / math.sqrt(2)))),
        (lambda x: kernels.gelu(x, tanh=True), gelu_tanh64),
        (kernels.silu, lambda x: x / (1 + np.exp(-x))),
    ],
    ids=["gelu", "gelu_tanh", "silu"],
)  # fmt: skip
def test_activation_agrees_with_float64(op: Callable, law: Callable) -> None:
    x = np.concatenate([np.linspace(-12, 12, 20011), np.geomspace(1e-30, 80, 999), -np.geomspace(1e-30, 80, 999)])
    x = x.astype(np.float32)
    with np.errstate(over="ignore"):
        want = law(x.astype(np.float64))
    error = np.abs(op(x) - want) / np.maximum(1, np.abs(x))
    assert error.max() <= 3e-7, x[error.argmax()]
    np.testing.assert_array_equal(op(np.array([np.inf, -np.inf, 0], np.float32)), [np.inf, 0, 0])
    assert np.isnan(op(np.array([1, np.nan], np.float32)))[1]


def test_swiglu_of_the_halves_of_a_projection() -> None:
    both = normal((21, 130), 8)
    gate, up = both[:, :65], both[:, 65:]
    want = gate / (1 + np.exp(-gate.astype(np.float64))) * up
    np.testing.assert_allclose(kernels.swiglu(gate, up), want, rtol=6 * EPS)
    np.testing.assert_array_equal(kernels.add(gate, up), gate + up)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[-1] < 1000])
def test_softmax_agrees_with_float64(shape: tuple[int, ...]) -> None:
    x, bias = 3 * normal(shape, 1), normal(shape, 2)
    z = 0.125 * x.astype(np.float64) + bias
    e = np.exp(z - z.max(-1, keepdims=True, initial=-np.inf))
    got = kernels.softmax(x, mask=bias, scale=0.125)
    np.testing.assert_allclose(got, e / e.sum(-1, keepdims=True), rtol=40 * EPS, atol=1e-9)
    if x.size:
        np.testing.assert_allclose(got.sum(-1), 1, rtol=30 * EPS)


def test_softmax_masks_rows_by_broadcast_and_empty_rows_are_zero() -> None:
    x = normal((2, 3, 4, 21), 1)
    keep = rng(9).random((2, 1, 1, 21)) < 0.6
    keep[1] = False
    got = kernels.softmax(x, mask=keep)
    want = kernels.softmax(np.where(keep, x, -np.inf).astype(np.float32))
    np.testing.assert_array_equal(got, want)
    assert not got[1].any()
    assert np.isnan(kernels.softmax(np.array([[1, np.nan], [np.inf, 1]], np.float32))).all()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("d", "rot"), [(64, 64), (80, 80), (80, 32), (96, 48), (40, 2), (7, 6)])
def test_rope_agrees_with_float64(d: int, rot: int, interleaved: bool) -> None:
    batch, heads, n = 2, 3, 300
    x = normal((batch, n, heads, d), d).swapaxes(1, 2)
    cos, sin = kernels.rope_tables(400, rot, base=5000.0)
    pos = rng(rot).integers(0, 400, (batch, n))
    angle = pos[:, None, :, None] * 5000.0 ** (-np.arange(rot // 2) * 2 / rot)
    z = x.astype(np.float64)
    u, v = (z[..., 0:rot:2], z[..., 1:rot:2]) if interleaved else (z[..., : rot // 2], z[..., rot // 2 : rot])
    left, right = u * np.cos(angle) - v * np.sin(angle), v * np.cos(angle) + u * np.sin(angle)
    want = z.copy()
    if interleaved:
        want[..., 0:rot:2], want[..., 1:rot:2] = left, right
    else:
        want[..., : rot // 2], want[..., rot // 2 : rot] = left, right
    got = kernels.rope(x, cos, sin, positions=pos, interleaved=interleaved)
    np.testing.assert_allclose(got, want, rtol=4 * EPS, atol=16 * EPS)
    np.testing.assert_array_equal(got[..., rot:], x[..., rot:])
    np.testing.assert_array_equal(
        kernels.rope(x[1], cos, sin, positions=pos[1].astype(np.int32), interleaved=interleaved), got[1]
    )
    np.testing.assert_array_equal(kernels.rope(x, cos, sin, positions=pos, interleaved=interleaved, out=x), got)


def test_rope_without_positions_counts_from_first() -> None:
    x = normal((2, 5, 16), 1)
    cos, sin = kernels.rope_tables(9, 16)
    want = kernels.rope(x, cos, sin, positions=np.arange(4, 9))
    np.testing.assert_array_equal(kernels.rope(x, cos, sin, first=4), want)
    later = kernels.rope_tables(5, 16, first=4)
    np.testing.assert_array_equal(kernels.rope(x, *later), want)
    with pytest.raises(InputError, match="range"):
        kernels.rope(x, cos, sin, first=5)
    with pytest.raises(InputError, match="range"):
        kernels.rope(x, cos, sin, positions=np.array([0, 1, 2, 3, -1]))


@pytest.mark.parametrize(("cols", "k"), [(1, 1), (129, 7), (1000, 999), (4099, 50), (49152, 50), (49152, 3000)])
@pytest.mark.parametrize("kind", ["normal", "few values", "rising", "odd"])
def test_topk_is_a_stable_sort(cols: int, k: int, kind: str) -> None:
    x = normal((2, cols), k)
    if kind == "few values":
        x = np.rint(x)
    elif kind == "rising":
        x = np.sort(x)
    elif kind == "odd":
        x[rng(cols).random(x.shape) < 0.1] = np.nan
        x[rng(cols, 1).random(x.shape) < 0.1] = -np.inf
    values, index = kernels.topk(x, k)
    key = np.where(np.isnan(x), np.inf, x)
    want = np.lexsort((-key, ~np.isnan(x)), axis=-1)[:, :k]
    np.testing.assert_array_equal(index, want)
    np.testing.assert_array_equal(values, np.take_along_axis(x, want, 1))
    np.testing.assert_array_equal(kernels.argmax(x), want[:, 0])


def test_rows_are_gathered_and_scattered() -> None:
    for dtype in (np.float32, np.float16, np.int8, np.int64):
        x = (100 * normal((3, 20, 7), 1)).astype(dtype)
        index = np.stack([rng(b).permutation(20)[:11] for b in range(3)])
        y = kernels.gather_rows(x, index)
        np.testing.assert_array_equal(y, np.take_along_axis(x, index[..., None], 1))
        back = np.zeros_like(x)
        kernels.scatter_rows(y, index.astype(np.int32), back)
        kept = np.zeros((3, 20), bool)
        np.put_along_axis(kept, index, True, 1)
        np.testing.assert_array_equal(back, np.where(kept[..., None], x, 0))
    with pytest.raises(InputError, match="range"):
        kernels.gather_rows(x[0], np.array([20]))


def test_bad_input_says_what_is_wrong_and_touches_nothing() -> None:
    x, out = normal((4, 8)), np.full((4, 8), 77, np.float32)
    cases: list[Callable[[], object]] = [
        lambda: kernels.layernorm(x.astype(np.float64), out=out),
        lambda: kernels.layernorm(x, np.ones(7, np.float32), out=out),
        lambda: kernels.layernorm(x[:, ::2], out=out[:, :4]),
        lambda: kernels.layernorm(x, eps=-1.0, out=out),
        lambda: kernels.gelu(out[:3], out=out[1:]),
        lambda: kernels.softmax(x, mask=np.ones((4, 1), bool), out=out),
        lambda: kernels.swiglu(x, x[:2], out=out),
        lambda: kernels.add_norm_quantize(x, None, np.zeros(8, np.float32), rms=True),
        lambda: kernels.topk(x, 9),
        lambda: kernels.rope_tables(4, 3),
    ]
    for case in cases:
        with pytest.raises(InputError):
            case()
    assert (out == 77).all()


def test_dlpack_tensors_are_taken() -> None:
    torch = pytest.importorskip("torch", reason="needs a DLPack producer")
    x = torch.randn(5, 33, generator=torch.Generator().manual_seed(1))
    want = torch.nn.functional.layer_norm(x, (33,))
    np.testing.assert_allclose(kernels.layernorm(x), want.numpy(), atol=2e-6)
