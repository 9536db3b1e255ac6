"""What may overtake what: a policy that changes does not wait for a hundred thousand workloads.

Each type of resources has a lane, and in a lane the order stays. Workloads wait for policies that came before them, so
that nobody is reachable without them; policies that are taken away wait for workloads that came before, which may have
named them until then. Policies that are new or changed wait for policies only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from ztunnel.mesh import ADDRESS_TYPE, AUTHORIZATION_TYPE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

__all__ = ["Lanes"]


class Lanes:
    """Runs work in a nursery, each piece after those it must not overtake.

    Args:
        nursery: where it runs.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._last: dict[str, trio.Event] = {}
        self._left = trio.Event()
        self.waiting = 0
        """Bytes of what is not done yet."""

    def start(
        self, work: Callable[[], Awaitable[object]], lanes: Iterable[str], after: Iterable[str] = (), size: int = 0
    ) -> None:
        """Run `work` once all that came before in `lanes` and in the lanes `after` is done.

        Args:
            work: Must not raise but for faults.
            lanes: What comes later in one of these waits for it.
            after: Other lanes whose work, as far as it came before, is waited for.
            size: Bytes that it keeps.
        """
        mine = tuple(lanes)
        before = [self._last[lane] for lane in (*mine, *after) if lane in self._last]
        done = trio.Event()
        for lane in mine:
            self._last[lane] = done
        self.waiting += size
        self._nursery.start_soon(self._run, work, before, done, size)

    async def _run(
        self, work: Callable[[], Awaitable[object]], before: list[trio.Event], done: trio.Event, size: int
    ) -> None:
        try:
            for event in before:
                await event.wait()
            await work()
        finally:
            done.set()
            self.waiting -= size
            self._left.set()
            self._left = trio.Event()

    @staticmethod
    def after(type_url: str, *, removes: bool) -> tuple[str, ...]:
        """Lanes of other types that a response waits for."""
        if type_url == ADDRESS_TYPE:
            return (AUTHORIZATION_TYPE,)
        return (ADDRESS_TYPE,) if type_url == AUTHORIZATION_TYPE and removes else ()

    async def below(self, size: int) -> None:
        """Wait until less than `size` bytes are kept."""
        while self.waiting >= size:
            await self._left.wait()
