"""A connection, asked of the registry: what the mesh will do with it, by the very decisions that ztunnels make.

Source: `ztunnel.mesh`, whose store is filled here from the catalog as discovery would fill it.
"""

from __future__ import annotations

import ipaddress
import itertools
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from hbone.connect import Authority, AuthorityError
from hbone.errors import HboneError, IdentityError
from hbone.identity import SpiffeId
from miniistiod.catalog import ADDRESS, AUTHORIZATION
from miniistiod.wording import says
from ztunnel.mesh.address import RejectedResource, parse_ip
from ztunnel.mesh.decode import decode_address, decode_policy
from ztunnel.mesh.explain import explain
from ztunnel.mesh.policy import Action, PolicyScope
from ztunnel.mesh.rbac import Connection, decide
from ztunnel.mesh.store import Store
from ztunnel.mesh.workload import Protocol, Workload

if TYPE_CHECKING:
    from collections.abc import Callable

    from miniistiod.catalog import Catalog, Entry

__all__ = ["ExplainError", "MeshView", "Question", "effective", "reachability"]

_NOWHERE = ipaddress.IPv4Address("0.0.0.0")
MAX_IDENTITIES = 40
MAX_TARGETS = 60
"""Of a table of who may reach what."""
MAX_ENDPOINTS = 25
"""Of each service that are looked at for that table; `explain` looks at those that are chosen."""


_Decoded = TypeVar("_Decoded")


class ExplainError(HboneError):
    """The question cannot be answered; the message says why."""


@attrs.frozen
class _News:
    number: int
    addresses: list[tuple[str, Entry | None]]
    policies: list[tuple[str, Entry | None]]


class MeshView:
    """The catalog as a ztunnel holds it, brought up to date when it is asked for."""

    def __init__(self) -> None:
        self.store = Store()
        self._number = -1

    def news(self, catalog: Catalog) -> _News:
        """What changed since the last time; to be taken where the catalog cannot change meanwhile."""
        since = [catalog.of[url].since(self._number) if self._number >= 0 else None for url in (ADDRESS, AUTHORIZATION)]
        if None in since:
            self.store = Store()  # from the beginning
            since = [list(catalog.of[url].entries) for url in (ADDRESS, AUTHORIZATION)]
        addresses, policies = (
            [(name, catalog.of[url].entries.get(name)) for name in names or ()]
            for url, names in zip((ADDRESS, AUTHORIZATION), since, strict=True)
        )
        return _News(catalog.number, addresses, policies)

    def take(self, news: _News) -> Store:
        """Read it; may be done in a thread."""
        self.store.apply_addresses(*_read(news.addresses, decode_address))
        self.store.apply_policies(*_read(news.policies, decode_policy))
        self._number = news.number
        return self.store


def _read(
    news: list[tuple[str, Entry | None]], decode: Callable[[str, bytes], _Decoded]
) -> tuple[list[_Decoded], list[str], list[RejectedResource]]:
    """What came, what went, and what a ztunnel would not take."""
    decoded: list[_Decoded] = []
    rejected: list[RejectedResource] = []
    for name, item in news:
        if item is not None:
            try:
                decoded.append(decode(name, item.body))
            except RejectedResource as error:
                rejected.append(error)
    return decoded, [name for name, item in news if item is None], rejected


@attrs.frozen
class Question:
    """Who wants to connect where."""

    source: str
    """`ns/workload`, `ns/sa/account` or a SPIFFE ID."""
    destination: str
    """`HOST:PORT`: an address, or the name of a service."""

    def answer(self, store: Store, trust_domain: str) -> dict[str, Any]:
        """Every step of the decision.

        Raises:
            ExplainError: there is no such source or destination.
        """
        source, notes = _source(store, self.source, trust_domain)
        ip, port, more = _destination(store, source, self.destination)
        found = explain(store, source, (ip, port), network=source.network, client_ip=_address_of(source)).to_dict()
        found["steps"] = [*({"topic": "source", "text": text} for text in notes), *more, *found["steps"]]
        return found


def _address_of(source: Workload) -> Any:
    return next(iter(source.addresses), _NOWHERE)


def _source(store: Store, text: str, trust_domain: str) -> tuple[Workload, list[str]]:
    identity = _identity(text, trust_domain)
    if identity is None:
        namespace, _, name = text.partition("/")
        for workload in store.workloads.values():
            if workload.namespace == namespace and name in (workload.name, workload.uid):
                return workload, []
        raise ExplainError(f"there is no workload {text!r}; 'miniistiod get workloads' lists them")
    same = [workload for workload in store.workloads.values() if workload.identity == identity]
    if same:
        first = min(same, key=lambda workload: workload.uid)
        others = f", of {len(same)} with that identity" if len(same) > 1 else ""
        return first, [f"asked for the workload {first.namespace}/{first.name}{others}"]
    made = Workload(
        uid=str(identity),
        name=identity.service_account or "",
        namespace=identity.namespace or "",
        service_account=identity.service_account or "",
        trust_domain=identity.trust_domain,
    )
    return made, [f"no workload has the identity {identity}: asked for a client with no known address"]


def _identity(text: str, trust_domain: str) -> SpiffeId | None:
    """The identity that a source names; None when it names a workload."""
    try:
        if text.startswith("spiffe://"):
            identity = SpiffeId.parse(text)
            if identity.namespace is None:
                raise ExplainError(f"{text} is not of the form spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT")
            return identity
        parts = text.split("/")
        if len(parts) == 3 and parts[1] == "sa":
            return SpiffeId.istio(trust_domain, parts[0], parts[2])
    except IdentityError as error:
        raise ExplainError(f"the source {text!r} is no identity: {error}") from None
    if text.count("/") != 1 or not all(text.split("/")):
        raise ExplainError(f"the source is {text!r}; write NAMESPACE/WORKLOAD, NAMESPACE/sa/ACCOUNT or a SPIFFE ID")
    return None


def _destination(store: Store, source: Workload, text: str) -> tuple[Any, int, list[dict[str, str]]]:
    try:
        authority = Authority.parse(text)
    except AuthorityError as error:
        raise ExplainError(f"the destination {text!r}: {error}; write HOST:PORT") from None
    if authority.ip is not None:
        return parse_ip(str(authority.ip)), authority.port, []
    service = store.service_by_host(authority.host, source.namespace)
    if service is None:
        raise ExplainError(f"no service is called {authority.host!r} for {source.namespace}; name one, or an address")
    addresses = [vip.ip for vip in service.vips if vip.network == source.network]
    if not addresses:
        raise ExplainError(f"the service {service.key} has no address on network {source.network!r}; name an endpoint")
    step = {"topic": "name", "text": f"{authority.host} is service {service.key}, at {addresses[0]}"}
    return addresses[0], authority.port, [step]


def effective(store: Store, name: str) -> dict[str, Any]:
    """The policies of a workload in the order in which they decide.

    Raises:
        ExplainError: there is no such workload.
    """
    workload, _ = _source(store, name, "")
    policies = store.policies_for(workload)
    # Deny is asked before allow; the sort keeps the order within each.
    ordered = sorted(policies.policies, key=lambda policy: policy.action is not Action.DENY)
    return {
        "workload": f"{workload.namespace}/{workload.name}",
        "policies": [
            {
                "name": policy.label,
                "action": policy.action.name,
                "scope": policy.scope.name,
                "says": says(policy),
                "because": _BECAUSE[policy.scope],
            }
            for policy in ordered
        ],
        "otherwise": "denied" if any(policy.action is Action.ALLOW for policy in ordered) else "allowed",
        "missing": list(policies.missing),
    }


_BECAUSE = {
    PolicyScope.GLOBAL: "is of the whole mesh",
    PolicyScope.NAMESPACE: "is of its namespace",
    PolicyScope.WORKLOAD_SELECTOR: "selects it",
}


def reachability(store: Store) -> dict[str, Any]:
    """Who may talk to whom: each identity against each port of each service, by the policies of its endpoints.

    Cut where the mesh is larger than a table that people read; `cut` says so.
    """
    sources: dict[SpiffeId, Workload] = {}
    callers = (workload for workload in store.workloads.values() if workload.addresses)
    for workload in sorted(callers, key=lambda item: str(item.identity)):
        sources.setdefault(workload.identity, workload)
    targets = [
        (service, port)
        for key in sorted(store.services)
        for service in (store.services[key],)
        for port in service.ports
    ]
    rows = [
        {
            "identity": str(identity),
            "cells": [_verdict(store, workload, service, port) for service, port in targets[:MAX_TARGETS]],
        }
        for identity, workload in list(sources.items())[:MAX_IDENTITIES]
    ]
    return {
        "targets": [f"{service.key}:{port}" for service, port in targets[:MAX_TARGETS]],
        "rows": rows,
        "cut": len(sources) > MAX_IDENTITIES or len(targets) > MAX_TARGETS,
    }


def _verdict(store: Store, source: Workload, service: Any, port: int) -> str:
    """`yes`, `no` or `some`: of the endpoints that serve the port; `-` without any.

    `waypoint` where one decides, and `plain` where an endpoint is reached in plaintext: what holds it back there shows
    no identity to its policies, and whether it has a ztunnel that asks them is not known.
    """
    if service.waypoint is not None:
        return "waypoint"
    if service.namespace_only and service.namespace != source.namespace:
        return "-"
    found: set[bool] = set()
    for uid, endpoint in itertools.islice(store.members(service).items(), MAX_ENDPOINTS):
        workload = store.workloads.get(uid)
        target = endpoint.ports.get(port) or service.ports.get(port) or port
        if workload is not None and workload.protocol is not Protocol.HBONE:
            return "plain"
        if workload is None or not workload.addresses:
            continue
        connection = Connection(_address_of(source), source.identity, (workload.addresses[0], target))
        found.add(decide(store, workload, connection).allowed)
    return "-" if not found else "some" if len(found) == 2 else "yes" if found == {True} else "no"
