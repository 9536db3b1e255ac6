"""A connection that is over goes with its last user: the garbage collector, which stops all, has nothing to do."""

from __future__ import annotations

import contextlib
import gc
from typing import TYPE_CHECKING, Any

import pytest
import trio
from tests.support.pair import Pair, echo, open_pair, reset

from ztunnel.mesh.policy import Action, Authorization, PolicyScope

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

COUNT = 20


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with open_pair() as pair:
        with trio.fail_after(60):
            yield pair


async def ended(pair: Pair) -> None:
    async with await pair.connect() as stream:
        await stream.send_all(b"hello")
        await stream.send_eof()
        while await stream.receive_some(100):
            pass


async def cut(pair: Pair) -> None:
    stream = await pair.connect()
    await stream.send_all(b"hello")
    await stream.receive_some(1)
    reset(stream)


async def refused(pair: Pair) -> None:
    async with await pair.connect() as stream:
        with contextlib.suppress(trio.BrokenResourceError):
            assert not await stream.receive_some(100)


@pytest.mark.parametrize("connect", [ended, cut, refused])
async def test_connections_leave_no_cycles(pair: Pair, connect: Any) -> None:
    await pair.serve(echo)
    await ended(pair)
    if connect is refused:
        pair.store.apply_policies(
            [Authorization(name="no", namespace="", scope=PolicyScope.GLOBAL, action=Action.ALLOW)]
        )
    await connect(pair)
    done = len(pair.server.log.completed)
    gc.collect()
    gc.disable()
    try:
        for _ in range(COUNT):
            await connect(pair)
        await pair.settle(lambda: len(pair.server.log.completed) >= done + COUNT)
        await pair.settle(lambda: not len(pair.client.plane.connections))
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        ours = [type(found).__qualname__ for found in gc.garbage if type(found).__module__.startswith("ztunnel.")]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert ours == []
