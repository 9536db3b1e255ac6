"""Two data paths joined by memory: a client's app, its tunnel, the server's tunnel, its app; no kernel between."""

from __future__ import annotations

import collections
import itertools
import select
import socket
from typing import TYPE_CHECKING, Any, cast

from tests.support.dataplane import scripted_reactor
from tests.support.mesh import at

from hbone.config import ConnectionConfig
from hbone.endpoint import Endpoint
from hbone.engine import WindowBudget
from hbone.testing.ca import TestCa
from hbone.tls import TlsContext
from ztunnel.dataplane.relay import Relay
from ztunnel.dataplane.sockets import SocketCalls
from ztunnel.dataplane.tunnel import Tunnel

if TYPE_CHECKING:
    from hbone.errors import ErrorCode
    from hbone.events import Headers
    from ztunnel.dataplane.reactor import Reactor
    from ztunnel.dataplane.stream import StreamEnd
    from ztunnel.errors import DataplaneError

__all__ = ["CA", "Joined", "JoinedSocket", "Side", "Wire"]

CA = TestCa()
_REQUEST = ((b":method", b"CONNECT"), (b":authority", b"10.0.0.2:80"))
ROOM = 4 << 20
"""Bytes that a direction holds: what a kernel's socket buffers may."""
_numbers = itertools.count(50_000)


class Wire:
    """One direction's bytes, in memory that was there before: carrying them makes no object worth the name."""

    def __init__(self, room: int = ROOM) -> None:
        self._ring = memoryview(bytearray(room))
        self.filled = 0
        self.taken = 0
        self.was_full = False
        """Not all that was to be put found room."""
        self.news = False
        """Something was put; whoever tells the reader takes it back."""

    def put(self, data: Any) -> int:
        size = min(len(data), len(self._ring) - self.filled)
        self.was_full = size < len(data)
        self.news = True
        if not size:
            raise BlockingIOError
        self._ring[self.filled : self.filled + size] = data[:size]
        self.filled += size
        return size

    def get(self, into: Any, limit: int) -> int:
        size = min(limit, self.filled - self.taken)
        if not size:
            raise BlockingIOError
        into[:size] = self._ring[self.taken : self.taken + size]
        self.taken += size
        if self.taken == self.filled:
            self.taken = self.filled = 0
        return size

    @property
    def has_room(self) -> bool:
        return self.filled < len(self._ring)

    @property
    def waiting(self) -> int:
        return self.filled - self.taken


class JoinedSocket:
    """One end of two wires."""

    segment = 1448
    """What its kernel would put into one segment; that of Ethernet."""
    largest = 0
    """Bytes of the largest `send`."""

    def __init__(self, inwards: Wire, outwards: Wire, calls: collections.Counter[str]) -> None:
        self.inwards = inwards
        self.outwards = outwards
        self.number = next(_numbers)
        self.calls = calls

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0, /) -> int:
        self.calls["recv"] += 1
        return self.inwards.get(buffer, nbytes or len(buffer))

    def send(self, data: Any, flags: int = 0, /) -> int:
        self.calls["send"] += 1
        self.largest = max(self.largest, len(data))
        return self.outwards.put(data)

    def fileno(self) -> int:
        return self.number

    def getsockopt(self, level: int, option: int) -> int:
        assert (level, option) == (socket.IPPROTO_TCP, socket.TCP_MAXSEG)
        return self.segment

    def setsockopt(self, *_: Any) -> None:
        self.calls["setsockopt"] += 1

    def shutdown(self, how: int, /) -> None:
        self.calls["shutdown"] += 1

    def close(self) -> None:
        self.calls["close"] += 1


class Side:
    """Owner of a tunnel, user of its stream, owner of its relay."""

    def __init__(self, reactor: Reactor, calls: collections.Counter[str], room: int = ROOM) -> None:
        self.reactor = reactor
        self.calls = calls
        self.tunnel: Tunnel
        self.tunnel_socket: JoinedSocket
        self.end: StreamEnd | None = None
        self.quiet: list[Side] = []
        """Apps for streams that come later."""
        self.to_app, self.from_app = Wire(room), Wire(room)
        self.app = JoinedSocket(self.from_app, self.to_app, calls)
        self.relay = Relay(reactor, SocketCalls(), cast("Any", self.app), self)

    def tunnel_established(self, tunnel: Tunnel) -> None:
        pass

    def tunnel_lost(self, tunnel: Tunnel, error: DataplaneError | None) -> None:
        raise AssertionError(error)

    def tunnel_draining(self, tunnel: Tunnel) -> None:
        pass

    def tunnel_alive(self, tunnel: Tunnel) -> None:
        pass

    def stream_finished(self, tunnel: Tunnel) -> None:
        pass

    def connect_received(self, end: StreamEnd, headers: Headers) -> None:
        side = self.quiet.pop() if self.quiet else self
        end.user = side
        end.accept((), side.relay)
        side.relay.start(end)

    def stream_accepted(self, headers: Headers) -> None:
        assert self.end is not None
        self.relay.start(self.end)

    def stream_refused(self, status: int) -> None:
        raise AssertionError(status)

    def stream_reset(self, code: ErrorCode, *, processed: bool) -> None:
        raise AssertionError(code)

    def stream_lost(self, error: DataplaneError) -> None:
        raise AssertionError(error)

    def relay_ended(self, relay: Relay, error: DataplaneError | None) -> None:
        pass


class Joined:
    """Both, with a stream that stands. `push` puts bytes before an app's socket, `turn` lets both work."""

    def __init__(self, config: ConnectionConfig | None = None, segment: int = 1448) -> None:
        config = config or ConnectionConfig()
        self.calls: collections.Counter[str] = collections.Counter()
        there, back = Wire(), Wire()
        self.client = Side(scripted_reactor(), self.calls)
        self.server = Side(scripted_reactor(), self.calls)
        for side, wires, is_client, name in (
            (self.client, (back, there), True, "web"),
            (self.server, (there, back), False, "orders"),
        ):
            identity = CA.identity("shop", name)
            context = TlsContext.client(identity) if is_client else TlsContext.server(identity)
            endpoint = Endpoint(
                context,
                client=is_client,
                authorize=lambda _: True,
                config=config,
                budget=WindowBudget(64 << 20),
                now=0.0,
            )
            sock = JoinedSocket(*wires, self.calls)
            sock.segment = segment
            side.tunnel = Tunnel(
                side.reactor,
                SocketCalls(),
                cast("socket.SocketType", sock),
                endpoint,
                side,
                at("10.0.0.9:15008"),
                connected=True,
            )
            side.tunnel_socket = sock
        self.client.tunnel.flush()
        self.settle()
        self.client.end = self.client.tunnel.connect(_REQUEST, self.client, self.client.relay)
        self.settle()
        assert self.server.tunnel.streams

    def open(self, count: int) -> None:
        """Open further streams, which say nothing."""
        for _ in range(count):
            extra = Side(self.client.reactor, collections.Counter(), room=64)
            extra.end = self.client.tunnel.connect(_REQUEST, extra, extra.relay)
            self.server.quiet.append(Side(self.server.reactor, collections.Counter(), room=64))
        self.settle()
        assert len(self.client.tunnel.streams) == count + 1

    def settle(self) -> None:
        """Until nobody has anything to do."""
        while self.turn():
            pass

    def turn(self) -> bool:
        """One turn of each; whether there was anything to do."""
        worked = False
        for side in (self.client, self.server):
            events = [
                (sock.number, select.EPOLLIN)
                for sock in (side.app, side.tunnel_socket)
                if sock.inwards.waiting and sock.number in side.reactor.handlers
            ]
            if events or side.reactor.busy:
                worked = True
                side.reactor.turn(events)
        return worked
