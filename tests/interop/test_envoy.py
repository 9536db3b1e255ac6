"""Envoy at the other end: it terminates our tunnels, and originates tunnels to us."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

import hbone
import hbone.trio
from hbone.testing.ca import TestCa
from hbone.testing.envoy import EnvoyPorts, config, envoy, free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

pytestmark = pytest.mark.interop

MIB = 1 << 20
CA = TestCa()
ENVOY = CA.id("shop", "envoy")


def _material(directory: Path) -> None:
    issued = CA.issue(uris=[str(ENVOY)])
    (directory / "envoy.pem").write_bytes(issued.cert_pem)
    (directory / "envoy.key").write_bytes(issued.key_pem)
    (directory / "root.pem").write_bytes(CA.root_pem)


def _source(name: str) -> hbone.StaticSource:
    identity = CA.identity("shop", name)
    return hbone.StaticSource(identity.svid, identity.bundles)


async def _echo(stream: trio.SocketStream) -> None:
    try:
        async with stream:
            async for data in stream:
                await stream.send_all(data)
            await stream.send_eof()
    except trio.BrokenResourceError:
        pass


@contextlib.asynccontextmanager
async def _terminating(
    directory: Path, application: Callable[[trio.SocketStream], Awaitable[None]] = _echo, drain_after: int = 0
) -> AsyncIterator[tuple[EnvoyPorts, str, hbone.trio.ConnectionPool]]:
    """Envoy in front of an application, and a pool of ours that tunnels to it."""
    _material(directory)
    ports = EnvoyPorts()
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, application, 0)
        port = listeners[0].socket.getsockname()[1]
        bootstrap = config(
            directory,
            ports,
            application=("127.0.0.1", port),
            tunnel_to=("127.0.0.1", 1),
            authority="x:1",
            drain_after=drain_after,
        )
        async with envoy(directory, ports, bootstrap), hbone.trio.ConnectionPool(_source("client")) as pool:
            yield ports, f"127.0.0.1:{port}", pool
        nursery.cancel_scope.cancel()


async def _read(stream: trio.abc.ReceiveStream, nbytes: int) -> bytes:
    data = bytearray()
    while len(data) < nbytes:
        part = await stream.receive_some()
        if not part:
            break
        data += part
    return bytes(data)


async def test_envoy_terminates_a_stream_and_ends_it_from_both_sides(tmp_path: Path) -> None:
    async with _terminating(tmp_path) as (ports, authority, pool):
        stream = await pool.connect(authority, via=("127.0.0.1", ports.hbone), peer=str(ENVOY))
        assert stream.peer == ENVOY
        await stream.send_all(b"hello")
        assert await _read(stream, 5) == b"hello"
        await stream.send_eof()
        assert await stream.receive_some() == b""
        await stream.aclose()


async def test_envoy_answers_after_our_fin(tmp_path: Path) -> None:
    async def count(stream: trio.SocketStream) -> None:
        async with stream:
            total = sum([len(part) async for part in stream])
            await stream.send_all(b"%d" % total)

    async with _terminating(tmp_path, count) as (ports, authority, pool):
        stream = await pool.connect(authority, via=("127.0.0.1", ports.hbone), peer=str(ENVOY))
        await stream.send_all(b"x" * 100_000)
        await stream.send_eof()
        assert b"".join([part async for part in stream]) == b"100000"
        await stream.aclose()


async def test_what_envoys_application_said_before_its_fin_arrives_whole(tmp_path: Path) -> None:
    """Envoy resets a stream whose TCP upstream ends first; by then we have all of it, and a clean end."""

    async def greet(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.send_all(b"bye" * 10_000)

    async with _terminating(tmp_path, greet) as (ports, authority, pool):
        stream = await pool.connect(authority, via=("127.0.0.1", ports.hbone), peer=str(ENVOY))
        assert b"".join([part async for part in stream]) == b"bye" * 10_000
        await stream.aclose()


async def test_frames_over_16_kib_reach_envoy_unharmed(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096 * 8
    async with _terminating(tmp_path) as (ports, authority, pool):
        stream = await pool.connect(authority, via=("127.0.0.1", ports.hbone), peer=str(ENVOY))
        back = b""

        async def receive() -> None:
            nonlocal back
            back = await _read(stream, len(data))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await stream.send_all(data)
        assert back == data
        await stream.aclose()


async def test_a_hundred_streams_at_once_share_one_connection_to_envoy(tmp_path: Path) -> None:
    async with _terminating(tmp_path) as (ports, authority, pool):
        via = ("127.0.0.1", ports.hbone)
        streams = [await pool.connect(authority, via=via, peer=str(ENVOY)) for _ in range(100)]
        for number, stream in enumerate(streams):
            await stream.send_all(b"%03d" % number)
        answers = [await _read(stream, 3) for stream in streams]
        assert answers == [b"%03d" % number for number in range(100)]
        assert _established(ports.hbone) == 1
        for stream in streams:
            await stream.aclose()


async def test_a_draining_envoy_gets_no_new_stream_and_finishes_the_old(tmp_path: Path) -> None:
    async with _terminating(tmp_path, drain_after=3) as (ports, authority, pool):
        via = ("127.0.0.1", ports.hbone)
        old = [await pool.connect(authority, via=via, peer=str(ENVOY)) for _ in range(3)]
        more = [await pool.connect(authority, via=via, peer=str(ENVOY)) for _ in range(4)]
        for stream in [*old, *more]:
            await stream.send_all(b"still here")
            assert await _read(stream, 10) == b"still here"
        assert _established(ports.hbone) > 1
        for stream in [*old, *more]:
            await stream.aclose()


@contextlib.asynccontextmanager
async def _originating(
    directory: Path, handler: Callable[[hbone.trio.HboneStream], Awaitable[None]]
) -> AsyncIterator[EnvoyPorts]:
    """A server of ours, and an Envoy that tunnels plain connections to it."""
    _material(directory)
    ports = EnvoyPorts()
    port = free_port()
    bootstrap = config(
        directory, ports, application=("127.0.0.1", 1), tunnel_to=("127.0.0.1", port), authority="10.0.0.9:8080"
    )
    async with trio.open_nursery() as nursery:

        async def serve(*, task_status: trio.TaskStatus[list[trio.SocketListener]]) -> None:
            await hbone.trio.serve(
                handler,
                _source("server"),
                port=port,
                host="127.0.0.1",
                authorize=hbone.same_trust_domain,
                task_status=task_status,
            )

        await nursery.start(serve)
        async with envoy(directory, ports, bootstrap):
            yield ports
        nursery.cancel_scope.cancel()


async def test_envoy_originates_tunnels_to_our_server(tmp_path: Path) -> None:
    seen: list[tuple[str, str]] = []

    async def handler(stream: hbone.trio.HboneStream) -> None:
        seen.append((str(stream.peer), str(stream.request.authority)))
        async with stream:
            async for data in stream:
                await stream.send_all(data)
            await stream.send_eof()

    async with _originating(tmp_path, handler) as ports:
        streams = [await trio.open_tcp_stream("127.0.0.1", ports.outbound) for _ in range(20)]
        for number, stream in enumerate(streams):
            await stream.send_all(b"%02d" % number)
        assert [await _read(stream, 2) for stream in streams] == [b"%02d" % n for n in range(20)]
        data = b"d" * (4 * MIB)
        async with trio.open_nursery() as both:
            both.start_soon(streams[0].send_all, data)
            assert await _read(streams[0], len(data)) == data
        await streams[0].send_eof()
        assert await streams[0].receive_some() == b""
        for stream in streams:
            await stream.aclose()
    assert seen == [(str(ENVOY), "10.0.0.9:8080")] * 20


async def test_our_server_may_end_its_direction_first_towards_envoy(tmp_path: Path) -> None:
    arrived = bytearray()
    done = trio.Event()

    async def handler(stream: hbone.trio.HboneStream) -> None:
        async with stream:
            await stream.send_all(b"bye")
            await stream.send_eof()
            async for part in stream:
                arrived.extend(part)
        done.set()

    async with _originating(tmp_path, handler) as ports:
        async with await trio.open_tcp_stream("127.0.0.1", ports.outbound) as stream:
            assert b"".join([part async for part in stream]) == b"bye"
            await stream.send_all(b"after your end")
            await stream.send_eof()
            with trio.fail_after(10):
                await done.wait()
    assert arrived == b"after your end"


def _established(port: int) -> int:
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[3] == "01" and int(row[2].rpartition(":")[2], 16) == port for row in rows)
