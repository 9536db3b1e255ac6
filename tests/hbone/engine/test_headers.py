"""Header blocks: HPACK within limits, and what HTTP/2 calls malformed."""

import pytest
from hpack import Decoder, Encoder

from hbone.engine.headers import (
    TABLE_SIZE,
    BlockDecoder,
    BlockEncoder,
    list_size,
    request_fault,
    response_status,
)
from hbone.errors import ErrorCode, ProtocolError
from hbone.events import Headers

REQUEST: Headers = (
    (b":method", b"CONNECT"),
    (b":authority", b"[2001:db8::1]:8080"),
    (b"baggage", b"k8s.namespace.name=shop," + b"x" * 300),
    (b"forwarded", b'for="10.0.0.1:4000"'),
    (b"empty", b""),
    (b"n" * 200, b"v" * 126 + b"w"),
)


def decoder(size: int = 16_384, fields: int = 64) -> BlockDecoder:
    return BlockDecoder(size, fields)


def test_what_is_encoded_is_understood_by_another_decoder() -> None:
    judge = Decoder()
    encoder = BlockEncoder()
    for headers in (REQUEST, ((b":status", b"200"),), ((b":status", b"503"),), REQUEST):
        assert tuple((bytes(n), bytes(v)) for n, v in judge.decode(encoder.encode(headers), raw=True)) == headers


@pytest.mark.parametrize("length", [0, 1, 126, 127, 128, 254, 255, 256, 20_000])
def test_strings_of_any_length_are_encoded(length: int) -> None:
    headers = ((b"name", b"v" * length),)
    assert decoder(2**20).decode(BlockEncoder().encode(headers)).fields == headers


@pytest.mark.parametrize("huffman", [True, False])
def test_what_another_encoder_says_is_understood_with_its_table(huffman: bool) -> None:
    other = Encoder()
    ours = decoder()
    for turn in range(30):
        headers = (*REQUEST, (b"turn", b"%d" % turn), (b"r" * turn, b"s" * (turn * 20)))
        assert ours.decode(other.encode(headers, huffman=huffman)).fields == headers
        ours.trim()


def test_the_same_bytes_mean_what_the_table_says_now() -> None:
    ours = decoder()
    for name in (b"a", b"b", b"b"):
        ours.decode(b"\x40\x01" + name + b"\x01v")
        assert ours.decode(b"\xbe").fields == ((name, b"v"),)
    assert ours.decode(b"\x88") == ours.decode(b"\x88")


def test_the_encoder_stays_at_4096_whatever_the_peer_offers() -> None:
    encoder = BlockEncoder()
    encoder.limit_table(2**32 - 1)
    assert encoder.table_size == TABLE_SIZE
    judge = Decoder()
    for _ in range(100):
        judge.decode(encoder.encode(REQUEST))
    assert not judge.header_table.dynamic_entries


def test_a_smaller_table_is_confirmed_in_the_next_block_and_once() -> None:
    encoder = BlockEncoder()
    judge = Decoder()
    encoder.limit_table(1000)
    encoder.limit_table(0)
    encoder.limit_table(2000)
    judge.max_allowed_table_size = 0
    judge.decode(encoder.encode(((b"a", b"b"),)))  # raises when the update is missing
    assert judge.header_table_size == 0
    assert encoder.encode(((b":status", b"200"),)) == b"\x88"


def test_too_many_fields_are_decoded_and_dropped() -> None:
    other = Encoder()
    ours = decoder(fields=8)
    block = ours.decode(other.encode([(b"n%d" % index, b"v") for index in range(9)]))
    assert block.too_large
    assert len(block.fields) == 8
    again = ours.decode(other.encode([(b"n8", b"v")]))  # from the table, which holds the dropped field too
    assert again.fields == ((b"n8", b"v"),)


def test_a_list_that_is_too_large_keeps_the_table_in_step() -> None:
    other = Encoder()
    ours = decoder(size=1024)
    assert ours.decode(other.encode([(b"big", b"v" * 2000)])).too_large
    assert other.encode([(b"big", b"v" * 2000)]) == b"\xbe"
    assert ours.decode(b"\xbe").too_large


def test_a_bomb_of_references_stops_early() -> None:
    other = Encoder()
    ours = decoder()
    ours.decode(other.encode([(b"big", b"v" * 4000)]))
    with pytest.raises(ProtocolError, match="beyond 65536 bytes") as caught:
        ours.decode(b"\xbe" * 16_384)
    assert caught.value.code is ErrorCode.ENHANCE_YOUR_CALM


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(b"\xbe", id="index beyond the table"),
        pytest.param(b"\x80", id="index 0"),
        pytest.param(b"\xff\x80\x80\x80\x80\x80\x80\x01", id="integer that goes on and on"),
        pytest.param(b"\xff" + b"\x80" * 10_000, id="integer without end"),
        pytest.param(b"\x40\x05ab", id="ends within a name"),
        pytest.param(b"\x40\x01a\x05b", id="ends within a value"),
        pytest.param(b"\x40\x01a", id="no value"),
        pytest.param(b"\x40", id="no name"),
        pytest.param(b"\x40\x01a\x84\xff\xff\xff\xff", id="Huffman end of string"),
        pytest.param(b"\x3f\xe2\x1f", id="table size beyond ours"),
        pytest.param(b"\x88\x20", id="table size after a field"),
        pytest.param(b"\x20\x20\x20", id="three table sizes"),
        pytest.param(b"\x00\x01a\x7f", id="length that ends early"),
    ],
)
def test_a_block_that_cannot_be_decoded_ends_the_connection(block: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        decoder().decode(block)
    assert caught.value.code is ErrorCode.COMPRESSION_ERROR


def test_table_size_may_go_down_and_up_again_at_the_start() -> None:
    ours = decoder()
    ours.decode(Encoder().encode([(b"name", b"value")]))
    assert ours.decode(b"\x20\x3f\xe1\x1f\x88").fields == ((b":status", b"200"),)
    with pytest.raises(ProtocolError):
        ours.decode(b"\xbe")


def test_list_size_counts_32_for_each_field() -> None:
    assert list_size(((b"a", b"bc"), (b"d", b""))) == 3 + 32 + 1 + 32


M = (b":method", b"CONNECT")
A = (b":authority", b"a:1")


@pytest.mark.parametrize(
    "headers",
    [
        (M, A),
        (M, A, (b"te", b"trailers")),
        (M, A, (b"x", b"")),
        (M, A, (b"x", b"a\tb \xff")),
        (M,),
        ((b":method", b"GET"), (b":scheme", b"https"), (b":path", b"/")),
    ],
)
def test_requests_that_http2_allows_are_for_connect_to_judge(headers: Headers) -> None:
    assert request_fault(headers) is None


@pytest.mark.parametrize(
    "headers",
    [
        (),
        (A,),
        (A, (b"x", b"y"), M),
        (M, M),
        (M, A, A),
        (M, A, (b":protocol", b"websocket")),
        (M, A, (b":status", b"200")),
        (M, A, (b":unknown", b"x")),
        (M, A, (b"", b"x")),
        (M, A, (b"Upper", b"x")),
        (M, A, (b"sp ace", b"x")),
        (M, A, (b"colon:", b"x")),
        (M, A, (b"nul\0", b"x")),
        (M, A, (b"high\xc3\xa9", b"x")),
        (M, A, (b"x", b"a\r\nb")),
        (M, A, (b"x", b"a\nb")),
        (M, A, (b"x", b"a\0b")),
        (M, A, (b"x", b" a")),
        (M, A, (b"x", b"a\t")),
        (M, (b":authority", b"a:1\r\n")),
        (M, A, (b"connection", b"close")),
        (M, A, (b"proxy-connection", b"close")),
        (M, A, (b"keep-alive", b"1")),
        (M, A, (b"transfer-encoding", b"chunked")),
        (M, A, (b"upgrade", b"h2c")),
        (M, A, (b"te", b"gzip")),
    ],
)
def test_requests_that_http2_calls_malformed_are_faults(headers: Headers) -> None:
    assert request_fault(headers)


@pytest.mark.parametrize(
    ("headers", "status"),
    [(((b":status", b"200"),), 200), (((b":status", b"503"), (b"x", b"y")), 503), (((b":status", b"100"),), 100)],
)
def test_a_response_has_its_status(headers: Headers, status: int) -> None:
    assert response_status(headers) == status


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ((b"x", b"y"),),
        ((b":status", b"20"),),
        ((b":status", b"0200"),),
        ((b":status", b"abc"),),
        ((b":status", b"200"), (b":status", b"200")),
        ((b":status", b"200"), (b":authority", b"a:1")),
        ((b":status", b"200"), (b"Upper", b"x")),
        ((b"x", b"y"), (b":status", b"200")),
    ],
)
def test_a_malformed_response_has_none(headers: Headers) -> None:
    assert isinstance(response_status(headers), str)
