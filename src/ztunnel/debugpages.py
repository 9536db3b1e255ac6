"""What the processes do with their time and memory, as pages. Source: Istio's ztunnel, /debug/pprof."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

from hbone.errors import ConfigurationError
from ztunnel import heap
from ztunnel.pages import Page
from ztunnel.profiler import Busy, collapsed, joined
from ztunnel.standing import timestamp

if TYPE_CHECKING:
    from ztunnel.pages import Request, Route
    from ztunnel.profiler import Stacks

__all__ = ["PAGES", "DebugView", "debug_routes"]

PAGES = (
    (
        "/debug/pprof/profile?seconds=10",
        "where the CPU time goes, as a flame graph; for programs &format=pprof or collapsed",
    ),
    ("/debug/pprof/heap", "what fills the memory"),
    ("/debug/pprof/heap/profiling", "POST ?activate=true or false: trace which lines allocate, at a cost"),
)
MAX_SECONDS = 300
MAX_FREQUENCY = 1000


class DebugView(Protocol):
    """The processes that are looked at."""

    async def profile(self, seconds: int, frequency: int) -> dict[str, Stacks]:
        """Stacks of each process, by its name. Raises ConfigurationError."""
        ...

    async def heap(self) -> dict[str, dict[str, Any]]:
        """What `heap.look` says of each."""
        ...

    def trace_heap(self, on: bool) -> None:
        """Begin, or end, to trace allocations in all of them."""
        ...


def debug_routes(view: DebugView) -> dict[str, Route]:
    """The pages by path."""

    async def profile(request: Request) -> Page:
        seconds = _number(request, "seconds", 10, MAX_SECONDS)
        if seconds is None:
            return Page.text(f"invalid seconds value; expected 1-{MAX_SECONDS}\n", 400)
        frequency = _number(request, "frequency", 100, MAX_FREQUENCY)
        if frequency is None:
            return Page.text(f"invalid frequency value; expected 1-{MAX_FREQUENCY}\n", 400)
        form = request.query.get("format", "svg")
        if form not in ("svg", "collapsed", "pprof"):
            return Page.text("invalid format value; expected svg, collapsed or pprof\n", 400)
        try:
            found = await view.profile(seconds, frequency)
        except Busy as error:
            return Page.text(f"{error}\n", 503)
        except ConfigurationError as error:
            return Page.text(f"{error}\n", 500)
        stacks = joined(found)
        if form == "collapsed":
            return Page.text(collapsed(stacks))
        if form == "pprof":
            from ztunnel.pprof import pprof

            body = pprof(stacks, seconds, frequency, time.time())
            return Page(content_type="application/octet-stream", body=body)
        used = sum(stacks.values()) / 1e6
        when = timestamp(time.time())
        note = (
            f"{used:.2f} s of CPU time in {seconds} s ({used / seconds:.0%} of a core), sampled {frequency} times a"
            f" second until {when}. Click a function to see it alone, and all to go back."
        )
        title = "CPU of ztunnel" + (f" and its {len(found) - 1} workers" if len(found) > 1 else "")
        from ztunnel.flamegraph import flame_graph  # brings `html`, half a megabyte of names for characters

        return Page(content_type="image/svg+xml", body=flame_graph(stacks, title, note))

    async def heap_page(_: Request) -> Page:
        return Page.text(heap.page(await view.heap()))

    async def profiling(request: Request) -> Page:
        if request.method != "POST":
            return Page.text(f"heap profiling active: {str(heap.is_tracing()).lower()}\n")
        wanted = request.query.get("activate")
        if wanted not in ("true", "false"):
            return Page.text("invalid activate value; expected true or false\n", 400)
        view.trace_heap(wanted == "true")
        return Page.text(f"heap profiling active: {wanted}\n")

    return {
        "/debug/pprof/profile": profile,
        "/debug/pprof/heap": heap_page,
        "/debug/pprof/heap/profiling": profiling,
    }


def _number(request: Request, name: str, default: int, most: int) -> int | None:
    text = request.query.get(name, str(default))
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        return None
    number = int(text)
    return number if 1 <= number <= most else None
