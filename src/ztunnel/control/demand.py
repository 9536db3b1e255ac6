"""Addresses that are asked for when a connection needs them, where not all of the mesh is subscribed to.

A name is asked for once. From then on the control plane tells of it by itself, so what it said, also that there is no
such thing, is known until it says otherwise, at no cost. Names are never taken back, as ztunnel never does: to an
istiod that would mean that all others are gone. Those that were answered longest ago by "no such thing" are forgotten
here when there are too many, and to the control plane with the next stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from ztunnel.errors import DiscoveryTooSlow
from ztunnel.mesh import NetworkAddress, canonical, is_loopback

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ztunnel.mesh import GatewayAddress, IpAddress, NamespacedHostname, Service, Store, Workload

__all__ = ["ANSWER_TIMEOUT", "Demand"]

ANSWER_TIMEOUT = 5.0
"""Seconds that the control plane has to say what an address is."""
MAX_NAMES = 10_000
"""Names that are remembered; miniistiod takes five times as many from one stream."""
_ROUNDS = 3
"""Questions one after the other for one connection: an address, its service's waypoint, where that is."""


class Demand:
    """What was asked for, and who waits.

    Args:
        store: gets the answers.
        network: of this node.
    """

    def __init__(self, store: Store, network: str) -> None:
        self._store = store
        self._network = network
        self._names: dict[str, trio.Event | None] = {}  # to who waits, or to nobody: it was answered
        self._unsaid: list[str] = []
        self.more = trio.Event()
        """Set when there is something to be sent."""

    # a connection

    def missing(self, ip: IpAddress, namespace: str) -> list[str]:
        """Names to ask for before it is known where a connection to `ip` goes; none where that was done."""
        store = self._store
        ip = canonical(ip)
        workload = store.workload_by_address(self._network, ip)
        service = store.service_by_vip(self._network, ip, namespace)
        if workload is None and service is None:
            names = [] if is_loopback(ip) or store.rejection(self._network, ip) else [f"{self._network}/{ip}"]
        else:
            names = [
                str(reference.destination)
                for reference in _references(workload, service)
                if not self._is_here(reference.destination)
            ]
        return [name for name in names if self.is_news(name)]

    def _is_here(self, place: NetworkAddress | NamespacedHostname) -> bool:
        """Whether a workload has the address, as our own may, which nobody asks for."""
        return isinstance(place, NetworkAddress) and (
            self._store.workload_by_address(place.network, place.ip) is not None
        )

    def is_news(self, name: str) -> bool:
        """Whether nobody asked for it, or the answer is not there yet; a service that is here need not be asked for."""
        if name in self._names:
            return self._names[name] is not None
        return name not in self._store.services

    async def learn(self, ip: IpAddress, namespace: str, *further: str) -> None:
        """Ask for what is missing, and wait for the answers.

        Args:
            ip: where a connection goes.
            namespace: of its client.
            further: names that turned out to be needed as well.

        Raises:
            DiscoveryTooSlow: there was none in time. It is not known whether plaintext would be right.
        """
        with trio.move_on_after(ANSWER_TIMEOUT):
            for _ in range(_ROUNDS):
                names = [*self.missing(ip, namespace), *(name for name in further if self.is_news(name))]
                if not names:
                    return
                for event in [self.ask(name) for name in names]:
                    if event is not None:
                        await event.wait()
            return
        raise DiscoveryTooSlow(ip, ANSWER_TIMEOUT)

    def wonder(self, ip: IpAddress) -> None:
        """Ask who is at an address, for what is logged and counted later; nobody waits."""
        if self._store.workload_by_address(self._network, canonical(ip)) is None and not is_loopback(ip):
            self.ask(f"{self._network}/{canonical(ip)}")

    async def hear_of(self, *names: str) -> None:
        """Ask, and wait for the answers; what has none in time is as if there were no such thing."""
        with trio.move_on_after(ANSWER_TIMEOUT):
            for event in [self.ask(name) for name in names]:
                if event is not None:
                    await event.wait()

    def ask(self, name: str) -> trio.Event | None:
        """Subscribe to a name; returns what is set once it is answered, None when it was."""
        if name not in self._names:
            if len(self._names) >= MAX_NAMES:
                self._forget_one()
            self._names[name] = trio.Event()
            self._unsaid.append(name)
            self.more.set()
        return self._names[name]

    def _forget_one(self) -> None:
        oldest = next((name for name, waiting in self._names.items() if waiting is None), None)
        if oldest is None:
            oldest = next(iter(self._names))
        waiting = self._names.pop(oldest)
        if waiting is not None:
            waiting.set()

    # the stream

    def opening(self, untold: Iterable[str] = ()) -> list[str]:
        """What is to be said at the begin of a stream: everything asked for so far.

        Args:
            untold: Names that we hold. If there are any, the opening was too large; then nothing is in it, and all
                names are said after it, a few at a time.
        """
        held = list(untold)
        if held:
            self._unsaid = list(dict.fromkeys((*held, *self._names)))
            self.more.set()
            return []
        self._unsaid.clear()
        return list(self._names)

    def unsaid(self) -> list[str]:
        """What is to be said now."""
        names, self._unsaid = self._unsaid, []
        self.more = trio.Event()
        return names

    def answered(self, names: Iterable[str]) -> None:
        """These were in a response that is in force, by name, by an alias, or as gone."""
        for name in names:
            waiting = self._names.get(name)
            if waiting is not None:
                # To the end: the one that was answered longest ago is forgotten first.
                del self._names[name]
                self._names[name] = None
                waiting.set()


def _references(workload: Workload | None, service: Service | None) -> Iterator[GatewayAddress]:
    if service is not None:
        if service.waypoint is not None:
            yield service.waypoint
        for one in service.weighted_waypoints:
            yield one.destination
    if workload is not None:
        if workload.waypoint is not None:
            yield workload.waypoint
        if workload.network_gateway is not None:
            yield workload.network_gateway
