"""Draw docs/figures/kv_page.svg: how a KV cache of libedgetok lays out tokens, pages and the parts of a page.

    python docs/figures/kv_page.py [OUT.svg]

Sizes are computed for head width 64 from the rules in kernels_c/src/kv_cache.h; bars are drawn to scale.
"""

from __future__ import annotations

import sys
from pathlib import Path

WIDTH, SLOTS, D = 860, 64, 64
INK, SOFT = "#1f2933", "#7b8794"
FILL = {"scales": "#f0b429", "K": "#4098d7", "V": "#3ebd93", "tail": "#d9e2ec", "dead": "#ffffff"}


def up(size: int) -> int:
    """Every part starts at a multiple of 64 bytes."""
    return -(-size // 64) * 64


# name, bytes, colour of each part, in order
PAGES: dict[str, list[tuple[str, int, str]]] = {
    "INT8": [("K scale", up(4), "scales"), ("V scales", up(2 * D), "scales"), ("K codes", SLOTS * D, "K"),
             ("V codes", SLOTS * D, "V")],
    "INT4": [("K scales, zeros", up(4 * D), "scales"), ("V scales", up(2 * D), "scales"),
             ("K codes", SLOTS * D // 2, "K"), ("V codes", SLOTS * D // 2, "V")],
    "f16": [("K", 2 * SLOTS * D, "K"), ("V", 2 * SLOTS * D, "V")],
}  # fmt: skip


def rect(x: float, y: float, w: float, h: float, fill: str, line: str = INK) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}" stroke="{line}" stroke-width="0.7"/>'


def text(x: float, y: float, words: str, *, size: int = 12, anchor: str = "start", fill: str = INK) -> str:
    place = f'x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"'
    return f"<text {place}>{words}</text>"


def sequence(top: int) -> list[str]:
    """Three pages of slots: one with evicted slots, one whole, one still in the tail."""
    out = [text(20, top, "A sequence, one layer, one KV head: a token takes a slot, 64 slots are a page", size=14)]
    evicted = {3, 4, 5, 17, 18, 30, 31, 32, 33, 50}
    for page, (name, used) in enumerate((("page 0", 64), ("page 1", 64), ("page 2", 23))):
        x0 = 20 + page * 280
        for slot in range(SLOTS):
            x, y = x0 + slot % 32 * 8, top + 26 + slot // 32 * 14
            quantized = page < 2
            fill = FILL["K"] if quantized else FILL["tail"]
            if slot >= used or (page == 0 and slot in evicted):
                fill = FILL["dead"]
            out.append(rect(x, y, 7, 12, fill, SOFT))
        out.append(text(x0, top + 20, name, fill=SOFT))
    out.append(text(20, top + 70, "live mask: 64 bits; a cleared", fill=SOFT, size=11))
    out.append(text(20, top + 84, "bit is an evicted slot, the rest stay", fill=SOFT, size=11))
    out.append(text(300, top + 70, "quantized once, when its", fill=SOFT, size=11))
    out.append(text(300, top + 84, "64th slot is written", fill=SOFT, size=11))
    out.append(text(580, top + 70, "not full: f16 rows in the tail;", fill=SOFT, size=11))
    out.append(text(580, top + 84, "queries here read them unquantized", fill=SOFT, size=11))
    return out


def scales(top: int) -> list[str]:
    """Which scale covers what."""
    out = [text(20, top, "What shares a scale", size=14)]
    cell, rows, columns = 11, 8, 14
    titles = ("K, INT8: the page", "K, INT8 that evicts: a token", "K, INT4: a channel (and a zero)", "V: a channel")
    groups = ((rows, columns), (1, columns), (rows, 1), (rows, 1))
    for n, (title, (high, wide)) in enumerate(zip(titles, groups)):
        x0, y0 = 20 + n * 210, top + 30
        for r in range(rows):
            for c in range(columns):
                on = r < high and c < wide
                base = FILL["V"] if title.startswith("V") else FILL["K"]
                out.append(rect(x0 + c * cell, y0 + r * cell, cell, cell, FILL["scales"] if on else base, "#ffffff"))
        out.append(text(x0, y0 - 8, title, size=11))
    out.append(text(20, top + 30 + rows * cell + 16, "rows: 64 tokens; columns: d or dv channels", fill=SOFT, size=11))
    return out


def parts(top: int) -> list[str]:
    """The bytes of a page, to scale."""
    out = [text(20, top, f"The bytes of a page, head width {D}, to scale (x86 layouts)", size=14)]
    longest = max(sum(size for _, size, _ in page) for page in PAGES.values())
    unit = (WIDTH - 110) / longest
    for n, (kind, page) in enumerate(PAGES.items()):
        x, y = 60.0, top + 16 + n * 44
        out.append(text(20, y + 17, kind))
        for name, size, colour in page:
            out.append(rect(x, y, size * unit, 26, FILL[colour]))
            if size * unit > 60:
                out.append(text(x + size * unit / 2, y + 17, f"{name} {size}", anchor="middle", size=11))
            x += size * unit
        total = sum(size for _, size, _ in page)
        out.append(text(x + 8 if x < WIDTH - 190 else x - 4, y + (17 if x < WIDTH - 190 else 39),
                        f"{total} bytes, {total / (2 * SLOTS * D):.3g} per element",
                        anchor="start" if x < WIDTH - 190 else "end", size=11, fill=SOFT))  # fmt: skip
    out.append(text(60, top + 16 + 3 * 44 + 12, "yellow: scales (and zeros), each part from a multiple of 64 bytes; "
                    "codes in the order one instruction set reads them", size=11, fill=SOFT))  # fmt: skip
    return out


def svg() -> str:
    body = [*sequence(28), *scales(148), *parts(312)]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 480" font-family="sans-serif" role="img">'
    title = "<title>Layout of a KV cache: slots, pages, scales, bytes</title>"
    return "\n".join([head, title, rect(0, 0, WIDTH, 480, "#ffffff", "#ffffff"), *body, "</svg>", ""])


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg")
    out.write_text(svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
