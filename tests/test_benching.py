"""Warm-up, inputs, peers and the fresh process of a bench."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command import VIT

from edgetok.benching import BenchOptions, run_bench, target_feeds, warm_up
from edgetok.errors import ArtifactError, InputError
from edgetok.fresh import child_cost, empty_rss_bytes
from edgetok.peers import open_peer, open_session
from edgetok.progress import RecordProgress

STATIC = VIT.with_name("vit_hf_dynamo23_eager_static.onnx")


def test_warm_up_stops_when_the_time_no_longer_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    durations = iter([1.0] * 5 + [0.5] * 5 + [0.1] * 100)

    def call() -> None:
        clock[0] += next(durations)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    calls, steady = warm_up(call, max_seconds=100)
    assert steady
    assert 15 <= calls <= 25  # two windows of five at the last speed, and not before


def test_warm_up_gives_up_on_what_never_settles(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def call() -> None:
        clock[0] += 1.5 ** min(clock[0], 50) * 0.1 + 0.1

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    calls, steady = warm_up(call, max_seconds=3)
    assert not steady
    assert calls >= 3


def test_inputs_of_a_plain_model_are_random_and_of_the_batch_asked_for() -> None:
    engine = open_session(VIT, "cpu_ort", 1)
    try:
        shapes = {"pixel_values": (1, 3, 32, 32)}
        feeds = target_feeds(VIT, engine.inputs, batch=8, shapes=shapes)
    finally:
        engine.close()
    assert feeds["pixel_values"].shape == (8, 3, 32, 32)


def test_all_engines_answer_the_same() -> None:
    ours, peer = open_session(STATIC, "cpu_ort", 1), open_peer("onnxruntime", STATIC, 1)
    try:
        feeds = target_feeds(STATIC, ours.inputs, batch=1)
        a, b = ours.call(feeds), peer.call(feeds)
    finally:
        ours.close()
        peer.close()
    # The same graph on the same runtime.
    np.testing.assert_allclose(a["logits"], b["logits"], rtol=1e-5, atol=1e-6)


def test_openvino_peer_answers_nearly_the_same() -> None:
    pytest.importorskip("openvino", reason="the peer openvino is not installed")
    peer, ours = open_peer("openvino", STATIC, 1), open_peer("onnxruntime", STATIC, 1)
    feeds = target_feeds(STATIC, ours.inputs, batch=1)
    a, b = peer.call(feeds)["logits"].ravel(), ours.call(feeds)["logits"].ravel()
    peer.close()
    # It computes in bf16 (8 bits of mantissa) where the CPU has it.
    assert float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) > 0.99


def test_a_peer_refuses_a_broken_model(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"\x08\x01nonsense")
    with pytest.raises(ArtifactError):
        open_peer("onnxruntime", tmp_path / "m.onnx", 1)
    with pytest.raises(InputError, match="unknown peer"):
        open_peer("tensorflow", STATIC, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a process is read from /proc")
def test_memory_is_that_of_a_fresh_process() -> None:
    """This process holds numpy, onnx and pytest; the fresh one is charged for what it loads itself."""
    ballast = np.ones(60_000_000)  # 480 MB that must not be counted
    engine = open_peer("onnxruntime", STATIC, 1)
    peak, load_ms = child_cost(engine.name, STATIC, "cpu", 1, target_feeds(STATIC, engine.inputs, batch=1))
    assert ballast.size
    assert empty_rss_bytes() is not None
    assert peak is not None
    assert 5e6 < peak < 400e6
    assert load_ms is not None
    assert load_ms > 0


def test_a_peer_that_cannot_be_measured_does_not_stop_the_bench(tmp_path: Path) -> None:
    engine = open_peer("onnxruntime", STATIC, 1)
    assert child_cost(engine.name, tmp_path / "gone.onnx", "cpu", 1, {}) == (None, None)


def test_bench_reports_progress_and_conditions() -> None:
    report = run_bench(
        BenchOptions(STATIC, rows=("single-stream",), device="cpu_ort", threads=1, rounds=5, memory=False),
        RecordProgress(),
    )
    assert report.conditions["threads"] == 1
    (row,) = report.rows
    assert row.ci95[0] <= row.value <= row.ci95[1]
    assert row.to_json()["samples_ms"]


def test_peers_need_a_source(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="source"):
        run_bench(BenchOptions(tmp_path / "artifact", peers=("onnxruntime",)))
