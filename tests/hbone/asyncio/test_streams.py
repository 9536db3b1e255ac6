"""Tunnels under asyncio, on the loopback interface."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import pathlib
import socket
import ssl
import tempfile
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import pytest
from tests.support.tunnels import Watched, ca, who

import hbone
import hbone.asyncio
from hbone.admission import Admission
from hbone.errors import (
    ConnectionLost,
    ConnectRejected,
    ErrorCode,
    PeerIdentityError,
    StreamResetError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine

P = ParamSpec("P")
R = TypeVar("R")
ORDERS = "spiffe://cluster.local/ns/shop/sa/orders"


def under_asyncio(test: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, R]:
    """pytest-trio takes every async test for its own."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return asyncio.run(asyncio.wait_for(test(*args, **kwargs), 30))

    del run.__wrapped__
    return run


def source_of(name: str) -> hbone.StaticSource:
    identity = who(name)
    return hbone.StaticSource(identity.svid, identity.bundles)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


@contextlib.asynccontextmanager
async def serving(
    handler: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[object]] = echo, **options: Any
) -> AsyncIterator[tuple[int, asyncio.Task[None]]]:
    started: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    options.setdefault("authorize", hbone.same_trust_domain)
    server = asyncio.create_task(
        hbone.asyncio.serve(
            handler,
            source_of("orders"),
            0,
            host="127.0.0.1",
            started=lambda addresses: started.set_result(addresses[0][1]),
            **options,
        )
    )
    try:
        yield await started, server
    finally:
        server.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await server


@under_asyncio
async def test_reader_and_writer_are_asyncios_own() -> None:
    async with serving() as (port, _), hbone.asyncio.ConnectionPool(source_of("web")) as pool:
        reader, writer = await pool.connect("10.0.0.7:8080", via=("127.0.0.1", port), peer=ORDERS)
        assert writer.get_extra_info("peer") == ca().id("shop", "orders")
        writer.write(b"hello\n")
        await writer.drain()
        assert await reader.readline() == b"hello\n"
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()


@under_asyncio
async def test_a_hundred_streams_share_one_tunnel() -> None:
    async with serving() as (port, _), hbone.asyncio.ConnectionPool(source_of("web")) as pool:

        async def one(number: int) -> bytes:
            reader, writer = await pool.connect("10.0.0.7:8080", via=("127.0.0.1", port), peer=ORDERS)
            writer.write(b"%d" % number)
            writer.write_eof()
            answer = await reader.read()
            writer.close()
            return answer

        answers = await asyncio.gather(*(one(number) for number in range(100)))
        assert answers == [b"%d" % number for number in range(100)]
        assert pool.statistics().tunnels == 1


@under_asyncio
async def test_megabytes_with_back_pressure() -> None:
    async with serving() as (port, _), hbone.asyncio.ConnectionPool(source_of("web")) as pool:
        reader, writer = await pool.connect("10.0.0.7:8080", via=("127.0.0.1", port), peer=ORDERS)

        async def send() -> None:
            for _ in range(100):
                writer.write(bytes(100_000))
                await writer.drain()
                assert writer.transport.get_write_buffer_size() <= 64 * 1024
            writer.write_eof()

        sending = asyncio.create_task(send())
        received = 0
        while data := await reader.read(65536):
            received += len(data)
        await sending
        writer.close()
        assert received == 10_000_000


@under_asyncio
async def test_a_reader_that_sleeps_stalls_alone() -> None:
    async with serving() as (port, _), hbone.asyncio.ConnectionPool(source_of("web")) as pool:
        _, sleeper = await pool.connect("10.0.0.7:8080", via=("127.0.0.1", port), peer=ORDERS)
        sleeper.write(bytes(5_000_000))  # the echo of it is never read
        reader, writer = await pool.connect("10.0.0.7:8080", via=("127.0.0.1", port), peer=ORDERS)
        for _ in range(50):
            writer.write(bytes(50_000))
            assert len(await reader.readexactly(50_000)) == 50_000
        sleeper.transport.abort()


@under_asyncio
async def test_a_reset_is_a_connection_reset_error() -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.transport.abort()

    async with serving(reset) as (port, _), hbone.asyncio.ConnectionPool(source_of("web")) as pool:
        reader, writer = await pool.connect("10.0.0.7:8080", via=("127.0.0.1", port), peer=ORDERS)
        writer.write(b"x")
        with pytest.raises(ConnectionResetError) as caught:
            await reader.read()
        assert isinstance(caught.value.__cause__, StreamResetError)
        assert caught.value.__cause__.code is ErrorCode.CONNECT_ERROR


@under_asyncio
async def test_close_sends_everything_first() -> None:
    received = bytearray()
    done = asyncio.Event()

    async def collect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.extend(await reader.read())
        done.set()

    async with serving(collect) as (port, _), hbone.asyncio.ConnectionPool(source_of("web")) as pool:
        _, writer = await pool.connect("10.0.0.7:8080", via=("127.0.0.1", port), peer=ORDERS)
        writer.write(b"x" * 1_000_000)
        writer.close()
        await writer.wait_closed()
        await done.wait()
    assert len(received) == 1_000_000


@under_asyncio
async def test_an_answer_that_came_before_all_was_asked_is_read_whole() -> None:
    size = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"a" * size)  # and END_STREAM, then RST_STREAM NO_ERROR. Source: RFC 9113 §8.1

    async with serving(answer) as (port, _), hbone.asyncio.ConnectionPool(source_of("web")) as pool:
        for size in (6, 200_000):  # the latter is more than asyncio's reader takes before it pauses
            reader, writer = await pool.connect("10.0.0.7:8080", via=("127.0.0.1", port), peer=ORDERS)
            with contextlib.suppress(ConnectionResetError):
                while True:
                    writer.write(bytes(100_000))
                    await writer.drain()
            assert await reader.read() == b"a" * size
            with pytest.raises(ConnectionResetError):
                await writer.drain()


@under_asyncio
async def test_a_handler_decides_before_it_accepts() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        transport = writer.transport
        assert isinstance(transport, hbone.asyncio.HboneTransport)
        assert str(writer.get_extra_info("request").authority) == "10.0.0.7:8080"
        transport.reject(401)

    async with serving(refuse, accept=False) as (port, _):
        async with hbone.asyncio.ConnectionPool(source_of("web")) as pool:
            with pytest.raises(ConnectRejected) as caught:
                await pool.connect("10.0.0.7:8080", via=("127.0.0.1", port), peer=ORDERS)
            assert caught.value.status == 401


@under_asyncio
async def test_a_handlers_fault_is_its_streams_alone() -> None:
    async def fail(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.read(1) == b"f":
            raise ValueError("a fault of the handler's")
        await echo(reader, writer)

    async with serving(fail) as (port, _), hbone.asyncio.ConnectionPool(source_of("web")) as pool:
        good, good_writer = await pool.connect("10.0.0.7:8080", via=("127.0.0.1", port), peer=ORDERS)
        bad, bad_writer = await pool.connect("10.0.0.7:8080", via=("127.0.0.1", port), peer=ORDERS)
        bad_writer.write(b"f")
        with pytest.raises(ConnectionResetError):
            await bad.read()
        good_writer.write(b"-still here")
        assert await good.readexactly(10) == b"still here"


@under_asyncio
async def test_another_peer_is_refused_and_nobody_there_is_said() -> None:
    async with serving() as (port, _), hbone.asyncio.ConnectionPool(source_of("web")) as pool:
        with pytest.raises(PeerIdentityError, match="orders"):
            await pool.connect(
                "10.0.0.7:8080", via=("127.0.0.1", port), peer="spiffe://cluster.local/ns/shop/sa/payments"
            )
        with pytest.raises(ConnectionLost, match=r"127\.0\.0\.1:1"):
            await pool.connect("10.0.0.7:8080", via=("127.0.0.1", 1), peer=ORDERS)


@under_asyncio
async def test_a_silent_peer_is_given_up() -> None:
    async with hbone.asyncio.ConnectionPool(source_of("web"), dial_timeout=0.05) as pool:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            with pytest.raises(ConnectionLost, match=r"within 0\.05 s"):
                await pool.connect("10.0.0.7:8080", via=("127.0.0.1", port), peer=ORDERS)


@under_asyncio
async def test_an_answer_that_a_stopped_server_cut_does_not_look_complete() -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"half")
        await asyncio.sleep(3600)

    async with hbone.asyncio.ConnectionPool(source_of("web")) as pool:
        async with serving(half, drain_timeout=0.05) as (port, _):
            reader, writer = await pool.connect("10.0.0.7:8080", via=("127.0.0.1", port), peer=ORDERS)
            assert await reader.readexactly(4) == b"half"
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()


@under_asyncio
async def test_a_draining_server_finishes_its_streams() -> None:
    async with serving() as (port, server), hbone.asyncio.ConnectionPool(source_of("web")) as pool:
        reader, writer = await pool.connect("10.0.0.7:8080", via=("127.0.0.1", port), peer=ORDERS)
        server.cancel()
        await asyncio.sleep(0)
        writer.write(b"still served")
        assert await reader.readexactly(12) == b"still served"
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
        with contextlib.suppress(asyncio.CancelledError):
            await server
        assert pool.statistics().tunnels == 0


@under_asyncio
async def test_a_refused_stream_is_tried_on_another_tunnel() -> None:
    tries = 0

    async def refuse_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            assert isinstance(writer.transport, hbone.asyncio.HboneTransport)
            writer.transport.reset(ErrorCode.REFUSED_STREAM)
        else:
            assert isinstance(writer.transport, hbone.asyncio.HboneTransport)
            writer.transport.accept()
            await echo(reader, writer)

    async with serving(refuse_once, accept=False) as (port, _):
        async with hbone.asyncio.ConnectionPool(source_of("web")) as pool:
            reader, writer = await pool.connect("10.0.0.7:8080", via=("127.0.0.1", port), peer=ORDERS)
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
    assert tries == 2


@under_asyncio
async def test_closing_the_pool_gives_up_what_is_being_dialled() -> None:
    pool = hbone.asyncio.ConnectionPool(source_of("web"))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(5)
        dialing = [
            asyncio.create_task(pool.connect("10.0.0.7:8080", via=silent.getsockname(), peer=ORDERS)) for _ in range(5)
        ]
        await asyncio.sleep(0)
        await pool.aclose()
        for outcome in await asyncio.wait_for(asyncio.gather(*dialing, return_exceptions=True), 5):
            assert isinstance(outcome, ConnectionLost)
        accepted, _ = await asyncio.to_thread(silent.accept)
        with accepted:
            accepted.settimeout(5)
            while await asyncio.to_thread(accepted.recv, 65536):
                pass  # to the end of what it sent: the connection is closed


def tls_contexts(directory: pathlib.Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A client's and a server's, for TLS of the application's own inside a stream."""
    issued = ca().server("orders.example")
    (directory / "cert.pem").write_bytes(issued.cert_pem)
    (directory / "key.pem").write_bytes(issued.key_pem)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(directory / "cert.pem", directory / "key.pem")
    return ssl.create_default_context(cadata=ca().root_pem.decode()), server


async def shout_over_tls(context: ssl.SSLContext, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    transport = await loop.start_tls(writer.transport, protocol, context, server_side=True)
    assert transport is not None
    writer = asyncio.StreamWriter(transport, protocol, reader, loop)
    while data := await reader.read(65536):
        writer.write(data.upper())
        await writer.drain()
    writer.close()


@under_asyncio
async def test_an_application_may_speak_tls_of_its_own_inside() -> None:
    with tempfile.TemporaryDirectory() as directory:
        inner, served = tls_contexts(pathlib.Path(directory))
    async with serving(functools.partial(shout_over_tls, served)) as (port, _):
        async with hbone.asyncio.ConnectionPool(source_of("web")) as pool:
            bystander_reader, bystander = await pool.connect("10.0.0.7:443", via=("127.0.0.1", port), peer=ORDERS)
            reader, writer = await pool.connect("10.0.0.7:443", via=("127.0.0.1", port), peer=ORDERS)
            await writer.start_tls(inner, server_hostname="orders.example")
            writer.write(b"hello" * 100_000)
            assert await reader.readexactly(500_000) == b"HELLO" * 100_000
            writer.close()
            await writer.wait_closed()
            await bystander.start_tls(inner, server_hostname="orders.example")  # the same tunnel, unharmed
            bystander.write(b"still here")
            assert await bystander_reader.readexactly(10) == b"STILL HERE"
            assert pool.statistics().tunnels == 1
            bystander.close()
            await bystander.wait_closed()


@under_asyncio
async def test_what_is_written_before_the_answer_follows_it() -> None:
    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert isinstance(writer.transport, hbone.asyncio.HboneTransport)
        writer.write(b"early")
        writer.transport.accept()
        assert await reader.read() == b""

    async with serving(early, accept=False) as (port, _):
        async with hbone.asyncio.ConnectionPool(source_of("web")) as pool:
            reader, writer = await pool.connect("10.0.0.7:8080", via=("127.0.0.1", port), peer=ORDERS)
            assert await reader.readexactly(5) == b"early"
            writer.close()


class Wire:
    """A TCP relay in front of a server, whose connections a test can freeze."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.connections = 0
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.tasks: list[asyncio.Task[Any]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self.tasks.append(task)
        flowing = self.flowing
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.port)

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                await flowing.wait()
                target.write(data)
            target.close()

        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))
        for each in (writer, far_writer):
            each.close()
            with contextlib.suppress(ConnectionError):
                await each.wait_closed()

    async def stop(self) -> None:
        """Cut every connection."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks)

    def freeze(self) -> None:
        """Let nothing more through on the connections that there are."""
        self.flowing.clear()
        self.flowing = asyncio.Event()
        self.flowing.set()


class LaterPool(hbone.asyncio.ConnectionPool):
    """A pool whose clock a test puts forward."""

    later = 0.0

    def _now(self) -> float:
        return super()._now() + self.later


@pytest.mark.parametrize("frozen", [False, True])
def test_a_tunnel_unused_for_long_is_asked_before_it_is_used(frozen: bool) -> None:
    @under_asyncio
    async def main() -> None:
        async with serving(drain_timeout=0.1) as (port, _):
            wire = Wire(port)
            relay = await asyncio.start_server(wire.serve, "127.0.0.1", 0)
            via = relay.sockets[0].getsockname()[:2]
            async with relay, LaterPool(source_of("web"), ping_timeout=0.2) as pool:
                _, writer = await pool.connect("10.0.0.7:8080", via=via, peer=ORDERS)
                writer.close()
                pool.later = 60.0
                if frozen:
                    wire.freeze()
                reader, writer = await pool.connect("10.0.0.7:8080", via=via, peer=ORDERS)
                writer.write(b"alive")
                assert await reader.readexactly(5) == b"alive"
                assert wire.connections == (2 if frozen else 1)
                assert pool.statistics().tunnels == 1
                asked = [tunnel.engine.statistics().rtt is not None for tunnel in pool._tunnels]
                assert any(asked) is not frozen
                writer.close()
            await wire.stop()

    main()


@under_asyncio
async def test_what_is_not_tls_costs_its_own_connection() -> None:
    async with serving() as (port, _), hbone.asyncio.ConnectionPool(source_of("web")) as pool:
        reader, writer = await pool.connect("10.0.0.7:8080", via=("127.0.0.1", port), peer=ORDERS)
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + bytes(100), b""):
            stranger_reader, stranger = await asyncio.open_connection("127.0.0.1", port)
            stranger.write(garbage)
            stranger.write_eof()
            with contextlib.suppress(ConnectionError):
                await stranger_reader.read()  # to the end: the connection is closed
            stranger.close()
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        writer.close()


async def nobody_shakes_hands(admission: Admission) -> None:
    while admission.count:
        await asyncio.sleep(0)


@under_asyncio
async def test_too_many_handshakes_of_one_address_are_closed_at_once() -> None:
    admission = Admission(per_address=2, waiting=0)
    async with serving(admission=admission) as (port, _):
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        refused, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(ConnectionError):
            assert await refused.read() == b""
        for _, each in silent:
            each.close()
        writer.close()
        await nobody_shakes_hands(admission)
        async with hbone.asyncio.ConnectionPool(source_of("web")) as pool:
            reader, writer = await pool.connect("10.0.0.7:8080", via=("127.0.0.1", port), peer=ORDERS)
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            writer.close()
        await nobody_shakes_hands(admission)


async def keeps_out(admission: Watched) -> None:
    while not admission.kept_out:
        await asyncio.sleep(0)


@under_asyncio
async def test_handshakes_over_the_limit_wait_for_their_turn() -> None:
    admission = Watched(per_address=2)
    async with serving(admission=admission) as (port, _), hbone.asyncio.ConnectionPool(source_of("web")) as pool:
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        dial = asyncio.create_task(pool.connect("10.0.0.7:8080", via=("127.0.0.1", port), peer=ORDERS))
        await keeps_out(admission)
        for _, each in silent:
            each.close()
        reader, writer = await dial
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        writer.close()
        await nobody_shakes_hands(admission)


@contextlib.asynccontextmanager
async def kept_waiting(**options: Any) -> AsyncIterator[asyncio.StreamReader]:
    """One that waits at a server, for a turn that it will not get."""
    admission = Watched(per_address=1)
    assert admission.enter("127.0.0.1")  # as another server of the process would
    async with serving(admission=admission, **options) as (port, _):
        _, shaking = await asyncio.open_connection("127.0.0.1", port, local_addr=("127.0.0.2", 0))
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await keeps_out(admission)
        yield reader
    while admission.count > 1:
        await asyncio.sleep(0)
    shaking.close()
    writer.close()


def test_who_waits_for_a_handshake_is_closed_when_its_time_is_over(caplog: pytest.LogCaptureFixture) -> None:
    @under_asyncio
    async def main() -> None:
        async with kept_waiting(config=hbone.ConnectionConfig(handshake_timeout=1)) as reader:
            with contextlib.suppress(ConnectionError):
                await reader.read()  # to the end: the connection is closed

    caplog.set_level("INFO")
    main()
    assert caplog.text.count("tunnel from 127.0.0.1 refused") == 1
    assert "the TLS handshake was not complete after 1 s" in caplog.text


@under_asyncio
async def test_who_waits_for_a_handshake_does_not_hold_up_the_end() -> None:
    async with kept_waiting(drain_timeout=3600):
        pass
