"""An authorization policy, as received. `rbac.py` evaluates it."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

import attrs

from ztunnel.mesh.address import IpNetwork, RejectedResource, port_from_wire, prefix_from_wire

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ztunnel.wire import authorization_pb2

__all__ = ["Action", "Authorization", "Clause", "Kind", "Match", "PolicyScope", "Rule", "ServiceAccount", "StringMatch"]


class PolicyScope(enum.Enum):
    """Which workloads a policy rules."""

    GLOBAL = "Global"
    NAMESPACE = "Namespace"
    WORKLOAD_SELECTOR = "WorkloadSelector"
    """Those that name it in their `authorization_policies`."""


class Action(enum.Enum):
    """What a match means."""

    ALLOW = "Allow"
    DENY = "Deny"


class Kind(enum.Enum):
    """How a text is compared."""

    EXACT = "Exact"
    PREFIX = "Prefix"
    SUFFIX = "Suffix"
    PRESENCE = "Presence"


@attrs.frozen
class StringMatch:
    """One accepted text. Source: istio.security.StringMatch."""

    kind: Kind
    text: str = ""

    def matches(self, value: str) -> bool:
        """Whether `value` is accepted; case counts."""
        if self.kind is Kind.EXACT:
            return value == self.text
        if self.kind is Kind.PREFIX:
            return value.startswith(self.text)
        if self.kind is Kind.SUFFIX:
            return value.endswith(self.text)
        return value != ""


@attrs.frozen
class ServiceAccount:
    """A service account of one namespace; the trust domain does not count."""

    namespace: str
    name: str


@attrs.frozen(kw_only=True)
class Match:
    """All fields that are set must hold; one with no field set never matches. Source: istio.security.Match."""

    namespaces: tuple[StringMatch, ...] = ()
    not_namespaces: tuple[StringMatch, ...] = ()
    principals: tuple[StringMatch, ...] = ()
    not_principals: tuple[StringMatch, ...] = ()
    service_accounts: tuple[ServiceAccount, ...] = ()
    not_service_accounts: tuple[ServiceAccount, ...] = ()
    source_ips: tuple[IpNetwork, ...] = ()
    not_source_ips: tuple[IpNetwork, ...] = ()
    destination_ips: tuple[IpNetwork, ...] = ()
    not_destination_ips: tuple[IpNetwork, ...] = ()
    destination_ports: tuple[int, ...] = ()
    not_destination_ports: tuple[int, ...] = ()


Clause = tuple[Match, ...]
"""Any match suffices; one without matches holds."""
Rule = tuple[Clause, ...]
"""All clauses must hold; one without clauses holds."""


@attrs.frozen(kw_only=True)
class Authorization:
    """A policy; any of its rules suffices, and one without rules never matches.

    Source: istio.security.Authorization.
    """

    name: str
    namespace: str
    scope: PolicyScope
    action: Action
    rules: tuple[Rule, ...] = ()
    dry_run: bool = False
    """Decide and report, but enforce nothing."""
    key: str = ""
    """Name of the resource; `namespace/name` unless given."""
    unusable: str = ""
    """Why the policy could not be read. Such a policy stands for one that denies whatever it rules."""
    wire: bytes = attrs.field(default=b"", eq=False, repr=False)
    """As the control plane sent it; empty when it came from the local file."""

    def __attrs_post_init__(self) -> None:
        if not self.key:
            object.__setattr__(self, "key", self.label)

    @property
    def label(self) -> str:
        """`namespace/name`, as logs and errors name it."""
        return f"{self.namespace}/{self.name}"

    @classmethod
    def from_wire(cls, message: authorization_pb2.Authorization, key: str = "", wire: bytes = b"") -> Authorization:
        """Read a policy as discovery sends it. What could widen it is refused, not dropped.

        Raises:
            RejectedResource: what cannot be enforced, with the reason.
        """
        key = key or f"{message.namespace}/{message.name}"
        try:
            return _read(message, key, wire)
        except ValueError as error:
            scope = {0: "", 2: None}.get(message.scope, message.namespace)
            raise RejectedResource(key, str(error), namespace=scope, enforced=not message.dry_run, wire=wire) from None


_SCOPES = {0: PolicyScope.GLOBAL, 1: PolicyScope.NAMESPACE, 2: PolicyScope.WORKLOAD_SELECTOR}
_ACTIONS = {0: Action.ALLOW, 1: Action.DENY}


def _read(message: authorization_pb2.Authorization, key: str, wire: bytes) -> Authorization:
    if message.scope not in _SCOPES:
        raise ValueError(f"scope {message.scope} is unknown")
    if message.action not in _ACTIONS:
        raise ValueError(f"action {message.action} is unknown; only ALLOW and DENY can be enforced")
    return Authorization(
        name=message.name,
        namespace=message.namespace,
        scope=_SCOPES[message.scope],
        action=_ACTIONS[message.action],
        rules=tuple(
            tuple(tuple(_match(match) for match in clause.matches) for clause in rule.clauses) for rule in message.rules
        ),
        dry_run=message.dry_run,
        key=key,
        wire=wire,
    )


def _match(message: authorization_pb2.Match) -> Match:
    values: dict[str, Any] = {}
    for name in ("namespaces", "not_namespaces", "principals", "not_principals"):
        values[name] = tuple(_strings(getattr(message, name), name))
    for name in ("service_accounts", "not_service_accounts"):
        values[name] = tuple(ServiceAccount(entry.namespace, entry.serviceAccount) for entry in getattr(message, name))
    for name in ("source_ips", "not_source_ips", "destination_ips", "not_destination_ips"):
        values[name] = tuple(prefix_from_wire(entry.address, entry.length, name) for entry in getattr(message, name))
    for name in ("destination_ports", "not_destination_ports"):
        values[name] = tuple(port_from_wire(port, name) for port in getattr(message, name))
    return Match(**values)


def _strings(messages: Iterable[authorization_pb2.StringMatch], what: str) -> Iterable[StringMatch]:
    for message in messages:
        kind = message.WhichOneof("match_type")
        if kind == "exact":
            yield StringMatch(Kind.EXACT, message.exact)
        elif kind == "prefix":
            yield StringMatch(Kind.PREFIX, message.prefix)
        elif kind == "suffix":
            yield StringMatch(Kind.SUFFIX, message.suffix)
        elif kind == "presence":
            yield StringMatch(Kind.PRESENCE)
        else:
            raise ValueError(f"{what} has an entry without a kind; it needs exact, prefix, suffix or presence")
