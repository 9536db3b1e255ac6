"""grpcio at the other end: as client of our server, and as server of our client."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import trio
from tests.support.grpc import CA, CHAT, ECHO, FAIL, META, MIB, POUR, WAIT, Site, client_context, serving

from hbone.grpc import GrpcError, GrpcUnavailable, StatusCode
from hbone.trio.grpc import GrpcClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

pytestmark = pytest.mark.interop

UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
TIMEOUT = 30.0


async def in_thread(function: Callable[[grpc.Channel], Any], site: Site, **credentials: bytes) -> Any:
    """Run blocking code with a channel to our server."""

    def run() -> Any:
        secure = grpc.ssl_channel_credentials(CA.root_pem, **credentials)
        with grpc.secure_channel(f"localhost:{site.port}", secure, options=UNLIMITED) as channel:
            return function(channel)

    return await trio.to_thread.run_sync(run)


# grpcio calls us


async def test_grpcio_makes_unary_calls() -> None:
    async with serving() as site:
        for message in (b"", b"x", bytes(100_000), bytes(20 * MIB)):

            def call(channel: grpc.Channel, message: bytes = message) -> Any:
                return channel.unary_unary(ECHO)(message, timeout=TIMEOUT)

            assert await in_thread(call, site) == message
        await site.settled()


async def test_grpcio_presents_a_certificate() -> None:
    async with serving() as site:
        issued = CA.issue(uris=[str(CA.id("shop", "orders"))])
        await in_thread(
            lambda channel: channel.unary_unary(ECHO)(b"", timeout=TIMEOUT),
            site,
            private_key=issued.key_pem,
            certificate_chain=issued.cert_pem,
        )
        assert site.methods.peers == [CA.id("shop", "orders")]


async def test_grpcio_and_we_stream_both_ways() -> None:
    def chat(channel: grpc.Channel) -> list[bytes]:
        answered = threading.Semaphore(1)

        def questions() -> Iterator[bytes]:
            for number in range(200):
                assert answered.acquire(timeout=TIMEOUT)
                yield b"%d" % number

        answers = []
        for answer in channel.stream_stream(CHAT)(questions(), timeout=TIMEOUT):
            answers.append(answer)
            answered.release()
        return answers

    async with serving() as site:
        assert await in_thread(chat, site) == [b"re: %d" % number for number in range(200)]


async def test_grpcio_streams_large_messages() -> None:
    def chat(channel: grpc.Channel) -> int:
        return sum(len(answer) for answer in channel.stream_stream(CHAT)(iter([bytes(3 * MIB)] * 10), timeout=TIMEOUT))

    async with serving() as site:
        assert await in_thread(chat, site) == 10 * (3 * MIB + 4)


async def test_grpcio_ends_its_half_and_gets_the_rest() -> None:
    async with serving() as site:
        assert await in_thread(lambda channel: list(channel.stream_stream(CHAT)(iter([]), timeout=TIMEOUT)), site) == []


@pytest.mark.parametrize("code", [code for code in StatusCode if code is not StatusCode.OK])
async def test_grpcio_understands_every_status(code: StatusCode) -> None:
    def call(channel: grpc.Channel) -> grpc.RpcError:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(FAIL)(b"%d" % code, timeout=TIMEOUT)
        return caught.value

    async with serving() as site:
        error: Any = await in_thread(call, site)
        assert error.code().value[0] == code
        assert error.details() == "as asked: é 100%"
        assert dict(error.trailing_metadata()) == {"why": "asked", "why-bin": b"\x00\xff"}


async def test_grpcio_is_told_of_an_unknown_method_and_of_a_broken_handler() -> None:
    def codes(channel: grpc.Channel) -> list[grpc.StatusCode]:
        found = []
        for path, message in (("/test.Service/Other", b""), (FAIL, b"raise")):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(path)(message, timeout=TIMEOUT)
            found.append(caught.value.code())
        return found

    async with serving() as site:
        assert await in_thread(codes, site) == [grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL]


async def test_grpcio_and_we_exchange_metadata() -> None:
    sent = (("clusterid", "Kubernetes"), ("raw-bin", b"\x00\xff\x7f"), ("twice", "a"), ("twice", "b"))

    def call(channel: grpc.Channel) -> tuple[bytes, dict[str, Any]]:
        answer, info = channel.unary_unary(META).with_call(b"", timeout=TIMEOUT, metadata=sent)
        return answer, dict(info.initial_metadata())

    async with serving() as site:
        answer, metadata = await in_thread(call, site)
        for pair in sent:
            assert repr(pair).encode() in answer
        assert metadata["served-by"] == "us"
        assert metadata["blob-bin"] == b"\x01\x02"


async def test_grpcio_sees_headers_before_the_first_message() -> None:
    def call(channel: grpc.Channel) -> Any:
        stream = channel.stream_stream(WAIT)(iter([]), timeout=TIMEOUT)
        found = stream.initial_metadata()
        stream.cancel()
        return found

    async with serving() as site:
        assert await in_thread(call, site) is not None
        with trio.fail_after(10):
            while not site.methods.cancelled:
                await trio.sleep(0.01)


async def test_grpcios_deadline_and_cancel_reach_the_handler() -> None:
    def call(channel: grpc.Channel) -> grpc.StatusCode:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(WAIT)(b"", timeout=0.3)
        return caught.value.code()

    async with serving() as site:
        assert await in_thread(call, site) is grpc.StatusCode.DEADLINE_EXCEEDED
        with trio.fail_after(10):
            while not site.methods.cancelled:
                await trio.sleep(0.01)


async def test_grpcio_gives_up_a_pouring_stream() -> None:
    def call(channel: grpc.Channel) -> int:
        stream = channel.unary_stream(POUR)(b"", timeout=TIMEOUT)
        got = sum(len(next(stream)) for _ in range(30))
        stream.cancel()
        return got

    async with serving() as site:
        assert await in_thread(call, site) == 30 * MIB
        with trio.fail_after(10):
            await site.settled()
        assert site.methods.cancelled == 1


async def test_a_compressing_grpcio_is_told_that_we_do_not() -> None:
    def call(channel: grpc.Channel) -> grpc.StatusCode:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(ECHO)(bytes(10_000), timeout=TIMEOUT, compression=grpc.Compression.Gzip)
        return caught.value.code()

    async with serving() as site:
        assert await in_thread(call, site) is grpc.StatusCode.UNIMPLEMENTED


async def test_grpcio_makes_many_calls_at_once() -> None:
    def call(channel: grpc.Channel) -> list[bytes]:
        echo = channel.unary_unary(ECHO)
        futures = [echo.future(b"%d" % number, timeout=TIMEOUT) for number in range(500)]
        return [future.result() for future in futures]

    async with serving() as site:
        assert await in_thread(call, site) == [b"%d" % number for number in range(500)]


async def test_grpcio_calls_again_on_a_new_connection_after_a_drain() -> None:
    started, drained = threading.Event(), threading.Event()

    def call(channel: grpc.Channel) -> list[bytes]:
        echo = channel.unary_unary(ECHO)
        answers = [echo(b"1", timeout=TIMEOUT)]
        started.set()
        assert drained.wait(TIMEOUT)
        answers.append(echo(b"2", timeout=TIMEOUT, wait_for_ready=True))
        return answers

    async with serving() as site:

        async def drain() -> None:
            await trio.to_thread.run_sync(started.wait, TIMEOUT)
            for connection in list(site.server._connections):
                connection.drain()
            await site.settled()
            drained.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain)
            assert await in_thread(call, site) == [b"1", b"2"]
        assert site.server.statistics.accepted == 2


# We call grpcio


class _Handler(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpcio has no types
    """The same methods, by grpcio."""

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        return {
            ECHO: grpc.unary_unary_rpc_method_handler(lambda message, _: message),
            CHAT: grpc.stream_stream_rpc_method_handler(self._chat),
            FAIL: grpc.unary_unary_rpc_method_handler(self._fail),
            META: grpc.unary_unary_rpc_method_handler(self._meta),
            POUR: grpc.unary_stream_rpc_method_handler(lambda _, __: (bytes(MIB) for _ in range(40))),
            WAIT: grpc.unary_unary_rpc_method_handler(self._wait),
        }.get(details.method)

    def __init__(self) -> None:
        self.ended = threading.Event()

    def _chat(self, messages: Iterator[bytes], _: Any) -> Iterator[bytes]:
        for message in messages:
            yield b"re: " + message

    def _fail(self, message: bytes, context: grpc.ServicerContext) -> bytes:
        context.set_trailing_metadata((("why", "asked"), ("why-bin", b"\x00\xff")))
        code = next(code for code in grpc.StatusCode if code.value[0] == int(message))
        context.abort(code, "as asked: é 100%")
        raise AssertionError

    def _meta(self, _: bytes, context: grpc.ServicerContext) -> bytes:
        context.send_initial_metadata((("served-by", "grpcio"), ("blob-bin", b"\x01")))
        return repr(sorted(tuple(pair) for pair in context.invocation_metadata() if pair[0] != "user-agent")).encode()

    def _wait(self, _: bytes, context: grpc.ServicerContext) -> bytes:
        context.add_callback(self.ended.set)
        self.ended.wait(TIMEOUT)
        return b""


class _Grpcio:
    def __init__(self) -> None:
        issued = CA.server("localhost", "127.0.0.1")
        self.handler = _Handler()
        self.server = grpc.server(ThreadPoolExecutor(4), handlers=[self.handler], options=UNLIMITED)
        credentials = grpc.ssl_server_credentials([(issued.key_pem, issued.cert_pem)])
        self.port = self.server.add_secure_port("127.0.0.1:0", credentials)
        self.server.start()


@asynccontextmanager
async def grpcio() -> AsyncIterator[tuple[_Grpcio, GrpcClient]]:
    server = _Grpcio()
    try:
        async with GrpcClient.connect("127.0.0.1", server.port, client_context()) as client:
            yield server, client
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(server.server.stop(0).wait, 10)


async def test_we_make_unary_calls_to_grpcio() -> None:
    async with grpcio() as (_, client):
        for message in (b"", b"x", bytes(100_000), bytes(20 * MIB)):
            assert await client.unary(ECHO, message, max_bytes=64 * MIB) == message


async def test_we_stream_with_grpcio() -> None:
    async with grpcio() as (_, client), client.stream(CHAT) as chat:
        for number in range(200):
            await chat.send(b"%d" % number)
            assert await chat.receive() == b"re: %d" % number
        await chat.end()
        assert await chat.receive() is None


async def test_grpcio_pours_and_we_take_it_all() -> None:
    async with grpcio() as (_, client), client.stream(POUR) as stream:
        await stream.send(b"")
        await stream.end()
        assert sum([len(message) async for message in stream]) == 40 * MIB


@pytest.mark.parametrize("code", [code for code in StatusCode if code is not StatusCode.OK])
async def test_we_understand_every_status_of_grpcio(code: StatusCode) -> None:
    async with grpcio() as (_, client):
        with pytest.raises(GrpcError) as caught:
            await client.unary(FAIL, b"%d" % code)
        assert caught.value.code is code
        assert caught.value.message == "as asked: é 100%"
        assert caught.value.trailers == (("why", "asked"), ("why-bin", b"\x00\xff"))


async def test_we_exchange_metadata_with_grpcio() -> None:
    sent: list[tuple[str, str | bytes]] = [("clusterid", "Kubernetes"), ("raw-bin", b"\x00\xff\x7f")]
    async with grpcio() as (_, client), client.stream(META, sent) as stream:
        await stream.send(b"")
        await stream.end()
        assert await stream.receive() == repr(sorted(sent)).encode()
        assert dict(stream.metadata)["served-by"] == "grpcio"
        assert dict(stream.metadata)["blob-bin"] == b"\x01"


async def test_our_deadline_and_cancel_reach_grpcio() -> None:
    async with grpcio() as (server, client):
        with pytest.raises(GrpcError, match="DEADLINE_EXCEEDED"):
            await client.unary(WAIT, b"", timeout=0.3)
        assert await trio.to_thread.run_sync(server.handler.ended.wait, TIMEOUT)
        assert await client.unary(ECHO, b"x") == b"x"


async def test_grpcio_without_the_method_says_so() -> None:
    async with grpcio() as (_, client):
        with pytest.raises(GrpcError, match="UNIMPLEMENTED"):
            await client.unary("/test.Service/Other", b"")


async def test_a_stopping_grpcio_is_noticed() -> None:
    async with grpcio() as (server, client):
        assert await client.unary(ECHO, b"x") == b"x"
        await trio.to_thread.run_sync(server.server.stop(None).wait, 10)
        with trio.fail_after(10):
            while client.usable:
                await trio.sleep(0.01)
        with pytest.raises(GrpcUnavailable):
            await client.unary(ECHO, b"x")
