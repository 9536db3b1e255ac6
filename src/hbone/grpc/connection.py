"""What both ends of a gRPC connection do, without I/O: plaintext in, calls and their messages out, and back.

A call takes from the peer only what somebody waits for. Until then at most one stream window of it is kept; while a
message is waited for, the window grows to the message, so a large one needs no round trip for every 64 KiB. The
connection's own window is given back on receipt, so a call that nobody reads stalls alone.

Source: gRPC over HTTP2; RFC 9113.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import struct
from typing import TYPE_CHECKING, Any, ClassVar, Final

from h2.errors import ErrorCodes
from h2.events import (
    DataReceived,
    RemoteSettingsChanged,
    SettingsAcknowledged,
    StreamEnded,
    StreamReset,
    WindowUpdated,
)
from h2.exceptions import H2Error
from h2.exceptions import ProtocolError as H2ProtocolError
from h2.settings import SettingCodes

from hbone.config import KIB, MIB
from hbone.engine.flow import WindowBudget
from hbone.engine.frames import DEFAULT_WINDOW
from hbone.engine.guard import MAX_REPLY_BYTES, Flood
from hbone.errors import ConnectionLost, ErrorCode, LocalProtocolError, RemoteProtocolError
from hbone.grpc.config import GrpcConfig
from hbone.grpc.guard import FrameGuard
from hbone.grpc.http2 import Http2
from hbone.grpc.status import GrpcError, GrpcUnavailable, StatusCode, status_from_reset

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hbone.grpc.call import Call

__all__ = ["CONTENT_TYPE", "GrpcConnection"]

CONTENT_TYPE: Final = b"application/grpc"

_PREFIX: Final = struct.Struct(">BI")
_TURN: Final = 128 * KIB
"""Payload handed out in one turn, in bytes; bounds what waits behind a slow transport."""
_QUANTUM: Final = 64 * KIB
"""Payload of one call before the next one's turn."""
_BIG_MESSAGE: Final = 64 * KIB
"""From here on a message being received counts against the budget."""
_ALIVE_PING: Final = b"alive???"


class GrpcConnection(abc.ABC):
    """All calls of one connection; `ClientConnection` or `ServerConnection`.

    Verbs only queue; take what is to be sent with `data_to_send` after each of them, after `receive_data`, and after
    `on_time`. Calls whose state changed are in `take_changed`.

    Args:
        config: limits and times.
        peer: the other end's name, for error messages.
        budget: shared by connections: bytes of large messages that are being received.
    """

    client: ClassVar[bool]

    def __init__(
        self, *, config: GrpcConfig | None = None, peer: str = "the peer", budget: WindowBudget | None = None
    ) -> None:
        client = self.client
        self.config = config or GrpcConfig()
        self.calls: dict[int, Call] = {}
        self.draining = False
        """No new calls: a GOAWAY was sent or received."""
        self.closed = False
        """Nothing more is received or begun; send what is left and close the transport."""
        self.peer_max_streams = 100
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
        self._heard_at = 0.0
        self._pinged_at: float | None = None
        self._settings_due: float | None = None
        self._ack_due: float | None = None
        self._block_due: float | None = None
        self._handlers: dict[type, Callable[[Any, float], None]] = {
            DataReceived: self._on_data,
            StreamEnded: self._on_end,
            StreamReset: self._on_reset,
            WindowUpdated: self._on_window,
            RemoteSettingsChanged: self._on_settings,
            SettingsAcknowledged: self._on_settings_ack,
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
        due = [self._settings_due, self._ack_due, self._block_due]
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

    def _close_if_drained(self) -> None:
        if self.draining and not self.calls:
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

    def cancel(self, call: Call, code: ErrorCode = ErrorCode.CANCEL) -> None:
        """Give up a call at either end. Without effect on one that is over."""
        if call.closed:
            return
        self._reset(call.stream_id, ErrorCodes(code))
        self._finish_call(call, GrpcError(StatusCode.CANCELLED, "the call was cancelled"))

    # Messages

    def send_message(self, call: Call, message: bytes | Sequence[bytes]) -> None:
        """Queue a message; it leaves as the peer's windows allow. Wait for `unsent` to fall before the next.

        Args:
            call: an open one.
            message: whole, or in parts that other messages may share; they are put together frame by frame.

        Raises:
            GrpcError: the call is over.
            LocalProtocolError: it was ended by us, or the message has more than 2^32 - 1 bytes.
        """
        if call.closed:
            raise call.failure or GrpcError(StatusCode.CANCELLED, "the call is over")
        if call._closing is not None:
            raise LocalProtocolError(f"{call.path}: a message after the end")
        parts = (message,) if isinstance(message, bytes) else message
        length = sum(map(len, parts))
        if length >= 2**32:
            raise LocalProtocolError(f"a message of {length} bytes; the format ends at 2^32 - 1")
        self._before_message(call)
        prefix = _PREFIX.pack(0, length)
        if length <= 16 * KIB:
            call._queue.append(b"".join((prefix, *parts)))
        else:
            call._queue.append(prefix)
            call._queue.extend(parts)
        call.unsent += len(prefix) + length
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
            if length > _BIG_MESSAGE and not call._budgeted and not call.ended:
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
            parts: list[bytes | memoryview] = []
            missing = nbytes
            while missing:
                if len(queue[0]) <= missing:
                    parts.append(queue.popleft())
                else:
                    view = memoryview(queue[0])  # so that cutting copies nothing
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

    @abc.abstractmethod
    def _before_message(self, call: Call) -> None:
        """What must be sent before a call's first message."""

    @abc.abstractmethod
    def _send_closing(self, call: Call) -> None:
        """Say the end of our half; all messages have left."""

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
            return  # answered already, so nobody reads it
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
        if call is not None:
            call.ended = True
            self._changed[call] = None

    def _reset(self, stream_id: int, code: ErrorCodes) -> None:
        with contextlib.suppress(H2Error):  # closed both ways already
            self._http2.reset_stream(stream_id, code)

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
