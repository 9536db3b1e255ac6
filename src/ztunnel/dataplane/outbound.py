"""Connections of the workload to others: 15001, and what SOCKS5 asks for.

In the common case the whole way from `accept` to the CONNECT frame is one callback: the workload is known, the route
is chosen, and a tunnel stands. A Trio task is started only to wait for the control plane or for a name.

A long file, because each step of a connection's way may fail, be tried again, or find it gone.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, Final

from hbone.errors import ErrorCode, LocalProtocolError
from ztunnel.dataplane.connections import AppConnection
from ztunnel.dataplane.dial import Dial
from ztunnel.dataplane.inner import InnerDial
from ztunnel.dataplane.names import Names, lookup_for
from ztunnel.dataplane.plan import GatewayPlan, Plan, plan_of
from ztunnel.dataplane.reactor import GONE, READ_WRITE
from ztunnel.dataplane.relay import ENDS, Relay, join
from ztunnel.errors import (
    CertificateRevoked,
    ConnectFailed,
    DataplaneError,
    Http2Failed,
    ReceiveFailed,
    TunnelRejected,
    UnknownGateway,
    address_text,
)
from ztunnel.logs import OUTBOUND, AccessRecord
from ztunnel.mesh.route import Plain, Refused, Resolve, Tunnel, route

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Hashable

    from hbone.events import Headers
    from hbone.pool import PoolKey
    from ztunnel.control.demand import Demand
    from ztunnel.dataplane.dialer import Dialer
    from ztunnel.dataplane.inner import InnerTunnels
    from ztunnel.dataplane.plane import Plane
    from ztunnel.dataplane.stream import StreamEnd
    from ztunnel.dataplane.tunnel import Tunnel as LiveTunnel
    from ztunnel.mesh.address import Address, IpAddress
    from ztunnel.mesh.store import Change
    from ztunnel.mesh.workload import Workload

__all__ = ["Outbound", "OutboundConnection"]

_WATCH_AFTER: Final = 0.5  # seconds without an answer after which the app's own reset is watched for
_ANSWER_SECONDS: Final = 20.0  # dial, certificate and CONNECT together; the far side has 10 s to reach its application
_TRIES: Final = 3
_PLANS: Final = 4096
_GONE_FAR: Final = "the stream was reset: "


class Outbound:
    """Takes captured connections to where they go.

    Args:
        plane: what the data path shares.
        dialer: tunnels to other proxies.
        inner: tunnels to other networks, inside those to their gateways.
    """

    def __init__(self, plane: Plane, dialer: Dialer, inner: InnerTunnels) -> None:
        self.plane = plane
        self.dialer = dialer
        self.inner = inner
        self.names = Names(plane.reactor.clock, ipv6=plane.config.ipv6_enabled, lookup=lookup_for(plane.config))
        """Workloads that are known by host name."""
        self.pending: dict[OutboundConnection, None] = {}
        """Not answered yet, the oldest first."""
        self._random = random.Random(random.SystemRandom().getrandbits(128))
        self._plans: dict[Hashable, Plan] = {}
        self._direct: dict[Address, Plan] = {}
        self.close = plane.store.subscribe(self._forget_plans)
        """Forget the store."""

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

    def plan_for(self, source: Workload, destination: Address, client: IpAddress) -> Plan | Refused | Resolve:
        """Where a connection goes, with what its kind has in common."""
        plan = self._direct.get(destination)
        if plan is not None:
            return plan
        plane = self.plane
        found = route(
            plane.store,
            source,
            destination,
            network=plane.config.network,
            own_ports=plane.own_ports,
            own_addresses=plane.own_addresses,
            client_ip=client,
            hbone_port=plane.hbone_port,
        )
        if isinstance(found, Refused | Resolve):
            return found
        plan = self.plan_of(source, found)
        workload = found.workload
        if (
            workload is not None
            and workload.waypoint is None
            and found.service is None
            and destination[0] in workload.addresses
        ):
            # Straight to a workload by its own address: nothing was drawn, so every connection goes there.
            if len(self._direct) >= _PLANS:
                self._direct.clear()
            self._direct[destination] = plan
        return plan

    def plan_of(self, source: Workload, found: Tunnel | Plain) -> Plan:
        """What connections of a route have in common."""
        key: Hashable = found
        if isinstance(found, Tunnel):
            key = (found.next_hop, found.authority, found.expected, found.workload, found.service, found.inner)
        plan = self._plans.get(key)
        if plan is None:
            plan = plan_of(self.plane, source, found)
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    def _forget_plans(self, _: Change) -> None:
        self._plans.clear()
        self._direct.clear()

    def headers_for(self, record: AccessRecord, plan: Plan) -> Headers:
        """The CONNECT request. Source: ztunnel's headers."""
        ids = self._random.getrandbits(192).to_bytes(24, "big").hex()
        return (
            *plan.headers,
            (b"forwarded", b'for="%s"%s' % (record.source.encode(), plan.forwarded)),
            (b"traceparent", f"00-{ids[:32]}-{ids[32:]}-00".encode()),
        )

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


class OutboundConnection(AppConnection):
    """One app connection on its way out."""

    __slots__ = (
        "_answer",
        "_dial",
        "_end",
        "_far",
        "_outbound",
        "_plan",
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
        self._plan: Plan | None = None
        self._end: StreamEnd | None = None
        self._far: Relay | None = None
        self._dial: Dial | InnerDial | None = None
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
        self.source = source
        demand = self.plane.demand
        if demand is not None and demand.missing(self.destination[0], source.namespace):
            self.plane.reactor.start_task(self._learn, demand)
        else:
            self._go(source)

    async def _learn(self, demand: Demand, *further: str) -> None:
        """Ask the control plane what the destination is."""
        try:
            await demand.learn(self.destination[0], self.source.namespace, *further)
        except DataplaneError as exc:
            self.fail(exc)
        else:
            if not self.closed:
                self._go(self.source)

    def _go(self, source: Workload) -> None:
        found = self._outbound.plan_for(source, self.destination, self.peer[0])
        if isinstance(found, Plan):
            self._take(found)
        elif isinstance(found, Refused):
            error, demand = found.error, self.plane.demand
            if demand is not None and isinstance(error, UnknownGateway) and demand.is_news(error.name):
                self.plane.reactor.start_task(self._learn, demand, error.name)
            else:
                self.fail(error)
        else:
            self.plane.reactor.start_task(self._resolve, found)

    async def _resolve(self, found: Resolve) -> None:
        store = self.plane.store
        generation = store.generation
        try:
            ip = await self._outbound.names.resolve(found.hostname, found.hint)
        except DataplaneError as exc:
            self.fail(exc)
            return
        finally:
            self.plane.metrics.on_demand_dns(self.source, found.hostname)
        if self.closed:
            return
        if store.generation != generation:
            self._go(self.source)  # what was plaintext may be in the mesh by now; the name is remembered
            return
        then = found.then(ip)
        if isinstance(then, Refused):
            self.fail(then.error)
        else:
            self._take(self._outbound.plan_of(self.source, then))

    def _take(self, plan: Plan) -> None:
        plane = self.plane
        self._plan = plan
        found = plan.route
        plane.connections.outbound[self] = None
        record = AccessRecord(plan.parties, address_text(self.peer), self.started)
        if isinstance(plan, GatewayPlan):
            self.record = record  # counted when it is known who answers, or that nobody does
            self._ask()
            return
        self.open_record(record, plan.traffic)
        if isinstance(found, Tunnel):
            assert plan.key is not None
            self.key = plan.key
            self._outbound.dialer.checkout(self)
        else:
            self._dial = Dial(plane.reactor, plane.calls, self)
            self._dial.start(found.address)

    # Through a tunnel

    def _ask(self) -> None:
        """For a tunnel."""
        plan, record, outbound = self._plan, self.record, self._outbound
        if not isinstance(plan, GatewayPlan):
            outbound.dialer.checkout(self)
            return
        assert record is not None
        assert plan.key is not None
        dial = InnerDial(outbound.inner, self, plan.key, plan.inner.expected, outbound.headers_for(record, plan))
        self._dial = dial
        dial.start()

    def tunnel_ready(self, tunnel: LiveTunnel) -> None:
        """Ask for a stream."""
        plan, record = self._plan, self.record
        assert plan is not None
        assert record is not None
        relay = self.relay
        if relay is None:
            plane = self.plane
            relay = self.relay = Relay(plane.reactor, plane.calls, self._sock, self)
            if self._answer is not None:  # what a server says first may come together with the 200
                relay.hold()
        self._tries += 1
        dial = self._dial
        if isinstance(dial, InnerDial):
            self._dial = None
            headers = (*dial.headers, *plan.network)
        else:
            headers = self._outbound.headers_for(record, plan)
        try:
            self._end = tunnel.connect(headers, self, relay)
        except LocalProtocolError as exc:
            if self._tries < _TRIES:
                self.plane.reactor.later(self._again)
            else:
                self.fail(Http2Failed(str(exc)))
            return
        self._outbound.dialer.opened(tunnel)

    def _again(self) -> None:
        if not self.closed:
            self._ask()

    def tunnel_failed(self, error: DataplaneError) -> None:
        """There is no tunnel."""
        self.fail(error)

    def stream_accepted(self, headers: Headers) -> None:
        """200: relay."""
        end, relay, record = self._end, self.relay, self.record
        assert end is not None
        assert relay is not None
        plan = self._plan
        if isinstance(plan, GatewayPlan) and record is not None:
            parties, traffic = plan.answered(end.tunnel.peer, headers)
            self.open_record(AccessRecord(parties, record.source, record.opened_at), traffic)
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
            lost = error if isinstance(error, CertificateRevoked) else ReceiveFailed(str(error))
            self.relay.end_after_reset(ErrorCode.INTERNAL_ERROR, lost)

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
            if self.relay.written:  # one read brought the 200, bytes and the tunnel's end: what was cut must show
                self.plane.calls.reset_on_close(self._sock)
        self.plane.reactor.close(self._sock)
        self._over(error)
        self.relay = None  # it refers to us, and was never started

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
            if self.traffic is None and self.record is not None and self._plan is not None:
                self.open_record(self.record, self._plan.traffic)
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
        found = {**(super().dump() or {}), "originalDst": address_text(self.destination)}
        if isinstance(self._plan, GatewayPlan):
            found["protocol"] = "DOUBLEHBONE"
        return found
