"""Serving tunnels: accept, handshake, and a task for each stream."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from hbone.admission import HANDSHAKES, Admission
from hbone.config import ConnectionConfig
from hbone.endpoint import Endpoint
from hbone.errors import ErrorCode, HboneError
from hbone.recall import Recall
from hbone.tls import TlsContext
from hbone.trio.connection import Connection
from hbone.trio.entrance import Entrance

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from hbone.engine.flow import WindowBudget
    from hbone.identity import Authorizer, IdentitySource, RevocationSource, SpiffeId
    from hbone.trio.stream import HboneStream

    Handler = Callable[[HboneStream], Awaitable[object]]
    """Serves one stream, which is closed when it returns."""

L = TypeVar("L", bound=trio.abc.Listener[Any])

__all__ = ["DRAIN_TIMEOUT", "Handler", "serve", "serve_listeners", "serve_transport"]

DRAIN_TIMEOUT = 5.0
"""Seconds that open streams may take to end when a server is cancelled."""

_log = logging.getLogger("hbone.trio.server")


async def serve(
    handler: Handler,
    svid: IdentitySource,
    port: int = 15008,
    *,
    authorize: Authorizer,
    host: str | None = None,
    config: ConnectionConfig | None = None,
    budget: WindowBudget | None = None,
    admission: Admission = HANDSHAKES,
    drain_timeout: float = DRAIN_TIMEOUT,
    revocations: RevocationSource | None = None,
    refused: Callable[[HboneError], object] = lambda _: None,
    task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Listen, and call `handler` for each stream that an authorized peer opens. Runs until it is cancelled.

    On cancellation it stops listening, tells every peer with GOAWAY, and lets open streams end for `drain_timeout`.
    A connection's fault, or a handler's, ends that connection or stream and nothing else.

    Args:
        handler: serves one stream. The first use of the stream answers 200; a handler that decides first calls
            `stream.reject(status)`. An exception of it resets the stream, and is logged.
        svid: who we are; each accepted connection uses what is current.
        port: TCP port; 0 lets the system choose, and `task_status` tells which.
        authorize: says who may connect, from the peer's verified SPIFFE ID and our own.
        host: address to listen on; None stands for every one.
        config: parameters of HTTP/2.
        budget: what receive windows of all tunnels together may grow by.
        admission: limits of handshakes at once, by default those of the process: 512, and 32 of one address. What is
            over waits its turn, unread, within the time that a handshake may take.
        drain_timeout: seconds.
        revocations: certificates that were taken back; those that are found end tunnels that live, too.
        refused: called with the error of each tunnel that is refused in its handshake, or cut by `revocations`.
        task_status: reports the listeners.

    Raises:
        OSError: the port cannot be listened on.
    """
    listeners = await trio.open_tcp_listeners(port, host=host)
    await serve_listeners(
        handler,
        svid,
        listeners,
        authorize=authorize,
        config=config,
        budget=budget,
        admission=admission,
        drain_timeout=drain_timeout,
        revocations=revocations,
        refused=refused,
        task_status=task_status,
    )


async def serve_listeners(
    handler: Handler,
    svid: IdentitySource,
    listeners: Sequence[L],
    *,
    authorize: Authorizer,
    config: ConnectionConfig | None = None,
    budget: WindowBudget | None = None,
    admission: Admission = HANDSHAKES,
    drain_timeout: float = DRAIN_TIMEOUT,
    revocations: RevocationSource | None = None,
    refused: Callable[[HboneError], object] = lambda _: None,
    task_status: trio.TaskStatus[list[L]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """As `serve`, on listeners that the caller made; they are closed at the end."""
    server = _Server(handler, svid, authorize, config, budget, admission, revocations, refused)
    try:
        async with trio.open_nursery() as outer:
            # The connections live in a task of their own that a cancellation from outside does not reach: they drain.
            stop = trio.Event()
            scope, nursery = await outer.start(_host, stop)
            try:
                await trio.serve_listeners(
                    server.serve_transport, list(listeners), handler_nursery=nursery, task_status=task_status
                )
            finally:
                scope.deadline = trio.current_time() + drain_timeout
                server.drain()
                stop.set()
    finally:
        server.close()


async def serve_transport(
    handler: Handler,
    svid: IdentitySource,
    transport: trio.abc.Stream,
    *,
    authorize: Authorizer,
    config: ConnectionConfig | None = None,
    budget: WindowBudget | None = None,
) -> None:
    """Serve one tunnel on a transport that the caller accepted, until it ends; the transport is closed then."""
    await _Server(handler, svid, authorize, config, budget, Admission()).serve_transport(transport)


async def _host(stop: trio.Event, *, task_status: trio.TaskStatus[tuple[trio.CancelScope, trio.Nursery]]) -> None:
    with trio.CancelScope(shield=True) as scope:
        async with trio.open_nursery() as nursery:
            task_status.started((scope, nursery))
            await stop.wait()


class _Server:
    def __init__(
        self,
        handler: Handler,
        svid: IdentitySource,
        authorize: Authorizer,
        config: ConnectionConfig | None,
        budget: WindowBudget | None,
        admission: Admission,
        revocations: RevocationSource | None = None,
        refused: Callable[[HboneError], object] = lambda _: None,
    ) -> None:
        self._handler = handler
        self._svid = svid
        self._authorize = authorize
        self._config = config or ConnectionConfig()
        self._budget = budget
        self._entrance = Entrance(admission, self._config.handshake_timeout, _log)
        self._recall = Recall(TlsContext.server, revocations, self._cut)
        self._refused = refused
        self._connections: set[Connection] = set()
        self._draining = False

    async def serve_transport(self, transport: trio.abc.Stream) -> None:
        """One connection, under the catch that keeps its faults from the others."""
        try:
            await self._serve(transport)
        except HboneError as error:
            _log.warning("tunnel from %s refused: %s", _address(transport) or "a peer", error)
        except Exception:
            _log.exception("tunnel from %s failed", _address(transport) or "a peer")
        finally:
            await trio.aclose_forcefully(transport)

    def _cut(self, error: HboneError) -> None:
        _log.info("tunnel closed by the revocation lists: %s", error)
        self._refused(error)

    def close(self) -> None:
        """Ask the revocation lists no more."""
        self._recall.close()

    def drain(self) -> None:
        """GOAWAY to all."""
        self._draining = True
        self._entrance.close()
        for connection in list(self._connections):
            connection.drain()

    async def _serve(self, transport: trio.abc.Stream) -> None:
        address = _address(transport)
        came_at = trio.current_time()
        turn = await self._entrance.enter(address)
        if turn is None:
            return
        try:
            identity = self._svid.current()
            own = identity.svid.id
            authorize = self._authorize

            def allowed(peer: SpiffeId) -> bool:
                return authorize(peer, own)

            endpoint = Endpoint(
                self._recall.of(identity),
                client=False,
                authorize=allowed,
                config=self._config,
                budget=self._budget,
                now=came_at,
            )
            async with trio.open_nursery() as streams:
                connection = Connection(
                    transport,
                    endpoint,
                    client=False,
                    on_request=lambda stream: streams.start_soon(self._serve_stream, stream),
                    on_unusable=self._connections.discard,
                )
                self._connections.add(connection)
                if self._draining:
                    connection.drain()
                try:
                    await streams.start(connection.run)
                except HboneError as error:
                    _log.info("tunnel from %s refused: %s", address or "a peer", error)
                    self._refused(error)
                else:
                    self._recall.admit(connection)
                turn.leave()
        finally:
            turn.leave()

    async def _serve_stream(self, stream: HboneStream) -> None:
        try:
            await self._handler(stream)
            stream.accept()
            await stream.aclose()
        except trio.BrokenResourceError as error:
            _log.debug("%r broke: %s", stream, error)
        except Exception:
            _log.exception("the handler of %r failed", stream)
            if stream.opened:
                stream.reset(ErrorCode.INTERNAL_ERROR)
            elif not stream.closed:
                stream.reject(503)
        finally:
            if not stream.closed:
                stream.close() if stream.failure is not None else stream.reset(ErrorCode.CANCEL)


def _address(transport: trio.abc.Stream) -> str:
    """The peer's address, for counting; empty where there is none, as in memory."""
    if isinstance(transport, trio.SocketStream):
        try:
            return str(transport.socket.getpeername()[0])
        except (OSError, IndexError, TypeError):
            return ""
    return ""
