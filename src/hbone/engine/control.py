"""What the peer says about streams and the connection: every frame that is not DATA.

Each handler is called with a whole frame whose length fits its type. A handler either changes the state and notes an
event, resets one stream for a fault (`_fault`), or raises, which ends the connection.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from hbone.engine import frames
from hbone.engine.flow import widened
from hbone.engine.frames import ACK, END_HEADERS, END_STREAM, MAX_STREAM_ID, MAX_WINDOW, PADDED, U32, FrameType, Setting
from hbone.engine.guard import MAX_CONTINUATIONS, Flood
from hbone.engine.headers import BlockDecoder, HeaderBlock, request_fault, response_status
from hbone.engine.send import PEER_RESET, Outbound
from hbone.engine.streams import FAULTS, Input, Stream, StreamState
from hbone.errors import ErrorCode, ProtocolError, RemoteProtocolError
from hbone.events import (
    ConnectAccepted,
    ConnectReceived,
    ConnectRefused,
    PeerDraining,
    PingAcknowledged,
    SendCapacityIncreased,
    SettingsReceived,
    StreamEnded,
    StreamReset,
    TransportEnded,
)

if TYPE_CHECKING:
    from hbone.config import ConnectionConfig
    from hbone.engine.flow import WindowBudget
    from hbone.events import Event

__all__ = ["DRAIN_PING", "KEEPALIVE_PING", "LAST_STREAM", "LIVENESS_PING", "Control"]

KEEPALIVE_PING: Final = b"hbonekpa"
LIVENESS_PING: Final = b"hboneliv"
DRAIN_PING: Final = b"hbonedrn"
LAST_STREAM: Final = 2**30
"""Stream id from which a connection is drained, so that another takes over long before the ids end."""
_MAX_INTERIM: Final = 8
"""1xx answers to one request."""
_MAX_DEBUG: Final = 256
"""Bytes of GOAWAY's debug data that are passed on or sent."""
_UPDATE_UNIT: Final = 64 * 1024
_NEVER: Final = math.inf


class Control(Outbound):
    """Handlers of frames, and the deadlines that they set and clear."""

    __slots__ = (
        "_block",
        "_block_deadline",
        "_block_ends",
        "_block_frames",
        "_block_stream",
        "_credit",
        "_decoder",
        "_drain_deadline",
        "_draining",
        "_events",
        "_finishing",
        "_granted",
        "_half_window",
        "_last_peer",
        "_next_id",
        "_overhead",
        "_ping_due",
        "_pings",
        "_plain",
        "_preface_deadline",
        "_rtt",
        "_settings_deadline",
        "_settings_received",
        "_streams_total",
    )

    def __init__(self, *, client: bool, config: ConnectionConfig, budget: WindowBudget | None) -> None:
        super().__init__(client=client, config=config, budget=budget)
        self._decoder = BlockDecoder(config.max_header_list_size, config.max_header_fields)
        self._events: list[Event] = []
        self._credit = self._granted = config.connection_window
        self._half_window = config.connection_window // 2
        self._overhead = 0
        self._plain = False
        """DATA may come now: the first SETTINGS is here and no header block is open."""
        self._settings_received = False
        self._block: bytearray | None = None
        self._block_stream = 0
        self._block_frames = 0
        self._block_ends = False
        self._next_id = 1
        self._last_peer = 0
        self._streams_total = 0
        self._draining = False
        self._finishing = False
        """No further stream can begin; the connection is over with the last one."""
        self._pings: dict[bytes, float] = {}
        self._rtt: float | None = None
        self._preface_deadline = self._settings_deadline = self._block_deadline = _NEVER
        self._drain_deadline = self._ping_due = _NEVER

    # --- the order of frames

    def _expect(self, kind: int, flags: int, stream_id: int) -> None:
        """Refuse what may not come now. Source: RFC 9113 §3.4, §6.10."""
        if not self._settings_received:
            if kind != FrameType.SETTINGS or flags & ACK:
                raise RemoteProtocolError("the first frame is not SETTINGS")
        elif kind != FrameType.CONTINUATION or stream_id != self._block_stream:
            raise RemoteProtocolError(f"the header block of stream {self._block_stream} was interrupted")

    def _admit_block(self, kind: int, length: int) -> None:
        """Refuse a header block by its encoded size, before it is kept or decoded. Source: RFC 9113 §10.5.1."""
        limit = self._config.max_header_list_size
        size = length
        if kind == FrameType.CONTINUATION:
            if self._block is None:
                raise RemoteProtocolError("CONTINUATION without a header block")
            size += len(self._block)
            if self._block_frames >= MAX_CONTINUATIONS:
                raise RemoteProtocolError(
                    f"a header block of more than {MAX_CONTINUATIONS} CONTINUATION frames", ErrorCode.ENHANCE_YOUR_CALM
                )
        if size > limit:
            raise RemoteProtocolError(
                f"a header block of {size} bytes; the limit is {limit}", ErrorCode.ENHANCE_YOUR_CALM
            )
        if self._block_deadline == _NEVER:
            self._block_deadline = self._now + self._config.preface_timeout

    def _is_idle(self, stream_id: int) -> bool:
        """No such stream was ever opened. Source: RFC 9113 §5.1.1."""
        if not stream_id & 1:
            return True  # servers open none
        return stream_id >= self._next_id if self._client else stream_id > self._last_peer

    def _control(self, kind: int, flags: int, stream_id: int, payload: memoryview) -> None:
        if kind == FrameType.WINDOW_UPDATE:
            self._receive_window_update(stream_id, U32.unpack(payload)[0] & MAX_WINDOW)
        elif kind == FrameType.HEADERS:
            self._receive_headers(flags, stream_id, payload)
        elif kind == FrameType.RST_STREAM:
            self._receive_reset(stream_id, ErrorCode.from_wire(U32.unpack(payload)[0]))
        elif kind == FrameType.CONTINUATION:
            self._receive_continuation(flags, payload)
        elif kind == FrameType.PRIORITY:
            if not stream_id:
                raise RemoteProtocolError("PRIORITY on stream 0")
            self._guard.count(Flood.IGNORED, self._now)
        elif stream_id:
            raise RemoteProtocolError(f"{FrameType(kind).name} on stream {stream_id}")
        elif kind == FrameType.SETTINGS:
            self._receive_settings(flags, payload)
        elif kind == FrameType.PING:
            self._receive_ping(flags, bytes(payload))
        else:
            self._receive_goaway(payload)

    # --- header blocks

    def _receive_headers(self, flags: int, stream_id: int, payload: memoryview) -> None:
        """HEADERS; its priority is skipped. Source: RFC 9113 §6.2."""
        if not stream_id:
            raise RemoteProtocolError("HEADERS on stream 0")
        if flags & PADDED:
            if not payload or payload[0] >= len(payload):
                raise RemoteProtocolError("HEADERS with more padding than payload")
            payload = payload[1 : len(payload) - payload[0]]
        if flags & frames.PRIORITY:
            if len(payload) < 5:
                raise RemoteProtocolError("HEADERS too short for its priority", ErrorCode.FRAME_SIZE_ERROR)
            payload = payload[5:]
        if flags & END_HEADERS:
            self._block_deadline = _NEVER
            self._receive_block(stream_id, bytes(payload), bool(flags & END_STREAM))
            return
        self._block = bytearray(payload)
        self._block_stream = stream_id
        self._block_frames = 0
        self._block_ends = bool(flags & END_STREAM)
        self._plain = False

    def _receive_continuation(self, flags: int, payload: memoryview) -> None:
        """CONTINUATION. Source: RFC 9113 §6.10."""
        assert self._block is not None  # `_admit_block` saw to it
        self._block += payload
        self._block_frames += 1
        if flags & END_HEADERS:
            block = bytes(self._block)
            self._block = None
            self._block_deadline = _NEVER
            self._plain = True
            self._receive_block(self._block_stream, block, self._block_ends)

    def _receive_block(self, stream_id: int, block: bytes, ended: bool) -> None:
        """A whole header block. It is decoded whatever becomes of it, for the next ones. Source: RFC 9113 §4.3."""
        decoded = self._decoder.decode(block)
        stream = self._streams.get(stream_id)
        if stream is not None:
            if stream.state is StreamState.REQUESTED or stream.state is StreamState.REQUESTED_ENDED:
                self._receive_response(stream, decoded, ended)
            else:
                code, source = FAULTS[stream.state, Input.RECEIVE_TRAILERS]
                self._fault(stream_id, code, f"HEADERS while it is {stream.state.name}, {source}")
        elif not self._is_idle(stream_id):
            self._stray_headers(stream_id)
        elif self._client or not stream_id & 1:
            raise RemoteProtocolError(f"HEADERS on stream {stream_id}, which only we may open or nobody")
        else:
            self._last_peer = stream_id
            self._receive_request(stream_id, decoded, ended)

    def _stray_headers(self, stream_id: int) -> None:
        left = self._reset_streams.get(stream_id)
        if left is None:
            raise RemoteProtocolError(f"HEADERS on stream {stream_id}, which has ended", ErrorCode.STREAM_CLOSED)
        if left == PEER_RESET:
            self._fault(stream_id, ErrorCode.STREAM_CLOSED, "HEADERS after it ended")
        else:
            self._guard.count(Flood.STRAY, self._now)

    def _receive_request(self, stream_id: int, decoded: HeaderBlock, ended: bool) -> None:
        """A client's HEADERS on a new stream. Source: RFC 9113 §5.1.2, §8.1.1, §8.5."""
        if self._finishing or len(self._streams) >= self._config.max_concurrent_streams:
            self._guard.count(Flood.REFUSAL, self._now)
            self._refuse(stream_id, ErrorCode.REFUSED_STREAM)
            return
        if decoded.too_large:
            self._guard.count(Flood.FAULT, self._now)
            block = self._encoder.encode(((b":status", b"431"),))
            self._reply(frames.header_block(stream_id, block, end_stream=True, max_frame=self._send_frame))
            self._refuse(stream_id, ErrorCode.NO_ERROR)
            return
        fault = request_fault(decoded.fields)
        if fault is not None:
            self._fault(stream_id, ErrorCode.PROTOCOL_ERROR, fault)
            return
        stream = self._open(stream_id, Input.RECEIVE_CONNECT)
        stream.batch = self._batch
        self._streams_total += 1
        if ended:
            self._transition(stream, Input.RECEIVE_END)
        self._events.append(ConnectReceived(stream_id=stream_id, headers=decoded.fields, ended=ended))
        if stream_id >= LAST_STREAM:
            self._begin_drain()

    def _receive_response(self, stream: Stream, decoded: HeaderBlock, ended: bool) -> None:
        """A server's answer. Source: RFC 9113 §8.1, §8.5."""
        if decoded.too_large:
            self._fault(stream.id, ErrorCode.ENHANCE_YOUR_CALM, "the header list of its answer is too large")
            return
        status = response_status(decoded.fields)
        if isinstance(status, str):
            self._fault(stream.id, ErrorCode.PROTOCOL_ERROR, status)
        elif status < 200:
            stream.interim += 1
            if ended or status == 101 or stream.interim > _MAX_INTERIM:
                code = ErrorCode.ENHANCE_YOUR_CALM if stream.interim > _MAX_INTERIM else ErrorCode.PROTOCOL_ERROR
                self._fault(stream.id, code, f"status {status} as answer {stream.interim}")
            else:
                self._transition(stream, Input.RECEIVE_INTERIM)
        elif status == 200:
            self._transition(stream, Input.RECEIVE_ACCEPT)
            self._events.append(ConnectAccepted(stream_id=stream.id, headers=decoded.fields))
            if ended:
                self._transition(stream, Input.RECEIVE_END)
                self._events.append(StreamEnded(stream_id=stream.id))
        else:
            if not ended or stream.state is StreamState.REQUESTED:
                self._reply(frames.rst_stream(stream.id, ErrorCode.CANCEL))
            self._transition(stream, Input.RECEIVE_REFUSAL)
            self._events.append(ConnectRefused(stream_id=stream.id, status=status, headers=decoded.fields))

    # --- ends of streams

    def _refuse(self, stream_id: int, code: ErrorCode) -> None:
        """RST_STREAM for a stream that never was; payload that was sent with it is dropped."""
        self._reply(frames.rst_stream(stream_id, code))
        self._remember(stream_id, self._config.initial_stream_window)

    def _fault(self, stream_id: int, code: ErrorCode, why: str) -> None:
        """Reset one stream for what the peer did; the connection lives. Source: RFC 9113 §5.4.2."""
        try:
            self._guard.count(Flood.FAULT, self._now)
        except RemoteProtocolError as error:
            raise RemoteProtocolError(f"{error}; the last, on stream {stream_id}: {why}", error.code) from None
        stream = self._streams.get(stream_id)
        if stream is None:
            self._refuse(stream_id, code)
            return
        self._reply(frames.rst_stream(stream_id, code))
        self._transition(stream, Input.SEND_RESET)
        self._announce_reset(stream, StreamReset(stream_id=stream_id, code=code, by_peer=False))

    def _receive_reset(self, stream_id: int, code: ErrorCode) -> None:
        """RST_STREAM. Source: RFC 9113 §6.4."""
        stream = self._streams.get(stream_id)
        if stream is None:
            if self._is_idle(stream_id):
                raise RemoteProtocolError(f"RST_STREAM on stream {stream_id}, which was never opened")
            if self._reset_streams.get(stream_id, PEER_RESET) != PEER_RESET:
                self._reset_streams[stream_id] = PEER_RESET  # it crossed ours
            else:
                self._guard.count(Flood.STRAY, self._now)
            return
        if not self._client:
            if not stream.answered:
                self._guard.count(Flood.RESET, self._now)
            elif not stream.used and stream.send_window >= self._peer_window:  # no payload either way
                self._guard.count(Flood.ABANDONED, self._now)
        self._transition(stream, Input.RECEIVE_RESET)
        processed = code is not ErrorCode.REFUSED_STREAM
        self._announce_reset(stream, StreamReset(stream_id=stream_id, code=code, processed=processed))

    def _announce_reset(self, stream: Stream, event: StreamReset) -> None:
        events = self._events
        if stream.batch == self._batch:  # nobody has heard of it yet, so nobody shall dial for it
            events[:] = [other for other in events if getattr(other, "stream_id", None) != stream.id]
        else:
            events.append(event)

    # --- windows

    def _receive_window_update(self, stream_id: int, increment: int) -> None:
        """WINDOW_UPDATE. Source: RFC 9113 §6.9, §6.9.1."""
        self._guard.count_update(self._now, self._sent_frames * max(1, self._send_frame // _UPDATE_UNIT))
        if not stream_id:
            if not increment:
                raise RemoteProtocolError("WINDOW_UPDATE of 0 on the connection")
            self._send_window = widened(self._send_window, increment)
            if self._wants_connection and self._send_window > 0:
                self._wants_connection = False
                self._events.append(SendCapacityIncreased(stream_id=0))
            return
        stream = self._streams.get(stream_id)
        if stream is None:
            if self._is_idle(stream_id):
                raise RemoteProtocolError(f"WINDOW_UPDATE on stream {stream_id}, which was never opened")
            return
        if not increment:
            self._fault(stream_id, ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
            return
        try:
            stream.send_window = widened(stream.send_window, increment)
        except ProtocolError as error:
            self._fault(stream_id, error.code, str(error))
            return
        if stream.waiting and stream.send_window > 0:
            stream.waiting = False
            self._events.append(SendCapacityIncreased(stream_id=stream_id))

    def _update_connection(self) -> None:
        """Credit the connection with what was received; the windows of streams bound what is held."""
        increment = self._config.connection_window - self._credit
        self._credit += increment
        self._granted += increment
        self.out += frames.window_update(0, increment)

    # --- the connection

    def _receive_settings(self, flags: int, payload: memoryview) -> None:
        """SETTINGS, or the acknowledgement of ours. Source: RFC 9113 §6.5."""
        if flags & ACK:
            if payload:
                raise RemoteProtocolError("a SETTINGS acknowledgement with payload", ErrorCode.FRAME_SIZE_ERROR)
            if self._settings_deadline == _NEVER:
                self._guard.count(Flood.STRAY, self._now)
            self._settings_deadline = _NEVER
            return
        self._guard.count(Flood.SETTINGS, self._now)
        if not self._settings_received:
            self.peer_max_streams = MAX_STREAM_ID  # unless this frame says less
        for position in range(0, len(payload), 6):
            self._apply_setting(
                int.from_bytes(payload[position : position + 2]), U32.unpack_from(payload, position + 2)[0]
            )
        self._reply(frames.settings(ack=True))
        if not self._settings_received:
            self._settings_received = self._plain = True
            self._preface_deadline = _NEVER
            self._events.append(SettingsReceived())

    def _apply_setting(self, code: int, value: int) -> None:
        """One setting of the peer's; unknown ones are dropped. Source: RFC 9113 §6.5.2."""
        if code == Setting.HEADER_TABLE_SIZE:
            self._encoder.limit_table(value)
        elif code == Setting.ENABLE_PUSH:
            if value > 1 or (value and self._client):
                raise RemoteProtocolError(f"ENABLE_PUSH is {value}")
        elif code == Setting.MAX_CONCURRENT_STREAMS:
            self.peer_max_streams = value
        elif code == Setting.INITIAL_WINDOW_SIZE:
            self._apply_initial_window(value)
        elif code == Setting.MAX_FRAME_SIZE:
            if not frames.DEFAULT_FRAME_SIZE <= value < 2**24:
                raise RemoteProtocolError(f"MAX_FRAME_SIZE is {value}; it must be from 16384 to 16777215")
            self._send_frame = min(value, self._config.max_send_frame)
        elif code == Setting.MAX_HEADER_LIST_SIZE:
            self._peer_header_list = value
        elif code == Setting.ENABLE_CONNECT_PROTOCOL and value > 1:
            raise RemoteProtocolError(f"ENABLE_CONNECT_PROTOCOL is {value}")

    def _apply_initial_window(self, value: int) -> None:
        """Shift the send window of every stream; some may become negative. Source: RFC 9113 §6.9.2."""
        if value > MAX_WINDOW:
            raise RemoteProtocolError(
                f"INITIAL_WINDOW_SIZE is {value}; the limit is 2^31-1", ErrorCode.FLOW_CONTROL_ERROR
            )
        change = value - self._peer_window
        self._peer_window = value
        woken = False
        for stream in self._streams.values():
            stream.send_window = widened(stream.send_window, change)
            if stream.waiting and stream.send_window > 0:
                stream.waiting = False
                woken = True
        if woken:
            self._events.append(SendCapacityIncreased(stream_id=0))

    def _receive_ping(self, flags: int, payload: bytes) -> None:
        """PING, or the answer to one of ours. Source: RFC 9113 §6.7."""
        if not flags & ACK:
            self._guard.count(Flood.PING, self._now)
            self._reply(frames.ping(payload, ack=True))
            return
        sent = self._pings.pop(payload, None)
        if sent is None:
            self._guard.count(Flood.STRAY, self._now)
            return
        if payload == DRAIN_PING:
            self._end_drain()
            return
        self._rtt = self._now - sent
        if payload == KEEPALIVE_PING:
            self._ping_due = self._now + self._config.keepalive_interval
        self._events.append(PingAcknowledged(rtt=self._rtt))

    def _receive_goaway(self, payload: memoryview) -> None:
        """GOAWAY: what the peer has not begun, it never will. Source: RFC 9113 §6.8."""
        self._guard.count(Flood.GOAWAY, self._now)
        last = U32.unpack_from(payload, 0)[0] & MAX_STREAM_ID
        code = ErrorCode.from_wire(U32.unpack_from(payload, 4)[0])
        self._draining = True
        self._events.append(PeerDraining(last_stream_id=last, code=code, debug=bytes(payload[8 : 8 + _MAX_DEBUG])))
        if self._client:
            self._finishing = True
            for stream in [stream for stream in self._streams.values() if stream.id > last]:
                self._transition(stream, Input.RECEIVE_RESET)
                self._events.append(StreamReset(stream_id=stream.id, code=ErrorCode.REFUSED_STREAM, processed=False))

    # --- the end

    def _begin_drain(self) -> None:
        """First GOAWAY of two; a client needs one, since servers open no streams. Source: RFC 9113 §6.8."""
        if self._drain_deadline != _NEVER or self._finishing:
            return
        self._draining = True
        if self._client:
            self.out += frames.goaway(0, ErrorCode.NO_ERROR)
            self._finishing = True
            return
        self.out += frames.goaway(MAX_STREAM_ID, ErrorCode.NO_ERROR) + frames.ping(DRAIN_PING)
        self._pings[DRAIN_PING] = self._now
        self._drain_deadline = self._now + self._config.preface_timeout

    def _end_drain(self) -> None:
        """Second GOAWAY: what came before it is served, what comes after it is refused."""
        self._drain_deadline = _NEVER
        self._pings.pop(DRAIN_PING, None)
        self.out += frames.goaway(self._last_peer, ErrorCode.NO_ERROR)
        self._finishing = True

    def _finish(self) -> None:
        """The last stream of a drained connection has ended."""
        if not self.closed:
            self.out += frames.goaway(self._last_peer, ErrorCode.NO_ERROR)
            self._forget_all()
            self._events.append(TransportEnded(reason="the connection is drained", clean=True))

    def _abort(self, code: ErrorCode, why: str) -> None:
        if not self.closed:
            self.out += frames.goaway(self._last_peer, code, why.encode("ascii", "replace")[:_MAX_DEBUG])
            self._forget_all()
