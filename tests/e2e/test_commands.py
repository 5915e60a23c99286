"""The main job through the commands: convert, verify, inspect, run, bench, compare, on a vision and a text model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command import ROOT, VIT, edgetok

from edgetok.demo_data import write_images

MINILM = ROOT / "tests" / "fixtures" / "hf" / "minilm"
# Tiny models run in a tenth of a millisecond: a gate on speed would judge the call.
LOOSE = ["--require-speedup", "0", "-d", "cpu", "-t", "1"]
CONTRACT = {"artifact", "sha256", "source", "tokens", "reduce", "precision", "check", "agreement", "speed", "bytes",
            "peak_rss_bytes", "seconds"}  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    (folder / "p.yaml").write_text("height: 32\nwidth: 32\nmean: [0.5, 0.5, 0.5]\nstd: [0.25, 0.25, 0.25]\n")
    return write_images(folder / "images", 24, side=40)


@pytest.fixture(scope="module")
def vit(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    output = tmp_path_factory.mktemp("vit") / "edge.edgetok"
    done = edgetok(
        *("convert", VIT, "-o", output, "--reduce", "tome:r=2", "--precision", "int8"),
        *("--calib", photos, "--preprocess", photos.parent / "p.yaml", "--cosine", "0.5", "--json", *LOOSE),
    )
    assert done.code == 0, done.err
    return output, done.json()


def test_convert_json_keeps_its_contract(vit: tuple[Path, dict[str, object]]) -> None:
    output, report = vit
    assert set(report) >= CONTRACT
    assert report["artifact"] == str(output)
    assert report["precision"] == "int8"
    tokens = report["tokens"]
    assert isinstance(tokens, dict)
    assert (tokens["before"], tokens["after"]) == (17, 13)
    assert set(report["speed"]) >= {  # type: ignore[call-overload]
        "device", "threads", "batch", "source_ms", "artifact_ms", "ratio", "ci95", "from_graph", "from_tokens",
        "from_bits", "pass",
    }  # fmt: skip
    assert set(report["check"]) >= {"metric", "source", "artifact", "drop", "limit", "pass"}  # type: ignore[call-overload]


def test_verify_replays_the_golden_inputs(vit: tuple[Path, dict[str, object]]) -> None:
    done = edgetok("verify", vit[0], "--source", VIT, "-d", "cpu", "--json")
    assert done.code == 0, done.err
    report = done.json()
    assert report["pass"] is True
    assert report["sha256"] == vit[1]["sha256"]
    assert report["replay"][0]["name"] == "logits"
    assert {c["name"] for c in report["checks"]} == {"structure", "replay", "source"}


def test_verify_makes_the_artifact_again(vit: tuple[Path, dict[str, object]], photos: Path) -> None:
    done = edgetok("verify", vit[0], "--reproduce", VIT, "--calib", photos, "-d", "cpu", "-t", "1", "--json")
    assert done.code == 0, done.err
    assert done.json()["checks"][-1]["name"] == "reproduce"


def test_inspect_shows_the_manifest(vit: tuple[Path, dict[str, object]]) -> None:
    report = edgetok("inspect", vit[0], "--json").json()
    assert report["kind"] == "artifact"
    assert report["manifest"]["content_sha256"] == vit[1]["sha256"]
    assert report["manifest"]["golden_cases"] >= 1
    text = edgetok("inspect", vit[0]).out
    assert "made from" in text


def test_inspect_a_source_shows_blocks_and_methods() -> None:
    report = edgetok("inspect", VIT, "--json").json()
    assert [b["heads"] for b in report["blocks"]] == [3, 3]
    assert report["tokens_per_layer"] == [17, 17]
    methods = {m["name"]: m for m in report["methods"]}
    assert set(methods) == {"expedit", "pitome", "token_transforming", "tome", "tomesd", "zero_tprune"}
    assert all(m["applies"] for m in methods.values())
    assert report["macs"] > report["macs_blocks"] > 0


def test_inspect_a_decoder_says_why_not() -> None:
    report = edgetok("inspect", VIT.with_name("llama_dynamo23_sdpa_static.onnx"), "--json").json()
    assert any(h.startswith("causal") for h in report["hazards"])
    assert not any(m["applies"] for m in report["methods"])
    assert all(m["reason"] for m in report["methods"])


def test_run_takes_an_image_as_the_artifact_recorded(vit: tuple[Path, dict[str, object]], photos: Path) -> None:
    done = edgetok("run", vit[0], "-i", photos / "000.png", "-d", "cpu", "--json")
    assert done.code == 0, done.err
    assert done.json()["outputs"][0]["shape"] == [1, 10]


def test_bench_an_artifact_with_its_source(vit: tuple[Path, dict[str, object]]) -> None:
    done = edgetok("bench", vit[0], "--source", VIT, "--peer", "onnxruntime", "--rounds", 5, "-d", "cpu", "--json")
    assert done.code == 0, done.err
    rows = done.json()["rows"]
    assert [r["engine"] for r in rows[:2]] == ["edgetok", "onnxruntime"]
    assert rows[1]["cosine"] > 0.5
    without = edgetok("bench", vit[0], "--peer", "onnxruntime", "-d", "cpu")
    assert without.code == 2
    assert "--source" in without.err


def test_compare_the_source_with_the_artifact(vit: tuple[Path, dict[str, object]]) -> None:
    done = edgetok("compare", VIT, vit[0], "--rounds", 5, "-d", "cpu", "--json", "--fail-on", "cosine<0.5")
    assert done.code == 0, done.err
    metrics = {x["metric"] for x in done.json()["lines"]}
    assert metrics == {"p50", "p90", "p99", "memory", "size", "cosine"}


def test_a_failed_gate_with_json_is_one_document_with_what_was_measured(tmp_path: Path) -> None:
    shape = ["--shape", "pixel_values=1x3x32x32"]
    done = edgetok("convert", VIT, "-o", tmp_path / "o", *shape, *LOOSE, "--max-bytes", "1kB", "--json")
    assert done.code == 6
    report = done.json()
    assert report["error"]["code"] == 6
    assert report["agreement"]["cosine"] > 0.99
    assert report["artifact"] is None


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    done = edgetok("convert", VIT, "-o", tmp_path / "o", "--precision", "int8-dynamic", "--dry_run", "--json")
    assert done.code == 0, done.err
    json.loads(done.out)
    assert list(tmp_path.iterdir()) == []


def test_recipe_and_flags_do_not_mix(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("format: 1\n")
    done = edgetok("convert", VIT, "-o", tmp_path / "o", "--recipe", tmp_path / "r.yaml", "--precision", "int8")
    assert done.code == 2
    assert "--recipe" in done.err


@pytest.mark.parametrize("value", ["int-8", "int8_dynamik", "bf16"])
def test_unknown_precision_is_a_usage_error(value: str, tmp_path: Path) -> None:
    assert edgetok("convert", VIT, "-o", tmp_path / "o", "--precision", value).code == 2


def test_a_text_model_takes_sentences(tmp_path: Path) -> None:
    done = edgetok("convert", MINILM, "-o", tmp_path / "text", "--precision", "int8_dynamic", "--cosine", 0.5, *LOOSE)
    assert done.code == 0, done.err
    one = edgetok("run", tmp_path / "text", "--text", "a b c", "--text", "d", "-o", tmp_path / "y.npz", "-d", "cpu")
    assert one.code == 0, one.err
    with np.load(tmp_path / "y.npz") as found:
        assert any(a.shape[0] == 2 for a in found.values())
    short = ["--rounds", 5, "-d", "cpu", "--no-memory", "--json"]
    bench = edgetok("bench", tmp_path / "text", "--source", MINILM, "--peer", "onnxruntime", *short)
    assert bench.code == 0, bench.err
    assert [r["engine"] for r in bench.json()["rows"][:2]] == ["edgetok", "onnxruntime"]
    compared = edgetok("compare", MINILM, tmp_path / "text", *short[:4], "--json")
    assert compared.code == 0, compared.err
    assert compared.json()["a"] == str(MINILM)
    seen = edgetok("inspect", tmp_path / "text", "--json")
    assert {r["reason"] for r in seen.json()["refused"]} <= {"rows"}
