"""What the kernel says: CPU and memory of processes, and how busy the machine was."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "Cpu",
    "HostLoad",
    "cpu",
    "descendants",
    "host_facts",
    "machine_ticks",
    "raise_descriptor_limit",
    "resident",
    "spawn",
    "stolen",
]

HERTZ = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
_SCHEDULER_CLOCK = 2
"""Source: linux/posix-timers.h, CPUCLOCK_SCHED: the exact sum of run time, threads that ended included."""


@attrs.frozen
class Cpu:
    """CPU time, in seconds."""

    user: float = 0.0
    system: float = 0.0

    def since(self, before: Cpu) -> Cpu:
        """What was used since `before`."""
        return Cpu(self.user - before.user, self.system - before.system)

    @property
    def total(self) -> float:
        """User and system together."""
        return self.user + self.system


def run_time(pid: int) -> float:
    """Seconds that a process has run, to the nanosecond; 0 when it is gone."""
    try:
        return time.clock_gettime((~pid << 3) | _SCHEDULER_CLOCK)
    except OSError:
        return 0.0


def ticks(pid: int) -> tuple[int, int]:
    """User and system ticks (10 ms each) of a process, all its threads; 0 when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0, 0
    return int(fields[11]), int(fields[12])


class CpuReading:
    """A moment of some processes; two of them make a `Cpu`."""

    def __init__(self, pids: Iterable[int]) -> None:
        """Read now.

        Args:
            pids: the processes; their descendants count too.
        """
        everyone = {one for pid in pids for one in (pid, *descendants(pid))}
        self.run_times = {pid: run_time(pid) for pid in everyone}
        self.ticks = {pid: ticks(pid) for pid in everyone}

    def since(self, before: CpuReading) -> Cpu:
        """What was used since `before`.

        The total is exact. Its parts are as the kernel's ticks have them, so of a turn of a second they are known to
        about a hundredth of it.
        """
        total = sum(now - before.run_times.get(pid, 0.0) for pid, now in self.run_times.items() if now)
        user = system = 0
        for pid, (mine, kernels) in self.ticks.items():
            was = before.ticks.get(pid, (0, 0))
            user += max(0, mine - was[0])
            system += max(0, kernels - was[1])
        share = user / (user + system) if user + system else 0.5
        return Cpu(total * share, total * (1 - share))


def cpu(pids: Iterable[int]) -> CpuReading:
    """The CPU time of processes and their descendants, now."""
    return CpuReading(pids)


def descendants(pid: int) -> list[int]:
    """Every process that `pid` started, and those that these started."""
    found: list[int] = []
    todo = [pid]
    while todo:
        one = todo.pop()
        try:
            threads = list(Path(f"/proc/{one}/task").iterdir())
            children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
        except OSError:
            continue
        found += children
        todo += children
    return found


def resident(pids: Iterable[int]) -> float:
    """Resident memory of processes and their descendants together, in MB (10^6 bytes).

    Pages that several of them share count once: the proportional size is asked for where the kernel has it.
    """
    total = 0.0
    for pid in pids:
        family = [pid, *descendants(pid)]
        total += sum(_resident(one) if len(family) == 1 else _proportional(one) for one in family)
    return total


def _resident(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / 1e6
    except OSError:
        return 0.0


def _proportional(pid: int) -> float:
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return _resident(pid)
    return next((int(line.split()[1]) * 1024 / 1e6 for line in rollup.splitlines() if line.startswith("Pss:")), 0.0)


def machine_ticks() -> list[int]:
    """Ticks of all cores: user, nice, system, idle, iowait, irq, softirq, steal."""
    with open("/proc/stat") as stat:
        return [int(value) for value in stat.readline().split()[1:9]]


def stolen(before: list[int]) -> float:
    """Share of the machine that the hypervisor took since `machine_ticks` gave `before`."""
    ticks = [now - was for now, was in zip(machine_ticks(), before, strict=True)]
    return ticks[7] / (sum(ticks) or 1)


class HostLoad:
    """How much of the machine went to others while we measured."""

    def __init__(self) -> None:
        """Begin to watch."""
        self._machine = machine_ticks()
        self._own = self._ours()

    @staticmethod
    def _ours() -> float:
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        me = os.getpid()
        return run_time(me) + sum(map(run_time, descendants(me))) + ended.ru_utime + ended.ru_stime

    def shares(self) -> dict[str, float]:
        """Of the whole machine: `steal`, taken by the hypervisor; `foreign`, used by processes that are not ours."""
        user, nice, system, idle, wait, irq, softirq, steal = (
            now - before for now, before in zip(machine_ticks(), self._machine, strict=True)
        )
        busy = user + nice + system + irq + softirq
        whole = busy + idle + wait + steal
        if not whole:
            return {"steal": 0.0, "foreign": 0.0}
        foreign = busy - (self._ours() - self._own) * HERTZ
        return {"steal": steal / whole, "foreign": max(0.0, foreign / whole)}


def host_facts() -> dict[str, Any]:
    """What a reader must know of the machine."""
    with open("/proc/cpuinfo") as cpuinfo:
        model = next((line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")), "unknown")
    uname = os.uname()
    return {
        "name": uname.nodename,
        "cpu": model,
        "cores": os.cpu_count() or 0,
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * PAGE / 1e9),
        "kernel": uname.release,
    }


def raise_descriptor_limit() -> int:
    """Let this process and its children open as many descriptors as they may; the number."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = 1 << 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def spawn(command: list[str]) -> subprocess.Popen[bytes]:
    """A process of the bench that is talked to by pipes."""
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
