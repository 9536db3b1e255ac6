"""Pages that a daemon shows about itself: what is asked, what is answered, and which page a path means."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import attrs

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from hbone.daemon.http import App, Receive, Scope, Send

    SendBytes = Callable[[bytes], Awaitable[None]]

__all__ = ["Page", "Request", "router"]


@attrs.frozen(kw_only=True)
class Request:
    """What a page is asked."""

    method: str
    query: Mapping[str, str]
    accept: str = ""


@attrs.frozen(kw_only=True)
class Page:
    """An answer."""

    status: int = 200
    content_type: str = "text/plain; charset=utf-8"
    body: bytes = b""
    write: Callable[[SendBytes], Awaitable[None]] | None = None
    """Writes the body in parts, in place of `body`; the length is not known before."""
    then: Callable[[], None] | None = None
    """Called once the answer has been sent."""

    @classmethod
    def text(cls, text: str, status: int = 200) -> Page:
        """Plain text."""
        return cls(status=status, body=text.encode())

    @classmethod
    def json(cls, value: Any) -> Page:
        """JSON for people and programs: indented, keys sorted."""
        body = json.dumps(value, indent=2, sort_keys=True, default=str).encode() + b"\n"
        return cls(content_type="application/json", body=body)


if TYPE_CHECKING:
    Route = Callable[[Request], Awaitable[Page]]


def router(routes: Mapping[str, Route]) -> App:
    """An ASGI application of a few pages; an unknown path is 404, as ztunnel's."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        route = routes.get(scope["path"])
        if route is None:
            page = Page(status=404)
        else:
            accept = b",".join(value for name, value in scope["headers"] if name == b"accept")
            # %-escapes are undone before the names are looked up; of a repeated name the last counts
            query = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1")[:8192], keep_blank_values=True))
            page = await route(Request(method=scope["method"], query=query, accept=accept.decode("latin-1")))
        headers = [
            (b"content-type", page.content_type.encode()),
            (b"cache-control", b"no-store"),
            (b"x-content-type-options", b"nosniff"),
        ]
        if page.write is None:
            headers.append((b"content-length", str(len(page.body)).encode()))
        await send({"type": "http.response.start", "status": page.status, "headers": headers})
        no_body = scope["method"] == "HEAD"
        if page.write is not None and not no_body:
            await page.write(lambda part: send({"type": "http.response.body", "body": part, "more_body": True}))
        await send({"type": "http.response.body", "body": b"" if no_body else page.body})
        if page.then is not None:
            page.then()

    return app
