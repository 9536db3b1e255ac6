"""One page that shows the mesh to people: what is in it, who may talk to whom, what each proxy has.

No script, nothing from elsewhere, every value escaped.
"""

from __future__ import annotations

import collections
import functools
import html
import itertools
from typing import TYPE_CHECKING, Any

from miniistiod.explain import MAX_ENDPOINTS, reachability
from miniistiod.wording import says
from ztunnel.mesh.policy import Action, PolicyScope
from ztunnel.mesh.workload import Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

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
MAX_TEXT = 400
"""Characters of what a policy says; the JSON page has all."""
_STYLE = """
:root { color-scheme: light dark; --line: #d5d8dc; --head: #f3f4f6; --dim: #667; --yes: #dcf3de; --no: #f9dcdc;
  --some: #fdf0cd; --bad: #a40000; --ok: #05660f }
@media (prefers-color-scheme: dark) { :root { --line: #444; --head: #2a2a2a; --dim: #9aa; --yes: #1d4023; --no: #552020;
  --some: #4a3d15; --bad: #f99; --ok: #8d8 } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 90rem; padding: 0 1.5rem }
h1 { font-size: 1.4rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem } p, ul { margin: .3rem 0 }
table { border-collapse: collapse } th, td { border: 1px solid var(--line); padding: .2rem .6rem; text-align: left;
  vertical-align: top } th { background: var(--head); font-weight: 600 }
td { overflow-wrap: break-word; max-width: 40rem }
#reachability td, #reachability thead th { text-align: center } #reachability tbody th { white-space: nowrap }
.yes { background: var(--yes) } .no { background: var(--no) } .some, .plain { background: var(--some) }
.bad { color: var(--bad) } .ok { color: var(--ok) } .scroll { overflow-x: auto } small { color: var(--dim) }
"""


class _Cell(str):
    """A text in a colour."""

    css: str

    def __new__(cls, text: str, css: str) -> _Cell:
        made = super().__new__(cls, text)
        made.css = css
        return made


def render(
    store: Store, status: dict[str, Any], subscribers: Sequence[dict[str, Any]], *, trust_domain: str, number: int
) -> str:
    """The page.

    Args:
        store: the mesh as a ztunnel sees it.
        status: as `/ready` has it, with the texts of warnings.
        subscribers: as `/subscribers` has them.
        trust_domain: the mesh's; it is left out of identities.
        number: of the newest change that proxies may have been told.
    """
    state = status["status"]
    counts = (
        (len(store.workloads), "workloads"),
        (len(store.services), "services"),
        (len(store.policies), "policies"),
        (len(subscribers), "proxies connected"),
    )
    short = functools.partial(_short, trust_domain=trust_domain)
    parts = [
        f"<p>Trust domain {_text(trust_domain)}: {', '.join(f'{count} {what}' for count, what in counts)}."
        f' Documents: <b class="{"ok" if state == "ok" else "bad"}">{_text(state)}</b></p>',
        _list("Not in force", status["problems"]),
        _list("Warnings", status["warnings"]),
        _section(
            "Workloads",
            ("workload", "addresses", "identity", "reached by", "state", "services"),
            _workloads(store, short),
        ),
        _section("Services", ("service", "addresses", "ports", "healthy endpoints", "waypoint"), _services(store)),
        _matrix(reachability(store), short),
        _section("Policies", ("policy", "action", "holds for", "says"), _policies(store)),
        _section(
            "Proxies",
            ("proxy", "identity", "from", "policies", "addresses"),
            (_proxy(item, short, number) for item in subscribers),
        ),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>miniistiod</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body><h1>miniistiod</h1>\n{body}\n</body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _short(identity: object, trust_domain: str) -> str:
    """An identity as `explain` takes it; whole where it is of another trust domain."""
    text = str(identity)
    found = text.removeprefix(f"spiffe://{trust_domain}/ns/")
    return text if found == text else found


def _list(title: str, items: Sequence[str]) -> str:
    if not items:
        return ""
    shown = "".join(f"<li>{_text(item)}</li>" for item in items[:MAX_ROWS])
    more = f"<p><small>and {len(items) - MAX_ROWS} more</small></p>" if len(items) > MAX_ROWS else ""
    return f"<h2>{_text(title)}</h2><ul>{shown}</ul>{more}"


def _td(cell: str) -> str:
    css = f' class="{cell.css}"' if isinstance(cell, _Cell) else ""
    return f"<td{css}>{_text(cell)}</td>"


def _section(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; it ends where people stop to read."""
    remaining = iter(rows)
    lines = ["".join(map(_td, row)) for row in itertools.islice(remaining, MAX_ROWS)]
    more = sum(1 for _ in remaining)
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{line}</tr>" for line in lines) or f'<tr><td colspan="{len(header)}">none</td></tr>'
    note = f"<p><small>and {more} more</small></p>" if more else ""
    name = title.lower()
    return (
        f'<h2>{_text(title)}</h2><div class="scroll"><table id="{name}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{note}"
    )


def _workloads(store: Store, short: Callable[[object], str]) -> Iterable[Sequence[str]]:
    for item in sorted(store.workloads.values(), key=lambda item: (item.namespace, item.name, item.uid)):
        yield (
            f"{item.namespace}/{item.name}",
            ", ".join(map(str, item.addresses)) or item.hostname or "-",
            short(item.identity),
            "HBONE" if item.protocol is Protocol.HBONE else _Cell("plaintext", "plain"),
            "healthy" if item.healthy else _Cell("unhealthy", "no"),
            ", ".join(sorted(item.services)) or "-",
        )


def _services(store: Store) -> Iterable[Sequence[str]]:
    for key in sorted(store.services):
        item = store.services[key]
        good, known = len(store.endpoints(item)), len(store.members(item))
        yield (
            key,
            ", ".join([*(str(vip.ip) for vip in item.vips), *(str(network) for _, network in item.cidrs)]) or "-",
            ", ".join(f"{port}" for port in sorted(item.ports)),
            _Cell(f"{good} of {known}", "yes" if good == known > 0 else "some" if good else "no"),
            str(item.waypoint) if item.waypoint is not None else "-",
        )


def _policies(store: Store) -> Iterable[Sequence[str]]:
    named: collections.Counter[str] = collections.Counter()
    for workload in store.workloads.values():
        named.update(workload.authorization_policies)
    for key in sorted(store.policies):
        item = store.policies[key]
        where = {
            PolicyScope.GLOBAL: "all workloads",
            PolicyScope.NAMESPACE: f"namespace {item.namespace}",
            PolicyScope.WORKLOAD_SELECTOR: f"{named[key]} workload{'' if named[key] == 1 else 's'}",
        }
        text = says(item)
        cut = f"{text[:MAX_TEXT]}..." if len(text) > MAX_TEXT else text
        yield key, _Cell(item.action.name, "yes" if item.action is Action.ALLOW else "no"), where[item.scope], cut


def _matrix(found: dict[str, Any], short: Callable[[object], str]) -> str:
    if not found["rows"] or not found["targets"]:
        return ""
    places = [target.rpartition(":")[::2] for target in found["targets"]]
    services = ((key, len(list(group))) for key, group in itertools.groupby(places, key=lambda place: place[0]))
    head = "".join(f'<th colspan="{count}">{_text(key)}</th>' for key, count in services)
    ports = "".join(f"<th>{_text(port)}</th>" for _, port in places)
    lines = [
        f"<tr><th>{_text(short(row['identity']))}</th>{''.join(_td(_Cell(cell, cell)) for cell in row['cells'])}</tr>"
        for row in found["rows"]
    ]
    note = "<p><small>Not all of the mesh: ask 'miniistiod explain' for the rest.</small></p>" if found["cut"] else ""
    return (
        "<h2>Who may talk to whom</h2><p><small>Identities, and the ports of services, by the policies of the services'"
        f" endpoints, {MAX_ENDPOINTS} at most. some: of the endpoints; plain: reached in plaintext, and only a ztunnel"
        " there would ask; waypoint: decided there; -: no endpoint.</small></p>"
        f'<div class="scroll"><table id="reachability"><thead><tr><th rowspan="2">from</th>{head}</tr><tr>{ports}</tr>'
        f"</thead><tbody>{''.join(lines)}</tbody></table></div>{note}"
    )


def _proxy(item: dict[str, Any], short: Callable[[object], str], number: int) -> Sequence[str]:
    kinds = {url.rpartition(".")[2]: kind for url, kind in item["types"].items()}
    parts = item["node"].split("~")
    return (
        parts[2] if len(parts) == 4 else item["node"],
        short(item["identity"]),
        item["remote"],
        _state(kinds.get("Authorization"), number),
        _state(kinds.get("Address"), number),
    )


def _state(kind: dict[str, Any] | None, number: int) -> str:
    """What a proxy said to the last that it was sent."""
    if kind is None:
        return _Cell("not asked for", "some")
    if kind["rejected"]:
        return _Cell(f"rejected: {kind['rejected']}", "no")
    if not kind["acknowledged"]:
        return _Cell("sent, not acknowledged yet", "some")
    behind = number - kind["number"]
    return _Cell(f"acknowledged {kind['has']}", "yes") if behind <= 0 else _Cell(f"changes behind: {behind}", "some")
