"""Flow control: how much the peer may send, how much we may, and what all connections together may grow to.

A receive window is three numbers that add up to its size: `credit` that the peer still has, bytes that the reader
holds, and bytes it `released` that the peer has not been told of. Telling waits for half a window, so a bulk stream
costs one WINDOW_UPDATE in each half window. A window whose half was used up within a second by a reader that keeps up
doubles, so a fast stream gets a large window and an idle one stays small.

Source: RFC 9113 §5.2, §6.9.
"""

from __future__ import annotations

from typing import Final

from hbone.config import MIB
from hbone.engine.frames import MAX_WINDOW
from hbone.errors import ErrorCode, LocalProtocolError, ProtocolError

__all__ = ["GROWTH_INTERVAL", "ReceiveWindow", "WindowBudget", "widened"]

GROWTH_INTERVAL: Final = 1.0
"""Seconds within which half a window must have been used up for it to grow."""


class WindowBudget:
    """Bytes that receive windows of all connections together may have beyond their initial sizes."""

    __slots__ = ("limit", "used")

    def __init__(self, limit: int = 64 * MIB) -> None:
        self.limit = limit
        self.used = 0

    def take(self, nbytes: int) -> bool:
        """Reserve `nbytes`; False, and nothing reserved, when they are not there."""
        if self.used + nbytes > self.limit:
            return False
        self.used += nbytes
        return True

    def give_back(self, nbytes: int) -> None:
        """Return what `take` reserved.

        Raises:
            LocalProtocolError: more than was taken.
        """
        if nbytes > self.used:
            raise LocalProtocolError(f"{nbytes} bytes given back to a window budget of which {self.used} are taken")
        self.used -= nbytes


class ReceiveWindow:
    """What the peer may send on one stream."""

    __slots__ = ("_initial", "_limit", "credit", "released", "size", "threshold", "updated_at", "updates")

    def __init__(self, size: int, limit: int, now: float) -> None:
        self._initial = size
        self._limit = limit
        self.size = size
        self.credit = size
        """Bytes that the peer may still send."""
        self.released = 0
        """Bytes that the reader is done with and the peer does not know of."""
        self.threshold = max(1, size // 2)
        """`released` at which the peer is told."""
        self.updated_at = now
        self.updates = 0
        """Times that the peer was told."""

    @property
    def held(self) -> int:
        """Bytes received, or on their way in a frame that has begun, that the reader has not released."""
        return self.size - self.credit - self.released

    def update(self, now: float, budget: WindowBudget) -> int:
        """Turn what was released into credit, and grow where that helps.

        Returns:
            The increment to announce, in bytes.
        """
        increment = self.released
        if self.size < self._limit and now - self.updated_at <= GROWTH_INTERVAL and self.held * 4 <= self.size:
            growth = min(self.size, self._limit - self.size)
            if budget.take(growth):
                increment += growth
                self.size += growth
                self.threshold = self.size // 2
        self.released = 0
        self.credit += increment
        self.updated_at = now
        self.updates += 1
        return increment

    def close(self, budget: WindowBudget) -> None:
        """Give the growth back to the budget."""
        budget.give_back(self.size - self._initial)
        self.size = self._initial


def widened(window: int, increment: int) -> int:
    """A send window after WINDOW_UPDATE or a change of SETTINGS_INITIAL_WINDOW_SIZE; it may be negative.

    Raises:
        ProtocolError: beyond 2^31-1; FLOW_CONTROL_ERROR.

    Source: RFC 9113 §6.9.1, §6.9.2.
    """
    window += increment
    if window > MAX_WINDOW:
        raise ProtocolError(f"a window of {window} bytes is beyond the limit of 2^31-1", ErrorCode.FLOW_CONTROL_ERROR)
    return window
