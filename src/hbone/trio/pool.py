"""A pool of tunnels under Trio: streams of one source, destination and expected peer share connections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self, Unpack

import trio

from hbone.errors import LocalProtocolError
from hbone.trio.client import dial, open_tcp
from hbone.trio.connection import Connection
from hbone.trio.nursery import open_quiet_nursery
from hbone.trio.stream import HboneStream
from hbone.tunnelpool import TunnelPool

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType

    from hbone.connect import Authority, ConnectRequest
    from hbone.identity import Identity, IdentitySource, SpiffeId
    from hbone.pool import PoolKey
    from hbone.trio.client import OpenTransport
    from hbone.tunnelpool import PoolOptions

__all__ = ["ConnectionPool"]


class ConnectionPool(TunnelPool[Connection, HboneStream]):
    """Opens streams, over as few tunnels as its rules allow; see `hbone.pool`.

    ```python
    async with hbone.trio.ConnectionPool(svid) as pool:
        stream = await pool.connect("10.0.0.7:8080", via=("10.0.0.7", 15008), peer="spiffe://…")
    ```

    Leaving the block ends the streams that are still open, sends what was queued, and closes the tunnels.

    Args:
        svid: who we are. Each new tunnel uses what is current; a rotation breaks no tunnel that lives.
        open_transport: how to connect; TCP by default.
        authorize: asked about the peer where `connect` names none; by default whether the trust domain is ours.
        config: parameters of HTTP/2.
        budget: what receive windows of all tunnels together may grow by.
        dial_timeout: seconds for connecting and the handshake; 10 by default.
        ping_timeout: seconds that a tunnel unused for long has to prove that it lives; 2 by default.
        max_streams: streams on one tunnel; 100 by default.
        idle_timeout: seconds that a tunnel without a stream is kept; 300 by default.
        capacity: tunnels kept, 500 by default; beyond it idle ones are closed.
        revocations: certificates that were taken back; those that are found end tunnels that live, too.
        refused: called with the error when that happens.
    """

    def __init__(
        self, svid: IdentitySource, *, open_transport: OpenTransport = open_tcp, **options: Unpack[PoolOptions]
    ) -> None:
        super().__init__(svid, **options)
        self._open_transport = open_transport
        self._tunnels: set[Connection] = set()
        self._manager: AbstractAsyncContextManager[trio.Nursery] | None = None
        self._nursery: trio.Nursery | None = None
        self._closed = True  # until it is entered

    async def __aenter__(self) -> Self:
        if self._manager is not None:
            raise LocalProtocolError("a ConnectionPool is entered once; make another")
        self._manager = open_quiet_nursery()
        self._nursery = await self._manager.__aenter__()
        self._nursery.start_soon(self._close_idle)
        self._closed = False
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        assert self._manager is not None
        assert self._nursery is not None
        self._close_pool()
        if kind is None:
            tunnels = list(self._tunnels)
            for tunnel in tunnels:
                tunnel.close()  # each runs on until its last bytes have left, for a second at most
            self._nursery.start_soon(self._join, tunnels, self._nursery.cancel_scope)
        return await self._manager.__aexit__(kind, error, trace)

    async def connect(
        self,
        target: str | Authority | ConnectRequest,
        *,
        via: tuple[str, int],
        peer: str | SpiffeId | Iterable[str | SpiffeId] | None,
    ) -> HboneStream:
        """Open a stream to `target` through the tunnel endpoint at `via`. Bring a deadline for the answer.

        Args:
            target: `host:port` that the other end shall connect us to, or a whole request.
            via: host and port of the tunnel endpoint.
            peer: who may answer there; None leaves it to the pool's `authorize`.

        Raises:
            ConnectRejected: the answer was not 200.
            ConnectionLost: nobody answers at `via`, or the tunnel ended before the answer.
            PeerIdentityError: somebody else answers.
            TlsError: the handshake failed.
            StreamResetError: the peer reset the stream instead of answering.
            IdentityError: our own certificate cannot be had.
            LocalProtocolError: the request's headers are larger than the peer takes.
        """
        return await self._open(target, via, peer)

    def _now(self) -> float:
        return trio.current_time()

    def _make_event(self) -> trio.Event:
        return trio.Event()

    async def _make_tunnel(self, key: PoolKey, identity: Identity) -> Connection:
        assert self._nursery is not None
        tunnel = await dial(
            self._nursery,
            key.address,
            lambda: self._make_endpoint(key, identity),
            timeout=self._dial_timeout,
            open_transport=self._open_transport,
            on_unusable=self._on_unusable,
            on_stream_end=self._on_stream_end,
        )
        if tunnel.failure is None:
            self._tunnels.add(tunnel)
        return tunnel

    async def _answers(self, tunnel: Connection) -> bool:
        with trio.move_on_after(self._ping_timeout):
            await tunnel.ping()
            return True
        return False

    async def _wait_answer(self, stream: HboneStream) -> None:
        await stream.wait_answer()

    def _on_unusable(self, tunnel: Connection) -> None:
        super()._on_unusable(tunnel)
        if tunnel.failure is not None:
            self._tunnels.discard(tunnel)

    async def _close_idle(self) -> None:
        while True:
            deadline = self._pool.next_deadline()
            now = trio.current_time()
            # A tunnel that is not idle yet is not due before this; at most once a second is often enough.
            await trio.sleep_until(now + self._idle_timeout if deadline is None else max(deadline, now + 1.0))
            self._reap()

    async def _join(self, tunnels: list[Connection], scope: trio.CancelScope) -> None:
        for tunnel in tunnels:
            await tunnel.aclose()
        scope.cancel()
