"""Gates compare in the direction that fails on NaN, and say the limit."""

from __future__ import annotations

import numpy as np
import pytest

from edgetok.errors import InputError
from edgetok.gates import Limits, agreement, check_agreement, check_drop, check_memory, check_size, check_speed, cosine
from edgetok.measuring import Ratio


def outputs(*arrays: np.ndarray) -> list[dict[str, np.ndarray]]:
    return [{"y": a} for a in arrays]


def test_equal_outputs_agree_exactly() -> None:
    x = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    (found,) = agreement(outputs(x, -x), outputs(x, -x))
    assert (found.cosine, found.max_abs, found.relative) == (pytest.approx(1.0, abs=1e-12), 0.0, 0.0)


def test_worst_sample_is_kept() -> None:
    x = np.array([[1.0, 0.0]], np.float32)
    (found,) = agreement(outputs(x, x), outputs(x, np.array([[0.0, 1.0]], np.float32)))
    assert (found.cosine, found.worst) == (0.5, 0.0)


def test_nan_fails_the_gate() -> None:
    x = np.ones((1, 2), np.float32)
    found = agreement(outputs(x), outputs(np.array([[np.nan, 1.0]], np.float32)))
    assert not check_agreement(found, Limits(), reduced=False, decides=True).passed
    assert not check_agreement(found, Limits(), reduced=False, decides=False).passed
    assert not check_drop("accuracy", 80.0, float("nan"), 0.5).passed


def test_changed_shape_is_refused_with_the_next_step() -> None:
    with pytest.raises(InputError, match=r"\[1, 3\].*\[1, 2\]"):
        agreement(outputs(np.zeros((1, 2), np.float32)), outputs(np.zeros((1, 3), np.float32)))


def test_limits_in_force_depend_on_reduction() -> None:
    assert Limits().cosine_limit(False) == 0.99
    assert Limits().cosine_limit(True) == 0.95
    assert Limits(cosine=0.5).cosine_limit(True) == 0.5


@pytest.mark.parametrize(("low", "passed"), [(1.0, False), (1.01, True), (0.9, False)])
def test_speed_passes_on_the_lower_end_of_the_interval(low: float, passed: bool) -> None:
    assert check_speed(Ratio(1.5, low, 2.0), Limits()).passed is passed


def test_drop_exactly_at_the_limit_passes() -> None:
    assert check_drop("accuracy", 80.0, 79.5, 0.5).passed
    assert not check_drop("accuracy", 80.0, 79.49, 0.5).passed


def test_size_and_memory_are_silent_without_a_limit() -> None:
    assert check_size(10, Limits()) is None
    assert check_memory(10, Limits()) is None
    size, memory = check_size(11, Limits(max_bytes=10)), check_memory(None, Limits(max_rss_bytes=10))
    assert size is not None
    assert not size.passed
    assert memory is not None
    assert "not measurable" in memory.text


def test_cosine_of_zeros() -> None:
    zero, one = np.zeros(3), np.ones(3)
    assert cosine(zero, zero) == 1.0
    assert cosine(zero, one) == 0.0


@pytest.mark.parametrize("bad", [{"drop": -1.0}, {"cosine": 2.0}, {"speedup": -0.1}, {"drop": float("nan")}])
def test_senseless_limits_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Limits(**bad)  # type: ignore[arg-type]
