"""`miniistiod check | get | explain`: what is wrong with documents, what is known, and what becomes of a connection."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from hbone.commandline import CommandError, ExitCode
from hbone.errors import ConfigurationError
from miniistiod import admin_client, expiry, lint, watch
from miniistiod.catalog import ADDRESS, AUTHORIZATION
from miniistiod.commandline import PROGRAM, add_command, add_state, counted, say, show, table, when
from miniistiod.registry import Registry
from miniistiod.resources import Severity, load
from miniistiod.store import ADMIN_SOCKET, Store

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from miniistiod.resources import Finding

__all__ = ["add"]


def add(commands: Any) -> None:
    """Declare the commands of this module."""
    _add_check(commands)
    _add_get(commands)
    _add_explain(commands)


# -- check


def _add_check(commands: Any) -> None:
    command = add_command(
        commands,
        "check",
        "say what is wrong with documents before they are loaded: file, line, what, how to mend it",
        _check,
        "miniistiod check mesh/",
        "miniistiod check mesh/shop.yaml mesh/meshconfig.yaml --strict",
    )
    command.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a directory, or YAML files")
    command.add_argument("--strict", action="store_true", help="exit 1 for warnings too")
    command.add_argument("--json", action="store_true", help="findings as JSON")


def _check(arguments: argparse.Namespace) -> int:
    files: dict[str, str] = {}
    for path in arguments.paths:
        if path.is_dir():
            files.update({str(path / name): text for name, text in watch.read(path).items()})
        else:
            files[str(path)] = _text(path)
    resources = load(files)
    findings: list[Finding] = list(resources.findings)
    if not resources.errors:
        findings += lint.findings(Registry.of(resources), resources.mesh.trust_domain)
    errors = sum(item.severity is Severity.ERROR for item in findings)
    if arguments.json:
        show(json.dumps([item.to_json() for item in findings], indent=1))
    else:
        for item in findings:
            show(str(item))
        counts = ((len(resources.resources), "document"), (errors, "error"), (len(findings) - errors, "warning"))
        say(", ".join(counted(number, what) for number, what in counts))
    return ExitCode.NO if errors or (arguments.strict and findings) else ExitCode.DONE


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{str(path)!r} cannot be read: {(error.strerror or '').lower()}; check the path") from None
    except UnicodeDecodeError as error:
        raise CommandError(f"{str(path)!r} is not UTF-8 at byte {error.start}; save it as UTF-8") from None


# -- get


def _add_get(commands: Any) -> None:
    command = add_command(
        commands,
        "get",
        "show what a running control plane knows and has issued",
        _get,
        "miniistiod get workloads --state state/",
        "miniistiod get certificates --state state/ --json",
        "miniistiod get policies --state state/ --workload shop/orders-1",
    )
    command.add_argument("what", choices=tuple(_COLUMNS))
    add_state(command)
    command.add_argument(
        "--workload", metavar="NS/NAME", help="with policies: those of one workload, in the order in which they decide"
    )
    command.add_argument("--json", action="store_true")


def _get(arguments: argparse.Namespace) -> int:
    socket = arguments.state / ADMIN_SOCKET
    if arguments.workload is not None:
        if arguments.what != "policies":
            raise CommandError(f"--workload goes with policies, not with {arguments.what}; leave it out")
        return _get_effective(socket, arguments)
    items = admin_client.fetch(socket, f"/{arguments.what}")
    if arguments.json:
        show(json.dumps(items, indent=1))
        return ExitCode.DONE
    if isinstance(items, dict):  # conditions, by the document that they are of
        items = [{"document": title, **item} for title, found in items.items() for item in found]
    header, row = _COLUMNS[arguments.what]
    table(header, [row(item) for item in items])
    status = admin_client.fetch(socket, "/ready")
    for problem in status["problems"]:
        say(f"{PROGRAM}: not in force: {problem}")
    _warn(arguments.state)
    return ExitCode.DONE


def _get_effective(socket: Path, arguments: argparse.Namespace) -> int:
    found = _answer(socket, "/effective?" + urlencode({"workload": arguments.workload}))
    if arguments.json:
        show(json.dumps(found, indent=1))
        return ExitCode.DONE
    rows = [(item["name"], item["action"], item["because"], _cut(item["says"])) for item in found["policies"]]
    table(("POLICY", "ACTION", "BECAUSE IT", "SAYS"), rows)
    say(f"what none of them decides is {found['otherwise']}")
    for name in found["missing"]:
        say(f"{PROGRAM}: {name} is named by the workload and does not exist")
    return ExitCode.DONE


def _answer(socket: Path, page: str) -> Any:
    """The JSON of a page that may say that there is no answer."""
    found = admin_client.fetch(socket, page)
    if "error" in found:
        raise CommandError(str(found["error"]))
    return found


def _warn(state: Path) -> None:
    with contextlib.suppress(ConfigurationError), Store.open(state) as store:
        for text in expiry.warnings(store, time.time()):
            say(f"{PROGRAM}: {text}")


def _workload(item: dict[str, Any]) -> tuple[str, ...]:
    body = item["workload"]
    at = ",".join(alias.partition("/")[2] for alias in item["at"]) or body.get("hostname", "-")
    return (
        f"{body['namespace']}/{body['name']}",
        at,
        body.get("serviceAccount", "default"),
        body.get("tunnelProtocol", "plaintext"),
        ",".join(sorted(body.get("services", {}))) or "-",
        ",".join(body.get("authorizationPolicies", ())) or "-",
    )


def _service(item: dict[str, Any]) -> tuple[str, ...]:
    body = item["service"]
    ports = ",".join(f"{port['servicePort']}->{port.get('targetPort', '?')}" for port in body.get("ports", ()))
    return item["name"], ",".join(alias.partition("/")[2] for alias in item["at"]) or "-", ports or "-"


def _policy(item: dict[str, Any]) -> tuple[str, ...]:
    body = item["policy"]
    return (
        item["name"],
        body.get("action", "ALLOW"),
        body.get("scope", "GLOBAL"),
        str(item["workloads"]),
        _cut(item["says"]),
    )


def _cut(text: str) -> str:
    """As much as fits in a table; --json has all."""
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}..."


def _certificate(item: dict[str, Any]) -> tuple[str, ...]:
    return (
        item["serial"],
        item["spiffe_id"],
        when(item["issued"]),
        when(item["expires"]),
        "revoked" if item["revoked"] else "valid",
        item["caller"],
    )


def _registration(item: dict[str, Any]) -> tuple[str, ...]:
    since = item["connected"] if item["state"] == "connected" else item["disconnected"] or item["connected"]
    name = f"{item['namespace']}/{item['name']}"
    return name, item["group"], item["address"], item["service_account"], item["state"], when(since)


def _subscriber(item: dict[str, Any]) -> tuple[str, ...]:
    rejected = [kind["rejected"] for kind in item["types"].values() if kind["rejected"]]
    has = [
        f"{kind['has']} {_TYPES.get(url, url)}{'' if kind['acknowledged'] else ' (sent)'}"
        for url, kind in sorted(item["types"].items())
    ]
    return (
        *(item["node"], item["identity"], item["remote"], when(item["since"])),
        ", ".join(has) or "-",
        _cut(rejected[0]) if rejected else "-",
    )


def _condition(item: dict[str, Any]) -> tuple[str, ...]:
    kind = item["type"].rpartition("/")[2]
    return item["document"], kind, "yes" if item["ok"] else "no", item["reason"], _cut(item["text"])


_TYPES = {AUTHORIZATION: "policies", ADDRESS: "addresses"}
MAX_TEXT = 200
"""Characters of a text in a table."""


_COLUMNS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], tuple[str, ...]]]] = {
    "workloads": (("WORKLOAD", "ADDRESS", "ACCOUNT", "TUNNEL", "SERVICES", "POLICIES"), _workload),
    "services": (("SERVICE", "ADDRESS", "PORTS"), _service),
    "policies": (("POLICY", "ACTION", "SCOPE", "WORKLOADS", "SAYS"), _policy),
    "conditions": (("DOCUMENT", "CONDITION", "HOLDS", "REASON", "TEXT"), _condition),
    "certificates": (("SERIAL", "IDENTITY", "ISSUED", "EXPIRES", "STATE", "CALLER"), _certificate),
    "registrations": (("MACHINE", "GROUP", "ADDRESS", "ACCOUNT", "STATE", "SINCE"), _registration),
    "subscribers": (("NODE", "IDENTITY", "FROM", "SINCE", "ACKNOWLEDGED", "REJECTED"), _subscriber),
}


# -- explain


def _add_explain(commands: Any) -> None:
    command = add_command(
        commands,
        "explain",
        "say what the mesh will do with a connection, step by step; exit 1 when it would be refused",
        _explain,
        "miniistiod explain --state state/ shop/web-1 orders.mesh:80",
        "miniistiod explain --state state/ shop/sa/web 10.1.0.1:8080",
    )
    command.add_argument("source", metavar="SRC", help="NAMESPACE/WORKLOAD, NAMESPACE/sa/ACCOUNT or a SPIFFE ID")
    command.add_argument("destination", metavar="DST:PORT", help="an address, or the name of a service")
    add_state(command)
    command.add_argument("--json", action="store_true")


def _explain(arguments: argparse.Namespace) -> int:
    query = urlencode({"from": arguments.source, "to": arguments.destination})
    found = _answer(arguments.state / ADMIN_SOCKET, f"/explain?{query}")
    if arguments.json:
        show(json.dumps(found, indent=1))
    else:
        for step in found["steps"]:
            show(f"{step['topic']:12} {step['text']}")
        show("allowed" if found["allowed"] else "refused")
    return ExitCode.DONE if found["allowed"] else ExitCode.NO
