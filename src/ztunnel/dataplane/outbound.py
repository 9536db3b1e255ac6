"""Connections of the workload to others: 15001, and what SOCKS5 asks for.

In the common case the whole way from `accept` to the CONNECT frame is one callback: the workload is known, the route
is chosen, and a tunnel stands. A Trio task is started only to wait for the control plane or for a name.
"""

from __future__ import annotations

import random
import socket
from typing import TYPE_CHECKING, Any, Final

import trio
from hbone.connect import Authority, Baggage, ConnectRequest

from hbone.errors import ErrorCode, LocalProtocolError
from hbone.pool import PoolKey
from ztunnel.dataplane.connections import AppConnection
from ztunnel.dataplane.dial import Dial
from ztunnel.dataplane.reactor import GONE, READ_WRITE
from ztunnel.dataplane.relay import ENDS, Relay, join
from ztunnel.dataplane.sockets import text_of
from ztunnel.errors import (
    ConnectFailed,
    DataplaneError,
    Http2Failed,
    ReceiveFailed,
    ResolutionFailed,
    TunnelRejected,
    address_text,
)
from ztunnel.logs import OUTBOUND, AccessRecord
from ztunnel.mesh.address import parse_ip
from ztunnel.mesh.route import Plain, Refused, Resolve, Tunnel, route

if TYPE_CHECKING:
    from collections.abc import Callable

    from hbone.events import Headers
    from ztunnel.dataplane.connections import Plane
    from ztunnel.dataplane.dialer import Dialer
    from ztunnel.dataplane.tunnel import StreamEnd
    from ztunnel.dataplane.tunnel import Tunnel as LiveTunnel
    from ztunnel.mesh.address import Address, IpAddress
    from ztunnel.mesh.workload import Workload

__all__ = ["Outbound", "OutboundConnection", "resolve"]

_RESOLVE_SECONDS: Final = 5.0
_WATCH_AFTER: Final = 0.5  # seconds without an answer after which the app's own reset is watched for
_ANSWER_SECONDS: Final = 20.0  # dial, certificate and CONNECT together; the far side has 10 s to reach its application
_TRIES: Final = 3
_GONE_FAR: Final = "the stream was reset: "


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


class Outbound:
    """Takes captured connections to where they go.

    Args:
        plane: what the data path shares.
        dialer: tunnels to other proxies.
    """

    def __init__(self, plane: Plane, dialer: Dialer) -> None:
        self.plane = plane
        self.dialer = dialer
        self.pending: dict[OutboundConnection, None] = {}
        """Not answered yet, the oldest first."""
        self._keys: dict[tuple[Workload, Tunnel], PoolKey] = {}
        self._random = random.Random(random.SystemRandom().getrandbits(128))
        self._baggage: tuple[Workload, Baggage] | None = None

    def accepted(self, sock: socket.SocketType, peer: Address) -> None:
        """A connection to 15001."""
        self.begin(sock, peer, self.plane.calls.original_destination(sock, peer[0]))

    def begin(
        self,
        sock: socket.SocketType,
        peer: Address,
        destination: Address,
        *,
        answer: Callable[[DataplaneError | None], None] | None = None,
    ) -> None:
        """Take a connection to `destination`.

        Args:
            sock: accepted, and not watched; closed when it is over.
            peer: its other end.
            destination: where it was going.
            answer: called once before the relaying starts, or with the error before `sock` is closed.
        """
        plane = self.plane
        plane.metrics.socket_opened("source")
        connection = OutboundConnection(self, sock, peer, destination, answer)
        workload = plane.local.current
        if workload is not None:
            connection.go(workload)
        else:
            plane.reactor.start_task(connection.wait_for_workload)

    def key_for(self, source: Workload, found: Tunnel) -> PoolKey:
        """The pool's key for a route."""
        ip, port = found.next_hop
        return PoolKey(source.identity, (text_of(ip), port), found.expected)

    def headers_for(self, connection: OutboundConnection, found: Tunnel) -> Headers:
        """The CONNECT request. Source: ztunnel's headers."""
        source = connection.source
        if self._baggage is None or self._baggage[0] is not source:
            self._baggage = (source, baggage_of(source))
        trace = self._random.getrandbits(192)
        return ConnectRequest(
            authority=Authority.parse(found.authority),
            baggage=self._baggage[1],
            forwarded_for=address_text(connection.peer),
            forwarded_host=found.service.hostname if found.service is not None else None,
            traceparent=f"00-{trace >> 64:032x}-{trace & (2**64 - 1):016x}-00",
            network=None,
        ).to_headers()

    def on_time(self, now: float) -> None:
        """Connections that wait for their answer for long."""
        for connection in list(self.pending):
            waited = now - connection.started
            if waited < _WATCH_AFTER:
                break
            if waited >= _ANSWER_SECONDS:
                connection.fail(ConnectFailed(f"timed out after {_ANSWER_SECONDS:g} s"))
            else:
                connection.watch()
        if not self.pending:
            self.plane.reactor.unsweep(self)


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


class OutboundConnection(AppConnection):
    """One app connection on its way out."""

    __slots__ = (
        "_answer",
        "_dial",
        "_end",
        "_far",
        "_outbound",
        "_route",
        "_sock",
        "_tries",
        "_watched",
        "destination",
        "key",
        "peer",
        "source",
        "started",
        "waiting",
    )

    def __init__(
        self,
        outbound: Outbound,
        sock: socket.SocketType,
        peer: Address,
        destination: Address,
        answer: Callable[[DataplaneError | None], None] | None,
    ) -> None:
        super().__init__(outbound.plane, "source")
        self.peer = peer
        self.destination = destination
        self.started = outbound.plane.reactor.now
        self.waiting = False
        self.key: PoolKey
        self.source: Workload
        self._outbound = outbound
        self._sock = sock
        self._answer = answer
        self._route: Tunnel | Plain | None = None
        self._end: StreamEnd | None = None
        self._far: Relay | None = None
        self._dial: Dial | None = None
        self._watched = False
        self._tries = 0
        if not outbound.pending:
            outbound.plane.reactor.sweep(outbound)
        outbound.pending[self] = None

    # Where to

    async def wait_for_workload(self) -> None:
        """The control plane has not told of our own workload yet."""
        try:
            workload = await self.plane.local.wait()
        except DataplaneError as exc:
            self.fail(exc)
        else:
            if not self.closed:
                self.go(workload)

    def go(self, source: Workload) -> None:
        """Choose the route, and take it."""
        plane = self.plane
        self.source = source
        found = route(
            plane.store,
            source,
            self.destination,
            network=plane.config.network,
            own_ports=plane.own_ports,
            own_addresses=plane.own_addresses,
            client_ip=self.peer[0],
            hbone_port=plane.hbone_port,
        )
        if isinstance(found, Resolve):
            plane.reactor.start_task(self._resolve, found)
        else:
            self._take(found)

    async def _resolve(self, found: Resolve) -> None:
        try:
            ip = await resolve(found.hostname, found.hint)
        except DataplaneError as exc:
            self.fail(exc)
            return
        finally:
            self.plane.metrics.on_demand_dns(self.source, found.hostname)
        if not self.closed:
            self._take(found.then(ip))

    def _take(self, found: Tunnel | Plain | Refused) -> None:
        if isinstance(found, Refused):
            self.fail(found.error)
            return
        self._route = found
        self._open(found)
        if isinstance(found, Tunnel):
            self.key = self._outbound.key_for(self.source, found)
            self._outbound.dialer.checkout(self)
        else:
            self._dial = Dial(self.plane.reactor, self.plane.calls, self)
            self._dial.start(found.address)

    def _open(self, found: Tunnel | Plain) -> None:
        plane = self.plane
        tunnel = isinstance(found, Tunnel)
        source, workload = self.source, found.workload
        record = AccessRecord(
            OUTBOUND,
            self.peer,
            found.next_hop if isinstance(found, Tunnel) else found.address,
            hbone_authority=found.authority if isinstance(found, Tunnel) else None,
            source_workload=source,
            source_identity=source.identity if tunnel else None,
            destination_workload=workload,
            destination_identity=workload.identity if tunnel and workload is not None else None,
            service=found.service,
            opened_at=self.started,
        )
        traffic = plane.metrics.connection(
            "source",
            source,
            source.identity if tunnel else None,
            workload,
            found.service,
            None,
            "mutual_tls" if tunnel else "unknown",
        )
        plane.connections.outbound[self] = None
        self.open_record(record, traffic)

    # Through a tunnel

    def tunnel_ready(self, tunnel: LiveTunnel) -> None:
        """Ask for a stream."""
        found = self._route
        assert isinstance(found, Tunnel)
        relay = self.relay
        if relay is None:
            plane = self.plane
            relay = self.relay = Relay(plane.reactor, plane.calls, self._sock, self)
        self._tries += 1
        try:
            self._end = tunnel.connect(self._outbound.headers_for(self, found), self, relay)
        except LocalProtocolError as exc:
            if self._tries < _TRIES:
                self.plane.reactor.later(self._again)
            else:
                self.fail(Http2Failed(str(exc)))
            return
        self._outbound.dialer.opened(tunnel)

    def _again(self) -> None:
        if not self.closed:
            self._outbound.dialer.checkout(self)

    def tunnel_failed(self, error: DataplaneError) -> None:
        """There is no tunnel."""
        self.fail(error)

    def stream_accepted(self, headers: Headers) -> None:
        """200: relay."""
        end, relay = self._end, self.relay
        assert end is not None
        assert relay is not None
        self._connected()
        relay.start(end, watched=self._watched)

    def stream_refused(self, status: int) -> None:
        """The other proxy, or its policy, does not want it."""
        self._end = None
        self.fail(TunnelRejected(status))

    def stream_reset(self, code: ErrorCode, *, processed: bool) -> None:
        """Before the 200 it may be retried; after it, it is the relay's."""
        relay = self.relay
        if self in self._outbound.pending:
            self._end = None
            if not processed and self._tries < _TRIES:
                self.plane.reactor.later(self._again)
            else:
                self.fail(Http2Failed(_GONE_FAR + code.name))
        elif relay is not None:
            error = None if code in ENDS else ReceiveFailed(_GONE_FAR + code.name)
            relay.end_after_reset(code, error)

    def stream_lost(self, error: DataplaneError) -> None:
        """The tunnel ended."""
        self._end = None
        if self in self._outbound.pending:
            self.fail(error)
        elif self.relay is not None:
            self.relay.end_after_reset(ErrorCode.INTERNAL_ERROR, ReceiveFailed(str(error)))

    # In plaintext

    def dialed(self, sock: socket.SocketType, mask: int, *, watched: bool) -> None:
        """Relay."""
        self._dial = None
        plane = self.plane
        near = self.relay = Relay(plane.reactor, plane.calls, self._sock, self)
        far = self._far = Relay(plane.reactor, plane.calls, sock, self)
        self._connected()
        if self._watched:
            plane.reactor.remove(self._sock.fileno())
        join(near, far, watched=watched)

    def dial_failed(self, error: DataplaneError) -> None:
        """Not connected."""
        self.fail(error)

    # Until it is connected

    def _connected(self) -> None:
        self._outbound.pending.pop(self, None)
        answer, self._answer = self._answer, None
        if answer is not None:
            answer(None)

    def watch(self) -> None:
        """The answer takes long: notice when the app gives up."""
        if not self._watched and not self.closed:
            self._watched = True
            self.plane.reactor.add(self._sock.fileno(), self, READ_WRITE)

    def on_event(self, mask: int) -> None:
        """Only a reset counts: what else the app does waits until it is connected."""
        if mask & GONE:
            self.fail(None)

    def on_fault(self) -> None:
        """A fault of ours."""
        self.fail(ConnectFailed("internal error"))

    def fail(self, error: DataplaneError | None) -> None:
        """It does not come about; the app's connection is closed."""
        if self.closed:
            return
        self._outbound.pending.pop(self, None)
        self.waiting = False
        if self._dial is not None:
            self._dial.cancel()
        if self._end is not None:
            self._end.reset(ErrorCode.CANCEL)
        if self.relay is not None and self.relay.closed:
            return
        answer, self._answer = self._answer, None
        if answer is not None and error is not None:
            answer(error)
        if self.relay is not None:
            self.relay.closed = True
        self.plane.reactor.close(self._sock)
        self._over(error)

    def abort(self, error: DataplaneError) -> None:
        """Cut it."""
        if self in self._outbound.pending:
            self.fail(error)
        elif self.relay is not None:
            self.relay.abort(error)

    def relay_ended(self, relay: Relay, error: DataplaneError | None) -> None:
        """The app's connection is over; of plain TCP both."""
        if self._far is not None and self.relay is not None and not (self._far.closed and self.relay.closed):
            return
        self._over(error)

    def _over(self, error: DataplaneError | None) -> None:
        if not self.closed:
            self.plane.metrics.socket_closed(self.reporter)
            if self.record is None:
                self.closed = True
                if error is not None:
                    self.plane.log.early_deny(OUTBOUND, self.peer, self.destination, error)
            else:
                self.close_record(error)

    def bytes_moved(self) -> tuple[int, int]:
        """Read from the app, written to the app."""
        relay = self.relay
        return (relay.read, relay.written) if relay is not None else (0, 0)

    def dump(self) -> dict[str, Any]:
        """With where the app wanted to go."""
        return {**super().dump(), "originalDst": address_text(self.destination)}
