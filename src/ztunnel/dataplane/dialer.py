"""The adapter of `hbone.pool`: hands out tunnels, dials when one is missing, and keeps those who wait.

In the common case `checkout` calls `tunnel_ready` before it returns: no task, no wake-up. A dial serves all who wait
for its key, and its failure is the failure of all of them: a peer that is down is dialled once, not once a client.
"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Final, Protocol

from hbone.endpoint import Endpoint
from hbone.errors import HboneError
from hbone.pool import Dial, Ping, Pool, Use
from hbone.tls import TlsContext
from ztunnel.dataplane.tunnel import Tunnel
from ztunnel.errors import (
    ConnectFailed,
    ConnectTimedOut,
    DataplaneError,
    IdentityUnavailable,
    PeerRevoked,
    TlsFailed,
    TlsSetupFailed,
    unexpected_peer,
)
from ztunnel.mesh.address import parse_ip

if TYPE_CHECKING:
    from hbone.config import ConnectionConfig
    from hbone.engine.flow import WindowBudget
    from hbone.events import Headers
    from hbone.identity import Identity, SpiffeId
    from hbone.pool import PoolKey
    from ztunnel.dataplane.reactor import Reactor
    from ztunnel.dataplane.recall import Recall
    from ztunnel.dataplane.sockets import SocketCalls
    from ztunnel.dataplane.stream import StreamEnd

__all__ = ["Dialer", "IdentitySource", "TunnelUser"]

_PING_SECONDS: Final = 3.0  # a tunnel that was silent for long has so long to answer before another is dialled


class IdentitySource(Protocol):
    """Who gives us our certificate."""

    def current(self) -> Identity | None:
        """The identity in use; None while the CA has not given one."""

    async def fetch(self) -> Identity:
        """Wait for it, within a bound."""


class TunnelUser(Protocol):
    """Who wants a stream."""

    key: PoolKey
    """Which tunnel."""
    waiting: bool
    """It waits for one. Whoever gives up sets it to False."""

    def tunnel_ready(self, tunnel: Tunnel) -> None:
        """Open the stream now."""

    def tunnel_failed(self, error: DataplaneError) -> None:
        """There is none to be had."""


class Dialer:
    """Tunnels to other proxies.

    Args:
        reactor: runs them.
        calls: the socket calls.
        identities: our certificate.
        config: parameters of HTTP/2.
        budget: what receive windows may grow by, of the process.
        recall: which certificates were taken back.
        max_streams: streams on one tunnel.
        idle_timeout: seconds that a tunnel may stay without a stream.
    """

    def __init__(
        self,
        reactor: Reactor,
        calls: SocketCalls,
        identities: IdentitySource,
        *,
        config: ConnectionConfig,
        budget: WindowBudget,
        recall: Recall,
        max_streams: int = 100,
        idle_timeout: float = 300.0,
    ) -> None:
        self.pool: Pool[Tunnel] = Pool(
            lambda tunnel: tunnel.engine,
            heard_at=lambda tunnel: tunnel.endpoint.heard_at,
            max_streams=max_streams,
            idle_timeout=idle_timeout,
        )
        self.tunnels: set[Tunnel] = set()
        """All of them: dialling, pooled, and draining."""
        self._reactor = reactor
        self._calls = calls
        self._identities = identities
        self._config = config
        self._budget = budget
        self._recall = recall
        recall.members.append(("source", lambda: self.tunnels))
        self._dialing: dict[Tunnel, PoolKey] = {}
        self._waiting: dict[PoolKey, collections.deque[TunnelUser]] = {}
        self._closed = False

    def checkout(self, user: TunnelUser) -> None:
        """Give `user` a tunnel: now, or when there is one."""
        answer = self.pool.checkout(user.key, self._reactor.now)
        if isinstance(answer, Use):
            user.tunnel_ready(answer.tunnel)
            return
        queue = self._waiting.get(user.key)
        if queue is None:
            queue = self._waiting[user.key] = collections.deque()
        user.waiting = True
        queue.append(user)
        if isinstance(answer, Dial):
            self._dial(user.key)
        elif isinstance(answer, Ping):
            answer.tunnel.ping()

    def opened(self, tunnel: Tunnel) -> None:
        """A stream was opened on `tunnel`."""
        self.pool.opened(tunnel)

    def on_time(self, now: float) -> None:
        """Tunnels that were idle for too long, or do not answer a PING."""
        if (due := self.pool.next_deadline()) is not None and due <= now:
            for tunnel in self.pool.on_time(now):
                tunnel.close()
        for tunnel in list(self.tunnels):
            if tunnel.pinged_at is not None and now - tunnel.pinged_at >= _PING_SECONDS:
                tunnel.pinged_at = None
                self._retire(tunnel)
                if not tunnel.streams:
                    tunnel.close()

    def close(self) -> None:
        """Close every tunnel; streams that are open are lost."""
        self._closed = True
        self.pool.close()
        for tunnel in list(self.tunnels):
            tunnel.close()
        self._reactor.unsweep(self)

    # Dialling

    def _dial(self, key: PoolKey) -> None:
        identity = self._identities.current()
        if identity is not None:
            self._dial_as(key, identity)
            return
        try:
            self._reactor.start_task(self._fetch_and_dial, key)
        except RuntimeError as exc:
            self._failed(key, IdentityUnavailable(str(exc)))

    async def _fetch_and_dial(self, key: PoolKey) -> None:
        error: DataplaneError = IdentityUnavailable("cancelled")
        identity: Identity | None = None
        try:
            identity = await self._identities.fetch()
        except Exception as exc:
            error = IdentityUnavailable.because(exc)
        finally:
            if identity is None:
                self._failed(key, error)
        if identity is not None:
            self._dial_as(key, identity)

    def _dial_as(self, key: PoolKey, identity: Identity) -> None:
        if self._closed:
            self._failed(key, ConnectFailed("the proxy is stopping"))
            return
        if identity.svid.id != key.source:
            self._failed(
                key, IdentityUnavailable(f"the certificate at hand is for {identity.svid.id}, not {key.source}")
            )
            return
        expected = key.expected or frozenset()

        def authorize(peer: SpiffeId) -> bool:
            return peer in expected

        address = parse_ip(key.address[0]), key.address[1]
        now = self._reactor.clock()
        try:
            context = TlsContext.client(identity, crls=self._recall.lists)
            endpoint = Endpoint(
                context, client=True, authorize=authorize, config=self._config, budget=self._budget, now=now
            )
        except HboneError as exc:
            self._failed(key, TlsSetupFailed(str(exc)))
            return
        try:
            sock = self._calls.dial(address)
        except OSError as exc:
            why = exc.strerror or str(exc)
            self._failed(key, ConnectTimedOut(why) if isinstance(exc, TimeoutError) else ConnectFailed(why))
            return
        tunnel = Tunnel(self._reactor, self._calls, sock, endpoint, self, address, connected=False)
        self.tunnels.add(tunnel)
        self._dialing[tunnel] = key
        self._reactor.sweep(self)

    def _failed(self, key: PoolKey, error: DataplaneError) -> None:
        self.pool.dial_failed(key)
        queue = self._waiting.pop(key, None)
        while queue:
            user = queue.popleft()
            if user.waiting:
                user.waiting = False
                user.tunnel_failed(error)

    def _wake(self, key: PoolKey) -> None:
        """Serve as many of those who wait as there is room for."""
        queue = self._waiting.get(key)
        if queue is None:
            return
        ready = self.pool.ready(key)
        while queue and ready > 0:
            user = queue.popleft()
            if user.waiting:
                user.waiting = False
                ready -= 1
                self.checkout(user)
        if not queue:
            del self._waiting[key]

    def _retire(self, tunnel: Tunnel) -> None:
        key = self.pool.key_of(tunnel)
        self.pool.retire(tunnel)
        if key is not None and key in self._waiting:
            self._wake(key)

    # What tunnels tell

    def tunnel_established(self, tunnel: Tunnel) -> None:
        """Dialled: those who wait get it."""
        if not self._recall.allows(tunnel, "source"):
            return
        key = self._dialing.pop(tunnel)
        self.pool.dialed(key, tunnel, self._reactor.now)
        self._wake(key)

    def tunnel_lost(self, tunnel: Tunnel, error: DataplaneError | None) -> None:
        """A dial that failed, or a tunnel that ended."""
        self.tunnels.discard(tunnel)
        key = self._dialing.pop(tunnel, None)
        if key is None:
            self._retire(tunnel)
        else:
            if isinstance(error, PeerRevoked):
                self._recall.refused("source")
            peer = tunnel.endpoint.tls.refused_id
            if isinstance(error, TlsFailed) and peer is not None and peer not in (key.expected or frozenset()):
                error = unexpected_peer(peer, (key.expected or frozenset()))
            self._failed(key, error or ConnectFailed("the tunnel was closed"))
        if not self.tunnels:
            self._reactor.unsweep(self)

    def tunnel_draining(self, tunnel: Tunnel) -> None:
        """GOAWAY: no further stream; it closes with its last one."""
        self._retire(tunnel)
        if not tunnel.streams:
            tunnel.close()

    def tunnel_alive(self, tunnel: Tunnel) -> None:
        """It answered, so it can be used."""
        self.pool.alive(tunnel, self._reactor.now)
        key = self.pool.key_of(tunnel)
        if key is not None:
            self._wake(key)

    def stream_finished(self, tunnel: Tunnel) -> None:
        """Room for one more."""
        self.pool.finished(tunnel, self._reactor.now)
        key = self.pool.key_of(tunnel)
        if key is None:
            if not tunnel.streams:
                self._reactor.later(tunnel.close_when_sent)  # it was retired, and this was its last
        elif key in self._waiting:
            self._wake(key)

    def connect_received(self, end: StreamEnd, headers: Headers) -> None:
        """No server opens streams towards us: the engine refuses them before this."""
        end.reject(405)
