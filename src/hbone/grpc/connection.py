"""One gRPC connection, client or server, without I/O: plaintext in, calls and their messages out, and back.

A call takes from the peer only what somebody waits for. Until then at most one stream window of it is kept; while a
message is waited for, the window grows to the message, so a large one needs no round trip for every 64 KiB. The
connection's own window is given back on receipt, so a call that nobody reads stalls alone.

Source: gRPC over HTTP2; RFC 9113.
"""

from __future__ import annotations

import collections
import contextlib
import struct
from typing import TYPE_CHECKING, Any, Final

import attrs
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    PingAckReceived,
    RemoteSettingsChanged,
    RequestReceived,
    ResponseReceived,
    SettingsAcknowledged,
    StreamEnded,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from h2.exceptions import H2Error
from h2.exceptions import ProtocolError as H2ProtocolError
from h2.settings import SettingCodes

from hbone.config import KIB, MIB, between
from hbone.engine.flow import WindowBudget
from hbone.engine.frames import DEFAULT_WINDOW, MAX_STREAM_ID
from hbone.engine.guard import MAX_REPLY_BYTES, Flood
from hbone.errors import ConnectionLost, ErrorCode, LocalProtocolError, RemoteProtocolError
from hbone.grpc.guard import FrameGuard
from hbone.grpc.http2 import Http2
from hbone.grpc.metadata import Metadata, decode_metadata, decode_timeout, encode_metadata, encode_timeout
from hbone.grpc.status import (
    GrpcError,
    GrpcUnavailable,
    StatusCode,
    decode_message,
    encode_message,
    status_from_http,
    status_from_reset,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Call", "GrpcConfig", "GrpcConnection"]

_PREFIX: Final = struct.Struct(">BI")
_TURN: Final = 128 * KIB
"""Payload handed out in one turn, in bytes; bounds what waits behind a slow transport."""
_QUANTUM: Final = 64 * KIB
"""Payload of one call before the next one's turn."""
_BIG_MESSAGE: Final = 64 * KIB
"""From here on a message being received counts against the budget."""
_LAST_STREAM: Final = 2**30
"""A client opens no stream beyond; it is time for another connection."""
_DRAIN_PING: Final = b"draining"
_ALIVE_PING: Final = b"alive???"
_CONTENT_TYPE: Final = b"application/grpc"
_USER_AGENT: Final = b"grpc-python-hbone/0.1"
_OPENING: Final = [(b":status", b"200"), (b"content-type", _CONTENT_TYPE)]


@attrs.frozen(kw_only=True)
class GrpcConfig:
    """Limits and times of a gRPC connection. The defaults are those of Istio's control plane."""

    max_message_size: int = attrs.field(default=4 * MIB, validator=between(1, 2**32 - 1))
    """Largest message that is received where a call names no other limit, in bytes."""
    max_concurrent_streams: int = attrs.field(default=100, validator=between(1, 2**31 - 1))
    """Calls that a server lets one client have open."""
    max_connection_window: int = attrs.field(default=16 * MIB, validator=between(65_535, 2**31 - 1))
    """Receive window of the connection, in bytes."""
    max_stream_window: int = attrs.field(default=4 * MIB, validator=between(65_535, 2**31 - 1))
    """Receive window of a call while a large message is waited for, in bytes; else it is 65,535."""
    max_header_list_size: int = attrs.field(default=16 * KIB, validator=between(1024, 2**20))
    """Headers of a call, in bytes by RFC 9113 §10.5.1; also the limit of the encoded block."""
    keepalive_interval: float = attrs.field(default=30.0, validator=between(0.0, 86_400.0))
    """Seconds of silence until a PING; 0 sends none. A client sends them only while a call is open."""
    keepalive_timeout: float = attrs.field(default=10.0, validator=between(0.1, 3600.0))
    """Seconds until an unanswered PING ends the connection."""
    preface_timeout: float = attrs.field(default=5.0, validator=between(0.1, 3600.0))
    """Seconds from the handshake to the peer's first SETTINGS; also for an open header block."""
    settings_timeout: float = attrs.field(default=10.0, validator=between(0.1, 3600.0))
    """Seconds until our SETTINGS must be acknowledged."""
    drain_grace: float = attrs.field(default=10.0, validator=between(0.0, 86_400.0))
    """Seconds that open calls have once the connection drains; then they end with UNAVAILABLE."""
    handshake_timeout: float = attrs.field(default=10.0, validator=between(0.1, 3600.0))
    """Seconds for the TLS handshake."""
    stall_timeout: float = attrs.field(default=300.0, validator=between(0.1, 86_400.0))
    """Seconds for which a peer may take nothing of a message that we send."""
    max_connection_age: float = attrs.field(default=1800.0, validator=between(0.1, 1e9))
    """Seconds until a server drains a connection, give or take a tenth, so that clients spread again."""


class Call:
    """One call, as one end sees it. Read its state; its verbs are those of the connection."""

    __slots__ = (
        "_budgeted",
        "_buffer",
        "_closing",
        "_connection",
        "_outstanding",
        "_queue",
        "_ready",
        "_status",
        "_wanted",
        "authority",
        "closed",
        "ended",
        "failure",
        "headers_sent",
        "metadata",
        "opened",
        "path",
        "stream_id",
        "timeout",
        "trailers",
        "unsent",
    )

    def __init__(self, connection: GrpcConnection, stream_id: int, path: str) -> None:
        self._connection = connection
        self.stream_id = stream_id
        self.path = path
        """`/package.Service/Method`."""
        self.authority = ""
        self.metadata: tuple[tuple[str, str | bytes], ...] = ()
        """The peer's: of the request at a server, of the response at a client."""
        self.trailers: tuple[tuple[str, str | bytes], ...] = ()
        """Client: metadata that came with the status."""
        self.timeout: float | None = None
        """Seconds that the client gave the call when it began."""
        self.opened = False
        """Client: response headers came."""
        self.headers_sent = False
        self.ended = False
        """The peer sends no more messages; those that came may still be taken."""
        self.closed = False
        """Nothing more goes either way."""
        self.failure: GrpcError | None = None
        """Why the call did not end well; at a client, also the status when it is not OK."""
        self.unsent = 0
        """Bytes of messages that are still ours to hand to the transport."""
        self._queue: collections.deque[memoryview] = collections.deque()
        self._closing: list[tuple[bytes, bytes]] | None = None
        self._ready = False
        self._buffer = bytearray()
        self._outstanding = DEFAULT_WINDOW
        self._wanted: int | None = None
        self._budgeted = 0
        self._status: GrpcError | None = None

    def __repr__(self) -> str:
        return f"<Call {self.path} on stream {self.stream_id}>"

    def receive(self, limit: int | None = None) -> bytes | None:
        """The next message; None when there is none yet, or no more (`ended`).

        Args:
            limit: the largest that is accepted, in bytes; by default that of the configuration.

        Raises:
            GrpcError: the message is too large or compressed, the call was cut, or at a client it failed.
        """
        return self._connection.receive(self, limit)


class GrpcConnection:
    """All calls of one connection.

    Verbs only queue; take what is to be sent with `data_to_send` after each of them, after `receive_data`, and after
    `on_time`. Calls whose state changed are in `take_changed`.

    Args:
        client: which end this is.
        config: limits and times.
        authority: client: the server's name and port, as `:authority`.
        peer: the other end's name, for error messages.
        budget: shared by all connections of a server: bytes of large messages that are being received.
    """

    def __init__(
        self,
        *,
        client: bool,
        config: GrpcConfig | None = None,
        authority: str = "localhost",
        peer: str = "the peer",
        budget: WindowBudget | None = None,
    ) -> None:
        self.client = client
        self.config = config or GrpcConfig()
        self.calls: dict[int, Call] = {}
        self.draining = False
        """No new calls: a GOAWAY was sent or received."""
        self.closed = False
        """Nothing more is received or begun; send what is left and close the transport."""
        self.peer_max_streams = 100
        self._authority = authority
        self._peer = peer
        self._budget = budget or WindowBudget(256 * MIB)
        settings = {
            SettingCodes.HEADER_TABLE_SIZE: 4096,
            SettingCodes.INITIAL_WINDOW_SIZE: DEFAULT_WINDOW,
            SettingCodes.MAX_FRAME_SIZE: 16 * KIB,
            SettingCodes.MAX_CONCURRENT_STREAMS: self.config.max_concurrent_streams,
            SettingCodes.MAX_HEADER_LIST_SIZE: self.config.max_header_list_size,
        }
        if client:
            settings[SettingCodes.ENABLE_PUSH] = 0
        self._http2 = Http2(client=client, settings=settings)
        self._guard = FrameGuard(
            server=not client, max_frame_size=16 * KIB, max_header_block=self.config.max_header_list_size
        )
        self._changed: dict[Call, None] = {}
        self._received: list[Call] = []
        self._ready: collections.deque[Call] = collections.deque()
        self._out = bytearray()
        self._replies = 0
        self._consumed = 0
        self._refuse_above = MAX_STREAM_ID
        self._heard_at = 0.0
        self._pinged_at: float | None = None
        self._settings_due: float | None = None
        self._ack_due: float | None = None
        self._block_due: float | None = None
        self._drain_ping_due: float | None = None
        self._drain_due: float | None = None
        self._handlers: dict[type, Callable[[Any, float], None]] = {
            RequestReceived: self._on_request,
            ResponseReceived: self._on_response,
            TrailersReceived: self._on_trailers,
            DataReceived: self._on_data,
            StreamEnded: self._on_end,
            StreamReset: self._on_reset,
            WindowUpdated: self._on_window,
            RemoteSettingsChanged: self._on_settings,
            SettingsAcknowledged: self._on_settings_ack,
            PingAckReceived: self._on_ping_ack,
            ConnectionTerminated: self._on_goaway,
        }

    # The connection

    def start(self, now: float) -> None:
        """Queue preface and SETTINGS; the peer's are due from now on."""
        self._http2.initiate_connection()
        self._http2.increment_flow_control_window(self.config.max_connection_window - DEFAULT_WINDOW)
        self._heard_at = now
        self._settings_due = now + self.config.preface_timeout
        self._ack_due = now + self.config.settings_timeout

    def receive_data(self, data: bytes | bytearray | memoryview, now: float) -> list[Call]:
        """Take plaintext.

        Returns:
            Calls that a client began. Others that changed are in `take_changed`.

        Raises:
            RemoteProtocolError: the peer broke the protocol or floods us; GOAWAY is queued, all calls have failed.
        """
        if self.closed:
            return []
        self._heard_at = now
        self._pinged_at = None
        waiting = len(self._flush())
        try:
            for event in self._http2.receive_data(self._guard.scan(memoryview(data), now)):
                handler = self._handlers.get(type(event))
                if handler is not None:
                    handler(event, now)
            self._replies += len(self._flush()) - waiting
            if self._replies > MAX_REPLY_BYTES:
                raise RemoteProtocolError(
                    f"more than {MAX_REPLY_BYTES} bytes of answers are waiting for the peer to read them",
                    ErrorCode.ENHANCE_YOUR_CALM,
                )
        except RemoteProtocolError as error:
            self._end(error, error.code)
            raise
        except H2ProtocolError as error:
            broken = RemoteProtocolError(str(error) or type(error).__name__, ErrorCode.from_wire(int(error.error_code)))
            self._end(broken, None)  # GOAWAY is queued already
            raise broken from error
        if self._guard.in_header_block:
            if self._block_due is None:
                self._block_due = now + self.config.preface_timeout
        else:
            self._block_due = None
        received, self._received = self._received, []
        return received

    def data_to_send(self) -> bytes:
        """What is to be sent now, at most some 128 KiB of payload; call again until it is empty."""
        self._pump(_TURN)
        data = bytes(self._flush())
        self._out.clear()
        self._replies = 0
        return data

    def take_changed(self) -> list[Call]:
        """Calls of which a message came or was sent, or that ended, since the last time."""
        changed = list(self._changed)
        self._changed.clear()
        return changed

    def next_deadline(self) -> float | None:
        """When `on_time` is wanted next."""
        if self.closed:
            return None
        due = [self._settings_due, self._ack_due, self._block_due, self._drain_ping_due, self._drain_due]
        config = self.config
        if self._pinged_at is not None:
            due.append(self._pinged_at + config.keepalive_timeout)
        elif config.keepalive_interval and (self.calls or not self.client):
            due.append(self._heard_at + config.keepalive_interval)
        return min((at for at in due if at is not None), default=None)

    def on_time(self, now: float) -> None:
        """Do what is due.

        Raises:
            RemoteProtocolError: the peer is too slow with its preface, settings or headers; GOAWAY is queued.
            ConnectionLost: the peer no longer answers.
        """
        if self.closed:
            return
        for due, what in (
            (self._settings_due, "the peer sent no SETTINGS in time"),
            (self._ack_due, "the peer did not acknowledge our SETTINGS in time"),
            (self._block_due, "the peer did not complete a header block in time"),
        ):
            if due is not None and now >= due:
                late = RemoteProtocolError(what, ErrorCode.SETTINGS_TIMEOUT)
                self._end(late, late.code)
                raise late
        if self._drain_ping_due is not None and now >= self._drain_ping_due:
            self._drain_finally()
        if self._drain_due is not None and now >= self._drain_due:
            self._drain_due = None
            for call in list(self.calls.values()):
                self._cut(call)
            self._close_if_drained()
            return
        self._keep_alive(now)

    def _keep_alive(self, now: float) -> None:
        config = self.config
        if self._pinged_at is not None:
            if now >= self._pinged_at + config.keepalive_timeout:
                lost = ConnectionLost(f"the peer did not answer a PING within {config.keepalive_timeout:g} seconds")
                self.connection_lost(lost)
                raise lost
        elif (
            config.keepalive_interval
            and (self.calls or not self.client)
            and now >= self._heard_at + config.keepalive_interval
        ):
            self._pinged_at = now
            self._http2.ping(_ALIVE_PING)

    def drain(self, now: float) -> None:
        """Server: no new calls, in two steps so that none in flight is lost; open ones have `drain_grace` seconds.

        Source: RFC 9113 §6.8.
        """
        if self.draining or self.closed:
            return
        self.draining = True
        self._drain_due = now + self.config.drain_grace
        self._drain_ping_due = now + min(1.0, self.config.drain_grace)
        self._http2.close_connection(last_stream_id=MAX_STREAM_ID)
        self._http2.ping(_DRAIN_PING)

    def _drain_finally(self) -> None:
        self._drain_ping_due = None
        self._refuse_above = self._http2.highest_inbound_stream_id
        self._http2.close_connection(last_stream_id=self._refuse_above)
        self._close_if_drained()

    def _close_if_drained(self) -> None:
        if self.draining and self._drain_ping_due is None and not self.calls:
            self.closed = True

    def close(self) -> None:
        """GOAWAY; all calls are over."""
        if not self.closed:
            self._end(ConnectionLost("the connection was closed"), ErrorCode.NO_ERROR)

    def connection_lost(self, reason: Exception) -> None:
        """The transport is gone: all calls are over."""
        if not self.closed:
            self._end(reason, None)

    def _end(self, reason: Exception, code: ErrorCode | None) -> None:
        self.closed = True
        for call in list(self.calls.values()):
            self._finish_call(call, call._status or GrpcUnavailable(f"the connection to {self._peer} ended: {reason}"))
        if code is not None:
            debug = str(reason).encode()[:200] if code else None
            self._http2.close_connection(ErrorCodes(code), debug)

    # Verbs of a client

    def start_call(self, path: str, metadata: Metadata = (), *, timeout: float | None = None) -> Call:
        """Begin a call.

        Args:
            path: `/package.Service/Method`.
            metadata: sent with the request.
            timeout: seconds that the server is told it has.

        Raises:
            GrpcUnavailable: this connection takes no more calls; another one may.
            LocalProtocolError: unusable path or metadata; nothing was sent.
        """
        fields = encode_metadata(metadata)
        if not path.startswith("/") or path.count("/") != 2 or not path.isascii() or not path.isprintable():
            raise LocalProtocolError(f"{path!r} is not a method; write /package.Service/Method")
        if self.closed or self.draining:
            raise GrpcUnavailable(f"the connection to {self._peer} is closing", processed=False)
        if len(self.calls) >= self.peer_max_streams:
            raise GrpcUnavailable(
                f"{len(self.calls)} calls are open, which is all that {self._peer} allows", processed=False
            )
        stream_id = self._http2.get_next_available_stream_id()
        headers = [
            (b":method", b"POST"),
            (b":scheme", b"https"),
            (b":path", path.encode()),
            (b":authority", self._authority.encode()),
            (b"content-type", _CONTENT_TYPE),
            (b"te", b"trailers"),
            (b"user-agent", _USER_AGENT),
        ]
        if timeout is not None:
            headers.append((b"grpc-timeout", encode_timeout(timeout)))
        self._http2.send_headers(stream_id, headers + fields)
        call = Call(self, stream_id, path)
        call.headers_sent = True
        call.timeout = timeout
        self.calls[stream_id] = call
        self.draining = stream_id >= _LAST_STREAM
        return call

    def end(self, call: Call) -> None:
        """Client: no more messages; the call goes on until the server's status."""
        if call._closing is None and not call.closed:
            call._closing = []
            self._mark_ready(call)

    def cancel(self, call: Call, code: ErrorCode = ErrorCode.CANCEL) -> None:
        """Give up a call at either end. Without effect on one that is over."""
        if call.closed:
            return
        self._reset(call.stream_id, ErrorCodes(code))
        self._finish_call(call, GrpcError(StatusCode.CANCELLED, "the call was cancelled"))

    # Verbs of a server

    def send_headers(self, call: Call, metadata: Metadata = ()) -> None:
        """Server: response headers, once; the first message sends them otherwise."""
        if not call.headers_sent and not call.closed and call._closing is None:
            fields = encode_metadata(metadata)
            call.headers_sent = True
            self._http2.send_headers(call.stream_id, [*_OPENING, *fields])

    def finish(self, call: Call, code: StatusCode = StatusCode.OK, message: str = "", trailers: Metadata = ()) -> None:
        """Server: the call's status, after the messages that were queued. Without effect on one that is over."""
        if call.closed or call._closing is not None:
            return
        fields = encode_metadata(trailers)
        closing = [(b"grpc-status", b"%d" % code)]
        if message:
            closing.append((b"grpc-message", encode_message(message)))
        call._closing = closing + fields
        call._wanted = None
        self._mark_ready(call)

    def _cut(self, call: Call) -> None:
        """End a call whose time is over, whatever waits to be sent."""
        call._queue.clear()
        call.unsent = 0
        call._closing = None
        if self.client:
            self.cancel(call)
            return
        # A ztunnel that reads these words calls again at once.
        self.finish(call, StatusCode.UNAVAILABLE, "the connection has reached its age: transport is closing")
        self._send_closing(call)
        call.failure = GrpcUnavailable("the connection has drained")

    # Messages

    def send_message(self, call: Call, message: bytes) -> None:
        """Queue a message; it leaves as the peer's windows allow. Wait for `unsent` to fall before the next.

        Raises:
            GrpcError: the call is over.
            LocalProtocolError: it was ended by us, or the message has more than 2^32 - 1 bytes.
        """
        if call.closed:
            raise call.failure or GrpcError(StatusCode.CANCELLED, "the call is over")
        if call._closing is not None:
            raise LocalProtocolError(f"{call.path}: a message after the end")
        if len(message) >= 2**32:
            raise LocalProtocolError(f"a message of {len(message)} bytes; the format ends at 2^32 - 1")
        if not call.headers_sent:
            self.send_headers(call)
        prefix = _PREFIX.pack(0, len(message))
        if len(message) <= 16 * KIB:
            call._queue.append(memoryview(prefix + message))
        else:
            call._queue.append(memoryview(prefix))
            call._queue.append(memoryview(message))
        call.unsent += len(prefix) + len(message)
        self._mark_ready(call)

    def receive(self, call: Call, limit: int | None = None) -> bytes | None:
        """See `Call.receive`."""
        buffer = call._buffer
        limit = self.config.max_message_size if limit is None else limit
        if len(buffer) >= _PREFIX.size:
            compressed, length = _PREFIX.unpack_from(buffer)
            if compressed:
                raise GrpcError(StatusCode.UNIMPLEMENTED, "a compressed message, which is not supported")
            if length > limit:
                raise GrpcError(
                    StatusCode.RESOURCE_EXHAUSTED, f"a message of {length} bytes; the limit is {limit} bytes"
                )
            end = _PREFIX.size + length
            if len(buffer) >= end:
                message = bytes(memoryview(buffer)[_PREFIX.size : end])
                del buffer[:end]
                self._give_back(call)
                call._wanted = None
                self._credit(call)
                return message
            if length > _BIG_MESSAGE and not call._budgeted:
                if not self._budget.take(length):
                    raise GrpcError(StatusCode.RESOURCE_EXHAUSTED, "too many large messages are being received at once")
                call._budgeted = length
        if call.ended or call.closed:
            if call.failure is not None:
                raise call.failure
            if buffer:
                raise GrpcError(StatusCode.INTERNAL, "the peer ended the call within a message")
            return None
        call._wanted = limit
        self._credit(call)
        return None

    def _give_back(self, call: Call) -> None:
        if call._budgeted:
            self._budget.give_back(call._budgeted)
            call._budgeted = 0

    def _credit(self, call: Call) -> None:
        """Let the peer send what somebody waits for, or what one window holds beyond what is kept."""
        if call.ended or call.closed:
            return
        kept = len(call._buffer)
        if call._wanted is None:
            goal = DEFAULT_WINDOW - kept
        else:
            goal = DEFAULT_WINDOW
            if kept >= _PREFIX.size:
                missing = _PREFIX.size + _PREFIX.unpack_from(call._buffer)[1] - kept
                goal = min(max(goal, missing), self.config.max_stream_window)
        increment = goal - call._outstanding
        if increment >= max(goal // 4, 1024):
            call._outstanding += increment
            with contextlib.suppress(H2Error):  # hyper-h2 may have read on to the call's end already
                self._http2.increment_flow_control_window(increment, call.stream_id)

    # Sending

    def _flush(self) -> bytearray:
        """What hyper-h2 has queued comes after what we have."""
        self._out += self._http2.data_to_send()
        return self._out

    def _mark_ready(self, call: Call) -> None:
        if not call._ready:
            call._ready = True
            self._ready.append(call)

    def _pump(self, room: int) -> None:
        while room > 0 and self._ready:
            call = self._ready.popleft()
            call._ready = False
            if call.closed:
                continue
            sent = self._send_some(call, min(room, _QUANTUM))
            room -= sent
            if sent and call.unsent:
                self._mark_ready(call)  # at the end: the others first

    def _send_some(self, call: Call, room: int) -> int:
        sent = 0
        http2, queue = self._http2, call._queue
        while call.unsent and sent < room:
            window = http2.local_flow_control_window(call.stream_id)
            nbytes = min(window, http2.max_outbound_frame_size, room - sent, call.unsent)
            if nbytes <= 0:
                break
            parts: list[memoryview] = []
            missing = nbytes
            while missing:
                view = queue[0]
                if len(view) <= missing:
                    parts.append(queue.popleft())
                else:
                    parts.append(view[:missing])
                    queue[0] = view[missing:]
                missing -= len(parts[-1])
            call.unsent -= nbytes
            is_last = self.client and not call.unsent and call._closing is not None
            http2.send_data(call.stream_id, parts[0] if len(parts) == 1 else b"".join(parts), end_stream=is_last)
            self._guard.sent_frames += 1 + nbytes // (64 * KIB)
            sent += nbytes
            if is_last:
                call._closing = [(b"", b"")]  # said
        if not call.unsent and call._closing is not None:
            self._send_closing(call)
        if sent:
            self._changed[call] = None
        return sent

    def _send_closing(self, call: Call) -> None:
        closing = call._closing
        if self.client:
            if closing == []:
                call._closing = [(b"", b"")]
                self._http2.end_stream(call.stream_id)
            return
        fields: Iterable[tuple[bytes, bytes]] = closing or []
        if not call.headers_sent:
            fields = [*_OPENING, *fields]
            call.headers_sent = True
        self._http2.send_headers(call.stream_id, fields, end_stream=True)
        if not call.ended:  # it need not go on sending. Source: RFC 9113 §8.1
            self._reset(call.stream_id, ErrorCodes.NO_ERROR)
        self._finish_call(call, None)

    def _finish_call(self, call: Call, failure: GrpcError | None) -> None:
        """Forget a call; what it received can still be taken unless it failed."""
        if self.calls.pop(call.stream_id, None) is None:
            return
        call.closed = True
        call.ended = True
        call._queue.clear()
        call.unsent = 0
        self._give_back(call)
        if failure is not None:
            call.failure = failure
            if failure is not call._status:
                call._buffer.clear()
        self._changed[call] = None
        self._close_if_drained()

    # Receiving

    def _on_request(self, event: RequestReceived, now: float) -> None:
        stream_id, fields = event.stream_id, event.headers or []
        assert stream_id is not None
        if stream_id > self._refuse_above or len(self.calls) >= self.config.max_concurrent_streams:
            self._guard.floods.count(Flood.REFUSAL, now)
            self._reset(stream_id, ErrorCodes.REFUSED_STREAM)
            return
        found = {bytes(name): bytes(value) for name, value in fields}
        if found.get(b":method") != b"POST":
            self._reject(stream_id, b"405")
            return
        content_type = found.get(b"content-type", b"")
        if not content_type.startswith(_CONTENT_TYPE) or content_type[16:17] not in (b"", b"+", b";"):
            self._reject(stream_id, b"415")
            return
        call = Call(self, stream_id, found.get(b":path", b"").decode("latin-1"))
        call.authority = found.get(b":authority", found.get(b"host", b"")).decode("latin-1")
        self.calls[stream_id] = call
        try:
            if found.get(b"grpc-encoding", b"identity") != b"identity":
                raise GrpcError(StatusCode.UNIMPLEMENTED, "compressed messages are not supported")
            if b"grpc-timeout" in found:
                call.timeout = decode_timeout(found[b"grpc-timeout"])
            call.metadata = decode_metadata(fields)
        except GrpcError as error:
            self.finish(call, error.code, error.message)
            return
        self._received.append(call)

    def _reject(self, stream_id: int, status: bytes) -> None:
        """Answer what is no gRPC request."""
        with contextlib.suppress(H2Error):
            self._http2.send_headers(stream_id, [(b":status", status)], end_stream=True)
            self._http2.reset_stream(stream_id, ErrorCodes.NO_ERROR)

    def _on_response(self, event: ResponseReceived, _: float) -> None:
        call = self.calls.get(event.stream_id or 0)
        if call is None:
            return
        fields = event.headers or []
        found = {bytes(name): bytes(value) for name, value in fields}
        status = int(found.get(b":status", b"0"))
        if b"grpc-status" in found:
            self._note_status(call, fields)
            return
        if status != 200:
            problem = GrpcError(status_from_http(status), f"the server answered with HTTP status {status}")
        elif not found.get(b"content-type", b"").startswith(_CONTENT_TYPE):
            problem = GrpcError(StatusCode.UNKNOWN, "the server's answer is not gRPC")
        elif found.get(b"grpc-encoding", b"identity") != b"identity":
            problem = GrpcError(StatusCode.INTERNAL, "the server compresses, which we did not allow")
        else:
            try:
                call.metadata = decode_metadata(fields)
                call.opened = True
                self._changed[call] = None
                return
            except GrpcError as error:
                problem = GrpcError(StatusCode.INTERNAL, f"the server's answer: {error.message}")
        self._abandon(call, problem)

    def _on_trailers(self, event: TrailersReceived, _: float) -> None:
        call = self.calls.get(event.stream_id or 0)
        if call is not None and self.client:
            self._note_status(call, event.headers or [])

    def _note_status(self, call: Call, fields: Iterable[tuple[bytes, bytes]]) -> None:
        found = {bytes(name): bytes(value) for name, value in fields}
        if b"grpc-status" not in found:
            return
        code = StatusCode.from_wire(found[b"grpc-status"])
        try:
            call.trailers = decode_metadata(fields)
        except GrpcError:
            call.trailers = ()  # the status matters more
        call._status = GrpcError(code, decode_message(found.get(b"grpc-message", b"")), call.trailers)

    def _on_data(self, event: DataReceived, now: float) -> None:
        length = event.flow_controlled_length or 0
        self._consumed += length
        if self._consumed * 2 >= self.config.max_connection_window:
            self._http2.increment_flow_control_window(self._consumed)
            self._consumed = 0
        call = self.calls.get(event.stream_id or 0)
        if call is None:
            self._guard.floods.count(Flood.STRAY, now)
            return
        call._outstanding -= length
        if call._closing is not None and not self.client:
            return  # answered already
        call._buffer += event.data or b""
        if event.stream_ended is None:
            self._credit(call)
        buffer = call._buffer
        if len(buffer) >= _PREFIX.size and call._wanted is not None:
            compressed, size = _PREFIX.unpack_from(buffer)
            is_new = size > _BIG_MESSAGE and not call._budgeted
            if compressed or is_new or size > call._wanted or len(buffer) - _PREFIX.size >= size:
                self._changed[call] = None

    def _on_end(self, event: StreamEnded, _: float) -> None:
        call = self.calls.get(event.stream_id or 0)
        if call is None:
            return
        call.ended = True
        self._changed[call] = None
        if not self.client:
            return
        status = call._status or GrpcError(StatusCode.UNKNOWN, "the server ended the call without a status")
        if not call._closing:
            self._reset(call.stream_id, ErrorCodes.CANCEL)  # we had more to say
        elif call.unsent:
            self._reset(call.stream_id, ErrorCodes.CANCEL)
        call._status = status
        self._finish_call(call, status if status.code != StatusCode.OK else None)

    def _reset(self, stream_id: int, code: ErrorCodes) -> None:
        with contextlib.suppress(H2Error):  # closed both ways already
            self._http2.reset_stream(stream_id, code)

    def _abandon(self, call: Call, failure: GrpcError) -> None:
        self._reset(call.stream_id, ErrorCodes.CANCEL)
        self._finish_call(call, failure)

    def _on_reset(self, event: StreamReset, now: float) -> None:
        call = self.calls.get(event.stream_id or 0)
        if not event.remote_reset:
            self._guard.floods.count(Flood.FAULT, now)
        elif call is not None and not self.client:
            self._guard.floods.count(Flood.RESET, now)
        if call is None:
            return
        code = ErrorCode.from_wire(int(event.error_code or 0))
        if call._status is not None and code == ErrorCode.NO_ERROR:
            self._finish_call(call, call._status if call._status.code != StatusCode.OK else None)
        elif code == ErrorCode.REFUSED_STREAM:
            self._finish_call(call, GrpcUnavailable(f"{self._peer} refused the call", processed=False))
        else:
            self._finish_call(call, GrpcError(status_from_reset(code), f"the peer reset the call: {code.name}"))

    def _on_window(self, event: WindowUpdated, _: float) -> None:
        if event.stream_id:
            call = self.calls.get(event.stream_id)
            if call is not None and call.unsent:
                self._mark_ready(call)
        else:
            self._all_ready()

    def _all_ready(self) -> None:
        for call in self.calls.values():
            if call.unsent:
                self._mark_ready(call)

    def _on_settings(self, event: RemoteSettingsChanged, _: float) -> None:
        self._settings_due = None
        changed = event.changed_settings
        if SettingCodes.MAX_CONCURRENT_STREAMS in changed:
            self.peer_max_streams = changed[SettingCodes.MAX_CONCURRENT_STREAMS].new_value
        if SettingCodes.INITIAL_WINDOW_SIZE in changed:
            self._all_ready()

    def _on_settings_ack(self, _: SettingsAcknowledged, __: float) -> None:
        self._ack_due = None

    def _on_ping_ack(self, event: PingAckReceived, _: float) -> None:
        if event.ping_data == _DRAIN_PING and self._drain_ping_due is not None:
            self._drain_finally()

    def _on_goaway(self, event: ConnectionTerminated, _: float) -> None:
        if not self.client:
            return  # a client may say that it is leaving; its calls go on
        self.draining = True
        code = ErrorCode.from_wire(int(event.error_code or 0))
        last = event.last_stream_id or 0
        debug = (event.additional_data or b"").decode("ascii", "replace")
        reason = f"{self._peer} is closing the connection (received prior goaway: {code.name}{debug and ', '}{debug})"
        for call in list(self.calls.values()):
            if call.stream_id > last:
                self._finish_call(call, GrpcUnavailable(reason, processed=False))
        self._close_if_drained()
