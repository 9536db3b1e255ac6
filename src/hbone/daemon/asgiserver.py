"""Hypercorn, for an application of somebody else's on one connection. A daemon's own pages do without it (`http1`).

A peer never reaches it directly. One bad connection can raise through its nursery and end the process, so it gets one
connection at a time, under the catch of `hbone.daemon.http`; what leads to HTTP/2 (an `Upgrade`) and CONNECT is refused
before it acts on it; whatever waits has a limit.

Imported at first use: with what it brings (ssl, wsproto, multiprocessing) it takes 8 MB.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from hypercorn.config import Config
from hypercorn.events import Closed, Updated
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext

from hbone.daemon.http1 import refusal

if TYPE_CHECKING:
    from hypercorn.typing import AppWrapper

    from hbone.daemon.http import HttpLimits

__all__ = ["speak"]


class _Refused(Exception):
    """The request leads out of HTTP/1.1, and was answered."""


class _Http1Only(H11Protocol):
    """Answers what is no plain request with an error instead of changing the protocol."""

    async def _check_protocol(self, event: Any) -> None:
        status = refusal(event)
        if status is not None:
            await self._send_error_response(status)
            await self.send(Closed())
            raise _Refused


class _Http1Server(TCPServer):
    """Hypercorn's connection with that protocol in place."""

    async def protocol_send(self, event: Any) -> None:
        if isinstance(event, Updated):
            cast(Any, self.stream).idle = event.idle
        await super().protocol_send(event)

    async def _read_data(self) -> None:
        made = self.protocol
        made.protocol = _Http1Only(
            made.app,
            made.config,
            made.context,
            made.task_group,
            made.state,
            made.ssl,
            made.client,
            made.server,
            made.send,
        )
        await super()._read_data()
        await self.idle_task.stop()  # else a connection that has ended would stay until its idle time is over


async def speak(app: Any, stream: Any, limits: HttpLimits) -> None:
    """Serve requests of one connection until it ends; the caller has seen that it does not begin with HTTP/2.

    Args:
        app: answers `http` scopes, and has its limits.
        stream: the bytes; its `idle` says whether a request is being answered.
        limits: what the peer may cost.
    """
    config = Config()
    config.accesslog = None
    config.errorlog = None
    config.include_server_header = False
    config.h11_max_incomplete_size = limits.header_bytes
    config.keep_alive_timeout = limits.idle_seconds
    config.keep_alive_max_requests = limits.requests
    config.read_timeout = limits.read_seconds  # type: ignore[assignment]  # used as seconds, a float too
    await _Http1Server(cast("AppWrapper", app), config, WorkerContext(None), {}, stream)
