"""AuthorizationPolicy and PeerAuthentication. What a layer 4 proxy cannot enforce is refused, not left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from miniistiod.resources import metadata as common
from miniistiod.resources.gateway import target
from miniistiod.resources.model import (
    Action,
    AuthorizationPolicy,
    Match,
    Metadata,
    MtlsMode,
    PeerAuthentication,
    Rule,
    Target,
    ValueMatch,
)
from miniistiod.resources.reader import names_like
from miniistiod.resources.tree import Mapping, Sequence

if TYPE_CHECKING:
    from collections.abc import Callable

    from miniistiod.resources.reader import Reader

__all__ = ["authorization_policy", "peer_authentication"]

T = TypeVar("T")

_L7_SOURCE = ("remoteIpBlocks", "notRemoteIpBlocks", "requestPrincipals", "notRequestPrincipals")
_L7_OPERATION = ("hosts", "notHosts", "methods", "notMethods", "paths", "notPaths")
_L7_KEYS = ("request.", "remote.ip", "connection.sni", "experimental.", "source.labels", "source.user")
_L7_FIX = (
    "ztunnel sees connections, not requests: bind the policy to a waypoint with targetRefs, or say it by ports,"
    " principals, namespaces or addresses"
)
_CONDITIONS = ("destination.ip", "destination.port", "source.ip", "source.namespace", "source.principal")
_PORT_FIX = 'not a port; write a number from 1 to 65535 in quotes, as "8080"'
DRY_RUN = "istio.io/dry-run"


def authorization_policy(reader: Reader, meta: Metadata) -> AuthorizationPolicy | None:
    """Who may connect to what."""
    reader.ignore("status")
    spec = reader.required_mapping("spec", "add spec; 'spec: {}' allows nobody in the namespace")
    if spec is None:
        return None
    dry_run = meta.annotations.get(DRY_RUN, "false").lower() in ("true", "t", "1")
    if dry_run:
        reader.error(
            meta.line,
            f"the annotation {DRY_RUN} asks for a dry run, which older ztunnels would enforce",
            "remove the annotation, or the policy",
        )
    targets = _targets(spec, meta)
    bound = bool(targets)
    action = _action(spec, bound)
    selector = common.selector(spec, "selector", "matchLabels")
    if bound and selector is not None:
        spec.error(spec.line, "spec has both targetRefs and a selector", "keep one of them")
    line = spec.line
    if bound:
        spec.take("provider")
    else:
        spec.refuse("provider", "names an external authorizer, which a layer 4 proxy does not ask", "remove it")
    rules = tuple(_rule(item, meta.namespace, bound) for item in spec.readers("rules") or ())
    spec.finish()
    if action is Action.DENY and not rules:
        spec.error(line, "a DENY policy without rules denies nothing", "add rules; 'rules: [{}]' denies everyone")
    return AuthorizationPolicy(
        meta=meta, selector=selector, action=action, rules=rules, targets=targets, dry_run=dry_run
    )


def _targets(spec: Reader, meta: Metadata) -> tuple[Target, ...]:
    single = spec.mapping("targetRef")
    readers = ([single] if single is not None else []) + (spec.readers("targetRefs") or [])
    found = (target(item, meta.namespace) for item in readers)
    return tuple(item for item in found if item is not None)


def _action(spec: Reader, bound: bool) -> Action:
    line = spec.line
    action = Action(spec.choice("action", [item.value for item in Action]) or "ALLOW")
    if not action.layer_4 and not bound:
        spec.error(
            line,
            f"spec.action {action.value} cannot be enforced by a layer 4 proxy",
            "use ALLOW or DENY, or bind the policy to a waypoint with targetRefs",
        )
    return action


def _rule(reader: Reader, namespace: str, bound: bool) -> Rule:
    """Clauses in the order to, from, when. Source: istio-proxy's conversion for ztunnel."""
    clauses: list[tuple[Match, ...]] = []
    sources = _alternatives(reader, "from", "source", lambda inner: _source(inner, namespace, bound))
    operations = _alternatives(reader, "to", "operation", lambda inner: _operation(inner, bound))
    clauses.extend(clause for clause in (operations, sources) if clause)
    conditions = reader.readers("when")
    if conditions is not None and not conditions:
        reader.error(reader.line, f"{reader.field('when')} is empty", "remove it or add a condition")
    clauses.extend((_condition(item, bound),) for item in conditions or ())
    reader.finish()
    return Rule(clauses=tuple(clauses))


def _alternatives(reader: Reader, name: str, inner: str, read: Callable[[Reader], Match]) -> tuple[Match, ...]:
    items = reader.readers(name)
    if items is None:
        return ()
    if not items:
        reader.error(reader.line, f"{reader.field(name)} is empty", f"remove it or add a {inner}")
    found: list[Match] = []
    for item in items:
        body = item.mapping(inner)
        item.finish()
        if body is None:
            item.require(inner, f"write '- {inner}: ...'")
            continue
        errors = body.findings.errors
        match = read(body)
        body.finish()
        if match == Match() and body.findings.errors == errors:
            body.error(body.line, f"{body.path} says nothing", f"remove it, or remove {name} to mean anything")
        found.append(match)
    return tuple(found)


def _requests(reader: Reader, names: tuple[str, ...], bound: bool) -> tuple[str, ...]:
    """Fields about requests that are there. They are errors where no waypoint is to look at them."""
    found: list[str] = []
    for name in names:
        value = reader.take(name)
        if value is None or (isinstance(value, Sequence) and not value.items):
            continue
        found.append(name)
        if not bound:
            reader.error(value.line, f"{reader.field(name)} is about requests", _L7_FIX)
    return tuple(found)


def _source(reader: Reader, namespace: str, bound: bool) -> Match:
    return Match(
        requests=_requests(reader, _L7_SOURCE, bound),
        principals=ValueMatch(
            values=_patterns(reader, "principals", _check_principal),
            not_values=_patterns(reader, "notPrincipals", _check_principal),
        ),
        namespaces=ValueMatch(
            values=_patterns(reader, "namespaces", _check_pattern),
            not_values=_patterns(reader, "notNamespaces", _check_pattern),
        ),
        service_accounts=_values(reader, "serviceAccounts", lambda text: _service_account(text, namespace)),
        not_service_accounts=_values(reader, "notServiceAccounts", lambda text: _service_account(text, namespace)),
        source_ips=_values(reader, "ipBlocks", common.ip_interface),
        not_source_ips=_values(reader, "notIpBlocks", common.ip_interface),
    )


def _operation(reader: Reader, bound: bool) -> Match:
    requests = _requests(reader, _L7_OPERATION, bound)
    return Match(ports=_ports(reader, "ports"), not_ports=_ports(reader, "notPorts"), requests=requests)


def _condition(reader: Reader, bound: bool) -> Match:
    line = reader.line
    key = reader.text("key")
    match = Match()
    if key is None:
        reader.require("key", f"write one of {names_like(_CONDITIONS)}")
        reader.ignore("values", "notValues")
    elif key not in _CONDITIONS:
        if not bound or not key.startswith(_L7_KEYS):
            known = "is about requests" if key.startswith(_L7_KEYS) else "is not known"
            reader.error(line, f"{reader.field('key')} {key!r} {known}", f"write one of {names_like(_CONDITIONS)}")
        reader.ignore("values", "notValues")
        match = Match(requests=(key,))
    else:
        errors = reader.findings.errors
        match = _CONDITION_READERS[key](reader)
        if match == Match() and reader.findings.errors == errors:
            reader.error(line, f"{reader.path} has neither values nor notValues", "add some")
    reader.finish()
    return match


def _strings(reader: Reader, check: Callable[[str], None]) -> ValueMatch:
    return ValueMatch(values=_patterns(reader, "values", check), not_values=_patterns(reader, "notValues", check))


_CONDITION_READERS: dict[str, Callable[[Reader], Match]] = {
    "source.principal": lambda reader: Match(principals=_strings(reader, _check_principal)),
    "source.namespace": lambda reader: Match(namespaces=_strings(reader, _check_pattern)),
    "source.ip": lambda reader: Match(
        source_ips=_values(reader, "values", common.ip_interface),
        not_source_ips=_values(reader, "notValues", common.ip_interface),
    ),
    "destination.ip": lambda reader: Match(
        destination_ips=_values(reader, "values", common.ip_interface),
        not_destination_ips=_values(reader, "notValues", common.ip_interface),
    ),
    "destination.port": lambda reader: Match(ports=_ports(reader, "values"), not_ports=_ports(reader, "notValues")),
}


def _values(
    reader: Reader, name: str, parse: Callable[[str], T], check: Callable[[T], None] | None = None
) -> tuple[T, ...]:
    """A list of values; an empty list is an error, because it reads as 'nobody' and means 'anybody'."""
    line, errors = reader.line, reader.findings.errors
    values = reader.texts(name, parse, check)
    if values is None:
        return ()
    if not values and reader.findings.errors == errors:
        reader.error(line, f"{reader.field(name)} is an empty list, which restricts nothing", "remove it or fill it")
    return values


def _patterns(reader: Reader, name: str, check: Callable[[str], None]) -> tuple[str, ...]:
    """Texts with wildcards. A wrong one is an error and stays: Istio would take it for something."""
    return _values(reader, name, str, check)


def _check_pattern(text: str) -> None:
    if not text:
        raise ValueError("empty; write a name, or * for any")
    if "*" in text[1:-1] or (text != "*" and text.startswith("*") and text.endswith("*")):
        raise ValueError("has more than one wildcard; put one * at the beginning or at the end")


def _check_principal(text: str) -> None:
    if text.startswith("spiffe://"):
        raise ValueError(f"has the scheme, so it would never match; write {text.removeprefix('spiffe://')}")
    _check_pattern(text)
    if "*" not in text and "/ns/" not in text:
        raise ValueError("not a principal; write trust-domain/ns/namespace/sa/account")


def _service_account(text: str, namespace: str) -> tuple[str, str]:
    own, slash, account = text.rpartition("/")
    own = own if slash else namespace
    if not common.is_namespace(own) or not common.is_object_name(account):
        raise ValueError("not a service account; write account or namespace/account, without wildcards")
    return own, account


def _ports(reader: Reader, name: str) -> tuple[int, ...]:
    return _values(reader, name, _port, _check_port)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 6 and text == str(int(text)) and int(text) < 65_536):
        raise ValueError(_PORT_FIX)
    return int(text)


def _check_port(port: int) -> None:
    if port == 0:
        raise ValueError(_PORT_FIX)


def peer_authentication(reader: Reader, meta: Metadata) -> PeerAuthentication | None:
    """Whether workloads take plaintext."""
    reader.ignore("status")
    spec = reader.required_mapping("spec", "add spec with mtls.mode")
    if spec is None:
        return None
    selector = common.selector(spec, "selector", "matchLabels")
    mode = _mode(spec)
    ports: dict[int, MtlsMode] = {}
    line = spec.line
    listed = spec.take("portLevelMtls")
    if isinstance(listed, Mapping):
        for text, (port_line, value) in listed.items.items():
            inner = type(spec)(value, f"{spec.field('portLevelMtls')}[{text}]", spec.findings)
            chosen = inner.choice("mode", {item.value for item in MtlsMode})
            inner.finish()
            try:
                port = _port(text)
                _check_port(port)
                ports[port] = MtlsMode(chosen or "UNSET")
            except ValueError as error:
                spec.error(port_line, f"{spec.field('portLevelMtls')} has the key {text!r}", str(error))
    elif listed is not None:
        spec.error(listed.line, "spec.portLevelMtls is not a mapping", "write '8080: {mode: PERMISSIVE}'")
    spec.finish()
    if ports and selector is None:
        spec.error(line, "spec.portLevelMtls has an effect only with a selector", "add selector.matchLabels")
    return PeerAuthentication(meta=meta, selector=selector, mode=mode, ports=ports)


def _mode(spec: Reader) -> MtlsMode:
    mtls = spec.mapping("mtls")
    if mtls is None:
        return MtlsMode.UNSET
    text = mtls.choice("mode", {item.value for item in MtlsMode})
    mtls.finish()
    return MtlsMode(text or "UNSET")
