"""A service: virtual addresses and host name in front of endpoints."""

from __future__ import annotations

import enum
from ipaddress import IPv4Address
from typing import TYPE_CHECKING

import attrs

from hbone.errors import IdentityError
from hbone.identity import SpiffeId
from ztunnel.mesh.address import (
    GatewayAddress,
    IpAddress,
    IpNetwork,
    NetworkAddress,
    RejectedResource,
    ip_from_wire,
    prefix_from_wire,
)
from ztunnel.mesh.workload import ports_from_wire

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ztunnel.wire import workload_pb2

__all__ = ["Endpoint", "IpFamilies", "LoadBalancer", "Mode", "Scope", "Service", "WeightedWaypoint"]


class IpFamilies(enum.Enum):
    """Which addresses of its endpoints a service uses."""

    AUTOMATIC = "Automatic"
    IPV4 = "IPv4"
    IPV6 = "IPv6"
    DUAL = "Dual"

    def allows(self, ip: IpAddress) -> bool:
        """Whether an endpoint's address is of these families."""
        if self is IpFamilies.IPV4:
            return ip.version == 4
        if self is IpFamilies.IPV6:
            return ip.version == 6
        return True


class Scope(enum.Enum):
    """What a routing preference compares between the source and an endpoint."""

    REGION = "Region"
    ZONE = "Zone"
    SUBZONE = "Subzone"
    NODE = "Node"
    CLUSTER = "Cluster"
    NETWORK = "Network"


class Mode(enum.Enum):
    """How routing preferences choose among endpoints."""

    STANDARD = "Standard"
    """They do not; every endpoint counts."""
    STRICT = "Strict"
    """Only endpoints that match all of them."""
    FAILOVER = "Failover"
    """Only the endpoints that match best."""
    PASSTHROUGH = "Passthrough"
    """No endpoint is chosen; the original destination is used."""


_SCOPES = dict(enumerate([Scope.REGION, Scope.ZONE, Scope.SUBZONE, Scope.NODE, Scope.CLUSTER, Scope.NETWORK], start=1))
_MODES = dict(enumerate([Mode.STANDARD, Mode.STRICT, Mode.FAILOVER, Mode.PASSTHROUGH]))
_FAMILIES = dict(enumerate([IpFamilies.AUTOMATIC, IpFamilies.IPV4, IpFamilies.IPV6, IpFamilies.DUAL]))


@attrs.frozen(kw_only=True)
class LoadBalancer:
    """Source: istio.workload.LoadBalancing."""

    preferences: tuple[Scope, ...] = ()
    mode: Mode = Mode.STANDARD
    allow_unhealthy: bool = False


@attrs.frozen
class WeightedWaypoint:
    """One of several waypoints that share a service's traffic."""

    destination: GatewayAddress
    weight: int


@attrs.frozen
class Endpoint:
    """A workload as an endpoint of a service."""

    workload_uid: str
    ports: Mapping[int, int]
    """This endpoint's own service port -> target port."""
    healthy: bool = True


@attrs.frozen(kw_only=True)
class Service:
    """A service as the control plane or the local file describes it. Source: istio.workload.Service."""

    name: str
    namespace: str
    hostname: str
    vips: tuple[NetworkAddress, ...] = ()
    cidrs: tuple[tuple[str, IpNetwork], ...] = ()
    """Ranges of virtual addresses, each with its network."""
    ports: Mapping[int, int] = attrs.field(factory=dict)
    """Service port -> target port; 0: each endpoint names its own."""
    subject_alt_names: tuple[str, ...] = ()
    waypoint: GatewayAddress | None = None
    weighted_waypoints: tuple[WeightedWaypoint, ...] = ()
    load_balancer: LoadBalancer | None = None
    ip_families: IpFamilies = IpFamilies.AUTOMATIC
    canonical: bool = False
    namespace_only: bool = False
    """Invisible to clients of other namespaces."""
    endpoints: Mapping[str, Endpoint] = attrs.field(factory=dict)
    """Endpoints given with the service itself, as the local file may do."""
    key: str = attrs.field(init=False, eq=False, repr=False)
    """`namespace/hostname`, the resource's name."""
    identities: frozenset[SpiffeId] = attrs.field(init=False, eq=False, repr=False)
    """Those of `subject_alt_names` that are SPIFFE IDs; an endpoint may prove any of them."""
    wire: bytes = attrs.field(default=b"", eq=False, repr=False)
    """As the control plane sent it; empty when it came from the local file."""

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "key", f"{self.namespace}/{self.hostname}")
        object.__setattr__(self, "identities", frozenset(_identities(self.subject_alt_names)))

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def passthrough(self) -> bool:
        """Whether connections keep their original destination."""
        return self.load_balancer is not None and self.load_balancer.mode is Mode.PASSTHROUGH

    def takes(self, endpoint: Endpoint) -> bool:
        """Whether the endpoint's health lets it in."""
        return endpoint.healthy or (self.load_balancer is not None and self.load_balancer.allow_unhealthy)

    @classmethod
    def from_wire(cls, message: workload_pb2.Service, wire: bytes = b"") -> Service:
        """Read a service as discovery sends it.

        Raises:
            RejectedResource: what cannot be used, with the reason.
        """
        name = f"{message.namespace}/{message.hostname}"
        try:
            return _read(message, wire)
        except ValueError as error:
            raise RejectedResource(name, str(error), addresses=tuple(_vips_that_read(message)), wire=wire) from None


def _identities(names: Iterable[str]) -> Iterable[SpiffeId]:
    for name in names:
        try:
            yield SpiffeId.parse(name)
        except IdentityError:
            continue  # a DNS name or the like; it never widens who is accepted


def _vips_that_read(message: workload_pb2.Service) -> Iterable[tuple[str, IpAddress]]:
    for vip in message.addresses:
        try:
            yield vip.network, ip_from_wire(vip.address, "address")
        except ValueError:
            continue


def _read(message: workload_pb2.Service, wire: bytes) -> Service:
    if not message.hostname:
        raise ValueError("the service has no hostname")
    if message.ip_families not in _FAMILIES:
        raise ValueError(f"ip_families {message.ip_families} is unknown")
    vips: list[NetworkAddress] = []
    cidrs: list[tuple[str, IpNetwork]] = []
    for vip in message.addresses:
        ip = ip_from_wire(vip.address, "address")
        if not vip.HasField("length"):
            vips.append(NetworkAddress(vip.network, ip))
            continue
        network = prefix_from_wire(vip.address, vip.length, "address")
        if network.prefixlen == (32 if isinstance(ip, IPv4Address) else 128):
            vips.append(NetworkAddress(vip.network, ip))
        else:
            cidrs.append((vip.network, network))
    balancer = None
    if message.HasField("load_balancing"):
        balancing = message.load_balancing
        for scope in balancing.routing_preference:
            if scope not in _SCOPES:
                raise ValueError(f"load_balancing.routing_preference {scope} is unknown")
        if balancing.mode not in _MODES:
            raise ValueError(f"load_balancing.mode {balancing.mode} is unknown")
        if balancing.health_policy not in {0, 1}:
            raise ValueError(f"load_balancing.health_policy {balancing.health_policy} is unknown")
        balancer = LoadBalancer(
            preferences=tuple(_SCOPES[scope] for scope in balancing.routing_preference),
            mode=_MODES[balancing.mode],
            allow_unhealthy=balancing.health_policy == 1,
        )
    return Service(
        name=message.name,
        namespace=message.namespace,
        hostname=message.hostname,
        vips=tuple(vips),
        cidrs=tuple(cidrs),
        ports=ports_from_wire(message.ports, "ports"),
        subject_alt_names=tuple(message.subject_alt_names),
        waypoint=GatewayAddress.from_wire(message.waypoint, "waypoint") if message.HasField("waypoint") else None,
        weighted_waypoints=tuple(
            WeightedWaypoint(GatewayAddress.from_wire(entry.destination, "weighted_waypoints"), entry.weight)
            for entry in message.weighted_waypoints
        ),
        load_balancer=balancer,
        ip_families=_FAMILIES[message.ip_families],
        canonical=message.canonical,
        namespace_only=message.visibility == 1,
        wire=wire,
    )
