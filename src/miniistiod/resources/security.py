"""AuthorizationPolicy and PeerAuthentication. What a layer 4 proxy cannot enforce is refused, not left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from miniistiod.resources import metadata as common
from miniistiod.resources.model import (
    Action,
    AuthorizationPolicy,
    Match,
    Metadata,
    MtlsMode,
    PeerAuthentication,
    Rule,
    ValueMatch,
)
from miniistiod.resources.reader import names_like
from miniistiod.resources.tree import Mapping

if TYPE_CHECKING:
    from collections.abc import Callable

    from miniistiod.resources.reader import Reader

__all__ = ["authorization_policy", "peer_authentication"]

T = TypeVar("T")

_L7_SOURCE = ("remoteIpBlocks", "notRemoteIpBlocks", "requestPrincipals", "notRequestPrincipals")
_L7_OPERATION = ("hosts", "notHosts", "methods", "notMethods", "paths", "notPaths")
_L7_KEYS = ("request.", "remote.ip", "connection.sni", "experimental.", "source.labels", "source.user")
_L7_FIX = "ztunnel sees connections, not requests: remove it, or say it by ports, principals, namespaces or addresses"
_CONDITIONS = ("destination.ip", "destination.port", "source.ip", "source.namespace", "source.principal")
DRY_RUN = "istio.io/dry-run"


def authorization_policy(reader: Reader, meta: Metadata) -> AuthorizationPolicy | None:
    """Who may connect to what."""
    reader.ignore("status")
    spec = reader.mapping("spec")
    if spec is None:
        reader.require("spec", "add spec; 'spec: {}' allows nobody in the namespace")
        return None
    if meta.annotations.get(DRY_RUN, "false").lower() not in ("false", "f", "0"):
        reader.error(meta.line, f"the annotation {DRY_RUN} asks for a dry run, which is not built yet", "remove it")
    for name in ("targetRef", "targetRefs"):
        spec.refuse(name, "binds the policy to a waypoint, which is not built yet", "use selector.matchLabels")
    spec.refuse("provider", "names an external authorizer, which a layer 4 proxy does not ask", "remove it")
    action = _action(spec)
    selector = common.selector(spec, "selector", "matchLabels")
    rules = tuple(_rule(item, meta.namespace) for item in spec.readers("rules") or ())
    spec.finish()
    if action is Action.DENY and not rules:
        spec.error(spec.line, "a DENY policy without rules denies nothing", "add rules; 'rules: [{}]' denies everyone")
    return AuthorizationPolicy(meta=meta, selector=selector, action=action, rules=rules)


def _action(spec: Reader) -> Action:
    line = spec.line
    text = spec.choice("action", {"ALLOW", "DENY", "AUDIT", "CUSTOM"}) or "ALLOW"
    if text in ("AUDIT", "CUSTOM"):
        spec.error(line, f"spec.action {text} cannot be enforced by a layer 4 proxy", "use ALLOW or DENY")
        return Action.DENY
    return Action(text)


def _rule(reader: Reader, namespace: str) -> Rule:
    """Clauses in the order to, from, when. Source: istio-proxy's conversion for ztunnel."""
    clauses: list[tuple[Match, ...]] = []
    sources = _alternatives(reader, "from", "source", lambda inner: _source(inner, namespace))
    operations = _alternatives(reader, "to", "operation", _operation)
    clauses.extend(clause for clause in (operations, sources) if clause)
    conditions = reader.readers("when")
    if conditions is not None and not conditions:
        reader.error(reader.line, f"{reader.field('when')} is empty", "remove it or add a condition")
    clauses.extend((_condition(item, namespace),) for item in conditions or ())
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


def _source(reader: Reader, namespace: str) -> Match:
    for name in _L7_SOURCE:
        reader.refuse(name, "is about requests", _L7_FIX)
    return Match(
        principals=ValueMatch(
            values=_values(reader, "principals", _principal), not_values=_values(reader, "notPrincipals", _principal)
        ),
        namespaces=ValueMatch(
            values=_values(reader, "namespaces", _pattern), not_values=_values(reader, "notNamespaces", _pattern)
        ),
        service_accounts=_values(reader, "serviceAccounts", lambda text: _service_account(text, namespace)),
        not_service_accounts=_values(reader, "notServiceAccounts", lambda text: _service_account(text, namespace)),
        source_ips=_values(reader, "ipBlocks", common.ip_or_network),
        not_source_ips=_values(reader, "notIpBlocks", common.ip_or_network),
    )


def _operation(reader: Reader) -> Match:
    for name in _L7_OPERATION:
        reader.refuse(name, "is about requests", _L7_FIX)
    return Match(ports=_values(reader, "ports", _port), not_ports=_values(reader, "notPorts", _port))


def _condition(reader: Reader, namespace: str) -> Match:
    line = reader.line
    key = reader.text("key")
    match = Match()
    if key is None:
        reader.require("key", f"write one of {names_like(_CONDITIONS)}")
        reader.ignore("values", "notValues")
    elif key not in _CONDITIONS:
        known = "is about requests" if key.startswith(_L7_KEYS) else "is not known"
        reader.error(line, f"{reader.field('key')} {key!r} {known}", f"write one of {names_like(_CONDITIONS)}")
        reader.ignore("values", "notValues")
    else:
        errors = reader.findings.errors
        match = _CONDITION_READERS[key](reader)
        if match == Match() and reader.findings.errors == errors:
            reader.error(line, f"{reader.path} has neither values nor notValues", "add some")
    reader.finish()
    return match


def _strings(reader: Reader, parse: Callable[[str], str]) -> ValueMatch:
    return ValueMatch(values=_values(reader, "values", parse), not_values=_values(reader, "notValues", parse))


_CONDITION_READERS: dict[str, Callable[[Reader], Match]] = {
    "source.principal": lambda reader: Match(principals=_strings(reader, _principal)),
    "source.namespace": lambda reader: Match(namespaces=_strings(reader, _pattern)),
    "source.ip": lambda reader: Match(
        source_ips=_values(reader, "values", common.ip_or_network),
        not_source_ips=_values(reader, "notValues", common.ip_or_network),
    ),
    "destination.ip": lambda reader: Match(
        destination_ips=_values(reader, "values", common.ip_or_network),
        not_destination_ips=_values(reader, "notValues", common.ip_or_network),
    ),
    "destination.port": lambda reader: Match(
        ports=_values(reader, "values", _port), not_ports=_values(reader, "notValues", _port)
    ),
}


def _values(reader: Reader, name: str, parse: Callable[[str], T]) -> tuple[T, ...]:
    """A list of values; an empty list is an error, because it reads as 'nobody' and means 'anybody'."""
    line, errors = reader.line, reader.findings.errors
    values = reader.texts(name, parse)
    if values is None:
        return ()
    if not values and reader.findings.errors == errors:
        reader.error(line, f"{reader.field(name)} is an empty list, which restricts nothing", "remove it or fill it")
    return values


def _pattern(text: str) -> str:
    if not text:
        raise ValueError("empty; write a name, or * for any")
    if "*" in text[1:-1] or (text != "*" and text.startswith("*") and text.endswith("*")):
        raise ValueError("has more than one wildcard; put one * at the beginning or at the end")
    return text


def _principal(text: str) -> str:
    if text.startswith("spiffe://"):
        raise ValueError(f"has the scheme, so it would never match; write {text.removeprefix('spiffe://')}")
    text = _pattern(text)
    if "*" not in text and "/ns/" not in text:
        raise ValueError("not a principal; write trust-domain/ns/namespace/sa/account")
    return text


def _service_account(text: str, namespace: str) -> tuple[str, str]:
    own, slash, account = text.rpartition("/")
    own = own if slash else namespace
    if not common.is_namespace(own) or not common.is_object_name(account):
        raise ValueError("not a service account; write account or namespace/account, without wildcards")
    return own, account


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and text == str(int(text)) and 1 <= int(text) <= 65_535):
        raise ValueError('not a port; write a number from 1 to 65535 in quotes, as "8080"')
    return int(text)


def peer_authentication(reader: Reader, meta: Metadata, root_namespace: str) -> PeerAuthentication | None:
    """Whether workloads take plaintext."""
    reader.ignore("status")
    spec = reader.mapping("spec")
    if spec is None:
        reader.require("spec", "add spec with mtls.mode")
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
                ports[_port(text)] = MtlsMode(chosen or "UNSET")
            except ValueError as error:
                spec.error(port_line, f"{spec.field('portLevelMtls')} has the key {text!r}", str(error))
    elif listed is not None:
        spec.error(listed.line, "spec.portLevelMtls is not a mapping", "write '8080: {mode: PERMISSIVE}'")
    spec.finish()
    if ports and selector is None:
        spec.error(line, "spec.portLevelMtls has an effect only with a selector", "add selector.matchLabels")
    if selector is not None and meta.namespace == root_namespace:
        spec.error(
            line,
            f"a selector in the root namespace {root_namespace} has no effect",
            "move the PeerAuthentication to the workload's namespace",
        )
    return PeerAuthentication(meta=meta, selector=selector, mode=mode, ports=ports)


def _mode(spec: Reader) -> MtlsMode:
    mtls = spec.mapping("mtls")
    if mtls is None:
        return MtlsMode.UNSET
    text = mtls.choice("mode", {item.value for item in MtlsMode})
    mtls.finish()
    return MtlsMode(text or "UNSET")
