"""The parent of the workers: starts them, tells all of them every change, replaces one that dies, drains them.

One class, and so one long file: each of its tasks reads and changes which worker has which place.
"""

from __future__ import annotations

import functools
import json
import os
import socket
from typing import TYPE_CHECKING, Any

import attrs
import trio

from hbone.daemon import logs
from hbone.errors import HboneError
from ztunnel.control.revocation import pack_lists
from ztunnel.control.svids import Backoff
from ztunnel.dataplane import SocketCalls, options_of
from ztunnel.dataplane.listener import open_listeners
from ztunnel.errors import address_text
from ztunnel.jsonstream import Rows
from ztunnel.logs import INBOUND, OUTBOUND
from ztunnel.mesh import ADDRESS_TYPE, AUTHORIZATION_TYPE
from ztunnel.metrics import Counts
from ztunnel.standing import timestamp
from ztunnel.wire import discovery_pb2
from ztunnel.workers.book import Page, make_memory
from ztunnel.workers.link import Link
from ztunnel.workers.process import adopt_orphans, how_ended
from ztunnel.workers.starting import Starter, StartFailed
from ztunnel.workers.wire import Kind, pack_identity
from ztunnel.workers.worker import Setup

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hbone.identity import Identity
    from ztunnel.config import Config
    from ztunnel.control.demand import Demand
    from ztunnel.given import Given
    from ztunnel.membership import Membership
    from ztunnel.metrics import Metrics
    from ztunnel.profiler import Stacks

__all__ = ["Supervisor"]

CONFIRM = 10.0
"""Seconds that a worker has to put a change in force, and no less than the next for each resource."""
CONFIRM_RESOURCE = 0.002
REPORT = 1.0
"""Seconds that a page waits for the workers' part of it."""
REPORT_LONG = 30.0
"""The same, for what takes a worker long."""
BEAT = 5.0
"""Seconds between two questions whether a worker is there, and ..."""
BEAT_TIMEOUT = 20.0
"""... for its answer."""
STEADY = 10.0
"""Seconds after which a worker that dies is replaced at once."""
DRAIN_MORE = 3.0
"""Seconds beyond the drain deadline that workers have to end."""

log = logs.get_logger("ztunnel.workers")


@attrs.define(eq=False)
class _Place:
    """One of the workers, whichever process it is."""

    number: int
    link: Link | None = None
    serving: trio.Event = attrs.field(factory=trio.Event)
    """Set when its first process began to accept."""
    restarts: int = 0
    covered_by: Link | None = None
    """Accepts for it while it is away."""


class Supervisor:
    """The data path of several processes, as one.

    Args:
        config: settings.
        mesh: what all of them are told.
        metrics: gets the sum of what they count.
        count: how many.
    """

    def __init__(self, config: Config, mesh: Membership, metrics: Metrics, count: int) -> None:
        self.config = config
        self.transparent = False
        """Applications see the client's own address."""
        self._mesh = mesh
        self._places = [_Place(number) for number in range(count)]
        self._sockets: list[dict[str, socket.SocketType]] = []
        self._shared: frozenset[str] = frozenset()
        self._listening: dict[str, str] = {}
        self._starter: Starter | None = None
        self._lock = -1
        self._accepting = False
        self._departed = Counts()
        self._restarts = 0
        self._nursery: trio.Nursery | None = None
        self._stopping = trio.Event()
        self._all_ended = trio.Event()
        mesh.spread = self.spread
        metrics.add_counts(self.counts)
        metrics.add_counter("ztunnel_worker_restarts", "Workers that died and were replaced", lambda: self._restarts)
        metrics.add_gauge("ztunnel_workers", "Workers that accept connections", lambda: len(list(self._serving())))

    # life

    def bind(self, given: Given | None = None) -> None:
        """Listen; nothing is accepted before `start`.

        The sockets stay open here, so what waits on them outlives a worker.

        Args:
            given: sockets to be used instead of new ones.

        Raises:
            ConfigurationError: an address cannot be had, or the kernel cannot do what workers need.
        """
        adopt_orphans()
        config = self.config
        calls = SocketCalls(options_of(config))
        listeners = open_listeners(calls, config, len(self._places), given)
        self.transparent, self._sockets, self._shared = listeners.transparent, listeners.shares, listeners.shared
        self._listening = {what: address_text(calls.local_address(sock)) for what, sock in self._sockets[0].items()}
        self._lock = os.memfd_create("ztunnel-output", os.MFD_CLOEXEC)
        logs.share_output(self._lock)
        self._starter = Starter(self._setup())

    def _setup(self) -> Setup:
        config = self.config
        own = attrs.evolve(
            config,
            auth_token=None,
            xds_headers=(),
            ca_headers=(),
            state_dir=None,
            crl_path=None,
            local_xds_path=None,
            local_xds=self._mesh.local_text,
            window_budget=config.window_budget // len(self._places),
        )
        return Setup(
            parent=os.getpid(),
            config=own,
            transparent=self.transparent,
            listeners=tuple({what: sock.fileno() for what, sock in share.items()} for share in self._sockets),
            shared=self._shared,
            workers=len(self._places),
            log_format=logs.current_format(),
            output_lock=self._lock,
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the workers running until cancelled; on a drain, until they ended."""
        unsubscribe = self._mesh.svids.subscribe(self._rotated)
        forget_lists = self._mesh.revocations.subscribe(self._lists_changed)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                async with trio.open_nursery() as keepers:
                    for place in self._places:
                        keepers.start_soon(self._keep, place)
                    task_status.started()
                self._all_ended.set()
                nursery.cancel_scope.cancel()
        finally:
            unsubscribe()
            forget_lists()
            self._nursery = None
            self.close()

    async def start(self) -> None:
        """Have all of them accept; returns when they do."""
        self._accepting = True
        for place in self._places:
            if place.link is not None:
                self._let_accept(place.link)
        for place in self._places:
            await place.serving.wait()

    def sockets(self) -> list[tuple[str, socket.SocketType]]:
        """What is listened on, with the purposes; each socket once."""
        found = {sock.fileno(): (what, sock) for share in self._sockets for what, sock in share.items()}
        return list(found.values())

    def release(self) -> None:
        """Have none of them accept further: another process has the sockets."""
        self._stopping.set()
        for link in self._links():
            link.send(Kind.RELEASE)
        self._stop_listening()

    async def drain(self) -> None:
        """Have all of them drain, and wait until they ended, a little longer than the deadline at most."""
        self._stopping.set()
        self._stop_listening()
        for link in self._links():
            link.send(Kind.DRAIN)
        with trio.move_on_after(self.config.drain_deadline + DRAIN_MORE):
            await self._all_ended.wait()
        for link in self._links():
            log.warning("a worker did not end by the deadline; it is killed", worker=link.number, pid=link.pid)
            link.kill()

    def _stop_listening(self) -> None:
        if self._starter is not None:
            self._starter.close()  # it holds the listeners, too
            self._starter = None
        for share in self._sockets:
            for sock in share.values():
                sock.close()
        self._sockets = []

    def close(self) -> None:
        """End what is left at once."""
        self._stopping.set()
        self._stop_listening()
        for link in self._links():
            link.kill()
        if self._lock >= 0:
            logs.share_output(None)
            os.close(self._lock)
            self._lock = -1

    # one worker

    async def _keep(self, place: _Place) -> None:
        backoff = Backoff(first=0.1, limit=10.0)
        while not self._stopping.is_set():
            began = trio.current_time()
            pid: int | None = None
            lost = 0
            try:
                link = await self._spawn(place)
            except StartFailed as failed:
                reason = str(failed)
            else:
                pid = link.pid
                lost = await self._attend(place, link)
                reason = how_ended(link.code)
            if self._stopping.is_set():
                return
            place.restarts += 1
            self._restarts += 1
            steady = trio.current_time() - began >= STEADY
            if steady:
                backoff.reset()
            wait = 0.0 if steady else backoff.wait()
            log.error(
                "a worker died and is replaced",
                worker=place.number,
                pid=pid,
                reason=reason,
                connections_lost=lost,
                wait=f"{wait:.2f}s",
            )
            with trio.move_on_after(wait):
                await self._stopping.wait()

    async def _spawn(self, place: _Place) -> Link:
        ours, theirs = socket.socketpair()
        memory = -1
        page: Page | None = None
        try:
            memory = make_memory()
            page = Page(memory)
            if self._starter is None:
                raise StartFailed("the daemon is stopping")
            pid = await self._starter.fork(place.number, theirs.fileno(), memory)
        except BaseException as error:
            ours.close()
            if page is not None:
                page.close()
            if isinstance(error, OSError):
                raise StartFailed(f"a worker cannot be started: {error.strerror}") from None
            raise
        finally:
            theirs.close()
            if memory >= 0:
                os.close(memory)
        return Link(place.number, pid, ours, page, self._fetch, self._demanded)

    async def _attend(self, place: _Place, link: Link) -> int:
        """Tell a new worker everything, and serve it until it ends; returns how many connections ended with it."""
        place.link = link
        try:
            link.send(Kind.LEVEL, logs.current_level().encode())
            link.send_snapshot(self._mesh.store.snapshot_in_slices())
            for body in self._removed_from_local():
                link.send(Kind.DELTA, body)
            if self._mesh.revocations.current:
                link.send(Kind.REVOCATIONS, pack_lists(self._mesh.revocations.current))
            link.send(Kind.IDENTITY, pack_identity(self._mesh.svids.current()))
            if self._stopping.is_set():
                link.send(Kind.DRAIN)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, link)
                if self._accepting:
                    self._let_accept(link)
                await link.run()
                nursery.cancel_scope.cancel()
        finally:
            place.link = None
            counts, lost = link.page.last_counts()
            link.page.close()
            self._departed.add(counts)
            if not self._stopping.is_set():
                self._cover(place)
        return lost

    def _removed_from_local(self) -> Iterator[bytes]:
        """What the local file says and discovery took away since: a new worker reads the file again."""
        mesh = self._mesh
        addresses, policies = mesh.local_names()
        store = mesh.store
        for url, names in (
            (ADDRESS_TYPE, addresses - store.workloads.keys() - store.services.keys()),
            (AUTHORIZATION_TYPE, policies - store.policies.keys()),
        ):
            if names:
                response = discovery_pb2.DeltaDiscoveryResponse(type_url=url, removed_resources=sorted(names))
                yield response.SerializeToString()

    def _let_accept(self, link: Link) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(self._accepts, link, link.send(Kind.ACCEPT))

    async def _accepts(self, link: Link, number: int) -> None:
        if not await self._confirm(link, number, self._patience(0)):
            return
        place = self._places[link.number]
        if place.link is not link:
            return
        link.serving = True
        if place.covered_by is not None:
            place.covered_by.send(Kind.UNCOVER, str(place.number).encode())
            place.covered_by = None
        log.info("worker ready", worker=link.number, pid=link.pid)
        place.serving.set()

    def _cover(self, place: _Place) -> None:
        """Until it is replaced, another accepts what the kernel deals out to it."""
        other = next((link for link in self._serving() if link.number != place.number), None)
        place.covered_by = other
        if other is not None:
            other.send(Kind.COVER, str(place.number).encode())

    async def _watch(self, link: Link) -> None:
        """See that it still turns."""
        while True:
            await trio.sleep(BEAT)
            if link.serving and not await link.ask("nothing", BEAT_TIMEOUT) and link.alive:
                log.error(f"a worker gave no sign for {BEAT_TIMEOUT:g} s; it is killed", worker=link.number)
                link.kill()
                return

    def _links(self) -> list[Link]:
        return [place.link for place in self._places if place.link is not None]

    def _serving(self) -> Iterator[Link]:
        return (link for link in self._links() if link.serving)

    # what all are told

    def _patience(self, resources: int) -> float:
        store = self._mesh.store
        known = len(store.workloads) + len(store.services) + len(store.policies)
        return max(CONFIRM, (resources + known) * CONFIRM_RESOURCE)

    async def spread(self, raw: bytes, resources: int) -> None:
        """Put a response of discovery in force in every worker; returns when it is, or they are killed.

        One that is replaced meanwhile begins with what is in force here.
        """
        sent = [(link, link.send(Kind.DELTA, raw)) for link in self._links()]
        async with trio.open_nursery() as nursery:
            for link, number in sent:
                nursery.start_soon(self._confirm, link, number, self._patience(resources))

    async def _confirm(self, link: Link, number: int, seconds: float) -> bool:
        if await link.confirmed(number, seconds):
            return True
        if link.alive:
            log.error(f"a worker did not take a change within {seconds:g} s; it is killed", worker=link.number)
            link.kill()
        return False

    def _rotated(self, identity: Identity) -> None:
        self._tell(Kind.IDENTITY, pack_identity(identity))

    def _lists_changed(self) -> None:
        self._tell(Kind.REVOCATIONS, pack_lists(self._mesh.revocations.current))

    def _tell(self, kind: Kind, body: bytes) -> None:
        """Tell all; who does not take it in time is killed."""
        for link in self._links():
            number = link.send(kind, body)
            if self._nursery is not None:
                self._nursery.start_soon(self._confirm, link, number, self._patience(0))

    def _fetch(self, link: Link) -> None:
        if not link.fetching and self._nursery is not None:
            link.fetching = True
            self._nursery.start_soon(self._fetch_for, link)

    def _demanded(self, link: Link, names: list[str]) -> None:
        if self._nursery is not None and self._mesh.demand is not None:
            self._nursery.start_soon(self._answer, link, names, self._mesh.demand)

    async def _answer(self, link: Link, names: list[str], demand: Demand) -> None:
        """Tell a worker once names were answered; the answers themselves are told to all before."""
        for name in names:
            while link.alive and (waiting := demand.ask(name)) is not None:
                await waiting.wait()
        if link.alive:
            link.send(Kind.ANSWERED, json.dumps(names).encode())

    async def _fetch_for(self, link: Link) -> None:
        try:
            identity = await self._mesh.svids.fetch()
        except HboneError as error:
            link.send(Kind.NO_IDENTITY, str(error).encode())
        else:
            link.send(Kind.IDENTITY, pack_identity(identity))
        finally:
            link.fetching = False

    def level_changed(self) -> None:
        """The log level is another now."""
        for link in self._links():
            link.send(Kind.LEVEL, logs.current_level().encode())

    async def profile(self, seconds: int, frequency: int) -> dict[str, Stacks]:
        """Where each worker spends its CPU; one that does not answer is left out."""
        found = await self._asked("profile", f"profile {seconds} {frequency}", seconds + REPORT_LONG)
        return {name: {tuple(stack): spent for stack, spent in rows} for name, rows in found.items()}

    async def heap(self) -> dict[str, dict[str, Any]]:
        """What fills the memory of each."""
        return await self._asked("heap", "heap", REPORT_LONG)

    def trace_heap(self, on: bool) -> None:
        """Begin, or end, to trace allocations in each that runs now."""
        for link in self._links():
            link.send(Kind.TRACE, b"on" if on else b"")

    async def _asked(self, what: str, question: str, seconds: float) -> dict[str, Any]:
        """What each worker has to say to this, by name."""
        found: dict[str, Any] = {}

        async def ask(link: Link) -> None:
            if await link.ask(question, seconds):
                found[f"worker {link.number}"] = link.report.pop(what, {})

        async with trio.open_nursery() as nursery:
            for link in self._links():
                nursery.start_soon(ask, link)
        return dict(sorted(found.items()))

    # what the pages show

    async def refresh(self, what: str) -> None:
        """Ask all of them: `counts`, `status` or `connections`. One that does not answer in time is left out."""
        async with trio.open_nursery() as nursery:
            for link in self._links():
                nursery.start_soon(functools.partial(link.ask, what, REPORT))

    def counts(self) -> Counts:
        """What was counted in all, by those that ended as well."""
        total = Counts()
        total.add(self._departed)
        for link in self._links():
            total.add(link.page.counts())
        return total

    def listening(self) -> dict[str, str]:
        """Addresses by purpose."""
        return dict(self._listening)

    def open_connections(self) -> dict[str, int]:
        """How many there are, by direction, as of the last `refresh`."""
        return {way: sum(int(link.report.get(way, 0)) for link in self._links()) for way in (INBOUND, OUTBOUND)}

    def connections(self) -> dict[str, Rows]:
        """Each of them, by direction, as of the last `refresh`."""
        reports = [(link.number, link.report.get("connections", {})) for link in self._links()]

        def rows(way: str) -> Rows:  # a function, as the generator is read later
            return Rows(
                ((number, connection) for number, found in reports for connection in found.get(way, ())),
                lambda item: {**item[1], "worker": item[0]},
            )

        return {way: rows(way) for way in (INBOUND, OUTBOUND)}

    def tunnels(self) -> list[dict[str, Any]]:
        """Tunnels of all, as of the last `refresh`."""
        return [
            {**tunnel, "worker": link.number} for link in self._links() for tunnel in link.report.get("tunnels", ())
        ]

    def workers(self) -> list[dict[str, Any]]:
        """The processes."""
        return [
            {
                "worker": place.number,
                "pid": place.link.pid if place.link is not None else None,
                "state": _state(place.link, draining=self._stopping.is_set()),
                "startedAt": timestamp(place.link.started_at) if place.link is not None else None,
                "restarts": place.restarts,
                "opened": _opened(place.link),
                INBOUND: int(place.link.report.get(INBOUND, 0)) if place.link is not None else 0,
                OUTBOUND: int(place.link.report.get(OUTBOUND, 0)) if place.link is not None else 0,
                "tunnels": len(place.link.report.get("tunnels", ())) if place.link is not None else 0,
            }
            for place in self._places
        ]


def _state(link: Link | None, *, draining: bool) -> str:
    if link is None:
        return "ended" if draining else "away"
    return "draining" if draining else "serving" if link.serving else "starting"


def _opened(link: Link | None) -> int:
    """Connections so far, of this process."""
    return sum(traffic.opened_count for traffic in link.page.counts().traffic.values()) if link is not None else 0
