"""The data path as the daemon sees it: in this process, or in several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import trio

from ztunnel.dataplane import Dataplane
from ztunnel.errors import address_text
from ztunnel.logs import INBOUND, OUTBOUND, AccessLog

if TYPE_CHECKING:
    import socket

    from ztunnel.config import Config
    from ztunnel.dataplane import Reactor
    from ztunnel.given import Given
    from ztunnel.jsonstream import Rows
    from ztunnel.membership import Membership
    from ztunnel.metrics import Metrics
    from ztunnel.profiler import Stacks

__all__ = ["DataPath", "OneProcess", "data_path"]


class DataPath(Protocol):
    """What starts, drains, and is shown."""

    @property
    def transparent(self) -> bool:
        """Applications see the client's own address."""
        ...

    def bind(self, given: Given | None = None) -> None:
        """Listen, where there is one on a socket that was given; nothing is accepted before `start`.

        Raises ConfigurationError.
        """
        ...

    def sockets(self) -> list[tuple[str, socket.SocketType]]:
        """What it listens on, with the purposes; a purpose may come several times."""
        ...

    def release(self) -> None:
        """Accept nothing further: another process has the sockets. `drain` comes next."""
        ...

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """What goes on beside the connections, until cancelled."""
        ...

    async def start(self) -> None:
        """Begin to accept."""
        ...

    async def drain(self) -> None:
        """Accept nothing further, and let connections finish until the deadline."""
        ...

    def close(self) -> None:
        """Cut what is left."""
        ...

    async def refresh(self, what: str) -> None:
        """Bring up to date what follows: `counts` of metrics, `status`, or `connections`."""
        ...

    def listening(self) -> dict[str, str]:
        """Addresses by purpose."""
        ...

    def open_connections(self) -> dict[str, int]:
        """How many, by direction."""
        ...

    def connections(self) -> dict[str, Rows]:
        """Each, by direction; to be written once."""
        ...

    def tunnels(self) -> list[dict[str, Any]]:
        """Each."""
        ...

    def workers(self) -> list[dict[str, Any]]:
        """The processes; none where this one is the only one."""
        ...

    def level_changed(self) -> None:
        """The log level is another now."""
        ...

    async def profile(self, seconds: int, frequency: int) -> dict[str, Stacks]:
        """Where its own processes spend their CPU, by name; none where this one is the only one."""
        ...

    async def heap(self) -> dict[str, dict[str, Any]]:
        """What fills their memory."""
        ...

    def trace_heap(self, on: bool) -> None:
        """Begin, or end, to trace their allocations."""
        ...


class OneProcess:
    """The data path in the daemon's own process."""

    def __init__(self, reactor: Reactor, config: Config, mesh: Membership, metrics: Metrics) -> None:
        self.plane = Dataplane(
            reactor,
            config,
            mesh.store,
            mesh.svids,
            metrics,
            AccessLog(policy_at_info=config.policy_info_logging),
            revocations=mesh.revocations,
            demand=mesh.demand,
        )

    @property
    def transparent(self) -> bool:
        """Applications see the client's own address."""
        return self.plane.transparent

    def bind(self, given: Given | None = None) -> None:
        """Listen; nothing is accepted before `start`. Raises ConfigurationError."""
        self.plane.bind(given)

    def sockets(self) -> list[tuple[str, socket.SocketType]]:
        """What it listens on, with the purposes."""
        return self.plane.sockets()

    def release(self) -> None:
        """Accept nothing further."""
        self.plane.release()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The reactor does it all."""
        task_status.started()
        await trio.lowlevel.checkpoint()

    async def start(self) -> None:
        """Begin to accept."""
        self.plane.start()
        await trio.lowlevel.checkpoint()

    async def drain(self) -> None:
        """Accept nothing further, and let connections finish until the deadline."""
        await self.plane.drain()

    def close(self) -> None:
        """Cut what is left."""
        self.plane.close()

    async def refresh(self, what: str) -> None:
        """Bring the counters of live connections up to date; the rest always is."""
        if what == "counts":
            for _ in self.plane.connections.accounting():
                await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()

    def listening(self) -> dict[str, str]:
        """Addresses by purpose."""
        return {what: address_text(listener.address) for what, listener in self.plane.listeners.items()}

    def open_connections(self) -> dict[str, int]:
        """How many, by direction."""
        connections = self.plane.connections
        return {INBOUND: len(connections.inbound), OUTBOUND: len(connections.outbound)}

    def connections(self) -> dict[str, Rows]:
        """Each, by direction; to be written once."""
        return self.plane.connections.dump()

    def tunnels(self) -> list[dict[str, Any]]:
        """Each."""
        return self.plane.tunnels()

    def workers(self) -> list[dict[str, Any]]:
        """None: this process is the only one."""
        return []

    def level_changed(self) -> None:
        """This process's own."""

    async def profile(self, seconds: int, frequency: int) -> dict[str, Stacks]:
        """None: this process is the only one."""
        await trio.lowlevel.checkpoint()
        return {}

    async def heap(self) -> dict[str, dict[str, Any]]:
        """None."""
        await trio.lowlevel.checkpoint()
        return {}

    def trace_heap(self, on: bool) -> None:
        """None."""


def data_path(reactor: Reactor, config: Config, mesh: Membership, metrics: Metrics) -> DataPath:
    """The data path that the settings ask for."""
    count = config.workers
    if count < 2:
        return OneProcess(reactor, config, mesh, metrics)
    from ztunnel.workers.supervisor import Supervisor

    return Supervisor(config, mesh, metrics, count)
