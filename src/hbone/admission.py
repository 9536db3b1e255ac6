"""How many handshakes a server does at once. A handshake costs a millisecond before anyone has proved anything."""

from __future__ import annotations

__all__ = ["HANDSHAKES", "Admission"]


class Admission:
    """Counts connections that have not completed their handshake, in all and by address.

    Args:
        limit: connections at once.
        per_address: connections at once from one address.
    """

    def __init__(self, limit: int = 512, per_address: int = 32) -> None:
        self.limit = limit
        self.per_address = per_address
        self.count = 0
        self._by_address: dict[str, int] = {}

    def enter(self, address: str) -> bool:
        """Count one from `address`; False, and nothing counted, when there are too many."""
        here = self._by_address.get(address, 0)
        if self.count >= self.limit or here >= self.per_address:
            return False
        self.count += 1
        self._by_address[address] = here + 1
        return True

    def leave(self, address: str) -> None:
        """One from `address`, let in before, completed its handshake or went away."""
        self.count -= 1
        here = self._by_address[address] - 1
        if here:
            self._by_address[address] = here
        else:
            del self._by_address[address]


HANDSHAKES = Admission()
"""The limit of the process."""
