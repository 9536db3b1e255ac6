"""A tunnel connection as an asyncio protocol: no tasks, the loop's callbacks drive the endpoint."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from hbone.asyncio.stream import TunnelStream
from hbone.errors import ConnectionLost, ErrorCode, HboneError
from hbone.session import Session, as_request

if TYPE_CHECKING:
    from collections.abc import Callable

    from hbone.connect import Authority, ConnectRequest
    from hbone.endpoint import Endpoint
    from hbone.identity import SpiffeId

__all__ = ["Tunnel"]

FLUSH_TIMEOUT = 1.0
"""Seconds that the last bytes of a connection may take to leave."""


class Tunnel(Session[TunnelStream], asyncio.Protocol):
    """One tunnel. Made by `ConnectionPool` and `serve`.

    Args:
        endpoint: a new endpoint, on the clock of the loop's `time`.
        client: whether we dialled.
        on_request: server: called with each requested stream.
        on_unusable: called when the peer takes no further stream, and when the connection is over.
        on_stream_end: called when a stream is over.
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
        super().__init__(endpoint, client=client)
        self.loop = asyncio.get_running_loop()
        self.established: asyncio.Future[None] = self.loop.create_future()
        """Done when the handshake is complete, or has failed."""
        self.ended: asyncio.Future[None] = self.loop.create_future()
        """Done when the transport is closed."""
        self._on_request = on_request
        self._on_unusable = on_unusable
        self._on_stream_end = on_stream_end
        self._transport: asyncio.Transport | None = None
        self._may_write = True
        self._flushing: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._pongs: list[asyncio.Future[None]] = []

    @property
    def peer(self) -> SpiffeId | None:
        """Who is at the other end; None before the handshake is complete."""
        return self.endpoint.peer

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
        self._check()
        pong: asyncio.Future[None] = self.loop.create_future()
        self._pongs.append(pong)
        self.engine.ping(self.loop.time())
        self.wake_writer()
        try:
            await pong
        finally:
            if pong in self._pongs:
                self._pongs.remove(pong)
        self._check()

    def drain(self) -> None:
        """Tell the peer to open no further stream; the connection ends when those that are open have."""
        if self.failure is not None:
            return
        if not self.endpoint.established:
            self.close()
            return
        self.engine.drain(self.loop.time())
        self._on_time()

    def close(self) -> None:
        """End the connection and its streams: GOAWAY and close_notify are sent if the transport takes them."""
        for stream in list(self.streams.values()):
            if stream.transport is not None:
                stream.transport.close()
            stream.close()
        self.lose(ConnectionLost("the tunnel was closed by this end"))

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """TCP is up."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._flush()
        self._rearm()

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
        self._rearm()

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

    def wake_writer(self) -> None:
        """Flush once at the end of this turn of the loop, so that frames share records."""
        if self._flushing is None:
            self._flushing = self.loop.call_soon(self._flush)

    def make_stream(self, request: ConnectRequest, peer: SpiffeId) -> TunnelStream:
        """An asyncio stream."""
        return TunnelStream(self, request, peer)

    def on_established(self) -> None:
        """The handshake is complete."""
        if not self.established.done():
            self.established.set_result(None)

    def on_request(self, stream: TunnelStream) -> None:
        """Hand a requested stream to the server."""
        if self._on_request is None:
            stream.reject(405)
        else:
            self._on_request(stream)

    def on_finished(self, stream: TunnelStream) -> None:
        """A stream is over; if it was the last of a drained connection, so is that."""
        self._rearm()
        if self._on_stream_end is not None:
            self._on_stream_end(self)

    def on_draining(self) -> None:
        """The peer takes no further stream."""
        if self._on_unusable is not None:
            self._on_unusable(self)

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
        if self._on_unusable is not None:
            self._on_unusable(self)
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

    def _rearm(self) -> None:
        deadline = None if self.failure is not None else self.endpoint.next_deadline()
        if deadline is None:
            return
        if self._timer is not None:
            if self._timer.when() <= deadline:
                return  # too early is harmless, and cheaper than a timer for each packet
            self._timer.cancel()
        self._timer = self.loop.call_at(deadline, self._on_time)

    def _on_time(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.dispatch(self.endpoint.on_time(self.loop.time()))
        if self.endpoint.wants_flush:
            self.wake_writer()
        self._rearm()

    def _check(self) -> None:
        if self.failure is not None:
            raise ConnectionLost(str(self.failure)) from self.failure
