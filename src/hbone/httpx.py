"""httpx over HBONE: requests travel in CONNECT streams of a pool's tunnels.

```python
transport = hbone.httpx.HboneTransport(pool, via=("10.0.0.7", 15008), peer="spiffe://cluster.local/ns/shop/sa/orders")
async with httpx.AsyncClient(transport=transport) as client:
    response = await client.get("http://10.0.0.7:8080/orders")
```

Works with the pools of `hbone.trio` and `hbone.asyncio`. Needs the extra `httpx`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from typing import TYPE_CHECKING, Any

import httpcore
import httpx

from hbone.connect import Authority
from hbone.errors import HboneError
from hbone.session import as_peers

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator

    import hbone.asyncio
    import hbone.trio
    from hbone.identity import SpiffeId

    Pool = hbone.trio.ConnectionPool | hbone.asyncio.ConnectionPool

__all__ = ["HboneTransport"]

_HBONE_PORT = 15008
_CLOSE_TIMEOUT = 1.0


class HboneTransport(httpx.AsyncBaseTransport):
    """A transport for httpx.AsyncClient.

    Args:
        pool: where tunnels come from; it is the caller's, and stays open when the client is closed.
        via: host and port of the tunnel endpoint; None stands for port 15008 of the URL's host.
        peer: who may answer there; None leaves it to the pool's `authorize`.
        max_connections: HTTP connections at once, each in a stream.
        keepalive_expiry: seconds that an unused HTTP connection is kept.
        ssl_context: for https URLs, whose TLS is the application's own and runs inside the tunnel; by default httpx's.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        via: tuple[str, int] | None = None,
        peer: str | SpiffeId | Iterable[str | SpiffeId] | None,
        max_connections: int = 100,
        keepalive_expiry: float = 5.0,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._http = httpcore.AsyncConnectionPool(
            ssl_context=ssl_context,
            max_connections=max_connections,
            keepalive_expiry=keepalive_expiry,
            network_backend=_Backend(pool, via, as_peers(peer)),
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request.

        Raises:
            httpx.ConnectError: no tunnel, another peer than expected, or CONNECT was rejected.
            httpx.TransportError: its other kinds, as with httpx's own transport.
        """
        assert isinstance(request.stream, httpx.AsyncByteStream)
        outgoing = httpcore.Request(
            method=request.method,
            url=httpcore.URL(
                scheme=request.url.raw_scheme,
                host=request.url.raw_host,
                port=request.url.port,
                target=request.url.raw_path,
            ),
            headers=request.headers.raw,
            content=request.stream,
            extensions=request.extensions,
        )
        with _as_httpx():
            response = await self._http.handle_async_request(outgoing)
        return httpx.Response(
            status_code=response.status,
            headers=response.headers,
            stream=_Body(response.stream),
            extensions=response.extensions,
        )

    async def aclose(self) -> None:
        """Close the HTTP connections; the tunnels are the pool's."""
        await self._http.aclose()


@contextlib.contextmanager
def _as_httpx() -> Iterator[None]:
    """Errors of httpcore as those of httpx, which bear the same names."""
    try:
        yield
    except Exception as error:
        kind = getattr(httpx, type(error).__name__, None)
        if type(error).__module__.startswith("httpcore") and isinstance(kind, type):
            raise kind(str(error)) from error
        raise


class _Body(httpx.AsyncByteStream):
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _as_httpx():
            async for part in self._stream:
                yield part

    async def aclose(self) -> None:
        await self._stream.aclose()


class _Backend(httpcore.AsyncNetworkBackend):
    def __init__(self, pool: Pool, via: tuple[str, int] | None, peer: frozenset[SpiffeId] | None) -> None:
        self._pool = pool
        self._via = via
        self._peer = peer

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            connect = functools.partial(
                self._pool.connect, Authority(host, port), via=self._via or (host, _HBONE_PORT), peer=self._peer
            )
            stream = await _within(timeout, connect, httpcore.ConnectTimeout)
        except HboneError as error:
            raise httpcore.ConnectError(str(error)) from error
        return _AsyncioStream(*stream) if isinstance(stream, tuple) else _TrioStream(stream)

    async def sleep(self, seconds: float) -> None:
        if _under_trio():
            import trio

            await trio.sleep(seconds)
        else:
            await asyncio.sleep(seconds)


def _under_trio() -> bool:
    import trio

    try:
        trio.lowlevel.current_task()
    except RuntimeError:
        return False
    return True


async def _within(timeout: float | None, call: Callable[[], Any], late: type[Exception]) -> Any:
    """Call with a deadline of the running loop's kind."""
    if _under_trio():
        import trio

        with trio.move_on_after(float("inf") if timeout is None else timeout):
            return await call()
    else:
        try:
            async with asyncio.timeout(timeout):
                return await call()
        except TimeoutError:
            pass
    raise late("no answer in time" if timeout is None else f"no answer within {timeout:g} s")


class _TrioStream(httpcore.AsyncNetworkStream):
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data: bytes = await self._call(
            functools.partial(self._stream.receive_some, max_bytes),
            timeout,
            httpcore.ReadTimeout,
            httpcore.ReadError,
        )
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        send = functools.partial(self._stream.send_all, buffer)
        await self._call(send, timeout, httpcore.WriteTimeout, httpcore.WriteError)

    async def _call(
        self, call: Callable[[], Any], timeout: float | None, late: type[Exception], failed: type[Exception]
    ) -> Any:
        import trio

        try:
            return await _within(timeout, call, late)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise failed(str(error)) from error

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        import trio

        inner = trio.SSLStream(self._stream, ssl_context, server_hostname=server_hostname, https_compatible=True)
        await self._call(inner.do_handshake, timeout, httpcore.ConnectTimeout, httpcore.ConnectError)
        return _TrioStream(inner)

    def get_extra_info(self, info: str) -> Any:
        return getattr(self._stream, "peer", None) if info == "peer" else None


class _AsyncioStream(httpcore.AsyncNetworkStream):
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            data: bytes = await _within(timeout, functools.partial(self._reader.read, max_bytes), httpcore.ReadTimeout)
        except OSError as error:
            raise httpcore.ReadError(str(error)) from error
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._writer.write(buffer)
        try:
            await _within(timeout, self._writer.drain, httpcore.WriteTimeout)
        except OSError as error:
            raise httpcore.WriteError(str(error)) from error

    async def aclose(self) -> None:
        self._writer.close()
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                await self._writer.wait_closed()
        except TimeoutError:  # what was written has no room at the peer
            self._writer.transport.abort()
        except OSError:
            pass  # it broke, and is closed

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        start = functools.partial(self._writer.start_tls, ssl_context, server_hostname=server_hostname)
        try:
            await _within(timeout, start, httpcore.ConnectTimeout)
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from error
        return self

    def get_extra_info(self, info: str) -> Any:
        return self._writer.get_extra_info(info)
