"""An endpoint with its streams as applications see them; what the Trio and asyncio adapters share. No I/O.

`Session` turns the endpoint's events into calls on its streams, which are of `hbone.sessionstream`. An adapter derives
from both, brings the loop's clock, and waits where these say "not yet".
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from hbone.connect import Authority, BadConnect, ConnectRequest
from hbone.endpoint import Endpoint
from hbone.errors import (
    ConnectionLost,
    ConnectRejected,
    HboneError,
    LocalProtocolError,
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
from hbone.sessionstream import SessionStream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hbone.config import ConnectionConfig
    from hbone.engine.flow import WindowBudget
    from hbone.events import Event
    from hbone.identity import Authorizer
    from hbone.tls import TlsContext

__all__ = ["FLUSH_TIMEOUT", "Session", "as_peers", "as_request", "dialing_endpoint"]

FLUSH_TIMEOUT = 1.0
"""Seconds that the last bytes of a connection, GOAWAY, an alert or close_notify, may take to leave."""

S = TypeVar("S", bound=SessionStream)


class Session(abc.ABC, Generic[S]):
    """One tunnel connection and its streams.

    Args:
        endpoint: a new endpoint, on the loop's clock.
        client: whether we dialled.
        on_request: server: called with each requested stream; it may start a task and must return at once.
        on_unusable: called when the peer takes no further stream, and when the connection is over.
        on_stream_end: called when a stream is over.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        client: bool,
        on_request: Callable[[S], None] | None = None,
        on_unusable: Callable[[Any], None] | None = None,  # called with the adapter's own class
        on_stream_end: Callable[[Any], None] | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.engine = endpoint.engine
        self.client = client
        self.streams: dict[int, S] = {}
        self.blocked: dict[SessionStream, None] = {}
        """Streams that wait for room to send, first come first served."""
        self.failure: HboneError | None = None
        """Why the connection is over; None while it lives."""
        self._on_request = on_request
        self._on_unusable = on_unusable
        self._on_stream_end = on_stream_end

    # What an adapter brings

    @abc.abstractmethod
    def now(self) -> float:
        """The loop's clock."""

    @abc.abstractmethod
    def wake_writer(self) -> None:
        """The endpoint has something to send."""

    @abc.abstractmethod
    def rearm(self) -> None:
        """The endpoint's next deadline may have come nearer."""

    @abc.abstractmethod
    def make_stream(self, request: ConnectRequest, peer: SpiffeId) -> S:
        """A stream of the adapter's kind."""

    @abc.abstractmethod
    def on_established(self) -> None:
        """The handshake is complete."""

    @abc.abstractmethod
    def on_pong(self) -> None:
        """The peer answered a PING."""

    @abc.abstractmethod
    def on_lost(self) -> None:
        """`failure` is set and the streams have been told: what is queued may still leave, for a moment."""

    # The connection

    @property
    def peer(self) -> SpiffeId | None:
        """Who is at the other end; None before the handshake is complete."""
        return self.endpoint.peer

    def drain(self) -> None:
        """Tell the peer to open no further stream; the connection ends when those that are open have."""
        if self.failure is not None:
            return
        if not self.endpoint.established:
            self.close()
            return
        now = self.now()
        self.engine.drain(now)
        self.dispatch(self.endpoint.on_time(now))
        self.wake_writer()
        self.rearm()

    def close(self) -> None:
        """End the connection and its streams now: GOAWAY and close_notify are sent if the transport takes them."""
        for stream in list(self.streams.values()):
            stream.close()
        self.lose(ConnectionLost("the tunnel was closed by this end"))

    def check(self) -> None:
        """Raise if the connection is over.

        Raises:
            ConnectionLost: it is.
        """
        if self.failure is not None:
            raise ConnectionLost(str(self.failure)) from self.failure

    def open(self, request: ConnectRequest) -> S:
        """Client: ask for a stream.

        Raises:
            LocalProtocolError: the tunnel takes none now.
            ConnectionLost: the tunnel is over.
        """
        self.check()
        peer = self.endpoint.peer
        if peer is None:
            raise LocalProtocolError("the TLS handshake is not complete; wait for it before opening a stream")
        stream = self.make_stream(request, peer)
        stream.stream_id = self.engine.connect(request.to_headers(), stream.sink)
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
                        stream.peer_ended()
                case StreamReset(stream_id=stream_id, code=code, by_peer=by_peer, processed=processed):
                    if (stream := streams.get(stream_id)) is not None:
                        stream.peer_reset(code, by_peer=by_peer, processed=processed)
                case ConnectReceived():
                    self._received(event)
                case ConnectAccepted(stream_id=stream_id, headers=headers):
                    if (stream := streams.get(stream_id)) is not None:
                        stream.answered(headers)
                case ConnectRefused(stream_id=stream_id, status=status):
                    if (stream := streams.get(stream_id)) is not None:
                        stream.fail(ConnectRejected(status))
                case HandshakeCompleted():
                    self.on_established()
                case PeerDraining():
                    if self._on_unusable is not None:
                        self._on_unusable(self)
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
            stream.fail(broken)
        self.blocked.clear()
        self.engine.connection_lost()
        if self._on_unusable is not None:
            self._on_unusable(self)
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
        if self.streams.pop(stream.stream_id, None) is None:
            return
        self.wake_writer()
        self.rearm()  # if it was the last of a drained connection, so is that
        if self._on_stream_end is not None:
            self._on_stream_end(self)

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
        stream.read_ended = event.ended
        self.streams[event.stream_id] = stream
        if self._on_request is None:
            stream.reject(405)
        else:
            self._on_request(stream)


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
