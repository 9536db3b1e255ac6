"""Tunnels and those who wait for them: limits, retries, deadlines, fairness."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

import pytest
import trio
from tests.support.compiled import stand_in
from tests.support.pair import CA, Lines, Pair, echo, fresh_port, make_host, open_pair, reset

from hbone.engine import frames
from hbone.engine.frames import FrameType
from hbone.errors import ErrorCode
from ztunnel.dataplane import Reactor
from ztunnel.mesh import Store, parse_ip

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hbone.events import Headers
    from ztunnel.dataplane.stream import StreamEnd


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with open_pair() as pair:
        with trio.fail_after(20):
            yield pair


async def warm(pair: Pair) -> trio.SocketStream:
    """One connection, whose tunnel stands."""
    await pair.serve(echo)
    stream = await pair.connect()
    await stream.send_all(b"x")
    assert await stream.receive_some(1) == b"x"
    return stream


async def test_silent_connections_are_limited_by_address_and_others_wait_ten_seconds(pair: Pair) -> None:
    address = pair.server.plane.listeners["hbone"].address
    inbound = pair.server.plane.inbound
    async with contextlib.AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(await trio.open_tcp_stream(str(address[0]), address[1])) for _ in range(40)
        ]
        await pair.settle(lambda: (len(inbound.tunnels), inbound.room.count) == (32, 8))
        for tunnel in list(inbound.tunnels):
            tunnel.on_time(pair.reactor.clock() + 9)
        assert len(inbound.tunnels) == 32
        inbound.room.on_time(pair.reactor.clock() + 11)
        for tunnel in list(inbound.tunnels):
            tunnel.on_time(pair.reactor.clock() + 11)
        assert not inbound.tunnels
        for stream in streams[32:]:
            with trio.fail_after(30):
                assert await stream.receive_some(1) == b""
        assert "TLS handshake was not complete after 10 s" in pair.server.log.denied[0]


async def test_a_connect_that_was_not_processed_is_tried_again(pair: Pair) -> None:
    async with await warm(pair):
        inbound = pair.server.plane.inbound
        real = inbound.connect_received
        refused = 0

        def refuse_once(end: StreamEnd, headers: Headers) -> None:
            nonlocal refused
            refused += 1
            stand_in(inbound, "connect_received", real)
            end.reset(ErrorCode.REFUSED_STREAM)

        stand_in(inbound, "connect_received", refuse_once)
        async with await pair.connect() as stream:
            await stream.send_all(b"y")
            assert await stream.receive_some(1) == b"y"
        assert refused == 1


async def test_a_connect_that_was_processed_is_not(pair: Pair) -> None:
    async with await warm(pair):
        asked = 0

        def fail(end: StreamEnd, headers: Headers) -> None:
            nonlocal asked
            asked += 1
            end.reset(ErrorCode.INTERNAL_ERROR)

        stand_in(pair.server.plane.inbound, "connect_received", fail)
        async with await pair.connect() as stream:
            with contextlib.suppress(trio.BrokenResourceError):
                assert await stream.receive_some(1) == b""
        assert asked == 1
    await pair.settle(lambda: len(pair.client.log.errors) == 1)
    assert "INTERNAL_ERROR" in pair.client.log.errors[0]


# What one read brings


async def test_an_application_that_resets_at_once_takes_no_other_stream_with_it(pair: Pair) -> None:
    async def bang(stream: trio.SocketStream) -> None:
        reset(stream)

    async with await warm(pair) as other:
        await pair.serve(bang)
        async with pair.looking_away():
            stream = await pair.connect()
            await pair.settle(lambda: len(pair.server.log.completed) == 1)
        async with stream:
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some(1)
        await other.send_all(b"y")
        assert await other.receive_some(1) == b"y"


async def test_an_application_that_reads_on_and_resets_takes_no_other_stream_with_it(pair: Pair) -> None:
    served: list[trio.SocketStream] = []
    go_on = trio.Event()

    async def late(stream: trio.SocketStream) -> None:
        served.append(stream)
        await go_on.wait()
        async for _ in stream:
            pass

    async with await warm(pair) as other:
        await pair.serve(late)
        (tunnel,) = pair.client.plane.dialer.tunnels
        async with await pair.connect() as stream, trio.open_nursery() as nursery:

            @nursery.start_soon
            async def send() -> None:
                with contextlib.suppress(trio.BrokenResourceError):
                    while True:
                        await stream.send_all(bytes(65_536))

            await pair.settle(lambda: len(pair.server.plane.connections.inbound) == 2)
            *_, connection = pair.server.plane.connections.inbound
            relay = connection.relay
            assert relay is not None
            await pair.settle(lambda: bool(relay._queue) and tunnel.streams[max(tunnel.streams)].waits)
            async with pair.looking_away():  # WINDOW_UPDATE and RST_STREAM come in one read
                go_on.set()
                await pair.settle(lambda: not relay._queue)
                reset(served[0])
                await pair.settle(lambda: len(pair.server.log.completed) == 1)
        await other.send_all(b"y")
        assert await other.receive_some(1) == b"y"


async def test_what_a_tunnel_brought_before_it_broke_is_not_taken_for_complete(pair: Pair) -> None:
    async def greet(stream: trio.SocketStream) -> None:
        await stream.send_all(b"220 ready")
        await trio.sleep_forever()

    async with await warm(pair):
        await pair.serve(greet)
        async with pair.looking_away():  # 200, bytes and the fault come in one read
            stream = await pair.connect()
            await pair.settle(lambda: [c.bytes_moved()[1] for c in pair.server.plane.connections.inbound] == [1, 9])
            (tunnel,) = pair.server.plane.inbound.tunnels
            tunnel.engine.out += frames.frame(FrameType.PING, 0, 3, bytes(8))
            tunnel.flush()
        async with stream:
            assert await stream.receive_some() == b"220 ready"
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some(1)


async def test_an_app_that_gives_up_before_the_answer_takes_its_stream_with_it(pair: Pair) -> None:
    async with await warm(pair):
        asked: list[StreamEnd] = []
        stand_in(pair.server.plane.inbound, "connect_received", lambda end, headers: asked.append(end))
        stream = await pair.connect()
        await pair.settle(lambda: len(asked) == 1)
        (pending,) = pair.client.plane.outbound.pending
        pair.client.plane.outbound.on_time(pending.started + 1)  # it waits for long: now a reset is watched for
        reset(stream)
        await pair.settle(lambda: asked[0].closed)
        assert not pair.client.plane.outbound.pending


async def test_a_connect_without_an_answer_is_given_up(pair: Pair) -> None:
    async with await warm(pair):
        asked: list[StreamEnd] = []
        stand_in(pair.server.plane.inbound, "connect_received", lambda end, headers: asked.append(end))
        async with await pair.connect() as stream:
            await pair.settle(lambda: len(asked) == 1)
            (pending,) = pair.client.plane.outbound.pending
            pair.client.plane.outbound.on_time(pending.started + 21)
            with contextlib.suppress(trio.BrokenResourceError):
                assert await stream.receive_some(1) == b""
        await pair.settle(lambda: asked[0].closed)
    assert pair.client.log.errors == ["connection failed: timed out after 20 s"]


async def test_a_stream_that_dies_cancels_the_dial_to_the_application(pair: Pair) -> None:
    async with await warm(pair):
        with contextlib.ExitStack() as stack:
            deaf = stack.enter_context(socket.create_server((pair.server.ip, fresh_port()), backlog=0))
            for _ in range(3):  # its queue is full, so it answers no further SYN
                filler = stack.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(deaf.getsockname())
            pair.app_port = deaf.getsockname()[1]
            other = await pair.connect()
            await pair.settle(lambda: len(pair.server.plane.connections) == 2)
            (tunnel,) = pair.client.plane.dialer.tunnels
            end = tunnel.streams[max(tunnel.streams)]
            watched = len(pair.reactor.handlers)
            end.reset(ErrorCode.CANCEL)
            await pair.settle(lambda: len(pair.server.plane.connections) == 1)
            assert len(pair.reactor.handlers) == watched - 1
            await other.aclose()


async def test_new_tunnels_use_the_newest_certificate(pair: Pair) -> None:
    async with await warm(pair):
        (tunnel,) = pair.server.plane.inbound.tunnels
        old = tunnel.endpoint.tls.peer_chain[0].serial_number
        pair.client.identities.identity = CA.identity("default", "client")
        pair.client.plane.dialer.pool.retire(next(iter(pair.client.plane.dialer.tunnels)))
        async with await pair.connect() as stream:
            await stream.send_all(b"y")
            assert await stream.receive_some(1) == b"y"
            serials = {t.endpoint.tls.peer_chain[0].serial_number for t in pair.server.plane.inbound.tunnels}
            assert len(serials) == 2
            assert old in serials


async def test_an_idle_tunnel_is_closed(pair: Pair) -> None:
    stream = await warm(pair)
    await stream.aclose()
    dialer = pair.client.plane.dialer
    await pair.settle(lambda: not len(pair.client.plane.connections))
    dialer.on_time(pair.reactor.clock() + 299)
    assert len(dialer.tunnels) == 1
    dialer.on_time(pair.reactor.clock() + 301)
    assert not dialer.tunnels
    await pair.settle(lambda: not pair.server.plane.inbound.tunnels)


def test_the_whole_works_with_trio_as_a_guest() -> None:
    reactor = Reactor()
    store = Store()
    client, server = make_host(reactor, store, "client"), make_host(reactor, store, "server")

    async def main() -> bytes:
        client.plane.start()
        server.plane.start()
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(fresh_port(), host=server.ip)
            port = listeners[0].socket.getsockname()[1]
            nursery.start_soon(trio.serve_listeners, echo, listeners)
            client.calls.destination = (parse_ip(server.ip), port)
            answers = b""
            for _ in range(20):
                async with await trio.open_tcp_stream(*client.outbound) as stream:
                    await stream.send_all(b"x")
                    answers += await stream.receive_some(1)
            nursery.cancel_scope.cancel()
        await client.plane.drain()
        await server.plane.drain()
        client.plane.close()
        server.plane.close()
        return answers

    assert reactor.run(main) == b"x" * 20
    assert isinstance(server.log, Lines)
    assert len(server.log.completed) == 20


async def test_a_connection_that_waited_for_its_workload_goes_on_at_once(pair: Pair) -> None:
    async with await warm(pair):
        client = pair.client
        pair.store.apply_addresses([], [client.workload.uid])
        async with await pair.connect() as stream:
            await pair.settle(lambda: len(client.plane.outbound.pending) == 1)
            await trio.testing.wait_all_tasks_blocked()
            pair.store.apply_addresses([client.workload], [])
            await stream.send_all(b"y")
            assert await stream.receive_some(1) == b"y"
