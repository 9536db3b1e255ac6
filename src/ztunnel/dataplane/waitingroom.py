"""Connections that wait for their turn to shake hands.

How many handshakes one address has at once is limited. Behind the gateway of a network, or a NAT, many clients share
an address, and their bursts are no attack: what is over the limit waits its turn, unread, instead of being closed.
"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from hbone.admission import Admission
    from ztunnel.dataplane.reactor import Reactor
    from ztunnel.mesh.address import Address

__all__ = ["WaitingRoom"]

WAIT_SECONDS: Final = 10.0
"""How long a connection waits; as long as a handshake may take."""


class WaitingRoom:
    """In front of the handshakes.

    Args:
        reactor: closes sockets, and tells the time.
        admission: handshakes at once, in all and by address.
        begin: called for a connection whose turn it is; `leave` is to be called when its handshake is over.
        limit: connections that wait at once.
        per_address: those of one address.
    """

    def __init__(
        self,
        reactor: Reactor,
        admission: Admission,
        begin: Callable[[socket.SocketType, Address, str], object],
        *,
        limit: int = 1024,
        per_address: int = 256,
    ) -> None:
        self.count = 0
        """Connections that wait."""
        self._reactor = reactor
        self._admission = admission
        self._begin = begin
        self._limit = limit
        self._per_address = per_address
        self._queues: dict[str, collections.deque[tuple[float, socket.SocketType, Address]]] = {}

    def enter(self, sock: socket.SocketType, peer: Address, source: str) -> None:
        """An accepted connection: its handshake begins, or it waits, or it is closed."""
        queue = self._queues.get(source)
        if queue is None and self._admission.enter(source):
            self._begin(sock, peer, source)
            return
        if self.count >= self._limit or (queue is not None and len(queue) >= self._per_address):
            self._reactor.close(sock)
            return
        if queue is None:
            queue = self._queues[source] = collections.deque()
        if not self.count:
            self._reactor.sweep(self)
        self.count += 1
        queue.append((self._reactor.now, sock, peer))

    def leave(self, source: str) -> None:
        """A handshake from `source` is over."""
        self._admission.leave(source)
        if self.count:
            self._reactor.later(self._admit)

    def _admit(self) -> None:
        """Begin as many handshakes as there is room for; addresses take turns."""
        admitted = True
        while admitted:
            admitted = False
            for source in list(self._queues):
                if self._admission.enter(source):
                    _, sock, peer = self._take(source)
                    self._begin(sock, peer, source)
                    admitted = True

    def _take(self, source: str) -> tuple[float, socket.SocketType, Address]:
        queue = self._queues[source]
        taken = queue.popleft()
        self.count -= 1
        del self._queues[source]
        if queue:
            self._queues[source] = queue  # behind the others
        if not self.count:
            self._reactor.unsweep(self)
        return taken

    def on_time(self, now: float) -> None:
        """Close what has waited for too long."""
        for source, queue in list(self._queues.items()):
            while queue and now - queue[0][0] >= WAIT_SECONDS:
                self._reactor.close(self._take(source)[1])

    def close(self) -> None:
        """Close all that wait."""
        for source in list(self._queues):
            while source in self._queues:
                self._reactor.close(self._take(source)[1])
