"""A tunnel inside a tunnel, joined by memory: a client's app, a gateway that hands bytes on, the far app; no kernel."""

from __future__ import annotations

import collections
import select
from typing import TYPE_CHECKING, Any, cast

from tests.support.dataplane import scripted_reactor
from tests.support.joined import CA, JoinedSocket, Side, Wire
from tests.support.mesh import at

from hbone.config import ConnectionConfig
from hbone.endpoint import Endpoint
from hbone.engine import WindowBudget
from hbone.tls import TlsContext
from ztunnel.dataplane.inner import InnerTunnel
from ztunnel.dataplane.sockets import SocketCalls
from ztunnel.dataplane.tunnel import Tunnel

if TYPE_CHECKING:
    import socket

    from hbone.errors import ErrorCode
    from ztunnel.errors import DataplaneError

__all__ = ["Nested", "NestedSide"]

REQUEST = ((b":method", b"CONNECT"), (b":authority", b"web.example:80"))


class NestedSide(Side):
    """Remembers the end instead of forbidding it."""

    def __init__(self, nested: Nested, room: int) -> None:
        super().__init__(nested.reactor, nested.calls, room)
        self.lost: list[DataplaneError | None] = []
        self.ended: list[DataplaneError | None] = []
        self.codes: list[ErrorCode] = []
        """Of RST_STREAM."""

    def tunnel_lost(self, tunnel: Tunnel, error: DataplaneError | None) -> None:
        self.lost.append(error)

    def stream_reset(self, code: ErrorCode, *, processed: bool) -> None:
        self.codes.append(code)
        self.relay.end_after_reset(code, None)

    def stream_lost(self, error: DataplaneError) -> None:
        self.ended.append(error)

    def relay_ended(self, relay: Any, error: DataplaneError | None) -> None:
        self.ended.append(error)


class Nested:
    """All of it on one reactor, with a stream inside that stands.

    Args:
        inner: parameters of the ends.
        outer: parameters of the tunnel to the gateway.
        room: bytes that an app's socket buffer holds.
        between: bytes that the gateway's and the far socket buffers hold.
    """

    def __init__(
        self,
        *,
        inner: ConnectionConfig | None = None,
        outer: ConnectionConfig | None = None,
        room: int = 4 << 20,
        between: int = 4 << 20,
    ) -> None:
        self.calls: collections.Counter[str] = collections.Counter()
        self.reactor = scripted_reactor()
        self.sockets: list[JoinedSocket] = []
        self.client = NestedSide(self, room)
        self.near = NestedSide(self, 64)
        """Owner of the tunnel to the gateway; its app is not used."""
        self.gateway = NestedSide(self, between)
        self.far = NestedSide(self, room)
        there, back = Wire(), Wire()
        self.outer_calls: collections.Counter[str] = collections.Counter()
        """Of the socket to the gateway, our end."""
        self.outer = self._tunnel(self.near, JoinedSocket(back, there, self.outer_calls), "client", "client", outer)
        self._tunnel(self.gateway, JoinedSocket(there, back, self.calls), "server", "gateway", outer)
        behind = JoinedSocket(self.gateway.to_app, self.gateway.from_app, self.calls)
        self._tunnel(self.far, behind, "server", "far", inner)
        self.sockets += [side.app for side in (self.client, self.gateway, self.far)]
        self.outer.flush()
        self.settle()
        endpoint = self._endpoint("client", "client", inner)
        self.inner = InnerTunnel(self.reactor, SocketCalls(), endpoint, self.client, at("10.0.0.9:15008"))
        self.inner.open(self.outer, REQUEST)
        self.settle()
        assert self.inner.established
        self.client.end = self.inner.connect(REQUEST, self.client, self.client.relay)
        self.settle()

    def _endpoint(self, end: str, name: str, config: ConnectionConfig | None) -> Endpoint:
        identity = CA.identity("shop", name)
        client = end == "client"
        context = TlsContext.client(identity) if client else TlsContext.server(identity)
        budget = WindowBudget(64 << 20)
        config = config or ConnectionConfig()
        return Endpoint(context, client=client, authorize=lambda _: True, config=config, budget=budget, now=0.0)

    def _tunnel(
        self, side: NestedSide, sock: JoinedSocket, end: str, name: str, config: ConnectionConfig | None
    ) -> Tunnel:
        self.sockets.append(sock)
        side.tunnel_socket = sock
        side.tunnel = Tunnel(
            self.reactor,
            SocketCalls(),
            cast("socket.SocketType", sock),
            self._endpoint(end, name, config),
            side,
            at("10.0.0.9:15008"),
            connected=True,
        )
        return side.tunnel

    def settle(self) -> None:
        """Until nobody has anything to do."""
        while self.turn():
            pass

    def turn(self) -> bool:
        """One turn; whether there was anything to do."""
        events = []
        for sock in self.sockets:
            if sock.number not in self.reactor.handlers:
                continue
            mask = select.EPOLLIN if sock.inwards.waiting and sock.inwards.news else 0
            sock.inwards.news = False  # told once, as an edge is
            if sock.outwards.was_full and sock.outwards.has_room:
                sock.outwards.was_full = False
                mask |= select.EPOLLOUT
            if mask:
                events.append((sock.number, mask))
        if not events and not self.reactor.busy:
            return False
        self.reactor.turn(events)
        return True
