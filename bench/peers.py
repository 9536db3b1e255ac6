"""Whom we measure: nothing in between, ourselves, Envoy, a Rust ztunnel, and whatever `BENCH_PEER` names.

Every stage has hosts and processes of its own. The client always connects to the application's own address; a port of
its own for each peer decides, by nftables, whose proxies the connection goes through.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import trio

from bench import rust
from bench.envoys import BINARY, Credentials, EnvoyPair
from bench.errors import BenchError
from bench.figures import DIRECT, OURS
from bench.measure import resident, spawn
from hbone.testing.envoy import EnvoyPorts
from hbone.testing.hosts import NamespaceHost
from hbone.testing.mesh import CONTROL_PLANE, Daemon, Mesh, mesh
from hbone.version import VERSION

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from bench.catalogue import Stage as StageName
    from hbone.testing.hosts import Host

__all__ = ["ENVOY", "RUST", "Peer", "Plan", "Stage", "named", "stage"]

ENVOY, RUST = "envoy", "ztunnel-rs"
PORTS = {OURS: 8080, ENVOY: 8081, DIRECT: 8082, RUST: 8080}
"""The application's ports; which one decides whose proxies a connection goes through."""
POLICIES = 1000
COMPILED = Path(__file__).parents[1] / "build" / "compiled"
"""What `make compiled` makes."""
LOOPBACK = "127.0.79"
"""Where loopback hosts are; not where tests and demos have theirs."""

WORKLOADS = """\
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: {name}, namespace: bench, labels: {{app: {app}}}}}
spec: {{address: "{{{host}}}", serviceAccount: {account}}}
"""
POLICY = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: {name}, namespace: bench}}
spec:
  selector: {{matchLabels: {{app: server}}}}
  rules:
  - from: [{{source: {{principals: ["cluster.local/ns/bench/sa/{account}"]}}}}]
"""


@attrs.frozen(kw_only=True)
class Plan:
    """What a run is to be like."""

    namespaces: bool
    rounds: int
    seconds: float
    """Length of a turn."""
    idle_streams: int
    idle_tunnels: int
    pushed: int
    """Workloads that are pushed at once."""
    workers: int = 1
    """Worker threads or processes of each proxy."""
    spare: int = 0
    """Rounds of a workload that may be made again because the hypervisor took too much of the machine."""
    workloads: tuple[str, ...] = ()
    """Only these, where any are named."""
    pure: bool = False
    """Our data path as plain Python, though it may be there compiled."""


@attrs.frozen(kw_only=True)
class Peer:
    """One pair of proxies, or none."""

    name: str
    job: dict[str, Any]
    """What the load process must know to go through it: host, port, perhaps proxy, source and namespace."""
    pids: tuple[int, ...] = ()
    """The daemons, the client's first."""
    started: tuple[float, ...] = ()
    """Seconds that each took until it was ready."""
    tunnel: tuple[str, int] | None = None
    """Where its server takes tunnels, if a hostile peer may try."""
    hostile: Credentials | None = None
    """Certificate of that peer."""

    def resident(self) -> float:
        """Resident memory of both proxies, in MB."""
        return resident(self.pids)


@attrs.frozen(kw_only=True)
class Stage:
    """Peers that run, and the mesh that ours belong to."""

    peers: list[Peer]
    mesh: Mesh
    load: list[str]
    """Command line that runs the load process where the client is."""
    versions: dict[str, str]

    def peer(self, name: str) -> Peer | None:
        """The peer of that name, if it is here."""
        return next((peer for peer in self.peers if peer.name == name), None)


def policies(count: int) -> str:
    """Documents of `count` policies, of which the last, by name too, allows the client."""
    accounts = [f"other-{number}" for number in range(count - 1)] + ["client"]
    return "---\n".join(
        POLICY.format(name="clients" if account == "client" else f"a-{number:05}", account=account)
        for number, account in enumerate(accounts)
    )


def _documents(with_rust: bool) -> dict[str, str]:
    entries = [("client", "alpha", "client"), ("server", "beta", "server"), ("mallory", CONTROL_PLANE, "mallory")]
    if with_rust:
        entries += [("rs-client", "gamma", "client"), ("rs-server", "delta", "server")]
    made = [WORKLOADS.format(name=name, host=host, account=account, app=account) for name, host, account in entries]
    return {"bench": "---\n".join([*made, policies(1)])}


def compiled() -> dict[str, str]:
    """The environment with which our commands run compiled; empty where nobody has compiled them."""
    return {"PYTHONPATH": str(COMPILED)} if any(COMPILED.glob("ztunnel/dataplane/*.so")) else {}


@contextlib.asynccontextmanager
async def stage(directory: Path, name: StageName, plan: Plan) -> AsyncIterator[Stage]:
    """Start every peer that can be had, as `name` wants them.

    Raises:
        HboneError: one did not start.
    """
    os.mkdir(directory)
    binary = rust.binary()
    if binary is not None and not plan.namespaces:
        raise BenchError(f"{rust.VARIABLE} is set, but its ports are fixed, so it needs namespaces: run this as root")
    names = ["alpha", "beta"] + ["gamma", "delta"] * (binary is not None)
    documents = _documents(binary is not None)
    async with (
        mesh(
            directory, names, namespaces=plan.namespaces, documents=documents, capture=False, loopback=LOOPBACK
        ) as running,
        contextlib.AsyncExitStack() as stack,
    ):
        alpha, beta = running.hosts["alpha"], running.hosts["beta"]
        ports = envoy_ports(alpha, beta)
        _prepare(running, ports)
        await _application(beta, list({*PORTS.values()}), stack)
        environment = {"ZTUNNEL_WORKER_THREADS": str(plan.workers)} | ({} if plan.pure else compiled())
        if name == "tunnels":
            environment["POOL_MAX_STREAMS_PER_CONNECTION"] = "1"
            environment["POOL_UNUSED_RELEASE_TIMEOUT"] = "100ms"
        peers = [Peer(name=DIRECT, job={"host": beta.address, "port": PORTS[DIRECT]})]
        versions = {OURS: f"{VERSION} ({'compiled' if 'PYTHONPATH' in environment else 'plain Python'})"}
        hostile = name == "scale"
        peers.append(await _ours(running, environment, hostile))
        if BINARY.exists():
            peers.append(await _envoys(running, directory, ports, name, plan, stack))
            versions[ENVOY] = _envoy_version()
        if binary is not None:
            await _application(running.hosts["delta"], [PORTS[RUST]], stack)
            environment |= rust.environment(plan.workers)
            peers.append(await _rust(running, binary, environment, peers[1].hostile))
            versions[RUST] = rust.version(binary)
        if name == "load":
            peers += named(os.environ.get("BENCH_PEER", ""))
        yield Stage(
            peers=peers,
            mesh=running,
            load=[*alpha.command(sys.executable), "-m", "bench.load"],
            versions=versions,
        )


def free_port(first: int, *addresses: str) -> int:
    """The next port from `first` that none of the addresses uses; below those that connections get by themselves.

    Raises:
        BenchError: a hundred are taken.
    """
    for port in range(first, first + 100):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for address in addresses:
                stack.enter_context(socket.create_server((address, port)))
            return port
    raise BenchError(f"the ports {first} to {first + 99} are taken")


def envoy_ports(*hosts: Host) -> EnvoyPorts:
    """Where the Envoys of these hosts can listen."""
    addresses = [] if any(isinstance(host, NamespaceHost) for host in hosts) else [host.address for host in hosts]
    ports = EnvoyPorts()
    ports.hbone, ports.outbound = free_port(12_000, *addresses), free_port(12_300, *addresses)
    ports.admin = free_port(12_600, "127.0.0.1")
    return ports


def _envoy_version() -> str:
    done = subprocess.run([BINARY, "--version"], capture_output=True, text=True, timeout=10, check=False)
    return next((part for part in done.stdout.split("/") if part.count(".") == 2), "of unknown version")


def _prepare(running: Mesh, ports: EnvoyPorts) -> None:
    """Captures, and room for as many connections as are wanted."""
    for name, host in running.hosts.items():
        if not isinstance(host, NamespaceHost):
            continue
        if name != CONTROL_PLANE:
            host.capture(bypass=[PORTS[DIRECT], ports.hbone], elsewhere={PORTS[ENVOY]: ports.outbound}, dns=None)
        settings = "echo 16384 65000 > ip_local_port_range; echo 1 > tcp_tw_reuse"
        subprocess.run(host.command("sh", "-c", f"cd /proc/sys/net/ipv4; {settings}"), check=True, timeout=10)


async def _application(host: Host, ports: list[int], stack: contextlib.AsyncExitStack) -> None:
    command = host.command(sys.executable, "-m", "bench.application", host.address, *map(str, ports))
    process = spawn(command)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()

    def end() -> None:
        process.terminate()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()

    stack.callback(end)
    with trio.fail_after(10):
        await trio.to_thread.run_sync(process.stdout.readline)


async def _ours(running: Mesh, environment: dict[str, str], hostile: bool) -> Peer:
    alpha, beta = running.hosts["alpha"], running.hosts["beta"]
    started = []
    for host, account in (("beta", "server"), ("alpha", "client")):
        daemon = await running.add_ztunnel(host, ("bench", account, account), environment=environment, wait=False)
        began = time.perf_counter()
        await daemon.until_ready()
        started.append(time.perf_counter() - began)
    job: dict[str, Any] = {"host": beta.address, "port": PORTS[OURS]}
    if not running.namespaces:
        job |= {"proxy": (alpha.address, 15080), "source": alpha.address}
    return Peer(
        name=OURS,
        job=job,
        pids=tuple(running.ztunnels[name].pid for name in ("alpha", "beta")),
        started=tuple(started),
        tunnel=(beta.address, 15008),
        hostile=await trio.to_thread.run_sync(_enroll_hostile, running) if hostile else None,
    )


def _enroll_hostile(running: Mesh) -> Credentials:
    """A certificate of the mesh for the one who will misbehave."""
    token, state = running.directory / "mallory.token", running.directory / "mallory-state"
    where = ["--state", str(running.directory / "state"), "--namespace", "bench", "--service-account", "mallory"]
    running.cli("token", "create", *where, "--name", "mallory", "--out", str(token))
    host = running.hosts[CONTROL_PLANE]
    command = [sys.executable, "-m", "ztunnel", "enroll", "--server", running.server, "--token-file", str(token)]
    environment = {**os.environ, "ZTUNNEL_STATE_DIR": str(state)}
    done = subprocess.run(
        host.command(*command), env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    if done.returncode:
        raise BenchError(f"the hostile peer could not be enrolled: {done.stderr.strip()}")
    return Credentials(state / "svid.pem", state / "svid.pem", state / "roots.pem")


async def _envoys(
    running: Mesh, directory: Path, ports: EnvoyPorts, name: StageName, plan: Plan, stack: contextlib.AsyncExitStack
) -> Peer:
    alpha, beta = running.hosts["alpha"], running.hosts["beta"]
    pair = EnvoyPair(directory, ports, plan.workers)
    settings: dict[str, Any] = {"policies": POLICIES if name == "scale" else 1}
    if name == "tunnels":
        settings |= {"streams": 1, "reuse": False}
    started: list[float] = []
    pids: list[int] = []
    for host, account in ((beta, "server"), (alpha, "client")):
        bind = "0.0.0.0" if running.namespaces else host.address
        daemon = pair.daemon(account, host, beta, PORTS[ENVOY], bind, **settings)
        daemon.start()
        began = time.perf_counter()
        stack.push_async_callback(daemon.stop, timeout=5)
        await _until_ready(daemon, ports.admin)
        started.append(time.perf_counter() - began)
        pids.insert(0, daemon.pid)
        if not running.namespaces:
            ports.admin = free_port(12_600, "127.0.0.1")  # both stand on one loopback
    job = {"host": beta.address, "port": PORTS[ENVOY]}
    if not running.namespaces:
        job = {"host": alpha.address, "port": ports.outbound}
    return Peer(
        name=ENVOY,
        job=job,
        pids=tuple(pids),
        started=tuple(started),
        tunnel=(beta.address, ports.hbone),
        hostile=pair.credentials("mallory"),
    )


async def _until_ready(daemon: Daemon, port: int) -> None:
    with trio.move_on_after(30):
        while daemon.running:
            status, _ = await daemon.http(port, "/ready", address="127.0.0.1")
            if status == 200:
                return
            await trio.sleep(0.05)
    raise BenchError(f"{daemon.name} did not become ready; its log: {daemon.tail()}")


async def _rust(running: Mesh, binary: Path, environment: dict[str, str], hostile: Credentials | None) -> Peer:
    gamma, delta = running.hosts["gamma"], running.hosts["delta"]
    started: list[float] = []
    pids: list[int] = []
    for host, name, account in (("delta", "rs-server", "server"), ("gamma", "rs-client", "client")):
        workload = ("bench", name, account)
        daemon = await running.add_ztunnel(
            host, workload, environment=environment, command=rust.command(binary), wait=False
        )
        began = time.perf_counter()
        await daemon.until_ready()
        started.append(time.perf_counter() - began)
        pids.insert(0, daemon.pid)
    assert isinstance(gamma, NamespaceHost)
    return Peer(
        name=RUST,
        job={"host": delta.address, "port": PORTS[RUST], "netns": f"/run/netns/{gamma.namespace}"},
        pids=tuple(pids),
        started=tuple(started),
        tunnel=(delta.address, 15008),
        hostile=hostile,
    )


def named(text: str) -> list[Peer]:
    """`name=host:port,pid,pid` of pairs that already run, in the network namespace of the first pid.

    Raises:
        BenchError: another form, or a process that isn't there.
    """
    peers = []
    for item in text.split():
        name, _, rest = item.partition("=")
        where, *pids = rest.split(",")
        host, _, port = where.rpartition(":")
        if not (name and host and port.isdigit() and all(pid.isdigit() for pid in pids)):
            raise BenchError(f"BENCH_PEER has {item!r}; write name=host:port,pid,pid")
        for pid in pids:
            if not os.path.exists(f"/proc/{pid}"):
                raise BenchError(f"BENCH_PEER has {item!r}, but there is no process {pid}")
        job: dict[str, Any] = {"host": host.strip("[]"), "port": int(port)}
        if pids:
            job["netns"] = f"/proc/{pids[0]}/ns/net"
        peers.append(Peer(name=name, job=job, pids=tuple(map(int, pids))))
    return peers
