"""Two engines joined in memory, so that a test drives both ends and sees what each was told.

```python
pair = EnginePair()
stream = pair.connect()                   # the server was told; `pair.server.events` has it
pair.accept(stream)
pair.client.engine.send_data(stream, b"hello")
pair.pump()
assert pair.server.received[stream] == b"hello"
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hbone.engine import Engine
from hbone.events import ConnectReceived, StreamReset
from hbone.testing.frames import connect_headers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hbone.config import ConnectionConfig
    from hbone.engine import Sink, WindowBudget
    from hbone.events import Event, Headers

__all__ = ["EngineEnd", "EnginePair"]


class EngineEnd:
    """One engine with what it was told: `events` in order, and the payload of each stream in `received`."""

    def __init__(
        self, *, client: bool, config: ConnectionConfig | None = None, budget: WindowBudget | None = None
    ) -> None:
        self.engine = Engine(client=client, config=config, budget=budget)
        self.events: list[Event] = []
        self.received: dict[int, bytearray] = {}
        self.reading = True
        """Payload is credited at once. Set it to False for a reader that sleeps, and call `release` later."""
        self.held: dict[int, int] = {}
        """Bytes of each stream that are not released."""

    def sink(self, stream_id: int) -> Sink:
        """A sink that keeps the payload of one stream."""
        kept = self.received.setdefault(stream_id, bytearray())

        def take(view: memoryview) -> int:
            kept.extend(view)
            if self.reading:
                return len(view)
            self.held[stream_id] = self.held.get(stream_id, 0) + len(view)
            return 0

        return take

    def release(self, stream_id: int) -> None:
        """Release what a sleeping reader holds of one stream."""
        self.engine.release_capacity(stream_id, self.held.pop(stream_id, 0))

    def receive(self, data: bytes, now: float = 0.0) -> list[Event]:
        """Give bytes to the engine; its events are kept, and returned."""
        events = self.engine.receive_data(data, now)
        self.events += events
        return events

    def take_events(self) -> list[Event]:
        """Events so far, which are then forgotten."""
        events, self.events = self.events, []
        return events


class EnginePair:
    """A client and a server engine whose bytes go to each other when `pump` is called.

    Args:
        client: Settings of the client.
        server: Settings of the server.
        chunks: Cuts what one end sent into the parts in which the other gets it.
        now: The clock, which only the test moves.
    """

    def __init__(
        self,
        client: ConnectionConfig | None = None,
        server: ConnectionConfig | None = None,
        *,
        budget: WindowBudget | None = None,
        chunks: Callable[[bytes], Iterator[bytes]] | None = None,
        now: float = 0.0,
    ) -> None:
        self.client = EngineEnd(client=True, config=client)
        self.server = EngineEnd(client=False, config=server, budget=budget)
        self.now = now
        self._chunks = chunks
        self.client.engine.start(now)
        self.server.engine.start(now)
        self.pump()

    def _carry(self, sender: EngineEnd, receiver: EngineEnd) -> bool:
        data = sender.engine.data_to_send()
        if self._chunks is None:
            receiver.receive(data, self.now)
        else:
            for chunk in self._chunks(data):
                receiver.receive(chunk, self.now)
        return bool(data)

    def pump(self, rounds: int = 1000) -> None:
        """Carry bytes both ways until neither end has any.

        Raises:
            AssertionError: they still talk after `rounds`.
        """
        for _ in range(rounds):
            if not (self._carry(self.client, self.server) | self._carry(self.server, self.client)):
                return
        raise AssertionError(f"the engines still talk after {rounds} rounds")

    def advance(self, seconds: float) -> None:
        """Move the clock, let both ends do what is due, and pump."""
        self.now += seconds
        for end in (self.client, self.server):
            deadline = end.engine.next_deadline()
            if deadline is not None and deadline <= self.now:
                end.events += end.engine.on_time(self.now)
        self.pump()

    def connect(self, headers: Headers | None = None) -> int:
        """Open a stream from the client and carry the request to the server."""
        engine = self.client.engine
        stream_id = engine.statistics().streams * 2 + 1
        taken = engine.connect(headers or connect_headers(), self.client.sink(stream_id))
        assert taken == stream_id, "the client skipped a stream"
        self.pump()
        return stream_id

    def accept(self, stream_id: int, headers: Headers = ()) -> None:
        """Answer 200 and carry it to the client."""
        self.server.engine.accept(stream_id, headers, self.server.sink(stream_id))
        self.pump()

    def open(self) -> int:
        """A stream that is open both ways; the events that led to it are forgotten."""
        stream_id = self.connect()
        assert any(isinstance(event, ConnectReceived) for event in self.server.events), self.server.events
        self.accept(stream_id)
        self.client.take_events()
        self.server.take_events()
        return stream_id

    def send(self, sender: EngineEnd, stream_id: int, data: bytes, *, end_stream: bool = False) -> None:
        """Send all of `data`, pumping whenever a window is used up.

        Raises:
            AssertionError: a window stays shut, so that it can't all be sent.
        """
        sent = 0
        while True:
            taken = sender.engine.send_data(stream_id, memoryview(data)[sent:], end_stream)
            sent += taken
            self.pump()
            if sent == len(data):
                return
            assert taken or sender.engine.send_capacity(stream_id), f"stuck after {sent} of {len(data)} bytes"

    def resets(self) -> list[StreamReset]:
        """Resets that either end was told of."""
        return [event for event in self.client.events + self.server.events if isinstance(event, StreamReset)]
