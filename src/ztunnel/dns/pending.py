"""Questions that wait for somebody else, and clients on TCP: both bounded, and the oldest gives way."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

import attrs
import trio

from ztunnel.dns.wire import MAX_MESSAGE, take_framed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ztunnel.dns.wire import Query

__all__ = ["MAX_ALIKE", "MAX_PENDING", "MAX_PENDING_BYTES", "Connection", "Pending"]

MAX_PENDING: Final = 1024
MAX_PENDING_BYTES: Final = 8 << 20
MAX_ALIKE: Final = 128
"""Times that one question may wait for an answer: a resolver that asks this proxy would ask it for ever."""
IDLE_SECONDS: Final = 5.0
_IN_FLIGHT: Final = 16  # of one connection; more are not read


@attrs.define(eq=False)
class Pending:
    """Questions that wait for somebody else; the oldest gives way."""

    waiting: OrderedDict[trio.CancelScope, int] = attrs.field(factory=OrderedDict)
    nbytes: int = 0
    alike: dict[int, int] = attrs.field(factory=dict)

    @contextlib.contextmanager
    def enter(self, query: Query) -> Iterator[trio.CancelScope]:
        """Wait within; the scope is cancelled when the place is needed."""
        scope, key = trio.CancelScope(), _key(query)
        self.waiting[scope] = 0
        self.alike[key] = self.alike.get(key, 0) + 1
        self.keep(scope, len(query.wire))
        try:
            with scope:
                yield scope
        finally:
            self._leave(scope)
            count = self.alike.pop(key) - 1
            if count:
                self.alike[key] = count

    def keep(self, scope: trio.CancelScope, nbytes: int) -> None:
        """Count bytes that are kept for who waits in `scope`."""
        if scope in self.waiting:
            self.waiting[scope] += nbytes
            self.nbytes += nbytes
        while len(self.waiting) > MAX_PENDING or (self.nbytes > MAX_PENDING_BYTES and len(self.waiting) > 1):
            self._leave(next(iter(self.waiting)), cancel=True)

    def _leave(self, scope: trio.CancelScope, *, cancel: bool = False) -> None:
        self.nbytes -= self.waiting.pop(scope, 0)
        if cancel:
            scope.cancel()

    def has_too_many(self, query: Query) -> bool:
        """Whether the same question waits too often."""
        return self.alike.get(_key(query), 0) >= MAX_ALIKE


def _key(query: Query) -> int:
    """Equal for equal questions, the ID apart."""
    return hash(query.wire[12 : query.end].lower() if query.type else query.wire[2:])


class Connection:
    """A client on TCP: messages with their length before them, answered in any order. RFC 7766."""

    def __init__(self, stream: trio.SocketStream, port: int) -> None:
        self.port = port
        self.scope = trio.CancelScope()
        """All of it."""
        self.reading = trio.CancelScope()
        """Further questions; those that were asked are answered still."""
        self.slots = trio.Semaphore(_IN_FLIGHT)
        self._stream = stream
        self._kept = bytearray()
        self._lock = trio.Lock()

    async def receive(self) -> bytes | None:
        """The next message; None at the end, or when none came within five seconds and none is worked on."""
        while True:
            with trio.move_on_after(IDLE_SECONDS):
                return await self._receive()
            if self.slots.value == _IN_FLIGHT or self._kept:
                return None

    async def _receive(self) -> bytes | None:
        kept = self._kept
        while (message := take_framed(kept)) is None:
            try:
                data = await self._stream.receive_some(MAX_MESSAGE)
            except trio.BrokenResourceError:
                return None
            if not data:
                return None
            kept += data
        return message

    async def send(self, message: bytes) -> None:
        """Send a message; a client that does not take it for five seconds, or is gone, is cut off."""
        data = len(message).to_bytes(2, "big") + message
        try:
            with trio.fail_after(IDLE_SECONDS):
                async with self._lock:
                    await self._stream.send_all(data)
        except (trio.TooSlowError, trio.BrokenResourceError):
            self.scope.cancel()
        except trio.Cancelled:
            self.scope.cancel()  # half a message may be on its way
            raise

    def close(self) -> None:
        """Close the socket."""
        self._stream.socket.close()
