"""Hostile HBONE peers with a valid certificate, against a real ztunnel process and beside a well-behaved neighbour.

Each costs its own connection and no more: the process lives, the neighbour loses no byte, dials to the application
are few, memory and descriptors come back.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import socket
import struct
from typing import TYPE_CHECKING

import pytest
import trio
from hpack import Decoder, Encoder
from OpenSSL import SSL
from tests.hbone.test_connect import BAD_AUTHORITIES, BAD_REQUESTS
from tests.support.hostile import SILENT, TALKS, HostilePeer, Siege, rss, siege
from tests.support.shop import descriptors, until
from tests.support.sizes import FULL

from hbone.engine.frames import FrameType, Setting
from hbone.errors import ErrorCode
from hbone.testing import frames
from hbone.testing.ca import WRONG_SVIDS, TestCa

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

MIB = 1 << 20
CALM = ErrorCode.ENHANCE_YOUR_CALM


@pytest.fixture(scope="module")
def besieged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Siege]:
    with siege(tmp_path_factory.mktemp("siege")) as found:
        yield found


@contextlib.asynccontextmanager
async def attack(besieged: Siege, *, dials: int | None = None, grows: int = 8 * MIB) -> AsyncIterator[HostilePeer]:
    """A hostile peer that has greeted, beside the neighbour.

    Args:
        besieged: the mesh.
        dials: how many connections the application may get meanwhile; None does not count.
        grows: bytes that the process may grow by.
    """
    resting, memory = descriptors(besieged.pid), rss(besieged.pid)
    async with besieged.neighbour() as neighbour:
        async with await besieged.peer() as peer:
            await peer.start()
            before = besieged.accepted
            yield peer
            await neighbour.turns_more(2)
            if dials is not None:
                assert besieged.accepted - before <= dials
        assert rss(besieged.pid) - memory <= grows
    assert await besieged.at_rest(resting) <= resting


def odd(start: int = 1) -> Iterator[int]:
    return itertools.count(start, 2)


async def open_streams(peer: HostilePeer, count: int, authority: str, start: int = 1) -> list[int]:
    """CONNECT `count` times and wait for the answers."""
    streams = list(itertools.islice(odd(start), count))
    await peer.send(*(frames.connect(stream, authority) for stream in streams))
    await peer.until(lambda: all(status(peer, stream) for stream in streams))
    assert {status(peer, stream) for stream in streams} == {200}
    return streams


def status(peer: HostilePeer, stream: int) -> int | None:
    """The first answer on a stream. Our blocks refer to no table, so each can be read on its own."""
    block = peer.status(stream)
    return None if block is None else int(dict(Decoder().decode(block, raw=True))[b":status"])


# --- streams opened and reset


def pairs(authority: str) -> Iterator[bytes]:
    return (piece for stream in odd() for piece in (frames.connect(stream, authority), frames.rst_stream(stream)))


@pytest.mark.parametrize("at_once", [1, 2, 1000], ids=["a write a frame", "a write a pair", "in bulk"])
async def test_a_burst_of_rapid_resets_ends_early_and_dials_little(besieged: Siege, at_once: int) -> None:
    async with attack(besieged, dials=20) as peer:
        await peer.burst(itertools.islice(pairs(besieged.authority()), 20_000), at_once=at_once)
        await peer.gone_for(CALM)


async def test_resets_that_wait_for_the_dial_end_early_and_dial_little(besieged: Siege) -> None:
    async with attack(besieged, dials=20) as peer:
        for stream in itertools.islice(odd(), 1000):
            await peer.send(frames.connect(stream, besieged.authority()))
            await trio.sleep(0.001)
            await peer.send(frames.rst_stream(stream))
            if peer.ended:
                break
        await peer.gone_for(CALM)


async def test_rapid_resets_at_2000_a_second_end_within_a_second(besieged: Siege) -> None:
    async with attack(besieged, dials=20) as peer:
        sent = 0
        began = trio.current_time()
        for stream in itertools.islice(odd(), 4000):
            await peer.send(frames.connect(stream, besieged.authority()), frames.rst_stream(stream))
            sent += 1
            await trio.sleep_until(began + sent / 2000)
            if peer.ended:
                break
        assert sent < 2000
        await peer.gone_for(CALM)


async def test_resets_after_the_200_one_at_a_time_become_slow_and_end(besieged: Siege) -> None:
    """The end comes after some 1,500 of them, which takes half a minute."""
    async with attack(besieged, dials=2000 if FULL else 150) as peer:
        with trio.move_on_after(120 if FULL else 2):
            for stream in odd():
                peer.received.clear()
                await peer.send(frames.connect(stream, besieged.authority()))
                with contextlib.suppress(AssertionError):
                    await peer.until(functools.partial(_answer, peer, stream))
                if peer.ended:
                    break
                await peer.send(frames.rst_stream(stream))
        if FULL:
            await peer.gone_for(CALM)


async def test_resets_after_the_200_of_many_at_once_end(besieged: Siege) -> None:
    async with attack(besieged, dials=1500, grows=16 * MIB) as peer:
        for start in itertools.count(1, 200):
            streams = list(itertools.islice(odd(start), 100))
            peer.received.clear()
            await peer.send(*(frames.connect(stream, besieged.authority()) for stream in streams))
            with contextlib.suppress(AssertionError):
                await peer.until(lambda: all(status(peer, stream) for stream in streams))  # noqa: B023
            await peer.send(*map(frames.rst_stream, streams))
            if peer.ended:
                break
        await peer.gone_for(CALM)


FAULTS: dict[str, Callable[[int], bytes]] = {
    "window overflow": lambda stream: frames.window_update(stream, 2**31 - 1),
    "window update of 0": lambda stream: frames.window_update(stream, 0),
    "DATA after END": lambda stream: frames.data(stream, end_stream=True) + frames.data(stream, b"x"),
    "HEADERS after END": lambda stream: frames.data(stream, end_stream=True) + frames.headers(stream, ((b"x", b"y"),)),
    "beyond the window": lambda stream: frames.data(stream, bytes(300_000)),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_made_you_reset_ends_within_20_faults(besieged: Siege, fault: Callable[[int], bytes]) -> None:
    async with attack(besieged, dials=20) as peer:
        for stream in itertools.islice(odd(), 40):
            await peer.send(frames.connect(stream, besieged.authority()), fault(stream))
            await trio.sleep(0.005)
        await peer.gone_for(CALM)


async def test_the_201st_stream_is_refused_and_the_200_live(besieged: Siege) -> None:
    async with attack(besieged, grows=16 * MIB) as peer:
        streams = await open_streams(peer, 200, besieged.authority())
        await peer.send(frames.connect(401, besieged.authority()))
        await peer.until(lambda: peer.reset_code(401) is not None)
        assert peer.reset_code(401) is ErrorCode.REFUSED_STREAM
        peer.received.clear()
        await peer.send(*(frames.data(stream, b"alive") for stream in streams))
        await peer.until(lambda: sum(kind == FrameType.DATA for kind, *_ in peer.frames()) == 200)
        assert {payload for kind, _, _, payload in peer.frames() if kind == FrameType.DATA} == {b"alive"}


async def test_insisting_on_more_than_200_streams_ends_the_connection(besieged: Siege) -> None:
    async with attack(besieged, dials=200, grows=16 * MIB) as peer:
        await peer.burst(frames.connect(stream, besieged.authority()) for stream in itertools.islice(odd(), 2000))
        await peer.gone_for(CALM)


# --- headers


@pytest.mark.parametrize("part", [b"", b"\x00\x01a\x01b", bytes(16_000)], ids=["empty", "small", "full"])
async def test_a_continuation_flood_ends_within_4_frames(besieged: Siege, part: bytes) -> None:
    async with attack(besieged, dials=0) as peer:
        await peer.send(frames.headers(1, b"\x83", end_headers=False))
        await peer.burst(itertools.repeat(frames.continuation(1, part), 5000), at_once=1)
        await peer.gone_for(CALM)


async def test_a_header_bomb_gets_431_and_the_connection_lives(besieged: Siege) -> None:
    async with attack(besieged, dials=1) as peer:
        encoder = Encoder()
        bomb = [*frames.connect_headers(besieged.authority()), *((b"x%d" % index, b"y" * 40) for index in range(70))]
        await peer.send(frames.headers(1, encoder.encode(bomb)))
        await peer.until(lambda: status(peer, 1) is not None)
        assert status(peer, 1) == 431
        await open_streams(peer, 1, besieged.authority(), start=3)


async def test_a_bomb_by_reference_is_given_up(besieged: Siege) -> None:
    async with attack(besieged, dials=0) as peer:
        encoder = Encoder()
        large = encoder.encode([*frames.connect_headers(besieged.authority()), (b"big", b"z" * 3900)])
        await peer.send(frames.headers(1, large + b"\xbe" * 12_000))  # index 62: the field just added
        await peer.gone_for(CALM)


async def test_an_encoder_table_of_4_gib_is_not_made(besieged: Siege) -> None:
    async with attack(besieged) as peer:
        await peer.send(frames.settings({int(Setting.HEADER_TABLE_SIZE): 2**32 - 1}))
        streams = await open_streams(peer, 50, besieged.authority())
        decoder = Decoder()
        decoder.max_allowed_table_size = 4096
        for stream in streams:
            block = peer.status(stream)
            assert block is not None
            assert dict(decoder.decode(block, raw=True))[b":status"] == b"200"


async def test_a_broken_header_block_ends_the_connection(besieged: Siege) -> None:
    async with attack(besieged, dials=0) as peer:
        await peer.send(frames.headers(1, b"\xff\xff\xff\xff\xff\xff\xff"))
        await peer.gone_for(ErrorCode.COMPRESSION_ERROR)


# --- floods of control frames


FLOODS: dict[str, bytes] = {
    "SETTINGS": frames.settings(),
    "SETTINGS with values": frames.settings({4: 65_535}),
    "PING": frames.ping(),
    "PING answers": frames.ping(ack=True),
    "PRIORITY": frames.priority(1),
    "WINDOW_UPDATE": frames.window_update(0, 1),
    "unknown": frames.unknown(0, b"x" * 100),
    "GOAWAY": frames.goaway(),
    "empty DATA": frames.data(1),
    "DATA of padding": frames.data(1, pad=255),
    "RST_STREAM of closed streams": frames.rst_stream(3),
}


@pytest.mark.parametrize("reads", [True, False], ids=["answered", "unread"])
@pytest.mark.parametrize("name", FLOODS)
async def test_a_flood_of_frames_is_cut_off(besieged: Siege, name: str, reads: bool) -> None:
    async with attack(besieged, dials=2) as peer:
        await open_streams(peer, 1, besieged.authority())
        await peer.send(frames.connect(3, besieged.authority()) + frames.rst_stream(3))
        async with trio.open_nursery() as nursery:
            if reads:
                nursery.start_soon(peer.until_closed)
            sent = await peer.burst(itertools.repeat(FLOODS[name], 50_000), at_once=50)
            nursery.cancel_scope.cancel()
        assert sent < 50_000
        await peer.gone_for(CALM)


async def test_replies_that_nobody_reads_are_few(besieged: Siege) -> None:
    async with attack(besieged, grows=4 * MIB) as peer:
        pinged = 0
        with trio.move_on_after(2):
            for _ in range(400):  # slowly enough for the bucket
                await peer.send(frames.ping())
                pinged += 1
                await trio.sleep(0.1 if pinged > 90 else 0)
        assert pinged > 90


# --- DATA, and applications that do not read


async def test_tiny_data_to_an_application_that_does_not_read_is_kept_once(besieged: Siege) -> None:
    async with attack(besieged, dials=4, grows=6 * MIB) as peer:
        streams = await open_streams(peer, 4, besieged.authority(SILENT))
        piece = b"".join(frames.data(stream, b"x") for stream in streams) * 400
        with trio.move_on_after(3):
            while not peer.ended:
                await peer.send(piece)
        assert besieged.victim.running
    assert await until(lambda: not besieged.application.listening(SILENT))


async def test_a_window_full_for_each_of_50_sleeping_applications_stays_within_the_budget(besieged: Siege) -> None:
    async with attack(besieged, dials=50, grows=40 * MIB) as peer:
        streams = await open_streams(peer, 50, besieged.authority(SILENT))
        await peer.send(*(frames.data(stream, bytes(16_384)) for _ in range(15) for stream in streams))
        await trio.sleep(0.5)
        assert not peer.ended
    assert await until(lambda: not besieged.application.listening(SILENT))


async def test_200_streams_with_no_window_and_a_mib_waiting_at_each_keep_2_mib(besieged: Siege) -> None:
    async with attack(besieged, dials=200, grows=16 * MIB) as peer:
        await open_streams(peer, 20, besieged.authority())  # what streams cost in themselves is not the question
        await peer.send(*(frames.rst_stream(stream) for stream in itertools.islice(odd(), 20)))
        await peer.send(frames.settings({int(Setting.INITIAL_WINDOW_SIZE): 0}))
        before = rss(besieged.pid)
        await open_streams(peer, 180, besieged.authority(TALKS), start=41)
        await trio.sleep(0.5)
        assert rss(besieged.pid) - before <= 4 * MIB
        assert not [kind for kind, *_ in peer.frames() if kind == FrameType.DATA]
    assert await until(lambda: not besieged.application.listening(TALKS))


@pytest.mark.parametrize("how", ["FIN", "RST", "close_notify", "GOAWAY"])
async def test_sockets_to_the_application_close_with_the_tunnel(besieged: Siege, how: str) -> None:
    async with attack(besieged, dials=40) as peer:
        streams = await open_streams(peer, 40, besieged.authority(SILENT))
        await peer.send(*(frames.data(stream, bytes(16_384)) for stream in streams))
        if how == "RST":
            peer.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif how == "close_notify":
            peer.client.connection.shutdown()
            await peer.push()
        elif how == "GOAWAY":
            await peer.send(frames.goaway(0, ErrorCode.INTERNAL_ERROR))
        await trio.aclose_forcefully(peer.stream)
        assert await until(lambda: not besieged.application.listening(SILENT))


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param(frames.raw(0, 0, 1, length=2**24 - 1), id="DATA of 16 MiB"),
        pytest.param(frames.raw(1, 4, 1, length=2**24 - 1), id="HEADERS of 16 MiB"),
        pytest.param(frames.raw(6, 0, 0, bytes(9)), id="PING of 9 bytes"),
        pytest.param(frames.raw(3, 0, 1, bytes(5)), id="RST_STREAM of 5 bytes"),
        pytest.param(frames.raw(4, 0, 0, bytes(7)), id="SETTINGS of 7 bytes"),
        pytest.param(frames.raw(4, 0, 1, b""), id="SETTINGS on a stream"),
        pytest.param(frames.raw(4, 1, 0, bytes(6)), id="SETTINGS answer with values"),
        pytest.param(frames.data(0, b"x"), id="DATA on stream 0"),
        pytest.param(frames.data(99, b"x"), id="DATA on an idle stream"),
        pytest.param(frames.rst_stream(99), id="RST_STREAM on an idle stream"),
        pytest.param(frames.connect(2), id="a stream with an even number"),
        pytest.param(frames.push_promise(1, 2, frames.connect_headers()), id="PUSH_PROMISE"),
        pytest.param(frames.continuation(1, b"x"), id="CONTINUATION alone"),
        pytest.param(frames.headers(1, b"\x82", end_headers=False) + frames.ping(), id="PING within HEADERS"),
        pytest.param(frames.window_update(0, 2**31 - 1) * 2, id="connection window overflow"),
        pytest.param(frames.window_update(0, 0), id="connection window update of 0"),
        pytest.param(frames.settings({4: 2**31}), id="a window of 2 GiB"),
        pytest.param(frames.settings({5: 1}), id="frames of 1 byte"),
        pytest.param(frames.settings((4, 1) for _ in range(1000)), id="1000 settings"),
        pytest.param(frames.goaway(0, 0, bytes(10_000)), id="a GOAWAY of 10 kB"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", id="HTTP/1.1"),
    ],
)
async def test_a_broken_frame_ends_its_connection_with_a_reason(besieged: Siege, wire: bytes) -> None:
    async with attack(besieged, dials=0) as peer:
        await peer.send(wire)
        await peer.until_closed(5)
        assert peer.goaway not in (None, ErrorCode.NO_ERROR, ErrorCode.INTERNAL_ERROR)


# --- CONNECT


def forms(target: str) -> dict[str, tuple[tuple[bytes, bytes], ...]]:
    """Requests that no strict reader takes; those by name and those by address mean the attacked application."""
    address, port = target.encode().split(b":")
    method = (b":method", b"CONNECT")
    found: dict[str, tuple[tuple[bytes, bytes], ...]] = {
        f"authority {value[:40]!r}": (method, (b":authority", value)) for value in BAD_AUTHORITIES
    }
    for template in BAD_AUTHORITIES:
        if template.startswith(b"10.0.0.7") and template != b"10.0.0.7":
            value = template.replace(b"10.0.0.7", address).replace(b":80", b":" + port)
            found[f"authority {value[:60]!r}"] = (method, (b":authority", value))
    for name, headers in BAD_REQUESTS.items():
        found[name] = tuple(
            (key, value.replace(b"10.0.0.7", address).replace(b":80", b":" + port)) for key, value in headers
        )
    return {name: headers for name, headers in found.items() if sum(map(len, itertools.chain(*headers))) < 8000}


async def test_no_malformed_connect_is_dialled(besieged: Siege) -> None:
    wrong = forms(besieged.authority())
    assert len(wrong) >= 92
    answers: dict[str, object] = {}
    async with besieged.neighbour():
        before = besieged.accepted
        names = list(wrong)
        for start in range(0, len(names), 10):
            async with await besieged.peer() as peer:
                await peer.start()
                for stream, name in zip(odd(), names[start : start + 10], strict=False):
                    await peer.send(frames.headers(stream, wrong[name]))
                    answered = functools.partial(_answer, peer, stream)
                    with trio.move_on_after(15):
                        while answered() is None and await peer.read():
                            pass
                    answers[name] = answered() or (peer.goaway if peer.ended else "nothing")
                    if peer.ended:
                        break
        assert besieged.accepted == before
    good = {400, ErrorCode.PROTOCOL_ERROR}
    assert {name: answer for name, answer in answers.items() if answer not in good} == {}
    assert len(answers) == len(wrong)


def _answer(peer: HostilePeer, stream: int) -> object:
    return status(peer, stream) or peer.reset_code(stream)


async def test_nothing_but_the_workload_itself_can_be_reached(besieged: Siege) -> None:
    own = besieged.address
    echo = 9000
    forbidden = [
        f"127.0.0.1:{echo}",
        f"[::1]:{echo}",
        f"0.0.0.0:{echo}",
        f"[::]:{echo}",
        f"localhost:{echo}",
        "169.254.169.254:80",
        "[fe80::1]:80",
        "224.0.0.1:80",
        "255.255.255.255:80",
        f"{besieged.elsewhere}:15021",
        f"{besieged.control}:15012",
        f"{besieged.control}:15014",
        "10.0.0.1:80",
        "metadata.google.internal:80",
        f"orders.shop.svc.cluster.local:{echo}",
        *(f"{own}:{port}" for port in (15000, 15001, 15006, 15008, 15020, 15021, 15080)),
    ]
    listening = trio.socket.socket()
    await listening.bind(("127.0.0.1", 0))
    listening.listen()
    forbidden.append(f"127.0.0.1:{listening.getsockname()[1]}")
    async with attack(besieged, dials=0) as peer:
        for stream, authority in zip(odd(), forbidden, strict=False):
            await peer.send(frames.connect(stream, authority) + frames.data(stream, b"GET / HTTP/1.0\r\n\r\n"))
            await peer.until(functools.partial(_answer, peer, stream))
            found = _answer(peer, stream)
            assert isinstance(found, int), authority
            assert 400 <= found < 600, authority
    with trio.move_on_after(0.1) as scope:
        await listening.accept()
    assert scope.cancelled_caught
    listening.close()


async def test_a_port_where_nobody_listens_is_503(besieged: Siege) -> None:
    async with attack(besieged, dials=0) as peer:
        await peer.send(frames.connect(1, besieged.authority(9)))
        await peer.until(lambda: status(peer, 1) is not None)
        assert status(peer, 1) == 503


# --- TLS


async def _refused(besieged: Siege, peer: HostilePeer) -> bool:
    """Whether the peer gets no HTTP/2 from the server."""
    async with peer:
        try:
            await peer.handshake()
        except SSL.Error:
            return True
        await peer.send(frames.PREFACE + frames.settings() + frames.connect(1, besieged.authority()))
        await peer.until_closed(10)
        return not peer.received


@pytest.mark.parametrize("kind", WRONG_SVIDS)
async def test_a_wrong_certificate_of_the_right_root_is_refused(besieged: Siege, kind: str) -> None:
    identity = besieged.ca().wrong_identity(kind)
    before = besieged.accepted
    assert await _refused(besieged, await HostilePeer.connect(besieged.address, identity))
    assert besieged.accepted == before


async def test_the_same_root_signs_what_is_right(besieged: Siege) -> None:
    async with await besieged.peer(besieged.ca().identity("shop", "client")) as peer:
        await peer.start()
        await open_streams(peer, 1, besieged.authority())


async def test_other_roots_and_no_certificate_are_refused(besieged: Siege) -> None:
    async with besieged.neighbour():
        for identity in (TestCa().identity("shop", "client"), TestCa("other.example").identity("shop", "client"), None):
            assert await _refused(besieged, await HostilePeer.connect(besieged.address, identity))


@pytest.mark.parametrize("alpn", [[], [b"http/1.1"], [b"h2c"], [b"http/1.1", b"hq-29"], [b"H2"]], ids=str)
async def test_a_peer_without_h2_is_refused(besieged: Siege, alpn: list[bytes]) -> None:
    async with besieged.neighbour():
        peer = await HostilePeer.connect(besieged.address, besieged.hostile, alpn=alpn)
        assert await _refused(besieged, peer)


async def test_no_older_tls_is_spoken(besieged: Siege) -> None:
    peer = await HostilePeer.connect(besieged.address, besieged.hostile, version=SSL.TLS1_2_VERSION)
    assert await _refused(besieged, peer)


async def test_no_session_can_be_resumed(besieged: Siege) -> None:
    async with await besieged.peer() as first:
        await first.start()
        await open_streams(first, 1, besieged.authority())
    async with await HostilePeer.connect(besieged.address, besieged.hostile, like=first) as second:
        await second.handshake()
        await second.start()
        assert not SSL._lib.SSL_session_reused(second.client.connection._ssl)  # type: ignore[attr-defined]


@pytest.mark.parametrize("requested", [False, True], ids=["own", "asked of us"])
async def test_a_flood_of_key_updates_is_cut_off(besieged: Siege, requested: bool) -> None:
    resting = descriptors(besieged.pid)
    async with besieged.neighbour():
        async with await besieged.peer() as peer:
            client = peer.client
            await peer.raw(client.record(frames.PREFACE + frames.settings()))
            sent = 0
            for _ in range(500):
                await peer.raw(b"".join(client.key_update(requested=requested) for _ in range(20)))
                sent += 20
                await trio.sleep(0.001)
                if peer.ended:
                    break
            await peer.until_closed(5)
            assert sent < 10_000
    assert await besieged.at_rest(resting) <= resting


async def test_a_flood_of_empty_records_is_cut_off(besieged: Siege) -> None:
    async with besieged.neighbour():
        async with await besieged.peer() as peer:
            await peer.raw(peer.client.record(frames.PREFACE + frames.settings()))
            for _ in range(500):
                await peer.raw(b"".join(peer.client.record(b"") for _ in range(20)))
                if peer.ended:
                    break
            await peer.until_closed(5)


GARBAGE: dict[str, bytes] = {
    "zeros": bytes(4096),
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "h2 in the clear": frames.PREFACE + frames.settings(),
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
    "a record of 65535 bytes": b"\x16\x03\x01\xff\xff" + bytes(70_000),
    "a ClientHello that lies": b"\x16\x03\x01\x00\x10\x01\xff\xff\xff\x03\x03" + bytes(64),
    "alerts": b"\x15\x03\x03\x00\x02\x01\x00" * 1000,
    "SSLv2": b"\x80\x2e\x01\x00\x02" + bytes(64),
}


@pytest.mark.parametrize("name", GARBAGE)
async def test_garbage_instead_of_tls_costs_its_connection(besieged: Siege, name: str) -> None:
    resting = descriptors(besieged.pid)
    async with besieged.neighbour():
        async with await HostilePeer.connect(besieged.address, None) as peer:
            await peer.raw(GARBAGE[name])
            await peer.until_closed(12)
    assert await besieged.at_rest(resting) <= resting


async def test_three_hundred_silent_handshakes_of_one_address_keep_nobody_else_out(besieged: Siege) -> None:
    source = besieged.address.rpartition(".")[0] + ".77"
    resting = descriptors(besieged.pid)
    async with contextlib.AsyncExitStack() as stack:
        silent = []
        for _ in range(300):
            peer = await HostilePeer.connect(besieged.address, None, source=source)
            silent.append(await stack.enter_async_context(peer))
        async with besieged.neighbour():
            closed = sum([await peer.closes_within(0.1) for peer in silent[-12:]])
            assert closed == 12  # 32 from one address shake hands, and 256 wait
            assert not await silent[0].closes_within(0.01)
            assert not await silent[40].closes_within(0.01)
    assert await besieged.at_rest(resting) <= resting


# --- silence


async def _silent_tcp(besieged: Siege) -> tuple[HostilePeer, float]:
    return await HostilePeer.connect(besieged.address, None), 10


async def _half_a_handshake(besieged: Siege) -> tuple[HostilePeer, float]:
    peer = await HostilePeer.connect(besieged.address, besieged.hostile)
    with contextlib.suppress(SSL.WantReadError):
        peer.client.connection.do_handshake()
    hello = peer.client.output()
    await peer.raw(hello[: len(hello) // 2])
    return peer, 10


async def _a_handshake_byte_by_byte(besieged: Siege) -> tuple[HostilePeer, float]:
    peer = await HostilePeer.connect(besieged.address, besieged.hostile)
    ends = trio.current_time() + 10
    with contextlib.suppress(SSL.WantReadError):
        peer.client.connection.do_handshake()
    for byte in peer.client.output()[:20]:
        await peer.raw(bytes([byte]))
        await trio.sleep(0.2)
    return peer, ends - trio.current_time()


async def _no_preface(besieged: Siege) -> tuple[HostilePeer, float]:
    return await besieged.peer(), 5


async def _half_a_preface(besieged: Siege) -> tuple[HostilePeer, float]:
    peer = await besieged.peer()
    await peer.send(frames.PREFACE[:10])
    return peer, 5


async def _an_open_header_block(besieged: Siege) -> tuple[HostilePeer, float]:
    peer = await besieged.peer()
    await peer.start()
    await peer.send(frames.headers(1, b"\x82", end_headers=False))
    return peer, 5


async def _settings_unanswered(besieged: Siege) -> tuple[HostilePeer, float]:
    peer = await besieged.peer()
    await peer.send(frames.PREFACE + frames.settings())
    return peer, 10


async def _ping_unanswered(besieged: Siege) -> tuple[HostilePeer, float]:
    peer = await besieged.peer()
    await peer.start()
    return peer, 30


async def test_silence_is_ended_in_time(besieged: Siege) -> None:
    ways = [
        _silent_tcp,
        _half_a_handshake,
        _a_handshake_byte_by_byte,
        _no_preface,
        _half_a_preface,
        _an_open_header_block,
        _settings_unanswered,
    ]
    if FULL:
        ways.append(_ping_unanswered)
    resting = descriptors(besieged.pid)
    late: list[str] = []

    async def judge(way: Callable[[Siege], object]) -> None:
        peer, limit = await way(besieged)  # type: ignore[misc]
        async with peer:
            if await peer.closes_within(max(0.0, limit - 3)) or not await peer.closes_within(8):
                late.append(way.__name__)

    async with besieged.neighbour(), trio.open_nursery() as nursery:
        for way in ways:
            nursery.start_soon(judge, way)
    assert late == []
    assert await besieged.at_rest(resting) <= resting


async def test_after_all_this_the_process_is_as_it_was(besieged: Siege) -> None:
    """Runs last: nothing was logged as a fault of ours, and nothing is left."""
    for daemon in (*besieged.mesh.ztunnels.values(), besieged.mesh.control):
        assert daemon.running
        text = daemon.log.read_text(errors="replace")
        assert "Traceback" not in text
        assert "internal error" not in text
        faults = [record for record in daemon.records() if record.get("level") == "error"]
        assert [record for record in faults if record.get("scope") != "access"] == []
    assert rss(besieged.pid) < 120 * MIB
    assert descriptors(besieged.pid) < 60
