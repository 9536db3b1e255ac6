"""Tunnels inside tunnels: what leads to another network, through its gateway. Source: Istio, double HBONE.

```text
app ─ relay ─ stream ─ InnerTunnel: TLS and HTTP/2 of its own ─ stream of a pooled Tunnel ─ socket ─ gateway ─ far host
```

An inner tunnel is a tunnel whose socket is a stream: what OpenSSL wrote is the payload of that stream, as much of it as
both of its windows take, and the payload that comes is what OpenSSL reads. It runs in the callbacks of the outer one.

There is one for each connection, because a gateway chooses whom it hands a stream to: were they shared, all connections
would go to one endpoint. The gateway sees neither names nor bytes of what is inside.

A long file, because tunnel, carrier and dial end each other, whichever ends first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol, cast

from hbone.endpoint import Endpoint
from hbone.errors import ErrorCode, HboneError, LocalProtocolError
from hbone.tls import TlsContext
from ztunnel.dataplane.packets import burst_of
from ztunnel.dataplane.relay import CHUNK, HEADROOM, READ_BUFFER
from ztunnel.dataplane.tunnel import Tunnel
from ztunnel.errors import (
    ConnectFailed,
    DataplaneError,
    GatewayRefused,
    Http2Failed,
    IdentityUnavailable,
    PeerRevoked,
    TlsFailed,
    TlsSetupFailed,
    address_text,
    unexpected_peer,
)

if TYPE_CHECKING:
    import socket

    from hbone.config import ConnectionConfig
    from hbone.engine.flow import WindowBudget
    from hbone.events import Headers
    from hbone.identity import Identity, SpiffeId
    from hbone.pool import PoolKey
    from ztunnel.dataplane.dialer import Dialer, IdentitySource
    from ztunnel.dataplane.reactor import Reactor, Timer
    from ztunnel.dataplane.recall import Recall
    from ztunnel.dataplane.sockets import SocketCalls
    from ztunnel.dataplane.stream import StreamEnd
    from ztunnel.dataplane.tunnel import TunnelOwner
    from ztunnel.mesh.address import Address

__all__ = ["InnerDial", "InnerTunnel", "InnerTunnels", "InnerUser"]

_BODY: Final = READ_BUFFER.tail(HEADROOM)
_TRIES: Final = 3
_FAREWELL_SECONDS: Final = 5.0  # that the gateway has to end its direction of a stream that we ended


class _Carrier:
    """The stream that an inner tunnel has for its socket. Closing it ends the stream, in time and not by force."""

    __slots__ = ("cut", "end", "reactor", "timer")

    def __init__(self, reactor: Reactor) -> None:
        self.reactor = reactor
        self.end: StreamEnd | None = None
        self.cut = False
        """Not all was sent, so the stream must not look complete."""
        self.timer: Timer | None = None

    def fileno(self) -> int:
        return -1

    def recv_into(self, buffer: object, nbytes: int = 0, flags: int = 0, /) -> int:
        raise BlockingIOError

    def close(self) -> None:
        self.reactor.later(self._let_go)  # this turn's flushes are over

    def _let_go(self) -> None:
        end = self.end
        if end is None or end.closed:
            return
        if self.cut:
            end.reset(ErrorCode.CANCEL)
            return
        end.end()
        if not end.closed:
            self.timer = self.reactor.call_at(self.reactor.now + _FAREWELL_SECONDS, self._give_up)

    def _give_up(self) -> None:
        if self.end is not None:
            self.end.reset(ErrorCode.CANCEL)

    def over(self) -> None:
        """The stream is."""
        if self.timer is not None:
            self.timer.cancel()


class _Intake:
    """Decrypts when the turn ends: never while the outer tunnel is in the middle of a frame, or a relay of a read."""

    __slots__ = ("tunnel",)

    def __init__(self, tunnel: InnerTunnel) -> None:
        self.tunnel = tunnel

    def flush(self) -> None:
        self.tunnel.receive()

    def on_fault(self) -> None:
        self.tunnel.on_fault()


class InnerTunnel(Tunnel):
    """A tunnel inside a stream of another: the client's end.

    Args:
        reactor: moves the bytes.
        calls: the socket calls; none is made.
        endpoint: its TLS and HTTP/2.
        owner: told what happens.
        address: the gateway.
    """

    __slots__ = ("_arrived", "_carrier", "_ended_there", "_intake", "_reset")

    def __init__(
        self, reactor: Reactor, calls: SocketCalls, endpoint: Endpoint, owner: TunnelOwner, address: Address
    ) -> None:
        self._carrier = _Carrier(reactor)
        self._intake = _Intake(self)
        self._arrived = False  # ciphertext waits to be decrypted
        self._ended_there = False  # no more of it comes
        self._reset: DataplaneError | None = None  # and this is why
        sock = cast("socket.SocketType", self._carrier)
        super().__init__(reactor, calls, sock, endpoint, owner, address, connected=False)

    def _watch(self) -> None:
        """The outer tunnel's callbacks are ours."""

    def open(self, outer: Tunnel, headers: Headers) -> None:
        """Ask for the stream to be in. The handshake begins when the gateway has answered 200.

        Raises:
            LocalProtocolError: the outer tunnel takes no further stream.
        """
        self._carrier.end = outer.connect(headers, self, self)

    def _best_burst(self) -> int:
        end = self._carrier.end
        return CHUNK if end is None else burst_of(end.tunnel.burst)  # what is encrypted twice leaves in one packet, too

    # Into the stream

    def flush(self) -> None:
        """Encrypt what is queued, and send as much as the stream takes."""
        self.dirty = False
        self._send()

    def _send(self) -> bool:
        """Returns whether anything was sent."""
        end, endpoint = self._carrier.end, self.endpoint
        if end is None or self.blocked or self.closed or not self.connected:
            return False
        sent = False
        while endpoint.wants_flush:
            room = end.room()
            if not room:
                self.blocked = True
                break
            # OpenSSL writes where a relay would have read to, and the stream puts its header in front.
            _BODY.size = room
            nbytes = endpoint.data_to_send_into(_BODY)
            if not nbytes:
                break
            end.take(nbytes)
            sent = True
        return sent

    def resume(self) -> bool:
        """The stream has room again. Returns whether anything was there for it."""
        if not self.blocked or self.closed:
            return False
        self.blocked = False
        sent = self._send()
        if not self.blocked:
            self._serve_waiting()
            if self._ending is not None:
                self.reactor.later(self.close_when_sent)
        return sent

    # Out of the stream

    def deliver(self, view: memoryview) -> int:
        """The stream's sink: ciphertext, decrypted when the turn ends. Windows inside bound what waits for a reader."""
        if not self.closed:
            self.endpoint.tls.receive_data(view)
            if not self._arrived:
                self._arrived = True
                if self.established:
                    self.reactor.flush_later(self._intake)
                else:
                    self.reactor.handshake(self.receive)
        return len(view)

    def finish(self) -> None:
        """The gateway ended its direction."""
        if self.closed:
            self._carrier.over()
        else:
            self._over(None)

    def receive(self) -> None:
        """Decrypt, and give each stream its bytes."""
        self._arrived = False
        if self.closed:
            return
        now = self.reactor.now
        try:
            events = self.endpoint.receive_data(b"", now)
            if self._ended_there and self._reset is None:
                events = events + self.endpoint.receive_eof(now)
        except HboneError as exc:
            self._broken(exc)
            return
        if events:
            self._handle(events)
        if self.closing and not self.closed:
            self._go_on_draining()
        if self._ended_there and not self.closed:
            self._lose(self._reset or (None if self.closing else ConnectFailed("the tunnel was closed")))
        elif not self.closed and self.endpoint.wants_flush:
            self.mark_dirty()

    def _over(self, error: DataplaneError | None) -> None:
        """No more comes; first what has come."""
        self._ended_there = True
        self._reset = error
        if not self._arrived:
            self._arrived = True
            self.reactor.flush_later(self._intake)

    # What becomes of the stream

    def stream_accepted(self, headers: Headers) -> None:
        """The gateway is ready: shake hands with whom it chose."""
        self.connected = True
        self.mark_dirty()

    def stream_refused(self, status: int) -> None:
        """The gateway does not want it."""
        self._lose(GatewayRefused(status, self.address))

    def stream_reset(self, code: ErrorCode, *, processed: bool) -> None:
        """The gateway gave up, or whoever is behind it."""
        self._carrier.over()
        if self.closed:
            return
        if not processed:
            self._lose(_NotProcessed())
        else:
            self._over(Http2Failed(f"the gateway {address_text(self.address)} reset the stream: {code.name}"))

    def stream_lost(self, error: DataplaneError) -> None:
        """The outer tunnel ended, and nothing outlives it."""
        self._carrier.over()
        if not self.closed:
            self._over(error)

    def _lose(self, error: DataplaneError | None) -> None:
        self._carrier.cut = error is not None or self.blocked
        super()._lose(error)


class _NotProcessed(DataplaneError):
    """The gateway did not look at the stream: it may be tried on another tunnel."""

    def __init__(self) -> None:
        super().__init__("the network gateway took no stream")


class InnerUser(Protocol):
    """Who wants a tunnel to another network."""

    def tunnel_ready(self, tunnel: Tunnel) -> None:
        """Open the stream now; it is the only one."""

    def tunnel_failed(self, error: DataplaneError) -> None:
        """There is none to be had."""


class InnerDial:
    """One inner tunnel on its way: the outer one, a stream of it, and the handshake inside.

    Args:
        tunnels: where it will be.
        user: told how it ended, once.
        key: the outer tunnel.
        expected: who may answer behind the gateway.
        headers: the CONNECT to the gateway.
    """

    __slots__ = ("_tries", "_tunnel", "_tunnels", "expected", "headers", "key", "user", "waiting")

    def __init__(
        self,
        tunnels: InnerTunnels,
        user: InnerUser,
        key: PoolKey,
        expected: frozenset[SpiffeId],
        headers: Headers,
    ) -> None:
        self.user: InnerUser | None = user
        self.key = key
        self.expected = expected
        self.headers = headers
        self.waiting = False
        self._tunnels = tunnels
        self._tunnel: InnerTunnel | None = None
        self._tries = 0

    def start(self) -> None:
        """Dial; `cancel` until the user was told."""
        self._tunnels.dialer.checkout(self)

    def cancel(self) -> None:
        """Stop, and say nothing."""
        self.user = None
        self.waiting = False
        tunnel, self._tunnel = self._tunnel, None
        if tunnel is not None:
            tunnel.close(ConnectFailed("given up"))

    def tunnel_ready(self, outer: Tunnel) -> None:
        """The gateway is there: ask for a stream."""
        if self.user is None:
            return
        self._tries += 1
        identity = self._tunnels.identities.current()
        if identity is None:  # the outer tunnel outlived our certificate
            self._tunnels.reactor.start_task(self._fetch)
            return
        try:
            tunnel = self._tunnel = self._tunnels.make(self, identity, outer.address)
        except DataplaneError as exc:
            self.failed(exc)
            return
        try:
            tunnel.open(outer, self.headers)
        except LocalProtocolError as exc:
            self._tunnel = None
            self._tunnels.drop(tunnel)
            self._again(Http2Failed(str(exc)))
        else:
            self._tunnels.dialer.opened(outer)

    async def _fetch(self) -> None:
        error: DataplaneError = IdentityUnavailable("cancelled")
        fetched = False
        try:
            await self._tunnels.identities.fetch()
            fetched = True
        except Exception as exc:
            error = IdentityUnavailable.because(exc)
        finally:
            if not fetched:
                self.failed(error)
        if fetched:
            self._again(IdentityUnavailable("the certificate came and went"))

    def _again(self, error: DataplaneError) -> None:
        if self._tries < _TRIES:
            self._tunnels.reactor.later(self._retry)
        else:
            self.failed(error)

    def _retry(self) -> None:
        if self.user is not None:
            self.start()

    def tunnel_failed(self, error: DataplaneError) -> None:
        """There is no tunnel to the gateway."""
        self.failed(error)

    def established(self, tunnel: InnerTunnel) -> None:
        """Both stand."""
        self._tunnel = None
        user, self.user = self.user, None
        if user is not None:
            user.tunnel_ready(tunnel)
        if not tunnel.streams:
            tunnel.close()

    def lost(self, tunnel: InnerTunnel, error: DataplaneError | None) -> None:
        """It did not come about."""
        self._tunnel = None
        if isinstance(error, _NotProcessed):
            self._again(error)
            return
        peer = tunnel.endpoint.tls.refused_id
        if isinstance(error, TlsFailed) and peer is not None and peer not in self.expected:
            error = unexpected_peer(peer, self.expected)
        self.failed(error or ConnectFailed("the tunnel was closed"))

    def failed(self, error: DataplaneError) -> None:
        """Tell the user."""
        user, self.user = self.user, None
        if user is not None:
            user.tunnel_failed(error)


class InnerTunnels:
    """All tunnels inside others.

    Args:
        reactor: runs them.
        calls: the socket calls.
        dialer: the outer tunnels.
        identities: our certificate.
        config: parameters of HTTP/2.
        budget: what receive windows may grow by, of the process.
        recall: which certificates were taken back.
    """

    def __init__(
        self,
        reactor: Reactor,
        calls: SocketCalls,
        dialer: Dialer,
        identities: IdentitySource,
        *,
        config: ConnectionConfig,
        budget: WindowBudget,
        recall: Recall,
    ) -> None:
        self.reactor = reactor
        self.dialer = dialer
        self.identities = identities
        self.tunnels: dict[InnerTunnel, InnerDial] = {}
        """Each with what dialled it."""
        self._calls = calls
        self._config = config
        self._budget = budget
        self._recall = recall
        recall.members.append(("source", lambda: self.tunnels))

    def make(self, dial: InnerDial, identity: Identity, address: Address) -> InnerTunnel:
        """A tunnel that is to be opened inside another.

        Raises:
            DataplaneError: our certificate is unusable, or somebody else's.
        """
        if identity.svid.id != dial.key.source:
            raise IdentityUnavailable(f"the certificate at hand is for {identity.svid.id}, not {dial.key.source}")
        expected = dial.expected

        def authorize(peer: SpiffeId) -> bool:
            return peer in expected

        try:
            endpoint = Endpoint(
                TlsContext.client(identity, crls=self._recall.lists),
                client=True,
                authorize=authorize,
                config=self._config,
                budget=self._budget,
                now=self.reactor.clock(),
            )
        except HboneError as exc:
            raise TlsSetupFailed(str(exc)) from exc
        tunnel = InnerTunnel(self.reactor, self._calls, endpoint, self, address)
        self.tunnels[tunnel] = dial
        return tunnel

    def drop(self, tunnel: InnerTunnel) -> None:
        """It was not opened."""
        self.tunnels.pop(tunnel, None)
        tunnel.close()

    def close(self) -> None:
        """Close them all; streams that are open are lost."""
        for tunnel in list(self.tunnels):
            tunnel.close()

    # What tunnels tell

    def tunnel_established(self, tunnel: Tunnel) -> None:
        """The peer behind the gateway proved who it is."""
        if self._recall.allows(tunnel, "source"):
            inner = cast("InnerTunnel", tunnel)
            self.tunnels[inner].established(inner)

    def tunnel_lost(self, tunnel: Tunnel, error: DataplaneError | None) -> None:
        """A dial that failed, or a tunnel that ended."""
        inner = cast("InnerTunnel", tunnel)
        dial = self.tunnels.pop(inner, None)
        if isinstance(error, PeerRevoked):
            self._recall.refused("source")
        if dial is not None:
            dial.lost(inner, error)

    def tunnel_draining(self, tunnel: Tunnel) -> None:
        """GOAWAY: its one stream goes on."""
        if not tunnel.streams:
            tunnel.close()

    def tunnel_alive(self, tunnel: Tunnel) -> None:
        """Nobody asks: an inner tunnel does not wait for users."""

    def stream_finished(self, tunnel: Tunnel) -> None:
        """Its one stream is over, and so is it."""
        self.reactor.later(tunnel.close_when_sent)

    def connect_received(self, end: StreamEnd, headers: Headers) -> None:
        """No server opens streams towards us: the engine refuses them before this."""
        end.reject(405)
