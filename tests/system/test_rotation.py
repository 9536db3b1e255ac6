"""A root gives way to another under a mesh that connects all the time: no connection fails."""

from __future__ import annotations

import shutil
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest
import trio
from tests.support.shop import ECHO, NAMESPACES, closest_kind, echo, shop
from tests.support.sizes import FULL, size

from miniistiod.rotation import Step
from miniistiod.store import Store

if TYPE_CHECKING:
    from pathlib import Path

    from hbone.testing.mesh import Mesh

LIFETIME = size(30, 6)
"""Seconds that a certificate lives. A rotation takes about two of them."""
SHORT = {
    "SECRET_TTL": f"{LIFETIME}s",
    # Every connection needs a handshake, or nearly so.
    "POOL_UNUSED_RELEASE_TIMEOUT": "50ms",
    "POOL_MAX_STREAMS_PER_CONNECTION": "1",
}
APPLICATIONS = 4


class Applications:
    """They connect all the time, but while an application's own ztunnel is restarted."""

    def __init__(self, running: Mesh) -> None:
        self._running = running
        self._paused = False
        self._busy = 0
        self.done = 0
        self.failed: list[float] = []

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(APPLICATIONS):
                nursery.start_soon(self._one)

    async def _one(self) -> None:
        while True:
            await trio.sleep(0.1)
            if self._paused:
                continue
            self._busy += 1
            back = await echo(self._running)
            self._busy -= 1
            self.done += 1
            if back != b"hello":
                self.failed.append(time.time())

    async def until_more(self, count: int = 10) -> None:
        goal = self.done + count
        await until(lambda: self.done >= goal)

    async def pause(self) -> None:
        self._paused = True
        await until(lambda: not self._busy)

    def resume(self) -> None:
        self._paused = False


async def until(condition: Any) -> None:
    with trio.fail_after(30 + 10 * LIFETIME):
        while not condition():
            await trio.sleep(0.02)


async def rotate(running: Mesh, *arguments: str) -> None:
    """`miniistiod root rotate`."""
    state = str(running.directory / "state")
    await trio.to_thread.run_sync(lambda: running.cli("root", "rotate", "--state", state, *arguments))


async def restart(running: Mesh, applications: Applications, *, forgets: str) -> None:
    """Both ztunnels end and come back; one of them with its token and the root file only."""
    await applications.pause()

    async def one(name: str) -> None:
        ztunnel = running.ztunnels[name]
        await ztunnel.stop(signal.SIGKILL if name == forgets else signal.SIGTERM)
        if name == forgets:
            shutil.rmtree(running.directory / f"{name}-state")
        ztunnel.start()
        await ztunnel.until_ready()

    async with trio.open_nursery() as nursery:
        for name in running.ztunnels:
            nursery.start_soon(one, name)
    with trio.fail_after(30):  # on a slow machine the certificate of before has ended meanwhile
        while await echo(running) != b"hello":
            await trio.sleep(0.1)
    applications.resume()
    await applications.until_more()


@closest_kind
@pytest.mark.timeout(300)
async def test_no_connection_fails_while_the_root_is_rotated(tmp_path: Path, namespaces: bool) -> None:
    async with shop(tmp_path, namespaces=namespaces, environment=SHORT) as running:
        assert await echo(running) == b"hello"
        applications = Applications(running)
        with Store.open(tmp_path / "state") as store:
            (old,) = store.roots()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(applications.run)
                await applications.until_more()
                await rotate(running, "--skew", "500ms")
                await restart(running, applications, forgets="alpha")
                await until(lambda: (found := store.rotation()) is not None and found.step is Step.SIGNING)
                await applications.until_more()
                await restart(running, applications, forgets="beta")
                if FULL:  # with certificates that live longer than it is away
                    await running.control.stop(signal.SIGKILL)
                    await applications.until_more()
                    await running.start_control_plane()
                await rotate(running, "--finish", "serving")
                await restart(running, applications, forgets="alpha")
                await until(lambda: store.rotation() is None)
                await applications.until_more()
                await restart(running, applications, forgets="beta")
                nursery.cancel_scope.cancel()
            (new,) = store.roots()
        assert new != old
        assert applications.failed == []
        assert applications.done > size(400, 100)


@pytest.mark.skipif(not FULL, reason="takes two lifetimes more; the short run has the rotation with restarts")
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.timeout(300)
async def test_a_connection_outlives_the_root_that_it_was_made_under(tmp_path: Path, workers: int) -> None:
    environment = SHORT if workers == 1 else {**SHORT, "ZTUNNEL_WORKER_THREADS": str(workers)}
    async with shop(tmp_path, namespaces=NAMESPACES, environment=environment) as running:
        long = await running.connect("alpha", running.hosts["beta"].address, ECHO)
        async with long, trio.open_nursery() as nursery:
            await long.send_all(b"begin")
            assert await long.receive_some() == b"begin"
            applications = Applications(running)
            nursery.start_soon(applications.run)
            with Store.open(tmp_path / "state") as store:
                await rotate(running, "--skew", "500ms")
                await until(lambda: (found := store.rotation()) is not None and found.step is Step.SIGNING)
                await applications.until_more()
                await rotate(running, "--finish", "serving")
                await until(lambda: store.rotation() is None)
                await applications.until_more(100)
            await long.send_all(b"still here")
            assert await long.receive_some() == b"still here"
            nursery.cancel_scope.cancel()
        assert applications.failed == []
