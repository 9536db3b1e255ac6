"""One push of addresses on its way into the store: small ones straight, large ones as a layer that is laid over it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from ztunnel.mesh.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Set as AbstractSet

    from ztunnel.mesh.address import RejectedResource
    from ztunnel.mesh.service import Service
    from ztunnel.mesh.tables import Tables

__all__ = ["Change", "Push"]


@attrs.frozen(kw_only=True)
class Change:
    """What one push changed, removals included."""

    workloads: AbstractSet[str] = frozenset()
    """Uids."""
    services: AbstractSet[str] = frozenset()
    """`namespace/hostname`."""
    policies: AbstractSet[str] = frozenset()
    """Resource names."""

    def __bool__(self) -> bool:
        return bool(self.workloads or self.services or self.policies)


class Push:
    """Takes resources one by one; `commit` puts them in force, all at once.

    Args:
        tables: those in force, where nobody looks before the commit, or a layer.
        commit: gets what changed.
    """

    def __init__(self, tables: Tables, commit: Callable[[Change], Change]) -> None:
        self._tables = tables
        self._commit = commit
        self._workloads: set[str] = set()
        self._services: set[str] = set()

    def upsert(self, resource: Workload | Service) -> None:
        """New or changed: it replaces the one of the same name."""
        if isinstance(resource, Workload):
            self._tables.take_workload(resource)
            self._workloads.add(resource.uid)
        else:
            self._tables.take_service(resource)
            self._services.add(resource.key)

    def reject(self, error: RejectedResource) -> None:
        """What could not be read. A former good version of it stays; without one, its addresses are refused."""
        if self._tables.take_rejection(error):
            self._workloads.add(error.name)

    def remove(self, name: str) -> None:
        """Of a uid, or `namespace/hostname`; an unknown one is ignored."""
        workload, service = self._tables.take_removal(name)
        if workload:
            self._workloads.add(name)
        elif service:
            self._services.add(name)

    def commit(self) -> Change:
        """Put it in force, and announce what changed."""
        return self._commit(Change(workloads=self._workloads, services=self._services))
