"""One end of a tunnel connection: TLS with HTTP/2 on it. Ciphertext in, events and stream data out; no I/O, no clock.

```text
loop:
    events = endpoint.receive_data(ciphertext, now)     # payload goes to the sinks of its streams meanwhile
    endpoint.engine.send_data(stream_id, payload)       # and every other verb of the engine
    while n := endpoint.data_to_send_into(buffer):      # ciphertext to write to the transport
        ...
    wait until endpoint.next_deadline(), then endpoint.on_time(now)
```

An exception of `receive_data`, `receive_from` or `on_time` ends the connection: write what `data_to_send_into`
still has, an alert or GOAWAY, and close the transport.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hbone.config import ConnectionConfig
from hbone.engine import Engine
from hbone.errors import ErrorCode, PeerIdentityError, TlsError
from hbone.events import HandshakeCompleted, TransportEnded
from hbone.tls import IoBuffer, TlsConnection

if TYPE_CHECKING:
    from collections.abc import Callable

    from hbone.engine.flow import WindowBudget
    from hbone.events import Event
    from hbone.identity import SpiffeId
    from hbone.tls import TlsContext

__all__ = ["FRAME_HEADER", "PLAINTEXT", "SMALL_PAYLOAD", "Endpoint"]

FRAME_HEADER: Final = 9
"""Bytes that `send_from` needs free before a payload."""
SMALL_PAYLOAD: Final = 4096
"""Payloads up to here are copied, so that those of one turn share a TLS record and its 22 bytes and one call."""

_FEED: Final = 256 * 1024
_QUIET: Final = 1.0
"""Seconds after which a connection that hears nothing gives memory back, for others to take."""

PLAINTEXT: Final = IoBuffer(256 * 1024)
"""Decrypted bytes on their way to the sinks; one for the process, so an idle tunnel owns no large buffer."""
_buffers: Final = [PLAINTEXT]  # taken while in use: a second thread, or a tunnel inside a tunnel, makes itself another

_NOTHING: Final[list[Event]] = []


class Endpoint:
    """TLS and HTTP/2 of one tunnel connection.

    Args:
        context: certificate, roots and parameters of TLS; one context serves many connections.
        client: whether we dialled.
        authorize: says whether the verified peer may go on; asked once, while an alert can
            still tell the peer.
        config: parameters of HTTP/2.
        budget: what receive windows may grow by, shared with other connections.
        now: seconds on any monotonic clock, the same in every call.
    """

    def __init__(
        self,
        context: TlsContext,
        *,
        client: bool,
        authorize: Callable[[SpiffeId], bool],
        config: ConnectionConfig | None = None,
        budget: WindowBudget | None = None,
        now: float,
    ) -> None:
        self.config = config or ConnectionConfig()
        self.engine = Engine(client=client, config=self.config, budget=budget)
        self.tls = TlsConnection(context, server=not client, authorize=authorize)
        self.peer: SpiffeId | None = None
        """Who is at the other end; verified and authorized."""
        self.established = False
        """The handshake is complete and HTTP/2 has begun."""
        self.ended = False
        """Nothing further is read: the transport ended, the peer said close_notify, or something failed."""
        self.opened_at = now
        self.heard_at = now
        """When the peer was last heard."""
        self._closed = False
        self._failed = False
        self._ciphertext = client
        self._left_over = False
        self._trimmed_at: float | None = None  # `heard_at` of that time
        if client:
            self.tls.handshake()

    # Receiving

    def receive_data(self, data: bytes | bytearray | memoryview, now: float) -> list[Event]:
        """Take ciphertext of any length.

        Raises:
            TlsError: a record or the handshake is broken; an alert is left to send.
            PeerIdentityError: the peer is not one that we accept; the same.
            RemoteProtocolError: HTTP/2 was broken; GOAWAY is left to send.
        """
        if len(data) <= _FEED:
            self.tls.receive_data(data)
            return self._read(now)
        events: list[Event] = []
        view = memoryview(data)
        for start in range(0, len(view), _FEED):
            self.tls.receive_data(view[start : start + _FEED])
            events += self._read(now)
        return events

    def receive_from(self, buffer: IoBuffer, nbytes: int, now: float) -> list[Event]:
        """Take the first `nbytes` of ciphertext of `buffer`, at most 256 KiB; otherwise as `receive_data`.

        Hot path. Sinks are called meanwhile; they may not call back into this endpoint's receiving methods.
        """
        self.tls.receive_from(buffer, nbytes)
        return self._read(now)

    def receive_eof(self, now: float) -> list[Event]:
        """The transport ended. Without a close_notify before it, that is a truncation. Source: RFC 8446 §6.1."""
        if self.ended:
            return []
        if not self.established:
            return self._end("the peer closed the connection during the TLS handshake", clean=False)
        return self._end("the peer closed the connection without a TLS close_notify", clean=False)

    def _read(self, now: float) -> list[Event]:
        """Hot path, and therefore one function."""
        self.heard_at = now
        if self.ended:
            return []
        events = _NOTHING
        tls = self.tls
        buffer = _buffers.pop() if _buffers else IoBuffer(PLAINTEXT.size)
        try:
            if not self.established:
                if not self._shake_hands(now):
                    return []
                events = [HandshakeCompleted()]
            engine = self.engine
            size = buffer.size
            while filled := tls.read_into(buffer, 0, size):
                more = engine.receive_data(buffer.view[:filled], now)
                if more:
                    events = events + more if events else more
                if not tls.has_ciphertext():
                    break
        except TlsError:
            self._failed = self.ended = self._ciphertext = True
            raise
        except BaseException:
            self.ended = self._ciphertext = True
            raise
        finally:
            _buffers.append(buffer)
        if tls.closed_by_peer and not self.ended:
            return events + self._end("the peer closed the connection", clean=self.engine.open_streams == 0)
        return events

    def _shake_hands(self, now: float) -> bool:
        self._ciphertext = True
        tls = self.tls
        if not tls.handshake():
            return False
        peer = tls.peer_id
        if peer is None:
            raise PeerIdentityError("the peer presented no certificate")
        self.peer = peer
        self.established = True
        self.engine.start(now)
        return True

    def _end(self, reason: str, *, clean: bool) -> list[Event]:
        self.ended = True
        self.engine.connection_lost()
        return [TransportEnded(reason=reason, clean=clean)]

    # Sending

    def send_from(self, stream_id: int, buffer: IoBuffer, nbytes: int) -> None:
        """Send the payload at `buffer[9:9 + nbytes]` as one DATA frame; its header is written before it in place.

        Hot path: a large payload is encrypted where it stands, a small one joins what the turn queued.

        Raises:
            LocalProtocolError: more than `engine.send_capacity`, or the stream takes no data.
        """
        engine = self.engine
        engine.prefix_data(stream_id, buffer.array, nbytes)
        out = engine.out
        if nbytes <= SMALL_PAYLOAD:
            out += buffer.view[: FRAME_HEADER + nbytes]
            return
        tls = self.tls
        if out:
            tls.write(out)
            out.clear()
        tls.write_from(buffer, 0, FRAME_HEADER + nbytes)
        self._ciphertext = True

    def data_to_send_into(self, buffer: IoBuffer) -> int:
        """Encrypt what is queued, and put ciphertext into `buffer`.

        Returns:
            Bytes of ciphertext; less than `buffer.size` means that there is no more.
        """
        out = self.engine.out
        if out and self.established and not self._closed and not self._failed:
            self.tls.write(out)
            out.clear()
        nbytes = self.tls.data_to_send_into(buffer)
        self._ciphertext = nbytes == buffer.size
        return nbytes

    def data_to_send(self) -> bytes:
        """Ciphertext to write to the transport, at most 256 KiB at once; b"" when there is none.

        What did not fit the last time goes first and alone: the engine's queue has a bound, ciphertext has none, so
        nothing more is encrypted while some of it waits.
        """
        buffer = _buffers.pop() if _buffers else IoBuffer(PLAINTEXT.size)
        try:
            nbytes = self.tls.data_to_send_into(buffer) if self._left_over else 0
            if not nbytes:
                nbytes = self.data_to_send_into(buffer)
            self._left_over = self._ciphertext = nbytes == buffer.size
            return bytes(buffer.view[:nbytes])
        finally:
            _buffers.append(buffer)

    @property
    def wants_flush(self) -> bool:
        """Whether `data_to_send_into` has something."""
        return self._ciphertext or (
            bool(self.engine.out) and self.established and not self._closed and not self._failed
        )

    def close(self, code: ErrorCode = ErrorCode.NO_ERROR) -> None:
        """Queue GOAWAY, then close_notify. Open streams end with the connection; `engine.drain` lets them finish."""
        if self._closed or self._failed:  # after a failure the alert is all that TLS may still send
            return
        self._closed = True
        if self.established:
            if not self.engine.closed:
                self.engine.close(code)
            out = self.engine.out
            if out:
                self.tls.write(out)
                out.clear()
        self.tls.shutdown()
        self._ciphertext = True

    # Time

    def next_deadline(self) -> float | None:
        """When `on_time` is due; None when nothing waits."""
        if self.ended:
            return None
        if not self.established:
            return self.opened_at + self.config.handshake_timeout
        return self.engine.next_deadline()

    def on_time(self, now: float) -> list[Event]:
        """Do what is due at `now`; calling it early does nothing."""
        if self.ended:
            return []
        if self.established:
            if self._trimmed_at != self.heard_at and now - self.heard_at > _QUIET:
                self._trimmed_at = self.heard_at
                self.tls.trim()
                self.engine.trim(now)
            return self.engine.on_time(now)
        timeout = self.config.handshake_timeout
        if now < self.opened_at + timeout:
            return []
        return self._end(f"the TLS handshake was not complete after {timeout:g} s", clean=False)
