"""Draw accuracy against speed of token reduction on ``vit-s-focus`` from the rows that ``vit_reduction.py`` wrote.

    python benchmarks/vit_reduction.py table --json benchmarks/results/vit_reduction.json
    python benchmarks/vit_curve.py benchmarks/results/vit_reduction.json docs/figures/vit_accuracy_speed.png

Needs the ``bench`` extra (matplotlib).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

# One colour a method; Okabe and Ito's palette, told apart by colour-blind readers.
COLOURS = {
    "tome": "#0072B2",
    "pitome": "#D55E00",
    "tomesd": "#009E73",
    "expedit": "#CC79A7",
    "token_transforming": "#E69F00",
    "zero_tprune": "#56B4E9",
}


def method_of(row: dict[str, Any]) -> str:
    """The method a row is about: the first word of its name."""
    return row["method"].split(",")[0].split()[0]


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Speed-up over the unreduced clean graph (x) against CIFAR-10 probe accuracy (y), one point a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.6), layout="constrained")
    full = rows[0]["accuracy"] + rows[0]["drop"]
    axes.axhline(full, color="#777777", linewidth=0.8)
    axes.annotate(f"unreduced, {full:.1f} %", (1.0, full), xytext=(2, 3), textcoords="offset points", color="#555555")
    axes.axhspan(full - 0.5, full, color="#009E73", alpha=0.08, linewidth=0)
    for method in dict.fromkeys(method_of(r) for r in rows):
        mine = sorted((r for r in rows if method_of(r) == method), key=lambda r: r["speedup"])
        axes.errorbar(
            [r["speedup"] for r in mine],
            [r["accuracy"] for r in mine],
            yerr=[r["interval"] for r in mine],
            fmt="o",
            markersize=5,
            elinewidth=0.7,
            capsize=2,
            color=COLOURS.get(method, "#000000"),
            label=method,
        )
        line = [r for r in mine if "increasing" in r["method"]]
        if len(line) > 1:
            axes.plot(
                [r["speedup"] for r in line],
                [r["accuracy"] for r in line],
                color=COLOURS.get(method, "#000000"),
                linewidth=1,
                alpha=0.6,
            )
    axes.set_xlabel("speed-up over the unreduced graph, fp32, batch 1 (times)")
    axes.set_ylabel("CIFAR-10 probe accuracy, 2,000 test images (%)")
    axes.grid(color="#dddddd", linewidth=0.5)
    axes.legend(frameon=False, loc=(0.36, 0.04))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    a = parser.parse_args()
    draw(json.loads(a.rows.read_text("utf-8")), a.out)


if __name__ == "__main__":
    main()
