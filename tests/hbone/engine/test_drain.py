"""Drain and deadlines: GOAWAY both ways, PING, and peers that are late. The clock is a number."""

import pytest

from hbone.config import ConnectionConfig
from hbone.engine import frames as wire
from hbone.engine.control import DRAIN_PING, KEEPALIVE_PING, LIVENESS_PING
from hbone.engine.frames import FrameType
from hbone.errors import ErrorCode, LocalProtocolError
from hbone.events import (
    ConnectReceived,
    Event,
    PeerDraining,
    PingAcknowledged,
    StreamEnded,
    StreamReset,
    TransportEnded,
)
from hbone.testing import frames
from hbone.testing.engines import EngineEnd, EnginePair

DRAINED = TransportEnded(reason="the connection is drained", clean=True)
MAX = 2**31 - 1


def started(*, client: bool, config: ConnectionConfig | None = None) -> EngineEnd:
    end = EngineEnd(client=client, config=config)
    end.engine.start(0.0)
    end.receive((b"" if client else frames.PREFACE) + frames.settings() + frames.settings_ack())
    end.engine.data_to_send()
    end.take_events()
    return end


def goaways(data: bytes) -> list[tuple[int, int]]:
    return [
        (int.from_bytes(payload[:4]), int.from_bytes(payload[4:8]))
        for kind, _, _, payload in frames.split(data)
        if kind == FrameType.GOAWAY
    ]


def ended(events: list[Event]) -> list[TransportEnded]:
    return [event for event in events if isinstance(event, TransportEnded)]


# --- a server drains


def test_a_server_drains_in_two_phases_and_open_streams_finish() -> None:
    pair = EnginePair()
    stream = pair.open()
    pair.server.engine.drain(0.0)
    assert pair.server.engine.draining
    pair.pump()
    assert pair.client.take_events() == [
        PeerDraining(last_stream_id=MAX, code=ErrorCode.NO_ERROR),
        PeerDraining(last_stream_id=stream, code=ErrorCode.NO_ERROR),
    ]
    assert pair.client.engine.draining
    assert pair.client.engine.available_streams == 0
    pair.send(pair.client, stream, b"x" * 1_000_000, end_stream=True)
    pair.send(pair.server, stream, b"y" * 1_000_000, end_stream=True)
    assert len(pair.server.received[stream]) == len(pair.client.received[stream]) == 1_000_000
    assert pair.client.events[-1] == DRAINED
    pair.advance(0.0)
    assert ended(pair.server.events) == [DRAINED]
    assert pair.client.engine.closed
    assert pair.server.engine.closed


def test_streams_opened_between_the_two_goaways_are_served() -> None:
    server = started(client=False)
    server.engine.drain(0.0)
    assert server.engine.data_to_send() == frames.goaway(MAX) + frames.ping(DRAIN_PING)
    assert server.receive(frames.connect(1)) == [ConnectReceived(stream_id=1, headers=frames.connect_headers())]
    server.receive(frames.ping(DRAIN_PING, ack=True))
    assert server.engine.data_to_send() == frames.goaway(1)
    server.engine.accept(1, (), server.sink(1))
    server.receive(frames.data(1, b"served", end_stream=True))
    assert server.received[1] == b"served"
    assert server.receive(frames.connect(3)) == []
    assert frames.rst_stream(3, ErrorCode.REFUSED_STREAM) in server.engine.data_to_send()
    server.engine.end_stream(1)
    assert server.engine.next_deadline() == 0.0
    assert server.engine.on_time(0.0) == [DRAINED]


def test_the_second_goaway_comes_without_an_answer_too() -> None:
    server = started(client=False)
    server.receive(frames.connect(7))
    server.engine.drain(100.0)
    server.engine.drain(101.0)  # asked twice, said once
    assert goaways(server.engine.data_to_send()) == [(MAX, 0)]
    assert server.engine.on_time(104.9) == []
    server.engine.on_time(105.0)
    assert goaways(server.engine.data_to_send()) == [(7, 0)]


def test_an_idle_server_that_drains_ends_after_the_answer() -> None:
    server = started(client=False)
    server.engine.drain(0.0)
    assert not server.engine.closed
    assert server.receive(frames.ping(DRAIN_PING, ack=True)) == [DRAINED]


def test_a_reset_of_the_last_stream_ends_a_drain() -> None:
    pair = EnginePair()
    stream = pair.open()
    pair.server.engine.drain(0.0)
    pair.pump()
    pair.client.engine.reset(stream, ErrorCode.CANCEL)
    pair.pump()
    assert pair.server.take_events() == [
        StreamReset(stream_id=stream, code=ErrorCode.CANCEL),
        DRAINED,
    ]


# --- a client drains, or is told to


def test_a_client_drains_with_one_goaway() -> None:
    pair = EnginePair()
    stream = pair.open()
    pair.client.engine.drain(0.0)
    assert pair.client.engine.out == frames.goaway(0)
    with pytest.raises(LocalProtocolError, match="is draining"):
        pair.client.engine.connect(frames.connect_headers(), len)
    pair.pump()
    assert pair.server.take_events() == [PeerDraining(last_stream_id=0, code=ErrorCode.NO_ERROR)]
    pair.send(pair.server, stream, b"to the end", end_stream=True)
    pair.send(pair.client, stream, b"", end_stream=True)
    pair.advance(0.0)
    assert pair.client.received[stream] == b"to the end"
    assert ended(pair.client.events) == [DRAINED]


def test_an_idle_client_that_drains_is_over_at_once() -> None:
    client = started(client=True)
    client.engine.drain(5.0)
    assert client.engine.next_deadline() == 5.0
    assert client.engine.on_time(5.0) == [DRAINED]


def test_streams_above_goaways_last_were_not_processed() -> None:
    client = started(client=True)
    for _ in range(3):
        client.engine.connect(frames.connect_headers(), len)
    assert client.receive(frames.goaway(1, ErrorCode.NO_ERROR, b"restart")) == [
        PeerDraining(last_stream_id=1, code=ErrorCode.NO_ERROR, debug=b"restart"),
        StreamReset(stream_id=3, code=ErrorCode.REFUSED_STREAM, processed=False),
        StreamReset(stream_id=5, code=ErrorCode.REFUSED_STREAM, processed=False),
    ]
    assert client.engine.open_streams == 1
    assert client.receive(frames.response(1) + frames.data(1, end_stream=True))[1:] == [StreamEnded(stream_id=1)]
    client.engine.end_stream(1)
    assert client.engine.on_time(0.0) == [DRAINED]


def test_a_goaway_for_an_idle_client_ends_it() -> None:
    client = started(client=True)
    assert client.receive(frames.goaway(0)) == [PeerDraining(last_stream_id=0, code=ErrorCode.NO_ERROR), DRAINED]


def test_a_long_reason_of_goaway_is_cut() -> None:
    client = started(client=True)
    client.engine.connect(frames.connect_headers(), len)
    event = client.receive(frames.goaway(1, ErrorCode.INTERNAL_ERROR, b"x" * 4000))[0]
    assert isinstance(event, PeerDraining)
    assert len(event.debug) == 256


# --- PING


def test_keepalive_asks_10_seconds_after_the_last_answer() -> None:
    pair = EnginePair()
    assert pair.client.engine.next_deadline() == 10.0
    pair.client.take_events()
    pair.advance(10.0)
    assert pair.client.take_events() == [PingAcknowledged(rtt=0.0)]
    assert pair.client.engine.next_deadline() == 20.0


def test_an_unanswered_keepalive_ends_the_connection_after_20_seconds() -> None:
    for client in (True, False):
        end = started(client=client)
        assert end.engine.on_time(10.0) == []
        assert end.engine.data_to_send() == frames.ping(KEEPALIVE_PING)
        assert end.engine.next_deadline() == 30.0
        end.receive(frames.ping(b"not ours", ack=True), 29.0)
        assert end.engine.on_time(29.9) == []
        assert end.engine.on_time(30.0) == [TransportEnded(reason="PING not answered in 20 s", clean=False)]
        assert end.engine.closed
        assert goaways(end.engine.data_to_send()) == [(0, ErrorCode.NO_ERROR)]


def test_traffic_is_no_answer_to_a_ping() -> None:
    end = started(client=False)
    end.engine.on_time(10.0)
    for second in range(11, 30):
        end.receive(frames.connect(2 * second + 1), float(second))
    assert ended(end.engine.on_time(30.0))


def test_keepalive_can_be_off() -> None:
    end = started(client=True, config=ConnectionConfig(keepalive_interval=0))
    assert end.engine.next_deadline() is None


def test_a_liveness_ping_is_answered_with_its_round_trip() -> None:
    client = started(client=True)
    client.engine.ping(100.0)
    client.engine.ping(101.0)  # one question at a time
    assert client.engine.data_to_send() == frames.ping(LIVENESS_PING)
    assert client.receive(frames.ping(LIVENESS_PING, ack=True), 100.25) == [PingAcknowledged(rtt=0.25)]
    assert client.engine.statistics().rtt == 0.25
    client.engine.ping(102.0)
    assert client.engine.data_to_send() == frames.ping(LIVENESS_PING)
    assert ended(client.engine.on_time(122.0))


# --- peers that are late


def test_no_preface_in_5_seconds_ends_the_connection() -> None:
    for client, said in ((False, b""), (False, frames.PREFACE), (False, frames.PREFACE + b"\0\0\0"), (True, b"")):
        end = EngineEnd(client=client)
        end.engine.start(100.0)
        end.receive(said, 104.0)
        assert end.engine.next_deadline() == 105.0
        assert end.engine.on_time(104.9) == []
        reason = "no preface and SETTINGS from the peer in 5 s"
        assert end.engine.on_time(105.0) == [TransportEnded(reason=reason, clean=False)]
        assert goaways(end.engine.data_to_send()) == [(0, ErrorCode.SETTINGS_TIMEOUT)]


def test_settings_not_acknowledged_in_10_seconds_end_the_connection() -> None:
    end = EngineEnd(client=False)
    end.engine.start(100.0)
    end.receive(frames.PREFACE + frames.settings(), 101.0)
    assert end.engine.next_deadline() == 110.0
    end.engine.on_time(109.0)
    reason = "SETTINGS not acknowledged in 10 s"
    assert end.engine.on_time(110.0) == [TransportEnded(reason=reason, clean=False)]


@pytest.mark.parametrize(
    "opened",
    [
        pytest.param(frames.headers(1, b"", end_headers=False), id="no CONTINUATION"),
        pytest.param(frames.connect(1)[:-1], id="the last byte missing"),
        pytest.param(frames.connect(1)[:9], id="only the header"),
        pytest.param(frames.headers(1, b"", end_headers=False) + frames.continuation(1), id="not the last one"),
    ],
)
def test_a_header_block_that_stays_open_ends_the_connection_after_5_seconds(opened: bytes) -> None:
    end = started(client=False)
    end.receive(opened, 1.0)
    assert end.engine.next_deadline() == 6.0
    assert end.engine.on_time(5.9) == []
    assert end.engine.on_time(6.0) == [TransportEnded(reason="a header block stayed open for 5 s", clean=False)]


def test_a_header_block_that_is_slow_but_whole_is_fine() -> None:
    end = started(client=False)
    data = frames.connect(1)
    end.receive(data[:12], 1.0)
    end.receive(data[12:], 5.0)
    assert end.engine.next_deadline() == 10.0  # the PING


def test_an_engine_that_was_not_started_waits_for_nothing() -> None:
    assert EngineEnd(client=True).engine.next_deadline() is None
    assert wire.PREFACE == frames.PREFACE
