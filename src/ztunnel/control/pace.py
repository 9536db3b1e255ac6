"""Work that can wait, done a little at a time so that the data path is never kept waiting for long.

A large push is seconds of work. It is cut into slices by a count of items and by a clock, and between two of them the
reactor has a turn. What the garbage collector would do about its hundred thousands of objects cannot be cut: a
collection of the oldest generation walks all of them at once. So there is none while a push is taken in, and
afterwards the objects are set aside, where later ones don't walk them either.
"""

from __future__ import annotations

import contextlib
import gc
import time
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ztunnel.mesh import Change, Store

__all__ = ["Pace", "QuietCollector", "Slices", "settle"]

SECONDS = 0.00015
"""Of work between two turns of the reactor. A round trip through two proxies may meet it four times."""
ITEMS = 64
"""Of work between two turns, at most, however quick they are."""
ASIDE = 1000
"""Resources that came since objects were last set aside, for it to be done again."""
NEVER = 1 << 30


class QuietCollector:
    """Keeps the garbage collector from pausing the data path for a mesh that only grows old.

    It is the collector of the whole process, so this is for a process of our own.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._came = 0
        self._rested = 0
        self._thresholds = gc.get_threshold()

    @contextlib.contextmanager
    def quiet(self, resources: int) -> Iterator[None]:
        """No collection of the oldest generation for the body, which takes in so many resources."""
        if not self._depth:
            self._thresholds = gc.get_threshold()
            gc.set_threshold(*self._thresholds[:2], NEVER)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            self._came += resources
            if not self._depth:
                gc.set_threshold(*self._thresholds)
                if self._came >= ASIDE:
                    self.set_aside()

    def set_aside(self) -> None:
        """What is here now stays. It is freed when nobody refers to it, but no longer searched for cycles."""
        self._came = 0
        gc.collect(1)  # what is young and in a cycle may still go
        gc.freeze()

    def rested(self, items: int) -> None:
        """So many items of a push are done: keep the middle generation small, too."""
        if self._depth:
            self._rested += items
            if self._rested >= ASIDE:
                self._rested = 0
                self.pass_over()

    def pass_over(self) -> None:
        """Something large was made that is not to be walked, however young it is."""
        gc.freeze()


class Pace:
    """How work is cut into slices, for any number of tasks.

    Args:
        clock: seconds.
        seconds: length of a slice.
        items: most items of a slice.
        collector: of this process, if that may be touched.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.perf_counter,
        seconds: float = SECONDS,
        items: int = ITEMS,
        collector: QuietCollector | None = None,
    ) -> None:
        self.clock = clock
        self.seconds = seconds
        self.items = items
        self._collector = collector
        self.slices = 0
        """So far."""
        self.longest = 0
        """Most items of a slice."""

    def begin(self) -> Slices:
        """Of one task, from now on."""
        return Slices(self)

    def quiet(self, resources: int) -> contextlib.AbstractContextManager[None]:
        """See `QuietCollector.quiet`."""
        return self._collector.quiet(resources) if self._collector is not None else contextlib.nullcontext()

    def rested(self, items: int) -> None:
        """A slice of so many items is done."""
        self.slices += 1
        self.longest = max(self.longest, items)
        if self._collector is not None:
            self._collector.rested(items)

    def pass_over(self, size: int) -> None:
        """Something with so many entries was made; see `QuietCollector.pass_over`."""
        if self._collector is not None and size >= ASIDE:
            self._collector.pass_over()

    def set_aside(self) -> None:
        """See `QuietCollector.set_aside`."""
        if self._collector is not None:
            self._collector.set_aside()


class Slices:
    """The slices of one task: ask `due` after each item, and `rest` when it says so."""

    __slots__ = ("_count", "_end", "_pace")

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._count = 0
        self._end = pace.clock() + pace.seconds

    def due(self) -> bool:
        """An item is done; whether that is enough."""
        self._count += 1
        count, pace = self._count, self._pace
        return count >= pace.items or pace.clock() >= self._end

    async def rest(self) -> None:
        """Let others run."""
        pace = self._pace
        pace.rested(self._count)
        await trio.lowlevel.checkpoint()
        self._count = 0
        self._end = pace.clock() + pace.seconds


async def settle(store: Store, pace: Pace) -> None:
    """Work in what large pushes left to be done, until cancelled."""
    changed = trio.Event()

    def wake(_: Change) -> None:
        nonlocal changed
        changed.set()
        changed = trio.Event()

    unsubscribe = store.subscribe(wake)
    try:
        while True:
            if store.unsettled:
                slices = pace.begin()
                with pace.quiet(0):
                    while store.settle(1):
                        if slices.due():
                            await slices.rest()
            await changed.wait()
    finally:
        unsubscribe()
