"""A pool of tunnels, as the Trio and asyncio adapters share it: `hbone.pool` decides, this does it. No I/O, no clock.

What waits is written here once and awaits only what an adapter brings: an event of its loop, a dial, a PING, an answer.
"""

from __future__ import annotations

import abc
import collections
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypedDict, TypeVar

from hbone.errors import ConnectionLost, ErrorCode, HboneError, PeerIdentityError
from hbone.identity import same_trust_domain
from hbone.pool import Dial, Ping, Pool, PoolKey, PoolStatistics, Use
from hbone.recall import Recall
from hbone.session import Session, as_peers, as_request, dialing_endpoint
from hbone.sessionstream import SessionStream
from hbone.tls import TlsContext

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hbone.config import ConnectionConfig
    from hbone.connect import Authority, ConnectRequest
    from hbone.endpoint import Endpoint
    from hbone.engine.flow import WindowBudget
    from hbone.identity import Authorizer, Identity, IdentitySource, RevocationSource, SpiffeId

__all__ = ["DIAL_TIMEOUT", "PoolOptions", "TunnelPool"]

DIAL_TIMEOUT = 10.0
"""Seconds that connecting and the TLS handshake may take together."""
_ATTEMPTS = 4
"""Tunnels that one stream may try when peers keep saying that they took no note of it."""


class Event(Protocol):
    """What `trio.Event` and `asyncio.Event` have in common."""

    def set(self) -> None:
        """Wake who waits."""

    def is_set(self) -> bool:
        """Whether `set` was called."""

    async def wait(self) -> object:
        """Until `set` was called."""


class PoolOptions(TypedDict, total=False):
    """Keyword arguments of every pool; see `TunnelPool`."""

    authorize: Authorizer
    config: ConnectionConfig | None
    budget: WindowBudget | None
    dial_timeout: float
    ping_timeout: float
    max_streams: int
    idle_timeout: float
    capacity: int
    revocations: RevocationSource | None
    refused: Callable[[HboneError], object]


T = TypeVar("T", bound="Session[Any]")
S = TypeVar("S", bound=SessionStream)


class TunnelPool(abc.ABC, Generic[T, S]):
    """Opens streams, over as few tunnels as the rules of `hbone.pool` allow.

    Args:
        svid: who we are. Each new tunnel uses what is current; a rotation breaks no tunnel that lives.
        authorize: asked about the peer where a stream's opener names none.
        config: parameters of HTTP/2.
        budget: what receive windows of all tunnels together may grow by.
        dial_timeout: seconds for connecting and the handshake.
        ping_timeout: seconds that a tunnel unused for long has to prove that it lives.
        max_streams: streams on one tunnel.
        idle_timeout: seconds that a tunnel without a stream is kept.
        capacity: tunnels kept; beyond it idle ones are closed.
        revocations: certificates that were taken back; those that are found end tunnels that live, too.
        refused: called with the error when that happens.
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
        revocations: RevocationSource | None = None,
        refused: Callable[[HboneError], object] = lambda _: None,
    ) -> None:
        self._svid = svid
        self._authorize = authorize
        self._config = config
        self._budget = budget
        self._dial_timeout = dial_timeout
        self._ping_timeout = ping_timeout
        self._idle_timeout = idle_timeout
        self._recall = Recall(TlsContext.client, revocations, refused)
        self._pool: Pool[T] = Pool(
            lambda tunnel: tunnel.engine,
            heard_at=lambda tunnel: tunnel.endpoint.heard_at,
            max_streams=max_streams,
            idle_timeout=idle_timeout,
            capacity=capacity,
        )
        self._waiting: dict[PoolKey, collections.deque[Event]] = {}
        self._closed = False

    def statistics(self) -> PoolStatistics:
        """Counts of this moment."""
        return self._pool.statistics()

    # What an adapter brings

    @abc.abstractmethod
    def _now(self) -> float:
        """The loop's clock."""

    @abc.abstractmethod
    def _make_event(self) -> Event:
        """An event of the loop."""

    @abc.abstractmethod
    async def _make_tunnel(self, key: PoolKey, identity: Identity) -> T:
        """Connect, and complete the handshake within `_dial_timeout`; what is given up is closed."""

    @abc.abstractmethod
    async def _answers(self, tunnel: T) -> bool:
        """Whether `tunnel` answers a PING within `_ping_timeout`."""

    @abc.abstractmethod
    async def _wait_answer(self, stream: S) -> None:
        """Until CONNECT was answered or has failed."""

    # Streams

    async def _open(
        self,
        target: str | Authority | ConnectRequest,
        via: tuple[str, int],
        peer: str | SpiffeId | Iterable[str | SpiffeId] | None,
    ) -> S:
        """An accepted stream. It is tried again, on another tunnel, only where the peer says it never acted on it."""
        request = as_request(target)
        expected = as_peers(peer)
        for attempt in range(1, _ATTEMPTS + 1):
            tunnel = await self._tunnel(via, expected)
            if tunnel is None:
                continue
            stream: S = tunnel.open(request)
            self._pool.opened(tunnel)
            self._reap()
            try:
                await self._wait_answer(stream)
            except BaseException:
                stream.reset(ErrorCode.CANCEL)
                raise
            if stream.opened:
                return stream
            if stream.failure is not None and (stream.processed or attempt == _ATTEMPTS):
                raise stream.failure
            self._retire(tunnel)
        raise ConnectionLost(f"{via[0]}:{via[1]} took no stream on {_ATTEMPTS} tunnels, one after another")

    async def _tunnel(self, via: tuple[str, int], expected: frozenset[SpiffeId] | None) -> T | None:
        """A tunnel with room: open the stream before anything is awaited. None for a new one that takes no stream."""
        woken: PoolKey | None = None  # who was woken and does not check out passes it on: nobody else would
        try:
            while True:
                self._check_open()
                identity = self._svid.current()
                key = PoolKey(identity.svid.id, via, expected)
                if woken is not None and woken != key:
                    self._wake(woken)
                first, woken = woken == key, None
                match self._pool.checkout(key, self._now()):
                    case Use(tunnel):
                        return tunnel
                    case Ping(tunnel):
                        await self._ask(key, tunnel)
                    case Dial():
                        return await self._dial(key, identity)
                    case _:
                        await self._wait(key, first=first)
                        woken = key
        except BaseException:
            if woken is not None:
                self._wake(woken)
            raise

    async def _dial(self, key: PoolKey, identity: Identity) -> T | None:
        try:
            tunnel = await self._make_tunnel(key, identity)
            usable = self._is_usable(tunnel)
        except BaseException:
            self._pool.dial_failed(key)
            self._wake(key)
            raise
        if usable:
            self._pool.dialed(key, tunnel, self._now())
        else:
            self._pool.dial_failed(key)
        self._wake(key)
        return tunnel if usable else None

    def _is_usable(self, tunnel: T) -> bool:
        """Much may happen between the end of a handshake and here. What takes no stream is closed, not kept."""
        if self._recall.admit(tunnel) and tunnel.engine.available_streams and not self._closed:
            return True
        tunnel.close()
        self._check_open()
        if isinstance(tunnel.failure, PeerIdentityError):
            raise tunnel.failure
        if not isinstance(tunnel.failure, ConnectionLost):  # a refusal, where another tunnel would fare no better
            raise ConnectionLost(str(tunnel.failure)) from tunnel.failure
        return False

    def _make_endpoint(self, key: PoolKey, identity: Identity) -> Endpoint:
        """The client's end of a tunnel that is about to begin."""
        return dialing_endpoint(
            self._recall.of(identity),
            key.source,
            key.expected,
            self._authorize,
            self._config,
            self._budget,
            self._now(),
        )

    async def _ask(self, key: PoolKey, tunnel: T) -> None:
        """Does a tunnel unused for long still live? If not, it is closed and forgotten."""
        lives = False
        try:
            lives = await self._answers(tunnel)
        except HboneError:
            pass
        finally:
            if lives:
                self._pool.alive(tunnel, self._now())
            else:
                self._retire(tunnel)
            self._wake(key)

    def _check_open(self) -> None:
        if self._closed:
            raise ConnectionLost("the ConnectionPool is closed")

    # Waiters

    async def _wait(self, key: PoolKey, *, first: bool) -> None:
        waiting = self._waiting.setdefault(key, collections.deque())
        event = self._make_event()
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

    # Ends

    def _close_pool(self) -> None:
        """No further stream; whoever waits is told."""
        self._closed = True
        self._recall.close()
        self._pool.close()
        for waiting in self._waiting.values():
            while waiting:
                waiting.popleft().set()

    def _retire(self, tunnel: T) -> None:
        """Use it no more; it closes with its last stream."""
        self._pool.retire(tunnel)
        if not tunnel.streams:
            tunnel.close()

    def _on_unusable(self, tunnel: T) -> None:
        """The peer takes no further stream, or the tunnel is over."""
        key = self._pool.key_of(tunnel)
        self._pool.retire(tunnel)
        if tunnel.failure is None and not tunnel.streams:
            tunnel.close()
        if key is not None:
            self._wake(key)

    def _on_stream_end(self, tunnel: T) -> None:
        key = self._pool.key_of(tunnel)
        if key is None:
            if not tunnel.streams:
                tunnel.close()
            return
        self._pool.finished(tunnel, self._now())
        self._reap()
        if self._waiting:
            self._wake(key)

    def _reap(self) -> None:
        """Close what is idle for too long, or too many."""
        for tunnel in self._pool.on_time(self._now()):
            tunnel.close()
