"""The workload that this proxy serves, as the store has it now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from ztunnel.errors import UnknownLocalWorkload

if TYPE_CHECKING:
    from ztunnel.config import WorkloadInfo
    from ztunnel.mesh.store import Change, Store
    from ztunnel.mesh.workload import Workload

__all__ = ["LocalWorkload"]

_WAIT_SECONDS: Final = 5.0


class LocalWorkload:
    """Finds the workload, and waits for the control plane to tell of it.

    Args:
        store: the mesh.
        served: name, namespace and service account of the workload.
        node: only a workload of this node counts, if given.
    """

    def __init__(self, store: Store, served: WorkloadInfo, node: str | None) -> None:
        self._store = store
        self._served = served
        self._node = node
        self._found: Workload | None = None
        self._changed = trio.Event()
        self.close = store.subscribe(self._on_change)
        """Forget the store."""

    @property
    def current(self) -> Workload | None:
        """The workload; None while nobody has told of it."""
        if self._found is None:
            served = self._served
            self._found = self._store.find_local(served.name, served.namespace, served.service_account, self._node)
        return self._found

    async def wait(self) -> Workload:
        """The workload, for which the control plane has five seconds.

        Raises:
            UnknownLocalWorkload: it did not tell.
        """
        with trio.move_on_after(_WAIT_SECONDS):
            while (workload := self.current) is None:
                await self._changed.wait()
            return workload
        raise self.unknown()

    def unknown(self) -> UnknownLocalWorkload:
        """The error of a connection that cannot be served."""
        served = self._served
        return UnknownLocalWorkload(served.name, served.namespace, served.service_account)

    def _on_change(self, change: Change) -> None:
        if change.workloads:
            self._found = None
            self._changed.set()
            self._changed = trio.Event()
