"""What fills the memory of a process: objects by type at any time, and lines that allocated once tracing is on.

Objects by type cost a pause of some milliseconds for each million objects, and then time that is shared with the
connections. Tracing (tracemalloc) makes every allocation slower and remembers each, and a look at it is a pause: what
both cost is said on the page.
"""

from __future__ import annotations

import gc
import resource
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import trio

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["is_tracing", "look", "page", "trace"]

TOP: Final = 40
"""Lines of a table."""
AT_ONCE: Final = 1000
"""Objects that are counted between two turns of the loop."""


_tracemalloc: ModuleType | None = None


def is_tracing() -> bool:
    """Whether allocations are traced."""
    return _tracemalloc is not None and bool(_tracemalloc.is_tracing())


def trace(on: bool) -> None:
    """Begin, or end, to trace allocations of this process."""
    global _tracemalloc
    import tracemalloc  # a megabyte that is of use to few

    _tracemalloc = tracemalloc
    if on and not tracemalloc.is_tracing():
        tracemalloc.start(1)  # one frame of each: the least that says where
    elif not on:
        tracemalloc.stop()


async def look() -> dict[str, Any]:
    """What there is now, as JSON."""
    started = time.perf_counter()
    objects = gc.get_objects()
    pause = time.perf_counter() - started
    counts: dict[type, list[int]] = {}
    objects.reverse()
    total = len(objects)
    while objects:
        for _ in range(min(AT_ONCE, len(objects))):
            found = objects.pop()  # so that it can go when its time comes
            entry = counts.setdefault(type(found), [0, 0])
            entry[0] += 1
            entry[1] += _size(found)
        await trio.lowlevel.checkpoint()
    largest = sorted(counts.items(), key=lambda item: -item[1][1])[:TOP]
    return {
        "resident": _resident(),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "objects": total,
        "pause": pause,
        "types": [[f"{kind.__module__}.{kind.__qualname__}", count, nbytes] for kind, (count, nbytes) in largest],
        "traced": await _traced() if is_tracing() else None,
    }


def _size(found: object) -> int:
    try:
        return sys.getsizeof(found)
    except Exception:  # any object's own code may answer
        return 0


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


async def _traced() -> dict[str, Any]:
    import tracemalloc

    started = time.perf_counter()
    traces = tracemalloc.take_snapshot().traces
    pause = time.perf_counter() - started
    lines: dict[tuple[str, int], list[int]] = {}
    for number in range(len(traces)):
        trace = traces[number]
        frame = trace.traceback[0]
        entry = lines.setdefault((frame.filename, frame.lineno), [0, 0])
        entry[0] += 1
        entry[1] += trace.size
        if number % AT_ONCE == 0:
            await trio.lowlevel.checkpoint()
    largest = sorted(lines.items(), key=lambda item: -item[1][1])[:TOP]
    return {
        "pause": pause,
        "overhead": tracemalloc.get_tracemalloc_memory(),
        "bytes": sum(nbytes for _, nbytes in lines.values()),
        "lines": [[f"{name}:{line}", count, nbytes] for (name, line), (count, nbytes) in largest],
    }


def page(processes: dict[str, dict[str, Any]]) -> str:
    """Tables of several processes, by name."""
    parts = []
    for name, found in processes.items():
        parts.append(
            f"{name}: {_mib(found['resident'])} resident, {_mib(found['peak'])} at most,"
            f" {found['objects']:,} objects that came after the start and can refer to others\n"
            f"(Looking paused the process for {found['pause'] * 1000:.1f} ms. Sizes are of the objects alone, without"
            " what they refer to.)\n\n" + _table(found["types"], "type")
        )
        traced = found["traced"]
        if traced is None:
            parts.append(
                "Allocations are not traced. POST /debug/pprof/heap/profiling?activate=true traces those from then on;"
                " that makes each about ten times slower and takes some 50 bytes for it, and a look pauses the process"
                " for about half a second for each million of them.\n"
            )
        else:
            parts.append(
                f"{_mib(traced['bytes'])} allocated since tracing began, {_mib(traced['overhead'])} for tracing"
                f" itself\n(Looking paused the process for {traced['pause'] * 1000:.1f} ms.)\n\n"
                + _table(traced["lines"], "line")
            )
    return "\n".join(parts)


def _table(rows: list[list[Any]], what: str) -> str:
    lines = [f"{'bytes':>14} {'count':>10}  {what}"]
    lines += [f"{nbytes:>14,} {count:>10,}  {name}" for name, count, nbytes in rows]
    return "\n".join(lines) + "\n"


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):.1f} MiB"
