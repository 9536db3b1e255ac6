"""Connections to the workload through tunnels: 15008.

Each CONNECT: read, placed, registered, asked of the policies, dialled, and only then answered with 200. The dials of a
batch begin when all of it was read, and end with their stream; nothing outlives its tunnel.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from hbone.admission import Admission
from hbone.connect import BadConnect, ConnectRequest, response_headers
from hbone.endpoint import Endpoint
from hbone.errors import ErrorCode, HboneError
from hbone.identity import same_trust_domain
from hbone.tls import TlsContext
from ztunnel.dataplane.connections import InboundConnection
from ztunnel.dataplane.dial import Dial
from ztunnel.dataplane.plan import InboundPlan, baggage_of
from ztunnel.dataplane.relay import ENDS, Relay
from ztunnel.dataplane.restraint import Restraint
from ztunnel.dataplane.sockets import DONTWAIT
from ztunnel.dataplane.tunnel import Tunnel
from ztunnel.dataplane.waitingroom import WaitingRoom
from ztunnel.errors import (
    CertificateRevoked,
    ConnectFailed,
    DataplaneError,
    DiscoveryTooSlow,
    Http2Failed,
    IdentityUnavailable,
    InvalidAuthority,
    PeerRevoked,
    SendFailed,
    TlsFailed,
    TlsSetupFailed,
)
from ztunnel.logs import INBOUND, AccessRecord
from ztunnel.mesh.address import special_address
from ztunnel.mesh.inbound import inbound

if TYPE_CHECKING:
    import socket
    from collections.abc import Hashable

    from hbone.admission import Turn
    from hbone.config import ConnectionConfig
    from hbone.engine.flow import WindowBudget
    from hbone.events import Headers
    from hbone.identity import Identity
    from ztunnel.control.demand import Demand
    from ztunnel.dataplane.dialer import IdentitySource
    from ztunnel.dataplane.plane import Plane
    from ztunnel.dataplane.recall import Recall
    from ztunnel.dataplane.stream import StreamEnd
    from ztunnel.mesh.address import Address, IpAddress
    from ztunnel.mesh.rbac import Decision
    from ztunnel.mesh.store import Change
    from ztunnel.mesh.workload import Workload

__all__ = ["Inbound", "StreamConnection"]

_PLANS: Final = 64  # of one tunnel
_GONE: Final = "the stream was reset: "


class Inbound:
    """Accepts tunnels, and serves their streams.

    Args:
        plane: what the data path shares.
        identities: our certificate.
        config: parameters of HTTP/2.
        budget: what receive windows may grow by, of the process.
        recall: which certificates were taken back.
        transparent: applications see the client's own address.
        admission: handshakes at once, and connections that wait for theirs, in all and by address.
    """

    def __init__(
        self,
        plane: Plane,
        identities: IdentitySource,
        *,
        config: ConnectionConfig,
        budget: WindowBudget,
        recall: Recall,
        transparent: bool = False,
        admission: Admission | None = None,
    ) -> None:
        self.plane = plane
        self.transparent = transparent
        self.tunnels: dict[Tunnel, Address] = {}
        """Each with the local address that it came to."""
        self.draining = False
        self.waiting = 0
        """Connections that wait for our certificate."""
        self._released = False
        self._identities = identities
        self._config = config
        self._budget = budget
        self._recall = recall
        recall.members.append(("destination", lambda: self.tunnels))
        admission = admission or Admission(waiting=1024, waiting_per_address=256)
        self.room = WaitingRoom(plane.reactor, admission, self._begin)
        """Connections that wait for their turn to shake hands."""
        self._shaking: dict[Tunnel, Turn] = {}
        self._restraints: dict[Tunnel, Restraint] = {}
        self._response: tuple[Workload, Headers] | None = None
        self._plans: dict[Tunnel, dict[Hashable, InboundPlan]] = {}
        self.forget_store = plane.store.subscribe(self._forget_plans)
        """Hear of no further change."""

    # Tunnels

    def accepted(self, sock: socket.SocketType, peer: Address) -> None:
        """A connection to 15008."""
        self.room.enter(sock, peer, str(peer[0]))

    def _begin(self, sock: socket.SocketType, peer: Address, turn: Turn) -> None:
        plane = self.plane
        plane.metrics.socket_opened("destination")
        identity = self._identities.current()
        if identity is not None:
            self._shake_hands(sock, peer, turn, identity)
        else:
            try:
                plane.reactor.start_task(self._fetch_and_shake_hands, sock, peer, turn)
            except RuntimeError as exc:
                self._refuse(sock, peer, turn, IdentityUnavailable(str(exc)))

    async def _fetch_and_shake_hands(self, sock: socket.SocketType, peer: Address, turn: Turn) -> None:
        error: DataplaneError = IdentityUnavailable("cancelled")
        identity: Identity | None = None
        self.waiting += 1
        try:
            identity = await self._identities.fetch()
        except Exception as exc:
            error = IdentityUnavailable.because(exc)
        finally:
            self.waiting -= 1
            if identity is None:
                self._refuse(sock, peer, turn, error)
        if identity is not None:
            self._shake_hands(sock, peer, turn, identity)

    def _refuse(self, sock: socket.SocketType, peer: Address, turn: Turn, error: DataplaneError) -> None:
        turn.leave()
        self.plane.metrics.socket_closed("destination")
        self.plane.log.early_deny(INBOUND, peer, self.plane.calls.local_address(sock), error)
        self.plane.reactor.close(sock)

    def _shake_hands(self, sock: socket.SocketType, peer: Address, turn: Turn, identity: Identity) -> None:
        plane = self.plane
        if self.draining and not self._released:
            self._refuse(sock, peer, turn, ConnectFailed("the proxy is stopping"))
            return
        own = identity.svid.id
        try:
            endpoint = Endpoint(
                TlsContext.server(identity, crls=self._recall.lists),
                client=False,
                authorize=lambda peer_id: same_trust_domain(peer_id, own),
                config=self._config,
                budget=self._budget,
                now=plane.reactor.now,
            )
        except HboneError as exc:
            self._refuse(sock, peer, turn, TlsSetupFailed(str(exc)))
            return
        local = plane.calls.local_address(sock)
        tunnel = Tunnel(plane.reactor, plane.calls, sock, endpoint, self, peer, connected=True)
        self.tunnels[tunnel] = local
        self._plans[tunnel] = {}
        self._shaking[tunnel] = turn

    def tunnel_established(self, tunnel: Tunnel) -> None:
        """The peer proved who it is."""
        if not self._recall.allows(tunnel, "destination"):
            return
        self._shaking.pop(tunnel).leave()
        if self.draining:
            tunnel.drain()

    def tunnel_lost(self, tunnel: Tunnel, error: DataplaneError | None) -> None:
        """Its streams were told."""
        local = self.tunnels.pop(tunnel)
        del self._plans[tunnel]
        self._restraints.pop(tunnel, None)
        self.plane.metrics.socket_closed("destination")
        turn = self._shaking.pop(tunnel, None)
        if turn is not None:
            turn.leave()
            if isinstance(error, PeerRevoked):
                self._recall.refused("destination")
            self.plane.log.early_deny(INBOUND, tunnel.address, local, error or TlsFailed("the connection was closed"))

    def tunnel_draining(self, tunnel: Tunnel) -> None:
        """A client's GOAWAY says that it will not take streams of ours, which there are none of."""

    def tunnel_alive(self, tunnel: Tunnel) -> None:
        """A PING was answered."""

    def stream_finished(self, tunnel: Tunnel) -> None:
        """One stream less."""

    def release(self) -> None:
        """Another process accepts from here on: a tunnel that was accepted before is still made, and then drained."""
        self._released = True

    def drain(self) -> None:
        """GOAWAY on each tunnel; open streams go on."""
        self.draining = True
        if not self._released:
            self.room.close()
        for tunnel in list(self.tunnels):
            if tunnel.established or not self._released:
                tunnel.drain()

    def close(self) -> None:
        """Close every tunnel; streams that are open are lost."""
        self.draining, self._released = True, False
        self.room.close()
        self.forget_store()
        for tunnel in list(self.tunnels):
            tunnel.close()

    # Streams

    def connect_received(self, end: StreamEnd, headers: Headers) -> None:
        """A CONNECT."""
        plane = self.plane
        tunnel = end.tunnel
        local = self.tunnels[tunnel]
        try:
            request = ConnectRequest.from_headers(headers)
        except BadConnect as exc:
            end.reject(exc.status)
            plane.log.early_deny(INBOUND, tunnel.address, local, InvalidAuthority(exc.reason))
            return
        workload = plane.local.current
        if workload is not None:
            self._serve(end, request, workload)
        else:
            plane.reactor.start_task(self._wait_and_serve, end, request)

    async def _wait_and_serve(self, end: StreamEnd, request: ConnectRequest) -> None:
        try:
            workload = await self.plane.local.wait()
        except DataplaneError as exc:
            self._deny(end, exc)
        else:
            if not end.closed:
                self._serve(end, request, workload)

    async def _hear_and_serve(
        self, demand: Demand, end: StreamEnd, request: ConnectRequest, workload: Workload, names: list[str]
    ) -> None:
        ip = request.authority.ip
        if ip is None:
            await demand.hear_of(*names)
        else:
            with contextlib.suppress(DiscoveryTooSlow):  # then it is refused as what nobody knows
                await demand.learn(ip, workload.namespace)
        if not end.closed:
            self._serve(end, request, workload, heard=True)

    def _deny(self, end: StreamEnd, error: DataplaneError) -> None:
        end.reject(error.status)
        tunnel = end.tunnel
        self.plane.log.early_deny(INBOUND, tunnel.address, self.tunnels.get(tunnel), error)

    def _serve(self, end: StreamEnd, request: ConnectRequest, workload: Workload, *, heard: bool = False) -> None:
        demand = self.plane.demand
        if demand is not None and not heard:
            names = _unheard(demand, request, workload, self.tunnels[end.tunnel][0])
            if names:
                self.plane.reactor.start_task(self._hear_and_serve, demand, end, request, workload, names)
                return
        plans = self._plans[end.tunnel]
        key = (request.authority, request.baggage, request.forwarded_host, request.network)
        plan = plans.get(key)
        if plan is None or plan.workload is not workload:
            made = self._plan(end.tunnel, request, workload)
            if isinstance(made, DataplaneError):
                self._deny(end, made)
                return
            plan = made
            if len(plans) >= _PLANS:
                plans.clear()
            plans[key] = plan
        StreamConnection(self, plan, end).begin()

    def _plan(self, tunnel: Tunnel, request: ConnectRequest, workload: Workload) -> InboundPlan | DataplaneError:
        plane = self.plane
        config = plane.config
        local = self.tunnels[tunnel]
        target = inbound(
            plane.store,
            workload,
            local[0],
            request,
            plane.own_ports,
            network=config.network,
            localhost_tunnel=config.localhost_app_tunnel,
        )
        if isinstance(target, DataplaneError):
            return target
        peer = tunnel.peer
        if plane.demand is not None:
            plane.demand.wonder(tunnel.address[0])
        if peer is None:  # it cannot be: streams come after the handshake
            return IdentityUnavailable("the peer proved no identity")
        return InboundPlan(plane, workload, tunnel, local, peer, request, target)

    def _forget_plans(self, _: Change) -> None:
        for plans in self._plans.values():
            plans.clear()

    def dial_wasted(self, tunnel: Tunnel) -> None:
        """The peer reset a stream that had carried nothing to the application."""
        now = self.plane.reactor.now
        restraint = self._restraints.get(tunnel)
        if restraint is None:
            restraint = self._restraints[tunnel] = Restraint(now)
        restraint.wasted(now)

    def dial_waits(self, tunnel: Tunnel) -> float:
        """Seconds until a stream of `tunnel` is dialled for."""
        restraint = self._restraints.get(tunnel)
        return 0.0 if restraint is None else restraint.wait(self.plane.reactor.now)

    def response_for(self, workload: Workload) -> Headers:
        """Headers of the 200: what we say of the workload, unless that is switched off."""
        if not self.plane.config.response_baggage:
            return ()
        if self._response is None or self._response[0] is not workload:
            self._response = (workload, response_headers(baggage_of(workload)))
        return self._response[1]


def _unheard(demand: Demand, request: ConnectRequest, workload: Workload, local_ip: IpAddress) -> list[str]:
    """What nobody has told of yet: a service of the workload, by host name, or whose waypoint the workload may be."""
    authority = request.authority
    if authority.ip is None:
        return [key for key in workload.services if key.partition("/")[2] == authority.host and demand.is_news(key)]
    if authority.ip == local_ip or workload.application_tunnel is not None or special_address(authority.ip) is not None:
        return []
    return demand.missing(authority.ip, workload.namespace)


class StreamConnection(InboundConnection):
    """One stream of a tunnel, and the connection to the application."""

    __slots__ = ("_dial", "_end", "_inbound", "_plan")

    def __init__(self, inbound_: Inbound, plan: InboundPlan, end: StreamEnd) -> None:
        super().__init__(inbound_.plane, plan.workload, plan.facts)
        self._inbound = inbound_
        self._plan = plan
        self._end = end
        self._dial: Dial | None = None

    def begin(self) -> None:
        """Record, register, ask, dial: in this order."""
        plane, plan, end = self.plane, self._plan, self._end
        end.user = self
        plane.connections.register(self)
        self.open_record(AccessRecord(plan.parties, plan.client, plane.reactor.now), plan.traffic)
        error = self.check()
        if error is not None:
            end.reject(error.status)
            self.close_record(error)
            return
        target = plan.target
        source_ip = target.source or (end.tunnel.address[0] if self._inbound.transparent else None)
        self._dial = Dial(plane.reactor, plane.calls, self)
        wait = self._inbound.dial_waits(end.tunnel)
        if wait:
            self._dial.start_in(wait, target.connect, source_ip, local=True)
        else:
            self._dial.start(target.connect, source_ip, local=True)

    def decide(self) -> Decision:
        """What the policies say: to all streams of one plan the same."""
        return self._plan.decide(self.plane.store)

    def dialed(self, sock: socket.SocketType, mask: int, *, watched: bool) -> None:
        """The application is there: 200, and relay."""
        self._dial = None
        plane, end = self.plane, self._end
        if self._plan.header and not self._send_header(sock):
            plane.reactor.close(sock)
            self.dial_failed(ConnectFailed("the application did not take the PROXY header"))
            return
        relay = self.relay = Relay(plane.reactor, plane.calls, sock, self)
        end.accept(self._inbound.response_for(self.workload), relay)
        relay.start(end, watched=watched, mask=mask)

    def _send_header(self, sock: socket.SocketType) -> bool:
        try:
            return sock.send(self._plan.header, DONTWAIT) == len(self._plan.header)  # a new socket has room for it
        except OSError:
            return False

    def dial_failed(self, error: DataplaneError) -> None:
        """503."""
        self._dial = None
        self._end.reject(error.status)
        self.close_record(error)

    def on_fault(self) -> None:
        """A fault of ours."""
        self._cut(Http2Failed("internal error"), ErrorCode.INTERNAL_ERROR)

    def stream_accepted(self, headers: Headers) -> None:
        """Only a client hears that."""

    def stream_refused(self, status: int) -> None:
        """Only a client hears that."""

    def stream_reset(self, code: ErrorCode, *, processed: bool) -> None:
        """The client gave up."""
        if self.relay is None or not self.relay.written:
            self._inbound.dial_wasted(self._end.tunnel)
        error = None if code in ENDS else SendFailed(_GONE + code.name)
        if self.relay is not None:
            self.relay.end_after_reset(code, error)
        else:
            self._give_up(error)

    def stream_lost(self, error: DataplaneError) -> None:
        """The tunnel ended, and nothing outlives it."""
        lost = error if isinstance(error, CertificateRevoked) else SendFailed(str(error))
        if self.relay is not None:
            self.relay.end_after_reset(ErrorCode.INTERNAL_ERROR, lost)
        else:
            self._give_up(lost)

    def abort(self, error: DataplaneError) -> None:
        """Cut it."""
        self._cut(error, ErrorCode.CONNECT_ERROR)

    def _cut(self, error: DataplaneError, code: ErrorCode) -> None:
        if self.relay is not None and not self.relay.closed:
            self.relay.abort(error, code=code)
        else:
            self._end.reset(code)
            self._give_up(error)

    def _give_up(self, error: DataplaneError | None) -> None:
        if self._dial is not None:
            self._dial.cancel()
            self._dial = None
        self.close_record(error)

    def relay_ended(self, relay: Relay, error: DataplaneError | None) -> None:
        """The application's connection is over."""
        self.close_record(error)

    def bytes_moved(self) -> tuple[int, int]:
        """Written to the application, read from it."""
        relay = self.relay
        return (relay.written, relay.read) if relay is not None else (0, 0)
