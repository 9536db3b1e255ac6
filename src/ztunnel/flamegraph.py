"""Stacks drawn as an SVG: outermost functions on top, width is CPU time. One file, without anything from elsewhere."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ztunnel.profiler import Stacks

__all__ = ["flame_graph"]

WIDTH: Final = 1200
MARGIN: Final = 10
TOP: Final = 64
ROW: Final = 18
LETTER: Final = 6.6
"""Width of a letter, in pixels."""
THINNEST: Final = 0.3
"""Pixels below which a function is not drawn."""

COLOURS: Final = (
    (("ztunnel",), "ztunnel", "#f2a65a"),
    (("hbone",), "hbone", "#f6cf71"),
    (("trio", "outcome", "sniffio"), "trio", "#9cc7e8"),
    (("ssl", "OpenSSL", "cryptography", "_cffi_backend"), "TLS", "#b5d99c"),
    ((), "other", "#d9d4cc"),
)
"""Packages by colour, with the name of the colour."""

_STYLE: Final = """
text { font: 11px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #22201c; }
.head { font: bold 15px system-ui, "DejaVu Sans", sans-serif; }
.note, .legend { font: 12px system-ui, "DejaVu Sans", sans-serif; fill: #5d574d; }
g.f { cursor: pointer; }
g.f rect { stroke: #fffdf8; stroke-width: 1; }
g.f:hover rect { stroke: #22201c; }
g.f text { pointer-events: none; }
g.f.behind { opacity: .45; }
"""

_SCRIPT: Final = """
const frames = [...document.querySelectorAll("g.f")], left = %(margin)d, width = %(inner)d, letter = %(letter)s;
function zoom(from, span, depth) {
  for (const frame of frames) {
    const [x, w, d] = frame.dataset.at.split(" ").map(Number);
    const outer = d < depth && x <= from + 1e-6 && x + w >= from + span - 1e-6;
    const start = Math.max(0, (x - from) / span), end = Math.min(1, (x + w - from) / span);
    frame.style.display = end - start > 2e-4 ? "" : "none";
    frame.classList.toggle("behind", outer);
    const rect = frame.children[1], text = frame.children[2], room = (end - start) * width;
    rect.setAttribute("x", left + start * width);
    rect.setAttribute("width", room);
    text.setAttribute("x", left + start * width + 4);
    const fits = Math.floor((room - 8) / letter);
    let name = frame.dataset.name;
    while (name.length > fits && name.includes(".")) name = name.slice(name.indexOf(".") + 1);
    text.textContent = fits < 3 ? "" : name.length <= fits ? name : name.slice(0, fits - 1) + "\\u2026";
  }
}
for (const frame of frames) frame.addEventListener("click", () => zoom(...frame.dataset.at.split(" ").map(Number)));
"""


@attrs.define(eq=False)
class _Node:
    """A function below those that called it."""

    name: str
    spent: int = 0
    below: dict[str, _Node] = attrs.field(factory=dict)


def flame_graph(stacks: Stacks, title: str, note: str) -> bytes:
    """Draw them.

    Args:
        stacks: Microseconds by stack.
        title: The heading.
        note: What is said below it.
    """
    root = _tree(stacks)
    frames: list[str] = []
    depth = _draw(root, frames) if root.spent else 0
    height = TOP + max(1, depth) * ROW + MARGIN
    inner = WIDTH - 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<rect width="{WIDTH}" height="{height}" fill="#fffdf8"/>',
        f'<text class="head" x="{MARGIN}" y="24">{escape(title)}</text>',
        f'<text class="note" x="{MARGIN}" y="44">{escape(note)}</text>',
        *_legend(),
        *(frames or [f'<text class="note" x="{MARGIN}" y="{TOP + 13}">No CPU time was used.</text>']),
        f"<script><![CDATA[{_SCRIPT % {'margin': MARGIN, 'inner': inner, 'letter': LETTER}}]]></script>",
        "</svg>\n",
    ]
    return "\n".join(parts).encode()


def _tree(stacks: Stacks) -> _Node:
    root = _Node("all")
    for stack, spent in stacks.items():
        node = root
        node.spent += spent
        for name in stack:
            node = node.below.setdefault(name, _Node(name))
            node.spent += spent
    return root


def _draw(root: _Node, frames: list[str]) -> int:
    """Add the rectangles of what is wide enough; how many rows there are."""
    inner = WIDTH - 2 * MARGIN
    deepest = 0
    waiting: list[tuple[_Node, int, int]] = [(root, 0, 0)]  # a node, the microseconds left of it, its depth
    while waiting:
        node, before, depth = waiting.pop()
        width = node.spent / root.spent * inner
        if width < THINNEST:
            continue
        deepest = max(deepest, depth)
        left = before / root.spent
        frames.append(_frame(node, left, node.spent / root.spent, depth))
        for child in sorted(node.below.values(), key=lambda found: found.name):
            waiting.append((child, before, depth + 1))
            before += child.spent
    return deepest + 1


def _frame(node: _Node, left: float, share: float, depth: int) -> str:
    inner = WIDTH - 2 * MARGIN
    x, width, y = MARGIN + left * inner, share * inner, TOP + depth * ROW
    shown = _shortened(node.name, int((width - 8) / LETTER))
    name = escape(node.name)
    return (
        f'<g class="f" data-at="{left:.6f} {share:.6f} {depth}" data-name="{name}">'
        f"<title>{name}\n{_time(node.spent)}, {share:.1%}</title>"
        f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW}" rx="2" fill="{_colour(node.name)}"/>'
        f'<text x="{x + 4:.1f}" y="{y + 13}">{escape(shown)}</text></g>'
    )


def _shortened(name: str, fits: int) -> str:
    """As much of a name as fits; packages go first."""
    while len(name) > fits and "." in name:
        name = name.partition(".")[2]
    return "" if fits < 3 else name if len(name) <= fits else name[: fits - 1] + "…"


def _colour(name: str) -> str:
    package = name.partition(".")[0]
    return next(colour for packages, _, colour in COLOURS if package in packages or not packages)


def _legend() -> Iterator[str]:
    x = WIDTH - MARGIN
    for _, name, colour in reversed(COLOURS):
        x -= 7 * len(name) + 26
        yield f'<rect x="{x}" y="14" width="12" height="12" rx="2" fill="{colour}"/>'
        yield f'<text class="legend" x="{x + 16}" y="24">{name}</text>'


def _time(microseconds: int) -> str:
    return f"{microseconds / 1e6:.2f} s" if microseconds >= 1_000_000 else f"{microseconds / 1000:.1f} ms"
