"""The mesh of a running control plane: the documents in force, the catalog of them, and who waits for news.

A set of documents is taken whole or not at all. With a bad one the last good set stays in force, also across a restart,
and `status` says so until a good one comes. What a change costs goes with the change, not with the mesh.
"""

from __future__ import annotations

import datetime
import gc
import time
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import trio

from hbone.daemon.logs import get_logger
from hbone.errors import ConfigurationError
from miniistiod import conditions, lint, services, vips, watch
from miniistiod.catalog import Catalog
from miniistiod.explain import MeshView
from miniistiod.registry import HboneMark, Inputs, Registry
from miniistiod.resources import Loader, WorkloadEntry, WorkloadGroup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from miniistiod.auth import Caller, Node
    from miniistiod.catalog import Plan
    from miniistiod.config import Config
    from miniistiod.metrics import Metrics
    from miniistiod.resources import Delta, Resource
    from miniistiod.resources.binding import Key
    from miniistiod.store import Store
    from ztunnel.mesh.store import Store as StoreView

__all__ = ["Mesh", "Status"]

T = TypeVar("T")
_log = get_logger("miniistiod.mesh")
MANY = 10_000
"""Addresses in one change after which the collector of garbage is told that they stay."""
MAX_SHOWN = 20
"""Findings that are logged and shown of one load."""


@attrs.frozen(kw_only=True)
class Status:
    """How current what we serve is."""

    loaded: bool = False
    """There is a mesh to serve."""
    problems: tuple[str, ...] = ()
    """Why the newest documents are not in force; none when they are."""
    warnings: int = 0
    """Within documents; there may be more between them."""
    since: float = 0.0
    """When this began, in seconds since 1970."""

    def to_json(self) -> dict[str, Any]:
        """For /ready."""
        state = "not ready" if not self.loaded else "degraded" if self.problems else "ok"
        return {"status": state, "since": self.since, "problems": list(self.problems), "warnings": self.warnings}


class Mesh:
    """Documents in force and their catalog."""

    def __init__(self, config: Config, store: Store, metrics: Metrics) -> None:
        self._config = config
        self._store = store
        self._metrics = metrics
        self._marks = store.marks()
        self._first_seen = store.first_seen()
        self._vips = store.vips()
        self.catalog = Catalog()
        self._registry = Registry(
            Inputs(
                trust_domain=store.trust_domain,
                cluster_id=config.cluster_id,
                cluster_domain=config.cluster_domain,
                marks=self._marks,
                vips=self._vips,
                first_seen=self._first_seen,
            ),
            self.catalog,
        )
        self._lock = trio.Lock()
        self._loader = Loader()
        self._unsaved: dict[str, str | None] = {}
        """Texts that were read since the state was last written; None for files that are gone."""
        self._entries: dict[Key, WorkloadEntry] = {}
        """Machines that registered themselves."""
        self._listeners: dict[object, Callable[[], None]] = {}
        self._present: dict[object, tuple[Node, Caller]] = {}
        self._followers: list[Callable[[], None]] = []
        self._looks = 0
        """How often documents may have changed, also where the catalog did not."""
        self._told: tuple[int, tuple[str, ...]] = (-1, ())
        self._view = MeshView()
        self._looking = trio.Lock()
        self.status = Status(since=time.time())
        self.fingerprint: watch.Fingerprint | None = None

    # -- documents

    async def restore(self) -> None:
        """Bring the last good set of the state in force."""
        files = await trio.to_thread.run_sync(self._store.documents)
        if not files:
            return
        async with self._lock:
            await trio.to_thread.run_sync(self._loader.update, files)
            if not self._loader.errors():
                await self._adopt(restored=True)

    async def reload(self) -> None:
        """Read what changed in the directory; bring it in force if it is good."""
        async with self._lock:
            self._looks += 1
            try:
                await trio.to_thread.run_sync(self._read)
                self._check()
                errors = await trio.to_thread.run_sync(self._loader.errors)
                if errors:
                    self._degraded(tuple(str(error) for error in errors))
                else:
                    await self._adopt()
            except ConfigurationError as error:
                self._degraded((str(error),))

    def _read(self) -> None:
        directory = self._config.config_dir
        seen = watch.scan(directory)
        known = self.fingerprint or {}
        texts = watch.read(directory, [path for path, stamp in seen.items() if known.get(path) != stamp])
        gone = [path for path in self._loader.paths if path not in seen]
        for path in self._loader.update(texts, gone):
            self._unsaved[path] = texts.get(path)
        self.fingerprint = seen

    def _check(self) -> None:
        wanted = self._loader.mesh.trust_domain
        if wanted is not None and wanted != self._store.trust_domain:
            raise ConfigurationError(
                f"meshconfig.yaml says trustDomain {wanted!r} and the state's root is of {self._store.trust_domain!r};"
                " correct it, or start a new mesh in another state directory"
            )

    def _degraded(self, problems: tuple[str, ...]) -> None:
        problems = problems[:MAX_SHOWN]
        if problems == self.status.problems:
            return
        self.status = attrs.evolve(self.status, problems=problems, since=time.time())
        self._metrics.degraded.set(1)
        for problem in problems:
            _log.error("documents refused, the last good ones stay in force", reason=problem)

    async def _adopt(self, *, restored: bool = False) -> None:
        """Bring the newest documents in force. What is decided for them is committed before anybody hears of it."""
        plan = await trio.to_thread.run_sync(self._plan, restored, list(self._present.values()))
        self._loader.taken()
        self._apply(plan)
        if len(plan.addresses) > MANY:
            await trio.to_thread.run_sync(_settle_memory)
        problems = self.status.problems if restored else ()
        self.status = Status(loaded=True, problems=problems, warnings=self._loader.warnings, since=time.time())
        self._metrics.degraded.set(1 if problems else 0)
        _log.info(
            "documents in force",
            documents=len(self._loader.documents),
            addresses=len(self.catalog.addresses),
            policies=len(self.catalog.policies),
            warnings=self.status.warnings,
        )

        for follow in self._followers:
            follow()

    def follow(self, callback: Callable[[], None]) -> None:
        """Have `callback` called whenever other documents came in force, whether or not they changed the catalog."""
        self._followers.append(callback)

    def _plan(self, restored: bool, present: list[tuple[Node, Caller]]) -> Plan:
        delta = self._loader.delta()
        for node, caller in present:
            # Before anybody hears of a new machine, so that none is told to reach it in plaintext.
            self._note_mark(delta.changed.get(("WorkloadEntry", caller.namespace, node.name)), node, caller)
        numbers = self._allot(delta)
        now = datetime.datetime.now(datetime.UTC)
        seen: dict[Key, datetime.datetime | None] = {
            key: now for key in delta.changed if key not in self._first_seen and not restored
        }
        seen.update(dict.fromkeys(key for key in delta.removed if key in self._first_seen))
        if not restored:
            if self._unsaved or seen or numbers is not None:
                self._store.change_documents(self._unsaved, numbers, seen)
            self._unsaved = {}
        for key, moment in seen.items():
            if moment is None:
                del self._first_seen[key]
            else:
                self._first_seen[key] = moment
        if numbers is not None:
            self._vips = numbers
        changed: dict[Key, Resource] = {key: self._entries[key] for key in delta.removed if key in self._entries}
        removed = [key for key in delta.removed if key not in changed]
        return self._registry.change({**changed, **delta.changed}, removed, mesh=delta.mesh, vips=numbers)

    def _allot(self, delta: Delta) -> dict[tuple[str, str], int] | None:
        """Automatic addresses of the newest documents; None when they are those of before."""
        before = services.vip_needs(item for item in delta.before.values() if item is not None)
        if before == services.vip_needs(delta.changed.values()):
            return None
        wanted, given = services.vip_needs(self._loader.services.values())
        numbers = vips.allot(self._vips, wanted, given)
        return None if numbers == self._vips else numbers

    def _apply(self, plan: Plan) -> None:
        self._looks += 1
        if self.catalog.apply(plan):
            for wake in list(self._listeners.values()):
                wake()

    # -- what is known of the documents in force

    async def warnings(self) -> tuple[str, ...]:
        """What probably is not as it was meant, within documents and between them."""
        async with self._lock:
            if self._told[0] != self._looks:
                self._told = (self._looks, await trio.to_thread.run_sync(self._warnings))
            return self._told[1]

    def _warnings(self) -> tuple[str, ...]:
        between = lint.findings(self._registry, self._store.trust_domain)
        return tuple(str(item) for item in (*self._loader.findings(), *between))

    async def conditions(self) -> dict[str, list[dict[str, Any]]]:
        """What Istio would write into the status of the documents, by `Kind namespace/name`."""
        async with self._lock:
            return await trio.to_thread.run_sync(conditions.every_condition, self._registry)

    async def ask(self, question: Callable[[StoreView], T]) -> T:
        """Answer a question about the mesh as a ztunnel sees it; in a thread, for it may be a long one."""
        async with self._looking:
            news = self._view.news(self.catalog)

            def answer() -> T:
                return question(self._view.take(news))

            return await trio.to_thread.run_sync(answer)

    def group(self, namespace: str, name: str) -> WorkloadGroup | None:
        """A WorkloadGroup of the documents in force."""
        found = self._registry.documents.get(("WorkloadGroup", namespace, name))
        return found if isinstance(found, WorkloadGroup) else None

    def entry(self, namespace: str, name: str) -> WorkloadEntry | None:
        """A WorkloadEntry of the documents in force, or of a machine that registered itself."""
        found = self._registry.documents.get(("WorkloadEntry", namespace, name))
        return found if isinstance(found, WorkloadEntry) else None

    @property
    def network(self) -> str:
        """The network that is meant where none is named."""
        return self._registry.network

    async def marks_changed(self) -> None:
        """The state's marks may have been changed by a command: bring the mesh in line with them."""
        async with self._lock:
            marks = await trio.to_thread.run_sync(self._store.marks)
            changed = [key for key in {**marks, **self._marks} if marks.get(key) != self._marks.get(key)]
            for key in changed:
                self._marks.pop(key, None)
            self._marks.update({key: marks[key] for key in changed if key in marks})
            if changed:
                await self._change({}, touched=[("WorkloadEntry", *key) for key in changed])

    # -- machines that register themselves

    async def put_entries(self, entries: Iterable[WorkloadEntry]) -> None:
        """Add machines beside the documents, or replace them. A document of the same name has precedence."""
        async with self._lock:
            changed: dict[Key, Resource] = {}
            for item in entries:
                self._entries[item.meta.key] = item
                if not self._documented(item.meta.key):
                    changed[item.meta.key] = item
            await self._change(changed)

    async def drop_entries(self, places: Iterable[tuple[str, str]]) -> None:
        """Take machines away again, by namespace and name."""
        async with self._lock:
            keys: list[Key] = [("WorkloadEntry", *place) for place in places]
            gone = [key for key in keys if self._entries.pop(key, None) is not None and not self._documented(key)]
            await self._change({}, gone)

    def _documented(self, key: Key) -> bool:
        found = self._registry.documents.get(key)
        return found is not None and bool(found.meta.path)

    async def _change(
        self, changed: dict[Key, Resource], removed: Iterable[Key] = (), touched: Iterable[Key] = ()
    ) -> None:
        def plan() -> Plan:
            return self._registry.change(changed, removed, touched=touched)

        self._apply(await trio.to_thread.run_sync(plan))

    # -- clients

    def listen(self, key: object, wake: Callable[[], None]) -> None:
        """Have `wake` called after each change of the catalog, until `forget`."""
        self._listeners[key] = wake

    def forget(self, key: object) -> None:
        """Undo `listen` and `present`."""
        self._listeners.pop(key, None)
        self._present.pop(key, None)

    async def present(self, key: object, node: Node, caller: Caller) -> None:
        """A ztunnel is connected as this node: from now on its WorkloadEntry is reached by HBONE only.

        It stays so when the ztunnel goes away: to fall back to plaintext would be for an attacker to ask for.
        """
        if node.kind != "ztunnel":
            return
        self._present[key] = (node, caller)
        async with self._lock:
            found = self.entry(caller.namespace, node.name)
            if await trio.to_thread.run_sync(self._note_mark, found, node, caller):
                await self._change({}, touched=[("WorkloadEntry", caller.namespace, node.name)])

    async def enrolled(self, caller: Caller) -> None:
        """A host turned its one-time token into an identity."""
        if caller.name is None:
            return
        async with self._lock:
            before = self._marks.get((caller.namespace, caller.name))
            if before is None or before.service_account != caller.service_account:
                mark = HboneMark(service_account=caller.service_account)
                await trio.to_thread.run_sync(self._set_mark, caller.namespace, caller.name, mark)
                await self._change({}, touched=[("WorkloadEntry", caller.namespace, caller.name)])

    def _note_mark(self, item: Resource | None, node: Node, caller: Caller) -> bool:
        """Mark the entry of a node that is connected; whether it was not marked so before."""
        if not isinstance(item, WorkloadEntry):
            return False
        if (item.endpoint.service_account or "default") != caller.service_account:
            return False
        mark = HboneMark(service_account=caller.service_account, node=node.node_name)
        if self._marks.get((caller.namespace, node.name)) == mark:
            return False
        self._set_mark(caller.namespace, node.name, mark)
        return True

    def _set_mark(self, namespace: str, name: str, mark: HboneMark) -> None:
        self._store.mark(namespace, name, mark.service_account, mark.node, time.time())
        self._marks[(namespace, name)] = mark
        _log.info("workload is reached by HBONE from now on", namespace=namespace, name=name)


def _settle_memory() -> None:
    """What was just read is there to stay: the collector need not walk over it again at each later change."""
    gc.collect()
    gc.freeze()
