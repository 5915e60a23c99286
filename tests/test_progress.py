"""Progress: silent for what is quick, a line for what is slow, never on stdout, and off the screen before an error."""

from __future__ import annotations

import pytest

from edgetok.cli import bars
from edgetok.cli.bars import BarProgress, LineProgress, make_progress
from edgetok.cli.output import Output
from edgetok.errors import InputError
from edgetok.progress import NullProgress, Progress, RecordProgress


@pytest.mark.parametrize("progress", [NullProgress(), RecordProgress(), LineProgress(Output()), BarProgress(Output())])
def test_all_keep_the_protocol(progress: Progress) -> None:
    assert isinstance(progress, Progress)
    progress.start("work", 3)
    progress.start("part")
    progress.advance()
    progress.advance(to=2, total=4)
    progress.done()
    progress.line("label", "text", "pass")
    progress.done()
    progress.done()  # one too many does no harm
    progress.advance()


def test_quick_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = LineProgress(Output())
    progress.start("work", 3)
    progress.advance(3)
    progress.done()
    assert capsys.readouterr() == ("", "")


def test_slow_work_says_so_on_stderr(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(bars.time, "monotonic", lambda: next(clock))
    progress = LineProgress(Output())
    progress.start("work", 3)
    progress.advance(3)
    progress.done()
    out, err = capsys.readouterr()
    assert out == ""
    assert "work" in err
    assert "3/3" in err


def test_lines_go_to_stdout_for_people_and_nowhere_with_json(capsys: pytest.CaptureFixture[str]) -> None:
    make_progress(Output()).line("speed", "2.0x", "pass")
    out, err = capsys.readouterr()
    assert out.split() == ["speed", "2.0x", "pass"]
    assert err == ""
    make_progress(Output(json=True)).line("speed", "2.0x", "pass")
    assert capsys.readouterr() == ("", "")


def test_no_bars_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("CI", "true")
    assert isinstance(make_progress(Output()), LineProgress)
    assert isinstance(make_progress(Output(quiet=True)), NullProgress)


def test_an_error_takes_the_bar_off_the_screen() -> None:
    out = Output()
    bar = BarProgress(out)
    out._progress = bar
    bar.start("work", 3)
    out.error(InputError("no"))
    assert bar._bar is None


def test_json_holds_no_nan_and_no_numpy() -> None:
    import numpy as np

    from edgetok.cli.output import plain

    value = {"a": np.float32(1.5), "b": float("nan"), "c": (np.arange(2), None), 3: {"d": True}}
    assert plain(value) == {"a": 1.5, "b": None, "c": [[0, 1], None], "3": {"d": True}}


@pytest.mark.parametrize(
    ("text", "size"), [("26MB", 26_000_000), ("1.5 GiB", 3 << 29), ("1000", 1000), ("2kib", 2048), ("7 b", 7)]
)
def test_sizes(text: str, size: int) -> None:
    from edgetok.cli.output import parse_bytes

    assert parse_bytes(text, "--max-bytes") == size


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "0", "1XB", "1e400", "nan", "inf", "1 2 MB"])
def test_wrong_sizes_are_refused(text: str) -> None:
    from edgetok.cli.output import parse_bytes

    with pytest.raises(InputError):
        parse_bytes(text, "--max-bytes")


@pytest.mark.parametrize("text", ["x", "x=", "=1x3", "x=1x0", "x=1x-3", "x=1xa", "x=1x²"])
def test_wrong_shapes_are_refused(text: str) -> None:
    from edgetok.cli.options import parse_shapes

    with pytest.raises(InputError):
        parse_shapes([text])


def test_shapes_are_read_and_names_may_hold_an_equals_sign() -> None:
    from edgetok.cli.options import parse_shapes

    assert parse_shapes(["x=1x3", "a=b=2"]) == {"x": (1, 3), "a=b": (2,)}
