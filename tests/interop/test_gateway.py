"""Envoy as the gateway of a network: it ends our outer tunnel, and hands the inner one on as bytes."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
import trio
from tests.support.gateway import Crossing, open_crossing
from tests.support.pair import CA, echo, reset

from hbone.testing.envoy import EnvoyPorts, config, envoy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

pytestmark = pytest.mark.interop


@contextlib.asynccontextmanager
async def through_envoy(
    directory: Path, application: Callable[[trio.SocketStream], Awaitable[object]] = echo
) -> AsyncIterator[Crossing]:
    ports = EnvoyPorts()
    issued = CA.issue(uris=[str(CA.id("default", "gateway"))])
    (directory / "envoy.pem").write_bytes(issued.cert_pem)
    (directory / "envoy.key").write_bytes(issued.key_pem)
    (directory / "root.pem").write_bytes(CA.root_pem)
    async with open_crossing(gateway_port=ports.hbone) as crossing:
        await crossing.serve(application)
        crossing.take_service()
        behind = (crossing.server.ip, 15008)
        bootstrap = config(directory, ports, application=behind, tunnel_to=("127.0.0.1", 1), authority="x:1")
        async with envoy(directory, ports, bootstrap):
            yield crossing


async def received(stream: trio.SocketStream, nbytes: int) -> bytes:
    data = bytearray()
    with trio.fail_after(60):
        while len(data) < nbytes:
            part = await stream.receive_some()
            if not part:
                break
            data += part
    return bytes(data)


async def test_inner_tunnels_pass_an_envoy_gateway(tmp_path: Path) -> None:
    async with through_envoy(tmp_path) as crossing:
        streams = [await crossing.connect() for _ in range(10)]
        for number, stream in enumerate(streams):
            await stream.send_all(b"%02d" % number)
        assert [await received(stream, 2) for stream in streams] == [b"%02d" % n for n in range(10)]
        assert len(crossing.client.plane.dialer.tunnels) == 1
        assert len(crossing.server.plane.inbound.tunnels) == 10
        data = bytes(range(256)) * 4096 * 4
        async with trio.open_nursery() as both:
            both.start_soon(streams[0].send_all, data)
            assert await received(streams[0], len(data)) == data
        for stream in streams:
            await stream.send_eof()
            assert await received(stream, 1) == b""
            await stream.aclose()
        await crossing.settle(lambda: not crossing.client.plane.inner.tunnels)
        await crossing.settle(lambda: not crossing.server.plane.inbound.tunnels)
    assert not crossing.client.log.errors


async def test_each_direction_ends_on_its_own_through_an_envoy_gateway(tmp_path: Path) -> None:
    async def count(stream: trio.SocketStream) -> None:
        total = sum([len(part) async for part in stream])
        await stream.send_all(b"%d" % total)

    async with through_envoy(tmp_path, count) as crossing:
        async with await crossing.connect() as stream:
            await stream.send_all(b"x" * 300_000)
            await stream.send_eof()
            assert await received(stream, 100) == b"300000"


async def test_a_reset_passes_an_envoy_gateway(tmp_path: Path) -> None:
    async def handler(stream: trio.SocketStream) -> None:
        await stream.send_all(await stream.receive_some())
        await stream.receive_some()
        reset(stream)

    async with through_envoy(tmp_path, handler) as crossing:
        stream = await crossing.connect()
        await stream.send_all(b"hello")
        assert await received(stream, 5) == b"hello"
        await stream.send_all(b"now")
        with pytest.raises(trio.BrokenResourceError):
            await received(stream, 1)
        await stream.aclose()
