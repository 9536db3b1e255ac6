"""What goes out: DATA within both windows, and small frames in one queue.

Two ways for payload. `send_data` copies into the queue. `prefix_data` writes the nine bytes in front of payload that
already stands in the caller's buffer, so that header and payload are encrypted in one call; nothing is queued then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hbone.config import KIB
from hbone.engine import frames
from hbone.engine.flow import WindowBudget
from hbone.engine.frames import DEFAULT_FRAME_SIZE, DEFAULT_WINDOW, END_STREAM, HEADER
from hbone.engine.guard import MAX_REPLIES, MAX_REPLY_BYTES, Guard
from hbone.engine.headers import BlockEncoder, list_size
from hbone.engine.streams import NEXT, Input, Stream, StreamState
from hbone.errors import ErrorCode, LocalProtocolError, RemoteProtocolError

if TYPE_CHECKING:
    from mmap import mmap

    from hbone.config import ConnectionConfig
    from hbone.events import Headers

__all__ = ["SEND_QUEUE", "Outbound"]

SEND_QUEUE: Final = 256 * KIB
"""Bytes that may wait in the queue before `send_capacity` says 0."""
_REMEMBERED: Final = 1024
"""Streams that ended by a reset and are remembered, to tell what was on its way from what is wrong."""
_NO_LIMIT: Final = 2**32 - 1
PEER_RESET: Final = -1


class Outbound:
    """The sending half of an engine, and the streams that both halves share."""

    __slots__ = (
        "_batch",
        "_budget",
        "_client",
        "_config",
        "_encoder",
        "_guard",
        "_last_reply",
        "_last_reply_at",
        "_now",
        "_peer_header_list",
        "_peer_window",
        "_replies",
        "_reply_bytes",
        "_reset_streams",
        "_send_frame",
        "_send_window",
        "_sent_frames",
        "_streams",
        "_wants_connection",
        "_wants_room",
        "closed",
        "out",
        "peer_max_streams",
    )

    def __init__(self, *, client: bool, config: ConnectionConfig, budget: WindowBudget | None) -> None:
        self._client = client
        self._config = config
        self._budget = WindowBudget() if budget is None else budget
        self._guard = Guard()
        self._encoder = BlockEncoder()
        self._streams: dict[int, Stream] = {}
        self._reset_streams: dict[int, int] = {}
        self._now = 0.0
        self._batch = 0
        self._send_window = DEFAULT_WINDOW
        self._send_frame = DEFAULT_FRAME_SIZE
        self._sent_frames = 0
        self._peer_window = DEFAULT_WINDOW
        self._peer_header_list = _NO_LIMIT
        self._wants_connection = False
        self._wants_room = False
        self._replies = 0
        self._reply_bytes = 0
        self._last_reply = b""
        self._last_reply_at = 0
        self.closed = False
        """The connection is over; only what is queued may still be sent."""
        self.out = bytearray()
        """The queue itself. A hot caller writes it out and clears it; what it cannot write out, it leaves here."""
        self.peer_max_streams = 100
        """Streams that the peer lets us have open; 100 until its SETTINGS say."""

    # --- the queue

    @property
    def has_data_to_send(self) -> bool:
        """Something is queued."""
        return bool(self.out)

    def data_to_send(self) -> bytes:
        """Everything queued, which is then no longer queued."""
        data = bytes(self.out)
        self.out.clear()
        return data

    def _reply(self, frame: bytes) -> None:
        """Queue a frame that the peer caused; a peer that causes many and reads none is cut off."""
        out = self.out
        if not out.startswith(self._last_reply, self._last_reply_at):  # written out since
            self._replies = self._reply_bytes = 0
        self._last_reply = frame
        self._last_reply_at = len(out)
        self._replies += 1
        self._reply_bytes += len(frame)
        out += frame
        if self._replies > MAX_REPLIES or self._reply_bytes > MAX_REPLY_BYTES:
            raise RemoteProtocolError(
                f"the peer caused {self._replies} frames, {self._reply_bytes} bytes, and reads none of them;"
                f" the limits are {MAX_REPLIES} and {MAX_REPLY_BYTES}",
                ErrorCode.ENHANCE_YOUR_CALM,
            )

    # --- payload

    def send_capacity(self, stream_id: int) -> int:
        """Bytes that `send_data` or `prefix_data` takes now: the least of both windows and one frame.

        It is 0 while the queue is full. When it is 0, `SendCapacityIncreased` follows once that has changed; on a
        stream that may not send, because its direction ended or it is not accepted yet, nothing follows.

        Raises:
            LocalProtocolError: there is no such stream.

        Source: RFC 9113 §5.2.
        """
        stream = self._streams.get(stream_id)
        if stream is None:
            raise self._unknown(stream_id)
        if not stream.writable:
            return 0
        capacity = stream.send_window
        if capacity <= 0:
            stream.waiting = True
            return 0
        if capacity > self._send_window:
            capacity = self._send_window
            if capacity <= 0:
                self._wants_connection = True
                return 0
        if capacity > self._send_frame:
            capacity = self._send_frame
        if len(self.out) >= SEND_QUEUE:
            self._wants_room = True
            return 0
        return capacity

    def send_data(self, stream_id: int, data: bytes | bytearray | memoryview, end_stream: bool = False) -> int:
        """Queue as much of `data` as `send_capacity` allows; at most one frame.

        Args:
            stream_id: An open stream.
            data: Copied.
            end_stream: End our direction with it; heeded only when all of `data` is taken.

        Returns:
            The bytes taken.

        Raises:
            LocalProtocolError: no such stream, or our direction has ended or may not begin yet.

        Source: RFC 9113 §6.1.
        """
        stream = self._sendable(stream_id)
        size = len(data)
        taken = min(size, self.send_capacity(stream_id)) if size else 0
        ends = end_stream and taken == size
        if not taken and not ends:
            return 0
        out = self.out
        out += HEADER.pack(taken << 8, END_STREAM if ends else 0, stream_id)
        if taken:
            out += data if taken == size else memoryview(data)[:taken]
            stream.send_window -= taken
            self._send_window -= taken
            self._sent_frames += 1
        if ends:
            self._transition(stream, Input.SEND_END)
        return taken

    def prefix_data(self, stream_id: int, buffer: bytearray | mmap, nbytes: int) -> None:
        """Make `buffer[:9 + nbytes]` a DATA frame of the payload that stands at `buffer[9:]`.

        Nothing is queued: emit it right after what the queue holds.

        Raises:
            LocalProtocolError: more than `send_capacity`, no such stream, or our direction has ended.

        Source: RFC 9113 §6.1.
        """
        stream = self._streams.get(stream_id)
        if stream is None or not stream.writable:
            raise self._unwritable(stream_id)
        if nbytes > stream.send_window or nbytes > self._send_window or nbytes > self._send_frame:
            raise LocalProtocolError(f"{nbytes} bytes on stream {stream_id} are beyond its send capacity")
        HEADER.pack_into(buffer, 0, nbytes << 8, 0, stream_id)
        stream.send_window -= nbytes
        self._send_window -= nbytes
        self._sent_frames += 1

    # --- ends

    def end_stream(self, stream_id: int) -> None:
        """End our direction; the other goes on.

        Raises:
            LocalProtocolError: no such stream, or our direction has ended or may not begin yet.

        Source: RFC 9113 §5.1.
        """
        stream = self._sendable(stream_id)
        self.out += HEADER.pack(0, END_STREAM, stream_id)
        self._transition(stream, Input.SEND_END)

    def reset(self, stream_id: int, code: ErrorCode) -> None:
        """End the stream abruptly; nothing happens when it has ended already. Source: RFC 9113 §6.4."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            self.out += frames.rst_stream(stream_id, code)
            self._transition(stream, Input.SEND_RESET)

    def release_capacity(self, stream_id: int, nbytes: int) -> None:
        """Credit the peer with `nbytes` that the reader is done with; nothing happens when the stream has ended.

        Raises:
            LocalProtocolError: more than the reader holds.

        Source: RFC 9113 §6.9.
        """
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        if not 0 <= nbytes <= stream.held:
            raise LocalProtocolError(f"{nbytes} bytes of stream {stream_id} released, of which {stream.held} are held")
        stream.released += nbytes
        if stream.released >= stream.threshold:
            self._update_window(stream)

    def _update_window(self, stream: Stream) -> None:
        if stream.id not in self._streams or stream.state in (
            StreamState.HALF_CLOSED_REMOTE,
            StreamState.RECEIVED_ENDED,
        ):
            stream.released = 0  # nobody is left to send
        else:
            self.out += frames.window_update(stream.id, stream.update(self._now, self._budget))

    # --- streams

    def _send_request(self, stream_id: int, headers: Headers) -> None:
        if list_size(headers) > self._peer_header_list:
            raise LocalProtocolError(
                f"headers of {list_size(headers)} bytes on stream {stream_id}; the peer takes {self._peer_header_list}"
            )
        self._send_headers(stream_id, headers)

    def _send_answer(self, stream_id: int, status: int, headers: Headers, *, end_stream: bool = False) -> None:
        """What the peer takes is its advice, not our fault: beyond it the status goes alone. RFC 9113 §10.5.1."""
        answer = ((b":status", b"%d" % status), *headers)
        if list_size(answer) > self._peer_header_list:
            answer = answer[:1]
        self._send_headers(stream_id, answer, end_stream=end_stream)

    def _send_headers(self, stream_id: int, headers: Headers, *, end_stream: bool = False) -> None:
        block = self._encoder.encode(headers)
        self.out += frames.header_block(stream_id, block, end_stream=end_stream, max_frame=self._send_frame)

    def _open(self, stream_id: int, how: Input) -> Stream:
        config = self._config
        stream = Stream(
            stream_id,
            size=config.initial_stream_window,
            limit=config.stream_window,
            send_window=self._peer_window,
            now=self._now,
        )
        self._streams[stream_id] = stream
        self._transition(stream, how)
        return stream

    def _transition(self, stream: Stream, how: Input) -> None:
        """Move a stream along the table.

        Raises:
            LocalProtocolError: its state does not allow that.
        """
        state = NEXT[stream.state][how]
        if state is None:
            raise LocalProtocolError(f"{how.name} on stream {stream.id}, which is {stream.state.name}")
        stream.enter(state)
        if state is StreamState.CLOSED:
            self._forget(stream, how)

    def _forget(self, stream: Stream, how: Input) -> None:
        del self._streams[stream.id]
        stream.close(self._budget)
        stream.reader = stream.early = None
        if how is not Input.SEND_END and how is not Input.RECEIVE_END:
            self._remember(stream.id, PEER_RESET if how is Input.RECEIVE_RESET else stream.credit)

    def _remember(self, stream_id: int, credit: int) -> None:
        """Note a stream that ended by a reset, and how much of its payload may still be on its way."""
        remembered = self._reset_streams
        if len(remembered) >= _REMEMBERED:
            del remembered[next(iter(remembered))]
        remembered[stream_id] = credit

    def _forget_all(self) -> None:
        self.closed = True
        for stream in list(self._streams.values()):
            stream.enter(StreamState.CLOSED)
            stream.close(self._budget)
            stream.reader = stream.early = None
        self._streams.clear()

    def _sendable(self, stream_id: int) -> Stream:
        stream = self._streams.get(stream_id)
        if stream is None or not stream.writable:
            raise self._unwritable(stream_id)
        return stream

    def _unwritable(self, stream_id: int) -> LocalProtocolError:
        stream = self._streams.get(stream_id)
        if stream is None:
            return self._unknown(stream_id)
        return LocalProtocolError(f"stream {stream_id} is {stream.state.name}; nothing may be sent on it")

    def _unknown(self, stream_id: int) -> LocalProtocolError:
        return LocalProtocolError(
            f"stream {stream_id} is not open" + (": the connection is over" if self.closed else "")
        )
