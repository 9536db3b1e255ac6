"""The data path without a kernel: scripted sockets under the real reactor, and a far end that remembers."""

from __future__ import annotations

import collections
import itertools
import socket
from typing import TYPE_CHECKING, Any

from ztunnel.dataplane.reactor import Reactor
from ztunnel.dataplane.relay import CHUNK, HEADROOM, READ_BUFFER, Relay
from ztunnel.dataplane.sockets import SocketCalls

if TYPE_CHECKING:
    from hbone.errors import ErrorCode
    from ztunnel.errors import DataplaneError

__all__ = ["FakeFar", "RelayOwner", "ScriptedPoller", "ScriptedSocket", "scripted_reactor"]

_numbers = itertools.count(10_000)


class ScriptedPoller:
    """Knows what is watched, and never says anything by itself."""

    def __init__(self) -> None:
        self.masks: dict[int, int] = {}
        self.calls = 0

    def register(self, fd: int, eventmask: int = 0, /) -> None:
        assert fd not in self.masks
        self.calls += 1
        self.masks[fd] = eventmask

    def modify(self, fd: int, eventmask: int, /) -> None:
        self.calls += 1
        self.masks[fd] = eventmask

    def unregister(self, fd: int, /) -> None:
        self.calls += 1
        del self.masks[fd]

    def poll(self, timeout: float | None = None, maxevents: int = -1) -> list[tuple[int, int]]:
        return []

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        """Nothing to close."""


def scripted_reactor() -> Reactor:
    """A reactor whose turns the test makes: `reactor.turn([(fd, mask)])`."""
    return Reactor(poller=ScriptedPoller(), clock=lambda: 0.0)


class ScriptedSocket:
    """A socket that does what the script says.

    `to_read`: bytes, b"" for FIN, or an exception, in order; afterwards reads would block.
    `takes`: how many bytes each send takes, or an exception; afterwards sends take everything.
    """

    def __init__(self, *to_read: bytes | OSError) -> None:
        self.number = next(_numbers)
        self.to_read: collections.deque[bytes | OSError] = collections.deque(to_read)
        self.takes: collections.deque[int | OSError] = collections.deque()
        self.written = bytearray()
        self.fin = False
        self.linger_reset = False
        self.closed = False
        self.calls: collections.Counter[str] = collections.Counter()

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0, /) -> int:
        self.calls["recv"] += 1
        assert flags & socket.MSG_DONTWAIT
        if not self.to_read:
            raise BlockingIOError
        item = self.to_read.popleft()
        if isinstance(item, OSError):
            raise item
        limit = nbytes or len(buffer)
        if len(item) > limit:
            self.to_read.appendleft(item[limit:])
            item = item[:limit]
        buffer[: len(item)] = item
        return len(item)

    def send(self, data: Any, flags: int = 0, /) -> int:
        self.calls["send"] += 1
        assert flags & socket.MSG_DONTWAIT
        assert not self.fin
        taken = self.takes.popleft() if self.takes else len(data)
        if isinstance(taken, OSError):
            raise taken
        if not taken:
            raise BlockingIOError
        taken = min(taken, len(data))
        self.written += data[:taken]
        return taken

    def shutdown(self, how: int, /) -> None:
        self.calls["shutdown"] += 1
        assert how == socket.SHUT_WR
        self.fin = True

    def setsockopt(self, level: int, optname: int, value: bytes, /) -> None:
        self.calls["setsockopt"] += 1
        if optname == socket.SO_LINGER:
            self.linger_reset = True

    def close(self) -> None:
        self.calls["close"] += 1
        self.closed = True

    def fileno(self) -> int:
        return self.number

    @property
    def end(self) -> str:
        """How the app sees it: open, fin, closed or reset."""
        if self.closed:
            return "reset" if self.linger_reset else "closed"
        return "fin" if self.fin else "open"


class FakeFar:
    """The far end of a relay: a stream whose window the test sets."""

    def __init__(self, window: int = 1 << 30) -> None:
        self.window = window
        self.taken = bytearray()
        self.ended = False
        self.code: ErrorCode | None = None
        self.credits: list[int] = []

    def room(self) -> int:
        return min(self.window, CHUNK)

    def take(self, nbytes: int) -> None:
        assert nbytes <= self.window
        self.window -= nbytes
        self.taken += READ_BUFFER.array[HEADROOM : HEADROOM + nbytes]

    def end(self) -> None:
        assert not self.ended
        self.ended = True

    def reset(self, code: ErrorCode) -> None:
        self.code = code

    def credit(self, nbytes: int) -> None:
        self.credits.append(nbytes)


class RelayOwner:
    """Hears once how a relay ended."""

    def __init__(self) -> None:
        self.ended = 0
        self.error: DataplaneError | None = None

    def relay_ended(self, relay: Relay, error: DataplaneError | None) -> None:
        self.ended += 1
        self.error = error


def relay_of(sock: ScriptedSocket, far: FakeFar | None = None) -> tuple[Reactor, Relay, FakeFar, RelayOwner]:
    """A started relay on a scripted socket."""
    reactor = scripted_reactor()
    owner = RelayOwner()
    relay = Relay(reactor, SocketCalls(), sock, owner)
    far = far or FakeFar()
    relay.start(far)
    reactor.turn(())
    return reactor, relay, far, owner
