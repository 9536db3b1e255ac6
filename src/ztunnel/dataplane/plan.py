"""What the connections of one route have in common, and names to addresses."""

from __future__ import annotations

import random
import socket
from typing import TYPE_CHECKING, Final

import trio

from hbone.connect import Authority, Baggage, ConnectRequest
from hbone.pool import PoolKey
from ztunnel.dataplane.sockets import text_of
from ztunnel.errors import ResolutionFailed, address_text
from ztunnel.logs import INBOUND, OUTBOUND, Parties
from ztunnel.mesh.address import parse_ip
from ztunnel.mesh.inbound import proxy_header
from ztunnel.mesh.rbac import Connection as PolicyFacts
from ztunnel.mesh.route import Plain, Tunnel

if TYPE_CHECKING:
    from hbone.events import Headers
    from hbone.identity import SpiffeId
    from ztunnel.dataplane.connections import Plane
    from ztunnel.dataplane.tunnel import Tunnel as LiveTunnel
    from ztunnel.mesh.address import Address, IpAddress
    from ztunnel.mesh.inbound import InboundTarget
    from ztunnel.mesh.workload import Workload

__all__ = ["InboundPlan", "Plan", "baggage_of", "resolve"]

_RESOLVE_SECONDS: Final = 5.0


class Plan:
    """What the connections of one route have in common; made once, and forgotten when the mesh changes."""

    __slots__ = ("forwarded", "headers", "key", "parties", "route", "traffic")

    def __init__(self, plane: Plane, source: Workload, found: Tunnel | Plain) -> None:
        self.route = found
        tunnel = isinstance(found, Tunnel)
        self.traffic = plane.metrics.connection(
            "source",
            source,
            source.identity if tunnel else None,
            found.workload,
            found.service,
            None,
            "mutual_tls" if tunnel else "unknown",
        )
        self.parties = Parties(
            OUTBOUND,
            found.next_hop if isinstance(found, Tunnel) else found.address,
            hbone_authority=found.authority if isinstance(found, Tunnel) else None,
            source_workload=source,
            source_identity=source.identity if tunnel else None,
            destination_workload=found.workload,
            destination_identity=found.workload.identity if isinstance(found, Tunnel) else None,
            service=found.service,
        )
        self.key: PoolKey | None = None
        self.headers: Headers = ()
        self.forwarded = b""
        if isinstance(found, Tunnel):
            ip, port = found.next_hop
            self.key = PoolKey(source.identity, (text_of(ip), port), found.expected)
            service = found.service
            fields = ConnectRequest(
                authority=Authority.parse(found.authority),
                baggage=baggage_of(source),
                forwarded_host=service.hostname if service is not None else None,
            ).to_headers()
            self.headers = tuple(field for field in fields if field[0] != b"forwarded")
            self.forwarded = b"".join(b";" + value for name, value in fields if name == b"forwarded")


class InboundPlan:
    """What the streams of one tunnel that ask for the same have in common; forgotten when the mesh changes.

    Policies are asked for each stream all the same.
    """

    __slots__ = ("client", "facts", "header", "parties", "target", "traffic", "workload")

    def __init__(
        self,
        plane: Plane,
        workload: Workload,
        tunnel: LiveTunnel,
        local: Address,
        peer: SpiffeId,
        request: ConnectRequest,
        target: InboundTarget,
    ) -> None:
        client = tunnel.address
        source = plane.store.workload_by_address(plane.config.network, client[0])
        baggage = request.baggage if plane.config.response_baggage else None
        self.client = address_text(client)
        self.workload = workload
        self.target = target
        self.facts = PolicyFacts(client[0], peer, target.address)
        self.header = b"" if target.proxy_target is None else proxy_header(client, target.proxy_target, peer)
        self.parties = Parties(
            INBOUND,
            local,
            hbone_authority=str(request.authority),
            source_workload=source,
            source_identity=peer,
            destination_workload=workload,
            destination_identity=workload.identity,
            service=target.service,
            source_baggage=baggage,
        )
        self.traffic = plane.metrics.connection(
            "destination",
            source,
            peer,
            workload,
            target.service,
            None,
            "mutual_tls",
            baggage if source is None else None,
        )


def baggage_of(workload: Workload) -> Baggage:
    """What we say of a workload. Source: ztunnel's baggage."""
    return Baggage(
        cluster=workload.cluster_id or None,
        namespace=workload.namespace or None,
        workload_type=workload.workload_type or None,
        workload_name=workload.workload_name or None,
        service_name=workload.canonical_name or None,
        service_version=workload.canonical_revision or None,
        region=workload.locality.region or None,
        zone=workload.locality.zone or None,
    )


async def resolve(hostname: str, hint: IpAddress) -> IpAddress:
    """An address of a name, by the system's resolver; one of the hint's family if there is any.

    Raises:
        ResolutionFailed: none within five seconds.
    """
    found: list[IpAddress] = []
    with trio.move_on_after(_RESOLVE_SECONDS) as scope:
        try:
            for entry in await trio.socket.getaddrinfo(hostname, None, type=socket.SOCK_STREAM):
                found.append(parse_ip(str(entry[4][0])))
        except (OSError, UnicodeError) as exc:
            raise ResolutionFailed(hostname, str(exc)) from exc
    if scope.cancelled_caught:
        raise ResolutionFailed(hostname, f"no answer within {_RESOLVE_SECONDS:g} s")
    if not found:
        raise ResolutionFailed(hostname)
    return random.choice([ip for ip in found if ip.version == hint.version] or found)
