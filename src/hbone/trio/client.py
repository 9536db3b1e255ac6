"""Dialling a tunnel."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

import trio

from hbone.errors import ConnectionLost
from hbone.identity import same_trust_domain
from hbone.session import as_peers, dialing_endpoint
from hbone.tls import TlsContext
from hbone.trio.connection import Connection
from hbone.trio.nursery import open_quiet_nursery
from hbone.tunnelpool import DIAL_TIMEOUT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

    from hbone.config import ConnectionConfig
    from hbone.endpoint import Endpoint
    from hbone.engine.flow import WindowBudget
    from hbone.identity import Authorizer, IdentitySource, SpiffeId

__all__ = ["OpenTransport", "dial", "open_tcp", "open_tunnel"]

if TYPE_CHECKING:
    OpenTransport = Callable[[str, int], Awaitable[trio.abc.Stream]]
    """Connects to a host and a port."""


async def open_tcp(host: str, port: int) -> trio.abc.Stream:
    """Connect by TCP.

    Raises:
        ConnectionLost: the address does not answer, or has no such name.
    """
    try:
        return await trio.open_tcp_stream(host, port)
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that no resolver can be asked for
        raise ConnectionLost(f"cannot connect to {host}:{port}: {_reason(error)}") from error


async def dial(
    nursery: trio.Nursery,
    address: tuple[str, int],
    make_endpoint: Callable[[], Endpoint],
    *,
    timeout: float = DIAL_TIMEOUT,
    open_transport: OpenTransport = open_tcp,
    on_unusable: Callable[[Connection], None] | None = None,
    on_stream_end: Callable[[Connection], None] | None = None,
) -> Connection:
    """Connect and complete the handshake; the tunnel then runs in `nursery`.

    Args:
        nursery: where the tunnel's tasks live.
        address: host and port.
        make_endpoint: called when the transport is there.
        timeout: seconds for all of it.
        open_transport: how to connect.
        on_unusable: as Connection's.
        on_stream_end: as Connection's.

    Raises:
        ConnectionLost: nobody answers there, or not in time.
        PeerIdentityError: somebody else answers.
        TlsError: the handshake failed.
    """
    host, port = address
    with trio.move_on_after(timeout):
        transport = await open_transport(host, port)
        try:
            connection = Connection(
                transport, make_endpoint(), client=True, on_unusable=on_unusable, on_stream_end=on_stream_end
            )
        except BaseException:
            await trio.aclose_forcefully(transport)
            raise
        try:
            await nursery.start(connection.run)
        except BaseException:
            connection.close()  # it may be running already when the one who dialled is cancelled
            raise
        return connection
    raise ConnectionLost(f"{host}:{port} did not complete a connection and TLS handshake within {timeout:g} s")


@contextlib.asynccontextmanager
async def open_tunnel(
    via: tuple[str, int],
    svid: IdentitySource,
    *,
    peer: str | SpiffeId | Iterable[str | SpiffeId] | None,
    authorize: Authorizer = same_trust_domain,
    config: ConnectionConfig | None = None,
    budget: WindowBudget | None = None,
    dial_timeout: float = DIAL_TIMEOUT,
    open_transport: OpenTransport = open_tcp,
) -> AsyncIterator[Connection]:
    """One tunnel without a pool, for the length of a block.

    ```python
    async with hbone.trio.open_tunnel(("10.0.0.7", 15008), svid, peer="spiffe://…") as tunnel:
        stream = await tunnel.connect("10.0.0.7:8080")
    ```

    Args:
        via: host and port of the tunnel's other end.
        svid: who we are.
        peer: who may answer; None leaves it to `authorize`.
        authorize: asked when `peer` is None.
        config: parameters of HTTP/2.
        budget: what receive windows may grow by.
        dial_timeout: seconds for connecting and the handshake.
        open_transport: how to connect.

    Raises:
        ConnectionLost: nobody answers there, or not in time.
        PeerIdentityError: somebody else answers.
        TlsError: the handshake failed.
    """
    expected = as_peers(peer)
    identity = svid.current()
    context = TlsContext.client(identity)

    def make_endpoint() -> Endpoint:
        return dialing_endpoint(context, identity.svid.id, expected, authorize, config, budget, trio.current_time())

    async with open_quiet_nursery() as nursery:
        connection = await dial(nursery, via, make_endpoint, timeout=dial_timeout, open_transport=open_transport)
        try:
            yield connection
        finally:
            connection.close()


def _reason(error: BaseException) -> str:
    """One sentence of an OSError, which may hold a group of one attempt each."""
    cause = error.__cause__
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    if isinstance(cause, OSError):
        error = cause
    if isinstance(error, socket.gaierror) or not isinstance(error, OSError) or error.errno is None:
        return str(getattr(error, "strerror", None) or error).lower()
    return os.strerror(error.errno).lower()
