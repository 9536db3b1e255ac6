"""A pool of tunnels: streams of one source, destination and expected peer share connections."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Self

import trio

from hbone.errors import ConnectionLost, ErrorCode, HboneError, LocalProtocolError
from hbone.identity import same_trust_domain
from hbone.pool import Dial, Ping, Pool, PoolKey, PoolStatistics, Use
from hbone.session import Contexts, as_peers, as_request, dialing_endpoint
from hbone.tls import TlsContext
from hbone.trio.client import DIAL_TIMEOUT, dial, open_quiet_nursery, open_tcp

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType

    from hbone.config import ConnectionConfig
    from hbone.connect import Authority, ConnectRequest
    from hbone.endpoint import Endpoint
    from hbone.engine.flow import WindowBudget
    from hbone.identity import Authorizer, Identity, IdentitySource, SpiffeId
    from hbone.trio.client import OpenTransport
    from hbone.trio.connection import Connection
    from hbone.trio.stream import HboneStream

__all__ = ["ConnectionPool"]

_ATTEMPTS = 4  # tunnels that one connect() may try when peers keep saying that they took no note of it


class ConnectionPool:
    """Opens streams, over as few tunnels as its rules allow; see `hbone.pool`.

    ```python
    async with hbone.trio.ConnectionPool(svid) as pool:
        stream = await pool.connect("10.0.0.7:8080", via=("10.0.0.7", 15008), peer="spiffe://…")
    ```

    Leaving the block ends the streams that are still open, sends what was queued, and closes the tunnels.

    Args:
        svid: who we are. Each new tunnel uses what is current; a rotation breaks no tunnel that lives.
        authorize: asked about the peer where `connect` names none.
        config: parameters of HTTP/2.
        budget: what receive windows of all tunnels together may grow by.
        dial_timeout: seconds for connecting and the handshake.
        ping_timeout: seconds that a tunnel unused for long has to prove that it lives.
        max_streams: streams on one tunnel.
        idle_timeout: seconds that a tunnel without a stream is kept.
        capacity: tunnels kept; beyond it idle ones are closed.
        open_transport: how to connect; TCP by default.
    """

    def __init__(
        self,
        svid: IdentitySource,
        *,
        authorize: Authorizer = same_trust_domain,
        config: ConnectionConfig | None = None,
        budget: WindowBudget | None = None,
        dial_timeout: float = DIAL_TIMEOUT,
        ping_timeout: float = 2.0,
        max_streams: int = 100,
        idle_timeout: float = 300.0,
        capacity: int = 500,
        open_transport: OpenTransport = open_tcp,
    ) -> None:
        self._svid = svid
        self._authorize = authorize
        self._config = config
        self._budget = budget
        self._dial_timeout = dial_timeout
        self._ping_timeout = ping_timeout
        self._idle_timeout = idle_timeout
        self._open_transport = open_transport
        self._contexts = Contexts(TlsContext.client)
        self._pool: Pool[Connection] = Pool(
            lambda tunnel: tunnel.engine,
            heard_at=lambda tunnel: tunnel.endpoint.heard_at,
            max_streams=max_streams,
            idle_timeout=idle_timeout,
            capacity=capacity,
        )
        self._tunnels: set[Connection] = set()
        self._waiting: dict[PoolKey, collections.deque[trio.Event]] = {}
        self._manager: AbstractAsyncContextManager[trio.Nursery] | None = None
        self._nursery: trio.Nursery | None = None

    async def __aenter__(self) -> Self:
        if self._manager is not None:
            raise LocalProtocolError("a ConnectionPool is entered once; make another")
        self._manager = open_quiet_nursery()
        self._nursery = await self._manager.__aenter__()
        self._nursery.start_soon(self._close_idle)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        nursery, self._nursery = self._nursery, None
        assert self._manager is not None
        assert nursery is not None
        self._pool.close()
        if kind is None:
            tunnels = list(self._tunnels)
            for tunnel in tunnels:
                tunnel.close()  # each runs on until its last bytes have left, for a second at most
            nursery.start_soon(self._join, tunnels, nursery.cancel_scope)
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
        """
        request = as_request(target)
        expected = as_peers(peer)
        for _ in range(_ATTEMPTS - 1):
            stream = await self._try(request, via, expected)
            if stream is not None:
                return stream
        stream = await self._try(request, via, expected, last=True)
        if stream is None:
            raise ConnectionLost(f"{via[0]}:{via[1]} took no stream on {_ATTEMPTS} tunnels, one after another")
        return stream

    def statistics(self) -> PoolStatistics:
        """Counts of this moment."""
        return self._pool.statistics()

    async def _try(
        self,
        request: ConnectRequest,
        via: tuple[str, int],
        expected: frozenset[SpiffeId] | None,
        *,
        last: bool = False,
    ) -> HboneStream | None:
        """One attempt; None when it may be made again because the peer never acted on it."""
        tunnel = await self._tunnel(via, expected)
        try:
            stream = tunnel.open(request)
        except (LocalProtocolError, ConnectionLost):
            self._pool.retire(tunnel)
            return None
        self._pool.opened(tunnel)
        try:
            await stream.wait_answer()
        except BaseException:
            stream.reset(ErrorCode.CANCEL)
            raise
        if stream.opened:
            return stream
        assert stream.failure is not None
        if stream.processed or last:
            raise stream.failure
        self._retire(tunnel)
        return None

    async def _tunnel(self, via: tuple[str, int], expected: frozenset[SpiffeId] | None) -> Connection:
        again = False
        while True:
            if self._nursery is None:
                raise ConnectionLost("the ConnectionPool is closed")
            identity = self._svid.current()
            key = PoolKey(identity.svid.id, via, expected)
            answer = self._pool.checkout(key, trio.current_time())
            match answer:
                case Use(tunnel):
                    return tunnel
                case Ping(tunnel):
                    await self._ask(key, tunnel)
                case Dial():
                    await self._dial(key, identity)
                case _:
                    await self._wait(key, first=again)
                    again = True

    async def _dial(self, key: PoolKey, identity: Identity) -> None:
        nursery = self._nursery
        if nursery is None:
            raise ConnectionLost("the ConnectionPool is closed")

        def make_endpoint() -> Endpoint:
            return dialing_endpoint(
                self._contexts.of(identity),
                key.source,
                key.expected,
                self._authorize,
                self._config,
                self._budget,
                trio.current_time(),
            )

        try:
            tunnel = await dial(
                nursery,
                key.address,
                make_endpoint,
                timeout=self._dial_timeout,
                open_transport=self._open_transport,
                on_unusable=self._on_unusable,
                on_stream_end=self._on_stream_end,
            )
        except BaseException:
            self._pool.dial_failed(key)
            self._wake(key)
            raise
        self._pool.dialed(key, tunnel, trio.current_time())
        if tunnel.failure is None:
            self._tunnels.add(tunnel)
        else:  # between the end of the handshake and here
            self._pool.retire(tunnel)
        self._reap()
        self._wake(key)

    async def _ask(self, key: PoolKey, tunnel: Connection) -> None:
        """Does a tunnel unused for long still live? If not, it is closed and forgotten."""
        lives = False
        try:
            with trio.move_on_after(self._ping_timeout):
                await tunnel.ping()
                lives = True
        except HboneError:
            pass
        finally:
            if lives:
                self._pool.alive(tunnel, trio.current_time())
            else:
                self._retire(tunnel)
            self._wake(key)

    async def _wait(self, key: PoolKey, *, first: bool) -> None:
        waiting = self._waiting.setdefault(key, collections.deque())
        event = trio.Event()
        if first:  # woken before, and another was faster
            waiting.appendleft(event)
        else:
            waiting.append(event)
        try:
            await event.wait()
        except BaseException:
            if event.is_set():
                self._wake(key)  # whoever woke us meant one of us
            else:
                waiting.remove(event)
            raise
        finally:
            if not waiting and self._waiting.get(key) is waiting:
                del self._waiting[key]

    def _wake(self, key: PoolKey) -> None:
        waiting = self._waiting.get(key)
        if waiting:
            for _ in range(min(len(waiting), self._pool.ready(key))):
                waiting.popleft().set()

    def _retire(self, tunnel: Connection) -> None:
        """Use it no more; it closes with its last stream."""
        self._pool.retire(tunnel)
        if not tunnel.streams:
            tunnel.close()

    def _on_unusable(self, tunnel: Connection) -> None:
        key = self._pool.key_of(tunnel)
        self._pool.retire(tunnel)
        if tunnel.failure is not None:
            self._tunnels.discard(tunnel)
        elif not tunnel.streams:
            tunnel.close()
        if key is not None:
            self._wake(key)

    def _on_stream_end(self, tunnel: Connection) -> None:
        key = self._pool.key_of(tunnel)
        if key is None:
            if not tunnel.streams:
                tunnel.close()
            return
        self._pool.finished(tunnel, trio.current_time())
        self._reap()
        if self._waiting:
            self._wake(key)

    def _reap(self) -> None:
        for tunnel in self._pool.on_time(trio.current_time()):
            tunnel.close()

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
