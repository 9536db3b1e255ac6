"""A tunnel connection as an asyncio protocol: no tasks, the loop's callbacks drive the endpoint."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from hbone.asyncio.stream import TunnelStream
from hbone.errors import ConnectionLost, ErrorCode, HboneError
from hbone.session import FLUSH_TIMEOUT, Session, as_request

if TYPE_CHECKING:
    from collections.abc import Callable

    from hbone.connect import Authority, ConnectRequest
    from hbone.endpoint import Endpoint
    from hbone.identity import SpiffeId

__all__ = ["Tunnel"]


class Tunnel(Session[TunnelStream], asyncio.Protocol):
    """One tunnel. Made by `ConnectionPool` and `serve`.

    Args:
        endpoint: a new endpoint, on the clock of the loop's `time`.
        client: whether we dialled.
        on_request: as Session's, and so are the others.
        on_unusable: its.
        on_stream_end: its.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        client: bool,
        on_request: Callable[[TunnelStream], None] | None = None,
        on_unusable: Callable[[Tunnel], None] | None = None,
        on_stream_end: Callable[[Tunnel], None] | None = None,
    ) -> None:
        super().__init__(
            endpoint, client=client, on_request=on_request, on_unusable=on_unusable, on_stream_end=on_stream_end
        )
        self.loop = asyncio.get_running_loop()
        self.established: asyncio.Future[None] = self.loop.create_future()
        """Done when the handshake is complete, or has failed."""
        self.ended: asyncio.Future[None] = self.loop.create_future()
        """Done when the transport is closed."""
        self._transport: asyncio.Transport | None = None
        self._may_write = True
        self._flushing: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._pongs: list[asyncio.Future[None]] = []

    async def connect(
        self, target: str | Authority | ConnectRequest
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Client: open a stream to `target` and wait for the answer. Bring a deadline.

        Raises:
            ConnectRejected: the answer was not 200.
            StreamResetError: the peer reset the stream instead.
            ConnectionLost: the tunnel is over.
            LocalProtocolError: the tunnel takes no stream now.
        """
        stream = self.open(as_request(target))
        try:
            await stream.wait_answer()
        except BaseException:
            stream.reset(ErrorCode.CANCEL)
            raise
        if not stream.opened and stream.failure is not None:
            raise stream.failure
        return stream.make_pair()

    async def ping(self) -> None:
        """Send PING and wait for its answer. Bring a deadline.

        Raises:
            ConnectionLost: the tunnel is over.
        """
        self.check()
        pong: asyncio.Future[None] = self.loop.create_future()
        self._pongs.append(pong)
        self.engine.ping(self.loop.time())
        self.wake_writer()
        try:
            await pong
        finally:
            if pong in self._pongs:
                self._pongs.remove(pong)
        self.check()

    def close(self) -> None:
        """As Session's; what was written and has room is sent."""
        for stream in list(self.streams.values()):
            if stream.transport is not None:
                stream.transport.close()
        super().close()

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """TCP is up."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._flush()
        self.rearm()

    def data_received(self, data: bytes) -> None:
        """Ciphertext."""
        if self.failure is not None:
            return
        try:
            events = self.endpoint.receive_data(data, self.loop.time())
        except HboneError as error:
            self.lose(error)
            return
        if events:
            self.dispatch(events)
        if self.endpoint.wants_flush:
            self.wake_writer()
        self.rearm()

    def eof_received(self) -> bool:
        """The peer closed."""
        self.dispatch(self.endpoint.receive_eof(self.loop.time()))
        self.lose(ConnectionLost("the peer closed the connection"))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The transport is closed."""
        lost = ConnectionLost(f"the transport broke: {exc}" if exc is not None else "the transport was closed")
        lost.__cause__ = exc
        self.lose(lost)
        self._transport = None
        if not self.ended.done():
            self.ended.set_result(None)

    def pause_writing(self) -> None:
        """The transport is full: the endpoint keeps its queue, whose bound slows the streams."""
        self._may_write = False

    def resume_writing(self) -> None:
        """The transport has room."""
        self._may_write = True
        self._flush()

    # What the session tells

    def now(self) -> float:
        """The loop's clock."""
        return self.loop.time()

    def wake_writer(self) -> None:
        """Flush once at the end of this turn of the loop, so that frames share records."""
        if self._flushing is None:
            self._flushing = self.loop.call_soon(self._flush)

    def rearm(self) -> None:
        """Set the timer, or bring it forward."""
        deadline = None if self.failure is not None else self.endpoint.next_deadline()
        if deadline is None:
            return
        if self._timer is not None:
            if self._timer.when() <= deadline:
                return  # too early is harmless, and cheaper than a timer for each packet
            self._timer.cancel()
        self._timer = self.loop.call_at(deadline, self._on_time)

    def make_stream(self, request: ConnectRequest, peer: SpiffeId) -> TunnelStream:
        """An asyncio stream."""
        return TunnelStream(self, request, peer)

    def on_established(self) -> None:
        """The handshake is complete."""
        if not self.established.done():
            self.established.set_result(None)

    def on_pong(self) -> None:
        """The peer answered a PING."""
        pongs, self._pongs = self._pongs, []
        for pong in pongs:
            if not pong.done():
                pong.set_result(None)

    def on_lost(self) -> None:
        """The connection is over: what is queued may still leave, for a moment."""
        if not self.established.done():
            self.established.set_result(None)
        self.on_pong()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        transport = self._transport
        if transport is not None and not transport.is_closing():
            self._may_write = True
            self._flush()
            transport.close()
            self.loop.call_later(FLUSH_TIMEOUT, transport.abort)

    def _flush(self) -> None:
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        sent = False
        while self._may_write and (data := self.endpoint.data_to_send()):
            transport.write(data)
            sent = True
        if sent:
            self.unblock()

    def _on_time(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.dispatch(self.endpoint.on_time(self.loop.time()))
        if self.endpoint.wants_flush:
            self.wake_writer()
        self.rearm()
