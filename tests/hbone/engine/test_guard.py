"""What a hostile peer can make us do, counted: one test for each class of attack.

`cost` is how many frames of an endless supply are taken before the connection ends; time stands still unless a test
moves it.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice, repeat

import pytest
from hpack import Encoder

from hbone.config import KIB, ConnectionConfig
from hbone.engine.frames import FrameType
from hbone.engine.guard import MAX_REPLIES, MAX_REPLY_BYTES, Flood, Guard
from hbone.engine.headers import TABLE_SIZE
from hbone.errors import ErrorCode, RemoteProtocolError
from hbone.events import ConnectReceived, Event, StreamReset
from hbone.testing import frames
from hbone.testing.engines import EngineEnd

CALM = ErrorCode.ENHANCE_YOUR_CALM
LIMIT = 5000


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


def cost(
    end: EngineEnd,
    supply: Iterable[bytes],
    *,
    reads: bool = True,
    step: float = 0.0,
    answer: Callable[[int], None] | None = None,
) -> int:
    """Give `supply` piece by piece, each `step` seconds later; the number taken before the end."""
    ended: list[RemoteProtocolError] = []
    now = 0.0
    taken = 0
    for piece in islice(supply, LIMIT):
        try:
            events = end.receive(piece, now)
        except RemoteProtocolError as error:
            ended.append(error)
            break
        taken += 1
        now += step
        for event in events:
            if answer is not None and isinstance(event, ConnectReceived):
                answer(event.stream_id)
        if reads:
            end.engine.data_to_send()
    if ended:
        kind, _, _, payload = frames.split(end.engine.data_to_send())[-1]
        assert (kind, payload[4:8]) == (FrameType.GOAWAY, int(CALM).to_bytes(4))
        assert ended[0].code is CALM
        assert end.engine.closed
    return taken


def odd() -> Iterator[int]:
    return count(1, 2)


def pairs() -> Iterator[bytes]:
    return (frames.connect(stream) + frames.rst_stream(stream) for stream in odd())


def after_end(then: Callable[[int], bytes]) -> Callable[[int], bytes]:
    return lambda stream: frames.data(stream, end_stream=True) + then(stream)


def connects(events: list[Event]) -> int:
    return sum(isinstance(event, ConnectReceived) for event in events)


# --- streams


def test_rapid_reset_in_a_burst_ends_within_120_streams_and_dials_none() -> None:
    end = server()
    burst = list(islice(pairs(), 10_000))
    assert cost(end, (b"".join(burst[at : at + 20]) for at in range(0, 10_000, 20))) <= 120 // 20
    assert connects(end.events) == 0  # opened and reset in one batch: nobody was told


def test_rapid_reset_at_2000_a_second_ends_within_a_second() -> None:
    end = server()
    split = (piece for stream in odd() for piece in (frames.connect(stream), frames.rst_stream(stream)))
    taken = cost(end, split, step=1 / 4000)
    assert taken / 4000 < 1.0
    assert taken <= 2 * 120


@pytest.mark.parametrize(
    ("rate", "streams"),
    [(1_000_000, range(1000, 1002)), (50, range(1500, 1800)), (19, range(LIMIT // 2, LIMIT // 2 + 1))],
)
def test_reset_after_the_answer_ends_later_and_one_at_a_time_too(rate: int, streams: range) -> None:
    """50 a second is what is left of it where each dial waits; below 20 it goes on."""
    end = server()

    def accept(stream_id: int) -> None:
        end.engine.accept(stream_id, (), len)

    split = (piece for stream in odd() for piece in (frames.connect(stream), frames.rst_stream(stream)))
    assert cost(end, split, step=1 / (2 * rate), answer=accept) // 2 in streams


@pytest.mark.parametrize("ours", [b"", b"banner"])
def test_streams_that_carried_payload_may_end_by_reset(ours: bytes) -> None:
    """Either way: where the server speaks first, the client may have heard enough."""
    end = server()

    def accept(stream_id: int) -> None:
        end.engine.accept(stream_id, (), len)
        if ours:
            end.engine.send_data(stream_id, ours)

    theirs = b"" if ours else b"x"
    split = (
        piece
        for stream in odd()
        for piece in (
            frames.connect(stream),
            (frames.data(stream, theirs) if theirs else b"") + frames.rst_stream(stream),
        )
    )
    assert cost(end, split, answer=accept) == LIMIT


def test_100_dials_given_up_at_once_are_no_attack() -> None:
    end = server()
    end.receive(b"".join(frames.connect(stream) for stream in islice(odd(), 100)))
    end.receive(b"".join(frames.rst_stream(stream) for stream in islice(odd(), 100)))
    assert not end.engine.closed


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(lambda stream: frames.window_update(stream, 2**31 - 1), id="window overflow"),
        pytest.param(lambda stream: frames.window_update(stream, 0), id="window update of 0"),
        pytest.param(
            lambda stream: frames.data(stream, end_stream=True) + frames.data(stream, b"x"), id="DATA after END"
        ),
        pytest.param(
            lambda stream: frames.data(stream, end_stream=True) + frames.connect(stream), id="HEADERS after END"
        ),
        pytest.param(lambda stream: frames.headers(stream, ((b"x", b"y"),)), id="trailers"),
        pytest.param(lambda stream: frames.data(stream, bytes(300_000)), id="beyond the window"),
    ],
)
def test_made_you_reset_ends_within_20_faults(fault: Callable[[int], bytes]) -> None:
    end = server()
    supply = (piece for stream in odd() for piece in (frames.connect(stream), fault(stream)))
    assert cost(end, supply, step=0.01) <= 2 * 20


def test_malformed_requests_are_faults_too() -> None:
    end = server()
    supply = (frames.headers(stream, ((b":method", b"CONNECT"), (b"Bad", b"x"))) for stream in odd())
    assert cost(end, supply) <= 20
    assert connects(end.events) == 0


def test_data_on_an_ended_stream_is_a_fault_each_time() -> None:
    end = open_stream(server())
    end.receive(frames.data(1, end_stream=True))
    end.engine.end_stream(1)
    assert end.engine.open_streams == 0
    end.receive(frames.data(1, b"x"))
    sent = frames.split(end.engine.data_to_send())
    assert (FrameType.RST_STREAM, 0, 1, int(ErrorCode.STREAM_CLOSED).to_bytes(4)) in sent


def test_the_201st_stream_is_refused_and_200_live() -> None:
    end = server()
    end.receive(b"".join(frames.connect(stream) for stream in islice(odd(), 200)))
    assert connects(end.take_events()) == 200
    assert end.receive(frames.connect(401)) == []
    assert end.engine.data_to_send() == frames.rst_stream(401, ErrorCode.REFUSED_STREAM)
    for stream in islice(odd(), 200):
        end.engine.accept(stream, (), end.sink(stream))
        end.receive(frames.data(stream, b"alive"))
    assert all(end.received[stream] == b"alive" for stream in islice(odd(), 200))
    end.receive(frames.data(401, b"was on its way") + frames.rst_stream(1))
    assert connects(end.receive(frames.connect(403))) == 1


def test_insisting_on_more_streams_ends_the_connection() -> None:
    end = server()
    assert cost(end, (frames.connect(stream) for stream in odd())) <= 200 + 101


def test_a_refused_stream_keeps_the_header_table_in_step() -> None:
    end = server(ConnectionConfig(max_concurrent_streams=1))
    encoder = Encoder()
    first, second, third = ([*frames.connect_headers(f"10.0.0.{turn}:80"), (b"name", b"value")] for turn in (1, 2, 3))
    end.receive(frames.headers(1, encoder.encode(first)) + frames.headers(3, encoder.encode(second)))
    end.engine.reset(1, ErrorCode.CANCEL)
    events = end.receive(frames.headers(5, encoder.encode(third)))
    assert events == [ConnectReceived(stream_id=5, headers=tuple(third))]


# --- headers


@pytest.mark.parametrize("part", [b"", b"\x00\x01a\x01b", bytes(1000)])
def test_continuation_flood_ends_within_4_frames_or_16_kib(part: bytes) -> None:
    end = server()
    end.receive(frames.headers(1, b"\x83", end_headers=False))
    assert cost(end, repeat(frames.continuation(1, part))) <= 4


@pytest.mark.parametrize("large", [8 * KIB, 16 * KIB, 1024 * KIB - 1])
def test_a_header_block_is_refused_by_its_encoded_size_before_it_is_kept(large: int) -> None:
    end = server()
    end.receive(frames.headers(1, bytes(8 * KIB + 1), end_headers=False))
    with pytest.raises(RemoteProtocolError, match="a header block of") as caught:
        end.receive(frames.raw(FrameType.CONTINUATION, 0, 1, length=large))  # not one byte of it is here
    assert caught.value.code is CALM


def test_a_header_bomb_gets_431_and_the_connection_lives() -> None:
    end = server()
    encoder = Encoder()
    many = [*frames.connect_headers(), *((b"x%d" % index, b"y") for index in range(65))]
    assert end.receive(frames.headers(1, encoder.encode(many))) == []
    sent = frames.split(end.engine.data_to_send())
    assert [(kind, stream) for kind, _, stream, _ in sent] == [(FrameType.HEADERS, 1), (FrameType.RST_STREAM, 1)]
    assert b"431" in sent[0][3]
    assert sent[1][3] == bytes(4)  # NO_ERROR
    large = [*frames.connect_headers(), (b"big", b"z" * 16_000), (b"x64", b"y")]
    assert connects(end.receive(frames.headers(3, encoder.encode(large)))) == 1
    assert connects(end.receive(frames.headers(5, encoder.encode(frames.connect_headers("[::1]:1"))))) == 1


def test_insisting_on_large_headers_ends_the_connection() -> None:
    end = server()
    many = tuple((b"x%d" % index, b"y") for index in range(65))
    assert cost(end, (frames.connect(stream, extra=many) for stream in odd())) <= 20


def test_an_encoder_table_of_4_gib_stays_at_4096() -> None:
    end = server()
    end.receive(frames.settings({1: 2**32 - 1}))
    assert end.engine._encoder.table_size == TABLE_SIZE
    end.engine.data_to_send()
    for stream in islice(odd(), 100):
        end.receive(frames.connect(stream))
        end.engine.reject(stream, 503, ((b"x%d" % stream, b"y" * 1000),))
        assert len(end.engine.data_to_send()) > 1000  # no field is kept, so none is referred to


# --- floods of control frames


@pytest.mark.parametrize(
    ("frame", "most"),
    [
        pytest.param(frames.settings(), 10, id="SETTINGS"),
        pytest.param(frames.settings({4: 65_535}), 10, id="SETTINGS with a value"),
        pytest.param(frames.ping(), 100, id="PING"),
        pytest.param(frames.ping(ack=True), 1000, id="PING answers"),
        pytest.param(frames.settings_ack(), 1000, id="SETTINGS answers"),
        pytest.param(frames.priority(1), 100, id="PRIORITY"),
        pytest.param(frames.unknown(0, b"x"), 100, id="unknown type"),
        pytest.param(frames.unknown(1), 100, id="unknown type, empty"),
        pytest.param(frames.goaway(), 10, id="GOAWAY"),
        pytest.param(frames.window_update(0, 1), 1000, id="WINDOW_UPDATE of the connection"),
        pytest.param(frames.window_update(1, 1), 1000, id="WINDOW_UPDATE of a stream"),
        pytest.param(frames.data(1), 100, id="empty DATA"),
        pytest.param(frames.data(1, pad=0), 100, id="empty DATA with no padding"),
        pytest.param(frames.data(1, pad=255), 100, id="DATA of padding"),
        pytest.param(frames.data(1, b"x", pad=200), 102, id="DATA of mostly padding"),
    ],
)
@pytest.mark.parametrize("reads", [True, False])
def test_a_flood_is_cut_off(frame: bytes, most: int, reads: bool) -> None:
    end = open_stream(server())
    assert cost(end, repeat(frame), reads=reads) <= most
    assert len(end.engine.out) < MAX_REPLY_BYTES


@pytest.mark.parametrize(
    ("frame", "per_second"),
    [
        (frames.ping(), 10),
        (frames.settings({4: 65_535}), 1),
        (frames.priority(1), 10),
        (frames.unknown(0, b"x"), 10),
        (frames.window_update(1, 1), 1000),
        (frames.data(1), 10),
    ],
)
def test_the_same_at_a_modest_pace_passes(frame: bytes, per_second: int) -> None:
    end = open_stream(server())
    assert cost(end, repeat(frame), step=1.01 / per_second) == LIMIT


def test_more_than_32_settings_in_a_frame_end_the_connection() -> None:
    end = server()
    end.receive(frames.settings((4, 65_535) for _ in range(32)))
    with pytest.raises(RemoteProtocolError) as caught:
        end.receive(frames.settings((4, 65_535) for _ in range(33))[:9])
    assert caught.value.code is CALM


def test_unknown_settings_are_dropped_unread() -> None:
    end = server()
    for turn in range(300):
        end.receive(frames.settings((0x100 + 32 * turn + index, index) for index in range(32)), float(turn * 2))
    assert end.engine.data_to_send() == frames.settings_ack() * 300


def test_a_peer_that_never_reads_is_cut_off_at_1000_frames() -> None:
    end = server()
    assert cost(end, repeat(frames.ping()), reads=False, step=0.11) <= MAX_REPLIES
    assert len(end.engine.out) < MAX_REPLY_BYTES


def test_a_peer_that_reads_is_not_cut_off_though_the_queue_is_never_empty_when_it_asks() -> None:
    end = open_stream(server())

    def supply() -> Iterator[bytes]:
        for turn in count():
            end.engine.send_data(1, bytes(1 + turn % 7))
            yield frames.ping() + frames.ping()

    end.receive(frames.window_update(1, 2**20) + frames.window_update(0, 2**20))
    assert cost(end, supply(), step=0.21) == LIMIT


def test_resets_of_closed_streams_are_cut_off() -> None:
    end = server()
    end.receive(frames.connect(1) + frames.rst_stream(1))
    assert cost(end, repeat(frames.rst_stream(1))) <= 1000


# --- DATA


def test_one_byte_frames_at_1_khz_pass() -> None:
    end = open_stream(server())
    assert cost(end, repeat(frames.data(1, b"x")), step=0.001) == LIMIT
    assert len(end.received[1]) == LIMIT


def test_an_empty_frame_among_payload_passes() -> None:
    end = open_stream(server())
    assert cost(end, repeat(frames.data(1, bytes(100)) + frames.data(1))) == LIMIT


def test_empty_frames_among_single_bytes_are_cut_off() -> None:
    end = open_stream(server())
    assert cost(end, repeat(frames.data(1, b"x") + frames.data(1))) <= 200


def test_bulk_does_not_pay_for_more_than_1000_empty_frames() -> None:
    end = open_stream(server())
    for _ in range(1000):
        end.receive(frames.data(1, bytes(1000)))
    assert 1000 <= cost(end, repeat(frames.data(1))) <= 1200


def test_tiny_frames_for_a_reader_that_sleeps_keep_their_bytes_and_no_more() -> None:
    end = server(ConnectionConfig(stream_window=65_535, initial_stream_window=65_535))
    end.receive(frames.connect(1))
    for _ in range(65_535 // 100):
        end.receive(frames.data(1, b"x") * 100)
    stream = end.engine._streams[1]
    assert isinstance(stream.early, bytearray)
    assert len(stream.early) == 65_500
    events = end.receive(frames.data(1, b"x") * 36)
    assert events == [StreamReset(stream_id=1, code=ErrorCode.FLOW_CONTROL_ERROR, by_peer=False)]
    assert stream.early is None


def test_window_updates_that_payload_earned_are_free() -> None:
    end = open_stream(server())
    end.receive(frames.settings({4: 2**20}) + frames.window_update(0, 2**20))

    def supply() -> Iterator[bytes]:
        while True:
            end.engine.send_data(1, b"x")
            yield frames.window_update(1, 1) * 5 + frames.window_update(0, 1) * 5

    assert cost(end, supply()) == LIMIT


def test_200_streams_without_window_keep_nothing_of_ours() -> None:
    end = server()
    end.receive(frames.settings({4: 0}))
    for stream in islice(odd(), 200):
        open_stream(end, stream)
        assert end.engine.send_capacity(stream) == 0
        assert end.engine.send_data(stream, bytes(64 * KIB)) == 0
    assert not end.engine.has_data_to_send


# --- frames


@pytest.mark.parametrize("kind", [*FrameType, 0xFE])
def test_a_frame_beyond_the_limit_is_refused_on_its_ninth_byte(kind: int) -> None:
    end = open_stream(server())
    header = frames.raw(kind, 0, 1, length=2**24 - 1)
    assert end.receive(header[:8]) == []
    with pytest.raises(RemoteProtocolError, match="a frame of 16777215 bytes") as caught:
        end.receive(header[8:9])
    assert caught.value.code is ErrorCode.FRAME_SIZE_ERROR


# --- the bucket


def test_a_bucket_fills_again_up_to_its_burst() -> None:
    guard = Guard()
    for _ in range(100):
        guard.count(Flood.PING, 5.0)
    with pytest.raises(RemoteProtocolError, match="more than 100 PING frames at once and 10 a second after that"):
        guard.count(Flood.PING, 5.05)
    guard = Guard()
    for _ in range(100):
        guard.count(Flood.PING, 5.0)
    for _ in range(10):
        guard.count(Flood.PING, 6.0)
    for _ in range(100):
        guard.count(Flood.PING, 1e9)
    with pytest.raises(RemoteProtocolError):
        guard.count(Flood.PING, 1e9)


def test_only_full_buckets_are_forgotten() -> None:
    guard = Guard()
    for turn in range(10):
        for _ in range(19):
            guard.count(Flood.PING, float(turn))
        guard.trim(float(turn))
    guard.trim(10.0)
    guard.count(Flood.SETTINGS, 10.0)
    for _ in range(10):  # the burst of 100, and 100 more in ten seconds, less 190
        guard.count(Flood.PING, 10.0)
    with pytest.raises(RemoteProtocolError, match="PING"):
        guard.count(Flood.PING, 10.0)
    guard.trim(11.0)
    assert list(guard._buckets) == [Flood.PING]
    guard.trim(21.0)
    assert not guard._buckets
