"""What the data path asks of the kernel, counted: most of a proxy's cost is the kernel's."""

from __future__ import annotations

import collections
import select
from typing import TYPE_CHECKING, Any

import pytest
import trio
from tests.support.pair import Pair, counts, echo, open_pair

from ztunnel.dataplane.relay import Relay

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

polls: collections.Counter[str] = collections.Counter()


class CountingPoller:
    def __init__(self) -> None:
        self.real = select.epoll()

    def __getattr__(self, name: str) -> Any:
        if name in {"register", "modify", "unregister"}:
            polls[name] += 1
        return getattr(self.real, name)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with open_pair(poller=CountingPoller()) as pair:
        with trio.fail_after(20):
            await pair.serve(echo)
            async with await pair.connect() as stream:  # the tunnel stands, the mesh is known
                await stream.send_all(b"x")
                await stream.receive_some(1)
            await pair.settle(lambda: not len(pair.server.plane.connections))
            yield pair


async def test_a_round_trip_costs_each_proxy_two_reads_and_two_writes(pair: Pair) -> None:
    async with await pair.connect() as stream:
        await stream.send_all(b"x")
        await stream.receive_some(1)
        counts.clear()
        polls.clear()
        for _ in range(50):
            await stream.send_all(b"x")
            await stream.receive_some(1)
        assert dict(counts) == {"recv": 200, "send": 200}
        assert not polls


async def test_a_connection_costs_one_epoll_ctl_a_socket_and_one_option(pair: Pair) -> None:
    counts.clear()
    polls.clear()
    for _ in range(20):
        async with await pair.connect() as stream:
            await stream.send_all(b"x")
            await stream.receive_some(1)
    await pair.settle(lambda: len(pair.server.log.completed) == 21)
    assert polls == {"register": 40}
    assert counts["connect"] == 20
    assert counts["setsockopt"] == 20  # TCP_NODELAY towards the application; the rest is inherited
    assert counts["getsockopt"] <= 20
    assert counts["shutdown"] <= 20
    assert counts["accept"] <= 30
    assert counts["send"] <= 160
    assert counts["recv"] <= 220


async def test_bulk_costs_no_epoll_ctl_beyond_the_first_blocked_write(pair: Pair) -> None:
    size = 16 << 20
    async with await pair.connect() as stream, trio.open_nursery() as nursery:
        await stream.send_all(b"x")
        await stream.receive_some(1)
        counts.clear()
        polls.clear()

        async def send() -> None:
            await stream.send_all(bytes(size))
            await stream.send_eof()

        nursery.start_soon(send)
        got = 0
        async for chunk in stream:
            got += len(chunk)
        assert got == size
    assert polls["modify"] <= 2  # each app socket once
    assert polls["register"] == polls["unregister"] == 0


async def test_frames_of_one_turn_leave_in_one_send(pair: Pair) -> None:
    streams = [await pair.connect() for _ in range(30)]
    for stream in streams:
        await stream.send_all(b"x")
        await stream.receive_some(1)
    (tunnel,) = pair.client.plane.dialer.tunnels
    relays = [end.relay for end in tunnel.streams.values()]
    counts.clear()
    for relay in relays:
        assert isinstance(relay, Relay)
        relay._far.take(1)
    pair.reactor.turn(())
    assert counts["send"] == 1
    for stream in streams:
        await stream.aclose()
