"""An Endpoint on a socket, and the streams on it: the adapter of `hbone.endpoint` to the reactor.

Each callback reads at most twice, and every layer is called plainly: socket -> TLS -> engine -> the stream's sink,
which is the relay's `deliver`. What the streams of one turn send leaves in one record run and one `send`.

When the socket takes no more, the ciphertext that was left over is `_pending`, streams stop reading from their apps
and wait in `_waiting`; the same when a window is used up. They are served in turn, the ones that got nothing first.

A long file, because it is one adapter, and compiled as one.
"""

from __future__ import annotations

import collections
import select
from typing import TYPE_CHECKING, Final, Protocol

from hbone.errors import ErrorCode, HboneError, PeerRevokedError, RemoteProtocolError
from hbone.events import (
    ConnectAccepted,
    ConnectReceived,
    ConnectRefused,
    HandshakeCompleted,
    PeerDraining,
    PingAcknowledged,
    SendCapacityIncreased,
    StreamEnded,
    StreamReset,
    TransportEnded,
)
from hbone.tls import IoBuffer
from ztunnel.dataplane.farewell import close_when_delivered
from ztunnel.dataplane.packets import burst_of, packet_of
from ztunnel.dataplane.reactor import GONE, READ_WRITE, WRITE
from ztunnel.dataplane.relay import CHUNK
from ztunnel.dataplane.sockets import DONTWAIT
from ztunnel.dataplane.stream import StreamEnd, StreamUser
from ztunnel.errors import ConnectFailed, ConnectTimedOut, DataplaneError, Http2Failed, PeerRevoked, TlsFailed

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable

    from hbone.endpoint import Endpoint
    from hbone.events import Event, Headers
    from hbone.identity import SpiffeId
    from ztunnel.dataplane.reactor import Reactor
    from ztunnel.dataplane.sockets import SocketCalls
    from ztunnel.dataplane.stream import NearEnd
    from ztunnel.mesh.address import Address

__all__ = ["Tunnel", "TunnelOwner"]

_CIPHERTEXT: Final = IoBuffer(256 * 1024)
_OUT: Final = IoBuffer(256 * 1024)
_OUT_VIEW: Final = memoryview(_OUT.array)
_READS: Final = 2
_ENDING_SECONDS: Final = 30.0  # for the last bytes of a tunnel that is to be closed
_WAITING_LIMIT: Final = 256  # and twice the open streams: beyond that the closed ones are taken out
_HANGUP: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_ANYTHING_ELSE: Final = ~WRITE


class TunnelOwner(Protocol):
    """Who dialled or accepted the tunnel."""

    def tunnel_established(self, tunnel: Tunnel) -> None:
        """The handshake is complete, the peer's identity verified."""

    def tunnel_lost(self, tunnel: Tunnel, error: DataplaneError | None) -> None:
        """It is closed, its streams were told. No error: it ended as it should."""

    def tunnel_draining(self, tunnel: Tunnel) -> None:
        """The peer takes no further stream."""

    def tunnel_alive(self, tunnel: Tunnel) -> None:
        """A PING was answered."""

    def stream_finished(self, tunnel: Tunnel) -> None:
        """One stream less."""

    def connect_received(self, end: StreamEnd, headers: Headers) -> None:
        """Server: somebody asks for a stream; set `end.user`, and answer by `end.accept` or `end.reject`."""


class Tunnel:
    """One tunnel connection, either side.

    Args:
        reactor: watches the socket.
        calls: the socket calls.
        sock: connecting, or accepted; closed by the tunnel.
        endpoint: its TLS and HTTP/2.
        owner: told what happens.
        address: the other end.
        connected: whether the socket is; a client's is on the way.
    """

    __slots__ = (
        "_calls",
        "_calm",
        "_ending",
        "_hangup",
        "_out",
        "_owner",
        "_pending",
        "_queued",
        "_recv_into",
        "_sock",
        "_waiting",
        "address",
        "blocked",
        "burst",
        "closed",
        "closing",
        "connected",
        "dirty",
        "endpoint",
        "engine",
        "pinged_at",
        "reactor",
        "streams",
    )

    def __init__(
        self,
        reactor: Reactor,
        calls: SocketCalls,
        sock: socket.SocketType,
        endpoint: Endpoint,
        owner: TunnelOwner,
        address: Address,
        *,
        connected: bool,
    ) -> None:
        self.reactor = reactor
        self.endpoint = endpoint
        self.engine = endpoint.engine
        self.address = address
        self.connected = connected
        self.closed = False
        self.closing = False
        """It ends, cleanly, when its last stream has."""
        self.blocked = False
        """The socket takes no more; `_pending` waits for it."""
        self.burst = CHUNK
        """Bytes of payload to send at once, so that they leave in one packet."""
        self.dirty = False
        """`flush` is called when the turn ends."""
        self.streams: dict[int, StreamEnd] = {}
        self.pinged_at: float | None = None
        """When the pool asked whether it lives."""
        self._calm = False  # the handshake's last bytes are sent: only what the engine queues is to be flushed
        self._out = endpoint.engine.out
        self._calls = calls
        self._owner = owner
        self._sock = sock
        self._recv_into = sock.recv_into
        self._pending = bytearray()
        self._waiting: collections.deque[StreamEnd] | None = None  # made for the first, as an empty one is 760 bytes
        self._hangup = False
        self._queued = False
        self._ending: float | None = None  # it is closed once all was sent, or at that time
        self._watch()
        reactor.sweep(self)

    def _watch(self) -> None:
        self.reactor.add(self._sock.fileno(), self, READ_WRITE)

    @property
    def peer(self) -> SpiffeId | None:
        """Who is at the other end, verified."""
        return self.endpoint.peer

    @property
    def established(self) -> bool:
        """Whether the handshake is complete."""
        return self.endpoint.established

    # Verbs

    def connect(self, headers: Headers, user: StreamUser, relay: NearEnd) -> StreamEnd:
        """Client: ask for a stream, whose bytes go to `relay`.

        Raises:
            LocalProtocolError: the tunnel takes no further stream.
        """
        end = StreamEnd(self, self.engine.connect(headers, relay.deliver))
        end.user = user
        end.relay = relay
        self.streams[end.stream_id] = end
        self.mark_dirty()  # perhaps from a Trio task, while the loop sleeps
        return end

    def ping(self) -> None:
        """Ask whether the peer lives; the owner hears of the answer."""
        self.pinged_at = self.reactor.now
        self.engine.ping(self.reactor.now)
        self.mark_dirty()

    def drain(self) -> None:
        """No further stream; closed when the last one ends. Source: RFC 9113 §6.8."""
        if self.closed or self.closing:
            return
        self.closing = True
        if self.established:
            self.engine.drain(self.reactor.now)
            self.mark_dirty()
        else:
            self.close()

    def close(self, error: DataplaneError | None = None, *, code: ErrorCode = ErrorCode.NO_ERROR) -> None:
        """GOAWAY and close_notify, as far as the socket takes them; streams that are open are lost."""
        if not self.closed:
            if self.connected:
                try:
                    self.endpoint.close(code)
                except HboneError:
                    pass  # it is broken already, and says nothing further
                self.flush()
            self._lose(error)

    def close_when_sent(self) -> None:
        """Close it, but not before all that was to be sent is: its last stream may have ended with bytes under way."""
        if not self.blocked:
            self.flush()
        if not self.blocked:
            self.close()
        elif self._ending is None:
            self._ending = self.reactor.now + _ENDING_SECONDS

    def mark_dirty(self) -> None:
        """Flush when the turn ends."""
        if not self.dirty and not self.closed:
            self.dirty = True
            self.reactor.flush_later(self)

    def wait(self, end: StreamEnd) -> None:
        """Resume the relay of `end` when the tunnel takes bytes again."""
        if not end.waits and not end.closed:
            end.waits = True
            waiting = self._waiting
            if waiting is None:
                waiting = self._waiting = collections.deque()
            waiting.append(end)
            if len(waiting) > _WAITING_LIMIT + 2 * len(self.streams):
                self._waiting = collections.deque(end for end in waiting if not end.closed)

    def forget(self, end: StreamEnd) -> None:
        """The stream is over."""
        if not end.closed:
            end.closed = True
            self.streams.pop(end.stream_id, None)
            self._owner.stream_finished(self)
            if self.closing and not self.streams:
                self.reactor.later(self._go_on_draining)

    # Socket

    def on_event(self, mask: int) -> None:
        """The socket can be read or written."""
        if not self.connected:
            self._connect_ended(mask)
            return
        if mask & WRITE and self.blocked:
            self._write_pending()
        if mask & _ANYTHING_ELSE:
            if mask & _HANGUP:
                self._hangup = True
            if self.endpoint.established:
                self.receive()
            elif not self._queued:
                self._queued = True
                self.reactor.handshake(self.receive)

    def on_fault(self) -> None:
        """A fault of ours: the tunnel ends."""
        if not self.closed:
            self._lose(Http2Failed("internal error"))

    def on_time(self, now: float) -> None:
        """Deadlines: handshake, keepalive, drain."""
        if self.closed:
            return
        if self._ending is not None and now >= self._ending:
            self._lose(None)
            return
        events = self.endpoint.on_time(now)
        if events:
            self._handle(events)
        if not self.closed and self.endpoint.wants_flush:
            self.mark_dirty()

    def receive(self) -> None:
        """Read, decrypt, and give each stream its bytes."""
        self._queued = False
        endpoint = self.endpoint
        for _ in range(_READS):
            if self.closed:
                return
            try:
                nbytes = self._recv_into(_CIPHERTEXT.view, 0, DONTWAIT)
            except BlockingIOError:
                return
            except OSError as exc:
                self._lose(ConnectFailed(exc.strerror or str(exc)))
                return
            try:
                if nbytes:
                    events = endpoint.receive_from(_CIPHERTEXT, nbytes, self.reactor.now)
                else:
                    events = endpoint.receive_eof(self.reactor.now)
            except HboneError as exc:
                self._broken(exc)
                return
            if events:
                self._handle(events)
            if not self.dirty and (self._out or (not self._calm and endpoint.wants_flush)) and not self.closed:
                self.dirty = True
                self.reactor.dirty.append(self)
            if self.closing and not self.closed:
                self._go_on_draining()
            if not nbytes:
                self._lose(None if self.closing else ConnectFailed("the tunnel was closed"))
                return
            if nbytes < _CIPHERTEXT.size and not self._hangup:
                return
        self.reactor.later(self.receive)

    def _go_on_draining(self) -> None:
        """The engine's second GOAWAY, or its end, may be due."""
        due = self.endpoint.next_deadline()
        if due is not None and due <= self.reactor.now:
            self.on_time(self.reactor.now)

    def flush(self) -> None:
        """Encrypt what is queued, and send."""
        self.dirty = False
        if self.blocked or self.closed or not self.connected:
            return
        endpoint = self.endpoint
        size = _OUT.size
        while True:
            nbytes = endpoint.data_to_send_into(_OUT)
            if not nbytes:
                return
            try:
                sent = self._sock.send(_OUT_VIEW[:nbytes], DONTWAIT)
            except BlockingIOError:
                sent = 0
            except OSError as exc:
                self._lose_later(exc)
                return
            if sent < nbytes:
                self._pending += _OUT_VIEW[sent:nbytes]
                self.blocked = True
                return
            if nbytes < size:
                self._calm = endpoint.established
                return

    def _write_pending(self) -> None:
        pending = self._pending
        try:
            sent = self._sock.send(pending, DONTWAIT)
        except BlockingIOError:
            return
        except OSError as exc:
            self._lose_later(exc)
            return
        del pending[:sent]
        if pending:
            return
        self.blocked = False
        self.flush()
        self._serve_waiting()
        if self._ending is not None:
            self.close_when_sent()

    def _lose_later(self, exc: OSError) -> None:
        """A relay may be in the middle of a read: it must not lose its stream under its feet."""
        self.blocked = True
        error = ConnectFailed(exc.strerror or str(exc))
        self.reactor.later(lambda: self._lose(error))

    def _connect_ended(self, mask: int) -> None:
        if mask & GONE:
            exc = self._calls.error_of(self._sock)
            why = "connection closed" if exc is None else exc.strerror or str(exc)
            self._lose(ConnectTimedOut(why) if isinstance(exc, TimeoutError) else ConnectFailed(why))
        elif mask & WRITE:
            self.connected = True
            self.flush()

    # Streams

    def _serve_waiting(self) -> None:
        """Let each stream that waits send once; those that got nothing stay in front."""
        waiting = self._waiting
        if not waiting:
            return
        unserved: list[StreamEnd] = []
        for _ in range(len(waiting)):
            if self.blocked or self.closed:
                break
            end = waiting.popleft()
            end.waits = False
            relay = end.relay
            if end.closed or relay is None:
                continue
            if not relay.resume() and end.waits:
                waiting.pop()  # it has just been put at the back
                unserved.append(end)
        waiting.extendleft(reversed(unserved))

    def _handle(self, events: Iterable[Event]) -> None:
        streams = self.streams
        arrived: list[tuple[StreamEnd, Headers]] = []
        for event in events:
            if isinstance(event, SendCapacityIncreased):
                end = streams.get(event.stream_id)
                if end is not None:
                    if end.relay is not None:
                        end.relay.resume()
                elif event.stream_id == 0:
                    self._serve_waiting()
            elif isinstance(event, StreamEnded):
                end = streams.get(event.stream_id)
                if end is not None:
                    self._stream_ended(end)
            elif isinstance(event, ConnectAccepted):
                end = streams.get(event.stream_id)
                if end is not None and end.user is not None:
                    end.user.stream_accepted(event.headers)
            elif isinstance(event, ConnectReceived):
                end = streams[event.stream_id] = StreamEnd(self, event.stream_id)
                end.ended = event.ended
                arrived.append((end, event.headers))
            elif isinstance(event, StreamReset):
                end = streams.get(event.stream_id)
                if end is not None:
                    self.forget(end)
                    if end.user is not None:
                        end.user.stream_reset(event.code, processed=event.processed)
                    end.let_go()
            elif isinstance(event, ConnectRefused):
                end = streams.get(event.stream_id)
                if end is not None:
                    self.forget(end)
                    if end.user is not None:
                        end.user.stream_refused(event.status)
                    end.let_go()
            else:
                self._connection_event(event)
            if self.closed:
                return
        # Only now is it known which of them the same batch has reset: those are never dialled.
        for end, headers in arrived:
            if not end.closed:
                self._owner.connect_received(end, headers)

    def _connection_event(self, event: Event) -> None:
        if isinstance(event, HandshakeCompleted):
            self.burst = self._best_burst()
            self._owner.tunnel_established(self)
        elif isinstance(event, PingAcknowledged):
            if self.pinged_at is not None:
                self.pinged_at = None
                self._owner.tunnel_alive(self)
        elif isinstance(event, PeerDraining):
            self._owner.tunnel_draining(self)
        elif isinstance(event, TransportEnded):
            if event.clean:
                self.close_when_sent()
            elif not self.connected:
                self._lose(ConnectTimedOut(event.reason))
            else:
                self.close(Http2Failed(event.reason) if self.established else TlsFailed(event.reason))

    def _best_burst(self) -> int:
        return min(burst_of(packet_of(self._calls.segment(self._sock))), CHUNK)

    def _stream_ended(self, end: StreamEnd) -> None:
        end.ended = True
        if end.sent_end:
            self.forget(end)
        if end.relay is not None:
            end.relay.finish()
        if end.closed:
            end.let_go()

    # The end

    def _broken(self, exc: HboneError) -> None:
        """The peer broke TLS or HTTP/2: the alert or GOAWAY is sent as far as the socket takes it."""
        self.flush()
        if isinstance(exc, RemoteProtocolError):
            self._lose(Http2Failed(str(exc)))
        else:
            self._lose((PeerRevoked if isinstance(exc, PeerRevokedError) else TlsFailed)(str(exc)))

    def _lose(self, error: DataplaneError | None) -> None:
        if self.closed:
            return
        self.closed = True
        self._waiting = None
        self.reactor.unsweep(self)
        if error is None and not self._pending:
            close_when_delivered(self.reactor, self._calls, self._sock)
        else:
            self._pending.clear()
            self.reactor.close(self._sock)
        self.engine.connection_lost()
        streams = list(self.streams.values())
        self.streams.clear()
        reason = error or Http2Failed("the tunnel was closed")
        for end in streams:
            end.closed = True
            if end.user is not None:
                end.user.stream_lost(reason)
            end.let_go()
        self._owner.tunnel_lost(self, error)
