"""Connections at a steady rate through a mesh, each with a verdict."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

import attrs
import trio
from tests.support.shop import ECHO

if TYPE_CHECKING:
    from hbone.testing.mesh import Mesh

__all__ = ["Attempt", "Load"]


@attrs.define
class Attempt:
    """One connection of the client."""

    began: float
    """Wall clock, seconds since 1970."""
    accepted: bool = False
    """The proxy answered at all."""
    answered: bool = False
    """Every byte came back, and the end."""
    sent: int = 0
    received: int = 0
    error: str = ""


@attrs.define
class Load:
    """Makes connections until told to stop, `rate` a second as far as the machine can.

    Args:
        running: the mesh.
        rate: connections a second.
        hold: seconds that each stays open.
    """

    running: Mesh
    rate: float = 200.0
    hold: float = 0.02
    limit: int = 100
    attempts: list[Attempt] = attrs.field(factory=list)
    _stop: trio.Event = attrs.field(factory=trio.Event)
    _many: trio.Event = attrs.field(factory=trio.Event)

    async def run(self) -> None:
        """Until `stop`, and then until the last one has its verdict."""
        slots = trio.CapacityLimiter(self.limit)
        async with trio.open_nursery() as nursery:
            begun = trio.current_time()
            for number in itertools.count():
                with trio.move_on_at(begun + number / self.rate):
                    await self._stop.wait()
                if self._stop.is_set():
                    return
                await slots.acquire_on_behalf_of(number)
                nursery.start_soon(self._one, number, slots)

    def stop(self) -> None:
        """Begin no more."""
        self._stop.set()

    async def more(self, count: int) -> None:
        """Wait until so many more have been made."""
        wanted = len(self.attempts) + count
        while len(self.attempts) < wanted:
            await trio.sleep(0.01)

    async def _one(self, number: int, slots: trio.CapacityLimiter) -> None:
        attempt = Attempt(time.time())
        data = b"%d:%s" % (number, bytes(number % 1000))
        try:
            stream = await self.running.connect("alpha", self.running.hosts["beta"].address, ECHO)
            attempt.accepted = True
            async with stream:
                await stream.send_all(data)
                attempt.sent = len(data)
                back = b""
                while len(back) < len(data):
                    part = await stream.receive_some()
                    if not part:
                        break
                    back += part
                attempt.received = len(back)
                await trio.sleep(self.hold)
                await stream.send_eof()
                attempt.answered = back == data and await stream.receive_some() == b""
        except (OSError, trio.BrokenResourceError) as error:
            attempt.error = repr(error)
        finally:
            self.attempts.append(attempt)
            slots.release_on_behalf_of(number)

    @property
    def failed(self) -> list[Attempt]:
        """Those that did not go well."""
        return [attempt for attempt in self.attempts if not attempt.answered]
