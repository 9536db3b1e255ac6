"""A gRPC server over TLS under Trio. One connection's fault, or one handler's, costs that one alone."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Self

import attrs
import trio

from hbone.admission import Admission
from hbone.config import MIB
from hbone.engine.flow import WindowBudget
from hbone.errors import ConnectionLost, HboneError
from hbone.grpc import Call, GrpcConfig, GrpcError, Metadata, ServerConnection, StatusCode
from hbone.tls import IoBuffer, TlsConnection, TlsContext
from hbone.trio.entrance import Entrance
from hbone.trio.grpctransport import CHUNK, Transport

if TYPE_CHECKING:
    from hbone.admission import Turn
    from hbone.identity import SpiffeId

__all__ = ["GrpcCall", "GrpcServer", "Handler", "ServerStatistics"]

_log = logging.getLogger("hbone.trio.grpc")

_OUT_OF_DESCRIPTORS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})


class _Connection(Transport[ServerConnection]):
    """One client's connection."""

    def drain(self) -> None:
        """Take no new calls; end when those that are open have, or when their grace is over."""
        self.grpc.drain(trio.current_time())
        self.wake()


class GrpcCall:
    """Server: one call, as its handler sees it. Returning from the handler ends it with OK."""

    def __init__(self, connection: _Connection, call: Call) -> None:
        self._connection = connection
        self._call = call
        self._received = False

    @property
    def path(self) -> str:
        """`/package.Service/Method`."""
        return self._call.path

    @property
    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """That of the request, in order."""
        return self._call.metadata

    def metadata_values(self, name: str) -> list[str | bytes]:
        """All values that the client sent under `name`, in order."""
        return [value for key, value in self._call.metadata if key == name]

    @property
    def peer(self) -> SpiffeId | None:
        """The client's verified identity; None for a client without a certificate."""
        return self._connection.tls.peer_id

    @property
    def tls(self) -> TlsConnection:
        """The client's chain, and what TLS agreed on."""
        return self._connection.tls

    @property
    def remote_address(self) -> tuple[str, int] | None:
        """The client's address and port; None where the transport has none."""
        return _remote_address(self._connection.stream)

    async def accept(self, metadata: Metadata = ()) -> None:
        """Send response headers now; some clients wait for them. Else they leave with the first message."""
        await trio.lowlevel.checkpoint()
        self._connection.grpc.send_headers(self._call, metadata)
        self._connection.wake()

    async def receive(self, max_bytes: int | None = None) -> bytes | None:
        """The next message; None when the client sends no more.

        From the second one on, response headers are sent before it waits: the call is a stream then, and accepted.

        Args:
            max_bytes: the largest that is accepted; by default the server's limit.

        Raises:
            GrpcError: the client gave the call up, or the message is over the limit.
        """
        if self._received and not self._call.ended:
            self._connection.grpc.send_headers(self._call)
        message = await self._connection.receive(self._call, max_bytes)
        self._received = True
        return message

    async def send(self, message: bytes | Sequence[bytes]) -> None:
        """Send a message, whole or in parts that other messages may share; waits while the client takes none.

        Raises:
            GrpcError: the client gave the call up.
        """
        await self._connection.send(self._call, message)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        message = await self.receive()
        if message is None:
            raise StopAsyncIteration
        return message


Handler = Callable[[GrpcCall], Awaitable[None]]
"""Serves one call. It is cancelled when the call is over; raise GrpcError for a status other than OK."""


@attrs.define
class ServerStatistics:
    """What a server has done so far."""

    connections: int = 0
    """Open now, handshakes included."""
    accepted: int = 0
    refused: int = 0
    """Closed before their handshake, because there were too many."""
    handshakes_failed: int = 0
    calls: int = 0
    """Open now."""
    calls_started: int = 0


class GrpcServer:
    """Serves calls on any number of connections.

    Args:
        handlers: by path, `/package.Service/Method`.
        config: limits and times of each connection.
        max_connections: open at once; one more is closed.
        max_connections_per_address: of them, from one address.
        receive_budget: bytes of large messages (over 64 KiB) that may be in the receiving at once, in all calls.
        admission: limits of handshakes at once, by default 512, and 32 of one address. What is over waits its turn,
            unread, for at most as long as a handshake may take.
    """

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        *,
        config: GrpcConfig | None = None,
        max_connections: int = 4096,
        max_connections_per_address: int = 256,
        receive_budget: int = 256 * MIB,
        admission: Admission | None = None,
    ) -> None:
        self.handlers = handlers
        self.config = config or GrpcConfig()
        self.statistics = ServerStatistics()
        self._entrance = Entrance(admission or Admission(), self.config.handshake_timeout, _log)
        self._open = Admission(max_connections, max_connections_per_address)
        self._budget = WindowBudget(receive_budget)
        self._buffer = IoBuffer(CHUNK)
        self._connections: set[_Connection] = set()
        self._accepting = trio.CancelScope()
        self._draining = False

    async def serve(
        self,
        listeners: Sequence[trio.abc.Listener[trio.abc.Stream]] | int,
        tls_source: Callable[[], TlsContext],
        *,
        host: str | None = None,
        task_status: trio.TaskStatus[Sequence[trio.abc.Listener[trio.abc.Stream]]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until cancelled, or until `drain` is complete. Closes the listeners.

        Args:
            listeners: what to accept on, or a TCP port.
            tls_source: asked for each connection, so that it gets the newest certificate.
            host: with a port: the address to listen on; None is every one.
            task_status: is given the listeners.
        """
        opened: Sequence[trio.abc.Listener[trio.abc.Stream]]
        opened = await trio.open_tcp_listeners(listeners, host=host) if isinstance(listeners, int) else listeners
        try:
            async with trio.open_nursery() as connections:
                task_status.started(opened)
                with self._accepting:
                    async with trio.open_nursery() as accepting:
                        for listener in opened:
                            accepting.start_soon(self._accept, listener, tls_source, connections)
                for listener in opened:
                    await listener.aclose()
        finally:
            with trio.CancelScope(shield=True):  # closing a listener does not wait
                for listener in opened:
                    await listener.aclose()

    def drain(self) -> None:
        """Accept no more, and end each connection when its calls have, or when their grace is over."""
        self._draining = True
        self._accepting.cancel()
        self._entrance.close()
        for connection in list(self._connections):
            connection.drain()

    async def serve_stream(self, stream: trio.abc.Stream, context: TlsContext) -> None:
        """Serve one connection over any stream until it is over. Never raises for what the peer does."""
        address = _remote_address(stream)
        host = address[0] if address else ""
        if not self._open.enter(host):
            self.statistics.refused += 1
            await trio.aclose_forcefully(stream)
            return
        self.statistics.connections += 1
        turn: Turn | None = None
        try:
            turn = await self._entrance.enter(host)
            if turn is None:
                self.statistics.refused += 1
            else:
                await self._serve(stream, context, host, turn)
        except Exception:
            _log.exception("a gRPC connection failed")
        finally:
            if turn is not None:
                turn.leave()
            self._open.leave(host)
            self.statistics.connections -= 1
            with trio.CancelScope(shield=True):  # forcefully: does not wait
                await trio.aclose_forcefully(stream)

    async def _accept(
        self,
        listener: trio.abc.Listener[trio.abc.Stream],
        tls_source: Callable[[], TlsContext],
        connections: trio.Nursery,
    ) -> None:
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:
                if error.errno not in _OUT_OF_DESCRIPTORS:
                    raise
                _log.error("cannot accept: %s", error.strerror)
                await trio.sleep(0.1)
                continue
            self.statistics.accepted += 1
            try:
                context = tls_source()
            except Exception:
                _log.exception("there is no certificate to serve with")
                await trio.aclose_forcefully(stream)
                continue
            connections.start_soon(self.serve_stream, stream, context)

    async def _serve(self, stream: trio.abc.Stream, context: TlsContext, host: str, turn: Turn) -> None:
        async with trio.open_nursery() as nursery:

            def on_call(call: Call) -> None:
                nursery.start_soon(self._run_call, connection, call)

            connection = _Connection(
                stream,
                TlsConnection(context, server=True),
                ServerConnection(config=self.config, budget=self._budget),
                self._buffer,
                on_call,
            )
            try:
                await connection.handshake()
            except HboneError as error:
                self.statistics.handshakes_failed += 1
                _log.info("TLS handshake with %s failed: %s", host or "a client", error)
                return
            finally:
                turn.leave()
            self._connections.add(connection)
            try:
                if self._draining:
                    connection.drain()
                nursery.start_soon(self._grow_old, connection)
                await connection.run()
            finally:
                self._connections.discard(connection)
                nursery.cancel_scope.cancel()
            if not isinstance(connection.failure, ConnectionLost | None):
                _log.warning("connection of %s ended: %s", host or "a client", connection.failure)

    async def _grow_old(self, connection: _Connection) -> None:
        await trio.sleep(self.config.max_connection_age * random.uniform(0.9, 1.1))  # not all at once
        connection.drain()

    async def _run_call(self, connection: _Connection, call: Call) -> None:
        self.statistics.calls += 1
        self.statistics.calls_started += 1
        deadline = math.inf if call.timeout is None else trio.current_time() + call.timeout
        try:
            with trio.CancelScope(deadline=deadline) as scope:
                connection.scopes[call] = scope
                if call.closed:
                    return
                error = await self._handle(connection, call)
            if scope.cancelled_caught:
                error = GrpcError(StatusCode.DEADLINE_EXCEEDED, "the call's time is over")
            if error is None:
                connection.grpc.finish(call)
            else:
                connection.grpc.finish(call, error.code, error.message, error.trailers)
            connection.wake()
        finally:
            self.statistics.calls -= 1
            del connection.scopes[call]
            connection.forget(call)

    async def _handle(self, connection: _Connection, call: Call) -> GrpcError | None:
        """Run the handler; its status."""
        handler = self.handlers.get(call.path)
        if handler is None:
            return GrpcError(StatusCode.UNIMPLEMENTED, "there is no such method")
        try:
            await handler(GrpcCall(connection, call))
        except GrpcError as error:
            return error
        except Exception as error:
            found = _error_in(error)
            if found is None:
                _log.exception("handler of %s failed", call.path)
            return found or GrpcError(StatusCode.INTERNAL, "internal error")
        return None


def _error_in(error: BaseException) -> GrpcError | None:
    """The status that one of a handler's tasks raised."""
    if isinstance(error, GrpcError):
        return error
    if isinstance(error, BaseExceptionGroup):
        return next((found for inner in error.exceptions if (found := _error_in(inner)) is not None), None)
    return None


def _remote_address(stream: trio.abc.Stream) -> tuple[str, int] | None:
    if isinstance(stream, trio.SocketStream):
        with contextlib.suppress(OSError):
            address = stream.socket.getpeername()
            if isinstance(address, tuple):
                return address[0], address[1]
    return None
