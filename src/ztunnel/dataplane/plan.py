"""What the connections of one route have in common, and names to addresses."""

from __future__ import annotations

import random
import socket
from typing import TYPE_CHECKING, Final

import trio

from hbone.connect import Authority, Baggage, ConnectRequest
from hbone.pool import PoolKey
from ztunnel.dataplane.sockets import text_of
from ztunnel.errors import ResolutionFailed
from ztunnel.mesh.address import parse_ip
from ztunnel.mesh.route import Plain, Tunnel

if TYPE_CHECKING:
    from hbone.events import Headers
    from ztunnel.dataplane.connections import Plane
    from ztunnel.mesh.address import IpAddress
    from ztunnel.mesh.workload import Workload

__all__ = ["Plan", "baggage_of", "resolve"]

_RESOLVE_SECONDS: Final = 5.0


class Plan:
    """What the connections of one route have in common; made once, and forgotten when the mesh changes."""

    __slots__ = ("forwarded", "headers", "key", "route", "traffic")

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
