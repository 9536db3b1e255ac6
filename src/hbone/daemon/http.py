"""An HTTP/1.1 server for a daemon's own pages (metrics, readiness, dumps), and for an application on a stream.

Every connection runs under a catch of its own, so that a bad one costs only itself; whatever waits has a limit. What
happens on one is `hbone.daemon.http1` for pages, which every daemon is asked for, and Hypercorn for an application of
somebody else's (`hbone.daemon.asgiserver`).
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Collection, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import trio

from hbone.config import KIB, MIB, between
from hbone.daemon.http1 import Http1Connection, PeerGone
from hbone.daemon.logs import get_logger
from hbone.errors import ConfigurationError

__all__ = [
    "App",
    "HttpLimits",
    "Message",
    "Receive",
    "Scope",
    "Send",
    "serve_asgi",
    "serve_stream",
    "unix_listener",
    "unix_socket",
]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_log = get_logger("hbone.daemon.http")
_OUT_OF_DESCRIPTORS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}


@attrs.frozen(kw_only=True)
class HttpLimits:
    """What one peer may cost the process."""

    connections: int = attrs.field(default=100, validator=between(1, 100_000))
    """Open at once; one more takes the place of the one that has waited longest without a request, or is closed."""
    header_bytes: int = attrs.field(default=16 * KIB, validator=between(1 * KIB, MIB))
    """Request line and header fields, in bytes."""
    body_bytes: int = attrs.field(default=MIB, validator=between(0, 1 << 40))
    """Request body, in bytes; more is answered with 413."""
    idle_seconds: float = attrs.field(default=10.0, validator=between(0.1, 3600))
    """From connect, or the last response, to the end of the next request's head."""
    read_seconds: float = attrs.field(default=10.0, validator=between(0.1, 3600))
    """Between two reads of a request's body."""
    write_seconds: float = attrs.field(default=30.0, validator=between(0.1, 3600))
    """For the peer to take one chunk of a response."""
    request_seconds: float = attrs.field(default=60.0, validator=between(0.1, 86_400))
    """For the application to answer one request."""
    requests: int = attrs.field(default=1000, validator=between(1, 1_000_000))
    """On one connection."""


async def serve_asgi(
    app: App,
    listeners: Sequence[trio.SocketListener],
    *,
    limits: HttpLimits | None = None,
    hosts: Collection[str] | None = None,
    task_status: trio.TaskStatus[Sequence[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve an ASGI application until cancelled; closes the listeners then, and every connection.

    Args:
        app: takes `http` scopes only; there is no lifespan and no websocket.
        listeners: TCP or Unix sockets, listening already. When one is closed, its connections still go on.
        limits: what one peer may cost.
        hosts: check that `Host` (and `Origin`, when sent) is loopback, an IP address or one of these names. Set it for
            pages that trust the loopback address, because a web site can point its own name there. None: no check.
        task_status: is given the listeners once connections are accepted.
    """
    await _Server(app, limits or HttpLimits(), hosts).run(listeners, task_status)


async def serve_stream(
    app: App,
    stream: trio.abc.HalfCloseableStream,
    *,
    limits: HttpLimits | None = None,
    hosts: Collection[str] | None = None,
) -> None:
    """Serve one connection that the caller accepted, on any stream, until it ends; closes the stream.

    Args:
        app: as `serve_asgi`'s. `client` and `server` of its scope are None.
        stream: nothing was read from it yet.
        limits: what the peer may cost.
        hosts: as `serve_asgi`'s.
    """
    limits = limits or HttpLimits()
    bounded = _BoundedStream(stream, _NoSocket(), limits.write_seconds)
    try:
        from hbone.daemon import asgiserver

        await _serve_connection(_GuardedApp(app, limits, hosts), bounded, limits, asgiserver.speak)
    finally:
        await trio.aclose_forcefully(stream)


def unix_listener(path: str | os.PathLike[str], *, mode: int = 0o600, backlog: int = 64) -> trio.SocketListener:
    """Listen on a Unix socket that appears with its final mode; a stale one of a dead process is replaced.

    Raises:
        ConfigurationError: something else stands there, a live process listens there, or the path is too long.
    """
    return trio.SocketListener(trio.socket.from_stdlib_socket(unix_socket(path, mode=mode, backlog=backlog)))


def unix_socket(
    path: str | os.PathLike[str],
    *,
    mode: int = 0o600,
    backlog: int = 64,
    kind: socket.SocketKind = socket.SOCK_STREAM,
) -> socket.socket:
    """The same, as a plain socket of any kind.

    Raises:
        ConfigurationError: something else stands there, a live process listens there, or the path is too long.
    """
    target = Path(path)
    name = str(target)
    if len(os.fsencode(name)) > 100:  # sun_path is 108 bytes, and a suffix is added for a moment
        raise ConfigurationError(f"socket path {name!r} is longer than 100 bytes; choose a shorter directory")
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(target.lstat().st_mode):
            raise ConfigurationError(f"{name!r} exists and is not a socket; remove it or choose another path")
        if _answers(name, kind):
            raise ConfigurationError(f"another process listens on {name!r}; stop it first")
    bound = Path(f"{name}.new")
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        bound.unlink(missing_ok=True)
        sock.bind(str(bound))
        bound.chmod(mode)
        sock.listen(backlog)
        bound.rename(target)
        return sock
    except OSError as error:
        sock.close()
        with contextlib.suppress(OSError):
            bound.unlink(missing_ok=True)
        raise ConfigurationError(f"cannot listen on {name!r}: {(error.strerror or str(error)).lower()}") from error


def _answers(path: str, kind: socket.SocketKind) -> bool:
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.setblocking(False)
        try:
            sock.connect(path)
        except OSError as error:
            return error.errno == errno.EAGAIN  # its backlog is full: alive
    return True


class _Server:
    """The accept loops and the connections of one `serve_asgi`."""

    def __init__(self, app: App, limits: HttpLimits, hosts: Collection[str] | None) -> None:
        self._limits = limits
        self._app = _GuardedApp(app, limits, hosts)
        self._open: dict[_BoundedStream, None] = {}

    async def run(
        self,
        listeners: Sequence[trio.SocketListener],
        task_status: trio.TaskStatus[Sequence[trio.SocketListener]],
    ) -> None:
        try:
            async with trio.open_nursery() as nursery:
                for listener in listeners:
                    nursery.start_soon(self._accept, listener, nursery)
                task_status.started(listeners)
                try:
                    await trio.sleep_forever()
                finally:
                    for stream in self._open:
                        stream.socket.close()
        finally:
            for listener in listeners:
                listener.socket.close()

    async def _accept(self, listener: trio.SocketListener, nursery: trio.Nursery) -> None:
        while True:
            try:
                accepted = await listener.accept()
            except trio.ClosedResourceError:
                return  # who gave us the listener closed it; connections go on
            except OSError as error:
                if error.errno not in _OUT_OF_DESCRIPTORS:
                    raise
                _log.error("cannot accept", error=(error.strerror or "").lower())
                await trio.sleep(0.1)
                continue
            if len(self._open) >= self._limits.connections and not self._make_room():
                accepted.socket.close()
                continue
            stream = _BoundedStream(accepted, accepted.socket, self._limits.write_seconds)
            self._open[stream] = None
            nursery.start_soon(self._serve, stream)

    def _make_room(self) -> bool:
        """Close the connection that has been open longest without a request: silence must not keep others out."""
        for stream in self._open:
            if stream.idle:
                del self._open[stream]
                stream.socket.close()
                return True
        return False

    async def _serve(self, stream: _BoundedStream) -> None:
        try:
            await _serve_connection(self._app, stream, self._limits, _speak)
        finally:
            self._open.pop(stream, None)
            stream.socket.close()


async def _serve_connection(app: _GuardedApp, stream: _BoundedStream, limits: HttpLimits, speak: Speak) -> None:
    """One connection, under the catch that keeps its faults from the others."""
    try:
        if await _is_http1(stream, limits):
            await speak(app, stream, limits)
    except Exception as error:
        _log.debug("connection failed", error=repr(error))
    except BaseExceptionGroup as group:
        _, others = group.split(Exception)  # ours is cancelled while it also failed
        if others is not None:
            raise others from None


async def _is_http1(stream: _BoundedStream, limits: HttpLimits) -> bool:
    """Wait for the first bytes; False when they can only begin HTTP/2 or are no request at all."""
    with trio.move_on_after(limits.idle_seconds):
        first = await stream.peek(4)
        return bool(first) and not first.startswith(b"PRI ")
    return False


async def _speak(app: _GuardedApp, stream: _BoundedStream, limits: HttpLimits) -> None:
    """HTTP/1.1 for pages of our own."""
    client, server = (_address(name) for name in (stream.socket.getpeername(), stream.socket.getsockname()))
    await Http1Connection(app, stream, limits, client, server).run()


def _address(name: Any) -> tuple[str, int] | None:
    """Of TCP; that of a Unix socket is a path."""
    return name[:2] if isinstance(name, tuple) else None


class _NoSocket:
    """A socket for a stream that has none: no address. What Hypercorn asks of one."""

    family = socket.AF_UNSPEC

    def getpeername(self) -> None:
        return None

    def getsockname(self) -> None:
        return None

    def close(self) -> None:
        """The stream is closed by who made it."""


class _BoundedStream(trio.abc.HalfCloseableStream):
    """A stream whose sends have a deadline, and whose first bytes can be looked at."""

    def __init__(
        self, stream: trio.abc.HalfCloseableStream, socket: trio.socket.SocketType | _NoSocket, write_seconds: float
    ) -> None:
        self._stream = stream
        self._write_seconds = write_seconds
        self._early = b""
        self._sending = trio.Lock()
        self.idle = True
        """No request is being answered."""
        self.socket = socket

    async def peek(self, nbytes: int) -> bytes:
        while len(self._early) < nbytes:
            more = await self._stream.receive_some(4096)
            if not more:
                break
            self._early += more
        return self._early

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if self._early:
            early, self._early = self._early, b""
            await trio.lowlevel.checkpoint()
            return early
        return bytes(await self._stream.receive_some(max_bytes))

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        try:
            with trio.fail_after(self._write_seconds):
                async with self._sending:  # an error, or the end, may be told while a page is sent
                    await self._stream.send_all(data)
        except trio.TooSlowError:
            self.socket.close()
            await trio.aclose_forcefully(self._stream)
            raise trio.BrokenResourceError("the peer did not read its response in time") from None

    async def wait_send_all_might_not_block(self) -> None:
        async with self._sending:
            await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        async with self._sending:
            await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()


class _Refused(Exception):
    """The request was answered with an error by us; the connection ends."""


class _TooLarge(Exception):
    """The request's body is over the limit."""


class _GuardedApp:
    """The application, with its limits."""

    def __init__(self, app: App, limits: HttpLimits, hosts: Collection[str] | None) -> None:
        self._app = app
        self._limits = limits
        self._hosts = None if hosts is None else {"localhost", *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send, *_: Any) -> None:
        if scope["type"] != "http":
            return  # Hypercorn's lifespan
        if self._hosts is not None and not _from_allowed_host(scope, self._hosts):
            await _answer(send, 403, "this name is not served here; use localhost or the address\n")
            return
        started = False
        left = self._limits.body_bytes

        async def bounded_receive() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise _TooLarge
            return message

        async def noted_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.body"
            await send(message)

        status, text = 500, "internal error\n"
        with trio.move_on_after(self._limits.request_seconds) as scope_of_time:
            try:
                await self._app(scope, bounded_receive, noted_send)
                return
            except _TooLarge:
                status, text = 413, f"the body is over {self._limits.body_bytes} bytes\n"
            except Exception as error:
                if _is_peers_end(error):
                    raise
                _log.exception("request failed", path=scope["path"])
        if scope_of_time.cancelled_caught:
            status, text = 504, f"no answer within {self._limits.request_seconds:g} seconds\n"
        if started:
            raise _Refused  # too late for a status: end the connection, so that the answer is seen to be cut
        await _answer(send, status, text)


Speak = Callable[[_GuardedApp, _BoundedStream, HttpLimits], Awaitable[None]]


def _is_peers_end(error: Exception) -> bool:
    return isinstance(error, PeerGone) or (isinstance(error, ExceptionGroup) and error.split(PeerGone)[1] is None)


async def _answer(send: Send, status: int, text: str) -> None:
    body = text.encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _from_allowed_host(scope: Scope, allowed: Collection[str]) -> bool:
    """No web page of another origin made this request through a name of its own."""
    hosts = [value for name, value in scope["headers"] if name == b"host"]
    origins = [value for name, value in scope["headers"] if name == b"origin"]
    if len(hosts) != 1 or len(origins) > 1 or not _is_allowed_name(hosts[0], allowed):
        return False
    if not origins:
        return True
    scheme, separator, rest = origins[0].partition(b"://")
    return scheme in (b"http", b"https") and bool(separator) and _is_allowed_name(rest, allowed)


def _is_allowed_name(authority: bytes, allowed: Collection[str]) -> bool:
    try:
        text = authority.decode("ascii").lower()
    except UnicodeDecodeError:
        return False
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            return False
    else:
        host = text.partition(":")[0]
    if host in allowed:
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True  # an address, so no name was pointed here by someone else
