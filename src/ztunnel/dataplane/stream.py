"""One stream of a tunnel, as a relay and as its user see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from hbone.errors import LocalProtocolError
from ztunnel.dataplane.relay import READ_BUFFER

if TYPE_CHECKING:
    from hbone.errors import ErrorCode
    from hbone.events import Headers
    from ztunnel.dataplane.relay import Relay
    from ztunnel.dataplane.tunnel import Tunnel
    from ztunnel.errors import DataplaneError

__all__ = ["NearEnd", "StreamEnd", "StreamUser"]

_FLUSH_AT_ONCE: Final = 32 * 1024  # a chunk that large is sent while it is in the cache; smaller ones share a send
_SMALL_LIMIT: Final = 64 * 1024  # small frames that gather before they are sent in the middle of a turn


class StreamUser(Protocol):
    """Whose stream it is."""

    def stream_accepted(self, headers: Headers) -> None:
        """Client: 200."""

    def stream_refused(self, status: int) -> None:
        """Client: another status; the stream is closed."""

    def stream_reset(self, code: ErrorCode, *, processed: bool) -> None:
        """The peer ended the stream abruptly. Not processed: it may be tried on another tunnel."""

    def stream_lost(self, error: DataplaneError) -> None:
        """The tunnel ended under it."""


class NearEnd(Protocol):
    """Where a stream's bytes go, and come from: a relay, or a tunnel inside the stream."""

    def deliver(self, view: memoryview) -> int:
        """The stream's sink: keep or write all of `view`, and close nothing. Returns the bytes that are done with."""

    def resume(self) -> bool:
        """The stream takes bytes again. Returns whether any were there for it."""

    def finish(self) -> None:
        """The peer sends no more."""


class StreamEnd:
    """One stream of a tunnel, as the far end of a relay."""

    __slots__ = (
        "_capacity",
        "_engine",
        "_out",
        "_send_from",
        "closed",
        "ended",
        "relay",
        "sent_end",
        "stream_id",
        "tunnel",
        "user",
        "waits",
    )

    def __init__(self, tunnel: Tunnel, stream_id: int) -> None:
        self.tunnel = tunnel
        self.stream_id = stream_id
        self.user: StreamUser | None = None
        self.relay: NearEnd | None = None
        self.closed = False
        """Both directions ended, or it was reset."""
        self.ended = False
        """The peer sent END_STREAM."""
        self.sent_end = False
        self.waits = False
        self._engine = engine = tunnel.engine
        self._capacity = engine.send_capacity
        self._out = engine.out
        self._send_from = tunnel.endpoint.send_from

    def let_go(self) -> None:
        """It is over: refer to nobody, so that they go without the garbage collector."""
        self.user = self.relay = None

    # The far end of a relay

    def room(self) -> int:
        """Bytes that can be sent now; 0 puts it in the queue of those that wait."""
        if not self.tunnel.blocked and not self.closed:
            try:
                room = self._capacity(self.stream_id)
            except LocalProtocolError:  # one read brought what we act on and the stream's end, which is told next
                return 0
            if room > 0:
                burst = self.tunnel.burst
                return room if room < burst else burst
        self.tunnel.wait(self)
        return 0

    def take(self, nbytes: int) -> None:
        """Send what the relay has read."""
        self._send_from(self.stream_id, READ_BUFFER, nbytes)
        tunnel = self.tunnel
        if nbytes >= _FLUSH_AT_ONCE or len(self._out) >= _SMALL_LIMIT:
            tunnel.flush()
        elif not tunnel.dirty:
            tunnel.dirty = True
            tunnel.reactor.dirty.append(tunnel)

    def end(self) -> None:
        """END_STREAM."""
        if not self.closed:
            self._engine.end_stream(self.stream_id)
            self.sent_end = True
            self.tunnel.mark_dirty()
            if self.ended:
                self.tunnel.forget(self)
                self.let_go()

    def reset(self, code: ErrorCode) -> None:
        """RST_STREAM."""
        if not self.closed:
            self._engine.reset(self.stream_id, code)
            self.tunnel.mark_dirty()
            self.tunnel.forget(self)
            self.let_go()

    def credit(self, nbytes: int) -> None:
        """The app took bytes that were kept."""
        if not self.closed:
            self._engine.release_capacity(self.stream_id, nbytes)
            self.tunnel.mark_dirty()

    # The server's answers

    def accept(self, headers: Headers, relay: Relay) -> None:
        """200; from here on the peer's bytes go to `relay`, those that came early at once."""
        self.relay = relay
        self._engine.accept(self.stream_id, headers, relay.deliver)
        self.tunnel.mark_dirty()
        if self.ended:
            relay.finish()

    def reject(self, status: int) -> None:
        """Another status; the stream is closed."""
        if not self.closed:
            self._engine.reject(self.stream_id, status)
            self.tunnel.mark_dirty()
            self.tunnel.forget(self)
            self.let_go()
