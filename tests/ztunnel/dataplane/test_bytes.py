"""Every byte is the right one, in its place: random conversations by each way into and out of the data path."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

import attrs
import pytest
import trio
from tests.support.pair import Pair, exactly, open_pair, reset
from tests.support.sizes import size

from ztunnel.mesh import parse_ip
from ztunnel.mesh.workload import ApplicationTunnel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_ID: Final = 8
_SIGNATURE: Final = b"\r\n\r\n\x00\r\nQUIT\n"


@attrs.frozen
class Part:
    """What one side says, how it ends, and how it goes about it: all of it follows from its number."""

    number: int
    data: bytes
    resets: bool
    waits: bool
    """It says nothing before it has heard something."""
    chunk: int

    @classmethod
    def of(cls, number: int) -> Part:
        rng = random.Random(number)
        length = rng.choice([0, 1, rng.randrange(2_000), rng.randrange(70_000), rng.randrange(400_000)])
        return cls(
            number=number,
            data=number.to_bytes(_ID) + rng.randbytes(length),
            resets=rng.random() < 0.2,
            waits=bool(number & 1) and rng.random() < 0.5,  # at most one of two sides
            chunk=rng.choice([7, 1000, 20_000, 500_000]) if length < 3_000 else rng.choice([1000, 20_000, 500_000]),
        )


class Conversation:
    """One side of a connection."""

    def __init__(self, stream: trio.SocketStream, part: Part, heard: bytes = b"") -> None:
        self.stream = stream
        self.part = part
        self.heard = bytearray(heard)
        self.complete = False
        """The other side said that it was all."""
        self.over = False
        self.broken = False
        """Writing found a reset, so the kernel tells it no more to who reads."""
        self.rng = random.Random(-1 - part.number)
        self._begun = trio.Event()

    async def run(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen)
                nursery.start_soon(self._speak)
            self.complete = self.complete and not self.broken
        finally:
            self.over = True
            await trio.aclose_forcefully(self.stream)

    async def _speak(self) -> None:
        part = self.part
        if part.waits:
            await self._begun.wait()
        end = self.rng.randrange(_ID, len(part.data) + 1) if part.resets else len(part.data)
        try:
            for start in range(0, end, part.chunk):
                await self.stream.send_all(part.data[start : min(end, start + part.chunk)])
            if part.resets:
                for _ in range(self.rng.randrange(20)):
                    await trio.lowlevel.checkpoint()
                reset(self.stream)
            else:
                await self.stream.send_eof()
        except trio.ClosedResourceError:
            pass
        except trio.BrokenResourceError:
            self.broken = True

    async def _listen(self) -> None:
        try:
            while data := await self.stream.receive_some(self.rng.choice([100, 5_000, 65_536])):
                self.heard += data
                self._begun.set()
                if self.rng.random() < 0.1:
                    await trio.sleep(0.001)
            self.complete = True
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        self._begun.set()


def check(side: Conversation) -> None:
    """What one side heard is what the other said: all of it where it looks complete, else its beginning."""
    heard = bytes(side.heard)
    if len(heard) < _ID:
        assert not side.complete
        return
    said = Part.of(int.from_bytes(heard[:_ID]))
    assert said.data.startswith(heard)
    assert said.number & 1 != side.part.number & 1
    if side.complete:
        assert not said.resets
        assert heard == said.data
    else:
        assert said.resets or side.part.resets


async def captured(pair: Pair) -> trio.SocketStream:
    return await pair.connect()


async def plaintext(pair: Pair) -> trio.SocketStream:
    pair.server.calls.destination = (parse_ip(pair.server.ip), pair.app_port)
    return await trio.open_tcp_stream(*pair.server.inbound)


async def socks5(pair: Pair) -> trio.SocketStream:
    stream = await trio.open_tcp_stream(*pair.client.socks5)
    await stream.send_all(
        b"\x05\x01\x00" + b"\x05\x01\x00\x01" + parse_ip(pair.server.ip).packed + pair.app_port.to_bytes(2)
    )
    assert await exactly(stream, 12) == b"\x05\x00" + b"\x05\x00\x00\x01" + bytes(6)
    return stream


@pytest.mark.parametrize("seed", range(size(20, 2)))
@pytest.mark.parametrize(
    ("way", "proxied"),
    [(captured, False), (socks5, False), (captured, True), (socks5, True), (plaintext, False)],
    ids=["captured", "socks5", "captured, PROXY", "socks5, PROXY", "plaintext"],
)
async def test_what_one_side_hears_is_what_the_other_said(
    way: Callable[[Pair], Awaitable[trio.SocketStream]], proxied: bool, seed: int
) -> None:
    connections = 30
    sides: list[Conversation] = []
    base = seed * 1_000_000

    async def application(stream: trio.SocketStream) -> None:
        if proxied:
            head = await exactly(stream, 16)
            assert head[:12] == _SIGNATURE
            await exactly(stream, int.from_bytes(head[14:16]))
        side = Conversation(stream, Part.of(base + 2 * len(sides)))
        sides.append(side)
        await side.run()

    async def client(pair: Pair, number: int) -> None:
        try:
            stream = await way(pair)
        except trio.BrokenResourceError:  # the application's reset was faster than the reply
            return
        side = Conversation(stream, Part.of(number))
        await side.run()
        sides_of_clients.append(side)

    sides_of_clients: list[Conversation] = []
    async with open_pair(localhost_app_tunnel=False) as pair:
        with trio.fail_after(60):
            await pair.serve(application)
            if proxied:
                tunnel = ApplicationTunnel(proxy=True, port=pair.app_port)
                pair.store.apply_addresses([attrs.evolve(pair.server.workload, application_tunnel=tunnel)], [])
            async with trio.open_nursery() as nursery:
                for number in range(connections):
                    nursery.start_soon(client, pair, base + 2 * number + 1)
                pool = pair.client.plane.dialer.pool
                for _ in range(10 if way is not plaintext else 0):  # so that much comes in one read
                    await trio.sleep(0.005)
                    if pool.statistics().tunnels:
                        async with pair.looking_away():
                            await trio.sleep(0.005)
            await pair.settle(lambda: all(side.over for side in sides))
            await pair.settle(lambda: not len(pair.server.plane.connections) + len(pair.client.plane.connections))
            assert len(pair.client.plane.dialer.tunnels) == (way is not plaintext)
            log = [*pair.client.log.errors, *pair.server.log.errors, *pair.client.log.denied, *pair.server.log.denied]
    assert [error for error in log if "CONNECT_ERROR" not in error] == []
    assert len(sides_of_clients) > connections // 2
    for side in (*sides, *sides_of_clients):
        check(side)
