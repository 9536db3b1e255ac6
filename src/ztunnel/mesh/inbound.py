"""CONNECT on 15008 -> what to connect to. Source: Istio, ztunnel's validation of the destination.

The address connected to is always the one that the tunnel arrived on (or this host's loopback, where the
workload asks for it): no authority makes us dial anyone else.
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING

import attrs

from ztunnel.errors import AddressMismatch, DataplaneError, NoService, SelfCall, UnusableDestination
from ztunnel.mesh.address import special_address
from ztunnel.mesh.endpoints import resolve_reference

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from hbone.connect import ConnectRequest
    from hbone.identity import SpiffeId
    from ztunnel.mesh.address import Address, GatewayAddress, IpAddress
    from ztunnel.mesh.service import Service
    from ztunnel.mesh.store import Store
    from ztunnel.mesh.workload import Workload

__all__ = ["InboundTarget", "guess_service", "inbound", "proxy_header"]

_LOOPBACK: dict[int, IpAddress] = {4: IPv4Address("127.0.0.1"), 6: IPv6Address("::1")}


@attrs.frozen
class InboundTarget:
    """Where an accepted CONNECT leads."""

    address: Address
    """The destination that policies are asked about."""
    connect: Address
    """What to connect to: `address`, or loopback for an application that takes PROXY headers there."""
    source: IpAddress | None = None
    """Source address to bind, when it must be loopback too."""
    service: Service | None = None
    """The service meant, as far as it can be told; for telemetry."""
    proxy_target: Address | None = None
    """Destination to write in a PROXY header before the payload; None: no header."""


def inbound(
    store: Store,
    workload: Workload,
    local_ip: IpAddress,
    request: ConnectRequest,
    own_ports: Collection[int],
    *,
    network: str = "",
    localhost_tunnel: bool = True,
) -> InboundTarget | DataplaneError:
    """What a CONNECT to this proxy's workload may reach. Called once per stream.

    Args:
        store: The mesh.
        workload: The workload that this proxy serves.
        local_ip: Address that the tunnel arrived on.
        request: The CONNECT.
        own_ports: Ports of this proxy's own listeners; none can be reached.
        network: The network of this node.
        localhost_tunnel: An application that takes PROXY headers is reached on loopback.

    Returns:
        The target, or the error to answer with.
    """
    authority = request.authority
    ip, port = authority.ip, authority.port
    tunnel = workload.application_tunnel
    service: Service | None = None

    if ip is not None:
        refused = _validate(store, workload, local_ip, (ip, port), network)
        if refused is not None:
            return refused
    else:
        service = store.service_by_host(authority.host, workload.namespace)
        if service is None:
            return NoService(f"{authority.host}:{port}")
        endpoint = store.endpoints(service).get(workload.uid)
        target = (endpoint.ports.get(port) if endpoint is not None else 0) or service.ports.get(port, 0)
        if not target:
            return NoService(f"{authority.host}:{port}")
        if special_address(local_ip) is not None and local_ip not in workload.addresses:
            return AddressMismatch(local_ip, local_ip)
        port = target

    if port in own_ports:
        return SelfCall()
    if tunnel is not None and tunnel.port:
        port = tunnel.port
        if port in own_ports:
            return SelfCall()
    address = (local_ip, port)

    if service is None:
        service = guess_service(store, workload, port, request.forwarded_host)
    if tunnel is None or not tunnel.proxy:
        return InboundTarget(address, address, None, service)

    proxy_target = (ip, authority.port) if ip is not None else _vip(service, authority.port, network)
    if proxy_target is None:
        return NoService(f"{authority.host}:{authority.port}")
    if not localhost_tunnel:
        return InboundTarget(address, address, None, service, proxy_target)
    loopback = _LOOPBACK[local_ip.version]
    return InboundTarget(address, (loopback, port), loopback, service, proxy_target)


def _validate(
    store: Store, workload: Workload, local_ip: IpAddress, asked: Address, network: str
) -> DataplaneError | None:
    """Whether an authority by address is the workload's business."""
    ip = asked[0]
    why = special_address(ip)
    if why is not None and ip not in workload.addresses:
        return UnusableDestination(asked, why)
    if ip == local_ip or workload.application_tunnel is not None or _serves(store, workload, local_ip, ip, network):
        return None
    return AddressMismatch(ip, local_ip)


def _serves(store: Store, workload: Workload, local_ip: IpAddress, ip: IpAddress, network: str) -> bool:
    """Whether the workload is the waypoint of whoever owns `ip`."""
    owner = store.workload_by_address(network, ip) or store.service_by_vip(network, ip)
    reference: GatewayAddress | None = owner.waypoint if owner is not None else None
    if reference is None:
        return False
    return any(
        found.uid == workload.uid or local_ip in found.addresses for found in resolve_reference(store, reference)
    )


def guess_service(store: Store, workload: Workload, port: int, forwarded_host: str | None = None) -> Service | None:
    """The service that a connection probably meant, for metrics and logs; never for authorization.

    Args:
        store: The mesh.
        workload: The destination.
        port: Port on it.
        forwarded_host: Host that the client's proxy names in `forwarded`.
    """
    keys: Iterable[str] = workload.services
    if forwarded_host:
        for key in keys:
            if key.partition("/")[2] == forwarded_host and key in store.services:
                return store.services[key]
        named = store.service_by_host(forwarded_host, workload.namespace)
        if named is not None:
            return named
    for key in keys:
        service = store.services.get(key)
        if service is None:
            continue
        own = workload.services[key]
        for service_port, target in service.ports.items():
            if target == port or own.get(service_port) == port:
                return service
    return None


def _vip(service: Service | None, port: int, network: str) -> Address | None:
    """An address that stands for a host name in a PROXY header: of this network and IPv4 first."""
    if service is None or not service.vips:
        return None
    best = min(service.vips, key=lambda vip: (vip.network != network, vip.ip.version))
    return best.ip, port


_SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
_IDENTITY = 0xD0


def proxy_header(client: Address, target: Address, identity: SpiffeId | None) -> bytes:
    """A PROXY protocol v2 header, with the client's identity as a TLV of type 0xD0.

    Source: PROXY protocol 2.2; Istio's use of it between ztunnel and waypoint.
    """
    if client[0].version != target[0].version:
        family, addresses = 0x01, b""
    else:
        family = 0x11 if client[0].version == 4 else 0x21
        addresses = client[0].packed + target[0].packed + struct.pack("!HH", client[1], target[1])
    tlv = b""
    if identity is not None:
        text = str(identity).encode()
        tlv = struct.pack("!BH", _IDENTITY, len(text)) + text
    return _SIGNATURE + struct.pack("!BBH", 0x21, family, len(addresses) + len(tlv)) + addresses + tlv
