"""Connections that wait for their turn to shake hands.

How many handshakes one address has at once is limited. Behind the gateway of a network, or a NAT, many clients share
an address, and their bursts are no attack: what is over the limit waits its turn, unread, instead of being closed.
Whose turn it is, `hbone.admission` says; here are the sockets, the time and the reactor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hbone.admission import Line

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from hbone.admission import Admission, Turn
    from ztunnel.dataplane.reactor import Reactor
    from ztunnel.mesh.address import Address

__all__ = ["WaitingRoom"]

WAIT_SECONDS: Final = 10.0
"""How long a connection waits; as long as a handshake may take."""


class WaitingRoom:
    """In front of the handshakes.

    Args:
        reactor: closes sockets, and tells the time.
        admission: handshakes at once, and connections that wait, in all and by address.
        begin: called for a connection whose turn it is; the turn is to be left when its handshake is over.
    """

    def __init__(
        self,
        reactor: Reactor,
        admission: Admission,
        begin: Callable[[socket.SocketType, Address, Turn], object],
    ) -> None:
        self._reactor = reactor
        self._line = Line(admission)
        self._begin = begin
        self._waiting: dict[socket.SocketType, tuple[float, Address, Turn]] = {}

    @property
    def count(self) -> int:
        """Connections that wait."""
        return len(self._waiting)

    def enter(self, sock: socket.SocketType, peer: Address, source: str) -> None:
        """An accepted connection: its handshake begins, or it waits, or it is closed."""
        reactor = self._reactor
        # Whoever leaves may stand in the middle of a tunnel's callback: what waited begins after it.
        turn = self._line.join(source, lambda: reactor.later(lambda: self._admit(sock)))
        if turn is None:
            reactor.close(sock)
        elif turn.entered:
            self._begin(sock, peer, turn)
        else:
            self._waiting[sock] = reactor.now, peer, turn
            reactor.sweep(self)

    def _admit(self, sock: socket.SocketType) -> None:
        if sock in self._waiting:  # it may have been closed since
            peer, turn = self._take(sock)
            self._begin(sock, peer, turn)

    def _take(self, sock: socket.SocketType) -> tuple[Address, Turn]:
        _, peer, turn = self._waiting.pop(sock)
        if not self._waiting:
            self._reactor.unsweep(self)
        return peer, turn

    def on_time(self, now: float) -> None:
        """Close what has waited for too long."""
        for sock, (came_at, _, _) in list(self._waiting.items()):
            if now - came_at < WAIT_SECONDS:
                return
            self._close(sock)

    def close(self) -> None:
        """Close all that wait."""
        for sock in list(self._waiting):
            self._close(sock)

    def _close(self, sock: socket.SocketType) -> None:
        _, turn = self._take(sock)
        turn.leave()
        self._reactor.close(sock)
