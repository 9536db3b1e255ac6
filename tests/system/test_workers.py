"""A mesh whose ztunnels have four workers each, under load: what changes, dies and drains costs nobody else a byte."""

from __future__ import annotations

import json
import os
import signal
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
from tests.support.load import Load
from tests.support.shop import DENY_ALL, ECHO, echo, shop, until
from tests.support.sizes import FULL, size

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hbone.testing.mesh import Mesh, Ztunnel

WORKERS = 4
COUNT = size(2000, 100)
"""Connections between two events."""
ALLOW = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: some, namespace: shop}
spec:
  selector: {matchLabels: {app: orders}}
  action: ALLOW
  rules: [{from: [{source: {principals: ["cluster.local/ns/shop/sa/client"]}}]}]
"""

pytestmark = pytest.mark.timeout(900 if COUNT > 100 else 180)


ENVIRONMENT = {"ZTUNNEL_WORKER_THREADS": str(WORKERS), "SECRET_TTL": "6s", "CONNECTION_TERMINATION_DEADLINE": "20s"}


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Mesh]:
    async with shop(tmp_path, namespaces=False, environment=ENVIRONMENT) as running:
        yield running


async def page(ztunnel: Ztunnel, path: str) -> Any:
    code, body = await ztunnel.http(15000, path)
    assert code == 200
    return json.loads(body)


async def workers(ztunnel: Ztunnel) -> list[dict[str, Any]]:
    return list((await page(ztunnel, "/status"))["workers"])


def total(samples: dict[str, float], name: str, *labels: str) -> float:
    found: list[float] = [
        value for key, value in samples.items() if key.startswith(name) and all(label in key for label in labels)
    ]
    return sum(found)


def completed(ztunnel: Ztunnel) -> list[dict[str, Any]]:
    """Lines of the access log, which a thread writes a moment later."""
    return [record for record in ztunnel.records() if record.get("message") == "connection complete"]


def rotations(ztunnel: Ztunnel) -> int:
    return sum(record.get("message") == "svid_rotated" for record in ztunnel.records())


async def settled(ztunnel: Ztunnel) -> None:
    assert await until(lambda: _idle(ztunnel))


async def _idle(ztunnel: Ztunnel) -> bool:
    return not any((await page(ztunnel, "/status"))["connections"].values())


async def test_changes_under_load_lose_nothing_and_metrics_are_what_the_client_counted(running: Mesh) -> None:
    alpha, beta = running.ztunnels["alpha"], running.ztunnels["beta"]
    load = Load(running)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(load.run)
        await load.more(COUNT)
        running.apply("some", ALLOW)
        assert await until(lambda: total_policies(beta), seconds=20)
        await load.more(COUNT)
        running.withdraw("some")
        seen = rotations(alpha), rotations(beta)
        assert await until(lambda: rotations(alpha) > seen[0] + 1 and rotations(beta) > seen[1] + 1, seconds=30)
        await load.more(COUNT)
        load.stop()
    assert load.failed == []
    await settled(alpha)
    await settled(beta)
    count = len(load.attempts)
    sent = sum(attempt.sent for attempt in load.attempts)
    for ztunnel, reporter in ((alpha, 'reporter="source"'), (beta, 'reporter="destination"')):
        samples = await ztunnel.metrics()
        mutual = 'connection_security_policy="mutual_tls"'
        assert total(samples, "istio_tcp_connections_opened_total", reporter, mutual) == count
        assert total(samples, "istio_tcp_connections_closed_total", reporter, mutual) == count
        assert total(samples, "istio_tcp_connections_failed_total", reporter) == 0
        assert total(samples, "istio_tcp_sent_bytes_total", reporter, mutual) == sent
        assert total(samples, "istio_tcp_received_bytes_total", reporter, mutual) == sent
        assert samples["ztunnel_worker_restarts_total"] == 0
        assert await until(lambda: len(completed(ztunnel)) == count), len(completed(ztunnel))  # noqa: B023
    shares = [worker["opened"] for worker in await workers(alpha)]
    assert sum(shares) == count
    if count >= 1000:
        assert all(abs(share - count / WORKERS) <= count / WORKERS / 4 for share in shares), shares
    await _deny(running)


async def _deny(running: Mesh) -> None:
    """A denial is in force in every worker: for what lives, and for what comes."""
    beta = running.ztunnels["beta"]
    streams = [await running.connect("alpha", running.hosts["beta"].address, ECHO) for _ in range(40)]
    for stream in streams:
        await stream.send_all(b"x")
        assert await stream.receive_some() == b"x"
    running.apply("closed", DENY_ALL)
    for stream in streams:  # whichever worker has it
        with trio.fail_after(20):
            try:
                assert await stream.receive_some() == b""
            except trio.BrokenResourceError:
                pass
        await stream.aclose()
    assert [await echo(running) for _ in range(40)] == [b""] * 40
    assert await until(lambda: _idle(beta))
    assert total(await beta.metrics(), "ztunnel_policy_change_closures_total") == 40


async def total_policies(ztunnel: Ztunnel) -> bool:
    return bool((await page(ztunnel, "/status"))["mesh"]["policies"])


async def test_a_killed_worker_costs_its_own_connections_and_no_other(tmp_path: Path) -> None:
    few = {"POOL_MAX_STREAMS_PER_CONNECTION": "2"}  # many tunnels, so that they are surely not all of one worker
    async with shop(tmp_path, namespaces=False, environment=ENVIRONMENT | few) as running:
        alpha = running.ztunnels["alpha"]
        fine = made = 0
        for host in ("alpha", "beta"):
            load, held = await _kill_one(running, host)
            made += len(load.attempts) + held
            fine += len(load.attempts) - len(load.failed) + held
        await settled(alpha)
        samples = await alpha.metrics()
        opened = total(samples, "istio_tcp_connections_opened_total", 'reporter="source"')
        assert fine <= opened <= made
        assert total(samples, "istio_tcp_connections_closed_total", 'reporter="source"') == opened


async def _kill_one(running: Mesh, host: str) -> tuple[Load, int]:
    victim = running.ztunnels[host]
    await settled(victim)
    load = Load(running)
    held = [await running.connect("alpha", running.hosts["beta"].address, ECHO) for _ in range(24)]
    for stream in held:
        await stream.send_all(b"x")
        assert await stream.receive_some() == b"x"
    dumped = (await page(victim, "/config_dump"))["connections"]["outbound" if host == "alpha" else "inbound"]
    chosen = max(range(WORKERS), key=lambda number: sum(entry["worker"] == number for entry in dumped))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(load.run)
        await load.more(COUNT)
        (pid,) = [worker["pid"] for worker in await workers(victim) if worker["worker"] == chosen]
        os.kill(pid, signal.SIGKILL)
        died = await victim.until_logged(message="a worker died and is replaced")
        assert died["reason"] == "SIGKILL"
        assert await until(lambda: _all_serve(victim))
        await load.more(COUNT)
        load.stop()
    moment = datetime.fromisoformat(died["time"]).timestamp()
    assert [attempt for attempt in load.failed if attempt.began > moment] == []
    assert len(load.failed) <= load.limit
    lost = 0
    for stream in held:
        with trio.fail_after(10):
            try:
                await stream.send_all(b"y")
                lost += await stream.receive_some() != b"y"
            except trio.BrokenResourceError:
                lost += 1
        await stream.aclose()
    assert lost <= sum(entry["worker"] == chosen for entry in dumped)
    assert 0 < lost < len(held)
    assert total(await victim.metrics(), "ztunnel_worker_restarts_total") == 1
    assert (await workers(victim))[chosen]["restarts"] == 1
    return load, len(held)


async def _all_serve(ztunnel: Ztunnel) -> bool:
    return all(worker["state"] == "serving" for worker in await workers(ztunnel))


@pytest.mark.parametrize("host", ["alpha", "beta"] if FULL else ["alpha"])
async def test_a_drain_reaches_every_worker_and_open_connections_finish(running: Mesh, host: str) -> None:
    ztunnel = running.ztunnels[host]
    load = Load(running, hold=0.2)
    held = [await running.connect("alpha", running.hosts["beta"].address, ECHO) for _ in range(24)]
    for stream in held:
        await stream.send_all(b"x")
        assert await stream.receive_some() == b"x"
    processes = [worker["pid"] for worker in await workers(ztunnel)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(load.run)
        await load.more(COUNT)
        assert ztunnel.process is not None
        ztunnel.process.send_signal(signal.SIGTERM)
        await ztunnel.until_logged(message="draining")
        for stream in held:
            await stream.send_all(b"y")
            assert await stream.receive_some() == b"y"
            await stream.send_eof()
            assert await stream.receive_some() == b""
            await stream.aclose()
        load.stop()
    moment = datetime.fromisoformat((await ztunnel.until_logged(message="draining"))["time"]).timestamp()
    assert [attempt for attempt in load.failed if attempt.accepted and attempt.began < moment] == []
    assert await until(lambda: not ztunnel.running, seconds=30)
    assert ztunnel.process.returncode == 0
    assert not [pid for pid in processes if await trio.Path(f"/proc/{pid}").exists()]
    assert not [record for record in ztunnel.records() if "deadline" in record.get("message", "")]
    if host == "alpha":
        assert len(completed(ztunnel)) >= len([attempt for attempt in load.attempts if attempt.accepted]) + len(held)
        await _kill_parent(running)


async def _kill_parent(running: Mesh) -> None:
    """A parent that is killed takes its workers with it."""
    beta = running.ztunnels["beta"]
    processes = [worker["pid"] for worker in await workers(beta)]
    await beta.stop(signal.SIGKILL)

    def gone() -> bool:
        return not [pid for pid in processes if _runs(pid)]

    assert await until(gone)
    beta.start()  # the addresses are free
    await beta.until_ready()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
