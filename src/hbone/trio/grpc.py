"""gRPC over TLS under Trio: a client of the control plane. The server's names, of `grpcserver`, are here too."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from typing import TYPE_CHECKING, Self

import trio

from hbone.config import MIB
from hbone.errors import ConnectionLost
from hbone.grpc import Call, ClientConnection, GrpcConfig, GrpcError, GrpcUnavailable, Metadata, StatusCode
from hbone.lazy import names_at_first_use
from hbone.tls import IoBuffer, TlsConnection, TlsContext
from hbone.trio.grpctransport import CHUNK, Transport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import TracebackType

    from hbone.trio.grpcserver import GrpcCall, GrpcServer, Handler, ServerStatistics

__all__ = ["GrpcCall", "GrpcClient", "GrpcServer", "GrpcStream", "Handler", "ServerStatistics"]

_OF_SERVER = ("GrpcCall", "GrpcServer", "Handler", "ServerStatistics")
_log = logging.getLogger(__name__)

__getattr__ = names_at_first_use(__name__, dict.fromkeys(_OF_SERVER, "hbone.trio.grpcserver"))  # most are clients alone


class GrpcStream:
    """Client: one call with any number of messages each way. Made by `GrpcClient.stream`."""

    def __init__(self, connection: Transport[ClientConnection], call: Call) -> None:
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
        self._connection = Transport(
            stream,
            TlsConnection(tls, server=False),
            ClientConnection(config=config, authority=self.authority, peer=self.authority),
            IoBuffer(CHUNK),
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
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that no resolver can be asked for
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
        nursery.start_soon(self._run)
        return self

    async def _run(self) -> None:
        try:
            await self._connection.run()
        except Exception:  # ours: it must not appear in the caller's code as a group of something else
            _log.exception("the connection to %s failed", self.authority)

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


def _dial_reason(error: Exception) -> str:
    """The words of a failed dial; Trio puts the reasons of several addresses in a group."""
    words = set()
    for cause in getattr(error.__cause__, "exceptions", None) or [error]:
        number = getattr(cause, "errno", None) or 0
        words.add(os.strerror(number) if number > 0 else str(getattr(cause, "strerror", None) or cause))
    return "; ".join(sorted(words)).lower()
