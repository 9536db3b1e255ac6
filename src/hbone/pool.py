"""Which tunnel carries the next stream: use this one, ask whether it lives, wait, or dial. No I/O, no clock.

The rules are ztunnel's, with one difference: a tunnel that once held its most streams is used again when some of
them end, where ztunnel retires it for good and dials another.

An adapter calls `checkout` and does what the answer says:

```text
Use(tunnel)   open a stream on it, now and without waiting; then tell `opened`, and `finished` when it ends
Ping(tunnel)  nothing was heard on it for long: ping it, then tell `alive` or `retire`, and check out again
Wait()        another caller dials or pings for this key; check out again when `ready(key)` says so
Dial()        dial, then tell `dialed` or `dial_failed` (also when cancelled), and check out again
```

Waiters are the adapter's; after each call that changes something it wakes the first `ready(key)` of them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

import attrs

from hbone.identity import SpiffeId  # noqa: TC001  # compiled, an attrs class looks its types up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Dial", "Ping", "Pool", "PoolKey", "PoolStatistics", "Use", "Wait"]

T = TypeVar("T")


@attrs.frozen(cache_hash=True)
class PoolKey:
    """Streams of one key may share a tunnel. Source: ztunnel's pool key, less the client's address."""

    source: SpiffeId
    """Who we are on the tunnel."""
    address: tuple[str, int]
    """Where the tunnel is dialled."""
    expected: frozenset[SpiffeId] | None
    """Who may answer; None when the adapter's authorizer alone decides."""


class EngineState(Protocol):
    """What the pool reads of an engine."""

    @property
    def draining(self) -> bool:
        """No further stream may be opened."""

    @property
    def available_streams(self) -> int:
        """Streams that the peer lets us open now."""


@attrs.frozen
class Use(Generic[T]):
    """Open a stream on `tunnel`."""

    tunnel: T


@attrs.frozen
class Ping(Generic[T]):
    """Ask whether `tunnel` still lives before using it."""

    tunnel: T


@attrs.frozen
class Wait:
    """Another caller is at it for this key."""


@attrs.frozen
class Dial:
    """Make a tunnel; nobody else will for this key until `dialed` or `dial_failed`."""


@attrs.frozen
class PoolStatistics:
    """A pool at one moment."""

    tunnels: int
    idle: int
    """Tunnels without a stream."""
    streams: int
    dialing: int
    """Keys that somebody dials for."""


_WAIT: Final = Wait()
_DIAL: Final = Dial()


class _Entry(Generic[T]):
    __slots__ = ("checking", "key", "streams", "tunnel", "use", "used_at")

    def __init__(self, tunnel: T, key: PoolKey, used_at: float) -> None:
        self.tunnel = tunnel
        self.key = key
        self.used_at = used_at
        """When its last stream ended, or it was dialled or answered a PING."""
        self.streams = 0
        self.checking = False
        self.use = Use(tunnel)


class _Site(Generic[T]):
    """The tunnels of one key."""

    __slots__ = ("dialing", "roomy", "tunnels")

    def __init__(self) -> None:
        self.tunnels: dict[T, _Entry[T]] = {}
        self.roomy: dict[_Entry[T], None] = {}
        """Those that may take a stream, the most recently made or freed last."""
        self.dialing = False


class Pool(Generic[T]):
    """Decides which tunnel carries a stream.

    Args:
        engine_of: the engine of a tunnel.
        heard_at: when the tunnel's peer was last heard, on the clock of `now`; without it only the pool's own
            calls count.
        max_streams: streams on one tunnel; the peer's own limit counts as well.
        idle_timeout: seconds that a tunnel may stay without a stream.
        capacity: tunnels kept; beyond it those without a stream go, the longest unused first.
        ping_after: seconds of silence after which a tunnel is asked before it is used; 0 never asks.
    """

    def __init__(
        self,
        engine_of: Callable[[T], EngineState],
        *,
        heard_at: Callable[[T], float] | None = None,
        max_streams: int = 100,
        idle_timeout: float = 300.0,
        capacity: int = 500,
        ping_after: float = 10.0,
    ) -> None:
        self._engine_of = engine_of
        self._heard_at = heard_at
        self._max_streams = max_streams
        self._idle_timeout = idle_timeout
        self._capacity = capacity
        self._ping_after = ping_after
        self._sites: dict[PoolKey, _Site[T]] = {}
        self._entries: dict[T, _Entry[T]] = {}
        self._idle: dict[T, _Entry[T]] = {}  # least recently used first

    def checkout(self, key: PoolKey, now: float) -> Use[T] | Ping[T] | Wait | Dial:
        """What to do for one more stream of `key`. `Use` reserves nothing: open the stream before anything else."""
        site = self._sites.get(key)
        if site is None:
            site = self._sites[key] = _Site()
        checking = False
        for entry in self._candidates(site):
            if entry.checking:
                checking = True
            elif self._silent(entry, now):
                entry.checking = True
                return Ping(entry.tunnel)
            else:
                return entry.use
        if checking or site.dialing:
            return _WAIT
        site.dialing = True
        self._sites[key] = site  # it went when its last tunnel did
        return _DIAL

    def ready(self, key: PoolKey) -> int:
        """How many callers would get another answer than `Wait` now; so many waiters are worth waking."""
        site = self._sites.get(key)
        if site is None:
            return 1
        room = 0
        checking = site.dialing
        for entry in self._candidates(site):
            if entry.checking:
                checking = True
                continue
            room += min(self._max_streams - entry.streams, self._engine_of(entry.tunnel).available_streams)
        return room + (not checking)

    def dialed(self, key: PoolKey, tunnel: T, now: float) -> None:
        """`Dial` was done."""
        site = self._sites.setdefault(key, _Site())
        site.dialing = False
        entry = _Entry(tunnel, key, now)
        self._entries[tunnel] = site.tunnels[tunnel] = self._idle[tunnel] = entry
        site.roomy[entry] = None

    def dial_failed(self, key: PoolKey) -> None:
        """`Dial` was not done. The error is its caller's; the next waiter tries again."""
        site = self._sites.get(key)
        if site is not None:
            site.dialing = False
            self._tidy(key, site)

    def alive(self, tunnel: T, now: float) -> None:
        """`Ping` was answered."""
        entry = self._entries.get(tunnel)
        if entry is not None:
            entry.checking = False
            entry.used_at = now

    def opened(self, tunnel: T) -> None:
        """A stream was opened on `tunnel`."""
        entry = self._entries.get(tunnel)
        if entry is None:
            return
        entry.streams += 1
        self._idle.pop(tunnel, None)
        if entry.streams >= self._max_streams:
            self._sites[entry.key].roomy.pop(entry, None)

    def finished(self, tunnel: T, now: float) -> None:
        """A stream on `tunnel` ended, in whichever way. A tunnel that was retired is ignored."""
        entry = self._entries.get(tunnel)
        if entry is None:
            return
        entry.streams -= 1
        entry.used_at = now
        if entry.streams == 0:
            self._idle[tunnel] = entry
        self._sites[entry.key].roomy[entry] = None

    def retire(self, tunnel: T) -> None:
        """No further stream on `tunnel`: GOAWAY, lost, or no answer to PING. Its streams are the adapter's matter."""
        entry = self._entries.pop(tunnel, None)
        if entry is None:
            return
        self._idle.pop(tunnel, None)
        site = self._sites[entry.key]
        del site.tunnels[tunnel]
        site.roomy.pop(entry, None)
        self._tidy(entry.key, site)

    def key_of(self, tunnel: T) -> PoolKey | None:
        """The key that `tunnel` was dialled for; None when it is no longer here."""
        entry = self._entries.get(tunnel)
        return None if entry is None else entry.key

    def next_deadline(self) -> float | None:
        """When `on_time` is due; minus infinity when a tunnel beyond the capacity can go at once."""
        for entry in self._idle.values():
            return -math.inf if len(self._entries) > self._capacity else entry.used_at + self._idle_timeout
        return None

    def on_time(self, now: float) -> list[T]:
        """Retire what is idle for too long or beyond the capacity; the caller closes what is returned."""
        closing: list[T] = []
        surplus = len(self._entries) - self._capacity
        for tunnel, entry in self._idle.items():
            if entry.checking:
                continue
            if surplus <= len(closing) and entry.used_at + self._idle_timeout > now:
                break
            closing.append(tunnel)
        for tunnel in closing:
            self.retire(tunnel)
        return closing

    def close(self) -> list[T]:
        """Retire every tunnel; the caller closes what is returned."""
        closing = list(self._entries)
        for tunnel in closing:
            self.retire(tunnel)
        return closing

    def statistics(self) -> PoolStatistics:
        """Counts of this moment."""
        return PoolStatistics(
            tunnels=len(self._entries),
            idle=len(self._idle),
            streams=sum(entry.streams for entry in self._entries.values()),
            dialing=sum(site.dialing for site in self._sites.values()),
        )

    def _candidates(self, site: _Site[T]) -> Iterator[_Entry[T]]:
        """Tunnels with room, the newest first; those that became unusable are dropped on the way."""
        for entry in tuple(reversed(site.roomy)):
            engine = self._engine_of(entry.tunnel)
            if engine.draining:
                self.retire(entry.tunnel)
            elif engine.available_streams > 0:
                yield entry

    def _silent(self, entry: _Entry[T], now: float) -> bool:
        if not self._ping_after:
            return False
        heard = entry.used_at
        if self._heard_at is not None:
            heard = max(heard, self._heard_at(entry.tunnel))
        return now - heard >= self._ping_after

    def _tidy(self, key: PoolKey, site: _Site[T]) -> None:
        if not site.tunnels and not site.dialing:
            self._sites.pop(key, None)
