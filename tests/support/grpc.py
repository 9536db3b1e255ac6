"""A gRPC server with a few methods, and clients of it: ours, and one that sends bytes made by hand."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio

from hbone.engine import frames
from hbone.errors import HboneError
from hbone.grpc import GrpcError, StatusCode
from hbone.testing.ca import TestCa
from hbone.tls import IoBuffer, TlsConnection, TlsContext
from hbone.trio.grpc import GrpcClient, GrpcServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hbone.identity import Identity
    from hbone.trio.grpc import GrpcCall

ECHO = "/test.Service/Echo"
CHAT = "/test.Service/Chat"
FAIL = "/test.Service/Fail"
META = "/test.Service/Meta"
WAIT = "/test.Service/Wait"
POUR = "/test.Service/Pour"
MIB = 1 << 20

CA = TestCa()
"""One root for all tests: keys take time."""
_SERVER = CA.server("localhost", "127.0.0.1")


def server_context() -> TlsContext:
    return TlsContext.server(_SERVER.server_certificate(), "optional", bundles=CA.bundle)


def client_context(identity: Identity | None = None, name: str = "localhost") -> TlsContext:
    return TlsContext.client(identity, roots=CA.root_pem, server_name=name)


class Methods:
    """Handlers, and what happened to them."""

    def __init__(self) -> None:
        self.cancelled = 0
        self.waiting = trio.Event()
        self.peers: list[Any] = []

    def table(self) -> dict[str, Any]:
        return {
            ECHO: self.echo,
            CHAT: self.chat,
            FAIL: self.fail,
            META: self.meta,
            WAIT: self.wait,
            POUR: self.pour,
        }

    async def echo(self, call: GrpcCall) -> None:
        self.peers.append(call.peer)
        message = await call.receive(64 * MIB)
        assert message is not None
        await call.send(message)

    async def chat(self, call: GrpcCall) -> None:
        async for message in call:
            await call.send(b"re: " + message)

    async def fail(self, call: GrpcCall) -> None:
        message = await call.receive()
        assert message is not None
        if message == b"raise":
            raise RuntimeError("an inner secret")
        if message == b"in a task":
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_fail, StatusCode.NOT_FOUND)
                await trio.sleep_forever()
        raise GrpcError(
            StatusCode(int(message)), "as asked: é 100%", trailers=(("why", "asked"), ("why-bin", b"\x00\xff"))
        )

    async def meta(self, call: GrpcCall) -> None:
        await call.accept([("served-by", "us"), ("blob-bin", b"\x01\x02")])
        await call.send(repr(sorted(set(call.metadata) - {("user-agent", dict(call.metadata)["user-agent"])})).encode())

    async def wait(self, call: GrpcCall) -> None:
        await call.accept()
        self.waiting.set()
        try:
            await trio.sleep_forever()
        finally:
            self.cancelled += 1

    async def pour(self, call: GrpcCall) -> None:
        self.waiting.set()
        try:
            while True:
                await call.send(bytes(MIB))
        except GrpcError:
            self.cancelled += 1
            raise


async def _fail(code: StatusCode) -> None:
    raise GrpcError(code, "from a task")


class Site:
    """A server on the loopback address."""

    def __init__(self, port: int, server: GrpcServer, methods: Methods) -> None:
        self.port = port
        self.server = server
        self.methods = methods

    def client(self, identity: Identity | None = None, **options: Any) -> Any:
        return GrpcClient.connect("127.0.0.1", self.port, client_context(identity), **options)

    async def settled(self) -> None:
        """Until no connection is left."""
        while self.server.statistics.connections:
            await trio.sleep(0.01)
        assert self.server.statistics.calls == 0


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[Site]:
    """The server, which must be well and without a connection left when the block ends."""
    methods = Methods()
    server = GrpcServer(methods.table(), **options)
    async with trio.open_nursery() as nursery:

        async def serve(task_status: trio.TaskStatus[Any]) -> None:
            await server.serve(0, server_context, host="127.0.0.1", task_status=task_status)

        listeners = await nursery.start(serve)
        site = Site(listeners[0].socket.getsockname()[1], server, methods)
        yield site
        with trio.fail_after(20):
            await site.settled()
            async with site.client() as client:
                assert await client.unary(ECHO, b"still well?") == b"still well?"
            server.drain()  # ends `serve`


class RawPeer:
    """TLS to a server, and whatever a test writes on it."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.tls = TlsConnection(client_context(), server=False)
        self._buffer = IoBuffer(65536)

    async def handshake(self, *, begin: bool = True) -> None:
        while not self.tls.handshake():
            await self.flush()
            self.tls.receive_data(await self.stream.receive_some(65536))
        await self.flush()
        if begin:
            await self.send(frames.PREFACE + frames.settings() + frames.settings(ack=True))

    async def flush(self) -> None:
        while nbytes := self.tls.data_to_send_into(self._buffer):
            await self.stream.send_all(bytes(self._buffer.view[:nbytes]))

    async def send(self, data: bytes) -> None:
        self.tls.write(data)
        await self.flush()

    async def read_to_end(self) -> bytes:
        """Plaintext until the server closes."""
        received = b""
        try:
            while data := await self.stream.receive_some(65536):
                self.tls.receive_data(data)
                while nbytes := self.tls.read_into(self._buffer, 0, self._buffer.size):
                    received += bytes(self._buffer.view[:nbytes])
        except (trio.BrokenResourceError, HboneError):
            pass
        return received
