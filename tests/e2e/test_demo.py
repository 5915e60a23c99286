"""The demo on the real model, with settings that make it short."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from command import edgetok

pytestmark = [pytest.mark.model, pytest.mark.slow]


def test_demo_converts_times_and_says_what_to_do_next(public_model: Callable[[str], Path], tmp_path: Path) -> None:
    cache = public_model("vit-s-focus").parents[2]
    short = ["--reduce", "tome:r=13", "--precision", "keep", "--images", 4, "-d", "cpu"]
    done = edgetok(
        "demo", "--json", "--keep", tmp_path / "demo", *short, env={"EDGETOK_CACHE": str(cache)}, timeout=900
    )
    assert done.code == 0, done.err
    report = done.json()
    assert report["convert"]["reduce"]["method"] == "tome"
    assert [row["engine"] for row in report["bench"]["rows"]] == ["edgetok", "onnxruntime"]
    assert len(list((tmp_path / "demo" / "images").glob("*.png"))) == 4
    assert edgetok("verify", tmp_path / "demo" / "vit-edge", "--no-replay").code == 0
    again = edgetok("demo", "--keep", tmp_path / "demo", env={"EDGETOK_CACHE": str(cache)})
    assert again.code == 2
    assert "--force" in again.err
