"""Every byte of every connection: listeners, tunnels, relays, on one epoll.

```text
15001 -> outbound -> dialer -> tunnel ~ ~ ~ tunnel <- inbound <- 15008
15080 -> socks5 ---^     relay both ways, both sides      15006 -> passthrough
```
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final

import trio

from hbone.engine import WindowBudget
from ztunnel.dataplane.connections import Connections
from ztunnel.dataplane.dialer import Dialer, IdentitySource
from ztunnel.dataplane.inbound import Inbound
from ztunnel.dataplane.inner import InnerTunnels
from ztunnel.dataplane.listener import Listener, open_listeners
from ztunnel.dataplane.local import LocalWorkload
from ztunnel.dataplane.outbound import Outbound
from ztunnel.dataplane.passthrough import Passthrough
from ztunnel.dataplane.plane import Plane
from ztunnel.dataplane.reactor import Reactor
from ztunnel.dataplane.recall import Recall
from ztunnel.dataplane.sockets import SocketCalls, SocketOptions, local_addresses
from ztunnel.dataplane.socks5 import Socks5
from ztunnel.errors import Drained, address_text
from ztunnel.mesh.route import HBONE_PORT

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from hbone.identity import RevocationSource
    from ztunnel.config import Config
    from ztunnel.control.demand import Demand
    from ztunnel.dataplane.tunnel import Tunnel
    from ztunnel.given import Given
    from ztunnel.logs import AccessLog
    from ztunnel.mesh.store import Change, Store
    from ztunnel.metrics import Metrics

__all__ = ["Dataplane", "IdentitySource", "Reactor", "SocketCalls"]

_DRAIN_STEP: Final = 0.01  # seconds between two looks whether all is done


class Dataplane:
    """The data path of one workload.

    ```python
    plane = Dataplane(reactor, config, store, svids, metrics, access_log)
    plane.bind()            # clients wait in the kernel from here on
    plane.start()           # inside the reactor: begin to accept
    await plane.drain()     # no new connections; the open ones have their deadline
    plane.close()
    ```

    Args:
        reactor: moves the bytes.
        config: settings.
        store: the mesh.
        identities: our certificate.
        metrics: counters.
        access_log: lines.
        revocations: lists of certificates that were taken back.
        calls: the socket calls, for tests.
        hbone_port: where peers take tunnels.
        demand: asks for addresses that are not known; None: all are.
    """

    def __init__(
        self,
        reactor: Reactor,
        config: Config,
        store: Store,
        identities: IdentitySource,
        metrics: Metrics,
        access_log: AccessLog,
        *,
        revocations: RevocationSource | None = None,
        calls: SocketCalls | None = None,
        hbone_port: int = HBONE_PORT,
        demand: Demand | None = None,
    ) -> None:
        self.reactor = reactor
        self.config = config
        self.connections = Connections(store, reactor.later, reactor.clock)
        """Live connections."""
        self.budget = WindowBudget(config.window_budget)
        self.listeners: dict[str, Listener] = {}
        """By purpose: hbone, inbound, outbound, socks5."""
        self._covered: dict[int, list[Listener]] = {}
        self._further: dict[int, list[Listener]] = {}
        self.transparent = False
        """Applications see the client's own address."""
        self._calls = calls or SocketCalls(options_of(config))
        local = LocalWorkload(store, config.served, config.node_name)
        self._plane = plane = Plane(
            reactor=reactor,
            calls=self._calls,
            config=config,
            store=store,
            local=local,
            metrics=metrics,
            log=access_log,
            connections=self.connections,
            demand=demand,
            own_ports=config.own_ports,
            hbone_port=hbone_port,
        )
        self._recall = recall = Recall(revocations, reactor, metrics)
        connection = config.connection
        self.dialer = Dialer(
            reactor,
            self._calls,
            identities,
            config=connection,
            budget=self.budget,
            recall=recall,
            max_streams=config.pool_max_streams,
            idle_timeout=config.pool_idle,
        )
        self.inner = InnerTunnels(
            reactor, self._calls, self.dialer, identities, config=connection, budget=self.budget, recall=recall
        )
        self.outbound = Outbound(plane, self.dialer, self.inner)
        self.socks5 = Socks5(plane, self.outbound)
        self.inbound = Inbound(plane, identities, config=connection, budget=self.budget, recall=recall)
        self.passthrough = Passthrough(plane)
        self._unsubscribe = store.subscribe(self.recheck)
        self._released = self._closed = False

    def bind(self, given: Given | None = None) -> None:
        """Listen; nothing is accepted before `start`.

        Args:
            given: sockets to be used instead of new ones.

        Raises:
            ConfigurationError: an address cannot be had, or ENABLE_ORIG_SRC was asked for and does not work.
        """
        listeners = open_listeners(self._calls, self.config, given=given)
        self.adopt(listeners.shares[0], transparent=listeners.transparent)
        for number, share in enumerate(listeners.shares[1:], 1):
            self._further[number] = self._listeners_on(share)

    def adopt(
        self, sockets: Mapping[str, socket.SocketType], *, transparent: bool, shared: frozenset[str] = frozenset()
    ) -> None:
        """Use sockets that `open_listeners` made, here or in the process that started this one.

        Args:
            sockets: by purpose.
            transparent: applications see the client's own address.
            shared: the purposes whose sockets other processes accept from.
        """
        self.transparent = self.inbound.transparent = self.passthrough.transparent = transparent
        for what, sock in sockets.items():
            self.listeners[what] = self._listener(what, sock, shared=what in shared)
        bound = {listener.address[1] for listener in self.listeners.values()}
        self._plane.own_ports = self.config.own_ports | bound
        self._plane.own_addresses = local_addresses()

    def _listener(self, what: str, sock: socket.SocketType, *, shared: bool = False) -> Listener:
        accepted = {
            "hbone": self.inbound.accepted,
            "inbound": self.passthrough.accepted,
            "outbound": self.outbound.accepted,
            "socks5": self.socks5.accepted,
        }[what]
        return Listener(self.reactor, self._calls, sock, accepted, what=what, shared=shared)

    def _listeners_on(self, sockets: Mapping[str, socket.SocketType]) -> list[Listener]:
        return [self._listener(what, sock) for what, sock in sockets.items()]

    def cover(self, share: int, sockets: Mapping[str, socket.SocketType]) -> None:
        """Accept for a process that is away, until `uncover`."""
        listeners = self._covered.get(share)
        if listeners is None:
            listeners = self._covered[share] = self._listeners_on(sockets)
        for listener in listeners:
            listener.start()

    def uncover(self, share: int) -> None:
        """It is back."""
        for listener in self._covered.get(share, ()):
            listener.pause()

    def start(self) -> None:
        """Begin to accept. Call inside the running reactor, when the mesh is known."""
        for listener in itertools.chain(self.listeners.values(), *self._further.values()):
            listener.start()

    def sockets(self) -> list[tuple[str, socket.SocketType]]:
        """What we listen on, with the purposes."""
        further = itertools.chain(*self._further.values())
        return [
            *((what, listener.sock) for what, listener in self.listeners.items()),
            *((listener.what, listener.sock) for listener in further),
        ]

    def _all_listeners(self) -> Iterator[Listener]:
        return itertools.chain(self.listeners.values(), *self._further.values(), *self._covered.values())

    def recheck(self, change: Change) -> None:
        """Ask the policies about live connections again; called for each change of the store."""
        self.connections.recheck(change)

    def when_recalled(self, call: Callable[[], object]) -> None:
        """Call once every tunnel was held against the revocation lists as they are now; at once where all were."""
        self._recall.when_done(call)

    def release(self) -> None:
        """Accept nothing further, and leave what waits to the process that has the sockets as well."""
        for listener in self._all_listeners():
            listener.close()
        self.inbound.release()
        self._released = True

    async def drain(self) -> None:
        """Accept nothing further, tell tunnels, and let connections finish until the deadline of the configuration.

        After `release` this loses nobody: what was accepted before is served to its end, handshakes included.
        """
        if not self._released:
            for listener in self._all_listeners():
                listener.drain()
            self.socks5.close()
        self.inbound.drain()
        with trio.move_on_after(self.config.drain_deadline):
            while self._is_busy():  # noqa: ASYNC110 - five things may be the last, and this is the end
                await trio.sleep(_DRAIN_STEP)

    def _is_busy(self) -> bool:
        """Somebody is served; an inbound tunnel closes itself after its last stream and the second GOAWAY."""
        return bool(
            len(self.connections)
            or self.outbound.pending
            or self.socks5.greetings
            or self.inbound.waiting
            or self.inbound.room.count
            or self.inbound.tunnels
            or self.reactor.farewells
        )

    def close(self) -> None:
        """Cut what is left. Sockets are closed when the reactor's turn ends, or with the reactor."""
        if self._closed:
            return
        self._closed = True
        self._unsubscribe()
        self._recall.close()
        self._plane.local.close()
        self.outbound.close()
        for listener in self._all_listeners():
            listener.close()
        self.socks5.close()
        for connection in self.connections:
            connection.abort(Drained())
        for pending in list(self.outbound.pending):
            pending.fail(Drained())
        self.inbound.close()
        self.inner.close()
        self.dialer.close()
        self.reactor.unsweep(self.outbound)

    def account(self) -> None:
        """Bring the byte counters of live connections up to date, before a scrape."""
        self.connections.account()

    def tunnels(self) -> list[dict[str, Any]]:
        """Tunnels, for people to read."""
        listed = []
        by_direction: tuple[tuple[str, Iterable[Tunnel]], ...] = (
            ("outbound", self.dialer.tunnels),
            ("outbound", self.inner.tunnels),
            ("inbound", self.inbound.tunnels),
        )
        for direction, tunnels in by_direction:
            for tunnel in tunnels:
                listed.append(
                    {
                        "direction": direction,
                        "address": address_text(tunnel.address),
                        "peer": str(tunnel.peer) if tunnel.peer is not None else None,
                        "streams": len(tunnel.streams),
                        "established": tunnel.established,
                        "inner": tunnel in self.inner.tunnels,
                    }
                )
        return listed


def options_of(config: Config) -> SocketOptions:
    """Socket options of the configuration."""
    own = config.bind_address
    return SocketOptions(
        keepalive=config.keepalive_enabled,
        keepalive_time=max(1, int(config.keepalive_time)),
        keepalive_interval=max(1, int(config.keepalive_interval)),
        keepalive_retries=config.keepalive_retries,
        user_timeout=config.user_timeout_enabled,
        mark=config.packet_mark,
        source=None if own is None or own.is_unspecified else own,
    )
