"""One page that shows the mesh to people: what is in it, who may talk to whom, what each proxy has.

No script, nothing from elsewhere, every value escaped.
"""

from __future__ import annotations

import html
import itertools
from typing import TYPE_CHECKING, Any

from miniistiod.explain import reachability

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ztunnel.mesh.store import Store

__all__ = ["HEADERS", "render"]

HEADERS = (
    (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)
MAX_ROWS = 500
"""Of each table; the JSON pages have all."""
_WORKLOADS = ("workload", "addresses", "identity", "reached by", "state", "services")
_SERVICES = ("service", "addresses", "ports", "endpoints", "waypoint")
_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin-top: 2em }
table { border-collapse: collapse } th, td { border: 1px solid #ccc; padding: .2em .6em; text-align: left }
th { background: #f2f2f2 } .yes { background: #d9f2d9 } .no { background: #f6d5d5 } .some { background: #fbeecb }
.bad { color: #a00 } .ok { color: #060 } .scroll { overflow-x: auto } small { color: #666 }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #181818 } th { background: #2a2a2a } th, td { border-color: #444 }
  .yes { background: #1d4023 } .no { background: #4d2020 } .some { background: #4a3d15 }
  .bad { color: #f88 } .ok { color: #8d8 } small { color: #999 }
}
"""


def render(store: Store, status: dict[str, Any], subscribers: Sequence[dict[str, Any]]) -> str:
    """The page.

    Args:
        store: the mesh as a ztunnel sees it.
        status: as `/ready` has it, with the texts of warnings.
        subscribers: as `/subscribers` has them.
    """
    state = status["status"]
    parts = [
        f'<p>Documents: <b class="{"ok" if state == "ok" else "bad"}">{_text(state)}</b></p>',
        _list("Not in force", status["problems"]),
        _list("Warnings", status["warnings"]),
        _section(
            "Workloads", ("workload", "addresses", "identity", "reached by", "state", "services"), _workloads(store)
        ),
        _section("Services", ("service", "addresses", "ports", "endpoints", "waypoint"), _services(store)),
        _matrix(reachability(store)),
        _section("Policies", ("policy", "action", "scope", "rules"), _policies(store)),
        _section("Proxies", ("node", "identity", "from", "policies", "addresses"), map(_proxy, subscribers)),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>miniistiod</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body><h1>miniistiod</h1>\n{body}\n</body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _list(title: str, items: Sequence[str]) -> str:
    if not items:
        return ""
    shown = "".join(f"<li>{_text(item)}</li>" for item in items[:MAX_ROWS])
    more = f"<p><small>and {len(items) - MAX_ROWS} more</small></p>" if len(items) > MAX_ROWS else ""
    return f"<h2>{_text(title)}</h2><ul>{shown}</ul>{more}"


def _section(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; it ends where people stop to read."""
    remaining = iter(rows)
    lines = ["".join(f"<td>{_text(cell)}</td>" for cell in row) for row in itertools.islice(remaining, MAX_ROWS)]
    more = sum(1 for _ in remaining)
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    note = f"<p><small>and {more} more</small></p>" if more else ""
    name = title.lower()
    return (
        f'<h2>{_text(title)}</h2><div class="scroll"><table id="{name}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{note}"
    )


def _workloads(store: Store) -> Iterable[Sequence[str]]:
    for uid in sorted(store.workloads):
        item = store.workloads[uid]
        yield (
            f"{item.namespace}/{item.name}",
            ", ".join(map(str, item.addresses)) or item.hostname or "-",
            str(item.identity),
            item.protocol.value,
            "healthy" if item.healthy else "unhealthy",
            ", ".join(sorted(item.services)) or "-",
        )


def _services(store: Store) -> Iterable[Sequence[str]]:
    for key in sorted(store.services):
        item = store.services[key]
        yield (
            key,
            ", ".join(str(vip.ip) for vip in item.vips) or "-",
            ", ".join(f"{port}" for port in sorted(item.ports)),
            f"{len(store.endpoints(item))} of {len(store.members(item))}",
            str(item.waypoint) if item.waypoint is not None else "-",
        )


def _policies(store: Store) -> Iterable[Sequence[str]]:
    for key in sorted(store.policies):
        item = store.policies[key]
        yield key, item.action.name, item.scope.name, str(len(item.rules))


def _matrix(found: dict[str, Any]) -> str:
    if not found["rows"] or not found["targets"]:
        return ""
    head = "".join(f"<th>{_text(target)}</th>" for target in found["targets"])
    lines = [
        f"<tr><th>{_text(row['identity'])}</th>"
        + "".join(f'<td class="{_text(cell)}">{_text(cell)}</td>' for cell in row["cells"])
        + "</tr>"
        for row in found["rows"]
    ]
    note = "<p><small>Not all of the mesh: ask 'miniistiod explain' for the rest.</small></p>" if found["cut"] else ""
    return (
        "<h2>Who may talk to whom</h2><p><small>By the policies of a service's endpoints, over a tunnel.</small></p>"
        f'<div class="scroll"><table id="reachability"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>{note}"
    )


def _proxy(item: dict[str, Any]) -> Sequence[str]:
    kinds = {url.rpartition(".")[2]: kind for url, kind in item["types"].items()}
    return (
        item["node"],
        item["identity"],
        item["remote"],
        _state(kinds.get("Authorization")),
        _state(kinds.get("Address")),
    )


def _state(kind: dict[str, Any] | None) -> str:
    """What a proxy said to the last that it was sent."""
    if kind is None:
        return "not asked for"
    if kind["rejected"]:
        return f"rejected: {kind['rejected']}"
    return f"acknowledged {kind['number']}" if kind["acknowledged"] else "sent, not acknowledged yet"
