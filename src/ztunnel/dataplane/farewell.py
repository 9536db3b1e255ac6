"""The end of a socket that has still to deliver what was written to it.

A socket that is closed while bytes wait to be read, or gets any later, sends RST, and the kernel drops what the other
end does not have yet. So who closes a connection that the other end may still write to sends FIN first, throws away
what comes, and closes when everything was delivered.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

from ztunnel.dataplane.reactor import GONE, READ
from ztunnel.dataplane.sockets import DONTWAIT

if TYPE_CHECKING:
    from ztunnel.dataplane.reactor import Reactor
    from ztunnel.dataplane.sockets import SocketCalls, StreamSocket

__all__ = ["close_when_delivered"]

_STUCK_SECONDS: Final = 30.0  # without the other end taking a byte
_READS: Final = 8  # of one turn
_NOWHERE: Final = bytearray(64 * 1024)


def close_when_delivered(reactor: Reactor, calls: SocketCalls, sock: StreamSocket) -> None:
    """End both directions of `sock`; at once where the other end has everything already.

    Args:
        reactor: watches the socket, or is to.
        calls: the socket calls.
        sock: connected; nothing is to be written to it any more, nor read.
    """
    unsent = calls.unsent(sock)
    if unsent:
        try:
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it was reset
        else:
            _Farewell(reactor, calls, sock, unsent)
            return
    reactor.close(sock)


class _Farewell:
    """Looks after such a socket."""

    __slots__ = ("_calls", "_reactor", "_since", "_sock", "_unsent")

    def __init__(self, reactor: Reactor, calls: SocketCalls, sock: StreamSocket, unsent: int) -> None:
        self._reactor = reactor
        self._calls = calls
        self._sock = sock
        self._unsent = unsent
        self._since = reactor.now
        reactor.farewells[self] = None
        reactor.sweep(self)
        fd = sock.fileno()
        if fd in reactor.handlers:
            reactor.hand_over(fd, self)
        else:
            reactor.add(fd, self, READ)
        reactor.later(self._discard)

    def on_event(self, mask: int) -> None:
        """More comes, or its end."""
        if mask & GONE:
            self.close()
        else:
            self._discard()

    def on_fault(self) -> None:
        """A fault of ours."""
        self.close()

    def on_time(self, now: float) -> None:
        """All delivered? Or is nobody there to take it?"""
        unsent = self._calls.unsent(self._sock)
        if unsent < self._unsent:
            self._unsent = unsent
            self._since = now
        if not unsent or now - self._since >= _STUCK_SECONDS:
            self.close()

    def close(self) -> None:
        """Close the socket."""
        if self in self._reactor.farewells:
            del self._reactor.farewells[self]
            self._reactor.unsweep(self)
            self._reactor.close(self._sock)

    def _discard(self) -> None:
        if self not in self._reactor.farewells:
            return
        try:
            for _ in range(_READS):
                nbytes = self._sock.recv_into(_NOWHERE, 0, DONTWAIT)
                if not nbytes:  # the other end wrote its last byte: what waits is delivered without us
                    self.close()
                    return
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        self._reactor.later(self._discard)
