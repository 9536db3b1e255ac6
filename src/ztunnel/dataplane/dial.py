"""One TCP connection on its way to an application or a plaintext destination."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from ztunnel.dataplane.reactor import GONE, READ_WRITE, WRITE
from ztunnel.errors import ConnectFailed, DataplaneError

if TYPE_CHECKING:
    import socket

    from ztunnel.dataplane.reactor import Reactor, Timer
    from ztunnel.dataplane.sockets import SocketCalls
    from ztunnel.mesh.address import Address, IpAddress

__all__ = ["DIAL_SECONDS", "Dial", "DialUser"]

DIAL_SECONDS: Final = 10.0
"""How long TCP may take. Source: ztunnel's connection timeout."""


class DialUser(Protocol):
    """Who dials."""

    def dialed(self, sock: socket.SocketType, mask: int, *, watched: bool) -> None:
        """Connected, and the user's from now on.

        Args:
            sock: the connection.
            mask: what it is known to be ready for, beyond being written.
            watched: the reactor watches it, for `READ_WRITE`.
        """

    def dial_failed(self, error: DataplaneError) -> None:
        """Not connected."""

    def on_fault(self) -> None:
        """`dialed` or `dial_failed` raised."""


class Dial:
    """Connects without blocking; within ten seconds, or until `cancel`.

    Args:
        reactor: watches the socket.
        calls: the socket calls.
        user: told how it ended, once; before `start` returns when the destination is on this host.
    """

    __slots__ = ("_calls", "_deadline", "_late", "_reactor", "_sock", "_timer", "_user")

    def __init__(self, reactor: Reactor, calls: SocketCalls, user: DialUser) -> None:
        self._reactor = reactor
        self._calls = calls
        self._user = user
        self._sock: socket.SocketType | None = None
        self._deadline = 0.0
        self._timer: Timer | None = None
        self._late: tuple[Address, IpAddress | None, bool] | None = None

    def start_in(
        self, seconds: float, address: Address, source: IpAddress | None = None, *, local: bool = False
    ) -> None:
        """Dial in a while, as `start` does; `cancel` until then has nothing to close."""
        self._late = (address, source, local)
        self._timer = self._reactor.call_at(self._reactor.clock() + seconds, self._start_late)

    def _start_late(self) -> None:
        self._timer = None
        if self._late is not None:
            address, source, local = self._late
            self.start(address, source, local=local)

    def start(self, address: Address, source: IpAddress | None = None, *, local: bool = False) -> None:
        """Dial.

        Args:
            address: where to.
            source: address to come from, if another than usual.
            local: the destination is on this host, so that the connection mostly stands at once: one call finds out,
                and saves a turn of the loop.
        """
        reactor = self._reactor
        try:
            sock = self._calls.dial(address, source=source, local=local)
        except OSError as exc:
            error = ConnectFailed(exc.strerror or str(exc))
            reactor.later(lambda: self._user.dial_failed(error))
            return
        if local and self._calls.is_connected(sock):
            self._user.dialed(sock, 0, watched=False)
            return
        self._sock = sock
        self._deadline = reactor.now + DIAL_SECONDS
        reactor.add(sock.fileno(), self, READ_WRITE)
        reactor.sweep(self)

    def cancel(self) -> None:
        """Stop, and say nothing."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        sock, self._sock = self._sock, None
        if sock is not None:
            self._reactor.unsweep(self)
            self._reactor.close(sock)

    def on_event(self, mask: int) -> None:
        """TCP came to an end of its handshake."""
        sock = self._sock
        if sock is None:
            return
        if mask & GONE:
            exc = self._calls.error_of(sock)
            self.cancel()
            self._user.dial_failed(ConnectFailed("connection closed" if exc is None else exc.strerror or str(exc)))
        elif mask & WRITE:
            self._sock = None
            self._reactor.unsweep(self)
            self._user.dialed(sock, mask & ~WRITE, watched=True)

    def on_fault(self) -> None:
        """A fault of ours: the user closes what is left."""
        self.cancel()
        self._user.on_fault()

    def on_time(self, now: float) -> None:
        """Too late?"""
        if now >= self._deadline:
            self.cancel()
            self._user.dial_failed(ConnectFailed(f"timed out after {DIAL_SECONDS:g} s"))
