"""A pool of tunnels under asyncio; the same rules as `hbone.pool`."""

from __future__ import annotations

import asyncio
import collections
import functools
from typing import TYPE_CHECKING, Self

from hbone.asyncio.connection import FLUSH_TIMEOUT, Tunnel
from hbone.errors import ConnectionLost, HboneError, LocalProtocolError
from hbone.identity import same_trust_domain
from hbone.pool import Dial, Ping, Pool, PoolKey, PoolStatistics, Use
from hbone.session import Contexts, as_peers, as_request, dialing_endpoint
from hbone.tls import TlsContext

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hbone.config import ConnectionConfig
    from hbone.connect import Authority, ConnectRequest
    from hbone.engine.flow import WindowBudget
    from hbone.identity import Authorizer, Identity, IdentitySource, SpiffeId

__all__ = ["ConnectionPool"]

_ATTEMPTS = 4  # tunnels that one connect() may try when peers keep saying that they took no note of it


class ConnectionPool:
    """Opens streams, over as few tunnels as its rules allow.

    ```python
    async with hbone.asyncio.ConnectionPool(svid) as pool:
        reader, writer = await pool.connect("10.0.0.7:8080", via=("10.0.0.7", 15008), peer="spiffe://…")
    ```

    Args:
        svid: who we are. Each new tunnel uses what is current.
        authorize: asked about the peer where `connect` names none.
        config: parameters of HTTP/2.
        budget: what receive windows of all tunnels together may grow by.
        dial_timeout: seconds for connecting and the handshake.
        ping_timeout: seconds that a tunnel unused for long has to prove that it lives.
        max_streams: streams on one tunnel.
        idle_timeout: seconds that a tunnel without a stream is kept.
        capacity: tunnels kept; beyond it idle ones are closed.
    """

    def __init__(
        self,
        svid: IdentitySource,
        *,
        authorize: Authorizer = same_trust_domain,
        config: ConnectionConfig | None = None,
        budget: WindowBudget | None = None,
        dial_timeout: float = 10.0,
        ping_timeout: float = 2.0,
        max_streams: int = 100,
        idle_timeout: float = 300.0,
        capacity: int = 500,
    ) -> None:
        self._svid = svid
        self._authorize = authorize
        self._config = config
        self._budget = budget
        self._dial_timeout = dial_timeout
        self._ping_timeout = ping_timeout
        self._idle_timeout = idle_timeout
        self._contexts = Contexts(TlsContext.client)
        self._pool: Pool[Tunnel] = Pool(
            lambda tunnel: tunnel.engine,
            heard_at=lambda tunnel: tunnel.endpoint.heard_at,
            max_streams=max_streams,
            idle_timeout=idle_timeout,
            capacity=capacity,
        )
        self._tunnels: set[Tunnel] = set()
        self._waiting: dict[PoolKey, collections.deque[asyncio.Future[None]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the streams that are still open, send what was queued, and close the tunnels; about a second at most."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._pool.close()
        tunnels = list(self._tunnels)
        for tunnel in tunnels:
            tunnel.close()
        if tunnels:
            await asyncio.wait([tunnel.ended for tunnel in tunnels], timeout=FLUSH_TIMEOUT + 1.0)

    async def connect(
        self,
        target: str | Authority | ConnectRequest,
        *,
        via: tuple[str, int],
        peer: str | SpiffeId | Iterable[str | SpiffeId] | None,
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a stream to `target` through the tunnel endpoint at `via`. Bring a deadline for the answer.

        Args:
            target: `host:port` that the other end shall connect us to, or a whole request.
            via: host and port of the tunnel endpoint.
            peer: who may answer there; None leaves it to the pool's `authorize`.

        Returns:
            As asyncio.open_connection; `writer.get_extra_info("peer")` is the peer's SpiffeId.

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
        for attempt in range(1, _ATTEMPTS + 1):
            tunnel = await self._tunnel(via, expected)
            try:
                stream = tunnel.open(request)
            except (LocalProtocolError, ConnectionLost):
                self._pool.retire(tunnel)
                continue
            self._pool.opened(tunnel)
            await tunnel.wait_answer(stream)
            if stream.opened:
                return tunnel.make_pair(stream)
            if stream.failure is not None and (stream.processed or attempt == _ATTEMPTS):
                raise stream.failure
            self._retire(tunnel)
        raise ConnectionLost(f"{via[0]}:{via[1]} took no stream on {_ATTEMPTS} tunnels, one after another")

    def statistics(self) -> PoolStatistics:
        """Counts of this moment."""
        return self._pool.statistics()

    async def _tunnel(self, via: tuple[str, int], expected: frozenset[SpiffeId] | None) -> Tunnel:
        loop = asyncio.get_running_loop()
        again = False
        while True:
            if self._closed:
                raise ConnectionLost("the ConnectionPool is closed")
            identity = self._svid.current()
            key = PoolKey(identity.svid.id, via, expected)
            answer = self._pool.checkout(key, loop.time())
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
        try:
            tunnel = await self._connect_tunnel(key, identity)
        except BaseException:
            self._pool.dial_failed(key)
            self._wake(key)
            raise
        self._pool.dialed(key, tunnel, tunnel.loop.time())
        if tunnel.failure is not None:
            self._pool.retire(tunnel)
        self._reap()
        self._wake(key)

    async def _connect_tunnel(self, key: PoolKey, identity: Identity) -> Tunnel:
        loop = asyncio.get_running_loop()
        host, port = key.address
        context = self._contexts.of(identity)
        tunnel: Tunnel | None = None

        def make_tunnel() -> Tunnel:
            endpoint = dialing_endpoint(
                context, key.source, key.expected, self._authorize, self._config, self._budget, loop.time()
            )
            return Tunnel(endpoint, client=True, on_unusable=self._on_unusable, on_stream_end=self._on_stream_end)

        try:
            async with asyncio.timeout(self._dial_timeout):
                _, tunnel = await loop.create_connection(make_tunnel, host, port)
                self._tunnels.add(tunnel)
                tunnel.ended.add_done_callback(functools.partial(self._forget, tunnel))
                await tunnel.established
        except TimeoutError:
            if tunnel is not None:
                tunnel.close()
            raise ConnectionLost(
                f"{host}:{port} did not complete a connection and TLS handshake within {self._dial_timeout:g} s"
            ) from None
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise ConnectionLost(f"cannot connect to {host}:{port}: {reason}") from error
        except BaseException:
            if tunnel is not None:
                tunnel.close()
            raise
        if not tunnel.endpoint.established:
            raise tunnel.failure or ConnectionLost(f"the handshake with {host}:{port} ended early")
        return tunnel

    async def _ask(self, key: PoolKey, tunnel: Tunnel) -> None:
        """Does a tunnel unused for long still live? If not, it is closed and forgotten."""
        lives = False
        try:
            async with asyncio.timeout(self._ping_timeout):
                await tunnel.ping()
                lives = True
        except (HboneError, TimeoutError):
            pass
        finally:
            if lives:
                self._pool.alive(tunnel, tunnel.loop.time())
            else:
                self._retire(tunnel)
            self._wake(key)

    async def _wait(self, key: PoolKey, *, first: bool) -> None:
        waiting = self._waiting.setdefault(key, collections.deque())
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if first:  # woken before, and another was faster
            waiting.appendleft(woken)
        else:
            waiting.append(woken)
        try:
            await asyncio.shield(woken)
        except BaseException:
            if woken.done():
                self._wake(key)  # whoever woke us meant one of us
            else:
                waiting.remove(woken)
            raise
        finally:
            if not waiting and self._waiting.get(key) is waiting:
                del self._waiting[key]

    def _wake(self, key: PoolKey) -> None:
        waiting = self._waiting.get(key)
        if waiting:
            for _ in range(min(len(waiting), self._pool.ready(key))):
                waiting.popleft().set_result(None)

    def _forget(self, tunnel: Tunnel, _: object) -> None:
        self._tunnels.discard(tunnel)

    def _retire(self, tunnel: Tunnel) -> None:
        """Use it no more; it closes with its last stream."""
        self._pool.retire(tunnel)
        if not tunnel.streams:
            tunnel.close()

    def _on_unusable(self, tunnel: Tunnel) -> None:
        key = self._pool.key_of(tunnel)
        self._pool.retire(tunnel)
        if tunnel.failure is None and not tunnel.streams:
            tunnel.close()
        if key is not None:
            self._wake(key)

    def _on_stream_end(self, tunnel: Tunnel) -> None:
        key = self._pool.key_of(tunnel)
        if key is None:
            if not tunnel.streams:
                tunnel.close()
            return
        self._pool.finished(tunnel, tunnel.loop.time())
        self._reap()
        if self._waiting:
            self._wake(key)

    def _reap(self) -> None:
        """Close what is idle for too long, and come again when the next one is due."""
        loop = asyncio.get_running_loop()
        for tunnel in self._pool.on_time(loop.time()):
            tunnel.close()
        if self._timer is None and not self._closed:
            deadline = self._pool.next_deadline()
            if deadline is not None:
                self._timer = loop.call_at(max(deadline, loop.time() + 1.0), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._reap()
