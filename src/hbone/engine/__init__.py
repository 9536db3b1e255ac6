"""HTTP/2 for tunnels: frames in, payload and events out; verbs in, frames out. No sockets, clocks or threads.

An engine is one object in layers, so that a frame on the hot path meets no indirection: `send.Outbound` (queue,
windows, DATA out), `control.Control` (every other frame in), `receive.Inbound` (the parser and DATA in), and `Engine`
(the verbs and the deadlines).

```python
engine = Engine(client=True)
engine.start(now)
stream_id = engine.connect(headers, sink)          # verbs only queue
transport.send(engine.data_to_send())
for event in engine.receive_data(transport.receive(), now):   # payload has gone to the sinks already
    ...
```

Rules for callers:

- After each `receive_data`, `on_time` or verb: send what is queued, then ask `next_deadline`.
- While the transport takes nothing, leave the queue alone: its bounds are what stops a peer that never reads.
- A sink is called inside `receive_data` and `accept`, so it may run before the event that `receive_data` returns:
  a client's sink can have payload before `ConnectAccepted` is seen. A server's has none before `accept`, and
  `StreamEnded` can come before it.
- `reset` and `release_capacity` may be called at any time, from a sink too; every other verb on a stream that has
  ended raises `LocalProtocolError`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import attrs

from hbone.config import ConnectionConfig
from hbone.engine import frames
from hbone.engine.control import KEEPALIVE_PING, LAST_STREAM, LIVENESS_PING
from hbone.engine.flow import WindowBudget
from hbone.engine.frames import DEFAULT_WINDOW, PREFACE, Setting
from hbone.engine.receive import Inbound
from hbone.engine.send import SEND_QUEUE
from hbone.engine.streams import Input, Sink, Stream, StreamState
from hbone.errors import ErrorCode, LocalProtocolError
from hbone.events import SendCapacityIncreased, TransportEnded

if TYPE_CHECKING:
    from hbone.events import Event, Headers

__all__ = ["Engine", "EngineStatistics", "Sink", "WindowBudget"]

_NEVER: Final = math.inf


@attrs.frozen(kw_only=True)
class EngineStatistics:
    """A connection in numbers."""

    open_streams: int
    streams: int
    """Opened since the start, by whichever side opens them."""
    sent_frames: int
    """DATA frames."""
    received_bytes: int
    """Payload and padding of DATA."""
    send_window: int
    """Bytes that the peer lets the connection send now."""
    queued_bytes: int
    rtt: float | None
    """Seconds that the last PING took."""


class Engine(Inbound):
    """One end of a tunnel connection.

    Args:
        client: Which end.
        config: Limits and timeouts.
        budget: What windows may grow by; shared between the connections of a process.
    """

    __slots__ = ()

    def __init__(
        self, *, client: bool, config: ConnectionConfig | None = None, budget: WindowBudget | None = None
    ) -> None:
        super().__init__(client=client, config=ConnectionConfig() if config is None else config, budget=budget)

    # --- state

    @property
    def open_streams(self) -> int:
        """Streams that have not ended."""
        return len(self._streams)

    def is_open(self, stream_id: int) -> bool:
        """Whether the stream has begun, and has not ended."""
        return stream_id in self._streams

    @property
    def draining(self) -> bool:
        """No stream should be opened here any more: one end sent GOAWAY, or stream ids run out."""
        return self._draining or self.closed or self._next_id >= LAST_STREAM

    @property
    def available_streams(self) -> int:
        """Streams that `connect` may open now."""
        if not self._client or self.draining:
            return 0
        return max(0, self.peer_max_streams - len(self._streams))

    def statistics(self) -> EngineStatistics:
        """The connection in numbers, now."""
        return EngineStatistics(
            open_streams=len(self._streams),
            streams=self._streams_total,
            sent_frames=self._sent_frames,
            received_bytes=self._granted - self._credit,
            send_window=self._send_window,
            queued_bytes=len(self.out),
            rtt=self._rtt,
        )

    # --- verbs

    def start(self, now: float) -> None:
        """Queue preface and SETTINGS, widen the connection's window, and arm the deadlines. Source: RFC 9113 §3.4."""
        config = self._config
        self._now = now
        values = [
            (Setting.INITIAL_WINDOW_SIZE, config.initial_stream_window),
            (Setting.MAX_FRAME_SIZE, config.max_frame_size),
            (Setting.MAX_HEADER_LIST_SIZE, config.max_header_list_size),
        ]
        if self._client:
            self.out += PREFACE
            values.insert(0, (Setting.ENABLE_PUSH, 0))
        else:
            values.insert(0, (Setting.MAX_CONCURRENT_STREAMS, config.max_concurrent_streams))
        self.out += frames.settings(values)
        if config.connection_window > DEFAULT_WINDOW:
            self.out += frames.window_update(0, config.connection_window - DEFAULT_WINDOW)
        self._preface_deadline = now + config.preface_timeout
        self._settings_deadline = now + config.settings_timeout
        if config.keepalive_interval:
            self._ping_due = now + config.keepalive_interval

    def connect(self, headers: Headers, sink: Sink) -> int:
        """Client: open a stream. Payload may be sent at once; the answer is an event.

        Args:
            headers: Pseudo-headers first.
            sink: Where payload goes.

        Returns:
            The stream's id.

        Raises:
            LocalProtocolError: the connection is draining or over, or has no stream left; or the peer takes no header
                list of that size.

        Source: RFC 9113 §8.5.
        """
        if not self._client:
            raise LocalProtocolError("only a client opens streams")
        if not self.available_streams:
            why = "is over" if self.closed else "is draining" if self.draining else "has no stream left"
            raise LocalProtocolError(f"the connection {why}: {len(self._streams)} of {self.peer_max_streams} are open")
        stream_id = self._next_id
        self._send_request(stream_id, headers)
        self._next_id += 2
        self._streams_total += 1
        self._open(stream_id, Input.SEND_CONNECT).reader = sink
        return stream_id

    def accept(self, stream_id: int, headers: Headers, sink: Sink) -> None:
        """Server: answer 200. `sink` gets what came before at once, inside this call.

        Args:
            stream_id: From `ConnectReceived`.
            headers: Beyond `:status`; left out where the peer takes no list of that size.
            sink: Where payload goes.

        Raises:
            LocalProtocolError: there is no such stream, or it has its answer.

        Source: RFC 9113 §8.5.
        """
        stream = self._unanswered(stream_id)
        self._send_answer(stream_id, 200, headers)
        stream.reader = sink
        self._transition(stream, Input.SEND_ACCEPT)
        early, stream.early = stream.early, None
        if early:
            taken = sink(memoryview(early))
            if taken:
                self.release_capacity(stream_id, taken)

    def reject(self, stream_id: int, status: int, headers: Headers = ()) -> None:
        """Server: answer with another status; the stream ends.

        Raises:
            LocalProtocolError: there is no such stream, it has its answer, or the status is not one of a refusal.

        Source: RFC 9113 §8.1, §8.5.
        """
        if not 300 <= status <= 599:
            raise LocalProtocolError(f"status {status} is no refusal; use one from 300 to 599")
        stream = self._unanswered(stream_id)
        self._send_answer(stream_id, status, headers, end_stream=True)
        if stream.state is StreamState.RECEIVED:
            self.out += frames.rst_stream(stream_id, ErrorCode.NO_ERROR)
        self._transition(stream, Input.SEND_REFUSAL)

    def ping(self, now: float) -> None:
        """Ask whether the peer lives; `PingAcknowledged` is its answer. One question at a time.

        Source: RFC 9113 §6.7.
        """
        if not self.closed and LIVENESS_PING not in self._pings:
            self._pings[LIVENESS_PING] = now
            self.out += frames.ping(LIVENESS_PING)

    def drain(self, now: float) -> None:
        """Let open streams finish and take no further ones; `TransportEnded` comes with the end of the last.

        A server says GOAWAY twice, so that streams which the client opens meanwhile are served. Source: RFC 9113 §6.8.
        """
        self._now = now
        if not self.closed:
            self._begin_drain()

    def close(self, code: ErrorCode = ErrorCode.NO_ERROR, debug: bytes = b"") -> None:
        """Queue GOAWAY; every stream ends now. Source: RFC 9113 §5.4.1, §6.8."""
        self._abort(code, debug.decode("ascii", "replace"))

    def connection_lost(self) -> None:
        """The transport is gone: forget the streams and what is queued, and give windows back."""
        self._forget_all()
        self.out.clear()

    # --- time

    def next_deadline(self) -> float | None:
        """When `on_time` must be called, on the clock of `now`; it may have passed. None: not for time's sake."""
        if self.closed:
            return None
        if (self._finishing and not self._streams) or (self._wants_room and len(self.out) < SEND_QUEUE):
            return self._now
        deadline = min(
            self._preface_deadline, self._settings_deadline, self._block_deadline, self._drain_deadline, self._ping_due
        )
        for payload, sent in self._pings.items():
            if payload in (KEEPALIVE_PING, LIVENESS_PING):
                deadline = min(deadline, sent + self._config.keepalive_timeout)
        return None if deadline == _NEVER else deadline

    def on_time(self, now: float) -> list[Event]:
        """Do what is due: PINGs, the second GOAWAY, and the end of a connection whose peer is late.

        Returns:
            What happened: `TransportEnded` for a connection that is over, `SendCapacityIncreased` when the queue has
            room again.
        """
        events: list[Event] = []
        if self.closed:
            return events
        self._now = now
        self._events = events
        late = self._late(now)
        if late is not None:
            code, reason = late
            self._abort(code, reason)
            events.append(TransportEnded(reason=reason, clean=False))
            return events
        if now >= self._ping_due:
            self._ping_due = _NEVER
            self._pings[KEEPALIVE_PING] = now
            self.out += frames.ping(KEEPALIVE_PING)
        if now >= self._drain_deadline:
            self._end_drain()
        if self._wants_room and len(self.out) < SEND_QUEUE:
            self._wants_room = False
            events.append(SendCapacityIncreased(stream_id=0))
        if self._finishing and not self._streams:
            self._finish()
        return events

    def trim(self, now: float) -> None:
        """Let go of what the engine makes again when it is needed; for a connection that idles."""
        self._decoder.trim()
        self._guard.trim(now)

    def _late(self, now: float) -> tuple[ErrorCode, str] | None:
        config = self._config
        if now >= self._preface_deadline:
            return ErrorCode.SETTINGS_TIMEOUT, f"no preface and SETTINGS from the peer in {config.preface_timeout:g} s"
        if now >= self._settings_deadline:
            return ErrorCode.SETTINGS_TIMEOUT, f"SETTINGS not acknowledged in {config.settings_timeout:g} s"
        if now >= self._block_deadline:
            return ErrorCode.ENHANCE_YOUR_CALM, f"a header block stayed open for {config.preface_timeout:g} s"
        for payload in (KEEPALIVE_PING, LIVENESS_PING):
            if now - self._pings.get(payload, now) >= config.keepalive_timeout:
                return ErrorCode.NO_ERROR, f"PING not answered in {config.keepalive_timeout:g} s"
        return None

    # --- helpers

    def _unanswered(self, stream_id: int) -> Stream:
        stream = self._streams.get(stream_id)
        if stream is None:
            raise self._unknown(stream_id)
        if stream.state not in (StreamState.RECEIVED, StreamState.RECEIVED_ENDED):
            raise LocalProtocolError(f"stream {stream_id} is {stream.state.name}; it has its answer")
        return stream
