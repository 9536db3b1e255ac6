"""The client: a process that takes a job a line (JSON) on standard input and answers with what it measured.

It runs where the client of the mesh would run, so it may stand in a network namespace of its own, and go to the one
that a job names.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any

from bench.measure import raise_descriptor_limit
from bench.workloads import RUNNERS, Meter, Target

CLONE_NEWNET = 0x4000_0000


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of the sorted `values` lie."""
    return values[min(len(values) - 1, int(len(values) * share))] if values else 0.0


def enter(namespace: str) -> None:
    """Go to another network namespace.

    Raises:
        OSError: it can't be entered.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_ino == os.stat("/proc/self/ns/net").st_ino:
            return
        if libc.setns(descriptor, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"{namespace}: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(descriptor)


def answer(job: dict[str, Any], home: str) -> dict[str, float]:
    """Do one job.

    Raises:
        OSError, RuntimeError: the load could not be driven.
    """
    enter(job.get("netns") or home)
    target = Target(job)
    meter = Meter(target)
    RUNNERS[job["runner"]](target, meter, job["seconds"], **job.get("arguments", {}))
    latencies = sorted(meter.latencies)
    found = {
        "units": meter.units,
        "seconds": meter.seconds,
        "user": meter.cpu.user,
        "system": meter.cpu.system,
        "p50": percentile(latencies, 0.5),
        "p99": percentile(latencies, 0.99),
    }
    if len(latencies) >= 1000:
        found["p999"] = percentile(latencies, 0.999)
    return found


def main() -> None:
    """Answer jobs until standard input ends."""
    raise_descriptor_limit()
    home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    for line in sys.stdin:
        try:
            found: dict[str, Any] = answer(json.loads(line), f"/proc/self/fd/{home}")
        except (OSError, RuntimeError) as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
