"""Where a server's connections wait for their handshake, under Trio."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from hbone.admission import Line

if TYPE_CHECKING:
    import logging

    from hbone.admission import Admission, Turn

__all__ = ["Entrance"]


class Entrance:
    """In front of the handshakes of one server.

    Args:
        admission: limits of handshakes at once, and of connections that wait.
        seconds: how long one waits.
        log: told whose handshake may not begin, and why.
    """

    def __init__(self, admission: Admission, seconds: float, log: logging.Logger) -> None:
        self._line = Line(admission)
        self._seconds = seconds
        self._log = log
        self._waiting: set[trio.Event] = set()
        self._closed = False

    def close(self) -> None:
        """Nobody waits from here on: the server accepts no more."""
        self._closed = True
        for came in self._waiting:
            came.set()

    async def enter(self, address: str) -> Turn | None:
        """Wait until the handshake may begin.

        Args:
            address: where the connection comes from; empty where it has none, as in memory.

        Returns:
            The turn, to be left when the handshake is over; None when it may not begin.
        """
        came = trio.Event()
        turn = self._line.join(address, came.set)
        if turn is None:
            self._log.warning("connection from %s closed: too many TLS handshakes at once", address or "a peer")
            return None
        if not turn.entered and not self._closed:
            self._waiting.add(came)
            try:
                with trio.move_on_after(self._seconds):
                    await came.wait()
            except BaseException:
                turn.leave()
                raise
            finally:
                self._waiting.discard(came)
        if turn.entered:
            return turn
        turn.leave()
        if not self._closed:
            self._log.warning("connection from %s closed: its TLS handshake had no turn in time", address or "a peer")
        return None
