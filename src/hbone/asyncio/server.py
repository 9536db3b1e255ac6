"""Serving tunnels under asyncio."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from hbone.admission import HANDSHAKES, Line
from hbone.asyncio.connection import Tunnel
from hbone.asyncio.stream import HboneTransport
from hbone.endpoint import Endpoint
from hbone.errors import ErrorCode, HboneError
from hbone.recall import Recall
from hbone.session import FLUSH_TIMEOUT
from hbone.tls import TlsContext

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from hbone.admission import Admission, Turn
    from hbone.asyncio.stream import TunnelStream
    from hbone.config import ConnectionConfig
    from hbone.engine.flow import WindowBudget
    from hbone.identity import Authorizer, IdentitySource, RevocationSource, SpiffeId

    Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[object]]
    """Serves one stream, which is closed when it returns."""

__all__ = ["Handler", "serve"]

_log = logging.getLogger("hbone.asyncio.server")


async def serve(
    handler: Handler,
    svid: IdentitySource,
    port: int = 15008,
    *,
    authorize: Authorizer,
    host: str | None = None,
    accept: bool = True,
    config: ConnectionConfig | None = None,
    budget: WindowBudget | None = None,
    admission: Admission = HANDSHAKES,
    drain_timeout: float = 5.0,
    revocations: RevocationSource | None = None,
    started: Callable[[Sequence[tuple[str, int]]], object] | None = None,
) -> None:
    """Listen, and call `handler(reader, writer)` for each stream that an authorized peer opens. Runs until cancelled.

    On cancellation it stops listening, tells every peer with GOAWAY, and lets open streams end for `drain_timeout`.

    Args:
        handler: serves one stream; `writer.get_extra_info("peer")` is the peer's SpiffeId, `"request"` the CONNECT.
        svid: who we are; each accepted connection uses what is current.
        port: TCP port; 0 lets the system choose.
        authorize: says who may connect, from the peer's verified SPIFFE ID and our own.
        host: address to listen on; None stands for every one.
        accept: answer 200 before the handler is called; False leaves `writer.transport.accept()` or `.reject(status)`
            to the handler.
        config: parameters of HTTP/2.
        budget: what receive windows of all tunnels together may grow by.
        admission: limits of handshakes at once, by default those of the process: 512, and 32 of one address. What is
            over waits its turn, unread, within the time that a handshake may take.
        drain_timeout: seconds.
        revocations: certificates that were taken back; those that are found end tunnels that live, too.
        started: called with the addresses listened on.

    Raises:
        OSError: the port cannot be listened on.
    """
    server = _Server(handler, svid, authorize, accept, config, budget, admission, revocations)
    listening = await asyncio.get_running_loop().create_server(server.make, host, port)
    try:
        if started is not None:
            started([socket.getsockname()[:2] for socket in listening.sockets])
        await asyncio.Event().wait()
    finally:
        listening.close()
        try:
            await asyncio.shield(server.drain(drain_timeout))
        finally:
            server.recall.close()


class _ServedTunnel(Tunnel):
    """Counts itself in and out of the handshakes."""

    def __init__(self, endpoint: Endpoint, server: _Server) -> None:
        super().__init__(endpoint, client=False, on_request=server.on_request)
        self._server = server
        self._turn: Turn | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait, or refuse, where there are too many handshakes."""
        name = transport.get_extra_info("peername")
        address = str(name[0]) if isinstance(name, tuple) and name else ""
        assert isinstance(transport, asyncio.Transport)
        if self._server.draining:  # accepted before the listener was closed, and told only now
            transport.abort()
            return
        self._turn = self._server.line.join(address, self._begin)
        if self._turn is None:
            _log.warning("connection from %s closed: too many TLS handshakes at once", address or "a peer")
            transport.abort()
            return
        self.established.add_done_callback(lambda _: self._leave())
        self._server.tunnels.add(self)
        super().connection_made(transport)
        if not self._turn.entered:
            transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Count it out, whatever became of it."""
        super().connection_lost(exc)
        self._server.tunnels.discard(self)
        if not self.endpoint.established and self._turn is not None and self.failure is not None:
            _log.info("tunnel from %s refused: %s", self._turn.address or "a peer", self.failure)

    def _begin(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def _leave(self) -> None:
        if self._turn is not None:
            self._turn.leave()
        if self.endpoint.established:
            self._server.recall.admit(self)


class _Server:
    def __init__(
        self,
        handler: Handler,
        svid: IdentitySource,
        authorize: Authorizer,
        accept: bool,
        config: ConnectionConfig | None,
        budget: WindowBudget | None,
        admission: Admission,
        revocations: RevocationSource | None,
    ) -> None:
        self._handler = handler
        self._svid = svid
        self._authorize = authorize
        self._accept = accept
        self._config = config
        self._budget = budget
        self.line = Line(admission)
        self.recall = Recall(TlsContext.server, revocations)
        self.draining = False
        self.tunnels: set[_ServedTunnel] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def make(self) -> asyncio.BaseProtocol:
        """A protocol for one accepted connection."""
        try:
            identity = self._svid.current()
            context = self.recall.of(identity)
        except HboneError as error:
            _log.error("a connection was closed: %s", error)
            return _Closed()
        own = identity.svid.id
        authorize = self._authorize

        def allowed(peer: SpiffeId) -> bool:
            return authorize(peer, own)

        return _ServedTunnel(
            Endpoint(
                context,
                client=False,
                authorize=allowed,
                config=self._config,
                budget=self._budget,
                now=asyncio.get_running_loop().time(),
            ),
            self,
        )

    def on_request(self, stream: TunnelStream) -> None:
        """A task for each stream."""
        task = asyncio.get_running_loop().create_task(self._serve_stream(stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drain(self, timeout: float) -> None:
        """GOAWAY, then wait for streams and tasks, then cut."""
        self.draining = True
        for tunnel in list(self.tunnels):
            tunnel.drain()
        waiting: set[asyncio.Future[None]] = {*self._tasks, *(tunnel.ended for tunnel in self.tunnels)}
        if waiting:
            await asyncio.wait(waiting, timeout=timeout)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:  # each resets its stream; a tunnel that is closed first would end it, as if all were said
            await asyncio.wait(tasks, timeout=FLUSH_TIMEOUT)
        tunnels = list(self.tunnels)
        for tunnel in tunnels:
            tunnel.close()
        ends: set[asyncio.Future[None]] = {*tasks, *(tunnel.ended for tunnel in tunnels)}
        if ends:
            await asyncio.wait(ends, timeout=FLUSH_TIMEOUT + 1.0)

    async def _serve_stream(self, stream: TunnelStream) -> None:
        if self._accept:
            stream.accept()
        reader, writer = stream.make_pair()
        transport = writer.transport
        assert isinstance(transport, HboneTransport)
        try:
            await self._handler(reader, writer)
            stream.accept()
            transport.close()
            await transport.wait_closed()
        except ConnectionError as error:
            _log.debug("a stream of %s broke: %s", stream.peer, error)
        except Exception:
            _log.exception("the handler of a stream of %s failed", stream.peer)
            if stream.opened:
                stream.reset(ErrorCode.INTERNAL_ERROR)
            elif not stream.closed:
                stream.reject(503)
        finally:
            if not stream.closed:
                stream.reset(ErrorCode.INTERNAL_ERROR)  # CANCEL would look like an end
            transport.close()


class _Closed(asyncio.Protocol):
    """Closes what it is given."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.abort()
