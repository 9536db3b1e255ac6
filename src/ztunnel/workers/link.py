"""The parent's end of one worker: what is said to it, what it confirmed, what it counts."""

from __future__ import annotations

import collections
import json
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import attrs
import trio

from hbone.daemon import logs
from ztunnel.workers.wire import CONFIRMED, MAX_DEMANDED, MAX_TO_PARENT, Decoder, Kind, Message, WireError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Generator

    from ztunnel.workers.book import Page

__all__ = ["Link"]

READ_SIZE = 256 * 1024
REAP_SECONDS = 10.0
"""Time that a killed process has to end."""
REAP_PATIENCE = 1.0
"""Time that a process without a socket has before it is killed."""
REAP_STEP = 0.005

log = logs.get_logger("ztunnel.workers")


@attrs.define(eq=False)
class _Waiting:
    """A report that was asked for."""

    event: trio.Event = attrs.field(factory=trio.Event)
    found: dict[str, Any] | None = None


class Link:
    """One worker.

    Args:
        number: which of them.
        pid: its process.
        sock: to it; closed here.
        page: its counters; closed by `close`.
        fetch: called when one of its connections waits for a certificate.
        demand: called when some of them wait to hear what names are.
    """

    def __init__(
        self,
        number: int,
        pid: int,
        sock: socket.socket,
        page: Page,
        fetch: Callable[[Link], None],
        demand: Callable[[Link, list[str]], None],
    ) -> None:
        self.number = number
        self.pid = pid
        self.page = page
        self.started_at = time.time()
        self.report: dict[str, Any] = {}
        """The last one."""
        self.alive = True
        self.serving = False
        """It accepts connections."""
        self.fetching = False
        self.code: int | None = None
        """How it ended: its exit code, or a signal below zero; None: it has not, or nobody knows."""
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._fetch = fetch
        self._demand = demand
        self._out: collections.deque[bytes | tuple[int, Generator[None, None, list[bytes]]]] = collections.deque()
        self._more = trio.Event()
        self._sent = 0
        self._unconfirmed: set[int] = set()
        self._heard = trio.Event()
        self._asked: dict[int, _Waiting] = {}

    # to it

    def send(self, kind: Kind, body: bytes = b"") -> int:
        """Queue a message; its number, to wait for by `confirmed`."""
        self._sent += 1
        if kind in CONFIRMED:
            self._unconfirmed.add(self._sent)
        if self.alive:
            self._out.append(Message(kind, self._sent, body).encode())
            self._more.set()
        return self._sent

    def send_snapshot(self, work: Generator[None, None, list[bytes]]) -> int:
        """Queue the mesh as it is now; it is put together in slices, and what follows comes after it."""
        self._sent += 1
        number = self._sent
        self._unconfirmed.add(number)
        try:
            next(work)  # from here on it holds the state of this moment
        except StopIteration as done:
            self._out.append(Message(Kind.SNAPSHOT, number, b"".join(done.value)).encode())
        else:
            self._out.append((number, work))
        self._more.set()
        return number

    async def confirmed(self, number: int, seconds: float) -> bool:
        """Wait until it said that a message is in force; False when it ended, or said nothing in time."""
        with trio.move_on_after(seconds):
            while self.alive and number in self._unconfirmed:
                await self._heard.wait()
        return number not in self._unconfirmed

    async def ask(self, what: str, seconds: float) -> bool:
        """Have `report` brought up to date; False when no answer came in time."""
        number = self.send(Kind.REPORT, what.encode())
        waiting = self._asked[number] = _Waiting()
        try:
            with trio.move_on_after(seconds):
                if self.alive:
                    await waiting.event.wait()
        finally:
            self._asked.pop(number, None)
        if waiting.found is None:
            return False
        self.report.update(waiting.found)
        return True

    def kill(self) -> None:
        """End the process at once. It is our child and not waited for yet, so its number is nobody else's."""
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    # its life

    async def run(self) -> None:
        """Serve the socket until the worker ends, and wait for its process: `code` says how it ended."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                await self._read()
                nursery.cancel_scope.cancel()
        except BaseException:
            self.kill()
            raise
        finally:
            self.alive = self.serving = False
            self._out.clear()
            self._notify()
            for waiting in self._asked.values():
                waiting.event.set()
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(self._stream)
                self.code = await self._reap()

    async def _reap(self) -> int | None:
        """Wait for the process, and kill it if it stays; bounded."""
        begun = trio.current_time()
        while (waited := trio.current_time() - begun) < REAP_SECONDS:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)  # noqa: ASYNC222 - it does not wait
            except ChildProcessError:  # not ours yet, or never
                if waited > REAP_PATIENCE:
                    return None
            else:
                if pid:
                    return os.waitstatus_to_exitcode(status)
                if waited > REAP_PATIENCE:
                    self.kill()
            await trio.sleep(REAP_STEP)
        return None

    async def _write(self) -> None:
        try:
            while True:
                await self._more.wait()
                self._more = trio.Event()
                while self._out:
                    item = self._out.popleft()
                    if not isinstance(item, bytes):
                        item = await _finish(*item)
                    await self._stream.send_all(item)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # it ended, which the reader sees

    async def _read(self) -> None:
        decoder = Decoder(MAX_TO_PARENT)
        try:
            while data := await self._stream.receive_some(READ_SIZE):
                for message in decoder.receive_data(bytes(data)):
                    self._take(message)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        except (WireError, LookupError, TypeError, ValueError) as error:
            log.error("a worker sent what cannot be read; it is killed", worker=self.number, error=str(error))
            self.kill()

    def _take(self, message: Message) -> None:
        kind = message.kind
        if kind is Kind.DONE:
            self._unconfirmed.discard(message.number)
            self._notify()
        elif kind is Kind.SERIES:
            self.page.announced(message.body)
        elif kind is Kind.REPORTED:
            waiting = self._asked.get(message.number)
            if waiting is not None:
                found = json.loads(message.body)
                if not isinstance(found, dict):
                    raise TypeError("a report is no object")
                waiting.found = found
                waiting.event.set()
        elif kind is Kind.FETCH:
            self._fetch(self)
        elif kind is Kind.DEMAND:
            names = json.loads(message.body)
            if not isinstance(names, list) or len(names) > MAX_DEMANDED or not all(isinstance(n, str) for n in names):
                raise TypeError("a demand is no list of names")
            self._demand(self, names)
        else:
            raise WireError(f"a worker sent {kind.name}")

    def _notify(self) -> None:
        self._heard.set()
        self._heard = trio.Event()


async def _finish(number: int, work: Generator[None, None, list[bytes]]) -> bytes:
    while True:
        try:
            next(work)
        except StopIteration as done:
            return Message(Kind.SNAPSHOT, number, b"".join(done.value)).encode()
        await trio.lowlevel.checkpoint()
