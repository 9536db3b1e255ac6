"""What is wrong with a mesh though each of its documents is right. Warnings only: such a mesh can be served."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from miniistiod import conditions, services
from miniistiod.resources.binding import WAYPOINT_BOUND
from miniistiod.resources.findings import Finding, Severity
from miniistiod.resources.model import AuthorizationPolicy, EndpointSlice, KubernetesService, WorkloadEntry
from miniistiod.workloads import gateway_address

if TYPE_CHECKING:
    from collections.abc import Iterator

    from miniistiod.registry import Registry
    from miniistiod.resources.model import Metadata

__all__ = ["findings"]


def findings(registry: Registry, trust_domain: str | None) -> list[Finding]:
    """Everything that is wrong between documents; principals are looked at when the mesh's trust domain is known."""
    principals = () if trust_domain is None else _foreign_principals(registry, trust_domain)
    return [
        *_lost_hosts(registry),
        *_shared_addresses(registry),
        *_unused_slices(registry),
        *_waypoints(registry),
        *_unknown_waypoints(registry),
        *_idle_policies(registry),
        *principals,
    ]


def _warning(meta: Metadata, what: str, fix: str) -> Finding:
    return Finding(meta.path, meta.line, Severity.WARNING, what, fix)


def _lost_hosts(registry: Registry) -> Iterator[Finding]:
    for name in registry.contested():
        winner, *others = registry.claimants(name)
        for item in others:
            owner = winner.meta
            yield _warning(
                item.meta,
                f"{item.meta.kind} {item.meta.namespace}/{item.meta.name} is not used for {name.partition('/')[2]},"
                f" which {owner.kind} {owner.name} ({owner.path}:{owner.line}) has already",
                "keep one of them",
            )


def _shared_addresses(registry: Registry) -> Iterator[Finding]:
    seen: dict[tuple[str, object], Metadata] = {}
    for item in registry.documents.values():
        if not isinstance(item, WorkloadEntry) or isinstance(item.endpoint.address, str):
            continue
        address = item.endpoint.address
        key = (item.endpoint.network or registry.network, address)
        other = seen.setdefault(key, item.meta)
        if other is not item.meta:
            yield _warning(
                item.meta,
                f"WorkloadEntry {item.meta.namespace}/{item.meta.name} has the address {address} of"
                f" {other.namespace}/{other.name} ({other.path}:{other.line})",
                "give each machine its own; a peer could take one for the other",
            )
    taken: dict[object, Metadata] = {}
    for model in registry.services.values():
        for vip in services.addresses(registry, model):
            if not isinstance(vip, ipaddress.IPv4Address | ipaddress.IPv6Address):
                continue
            other = taken.setdefault(vip, model.source.meta)
            if other is not model.source.meta:
                yield _warning(
                    model.source.meta,
                    f"{model.source.meta.kind} {model.name} has the address {vip} of {other.namespace}/{other.name}",
                    "give each service its own",
                )


def _unused_slices(registry: Registry) -> Iterator[Finding]:
    for item in registry.documents.values():
        if not isinstance(item, EndpointSlice):
            continue
        found = registry.documents.get(("Service", item.meta.namespace, item.service))
        title = f"EndpointSlice {item.meta.namespace}/{item.meta.name}"
        if not isinstance(found, KubernetesService):
            yield _warning(item.meta, f"{title} is of the Service {item.service}, which is not there", "add it")
        elif found.selector:
            what = f"{title} is not used: its Service {item.service} has a selector"
            yield _warning(item.meta, what, "remove the Service's selector, or the slice")


def _waypoints(registry: Registry) -> Iterator[Finding]:
    """Objects that ask for a waypoint and have none, or not the one that they ask for."""
    for item in registry.documents.values():
        for condition in conditions.conditions_of(registry, item):
            if condition.type == WAYPOINT_BOUND and not condition.ok:
                meta = item.meta
                yield _warning(
                    meta,
                    f"{meta.kind} {meta.namespace}/{meta.name}: {condition.reason}, {condition.text}",
                    "connections go past that waypoint until this is mended",
                )


def _unknown_waypoints(registry: Registry) -> Iterator[Finding]:
    """Waypoints that something uses and nobody knows the way to."""
    for gateway in registry.waypoints_in_use():
        place = gateway_address(gateway, registry.network)
        if place.HasField("hostname"):
            name = f"{place.hostname.namespace}/{place.hostname.hostname}"
        else:
            name = f"{place.address.network}/{ipaddress.ip_address(place.address.address)}"
        if not registry.catalog.resolve(name):
            yield _warning(
                gateway.meta,
                f"the waypoint {gateway.meta.namespace}/{gateway.meta.name} is at {name.partition('/')[2]}, which is"
                " neither a service nor a workload, so connections through it are refused",
                "add a WorkloadEntry or a service with that address",
            )


def _idle_policies(registry: Registry) -> Iterator[Finding]:
    """Policies for a waypoint that nothing goes through."""
    used = {(item.meta.namespace, item.meta.name) for item in registry.waypoints_in_use()}
    for policy in registry.documents.values():
        for target in policy.targets if isinstance(policy, AuthorizationPolicy) else ():
            if target.kind == "Gateway" and (target.namespace, target.name) not in used:
                yield _warning(
                    policy.meta,
                    f"AuthorizationPolicy {policy.meta.namespace}/{policy.meta.name} is for the waypoint {target.name},"
                    " which nothing uses, so it protects nothing",
                    "label what it is to protect istio.io/use-waypoint",
                )


def _foreign_principals(registry: Registry, trust_domain: str) -> Iterator[Finding]:
    for policy in registry.documents.values():
        for rule in policy.rules if isinstance(policy, AuthorizationPolicy) else ():
            for match in (match for clause in rule.clauses for match in clause):
                for value in (*match.principals.values, *match.principals.not_values):
                    domain, slash, _ = value.partition("/")
                    if slash and "*" not in domain and domain != trust_domain:
                        yield _warning(
                            policy.meta,
                            f"the principal {value!r} is not of the trust domain {trust_domain!r}, so it never matches",
                            f"write {trust_domain}/... or */...",
                        )
