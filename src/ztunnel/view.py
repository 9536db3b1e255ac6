"""What the pages of a daemon show, and the few things that they start."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

import trio
from cryptography.hazmat.backends.openssl import backend

from hbone.trio.nursery import open_quiet_nursery
from hbone.version import VERSION
from ztunnel import dump, heap
from ztunnel.dumpconfig import config_dump
from ztunnel.errors import address_text
from ztunnel.profiler import sample
from ztunnel.standing import timestamp

if TYPE_CHECKING:
    from ztunnel.admin import Readiness
    from ztunnel.config import Config
    from ztunnel.datapath import DataPath
    from ztunnel.dns.server import DnsProxy
    from ztunnel.membership import Membership
    from ztunnel.profiler import Stacks

__all__ = ["View"]


class View:
    """A daemon as its pages see it.

    Args:
        config: Its settings.
        mesh: What it knows, and who it is.
        path: Its connections.
        dns: Its DNS proxy, if there is one.
        readiness: What is pending.
    """

    def __init__(
        self, config: Config, mesh: Membership, path: DataPath, dns: DnsProxy | None, readiness: Readiness
    ) -> None:
        self.pages: dict[str, str] = {}
        """Addresses of the pages, by name."""
        self.draining = False
        self.stopping = trio.Event()
        """Set when a page asked for the end."""
        self._config = config
        self._mesh = mesh
        self._path = path
        self._dns = dns
        self._readiness = readiness
        self._started = time.time()

    def shut_down(self) -> None:
        """Begin the drain; calling it again does nothing."""
        self.stopping.set()

    async def refresh(self) -> None:
        """Bring `status` up to date."""
        await self._path.refresh("status")
        await self._mesh.look_at_token()

    async def refresh_counts(self) -> None:
        """Bring the counters up to date."""
        await self._path.refresh("counts")
        await self._mesh.look_at_token()

    def level_changed(self) -> None:
        """The log level is another now."""
        self._path.level_changed()

    def status(self) -> dict[str, Any]:
        """The short view; of several processes as of the last `refresh`."""
        path = self._path
        dns = {"dns": address_text(self._dns.addresses[0])} if self._dns is not None and self._dns.addresses else {}
        return self._mesh.status() | {
            "version": VERSION,
            "pid": os.getpid(),
            "startedAt": timestamp(self._started),
            "state": "draining" if self.draining else "ready" if self._readiness.ready else "starting",
            "pending": self._readiness.pending,
            "tunnels": path.tunnels(),
            "connections": path.open_connections(),
            "workers": path.workers(),
            "listeners": path.listening() | dns | self.pages,
            "keepsSources": path.transparent,
        }

    async def config_dump(self) -> dict[str, Any]:
        """Everything that is known, without secrets. Source: Istio's ztunnel, config dump."""
        await self._path.refresh("connections")
        mesh = self._mesh
        return {
            **dump.mesh_dump(mesh.store),
            "staticConfig": dump.static_dump(mesh.local),
            "certificates": dump.dump_certificates(mesh.svids),
            "version": {
                "version": VERSION,
                "pythonVersion": sys.version.split()[0],
                "cryptoProvider": backend.openssl_version_text(),
                "istioVersion": self._config.istio_version,
            },
            "config": config_dump(self._config),
            "connections": self._path.connections(),
            "tunnels": self._path.tunnels(),
            "workloadState": dump.workload_state(
                mesh.own_workload(), self._path.connections(), ready=self._readiness.ready
            ),
        }

    async def profile(self, seconds: int, frequency: int) -> dict[str, Stacks]:
        """Where the processes spend their CPU, by name.

        Raises:
            Busy: another profile is being taken.
            ConfigurationError: this is not the main thread.
        """
        found: dict[str, Stacks] = {}

        async def workers() -> None:
            found.update(await self._path.profile(seconds, frequency))

        async with open_quiet_nursery() as nursery:
            nursery.start_soon(workers)
            found["daemon"] = await sample(seconds, frequency)
        return dict(sorted(found.items()))

    async def heap(self) -> dict[str, dict[str, Any]]:
        """What fills the memory of the processes, by name."""
        return {"daemon": await heap.look()} | await self._path.heap()

    def trace_heap(self, on: bool) -> None:
        """Begin, or end, to trace allocations in all processes."""
        heap.trace(on)
        self._path.trace_heap(on)

    async def explain(self, destination: str, source: str | None) -> dict[str, Any]:
        """What the mesh does with a connection.

        Raises:
            ConfigurationError: the question names nothing that is known.
        """
        from ztunnel.questions import answer  # brings the explanations of each decision

        return await answer(self._mesh, destination, source)
