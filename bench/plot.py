"""The ratios as an SVG picture, a bar for each workload: shorter than the line is cheaper than the peer. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

import attrs

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Bar", "svg"]

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 840, 300, 64, 86, 34
ROW, BAR, GAP, GROUP = 22, 12, 3, 26
LONGEST = 2.0
"""Ratio at which a bar is cut off."""

STYLE = """\
  text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; fill: #1f2328; }
  .title { font-size: 17px; font-weight: 600; }
  .muted { fill: #59636e; font-size: 12px; }
  .group { fill: #59636e; font-size: 11px; font-weight: 600; letter-spacing: 0.06em; }
  .value { font-size: 12px; font-variant-numeric: tabular-nums; paint-order: stroke; stroke: #ffffff; stroke-width: 4; }
  .ground { fill: #ffffff; }
  .grid { stroke: #d1d9e0; stroke-width: 1; }
  .even { stroke: #59636e; stroke-width: 1.5; }
  .less { fill: #1a7f64; }
  .more { fill: #d1702b; }
  .second { fill-opacity: 0.55; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .muted, .group { fill: #9198a1; }
    .value { stroke: #0d1117; }
    .ground { fill: #0d1117; }
    .grid { stroke: #30363d; }
    .even { stroke: #9198a1; }
    .less { fill: #3fb68b; }
    .more { fill: #e6915a; }
  }
"""


@attrs.frozen(kw_only=True)
class Bar:
    """One line of the picture."""

    group: str
    title: str
    ratios: tuple[float | None, ...]
    """Ours to each other peer's, in the order of the legend."""


def _x(ratio: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * min(ratio, LONGEST) / LONGEST


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    css = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{css}>{escape(text)}</text>'


def svg(bars: Sequence[Bar], peers: Sequence[str], *, title: str, subtitle: str) -> str:
    """The picture, for light and dark pages.

    Args:
        bars: in order; those of one group stand together.
        peers: whom we are compared to.
        title: first line.
        subtitle: what was measured where.
    """
    thickness = BAR if len(peers) < 2 else max(6, BAR - 2)
    height_of_row = max(ROW, len(peers) * (thickness + GAP) + 6)
    body: list[str] = []
    y = float(TOP)
    group = ""
    for bar in bars:
        if bar.group != group:
            group = bar.group
            body.append(_text(16, y + 17, group.upper(), "group"))
            y += GROUP
        middle = y + height_of_row / 2
        body.append(_text(LEFT - 12, middle + 4.5, bar.title, anchor="end"))
        first = middle - (len(peers) * (thickness + GAP) - GAP) / 2
        for number, (peer, ratio) in enumerate(zip(peers, bar.ratios, strict=True)):
            top = first + number * (thickness + GAP)
            if ratio is None:
                continue
            kind = ("less" if ratio <= 1 else "more") + (" second" if number else "")
            label = f"{bar.title}: {ratio:.2f} of {peer}"
            end = _x(ratio)
            body.append(
                f'<rect x="{LEFT}" y="{top:.1f}" width="{max(1.0, end - LEFT):.1f}" height="{thickness}" rx="2"'
                f' class="{kind}"><title>{escape(label)}</title></rect>'
            )
            mark = "" if ratio <= LONGEST else " \u203a"
            body.append(_text(end + 6, top + thickness - 1.5, f"{ratio:.2f}{mark}", "value"))
        y += height_of_row
    bottom = y + 8
    height = bottom + BOTTOM
    grid = []
    for step in (0.0, 0.5, 1.0, 1.5, 2.0):
        x = _x(step)
        kind = "even" if step == 1 else "grid"
        grid.append(f'<line x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{bottom:.1f}" class="{kind}"/>')
        grid.append(_text(x, bottom + 18, f"{step:g}", "muted", "middle"))
    legend = "ours as a share of theirs; shorter is better"
    if len(peers) > 1:
        legend += f"; from the top: {', '.join(peers)}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}"'
            f' viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title, {chr(34): "&quot;"})}">',
            f"<style>\n{STYLE}</style>",
            f'<rect width="{WIDTH}" height="{height:.0f}" rx="6" class="ground"/>',
            _text(16, 30, title, "title"),
            _text(16, 50, subtitle, "muted"),
            _text(16, 68, legend, "muted"),
            *grid,
            *body,
            "</svg>",
            "",
        ]
    )
