"""gRPC over TLS under Trio: a client of the control plane, and its server.

One task a connection reads, one writes, one keeps time. The reader never waits for a handler, so a call that nobody
reads stalls alone; only the writer sends on the transport. A lost connection is state: its calls raise.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Self

import attrs
import trio

from hbone.admission import Admission
from hbone.config import KIB, MIB
from hbone.engine.flow import WindowBudget
from hbone.errors import ConnectionLost, HboneError
from hbone.grpc import Call, GrpcConfig, GrpcConnection, GrpcError, GrpcUnavailable, Metadata, StatusCode
from hbone.tls import IoBuffer, TlsConnection, TlsContext

if TYPE_CHECKING:
    from types import TracebackType

    from hbone.identity import SpiffeId

__all__ = ["GrpcCall", "GrpcClient", "GrpcServer", "GrpcStream", "Handler"]

_log = logging.getLogger(__name__)

_CHUNK: Final = 64 * KIB
_LOW: Final = 64 * KIB
"""A sender waits while more than this of its call waits, in bytes."""
_FLUSH_SECONDS: Final = 1.0
"""For the last bytes of a connection: GOAWAY, an alert, close_notify."""
_OUT_OF_DESCRIPTORS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})


class _Connection:
    """TLS and gRPC over one Trio stream, and the tasks that drive them.

    Args:
        stream: the transport; owned from now on.
        tls: a new TLS connection.
        grpc: a new gRPC connection.
        buffer: for plaintext and ciphertext in passing; may be shared within a thread.
        on_call: server: called with each new call; must return at once.
    """

    def __init__(
        self,
        stream: trio.abc.Stream,
        tls: TlsConnection,
        grpc: GrpcConnection,
        buffer: IoBuffer,
        on_call: Callable[[_Connection, Call], None] | None = None,
    ) -> None:
        self.stream = stream
        self.tls = tls
        self.grpc = grpc
        self.failure: HboneError | None = None
        """Why the connection is over."""
        self._buffer = buffer
        self._on_call = on_call
        self._waiting: dict[Call, trio.lowlevel.ParkingLot] = {}
        self.scopes: dict[Call, trio.CancelScope] = {}
        """Of handlers; cancelled when their call is over."""
        self._wake = trio.Event()
        self._read_all = trio.Event()
        self._writing = trio.CancelScope()
        self._timing = trio.CancelScope()

    async def handshake(self) -> None:
        """Complete the TLS handshake.

        Raises:
            TlsError: it failed; the alert was sent.
            ConnectionLost: the peer went away, or took too long.
        """
        seconds = self.grpc.config.handshake_timeout
        try:
            with trio.fail_after(seconds):
                while True:
                    try:
                        done = self.tls.handshake()
                    finally:
                        await self._send_ciphertext()
                    if done:
                        break
                    data = await self.stream.receive_some(_CHUNK)
                    if not data:
                        raise ConnectionLost("the peer closed the connection during the TLS handshake")
                    self.tls.receive_data(data)
        except trio.TooSlowError:
            raise ConnectionLost(f"the TLS handshake took longer than {seconds:g} seconds") from None
        except trio.BrokenResourceError as error:
            raise ConnectionLost(f"the connection broke during the TLS handshake: {_reason(error)}") from error
        self.grpc.start(trio.current_time())

    async def run(self) -> None:
        """Drive the connection until it is over, then close the transport. Never raises for what the peer does."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read)
                nursery.start_soon(self._keep_time)
                await self._write()
                nursery.cancel_scope.cancel()
        finally:
            self.lose(ConnectionLost("it was closed by this end"))
            await trio.aclose_forcefully(self.stream)

    def wake(self) -> None:
        """Something is to be sent, or a deadline has moved."""
        self._wake.set()
        self._timing.deadline = self._deadline()

    def drain(self) -> None:
        """Take no new calls; end when those that are open have, or when their grace is over."""
        self.grpc.drain(trio.current_time())
        self.wake()

    def close(self) -> None:
        """End all calls; the last bytes have a second to leave."""
        self.grpc.close()
        self.lose(ConnectionLost("it was closed by this end"))

    def lose(self, reason: HboneError) -> None:
        """Note why the connection is over, and wake everybody."""
        if self.failure is None:
            self.failure = reason
            self._writing.deadline = trio.current_time() + _FLUSH_SECONDS
        self.grpc.connection_lost(reason)
        self._dispatch()
        self._wake.set()

    async def wait(self, call: Call) -> None:
        """Until something about `call` changes."""
        await self._waiting.setdefault(call, trio.lowlevel.ParkingLot()).park()

    def forget(self, call: Call) -> None:
        """Nobody waits for `call` again."""
        self._waiting.pop(call, None)

    async def receive(self, call: Call, limit: int | None) -> bytes | None:
        """The next message of `call`; None after the last."""
        await trio.lowlevel.checkpoint()
        while True:
            message = call.receive(limit)
            self.wake()
            if message is not None or call.ended:
                return message
            await self.wait(call)

    async def send(self, call: Call, message: bytes) -> None:
        """Queue `message`, and wait until the peer has taken nearly all of it."""
        await self._until_low(call)
        self.grpc.send_message(call, message)
        self.wake()
        await self._until_low(call)

    async def _until_low(self, call: Call) -> None:
        await trio.lowlevel.checkpoint()
        seconds = self.grpc.config.stall_timeout
        while call.unsent > _LOW:
            with trio.move_on_after(seconds):
                await self.wait(call)
                continue
            self.grpc.cancel(call)
            self.wake()
            raise GrpcError(StatusCode.UNAVAILABLE, f"the peer took nothing of a message for {seconds:g} seconds")
        if call.closed and call.failure is not None:
            raise call.failure

    def _dispatch(self) -> None:
        for call in self.grpc.take_changed():
            waiting = self._waiting.get(call)
            if waiting is not None:
                waiting.unpark_all()
            if call.closed and call in self.scopes:
                self.scopes[call].cancel()

    async def _read(self) -> None:
        grpc, tls, buffer = self.grpc, self.tls, self._buffer
        try:
            self._decrypt(tls, grpc, buffer)  # what came with the end of the handshake
            while data := await self.stream.receive_some(_CHUNK):
                if not grpc.closed:
                    tls.receive_data(data)
                    self._decrypt(tls, grpc, buffer)
            tls.receive_eof()
            raise ConnectionLost("the peer closed the connection")
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self.lose(ConnectionLost(f"the connection broke: {_reason(error)}"))
        except HboneError as error:
            self.lose(error)
        finally:
            self._read_all.set()

    def _decrypt(self, tls: TlsConnection, grpc: GrpcConnection, buffer: IoBuffer) -> None:
        try:
            while nbytes := tls.read_into(buffer, 0, buffer.size):
                for call in grpc.receive_data(buffer.view[:nbytes], trio.current_time()):
                    if self._on_call is not None:
                        self._on_call(self, call)
            if tls.closed_by_peer:
                raise ConnectionLost("the peer closed the connection")
        finally:
            self._dispatch()
            self.wake()

    async def _write(self) -> None:
        with self._writing:
            try:
                while True:
                    plaintext = self.grpc.data_to_send()
                    self._dispatch()
                    if plaintext:
                        self.tls.write(plaintext)
                    if await self._send_ciphertext() or plaintext:
                        continue
                    if self.grpc.closed:
                        await self._finish()
                        return
                    await self._wake.wait()
                    self._wake = trio.Event()
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self.lose(ConnectionLost(f"the connection broke: {_reason(error)}"))
            except HboneError as error:
                self.lose(error)

    async def _finish(self) -> None:
        """Say close_notify. A server waits for the client to close: a reset could overtake the last statuses."""
        self.tls.shutdown()
        await self._send_ciphertext()
        if not self.grpc.client and isinstance(self.stream, trio.abc.HalfCloseableStream):
            await self.stream.send_eof()
            with trio.move_on_after(_FLUSH_SECONDS):
                await self._read_all.wait()

    async def _send_ciphertext(self) -> int:
        """Send what TLS has ready; the number of bytes."""
        sent = 0
        seconds = self.grpc.config.stall_timeout
        while nbytes := self.tls.data_to_send_into(self._buffer):
            chunk = bytes(self._buffer.view[:nbytes])  # the buffer is used by others while we wait
            try:
                with trio.fail_after(seconds):
                    await self.stream.send_all(chunk)
            except trio.TooSlowError:
                raise ConnectionLost(f"the peer read nothing for {seconds:g} seconds") from None
            sent += nbytes
        return sent

    async def _keep_time(self) -> None:
        while not self.grpc.closed:
            with trio.CancelScope(deadline=self._deadline()) as self._timing:
                await trio.sleep_forever()
            try:
                self.grpc.on_time(trio.current_time())
            except HboneError as error:
                self.lose(error)
            self._dispatch()
            self._wake.set()

    def _deadline(self) -> float:
        due = self.grpc.next_deadline()
        return math.inf if due is None else due


def _reason(error: BaseException) -> str:
    """The operating system's words for a broken stream."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror.lower()
    return str(cause or error) or type(error).__name__


class GrpcStream:
    """Client: one call with any number of messages each way. Made by `GrpcClient.stream`."""

    def __init__(self, connection: _Connection, call: Call) -> None:
        self._connection = connection
        self._call = call

    @property
    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """Of the server's response headers; empty until they came."""
        return self._call.metadata

    @property
    def trailers(self) -> tuple[tuple[str, str | bytes], ...]:
        """What came with the status."""
        return self._call.trailers

    async def send(self, message: bytes) -> None:
        """Send a message; waits while the server takes none.

        Raises:
            GrpcError: the call is over.
        """
        await self._connection.send(self._call, message)

    async def end(self) -> None:
        """Say that no more messages follow."""
        await trio.lowlevel.checkpoint()
        self._connection.grpc.end(self._call)
        self._connection.wake()

    async def receive(self, max_bytes: int | None = None) -> bytes | None:
        """The next message; None when the server ended the call with OK.

        Raises:
            GrpcError: another status, a message over `max_bytes`, or the connection was lost.
        """
        return await self._connection.receive(self._call, max_bytes)

    def cancel(self) -> None:
        """Give the call up."""
        self._connection.grpc.cancel(self._call)
        self._connection.wake()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        message = await self.receive()
        if message is None:
            raise StopAsyncIteration
        return message


class GrpcClient:
    """One connection to a gRPC server. Use it as `async with`: entering it does the TLS handshake.

    Args:
        stream: connected to the server; closed by the client in any case.
        tls: roots, the server's name, and who we are.
        authority: the server's name and port, by default from `tls` and `stream`.
        config: limits and times.
    """

    def __init__(
        self,
        stream: trio.abc.Stream,
        tls: TlsContext,
        *,
        authority: str | None = None,
        config: GrpcConfig | None = None,
    ) -> None:
        self.authority = authority or _authority(stream, tls)
        self._connection = _Connection(
            stream,
            TlsConnection(tls, server=False),
            GrpcConnection(client=True, config=config, authority=self.authority, peer=self.authority),
            IoBuffer(_CHUNK),
        )
        self._nursery_manager = trio.open_nursery()

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(
        cls,
        host: str,
        port: int,
        tls: TlsContext,
        *,
        config: GrpcConfig | None = None,
        connect_timeout: float = 5.0,
    ) -> AsyncIterator[Self]:
        """Dial `host`, and close the connection when the block ends.

        Args:
            host: name or address.
            port: of the server.
            tls: roots, the server's name, and who we are.
            config: limits and times.
            connect_timeout: seconds for name look-up and TCP.

        Raises:
            GrpcUnavailable: the server cannot be reached; names host, port and reason.
            TlsError: it is not the server that we trust, or refuses us.
        """
        authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            with trio.fail_after(connect_timeout):
                stream = await trio.open_tcp_stream(host, port)
        except trio.TooSlowError:
            raise GrpcUnavailable(
                f"{authority} did not answer within {connect_timeout:g} seconds", processed=False
            ) from None
        except OSError as error:
            raise GrpcUnavailable(f"{authority} cannot be reached: {_dial_reason(error)}", processed=False) from error
        async with cls(stream, tls, authority=authority, config=config) as client:
            yield client

    async def __aenter__(self) -> Self:
        try:
            await self._connection.handshake()
        except ConnectionLost as error:
            await trio.aclose_forcefully(self._connection.stream)
            raise GrpcUnavailable(f"{self.authority}: {error}", processed=False) from error
        except BaseException:
            await trio.aclose_forcefully(self._connection.stream)
            raise
        nursery = await self._nursery_manager.__aenter__()
        nursery.start_soon(self._connection.run)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        # The block's own error is raised as it is, not in a group with those of tasks that raise none.
        await self._nursery_manager.__aexit__(None, None, None)

    @property
    def usable(self) -> bool:
        """New calls may be made: the server neither drains nor went away."""
        grpc = self._connection.grpc
        return not grpc.closed and not grpc.draining

    @property
    def tls(self) -> TlsConnection:
        """What TLS agreed on, and the server's chain."""
        return self._connection.tls

    async def unary(
        self,
        path: str,
        request: bytes,
        metadata: Metadata = (),
        *,
        max_bytes: int = 4 * MIB,
        timeout: float | None = None,
    ) -> bytes:
        """One request, one answer.

        Args:
            path: `/package.Service/Method`.
            request: the message.
            metadata: sent with it.
            max_bytes: the largest answer that is accepted.
            timeout: seconds, also told to the server; None leaves it to the caller's scope.

        Raises:
            GrpcError: the server's status, DEADLINE_EXCEEDED, or an answer that is not one message.
            GrpcUnavailable: the connection was lost, or takes no more calls.
        """
        with trio.CancelScope(deadline=math.inf if timeout is None else trio.current_time() + timeout) as scope:
            async with self.stream(path, metadata, timeout=timeout) as stream:
                await stream.send(request)
                await stream.end()
                answer = await stream.receive(max_bytes)
                if answer is None:
                    raise GrpcError(StatusCode.INTERNAL, f"{self.authority} answered {path} without a message")
                if await stream.receive(max_bytes) is not None:
                    raise GrpcError(StatusCode.INTERNAL, f"{self.authority} answered {path} with two messages")
                return answer
        assert scope.cancelled_caught
        raise GrpcError(StatusCode.DEADLINE_EXCEEDED, f"{self.authority} did not answer within {timeout:g} seconds")

    @contextlib.asynccontextmanager
    async def stream(
        self, path: str, metadata: Metadata = (), *, timeout: float | None = None
    ) -> AsyncIterator[GrpcStream]:
        """A call with messages both ways; given up when the block ends before it does.

        Args:
            path: `/package.Service/Method`.
            metadata: sent with the request.
            timeout: seconds that the server is told it has; bring a scope for our side.

        Raises:
            GrpcUnavailable: the connection takes no more calls.
        """
        connection = self._connection
        call = connection.grpc.start_call(path, metadata, timeout=timeout)
        connection.wake()
        stream = GrpcStream(connection, call)
        try:
            yield stream
        finally:
            stream.cancel()
            connection.forget(call)


def _authority(stream: trio.abc.Stream, tls: TlsContext) -> str:
    name = tls.server_name or "localhost"
    host = f"[{name}]" if ":" in name else name
    if isinstance(stream, trio.SocketStream):
        with contextlib.suppress(OSError):
            peer = stream.socket.getpeername()
            if isinstance(peer, tuple):
                return f"{host}:{peer[1]}"
    return host


def _dial_reason(error: OSError) -> str:
    """The words of a failed dial; Trio puts the reasons of several addresses in a group."""
    words = set()
    for cause in getattr(error.__cause__, "exceptions", None) or [error]:
        number = getattr(cause, "errno", None) or 0
        words.add(os.strerror(number) if number > 0 else str(getattr(cause, "strerror", None) or cause))
    return "; ".join(sorted(words)).lower()


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

    async def send(self, message: bytes) -> None:
        """Send a message; waits while the client takes none.

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
    """Closed at once, because there were too many."""
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
        admission: limits on handshakes at once.
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
        self._admission = admission or Admission()
        self._open = Admission(max_connections, max_connections_per_address)
        self._budget = WindowBudget(receive_budget)
        self._buffer = IoBuffer(_CHUNK)
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
        try:
            await self._serve(stream, context, host)
        except Exception:
            _log.exception("a gRPC connection failed")
        finally:
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

    async def _serve(self, stream: trio.abc.Stream, context: TlsContext, host: str) -> None:
        async with trio.open_nursery() as nursery:

            def on_call(connection: _Connection, call: Call) -> None:
                nursery.start_soon(self._run_call, connection, call)

            connection = _Connection(
                stream,
                TlsConnection(context, server=True),
                GrpcConnection(client=False, config=self.config, peer="the client", budget=self._budget),
                self._buffer,
                on_call,
            )
            if not self._admission.enter(host):
                self.statistics.refused += 1
                return
            try:
                await connection.handshake()
            except HboneError as error:
                self.statistics.handshakes_failed += 1
                _log.info("TLS handshake with %s failed: %s", host or "a client", error)
                return
            finally:
                self._admission.leave(host)
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
