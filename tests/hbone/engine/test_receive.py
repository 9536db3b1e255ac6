"""The parser: frames in any pieces, and frames that are wrong."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbone.config import ConnectionConfig
from hbone.engine.frames import FrameType
from hbone.errors import ErrorCode, RemoteProtocolError
from hbone.events import ConnectAccepted, ConnectReceived, Event, StreamEnded, StreamReset
from hbone.testing import frames
from hbone.testing.engines import EngineEnd, EnginePair


def server(config: ConnectionConfig | None = None) -> EngineEnd:
    end = EngineEnd(client=False, config=config)
    end.engine.start(0.0)
    end.receive(frames.PREFACE + frames.settings() + frames.settings_ack())
    end.engine.data_to_send()
    end.take_events()
    return end


def open_stream(end: EngineEnd, stream_id: int = 1) -> EngineEnd:
    end.receive(frames.connect(stream_id))
    end.engine.accept(stream_id, (), end.sink(stream_id))
    end.engine.data_to_send()
    end.take_events()
    return end


# --- pieces


def test_payload_is_handed_over_while_its_frame_is_incomplete() -> None:
    end = open_stream(server())
    wire = frames.data(1, bytes(range(100)), end_stream=True)
    assert end.receive(wire[:9]) == []
    assert end.receive(wire[9:50]) == []
    assert bytes(end.received[1]) == bytes(range(41))
    assert end.receive(wire[50:-1]) == []
    assert end.receive(wire[-1:]) == [StreamEnded(stream_id=1)]
    assert bytes(end.received[1]) == bytes(range(100))


def test_payload_is_a_view_into_what_was_received() -> None:
    end = server()
    end.receive(frames.connect(1))
    seen: list[object] = []

    def sink(view: memoryview) -> int:
        seen.append(view.obj)
        return len(view)

    end.engine.accept(1, (), sink)
    wire = bytearray(frames.data(1, bytes(1000)) + frames.data(1, bytes(1000))[:500])
    end.engine.receive_data(wire, 0.0)
    assert [item is wire for item in seen] == [True, True]


def test_a_call_without_events_returns_an_empty_list() -> None:
    end = open_stream(server())
    assert end.engine.receive_data(frames.data(1, b"x"), 0.0) == []
    assert end.engine.receive_data(b"", 0.0) == []


def test_an_unknown_frame_is_skipped_without_being_kept() -> None:
    end = open_stream(server())
    wire = frames.unknown(1, bytes(100_000), flags=0xFF)
    for at in range(0, len(wire), 1000):
        assert end.receive(wire[at : at + 1000]) == []
        assert len(end.engine._partial) <= 9
    assert end.receive(frames.data(1, b"x", end_stream=True)) == [StreamEnded(stream_id=1)]


def test_undefined_flags_and_the_reserved_bit_are_ignored() -> None:
    end = open_stream(server())
    end.receive(frames.raw(FrameType.DATA, 0xF6, 0x8000_0001, b"payload"))
    assert bytes(end.received[1]) == b"payload"
    assert end.receive(frames.raw(FrameType.DATA, 0xF7, 0x8000_0001)) == [StreamEnded(stream_id=1)]


def test_accept_between_two_pieces_of_a_frame_loses_nothing() -> None:
    end = server()
    wire = frames.data(1, b"0123456789", end_stream=True)
    end.receive(frames.connect(1) + wire[:14])
    end.engine.accept(1, (), end.sink(1))
    assert end.received[1] == b"01234"
    assert end.receive(wire[14:]) == [StreamEnded(stream_id=1)]
    assert end.received[1] == b"0123456789"


def test_a_stream_opened_and_reset_in_one_call_is_never_mentioned() -> None:
    end = server()
    assert end.receive(frames.connect(1) + frames.connect(3) + frames.rst_stream(1)) == [
        ConnectReceived(stream_id=3, headers=frames.connect_headers())
    ]
    assert end.receive(frames.connect(5) + frames.data(5, b"x", end_stream=True) + frames.rst_stream(5)) == []
    assert end.engine.open_streams == 1


CONVERSATION = b"".join(
    (
        frames.PREFACE,
        frames.settings({4: 100_000, 5: 20_000, 0x99: 1}),
        frames.window_update(0, 1000),
        frames.connect(1, extra=[(b"baggage", b"a=b")]),
        frames.data(1, b"early"),
        frames.settings_ack(),
        frames.ping(b"abcdefgh"),
        frames.headers(3, frames.block(frames.connect_headers())[:5], end_headers=False),
        frames.continuation(3, frames.block(frames.connect_headers())[5:], end_headers=True),
        frames.data(3, b"padded", pad=7),
        frames.unknown(3, b"unknown payload"),
        frames.priority(5),
        frames.data(1, b"x" * 500),
        frames.headers(5, frames.connect_headers(), pad=4, priority=(0, 3), end_stream=True),
        frames.window_update(1, 5),
        frames.data(3, b"", pad=2),
        frames.data(3, b"last", end_stream=True, pad=0),
        frames.rst_stream(1, ErrorCode.CONNECT_ERROR),
        frames.data(1, b"late", end_stream=False),
        frames.goaway(0, ErrorCode.NO_ERROR, b"bye"),
    )
)


def converse(pieces: list[bytes]) -> tuple[list[Event], dict[int, bytes], bytes]:
    end = EngineEnd(client=False)
    end.engine.start(0.0)
    accepted = set()
    for piece in pieces:
        for event in end.receive(piece):
            if isinstance(event, ConnectReceived) and event.stream_id != 1:
                end.engine.accept(event.stream_id, (), end.sink(event.stream_id))
                accepted.add(event.stream_id)
    assert accepted == {3, 5}
    received = {stream: bytes(payload) for stream, payload in end.received.items()}
    return end.events, received, end.engine.data_to_send()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, len(CONVERSATION)), max_size=40))
def test_any_chunking_gives_the_same_events_payload_and_answers(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(CONVERSATION)]
    pieces = [CONVERSATION[start:end] for start, end in pairwise(edges)]
    events, received, answers = converse(pieces)
    expected = converse([CONVERSATION[at : at + 1] for at in range(len(CONVERSATION))])
    # A stream that one call opens and resets is not mentioned: the only difference that chunking makes.
    hidden = {stream for stream in (1,) if not any(getattr(e, "stream_id", 0) == stream for e in events)}
    assert events == [event for event in expected[0] if getattr(event, "stream_id", 0) not in hidden]
    assert received == expected[1]
    assert sorted(frames.split(answers)) == sorted(frames.split(expected[2]))


# --- random bytes


@settings(max_examples=150, deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=8), st.booleans(), st.booleans())
def test_garbage_raises_only_remote_protocol_errors(parts: list[bytes], client: bool, preface: bool) -> None:
    end = EngineEnd(client=client)
    end.engine.start(0.0)
    try:
        if preface:
            end.receive((b"" if client else frames.PREFACE) + frames.settings())
        for part in parts:
            end.receive(part)
    except RemoteProtocolError:
        assert end.engine.closed
    frames.split(end.engine.data_to_send())


def frame_strategy() -> st.SearchStrategy[bytes]:
    return st.builds(
        frames.raw,
        st.integers(0, 10),
        st.sampled_from([0, 0x1, 0x4, 0x5, 0x8, 0x9, 0xD, 0x20, 0x2D, 0xFF]),
        st.sampled_from([0, 1, 2, 3, 5, 7, 2**31 - 1]),
        st.one_of(
            st.binary(max_size=20),
            st.sampled_from(
                [
                    bytes(4),
                    b"\0\0\0\x08",
                    b"\x7f\xff\xff\xff",
                    bytes(8),
                    frames.block(frames.connect_headers()),
                    frames.block(((b":status", b"200"),)),
                    b"\x00\x04\x00\x00\x00\x10",
                ]
            ),
        ),
    )


@settings(max_examples=250, deadline=None)
@given(st.lists(frame_strategy(), max_size=25), st.booleans(), st.integers(1, 50))
def test_random_frames_raise_only_remote_protocol_errors(wires: list[bytes], client: bool, step: int) -> None:
    end = EngineEnd(client=client)
    end.engine.start(0.0)
    end.receive((b"" if client else frames.PREFACE) + frames.settings())
    if client:
        end.engine.connect(frames.connect_headers(), end.sink(1))
        end.engine.connect(frames.connect_headers(), end.sink(3))
    wire = b"".join(wires)
    try:
        for at in range(0, len(wire), step):
            for event in end.receive(wire[at : at + step]):
                if isinstance(event, ConnectReceived):
                    end.engine.accept(event.stream_id, (), end.sink(event.stream_id))
    except RemoteProtocolError:
        assert end.engine.closed
        assert end.engine.open_streams == 0
    assert frames.split(end.engine.data_to_send())


# --- bytes sent never exceed bytes granted


@settings(max_examples=40, deadline=None)
@given(
    st.integers(65_535, 70_000),
    st.lists(
        st.tuples(st.sampled_from(["send", "read", "pump", "wake", "end"]), st.integers(0, 2), st.integers(1, 40_000)),
        max_size=60,
    ),
)
def test_bytes_sent_never_exceed_bytes_granted(window: int, steps: list[tuple[str, int, int]]) -> None:
    config = ConnectionConfig(stream_window=100_000, initial_stream_window=window, connection_window=window + 20_000)
    pair = EnginePair(config, config)
    pair.server.reading = False
    streams = [pair.open() for _ in range(3)]
    sent = dict.fromkeys(streams, 0)
    for what, index, size in steps:
        stream = streams[index]
        if what == "send":
            sent[stream] += pair.client.engine.send_data(stream, bytes(size))
        elif what == "read" and pair.server.held.get(stream):
            amount = min(size, pair.server.held[stream])
            pair.server.held[stream] -= amount
            pair.server.engine.release_capacity(stream, amount)
        elif what == "wake":
            pair.server.release(stream)
        pair.pump()  # the receiver raises when it gets more than it granted
        assert len(pair.server.received[stream]) == sent[stream]
        assert pair.server.held.get(stream, 0) <= 100_000
    assert not pair.resets()


# --- frames that are wrong

H = frames.connect_headers()
OPEN_BLOCK = frames.headers(3, b"", end_headers=False)


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        pytest.param(frames.data(0, b"x"), ErrorCode.PROTOCOL_ERROR, id="DATA on 0"),
        pytest.param(frames.data(9, b"x"), ErrorCode.PROTOCOL_ERROR, id="DATA on idle"),
        pytest.param(frames.data(2, b"x"), ErrorCode.PROTOCOL_ERROR, id="DATA on a server's stream"),
        pytest.param(frames.raw(0, 0x8, 1), ErrorCode.PROTOCOL_ERROR, id="padded DATA without a length"),
        pytest.param(frames.raw(0, 0x8, 1, b"\x01"), ErrorCode.PROTOCOL_ERROR, id="padding as long as DATA"),
        pytest.param(frames.raw(0, 0x8, 1, b"\x05abc"), ErrorCode.PROTOCOL_ERROR, id="padding beyond DATA"),
        pytest.param(frames.headers(0, H), ErrorCode.PROTOCOL_ERROR, id="HEADERS on 0"),
        pytest.param(frames.headers(2, H), ErrorCode.PROTOCOL_ERROR, id="HEADERS on an even stream"),
        pytest.param(frames.raw(1, 0xC, 3, b"\x05ab"), ErrorCode.PROTOCOL_ERROR, id="padding beyond HEADERS"),
        pytest.param(frames.raw(1, 0xC, 3), ErrorCode.PROTOCOL_ERROR, id="padded HEADERS without a length"),
        pytest.param(frames.raw(1, 0x24, 3, b"abc"), ErrorCode.FRAME_SIZE_ERROR, id="HEADERS shorter than priority"),
        pytest.param(frames.headers(3, b"\x80"), ErrorCode.COMPRESSION_ERROR, id="HEADERS that cannot be decoded"),
        pytest.param(frames.priority(0), ErrorCode.PROTOCOL_ERROR, id="PRIORITY on 0"),
        pytest.param(frames.raw(2, 0, 1, bytes(4)), ErrorCode.FRAME_SIZE_ERROR, id="PRIORITY of 4"),
        pytest.param(frames.rst_stream(0), ErrorCode.PROTOCOL_ERROR, id="RST_STREAM on 0"),
        pytest.param(frames.rst_stream(9), ErrorCode.PROTOCOL_ERROR, id="RST_STREAM on idle"),
        pytest.param(frames.raw(3, 0, 1, bytes(5)), ErrorCode.FRAME_SIZE_ERROR, id="RST_STREAM of 5"),
        pytest.param(frames.raw(4, 0, 1), ErrorCode.PROTOCOL_ERROR, id="SETTINGS on a stream"),
        pytest.param(frames.raw(4, 0, 0, bytes(7)), ErrorCode.FRAME_SIZE_ERROR, id="SETTINGS of 7"),
        pytest.param(frames.raw(4, 1, 0, bytes(6)), ErrorCode.FRAME_SIZE_ERROR, id="SETTINGS answer of 6"),
        pytest.param(frames.settings({2: 2}), ErrorCode.PROTOCOL_ERROR, id="ENABLE_PUSH 2"),
        pytest.param(frames.settings({5: 16_383}), ErrorCode.PROTOCOL_ERROR, id="MAX_FRAME_SIZE 16383"),
        pytest.param(frames.settings({5: 2**24}), ErrorCode.PROTOCOL_ERROR, id="MAX_FRAME_SIZE 2^24"),
        pytest.param(frames.settings({4: 2**31}), ErrorCode.FLOW_CONTROL_ERROR, id="INITIAL_WINDOW_SIZE 2^31"),
        pytest.param(frames.settings({8: 2}), ErrorCode.PROTOCOL_ERROR, id="ENABLE_CONNECT_PROTOCOL 2"),
        pytest.param(frames.push_promise(1, 2, H), ErrorCode.PROTOCOL_ERROR, id="PUSH_PROMISE"),
        pytest.param(frames.raw(6, 0, 1, bytes(8)), ErrorCode.PROTOCOL_ERROR, id="PING on a stream"),
        pytest.param(frames.ping(bytes(7)), ErrorCode.FRAME_SIZE_ERROR, id="PING of 7"),
        pytest.param(frames.raw(7, 0, 1, bytes(8)), ErrorCode.PROTOCOL_ERROR, id="GOAWAY on a stream"),
        pytest.param(frames.raw(7, 0, 0, bytes(7)), ErrorCode.FRAME_SIZE_ERROR, id="GOAWAY of 7"),
        pytest.param(frames.goaway(debug=bytes(5000)), ErrorCode.FRAME_SIZE_ERROR, id="GOAWAY of 5008"),
        pytest.param(frames.window_update(9, 1), ErrorCode.PROTOCOL_ERROR, id="WINDOW_UPDATE on idle"),
        pytest.param(frames.raw(8, 0, 1, bytes(3)), ErrorCode.FRAME_SIZE_ERROR, id="WINDOW_UPDATE of 3"),
        pytest.param(frames.continuation(1, b""), ErrorCode.PROTOCOL_ERROR, id="CONTINUATION alone"),
        pytest.param(
            OPEN_BLOCK + frames.data(1, b"x"),
            ErrorCode.PROTOCOL_ERROR,
            id="DATA in a block",
        ),
        pytest.param(OPEN_BLOCK + frames.ping(), ErrorCode.PROTOCOL_ERROR, id="PING in a block"),
        pytest.param(
            OPEN_BLOCK + frames.continuation(5),
            ErrorCode.PROTOCOL_ERROR,
            id="wrong block",
        ),
        pytest.param(
            frames.data(1, end_stream=True) + frames.window_update(1, 1) + frames.rst_stream(1) + frames.connect(1),
            ErrorCode.STREAM_CLOSED,
            id="HEADERS on a stream that ended",
        ),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_what_ends_the_connection(wire: bytes, code: ErrorCode, whole: bool) -> None:
    end = open_stream(server())
    if code is ErrorCode.STREAM_CLOSED:
        end.engine.end_stream(1)
    with pytest.raises(RemoteProtocolError) as caught:  # noqa: PT012 - the pieces before the last are taken
        for piece in [wire] if whole else [wire[at : at + 1] for at in range(len(wire))]:
            end.receive(piece)
    assert caught.value.code is code
    kind, _, _, payload = frames.split(end.engine.data_to_send())[-1]
    assert kind == FrameType.GOAWAY
    assert int.from_bytes(payload[4:8]) == code
    assert payload[8:].decode() in str(caught.value)
    assert end.engine.closed
    assert end.receive(frames.ping()) == []


@pytest.mark.parametrize(
    "wire",
    [
        frames.push_promise(1, 2, H),
        frames.headers(2, ((b":status", b"200"),)),
        frames.headers(9, ((b":status", b"200"),)),
        frames.settings({2: 1}),
        frames.rst_stream(9),
        frames.data(9, b"x"),
    ],
)
def test_what_ends_a_clients_connection(wire: bytes) -> None:
    end = EngineEnd(client=True)
    end.engine.start(0.0)
    end.engine.connect(H, len)
    end.receive(frames.settings())
    with pytest.raises(RemoteProtocolError) as caught:
        end.receive(wire)
    assert caught.value.code is ErrorCode.PROTOCOL_ERROR


def test_frames_that_crossed_a_reset_of_ours_are_dropped() -> None:
    end = open_stream(server())
    end.engine.reset(1, ErrorCode.CANCEL)
    end.engine.data_to_send()
    crossed = (
        frames.data(1, b"x" * 1000)
        + frames.window_update(1, 5)
        + frames.data(1, end_stream=True)
        + frames.rst_stream(1)
    )
    assert end.receive(crossed) == []
    assert not end.engine.has_data_to_send
    assert not end.received[1]


def test_a_peer_that_ignores_a_reset_is_stopped_by_the_window_it_had() -> None:
    end = open_stream(server())
    end.engine.reset(1, ErrorCode.CANCEL)
    for _ in range(256):
        end.receive(frames.data(1, bytes(1024)))
    with pytest.raises(RemoteProtocolError) as caught:
        end.receive(frames.data(1, b"x"))
    assert caught.value.code is ErrorCode.FLOW_CONTROL_ERROR


def test_data_after_the_peers_own_reset_is_answered_with_stream_closed() -> None:
    end = open_stream(server())
    assert end.receive(frames.rst_stream(1)) == [StreamReset(stream_id=1, code=ErrorCode.CANCEL)]
    assert end.receive(frames.data(1, b"x")) == []
    assert end.engine.data_to_send() == frames.rst_stream(1, ErrorCode.STREAM_CLOSED)


def test_pings_are_answered_with_their_payload() -> None:
    end = server()
    end.receive(frames.ping(b"12345678"))
    assert end.engine.data_to_send() == frames.ping(b"12345678", ack=True)


def test_a_frame_of_1_mib_comes_through() -> None:
    end = open_stream(server(ConnectionConfig(initial_stream_window=2**20)))
    end.receive(frames.data(1, bytes(2**20)))
    assert len(end.received[1]) == 2**20


def test_a_client_hands_payload_to_its_sink_before_the_answer_is_returned() -> None:
    end = EngineEnd(client=True)
    end.engine.start(0.0)
    end.receive(frames.settings())
    end.engine.connect(H, end.sink(1))
    events = end.receive(frames.response(1) + frames.data(1, b"x", end_stream=True))
    assert events == [ConnectAccepted(stream_id=1, headers=((b":status", b"200"),)), StreamEnded(stream_id=1)]
    assert end.received[1] == b"x"
