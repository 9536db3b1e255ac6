"""Source and original destination -> Route. Source: Istio, ztunnel's outbound decisions.

What is known as HBONE is reached through a tunnel or not at all; every doubt ends in `Refused`.
"""

from __future__ import annotations

import bisect
import random
from itertools import accumulate
from typing import TYPE_CHECKING

import attrs

from ztunnel.errors import (
    DataplaneError,
    NoHealthyUpstream,
    NoService,
    RemoteNetwork,
    ResolutionFailed,
    SelfCall,
    UnknownWaypoint,
    UnusableDestination,
    address_text,
)
from ztunnel.mesh.address import NamespacedHostname, canonical, is_loopback
from ztunnel.mesh.service import Mode, Scope
from ztunnel.mesh.store import resolve_reference
from ztunnel.mesh.workload import Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from hbone.identity import SpiffeId
    from ztunnel.mesh.address import Address, GatewayAddress, IpAddress
    from ztunnel.mesh.service import Endpoint, LoadBalancer, Service
    from ztunnel.mesh.store import Store
    from ztunnel.mesh.workload import Workload

__all__ = [
    "HBONE_PORT",
    "Candidate",
    "Plain",
    "Refused",
    "Resolve",
    "Route",
    "Tunnel",
    "candidates",
    "choose_waypoint",
    "find_service",
    "rank",
    "route",
]

HBONE_PORT = 15_008
"""Where every peer takes tunnels."""


@attrs.frozen
class Tunnel:
    """Through an HBONE tunnel."""

    next_hop: Address
    authority: str
    """`:authority` of the CONNECT."""
    expected: frozenset[SpiffeId]
    """The next hop must prove one of these."""
    workload: Workload
    """The next hop: the destination itself, or its waypoint."""
    service: Service | None
    waypoint: bool = False


@attrs.frozen
class Plain:
    """By plain TCP: to a workload known to take no tunnels, or out of the mesh."""

    address: Address
    workload: Workload | None = None
    service: Service | None = None


@attrs.frozen
class Refused:
    """Not at all."""

    error: DataplaneError


@attrs.frozen
class Resolve:
    """To a workload known by host name only: look the name up, then ask `then` with one of its addresses."""

    hostname: str
    hint: IpAddress
    """An address of the family that is preferred."""
    then: Callable[[IpAddress], Tunnel | Plain | Refused]


Route = Tunnel | Plain | Refused | Resolve


@attrs.frozen
class Candidate:
    """An endpoint that may be chosen, with its workload and the port to use on it."""

    endpoint: Endpoint
    workload: Workload
    port: int


@attrs.frozen
class _Choice:
    """Endpoints to draw from, ready to be drawn by weight."""

    candidates: tuple[Candidate, ...]
    weights: tuple[int, ...]
    """Running sums of capacity."""
    remote: str | None
    """A network where the only endpoints are, when there is none on the source's."""

    def draw(self, rng: random.Random) -> Candidate | None:
        weights = self.weights
        if not weights or not weights[-1]:
            return None
        if len(weights) == 1:
            return self.candidates[0]
        return self.candidates[bisect.bisect_right(weights, rng.random() * weights[-1])]


_RANDOM = random.Random()


def route(
    store: Store,
    source: Workload,
    destination: Address,
    *,
    network: str = "",
    own_ports: Collection[int] = frozenset(),
    own_addresses: Collection[IpAddress] = frozenset(),
    rng: random.Random = _RANDOM,
    client_ip: IpAddress | None = None,
    hbone_port: int = HBONE_PORT,
) -> Route:
    """Where a connection of `source` to `destination` goes. Called once per connection.

    Args:
        store: The mesh.
        source: The workload that this proxy serves.
        destination: Where the application wanted to go.
        network: The network of this node.
        own_ports: Ports of this proxy's own listeners.
        own_addresses: Addresses of this host; one of our own ports on any of them is refused.
        rng: Draws among endpoints.
        client_ip: Where the connection comes from, if known.
        hbone_port: Where peers take tunnels.
    """
    ip, port = destination
    if port in own_ports and (ip in own_addresses or is_loopback(ip)):
        return Refused(SelfCall())
    if ip.version == 6 and ip.ipv4_mapped is not None:
        ip = canonical(ip)
        destination = (ip, port)
    target = store.workload_by_address(network, ip)
    addressed = None if target is not None else store.service_by_vip(network, ip, source.namespace)

    if addressed is not None:
        reference = choose_waypoint(addressed, rng)
        if reference is not None:
            return _to_waypoint(store, source, destination, reference, addressed, rng)

    # From here on services come first, as in ztunnel: an address may be both.
    service = find_service(store, source, destination, addressed, network)
    chosen: Candidate | None = None
    if service is not None and not service.passthrough:
        choice = _choice(store, source, service, port, waypoint=False)
        chosen = choice.draw(rng)
        if chosen is None and choice.remote is not None:
            return Refused(RemoteNetwork(destination, choice.remote))
    if chosen is not None:
        workload, target_port = chosen.workload, chosen.port
    else:
        if addressed is not None and not addressed.passthrough:
            return Refused(NoHealthyUpstream(destination))
        if target is None:
            return _passthrough(store, destination, network)
        # A workload is known at this very address, so its own protocol decides, never plaintext by default.
        workload, target_port, service = target, port, None

    if workload.network != source.network:
        return Refused(NoService(destination) if addressed is None else RemoteNetwork(destination, workload.network))
    if addressed is None and workload.waypoint is not None and not _from_waypoint(store, source, workload, client_ip):
        return _to_waypoint(store, source, destination, workload.waypoint, service, rng)

    def reach(address: IpAddress) -> Tunnel | Plain:
        """Workload and port are chosen; only the address was missing."""
        if workload.protocol is Protocol.HBONE:
            hop = (address, hbone_port)
            return Tunnel(hop, address_text((address, target_port)), _expected(workload, service), workload, service)
        return Plain((address, target_port), workload, service)

    own = _own_address(workload, service, ip, ip)
    if own is not None:
        if target_port in own_ports and own in own_addresses:
            return Refused(SelfCall())
        return reach(own)
    return _resolve(store, workload, service, ip, destination, reach)


def find_service(
    store: Store, source: Workload, destination: Address, addressed: Service | None, network: str
) -> Service | None:
    """The service whose endpoints are asked, in the source's own network."""
    if addressed is not None and source.network == network:
        return addressed
    return store.service_by_vip(source.network, destination[0], source.namespace)


def _passthrough(store: Store, destination: Address, network: str) -> Plain | Refused:
    """Out of the mesh, unless that is no place to go."""
    ip = destination[0]
    if is_loopback(ip):
        return Refused(UnusableDestination(destination, "a loopback address must be a workload's or a service's"))
    if ip.is_unspecified or ip.is_multicast:
        return Refused(UnusableDestination(destination, "it is an unspecified or multicast address"))
    rejected = store.rejection(network, ip)
    if rejected is not None:
        why = f"the control plane's description of it could not be read ({rejected.name}: {rejected.reason})"
        return Refused(UnusableDestination(destination, why))
    return Plain(destination)


def _expected(workload: Workload, service: Service | None) -> frozenset[SpiffeId]:
    if service is None or not service.identities:
        return frozenset((workload.identity,))
    return service.identities | {workload.identity}


def _own_address(workload: Workload, service: Service | None, wanted: IpAddress, hint: IpAddress) -> IpAddress | None:
    """The workload's address to use: the wanted one, else one of the hint's family, else any that may be."""
    addresses = workload.addresses
    if wanted in addresses:
        return wanted
    if service is not None:
        addresses = tuple(address for address in addresses if service.ip_families.allows(address))
    for address in addresses:
        if address.version == hint.version:
            return address
    return addresses[0] if addresses else None


def _resolve(
    store: Store,
    workload: Workload,
    service: Service | None,
    hint: IpAddress,
    destination: Address,
    reach: Callable[[IpAddress], Tunnel | Plain],
) -> Resolve | Refused:
    if not workload.hostname or workload.addresses:
        return Refused(NoHealthyUpstream(destination))

    def then(ip: IpAddress) -> Tunnel | Plain | Refused:
        ip = canonical(ip)
        special = ip.is_unspecified or ip.is_multicast or ip.is_link_local or is_loopback(ip)
        if special and store.workload_by_address(workload.network, ip) is None:
            # A name may not lead where an address may not, unless a workload is registered there.
            return Refused(ResolutionFailed(workload.hostname, f"{ip} is no address of the mesh"))
        if service is not None and not service.ip_families.allows(ip):
            return Refused(ResolutionFailed(workload.hostname, f"{ip} is not of the service's address family"))
        return reach(ip)

    return Resolve(workload.hostname, hint, then)


def choose_waypoint(service: Service, rng: random.Random) -> GatewayAddress | None:
    """The waypoint of a service: one of the weighted ones by weight, else the plain one, else None."""
    if service.weighted_waypoints:
        weights = list(accumulate(entry.weight for entry in service.weighted_waypoints))
        if weights[-1]:
            drawn = bisect.bisect_right(weights, rng.random() * weights[-1])
            return service.weighted_waypoints[drawn].destination
    return service.waypoint


def _to_waypoint(
    store: Store,
    source: Workload,
    destination: Address,
    reference: GatewayAddress,
    service: Service | None,
    rng: random.Random,
) -> Route:
    """Through a waypoint. One that cannot be found is never bypassed."""
    place = reference.destination
    waypoint_service: Service | None
    if isinstance(place, NamespacedHostname):
        waypoint_service = store.services.get(str(place))
        workload = store.workload_by_hostname(place.namespace, place.hostname) if waypoint_service is None else None
        hint = destination[0]
    else:
        waypoint_service = store.service_by_vip(place.network, place.ip, source.namespace)
        workload = store.workload_by_address(place.network, place.ip) if waypoint_service is None else None
        hint = place.ip
    port = reference.hbone_mtls_port
    if waypoint_service is not None:
        choice = _choice(store, source, waypoint_service, port, waypoint=True)
        chosen = choice.draw(rng)
        if chosen is None and choice.remote is not None:
            return Refused(RemoteNetwork(destination, choice.remote))
        if chosen is not None:
            workload, port = chosen.workload, chosen.port
    if workload is None:
        return Refused(UnknownWaypoint(str(reference)))
    if workload.network != source.network:
        return Refused(RemoteNetwork(destination, workload.network))
    gateway = workload

    def reach(ip: IpAddress) -> Tunnel:
        expected = _expected(gateway, waypoint_service)
        return Tunnel((ip, port), address_text(destination), expected, gateway, service, waypoint=True)

    ip = _own_address(gateway, waypoint_service, hint, hint)
    if ip is not None:
        return reach(ip)
    return _resolve(store, gateway, waypoint_service, hint, destination, reach)


def _from_waypoint(store: Store, source: Workload, workload: Workload, client_ip: IpAddress | None) -> bool:
    """Whether the connection comes from the destination's own waypoint, and must not go there again."""
    if workload.waypoint is None:
        return False
    return any(
        waypoint.identity == source.identity
        and (waypoint.uid == source.uid if client_ip is None else client_ip in waypoint.addresses)
        for waypoint in resolve_reference(store, workload.waypoint)
    )


def candidates(
    store: Store, source: Workload, service: Service, port: int, *, waypoint: bool = False
) -> list[tuple[Endpoint, Candidate | None, str]]:
    """Every endpoint of a service with what becomes of it: a candidate, or None and the reason.

    Args:
        store: The mesh.
        source: The client's workload.
        service: The service that is asked.
        port: Its port.
        waypoint: The service is a waypoint, whose port need not be declared where its workload takes tunnels itself.
    """
    found: list[tuple[Endpoint, Candidate | None, str]] = []
    for uid, endpoint in store.endpoints(service).items():
        workload = store.workloads.get(uid)
        target = service.ports.get(port)
        tunnel = workload.application_tunnel if workload is not None else None
        if workload is None:
            found.append((endpoint, None, "its workload is not known"))
        elif not workload.capacity:
            found.append((endpoint, None, "its capacity is 0"))
        elif not workload.addresses and not workload.hostname:
            found.append((endpoint, None, "it has neither address nor host name"))
        elif target is None and not (waypoint and tunnel is not None):
            found.append((endpoint, None, f"the service does not declare port {port}"))
        elif target == 0 and port not in endpoint.ports and not waypoint:
            found.append((endpoint, None, f"it has no target port for {port}"))
        elif workload.addresses and not any(map(service.ip_families.allows, workload.addresses)):
            found.append((endpoint, None, f"it has no {service.ip_families.value} address"))
        else:
            mapped = endpoint.ports.get(port) or target or (port if tunnel is not None and tunnel.port else 0)
            if mapped:
                found.append((endpoint, Candidate(endpoint, workload, mapped), ""))
            else:
                found.append((endpoint, None, f"it has no target port for {port}"))
    return found


def _choice(store: Store, source: Workload, service: Service, port: int, *, waypoint: bool) -> _Choice:
    key = (source.uid, service.key, port, waypoint)
    found = store.memo.get(key)
    if found is None:
        found = _choose(store, source, service, port, waypoint=waypoint)
        store.remember(key, found)
    choice: _Choice = found
    return choice


def _choose(store: Store, source: Workload, service: Service, port: int, *, waypoint: bool) -> _Choice:
    usable = [
        candidate
        for _, candidate, _ in candidates(store, source, service, port, waypoint=waypoint)
        if candidate is not None
    ]
    # Other networks need double HBONE, so their endpoints count only where there is nothing nearer.
    near = [candidate for candidate in usable if candidate.workload.network == source.network]
    remote = usable[0].workload.network if usable and not near else None
    if service.load_balancer is not None:
        near = _preferred(source, near, service.load_balancer)
    weights = tuple(accumulate(candidate.workload.capacity for candidate in near))
    return _Choice(tuple(near), weights, remote)


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
