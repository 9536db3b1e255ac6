"""What comes in: frames found in place, payload handed to its stream's sink uncopied.

`receive_data` walks the bytes it is given once. The branch at the top of its loop is the hot path: plain DATA for a
stream that is open costs one look-up, two subtractions and the call of the sink. Everything else goes through
`_frame`, which checks a frame as soon as its nine bytes are there and waits for the whole of it only if it is small.
A DATA frame is never waited for: what there is of it is handed over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hbone.engine.control import Control
from hbone.engine.frames import END_STREAM, HEADER, HEADER_SIZE, MAX_STREAM_ID, PADDED, PREFACE, FrameType
from hbone.engine.guard import MAX_GOAWAY_SIZE, MAX_SETTINGS, Flood
from hbone.engine.send import PEER_RESET
from hbone.engine.streams import FAULTS, TRANSITIONS, Input, Stream, StreamState
from hbone.errors import ErrorCode, LocalProtocolError, ProtocolError, RemoteProtocolError
from hbone.events import StreamEnded

if TYPE_CHECKING:
    from hbone.config import ConnectionConfig
    from hbone.engine.flow import WindowBudget
    from hbone.events import Event

__all__ = ["Inbound"]

_FIXED: Final = {
    FrameType.PRIORITY: 5,
    FrameType.RST_STREAM: 4,
    FrameType.PING: 8,
    FrameType.WINDOW_UPDATE: 4,
}
"""Payload sizes that leave no choice. Source: RFC 9113 §6.3, §6.4, §6.7, §6.9."""


class Inbound(Control):
    """The parser of an engine."""

    __slots__ = (
        "_left",
        "_padding",
        "_partial",
        "_payload_ends",
        "_payload_stream",
        "_preface",
        "_unfinished",
        "_wanted",
    )

    def __init__(self, *, client: bool, config: ConnectionConfig, budget: WindowBudget | None) -> None:
        super().__init__(client=client, config=config, budget=budget)
        self._preface = b"" if client else PREFACE
        self._partial = bytearray()
        self._wanted = 0
        self._unfinished = False
        self._payload_stream: Stream | None = None
        self._left = 0
        self._padding = 0
        self._payload_ends = False

    def receive_data(self, data: bytes | bytearray | memoryview, now: float) -> list[Event]:
        """Take bytes that the peer sent.

        Payload goes to the sinks of its streams during the call. A stream that the same call opens and resets is not
        mentioned at all.

        Args:
            data: Any part of what the peer sent, in order; not kept.
            now: Seconds, of a clock that never goes back.

        Returns:
            What happened, in order.

        Raises:
            RemoteProtocolError: the peer broke the protocol. GOAWAY is queued; all streams have ended.

        Source: RFC 9113 §4, §5.
        """
        events: list[Event] = []
        if self.closed:
            return events
        self._events = events
        self._now = now
        self._batch += 1
        try:
            self._receive(memoryview(data))
            if self._credit <= self._half_window and not self.closed:
                self._update_connection()
            if self._finishing and not self._streams:
                self._finish()
        except LocalProtocolError:
            raise  # a sink misused a verb
        except ProtocolError as error:
            self._abort(error.code, str(error))
            if isinstance(error, RemoteProtocolError):
                raise
            raise RemoteProtocolError(str(error), error.code) from error
        return events

    def _receive(self, view: memoryview) -> None:
        size = len(view)
        position = 0
        if self._preface:
            position = self._receive_preface(view, size)
        if self._unfinished:
            position = self._resume(view, position, size)
        streams = self._streams
        largest = self._config.max_frame_size
        unpack = HEADER.unpack_from
        # As whole numbers, and not as what `unpack` gives, they are compared and subtracted without a call (compiled).
        word: int
        flags: int
        stream_id: int
        while size - position >= HEADER_SIZE:
            word, flags, stream_id = unpack(view, position)
            if not word & 0xFF and flags <= END_STREAM and self._plain:
                stream = streams.get(stream_id)
                if stream is not None and (sink := stream.sink) is not None:
                    length = word >> 8
                    if 0 < length <= largest and length <= stream.credit and length <= self._credit:
                        stream.credit -= length
                        self._credit -= length
                        position += HEADER_SIZE
                        end = position + length
                        if end > size:
                            self._begin(stream, end - size, 0, flags)
                            if position == size:
                                return
                            flags = 0
                            end = size
                        taken: int = sink(view[position:end])
                        position = end
                        if taken:
                            released = stream.released + taken
                            stream.released = released
                            if released >= stream.threshold:
                                self._update_window(stream)
                        if flags:
                            self._receive_end(stream)
                        continue
                    if not length and flags:
                        position += HEADER_SIZE
                        self._receive_end(stream)
                        continue
            if self.closed:
                return  # by a sink
            position = self._frame(view, position, size, word, flags, stream_id & MAX_STREAM_ID)
            if self._unfinished:
                position = self._resume(view, position, size)
        if position < size:
            self._partial += view[position:]
            self._wanted = 0
            self._unfinished = True

    def _receive_preface(self, view: memoryview, size: int) -> int:
        taken = min(size, len(self._preface))
        if view[:taken] != self._preface[:taken]:
            raise RemoteProtocolError("the first bytes are not HTTP/2's preface")
        self._preface = self._preface[taken:]
        return taken

    # --- frames that are not whole

    def _resume(self, view: memoryview, position: int, size: int) -> int:
        """Go on with a frame that began earlier. Returns where the next one begins."""
        partial = self._partial
        if partial:
            if len(partial) < HEADER_SIZE:
                end = min(size, position + HEADER_SIZE - len(partial))
                partial += view[position:end]
                position = end
                if len(partial) < HEADER_SIZE:
                    return position
            if not self._wanted:
                self._wanted = self._admit(*HEADER.unpack_from(partial, 0))
            if len(partial) < self._wanted:
                end = min(size, position + self._wanted - len(partial))
                partial += view[position:end]
                position = end
                if len(partial) < self._wanted:
                    return position
            whole = memoryview(bytes(partial))
            partial.clear()
            self._unfinished = False
            word, flags, stream_id = HEADER.unpack_from(whole, 0)
            self._frame(whole, 0, len(whole), word, flags, stream_id & MAX_STREAM_ID)
            if not self._unfinished:
                return position
        return self._payload(view, position, size)

    def _begin(self, stream: Stream | None, left: int, padding: int, flags: int) -> None:
        """Note that `left` bytes for `stream`, or to be dropped, and then `padding` are to come."""
        self._payload_stream = stream
        self._left = left
        self._padding = padding
        self._payload_ends = bool(flags & END_STREAM)
        self._unfinished = True

    def _payload(self, view: memoryview, position: int, size: int) -> int:
        left = self._left
        stream = self._payload_stream
        if left and position < size:
            end = min(size, position + left)
            self._left = left - (end - position)
            if stream is not None:
                self._hand_over(stream, view[position:end])
            position = end
        if self._left:
            return position
        end = min(size, position + self._padding)
        self._padding -= end - position
        if not self._padding:
            self._unfinished = False
            self._payload_stream = None
            if self._payload_ends and stream is not None and stream.state is not StreamState.CLOSED:
                self._receive_end(stream)
        return end

    def _hand_over(self, stream: Stream, chunk: memoryview) -> None:
        sink = stream.sink
        if sink is not None:
            taken = sink(chunk)
            if taken:
                stream.released += taken
                if stream.released >= stream.threshold:
                    self._update_window(stream)
        elif stream.state is StreamState.RECEIVED:  # kept until `accept`; its window bounds it
            if stream.early is None:
                stream.early = bytearray()
            stream.early += chunk

    # --- one frame

    def _admit(self, word: int, flags: int, stream_id: int) -> int:
        """Judge a frame by its nine bytes.

        Returns:
            How many bytes must stand together before it is handled.

        Raises:
            RemoteProtocolError: it may not come now, or is too long.
        """
        length = word >> 8
        kind = word & 0xFF
        stream_id &= MAX_STREAM_ID
        if length > self._config.max_frame_size:
            raise RemoteProtocolError(
                f"a frame of {length} bytes; the limit is {self._config.max_frame_size}", ErrorCode.FRAME_SIZE_ERROR
            )
        if not self._plain:
            self._expect(kind, flags, stream_id)
        if kind == FrameType.DATA:
            return HEADER_SIZE + 1 if flags & PADDED and length else HEADER_SIZE
        if kind == FrameType.HEADERS or kind == FrameType.CONTINUATION:
            self._admit_block(kind, length)
        elif kind == FrameType.SETTINGS:
            if length % 6 or length > MAX_SETTINGS * 6:
                code = ErrorCode.FRAME_SIZE_ERROR if length % 6 else ErrorCode.ENHANCE_YOUR_CALM
                raise RemoteProtocolError(
                    f"SETTINGS of {length} bytes; entries have 6 and there may be {MAX_SETTINGS}", code
                )
        elif kind == FrameType.GOAWAY:
            if not 8 <= length <= MAX_GOAWAY_SIZE:
                raise RemoteProtocolError(
                    f"GOAWAY of {length} bytes; it has from 8 to {MAX_GOAWAY_SIZE}", ErrorCode.FRAME_SIZE_ERROR
                )
        elif kind == FrameType.PUSH_PROMISE:
            raise RemoteProtocolError("PUSH_PROMISE, though push is disabled")
        else:
            fixed = _FIXED.get(kind)  # type: ignore[call-overload]  # a plain int is looked up
            if fixed is None:
                return HEADER_SIZE
            if length != fixed:
                raise RemoteProtocolError(
                    f"{FrameType(kind).name} of {length} bytes; it has {fixed}", ErrorCode.FRAME_SIZE_ERROR
                )
        return HEADER_SIZE + length

    def _frame(self, view: memoryview, position: int, size: int, word: int, flags: int, stream_id: int) -> int:
        """Handle the frame at `position`, or keep what there is of it. Returns where the next one begins."""
        wanted = self._admit(word, flags, stream_id)
        if size - position < wanted:
            self._partial += view[position:size]
            self._wanted = wanted
            self._unfinished = True
            return size
        length = word >> 8
        kind = word & 0xFF
        start = position + HEADER_SIZE
        if kind == FrameType.DATA:
            return self._data(view, start, length, flags, stream_id)
        if kind > FrameType.CONTINUATION:  # skipped, never kept
            self._guard.count(Flood.IGNORED, self._now)
            self._begin(None, 0, length, 0)
            return start
        self._control(kind, flags, stream_id, view[start : start + length])
        return start + length

    def _data(self, view: memoryview, start: int, length: int, flags: int, stream_id: int) -> int:
        """DATA off the hot path. Source: RFC 9113 §6.1, §6.9.1."""
        padding = overhead = 0
        if flags & PADDED:
            if not length or view[start] >= length:
                raise RemoteProtocolError("DATA with more padding than payload")
            padding = view[start]
            overhead = 1
            start += 1
        payload = length - padding - overhead
        if not stream_id:
            raise RemoteProtocolError("DATA on stream 0")
        if length > self._credit:
            raise RemoteProtocolError(
                f"DATA of {length} bytes; the connection's window has {self._credit}", ErrorCode.FLOW_CONTROL_ERROR
            )
        self._credit -= length
        self._overhead += length - payload
        if payload <= padding and not flags & END_STREAM:
            self._guard.count_empty(self._now, self._granted - self._credit - self._overhead)
        stream = self._streams.get(stream_id)
        if stream is None:
            self._stray_data(stream_id, length)
        elif not self._charge(stream, length):
            stream = None
        elif length != payload:
            stream.released += length - payload  # padding never reaches the reader
            if stream.released >= stream.threshold:
                self._update_window(stream)
        if not length:
            if stream is not None and flags & END_STREAM:
                self._receive_end(stream)
            return start
        self._begin(stream, payload, padding, flags)
        return start

    def _charge(self, stream: Stream, length: int) -> bool:
        """Take `length` from the stream's window; False when that, or DATA at all, was a fault."""
        if (stream.state, Input.RECEIVE_DATA) not in TRANSITIONS:
            code, source = FAULTS[stream.state, Input.RECEIVE_DATA]
            self._fault(stream.id, code, f"DATA while it is {stream.state.name}, {source}")
            return False
        if length > stream.credit:
            why = f"DATA of {length} bytes; {stream.credit} were left"
            stream.credit = self._config.stream_window  # more of the same may be on its way
            self._fault(stream.id, ErrorCode.FLOW_CONTROL_ERROR, why)
            return False
        stream.credit -= length
        return True

    def _stray_data(self, stream_id: int, length: int) -> None:
        """DATA for a stream that has ended: what was on its way is dropped. Source: RFC 9113 §5.1 closed."""
        if self._is_idle(stream_id):
            raise RemoteProtocolError(f"DATA on stream {stream_id}, which was never opened")
        left = self._reset_streams.get(stream_id)
        if left is None or left == PEER_RESET:
            self._fault(stream_id, ErrorCode.STREAM_CLOSED, "DATA after it ended")
        elif length > left:
            raise RemoteProtocolError(
                f"DATA of {length} bytes on stream {stream_id}, which was reset with {left} left in its window",
                ErrorCode.FLOW_CONTROL_ERROR,
            )
        else:
            self._reset_streams[stream_id] = left - length

    def _receive_end(self, stream: Stream) -> None:
        """END_STREAM. Source: RFC 9113 §5.1."""
        if stream.state is StreamState.CLOSED:
            return  # the sink reset it just now
        self._transition(stream, Input.RECEIVE_END)
        self._events.append(StreamEnded(stream_id=stream.id))
