"""Real processes, real sockets: what a mesh carries, and what it leaves behind."""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING

import pytest
import trio
from tests.support.shop import ECHO, descriptors, echo, kinds, shop, until
from tests.support.sizes import size

if TYPE_CHECKING:
    from pathlib import Path

    from hbone.testing.mesh import Mesh, Ztunnel

MIB = 1 << 20
BLOCK = bytes(range(256)) * 1024


async def _send(stream: trio.SocketStream, nbytes: int) -> str:
    digest = hashlib.sha256()
    for number in range(nbytes // len(BLOCK)):
        block = number.to_bytes(8, "big") + BLOCK[8:]
        digest.update(block)
        await stream.send_all(block)
    await stream.send_eof()
    return digest.hexdigest()


async def _receive(stream: trio.SocketStream) -> str:
    digest = hashlib.sha256()
    async for data in stream:
        digest.update(data)
    return digest.hexdigest()


async def _both_ways(stream: trio.SocketStream, nbytes: int) -> tuple[str, str]:
    sums = {}

    async def send() -> None:
        sums["sent"] = await _send(stream, nbytes)

    async def receive() -> None:
        sums["received"] = await _receive(stream)

    async with stream, trio.open_nursery() as nursery:
        nursery.start_soon(send)
        nursery.start_soon(receive)
    return sums["sent"], sums["received"]


@kinds
async def test_a_hundred_connections_share_one_tunnel(tmp_path: Path, namespaces: bool) -> None:
    async with shop(tmp_path, namespaces=namespaces) as running:
        beta = running.hosts["beta"].address
        streams = [await running.connect("alpha", beta, ECHO) for _ in range(100)]
        for number, stream in enumerate(streams):
            await stream.send_all(b"%03d" % number)
        answers = [await stream.receive_some() for stream in streams]
        assert answers == [b"%03d" % number for number in range(100)]
        assert await running.hosts["alpha"].established(15008) == 1
        for stream in streams:
            await stream.aclose()


@kinds
@pytest.mark.timeout(900)
async def test_bytes_arrive_unchanged_both_ways_at_once(tmp_path: Path, namespaces: bool) -> None:
    nbytes = size(1024, 64) * MIB
    sums: list[tuple[str, str]] = []

    async def serve(stream: trio.SocketStream) -> None:
        sums.append(await _both_ways(stream, nbytes))

    async with shop(tmp_path, namespaces=namespaces, serve=serve) as running:
        stream = await running.connect("alpha", running.hosts["beta"].address, ECHO)
        sent, received = await _both_ways(stream, nbytes)
        assert await until(lambda: sums)
        assert sums == [(received, sent)]


@kinds
@pytest.mark.timeout(900)
async def test_short_connections_are_none_lost_and_leave_nothing(tmp_path: Path, namespaces: bool) -> None:
    count = size(10_000, 600)
    async with shop(tmp_path, namespaces=namespaces) as running:
        assert await echo(running) == b"hello"  # the tunnel is up; what follows comes and goes
        ztunnels = running.ztunnels.values()
        before = [descriptors(ztunnel.pid) for ztunnel in ztunnels]
        answered = await _many(running, count, at_once=32)
        assert answered == count
        assert await until(lambda: [descriptors(ztunnel.pid) for ztunnel in ztunnels] <= before)
        for ztunnel in ztunnels:
            assert await until(functools.partial(_all_counted, ztunnel, count + 1)), await _counted(ztunnel)


async def _counted(ztunnel: Ztunnel) -> tuple[float, float]:
    """Connections opened and closed, by the metrics."""
    samples = await ztunnel.metrics()
    opened = sum(v for k, v in samples.items() if k.startswith("istio_tcp_connections_opened_total"))
    closed = sum(v for k, v in samples.items() if k.startswith("istio_tcp_connections_closed_total"))
    return opened, closed


async def _all_counted(ztunnel: Ztunnel, count: int) -> bool:
    return await _counted(ztunnel) == (count, count)


async def _many(running: Mesh, count: int, *, at_once: int) -> int:
    answered = 0
    left = count

    async def worker() -> None:
        nonlocal answered, left
        while left:
            left -= 1
            with trio.fail_after(60):
                back = await echo(running)
            answered += back == b"hello"

    async with trio.open_nursery() as nursery:
        for _ in range(at_once):
            nursery.start_soon(worker)
    return answered


@kinds
async def test_half_close_works_in_each_direction(tmp_path: Path, namespaces: bool) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            asked = b"".join([part async for part in stream])
            await stream.send_all(b"%d bytes before your FIN" % len(asked))

    async with shop(tmp_path, namespaces=namespaces, serve=serve) as running:
        async with await running.connect("alpha", running.hosts["beta"].address, ECHO) as stream:
            await stream.send_all(b"x" * 1000)
            await stream.send_eof()
            assert b"".join([part async for part in stream]) == b"1000 bytes before your FIN"


@kinds
async def test_sleeping_readers_neither_stall_the_others_nor_fill_memory(tmp_path: Path, namespaces: bool) -> None:
    flood = 8 * MIB

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            try:
                kind = await stream.receive_some(1)
                if kind == b"F":
                    await stream.send_all(b"f" * flood)
                else:
                    async for data in stream:
                        await stream.send_all(data)
            except trio.BrokenResourceError:
                pass

    async with shop(tmp_path, namespaces=namespaces, serve=serve) as running:
        beta = running.hosts["beta"].address
        streams = [await running.connect("alpha", beta, ECHO) for _ in range(100)]
        sleepers, readers = streams[:50], streams[50:]
        for stream in sleepers:
            await stream.send_all(b"F")
        for stream in readers:
            await stream.send_all(b"E")
        data = b"e" * 65536
        with trio.fail_after(60):
            for _ in range(4):
                for stream in readers:
                    await stream.send_all(data)
                    back = 0
                    while back < len(data):
                        back += len(await stream.receive_some())
        for ztunnel in running.ztunnels.values():
            assert _resident(ztunnel.pid) < 160 * MIB  # 60 idle, 64 of window budget, and 12.5 of first windows
        for stream in streams:
            await trio.aclose_forcefully(stream)


def _resident(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * 4096
