"""Source and original destination -> Route. Source: Istio, ztunnel's outbound decisions.

What is known as HBONE is reached through a tunnel or not at all; every doubt ends in `Refused`. What is on another
network is reached through a tunnel in a tunnel: the outer one ends at the network's gateway, the inner one behind it.
"""

from __future__ import annotations

import bisect
import random
from itertools import accumulate
from typing import TYPE_CHECKING

import attrs

from hbone.connect import Authority, AuthorityError
from ztunnel.errors import (
    DataplaneError,
    NoHealthyUpstream,
    NoService,
    RemoteNetwork,
    ResolutionFailed,
    SelfCall,
    UnknownGateway,
    UnknownWaypoint,
    UnusableDestination,
    address_text,
)
from ztunnel.mesh.address import NetworkAddress, canonical, is_loopback
from ztunnel.mesh.endpoints import Purpose, choose, look_up, resolve_reference
from ztunnel.mesh.workload import Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from hbone.identity import SpiffeId
    from ztunnel.mesh.address import Address, GatewayAddress, IpAddress
    from ztunnel.mesh.endpoints import Candidate
    from ztunnel.mesh.service import Service
    from ztunnel.mesh.store import Store
    from ztunnel.mesh.workload import Workload

__all__ = [
    "HBONE_PORT",
    "Inner",
    "Place",
    "Plain",
    "Refused",
    "Resolve",
    "Route",
    "Tunnel",
    "choose_waypoint",
    "find_place",
    "find_service",
    "route",
]

HBONE_PORT = 15_008
"""Where every peer takes tunnels."""


@attrs.frozen
class Inner:
    """A second tunnel, inside a stream of the one to a gateway. Both ask for the same. Source: Istio, double HBONE."""

    expected: frozenset[SpiffeId]
    """Whoever answers behind the gateway must prove one of these."""
    workload: Workload
    """What was chosen, and stands for what is there; the gateway chooses who answers."""


@attrs.frozen
class Tunnel:
    """Through an HBONE tunnel."""

    next_hop: Address
    authority: str
    """`:authority` of the CONNECT."""
    expected: frozenset[SpiffeId]
    """The next hop must prove one of these."""
    workload: Workload
    """The next hop: the destination itself, its waypoint, or the gateway of its network."""
    service: Service | None
    waypoint: bool = False
    inner: Inner | None = None
    """To another network: the tunnel that the gateway hands on."""


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
            return _to_waypoint(store, source, destination, reference, addressed, addressed, rng)

    # From here on services come first, as in ztunnel: an address may be both.
    service = find_service(store, source, destination, addressed, network)
    chosen: Candidate | None = None
    if service is not None and not service.passthrough:
        choice = choose(store, source, service, port)
        chosen = choice.draw(rng)
        if chosen is None and choice.beyond is not None:
            return Refused(RemoteNetwork(destination, choice.beyond.network))
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
        return _to_gateway(store, source, destination, workload, service, addressed, rng)
    if addressed is None and workload.waypoint is not None and not _from_waypoint(store, source, workload, client_ip):
        return _to_waypoint(store, source, destination, workload.waypoint, service, addressed, rng)

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


@attrs.frozen
class Place:
    """What a reference to a waypoint or gateway leads to."""

    workload: Workload
    port: int
    service: Service | None
    hint: IpAddress
    """An address of the family that is preferred."""


def find_place(
    store: Store, source: Workload, reference: GatewayAddress, hint: IpAddress, rng: random.Random, purpose: Purpose
) -> Place | Workload | None:
    """Where a waypoint or gateway is: a service comes before a workload, as in ztunnel.

    Args:
        store: The mesh.
        source: The client's workload.
        reference: By address or host name.
        hint: An address of the family that is preferred; an address in the reference goes before it.
        rng: Draws among endpoints.
        purpose: Waypoint or gateway.

    Returns:
        The place; a workload on another network that no gateway leads to; or None when there is nothing.
    """
    to = reference.destination
    port = reference.hbone_mtls_port
    if isinstance(to, NetworkAddress):
        hint = to.ip
    service, workload = look_up(store, reference, source.namespace)
    if service is not None:
        choice = choose(store, source, service, port, purpose)
        chosen: Candidate | None = choice.draw(rng)
        if chosen is None:
            return choice.beyond
        workload, port = chosen.workload, chosen.port
    return None if workload is None else Place(workload, port, service, hint)


def _to_waypoint(
    store: Store,
    source: Workload,
    destination: Address,
    reference: GatewayAddress,
    service: Service | None,
    addressed: Service | None,
    rng: random.Random,
) -> Route:
    """Through a waypoint. One that cannot be found is never bypassed."""
    found = find_place(store, source, reference, destination[0], rng, Purpose.WAYPOINT)
    if found is None:
        return Refused(UnknownWaypoint(str(reference)))
    if not isinstance(found, Place):
        return Refused(RemoteNetwork(destination, found.network))
    if found.workload.network != source.network:
        return _to_gateway(store, source, destination, found.workload, found.service, addressed, rng)
    expected = _expected(found.workload, found.service)
    authority = address_text(destination)

    def reach(ip: IpAddress) -> Tunnel:
        return Tunnel((ip, found.port), authority, expected, found.workload, service, waypoint=True)

    return _reach_place(store, found, destination, reach)


def _to_gateway(
    store: Store,
    source: Workload,
    destination: Address,
    upstream: Workload,
    upstream_service: Service | None,
    addressed: Service | None,
    rng: random.Random,
) -> Route:
    """To another network: through a tunnel to its gateway, in which there is one to whom that chooses for a service."""
    if addressed is None:
        return Refused(NoService(destination))
    reference = upstream.network_gateway
    if reference is None:
        return Refused(RemoteNetwork(destination, upstream.network))
    found = find_place(store, source, reference, destination[0], rng, Purpose.GATEWAY)
    if not isinstance(found, Place):
        return Refused(UnknownGateway(str(reference), str(reference.destination)))
    try:
        authority = str(Authority(addressed.hostname.lower(), destination[1]))
    except AuthorityError as error:
        return Refused(UnusableDestination(destination, f"its service can't be asked for by name: {error}"))
    inner = Inner(_behind_gateway(store, upstream, upstream_service), upstream)
    if not inner.expected:
        return Refused(UnusableDestination(destination, f"no identity is known of it on network {upstream.network!r}"))
    expected = _expected(found.workload, found.service)

    def reach(ip: IpAddress) -> Tunnel:
        return Tunnel((ip, found.port), authority, expected, found.workload, addressed, inner=inner)

    return _reach_place(store, found, destination, reach)


def _behind_gateway(store: Store, upstream: Workload, service: Service | None) -> frozenset[SpiffeId]:
    """Who may answer behind a gateway: any endpoint of the service there, of which only some may be known one by one.

    A workload without address or host name stands for several, and what it says of its own identity means nobody.
    """
    if service is None:
        return frozenset((upstream.identity,)) if upstream.addresses or upstream.hostname else frozenset()
    key = ("behind", service.key, upstream.network)
    found: frozenset[SpiffeId] | None = store.memo.get(key)
    if found is None:
        there = map(store.workloads.get, store.endpoints(service))
        found = service.identities | {
            workload.identity
            for workload in there
            if workload is not None
            and workload.network == upstream.network
            and (workload.addresses or workload.hostname)
        }
        store.remember(key, found)
    return found


def _reach_place(store: Store, place: Place, destination: Address, reach: Callable[[IpAddress], Tunnel]) -> Route:
    ip = _own_address(place.workload, place.service, place.hint, place.hint)
    if ip is not None:
        return reach(ip)
    return _resolve(store, place.workload, place.service, place.hint, destination, reach)


def _from_waypoint(store: Store, source: Workload, workload: Workload, client_ip: IpAddress | None) -> bool:
    """Whether the connection comes from the destination's own waypoint, and must not go there again."""
    if workload.waypoint is None:
        return False
    return any(
        waypoint.identity == source.identity
        and (waypoint.uid == source.uid if client_ip is None else client_ip in waypoint.addresses)
        for waypoint in resolve_reference(store, workload.waypoint)
    )
