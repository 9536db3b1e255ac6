"""gRPC in memory: two ends joined without a transport, and one end against frames made by hand."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from hpack.hpack import Encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from hbone.config import KIB, MIB
from hbone.engine import frames
from hbone.engine.flow import WindowBudget
from hbone.engine.frames import FrameType
from hbone.errors import ConnectionLost, ErrorCode, LocalProtocolError, RemoteProtocolError
from hbone.grpc import Call, ClientConnection, GrpcConfig, GrpcError, GrpcUnavailable, ServerConnection, StatusCode
from hbone.grpc.guard import FrameGuard
from hbone.grpc.metadata import decode_metadata, decode_timeout, encode_metadata, encode_timeout
from hbone.grpc.status import decode_message, encode_message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

METHOD = "/test.Service/Method"
REQUEST = [
    (b":method", b"POST"),
    (b":scheme", b"https"),
    (b":path", METHOD.encode()),
    (b":authority", b"localhost"),
    (b"content-type", b"application/grpc"),
    (b"te", b"trailers"),
]


class Pair:
    """A client and a server; `move` carries bytes until both are silent."""

    def __init__(
        self,
        client: GrpcConfig | None = None,
        server: GrpcConfig | None = None,
        budget: WindowBudget | None = None,
        chunk: int = 1 << 20,
    ) -> None:
        self.now = 1000.0
        self.client = ClientConnection(config=client, peer="istiod:15012")
        self.server = ServerConnection(config=server, budget=budget)
        self.received: list[Call] = []
        self.chunk = chunk
        self.client.start(self.now)
        self.server.start(self.now)
        self.move()

    def move(self) -> None:
        while self.turn():
            pass

    def turn(self) -> int:
        """Carry what each has now; the number of bytes."""
        moved = 0
        for sender, receiver in ((self.client, self.server), (self.server, self.client)):
            data = sender.data_to_send()
            moved += len(data)
            for start in range(0, len(data), self.chunk):
                self.received += receiver.receive_data(data[start : start + self.chunk], self.now)
        return moved

    def call(self, **options: Any) -> tuple[Call, Call]:
        ours = self.client.start_call(METHOD, **options)
        self.move()
        return ours, self.received.pop()


def wire(message: bytes, compressed: int = 0) -> bytes:
    return struct.pack(">BI", compressed, len(message)) + message


# Calls


def test_a_unary_call_has_one_message_each_way() -> None:
    pair = Pair()
    ours, theirs = pair.call(metadata=[("authorization", "Bearer x"), ("k-bin", b"\x00\xff")])
    assert theirs.path == METHOD
    assert theirs.metadata[-2:] == (("authorization", "Bearer x"), ("k-bin", b"\x00\xff"))
    assert theirs.authority == "localhost"
    pair.client.send_message(ours, b"question")
    pair.client.end(ours)
    pair.move()
    assert theirs.receive() == b"question"
    assert theirs.receive() is None
    assert theirs.ended
    pair.server.send_message(theirs, b"answer")
    pair.server.finish(theirs, trailers=[("cost", "3")])
    pair.move()
    assert ours.receive() == b"answer"
    assert ours.receive() is None
    assert ours.closed
    assert ours.trailers == (("cost", "3"),)
    assert not pair.client.calls
    assert not pair.server.calls


def test_a_failure_before_any_message_is_one_headers_frame() -> None:
    pair = Pair()
    ours, theirs = pair.call()
    pair.server.finish(theirs, StatusCode.PERMISSION_DENIED, "no: ü 100%\n")
    data = pair.server.data_to_send()
    kinds = [kind for kind, _, _, _ in split(data)]
    assert kinds.count(FrameType.HEADERS) == 1
    pair.client.receive_data(data, pair.now)
    with pytest.raises(GrpcError) as caught:
        ours.receive()
    assert caught.value.code == StatusCode.PERMISSION_DENIED
    assert caught.value.message == "no: ü 100%\n"


def test_messages_before_a_failure_are_given_first() -> None:
    pair = Pair()
    ours, theirs = pair.call()
    pair.server.send_message(theirs, b"one")
    pair.server.finish(theirs, StatusCode.ABORTED, "gone", trailers=[("k", "v")])
    pair.move()
    assert ours.receive() == b"one"
    with pytest.raises(GrpcError, match="ABORTED: gone") as caught:
        ours.receive()
    assert caught.value.trailers == (("k", "v"),)


@pytest.mark.parametrize("code", [code for code in StatusCode if code is not StatusCode.OK])
def test_every_status_reaches_the_client(code: StatusCode) -> None:
    pair = Pair()
    ours, theirs = pair.call()
    pair.server.finish(theirs, code)
    pair.move()
    with pytest.raises(GrpcError) as caught:
        ours.receive()
    assert caught.value.code is code


def test_a_stream_goes_on_both_ways_after_the_clients_end() -> None:
    pair = Pair()
    ours, theirs = pair.call()
    pair.client.send_message(ours, b"a")
    pair.client.end(ours)
    pair.move()
    assert theirs.receive() == b"a"
    for number in range(3):
        pair.server.send_message(theirs, b"%d" % number)
        pair.move()
        assert ours.receive() == b"%d" % number
    assert ours.receive() is None
    assert not ours.ended


def test_a_server_may_finish_while_the_client_still_sends() -> None:
    pair = Pair()
    ours, theirs = pair.call()
    pair.client.send_message(ours, b"x" * MIB)
    pair.turn()
    pair.server.finish(theirs, StatusCode.UNAUTHENTICATED, "who are you")
    pair.move()
    with pytest.raises(GrpcError, match="UNAUTHENTICATED"):
        ours.receive()
    assert not pair.client.calls
    assert not pair.server.calls
    ours, theirs = pair.call()  # the connection is as good as before
    pair.server.finish(theirs)
    pair.move()
    assert ours.closed


def test_a_cancelled_call_is_over_at_the_other_end() -> None:
    pair = Pair()
    ours, theirs = pair.call()
    pair.client.cancel(ours)
    pair.move()
    assert theirs.closed
    with pytest.raises(GrpcError, match="CANCELLED"):
        theirs.receive()
    with pytest.raises(GrpcError, match="CANCELLED"):
        pair.server.send_message(theirs, b"late")
    pair.server.finish(theirs)  # without effect


def test_a_deadline_travels_with_the_call() -> None:
    pair = Pair()
    _, theirs = pair.call(timeout=2.5)
    assert theirs.timeout == pytest.approx(2.5)
    assert pair.call()[1].timeout is None


@given(st.floats(0, 1e9))
@settings(max_examples=200)
def test_a_timeout_is_never_shortened(seconds: float) -> None:
    value = encode_timeout(seconds)
    assert len(value) <= 9
    assert decode_timeout(value) >= seconds * (1 - 1e-9)
    assert decode_timeout(value) <= seconds + max(seconds * 1e-3, 3601 if seconds > 6e9 else 1e-6)


@pytest.mark.parametrize("value", [b"", b"5", b"S", b"123456789S", b"-1S", b"1.5S", b"1s"])
def test_a_malformed_timeout_fails_the_call(value: bytes) -> None:
    server = StockPeer()
    answer = server.request([*REQUEST, (b"grpc-timeout", value)])
    assert answer[b"grpc-status"] == b"3"


# Message framing


@given(
    st.lists(st.binary(max_size=200), min_size=1, max_size=5),
    st.integers(1, 40),
)
@settings(max_examples=100, deadline=None)
def test_messages_may_be_cut_anywhere(messages: list[bytes], chunk: int) -> None:
    pair = Pair(chunk=chunk)
    ours, theirs = pair.call()
    for message in messages:
        pair.client.send_message(ours, message)
    pair.client.end(ours)
    pair.move()
    assert list(iter(theirs.receive, None)) == messages
    assert theirs.ended


def test_data_frames_of_one_byte_make_messages() -> None:
    server = StockPeer()
    server.open(REQUEST)
    server.send_each_byte(wire(b"abc") + wire(b"") + wire(b"d"))
    call = server.calls[0]
    assert [call.receive(), call.receive(), call.receive(), call.receive()] == [b"abc", b"", b"d", None]


def test_a_message_in_parts_arrives_whole() -> None:
    pair = Pair()
    parts = [bytes([number % 251]) * size for number, size in enumerate([0, 3, 40_000, 0, 1, 16_384, 200_000, 0])]
    ours, theirs = pair.call()
    pair.client.send_message(ours, parts)
    pair.client.send_message(ours, [b"a", b"", b"bc"])
    pair.client.send_message(ours, [])
    received: list[bytes] = []
    while len(received) < 3:
        message = theirs.receive(MIB)
        if message is None:
            pair.move()
        else:
            received.append(message)
    assert received == [b"".join(parts), b"abc", b""]


@pytest.mark.parametrize("size", [16 * KIB, 64 * KIB, 20 * MIB])
def test_large_messages_pass_both_ways(size: int) -> None:
    pair = Pair()
    message = bytes(range(256)) * (size // 256)
    ours, theirs = pair.call()
    assert theirs.receive(64 * MIB) is None
    pair.client.send_message(ours, message)
    pair.client.end(ours)
    pair.move()
    assert theirs.receive(64 * MIB) == message
    assert ours.receive(64 * MIB) is None
    pair.server.send_message(theirs, message)
    pair.server.finish(theirs)
    pair.move()
    answer = ours.receive(64 * MIB)
    while answer is None:  # its budget is taken once its length is known
        pair.move()
        answer = ours.receive(64 * MIB)
    assert answer == message


def test_a_call_that_nobody_reads_keeps_one_window_and_stalls_alone() -> None:
    pair = Pair()
    calls = [pair.call() for _ in range(20)]
    for ours, _ in calls:
        pair.client.send_message(ours, b"x" * (10 * MIB))
    pair.move()
    for ours, theirs in calls:
        assert len(theirs._buffer) <= 65_535
        assert ours.unsent > 9 * MIB
    ours, theirs = pair.call()
    theirs.receive()
    pair.client.send_message(ours, b"not stalled" * 100_000)
    pair.move()
    assert len(theirs.receive() or b"") == 1_100_000


def test_a_message_over_the_limit_is_refused_by_its_length_alone() -> None:
    pair = Pair()
    ours, theirs = pair.call()
    theirs.receive(1000)
    pair.client.send_message(ours, b"x" * 1001)
    pair.move()
    with pytest.raises(GrpcError, match=r"RESOURCE_EXHAUSTED: a message of 1001 bytes; the limit is 1000 bytes"):
        theirs.receive(1000)
    server = StockPeer()
    server.open(REQUEST)
    server.data(struct.pack(">BI", 0, 2**32 - 1))
    with pytest.raises(GrpcError, match="4294967295"):
        server.calls[0].receive()


def test_large_messages_share_a_budget() -> None:
    budget = WindowBudget(3 * MIB)
    pair = Pair(budget=budget)
    first, second = pair.call(), pair.call()
    for ours, theirs in (first, second):
        theirs.receive(4 * MIB)
        pair.client.send_message(ours, b"x" * (2 * MIB))
    pair.turn()
    pair.turn()
    assert first[1].receive(4 * MIB) is None
    with pytest.raises(GrpcError, match="RESOURCE_EXHAUSTED: too many"):
        second[1].receive(4 * MIB)
    pair.server.finish(second[1], StatusCode.RESOURCE_EXHAUSTED)
    pair.move()
    assert len(first[1].receive(4 * MIB) or b"") == 2 * MIB
    assert budget.used == 0


def test_a_large_message_that_will_not_come_takes_nothing_of_the_budget() -> None:
    budget = WindowBudget(3 * MIB)
    client = ClientConnection(budget=budget)
    client, peer, call = client_of_stock_server(client)
    peer.send_headers(1, [(b":status", b"200"), (b"content-type", b"application/grpc")])
    peer.send_data(1, struct.pack(">BI", 0, 2 * MIB))
    peer.send_headers(1, [(b"grpc-status", b"0")], end_stream=True)
    client.receive_data(peer.data_to_send(), 1000)
    with pytest.raises(GrpcError, match="ended the call within a message"):
        call.receive()
    assert budget.used == 0


@pytest.mark.parametrize("how", ["cancel", "finish", "lost"])
def test_the_budget_is_given_back_when_a_call_ends_early(how: str) -> None:
    budget = WindowBudget(3 * MIB)
    pair = Pair(budget=budget)
    ours, theirs = pair.call()
    theirs.receive()
    pair.client.send_message(ours, b"x" * (2 * MIB))
    pair.turn()
    theirs.receive()
    assert budget.used == 2 * MIB
    if how == "cancel":
        pair.client.cancel(ours)
    elif how == "finish":
        pair.server.finish(theirs)
    else:
        pair.server.connection_lost(ConnectionLost("cable"))
    pair.move()
    assert budget.used == 0


def test_a_compressed_message_is_refused() -> None:
    server = StockPeer()
    server.open(REQUEST)
    server.data(wire(b"abc", compressed=1))
    with pytest.raises(GrpcError, match="UNIMPLEMENTED: a compressed message"):
        server.calls[0].receive()
    assert StockPeer().request([*REQUEST, (b"grpc-encoding", b"gzip")])[b"grpc-status"] == b"12"


def test_an_end_within_a_message_is_an_error() -> None:
    server = StockPeer()
    server.open(REQUEST)
    server.data(wire(b"abc")[:-1], end_stream=True)
    with pytest.raises(GrpcError, match="INTERNAL: the peer ended the call within a message"):
        server.calls[0].receive()


def test_calls_share_the_way_out_fairly() -> None:
    pair = Pair()
    bulk, small = pair.call(), pair.call()
    bulk[1].receive(64 * MIB)
    pair.client.send_message(bulk[0], b"x" * (8 * MIB))
    pair.turn()
    small[1].receive()
    pair.client.send_message(small[0], b"quick")
    pair.turn()
    assert small[1].receive() == b"quick"
    assert bulk[0].unsent > MIB


# Metadata


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("authorization", "Bearer token\n"),
        ("authorization", " Bearer"),
        ("a", "b\x00"),
        ("a", "ü"),
        ("A", "b"),
        ("", "b"),
        ("a b", "c"),
        (":path", "/x"),
        ("grpc-status", "0"),
        ("te", "trailers"),
        ("content-type", "x"),
        ("a-bin", "text"),
        ("a", b"bytes"),
    ],
)
def test_metadata_that_a_header_cannot_carry_is_refused_before_it_is_sent(name: str, value: str | bytes) -> None:
    pair = Pair()
    with pytest.raises(LocalProtocolError) as caught:
        pair.client.start_call(METHOD, [(name, value)])
    assert "Bearer token" not in str(caught.value)
    assert not pair.client.data_to_send()
    assert not pair.client.calls


@pytest.mark.parametrize("field", [(b"a", b"\xff"), (b"a", b"\x01"), (b"a-bin", b"!!!"), (b"a-bin", b"AAAAA")])
def test_metadata_that_is_malformed_fails_the_call(field: tuple[bytes, bytes]) -> None:
    with pytest.raises(GrpcError, match="INVALID_ARGUMENT"):
        decode_metadata([field])


@given(st.binary(max_size=50))
def test_binary_metadata_survives(value: bytes) -> None:
    assert decode_metadata(encode_metadata([("a-bin", value)])) == (("a-bin", value),)
    padded = [(b"a-bin", encode_metadata([("a-bin", value)])[0][1] + b"=" * (-len(value) % 3))]
    assert decode_metadata(padded) == (("a-bin", value),)


@given(st.text(max_size=100))
def test_status_messages_survive(text: str) -> None:
    encoded = encode_message(text)
    assert all(0x20 <= byte <= 0x7E for byte in encoded)
    assert decode_message(encoded) == text.encode(errors="replace").decode()


@pytest.mark.parametrize(("value", "text"), [(b"100%", "100%"), (b"%zz%20", "%zz "), (b"%ff", "\ufffd")])
def test_a_badly_encoded_status_message_is_shown_as_it_came(value: bytes, text: str) -> None:
    assert decode_message(value) == text


# Requests that are not gRPC, against a stock client


class StockPeer:
    """Our server, and a client that is hyper-h2 as it comes, or bytes made by hand."""

    def __init__(self, config: GrpcConfig | None = None, *, began: bool = True) -> None:
        self.now = 1000.0
        self.server = ServerConnection(config=config)
        self.server.start(self.now)
        self.calls: list[Call] = []
        self.h2 = H2Connection(H2Configuration(client_side=True, header_encoding=None))
        self.events: list[Any] = []
        if began:
            self.h2.initiate_connection()
            self.move()

    def move(self) -> None:
        while True:
            data = self.h2.data_to_send()
            self.calls += self.server.receive_data(data, self.now)
            answer = self.server.data_to_send()
            if not data and not answer:
                return
            self.events += self.h2.receive_data(answer)

    def open(self, headers: list[tuple[bytes, bytes]], *, end_stream: bool = False) -> int:
        stream_id = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream_id, headers, end_stream=end_stream)
        self.move()
        return stream_id

    def data(self, data: bytes, *, end_stream: bool = False) -> None:
        self.h2.send_data(self.h2.highest_outbound_stream_id, data, end_stream=end_stream)
        self.move()

    def send_each_byte(self, data: bytes) -> None:
        for number, byte in enumerate(data, 1):
            self.data(bytes([byte]), end_stream=number == len(data))

    def request(self, headers: list[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
        """All header fields of the answer to a request without a body."""
        stream_id = self.open(headers, end_stream=True)
        fields: dict[bytes, bytes] = {}
        for event in self.events:
            if getattr(event, "stream_id", None) == stream_id and getattr(event, "headers", None):
                fields.update(dict(event.headers))
        return fields

    def raw(self, data: bytes) -> None:
        self.calls += self.server.receive_data(data, self.now)
        self.server.data_to_send()


def with_field(name: bytes, value: bytes) -> list[tuple[bytes, bytes]]:
    return [(key, value if key == name else old) for key, old in REQUEST]


@pytest.mark.parametrize("method", [b"GET", b"PUT", b"OPTIONS"])
def test_another_method_gets_405(method: bytes) -> None:
    peer = StockPeer()
    assert peer.request(with_field(b":method", method))[b":status"] == b"405"
    assert not peer.calls


def test_a_request_that_is_rejected_and_reset_at_once_costs_only_itself() -> None:
    peer = begun()
    encoder = Encoder()
    for number, fields in enumerate([with_field(b":method", b"GET"), [*REQUEST, (b"grpc-timeout", b"x")], REQUEST]):
        stream_id = 2 * number + 1
        block = encoder.encode(fields)
        start = frames.header_block(stream_id, block, end_stream=False, max_frame=16384)
        peer.raw(start + frames.frame(0, 0, stream_id, wire(b"x" * 16000)) + frames.rst_stream(stream_id, 8))
    assert not peer.server.closed
    assert not peer.server.calls


def test_connect_gets_405() -> None:
    peer = StockPeer()
    assert peer.request([(b":method", b"CONNECT"), (b":authority", b"10.0.0.1:80")])[b":status"] == b"405"
    assert not peer.calls
    assert not peer.server.calls


@pytest.mark.parametrize("kind", [b"text/html", b"application/grpc-web", b"application/json", b""])
def test_another_content_type_gets_415(kind: bytes) -> None:
    assert StockPeer().request(with_field(b"content-type", kind))[b":status"] == b"415"


@pytest.mark.parametrize("kind", [b"application/grpc", b"application/grpc+proto", b"application/grpc; x=y"])
def test_grpc_content_types_are_accepted(kind: bytes) -> None:
    peer = StockPeer()
    peer.open(with_field(b"content-type", kind))
    assert len(peer.calls) == 1


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ([(b":status", b"404")], StatusCode.UNIMPLEMENTED),
        ([(b":status", b"503")], StatusCode.UNAVAILABLE),
        ([(b":status", b"418")], StatusCode.UNKNOWN),
        ([(b":status", b"fine")], StatusCode.UNKNOWN),
        ([(b":status", b"\xff")], StatusCode.UNKNOWN),
        ([(b":status", b"2000")], StatusCode.UNKNOWN),
        ([(b":status", b"200"), (b"content-type", b"text/html")], StatusCode.UNKNOWN),
        (
            [(b":status", b"200"), (b"content-type", b"application/grpc"), (b"grpc-encoding", b"gzip")],
            StatusCode.INTERNAL,
        ),
        ([(b":status", b"200"), (b"content-type", b"application/grpc"), (b"a-bin", b"!")], StatusCode.INTERNAL),
        ([(b":status", b"200"), (b"content-type", b"application/grpc"), (b"grpc-status", b"77")], StatusCode.UNKNOWN),
    ],
)
@pytest.mark.parametrize("end_stream", [True, False])
def test_an_answer_that_is_not_grpc_becomes_a_status(
    answer: list[tuple[bytes, bytes]], code: StatusCode, end_stream: bool
) -> None:
    client, peer, call = client_of_stock_server()
    peer.send_headers(1, answer, end_stream=end_stream)
    client.receive_data(peer.data_to_send(), 1000)
    if not end_stream and (b"grpc-status", b"77") in answer:
        peer.send_data(1, b"", end_stream=True)
        client.receive_data(peer.data_to_send(), 1000)
    with pytest.raises(GrpcError) as caught:
        call.receive()
    assert caught.value.code is code
    assert not client.calls


def test_an_end_without_status_is_unknown() -> None:
    client, peer, call = client_of_stock_server()
    peer.send_headers(1, [(b":status", b"200"), (b"content-type", b"application/grpc")])
    peer.send_data(1, wire(b"answer"), end_stream=True)
    client.receive_data(peer.data_to_send(), 1000)
    assert call.receive() == b"answer"
    with pytest.raises(GrpcError, match="UNKNOWN: the server ended the call without a status"):
        call.receive()


@pytest.mark.parametrize(
    ("reset", "code"),
    [
        (ErrorCode.CANCEL, StatusCode.CANCELLED),
        (ErrorCode.REFUSED_STREAM, StatusCode.UNAVAILABLE),
        (ErrorCode.ENHANCE_YOUR_CALM, StatusCode.RESOURCE_EXHAUSTED),
        (ErrorCode.INADEQUATE_SECURITY, StatusCode.PERMISSION_DENIED),
        (ErrorCode.PROTOCOL_ERROR, StatusCode.INTERNAL),
        (ErrorCode.NO_ERROR, StatusCode.INTERNAL),
    ],
)
def test_a_reset_becomes_a_status(reset: ErrorCode, code: StatusCode) -> None:
    client, peer, call = client_of_stock_server()
    peer.reset_stream(1, int(reset))
    client.receive_data(peer.data_to_send(), 1000)
    with pytest.raises(GrpcError) as caught:
        call.receive()
    assert caught.value.code is code


def client_of_stock_server(client: ClientConnection | None = None) -> tuple[ClientConnection, H2Connection, Call]:
    client = client or ClientConnection()
    client.start(1000)
    peer = H2Connection(H2Configuration(client_side=False, header_encoding=None))
    peer.initiate_connection()
    call = client.start_call(METHOD)
    client.send_message(call, b"question")
    peer.receive_data(client.data_to_send())
    return client, peer, call


# Drain


def test_a_drained_connection_finishes_its_calls_and_refuses_new_ones() -> None:
    pair = Pair()
    ours, theirs = pair.call()
    pair.server.drain(pair.now)
    late = pair.client.start_call(METHOD)  # crosses the GOAWAY
    pair.turn()
    assert pair.received.pop() is not theirs  # the first GOAWAY still lets it in
    pair.move()
    assert pair.client.draining
    with pytest.raises(GrpcUnavailable, match="istiod:15012 is closing"):
        pair.client.start_call(METHOD)
    for call in (theirs, *pair.server.calls.values()):
        pair.server.send_message(call, b"x" * 200_000)
    ours.receive()
    late.receive()
    pair.move()
    assert len(ours.receive() or b"") == 200_000
    assert len(late.receive() or b"") == 200_000
    assert not pair.server.closed
    for call in list(pair.server.calls.values()):
        pair.server.finish(call)
    pair.move()
    assert ours.closed
    assert ours.failure is None
    assert (pair.server.closed, pair.client.closed) == (True, True)


def test_a_call_after_the_last_goaway_is_refused_alone() -> None:
    peer = StockPeer()
    peer.open(REQUEST)
    peer.server.drain(peer.now)
    peer.now += 1
    peer.server.on_time(peer.now)  # the PING was never answered
    peer.server.data_to_send()
    late = frames.header_block(3, Encoder().encode(REQUEST), end_stream=True, max_frame=16384)
    peer.server.receive_data(late, peer.now)
    assert (FrameType.RST_STREAM, 0, 3, struct.pack(">I", ErrorCode.REFUSED_STREAM)) in split(
        peer.server.data_to_send()
    )
    assert len(peer.calls) == 1
    assert not peer.server.closed


def test_calls_that_outlive_the_grace_end_with_unavailable() -> None:
    pair = Pair(server=GrpcConfig(drain_grace=10))
    ours, theirs = pair.call()
    pair.server.send_message(theirs, b"x" * MIB)  # never taken
    pair.server.drain(pair.now)
    pair.move()
    pair.now += 10
    deadline = pair.server.next_deadline()
    assert deadline is not None
    assert deadline <= pair.now
    pair.server.on_time(pair.now)
    pair.move()
    assert theirs.closed
    assert pair.server.closed
    with pytest.raises(GrpcError, match=r"UNAVAILABLE: .*transport is closing"):
        ours.receive()


def test_a_goaway_fails_only_calls_above_it() -> None:
    client, peer, first = client_of_stock_server()
    second = client.start_call(METHOD)
    peer.close_connection(last_stream_id=1)
    client.receive_data(peer.data_to_send(), 1000)
    with pytest.raises(GrpcUnavailable, match="received prior goaway") as caught:
        second.receive()
    assert not caught.value.processed
    assert not first.closed


def test_an_idle_drained_connection_is_closed_once_the_client_knows() -> None:
    pair = Pair()
    pair.server.drain(pair.now)
    pair.turn()
    assert not pair.server.closed
    pair.move()
    assert pair.server.closed


# Time


def test_a_silent_client_gets_a_ping_and_is_then_cut() -> None:
    pair = Pair()
    ours, theirs = pair.call()
    pair.client.data_to_send()
    assert pair.server.next_deadline() == pair.now + 30
    pair.now += 30
    pair.server.on_time(pair.now)
    assert FrameType.PING in [kind for kind, *_ in split(pair.server.data_to_send())]
    pair.now += 10
    with pytest.raises(ConnectionLost, match="10 seconds"):
        pair.server.on_time(pair.now)
    assert theirs.closed
    assert not ours.closed


def test_an_answered_ping_keeps_the_connection() -> None:
    pair = Pair()
    pair.call()
    for _ in range(5):
        pair.now += 30
        pair.server.on_time(pair.now)
        pair.client.on_time(pair.now)
        pair.move()
    assert not pair.server.closed
    assert not pair.client.closed


def test_a_client_without_calls_sends_no_ping() -> None:
    pair = Pair()
    assert pair.client.next_deadline() is None
    ours, _ = pair.call()
    assert pair.client.next_deadline() == pair.now + 30
    pair.client.cancel(ours)
    assert pair.client.next_deadline() is None


@pytest.mark.parametrize(
    ("sent", "after", "words"),
    [
        (b"", 5, "no SETTINGS"),
        (frames.PREFACE, 5, "no SETTINGS"),
        (frames.PREFACE + frames.settings(), 10, "did not acknowledge"),
        (frames.PREFACE + frames.settings() + frames.frame(1, 0, 1, b"\x82"), 5, "header block"),
    ],
)
def test_a_client_that_says_too_little_is_cut(sent: bytes, after: float, words: str) -> None:
    peer = StockPeer(began=False)
    peer.raw(sent)
    peer.server.on_time(peer.now + after - 0.001)
    assert peer.server.next_deadline() == peer.now + after
    with pytest.raises(RemoteProtocolError, match=words):
        peer.server.on_time(peer.now + after)
    assert peer.server.closed
    assert FrameType.GOAWAY in [kind for kind, *_ in split(peer.server.data_to_send())]


# Hostile frames


def split(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """Frames of `data`: type, flags, stream, payload."""
    found = []
    position = 0
    while position < len(data):
        word, flags, stream_id = frames.HEADER.unpack_from(data, position)
        end = position + 9 + (word >> 8)
        found.append((word & 0xFF, flags, stream_id, data[position + 9 : end]))
        position = end
    return found


def begun(config: GrpcConfig | None = None) -> StockPeer:
    peer = StockPeer(config, began=False)
    peer.raw(frames.PREFACE + frames.settings() + frames.settings(ack=True))
    return peer


def request(stream_id: int, encoder: Encoder | None = None, *, end_stream: bool = False) -> bytes:
    block = (encoder or Encoder()).encode(REQUEST)
    return frames.header_block(stream_id, block, end_stream=end_stream, max_frame=16384)


FLOODS: dict[str, tuple[Callable[[int], bytes], int]] = {
    "settings": (lambda _: frames.settings(), 12),
    "settings acknowledgements": (lambda _: frames.settings(ack=True), 12),
    "pings": (lambda n: frames.ping(struct.pack(">Q", n)), 110),
    "ping answers": (lambda n: frames.ping(struct.pack(">Q", n), ack=True), 110),
    "priority": (lambda n: frames.frame(FrameType.PRIORITY, 0, 2 * n + 1, bytes(5)), 110),
    "unknown types": (lambda n: frames.frame(0x77, 0, n, b"x"), 110),
    "window updates": (lambda _: frames.window_update(0, 1), 1100),
    "goaways": (lambda _: frames.goaway(0, 0), 12),
    "rapid resets": (lambda n: request(2 * n + 1) + frames.rst_stream(2 * n + 1, 8), 120),
    "resets of nothing": (lambda _: request(1) + frames.rst_stream(1, 8) if _ == 0 else frames.rst_stream(1, 8), 1100),
    "streams beyond the limit": (lambda n: request(2 * n + 1), 210),
    "empty data": (lambda n: (request(1) if n == 0 else b"") + frames.frame(0, 0, 1), 110),
    "padded data": (lambda n: (request(1) if n == 0 else b"") + frames.frame(0, 8, 1, b"\x03\x00\x00\x00"), 110),
    "window overflows": (lambda n: request(2 * n + 1) + frames.window_update(2 * n + 1, 2**31 - 1), 20),
    "data after the end": (lambda n: request(2 * n + 1, end_stream=True) + frames.frame(0, 0, 2 * n + 1, b"x"), 20),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_ends_the_connection_soon(name: str) -> None:
    make, most = FLOODS[name]
    peer = begun()

    def flood() -> None:
        for number in range(most):
            peer.raw(make(number))

    with pytest.raises(RemoteProtocolError):
        flood()
    assert peer.server.closed
    assert not peer.server.calls


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_in_one_piece_ends_the_connection_with_little_kept(name: str) -> None:
    make, most = FLOODS[name]
    peer = begun()
    with pytest.raises(RemoteProtocolError):
        peer.server.receive_data(b"".join(make(n) for n in range(most)), peer.now)
    assert len(peer.server.data_to_send()) < 64 * KIB


def test_what_a_busy_client_does_is_no_flood() -> None:
    pair = Pair()
    for _ in range(2000):
        ours, theirs = pair.call()
        theirs.receive()
        pair.client.send_message(ours, b"x")
        pair.client.end(ours)
        pair.move()
        assert theirs.receive() == b"x"
        pair.server.send_message(theirs, b"y")
        pair.server.finish(theirs)
        pair.move()
        assert ours.receive() == b"y"
    assert len(pair.server._http2.streams) < 200


def test_a_client_that_gives_up_a_call_now_and_then_is_no_flood() -> None:
    pair = Pair()
    for _ in range(500):
        ours, _ = pair.call()
        pair.client.cancel(ours)
        pair.move()
        pair.now += 0.1
    assert not pair.server.closed


def test_a_stream_over_the_limit_is_refused_alone() -> None:
    peer = begun(GrpcConfig(max_concurrent_streams=2))
    encoder = Encoder()
    for number in range(4):
        peer.server.receive_data(request(2 * number + 1, encoder), peer.now)
    resets = [(stream, data) for kind, _, stream, data in split(peer.server.data_to_send()) if kind == 3]
    assert resets == [(5, struct.pack(">I", 7)), (7, struct.pack(">I", 7))]
    assert len(peer.server.calls) == 2
    assert not peer.server.closed


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (frames.HEADER.pack((2**24 - 1) << 8, 0, 1), ErrorCode.FRAME_SIZE_ERROR, "16777215 bytes"),
        (frames.HEADER.pack(16385 << 8, 0, 1), ErrorCode.FRAME_SIZE_ERROR, "16385 bytes"),
        (frames.frame(6, 0, 0, b"x" * 7), ErrorCode.FRAME_SIZE_ERROR, "PING"),
        (frames.frame(4, 0, 0, b"x" * 7), ErrorCode.FRAME_SIZE_ERROR, "SETTINGS"),
        (frames.frame(4, 1, 0, b"x" * 6), ErrorCode.FRAME_SIZE_ERROR, "SETTINGS"),
        (frames.settings((i, 0) for i in range(100, 133)), ErrorCode.ENHANCE_YOUR_CALM, "33 entries"),
        (frames.frame(4, 0, 1), ErrorCode.PROTOCOL_ERROR, "SETTINGS frame on stream 1"),
        (frames.frame(0, 0, 0, b"x"), ErrorCode.PROTOCOL_ERROR, "DATA frame on stream 0"),
        (frames.frame(1, 4, 0, b"\x82"), ErrorCode.PROTOCOL_ERROR, "HEADERS frame on stream 0"),
        (frames.frame(5, 4, 1, bytes(8)), ErrorCode.PROTOCOL_ERROR, "PUSH_PROMISE"),
        (frames.frame(9, 4, 1, b"\x82"), ErrorCode.PROTOCOL_ERROR, "without a header block"),
        (frames.frame(1, 0, 1, b"\x82") + frames.ping(bytes(8)), ErrorCode.PROTOCOL_ERROR, "within the header block"),
        (frames.frame(1, 0, 1) + frames.frame(9, 0, 1) * 5, ErrorCode.ENHANCE_YOUR_CALM, "CONTINUATION"),
        (frames.frame(1, 0, 1, bytes(16000)) + frames.frame(9, 0, 1, bytes(400)), ErrorCode.ENHANCE_YOUR_CALM, "16384"),
        (frames.frame(7, 0, 0, bytes(5000)), ErrorCode.ENHANCE_YOUR_CALM, "GOAWAY"),
        (frames.frame(8, 0, 0, bytes(4)), ErrorCode.PROTOCOL_ERROR, ""),
        (frames.frame(1, 4, 2, b"\x82"), ErrorCode.PROTOCOL_ERROR, ""),
        (frames.frame(1, 4, 1, b"\xff" * 50), ErrorCode.COMPRESSION_ERROR, ""),
        (frames.frame(0, 0, 7, b"x"), ErrorCode.PROTOCOL_ERROR, ""),
        (frames.settings([(4, 2**31)]), ErrorCode.FLOW_CONTROL_ERROR, ""),
        (frames.settings([(5, 100)]), ErrorCode.PROTOCOL_ERROR, ""),
        (frames.window_update(0, 2**31 - 1), ErrorCode.FLOW_CONTROL_ERROR, ""),
    ],
)
def test_a_broken_frame_ends_the_connection(data: bytes, code: ErrorCode, words: str) -> None:
    peer = begun()

    def send_each_byte() -> None:
        for start in range(len(data)):
            peer.server.receive_data(data[start : start + 1], peer.now)

    with pytest.raises(RemoteProtocolError, match=words or None) as caught:
        send_each_byte()
    assert peer.server.closed
    if caught.value.code is not code:
        assert (caught.value.code, code) in {
            (ErrorCode.PROTOCOL_ERROR, ErrorCode.COMPRESSION_ERROR),
            (ErrorCode.PROTOCOL_ERROR, ErrorCode.FLOW_CONTROL_ERROR),
        }


@pytest.mark.parametrize("first", [b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nXX", b"\x16\x03\x01", bytes(24)])
def test_what_is_no_preface_ends_the_connection(first: bytes) -> None:
    peer = StockPeer(began=False)
    with pytest.raises(RemoteProtocolError, match="preface"):
        peer.raw(first)


def test_the_first_frame_must_be_settings() -> None:
    peer = StockPeer(began=False)
    with pytest.raises(RemoteProtocolError, match="SETTINGS"):
        peer.raw(frames.PREFACE + frames.ping(bytes(8)))


def test_an_oversized_frame_is_refused_on_its_ninth_byte() -> None:
    guard = FrameGuard(server=False, max_frame_size=16384, max_header_block=16384)
    guard.scan(memoryview(frames.settings()), 0.0)
    head = frames.HEADER.pack(16385 << 8, 0, 1)
    for position in range(8):
        assert not guard.scan(memoryview(head[position : position + 1]), 0.0)
    with pytest.raises(RemoteProtocolError):
        guard.scan(memoryview(head[8:]), 0.0)


def test_unknown_settings_are_forgotten() -> None:
    peer = begun()
    for number in range(8):
        peer.raw(frames.settings((0x1000 + number * 30 + i, i) for i in range(30)))
    assert not [code for code in peer.server._http2.remote_settings if int(code) > 8]


def test_the_peer_cannot_grow_our_header_table() -> None:
    peer = begun()
    peer.raw(frames.settings([(1, 2**32 - 1)]))
    assert peer.server._http2.encoder.header_table_size == 4096


def test_a_header_bomb_is_refused() -> None:
    peer = begun()
    encoder = Encoder()
    encoder.encode([(b"x", b"y" * 4000)])
    block = Encoder().encode([*REQUEST, (b"x-bomb", b"y" * 3900)])
    bomb = block + b"\xbe" * 10_000  # the entry again and again, a byte each
    with pytest.raises(RemoteProtocolError):
        peer.raw(frames.header_block(1, bomb, end_stream=False, max_frame=16384))
    assert not peer.calls


def test_a_peer_that_never_reads_is_cut_off() -> None:
    peer = begun()

    def ping_without_reading() -> None:
        for _ in range(100_000):
            peer.now += 0.1  # slow enough for every bucket
            peer.server.receive_data(frames.ping(bytes(8)), peer.now)

    with pytest.raises(RemoteProtocolError, match="waiting"):
        ping_without_reading()
    assert len(peer.server._out) < 256 * KIB


def test_priority_in_headers_and_its_frame_build_no_tree() -> None:
    peer = begun()
    block = Encoder().encode(REQUEST)
    peer.raw(frames.frame(1, 0x24, 1, struct.pack(">IB", 0x8000_0000, 9) + block))
    peer.raw(frames.frame(FrameType.PRIORITY, 0, 5, struct.pack(">IB", 3, 9)))
    assert len(peer.calls) == 1


def chunks(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    position = 0
    for cut in cuts:
        yield data[position : position + cut]
        position += cut
        if position >= len(data):
            return
    yield data[position:]


@given(st.lists(st.integers(1, 60), max_size=200), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_any_chunking_passes_the_same_frames(cuts: list[int], extra: int) -> None:
    data = frames.PREFACE + frames.settings([(3, 5), (0x99, 1), (1, 99999)])
    data += frames.frame(2, 0, 3, bytes(5)) + frames.ping(b"12345678") + frames.frame(0xEE, 0, 9, b"unknown")
    data += request(1) + frames.frame(0, 8, 1, b"\x02abc\x00\x00") * (extra + 1) + frames.settings(ack=True)
    whole = FrameGuard(server=True, max_frame_size=16384, max_header_block=16384)
    pieces = FrameGuard(server=True, max_frame_size=16384, max_header_block=16384)
    expected = bytes(whole.scan(memoryview(data), 0.0))
    assert b"".join(bytes(pieces.scan(memoryview(chunk), 0.0)) for chunk in chunks(data, cuts)) == expected
    kinds = [kind for kind, *_ in split(expected[len(frames.PREFACE) :])]
    assert kinds == [4, 6, 1] + [0] * (extra + 1) + [4]
    assert split(expected[len(frames.PREFACE) :])[0][3] == struct.pack(">HIHI", 3, 5, 1, 4096)


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_garbage_raises_only_protocol_errors(data: bytes) -> None:
    for began in (True, False):
        peer = begun() if began else StockPeer(began=False)
        try:
            peer.raw(data)
        except RemoteProtocolError:
            assert peer.server.closed


def test_a_lost_connection_fails_its_calls_with_its_reason() -> None:
    pair = Pair()
    ours, _ = pair.call()
    pair.client.connection_lost(ConnectionLost("the cable was cut"))
    with pytest.raises(GrpcUnavailable, match=r"UNAVAILABLE: the connection to istiod:15012 ended: the cable was cut"):
        ours.receive()
    with pytest.raises(GrpcUnavailable):
        pair.client.start_call(METHOD)


@pytest.mark.parametrize("path", ["", "x", "/x", "/a/b/c", "/a/ü", "/a/b\n", "a/b"])
def test_a_path_that_is_no_method_is_refused(path: str) -> None:
    with pytest.raises(LocalProtocolError, match="method"):
        Pair().client.start_call(path)


def test_calls_beyond_the_servers_limit_are_not_begun() -> None:
    pair = Pair(server=GrpcConfig(max_concurrent_streams=2))
    pair.call()
    pair.call()
    with pytest.raises(GrpcUnavailable, match="2 calls are open") as caught:
        pair.client.start_call(METHOD)
    assert not caught.value.processed
