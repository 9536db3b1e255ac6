"""A peer that asks for connections and resets them at once is served more slowly.

A dial costs the application and us more than it costs the peer, and one to this host stands before the peer's reset
can be read. So once too many of a tunnel's streams were reset without a byte, its further dials wait a moment, and
those whose stream is reset meanwhile are never made: a burst of resets then costs nothing but frames, which the
engine counts. A peer that behaves loses that moment at worst. Source: CVE-2023-44487.
"""

from __future__ import annotations

from typing import Final

__all__ = ["WAIT_SECONDS", "Restraint"]

_BURST: Final = 10.0
_PER_SECOND: Final = 5.0
WAIT_SECONDS: Final = 0.02
"""How long a dial waits; longer than a reset that was sent with its request takes to arrive."""


class Restraint:
    """Counts the dials of one tunnel that came to nothing: ten at once, and five a second after that."""

    __slots__ = ("_at", "_left")

    def __init__(self, now: float) -> None:
        self._left = _BURST
        self._at = now

    def wasted(self, now: float) -> None:
        """A stream was reset before it carried a byte to the application."""
        self._left = max(-_BURST, self._refilled(now) - 1)
        self._at = now

    def wait(self, now: float) -> float:
        """Seconds that a dial waits now."""
        return 0.0 if self._refilled(now) >= 1 else WAIT_SECONDS

    def _refilled(self, now: float) -> float:
        return min(_BURST, self._left + (now - self._at) * _PER_SECOND)
