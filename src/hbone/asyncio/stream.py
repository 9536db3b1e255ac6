"""A CONNECT stream as an asyncio transport, for asyncio's own StreamReader and StreamWriter."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from hbone.errors import ErrorCode, HboneError, StreamResetError
from hbone.sessionstream import SessionStream

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hbone.asyncio.connection import Tunnel
    from hbone.connect import ConnectRequest
    from hbone.events import Headers
    from hbone.identity import SpiffeId

__all__ = ["HboneTransport", "TunnelStream"]

_DELIVER = 64 * 1024
_HIGH_WATER = 64 * 1024
_LOW_WATER = 16 * 1024


class TunnelStream(SessionStream):
    """The stream behind a transport."""

    def __init__(self, tunnel: Tunnel, request: ConnectRequest, peer: SpiffeId) -> None:
        super().__init__(tunnel, request, peer)  # type: ignore[arg-type]  # Session is invariant in its streams
        self.transport: HboneTransport | None = None
        self._loop = tunnel.loop
        self._answer = asyncio.Event()

    async def wait_answer(self) -> None:
        """Client: wait for the answer to CONNECT; its outcome is in `opened` and `failure`."""
        await self._answer.wait()

    def make_pair(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Reader and writer of this stream, once."""
        loop = self._loop
        reader = asyncio.StreamReader(loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        transport = HboneTransport(self, loop, protocol)
        protocol.connection_made(transport)
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        transport.deliver()
        return reader, writer

    def on_readable(self) -> None:
        """Hand on what arrived."""
        if self.transport is not None:
            self.transport.deliver()

    def on_writable(self) -> None:
        """Send what waits."""
        if self.transport is not None:
            self.transport.send_backlog()

    def on_answer(self) -> None:
        """Wake who asked for this stream."""
        self._answer.set()


class HboneTransport(asyncio.Transport):
    """Transport of one stream. `get_extra_info` knows `peer`, a SpiffeId, and `request`, the ConnectRequest.

    `close` sends END_STREAM after what was written, then RST_STREAM if the peer is still sending; `abort` and `reset`
    are abrupt. Source: RFC 9113 §8.5.
    """

    _start_tls_compatible = True  # asyncio asks for this name: TLS may be begun within the stream

    def __init__(self, stream: TunnelStream, loop: asyncio.AbstractEventLoop, protocol: asyncio.BaseProtocol) -> None:
        super().__init__({"peer": stream.peer, "request": stream.request})
        self._stream = stream
        self._loop = loop
        self._protocol = protocol
        self._paused = False
        self._backlog = bytearray()
        self._writing_paused = False
        self._high_water = _HIGH_WATER
        self._low_water = _LOW_WATER
        self._ending = False
        self._closing = False
        self._eof_told = False
        self._loss_told = False
        self._over = asyncio.Event()
        stream.transport = self

    @property
    def peer(self) -> SpiffeId:
        """Who is at the other end, verified."""
        return self._stream.peer

    # CONNECT

    def accept(self, headers: Headers = ()) -> None:
        """Server: answer 200."""
        self._stream.accept(headers)
        self.send_backlog()  # written before it might be sent

    def reject(self, status: int, headers: Headers = ()) -> None:
        """Server: answer with another status, and close.

        Raises:
            LocalProtocolError: it was accepted before.
        """
        self._stream.reject(status, headers)
        self._closing = True
        self._tell_loss(None)

    def reset(self, code: ErrorCode = ErrorCode.CONNECT_ERROR) -> None:
        """End both directions abruptly, with RST_STREAM."""
        self._closing = True
        self._backlog.clear()
        self._stream.reset(code)
        self._tell_loss(None)

    # Reading

    def is_reading(self) -> bool:
        """Whether the protocol gets data."""
        return not self._paused and not self._closing

    def pause_reading(self) -> None:
        """Keep what arrives; its window bounds it."""
        self._paused = True

    def resume_reading(self) -> None:
        """Hand it on again."""
        if self._paused:
            self._paused = False
            self._loop.call_soon(self.deliver)

    def deliver(self) -> None:
        """Give the protocol what arrived, until it pauses."""
        while not self._paused and not self._closing and not self._loss_told:
            protocol = self._protocol
            try:
                data = self._stream.read(_DELIVER)
            except HboneError as error:
                self._tell_loss(error)
                return
            if data is None:
                return
            if data:
                if isinstance(protocol, asyncio.BufferedProtocol):
                    _fill(protocol, data)
                elif isinstance(protocol, asyncio.Protocol):
                    protocol.data_received(data)
            else:
                self._tell_eof()
                return

    # Writing

    def write(self, data: Any) -> None:
        """Queue `data`; the protocol's `pause_writing` says when that is too much."""
        if self._ending:
            raise RuntimeError("write() after write_eof()")
        if self._closing or self._loss_told:
            return
        self._backlog += data
        self.send_backlog()
        if len(self._backlog) > self._high_water and not self._writing_paused:
            self._writing_paused = True
            self._protocol.pause_writing()

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        """Queue them all."""
        self.write(b"".join(list_of_data))

    def write_eof(self) -> None:
        """Send END_STREAM after what was written; the peer's direction goes on."""
        if not self._ending:
            self._ending = True
            self.send_backlog()

    def can_write_eof(self) -> bool:
        """Always: a stream's directions end one by one."""
        return True

    def send_backlog(self) -> None:
        """Send as much of what waits as windows and queue take."""
        backlog = self._backlog
        stream = self._stream
        sent = 0
        try:
            with memoryview(backlog) as view:
                while sent < len(view):
                    with view[sent:] as rest:
                        taken = stream.write(rest)
                    if not taken:
                        break
                    sent += taken
        except HboneError as error:
            backlog.clear()
            if isinstance(error, StreamResetError) and error.code is ErrorCode.NO_ERROR:
                # The peer has said all, and wants no more. A loss with an error would take it from who reads it.
                self._paused = False  # the window bounds what is left
                self.deliver()
                self._tell_loss(None)
            else:
                self._tell_loss(error)
            return
        if sent:
            del backlog[:sent]
        if self._writing_paused and len(backlog) <= self._low_water:
            self._writing_paused = False
            self._protocol.resume_writing()
        if not backlog:
            if self._closing:
                stream.close()
                self._tell_loss(None)
            elif self._ending:
                stream.end()

    def get_write_buffer_size(self) -> int:
        """Bytes written that wait for room."""
        return len(self._backlog)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Low and high water, in bytes."""
        return self._low_water, self._high_water

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Say how much may wait before the protocol is asked to pause, in bytes."""
        self._high_water = high if high is not None else 4 * low if low is not None else _HIGH_WATER
        self._low_water = low if low is not None else self._high_water // 4

    # The end

    def is_closing(self) -> bool:
        """Whether `close` was called, or the stream is over."""
        return self._closing or self._loss_told

    def close(self) -> None:
        """Send what was written, then END_STREAM, then RST_STREAM if the peer is still sending."""
        if not self._closing:
            self._closing = True
            self.send_backlog()

    async def wait_closed(self) -> None:
        """Wait until what was written has left and the stream is over, whoever the protocol is by then."""
        await self._over.wait()

    def abort(self) -> None:
        """RST_STREAM CONNECT_ERROR, as for a reset TCP connection."""
        self.reset()

    def _force_close(self, _: BaseException) -> None:
        """What asyncio's TLS calls when it fails."""
        self.abort()

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Who is told."""
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Tell another one."""
        self._protocol = protocol

    def _tell_eof(self) -> None:
        if self._eof_told:
            return
        self._eof_told = True
        protocol = self._protocol
        if not isinstance(protocol, asyncio.Protocol | asyncio.BufferedProtocol) or not protocol.eof_received():
            self.close()

    def _tell_loss(self, error: HboneError | None) -> None:
        if self._loss_told:
            return
        self._loss_told = True
        self._over.set()
        broken: Exception | None = None
        if error is not None:
            broken = ConnectionResetError(str(error))
            broken.__cause__ = error
        self._loop.call_soon(self._protocol.connection_lost, broken)


def _fill(protocol: asyncio.BufferedProtocol, data: bytes) -> None:
    """Give `data` to a protocol that brings its own buffer, as TLS does."""
    view = memoryview(data)
    while view:
        room = memoryview(protocol.get_buffer(len(view)))
        nbytes = min(len(room), len(view))
        room[:nbytes] = view[:nbytes]
        protocol.buffer_updated(nbytes)
        view = view[nbytes:]
