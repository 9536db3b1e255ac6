"""One HTTP/1.1 connection: h11 reads and writes it, an ASGI application answers.

Whatever leads to another protocol (an `Upgrade`, HTTP/2's preface) and CONNECT is refused before the application sees
it. A response leaves with its first piece of body: until then an error can still have a status of its own.
"""

from __future__ import annotations

import contextlib
from email.utils import formatdate
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import h11
import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hbone.daemon.http import HttpLimits, Message, Receive, Scope, Send

    Answer = Callable[[Scope, Receive, Send], Awaitable[None]]

__all__ = ["Http1Connection", "PeerGone", "refusal"]

_READ = 64 * 1024
_LINGER_SECONDS = 1.0
_LINGER_READS = 16


class PeerGone(OSError):
    """Nobody reads the response any more. Source: ASGI HTTP 2.4, disconnected client."""


class Http1Connection:
    """Requests one after the other, until one side ends the connection or a limit does.

    Args:
        app: answers; what it raises ends the connection.
        stream: the bytes; its `idle` says whether a request is being answered.
        limits: what the peer may cost.
        client: address and port of the peer, if it has them.
        server: ours.
    """

    def __init__(
        self,
        app: Answer,
        stream: Any,
        limits: HttpLimits,
        client: tuple[str, int] | None,
        server: tuple[str, int] | None,
    ) -> None:
        self.app = app
        self.stream = stream
        self.limits = limits
        self.http = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.header_bytes)
        self.last = False
        """The connection ends with this request."""
        self._ends: tuple[tuple[str, int] | None, tuple[str, int] | None] = (client, server)

    async def run(self) -> None:
        """Serve until it is over; the caller closes the stream.

        Raises:
            Exception: what the application raised, or the stream: nothing more can be said on it.
        """
        for count in range(1, self.limits.requests + 1):
            self.last = count == self.limits.requests
            request = await self._request()
            if request is None:
                break
            exchange = _Exchange(self, request)
            self.stream.idle = False
            await self.app(self._scope(request), exchange.receive, exchange.send)
            await exchange.finish()
            self.stream.idle = True
            if self.http.our_state is not h11.DONE or self.http.their_state is not h11.DONE:
                break
            self.http.start_next_cycle()
        await self._end()

    async def event(self) -> Any:
        """The next one of the peer's.

        Raises:
            h11.RemoteProtocolError: it is no HTTP/1.1.
        """
        while True:
            event = self.http.next_event()
            if event is not h11.NEED_DATA:
                return event
            if self.http.they_are_waiting_for_100_continue:
                await self.write(h11.InformationalResponse(status_code=100, headers=[]))
            self.http.receive_data(await self.stream.receive_some(_READ))

    async def write(self, *events: Any) -> None:
        """Send events of ours with one call."""
        await self.stream.send_all(b"".join([self.http.send(event) or b"" for event in events]))

    async def refuse(self, status: int) -> None:
        """Answer in place of the application, and let that be the end; nothing where an answer has begun."""
        if self.http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.last = True
            await self.write(self.response(status, [(b"content-length", b"0")]), h11.EndOfMessage())

    def response(self, status: int, headers: list[tuple[bytes, bytes]]) -> h11.Response:
        """The head of a response."""
        if not any(bytes(name).lower() == b"date" for name, _ in headers):
            headers = [*headers, (b"date", formatdate(usegmt=True).encode())]
        if self.last:
            headers = [*headers, (b"connection", b"close")]
        return h11.Response(status_code=status, headers=headers)

    async def _request(self) -> h11.Request | None:
        """The next request; None when there is none, or it was answered here."""
        try:
            with trio.move_on_after(self.limits.idle_seconds):
                event = await self.event()
                if not isinstance(event, h11.Request):
                    return None  # the peer's end
                status = refusal(event)
                if status is None and event.http_version not in (b"1.0", b"1.1"):
                    status = 400  # the peer's fault, as what is no HTTP at all
                if status is None:
                    return event
                await self.refuse(status)
        except h11.RemoteProtocolError as error:
            await self.refuse(error.error_status_hint)
        return None

    def _scope(self, request: h11.Request) -> Scope:
        path, _, query = request.target.partition(b"?")
        client, server = self._ends
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": request.http_version.decode("ascii"),
            "method": request.method.decode("ascii").upper(),
            "scheme": "http",
            "path": unquote(path.decode("ascii")),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": list(request.headers),
            "client": client,
            "server": server,
            "state": {},
            "extensions": {},
        }

    async def _end(self) -> None:
        """End our half first, and wait a little for the peer's: unread bytes would cost it our last answer."""
        await self.stream.send_eof()
        if self.http.their_state not in (h11.SEND_BODY, h11.ERROR):
            return
        with trio.move_on_after(_LINGER_SECONDS):
            for _ in range(_LINGER_READS):
                if not await self.stream.receive_some(_READ):
                    break


def refusal(request: h11.Request) -> int | None:
    """The status for what leads out of HTTP/1.1; None for a plain request."""
    if request.method in (b"CONNECT", b"PRI"):
        return 405
    names = {name for name, _ in request.headers}
    return 400 if b"upgrade" in names or b"http2-settings" in names else None


class _Exchange:
    """What the application has of one request: its two callables."""

    def __init__(self, connection: Http1Connection, request: h11.Request) -> None:
        self._connection = connection
        self._no_body = request.method.upper() == b"HEAD"
        self._start: Message | None = None
        self._started = False
        self._complete = False
        self._gone = False
        self._body_read = False
        self._kept = 0
        self._receiving = trio.Lock()
        self._watching: trio.CancelScope | None = None

    async def receive(self) -> Message:
        """The next piece of the request's body, or that nobody waits for the answer."""
        async with self._receiving:
            try:
                if not (self._body_read or self._complete or self._gone):
                    return await self._body()
                if not (self._complete or self._gone):
                    await self._await_end()
            except (trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError):
                self._gone = True
            except h11.RemoteProtocolError as error:
                self._gone = True
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await self._connection.refuse(error.error_status_hint)
        return {"type": "http.disconnect"}

    async def _body(self) -> Message:
        with trio.fail_after(self._connection.limits.read_seconds):
            event = await self._connection.event()
        if isinstance(event, h11.Data):
            return {"type": "http.request", "body": bytes(event.data), "more_body": True}
        self._body_read = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def _await_end(self) -> None:
        """Until the response is complete or the peer has ended; the next request may come meanwhile."""
        connection = self._connection
        with trio.CancelScope() as self._watching:
            while self._kept < connection.limits.header_bytes:
                data = await connection.stream.receive_some(connection.limits.header_bytes)
                connection.http.receive_data(data)
                self._kept += len(data)
                if not data:
                    return
            await trio.sleep_forever()

    async def send(self, message: Message) -> None:
        """Take a part of the response.

        Raises:
            PeerGone: nobody reads it.
            RuntimeError: it has no place here.
        """
        kind = message["type"]
        if kind == "http.response.start" and not self._started:
            self._start = message
            await trio.lowlevel.checkpoint()
        elif kind == "http.response.body" and self._start is not None and not self._complete:
            await self._send_body(self._start, bytes(message.get("body", b"")), bool(message.get("more_body")))
        else:
            raise RuntimeError(f"the application sent {kind!r} where it has no place in a response")

    async def _send_body(self, start: Message, body: bytes, more: bool) -> None:
        connection = self._connection
        if self._gone:
            raise PeerGone("the peer is gone")
        events: list[Any] = []
        status = start["status"]
        if not self._started:
            events.append(connection.response(status, list(start.get("headers", ()))))
            self._started = True
        if body and not self._no_body and status not in (204, 304):
            events.append(h11.Data(data=body))
        if not more:
            events.append(h11.EndOfMessage())
            self._complete = True
        try:
            await connection.write(*events)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._gone = True
            raise PeerGone("the peer is gone") from None
        if self._complete and self._watching is not None:
            self._watching.cancel()

    async def finish(self) -> None:
        """The application has returned; without an answer of its own there is one that says so."""
        if not (self._started or self._gone):
            await self._connection.refuse(500)
