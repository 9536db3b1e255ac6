"""A second ztunnel takes over under load: nobody is refused, reset, or left without an answer."""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from tests.support.daemon import exchange
from tests.support.dns import ask_from
from tests.support.load import Load
from tests.support.shop import echo, shop, until
from tests.support.sizes import FULL, size

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hbone.testing.hosts import Host
    from hbone.testing.mesh import Mesh, Ztunnel

COUNT = size(2000, 50)
"""Connections before, between and after, at 200 a second as far as the machine can."""

PARTNER = """\
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: partner, namespace: shop}
spec:
  hosts: [api.partner.example]
  addresses: [240.240.0.9]
  ports: [{number: 9000, name: tcp, protocol: TCP}]
  resolution: STATIC
  endpoints: [{address: "{beta}"}]
"""

pytestmark = pytest.mark.timeout(900 if COUNT > 200 else 240)


def successor(running: Mesh, host: str, **environment: str) -> Ztunnel:
    """Start a ztunnel that takes over from the one of `host`."""
    old = running.ztunnels[host]
    new = attrs.evolve(
        old,
        command=[sys.executable, "-m", "ztunnel", "run", "--take-over"],
        environment=old.environment | environment,
        log=old.log.with_name(f"{host}-after-{old.pid}.log"),
        process=None,
    )
    new.start()
    running.ztunnels[f"{host}, {new.pid}"] = new  # so that it is ended at the end
    return new


async def replaced(running: Mesh, host: str, new: Ztunnel) -> None:
    old = running.ztunnels[host]
    await new.until_logged(60, message="took over")
    assert await until(lambda: not old.running, seconds=60), old.tail()
    assert old.process is not None
    assert old.process.returncode == 0
    running.ztunnels[f"{host}, {old.pid}"], running.ztunnels[host] = old, new


async def page(ztunnel: Ztunnel, port: int, path: str) -> Any:
    code, body = await ztunnel.http(port, path)
    assert code == 200, (code, body)
    return json.loads(body) if body.startswith("{") else body


async def take_turns(running: Mesh, load: Load, turns: list[tuple[str, str]]) -> None:
    """Replace the ztunnel of a host by one with so many workers, one after the other."""
    for host, workers in turns:
        await load.more(COUNT)
        await replaced(running, host, successor(running, host, ZTUNNEL_WORKER_THREADS=workers))
    await load.more(COUNT)
    load.stop()


async def answered(ask: Callable[[], list[str]], wanted: list[str]) -> bool:
    return await trio.to_thread.run_sync(ask) == wanted


async def poll_pages(ztunnel: Ztunnel, done: trio.Event) -> int:
    """Ask for readiness and metrics all the while; how often."""
    count = 0
    host = ztunnel.host
    while not done.is_set():
        for port, path, wanted in ((15021, "/healthz/ready", "ready\n"), (15020, "/metrics", "istio_build")):
            with trio.fail_after(60):
                stream = await host.connect(host.proxy_address, port, source=host.source_address)
                code, body = await exchange(stream, path)
            assert (code, wanted in body) == (200, True)
        count += 1
        await trio.sleep(0.1)
    return count


async def ask_names(host: Host, done: trio.Event) -> None:
    """Ask the DNS proxy all the while."""
    while not done.is_set():
        for tcp in (False, True):
            ask = partial(ask_from, host.make, host.address, "api.partner.example", tcp=tcp, port=15053)
            assert await trio.to_thread.run_sync(ask) == ["240.240.0.9"]
        await trio.sleep(0.02)


async def test_both_sides_are_taken_over_at_200_connects_a_second(tmp_path: Path) -> None:
    """The pages and the DNS proxy answer all the while, too."""
    settings = {"CONNECTION_TERMINATION_DEADLINE": "20s"}
    async with shop(tmp_path, namespaces=False, environment=settings, documents={"partner": PARTNER}) as running:
        alpha = running.hosts["alpha"]
        ask = partial(ask_from, alpha.make, alpha.address, "api.partner.example", tcp=False, port=15053)
        assert await until(partial(answered, ask, ["240.240.0.9"]))
        load, done = Load(running), trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.run)
            nursery.start_soon(poll_pages, running.ztunnels["alpha"], done)
            nursery.start_soon(poll_pages, running.ztunnels["beta"], done)
            nursery.start_soon(ask_names, alpha, done)
            await take_turns(running, load, [("beta", "1"), ("alpha", "1")])
            done.set()
        assert load.failed == []
        assert len(load.attempts) >= 3 * COUNT
        for host in ("alpha", "beta"):
            samples = await running.ztunnels[host].metrics()
            opened = [value for name, value in samples.items() if name.startswith("istio_tcp_connections_opened_total")]
            assert sum(opened) >= COUNT


@pytest.mark.netns
async def test_captured_hosts_are_taken_over_by_more_and_by_fewer_workers(tmp_path: Path) -> None:
    settings = {"CONNECTION_TERMINATION_DEADLINE": "20s", "ZTUNNEL_WORKER_THREADS": "2"}
    turns = [("beta", "2"), ("alpha", "1"), ("alpha", "2"), ("beta", "3"), ("beta", "1")]
    async with shop(tmp_path, namespaces=True, environment=settings) as running:
        load = Load(running)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.run)
            await take_turns(running, load, turns if FULL else turns[:2])
        assert load.failed == []


async def test_what_is_open_is_served_on_by_the_old_one(tmp_path: Path) -> None:
    async with shop(tmp_path, namespaces=False, environment={"CONNECTION_TERMINATION_DEADLINE": "60s"}) as running:
        streams = [await running.connect("alpha", running.hosts["beta"].address, 9000) for _ in range(2)]
        for stream in streams:
            await stream.send_all(b"before")
            assert await stream.receive_some() == b"before"
        olds = {host: running.ztunnels[host] for host in ("alpha", "beta")}
        for host in olds:
            new = successor(running, host, CONNECTION_TERMINATION_DEADLINE="1s")
            await new.until_logged(60, message="took over")
            running.ztunnels[host] = new
        for stream in streams:
            await stream.send_all(b"after")
            assert await stream.receive_some() == b"after"
        for host, old in olds.items():
            assert old.running
            await old.until_logged(60, message="draining")
            found = await page(running.ztunnels[host], 15000, "/status")
            assert (found["pid"], found["state"]) == (running.ztunnels[host].pid, "ready")
            assert (tmp_path / f"{host}-state" / "admin.sock").is_socket()
        assert await echo(running) == b"hello"
        for stream in streams:
            await stream.aclose()
        for host, old in olds.items():
            assert await until(lambda: not old.running, seconds=30), old.tail()  # noqa: B023
            assert (tmp_path / f"{host}-state" / "admin.sock").is_socket()
        stream = await running.connect("alpha", running.hosts["beta"].address, 9000)
        await stream.send_all(b"held")
        assert await stream.receive_some() == b"held"
        await replaced(running, "beta", successor(running, "beta"))  # the one before has its deadline
        await stream.aclose()


async def test_one_that_does_not_get_ready_leaves_the_old_one_alone(tmp_path: Path) -> None:
    async with shop(tmp_path, namespaces=False) as running:
        old = running.ztunnels["beta"]
        unknown = successor(running, "beta", PROXY_WORKLOAD_INFO="shop/nobody/nobody")
        assert unknown.process is not None
        assert await trio.to_thread.run_sync(unknown.process.wait) == 3
        assert "does not know workload shop/nobody/nobody" in unknown.tail()
        await old.until_logged(60, message="did not take over")
        assert await echo(running) == b"hello"

        wrong = successor(running, "beta", ZTUNNEL_DNS_SERVERS="nonsense")
        assert wrong.process is not None
        assert await trio.to_thread.run_sync(wrong.process.wait) == 2
        assert await echo(running) == b"hello"

        listener = await running.hosts["beta"].listen(15999)  # takes connections, and says nothing
        silent = f"https://{running.hosts['beta'].address}:15999"
        waiting = {"XDS_ADDRESS": silent, "PROXY_WORKLOAD_INFO": "shop/nobody/nobody"}
        stuck = successor(running, "beta", **waiting)
        await old.until_logged(60, pid=stuck.pid)
        assert stuck.process is not None
        stuck.process.kill()
        await old.until_logged(60, message="did not take over", error=lambda text: text == "it ended")
        assert await echo(running) == b"hello"
        assert old.running

        # The old one dies while the new one is not ready yet: connections wait, and none is refused.
        late = successor(running, "beta", XDS_ADDRESS=silent)
        await old.until_logged(60, pid=late.pid)
        assert old.process is not None
        old.process.kill()
        await trio.to_thread.run_sync(old.process.wait)
        with trio.fail_after(60):
            stream = await running.connect("alpha", running.hosts["beta"].address, 9000)
            async with stream:
                await stream.send_all(b"patience")
                assert await stream.receive_some() == b"patience"
        await late.until_logged(60, message="took over")
        await listener.aclose()
