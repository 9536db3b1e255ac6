"""SOCKS5, byte by byte."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
import trio
from tests.support.mesh import service
from tests.support.pair import Pair, echo, exactly, open_pair

from ztunnel.mesh import Endpoint

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

GREETING = b"\x05\x01\x00"


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with open_pair() as pair:
        with trio.fail_after(20):
            yield pair


def request(host: str, port: int, *, command: int = 1) -> bytes:
    """A request for an address or a name."""
    try:
        address = b"\x01" + socket.inet_aton(host)
    except OSError:
        address = b"\x03" + bytes([len(host)]) + host.encode()
    return bytes((5, command, 0)) + address + port.to_bytes(2, "big")


async def ask(pair: Pair, *parts: bytes) -> tuple[trio.SocketStream, bytes, bytes]:
    """Send greeting and request; the answers to both."""
    stream = await trio.open_tcp_stream(*pair.client.socks5)
    for part in parts:
        await stream.send_all(part)
    return stream, await exactly(stream, 2), await exactly(stream, 10)


async def test_success_is_said_when_the_upstream_is_connected(pair: Pair) -> None:
    port = await pair.serve(echo)
    # Everything at once, payload included, and cut at an odd place.
    whole = GREETING + request(pair.server.ip, port) + b"payload"
    stream, method, reply = await ask(pair, whole[:5], whole[5:])
    async with stream:
        assert method == b"\x05\x00"
        assert reply == b"\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00"
        assert await exactly(stream, 7) == b"payload"
    assert len(pair.client.plane.dialer.tunnels) == 1


async def test_a_server_that_speaks_first_is_heard_after_the_reply(pair: Pair) -> None:
    async def greet(stream: trio.SocketStream) -> None:
        await stream.send_all(b"220 ready")
        await stream.receive_some(1)

    port = await pair.serve(greet)
    first, _, reply = await ask(pair, GREETING, request(pair.server.ip, port))
    assert reply == b"\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00"
    async with pair.looking_away():  # the 200 and what the server says come in one read
        stream = await trio.open_tcp_stream(*pair.client.socks5)
        await stream.send_all(GREETING + request(pair.server.ip, port))
        server = pair.server.plane.connections
        await pair.settle(lambda: [sum(connection.bytes_moved()) for connection in server] == [9, 9])
    async with first, stream:
        assert await exactly(stream, 2 + 10 + 9) == b"\x05\x00" + reply + b"220 ready"


async def test_a_service_is_found_by_its_host_name(pair: Pair) -> None:
    port = await pair.serve(echo)
    uid = pair.server.workload.uid
    web = service("web", "240.240.0.9", ports={80: port}, endpoints={uid: Endpoint(uid, {80: port})})
    pair.store.apply_addresses([web], [])
    stream, _, reply = await ask(pair, GREETING, request("Web.default.svc.cluster.local.", 80))
    async with stream:
        assert reply[1] == 0
        await stream.send_all(b"x")
        assert await exactly(stream, 1) == b"x"
    await pair.settle(lambda: bool(pair.client.log.completed))
    assert pair.client.log.completed[0][0].parties.service == web


async def test_names_mean_what_the_dns_proxy_says_short_and_headless_ones_too(pair: Pair) -> None:
    port = await pair.serve(echo)
    uid = pair.server.workload.uid
    pair.store.apply_addresses([service("headless", endpoints={uid: Endpoint(uid, {port: port})})], [])
    for name in ("headless", "headless.default", "headless.default.svc"):
        stream, _, reply = await ask(pair, GREETING, request(name, port))
        async with stream:
            assert reply[1] == 0
            await stream.send_all(b"x")
            assert await exactly(stream, 1) == b"x"


async def test_a_service_on_another_network_only_is_unreachable_and_asked_of_nobody_else(pair: Pair) -> None:
    pair.store.apply_addresses([service("far", "elsewhere/240.240.0.9", hostname="localhost")], [])
    stream, _, reply = await ask(pair, GREETING, request("localhost", 80))
    async with stream:
        assert reply[1] == 4
    await pair.settle(lambda: bool(pair.client.log.denied))
    assert "its service has no address on this network" in pair.client.log.denied[0]


async def test_other_names_go_to_the_system_and_loopback_is_refused(pair: Pair) -> None:
    stream, _, reply = await ask(pair, GREETING, request("localhost", 1))
    async with stream:
        assert reply[1] == 2
        assert await stream.receive_some(1) == b""


async def test_a_name_that_nobody_knows_is_unreachable(pair: Pair) -> None:
    stream, _, reply = await ask(pair, GREETING, request("no-such-name.invalid", 1))
    async with stream:
        assert reply[1] == 4


async def test_a_peer_that_is_down_is_refused(pair: Pair) -> None:
    port = await pair.serve(echo)
    pair.server.plane.listeners["hbone"].close()
    await trio.testing.wait_all_tasks_blocked()
    stream, _, reply = await ask(pair, GREETING, request(pair.server.ip, port))
    async with stream:
        assert reply[1] == 5


@pytest.mark.parametrize(
    ("greeting", "answer"),
    [
        pytest.param(b"\x04\x01\x00", b"", id="version 4"),
        pytest.param(b"\x05\x00", b"\x05\xff", id="no method"),
        pytest.param(b"\x05\x01\x02", b"\x05\xff", id="password only"),
    ],
)
async def test_a_greeting_that_is_no_good_is_answered_and_closed(pair: Pair, greeting: bytes, answer: bytes) -> None:
    async with await trio.open_tcp_stream(*pair.client.socks5) as stream:
        await stream.send_all(greeting)
        try:
            assert await exactly(stream, 2) == answer
            assert await stream.receive_some(1) == b""
        except trio.BrokenResourceError:
            assert not answer  # closed with a byte unread
    await pair.settle(lambda: len(pair.client.log.denied) == 1)


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        pytest.param(request("10.0.0.1", 80, command=2), 7, id="bind"),
        pytest.param(request("10.0.0.1", 80, command=3), 7, id="udp"),
        pytest.param(b"\x05\x01\x00\x02" + bytes(6), 8, id="address type"),
        pytest.param(b"\x05\x01\x00\x03\x00\x00\x50", 8, id="empty name"),
        pytest.param(b"\x05\x01\x00\x03\x03a b\x00\x50", 8, id="space in a name"),
        pytest.param(b"\x05\x01\x01\x01" + bytes(4) + b"\x00\x50", 1, id="reserved byte"),
        pytest.param(request("10.0.0.1", 0), 1, id="port 0"),
    ],
)
async def test_a_request_that_is_no_good_gets_its_code(pair: Pair, wrong: bytes, code: int) -> None:
    stream, method, reply = await ask(pair, GREETING, wrong)
    async with stream:
        assert method == b"\x05\x00"
        assert reply[:2] == bytes((5, code))
    await pair.settle(lambda: len(pair.client.log.denied) == 1)


async def test_a_slow_greeting_is_cut_after_ten_seconds(pair: Pair) -> None:
    async with await trio.open_tcp_stream(*pair.client.socks5) as stream:
        await stream.send_all(b"\x05")
        await pair.settle(lambda: len(pair.client.plane.socks5.greetings) == 1)
        (greeting,) = pair.client.plane.socks5.greetings
        greeting.on_time(pair.reactor.clock() + 9)
        assert pair.client.plane.socks5.greetings
        greeting.on_time(pair.reactor.clock() + 11)
        assert not pair.client.plane.socks5.greetings
        await trio.testing.wait_all_tasks_blocked()
    assert pair.client.log.denied == ["socks5: no request within 10 s"]
