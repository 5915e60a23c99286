"""Verdicts and rules of ``compare``."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgetok.comparing import Comparison, Line, _timing_lines, broken, parse_rule
from edgetok.errors import InputError
from edgetok.measuring import Timing


def timing(ms: float, seed: int, n: int = 60) -> Timing:
    return Timing(tuple(ms * (1 + 0.02 * np.random.default_rng(seed).standard_normal(n))))


def p50(a: Timing, b: Timing, *, paired: bool = False) -> Line:
    return _timing_lines("row", a, b, paired=paired, seed=0)[0]


def test_the_same_distribution_is_within_noise_nearly_always() -> None:
    verdicts = [p50(timing(10, 2 * i), timing(10, 2 * i + 1)).verdict for i in range(60)]
    # A 95 % interval misses in 3 of 60 on average; more than 12 would happen once in 100,000 such runs.
    assert verdicts.count("real") <= 12


def test_a_tenth_slower_is_real_and_has_the_right_size() -> None:
    line = p50(timing(10, 0), timing(11, 1))
    assert line.verdict == "real"
    assert line.change == pytest.approx(0.1, abs=0.02)
    assert line.ci95 is not None
    assert line.ci95[0] < 0.1 < line.ci95[1]


def test_pairs_cancel_what_hits_both() -> None:
    drift = np.linspace(1, 2, 50)
    a, b = Timing(tuple(10 * drift)), Timing(tuple(10.5 * drift))
    assert p50(a, b, paired=True).verdict == "real"
    assert p50(a, b, paired=False).verdict == "within noise"


def comparison(*lines: Line) -> Comparison:
    return Comparison("a", "b", lines, {})


@pytest.mark.parametrize(
    ("rule", "fails"),
    [
        ("p50>+5%", True),
        ("p50>5%", True),
        ("p50>+15%", False),
        ("p50<-5%", False),
        ("p50>10.5", True),
        ("p50 > 12", False),
    ],
)
def test_rules(rule: str, fails: bool) -> None:
    line = Line("row", "p50", 10.0, 11.0, "ms", 0.1, (0.08, 0.12), "real")
    assert bool(broken(comparison(line), [parse_rule(rule)])) is fails


def test_noise_breaks_no_rule() -> None:
    line = Line("row", "p50", 10.0, 11.0, "ms", 0.1, (-0.1, 0.3), "within noise")
    assert broken(comparison(line), [parse_rule("p50>+5%")]) == []


def test_nan_breaks_a_rule() -> None:
    line = Line("y", "cosine", 1.0, math.nan, "")
    assert broken(comparison(line), [parse_rule("cosine<0.99")])


def test_a_rule_about_what_was_not_measured_is_an_error() -> None:
    with pytest.raises(InputError, match="not measured"):
        broken(comparison(Line("row", "memory", None, None, "B")), [parse_rule("memory>+5%")])


@pytest.mark.parametrize("text", ["", "p50", "p50>", "p50=5%", "p51>5%", "p50>5 apples", "cosine<1%", "p50>+5%%"])
def test_wrong_rules_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_rule(text)


def test_markdown_has_a_row_per_line() -> None:
    text = comparison(Line("row", "size", 2e6, 1e6, "B", -0.5), Line("y", "cosine", 1.0, 0.5, "")).to_markdown()
    assert text.splitlines()[2:] == [
        "| row | size | 2.0 MB | 1.0 MB | -50.0 % | exact |",
        "| y | cosine | 1.00000 | 0.50000 |  | exact |",
    ]
