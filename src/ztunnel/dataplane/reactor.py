"""One epoll that moves the bytes by plain callbacks, and hosts Trio as its guest.

Everything that waits on time, on the network's set-up or on the control plane is a Trio task; everything that moves
bytes is a callback here. This is the only place where the two meet. The loop blocks in `epoll_wait` without a
timeout, so a busy data path pays for neither a Trio wake-up nor a timer.

```text
turn:  events -> on_event()      later() callbacks of the turn before      handshakes, for a millisecond
       flush() of what is dirty, once each       close() of what was closed
```

Descriptors are watched edge-triggered: a handler that stops early remembers that it may go on. In exchange a paused
socket costs no `epoll_ctl`, and one that is paused and gone is told once instead of being polled in circles.
"""

from __future__ import annotations

import collections
import contextlib
import heapq
import itertools
import os
import select
import time
from typing import TYPE_CHECKING, Any, Final, TypeVar, TypeVarTuple

import trio

from hbone.daemon.logs import get_logger
from ztunnel.dataplane.sockets import poll_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from ztunnel.dataplane.handlers import Closable, Farewell, Flushable, Handler, Poller, Swept

__all__ = ["GONE", "READ", "READ_WRITE", "WRITE", "Reactor", "Timer"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_EDGE: Final = select.EPOLLET
READ: Final = select.EPOLLIN | select.EPOLLRDHUP | _EDGE
"""Tell when bytes, the peer's FIN or an error arrive."""
READ_WRITE: Final = READ | select.EPOLLOUT
"""The same, and when room to write comes back."""
WRITE: Final = select.EPOLLOUT
"""Bit of an event: room to write, or a connect that ended."""
GONE: Final = select.EPOLLHUP | select.EPOLLERR
"""Bits of an event: the connection was reset or is closed both ways."""

_BATCH: Final = 256
_HANDSHAKE_SECONDS: Final = 0.001
_TURNS_PER_CHECKPOINT: Final = 32
_SWEEP_SECONDS: Final = 1.0
_SWEEP_SLICE: Final = 0.0003  # of a turn; and connections that then have something to send:
_SWEEP_SENDS: Final = 4

_log: Final = get_logger("ztunnel.dataplane")


class Timer:
    """One call at a time to come; `cancel` it when it is no longer wanted."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[[], object]) -> None:
        self.call: Callable[[], object] | None = call

    def cancel(self) -> None:
        """Do not call. Calling this again, or after the time, does nothing."""
        self.call = None


class Reactor:
    """The loop of the data path.

    Args:
        poller: another epoll, for tests.
        clock: seconds, monotonic; for tests.
    """

    def __init__(self, *, poller: Poller | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._poller = poller or select.epoll()
        self.clock = clock
        self.now = clock()
        """Seconds on the monotonic clock, read once a turn."""
        self.turns = 0
        """Turns so far."""
        self.handlers: dict[int, Handler] = {}
        self.dirty: list[Flushable] = []
        """Flushed at the end of the turn; whoever appends itself keeps a flag to do so once."""
        self.farewells: dict[Farewell, None] = {}
        """Sockets that are closed when all that was written to them was delivered."""
        self.stopping = False
        """Trio's main is done; no task can be started any more."""
        self._later: list[Callable[[], object]] = []
        self._handshakes: collections.deque[Callable[[], object]] = collections.deque()
        self._closing: list[Closable] = []
        self._timers: list[tuple[float, int, Timer]] = []
        self._timer_ids = itertools.count()
        self._timer_set = trio.Event()
        self._timer_due = float("inf")
        self._swept: dict[Swept, None] = {}
        self._sweeping = False
        self._to_ask: list[Swept] = []
        self._ticks: collections.deque[Callable[[], object]] = collections.deque()
        self._nursery: trio.Nursery | None = None
        self._wake_fd: int | None = None
        self._asleep = False
        self._disposed = False

    # Descriptors

    def add(self, fd: int, handler: Handler, mask: int = READ) -> None:
        """Watch `fd`. What it is already ready for is told in the next turn."""
        self._poller.register(fd, mask)
        self.handlers[fd] = handler

    def modify(self, fd: int, mask: int) -> None:
        """Watch for something else; what it is already ready for is told in the next turn."""
        self._poller.modify(fd, mask)

    def hand_over(self, fd: int, handler: Handler) -> None:
        """Give the events of `fd` to another handler."""
        self.handlers[fd] = handler

    def remove(self, fd: int) -> None:
        """Stop watching `fd`, which stays open. An event of this turn that still waits is dropped."""
        if self.handlers.pop(fd, None) is not None:
            self._poller.unregister(fd)

    def close(self, sock: Closable) -> None:
        """Stop watching `sock` now, and close it when the turn ends.

        So its descriptor cannot be given to another socket while an event for it waits in the batch.
        """
        self.handlers.pop(sock.fileno(), None)
        self._closing.append(sock)
        if self._asleep:
            self._wake()

    # Work

    def later(self, call: Callable[[], object]) -> None:
        """Call in the next turn, after its events."""
        self._later.append(call)
        if self._asleep:
            self._wake()

    def handshake(self, call: Callable[[], object]) -> None:
        """Call soon; all such calls together have a millisecond a turn (and one of them always runs)."""
        self._handshakes.append(call)
        if self._asleep:
            self._wake()

    def flush_later(self, flushable: Flushable) -> None:
        """Flush at the end of this turn. The caller sees to it that it asks once."""
        self.dirty.append(flushable)
        if self._asleep:
            self._wake()

    def call_at(self, deadline: float, call: Callable[[], object]) -> Timer:
        """Call once `clock()` has reached `deadline`. Costs a wake-up of Trio, so many connections share a timer."""
        timer = Timer(call)
        heapq.heappush(self._timers, (deadline, next(self._timer_ids), timer))
        if deadline < self._timer_due:
            self._timer_due = deadline
            self._timer_set.set()
        return timer

    def sweep(self, swept: Swept) -> None:
        """Call `swept.on_time(now)` once a second until `unsweep`: one timer for every deadline of the data path."""
        self._swept[swept] = None
        if not self._sweeping:
            self._sweeping = True
            self.call_at(self.clock() + _SWEEP_SECONDS, self._sweep)

    def unsweep(self, swept: Swept) -> None:
        """No more."""
        self._swept.pop(swept, None)

    def _sweep(self) -> None:
        self._to_ask = list(self._swept)
        self._to_ask.reverse()
        self._sweep_some()

    def _sweep_some(self) -> None:
        """A hundred tunnels that are due for a PING at once would keep everybody waiting: ask a few a turn."""
        now, to_ask = self.now, self._to_ask
        end = self.clock() + _SWEEP_SLICE
        while to_ask:
            swept = to_ask.pop()
            if swept in self._swept:
                try:
                    swept.on_time(now)
                except Exception:
                    self._fault(swept)
            if to_ask and (len(self.dirty) >= _SWEEP_SENDS or self.clock() >= end):
                self.later(self._sweep_some)
                return
        self._sweeping = bool(self._swept)
        if self._sweeping:
            self.call_at(now + _SWEEP_SECONDS, self._sweep)

    def start_task(self, task: Callable[[*Ts], Awaitable[object]], *args: *Ts, name: object = None) -> None:
        """Run a Trio task. Its fault is logged and ends nothing else.

        Raises:
            RuntimeError: the reactor is not running, or no longer.
        """
        if self._nursery is None or self.stopping:
            raise RuntimeError("the reactor does not run; a task cannot be started")
        self._nursery.start_soon(self._guarded, task, args, name=name or task)

    async def _guarded(self, task: Callable[..., Awaitable[object]], args: tuple[Any, ...]) -> None:
        try:
            await task(*args)
        except Exception:
            _log.exception("a task of the data path failed", task=getattr(task, "__qualname__", repr(task)))

    # One turn

    def turn(self, events: Iterable[tuple[int, int]]) -> None:
        """Give each event to its handler, then do what the turn left over."""
        self.now = self.clock()
        self.turns += 1
        get = self.handlers.get
        later: Iterable[Callable[[], object]] = ()
        if self._later:
            later, self._later = self._later, []
        for fd, mask in events:
            handler = get(fd)
            if handler is not None:
                try:
                    handler.on_event(mask)
                except Exception:
                    self._fault(handler, fd)
        for call in later:
            self._call(call)
        if self._handshakes:
            self._shake_hands()
        dirty = self.dirty
        while dirty:
            flushable = dirty.pop()
            try:
                flushable.flush()
            except Exception:
                self._fault(flushable)
        if self._closing:
            self._close_all()

    def settle(self) -> None:
        """What Trio's tasks left for the end of a turn."""
        if self.dirty or self._closing:
            later, self._later = self._later, []
            self.turn(())
            self._later[:0] = later

    @property
    def busy(self) -> bool:
        """Whether the next turn has work without an event."""
        return bool(self._later or self._handshakes or self.dirty or self._closing)

    def _shake_hands(self) -> None:
        handshakes = self._handshakes
        clock = self.clock
        end = clock() + _HANDSHAKE_SECONDS
        while handshakes:
            self._call(handshakes.popleft())
            if clock() >= end:
                return

    def _call(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception:
            self._fault(getattr(call, "__self__", None))

    def _fault(self, owner: object, fd: int | None = None) -> None:
        """One connection's fault costs that connection."""
        _log.exception("a callback of the data path failed; its connection is closed", owner=type(owner).__name__)
        on_fault = getattr(owner, "on_fault", None)
        try:
            if on_fault is not None:
                on_fault()
        except Exception:
            _log.exception("closing the connection failed as well", owner=type(owner).__name__)
            if fd is not None and self.handlers.get(fd) is owner:
                with contextlib.suppress(OSError):
                    self.remove(fd)

    def _close_all(self) -> None:
        closing, self._closing = self._closing, []
        for sock in closing:
            try:
                sock.close()
            except OSError:
                pass  # it is closed all the same

    # Time

    async def _keep_time(self) -> None:
        while True:
            self._timer_set = trio.Event()
            while self._timers and self._timers[0][2].call is None:
                heapq.heappop(self._timers)
            self._timer_due = self._timers[0][0] if self._timers else float("inf")
            with trio.move_on_after(max(0.0, self._timer_due - self.clock())):
                await self._timer_set.wait()
            self._on_time()

    def _on_time(self) -> None:
        self.now = now = self.clock()
        timers = self._timers
        while timers and (timers[0][0] <= now or timers[0][2].call is None):
            timer = heapq.heappop(timers)[2]
            call, timer.call = timer.call, None
            if call is not None:
                self._call(call)
        if self._asleep and self.busy:
            self._wake()

    # Running

    def run(self, main: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
        """Run `main` as Trio's main, with Trio as the guest of this loop. Returns what it returns.

        A fault of the loop itself cancels `main`, and is raised once `main` is done.
        """
        wake_fd = self._open_wake_fd()
        outcomes: list[Any] = []

        def soon_threadsafe(call: Callable[[], object]) -> None:
            self._ticks.append(call)
            os.eventfd_write(wake_fd, 1)

        trio.lowlevel.start_guest_run(
            self._main,
            main,
            args,
            run_sync_soon_threadsafe=soon_threadsafe,
            run_sync_soon_not_threadsafe=self._ticks.append,
            done_callback=outcomes.append,
        )
        try:
            self._loop(outcomes)
        except BaseException as fault:
            self._end_guest(outcomes, wake_fd)
            try:
                outcomes[0].unwrap()
            except _Cancelled:
                pass
            except BaseException as exc:
                raise exc from fault
            raise
        finally:
            self.dispose()
        result: T = outcomes[0].unwrap()
        return result

    async def _main(self, main: Callable[..., Awaitable[T]], args: tuple[Any, ...]) -> T:
        results: list[T] = []
        error: BaseException | None = None
        self.stopping = False
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._keep_time)
            try:
                results.append(await main(*args))
            except (Exception, KeyboardInterrupt, SystemExit) as exc:
                error = exc  # kept out of the nursery, which would wrap it in a group
            finally:
                self.stopping = True
                nursery.cancel_scope.cancel()
        if error is not None:
            raise error
        if not results:
            raise _Cancelled
        return results[0]

    def _loop(self, outcomes: list[Any]) -> None:
        ticks = self._ticks
        poll = poll_of(self._poller)
        while True:
            if ticks:
                for _ in range(len(ticks)):
                    ticks.popleft()()
                if outcomes:
                    return
                self.settle()
            self.turn(poll(0 if ticks or self._later or self._handshakes else -1, _BATCH))

    def _end_guest(self, outcomes: list[Any], wake_fd: int) -> None:
        """After a fault of the loop: cancel Trio's main, and tick it until its `finally` blocks are done."""
        ticks = self._ticks
        told = False
        while not outcomes:
            if not told and self._nursery is not None:
                told = True
                self.stopping = True
                self._nursery.cancel_scope.cancel()
            if not ticks:
                select.select([wake_fd], [], [])
                os.eventfd_read(wake_fd)
            while ticks and not outcomes:
                ticks.popleft()()

    async def run_in_trio(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The same loop as one task of a program that runs Trio itself; until cancelled. A third dearer."""
        self._open_wake_fd()
        poll = poll_of(self._poller)
        fd = self._poller.fileno()
        turns = 0
        self.stopping = False
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._keep_time)
                task_status.started()
                try:
                    while True:
                        events = poll(0, _BATCH)
                        if events or self.busy:
                            self.turn(events)
                            turns += 1
                            if turns % _TURNS_PER_CHECKPOINT == 0:
                                await trio.lowlevel.checkpoint()
                            continue
                        self._asleep = True
                        try:
                            await trio.lowlevel.wait_readable(fd)
                        finally:
                            self._asleep = False
                finally:
                    self.stopping = True
                    nursery.cancel_scope.cancel()
        finally:
            self.dispose()

    def dispose(self) -> None:
        """Close what waits to be closed, and the epoll. Sockets that are still watched are their owners' to close."""
        if self._disposed:
            return
        self._disposed = True
        self.stopping = True
        for farewell in list(self.farewells):
            farewell.close()
        self._close_all()
        self.handlers.clear()
        if self._wake_fd is not None:
            os.close(self._wake_fd)
            self._wake_fd = None
        self._poller.close()

    def _open_wake_fd(self) -> int:
        if self._disposed or self._wake_fd is not None:
            raise RuntimeError("a reactor runs once")
        self._wake_fd = fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller.register(fd, select.EPOLLIN)
        self.handlers[fd] = _Wake(fd)
        return fd

    def _wake(self) -> None:
        if self._wake_fd is not None:
            os.eventfd_write(self._wake_fd, 1)


class _Cancelled(Exception):
    """Trio's main was cancelled because the loop failed."""


class _Wake:
    """Another thread, or a Trio task, has something for the loop."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def on_event(self, mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)

    def on_fault(self) -> None:
        """Nothing to close: the loop owns the descriptor."""
