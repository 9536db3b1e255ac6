"""Life of a connection and its streams, from both ends."""

import struct

import pytest
from hpack import Decoder, Encoder

from hbone.config import ConnectionConfig
from hbone.engine import Engine
from hbone.engine.frames import FrameType, Setting
from hbone.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from hbone.events import (
    ConnectAccepted,
    ConnectReceived,
    ConnectRefused,
    Event,
    SettingsReceived,
    StreamEnded,
    StreamReset,
)
from hbone.testing import frames
from hbone.testing.engines import EngineEnd, EnginePair


def started(
    *, client: bool, settings: dict[int, int] | None = None, config: ConnectionConfig | None = None
) -> EngineEnd:
    end = EngineEnd(client=client, config=config)
    end.engine.start(0.0)
    end.engine.data_to_send()
    end.receive((b"" if client else frames.PREFACE) + frames.settings(settings or {}) + frames.settings_ack())
    end.engine.data_to_send()
    end.take_events()
    return end


def kinds(wire: bytes) -> list[int]:
    return [kind for kind, *_ in frames.split(wire)]


def resets(wire: bytes) -> list[tuple[int, int]]:
    return [
        (stream, int.from_bytes(payload))
        for kind, _, stream, payload in frames.split(wire)
        if kind == FrameType.RST_STREAM
    ]


# --- start


def settings_of(wire: bytes) -> dict[int, int]:
    sent = [payload for kind, flags, _, payload in frames.split(wire) if kind == FrameType.SETTINGS and not flags]
    assert len(sent) == 1
    return dict(struct.iter_unpack(">HI", sent[0]))


def test_a_client_starts_with_preface_settings_and_window() -> None:
    engine = Engine(client=True)
    engine.start(0.0)
    wire = engine.data_to_send()
    assert wire.startswith(frames.PREFACE)
    assert kinds(wire) == [FrameType.SETTINGS, FrameType.WINDOW_UPDATE]
    assert settings_of(wire) == {
        Setting.ENABLE_PUSH: 0,
        Setting.INITIAL_WINDOW_SIZE: 262_144,
        Setting.MAX_FRAME_SIZE: 1_048_576,
        Setting.MAX_HEADER_LIST_SIZE: 16_384,
    }
    assert wire.endswith(frames.window_update(0, 16_777_216 - 65_535))


def test_a_server_starts_with_settings_and_window() -> None:
    engine = Engine(client=False)
    engine.start(0.0)
    assert settings_of(engine.data_to_send()) == {
        Setting.MAX_CONCURRENT_STREAMS: 200,
        Setting.INITIAL_WINDOW_SIZE: 262_144,
        Setting.MAX_FRAME_SIZE: 1_048_576,
        Setting.MAX_HEADER_LIST_SIZE: 16_384,
    }


def test_both_ends_learn_of_the_others_settings_once() -> None:
    pair = EnginePair()
    assert pair.client.take_events() == [SettingsReceived()]
    assert pair.server.take_events() == [SettingsReceived()]
    assert pair.client.engine.peer_max_streams == 200
    assert pair.client.engine.next_deadline() == 10.0  # the first PING, nothing else


@pytest.mark.parametrize("wire", [b"GET / HTTP/1.1\r\n", b"PRI * HTTP/1.1", b"\x16\x03\x01", frames.settings()])
def test_a_wrong_preface_ends_the_connection_at_its_first_wrong_byte(wire: bytes) -> None:
    end = EngineEnd(client=False)
    end.engine.start(0.0)
    wrong = next(index for index, byte in enumerate(wire) if byte != frames.PREFACE[index])
    for index in range(wrong):
        end.receive(wire[index : index + 1])
    with pytest.raises(RemoteProtocolError, match="preface"):
        end.receive(wire[wrong : wrong + 1])
    assert end.engine.closed
    assert kinds(end.engine.data_to_send())[-1] == FrameType.GOAWAY


@pytest.mark.parametrize("first", [frames.ping(), frames.settings_ack(), frames.connect(1), frames.unknown()])
def test_the_first_frame_must_be_settings(first: bytes) -> None:
    end = EngineEnd(client=False)
    end.engine.start(0.0)
    with pytest.raises(RemoteProtocolError, match="the first frame is not SETTINGS"):
        end.receive(frames.PREFACE + first)


# --- CONNECT


def test_a_stream_carries_bytes_both_ways_and_ends_both_ways() -> None:
    pair = EnginePair()
    pair.server.take_events()
    pair.client.take_events()
    headers = frames.connect_headers("[::1]:80", [(b"baggage", b"a=b")])
    stream = pair.connect(headers)
    assert pair.server.take_events() == [ConnectReceived(stream_id=stream, headers=headers)]
    pair.accept(stream, ((b"baggage", b"c=d"),))
    assert pair.client.take_events() == [
        ConnectAccepted(stream_id=stream, headers=((b":status", b"200"), (b"baggage", b"c=d")))
    ]
    pair.send(pair.client, stream, b"question" * 100_000, end_stream=True)
    assert pair.server.take_events() == [StreamEnded(stream_id=stream)]
    pair.send(pair.server, stream, b"answer" * 100_000, end_stream=True)
    assert pair.client.take_events() == [StreamEnded(stream_id=stream)]
    assert pair.server.received[stream] == b"question" * 100_000
    assert pair.client.received[stream] == b"answer" * 100_000
    assert pair.client.engine.open_streams == pair.server.engine.open_streams == 0


def test_single_bytes_on_the_wire_make_no_difference() -> None:
    pair = EnginePair(chunks=lambda data: (data[at : at + 1] for at in range(len(data))))
    stream = pair.open()
    pair.send(pair.client, stream, b"question" * 1000, end_stream=True)
    pair.send(pair.server, stream, b"answer" * 1000, end_stream=True)
    assert pair.server.received[stream] == b"question" * 1000
    assert pair.client.received[stream] == b"answer" * 1000
    assert pair.client.engine.open_streams == pair.server.engine.open_streams == 0


def test_half_close_leaves_the_other_direction_open() -> None:
    pair = EnginePair()
    stream = pair.open()
    pair.client.engine.end_stream(stream)
    pair.pump()
    pair.send(pair.server, stream, b"still here")
    assert pair.client.received[stream] == b"still here"
    assert pair.client.engine.send_capacity(stream) == 0
    with pytest.raises(LocalProtocolError, match="HALF_CLOSED_LOCAL"):
        pair.client.engine.send_data(stream, b"x")


def test_bytes_and_end_sent_before_the_answer_reach_the_sink_within_accept() -> None:
    pair = EnginePair()
    stream = pair.client.engine.connect(frames.connect_headers(), pair.client.sink(1))
    pair.client.engine.send_data(stream, b"early", end_stream=True)
    pair.pump()
    assert pair.server.take_events()[1:] == [
        ConnectReceived(stream_id=1, headers=frames.connect_headers()),
        StreamEnded(stream_id=1),
    ]
    pair.server.engine.accept(1, (), pair.server.sink(1))
    assert pair.server.received[1] == b"early"
    pair.server.engine.end_stream(1)
    pair.pump()
    assert pair.client.engine.open_streams == pair.server.engine.open_streams == 0
    assert not pair.resets()


def test_a_request_that_ends_its_direction_says_so() -> None:
    end = started(client=False)
    assert end.receive(frames.connect(1, end_stream=True)) == [
        ConnectReceived(stream_id=1, headers=frames.connect_headers(), ended=True)
    ]
    end.engine.accept(1, (), len)
    end.engine.end_stream(1)
    assert end.engine.open_streams == 0


@pytest.mark.parametrize("status", [400, 401, 503])
def test_a_refusal_ends_the_stream_at_both_ends(status: int) -> None:
    pair = EnginePair()
    stream = pair.connect()
    pair.client.take_events()
    pair.server.engine.reject(stream, status, ((b"x", b"y"),))
    wire = pair.server.engine.data_to_send()
    assert kinds(wire) == [FrameType.HEADERS, FrameType.RST_STREAM]
    assert resets(wire) == [(stream, ErrorCode.NO_ERROR)]
    headers = ((b":status", str(status).encode()), (b"x", b"y"))
    assert pair.client.receive(wire) == [ConnectRefused(stream_id=stream, status=status, headers=headers)]
    pair.pump()
    assert pair.client.engine.open_streams == pair.server.engine.open_streams == 0
    assert not pair.resets()


def test_a_refusal_with_a_body_is_a_refusal() -> None:
    end = started(client=True)
    end.engine.connect(frames.connect_headers(), end.sink(1))
    end.engine.data_to_send()
    events = end.receive(frames.response(1, 503) + frames.data(1, b"no healthy upstream", end_stream=True))
    assert events == [ConnectRefused(stream_id=1, status=503, headers=((b":status", b"503"),))]
    assert resets(end.engine.data_to_send()) == [(1, ErrorCode.CANCEL)]
    assert not end.received[1]


def test_interim_answers_are_skipped_and_counted() -> None:
    end = started(client=True)
    end.engine.connect(frames.connect_headers(), len)
    assert end.receive(frames.response(1, 100) * 8) == []
    assert end.receive(frames.response(1)) == [ConnectAccepted(stream_id=1, headers=((b":status", b"200"),))]
    end.engine.connect(frames.connect_headers(), len)
    assert end.receive(frames.response(3, 103) * 9) == [
        StreamReset(stream_id=3, code=ErrorCode.ENHANCE_YOUR_CALM, by_peer=False)
    ]


@pytest.mark.parametrize("answer", [frames.response(1, 101), frames.response(1, 100, end_stream=True)])
def test_interim_answers_that_make_no_sense_are_faults(answer: bytes) -> None:
    end = started(client=True)
    end.engine.connect(frames.connect_headers(), len)
    assert end.receive(answer) == [StreamReset(stream_id=1, code=ErrorCode.PROTOCOL_ERROR, by_peer=False)]


def test_an_answer_that_ends_its_direction_is_both() -> None:
    end = started(client=True)
    end.engine.connect(frames.connect_headers(), len)
    assert end.receive(frames.response(1, end_stream=True)) == [
        ConnectAccepted(stream_id=1, headers=((b":status", b"200"),)),
        StreamEnded(stream_id=1),
    ]


def test_a_malformed_or_too_large_answer_is_a_fault() -> None:
    end = started(client=True)
    for _ in range(2):
        end.engine.connect(frames.connect_headers(), len)
    many = tuple((b"x%d" % index, b"y") for index in range(65))
    wire = frames.response(1, extra=[(b"Upper", b"x")]) + frames.response(3, extra=many)
    assert end.receive(wire) == [
        StreamReset(stream_id=1, code=ErrorCode.PROTOCOL_ERROR, by_peer=False),
        StreamReset(stream_id=3, code=ErrorCode.ENHANCE_YOUR_CALM, by_peer=False),
    ]


def test_headers_that_crossed_a_reset_are_decoded_and_dropped() -> None:
    end = started(client=True)
    encoder = Encoder()
    for _ in range(3):
        end.engine.connect(frames.connect_headers(), len)
    end.engine.reset(1, ErrorCode.CANCEL)
    end.receive(frames.rst_stream(3))
    end.engine.data_to_send()
    headers = ((b":status", b"200"), (b"name", b"value"))
    assert end.receive(frames.headers(1, encoder.encode(headers))) == []
    assert not end.engine.has_data_to_send
    assert end.receive(frames.headers(3, encoder.encode(headers))) == []
    assert resets(end.engine.data_to_send()) == [(3, ErrorCode.STREAM_CLOSED)]
    assert end.receive(frames.headers(5, encoder.encode(headers))) == [ConnectAccepted(stream_id=5, headers=headers)]


def test_payload_before_the_answer_is_a_fault() -> None:
    end = started(client=True)
    end.engine.connect(frames.connect_headers(), end.sink(1))
    assert end.receive(frames.data(1, b"x")) == [StreamReset(stream_id=1, code=ErrorCode.PROTOCOL_ERROR, by_peer=False)]
    assert not end.received[1]


@pytest.mark.parametrize("trailer", [frames.headers(1, ((b"x", b"y"),)), frames.response(1)])
def test_trailers_and_second_answers_are_faults(trailer: bytes) -> None:
    for client in (True, False):
        end = started(client=client)
        if client:
            end.engine.connect(frames.connect_headers(), len)
            end.receive(frames.response(1))
        else:
            end.receive(frames.connect(1))
            end.engine.accept(1, (), len)
        assert end.receive(trailer) == [StreamReset(stream_id=1, code=ErrorCode.PROTOCOL_ERROR, by_peer=False)]


# --- resets


def test_a_reset_reaches_the_other_end_with_its_code() -> None:
    pair = EnginePair()
    stream = pair.open()
    pair.client.engine.reset(stream, ErrorCode.CONNECT_ERROR)
    pair.pump()
    assert pair.server.take_events() == [StreamReset(stream_id=stream, code=ErrorCode.CONNECT_ERROR)]
    assert pair.client.engine.open_streams == pair.server.engine.open_streams == 0


def test_an_unknown_reset_code_is_an_internal_error() -> None:
    end = started(client=False)
    end.receive(frames.connect(1))
    assert end.receive(frames.rst_stream(1, 0xDEAD)) == [StreamReset(stream_id=1, code=ErrorCode.INTERNAL_ERROR)]


def test_a_stream_that_the_peer_refused_was_not_processed() -> None:
    end = started(client=True)
    end.engine.connect(frames.connect_headers(), len)
    assert end.receive(frames.rst_stream(1, ErrorCode.REFUSED_STREAM)) == [
        StreamReset(stream_id=1, code=ErrorCode.REFUSED_STREAM, processed=False)
    ]


def test_verbs_on_a_stream_that_ended_are_misuse_but_reset_and_release_are_not() -> None:
    end = started(client=False)
    end.receive(frames.connect(1) + frames.connect(3))
    end.engine.reset(1, ErrorCode.CANCEL)
    end.engine.data_to_send()
    for verb in (
        lambda: end.engine.accept(1, (), len),
        lambda: end.engine.reject(1, 400),
        lambda: end.engine.send_capacity(1),
        lambda: end.engine.send_data(1, b"x"),
        lambda: end.engine.prefix_data(1, bytearray(10), 1),
        lambda: end.engine.end_stream(1),
    ):
        with pytest.raises(LocalProtocolError, match="stream 1 is not open"):
            verb()
    end.engine.reset(1, ErrorCode.CANCEL)
    end.engine.release_capacity(1, 10)
    assert not end.engine.has_data_to_send
    assert end.engine.open_streams == 1


def test_an_answer_is_given_once() -> None:
    end = started(client=False)
    end.receive(frames.connect(1))
    assert end.engine.send_capacity(1) == 0
    with pytest.raises(LocalProtocolError, match="RECEIVED"):
        end.engine.send_data(1, b"too early")
    end.engine.accept(1, (), len)
    with pytest.raises(LocalProtocolError, match="it has its answer"):
        end.engine.accept(1, (), len)
    with pytest.raises(LocalProtocolError, match="it has its answer"):
        end.engine.reject(1, 503)
    with pytest.raises(LocalProtocolError, match="status 204 is no refusal"):
        end.engine.reject(1, 204)


def test_a_sink_may_reset_its_own_stream() -> None:
    for wire in (
        frames.data(1, b"abc") + frames.data(1, b"def", end_stream=True),
        frames.data(1, b"abc", end_stream=True),
        frames.data(1, b"abc", end_stream=True, pad=3),
    ):
        for step in (1, 4, len(wire)):
            end = started(client=False)
            end.receive(frames.connect(1))
            got: list[bytes] = []

            def sink(view: memoryview, end: EngineEnd = end, got: list[bytes] = got) -> int:
                got.append(bytes(view))
                end.engine.reset(1, ErrorCode.CANCEL)
                return len(view)

            end.engine.accept(1, (), sink)
            events: list[Event] = []
            for at in range(0, len(wire), step):
                events += end.receive(wire[at : at + step])
            assert events == []
            assert len(got) == 1


def test_misuse_by_a_sink_is_ours_and_not_the_peers() -> None:
    end = started(client=False)
    end.receive(frames.connect(1))

    def sink(view: memoryview) -> int:
        end.engine.end_stream(99)
        return len(view)

    end.engine.accept(1, (), sink)
    with pytest.raises(LocalProtocolError, match="stream 99"):
        end.receive(frames.data(1, b"x"))
    assert not end.engine.closed


def test_a_sink_may_close_the_connection() -> None:
    end = started(client=False)
    end.receive(frames.connect(1))

    def sink(view: memoryview) -> int:
        end.engine.close(ErrorCode.INTERNAL_ERROR)
        return len(view)

    end.engine.accept(1, (), sink)
    assert end.receive(frames.data(1, b"x") + frames.data(1, b"y") + frames.connect(3) + b"rest") == []
    assert end.engine.closed
    assert end.receive(frames.ping()) == []


# --- limits of the peer


def test_a_client_opens_no_more_than_the_server_allows() -> None:
    end = started(client=True, settings={Setting.MAX_CONCURRENT_STREAMS: 2})
    for _ in range(2):
        end.engine.connect(frames.connect_headers(), len)
    assert end.engine.available_streams == 0
    with pytest.raises(LocalProtocolError, match="no stream left: 2 of 2"):
        end.engine.connect(frames.connect_headers(), len)
    end.engine.reset(1, ErrorCode.CANCEL)
    assert end.engine.connect(frames.connect_headers(), len) == 5


def test_a_client_assumes_100_streams_until_settings_say_otherwise() -> None:
    end = EngineEnd(client=True)
    end.engine.start(0.0)
    assert end.engine.available_streams == 100
    end.receive(frames.settings())
    assert end.engine.available_streams == 2**31 - 1


def test_headers_beyond_the_peers_limit_are_not_sent() -> None:
    end = started(client=True, settings={Setting.MAX_HEADER_LIST_SIZE: 200})
    with pytest.raises(LocalProtocolError, match="the peer takes 200"):
        end.engine.connect(frames.connect_headers("a:1", [(b"baggage", b"x" * 200)]), len)
    assert not end.engine.has_data_to_send
    assert end.engine.connect(frames.connect_headers(), len) == 1


def test_an_answer_beyond_the_peers_limit_is_its_status_alone() -> None:
    end = started(client=False, settings={Setting.MAX_HEADER_LIST_SIZE: 100})
    end.receive(frames.connect(1) + frames.connect(3) + frames.connect(5))
    end.engine.accept(1, ((b"baggage", b"x" * 16),), len)
    end.engine.accept(3, ((b"baggage", b"x" * 200),), len)
    end.engine.reject(5, 503, ((b"retry-after", b"x" * 200),))
    decoder = Decoder()
    answers = [
        decoder.decode(payload, raw=True)
        for kind, _, _, payload in frames.split(end.engine.data_to_send())
        if kind == FrameType.HEADERS
    ]
    assert answers == [
        [(b":status", b"200"), (b"baggage", b"x" * 16)],
        [(b":status", b"200")],
        [(b":status", b"503")],
    ]


def test_stream_ids_that_run_out_drain_the_connection() -> None:
    end = started(client=True)
    end.engine._next_id = 2**30 - 1
    assert end.engine.connect(frames.connect_headers(), len) == 2**30 - 1
    assert end.engine.draining
    assert end.engine.available_streams == 0
    with pytest.raises(LocalProtocolError, match="is draining"):
        end.engine.connect(frames.connect_headers(), len)


def test_a_server_drains_when_the_client_nears_the_last_id() -> None:
    end = started(client=False)
    end.receive(frames.connect(2**31 - 1))
    assert end.engine.draining
    assert kinds(end.engine.data_to_send()) == [FrameType.GOAWAY, FrameType.PING]
    with pytest.raises(RemoteProtocolError, match="has ended"):
        end.receive(frames.connect(2**31 - 3))


def test_only_clients_open_streams() -> None:
    with pytest.raises(LocalProtocolError, match="only a client"):
        started(client=False).engine.connect(frames.connect_headers(), len)


def test_a_large_header_list_goes_out_in_continuations() -> None:
    pair = EnginePair()
    pair.client.engine._peer_header_list = 2**20
    pair.server.engine._config = ConnectionConfig(max_header_list_size=2**20)
    pair.server.engine._decoder._max_size = 2**20
    headers = frames.connect_headers("a:1", [(b"x", b"y" * 40_000)])
    pair.connect(headers)
    assert ConnectReceived(stream_id=1, headers=headers) in pair.server.events


# --- the end


def test_close_says_goaway_and_forgets_every_stream() -> None:
    end = started(client=False)
    end.receive(frames.connect(1) + frames.connect(5))
    end.engine.close(ErrorCode.ENHANCE_YOUR_CALM, b"why")
    assert end.engine.data_to_send() == frames.goaway(5, ErrorCode.ENHANCE_YOUR_CALM, b"why")
    assert end.engine.closed
    assert end.engine.open_streams == 0
    assert end.engine.next_deadline() is None
    assert end.engine.on_time(1e9) == []
    assert end.receive(frames.connect(7)) == []
    with pytest.raises(LocalProtocolError, match="the connection is over"):
        end.engine.accept(1, (), len)


def test_a_lost_connection_keeps_nothing() -> None:
    end = started(client=True)
    end.engine.connect(frames.connect_headers(), len)
    end.engine.connection_lost()
    assert not end.engine.has_data_to_send
    assert end.engine.open_streams == 0
    with pytest.raises(LocalProtocolError, match="the connection is over"):
        end.engine.connect(frames.connect_headers(), len)


def test_statistics_count() -> None:
    pair = EnginePair()
    stream = pair.open()
    pair.send(pair.client, stream, bytes(100_000))
    numbers = pair.server.engine.statistics()
    assert (numbers.open_streams, numbers.streams, numbers.received_bytes) == (1, 1, 100_000)
    assert pair.client.engine.statistics().sent_frames == 2
