"""An endpoint with its streams as applications see them; what the Trio and asyncio adapters share. No I/O, no clock.

`Session` turns the endpoint's events into calls on its streams; `SessionStream` keeps what an application has not read
yet, and how each direction ended. An adapter derives from both and waits where these say "not yet".
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Generic, TypeVar

from hbone.connect import Authority, BadConnect, ConnectRequest
from hbone.endpoint import Endpoint
from hbone.errors import (
    ConnectionLost,
    ConnectRejected,
    ErrorCode,
    HboneError,
    LocalProtocolError,
    StreamResetError,
)
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
from hbone.identity import SpiffeId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hbone.config import ConnectionConfig
    from hbone.engine.flow import WindowBudget
    from hbone.events import Event, Headers
    from hbone.identity import Authorizer, Identity
    from hbone.tls import TlsContext

__all__ = ["READING_ENDS", "Contexts", "Session", "SessionStream", "as_peers", "as_request", "dialing_endpoint"]

READING_ENDS = frozenset({ErrorCode.NO_ERROR, ErrorCode.CANCEL})
"""RST_STREAM codes that mean END_STREAM to who reads; with any other the stream is broken. To who writes, every code
means broken. Source: ztunnel's mapping of HTTP/2 to TCP."""

S = TypeVar("S", bound="SessionStream")


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
        self._buffer = bytearray()
        self._read_ended = False
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
        self.session.engine.accept(self.stream_id, headers, self._sink)
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
            if not self._read_ended and not self._gone:
                self.session.engine.release_capacity(self.stream_id, len(data))
                if self.session.engine.has_data_to_send:
                    self.session.wake_writer()
            return data
        if self._read_ended:
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
    def write_ended(self) -> bool:
        """We sent END_STREAM."""
        return self._write_ended

    # What the session tells

    @property
    def _lives(self) -> bool:
        """False for what the engine knows to be over too, though the event that says so is not dispatched yet."""
        return not self._gone and self.session.engine.is_open(self.stream_id)

    def _sink(self, view: memoryview) -> int:
        if self.closed:
            return len(view)
        self._buffer += view
        self.on_readable()
        return 0

    def _answered(self, headers: Headers) -> None:
        self.opened = True
        self.response = headers
        self.on_answer()

    def _peer_ended(self) -> None:
        self._read_ended = True
        self._leave_if_done()
        self.on_readable()

    def _peer_reset(self, code: ErrorCode, *, by_peer: bool, processed: bool) -> None:
        self.processed = processed
        if by_peer:
            error = StreamResetError(code)
        else:
            error = StreamResetError(code, f"the stream was reset for a fault of the peer's: {code.name}")
        if self.opened and by_peer and code in READING_ENDS:
            self._read_ended = True
        self._fail(error)

    def _fail(self, error: HboneError) -> None:
        if self.failure is None:
            self.failure = error
        self._leave()
        self.on_answer()
        self.on_readable()
        self.on_writable()

    def _leave_if_done(self) -> None:
        if self._read_ended and self._write_ended:
            self._leave()

    def _leave(self) -> None:
        if not self._gone:
            self._gone = True
            self.session.forget(self)


class Session(abc.ABC, Generic[S]):
    """One tunnel connection and its streams."""

    def __init__(self, endpoint: Endpoint, *, client: bool) -> None:
        self.endpoint = endpoint
        self.engine = endpoint.engine
        self.client = client
        self.streams: dict[int, S] = {}
        self.blocked: dict[SessionStream, None] = {}
        """Streams that wait for room to send, first come first served."""
        self.failure: HboneError | None = None
        """Why the connection is over; None while it lives."""

    @abc.abstractmethod
    def close(self) -> None:
        """End the connection and its streams now."""

    @abc.abstractmethod
    def wake_writer(self) -> None:
        """The endpoint has something to send."""

    @abc.abstractmethod
    def make_stream(self, request: ConnectRequest, peer: SpiffeId) -> S:
        """A stream of the adapter's kind."""

    @abc.abstractmethod
    def on_established(self) -> None:
        """The handshake is complete."""

    @abc.abstractmethod
    def on_request(self, stream: S) -> None:
        """Server: a client asks for `stream`; it waits for `accept` or `reject`."""

    @abc.abstractmethod
    def on_finished(self, stream: S) -> None:
        """`stream` ended, in whichever way."""

    @abc.abstractmethod
    def on_draining(self) -> None:
        """The peer takes no further stream."""

    @abc.abstractmethod
    def on_pong(self) -> None:
        """The peer answered a PING."""

    @abc.abstractmethod
    def on_lost(self) -> None:
        """`failure` is set and the streams have been told."""

    def open(self, request: ConnectRequest) -> S:
        """Client: ask for a stream.

        Raises:
            LocalProtocolError: the tunnel takes none now.
            ConnectionLost: the tunnel is over.
        """
        if self.failure is not None:
            raise ConnectionLost(str(self.failure)) from self.failure
        peer = self.endpoint.peer
        if peer is None:
            raise LocalProtocolError("the TLS handshake is not complete; wait for it before opening a stream")
        stream = self.make_stream(request, peer)
        stream.stream_id = self.engine.connect(request.to_headers(), stream._sink)
        self.streams[stream.stream_id] = stream
        self.wake_writer()
        return stream

    def dispatch(self, events: Iterable[Event]) -> None:
        """Tell streams and adapter what the peer did."""
        streams = self.streams
        for event in events:
            match event:
                case SendCapacityIncreased(stream_id=0):
                    self.unblock()
                case SendCapacityIncreased(stream_id=stream_id):
                    if (stream := streams.get(stream_id)) is not None:
                        self.blocked.pop(stream, None)
                        stream.on_writable()
                case StreamEnded(stream_id=stream_id):
                    if (stream := streams.get(stream_id)) is not None:
                        stream._peer_ended()
                case StreamReset(stream_id=stream_id, code=code, by_peer=by_peer, processed=processed):
                    if (stream := streams.get(stream_id)) is not None:
                        stream._peer_reset(code, by_peer=by_peer, processed=processed)
                case ConnectReceived():
                    self._received(event)
                case ConnectAccepted(stream_id=stream_id, headers=headers):
                    if (stream := streams.get(stream_id)) is not None:
                        stream._answered(headers)
                case ConnectRefused(stream_id=stream_id, status=status):
                    if (stream := streams.get(stream_id)) is not None:
                        stream._fail(ConnectRejected(status))
                case HandshakeCompleted():
                    self.on_established()
                case PeerDraining():
                    self.on_draining()
                case PingAcknowledged():
                    self.on_pong()
                case TransportEnded(reason=reason):
                    self.lose(ConnectionLost(reason))

    def lose(self, failure: HboneError) -> None:
        """The connection is over. Streams give what they hold and then break."""
        if self.failure is not None:
            return
        self.failure = failure
        self.endpoint.close()  # takes what is queued along, a GOAWAY too
        broken = failure if isinstance(failure, ConnectionLost) else ConnectionLost(str(failure))
        if broken is not failure:
            broken.__cause__ = failure
        for stream in list(self.streams.values()):
            stream._fail(broken)
        self.blocked.clear()
        self.engine.connection_lost()
        self.on_lost()

    def unblock(self) -> None:
        """There is room in the queue, or in the connection's window: each stream that waits may ask again."""
        if self.blocked:
            blocked = list(self.blocked)
            self.blocked.clear()
            for stream in blocked:
                stream.on_writable()

    def forget(self, stream: SessionStream) -> None:
        """`stream` is over."""
        self.blocked.pop(stream, None)
        known = self.streams.pop(stream.stream_id, None)
        if known is not None:
            self.wake_writer()
            self.on_finished(known)

    def _received(self, event: ConnectReceived) -> None:
        peer = self.endpoint.peer
        if peer is None:
            raise LocalProtocolError("a request arrived before the TLS handshake was complete")
        try:
            request = ConnectRequest.from_headers(event.headers)
        except BadConnect as error:
            if self.engine.is_open(event.stream_id):  # the same read may have brought its reset, or the end
                self.engine.reject(event.stream_id, error.status)
            return
        stream = self.make_stream(request, peer)
        stream.stream_id = event.stream_id
        stream._read_ended = event.ended
        self.streams[event.stream_id] = stream
        self.on_request(stream)


def as_request(target: str | Authority | ConnectRequest) -> ConnectRequest:
    """A CONNECT request for `target`.

    Raises:
        HboneError: the authority is not `host:port`.
    """
    if isinstance(target, ConnectRequest):
        return target
    return ConnectRequest(authority=target if isinstance(target, Authority) else Authority.parse(target))


def as_peers(peer: str | SpiffeId | Iterable[str | SpiffeId] | None) -> frozenset[SpiffeId] | None:
    """Who may answer; None stands for whomever an authorizer allows.

    Raises:
        IdentityError: not a SPIFFE ID.
    """
    if peer is None:
        return None
    if isinstance(peer, (str, SpiffeId)):
        peer = (peer,)
    return frozenset(each if isinstance(each, SpiffeId) else SpiffeId.parse(each) for each in peer)


class Contexts:
    """TLS contexts of one side, one for each version of the identity: made when it is first used, then shared."""

    def __init__(self, make: Callable[[Identity], TlsContext]) -> None:
        self._make = make
        self._identity: Identity | None = None
        self._context: TlsContext | None = None

    def of(self, identity: Identity) -> TlsContext:
        """The context of `identity`.

        Raises:
            HboneError: its certificate or key cannot be used.
        """
        if self._context is None or self._identity is not identity:
            self._context = self._make(identity)
            self._identity = identity
        return self._context


def dialing_endpoint(
    context: TlsContext,
    own: SpiffeId,
    expected: frozenset[SpiffeId] | None,
    authorize: Authorizer,
    config: ConnectionConfig | None,
    budget: WindowBudget | None,
    now: float,
) -> Endpoint:
    """The client's end of a new tunnel; `authorize` is asked when `expected` names nobody."""
    if expected is None:
        allowed = lambda peer: authorize(peer, own)  # noqa: E731 - a def each would say the same in four lines
    else:
        allowed = expected.__contains__
    return Endpoint(context, client=True, authorize=allowed, config=config, budget=budget, now=now)
