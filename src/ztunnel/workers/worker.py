"""A worker: one data path in a process of its own, told by its parent what the mesh is and who we are.

It has no key of its own making, no state directory, no token and no page. What it knows came over its socket.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import os
import socket
import time
from typing import TYPE_CHECKING, Any

import attrs
import trio

from hbone.daemon import logs
from ztunnel import heap, jsonstream
from ztunnel.control.apply import apply
from ztunnel.control.demand import Demand
from ztunnel.control.lanes import Lanes
from ztunnel.control.pace import Pace, QuietCollector, settle
from ztunnel.control.response import read
from ztunnel.control.revocation import Revocations
from ztunnel.control.svids import FETCH_TIMEOUT, NoCertificate
from ztunnel.dataplane import Dataplane, Reactor
from ztunnel.jsonstream import Rows
from ztunnel.logs import AccessLog
from ztunnel.logscopes import read_levels
from ztunnel.mesh import ADDRESS_TYPE, AUTHORIZATION_TYPE, Store
from ztunnel.profiler import Busy, sample
from ztunnel.workers.book import WorkerMetrics
from ztunnel.workers.process import call_ourselves, end_with
from ztunnel.workers.wire import CONFIRMED, MAX_DEMANDED, MAX_TO_WORKER, Decoder, Kind, Message, unpack_identity

if TYPE_CHECKING:
    from hbone.identity import Identity, SpiffeId
    from ztunnel.config import Config
    from ztunnel.control.response import Response
    from ztunnel.mesh import Change

__all__ = ["Setup", "Worker", "main"]

READ_SIZE = 256 * 1024

_OWN_LANES = {Kind.IDENTITY: "identity", Kind.REVOCATIONS: "revocations", Kind.ANSWERED: ADDRESS_TYPE}

log = logs.get_logger("ztunnel.workers")


@attrs.frozen(kw_only=True)
class Setup:
    """What all workers have in common from their start."""

    parent: int
    """Process id."""
    config: Config
    """Without secrets."""
    transparent: bool
    listeners: tuple[dict[str, int], ...]
    """Descriptors by purpose, of each worker, and then what was given beyond them: share k belongs to worker k % n."""
    shared: frozenset[str]
    """The purposes whose descriptors are the same for all."""
    workers: int
    """How many there are."""
    log_format: str
    output_lock: int
    """Descriptor of the file that is locked while lines are written."""


class ReceivedIdentity:
    """The certificate that the parent keeps fresh.

    Args:
        ask: asks the parent for one.
        wall: seconds since 1970.
    """

    def __init__(self, ask: Any, wall: Any = time.time) -> None:
        self._ask = ask
        self._wall = wall
        self._identity: Identity | None = None
        self._body = b""
        self._reason = f"no certificate came within {FETCH_TIMEOUT:g} s"
        self._answered = trio.Event()

    def current(self) -> Identity | None:
        """The identity in use; None when there is none or it has expired."""
        identity = self._identity
        if identity is None or self._wall() >= identity.svid.expires_at.timestamp():
            return None
        return identity

    async def fetch(self) -> Identity:
        """Wait for one.

        Raises:
            NoCertificate: the parent has none, and says why.
        """
        if self.current() is None:
            answered = self._answered
            self._ask()
            with trio.move_on_after(FETCH_TIMEOUT + 1):
                await answered.wait()
        else:
            await trio.lowlevel.checkpoint()
        identity = self.current()
        if identity is None:
            raise NoCertificate(self._reason)
        return identity

    def received(self, body: bytes) -> None:
        """Use this one from now on; the same again changes nothing."""
        if body != self._body:
            self._identity = unpack_identity(body)
            self._body = body
        self._wake()

    def refused(self, reason: str) -> None:
        """There is none, for this reason."""
        self._reason = reason
        self._wake()

    def want(self, spiffe_id: SpiffeId) -> None:
        """The workload has this identity now; a certificate for another is dropped."""
        if self._identity is not None and self._identity.svid.id != spiffe_id:
            self._identity, self._body = None, b""

    def _wake(self) -> None:
        self._answered.set()
        self._answered = trio.Event()


class Worker:
    """The process.

    Args:
        setup: what all have in common.
        number: which of them it is.
        sock: to the parent.
        memory: descriptor of the counters.
        reactor: moves the bytes.
    """

    def __init__(self, setup: Setup, number: int, sock: socket.socket, memory: int, reactor: Reactor) -> None:
        self.setup = setup
        self.number = number
        self.store = Store()
        self._pace = Pace(collector=QuietCollector())
        self.metrics = WorkerMetrics(memory, self._announce)
        self.identity = ReceivedIdentity(lambda: self._send(Message(Kind.FETCH)))
        self.revocations = Revocations()
        config = setup.config
        self._demand = Demand(self.store, config.network) if config.on_demand else None
        self.dataplane = Dataplane(
            reactor,
            config,
            self.store,
            self.identity,
            self.metrics,
            AccessLog(policy_at_info=config.policy_info_logging),
            revocations=self.revocations,
            demand=self._demand,
        )
        self._sock = sock
        self._out: collections.deque[bytes] = collections.deque()
        self._wake_writer = trio.Event()
        self._work, self._changes = trio.open_memory_channel[Message](float("inf"))  # the parent waits for each
        self._asked, self._questions = trio.open_memory_channel[Message](float("inf"))  # the parent waits for each
        self._drain = trio.Event()
        self._released = False
        self._others: list[dict[str, socket.SocketType]] = []
        self.store.subscribe(self._on_change)

    async def run(self) -> None:
        """Serve until told to drain, or until the parent is gone."""
        sockets = [
            _adopt({what: fd for what, fd in share.items() if number == self.number or what not in self.setup.shared})
            for number, share in enumerate(self.setup.listeners)
        ]
        self._others = sockets
        self.dataplane.adopt(sockets[self.number], transparent=self.setup.transparent, shared=self.setup.shared)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read)
                nursery.start_soon(self._write)
                nursery.start_soon(self._change)
                nursery.start_soon(self._answer)
                if self._demand is not None:
                    nursery.start_soon(self._ask, self._demand)
                await self._drain.wait()
                if not self._released:
                    for number, theirs in enumerate(sockets):
                        if number != self.number:
                            self.dataplane.cover(number, theirs)  # what waits for one that is away is taken as well
                await self.dataplane.drain()
                self.dataplane.close()
                self._account()
                await self._flushed()
                nursery.cancel_scope.cancel()
        finally:
            self.dataplane.close()

    # from the parent

    async def _read(self) -> None:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(self._sock))
        decoder = Decoder(MAX_TO_WORKER)
        with contextlib.suppress(trio.BrokenResourceError):
            while data := await stream.receive_some(READ_SIZE):
                for message in decoder.receive_data(bytes(data)):
                    if message.kind in CONFIRMED:
                        self._work.send_nowait(message)
                    else:
                        self._obey(message)
        logs.flush(0.1)
        os._exit(0)  # the parent is gone, and nothing here may go on without its policies

    def _obey(self, message: Message) -> None:
        kind, body = message.kind, message.body
        if kind is Kind.REPORT:
            self._asked.send_nowait(message)
        elif kind is Kind.NO_IDENTITY:
            self.identity.refused(body.decode())
        elif kind is Kind.COVER:
            if not self._released:
                for share in self._shares_of(int(body)):
                    self.dataplane.cover(share, self._others[share])
        elif kind is Kind.UNCOVER:
            for share in self._shares_of(int(body)):
                self.dataplane.uncover(share)
        elif kind is Kind.RELEASE:
            self._released = True
            self.dataplane.release()
        elif kind is Kind.LEVEL:
            logs.set_level(read_levels(body.decode())[0])
        elif kind is Kind.TRACE:
            heap.trace(bool(body))
        elif kind is Kind.DRAIN:
            self._drain.set()

    def _shares_of(self, number: int) -> range:
        """Which sockets are a worker's, its own first."""
        return range(number, len(self._others), self.setup.workers)

    async def _change(self) -> None:
        """Put in force what the parent says, in its order but for what may overtake."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(settle, self.store, self._pace)
            lanes = Lanes(nursery)
            async for message in self._changes:
                kind = message.kind
                if kind is Kind.DELTA:
                    response = await read(message.body, self._pace)
                    url = response.type_url
                    after = lanes.after(url, removes=bool(response.removed))
                    lanes.start(functools.partial(self._apply, message, response), (url,), after)
                elif kind in (Kind.SNAPSHOT, Kind.ACCEPT):
                    lanes.start(
                        functools.partial(self._obey_change, message),
                        (ADDRESS_TYPE, AUTHORIZATION_TYPE, *_OWN_LANES.values()),
                    )
                else:
                    lanes.start(functools.partial(self._obey_change, message), (_OWN_LANES[kind],))

    async def _apply(self, message: Message, response: Response) -> None:
        await apply(self.store, response, self._pace)
        await self._checked()
        self._confirm(message)

    async def _obey_change(self, message: Message) -> None:
        kind = message.kind
        if kind is Kind.SNAPSHOT:
            self._restore(message.body)
        elif kind is Kind.IDENTITY:
            self.identity.received(message.body)
        elif kind is Kind.REVOCATIONS:
            await self.revocations.received_all(message.body)
            await self._recalled()
        elif kind is Kind.ANSWERED and self._demand is not None:
            self._demand.answered(json.loads(message.body))
        elif kind is Kind.ACCEPT and not (self._released or self._drain.is_set()):
            self.dataplane.start()
            for share in self._shares_of(self.number)[1:]:
                self.dataplane.cover(share, self._others[share])
        self._confirm(message)

    async def _ask(self, demand: Demand) -> None:
        """Tell the parent what connections ask for."""
        while True:
            await demand.more.wait()
            names = demand.unsaid()
            for start in range(0, len(names), MAX_DEMANDED):
                self._send(Message(Kind.DEMAND, 0, json.dumps(names[start : start + MAX_DEMANDED]).encode()))

    def _confirm(self, message: Message) -> None:
        log.debug("change in force", worker=self.number, what=message.kind.name.lower(), bytes=len(message.body))
        self._send(Message(Kind.DONE, message.number))

    def _restore(self, snapshot: bytes) -> None:
        text = self.setup.config.local_xds
        if text is not None:
            from ztunnel.mesh import local  # brings PyYAML, which only a local file needs

            local.load(text).apply(self.store)
        if snapshot:
            self.store.restore(snapshot)
            self._pace.set_aside()

    async def _checked(self) -> None:
        """Wait until every live connection was asked about by the policies as they are now."""
        checked = trio.Event()
        self.dataplane.connections.when_checked(checked.set)
        await checked.wait()

    async def _recalled(self) -> None:
        """Wait until every live tunnel was held against the lists."""
        recalled = trio.Event()
        self.dataplane.when_recalled(recalled.set)
        await recalled.wait()

    def _on_change(self, change: Change) -> None:
        served = self.setup.config.served
        workload = self.store.find_local(
            served.name, served.namespace, served.service_account, self.setup.config.node_name
        )
        if workload is not None:
            self.identity.want(workload.identity)

    # to the parent

    async def _answer(self) -> None:
        """A report may take long, and the data path goes on meanwhile."""
        async with trio.open_nursery() as nursery:
            async for message in self._questions:
                nursery.start_soon(self._tell, message)

    async def _tell(self, message: Message) -> None:
        what, *arguments = message.body.decode().split()
        found: dict[str, Any] = {}
        if what == "profile":
            with contextlib.suppress(Busy):  # the parent gave up on the one before
                found[what] = Rows((await sample(*map(int, arguments))).items(), list)
        elif what == "heap":
            found[what] = await heap.look()
        elif what == "counts":
            for _ in self.dataplane.connections.accounting():
                await trio.lowlevel.checkpoint()
            self.metrics.write()
        else:
            found = self._report(what)
        self._send(Message(Kind.REPORTED, message.number, await jsonstream.collect(found)))

    def _report(self, what: str) -> dict[str, Any]:
        plane = self.dataplane
        found: dict[str, Any] = {
            "tunnels": plane.tunnels(),
            "inbound": len(plane.connections.inbound),
            "outbound": len(plane.connections.outbound),
        }
        if what == "connections":
            found["connections"] = plane.connections.dump()
        return found

    def _account(self) -> None:
        self.dataplane.account()
        self.metrics.write()

    def _announce(self, body: bytes) -> None:
        self._send(Message(Kind.SERIES, 0, body))

    def _send(self, message: Message) -> None:
        """At once where there is room, so that what was said is known even if this process is killed next."""
        data = message.encode()
        if not self._out:
            try:
                data = data[self._sock.send(data, socket.MSG_DONTWAIT) :]
            except OSError:
                pass  # full, or the parent is gone, which the reader sees
        if data:
            self._out.append(data)
            self._wake_writer.set()

    async def _write(self) -> None:
        while True:
            await self._wake_writer.wait()
            self._wake_writer = trio.Event()
            while self._out:
                await trio.lowlevel.wait_writable(self._sock)
                try:
                    sent = self._sock.send(self._out[0], socket.MSG_DONTWAIT)
                except BlockingIOError:
                    continue
                except OSError:
                    return
                rest = self._out.popleft()[sent:]
                if rest:
                    self._out.appendleft(rest)

    async def _flushed(self) -> None:
        with trio.move_on_after(1):
            while self._out:
                await trio.lowlevel.wait_writable(self._sock)
                await trio.lowlevel.checkpoint()


def _adopt(listeners: dict[str, int]) -> dict[str, socket.SocketType]:
    return {what: socket.SocketType(fileno=fd) for what, fd in listeners.items()}


def main(setup: Setup, number: int, sock: socket.socket, memory: int) -> int:
    """Run a worker to its end; its exit code."""
    try:
        end_with(setup.parent)
    except ProcessLookupError:
        return 1  # the parent ended before we began
    call_ourselves(f"ztunnel-work-{number}")
    logs.share_output(setup.output_lock)
    logs.configure(setup.log_format, read_levels(setup.config.log_level)[0])  # type: ignore[arg-type]  # the parent's own
    reactor = Reactor()
    try:
        worker = Worker(setup, number, sock, memory, reactor)
        reactor.run(worker.run)
    except BaseException:
        log.exception("the worker failed", worker=number)
        return 1
    finally:
        logs.shutdown()
    return 0
