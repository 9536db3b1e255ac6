"""How many handshakes a server does at once. A handshake costs a millisecond before anyone has proved anything.

Behind a NAT or the gateway of a network many clients share an address, and their bursts are no attack: who is over a
limit can wait in the server's line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["HANDSHAKES", "Admission", "Line", "Turn"]


class Admission:
    """Counts connections that have not completed their handshake, in all and by address.

    Args:
        limit: connections at once.
        per_address: connections at once from one address.
        waiting: connections over these that one server lets wait for their turn.
        waiting_per_address: of them, from one address.
    """

    def __init__(
        self, limit: int = 512, per_address: int = 32, *, waiting: int = 512, waiting_per_address: int = 128
    ) -> None:
        self.limit = limit
        self.per_address = per_address
        self.waiting = waiting
        self.waiting_per_address = waiting_per_address
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


class Turn:
    """A connection that was let in, or waits for it."""

    __slots__ = ("_line", "_over", "address", "entered")

    def __init__(self, line: Line, address: str) -> None:
        self.address = address
        self.entered = False
        """Its handshake may begin."""
        self._line = line
        self._over = False

    def leave(self) -> None:
        """Its handshake is over, or it waits no longer. Does nothing the second time."""
        if not self._over:
            self._over = True
            self._line.left(self)


class Line:
    """The connections of one server on their way through an admission. Not for several threads.

    Room that another server made in an admission they share is found when a connection of this one leaves.

    Args:
        admission: what lets them in.
    """

    def __init__(self, admission: Admission) -> None:
        self.waiting = 0
        """Connections that wait."""
        self._admission = admission
        self._inside = 0
        self._queues: dict[str, dict[Turn, Callable[[], object]]] = {}

    def join(self, address: str, wake: Callable[[], object]) -> Turn | None:
        """Enter, or wait for it; addresses take turns.

        Args:
            address: where it comes from.
            wake: called when one that waited has `entered`.

        Returns:
            Its turn, to be left however it ends; None when too many wait.
        """
        admission = self._admission
        turn = Turn(self, address)
        queue = self._queues.get(address, {})
        if not queue and admission.enter(address):
            turn.entered = True
            self._inside += 1
            return turn
        if not self._inside or self.waiting >= admission.waiting or len(queue) >= admission.waiting_per_address:
            return None
        queue[turn] = wake
        self._queues[address] = queue
        self.waiting += 1
        return turn

    def left(self, turn: Turn) -> None:
        """What `Turn.leave` does."""
        if not turn.entered:
            self._take(turn)
            return
        self._admission.leave(turn.address)
        self._inside -= 1
        while (wake := self._next()) is not None:
            wake()

    def _next(self) -> Callable[[], object] | None:
        """Let in one that waits, if there is room for any."""
        for address, queue in self._queues.items():
            if self._admission.enter(address):
                turn = next(iter(queue))
                turn.entered = True
                self._inside += 1
                wake = self._take(turn)
                if queue:
                    self._queues[address] = self._queues.pop(address)  # behind the other addresses
                return wake
        return None

    def _take(self, turn: Turn) -> Callable[[], object]:
        queue = self._queues[turn.address]
        wake = queue.pop(turn)
        self.waiting -= 1
        if not queue:
            del self._queues[turn.address]
        return wake
