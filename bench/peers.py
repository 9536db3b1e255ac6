"""Whom we measure: nothing in between, ourselves, Envoy, and whatever `BENCH_PEER` names.

Every pair stands on the same two hosts. The client always connects to the application's own address; a port of its
own for each peer decides, by nftables, whose proxies the connection goes through.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import trio

from hbone.errors import HboneError
from hbone.testing.ca import TestCa
from hbone.testing.envoy import EnvoyPorts, config
from hbone.testing.hosts import NamespaceHost, namespace_obstacle
from hbone.testing.mesh import Mesh, mesh

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["Peer", "bench_hosts"]

OURS, ENVOY, DIRECT = 8080, 8081, 8082
"""The application's ports; each belongs to one peer."""

DOCUMENTS = {
    "bench": """\
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: client, namespace: bench, labels: {app: client}}
spec: {address: "{alpha}", serviceAccount: client}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: server, namespace: bench, labels: {app: server}}
spec: {address: "{beta}", serviceAccount: server}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: clients, namespace: bench}
spec:
  selector: {matchLabels: {app: server}}
  rules:
  - from: [{source: {principals: [cluster.local/ns/bench/sa/client]}}]
"""
}


class BenchError(HboneError):
    """The bench could not be set up."""


@attrs.frozen(kw_only=True)
class Peer:
    """One pair of proxies, or none."""

    name: str
    job: dict[str, Any]
    """What the load process must know to go through it: host, port, perhaps proxy and source."""
    pids: tuple[int, ...] = ()

    def resident(self) -> list[float]:
        """Resident memory of each proxy, in MB."""
        found = []
        for pid in self.pids:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            found.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
        return found


@contextlib.asynccontextmanager
async def bench_hosts(directory: Path) -> AsyncIterator[tuple[list[Peer], list[str]]]:
    """Start every peer that can be had.

    Yields:
        The peers, and the command line that runs a program where the client is.
    """
    namespaces = not namespace_obstacle()
    started = mesh(directory, ["alpha", "beta"], namespaces=namespaces, documents=DOCUMENTS, capture=False)
    async with started as running, contextlib.AsyncExitStack() as stack:
        alpha, beta = running.hosts["alpha"], running.hosts["beta"]
        ports = EnvoyPorts()
        for host in (alpha, beta):
            if isinstance(host, NamespaceHost):
                host.capture(bypass=[DIRECT, ports.hbone], elsewhere={ENVOY: ports.outbound})
        await _application(running, stack)
        await running.add_ztunnel("alpha", ("bench", "client", "client"))
        await running.add_ztunnel("beta", ("bench", "server", "server"))
        pids = tuple(running.ztunnels[name].pid for name in ("alpha", "beta"))
        ours: dict[str, Any] = {"host": beta.address, "port": OURS}
        if not namespaces:
            ours |= {"proxy": (alpha.address, 15080), "source": alpha.address}
        peers = [Peer(name="direct", job={"host": beta.address, "port": DIRECT})]
        peers.append(Peer(name="ours", job=ours, pids=pids))
        envoys = await _envoys(running, directory, ports, stack)
        where = {"host": beta.address, "port": ENVOY} if namespaces else {"host": alpha.address, "port": ports.outbound}
        peers.append(Peer(name="envoy", job=where, pids=tuple(envoys)))
        peers += _named(os.environ.get("BENCH_PEER", ""))
        yield peers, alpha.command(sys.executable)


async def _application(running: Mesh, stack: contextlib.AsyncExitStack) -> None:
    command = [sys.executable, "-m", "bench.application", str(OURS), str(ENVOY), str(DIRECT)]
    process = _process(running.hosts["beta"].command(*command), stack, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with trio.fail_after(10):
        await trio.to_thread.run_sync(process.stdout.readline)


async def _envoys(running: Mesh, directory: Path, ports: EnvoyPorts, stack: contextlib.AsyncExitStack) -> list[int]:
    authority = TestCa()
    pids = []
    for name in ("alpha", "beta"):
        host = running.hosts[name]
        place = directory / f"envoy-{name}"
        place.mkdir()
        issued = authority.issue(uris=[str(authority.id("bench", name))])
        (place / "envoy.pem").write_bytes(issued.cert_pem)
        (place / "envoy.key").write_bytes(issued.key_pem)
        (place / "root.pem").write_bytes(authority.root_pem)
        beta = running.hosts["beta"].address
        bootstrap = config(
            place,
            ports,
            application=(beta, ENVOY),
            tunnel_to=(beta, ports.hbone),
            authority=f"{beta}:{ENVOY}",
            bind=host.address if not running.namespaces else "0.0.0.0",
        )
        binary = Path(sys.executable).with_name("envoy")
        file = place / "envoy.json"
        file.write_text(json.dumps(bootstrap))
        command = [str(binary), "-c", str(file), "--concurrency", "1", "--use-dynamic-base-id", "-l", "error"]
        pids.append(_process(host.command(*command), stack).pid)
    await trio.sleep(2)
    return pids


def _process(
    command: list[str], stack: contextlib.AsyncExitStack, stdout: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.DEVNULL)

    def end() -> None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()

    stack.callback(end)
    return process


def _named(text: str) -> list[Peer]:
    """`name=host:port,pid,pid` of pairs that already run.

    Raises:
        BenchError: another form.
    """
    peers = []
    for item in text.split():
        name, _, rest = item.partition("=")
        where, *pids = rest.split(",")
        host, _, port = where.rpartition(":")
        if not (name and host and port.isdigit() and all(pid.isdigit() for pid in pids)):
            raise BenchError(f"BENCH_PEER has {item!r}; write name=host:port,pid,pid")
        peers.append(Peer(name=name, job={"host": host, "port": int(port)}, pids=tuple(int(pid) for pid in pids)))
    return peers
