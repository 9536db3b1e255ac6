"""Where a process spends its CPU: stacks of Python functions, sampled for some seconds, with the CPU time of each.

The kernel's timer of CPU time interrupts a busy process, so one that idles is left alone. At each interrupt every
thread's own clock says how much it used since the last one, and that is put down to the stack it has now. Time inside
C functions counts for the Python function that called them. While none runs, nothing is there that could cost.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Final

import trio

from hbone.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import CodeType, FrameType

__all__ = ["MAX_DEPTH", "Busy", "Stacks", "collapsed", "joined", "sample"]

MAX_DEPTH: Final = 100
"""Functions of a stack that are told apart, from the innermost."""
MAX_STACKS: Final = 50_000
"""Stacks that are told apart; what comes later counts as `(other)`."""

Stacks = dict[tuple[str, ...], int]
"""Microseconds of CPU time by stack, outermost function first."""


class Busy(ConfigurationError):
    """Another profile is being taken."""


class _Sampler:
    """Counts from `start` to `stop`; both on the main thread."""

    def __init__(self) -> None:
        self._used: dict[tuple[str, tuple[CodeType, ...]], float] = {}
        self._names: dict[CodeType, str] = {}
        self._clocks: dict[int, float] = {}

    def start(self, frequency: int) -> None:
        for ident in sys._current_frames():
            self._spent(ident)
        signal.signal(signal.SIGPROF, self._tick)
        signal.siginterrupt(signal.SIGPROF, False)
        signal.setitimer(signal.ITIMER_PROF, 1 / frequency, 1 / frequency)

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, signal.SIG_IGN)  # one may be on its way, and the default ends the process

    def _spent(self, ident: int) -> float:
        """Seconds of CPU that a thread used since it was asked last. It has a Python frame, so it lives."""
        now = time.clock_gettime(time.pthread_getcpuclockid(ident))
        before = self._clocks.get(ident, now)
        self._clocks[ident] = now
        return now - before

    def _tick(self, _: int, interrupted: FrameType | None) -> None:
        here = threading.get_ident()
        for ident, frame in sys._current_frames().items():
            spent = self._spent(ident)
            if spent > 0:
                self._note("" if ident == here else _thread_name(ident), interrupted if ident == here else frame, spent)

    def _note(self, thread: str, frame: FrameType | None, spent: float) -> None:
        codes: list[CodeType] = []
        names = self._names
        while frame is not None and len(codes) < MAX_DEPTH:
            code = frame.f_code
            if code not in names:
                names[code] = f"{frame.f_globals.get('__name__', '?')}.{code.co_qualname}"
            codes.append(code)
            frame = frame.f_back
        key = (thread, tuple(codes))
        if key not in self._used and len(self._used) >= MAX_STACKS:
            key = ("(other)", ())
        self._used[key] = self._used.get(key, 0.0) + spent

    def stacks(self) -> Stacks:
        found: Stacks = {}
        for (thread, codes), spent in self._used.items():
            stack = (*((thread,) if thread else ()), *(self._names[code] for code in reversed(codes)))
            found[stack] = found.get(stack, 0) + round(spent * 1e6)
        return found


def _thread_name(ident: int) -> str:
    thread = threading._active.get(ident)  # type: ignore[attr-defined]  # by look-up, as `enumerate` takes a lock
    return f"thread {thread.name}" if thread is not None else "thread"


_running = False


async def sample(seconds: float, frequency: int) -> Stacks:
    """Profile this process, all its threads; call it on the main thread.

    Args:
        seconds: How long, in time that passes.
        frequency: Samples per second of CPU time. The kernel's tick may allow fewer.

    Raises:
        Busy: another one runs.
        ConfigurationError: this is not the main thread.
    """
    global _running
    if _running:
        raise Busy("a profile of this process is being taken already; ask again when it is over")
    if threading.current_thread() is not threading.main_thread():
        raise ConfigurationError("a profile can be taken only where the program runs in its main thread")
    sampler = _Sampler()
    _running = True
    try:
        sampler.start(frequency)
        await trio.sleep(seconds)
    finally:
        sampler.stop()
        _running = False
    return sampler.stacks()


def joined(processes: Mapping[str, Stacks]) -> Stacks:
    """The stacks of several processes, each below its name; of a single one as they are."""
    if len(processes) == 1:
        return next(iter(processes.values()))
    return {(name, *stack): spent for name, stacks in processes.items() for stack, spent in stacks.items()}


def collapsed(stacks: Stacks) -> str:
    """A line a stack, functions joined by `;`, then microseconds: what flame graph programs read."""
    lines = [f"{';'.join(_plain(name) for name in stack)} {spent}\n" for stack, spent in sorted(stacks.items())]
    return "".join(lines)


def _plain(name: str) -> str:
    return name.replace(";", ":").replace("\n", " ")
