"""gRPC over TLS under Trio: our client and server, and what hostile or absent peers do to them."""

from __future__ import annotations

import struct
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
from hpack.hpack import Encoder
from tests.support.grpc import (
    CA,
    CHAT,
    ECHO,
    FAIL,
    META,
    MIB,
    POUR,
    WAIT,
    Methods,
    RawPeer,
    client_context,
    server_context,
    serving,
)

from hbone.admission import Admission
from hbone.engine import frames
from hbone.errors import LocalProtocolError, TlsError
from hbone.grpc import GrpcConfig, GrpcError, GrpcUnavailable, StatusCode
from hbone.tls import TlsContext
from hbone.trio.grpc import GrpcClient, GrpcServer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

# Calls


async def test_unary_calls_and_streams_share_a_connection() -> None:
    async with serving() as site, site.client() as client:
        async with client.stream(CHAT) as chat:
            for text in (b"a", b"", b"c" * 100_000):
                await chat.send(text)
                assert await client.unary(ECHO, text) == text
                assert await chat.receive() == b"re: " + text
            await chat.end()
            assert await chat.receive() is None
        assert site.server.statistics.accepted == 1


async def test_a_stream_is_iterated_to_its_end() -> None:
    async with serving() as site, site.client() as client, client.stream(CHAT) as chat:
        for text in (b"1", b"2", b"3"):
            await chat.send(text)
        await chat.end()
        assert [message async for message in chat] == [b"re: 1", b"re: 2", b"re: 3"]


@pytest.mark.parametrize("size", [0, 1, 70_000, 64 * MIB])
async def test_messages_of_any_size_pass_both_ways(size: int) -> None:
    message = bytes(size)
    async with serving() as site, site.client() as client:
        assert await client.unary(ECHO, message, max_bytes=64 * MIB) == message


async def test_an_answer_over_the_limit_is_refused() -> None:
    async with serving() as site, site.client() as client:
        with pytest.raises(GrpcError, match=r"RESOURCE_EXHAUSTED: a message of 1001 bytes; the limit is 1000"):
            await client.unary(ECHO, b"x" * 1001, max_bytes=1000)
        with pytest.raises(GrpcError, match=r"RESOURCE_EXHAUSTED.*67108865 bytes; the limit is 67108864"):
            await client.unary(ECHO, bytes(64 * MIB + 1), max_bytes=100 * MIB)


async def test_metadata_passes_both_ways() -> None:
    async with serving() as site, site.client() as client:
        sent = [
            ("authorization", "Bearer x"),
            ("clusterid", "Kubernetes"),
            ("raw-bin", b"\x00\xff"),
            ("twice", "a"),
            ("twice", "b"),
        ]
        async with client.stream(META, sent) as stream:
            await stream.end()
            message = await stream.receive()
            assert message == repr(sorted(sent)).encode()
            assert await stream.receive() is None
            assert stream.metadata == (("served-by", "us"), ("blob-bin", b"\x01\x02"))


@pytest.mark.parametrize("code", [code for code in StatusCode if code is not StatusCode.OK])
async def test_every_status_arrives_with_its_words(code: StatusCode) -> None:
    async with serving() as site, site.client() as client:
        with pytest.raises(GrpcError) as caught:
            await client.unary(FAIL, b"%d" % code)
        assert caught.value.code is code
        assert caught.value.message == "as asked: é 100%"
        assert caught.value.trailers == (("why", "asked"), ("why-bin", b"\x00\xff"))


async def test_a_broken_handler_costs_its_call_and_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as site, site.client() as client:
        with pytest.raises(GrpcError) as caught:
            await client.unary(FAIL, b"raise")
        assert caught.value.code is StatusCode.INTERNAL
        assert "secret" not in str(caught.value)
        assert "an inner secret" in caplog.text  # it is for the operator
        assert await client.unary(ECHO, b"next") == b"next"


async def test_a_status_may_come_from_a_task_of_the_handler() -> None:
    async with serving() as site, site.client() as client:
        with pytest.raises(GrpcError, match="NOT_FOUND: from a task"):
            await client.unary(FAIL, b"in a task")


async def test_an_unknown_method_is_unimplemented() -> None:
    async with serving() as site, site.client() as client:
        with pytest.raises(GrpcError, match="UNIMPLEMENTED"):
            await client.unary("/test.Service/Other", b"")


async def test_a_deadline_ends_the_call_at_both_ends() -> None:
    async with serving() as site, site.client() as client:
        with pytest.raises(GrpcError, match=r"DEADLINE_EXCEEDED"):
            await client.unary(WAIT, b"", timeout=0.1)
        while not site.methods.cancelled:
            await trio.sleep(0.01)


async def test_the_server_keeps_the_clients_deadline_by_itself() -> None:
    async with serving() as site, site.client() as client, client.stream(WAIT, timeout=0.05) as stream:
        with pytest.raises(GrpcError, match="DEADLINE_EXCEEDED: the call's time is over"):
            await stream.receive()
        assert site.methods.cancelled == 1


async def test_leaving_a_stream_cancels_its_handler() -> None:
    async with serving() as site, site.client() as client:
        async with client.stream(WAIT) as stream:
            await stream.send(b"hello")
            await site.methods.waiting.wait()
        with trio.fail_after(5):
            while not site.methods.cancelled:
                await trio.sleep(0.01)
        assert await client.unary(ECHO, b"x") == b"x"


async def test_leaving_the_client_cancels_its_calls_at_the_server() -> None:
    async with serving() as site:
        async with site.client() as client, client.stream(WAIT):
            await site.methods.waiting.wait()
        with trio.fail_after(5):
            await site.settled()
        assert site.methods.cancelled == 1


async def test_calls_after_the_end_are_misuse() -> None:
    async with serving() as site, site.client() as client:
        async with client.stream(CHAT) as chat:
            await chat.end()
            with pytest.raises(LocalProtocolError, match="after the end"):
                await chat.send(b"x")
        with pytest.raises(LocalProtocolError, match="a header cannot carry"):
            await client.unary(ECHO, b"", [("authorization", "Bearer x\n")])


async def test_a_hundred_calls_at_once_and_one_too_many() -> None:
    async with serving() as site, site.client() as client:
        await client.unary(ECHO, b"")  # the server's limit is known now
        answers = []

        async def call(number: int) -> None:
            answers.append(await client.unary(ECHO, b"%d" % number))

        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(call, number)
            await trio.testing.wait_all_tasks_blocked()
        assert sorted(answers) == sorted(b"%d" % number for number in range(100))
        async with trio.open_nursery() as nursery:
            nursery.cancel_scope.deadline = trio.current_time() + 30
            for _ in range(100):
                nursery.start_soon(_hold, client)
            while len(client._connection.grpc.calls) < 100:
                await trio.sleep(0.01)
            with pytest.raises(GrpcUnavailable, match="100 calls are open") as caught:
                await client.unary(ECHO, b"")
            assert not caught.value.processed
            nursery.cancel_scope.cancel()


async def _hold(client: GrpcClient) -> None:
    async with client.stream(WAIT):
        await trio.sleep_forever()


async def test_a_reader_that_stands_still_stalls_only_its_call() -> None:
    async with serving() as site, site.client() as client, client.stream(POUR) as stream:
        assert await stream.receive() == bytes(MIB)
        for number in range(50):
            assert await client.unary(ECHO, b"%d" % number * 1000) == b"%d" % number * 1000
        assert await stream.receive() == bytes(MIB)
        connection = next(iter(site.server._connections))
        assert sum(call.unsent for call in connection.grpc.calls.values()) <= 2 * MIB


async def test_an_error_of_the_block_is_raised_as_it_is() -> None:
    async with serving() as site:
        with pytest.raises(ZeroDivisionError):
            async with site.client() as client, client.stream(CHAT):
                _ = 1 / 0
        with trio.move_on_after(0.1) as scope:
            async with site.client() as client, client.stream(WAIT) as stream:
                await stream.receive()
        assert scope.cancelled_caught


# Identity


async def test_the_server_knows_a_client_with_a_certificate_and_lets_others_in() -> None:
    async with serving() as site:
        identity = CA.identity("shop", "orders")
        async with site.client(identity) as client:
            await client.unary(ECHO, b"")
            assert client.tls.alpn == "h2"
        async with site.client() as client:
            await client.unary(ECHO, b"")
        assert site.methods.peers == [identity.svid.id, None]


async def test_a_server_of_another_name_is_not_trusted() -> None:
    async with serving() as site:
        context = client_context(name="istiod.istio-system.svc")
        with pytest.raises(TlsError):
            async with GrpcClient.connect("127.0.0.1", site.port, context):
                pytest.fail("connected")


async def test_a_workload_cannot_pose_as_the_server() -> None:
    server = GrpcServer(Methods().table())
    workload = TlsContext.server(CA.identity("shop", "orders"), "optional")
    with pytest.raises(TlsError):
        await _with_memory_server(server, _expect_no_entry, context=workload)


async def _expect_no_entry(client: GrpcClient) -> None:
    async with client:
        pytest.fail("connected")


async def test_each_connection_gets_the_newest_certificate() -> None:
    asked = []

    def source() -> TlsContext:
        asked.append(server_context())
        return asked[-1]

    server = GrpcServer(Methods().table())
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(server.serve, listeners, source)
        port = listeners[0].socket.getsockname()[1]
        for count in (1, 2):
            async with GrpcClient.connect("127.0.0.1", port, client_context()) as client:
                await client.unary(ECHO, b"")
            assert len(asked) == count
        server.drain()


# The transport


async def test_a_refused_connection_names_host_port_and_reason() -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    await listeners[0].aclose()
    with pytest.raises(GrpcUnavailable, match=rf"127\.0\.0\.1:{port} cannot be reached: connection refused") as caught:
        async with GrpcClient.connect("127.0.0.1", port, client_context()):
            pytest.fail("connected")
    assert caught.value.code is StatusCode.UNAVAILABLE
    assert not caught.value.processed


async def test_a_name_that_does_not_resolve_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any, **__: Any) -> Any:
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr(trio, "open_tcp_stream", fail)
    with pytest.raises(GrpcUnavailable, match=r"istiod.invalid:15012 cannot be reached: name or service not known"):
        async with GrpcClient.connect("istiod.invalid", 15012, client_context()):
            pytest.fail("connected")


async def test_a_server_that_closes_or_talks_nonsense_names_itself() -> None:
    async def close(stream: trio.SocketStream) -> None:
        await stream.receive_some(1)
        await stream.aclose()

    async def talk(stream: trio.SocketStream) -> None:
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await stream.receive_some(100_000)
        await stream.aclose()

    for handler, kind in ((close, GrpcUnavailable), (talk, TlsError)):
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, handler, listeners)
            port = listeners[0].socket.getsockname()[1]
            with pytest.raises(kind) as caught:
                async with GrpcClient.connect("127.0.0.1", port, client_context()):
                    pytest.fail("connected")
            if kind is GrpcUnavailable:
                assert f"127.0.0.1:{port}" in str(caught.value)
            nursery.cancel_scope.cancel()


async def test_calls_on_a_lost_connection_say_what_was_lost() -> None:
    async with serving() as site, site.client() as client:
        async with client.stream(WAIT) as stream:
            await site.methods.waiting.wait()
            for connection in list(site.server._connections):
                await trio.aclose_forcefully(connection.stream)
            with pytest.raises(GrpcUnavailable, match=rf"UNAVAILABLE: the connection to 127.0.0.1:{site.port} ended: "):
                await stream.receive()
        assert not client.usable
        with pytest.raises(GrpcUnavailable, match="is closing"):
            await client.unary(ECHO, b"")


async def test_a_drained_server_lets_calls_finish_and_returns() -> None:
    methods = Methods()
    server = GrpcServer(methods.table())
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(server.serve, listeners, server_context)
        port = listeners[0].socket.getsockname()[1]
        async with GrpcClient.connect("127.0.0.1", port, client_context()) as client, client.stream(CHAT) as chat:
            await chat.send(b"before")
            assert await chat.receive() == b"re: before"
            server.drain()
            while client.usable:
                await trio.sleep(0.01)
            await chat.send(b"x" * 500_000)
            assert await chat.receive() == b"re: " + b"x" * 500_000
            with pytest.raises(GrpcUnavailable, match="is closing"):
                await client.unary(ECHO, b"")
            with pytest.raises(GrpcUnavailable, match="refused"):
                async with GrpcClient.connect("127.0.0.1", port, client_context()):
                    pytest.fail("connected")
            await chat.end()
            assert await chat.receive() is None
    assert server.statistics.connections == 0


# Time, on a clock that jumps


async def _with_memory_server(
    server: GrpcServer,
    body: Callable[[GrpcClient], Awaitable[None]],
    *,
    context: TlsContext | None = None,
    config: GrpcConfig | None = None,
) -> None:
    """Run `body` with a client that is joined to `server` in memory."""
    ours, theirs = trio.testing.memory_stream_pair()
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_stream, theirs, context or server_context())
        try:
            await body(GrpcClient(ours, client_context(), config=config))
        except Exception as error:
            failure = error
    if failure is not None:
        raise failure
    assert server.statistics.connections == 0


async def test_an_old_connection_drains_and_its_calls_end(autojump_clock: trio.testing.MockClock) -> None:
    async def body(client: GrpcClient) -> None:
        async with client, client.stream(CHAT) as chat:
            await chat.send(b"x")
            assert await chat.receive() == b"re: x"
            began = trio.current_time()
            with pytest.raises(GrpcError, match=r"UNAVAILABLE: .*transport is closing"):
                await chat.receive()
            assert 900 + 10 <= trio.current_time() - began <= 1100 + 10
            assert not client.usable

    await _with_memory_server(GrpcServer(Methods().table(), config=GrpcConfig(max_connection_age=1000)), body)


async def test_an_idle_pair_stays_connected(autojump_clock: trio.testing.MockClock) -> None:
    async def body(client: GrpcClient) -> None:
        async with client:
            await trio.sleep(1000)
            assert await client.unary(ECHO, b"x") == b"x"

    await _with_memory_server(GrpcServer(Methods().table()), body)


class _Mute(trio.abc.Stream):
    """A transport that stops carrying bytes both ways once `cut` is set, without an error."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.cut = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if not self.cut:
            await self.stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self.stream.receive_some(max_bytes)
        if self.cut:
            await trio.sleep_forever()
        return data

    async def aclose(self) -> None:
        await self.stream.aclose()


async def test_a_dead_transport_is_noticed_by_both_ends(autojump_clock: trio.testing.MockClock) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    mute, deaf = _Mute(ours), _Mute(theirs)
    methods = Methods()
    server = GrpcServer(methods.table())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_stream, deaf, server_context())
        async with GrpcClient(mute, client_context()) as client, client.stream(WAIT) as stream:
            await methods.waiting.wait()
            await trio.testing.wait_all_tasks_blocked()
            mute.cut = deaf.cut = True
            began = trio.current_time()
            with pytest.raises(GrpcUnavailable, match="did not answer a PING within 10 seconds"):
                await stream.receive()
            assert 39 <= trio.current_time() - began <= 41
    assert methods.cancelled == 1
    assert server.statistics.connections == 0


async def test_a_peer_that_takes_nothing_of_a_message_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    methods = Methods()
    server = GrpcServer(methods.table(), config=GrpcConfig(stall_timeout=100))

    async def body(client: GrpcClient) -> None:
        async with client, client.stream(POUR) as stream:
            began = trio.current_time()
            while not methods.cancelled:
                await trio.sleep(1)
            assert 99 <= trio.current_time() - began <= 102
            with pytest.raises(GrpcError, match="CANCELLED"):
                await stream.receive()

    await _with_memory_server(server, body)


@pytest.mark.parametrize("step", ["silent", "half a handshake", "no preface", "no settings", "half a header block"])
async def test_a_peer_that_stops_early_is_closed_in_time(step: str, autojump_clock: trio.testing.MockClock) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    server = GrpcServer(Methods().table())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_stream, theirs, server_context())
        began = trio.current_time()
        peer = RawPeer(ours)
        if step == "half a handshake":
            peer.tls.handshake()
            await peer.flush()
        elif step != "silent":
            await peer.handshake(begin=False)
            if step != "no preface":
                await peer.send(frames.PREFACE)
            if step == "half a header block":
                await peer.send(frames.settings() + frames.settings(ack=True) + frames.frame(1, 0, 1, b"\x82"))
        await peer.read_to_end()
        assert trio.current_time() - began <= 10.1
        await ours.aclose()
    assert server.statistics.connections == 0


# Hostile peers


def _request(stream_id: int, fields: list[tuple[bytes, bytes]] | None = None) -> bytes:
    block = Encoder().encode(
        fields
        or [
            (b":method", b"POST"),
            (b":scheme", b"https"),
            (b":path", WAIT.encode()),
            (b":authority", b"localhost"),
            (b"content-type", b"application/grpc"),
        ]
    )
    return frames.header_block(stream_id, block, end_stream=False, max_frame=16384)


HOSTILE = {
    "garbage": bytes(range(256)) * 1000,
    "http/1.1": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "rapid resets": b"".join(_request(2 * n + 1) + frames.rst_stream(2 * n + 1, 8) for n in range(1000)),
    "pings": frames.ping(bytes(8)) * 100_000,
    "settings": frames.settings() * 100_000,
    "settings that nobody knows": frames.settings((i + 100, 1) for i in range(32)) * 1000,
    "priority chain": b"".join(frames.frame(2, 0, n + 2, struct.pack(">IB", n, 1)) for n in range(1, 1000)),
    "oversized frame": frames.HEADER.pack((2**24 - 1) << 8, 0, 1) + bytes(1000),
    "continuations": frames.frame(1, 0, 1) + frames.frame(9, 0, 1) * 10_000,
    "method not ascii": _request(1, [(b":method", "GÉT".encode()), (b":path", b"/"), (b":scheme", b"https")]) * 200,
    "push": frames.frame(5, 4, 1, bytes(8)),
    "window overflow": frames.window_update(0, 2**31 - 1) * 2,
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_client_costs_only_its_own_connection(name: str) -> None:
    async with serving() as site, site.client() as neighbour, neighbour.stream(CHAT) as chat:
        await chat.send(b"before")
        assert await chat.receive() == b"re: before"
        stream = await trio.open_tcp_stream("127.0.0.1", site.port)
        async with stream:
            peer = RawPeer(stream)
            await peer.handshake(begin=name not in ("garbage", "http/1.1"))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_send_all, peer, HOSTILE[name])
                with trio.fail_after(30):
                    await peer.read_to_end()  # the server closes
                nursery.cancel_scope.cancel()
        await chat.send(b"after")
        assert await chat.receive() == b"re: after"


async def _send_all(peer: RawPeer, data: bytes) -> None:
    try:
        await peer.send(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass


@pytest.mark.parametrize(
    "fields",
    [
        [(b":method", b"CONNECT"), (b":authority", b"10.0.0.1:80")],
        [(b":method", b"GET"), (b":scheme", b"https"), (b":path", b"/"), (b":authority", b"a")],
    ],
)
async def test_other_methods_are_answered_and_cost_nothing(fields: list[tuple[bytes, bytes]]) -> None:
    async with serving() as site:
        stream = await trio.open_tcp_stream("127.0.0.1", site.port)
        async with stream:
            peer = RawPeer(stream)
            await peer.handshake()
            await peer.send(_request(1, fields) + frames.goaway(0, 0))
            await trio.sleep(0.05)
            assert site.server.statistics.connections == 1
            assert site.server.statistics.calls_started == 0


@pytest.mark.parametrize(
    "data", [b"", b"\x16\x03\x01", b"GET / HTTP/1.1\r\n\r\n", bytes(5000), bytes(range(256)) * 100]
)
async def test_garbage_instead_of_tls_costs_only_its_own_connection(data: bytes) -> None:
    async with serving() as site:
        stream = await trio.open_tcp_stream("127.0.0.1", site.port)
        async with stream:
            await stream.send_all(data)
            await stream.send_eof()
            with trio.fail_after(10):
                try:
                    while await stream.receive_some(1000):
                        pass
                except trio.BrokenResourceError:
                    pass
        await site.settled()
        assert site.server.statistics.handshakes_failed == 1


async def test_handshakes_and_connections_of_one_address_are_limited() -> None:
    async with serving(admission=Admission(10, 3, waiting=0), max_connections_per_address=8) as site:
        async with AsyncExitStack() as stack:
            for _ in range(5):
                await stack.enter_async_context(await trio.open_tcp_stream("127.0.0.1", site.port))
            with trio.fail_after(5):
                while site.server.statistics.refused < 2 or site.server.statistics.connections > 3:
                    await trio.sleep(0.01)
            assert (site.server.statistics.refused, site.server.statistics.connections) == (2, 3)
        await site.settled()
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                await nursery.start(_keep_connected, site)
            with pytest.raises(GrpcUnavailable):
                async with site.client():
                    pytest.fail("connected")
            nursery.cancel_scope.cancel()


async def _wait_for_connections(server: GrpcServer, number: int) -> None:
    with trio.fail_after(30):
        while server.statistics.connections < number:
            await trio.sleep(0.01)


async def test_the_33rd_handshake_of_an_address_waits_for_its_turn() -> None:
    connected = trio.Event()

    async def ask() -> None:
        async with site.client() as client:
            connected.set()
            assert await client.unary(ECHO, b"x") == b"x"

    async with serving(config=GrpcConfig(handshake_timeout=60)) as site, AsyncExitStack() as stack:
        idle = [await stack.enter_async_context(await trio.open_tcp_stream("127.0.0.1", site.port)) for _ in range(32)]
        await _wait_for_connections(site.server, 32)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await _wait_for_connections(site.server, 33)
            assert not connected.is_set()
            await idle[0].aclose()
        assert site.server.statistics.refused == 0


async def test_who_waits_for_a_handshake_does_not_hold_up_a_drain() -> None:
    server = GrpcServer({}, config=GrpcConfig(handshake_timeout=3600), admission=Admission(per_address=1))
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(server.serve, listeners, server_context)
        port = listeners[0].socket.getsockname()[1]
        async with await trio.open_tcp_stream("127.0.0.1", port):
            await _wait_for_connections(server, 1)
            async with await trio.open_tcp_stream("127.0.0.1", port) as waits:
                await _wait_for_connections(server, 2)
                server.drain()
                with trio.fail_after(30):
                    assert await waits.receive_some() == b""


async def _keep_connected(site: Any, *, task_status: trio.TaskStatus[None]) -> None:
    async with site.client():
        task_status.started()
        await trio.sleep_forever()


async def test_a_source_without_certificate_costs_connections_not_the_server(caplog: pytest.LogCaptureFixture) -> None:
    contexts: list[TlsContext] = []
    server = GrpcServer(Methods().table())
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(server.serve, listeners, lambda: contexts[0])
        port = listeners[0].socket.getsockname()[1]
        with pytest.raises(GrpcUnavailable):
            async with GrpcClient.connect("127.0.0.1", port, client_context()):
                pytest.fail("connected")
        assert "no certificate to serve with" in caplog.text
        contexts.append(server_context())
        async with GrpcClient.connect("127.0.0.1", port, client_context()) as client:
            assert await client.unary(ECHO, b"x") == b"x"
        server.drain()


async def test_a_call_is_not_begun_twice_after_a_cancelled_send() -> None:
    async with serving() as site, site.client() as client:
        async with client.stream(WAIT) as stream:
            with trio.move_on_after(0.1):
                await stream.send(bytes(10 * MIB))  # the handler takes nothing
        assert await client.unary(ECHO, bytes(5 * MIB), max_bytes=64 * MIB) == bytes(5 * MIB)
