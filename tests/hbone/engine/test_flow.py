"""Windows: what may be sent, what is credited, and what they grow to."""

import pytest

from hbone.config import KIB, MIB, ConnectionConfig
from hbone.engine import Engine
from hbone.engine.flow import GROWTH_INTERVAL, ReceiveWindow, WindowBudget, widened
from hbone.engine.frames import FrameType
from hbone.errors import ErrorCode, LocalProtocolError, ProtocolError, RemoteProtocolError
from hbone.events import SendCapacityIncreased, StreamReset
from hbone.testing import frames
from hbone.testing.engines import EngineEnd, EnginePair

SMALL = ConnectionConfig(stream_window=65_535, initial_stream_window=65_535)


def increments(wire: bytes, stream_id: int) -> list[int]:
    return [
        int.from_bytes(payload)
        for kind, _, stream, payload in frames.split(wire)
        if kind == FrameType.WINDOW_UPDATE and stream == stream_id
    ]


def started_server(config: ConnectionConfig | None = None, *, budget: WindowBudget | None = None) -> EngineEnd:
    """A server whose peer has said no more than it must."""
    end = EngineEnd(client=False, config=config, budget=budget)
    end.engine.start(0.0)
    end.receive(frames.PREFACE + frames.settings() + frames.settings_ack())
    end.engine.data_to_send()
    return end


def with_stream(end: EngineEnd, stream_id: int = 1) -> EngineEnd:
    end.receive(frames.connect(stream_id))
    end.engine.accept(stream_id, (), end.sink(stream_id))
    end.engine.data_to_send()
    end.take_events()
    return end


# --- the window by itself


def test_a_window_is_credit_and_held_and_released() -> None:
    window = ReceiveWindow(1000, 1000, 0.0)
    window.credit -= 700
    window.released += 300
    assert window.held == 400
    assert window.update(0.0, WindowBudget()) == 300
    assert (window.credit, window.held, window.size) == (600, 400, 1000)


def test_a_window_grows_while_its_reader_keeps_up() -> None:
    budget = WindowBudget()
    window = ReceiveWindow(256 * KIB, 4 * MIB, 0.0)
    sizes = []
    for _ in range(6):
        window.credit -= window.threshold
        window.released += window.threshold
        window.update(0.5, budget)
        sizes.append(window.size)
    assert sizes == [512 * KIB, MIB, 2 * MIB, 4 * MIB, 4 * MIB, 4 * MIB]
    assert window.credit == 4 * MIB
    assert budget.used == 4 * MIB - 256 * KIB
    window.close(budget)
    assert budget.used == 0


def test_a_window_does_not_grow_for_a_slow_stream() -> None:
    window = ReceiveWindow(1000, 4000, 0.0)
    window.credit -= 500
    window.released += 500
    assert window.update(GROWTH_INTERVAL * 1.5, WindowBudget()) == 500
    assert window.size == 1000


def test_a_window_does_not_grow_for_a_reader_that_lags() -> None:
    window = ReceiveWindow(1000, 4000, 0.0)
    window.credit -= 1000
    window.released += 600
    assert window.update(0.1, WindowBudget()) == 600
    assert window.size == 1000


def test_a_window_does_not_grow_beyond_the_budget() -> None:
    budget = WindowBudget(1500)
    windows = [ReceiveWindow(1000, 4000, 0.0) for _ in range(2)]
    for window in windows:
        window.credit -= 500
        window.released += 500
        window.update(0.1, budget)
    assert [window.size for window in windows] == [2000, 1000]
    assert budget.used == 1000


def test_a_budget_takes_back_no_more_than_it_gave() -> None:
    budget = WindowBudget(10)
    assert budget.take(10)
    assert not budget.take(1)
    with pytest.raises(LocalProtocolError, match="11 bytes given back"):
        budget.give_back(11)


def test_a_send_window_may_be_negative_and_never_beyond_the_limit() -> None:
    assert widened(5, -10) == -5
    assert widened(-5, 2**31 - 1) == 2**31 - 6
    with pytest.raises(ProtocolError) as caught:
        widened(1, 2**31 - 1)
    assert caught.value.code is ErrorCode.FLOW_CONTROL_ERROR


# --- sending


def test_capacity_is_the_least_of_both_windows_and_a_frame() -> None:
    pair = EnginePair()
    stream = pair.open()
    engine = pair.client.engine
    assert engine.send_capacity(stream) == 64 * KIB  # max_send_frame
    sent = 0
    while engine.send_capacity(stream):
        sent += engine.send_data(stream, bytes(64 * KIB))
        engine.data_to_send()
    assert sent == 256 * KIB  # the initial window


def test_a_peer_with_default_settings_gets_frames_of_16_kib() -> None:
    server = with_stream(started_server())
    assert server.engine.send_capacity(1) == 16_384


def test_the_connection_window_limits_streams_together() -> None:
    server = started_server()
    server.receive(frames.settings({4: 2**20}))
    for stream_id in (1, 3):
        with_stream(server, stream_id)
    sent = [0, 0]
    for index, stream_id in enumerate((1, 3)):
        while server.engine.send_capacity(stream_id):
            sent[index] += server.engine.send_data(stream_id, bytes(20_000))
    assert sent == [65_535, 0]
    assert server.receive(frames.window_update(0, 10)) == [SendCapacityIncreased(stream_id=0)]
    assert server.engine.send_capacity(3) == 10


def test_capacity_of_0_is_followed_by_an_event_once() -> None:
    server = with_stream(started_server())
    server.receive(frames.window_update(0, 2**20))
    while server.engine.send_capacity(1):
        server.engine.send_data(1, bytes(16_384))
    assert server.receive(frames.window_update(0, 5)) == []
    assert server.receive(frames.window_update(1, 5)) == [SendCapacityIncreased(stream_id=1)]
    assert server.receive(frames.window_update(1, 5)) == []
    assert server.engine.send_capacity(1) == 10


def test_a_full_queue_makes_capacity_0_until_it_is_written_out() -> None:
    server = started_server()
    server.receive(frames.settings({4: 2**30, 5: 2**20}) + frames.window_update(0, 2**30))
    with_stream(server)
    engine = server.engine
    while engine.send_capacity(1):
        engine.send_data(1, bytes(64 * KIB))
    assert 256 * KIB <= len(engine.out) < 321 * KIB
    assert engine.next_deadline() == 10.0  # the next PING
    engine.out.clear()
    assert engine.next_deadline() == 0.0
    assert engine.on_time(0.0) == [SendCapacityIncreased(stream_id=0)]
    assert engine.on_time(0.0) == []


def test_prefix_data_writes_a_header_in_front_and_queues_nothing() -> None:
    pair = EnginePair()
    stream = pair.open()
    buffer = bytearray(9) + b"payload, and room"
    pair.client.engine.prefix_data(stream, buffer, 7)
    assert not pair.client.engine.has_data_to_send
    assert buffer[:16] == frames.data(stream, b"payload")
    pair.server.receive(bytes(buffer[:16]))
    assert pair.server.received[stream] == b"payload"


def test_prefix_data_refuses_more_than_the_windows_hold() -> None:
    server = with_stream(started_server())
    with pytest.raises(LocalProtocolError, match="beyond its send capacity"):
        server.engine.prefix_data(1, bytearray(20_000), 16_385)
    with pytest.raises(LocalProtocolError, match="stream 3 is not open"):
        server.engine.prefix_data(3, bytearray(20), 1)
    server.engine.end_stream(1)
    with pytest.raises(LocalProtocolError, match="HALF_CLOSED_LOCAL"):
        server.engine.prefix_data(1, bytearray(20), 1)
    assert server.engine.send_capacity(1) == 0


def test_send_data_takes_what_fits_and_ends_only_with_the_last_byte() -> None:
    server = with_stream(started_server())
    assert server.engine.send_data(1, bytes(20_000), end_stream=True) == 16_384
    assert server.engine.send_data(1, bytes(3616), end_stream=True) == 3616
    parts = frames.split(server.engine.data_to_send())
    assert [(flags, len(payload)) for _, flags, _, payload in parts] == [(0, 16_384), (1, 3616)]


def test_smaller_initial_window_makes_open_streams_negative() -> None:
    server = with_stream(started_server())
    assert server.engine.send_data(1, bytes(16_384)) == 16_384
    server.receive(frames.settings({4: 10_000}))
    assert server.engine.send_capacity(1) == 0
    assert server.receive(frames.window_update(1, 6_384)) == []  # exactly 0 now
    assert server.receive(frames.window_update(1, 1)) == [SendCapacityIncreased(stream_id=1)]
    assert server.engine.send_capacity(1) == 1


def test_larger_initial_window_wakes_streams_that_wait() -> None:
    server = started_server()
    server.receive(frames.settings({4: 0}))
    with_stream(server)
    assert server.engine.send_capacity(1) == 0
    assert server.receive(frames.settings({4: 100})) == [SendCapacityIncreased(stream_id=0)]
    assert server.engine.send_capacity(1) == 100


def test_initial_window_that_overflows_a_stream_ends_the_connection() -> None:
    server = with_stream(started_server())
    server.receive(frames.window_update(1, 2**31 - 1 - 65_535))
    with pytest.raises(RemoteProtocolError) as caught:
        server.receive(frames.settings({4: 65_536}))
    assert caught.value.code is ErrorCode.FLOW_CONTROL_ERROR


@pytest.mark.parametrize("value", [2**31, 2**32 - 1])
def test_initial_window_beyond_the_limit_ends_the_connection(value: int) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        started_server().receive(frames.settings({4: value}))
    assert caught.value.code is ErrorCode.FLOW_CONTROL_ERROR


def test_window_update_beyond_the_limit_resets_a_stream_and_ends_a_connection() -> None:
    server = with_stream(started_server())
    events = server.receive(frames.window_update(1, 2**31 - 1))
    assert events == [StreamReset(stream_id=1, code=ErrorCode.FLOW_CONTROL_ERROR, by_peer=False)]
    with pytest.raises(RemoteProtocolError) as caught:
        server.receive(frames.window_update(0, 2**31 - 1))
    assert caught.value.code is ErrorCode.FLOW_CONTROL_ERROR


def test_window_update_of_0_resets_a_stream_and_ends_a_connection() -> None:
    server = with_stream(started_server())
    assert server.receive(frames.window_update(1, 0)) == [
        StreamReset(stream_id=1, code=ErrorCode.PROTOCOL_ERROR, by_peer=False)
    ]
    with pytest.raises(RemoteProtocolError, match="WINDOW_UPDATE of 0"):
        server.receive(frames.window_update(0, 0))


# --- receiving


def test_stream_credit_returns_at_half_a_window_and_only_for_released_bytes() -> None:
    server = with_stream(started_server(SMALL))
    server.reading = False
    server.receive(frames.data(1, bytes(40_000)))
    assert not server.engine.has_data_to_send
    server.engine.release_capacity(1, 32_766)
    assert not server.engine.has_data_to_send
    server.engine.release_capacity(1, 1)
    assert increments(server.engine.data_to_send(), 1) == [32_767]


def test_more_than_is_held_cannot_be_released() -> None:
    server = with_stream(started_server(SMALL))
    server.reading = False
    server.receive(frames.data(1, bytes(100)))
    with pytest.raises(LocalProtocolError, match="101 bytes of stream 1 released, of which 100 are held"):
        server.engine.release_capacity(1, 101)
    server.engine.release_capacity(1, 100)
    server.engine.release_capacity(99, 100)  # a stream that has just died


def test_connection_credit_returns_on_receipt_at_half_its_window() -> None:
    config = ConnectionConfig(stream_window=65_535, initial_stream_window=65_535, connection_window=200_000)
    server = started_server(config)
    server.reading = False
    for stream_id in (1, 3):
        with_stream(server, stream_id)
        server.receive(frames.data(stream_id, bytes(50_000)))
    assert increments(server.engine.data_to_send(), 0) == [100_000]


def test_padding_counts_for_both_windows_and_is_released_at_once() -> None:
    server = with_stream(started_server(SMALL))
    server.reading = False
    frame = frames.data(1, bytes(200), pad=199)
    for _ in range(163):
        server.receive(frame)
    assert server.engine.statistics().received_bytes == 163 * 400
    assert len(server.received[1]) == 163 * 200
    assert not server.engine.has_data_to_send
    server.engine.release_capacity(1, 168)
    assert increments(server.engine.data_to_send(), 1) == [163 * 200 + 168]


def test_padding_alone_keeps_a_stream_going() -> None:
    server = with_stream(started_server(SMALL))
    server.reading = False
    for _ in range(150):
        server.receive(frames.data(1, pad=255), now=server.engine.statistics().received_bytes / 256)
    assert increments(server.engine.data_to_send(), 1) == [128 * 256]


def test_a_reader_that_finishes_after_the_peers_end_credits_nobody() -> None:
    server = with_stream(started_server(SMALL))
    server.reading = False
    server.receive(frames.data(1, bytes(60_000), end_stream=True))
    server.release(1)
    assert not server.engine.has_data_to_send


def test_more_than_the_stream_window_resets_the_stream() -> None:
    server = with_stream(started_server(SMALL))
    server.reading = False
    server.receive(frames.data(1, bytes(65_535)))
    events = server.receive(frames.data(1, b"x") + frames.data(1, b"y"))
    assert events == [StreamReset(stream_id=1, code=ErrorCode.FLOW_CONTROL_ERROR, by_peer=False)]
    assert len(server.received[1]) == 65_535


def test_more_than_the_connection_window_ends_the_connection() -> None:
    config = ConnectionConfig(
        stream_window=65_535, initial_stream_window=65_535, connection_window=65_535, max_frame_size=2**20
    )
    server = with_stream(started_server(config))
    with pytest.raises(RemoteProtocolError) as caught:
        server.receive(frames.data(1, bytes(65_536)))
    assert caught.value.code is ErrorCode.FLOW_CONTROL_ERROR


def test_data_for_closed_streams_still_counts_for_the_connection() -> None:
    config = ConnectionConfig(stream_window=65_535, initial_stream_window=65_535, connection_window=65_535)
    server = with_stream(started_server(config))
    server.engine.reset(1, ErrorCode.CANCEL)
    server.engine.data_to_send()
    assert server.receive(frames.data(1, bytes(40_000))) == []
    assert increments(server.engine.data_to_send(), 0) == [40_000]


def test_early_payload_is_kept_until_accept_and_charged_until_then() -> None:
    server = started_server(SMALL)
    server.receive(frames.connect(1) + frames.data(1, b"a" * 40_000, pad=0) + frames.data(1, b"b"))
    assert not increments(server.engine.data_to_send(), 1)
    server.engine.accept(1, (), server.sink(1))
    assert bytes(server.received[1]) == b"a" * 40_000 + b"b"
    assert increments(server.engine.data_to_send(), 1) == [40_002]


def test_budget_is_given_back_however_a_stream_or_connection_ends() -> None:
    budget = WindowBudget()
    for ending in ("ends", "reset", "lost", "close", "broken"):
        pair = EnginePair(budget=budget)
        stream = pair.open()
        pair.send(pair.client, stream, bytes(MIB))
        assert budget.used > 0
        engine = pair.server.engine
        if ending == "ends":
            pair.client.engine.end_stream(stream)
            engine.end_stream(stream)
            pair.pump()
        elif ending == "reset":
            engine.reset(stream, ErrorCode.CANCEL)
        elif ending == "lost":
            engine.connection_lost()
        elif ending == "close":
            engine.close()
        else:
            with pytest.raises(RemoteProtocolError):
                pair.server.receive(frames.data(0, b"x"))
        assert budget.used == 0, ending


def test_fifty_sleeping_readers_stall_only_themselves() -> None:
    pair = EnginePair()
    pair.server.reading = False
    sleeping = [pair.open() for _ in range(50)]
    for stream in sleeping:
        while pair.client.engine.send_data(stream, bytes(64 * KIB)):
            pair.pump()
    pair.server.reading = True
    awake = pair.open()
    pair.send(pair.client, awake, bytes(5 * MIB))
    assert len(pair.server.received[awake]) == 5 * MIB
    assert [len(pair.server.received[stream]) for stream in sleeping] == [256 * KIB] * 50


BIG = ConnectionConfig(
    stream_window=2**27,
    initial_stream_window=2**27,
    connection_window=2**28,
    max_frame_size=2**24 - 1,
    max_send_frame=2**24 - 1,
)


@pytest.mark.parametrize("client_sends", [True, False])
def test_both_windows_work_past_2_to_the_31_bytes(client_sends: bool) -> None:
    pair = EnginePair(BIG, BIG)
    taken = 0

    def count(view: memoryview) -> int:
        nonlocal taken
        taken += len(view)
        return len(view)

    stream = pair.client.engine.connect(frames.connect_headers(), count)
    pair.pump()
    pair.server.engine.accept(stream, (), count)
    pair.pump()
    sender, receiver = (pair.client, pair.server) if client_sends else (pair.server, pair.client)
    size = 2**24 - 1
    buffer = bytearray(9 + size)
    for _ in range(2**31 // size + 9):
        while sender.engine.send_capacity(stream) < size:
            assert receiver.engine.has_data_to_send
            sender.receive(receiver.engine.data_to_send())
        sender.engine.prefix_data(stream, buffer, size)
        receiver.engine.receive_data(buffer, 0.0)
    assert taken > 2**31
    assert receiver.engine.statistics().received_bytes == taken
    assert not pair.resets()


def test_a_fast_stream_grows_to_the_largest_window() -> None:
    pair = EnginePair()
    stream = pair.open()
    pair.send(pair.client, stream, bytes(16 * MIB))
    engine = pair.client.engine
    sent = 0
    while taken := engine.send_data(stream, bytes(64 * KIB)):
        sent += taken
        engine.data_to_send()
    assert sent > 2 * MIB  # a window of 4 MiB, of which less than half may be unannounced


def test_engine_takes_no_budget_for_streams_that_stay_small() -> None:
    budget = WindowBudget()
    engine = Engine(client=False, budget=budget)
    engine.start(0.0)
    engine.receive_data(frames.PREFACE + frames.settings() + frames.connect(1), 0.0)
    engine.accept(1, (), len)
    for second in range(100):
        engine.receive_data(frames.data(1, bytes(10_000)), float(second * 10))
    assert budget.used == 0
