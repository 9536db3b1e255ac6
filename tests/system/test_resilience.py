"""What goes on when a part of the mesh is away."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
import trio
from tests.support.shop import DENY_ALL, ECHO, echo, kinds, shop, until
from tests.support.sizes import size

if TYPE_CHECKING:
    from pathlib import Path

    from hbone.testing.mesh import Mesh


async def _answered(running: Mesh) -> bool:
    return await echo(running) == b"hello"


async def _refused(running: Mesh) -> bool:
    return await echo(running) == b""


async def _kept(running: Mesh, host: str, name: str, *words: bytes) -> bool:
    """Whether a file of a host's ztunnel comes to have all of `words`: a thread writes it a moment later."""
    path = running.directory / f"{host}-state" / name

    def has() -> bool:
        return path.exists() and all(word in path.read_bytes() for word in words)

    return await until(has)


@kinds
async def test_traffic_goes_on_without_the_control_plane(tmp_path: Path, namespaces: bool) -> None:
    async with shop(tmp_path, namespaces=namespaces) as running:
        stream = await running.connect("alpha", running.hosts["beta"].address, ECHO)
        async with stream:
            await stream.send_all(b"first")  # once this is back, both ends have their certificates
            assert await stream.receive_some() == b"first"
            await running.control.stop(signal.SIGKILL)
            await stream.send_all(b"still")
            assert await stream.receive_some() == b"still"
        assert await echo(running) == b"hello"
        for host, ztunnel in running.ztunnels.items():  # both ends forget everything that is not on disk
            assert await _kept(running, host, "svid.pem", b"CERTIFICATE")
            assert await _kept(running, host, "mesh.snapshot", b"client", b"orders")
            await ztunnel.stop(signal.SIGKILL)
            ztunnel.start()
            await ztunnel.until_ready()
        assert await until(lambda: _answered(running))
        await running.start_control_plane()
        running.apply("closed", DENY_ALL)
        assert await until(lambda: _refused(running), seconds=30)


@kinds
async def test_a_policy_outlives_a_restart_without_the_control_plane(tmp_path: Path, namespaces: bool) -> None:
    async with shop(tmp_path, namespaces=namespaces, documents={"closed": DENY_ALL}) as running:
        assert await echo(running) == b""
        assert await _kept(running, "beta", "mesh.snapshot", b"orders", b"closed")
        await running.control.stop(signal.SIGKILL)
        beta = running.ztunnels["beta"]
        await beta.stop(signal.SIGKILL)
        beta.start()
        await beta.until_ready()
        assert await echo(running) == b""


@kinds
@pytest.mark.timeout(300)
async def test_certificates_rotate_under_load_and_no_connection_fails(tmp_path: Path, namespaces: bool) -> None:
    short = {"SECRET_TTL": "4s", "POOL_UNUSED_RELEASE_TIMEOUT": "1s", "POOL_MAX_STREAMS_PER_CONNECTION": "4"}
    async with shop(tmp_path, namespaces=namespaces, environment=short) as running:
        failed = done = 0
        with trio.move_on_after(size(60, 12)):
            while True:
                async with trio.open_nursery() as nursery:

                    async def one() -> None:
                        nonlocal failed, done
                        back = await echo(running)
                        done += 1
                        failed += back != b"hello"

                    for _ in range(8):
                        nursery.start_soon(one)
        assert done > 50
        assert failed == 0
        rotated = [record for record in running.ztunnels["alpha"].records() if "svid_rotated" in str(record)]
        assert len(rotated) >= 3
