"""The run: stages, rounds, turns, and what is measured beside them."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from typing import IO, TYPE_CHECKING, Any

import attrs
import trio

from bench import crowd, policy
from bench.catalogue import WORKLOADS, Workload, of_stage
from bench.errors import BenchError
from bench.figures import OURS, Facts, Limits, Round, Sample, Samples, quietest
from bench.measure import HostLoad, cpu, machine_ticks, spawn, stolen
from bench.peers import POLICIES, Peer, Plan, Stage, policies, stage
from hbone.testing.mesh import CONTROL_PLANE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

__all__ = ["LoadProcess", "Outcome", "progress", "run"]

PER_FILE = 2000
"""Workloads in one document file of a push."""
TUNNELS_GONE = 1.5
"""Seconds after which idle tunnels of the stage `tunnels` are closed, so that none is used again."""


@attrs.define
class Outcome:
    """What a run found."""

    plan: Plan
    samples: Samples = attrs.field(factory=dict)
    facts: Facts = attrs.field(factory=dict)
    host: dict[str, float] = attrs.field(factory=dict)
    """Shares of the machine that went elsewhere."""
    steal: list[float] = attrs.field(factory=list)
    """The hypervisor's share of each round that counts."""
    again: int = 0
    """Rounds that do not count, of all workloads."""
    versions: dict[str, str] = attrs.field(factory=dict)
    notes: list[str] = attrs.field(factory=list)
    """What could not be measured, and why."""
    peers: list[str] = attrs.field(factory=list)

    def add(self, workload: str, peer: str, sample: dict[str, float]) -> None:
        """Keep a sample."""
        self.samples.setdefault(workload, {}).setdefault(peer, []).append(sample)

    def fact(self, name: str, peer: str, value: float) -> None:
        """Keep a fact."""
        self.facts.setdefault(name, {}).setdefault(peer, []).append(value)

    def note(self, text: str) -> None:
        """Keep a note, once."""
        if text not in self.notes:
            self.notes.append(text)


def progress(text: str) -> None:
    """Say on a terminal what is being done."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


class LoadProcess:
    """The client process; answers one job at a time."""

    def __init__(self, command: list[str]) -> None:
        self.process = spawn(command)

    async def do(
        self, peer: Peer, runner: str, arguments: dict[str, Any], seconds: float = 0.0, until: str = ""
    ) -> dict[str, float]:
        """One job.

        Raises:
            BenchError: the load could not be driven through the peer.
        """
        job = {**peer.job, "runner": runner, "arguments": arguments, "seconds": seconds, "pids": list(peer.pids)}
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(job | {"until": until}).encode() + b"\n")
        stdin.flush()
        line = await _line(stdout, seconds + 180)
        if not line:
            raise BenchError(f"{runner} through {peer.name}: no answer from the load process")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(f"{runner} through {peer.name}: {answer['error']}")
        return answer

    async def turn(self, peer: Peer, workload: Workload, seconds: float) -> dict[str, float]:
        """One turn of one peer."""
        return await self.do(peer, workload.runner, workload.arguments, seconds * workload.longer)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


async def run(directory: Path, plan: Plan) -> Outcome:
    """All stages.

    Raises:
        HboneError: a peer did not start, or no load could be driven through ours.
    """
    outcome = Outcome(plan)
    chosen = list(plan.workloads)
    watched = HostLoad()
    for name, measure in (("load", _load), ("tunnels", _tunnels), ("scale", _scale)):
        workloads = of_stage(name, chosen)  # type: ignore[arg-type]
        if not workloads:
            continue
        progress(f"starting the peers: {name}")
        async with stage(directory / name, name, plan) as running:  # type: ignore[arg-type]
            load = LoadProcess(running.load)
            try:
                outcome.versions |= running.versions
                outcome.peers += [peer.name for peer in running.peers if peer.name not in outcome.peers]
                for peer in running.peers:
                    for seconds in peer.started:
                        outcome.fact("start_s", peer.name, seconds)
                await measure(outcome, running, load, workloads)
            finally:
                load.close()
    outcome.host = watched.shares()
    if outcome.steal:
        outcome.host["steal"] = statistics.fmean(outcome.steal)
    if outcome.again:
        outcome.note(f"made again because the hypervisor took more than {Limits().steal:.0%}: {outcome.again} rounds")
    progress("")
    return outcome


async def _rounds(outcome: Outcome, running: Stage, load: LoadProcess, workloads: list[Workload]) -> None:
    """Peers take turns; a peer other than ours that fails once at a workload is left out of it from then on.

    Rounds of which the hypervisor took more than its limit are made again while the plan has some to spare.
    """
    plan, limit = outcome.plan, Limits().steal
    lost: set[tuple[str, str]] = set()
    made: dict[str, list[Round]] = {workload.name: [] for workload in workloads}
    for number in range(plan.rounds + plan.spare):
        extra = number - plan.rounds + 1
        which = f"once more ({extra})" if extra > 0 else f"round {number + 1}/{plan.rounds}"
        for workload in workloads:
            so_far = made[workload.name]
            if number >= plan.rounds and all(one.steal <= limit for one in quietest(so_far, plan.rounds)):
                continue
            if workload.runner == "handshakes":
                await trio.sleep(TUNNELS_GONE)
            samples: dict[str, Sample] = {}
            before = machine_ticks()
            for peer in running.peers:
                if (workload.name, peer.name) in lost or not (peer.pids or workload.direct):
                    continue
                progress(f"{which}: {workload.name} through {peer.name}")
                try:
                    samples[peer.name] = await load.turn(peer, workload, plan.seconds)
                except BenchError as error:
                    if peer.name == OURS:
                        raise
                    lost.add((workload.name, peer.name))
                    outcome.note(f"left out: {error}")
            so_far.append(Round(stolen(before), samples))
    for name, rounds in made.items():
        outcome.again += len(rounds) - plan.rounds
        for one in quietest(rounds, plan.rounds):
            outcome.steal.append(one.steal)
            for peer_name, sample in one.samples.items():
                if (name, peer_name) not in lost:
                    outcome.add(name, peer_name, sample)


def _each(value: float, peer: Peer) -> float:
    return value / len(peer.pids)


async def _load(outcome: Outcome, running: Stage, load: LoadProcess, workloads: list[Workload]) -> None:
    await trio.sleep(0.5)
    for peer in running.peers:
        if peer.pids:
            outcome.fact("rss_idle_mb", peer.name, _each(peer.resident(), peer))
    await _rounds(outcome, running, load, workloads)
    for peer in running.peers:
        if peer.pids:
            outcome.fact("rss_mb", peer.name, _each(peer.resident(), peer))


async def _hold(outcome: Outcome, load: LoadProcess, peer: Peer, count: int, fact: str) -> bool:
    """Hold `count` connections open through a peer and see what memory they take; whether that worked."""
    before = peer.resident()
    try:
        await load.do(peer, "hold", {"count": count})
    except BenchError as error:
        await load.do(peer, "release", {})
        if peer.name == OURS:
            raise
        outcome.note(f"left out: {count} idle connections: {error}")
        return False
    await trio.sleep(0.5)
    outcome.fact(fact, peer.name, (peer.resident() - before) * 1e3 / count)
    return True


async def _tunnels(outcome: Outcome, running: Stage, load: LoadProcess, workloads: list[Workload]) -> None:
    """Every connection has a tunnel of its own."""
    if not outcome.plan.workloads:
        for peer in running.peers:
            if peer.pids:
                progress(f"idle tunnels through {peer.name}")
                if await _hold(outcome, load, peer, outcome.plan.idle_tunnels, "idle_tunnel_kb"):
                    await load.do(peer, "release", {})
    await _rounds(outcome, running, load, workloads)


async def _scale(outcome: Outcome, running: Stage, load: LoadProcess, workloads: list[Workload]) -> None:
    """Policies, a hostile peer, idle streams, a push."""
    plan = outcome.plan
    for value in policy.microseconds(POLICIES, plan.rounds):
        outcome.fact("policy_us", OURS, value)
    if not plan.workloads:
        progress(f"a mesh of {plan.pushed:,} workloads")
        sizes = (plan.pushed, plan.pushed // 10)
        found = await trio.to_thread.run_sync(crowd.figures, plan.rounds, *sizes)
        for fact, each in found.items():
            for value in each:
                outcome.fact(fact, OURS, value)
    chosen = {workload.name for workload in workloads}
    await _rounds(outcome, running, load, [w for w in workloads if w.name == "steady"])
    if "steady_flood" in chosen:
        await _flooded(outcome, running, load)
    if "connect_policies" in chosen:
        running.mesh.apply("policies", policies(POLICIES).rpartition("---")[0])
        await _until_known(running, "policies", POLICIES)
        await _rounds(outcome, running, load, [WORKLOADS["connect_policies"]])
    if not {"steady_idle", "steady_push"} & chosen:
        return
    for peer in running.peers:
        if not peer.pids:
            continue
        progress(f"{plan.idle_streams} idle streams through {peer.name}")
        if await _hold(outcome, load, peer, plan.idle_streams, "idle_stream_kb"):
            for _ in range(plan.rounds):
                sample = await load.turn(peer, WORKLOADS["steady_idle"], plan.seconds)
                outcome.add("steady_idle", peer.name, sample)
            if peer.name == OURS and "steady_push" in chosen:
                await _push(outcome, running, load, peer)
            await load.do(peer, "release", {})


async def _flooded(outcome: Outcome, running: Stage, load: LoadProcess) -> None:
    """Steady round trips while a hostile peer floods the server's proxy."""
    workload, plan = WORKLOADS["steady_flood"], outcome.plan
    for number in range(plan.rounds):
        for peer in running.peers:
            if peer.tunnel is None or peer.hostile is None:
                continue
            progress(f"round {number + 1}/{plan.rounds}: a hostile peer at {peer.name}")
            async with _hostile(running, peer) as result:
                sample = await load.turn(peer, workload, plan.seconds)
            if not result.get("bytes"):
                raise BenchError(f"the hostile peer of {peer.name} got rid of nothing")
            outcome.add(workload.name, peer.name, sample)


async def _line(stream: IO[bytes], timeout: float = 30.0) -> bytes:
    """A line that a process of the bench writes; empty when it ended, or wrote none within `timeout` seconds."""
    with trio.move_on_after(timeout):
        return await trio.to_thread.run_sync(stream.readline, abandon_on_cancel=True)
    return b""


@contextlib.asynccontextmanager
async def _hostile(running: Stage, peer: Peer) -> AsyncIterator[dict[str, int]]:
    """Flood a peer's tunnel port from another host for the body; fills in afterwards what was sent."""
    result: dict[str, int] = {}
    assert peer.tunnel is not None
    assert peer.hostile is not None
    host, port = peer.tunnel
    credentials = peer.hostile
    arguments = [host, str(port), str(credentials.cert), str(credentials.key), str(credentials.roots)]
    authority = f"{peer.job['host']}:{peer.job['port']}"
    command = running.mesh.hosts[CONTROL_PLANE].command(sys.executable, "-m", "bench.flood", *arguments, authority)
    process = spawn(command)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if not await _line(process.stdout):
            raise BenchError(f"the hostile peer of {peer.name} did not get through")
        yield result
        process.stdin.close()
        result |= json.loads(await _line(process.stdout) or b"{}")
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


async def _until_known(running: Stage, what: str, count: int, *, every: float = 0.2, timeout: float = 600.0) -> float:
    """Wait until both our proxies know `count` of something, asking `every` so many seconds; how long it took.

    Raises:
        BenchError: they don't within `timeout` seconds.
    """
    began = time.perf_counter()
    with trio.move_on_after(timeout):
        waiting = dict(running.mesh.ztunnels)
        while waiting:
            for name, daemon in list(waiting.items()):
                status, body = await daemon.http(15000, "/status")
                if status == 200 and json.loads(body)["mesh"][what] >= count:
                    del waiting[name]
            await trio.sleep(every)
        return time.perf_counter() - began
    raise BenchError(f"{count} {what} were not known to both proxies within {timeout:.0f} s")


async def _push(outcome: Outcome, running: Stage, load: LoadProcess, peer: Peer) -> None:
    """Put a crowd of workloads into force while round trips go on; nobody talks to them.

    The control plane, which has a machine of its own anywhere else, gives way to those who are measured here.
    """
    count = outcome.plan.pushed
    mesh = running.mesh
    for thread in os.listdir(f"/proc/{mesh.control.pid}/task"):
        os.setpriority(os.PRIO_PROCESS, int(thread), 19)
    stop = mesh.directory / "pushed"
    ready = mesh.directory / "crowd"
    ready.mkdir()
    for first in range(0, count, PER_FILE):
        numbers = range(first, min(first + PER_FILE, count))
        (ready / f"crowd-{first:06}.yaml").write_text("---\n".join(map(_crowd, numbers)))
    workload = WORKLOADS["steady_push"]
    before = cpu(peer.pids)

    async def push() -> None:
        for file in sorted(ready.iterdir()):
            file.rename(mesh.documents / file.name)
        progress(f"{count} workloads are pushed")
        try:
            outcome.fact("push_s", OURS, await _until_known(running, "workloads", count, every=1.0))
            outcome.fact("push_cpu_us", OURS, cpu(peer.pids).since(before).total / count * 1e6)
        finally:
            stop.touch()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(push)
        sample = await load.do(peer, workload.runner, workload.arguments, 900.0, until=str(stop))
        outcome.add(workload.name, OURS, sample)


def _crowd(number: int) -> str:
    address = f"10.{100 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"
    return (
        "apiVersion: networking.istio.io/v1\n"
        "kind: WorkloadEntry\n"
        f"metadata: {{name: crowd-{number}, namespace: crowd, labels: {{app: crowd-{number % 100}}}}}\n"
        f"spec: {{address: {address}, serviceAccount: crowd-{number % 100}}}\n"
    )
