"""A workload: something with an identity that traffic goes to or comes from."""

from __future__ import annotations

import enum
import functools
from sys import intern
from typing import TYPE_CHECKING

import attrs

from hbone.errors import IdentityError
from hbone.identity import SpiffeId
from ztunnel.mesh.address import GatewayAddress, IpAddress, RejectedResource, ip_from_wire, port_from_wire
from ztunnel.wire import workload_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["ApplicationTunnel", "Locality", "Protocol", "Workload", "ports_from_wire"]

_TYPES = {0: "deployment", 1: "cronjob", 2: "pod", 3: "job"}
_STATUS = {0: True, 1: False}
_MODES = {0: False, 1: True}


class Protocol(enum.StrEnum):
    """How a workload is reached."""

    TCP = "TCP"
    """In plaintext."""
    HBONE = "HBONE"
    """Through a tunnel, always."""


@attrs.frozen
class Locality:
    """Where a workload runs, from coarse to fine."""

    region: str = ""
    zone: str = ""
    subzone: str = ""


@attrs.frozen
class ApplicationTunnel:
    """The application behind the workload takes tunnelled connections itself, as a waypoint does."""

    proxy: bool
    """It expects a PROXY protocol header first."""
    port: int = 0
    """The port it listens on; 0: the port that was asked for."""


@attrs.frozen(kw_only=True)
class Workload:
    """A workload as the control plane or the local file describes it. Source: istio.workload.Workload."""

    uid: str
    name: str = ""
    namespace: str = ""
    addresses: tuple[IpAddress, ...] = ()
    hostname: str = ""
    """Resolved when a connection needs it, if there are no addresses."""
    network: str = ""
    protocol: Protocol = Protocol.TCP
    trust_domain: str = "cluster.local"
    service_account: str = "default"
    waypoint: GatewayAddress | None = None
    network_gateway: GatewayAddress | None = None
    node: str = ""
    canonical_name: str = ""
    canonical_revision: str = ""
    workload_type: str = "deployment"
    workload_name: str = ""
    native_tunnel: bool = False
    application_tunnel: ApplicationTunnel | None = None
    services: Mapping[str, Mapping[int, int]] = attrs.field(factory=dict)
    """`namespace/hostname` of a service to this endpoint's own service port -> target port."""
    authorization_policies: tuple[str, ...] = ()
    healthy: bool = True
    cluster_id: str = "Kubernetes"
    locality: Locality = Locality()
    host_network: bool = False
    """It shares its node's address, and is therefore not looked up by address."""
    capacity: int = 1
    """Weight among the endpoints of a service; 0: never chosen."""
    identity: SpiffeId = attrs.field(init=False, eq=False, repr=False)
    """What it must prove in TLS."""
    wire: bytes = attrs.field(default=b"", eq=False, repr=False)
    """As the control plane sent it; empty when it came from the local file."""

    def __attrs_post_init__(self) -> None:
        identity = _identity(self.trust_domain, self.namespace, self.service_account)
        object.__setattr__(self, "identity", identity)

    def __hash__(self) -> int:
        return hash(self.uid)  # the fields are many, and connections look counters up by workload

    @property
    def rank(self) -> int:
        """Which of several workloads that claim one address wins: the highest. Source: ztunnel."""
        return 2 * ("//Pod/" in self.uid) + (self.protocol is Protocol.HBONE)

    @classmethod
    def from_wire(cls, message: workload_pb2.Workload, wire: bytes = b"") -> Workload:
        """Read a workload as discovery sends it.

        Raises:
            RejectedResource: what cannot be used, with the reason.
        """
        try:
            return _read(message, wire)
        except (ValueError, IdentityError) as error:
            addresses = tuple(_addresses_that_read(message.network, message.addresses))
            raise RejectedResource(message.uid, str(error), addresses=addresses, wire=wire) from None


def _addresses_that_read(network: str, addresses: Iterable[bytes]) -> Iterable[tuple[str, IpAddress]]:
    for data in addresses:
        try:
            yield network, ip_from_wire(data, "address")
        except ValueError:
            continue


def ports_from_wire(ports: Iterable[workload_pb2.Port], what: str) -> Mapping[int, int]:
    """Service port -> target port; of duplicates the last wins.

    Raises:
        ValueError: a port over 65535.
    """
    return _port_map(tuple([(port.service_port, port.target_port) for port in ports]), what)


# Many workloads have these in common, so they are made once. Nobody changes them.


@functools.lru_cache(4096)
def _port_map(ports: tuple[tuple[int, int], ...], what: str) -> dict[int, int]:
    return {
        port_from_wire(port, f"{what}: service port"): port_from_wire(target, f"{what}: target port")
        for port, target in ports
    }


@functools.lru_cache(65_536)  # more than the accounts of a large mesh: one that thrashes makes each workload its own
def _identity(trust_domain: str, namespace: str, service_account: str) -> SpiffeId:
    return SpiffeId.istio(trust_domain, namespace, service_account)


@functools.lru_cache(256)
def _locality(region: str, zone: str, subzone: str) -> Locality:
    return Locality(intern(region), intern(zone), intern(subzone))


def _read(message: workload_pb2.Workload, wire: bytes) -> Workload:
    if not message.uid:
        raise ValueError("the workload has no uid, and could never be removed")
    if message.tunnel_protocol not in {workload_pb2.NONE, workload_pb2.HBONE}:
        raise ValueError(f"tunnel_protocol {message.tunnel_protocol} is not supported; use NONE or HBONE")
    if message.status not in _STATUS:
        raise ValueError(f"status {message.status} is unknown")
    if message.network_mode not in _MODES:
        raise ValueError(f"network_mode {message.network_mode} is unknown")
    services: dict[str, Mapping[int, int]] = {}
    for key, ports in message.services.items():
        if "/" not in key:
            raise ValueError(f"service {key!r} is not of the form namespace/hostname")
        services[intern(key)] = ports_from_wire(ports.ports, "services")
    tunnel = None
    if message.HasField("application_tunnel"):
        if message.application_tunnel.protocol not in {0, 1}:
            raise ValueError(f"application_tunnel.protocol {message.application_tunnel.protocol} is unknown")
        tunnel = ApplicationTunnel(
            proxy=message.application_tunnel.protocol == 1,
            port=port_from_wire(message.application_tunnel.port, "application_tunnel.port"),
        )
    locality = message.locality
    return Workload(
        uid=message.uid,
        name=message.name,
        namespace=intern(message.namespace),
        addresses=tuple(ip_from_wire(data, "address") for data in message.addresses),
        hostname=message.hostname,
        network=intern(message.network),
        protocol=Protocol.HBONE if message.tunnel_protocol == workload_pb2.HBONE else Protocol.TCP,
        trust_domain=intern(message.trust_domain or "cluster.local"),
        service_account=intern(message.service_account or "default"),
        waypoint=GatewayAddress.from_wire(message.waypoint, "waypoint") if message.HasField("waypoint") else None,
        network_gateway=(
            GatewayAddress.from_wire(message.network_gateway, "network_gateway")
            if message.HasField("network_gateway")
            else None
        ),
        node=intern(message.node),
        canonical_name=intern(message.canonical_name),
        canonical_revision=intern(message.canonical_revision),
        workload_type=_TYPES.get(message.workload_type, "deployment"),
        workload_name=intern(message.workload_name),
        native_tunnel=message.native_tunnel,
        application_tunnel=tunnel,
        services=services,
        authorization_policies=tuple(map(intern, message.authorization_policies)),
        healthy=_STATUS[message.status],
        cluster_id=intern(message.cluster_id or "Kubernetes"),
        locality=_locality(locality.region, locality.zone, locality.subzone),
        host_network=_MODES[message.network_mode],
        capacity=message.capacity.value if message.HasField("capacity") else 1,
        wire=wire,
    )
