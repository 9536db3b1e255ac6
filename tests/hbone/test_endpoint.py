"""TLS and HTTP/2 joined, without a transport."""

from __future__ import annotations

import functools
import gc
import hashlib
import random
import tracemalloc
from typing import TYPE_CHECKING

import pytest

import hbone.endpoint
from hbone.config import ConnectionConfig
from hbone.engine import WindowBudget
from hbone.errors import ErrorCode, LocalProtocolError, PeerIdentityError, RemoteProtocolError, TlsError
from hbone.events import (
    ConnectReceived,
    HandshakeCompleted,
    PingAcknowledged,
    SettingsReceived,
    StreamEnded,
    StreamReset,
    TransportEnded,
)
from hbone.testing.ca import TestCa
from hbone.testing.endpoints import EndpointPair
from hbone.tls import IoBuffer

if TYPE_CHECKING:
    from hbone.identity import Identity


@functools.cache
def ca() -> TestCa:
    return TestCa()


@functools.cache
def who(name: str) -> Identity:
    return ca().identity("shop", name)


def joined(**options: object) -> EndpointPair:
    pair = EndpointPair(who("web"), who("orders"), **options)  # type: ignore[arg-type]
    pair.pump()
    return pair


def test_both_ends_learn_who_the_other_is() -> None:
    pair = joined()
    assert pair.client.endpoint.peer == ca().id("shop", "orders")
    assert pair.server.endpoint.peer == ca().id("shop", "web")
    for end in (pair.client, pair.server):
        assert end.take_events() == [HandshakeCompleted(), SettingsReceived()]
        assert end.endpoint.established


@pytest.mark.parametrize("chunk", [1, 7, 1000, None])
def test_any_chunking_of_the_ciphertext_gives_the_same(chunk: int | None) -> None:
    pair = joined(chunk=chunk)
    stream = pair.open()
    payload = random.Random(1).randbytes(20_000)
    sent = 0
    while sent < len(payload):
        sent += pair.client.send(stream, payload[sent:])
        pair.pump()
    pair.client.engine.end_stream(stream)
    pair.pump()
    assert pair.server.received[stream] == payload
    assert StreamEnded(stream_id=stream) in pair.server.events


def test_a_connection_that_is_quiet_gives_memory_back_once() -> None:
    pair = joined()
    stream = pair.open()
    pair.client.send(stream, b"x" * 100)
    pair.pump()
    endpoint = pair.server.endpoint
    queues = [endpoint.tls._into]
    for seconds in (1.0, 3.0, 4.0):
        endpoint.on_time(endpoint.heard_at + seconds)
        queues.append(endpoint.tls._into)
    assert queues[1] is queues[0]
    assert queues[2] is not queues[1]
    assert queues[3] is queues[2]
    pair.client.send(stream, b"y" * 100)
    pair.pump()
    assert pair.server.received[stream] == b"x" * 100 + b"y" * 100


def test_an_idle_end_of_a_tunnel_is_small() -> None:
    """Counted in what Python has allocated; OpenSSL's part is counted in `test_tls`."""
    first = joined()  # what is made once
    ends = []
    tracemalloc.start(1)
    try:
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(20):
            pair = joined()
            ends += [pair.client.endpoint, pair.server.endpoint]
            for endpoint in ends[-2:]:
                endpoint.on_time(endpoint.heard_at + 2)
        del pair
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (after - before) / len(ends) < 3_200  # 2,490 with Python 3.11
    assert first.server.endpoint.established


def test_payload_does_not_show_on_the_wire() -> None:
    pair = joined()
    stream = pair.open()
    pair.client.send(stream, b"a plain marker" * 10)
    pair.pump()
    assert pair.server.received[stream].startswith(b"a plain marker")
    assert b"plain marker" not in pair.wire


def test_large_and_small_payloads_keep_their_order() -> None:
    pair = joined()
    first, second = pair.open(), pair.open()
    rng = random.Random(2)
    expected = {first: hashlib.sha256(), second: hashlib.sha256()}
    for _ in range(200):
        stream = rng.choice((first, second))
        payload = rng.randbytes(rng.choice((1, 100, 4096, 4097, 16_000, 40_000)))
        taken = pair.client.send(stream, payload)
        expected[stream].update(payload[:taken])
        if rng.random() < 0.5:
            pair.pump()
    pair.pump()
    for stream, digest in expected.items():
        assert hashlib.sha256(pair.server.received[stream]).digest() == digest.digest()


def test_small_frames_of_one_turn_share_a_record() -> None:
    pair = joined()
    streams = [pair.open() for _ in range(10)]
    buffer = IoBuffer(1024)
    for stream in streams:
        buffer.view[9:12] = b"abc"
        pair.client.endpoint.send_from(stream, buffer, 3)
    ciphertext = pair.client.endpoint.data_to_send()
    assert len(ciphertext) == 10 * (9 + 3) + 22
    pair.server.receive(ciphertext, pair.now)
    assert all(pair.server.received[stream] == b"abc" for stream in streams)


def test_a_large_payload_is_encrypted_where_it_stands() -> None:
    pair = joined()
    stream = pair.open()
    assert pair.client.send(stream, b"x" * 10_000) == 10_000
    assert not pair.client.engine.has_data_to_send
    assert pair.client.endpoint.wants_flush


def test_more_than_the_capacity_is_refused_and_nothing_is_sent() -> None:
    pair = joined()
    stream = pair.open()
    capacity = pair.client.engine.send_capacity(stream)
    with pytest.raises(LocalProtocolError):
        pair.client.endpoint.send_from(stream, IoBuffer(capacity + 100), capacity + 1)
    assert not pair.client.endpoint.wants_flush


def test_ciphertext_fits_any_buffer() -> None:
    pair = joined()
    stream = pair.open()
    pair.client.send(stream, b"y" * 50_000)
    small = IoBuffer(1000)
    ciphertext = bytearray()
    while nbytes := pair.client.endpoint.data_to_send_into(small):
        ciphertext += small.view[:nbytes]
    assert not pair.client.endpoint.wants_flush
    pair.server.receive(bytes(ciphertext), 0.0)
    assert len(pair.server.received[stream]) > 10_000


def test_a_slow_transport_does_not_pile_up_ciphertext() -> None:
    much = ConnectionConfig(
        stream_window=2**31 - 1, initial_stream_window=2**31 - 1, connection_window=2**31 - 1
    )  # so that no window is the bound
    pair = EndpointPair(who("web"), who("orders"), server_config=much)
    pair.pump()
    sender = pair.client
    stream_id = pair.open()
    for _ in range(40):  # the transport takes one piece, then the application fills the queue again
        while sender.engine.send_data(stream_id, bytes(65_000)):
            pass
        assert sender.endpoint.wants_flush
        assert len(sender.endpoint.data_to_send()) > 0
    left = 0
    while data := sender.endpoint.data_to_send():
        left += len(data)
    assert left < 1024 * 1024


def test_receive_from_reads_out_of_the_shared_buffer() -> None:
    pair = joined()
    stream = pair.open()
    pair.client.send(stream, b"hello")
    ciphertext = pair.client.endpoint.data_to_send()
    shared = IoBuffer(64 * 1024)
    shared.view[: len(ciphertext)] = ciphertext
    assert pair.server.endpoint.receive_from(shared, len(ciphertext), 1.0) == []
    assert pair.server.received[stream] == b"hello"
    assert pair.server.endpoint.heard_at == 1.0


def test_a_tunnel_inside_a_tunnel_decrypts_within_the_outer_sink() -> None:
    outer, inner = joined(), joined()
    carrier = outer.open()
    stream = inner.open()
    inner.client.send(stream, b"z" * 30_000)
    ciphertext = inner.client.endpoint.data_to_send()

    def sink(view: memoryview) -> int:
        inner.server.receive(bytes(view), 0.0)
        return len(view)

    nested = outer.client.engine.connect(((b":method", b"CONNECT"), (b":authority", b"10.0.0.9:80")), sink)
    outer.pump()
    outer.server.engine.accept(nested, (), outer.server.sink(nested))
    sent = 0
    while sent < len(ciphertext):
        sent += outer.server.send(nested, ciphertext[sent:])
        outer.server.send(carrier, b"other")
        outer.pump()
    assert inner.server.received[stream] == b"z" * 30_000
    assert hbone.endpoint.PLAINTEXT in hbone.endpoint._buffers


def test_a_peer_that_is_not_authorized_is_refused_before_http() -> None:
    pair = joined(server_authorize=lambda peer: False)
    assert isinstance(pair.server.failure, PeerIdentityError)
    assert "shop/sa/web" in str(pair.server.failure)
    assert not pair.server.endpoint.established
    assert pair.server.events == []
    assert isinstance(pair.client.failure, TlsError)  # the alert


def test_a_client_that_finds_somebody_else_sends_no_request() -> None:
    expected = ca().id("shop", "payments")
    pair = joined(client_authorize=lambda peer: peer == expected)
    assert isinstance(pair.client.failure, PeerIdentityError)
    assert not pair.client.endpoint.established
    assert not any(isinstance(event, ConnectReceived) for event in pair.server.events)


def test_another_root_is_refused_by_both_ends() -> None:
    pair = EndpointPair(TestCa("other.domain").identity("shop", "web"), who("orders"))
    pair.pump()
    assert isinstance(pair.client.failure, TlsError)
    assert pair.server.failure is not None
    assert not pair.client.endpoint.established
    assert not pair.server.endpoint.established


def test_the_handshake_has_a_deadline() -> None:
    pair = EndpointPair(who("web"), who("orders"), server_config=ConnectionConfig(handshake_timeout=3.0))
    endpoint = pair.server.endpoint
    assert endpoint.next_deadline() == 3.0
    assert endpoint.on_time(2.9) == []
    (ended,) = endpoint.on_time(3.0)
    assert isinstance(ended, TransportEnded)
    assert not ended.clean
    assert "3 s" in ended.reason
    assert endpoint.next_deadline() is None


def test_after_the_handshake_time_is_the_engines() -> None:
    pair = joined()
    pair.advance(35.0)
    assert any(isinstance(event, PingAcknowledged) for event in pair.client.events)
    assert not any(isinstance(event, TransportEnded) for event in pair.client.events)


def test_close_says_goodbye_and_the_peer_ends_cleanly() -> None:
    pair = joined()
    pair.client.endpoint.close()
    pair.pump()
    assert any(isinstance(event, TransportEnded) and event.clean for event in pair.server.events)
    assert pair.server.endpoint.receive_eof(0.0) == []


def test_close_notify_with_open_streams_is_not_clean() -> None:
    pair = joined()
    pair.open()
    pair.client.endpoint.close()
    pair.pump()
    assert any(isinstance(event, TransportEnded) and not event.clean for event in pair.server.events)


def test_the_transports_end_without_close_notify_is_a_truncation() -> None:
    pair = joined()
    pair.open()
    (ended,) = pair.server.endpoint.receive_eof(0.0)
    assert isinstance(ended, TransportEnded)
    assert not ended.clean
    assert "close_notify" in ended.reason
    assert pair.server.endpoint.receive_eof(0.0) == []


def test_the_transports_end_in_the_handshake_says_so() -> None:
    pair = EndpointPair(who("web"), who("orders"))
    (ended,) = pair.client.endpoint.receive_eof(0.0)
    assert isinstance(ended, TransportEnded)
    assert "handshake" in ended.reason


def test_garbage_is_a_tls_error_and_leaves_an_alert() -> None:
    pair = EndpointPair(who("web"), who("orders"))
    pair.server.receive(b"GET / HTTP/1.1\r\n\r\n", 0.0)
    assert isinstance(pair.server.failure, TlsError)
    assert pair.server.endpoint.receive_data(b"more", 0.0) == []
    pair.server.endpoint.close()
    pair.server.endpoint.data_to_send()


def test_http2_broken_inside_tls_leaves_a_goaway() -> None:
    pair = joined()
    pair.client.endpoint.tls.write(b"\x00\x00\x08\x06\x00\x00\x00\x00\x01" + bytes(8))  # PING on a stream
    pair.pump()
    assert isinstance(pair.server.failure, RemoteProtocolError)
    assert pair.server.failure.code is ErrorCode.PROTOCOL_ERROR
    assert any(
        isinstance(event, TransportEnded) or type(event).__name__ == "PeerDraining" for event in pair.client.events
    )


def test_a_damaged_record_ends_the_connection() -> None:
    pair = joined()
    stream = pair.open()
    pair.client.send(stream, b"hello")
    damaged = bytearray(pair.client.endpoint.data_to_send())
    damaged[-1] ^= 1
    pair.server.receive(bytes(damaged), 0.0)
    assert isinstance(pair.server.failure, TlsError)
    assert pair.server.received[stream] == b""


def test_windows_go_back_to_the_budget_when_the_connection_ends() -> None:
    budget = WindowBudget()
    pair = joined(budget=budget)
    for _ in range(4):
        stream = pair.open()
        for _ in range(60):
            pair.client.send(stream, b"x" * 60_000)
            pair.pump()
    pair.server.endpoint.receive_eof(0.0)
    pair.client.endpoint.receive_eof(0.0)
    assert budget.used == 0


def test_a_reset_arrives_as_an_event() -> None:
    pair = joined()
    stream = pair.open()
    pair.server.engine.reset(stream, ErrorCode.CONNECT_ERROR)
    pair.pump()
    assert StreamReset(stream_id=stream, code=ErrorCode.CONNECT_ERROR) in pair.client.events
