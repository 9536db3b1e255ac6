"""`make bench`: our proxies beside others, in turns, in one table."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import trio

from bench.load import WORKLOADS
from bench.peers import Peer, bench_hosts
from hbone.errors import HboneError

RESULTS = Path(__file__).parent / "results" / "latest.json"
Samples = dict[str, dict[str, list[dict[str, float]]]]
"""By workload and peer, one sample a round."""


def unit(workload: str) -> tuple[str, float]:
    """What CPU is counted per, and how many units make one of it."""
    return ("s/GB", 1e9) if workload.startswith("bulk") else ("us", 1e6)


class LoadProcess:
    """The client process; answers one job at a time."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen([*command, "-m", "bench.load"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    async def run(self, peer: Peer, workload: str, seconds: float) -> dict[str, float]:
        """One turn of one peer.

        Raises:
            HboneError: the load could not be driven through it.
        """
        job = {**peer.job, "workload": workload, "seconds": seconds, "pids": list(peer.pids)}
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(job).encode() + b"\n")
        stdin.flush()
        with trio.fail_after(seconds + 120):
            answer: dict[str, Any] = json.loads(await trio.to_thread.run_sync(stdout.readline, abandon_on_cancel=True))
        if "error" in answer:
            raise HboneError(f"{workload} through {peer.name}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


def figures(samples: list[dict[str, float]], workload: str) -> dict[str, dict[str, float]]:
    """Median and best of each figure over the rounds."""
    _, scale = unit(workload)
    columns: dict[str, list[float]] = {
        "per_second": [s["units"] / s["seconds"] for s in samples],
        "cpu": [(s["user"] + s["system"]) / s["units"] * scale for s in samples],
        "user": [s["user"] / s["units"] * scale for s in samples],
        "system": [s["system"] / s["units"] * scale for s in samples],
        "p50_us": [s["p50"] * 1e6 for s in samples],
        "p99_us": [s["p99"] * 1e6 for s in samples],
        "p999_us": [s["p999"] * 1e6 for s in samples],
    }
    best = {name: (max if name == "per_second" else min) for name in columns}
    return {name: {"median": statistics.median(v), "best": best[name](v)} for name, v in columns.items()}


def ratio(samples: Samples, workload: str, ours: str, theirs: str) -> float:
    """Median over the rounds of our CPU to theirs, turn beside turn."""
    pairs = zip(samples[workload][ours], samples[workload][theirs], strict=True)
    found = []
    for a, b in pairs:
        mine, other = (a["user"] + a["system"]) / a["units"], (b["user"] + b["system"]) / b["units"]
        if other:
            found.append(mine / other)
    return statistics.median(found) if found else math.nan


def table(samples: Samples, peers: list[Peer]) -> str:
    """The table that people read."""
    head = f"{'workload':13} {'peer':8} {'per second':>13} {'CPU':>12} {'user':>8} {'system':>8}"
    lines = [f"{head} {'p50':>8} {'p99':>8}  ours/it"]
    for workload, by_peer in samples.items():
        label, _ = unit(workload)
        for peer in peers:
            f = {name: value["median"] for name, value in figures(by_peer[peer.name], workload).items()}
            rate = f"{f['per_second'] / 1e6:10.0f} MB" if workload.startswith("bulk") else f"{f['per_second']:13.0f}"
            costs = f"{f['cpu']:7.2f} {label:4} {f['user']:8.2f} {f['system']:8.2f}" if peer.pids else " " * 30
            times = f"{f['p50_us']:8.0f} {f['p99_us']:8.0f}" if f["p50_us"] else " " * 17
            share = f"{ratio(samples, workload, 'ours', peer.name):8.2f}" if peer.pids and peer.name != "ours" else ""
            lines.append(f"{workload:13} {peer.name:8} {rate} {costs} {times} {share}".rstrip())
    return "\n".join(lines)


async def bench(options: argparse.Namespace) -> int:
    """Measure and print; write `results/latest.json`.

    Returns:
        The exit code.
    """
    seconds, rounds = (0.4, 3) if options.quick else (options.seconds, options.rounds)
    names = options.workload or list(WORKLOADS)
    with tempfile.TemporaryDirectory(prefix="hbone-bench-") as directory:
        async with bench_hosts(Path(directory)) as (peers, command):
            load = LoadProcess(command)
            samples: Samples = {name: {peer.name: [] for peer in peers} for name in names}
            try:
                for turn in range(rounds):
                    for workload in names:
                        for peer in peers:
                            _progress(f"round {turn + 1}/{rounds}: {workload} through {peer.name}")
                            samples[workload][peer.name].append(await load.run(peer, workload, seconds))
            finally:
                load.close()
            memory = {peer.name: peer.resident() for peer in peers if peer.pids}
    _progress("")
    print(table(samples, peers))
    for name, values in memory.items():
        print(f"memory        {name:8} {' '.join(f'{value:.0f}' for value in values)} MB resident, after the load")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(_document(samples, peers, memory, rounds), indent=1) + "\n")
    print(f"written to {RESULTS.relative_to(Path.cwd()) if RESULTS.is_relative_to(Path.cwd()) else RESULTS}")
    return 0


def _document(samples: Samples, peers: list[Peer], memory: dict[str, list[float]], rounds: int) -> dict[str, Any]:
    with open("/proc/cpuinfo") as cpuinfo:
        model = next((line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")), "unknown")
    others = [peer.name for peer in peers if peer.pids and peer.name != "ours"]
    return {
        "host": {
            "cpu": model,
            "cores": os.cpu_count(),
            "kernel": platform.release(),
            "python": platform.python_version(),
        },
        "rounds": rounds,
        "peers": {
            peer.name: {w: figures(by_peer[peer.name], w) for w, by_peer in samples.items()}
            | {"rss_mb": memory.get(peer.name, [])}
            for peer in peers
        },
        "ratio_to": {other: {w: ratio(samples, w, "ours", other) for w in samples} for other in others},
    }


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three short rounds, under a minute")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each peer (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of one turn (%(default)s)")
    parser.add_argument("--workload", action="append", choices=list(WORKLOADS), help="only this one; may be repeated")
    try:
        code = trio.run(bench, parser.parse_args())
    except KeyboardInterrupt:
        code = 130
    except HboneError as problem:
        print(f"make bench: {problem}", file=sys.stderr)
        code = 1
    raise SystemExit(code)
