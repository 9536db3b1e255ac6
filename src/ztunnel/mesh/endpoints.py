"""Service -> endpoint: which may be chosen, which are preferred, and the draw. Source: ztunnel's load balancing."""

from __future__ import annotations

import bisect
import enum
from itertools import accumulate
from typing import TYPE_CHECKING

import attrs

from ztunnel.mesh.address import NamespacedHostname
from ztunnel.mesh.service import Mode, Scope

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from ztunnel.mesh.address import GatewayAddress
    from ztunnel.mesh.service import Endpoint, LoadBalancer, Service
    from ztunnel.mesh.store import Store
    from ztunnel.mesh.workload import Workload

__all__ = ["Candidate", "Choice", "Purpose", "candidates", "choose", "look_up", "rank", "resolve_reference"]


@attrs.frozen
class Candidate:
    """An endpoint that may be chosen, with its workload and the port to use on it."""

    endpoint: Endpoint
    workload: Workload
    port: int


class Purpose(enum.Enum):
    """What an endpoint is looked for as."""

    DESTINATION = "destination"
    WAYPOINT = "waypoint"
    """Its port need not be declared where its workload takes tunnels itself."""
    GATEWAY = "gateway"
    """It leads to the network that it is on, so that may be another than the source's."""


@attrs.frozen
class Choice:
    """Endpoints to draw from, ready to be drawn by weight."""

    candidates: tuple[Candidate, ...]
    weights: tuple[int, ...]
    """Running sums of capacity."""
    beyond: Workload | None = None
    """When there is none to draw: one that is out of reach for want of a gateway to its network."""

    def draw(self, rng: random.Random) -> Candidate | None:
        """One of them by weight; None when there is none."""
        weights = self.weights
        if not weights or not weights[-1]:
            return None
        if len(weights) == 1:
            return self.candidates[0]
        return self.candidates[bisect.bisect_right(weights, rng.random() * weights[-1])]


def candidates(
    store: Store, source: Workload, service: Service, port: int, purpose: Purpose = Purpose.DESTINATION
) -> list[tuple[Endpoint, Candidate | None, str]]:
    """Every endpoint of a service with what becomes of it: a candidate, or None and the reason.

    Args:
        store: The mesh.
        source: The client's workload.
        service: The service that is asked.
        port: Its port.
        purpose: What the endpoint is to be.
    """
    found: list[tuple[Endpoint, Candidate | None, str]] = []
    workloads = store.workloads  # made anew by each question while a large push is being worked in
    for uid, endpoint in store.endpoints(service).items():
        workload = workloads.get(uid)
        if workload is None:
            found.append((endpoint, None, "its workload is not known"))
            continue
        mapped, why = _port_on(service, endpoint, workload, port, purpose)
        why = why or _unreachable(source, service, workload, purpose)
        found.append((endpoint, None, why) if why else (endpoint, Candidate(endpoint, workload, mapped), ""))
    return found


def _unreachable(source: Workload, service: Service, workload: Workload, purpose: Purpose) -> str:
    """Why a workload cannot be chosen, whatever the port; "" if it can."""
    if not workload.capacity:
        return "its capacity is 0"
    if workload.network != source.network and purpose is not Purpose.GATEWAY:
        # Its addresses mean nothing here, and it need not have any: whoever is there stands behind the gateway.
        return "" if workload.network_gateway is not None else _beyond(workload)
    if not workload.addresses and not workload.hostname:
        return "it has neither address nor host name"
    if workload.addresses and not any(map(service.ip_families.allows, workload.addresses)):
        return f"it has no {service.ip_families.value} address"
    return ""


def _beyond(workload: Workload) -> str:
    return f"it is on network {workload.network!r}, and no gateway to there is known"


def _port_on(service: Service, endpoint: Endpoint, workload: Workload, port: int, purpose: Purpose) -> tuple[int, str]:
    """The port of an endpoint behind a service's port, or why it has none."""
    target = service.ports.get(port)
    tunnel = workload.application_tunnel
    waypoint = purpose is Purpose.WAYPOINT
    if target is None and not (waypoint and tunnel is not None):
        return 0, f"the service does not declare port {port}"
    mapped = endpoint.ports.get(port) or 0
    if not mapped and (target or waypoint):
        mapped = target or (port if tunnel is not None and tunnel.port else 0)
    return mapped, "" if mapped else f"it has no target port for {port}"


def choose(
    store: Store, source: Workload, service: Service, port: int, purpose: Purpose = Purpose.DESTINATION
) -> Choice:
    """The endpoints that connections of `source` to a service's port are shared among; remembered until changes."""
    key = (source.uid, service.key, port, purpose)
    found = store.memo.get(key)
    if found is None:
        found = _choose(store, source, service, port, purpose)
        store.remember(key, found)
    choice: Choice = found
    return choice


def _choose(store: Store, source: Workload, service: Service, port: int, purpose: Purpose) -> Choice:
    usable: list[Candidate] = []
    beyond: Workload | None = None
    for endpoint, candidate, _ in candidates(store, source, service, port, purpose):
        if candidate is not None:
            usable.append(candidate)
        elif beyond is None:
            workload = store.workloads.get(endpoint.workload_uid)
            if workload is not None and _unreachable(source, service, workload, purpose) == _beyond(workload):
                beyond = workload
    if service.load_balancer is not None:
        usable = _preferred(source, usable, service.load_balancer)
    weights = tuple(accumulate(candidate.workload.capacity for candidate in usable))
    return Choice(tuple(usable), weights, None if usable else beyond)


def _preferred(source: Workload, usable: list[Candidate], balancer: LoadBalancer) -> list[Candidate]:
    if balancer.mode not in {Mode.STRICT, Mode.FAILOVER}:
        return usable
    ranks = [rank(source, candidate.workload, balancer.preferences) for candidate in usable]
    if balancer.mode is Mode.STRICT:
        wanted = len(balancer.preferences)
        return [candidate for candidate, (_, matched) in zip(usable, ranks, strict=True) if matched == wanted]
    best = max((score for score, _ in ranks), default=0)
    return [candidate for candidate, (score, _) in zip(usable, ranks, strict=True) if score == best]


def rank(source: Workload, workload: Workload, preferences: tuple[Scope, ...]) -> tuple[int, int]:
    """How well a workload meets the routing preferences: (score for failover, preferences that match).

    A first preference for the network counts more than all others together, and its mismatch ends nothing.

    Source: Istio, ztunnel.
    """
    score = matched = 0
    for position, scope in enumerate(preferences):
        same = _SCOPES[scope](source) == _SCOPES[scope](workload)
        if same:
            matched += 1
            score += 1
            if position == 0 and scope is Scope.NETWORK:
                score += len(preferences) - 1
        elif not (position == 0 and scope is Scope.NETWORK):
            break
    return score, matched


_SCOPES: dict[Scope, Callable[[Workload], str]] = {
    Scope.REGION: lambda workload: workload.locality.region,
    Scope.ZONE: lambda workload: workload.locality.zone,
    Scope.SUBZONE: lambda workload: workload.locality.subzone,
    Scope.NODE: lambda workload: workload.node,
    Scope.CLUSTER: lambda workload: workload.cluster_id,
    Scope.NETWORK: lambda workload: workload.network,
}


def look_up(
    store: Store, reference: GatewayAddress, namespace: str | None = None
) -> tuple[Service | None, Workload | None]:
    """The service that a reference means to clients of a namespace, or of any; or else the workload."""
    to = reference.destination
    if isinstance(to, NamespacedHostname):
        service = store.services.get(str(to))
        workload = store.workload_by_hostname(to.namespace, to.hostname) if service is None else None
    else:
        service = store.service_by_vip(to.network, to.ip, namespace)
        workload = store.workload_by_address(to.network, to.ip) if service is None else None
    return service, workload


def resolve_reference(store: Store, reference: GatewayAddress) -> list[Workload]:
    """Every workload that a reference may mean: an address's or host name's own, or all endpoints of its service."""
    service, workload = look_up(store, reference)
    if service is not None:
        workloads = store.workloads
        return [found for uid in store.endpoints(service) if (found := workloads.get(uid)) is not None]
    return [workload] if workload is not None else []
