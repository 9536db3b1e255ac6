"""Two endpoints joined in memory: TLS and HTTP/2 without a transport, driven step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hbone.endpoint import Endpoint
from hbone.errors import HboneError
from hbone.events import ConnectReceived
from hbone.tls import IoBuffer, TlsContext

if TYPE_CHECKING:
    from collections.abc import Callable

    from hbone.config import ConnectionConfig
    from hbone.engine.flow import WindowBudget
    from hbone.events import Event, Headers
    from hbone.identity import Identity, SpiffeId

__all__ = ["EndpointEnd", "EndpointPair"]

REQUEST: Headers = ((b":method", b"CONNECT"), (b":authority", b"10.0.0.7:8080"))


def _anyone(_: SpiffeId) -> bool:
    return True


class EndpointEnd:
    """One of both ends, with what it was told."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.engine = endpoint.engine
        self.events: list[Event] = []
        self.received: dict[int, bytearray] = {}
        self.failure: HboneError | None = None
        """What ended it; nothing is read afterwards."""
        self._buffer = IoBuffer(64 * 1024)

    def sink(self, stream_id: int) -> Callable[[memoryview], int]:
        """A sink that keeps everything in `received` and credits it at once."""
        kept = self.received.setdefault(stream_id, bytearray())

        def take(view: memoryview) -> int:
            kept.extend(view)
            return len(view)

        return take

    def take_events(self) -> list[Event]:
        """What happened since the last call."""
        events, self.events = self.events, []
        return events

    def receive(self, data: bytes, now: float) -> None:
        """Ciphertext from the other end; a fault is kept in `failure`."""
        if self.failure is not None:
            return
        try:
            self.events += self.endpoint.receive_data(data, now)
        except HboneError as error:
            self.failure = error

    def send(self, stream_id: int, data: bytes) -> int:
        """Send as a hot caller does, up to the capacity; the bytes taken."""
        nbytes = min(len(data), self.engine.send_capacity(stream_id), self._buffer.size - 9)
        if nbytes:
            self._buffer.view[9 : 9 + nbytes] = data[:nbytes]
            self.endpoint.send_from(stream_id, self._buffer, nbytes)
        return nbytes


class EndpointPair:
    """A client's and a server's endpoint.

    Args:
        client: who the client is.
        server: who the server is.
        client_authorize: says whether the client takes the server.
        server_authorize: says whether the server takes the client.
        client_config: parameters of the client.
        server_config: parameters of the server.
        budget: shared by both.
        chunk: most bytes carried at once, to see that chunking does not matter.
    """

    def __init__(
        self,
        client: Identity,
        server: Identity,
        *,
        client_authorize: Callable[[SpiffeId], bool] = _anyone,
        server_authorize: Callable[[SpiffeId], bool] = _anyone,
        client_config: ConnectionConfig | None = None,
        server_config: ConnectionConfig | None = None,
        budget: WindowBudget | None = None,
        chunk: int | None = None,
    ) -> None:
        self.now = 0.0
        self._chunk = chunk
        self.client = EndpointEnd(
            Endpoint(
                TlsContext.client(client),
                client=True,
                authorize=client_authorize,
                config=client_config,
                budget=budget,
                now=0.0,
            )
        )
        self.server = EndpointEnd(
            Endpoint(
                TlsContext.server(server),
                client=False,
                authorize=server_authorize,
                config=server_config,
                budget=budget,
                now=0.0,
            )
        )
        self.wire = bytearray()
        """All ciphertext that passed, both ways."""

    def carry(self, sender: EndpointEnd, receiver: EndpointEnd) -> bool:
        """Move what `sender` has; whether there was something."""
        moved = False
        while data := sender.endpoint.data_to_send():
            moved = True
            self.wire += data
            step = self._chunk or len(data)
            for start in range(0, len(data), step):
                receiver.receive(data[start : start + step], self.now)
        return moved

    def pump(self) -> None:
        """Move bytes both ways until both ends are silent."""
        for _ in range(10_000):
            if not self.carry(self.client, self.server) | self.carry(self.server, self.client):
                return
        raise AssertionError("the two ends do not fall silent")

    def advance(self, seconds: float) -> None:
        """Let time pass, from one deadline of either end to the next."""
        until = self.now + seconds
        for _ in range(10_000):
            due = [d for end in (self.client, self.server) if (d := end.endpoint.next_deadline()) is not None]
            if not due or min(due) > until:
                break
            self.now = max(self.now, min(due))
            for end in (self.client, self.server):
                end.events += end.endpoint.on_time(self.now)
            self.pump()
        self.now = until

    def open(self, headers: Headers = REQUEST) -> int:
        """A stream, accepted by the server, whose sinks keep everything."""
        stream_id = self.client.engine.connect(headers, lambda view: self.client.sink(stream_id)(view))
        self.pump()
        assert any(isinstance(e, ConnectReceived) and e.stream_id == stream_id for e in self.server.events)
        self.server.engine.accept(stream_id, (), self.server.sink(stream_id))
        self.pump()
        return stream_id
