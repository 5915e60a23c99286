"""Axis orders: libedgetok against the numpy law, orders that are known to be right, bad input."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from edgetok.errors import InputError, UnsupportedError
from edgetok.kernels.index import density_and_recall, from_paro
from edgetok.kernels.index.paro import ORDERS, AxisOrder, paro_reference, permutation
from edgetok.native.index import Csr

GOALS = {"text": 0, "density": 0.0, "mass": 0.9, "alpha": 0.5, "eps": 0.0}


def assert_same(found: AxisOrder, law: AxisOrder) -> None:
    np.testing.assert_array_equal(found.quant, law.quant)
    np.testing.assert_array_equal(found.sparse, law.sparse)
    np.testing.assert_array_equal(found.order, law.order)
    np.testing.assert_array_equal(found.inverse, law.inverse)
    np.testing.assert_array_equal(found.index.q_perm, law.index.q_perm)
    for field in dataclasses.fields(Csr):
        np.testing.assert_array_equal(
            getattr(found.index.csr, field.name), getattr(law.index.csr, field.name), err_msg=field.name
        )


def assert_postconditions(found: AxisOrder) -> None:
    found.index.check()
    assert found.index.mask().any(3).all()
    assert 0 < found.index.density() <= 1
    assert found.index.q_perm is not None
    np.testing.assert_array_equal(
        np.take_along_axis(found.inverse, found.index.q_perm[0], -1),
        np.broadcast_to(np.arange(found.index.n), found.inverse.shape),
    )


def along(axis: int, frames: int, height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One head whose tokens attend to tokens at the same place on ``axis`` (0 frame, 1 height, 2 width)."""
    rng = np.random.default_rng(seed)
    place = np.indices((frames, height, width))[axis].ravel()
    code = rng.standard_normal((max(frames, height, width), 64)) * 2
    q, k = (code[place] + rng.standard_normal((len(place), 64)) * 0.3 for _ in range(2))
    return q[None, None].astype(np.float32), k[None, None].astype(np.float32)


@pytest.mark.parametrize(
    "change", [{}, {"density": 0.3, "mass": 0.0}, {"alpha": 0.0}, {"alpha": 1.0, "eps": 0.01}, {"mass": 1.0}]
)
@pytest.mark.parametrize(
    "size", [(1, 1, 1, 0), (3, 5, 7, 0), (4, 4, 16, 0), (2, 9, 8, 70), (5, 1, 30, 10), (1, 20, 16, 0)]
)
def test_paro_equals_its_law(size: tuple[int, int, int, int], change: dict[str, float]) -> None:
    frames, height, width, text = size
    rng = np.random.default_rng(sum(size))
    n = text + frames * height * width
    q, k = rng.standard_normal((2, 2, 3, n, 24)).astype(np.float32) * 2
    goals = GOALS | {"text": text} | change
    found = from_paro(q, k, frames, height, width, **goals)
    assert_same(found, paro_reference(q, k, frames, height, width, **goals))
    assert_postconditions(found)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_paro_puts_the_axis_of_a_head_outermost(axis: int) -> None:
    q, k = along(axis, 8, 8, 16, axis)
    found = from_paro(q, k, 8, 8, 16, mass=0.95)
    assert ORDERS[found.order[0]][0] == "FHW"[axis]
    quality = density_and_recall(q, k, found.index)
    assert quality.recall[0, 0] > 0.95
    assert quality.density[0, 0] < 0.25


def test_paro_is_the_same_on_every_isa_and_thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = [along(axis, 4, 6, 10, axis) for axis in (2, 0, 1)]
    q, k = (np.concatenate([h[i] for h in heads], 1) for i in range(2))
    whole = from_paro(q, k, 4, 6, 10, mass=0.8)
    assert_same(from_paro(q, k, 4, 6, 10, mass=0.8, threads=3), whole)
    for isa in ("scalar", "avx2"):
        monkeypatch.setenv("EDGETOK_MAX_ISA", isa)
        assert_same(from_paro(q, k, 4, 6, 10, mass=0.8), whole)


def test_permutation_golden() -> None:
    """1 text token, 2 frames of 1 x 3: order WHF takes width outermost, frame fastest."""
    assert permutation(5, 2, 1, 3, 1).tolist() == [0, 1, 4, 2, 5, 3, 6]
    assert permutation(0, 2, 1, 3, 1).tolist() == list(range(7))


def test_paro_keeps_text_and_the_partial_block() -> None:
    q, k = along(0, 5, 5, 9, 3)
    front = np.zeros((1, 1, 70, 64), np.float32)
    q, k = np.concatenate([front, q], 2), np.concatenate([front, k], 2)
    mask = from_paro(q, k, 5, 5, 9, text=70, density=0.01).index.mask()[0, 0]
    assert mask[:2].all()
    assert mask[:, :2].all()
    assert mask[-1].all()
    assert mask[:, -1].all()


@pytest.mark.parametrize(
    "bad",
    [
        {"mass": 0.0},
        {"mass": 2.0},
        {"density": -1.0},
        {"alpha": 1.5},
        {"eps": -1.0},
        {"alpha": float("nan")},
        {"text": 1},
    ],
)
def test_paro_refuses_bad_parameters(bad: dict[str, float]) -> None:
    q, k = along(0, 2, 4, 8, 0)
    with pytest.raises(InputError):
        from_paro(q, k, 2, 4, 8, **({"mass": 0.5} | bad))


def test_paro_refuses_grouped_heads_and_no_tokens() -> None:
    q, k = along(0, 2, 4, 8, 0)
    with pytest.raises(UnsupportedError):
        from_paro(np.repeat(q, 2, 1), k, 2, 4, 8, mass=0.5)
    with pytest.raises(InputError):
        from_paro(q[:, :, :0], k[:, :, :0], 0, 4, 8, mass=0.5)
    with pytest.raises(InputError):
        from_paro(q, k, -2, -4, 8, mass=0.5)
