"""Exponential and activations over every float32 that is not trivial, against double: the bounds of edgetok/ops.h."""

from __future__ import annotations

from pathlib import Path

import c_build
import pytest

# relative to (3 + |x|) for exp (x <= 0), to max(1, |x|) for the others
BOUNDS = {"exp": 7.2e-8, "silu": 1.2e-7, "gelu": 3e-7, "gelu_tanh": 1.4e-7}


@pytest.mark.slow
def test_functions_stay_within_their_bounds_everywhere(tmp_path: Path) -> None:
    folder = c_build.build(tmp_path, "-DEDGETOK_TESTS=ON", targets=("sweep_ops",))
    lines = [line.split() for line in c_build.run(folder / "kernels_c" / "sweep_ops", "1").splitlines()]
    worst = {name: (float(error), float(at)) for name, error, at in lines}
    assert set(worst) == set(BOUNDS)
    for name, (error, at) in worst.items():
        assert error <= BOUNDS[name], f"{name}({at!r}) is off by {error}"
