"""The same bytes for our engine and for hyper-h2: both must understand the same.

hyper-h2 is the judge. Where the two may differ:

1. GOAWAY: hyper-h2 takes nothing after it, sent or received; we go on until the open streams have ended.
2. A stream beyond the limit: hyper-h2 ends the connection; we refuse that stream.
3. Unknown SETTINGS: hyper-h2 keeps and reports them; we drop them.
4. CONNECT's fields: hyper-h2 judges `:path`, `:scheme`, `host` and a request without `:authority`; we leave that to
   `hbone.connect`. We refuse `:protocol`, which it knows. It joins or checks cookies and content-length; we don't look.
5. Floods: hyper-h2 counts none but CONTINUATION.
6. Trailers on a CONNECT stream: hyper-h2 gives them to the application; for us they are a fault (RFC 9113 §8.5).
7. PRIORITY that depends on itself, and a PRIORITY frame for an idle stream: hyper-h2 minds the first; we ignore both.
8. Which error code, and whether a frame for a stream that has ended costs the stream or the connection, where the RFC
   leaves that open. What is compared is whether the connection lives, and what streams were told until then.
9. WINDOW_UPDATE, RST_STREAM and a server's HEADERS for streams that were never opened: hyper-h2 lets some pass, or
   resets the stream; we end the connection (RFC 9113 §5.1 idle).
10. A batch that opens and resets a stream: we do not mention it. (Here each frame is given by itself.)
11. A frame that is too long: hyper-h2 waits for all of it; we refuse it on its ninth byte.

So the frames below are drawn from what both must agree on, with every order and mix of them.
"""

from __future__ import annotations

from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
from hypothesis import given, settings
from hypothesis import strategies as st

from hbone.errors import RemoteProtocolError
from hbone.events import ConnectAccepted, ConnectReceived, ConnectRefused, StreamEnded, StreamReset
from hbone.testing import frames
from hbone.testing.engines import EngineEnd

Understood = list[tuple[Any, ...]]
"""What a server was told: ("connect", id, headers), ("data", id, bytes), ("end", id), ("reset", id, code)."""


class Judge:
    """A plain H2Connection, put in the same terms."""

    def __init__(self, *, client: bool) -> None:
        codes = h2.settings.SettingCodes
        self.connection = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=client, header_encoding=None, validate_inbound_headers=True)
        )
        values = {codes.INITIAL_WINDOW_SIZE: 262_144, codes.MAX_FRAME_SIZE: 1_048_576}
        self.connection.local_settings = h2.settings.Settings(client=client, initial_values=values)
        self.connection.max_inbound_frame_size = 1_048_576
        self.connection.initiate_connection()
        self.connection.increment_flow_control_window(16_777_216 - 65_535)
        self.understood: Understood = []
        self.ended = False
        self.faults: set[int] = set()

    def receive(self, data: bytes) -> None:
        if self.ended:
            return
        try:
            events = self.connection.receive_data(data)
        except h2.exceptions.ProtocolError:
            self.ended = True
            return
        for event in events:
            self._understand(event)

    def _understand(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            self.understood.append(("connect", event.stream_id, tuple(event.headers)))
            self.connection.send_headers(event.stream_id, [(b":status", b"200")])
        elif isinstance(event, h2.events.ResponseReceived):
            status = dict(event.headers)[b":status"]
            self.understood.append(("answer", event.stream_id, status))
            if status != b"200":
                self.connection.reset_stream(event.stream_id)
                self.faults.add(event.stream_id)
        elif isinstance(event, h2.events.DataReceived):
            if event.data and event.stream_id not in self.faults:
                self.understood.append(("data", event.stream_id, event.data))
        elif isinstance(event, h2.events.StreamEnded):
            if event.stream_id not in self.faults:
                self.understood.append(("end", event.stream_id))
        elif isinstance(event, h2.events.StreamReset):
            if event.remote_reset:
                self.understood.append(("reset", event.stream_id, int(event.error_code)))
            else:
                self.faults.add(event.stream_id)
                self.understood.append(("fault", event.stream_id))

    def window(self, stream_id: int) -> int:
        try:
            return self.connection.local_flow_control_window(stream_id)
        except h2.exceptions.ProtocolError:
            return 0


class Ours:
    """Our engine, put in the same terms."""

    def __init__(self, *, client: bool) -> None:
        self.end = EngineEnd(client=client)
        self.engine = self.end.engine
        self.engine.start(0.0)
        self.understood: Understood = []
        self.ended = False

    def sink(self, stream_id: int, view: memoryview) -> int:
        self.understood.append(("data", stream_id, bytes(view)))
        return len(view)

    def receive(self, data: bytes) -> None:
        if self.ended:
            return
        try:
            events = self.engine.receive_data(data, 0.0)
        except RemoteProtocolError:
            self.ended = True
            return
        for event in events:
            if isinstance(event, ConnectReceived):
                stream_id = event.stream_id
                self.understood.append(("connect", stream_id, event.headers))
                self.engine.accept(stream_id, (), lambda view, of=stream_id: self.sink(of, view))  # type: ignore[misc]
                if event.ended:
                    self.understood.append(("end", stream_id))
            elif isinstance(event, ConnectAccepted):
                self.understood.append(("answer", event.stream_id, b"200"))
            elif isinstance(event, ConnectRefused):
                self.understood.append(("answer", event.stream_id, str(event.status).encode()))
            elif isinstance(event, StreamEnded):
                self.understood.append(("end", event.stream_id))
            elif isinstance(event, StreamReset):
                name = ("reset", event.stream_id, int(event.code)) if event.by_peer else ("fault", event.stream_id)
                self.understood.append(name)

    def window(self, stream_id: int) -> int:
        stream = self.engine._streams.get(stream_id)
        return min(stream.send_window, self.engine._send_window) if stream is not None and stream.writable else 0


STREAMS = st.sampled_from([1, 3, 5, 7])
CODES = st.sampled_from([0, 1, 2, 5, 7, 8, 10, 13])
FIELDS = st.lists(
    st.tuples(
        st.sampled_from([b"baggage", b"forwarded", b"traceparent", b"x-forwarded-network"]),
        st.sampled_from([b"", b"a=b", b"value with spaces", b"\xff\xfe", b"v" * 300]),
    ),
    max_size=4,
)
BAD_FIELDS = st.sampled_from(
    [
        (b"Upper", b"x"),
        (b"connection", b"close"),
        (b"transfer-encoding", b"chunked"),
        (b"te", b"gzip"),
        (b"x", b"a\r\nb"),
        (b"x", b"a\0b"),
        (b"x", b" padded"),
        (b":status", b"200"),
        (b":unknown", b"x"),
        (b":method", b"CONNECT"),
        (b"", b"x"),
    ]
)


def blocks(stream_id: int, wire: bytes, cut: int) -> bytes:
    """HEADERS, or HEADERS and CONTINUATION."""
    kind, flags, _, block = frames.split(wire)[0]
    if not cut:
        return wire
    cut = min(cut, len(block))
    return frames.raw(kind, flags & ~0x4, stream_id, block[:cut]) + frames.continuation(
        stream_id, block[cut:], end_headers=True
    )


COMMON = st.one_of(
    st.builds(
        frames.data, STREAMS, st.binary(max_size=40), end_stream=st.booleans(), pad=st.sampled_from([None, 0, 3])
    ),
    st.builds(frames.rst_stream, STREAMS, CODES),
    st.builds(frames.window_update, STREAMS, st.sampled_from([1, 1000, 2**31 - 1])),
    st.builds(frames.window_update, st.just(0), st.sampled_from([1, 1000, 2**30])),
    st.builds(frames.ping, st.binary(min_size=8, max_size=8), ack=st.booleans()),
    st.builds(
        frames.settings,
        st.dictionaries(st.sampled_from([1, 3, 4, 5, 6]), st.integers(16_384, 200_000), max_size=3),
    ),
    st.builds(frames.unknown, st.sampled_from([0, 1, 3]), st.binary(max_size=10)),
    st.just(frames.settings_ack()),
)
WRONG = st.sampled_from(
    [
        frames.raw(0, 0x8, 1, b"\x05abc"),
        frames.data(0, b"x"),
        frames.raw(6, 0, 0, bytes(7)),
        frames.raw(8, 0, 0, bytes(3)),
        frames.raw(8, 0, 0, bytes(4)),
        frames.raw(4, 0, 0, bytes(5)),
        frames.raw(4, 0, 1, b""),
        frames.settings({4: 2**31}),
        frames.settings({5: 1}),
        frames.rst_stream(0),
        frames.continuation(1),
        frames.headers(2, frames.connect_headers()),
        frames.headers(9, b"\x80"),
    ]
)
REQUESTS = st.one_of(
    st.builds(
        lambda stream, fields, end, cut: blocks(stream, frames.connect(stream, extra=fields, end_stream=end), cut),
        STREAMS,
        FIELDS,
        st.booleans(),
        st.sampled_from([0, 0, 1, 7]),
    ),
    st.builds(lambda stream, bad: frames.connect(stream, extra=[bad]), STREAMS, BAD_FIELDS),
)
ANSWERS = st.builds(
    lambda stream, status, fields, end: frames.response(stream, status, fields, end_stream=end),
    STREAMS,
    st.sampled_from([200, 200, 200, 503, 401]),
    FIELDS,
    st.booleans(),
)


def undecided(wire: bytes, known: dict[int, str], *, client: bool) -> bool:
    """Frames that the list above leaves to each: they are given to neither."""
    for kind, flags, stream, _ in frames.split(wire):
        state = known.get(stream, "idle")
        if kind == 0x1 and client and state == "idle":
            return True  # 9
        if kind == 0x1 and state not in ("idle", "asked"):
            return True  # 6, 8: trailers, and headers of a stream that has ended
        if kind == 0x9 and flags and stream and state not in ("idle", "asked"):
            return True
        if kind in (0x0, 0x3, 0x8) and stream and state in ("idle", "over"):
            return True  # 8, 9
        if kind == 0x0 and state in ("ended", "asked"):
            return True  # 8: DATA after END_STREAM, or before the answer
    return False


def note(understood: Understood, known: dict[int, str]) -> None:
    for what, stream, *_ in understood:
        known[stream] = {"connect": "open", "answer": "open", "data": "open", "end": "ended"}.get(what, "over")
    for what, stream, *rest in understood:
        if what == "answer" and rest != [b"200"]:
            known[stream] = "over"


def compare(wires: list[bytes], *, client: bool) -> None:
    ours, judge = Ours(client=client), Judge(client=client)
    known: dict[int, str] = {}
    start = (b"" if client else frames.PREFACE) + frames.settings() + frames.settings_ack()
    for end in (ours, judge):
        end.receive(start)
    if client:
        for stream in (1, 3, 5, 7):
            ours.engine.connect(frames.connect_headers(), lambda view, of=stream: ours.sink(of, view))  # type: ignore[misc]
            judge.connection.send_headers(stream, frames.connect_headers())
            known[stream] = "asked"
    highest = 0
    for wire in wires:
        if wire[3] == 0x1 and not client:  # ids go up
            stream = int.from_bytes(wire[5:9])
            if stream <= highest:
                continue
        if undecided(wire, known, client=client):
            continue
        if wire[3] == 0x1 and not client:
            highest = int.from_bytes(wire[5:9])
        ours.receive(wire)
        judge.receive(wire)
        if wire[3] == 0x1 and not client and not any(entry[1] == highest for entry in ours.understood):
            assert not any(entry[1] == highest for entry in judge.understood)
            if judge.ended:
                return  # 8: a malformed request costs hyper-h2's connection, and our stream
            known[highest] = "over"
        assert ours.ended == judge.ended, wire
        if ours.ended:
            assert ours.understood == judge.understood[: len(ours.understood)]
            return
        assert ours.understood == judge.understood, wire
        note(ours.understood, known)
        for stream in (1, 3, 5, 7):
            if known.get(stream) in ("open", "ended"):
                assert ours.window(stream) == judge.window(stream), (wire, stream)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(REQUESTS, REQUESTS, COMMON, COMMON, COMMON, WRONG), max_size=25))
def test_a_server_understands_what_hyper_h2_understands(wires: list[bytes]) -> None:
    compare(wires, client=False)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(ANSWERS, ANSWERS, COMMON, COMMON, COMMON, WRONG), max_size=25))
def test_a_client_understands_what_hyper_h2_understands(wires: list[bytes]) -> None:
    compare(wires, client=True)


def exchange(ours: EngineEnd, judge: h2.connection.H2Connection) -> list[h2.events.Event]:
    """Carry bytes both ways until there are none; hyper-h2 reads at once."""
    seen: list[h2.events.Event] = []
    while True:
        to_judge, to_ours = ours.engine.data_to_send(), judge.data_to_send()
        if not to_judge and not to_ours:
            return seen
        for event in judge.receive_data(to_judge):
            seen.append(event)
            if isinstance(event, h2.events.DataReceived):
                judge.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        ours.receive(to_ours)


def payload_of(events: list[h2.events.Event]) -> bytes:
    return b"".join([event.data for event in events if isinstance(event, h2.events.DataReceived)])


def bulk(ours: EngineEnd, judge: h2.connection.H2Connection, stream: int) -> None:
    """A megabyte each way, then both ends."""
    size = 2**20
    seen: list[h2.events.Event] = []
    sent = answered = 0
    while sent < size or answered < size:
        sent += ours.engine.send_data(stream, bytes(size - sent)) if sent < size else 0
        room = min(judge.local_flow_control_window(stream), judge.max_outbound_frame_size, size - answered)
        if room:
            judge.send_data(stream, b"y" * room, pad_length=None)
            answered += room
        seen += exchange(ours, judge)
    ours.engine.end_stream(stream)
    judge.end_stream(stream)
    seen += exchange(ours, judge)
    assert payload_of(seen) == bytes(size)
    assert ours.received[stream] == b"y" * size
    assert any(isinstance(event, h2.events.StreamEnded) for event in seen)
    assert StreamEnded(stream_id=stream) in ours.events
    assert ours.engine.open_streams == 0


def test_our_client_is_served_by_hyper_h2() -> None:
    ours = EngineEnd(client=True)
    ours.engine.start(0.0)
    judge = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
    judge.initiate_connection()
    exchange(ours, judge)
    for stream in (1, 3, 5):
        headers = frames.connect_headers("[::1]:80", [(b"baggage", b"v" * 300), (b"turn", b"%d" % stream)])
        assert ours.engine.connect(headers, ours.sink(stream)) == stream
        requests = [event for event in exchange(ours, judge) if isinstance(event, h2.events.RequestReceived)]
        assert [tuple(event.headers) for event in requests] == [headers]
        judge.send_headers(stream, [(b":status", b"200"), (b"baggage", b"w" * 300)])
        exchange(ours, judge)
        bulk(ours, judge, stream)


def test_our_server_serves_hyper_h2() -> None:
    ours = EngineEnd(client=False)
    ours.engine.start(0.0)
    judge = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding=None))
    judge.initiate_connection()
    exchange(ours, judge)
    for stream in (1, 3, 5):
        judge.send_headers(stream, [*frames.connect_headers(), (b"baggage", b"v" * 300)])
        exchange(ours, judge)
        ours.engine.accept(stream, ((b"baggage", b"w" * 300),), ours.sink(stream))
        answers = [event for event in exchange(ours, judge) if isinstance(event, h2.events.ResponseReceived)]
        assert [tuple(event.headers) for event in answers] == [((b":status", b"200"), (b"baggage", b"w" * 300))]
        bulk(ours, judge, stream)
    judge.send_headers(7, [*frames.connect_headers()])
    exchange(ours, judge)
    ours.engine.reject(7, 503)
    seen = exchange(ours, judge)
    assert any(isinstance(event, h2.events.StreamEnded) for event in seen)
    judge.update_settings({h2.settings.SettingCodes.HEADER_TABLE_SIZE: 0})
    judge.send_headers(9, [*frames.connect_headers()])
    exchange(ours, judge)
    ours.engine.accept(9, (), ours.sink(9))
    assert any(isinstance(event, h2.events.ResponseReceived) for event in exchange(ours, judge))
