"""Writes docs/paths.svg: how errors travel backwards under bp, fa and dfa. Run: python docs/make_picture.py"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

INK, SOFT, BACK, DIRECT = "#1f2933", "#9aa5b1", "#c2410c", "#0f766e"
LAYERS = ("x", "layer 1", "layer 2", "layer 3", "loss")


def arrow(
    x1: float, y1: float, x2: float, y2: float, colour: str, bend: float = 0.0, label: str = "", at: float = 0.5
) -> str:
    """A curved arrow, with a label under its point at the fraction ``at`` of the way."""
    cx, cy = (x1 + x2) / 2, (y1 + y2) / 2 + bend
    px = (1 - at) ** 2 * x1 + 2 * at * (1 - at) * cx + at**2 * x2
    py = (1 - at) ** 2 * y1 + 2 * at * (1 - at) * cy + at**2 * y2
    return (
        f'<path d="M{x1} {y1} Q{cx} {cy} {x2} {y2}" fill="none" stroke="{colour}" stroke-width="1.8" '
        f'marker-end="url(#{colour[1:]})"/>'
        f'<text x="{px:.0f}" y="{py + 17:.0f}" fill="{colour}" text-anchor="middle">{label}</text>'
    )


def panel(top: float, title: str, sub: str, arrows: list[str]) -> str:
    """One row: the network, and how its errors go back."""
    xs = [210 + 130 * i for i in range(5)]
    parts = [
        f'<text x="20" y="{top + 26}" font-size="17" font-weight="600" fill="{INK}">{title}</text>',
        f'<text x="20" y="{top + 46}" fill="{SOFT}">{sub}</text>',
    ]
    for x, name in zip(xs, LAYERS, strict=True):
        parts.append(f'<rect x="{x - 40}" y="{top + 10}" width="80" height="32" rx="7" fill="#fff" stroke="{INK}"/>')
        parts.append(f'<text x="{x}" y="{top + 31}" text-anchor="middle" fill="{INK}">{name}</text>')
    for a, b in pairwise(xs):
        parts.append(arrow(a + 42, top + 20, b - 46, top + 20, SOFT))
    return "\n".join(parts + arrows)


def main() -> None:
    """Draw three panels."""
    xs = [210 + 130 * i for i in range(5)]

    def chain(top: float, labels: tuple[str, str, str]) -> list[str]:
        names = dict(zip((3, 2), labels[:2], strict=True))
        return [
            arrow(xs[i] - 20, top + 44, xs[i - 1] + 24, top + 46, BACK, 34, names.get(i, labels[2] if i == 4 else ""))
            for i in (4, 3, 2)
        ]

    def fan(top: float) -> list[str]:
        first = [arrow(xs[4] - 20, top + 44, xs[3] + 24, top + 46, BACK, 34, "e")]
        return first + [
            arrow(xs[4] - 10, top + 44, xs[i] + 10, top + 46, DIRECT, 30 + 46 * (3 - i), f"B{i + 1} e", at=0.78)
            for i in (2, 1)
        ]

    colours = "".join(
        f'<marker id="{c[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{c}"/></marker>'
        for c in (SOFT, BACK, DIRECT)
    )
    body = [
        panel(10, 'rule="bp"', "the weight, transposed", chain(10, ("W3ᵀ δ3", "W2ᵀ δ2", "e"))),
        panel(120, 'rule="fa"', "a random weight", chain(120, ("B3ᵀ δ3", "B2ᵀ δ2", "e"))),
        panel(230, 'rule="dfa"', "the output error itself", fan(230)),
    ]
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 385" font-family="system-ui, sans-serif" '
        f'font-size="13"><rect width="800" height="385" fill="#fff"/><defs>{colours}</defs>{"".join(body)}</svg>\n'
    )
    Path(__file__).with_name("paths.svg").write_text(svg)


if __name__ == "__main__":
    main()
