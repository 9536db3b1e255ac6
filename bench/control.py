"""miniistiod in a small mesh and a large one: what a change costs it and each of a thousand listeners.

Each size has a control plane of its own, with subscribers over TLS that count what they get. A file with one workload
is replaced again and again, in each mesh in turn; who asked for that workload must get one resource each time,
everybody else nothing. CPU is the control plane's, less what it uses when nothing changes; latency is from the
replacement of the file until the last subscriber has the change, and so contains the debounce (0.2 s and more).
Growth is the median of the ratios of changes that stood side by side.

A long file, because it is one measurement from the documents to the table.
"""

from __future__ import annotations

import contextlib
import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import trio

from bench.errors import BenchError
from bench.measure import HostLoad, host_facts, resident, run_time
from bench.run import progress
from hbone.tls import TlsContext
from hbone.trio.grpc import GrpcClient
from miniistiod import issue_tokens
from miniistiod.catalog import ADDRESS, AUTHORIZATION
from miniistiod.store import Store
from miniistiod.streams import DELTA
from miniistiod.workloads import entry_uid
from ztunnel.wire import discovery_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from hbone.trio.grpc import GrpcStream

__all__ = ["FULL", "QUICK", "Figures", "Scale", "growth", "measure", "run", "table"]

RESULTS = Path(__file__).parent / "results" / "control-plane.json"
NAMESPACE = "shop"
PER_FILE = 100
"""Workloads in a document file."""
IDENTITIES = 20
"""Service accounts that the subscribers share; one of each may open a stream ten times a second."""
AT_ONCE = 16
"""Subscribers that connect at the same time."""
ASKED = 5
"""Workloads that a subscriber on demand asks for."""
HOT_SHARE = 10
"""One of so many subscribers on demand has asked for the workload that changes."""
LARGEST = 1 << 30
GROWTH = 1.3
"""What the cost of one change may grow by when the mesh grows tenfold."""


@attrs.frozen(kw_only=True)
class Scale:
    """How large a run is."""

    sizes: tuple[int, ...]
    """Workloads of each mesh."""
    wildcard: int
    """Subscribers to everything."""
    on_demand: int
    """Subscribers to a few names."""
    changes: int


FULL = Scale(sizes=(10_000, 100_000), wildcard=10, on_demand=990, changes=30)
QUICK = Scale(sizes=(1_000, 10_000), wildcard=3, on_demand=47, changes=10)


@attrs.frozen(kw_only=True)
class Figures:
    """What one mesh cost."""

    workloads: int
    subscribers: int
    start_s: float
    """Until it listens, documents read."""
    start_cpu_s: float
    """CPU of that."""
    start_mb: float
    """Resident memory then."""
    connected_mb: float
    """With all subscribers, each up to date."""
    peak_mb: float
    push_one: float
    """Resources a second to one subscriber to everything."""
    push_all: float
    """Resources a second when all of them ask at once."""
    change_cpu_ms: float
    change_ms: float
    change_bytes: int
    """Of the response that carries the change, without TLS and HTTP/2."""
    idle_cpu: float
    """CPU used when nothing happens, as a share of one core."""


def entry(name: str, address: str) -> str:
    """A workload."""
    return (
        "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\n"
        f"metadata: {{name: {name}, namespace: {NAMESPACE}, labels: {{networking.istio.io/tunnel: http}}}}\n"
        f"spec: {{address: {address}, serviceAccount: s0}}\n"
    )


def address_of(number: int) -> str:
    """Where the workload of a number is."""
    return f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"


def uid(name: str) -> str:
    """A workload's resource name."""
    return entry_uid("Kubernetes", NAMESPACE, name)


def write_documents(directory: Path, count: int) -> None:
    """A mesh of `count` workloads; the last of them, `hot`, in a file of its own."""
    directory.mkdir()
    for first in range(0, count - 1, PER_FILE):
        numbers = range(first, min(first + PER_FILE, count - 1))
        (directory / f"{first:06}.yaml").write_text("---\n".join(entry(f"w{n}", address_of(n)) for n in numbers))
    change_hot(directory, 0)


def change_hot(directory: Path, number: int) -> None:
    """Give `hot` another address."""
    (directory / ".hot").write_text(entry("hot", f"172.16.{number >> 8 & 255}.{number & 255}"))
    (directory / ".hot").rename(directory / "hot.yaml")


@attrs.define(eq=False)
class ControlPlane:
    """The process that is measured."""

    process: subprocess.Popen[bytes]
    state: Path
    documents: Path
    port: int
    start_s: float

    @property
    def pid(self) -> int:
        """Process id."""
        return self.process.pid

    def cpu(self) -> float:
        """Seconds that it has run."""
        return run_time(self.pid)

    def peak(self) -> float:
        """The most memory that was resident since `forget_peak`, in MB."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 / 1e6 for line in text.splitlines() if line.startswith("VmHWM:"))

    def forget_peak(self) -> None:
        """Begin to look for the peak anew."""
        with contextlib.suppress(OSError):  # another user's
            Path(f"/proc/{self.pid}/clear_refs").write_text("5")


@contextlib.asynccontextmanager
async def control_plane(directory: Path, workloads: int) -> AsyncIterator[ControlPlane]:
    """Miniistiod on a mesh of so many workloads.

    Raises:
        BenchError: it did not start.
    """
    documents, state, log = directory / "mesh", directory / "state", directory / "log"
    write_documents(documents, workloads)
    command = [sys.executable, "-m", "miniistiod", "run", "--init", "--config", str(documents), "--state", str(state)]
    command += ["--listen", "127.0.0.1:0", "--monitoring", "127.0.0.1:0", "--log-format", "json", "--log-level", "info"]
    began = time.monotonic()
    process = _spawn(command, log)
    try:
        with trio.fail_after(600):
            while (port := _port(log)) is None:
                if process.poll() is not None:
                    raise BenchError(f"miniistiod ended; its log: {log.read_text(errors='replace')[-2000:]}")
                await trio.sleep(0.02)
        yield ControlPlane(process, state, documents, port, time.monotonic() - began)
    finally:
        process.send_signal(signal.SIGTERM)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(process.wait)


def _spawn(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)


def _port(log: Path) -> int | None:
    for line in log.read_text(errors="replace").splitlines():
        if '"listening"' in line and line.endswith("}"):
            return int(json.loads(line)["addresses"][0].rpartition(":")[2])
    return None


class Subscriber:
    """One ztunnel's stream, as far as it costs the control plane something."""

    def __init__(self, number: int, names: Sequence[str]) -> None:
        self.number = number
        self.names = names
        """What it asks for; nothing means everything."""
        self.responses = 0
        self.resources = 0
        self.nbytes = 0
        self._news = trio.Event()

    async def run(self, port: int, tls: TlsContext, token: str, *, task_status: trio.TaskStatus[Any]) -> None:
        """Connect, subscribe, and take what comes; started once the first answers are there."""
        source = f"127.0.{1 + self.number // 100}.{1 + self.number % 100}"
        socket = await trio.open_tcp_stream("127.0.0.1", port, local_address=source)
        metadata = [("authorization", f"Bearer {token}")]
        async with GrpcClient(socket, tls) as client, client.stream(DELTA, metadata) as stream:
            for url in (AUTHORIZATION, ADDRESS):
                await stream.send(self._request(url))
            for _ in range(2):
                await self._take(stream)
            task_status.started()
            while True:
                await self._take(stream)

    def _request(self, url: str) -> bytes:
        message = pb.DeltaDiscoveryRequest(type_url=url)
        message.node.id = f"ztunnel~10.0.0.1~sub-{self.number}.{NAMESPACE}~{NAMESPACE}.svc.cluster.local"
        message.node.metadata.update({"NAME": f"sub-{self.number}", "NAMESPACE": NAMESPACE})
        if url == ADDRESS:
            message.resource_names_subscribe.extend(self.names)
        return message.SerializeToString()

    async def _take(self, stream: GrpcStream) -> None:
        data = await stream.receive(LARGEST)
        if data is None:
            raise BenchError("the control plane ended a stream")
        response = pb.DeltaDiscoveryResponse.FromString(data)
        acknowledgement = pb.DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
        self.responses += 1
        self.resources += len(response.resources)
        self.nbytes += len(data)
        self._news.set()
        self._news = trio.Event()
        await stream.send(acknowledgement.SerializeToString())

    async def until(self, responses: int) -> None:
        """Wait for so many responses."""
        while self.responses < responses:
            await self._news.wait()


@attrs.define(eq=False)
class Crowd:
    """Everybody who listens."""

    port: int
    tls: TlsContext
    tokens: list[str]
    nursery: trio.Nursery
    members: list[Subscriber] = attrs.Factory(list)

    async def join(self, names: Sequence[Sequence[str]]) -> float:
        """More subscribers, a few at a time; how many seconds it took until all were up to date."""
        began = time.monotonic()
        limiter = trio.CapacityLimiter(AT_ONCE)
        numbers = range(len(self.members), len(self.members) + len(names))
        new = [Subscriber(number, wanted) for number, wanted in zip(numbers, names, strict=True)]

        async def one(subscriber: Subscriber) -> None:
            async with limiter:
                token = self.tokens[subscriber.number % len(self.tokens)]
                await self.nursery.start(subscriber.run, self.port, self.tls, token)

        with trio.fail_after(600):
            async with trio.open_nursery() as joining:
                for subscriber in new:
                    joining.start_soon(one, subscriber)
        self.members += new
        return time.monotonic() - began

    def counts(self) -> list[tuple[int, int, int]]:
        """Responses, resources and bytes of each."""
        return [(one.responses, one.resources, one.nbytes) for one in self.members]


def tokens_of(state: Path) -> Iterator[str]:
    """Reusable tokens, one for each identity."""
    with Store.open(state) as store:
        for number in range(IDENTITIES):
            yield issue_tokens.create(
                store,
                namespace=NAMESPACE,
                service_account=f"s{number}",
                name=None,
                lifetime=None,
                reusable=True,
                now=time.time(),
            ).text


def wanted(number: int, workloads: int) -> list[str]:
    """What a subscriber on demand asks for."""
    names = [uid(f"w{(number * 7919 + n * 104_729) % (workloads - 1)}") for n in range(ASKED)]
    return [*names[1:], uid("hot")] if number % HOT_SHARE == 0 else names


@attrs.frozen(kw_only=True)
class Change:
    """What one change cost."""

    cpu: float
    """Seconds that the control plane ran, whatever it did."""
    watched: float
    """Seconds of which that was measured."""
    took: float
    """Seconds until the last subscriber had it."""
    nbytes: int
    """Of the response that carries it."""


@attrs.define(eq=False)
class Mesh:
    """One mesh with its control plane, everybody connected."""

    workloads: int
    cp: ControlPlane
    crowd: Crowd
    known: dict[str, float]
    """What was measured so far, by the field of `Figures`."""
    changes: list[Change] = attrs.Factory(list)
    idle: list[tuple[float, float]] = attrs.Factory(list)
    """CPU seconds and seconds of the pauses between them."""

    async def change(self) -> None:
        """Change one workload once more, after a pause."""
        self.idle.append(await _pause(self.cp))
        self.changes.append(await _change(self.cp, self.crowd, len(self.changes) + 1))

    @property
    def idle_cpu(self) -> float:
        """CPU seconds a second, while nothing changes."""
        return sum(cpu for cpu, _ in self.idle) / sum(seconds for _, seconds in self.idle)

    def cpu_of_changes(self) -> list[float]:
        """CPU seconds of each change, without what is used anyhow."""
        idle = self.idle_cpu
        return [item.cpu - idle * item.watched for item in self.changes]

    def figures(self) -> Figures:
        """All that was measured."""
        return Figures(
            **self.known,
            workloads=self.workloads,
            subscribers=len(self.crowd.members),
            peak_mb=self.cp.peak(),
            change_cpu_ms=statistics.median(self.cpu_of_changes()) * 1000,
            change_ms=statistics.median(item.took for item in self.changes) * 1000,
            change_bytes=self.changes[-1].nbytes,
            idle_cpu=self.idle_cpu,
        )


@contextlib.asynccontextmanager
async def mesh(directory: Path, workloads: int, scale: Scale) -> AsyncIterator[Mesh]:
    """A mesh of so many workloads, with all subscribers.

    Raises:
        BenchError: a subscriber to everything did not get everything.
    """
    progress(f"{workloads} workloads: start")
    async with control_plane(directory, workloads) as cp, trio.open_nursery() as nursery:
        known = {"start_s": cp.start_s, "start_cpu_s": cp.cpu(), "start_mb": resident([cp.pid])}
        tls = TlsContext.client(None, roots=(cp.state / "root-cert.pem").read_bytes(), server_name="localhost")
        crowd = Crowd(cp.port, tls, list(tokens_of(cp.state)), nursery)
        cp.forget_peak()
        progress(f"{workloads} workloads: subscribers to everything")
        known["push_one"] = workloads / await crowd.join([()])
        known["push_all"] = workloads * (scale.wildcard - 1) / await crowd.join([()] * (scale.wildcard - 1))
        for subscriber in crowd.members:
            if subscriber.resources != workloads:
                raise BenchError(f"a subscriber to everything got {subscriber.resources} of {workloads} resources")
        progress(f"{workloads} workloads: subscribers on demand")
        await crowd.join([wanted(number, workloads) for number in range(scale.on_demand)])
        known["connected_mb"] = resident([cp.pid])
        yield Mesh(workloads, cp, crowd, known)
        nursery.cancel_scope.cancel()


async def _pause(cp: ControlPlane) -> tuple[float, float]:
    """CPU seconds of a pause, and how long it was."""
    before, began = cp.cpu(), time.monotonic()
    await trio.sleep(1)
    return cp.cpu() - before, time.monotonic() - began


async def _change(cp: ControlPlane, crowd: Crowd, number: int) -> Change:
    """Change the workload that some asked for; everybody must get what they should, and nothing else."""
    concerned = {one for one in crowd.members if not one.names or uid("hot") in one.names}
    before = crowd.counts()
    cpu, began = cp.cpu(), time.monotonic()
    change_hot(cp.documents, number)
    with trio.fail_after(60):
        for one, (responses, _, _) in zip(crowd.members, before, strict=True):
            if one in concerned:
                await one.until(responses + 1)
    took = time.monotonic() - began
    await trio.sleep(0.2)  # acknowledgements, and whatever should not come
    used, watched = cp.cpu() - cpu, time.monotonic() - began
    size = 0
    for one, old, new in zip(crowd.members, before, crowd.counts(), strict=True):
        responses, resources, nbytes = (b - a for a, b in zip(old, new, strict=True))
        expected = one in concerned
        if (responses, resources) != (expected, expected) or (not expected and nbytes):
            raise BenchError(
                f"one workload changed, and a subscriber {'on demand' if one.names else 'to everything'} got"
                f" {responses} responses with {resources} resources instead of {int(expected)}"
            )
        size = max(size, nbytes)
    return Change(cpu=used, watched=watched, took=took, nbytes=size)


ROWS = (
    ("start_s", "documents read, listening after", "s", "{:.1f}"),
    ("start_cpu_s", "CPU of that", "s", "{:.1f}"),
    ("start_mb", "memory then", "MB", "{:.0f}"),
    ("connected_mb", "with all subscribers", "MB", "{:.0f}"),
    ("peak_mb", "at most", "MB", "{:.0f}"),
    ("push_one", "everything to one subscriber", "resources/s", "{:,.0f}"),
    ("push_all", "everything to all of them at once", "resources/s", "{:,.0f}"),
    ("change_cpu_ms", "one workload changed: CPU", "ms", "{:.1f}"),
    ("change_ms", "until the last one had it", "ms", "{:.0f}"),
    ("change_bytes", "bytes for each who has it", "B", "{}"),
    ("idle_cpu", "CPU when nothing changes", "of a core", "{:.1%}"),
)


def table(found: Sequence[Figures], grown: dict[str, float], scale: Scale) -> str:
    """The figures for a terminal."""
    lines = [
        f"miniistiod: {scale.wildcard} subscribers to everything, {scale.on_demand} on demand,"
        f" each with TLS and a connection of its own; medians of {scale.changes} changes"
    ]
    head = "".join(f"{item.workloads:>12,}" for item in found)
    lines.append(f"{'workloads':<36}{'':<12}{head}")
    for field, title, unit, form in ROWS:
        values = "".join(f"{form.format(getattr(item, field)):>12}" for item in found)
        lines.append(f"{title:<36}{unit:<12}{values}")
    factor = found[-1].workloads / found[0].workloads
    lines.append(
        f"a mesh {factor:g} times as large, one change: CPU x {grown['cpu']:.2f}, time x {grown['time']:.2f}"
        f" (limit {GROWTH})"
    )
    return "\n".join(lines)


def growth(small: Mesh, large: Mesh) -> dict[str, float]:
    """What a change costs in the large mesh, in those of the small one: medians of changes that were made in turn."""
    cpu = zip(small.cpu_of_changes(), large.cpu_of_changes(), strict=True)
    took = zip(small.changes, large.changes, strict=True)
    return {
        "cpu": statistics.median(after / before for before, after in cpu),
        "time": statistics.median(after.took / before.took for before, after in took),
    }


async def measure(directory: Path, scale: Scale) -> tuple[list[Figures], dict[str, float]]:
    """Measure every size; the figures, and how the cost of a change grew.

    Raises:
        BenchError: a control plane did not start, or a subscriber got what it should not have.
    """
    async with contextlib.AsyncExitStack() as stack:
        meshes = []
        for size in scale.sizes:
            (directory / f"{size}").mkdir()
            meshes.append(await stack.enter_async_context(mesh(directory / f"{size}", size, scale)))
        for number in range(scale.changes):
            progress(f"change {number + 1} of {scale.changes}")
            for one in meshes:
                await one.change()
        progress("")
        return [one.figures() for one in meshes], growth(meshes[0], meshes[-1])


async def run(directory: Path, scale: Scale) -> int:
    """Measure, print and write.

    Returns:
        The exit code: 1 when a change costs more in a larger mesh than it may.
    """
    load = HostLoad()
    found, grown = await measure(directory, scale)
    print(table(found, grown, scale))
    shares = load.shares()
    print("noise: " + ", ".join(f"{name} {value:.1%}" for name, value in shares.items()))
    written = {
        "host": host_facts(),
        "noise": {name: round(value, 4) for name, value in shares.items()},
        "scale": attrs.asdict(scale),
        "meshes": [attrs.asdict(item) for item in found],
        "growth": grown,
    }
    RESULTS.write_text(json.dumps(written, indent=1) + "\n")
    print(f"written: {RESULTS.relative_to(RESULTS.parent.parent.parent)}")
    return 1 if grown["cpu"] > GROWTH else 0
