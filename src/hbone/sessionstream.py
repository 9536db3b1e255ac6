"""One CONNECT stream as applications see it; what the streams of Trio and asyncio share. No I/O, no clock.

A stream keeps what its application has not read yet, and how each direction ended. An adapter derives from it, and
waits where it says "not yet".
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

from hbone.errors import ErrorCode, LocalProtocolError, StreamResetError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hbone.connect import ConnectRequest
    from hbone.errors import HboneError
    from hbone.events import Headers
    from hbone.identity import SpiffeId
    from hbone.session import Session

__all__ = ["READING_ENDS", "SessionStream"]

READING_ENDS = frozenset({ErrorCode.NO_ERROR, ErrorCode.CANCEL})
"""RST_STREAM codes that mean END_STREAM to who reads; with any other the stream is broken. To who writes, every code
means broken. Source: ztunnel's mapping of HTTP/2 to TCP."""


class SessionStream(abc.ABC):
    """One CONNECT stream. Its receive window bounds what is kept here."""

    def __init__(self, session: Session[SessionStream], request: ConnectRequest, peer: SpiffeId) -> None:
        self.session = session
        self.request = request
        """The CONNECT request: authority, baggage and the other headers."""
        self.peer = peer
        """Who is at the other end of the tunnel, verified."""
        self.stream_id = 0
        self.opened = False
        """The CONNECT was answered with 200."""
        self.closed = False
        """The application closed it."""
        self.response: Headers = ()
        """Client: headers of the answer."""
        self.processed = True
        """False when the peer says that it never acted on the request."""
        self.failure: HboneError | None = None
        """Why the stream broke; reading still gives what came before."""
        self.received_bytes = 0
        """Payload that arrived."""
        self.sent_bytes = 0
        """Payload that was queued to be sent."""
        self.on_over: Callable[[], object] | None = None
        """Called once when both directions have ended, in whatever way."""
        self._buffer = bytearray()
        self.read_ended = False
        """The peer sends no more."""
        self._write_ended = False
        self._gone = False

    @abc.abstractmethod
    def on_readable(self) -> None:
        """`read` has something to say."""

    @abc.abstractmethod
    def on_writable(self) -> None:
        """`write` has something to say."""

    @abc.abstractmethod
    def on_answer(self) -> None:
        """Client: `opened` or `failure` is set."""

    # The application's verbs

    def accept(self, headers: Headers = ()) -> None:
        """Server: answer 200. Does nothing when that was done, or the client is gone."""
        if self.opened or not self._lives:
            return
        self.opened = True
        self.session.engine.accept(self.stream_id, headers, self.sink)
        self.session.wake_writer()

    def reject(self, status: int, headers: Headers = ()) -> None:
        """Server: answer with another status, and close.

        Raises:
            LocalProtocolError: it was accepted before, or the status is not one of a refusal.
        """
        if self.opened:
            raise LocalProtocolError(f"stream {self.stream_id} was accepted; it can be reset, not rejected")
        if self._lives:
            self.session.engine.reject(self.stream_id, status, headers)
            self._leave()
        self.closed = True

    def read(self, max_bytes: int) -> bytes | None:
        """Take what arrived.

        Returns:
            Bytes; b"" at the end of the peer's direction; None when there is nothing yet.

        Raises:
            HboneError: the stream broke.
        """
        buffer = self._buffer
        if buffer:
            if len(buffer) <= max_bytes:
                data = bytes(buffer)
                buffer.clear()
            else:
                data = bytes(memoryview(buffer)[:max_bytes])
                del buffer[:max_bytes]
            if not self.read_ended and not self._gone:
                self.session.engine.release_capacity(self.stream_id, len(data))
                if self.session.engine.has_data_to_send:
                    self.session.wake_writer()
            return data
        if self.read_ended:
            return b""
        if self.failure is not None:
            raise self.failure
        return None

    def write(self, data: memoryview) -> int:
        """Queue as much of `data` as the windows and the queue take.

        Returns:
            Bytes taken; 0 when there is no room now, `on_writable` tells when there may be.

        Raises:
            HboneError: the stream broke.
        """
        capacity = self.capacity()
        if not capacity:
            return 0
        taken = self.session.engine.send_data(self.stream_id, data[:capacity])
        self.sent_bytes += taken
        self.session.wake_writer()
        return taken

    def capacity(self) -> int:
        """Bytes that `write` takes now.

        Raises:
            HboneError: the stream broke.
        """
        if self.failure is not None:
            raise self.failure
        if not self._lives and not self._gone:
            return 0  # why, is told next
        capacity = self.session.engine.send_capacity(self.stream_id)
        if not capacity:
            self.session.blocked[self] = None
        return capacity

    def end(self) -> None:
        """Send END_STREAM; the peer's direction goes on."""
        if self._write_ended or not self._lives:
            return
        self._write_ended = True
        self.session.engine.end_stream(self.stream_id)
        self._leave_if_done()
        self.session.wake_writer()

    def reset(self, code: ErrorCode = ErrorCode.CONNECT_ERROR) -> None:
        """End both directions abruptly; CONNECT_ERROR is what a reset TCP connection becomes. Source: RFC 9113 §8.5."""
        self.closed = True
        self._buffer.clear()
        if not self._gone:
            self.session.engine.reset(self.stream_id, code)
            self._leave()

    def close(self) -> None:
        """END_STREAM, then RST_STREAM if the peer still sends; a server that never answered answers 503 instead."""
        if self.closed:
            return
        if not self.opened and not self.session.client:
            self.reject(503)
            return
        self.closed = True
        self._buffer.clear()
        if self._gone:
            return
        if not self.opened:
            self.reset(ErrorCode.CANCEL)
            return
        self.end()
        if not self._gone:  # what was sent counts, the rest of what comes does not
            self.reset(ErrorCode.CANCEL if self.session.client else ErrorCode.NO_ERROR)

    @property
    def over(self) -> bool:
        """Both directions have ended, in whatever way."""
        return self._gone

    @property
    def write_ended(self) -> bool:
        """We sent END_STREAM."""
        return self._write_ended

    # What the session tells

    @property
    def _lives(self) -> bool:
        """False for what the engine knows to be over too, though the event that says so is not dispatched yet."""
        return not self._gone and self.session.engine.is_open(self.stream_id)

    def sink(self, view: memoryview) -> int:
        """Keep payload until it is read; nothing is credited before."""
        self.received_bytes += len(view)
        if self.closed:
            return len(view)
        self._buffer += view
        self.on_readable()
        return 0

    def answered(self, headers: Headers) -> None:
        """Client: CONNECT was answered with 200."""
        self.opened = True
        self.response = headers
        self.on_answer()

    def peer_ended(self) -> None:
        """END_STREAM came."""
        self.read_ended = True
        self._leave_if_done()
        self.on_readable()

    def peer_reset(self, code: ErrorCode, *, by_peer: bool, processed: bool) -> None:
        """RST_STREAM came, or was sent for a fault of the peer's."""
        self.processed = processed
        if by_peer:
            error = StreamResetError(code)
        else:
            error = StreamResetError(code, f"the stream was reset for a fault of the peer's: {code.name}")
        if self.opened and by_peer and code in READING_ENDS:
            self.read_ended = True
        self.fail(error)

    def fail(self, error: HboneError) -> None:
        """The stream is broken; what came before may still be read."""
        if self.failure is None:
            self.failure = error
        self._leave()
        self.on_answer()
        self.on_readable()
        self.on_writable()

    def _leave_if_done(self) -> None:
        if self.read_ended and self._write_ended:
            self._leave()

    def _leave(self) -> None:
        if not self._gone:
            self._gone = True
            self.session.forget(self)
            if self.on_over is not None:
                self.on_over()
