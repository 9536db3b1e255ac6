"""The mesh of a running control plane: the documents in force, the snapshot of them, and who waits for news.

A set of documents is taken whole or not at all. With a bad one the last good set stays in force, also across a restart,
and `status` says so until a good one comes.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import attrs
import trio

from hbone.daemon.logs import get_logger
from hbone.errors import ConfigurationError
from miniistiod import lint, vips, watch
from miniistiod.registry import HboneMark, Inputs, Registry, build, vip_needs
from miniistiod.resources import Loader, ResourceSet, WorkloadEntry
from miniistiod.snapshot import EMPTY, Snapshot, difference

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from miniistiod.auth import Caller, Node
    from miniistiod.config import Config
    from miniistiod.metrics import Metrics
    from miniistiod.store import Store

__all__ = ["Mesh", "Status"]

_log = get_logger("miniistiod.mesh")
MAX_SHOWN = 20
"""Findings that are logged and shown of one load."""


@attrs.frozen(kw_only=True)
class Status:
    """How current what we serve is."""

    loaded: bool = False
    """There is a mesh to serve."""
    problems: tuple[str, ...] = ()
    """Why the newest documents are not in force; none when they are."""
    warnings: tuple[str, ...] = ()
    since: float = 0.0
    """When this began, in seconds since 1970."""

    def to_json(self) -> dict[str, Any]:
        """For /ready."""
        state = "not ready" if not self.loaded else "degraded" if self.problems else "ok"
        return {"status": state, "since": self.since, "problems": list(self.problems), "warnings": len(self.warnings)}


class Mesh:
    """Documents in force and their snapshot."""

    def __init__(self, config: Config, store: Store, metrics: Metrics) -> None:
        self._config = config
        self._store = store
        self._metrics = metrics
        self._resources: ResourceSet | None = None
        self._workloads: Mapping[tuple[str, str], WorkloadEntry] = {}
        self._marks = store.marks()
        self._lock = trio.Lock()
        self._loader = Loader()
        self._listeners: dict[object, Callable[[], None]] = {}
        self._present: dict[object, tuple[Node, Caller]] = {}
        self.snapshot: Snapshot = EMPTY
        self.status = Status(since=time.time())
        self.fingerprint: watch.Fingerprint | None = None

    @property
    def resources(self) -> ResourceSet:
        """The documents in force."""
        return self._resources or ResourceSet()

    # -- documents

    async def restore(self) -> None:
        """Bring the last good set of the state in force."""
        files = await trio.to_thread.run_sync(self._store.documents)
        if files:
            resources = await trio.to_thread.run_sync(self._loader.load, files)
            if not resources.errors:
                await self._adopt(resources, files, keep=False)

    async def reload(self) -> None:
        """Read the directory; bring it in force if it is good."""
        async with self._lock:
            try:
                directory = self._config.config_dir
                fingerprint = await trio.to_thread.run_sync(watch.scan, directory)
                files = await trio.to_thread.run_sync(watch.read, directory)
                resources = await trio.to_thread.run_sync(self._loader.load, files)
                self.fingerprint = fingerprint
                self._check(resources)
            except ConfigurationError as error:
                self._degraded((str(error),))
                return
            if resources.errors:
                self._degraded(tuple(str(error) for error in resources.errors))
                return
            try:
                await self._adopt(resources, files, keep=True)
            except ConfigurationError as error:
                self._degraded((str(error),))

    def _check(self, resources: ResourceSet) -> None:
        wanted = resources.mesh.trust_domain
        if wanted is not None and wanted != self._store.trust_domain:
            raise ConfigurationError(
                f"meshconfig.yaml says trustDomain {wanted!r} and the state's root is of {self._store.trust_domain!r};"
                " correct it, or start a new mesh in another state directory"
            )

    def _degraded(self, problems: tuple[str, ...]) -> None:
        if problems == self.status.problems:
            return
        self.status = attrs.evolve(self.status, problems=problems[:MAX_SHOWN], since=time.time())
        self._metrics.degraded.set(1)
        for problem in problems[:MAX_SHOWN]:
            _log.error("documents refused, the last good ones stay in force", reason=problem)

    async def _adopt(self, resources: ResourceSet, files: Mapping[str, str], *, keep: bool) -> None:
        wanted, given = vip_needs(resources)
        numbers = vips.allot(await trio.to_thread.run_sync(self._store.vips), wanted, given)
        if keep:
            seen = [item.meta.key for item in resources.resources]
            await trio.to_thread.run_sync(self._store.keep_documents, files, numbers, seen, time.time())
        self._resources = resources
        self._workloads = {(item.meta.namespace, item.meta.name): item for item in resources.of(WorkloadEntry)}
        for node, caller in list(self._present.values()):
            await self._note_mark(node, caller)
        snapshot = await trio.to_thread.run_sync(self._build)
        warnings = await trio.to_thread.run_sync(self._warnings, numbers)
        problems = () if keep else self.status.problems
        self.status = Status(loaded=True, problems=problems, warnings=warnings, since=time.time())
        self._metrics.degraded.set(1 if problems else 0)
        self._publish(snapshot)
        _log.info(
            "documents in force",
            documents=len(resources.resources),
            addresses=len(self.snapshot.addresses),
            policies=len(self.snapshot.policies),
            warnings=len(warnings),
        )

    def _warnings(self, numbers: Mapping[tuple[str, str], int]) -> tuple[str, ...]:
        between = lint.findings(self._registry(numbers), self._store.trust_domain)
        return tuple(str(item) for item in (*self.resources.findings, *between))

    def _registry(self, numbers: Mapping[tuple[str, str], int]) -> Registry:
        return Registry(
            self.resources,
            Inputs(
                trust_domain=self._store.trust_domain,
                cluster_id=self._config.cluster_id,
                cluster_domain=self._config.cluster_domain,
                marks=self._marks,
                vips=numbers,
                first_seen=self._store.first_seen(),
            ),
        )

    def _build(self) -> Snapshot:
        return build(self._registry(self._store.vips()), self.snapshot)

    async def _rebuild(self) -> None:
        self._publish(await trio.to_thread.run_sync(self._build))

    def _publish(self, snapshot: Snapshot) -> None:
        before = self.snapshot
        if before is EMPTY:
            self.snapshot = snapshot
        elif difference(before.addresses, snapshot.addresses) or difference(before.policies, snapshot.policies):
            self.snapshot = snapshot  # else what clients have stays the base of the next difference
        if self.snapshot is not before:
            for wake in list(self._listeners.values()):
                wake()

    # -- clients

    def listen(self, key: object, wake: Callable[[], None]) -> None:
        """Have `wake` called after each change of the snapshot, until `forget`."""
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
            if await self._note_mark(node, caller):
                await self._rebuild()

    async def enrolled(self, caller: Caller) -> None:
        """A host turned its one-time token into an identity."""
        if caller.name is None:
            return
        async with self._lock:
            before = self._marks.get((caller.namespace, caller.name))
            if before is None or before.service_account != caller.service_account:
                await self._set_mark(caller.namespace, caller.name, HboneMark(service_account=caller.service_account))
                await self._rebuild()

    async def _note_mark(self, node: Node, caller: Caller) -> bool:
        entry = self._workloads.get((caller.namespace, node.name))
        if entry is None or (entry.endpoint.service_account or "default") != caller.service_account:
            return False
        mark = HboneMark(service_account=caller.service_account, node=node.node_name)
        if self._marks.get((caller.namespace, node.name)) == mark:
            return False
        await self._set_mark(caller.namespace, node.name, mark)
        return True

    async def _set_mark(self, namespace: str, name: str, mark: HboneMark) -> None:
        await trio.to_thread.run_sync(self._store.mark, namespace, name, mark.service_account, mark.node, time.time())
        self._marks = {**self._marks, (namespace, name): mark}
        _log.info("workload is reached by HBONE from now on", namespace=namespace, name=name)
