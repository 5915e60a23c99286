"""The ONNX project's node tests, run in process, against the committed lists: what passed keeps passing, what starts
to pass is listed.

Since onnx 1.2x the node cases are not shipped as files: importing ``onnx.backend.test.case.node`` runs one function per
case that computes inputs and expected outputs (about five seconds for 1,900 cases), so this module imports it lazily,
once per process. Run as a script to print what passes and what does not:

    python tests/backend/test_onnx_nodes.py reference
"""

from __future__ import annotations

import fnmatch
import sys
import tomllib
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest

HERE = Path(__file__).parent
DEVICES = ("reference", "cpu_ort")


@dataclass(frozen=True)
class Exclude:
    """Why some cases are not expected to pass.

    Args:
        reason: one line.
        names: case names, or patterns with ``*``.
        varies: the outcome depends on a random draw or on the machine, so passing is no news.
    """

    reason: str
    names: tuple[str, ...]
    varies: bool = False

    def covers(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.names)


@cache
def cases() -> dict[str, Any]:
    """Name to case, in the order of the ONNX project."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {case.name: case for case in load_model_tests(kind="node")}


def failure(name: str, device: str) -> str | None:
    """Run one case; None when it passes, else the reason in one line."""
    from onnx.backend.test.runner import Runner, _normalize_tensor

    from edgetok.onnx_backend import EdgetokBackend

    case = cases()[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rep = EdgetokBackend.prepare(case.model, edgetok_device=device)
            for inputs, expected in case.data_sets:
                got = rep.run([_normalize_tensor(x) for x in inputs])
                want = [_normalize_tensor(x) for x in expected]
                Runner.assert_similar_outputs(want, got, case.rtol, case.atol)
    except Exception as exc:  # every kind of failure is a result here
        return f"{type(exc).__name__}: {' '.join(str(exc).split())[:300]}"
    return None


def pass_list(device: str) -> list[str]:
    """The committed list of cases that must pass."""
    lines = (HERE / f"pass_{device}.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def onnx_version(device: str) -> str:
    """The onnx release for which the committed lists are complete (first line of the pass list)."""
    return (HERE / f"pass_{device}.txt").read_text().splitlines()[0].split()[-1]


def excludes(device: str) -> list[Exclude]:
    """The committed excludes with their reasons."""
    table = tomllib.loads((HERE / "excludes.toml").read_text())[device]
    return [Exclude(e["reason"], tuple(e["names"]), e.get("varies", False)) for e in table]


@pytest.mark.parametrize("device", DEVICES)
def test_listed_node_cases_still_pass(device: str) -> None:
    known = cases()
    broken = {name: why for name in pass_list(device) if name in known and (why := failure(name, device)) is not None}
    assert not broken, f"{len(broken)} listed cases fail on {device}:\n" + "\n".join(
        f"  {name}: {why}" for name, why in broken.items()
    )


@pytest.mark.parametrize("device", DEVICES)
def test_excluded_node_cases_still_fail(device: str) -> None:
    """A case that starts to pass belongs on the pass list, which only grows."""
    listed = set(pass_list(device))
    rules = [rule for rule in excludes(device) if not rule.varies]
    names = [name for name in cases() if name not in listed and any(rule.covers(name) for rule in rules)]
    passing = [name for name in names if failure(name, device) is None]
    if onnx.__version__ != onnx_version(device) and passing:
        pytest.skip(f"other onnx than the lists were made with; these pass now: {', '.join(passing)}")
    assert not passing, f"move to pass_{device}.txt, out of excludes.toml: {' '.join(passing)}"


@pytest.mark.parametrize("device", DEVICES)
def test_every_node_case_is_listed_or_excluded_with_a_reason(device: str) -> None:
    if onnx.__version__ != onnx_version(device):
        pytest.skip(f"lists are complete for onnx {onnx_version(device)}, this is {onnx.__version__}")
    listed, rules = set(pass_list(device)), excludes(device)
    loose = [n for n in cases() if n not in listed and not any(r.covers(n) for r in rules)]
    assert not loose, f"neither listed nor excluded: {loose}"
    gone = sorted(listed - set(cases()))
    assert not gone, f"listed, but unknown to onnx {onnx.__version__}: {gone}"
    assert all(rule.reason for rule in rules)


@pytest.mark.parametrize("device", DEVICES)
def test_pass_list_is_sorted_without_repeats(device: str) -> None:
    names = pass_list(device)
    assert names == sorted(set(names))


if __name__ == "__main__":
    for case_name in cases():
        why = failure(case_name, sys.argv[1])
        print(case_name if why is None else f"# {case_name}: {why}")
