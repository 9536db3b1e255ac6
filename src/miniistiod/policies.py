"""AuthorizationPolicy and PeerAuthentication -> what a ztunnel enforces.

Source: Istio's conversion of policies for ztunnel (names, scopes and the order of clauses).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.empty_pb2 import Empty

from miniistiod.index import selects
from miniistiod.resources.model import (
    Action,
    AuthorizationPolicy,
    Match,
    MtlsMode,
    PeerAuthentication,
)
from ztunnel.wire import authorization_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from miniistiod.resources.reader import IpInterface

__all__ = ["STATIC_STRICT", "PeerAuthentications", "authorization", "is_layer_4"]

STATIC_STRICT = "istio_converted_static_strict"
"""Denies every peer without an identity. The underscores keep it apart from names of documents."""


def authorization(policy: AuthorizationPolicy, root_namespace: str) -> pb.Authorization | None:
    """An AuthorizationPolicy on the wire; None when it is not a ztunnel's to enforce.

    Of rules about requests an ALLOW policy loses the whole rule, and a DENY policy the fields, as Istio does it.
    Neither is what was written: documents with such rules are refused before this.
    """
    meta = policy.meta
    if not is_layer_4(policy):
        return None
    deny = policy.action is Action.DENY
    if policy.selector is not None:
        scope = pb.WORKLOAD_SELECTOR
    elif meta.namespace == root_namespace:
        scope = pb.GLOBAL
    else:
        scope = pb.NAMESPACE
    return pb.Authorization(
        name=meta.name,
        namespace=meta.namespace,
        scope=scope,
        action=pb.DENY if deny else pb.ALLOW,
        rules=[
            pb.Rule(clauses=[pb.Clause(matches=[_match(match) for match in clause]) for clause in rule.clauses])
            for rule in policy.rules
            if deny or not rule.requests
        ],
    )


def is_layer_4(policy: AuthorizationPolicy) -> bool:
    """Whether a policy is a ztunnel's to enforce."""
    return not policy.targets and not policy.dry_run and policy.action.layer_4


def _match(match: Match) -> pb.Match:
    return pb.Match(
        namespaces=_strings(match.namespaces.values),
        not_namespaces=_strings(match.namespaces.not_values),
        principals=_strings(match.principals.values),
        not_principals=_strings(match.principals.not_values),
        source_ips=_networks(match.source_ips),
        not_source_ips=_networks(match.not_source_ips),
        destination_ips=_networks(match.destination_ips),
        not_destination_ips=_networks(match.not_destination_ips),
        destination_ports=match.ports,
        not_destination_ports=match.not_ports,
        service_accounts=_accounts(match.service_accounts),
        not_service_accounts=_accounts(match.not_service_accounts),
    )


def _strings(values: Iterable[str]) -> list[pb.StringMatch]:
    return [_string(value) for value in values]


def _string(value: str) -> pb.StringMatch:
    if value == "*":
        return pb.StringMatch(presence=Empty())
    if value.startswith("*"):
        return pb.StringMatch(suffix=value[1:])
    if value.endswith("*"):
        return pb.StringMatch(prefix=value[:-1])
    return pb.StringMatch(exact=value)


def _networks(values: Iterable[IpInterface]) -> list[pb.Address]:
    return [pb.Address(address=value.packed, length=value.network.prefixlen) for value in values]


def _accounts(values: Iterable[tuple[str, str]]) -> list[pb.ServiceAccountMatch]:
    return [pb.ServiceAccountMatch(namespace=namespace, serviceAccount=name) for namespace, name in values]


_ANONYMOUS = pb.Match(not_principals=[pb.StringMatch(presence=Empty())])


class PeerAuthentications:
    """Which workloads refuse plaintext, resolved by inheritance: workload, else namespace, else mesh."""

    def __init__(self, root_namespace: str) -> None:
        self._root_namespace = root_namespace
        self._namespaces: dict[str, PeerAuthentication] = {}
        self._workloads: dict[str, list[PeerAuthentication]] = {}
        self._present: set[str] = set()

    def replace(self, namespace: str, oldest_first: Sequence[PeerAuthentication]) -> None:
        """From now on these are all of a namespace."""
        self._namespaces.pop(namespace, None)
        self._workloads.pop(namespace, None)
        self._present.discard(namespace)
        for item in oldest_first:
            self._present.add(namespace)
            if not item.selector:
                # Istio takes an empty selector for none, except in the root namespace.
                if item.selector is None or namespace != self._root_namespace:
                    self._namespaces.setdefault(namespace, item)
            elif namespace != self._root_namespace:
                self._workloads.setdefault(namespace, []).append(item)

    @property
    def any(self) -> bool:
        """Whether there is one at all; without, the mesh takes plaintext and nothing is sent."""
        return bool(self._present)

    def _inherited(self, namespace: str) -> MtlsMode:
        for scope in (namespace, self._root_namespace):
            item = self._namespaces.get(scope)
            if item is not None and item.mode is not MtlsMode.UNSET:
                return item.mode
        return MtlsMode.PERMISSIVE

    def _mode(self, item: PeerAuthentication) -> MtlsMode:
        return self._inherited(item.meta.namespace) if item.mode is MtlsMode.UNSET else item.mode

    def names_for(self, namespace: str, labels: Mapping[str, str]) -> list[str]:
        """Names of the converted policies that a workload must refer to."""
        if not self.any:
            return []
        own = self._workloads.get(namespace, ())
        chosen = next((item for item in own if selects(item.selector or {}, labels)), None)
        if chosen is not None and _exceptions(chosen, self._mode(chosen)):
            return [f"{namespace}/{_converted_name(chosen)}"]
        mode = self._inherited(namespace) if chosen is None else self._mode(chosen)
        return [f"{self._root_namespace}/{STATIC_STRICT}"] if mode is MtlsMode.STRICT else []

    def static(self) -> pb.Authorization | None:
        """The policy that denies every peer without identity, for those that refer to it."""
        if not self.any:
            return None
        rules = [pb.Rule(clauses=[pb.Clause(matches=[_ANONYMOUS])])]
        return _denial(self._root_namespace, STATIC_STRICT, rules)

    def converted(self, namespace: str) -> Iterable[pb.Authorization]:
        """The policies that stand for the documents of a namespace."""
        for item in self._workloads.get(namespace, ()):
            mode = self._mode(item)
            ports = _exceptions(item, mode)
            if ports:
                rules = _rules(ports, strict=mode is MtlsMode.STRICT, own=item.mode is MtlsMode.STRICT)
                yield _denial(namespace, _converted_name(item), rules)


def _converted_name(item: PeerAuthentication) -> str:
    return f"converted_peer_authentication_{item.meta.name}"


def _exceptions(item: PeerAuthentication, mode: MtlsMode) -> list[int]:
    """Ports whose mode differs from the workload's own."""
    strict = mode is MtlsMode.STRICT
    return sorted(
        port
        for port, chosen in item.ports.items()
        if chosen is not MtlsMode.UNSET and (chosen is MtlsMode.STRICT) is not strict
    )


def _rules(ports: list[int], *, strict: bool, own: bool) -> list[pb.Rule]:
    if not strict:
        alone = []
        for port in ports:
            match = pb.Match(destination_ports=[port])
            match.MergeFrom(_ANONYMOUS)
            alone.append(pb.Rule(clauses=[pb.Clause(matches=[match])]))
        return alone
    anonymous = pb.Clause(matches=[_ANONYMOUS])
    others = [pb.Clause(matches=[pb.Match(not_destination_ports=[port])]) for port in ports]
    return [pb.Rule(clauses=[anonymous, *others] if own else [*others, anonymous])]


def _denial(namespace: str, name: str, rules: list[pb.Rule]) -> pb.Authorization:
    return pb.Authorization(name=name, namespace=namespace, scope=pb.WORKLOAD_SELECTOR, action=pb.DENY, rules=rules)
