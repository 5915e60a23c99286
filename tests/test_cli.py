"""The command as a user runs it: what it prints where, what it accepts, what it imports."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command import BERT, COMMAND, VIT, edgetok, environment

VERBS = ["doctor", "inspect", "convert", "verify", "run", "bench", "compare", "models", "devices", "completion", "demo"]
HEAVY = ("numpy", "onnx", "onnx_ir", "onnxruntime", "openvino", "tvm", "rich", "PIL", "yaml", "msgspec", "tokenizers")
STATIC = VIT.with_name("vit_hf_dynamo23_eager_static.onnx")


# ---- help, parsing, start-up


def test_help_lists_exactly_the_verbs() -> None:
    done = edgetok("--help")
    assert done.code == 0
    commands = done.out.partition("Commands:\n")[2].partition("exit codes")[0]
    assert sorted(re.findall(r"^  (\S+)  ", commands, re.MULTILINE)) == sorted(VERBS)


def test_help_lists_every_exit_code() -> None:
    from edgetok.errors import EXIT_CODES

    text = edgetok("--help").out
    assert all(
        re.search(rf"^ *{code}  {re.escape(meaning)}$", text, re.MULTILINE) for code, meaning in EXIT_CODES.items()
    )


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str) -> None:
    done = edgetok(verb, "--help")
    assert done.code == 0
    assert done.out.startswith(f"Usage: edgetok {verb}")
    assert done.err == ""


def test_no_arguments_is_a_usage_error_that_shows_help() -> None:
    done = edgetok()
    assert (done.code, done.out) == (2, "")
    assert "Commands:" in done.err


def test_version() -> None:
    from edgetok import __version__

    assert edgetok("--version").out == f"edgetok {__version__}\n"


def _modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"{code}\nimport sys; print('\\n' + ' '.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    return set(done.stdout.splitlines()[-1].split())


def test_import_edgetok_imports_nothing_heavy() -> None:
    assert not _modules_after("import edgetok") & {*HEAVY, "typer"}


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["no-such-verb"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    heavy = set(HEAVY) - ({"rich"} if arguments == ["no-such-verb"] else set())
    assert not _modules_after(f"from edgetok.cli.main import main; main({arguments!r})") & heavy


def test_flags_take_underscores() -> None:
    good = edgetok("bench", STATIC, "--max_seconds", 0.2, "--no_memory", "--rounds", 5, "-d", "cpu-ort")
    assert good.code == 0, good.err


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [(["convrt"], "convert"), (["bench", "x", "--thread", "2"], "--threads"), (["models", "pul"], "pull")],
)
def test_a_typing_error_gets_a_suggestion(arguments: list[str], suggestion: str) -> None:
    done = edgetok(*arguments)
    assert done.code == 2
    assert re.search(rf"^next +did you mean .*{suggestion}", done.err, re.MULTILINE)


def test_quiet_and_verbose_contradict() -> None:
    assert edgetok("devices", "-q", "-v").code == 2


def test_errors_with_json_are_one_document_and_still_readable_on_stderr() -> None:
    done = edgetok("bench", "no-such-file.onnx", "--json")
    assert done.code == 2
    error = done.json()["error"]
    assert error == {
        "code": 2,
        "kind": "usage",
        "message": "no such file or folder",
        "where": "no-such-file.onnx",
        "next": "check the path",
    }
    assert "error no such file or folder" in done.err


def test_usage_errors_with_json_are_one_document() -> None:
    assert edgetok("bench", "--no-such-flag", "--json").json()["error"]["code"] == 2


def test_a_reader_that_stops_early_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = edgetok("models", stdout=write)
    finally:
        os.close(write)
    assert done.code == 0
    assert "Traceback" not in done.err
    assert "Broken" not in done.err


def _in_a_terminal(*arguments: str, env: dict[str, str]) -> str:
    """What a terminal would show (stdout and stderr together)."""
    pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
    main, side = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdin=side, stdout=side, stderr=side, env=environment({"TERM": "xterm-256color", **env})
    )
    os.close(side)
    text = b""
    while True:
        try:
            piece = os.read(main, 4096)
        except OSError:  # Linux says EIO when the other side is closed
            break
        if not piece:
            break
        text += piece
    os.close(main)
    process.wait(timeout=60)
    return text.decode()


def test_colour_on_a_terminal_and_none_with_no_color() -> None:
    colour = re.compile(r"\x1b\[[0-9;]*3[0-7]m")
    assert colour.search(_in_a_terminal("no-such-verb", env={}))
    assert not colour.search(_in_a_terminal("no-such-verb", env={"NO_COLOR": "1"}))


def test_no_escape_codes_without_a_terminal() -> None:
    done = edgetok("doctor")
    assert "\x1b" not in done.out + done.err


# ---- doctor, devices, completion


def test_doctor_reports_machine_libraries_devices_and_how_to_get_the_rest() -> None:
    done = edgetok("doctor", "--json")
    assert done.code == 0, done.err
    report = done.json()
    assert report["ok"] is True
    assert report["cores"]["physical"] >= 1
    assert report["native"]["isa"]
    assert report["libraries"]["onnxruntime"]
    assert {d["name"] for d in report["devices"]} >= {"cpu-ort", "reference"}
    assert report["extras"]["tvm"]["fix"] == "pip install 'edgetok[tvm]'"


def test_doctor_uses_the_cache_folder_it_is_told(tmp_path: Path) -> None:
    assert edgetok("doctor", "--json", env={"EDGETOK_CACHE": str(tmp_path)}).json()["cache"] == str(tmp_path)


def test_devices_gives_each_a_reason() -> None:
    done = edgetok("devices", "--json")
    assert done.code == 0
    for row in done.json()["devices"]:
        assert row["reason"]
        assert row["available"] or row["fix"] or row["reason"]


def test_devices_and_doctor_name_the_kernels_that_this_cpu_takes() -> None:
    from edgetok.native.table import chosen

    names = [kernel.name for kernel in chosen()]
    assert edgetok("devices", "--json").json()["kernels"] == {"available": True, "chosen": names}
    assert edgetok("doctor", "--json").json()["native"]["kernels"] == names
    capped = edgetok("devices", "--json", env={"EDGETOK_MAX_ISA": "scalar"}).json()["kernels"]["chosen"]
    assert all("_scalar_" in name for name in capped)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str) -> None:
    done = edgetok("completion", shell)
    assert done.code == 0
    assert "_EDGETOK_COMPLETE" in done.out


def test_completion_completes_verbs_and_names() -> None:
    def complete(words: str) -> list[str]:
        extra = {
            "_EDGETOK_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
        }
        return edgetok(env=extra).out.split()

    assert complete("edgetok dev") == ["devices"]
    assert complete("edgetok models pull mini") == ["minilm-l6"]
    assert complete("edgetok convert x --precision int8") == ["int8", "int8-dynamic"]


# ---- models


def test_models_lists_name_size_and_licence(tmp_path: Path) -> None:
    done = edgetok("models", "--json", env={"EDGETOK_CACHE": str(tmp_path)})
    rows = {row["name"]: row for row in done.json()["models"]}
    assert set(rows) == {"vit-s-focus", "minilm-l6", "smollm2-135m"}
    assert rows["vit-s-focus"]["licence"] == "MIT"
    assert rows["vit-s-focus"]["pulled"] is False
    assert edgetok("models", "list", "--json", env={"EDGETOK_CACHE": str(tmp_path)}).json() == done.json()


def test_models_path_of_a_model_that_is_not_there_names_the_command(tmp_path: Path) -> None:
    done = edgetok("models", "path", "vit_s_focus", env={"EDGETOK_CACHE": str(tmp_path)})
    assert done.code == 2
    assert "edgetok models pull vit-s-focus" in done.err


def test_models_remove_twice(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "vit-s-focus"
    folder.mkdir(parents=True)
    (folder / "vit_s_focus.onnx").write_bytes(b"x")
    env = {"EDGETOK_CACHE": str(tmp_path)}
    assert edgetok("models", "remove", "vit-s-focus", "--json", env=env).json()["removed"] is True
    assert not folder.exists()
    assert edgetok("models", "remove", "vit-s-focus", "--json", env=env).json()["removed"] is False


def test_models_pull_offline_says_what_to_do(tmp_path: Path) -> None:
    done = edgetok("models", "pull", "minilm-l6", env={"EDGETOK_CACHE": str(tmp_path), "EDGETOK_OFFLINE": "1"})
    assert done.code == 8
    assert "edgetok models pull minilm-l6" in done.err


# ---- run


@pytest.fixture
def pixels(tmp_path: Path) -> Path:
    file = tmp_path / "x.npy"
    np.save(file, np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32))
    return file


def test_run_writes_what_the_model_answers(pixels: Path, tmp_path: Path) -> None:
    import onnxruntime as ort

    done = edgetok("run", STATIC, "--input", pixels, "-o", tmp_path / "y.npz", "-d", "cpu_ort", "--json")
    assert done.code == 0, done.err
    assert done.json()["outputs"][0]["shape"] == [1, 10]
    session = ort.InferenceSession(str(STATIC), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"pixel_values": np.load(pixels)})
    with np.load(tmp_path / "y.npz") as found:
        # The same runtime on the same machine; threads may order sums differently.
        np.testing.assert_allclose(found["logits"], expected, rtol=1e-5, atol=1e-6)


def test_run_takes_named_inputs_and_casts_only_within_a_kind(pixels: Path, tmp_path: Path) -> None:
    double = tmp_path / "d.npy"
    np.save(double, np.load(pixels).astype(np.float64))
    assert edgetok("run", STATIC, "-i", f"pixel_values={double}", "-d", "cpu").code == 0
    whole = tmp_path / "i.npy"
    np.save(whole, np.load(pixels).astype(np.float64).view(np.int64))
    assert edgetok("run", STATIC, "-i", f"nothing={pixels}", "-d", "cpu").code == 2


def test_run_refuses_to_replace_a_file(pixels: Path, tmp_path: Path) -> None:
    target = tmp_path / "y.npz"
    target.write_bytes(b"mine")
    done = edgetok("run", STATIC, "-i", pixels, "-o", target)
    assert done.code == 2
    assert "--force" in done.err
    assert target.read_bytes() == b"mine"


def test_run_refuses_images_without_preprocessing(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    done = edgetok("run", STATIC, "-i", tmp_path / "a.png", "-d", "cpu")
    assert done.code == 2
    assert "--preprocess" in done.err


def test_run_takes_an_image_with_a_preprocess_file(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    (tmp_path / "p.yaml").write_text("height: 32\nwidth: 32\n")
    done = edgetok("run", STATIC, "-i", tmp_path / "a.png", "--preprocess", tmp_path / "p.yaml", "-d", "cpu")
    assert done.code == 0, done.err


def test_run_wants_one_kind_of_input() -> None:
    assert edgetok("run", STATIC).code == 2
    assert edgetok("run", STATIC, "--random", "--text", "a").code == 2


def test_run_needs_a_shape_for_an_open_axis() -> None:
    done = edgetok("run", BERT, "--random", "-d", "cpu")
    assert done.code == 2
    assert "--shape" in done.err


def test_run_refuses_a_pickle(tmp_path: Path) -> None:
    file = tmp_path / "x.npy"
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert edgetok("run", STATIC, "-i", file, "-d", "cpu").code == 3


# ---- bench, compare

ROW_FIELDS = {"name", "engine", "device", "threads", "value", "unit", "p50_ms", "p90_ms", "p99_ms", "n", "ci95",
              "peak_rss_bytes"}  # fmt: skip


def test_bench_json_keeps_its_contract() -> None:
    done = edgetok("bench", VIT, "--peer", "onnxruntime", "--rounds", 5, "-d", "cpu", "--json", "--max-seconds", 2)
    assert done.code == 0, done.err
    report = done.json()
    assert [(r["name"], r["engine"]) for r in report["rows"]] == [
        ("single-stream", "edgetok"),
        ("single-stream", "onnxruntime"),
        ("batch8", "edgetok"),
        ("batch8", "onnxruntime"),
    ]
    assert {"cpu", "threads", "load_average", "versions", "governor", "clock_mhz"} <= set(report["conditions"])
    for row in report["rows"]:
        assert set(row) >= ROW_FIELDS
        assert row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["n"] >= 5
        assert row["peak_rss_bytes"] is None or row["peak_rss_bytes"] > 1_000_000
    # The same graph on the same runtime: only the order of sums may differ.
    assert report["rows"][1]["cosine"] > 0.99999


def test_bench_says_which_row_it_skips_and_why() -> None:
    done = edgetok("bench", STATIC, "--rounds", 5, "-d", "cpu", "--json", "--no-memory")
    assert [r["name"] for r in done.json()["rows"]] == ["single-stream"]
    assert done.json()["skipped"] == [{"name": "batch8", "reason": "edgetok: the model's batch axis is fixed"}]


@pytest.mark.parametrize("arguments", [["--rows", "pp512"], ["--peer", "tensorflow"], ["--rounds", "1"]])
def test_bench_refuses_unknown_names(arguments: list[str]) -> None:
    assert edgetok("bench", STATIC, *arguments).code == 2


def test_bench_makes_inputs_for_text_models() -> None:
    shapes = [a for n in ("input_ids", "attention_mask") for a in ("--shape", f"{n}=1x16")]
    done = edgetok("bench", BERT, "--rounds", 5, "-d", "cpu", "--no-memory", "--json", *shapes)
    assert done.code == 0, done.err


def test_compare_two_models_reports_speed_memory_size_and_answers() -> None:
    done = edgetok("compare", VIT, VIT, "--rounds", 5, "-d", "cpu", "--json")
    assert done.code == 0, done.err
    lines = {(x["row"], x["metric"]): x for x in done.json()["lines"]}
    assert {m for _, m in lines} == {"p50", "p90", "p99", "memory", "size", "cosine"}
    assert lines[("single-stream", "size")]["change"] == 0
    assert lines[("logits", "cosine")]["b"] > 0.99999
    assert {x["verdict"] for x in lines.values()} <= {"real", "within noise", "exact", "unknown"}


def test_compare_prints_markdown() -> None:
    done = edgetok("compare", VIT, VIT, "--rounds", 5, "-d", "cpu", "--markdown")
    assert done.out.startswith("| row | metric |")


def _record(path: Path, ms: float, **conditions: object) -> Path:
    rng = np.random.default_rng(0)
    samples = (ms * (1 + 0.01 * rng.standard_normal(40))).tolist()
    row = {"name": "single-stream", "engine": "edgetok", "device": "cpu-ort", "p50_ms": ms, "samples_ms": samples}
    path.write_text(json.dumps({"conditions": {"cpu": "a", "threads": 2, **conditions}, "rows": [row]}))
    return path


def test_compare_records_and_fail_on(tmp_path: Path) -> None:
    a, b = _record(tmp_path / "a.json", 10.0), _record(tmp_path / "b.json", 11.0)
    assert edgetok("compare", a, b, "--fail-on", "p50>+20%").code == 0
    done = edgetok("compare", a, b, "--fail-on", "p50>+5%", "--json")
    assert done.code == 6
    assert done.json()["error"]["kind"] == "budget"
    assert done.json()["lines"][0]["verdict"] == "real"
    assert edgetok("compare", b, a, "--fail-on", "p50>+5%").code == 0


def test_compare_refuses_records_of_other_conditions(tmp_path: Path) -> None:
    done = edgetok("compare", _record(tmp_path / "a.json", 10), _record(tmp_path / "b.json", 10, threads=4))
    assert done.code == 2
    assert "threads" in done.err


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": 3, "conditions": {}}', "[" * 100_000])
def test_compare_rejects_a_corrupt_record(tmp_path: Path, text: str) -> None:
    (tmp_path / "b.json").write_text(text)
    assert edgetok("compare", _record(tmp_path / "a.json", 10), tmp_path / "b.json").code == 3


def test_compare_refuses_a_record_and_a_model(tmp_path: Path) -> None:
    assert edgetok("compare", _record(tmp_path / "a.json", 10), STATIC).code == 2


def test_compare_refuses_models_with_other_inputs() -> None:
    assert edgetok("compare", STATIC, BERT.with_name("bert_dynamo18_eager_static.onnx"), "-d", "cpu").code == 2
