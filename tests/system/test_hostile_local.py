"""Hostile clients of a ztunnel's local ports: captured connections, SOCKS5, and its pages."""

from __future__ import annotations

import itertools
import socket
import struct
from typing import TYPE_CHECKING

import pytest
import trio
from tests.support.hostile import Siege, exchange, is_closed, rss, siege
from tests.support.shop import ECHO, descriptors

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
PAGES = {15000: "/status", 15020: "/metrics", 15021: "/healthz/ready"}


@pytest.fixture(scope="module")
def besieged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Siege]:
    with siege(tmp_path_factory.mktemp("siege")) as found:
        yield found


async def pages_answer(besieged: Siege) -> None:
    for port, path in PAGES.items():
        status, body = await besieged.victim.http(port, path, address=besieged.address)
        assert (status, bool(body)) == (200, True), port


async def test_our_own_listeners_are_no_destination(besieged: Siege) -> None:
    resting = descriptors(besieged.pid)
    async with besieged.neighbour():
        for port in (15001, 15006):
            for _ in range(100):
                assert await exchange(besieged.address, port, b"hello" * 1000) == b""
            denied = await besieged.victim.until_logged(message="connection failed", dst__addr=f":{port}")
            assert "15001" in str(denied) or "15006" in str(denied)
    assert await besieged.at_rest(resting) <= resting


# --- SOCKS5

GREETING = b"\x05\x01\x00"


def request(address: str, port: int, *, command: int = 1) -> bytes:
    return GREETING + bytes([5, command, 0, 1]) + socket.inet_aton(address) + struct.pack(">H", port)


def named(name: bytes, port: int = ECHO) -> bytes:
    return GREETING + b"\x05\x01\x00\x03" + bytes([len(name)]) + name + struct.pack(">H", port)


BAD_GREETINGS: dict[str, bytes] = {
    "SOCKS4": b"\x04\x01\x23\x28\x7f\x00\x00\x01\x00",
    "HTTP": b"CONNECT 10.0.0.1:80 HTTP/1.1\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
    "zeros": bytes(1000),
    "no methods": b"\x05\x00",
    "only a password": b"\x05\x01\x02",
    "255 methods, none of ours": b"\x05\xff" + bytes(range(1, 256)),
    "another version in the request": GREETING + b"\x04\x01\x00\x01\x7f\x00\x00\x01\x23\x28",
    "reserved byte": GREETING + b"\x05\x01\x07\x01\x7f\x00\x00\x01\x23\x28",
    "BIND": GREETING + b"\x05\x02\x00\x01\x7f\x00\x00\x01\x23\x28",
    "UDP ASSOCIATE": GREETING + b"\x05\x03\x00\x01\x7f\x00\x00\x01\x23\x28",
    "an address type of none": GREETING + b"\x05\x01\x00\x09\x7f\x00\x00\x01\x23\x28",
    "a name of no bytes": GREETING + b"\x05\x01\x00\x03\x00\x23\x28",
    "a name with a NUL": named(b"orders\x00.shop"),
    "a name in UTF-8": named("bücher.shop".encode()),
    "a name with a line end": named(b"orders.shop\r\nx"),
    "a name of 255 bytes": named(b"a" * 255),
    "a name that is not found": named(b"nobody.invalid"),
    "dots": named(b"...."),
    "port 0": request("10.0.0.1", 0),
}


@pytest.mark.parametrize("name", BAD_GREETINGS)
async def test_a_bad_greeting_is_refused_and_closed(besieged: Siege, name: str) -> None:
    answer = await exchange(besieged.address, 15080, BAD_GREETINGS[name])
    method, reply = answer[:2], answer[2:]
    assert method in (b"", b"\x05\x00", b"\x05\xff")
    assert len(reply) in (0, 10)
    assert reply[:1] in (b"", b"\x05")
    assert reply[1:2] != b"\x00"


OWN_PORTS = (15000, 15001, 15006, 15008, 15020, 15021, 15080)


async def test_socks5_leads_to_none_of_our_own_ports(besieged: Siege) -> None:
    for port in OWN_PORTS:
        for address in (besieged.address, "127.0.0.1", "0.0.0.0"):
            answer = await exchange(besieged.address, 15080, request(address, port) + b"GET / HTTP/1.0\r\n\r\n")
            assert answer[2:3] == b"\x05", (address, port)
            assert answer[3] != 0, (address, port)
            assert len(answer) == 12


async def test_payload_that_comes_with_the_request_is_not_lost(besieged: Siege) -> None:
    data = bytes(range(256)) * 400
    answer = await exchange(
        besieged.elsewhere, 15080, request(besieged.address, ECHO) + data, source=besieged.elsewhere
    )
    assert answer[12:] == data


async def test_a_greeting_byte_by_byte_is_read(besieged: Siege) -> None:
    stream = await trio.open_tcp_stream(besieged.elsewhere, 15080, local_address=besieged.elsewhere)
    async with stream:
        for byte in request(besieged.address, ECHO):
            await stream.send_all(bytes([byte]))
            await trio.sleep(0.002)
        answer = b""
        while len(answer) < 12:
            answer += await stream.receive_some()
        assert answer[2:4] == b"\x05\x00"


async def test_clients_that_go_away_in_the_greeting_leave_nothing(besieged: Siege) -> None:
    resting, memory = descriptors(besieged.pid), rss(besieged.pid)
    whole = request(besieged.address, ECHO)
    async with besieged.neighbour():
        for length in itertools.chain(range(len(whole)), range(len(whole))):
            for linger in (False, True):
                stream = await trio.open_tcp_stream(besieged.address, 15080)
                await stream.send_all(whole[:length])
                if linger:
                    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                await trio.aclose_forcefully(stream)
    assert await besieged.at_rest(resting) <= resting
    assert rss(besieged.pid) - memory < 4 * MIB


# --- pages

BAD_REQUESTS: dict[str, bytes] = {
    "zeros": bytes(5000),
    "noise": bytes(range(256)) * 100,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300),
    "h2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
    "h2c upgrade": b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n",
    "websocket": b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
    "CONNECT": b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost:80\r\n\r\n",
    "a method that is not ASCII": "GÉT / HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(),
    "a method of 10 kB": b"G" * 10_000 + b" / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no version": b"GET /\r\n\r\n",
    "HTTP/9.9": b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "no Host": b"GET / HTTP/1.1\r\n\r\n",
    "two Hosts": b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: other\r\n\r\n",
    "a target that is not ASCII": "GET /\u00fc HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(),
    "a target of 60 kB": b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a header of 60 kB": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 60_000 + b"\r\n\r\n",
    "10,000 headers": b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 10_000 + b"\r\n",
    "a bare CR": b"GET / HTTP/1.1\rHost: localhost\r\r",
    "a NUL": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
    "folded": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\r\n c\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nContent-Length: 5\r\n\r\nabcde",
    "a negative length": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    "a length that is too large": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n",
    "length and chunks": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /config_dump HTTP/1.1\r\n\r\n",
    "an unknown coding": b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
    "chunks of garbage": b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nxx\r\n",
    "a chunk of 2^64": b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
    "300 requests at once": b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n" * 300,
    "a path that climbs": b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "escapes": b"GET /%00%ff%2e%2e/?x=%zz&%=&&& HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "an absolute target": b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "TRACE": b"TRACE / HTTP/1.1\r\nHost: localhost\r\nMax-Forwards: 0\r\n\r\n",
    "half a request": b"GET / HT",
    "a body that does not come": b"POST /logging HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc",
    "Expect": b"POST /logging HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\nExpect: 100-continue\r\n\r\n",
    "Expect the impossible": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\nExpect: magic\r\n\r\n",
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
async def test_garbage_on_a_page_costs_its_connection(besieged: Siege, name: str) -> None:
    resting = descriptors(besieged.pid)
    for port in PAGES:
        answer = await exchange(besieged.address, port, BAD_REQUESTS[name], eof=True)
        first = answer.partition(b"\r\n")[0]
        assert not answer or first.startswith(b"HTTP/1.1 "), first
        assert not first.startswith(b"HTTP/1.1 5") or first.startswith(b"HTTP/1.1 501"), first
        assert not first.startswith(b"HTTP/1.1 101")
    await pages_answer(besieged)
    assert await besieged.at_rest(resting) <= resting


async def test_the_admin_page_serves_no_other_name_and_changes_nothing_by_get(besieged: Siege) -> None:
    for host in (b"evil.example", b"evil.example:15000", b"localhost.evil.example", b"127.0.0.1.evil.example", b""):
        answer = await exchange(
            besieged.address, 15000, b"GET /config_dump HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n"
        )
        assert answer.startswith((b"HTTP/1.1 403", b"HTTP/1.1 400")), host
    cross = b"POST /quitquitquit HTTP/1.1\r\nHost: localhost:15000\r\nOrigin: http://evil.example\r\n"
    answer = await exchange(besieged.address, 15000, cross + b"Content-Length: 0\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 403")
    for path in (b"/quitquitquit", b"/logging?level=off"):
        await exchange(
            besieged.address, 15000, b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )
    assert besieged.victim.running
    status, body = await besieged.victim.http(15000, "/logging", address=besieged.address)
    assert (status, "info" in body) == (200, True)


async def test_slow_clients_are_ended_and_keep_nobody_out(besieged: Siege) -> None:
    """Slow heads, slow bodies, silence and unread answers at once, more than each page has room for."""
    resting, memory = descriptors(besieged.pid), rss(besieged.pid)
    streams: list[trio.SocketStream] = []

    async def open_slow(port: int, first: bytes, count: int) -> None:
        for _ in range(count):
            stream = await trio.open_tcp_stream(besieged.address, port)
            streams.append(stream)
            await stream.send_all(first)

    async with besieged.neighbour(), trio.open_nursery() as nursery:
        for port in PAGES:
            await open_slow(port, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ", 60)
            await open_slow(port, b"", 60)
        await open_slow(15000, b"GET /config_dump HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50, 5)
        unread = streams[-5:]
        await open_slow(15080, b"\x05", 100)
        await open_slow(15080, GREETING, 100)

        async def drip() -> None:
            while True:
                for stream in streams[::40]:
                    try:
                        await stream.send_all(b"a")
                    except trio.BrokenResourceError:
                        pass
                await trio.sleep(0.5)

        nursery.start_soon(drip)
        await pages_answer(besieged)
        answer = await exchange(besieged.address, 15080, GREETING + b"\x05\x02\x00\x01\x7f\x00\x00\x01\x23\x28")
        assert answer[:2] == b"\x05\x00"
        for stream in streams:
            if stream not in unread:  # for those it takes 30 s
                assert await is_closed(stream)
        nursery.cancel_scope.cancel()
    for stream in streams:
        await trio.aclose_forcefully(stream)
    assert await besieged.at_rest(resting) <= resting
    assert rss(besieged.pid) - memory < 24 * MIB


async def test_after_all_this_the_process_is_as_it_was(besieged: Siege) -> None:
    """Runs last: nothing was logged as a fault of ours."""
    assert besieged.victim.running
    text = besieged.victim.log.read_text(errors="replace")
    assert "Traceback" not in text
    faults = [record for record in besieged.victim.records() if record.get("level") == "error"]
    assert [record for record in faults if record.get("scope") != "access"] == []
