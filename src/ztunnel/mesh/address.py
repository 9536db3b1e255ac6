"""Addresses of the mesh: IPs, networks, and references to waypoints and gateways."""

from __future__ import annotations

import functools
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from ztunnel.wire import workload_pb2

__all__ = [
    "Address",
    "GatewayAddress",
    "IpAddress",
    "IpNetwork",
    "NamespacedHostname",
    "NetworkAddress",
    "RejectedResource",
    "canonical",
    "ip_from_wire",
    "is_loopback",
    "parse_ip",
    "port_from_wire",
    "prefix_from_wire",
    "special_address",
]

IpAddress = IPv4Address | IPv6Address
IpNetwork = IPv4Network | IPv6Network
Address = tuple[IpAddress, int]
"""An IP and a port."""

_V6_BITS = 128


class RejectedResource(Exception):
    """A resource of the control plane that cannot be used; the others of the push stay valid.

    Attributes:
        name: Name of the resource.
        reason: What is wrong with it, for the NACK.
        addresses: (network, IP) pairs that the resource claims, as far as they could be read.
        namespace: Namespace that a policy rules, "" for the whole mesh; None when the resource is no policy,
            has no effect (dry run), or rules only the workloads that name it.
        wire: The resource as it came.
    """

    def __init__(
        self,
        name: str,
        reason: str,
        *,
        addresses: tuple[tuple[str, IpAddress], ...] = (),
        namespace: str | None = None,
        enforced: bool = True,
        wire: bytes = b"",
    ) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason
        self.addresses = addresses
        self.namespace = namespace
        self.enforced = enforced
        self.wire = wire


def canonical(ip: IpAddress) -> IpAddress:
    """`ip` with an IPv4-mapped IPv6 address turned into IPv4."""
    if ip.version == 6:
        mapped = ip.ipv4_mapped
        if mapped is not None:
            return mapped
    return ip


@functools.lru_cache(maxsize=8192)
def parse_ip(text: str) -> IpAddress:
    """The address of `text`; IPv4-mapped becomes IPv4, and an IPv6 scope is cut off. Cached: called per connection.

    Raises:
        ValueError: no IP address.
    """
    return canonical(ip_address(text.partition("%")[0]))


def is_loopback(ip: IpAddress) -> bool:
    """Whether `ip` is of 127.0.0.0/8 or ::1; the standard property costs ten times as much."""
    return int(ip) >> 24 == 127 if ip.version == 4 else int(ip) == 1


@functools.lru_cache(maxsize=4096)
def special_address(ip: IpAddress) -> str | None:
    """Why `ip` is no address that a peer may have us connect to, or None when it is an ordinary one."""
    if is_loopback(ip):
        return "it is a loopback address"
    if ip.is_unspecified or (ip.version == 4 and int(ip) >> 24 == 0):
        return "it is the unspecified address"
    if ip.is_multicast or int(ip) == 0xFFFFFFFF:
        return "it is a multicast or broadcast address"
    if ip.is_link_local:
        return "it is a link-local address"
    if ip.version == 6 and ip.ipv4_mapped is not None:
        return "it is an IPv4-mapped address"
    return None


def ip_from_wire(data: bytes, what: str) -> IpAddress:
    """The address of 4 or 16 bytes.

    Raises:
        ValueError: another length, naming `what`.
    """
    if len(data) == 4:
        return IPv4Address(data)
    if len(data) == 16:
        return canonical(IPv6Address(data))
    raise ValueError(f"{what} has {len(data)} bytes; an IP address has 4 or 16")


def prefix_from_wire(data: bytes, length: int, what: str) -> IpNetwork:
    """The network of an address and a prefix length; host bits beyond it are ignored.

    Raises:
        ValueError: a wrong number of bytes, or too long a prefix.
    """
    if len(data) not in {4, 16}:
        raise ValueError(f"{what} has {len(data)} bytes; an IP address has 4 or 16")
    bits = len(data) * 8
    if length > bits:
        raise ValueError(f"{what} has prefix length {length}; at most {bits} is possible")
    if bits == 32:
        return IPv4Network((data, length), strict=False)
    network = IPv6Network((data, length), strict=False)
    mapped = network.network_address.ipv4_mapped
    if mapped is not None and length >= _V6_BITS - 32:
        return IPv4Network((mapped, length - (_V6_BITS - 32)), strict=False)  # peers are compared as plain IPv4
    return network


def port_from_wire(port: int, what: str) -> int:
    """`port`, checked.

    Raises:
        ValueError: over 65535. (ztunnel keeps the low 16 bits, which names another port.)
    """
    if port > 65_535:
        raise ValueError(f"{what} is {port}; a port is at most 65535")
    return port


@attrs.frozen
class NetworkAddress:
    """An IP in one network. Source: istio.workload.NetworkAddress."""

    network: str
    ip: IpAddress

    def __str__(self) -> str:
        return f"{self.network}/{self.ip}"


@attrs.frozen
class NamespacedHostname:
    """A host name in one namespace: a service's, or a workload's. Source: istio.workload.NamespacedHostname."""

    namespace: str
    hostname: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.hostname}"


@attrs.frozen
class GatewayAddress:
    """Where a waypoint or a network's gateway is. Source: istio.workload.GatewayAddress."""

    destination: NetworkAddress | NamespacedHostname
    hbone_mtls_port: int

    def __str__(self) -> str:
        return f"{self.destination}:{self.hbone_mtls_port}"

    @classmethod
    def from_wire(cls, message: workload_pb2.GatewayAddress, what: str) -> GatewayAddress:
        """Read a reference.

        Raises:
            ValueError: no destination, a wrong address or a wrong port.
        """
        port = port_from_wire(message.hbone_mtls_port, f"{what}.hbone_mtls_port")
        kind = message.WhichOneof("destination")
        if kind == "address":
            ip = ip_from_wire(message.address.address, f"{what}.address")
            return cls(NetworkAddress(message.address.network, ip), port)
        if kind == "hostname":
            return cls(NamespacedHostname(message.hostname.namespace, message.hostname.hostname), port)
        raise ValueError(f"{what} has no destination; it needs an address or a hostname")
