"""Machines that register themselves: who connects with a WorkloadGroup becomes a WorkloadEntry made from it.

What a machine says of itself is taken for what cannot harm others: its address, unless that is somebody else's, and
labels that its group leaves open. Its name, namespace and service account are those of its certificate or token. A
machine that is away for longer than the grace period is taken out of the mesh and kept in the state until it returns.

Source: Istio's auto-registration; the differences are told at `make_registration`.
"""

from __future__ import annotations

import ipaddress
import math
import re
import time
from typing import TYPE_CHECKING

import attrs
import trio

from hbone.daemon.logs import get_logger
from hbone.errors import HboneError
from hbone.grpc import GrpcError, StatusCode
from miniistiod import auth
from miniistiod.resources import WorkloadEntry, WorkloadGroup
from miniistiod.resources.metadata import is_object_name
from miniistiod.resources.model import Metadata
from miniistiod.resources.networking import GROUP_ANNOTATION, NODE_ANNOTATION, REDIRECTION_ANNOTATION, TUNNEL_LABEL
from miniistiod.store import Registration, StaleAuthorityError
from miniistiod.workloads import entry_uid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from miniistiod.mesh import Mesh
    from miniistiod.store import Store

__all__ = ["GRACE_SECONDS", "Registrar", "RegistrationError", "entry_of", "make_registration"]

_log = get_logger("miniistiod.registrar")
GRACE_SECONDS = 10.0
"""How long a machine may be away. Source: Istio's PILOT_WORKLOAD_ENTRY_GRACE_PERIOD."""
RESTART_SECONDS = 30.0
"""The same after a start of ours: clients wait up to half as long between two attempts."""
FORGET_SECONDS = 30 * 86_400.0
"""How long a machine that is gone is listed."""
MAX_LABELS = 32
"""Labels that a machine may add to those of its group."""
_PLACEHOLDER = "1.1.1.1"
"""What a stock ztunnel says when INSTANCE_IP is unset."""
_LABEL = re.compile(r"(?:[a-z0-9][-a-z0-9.]{0,251}[a-z0-9]/)?[A-Za-z0-9](?:[-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?")
_NETWORK = re.compile(r"[A-Za-z0-9][-_.A-Za-z0-9]{0,252}")
_VALUE = re.compile(r"(?:[A-Za-z0-9](?:[-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?)?")
_ATTEMPTS = 5


class RegistrationError(HboneError):
    """A machine cannot be registered; the message is for it."""

    def __init__(self, message: str, *, identity: bool = False) -> None:
        super().__init__(message)
        self.identity = identity
        """It is not who the group is for."""


def make_registration(
    node: auth.Node, caller: auth.Caller, group: WorkloadGroup, *, remote: str, stream: str, now: float
) -> Registration:
    """What is kept of a machine. Pure.

    The name is the one that its token or, for a ztunnel, itself names: a dedicated ztunnel looks for itself by name.
    Istio's name, made of group and address, stands where there is none. Labels of the group win over the machine's,
    so that none escapes a policy or joins a service that its group did not foresee.

    Args:
        node: what the machine says of itself.
        caller: who it is.
        group: its group.
        remote: the address that it connects from.
        stream: the stream that keeps the registration.
        now: seconds since 1970.

    Raises:
        RegistrationError: it is not who the group is for, or what it says cannot be used.
    """
    if caller.namespace != group.meta.namespace:
        raise RegistrationError("the WorkloadGroup is of another namespace than the caller", identity=True)
    wanted = group.template.service_account
    if wanted and wanted != caller.service_account:
        raise RegistrationError("the WorkloadGroup is for another service account than the caller's", identity=True)
    network = group.template.network or node.network
    if network and not _NETWORK.fullmatch(network):
        raise RegistrationError(f"the network {network!r:.80} is malformed; use letters, digits, '-', '_' and '.'")
    address = _address(node, remote)
    if caller.name is not None:
        if node.name and node.name != caller.name:
            raise RegistrationError(
                f"the token was made for the name {caller.name!r}, and the node says {node.name!r:.80}", identity=True
            )
        name = caller.name
    elif node.kind == "ztunnel" and node.name:
        name = node.name
    else:
        name = "-".join(filter(None, (group.meta.name, str(address).replace(":", "-"), network)))[-253:].strip("-.")
    if not is_object_name(name):
        raise RegistrationError(f"the name {name!r:.80} is malformed; use lower case letters, digits, '-' and '.'")
    return Registration(
        namespace=caller.namespace,
        name=name,
        group=group.meta.name,
        service_account=caller.service_account,
        address=str(address),
        network=network,
        locality=group.template.locality or node.locality,
        labels=_labels(node.labels),
        node=node.node_name if is_object_name(node.node_name) else "",
        serial=caller.serial,
        stream=stream,
        connected=now,
    )


def _address(node: auth.Node, remote: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address that others reach it by: what it says, else where it connects from."""
    said = [text for text in (*node.addresses, node.ip) if text and text != _PLACEHOLDER]
    for text in (*said[:1], remote):
        try:
            address = ipaddress.ip_address(text.partition("%")[0])
        except ValueError:
            raise RegistrationError(f"the address {text!r:.80} is none; set INSTANCE_IP to this host's") from None
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        if address.is_unspecified or address.is_multicast or address == ipaddress.ip_address("255.255.255.255"):
            raise RegistrationError(f"the address {address} is no host's; set INSTANCE_IP to this host's")
        return address
    raise RegistrationError("this host's address is not known; set INSTANCE_IP")


def _labels(given: Mapping[str, str]) -> dict[str, str]:
    """Labels of a machine: well formed ones, and none that steers the mesh."""
    found = {}
    for key, value in sorted(given.items()):
        domain = key.partition("/")[0] if "/" in key else ""
        steers = domain.endswith(("istio.io", "k8s.io")) and domain != "service.istio.io"
        if _LABEL.fullmatch(key) and _VALUE.fullmatch(value) and not steers:
            found[key] = value
    return dict(list(found.items())[:MAX_LABELS])


def entry_of(registration: Registration, group: WorkloadGroup) -> WorkloadEntry:
    """The WorkloadEntry of a machine. Pure."""
    annotations = {
        REDIRECTION_ANNOTATION: "enabled",  # it runs a ztunnel, or it could not be connected
        **({NODE_ANNOTATION: registration.node} if registration.node else {}),
        **group.annotations,
        GROUP_ANNOTATION: registration.group,
    }
    if TUNNEL_LABEL in group.labels and REDIRECTION_ANNOTATION not in group.annotations:
        del annotations[REDIRECTION_ANNOTATION]  # the group says itself how they are reached
    return WorkloadEntry(
        meta=Metadata(
            kind="WorkloadEntry",
            namespace=registration.namespace,
            name=registration.name,
            labels={**registration.labels, **group.template.labels, **group.labels},
            annotations=annotations,
        ),
        endpoint=attrs.evolve(
            group.template,
            address=ipaddress.ip_address(registration.address),
            network=registration.network,
            locality=registration.locality,
            service_account=registration.service_account,
            labels={},
        ),
    )


class Registrar:
    """Keeps the machines that are connected in the mesh.

    Args:
        store: the state.
        mesh: where they are added to.
        cluster_id: first part of a workload's uid.
        grace: seconds that a machine may be away.
        wall: seconds since 1970.
    """

    def __init__(
        self,
        store: Store,
        mesh: Mesh,
        cluster_id: str,
        *,
        grace: float = GRACE_SECONDS,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._mesh = mesh
        self._cluster_id = cluster_id
        self._grace = grace
        self._wall = wall
        self._lock = trio.Lock()
        self._known: dict[tuple[str, str], Registration] = {}
        self._shown: dict[tuple[str, str], WorkloadEntry] = {}
        """What the mesh has of them."""
        self._away: dict[tuple[str, str], float] = {}
        """By when a machine that is away must be back, by Trio's clock."""
        self._open: dict[str, Registration] = {}
        """What each stream that is open registered: while a machine's ztunnel is replaced, there are two."""
        self._unsaved: set[tuple[str, str]] = set()
        self._state_changed = False
        self._wake = trio.Event()

    # -- life

    async def start(self) -> None:
        """Bring the machines of before back; they have a while to connect again."""
        self._known = await trio.to_thread.run_sync(self._store.registrations)
        deadline = trio.current_time() + max(self._grace, RESTART_SECONDS)
        for key, item in self._known.items():
            if not item.gone:
                self._away[key] = deadline
        await self._show()
        self._mesh.follow(self._look_again)

    async def run(self) -> None:
        """Take out those who stay away, and follow the groups and the state, until cancelled."""
        while True:
            deadline = min(self._away.values(), default=math.inf)
            with trio.move_on_at(deadline):
                await self._wake.wait()
            self._wake = trio.Event()
            async with self._lock:
                if self._state_changed or self._unsaved:
                    await self._follow_state()
                await self._expire()
                await self._show()

    def _look_again(self) -> None:
        self._wake.set()

    async def authority_changed(self) -> None:
        """Something was revoked, perhaps one of the machines."""
        await trio.lowlevel.checkpoint()
        self._state_changed = True
        self._wake.set()

    # -- machines

    async def connected(self, stream: str, node: auth.Node, caller: auth.Caller, remote: str) -> None:
        """A client has opened a stream: register it if it belongs to a group.

        Raises:
            GrpcError: it may not, or cannot.
        """
        name = node.group or caller.group
        if not name:
            return
        try:
            if node.group and caller.group and node.group != caller.group:
                raise RegistrationError("the token is for another WorkloadGroup than the node says", identity=True)
            group = self._mesh.group(caller.namespace, name)
            if group is None:
                raise RegistrationError(f"the namespace {caller.namespace!r} has no WorkloadGroup {name!r:.200}")
            registration = make_registration(node, caller, group, remote=remote, stream=stream, now=self._wall())
            async with self._lock:
                await self._register(registration, caller)
        except RegistrationError as error:
            code = StatusCode.PERMISSION_DENIED if error.identity else StatusCode.FAILED_PRECONDITION
            _log.warning("machine not registered", node=node.id, identity=str(caller.identity), reason=str(error))
            raise GrpcError(code, f"registration failed: {error}") from None

    async def _register(self, registration: Registration, caller: auth.Caller) -> None:
        key = registration.key
        document = self._mesh.entry(*key)
        if document is not None and document.meta.path:
            _log.debug("a document describes the machine", namespace=key[0], name=key[1], path=document.meta.path)
            return
        before = self._known.get(key)
        if before is not None and before.disconnected is None and key not in self._away:
            if (before.service_account, before.group) != (registration.service_account, registration.group):
                raise RegistrationError(f"the name {registration.name!r} is another machine's", identity=True)
            if before.address != registration.address:
                _log.warning("a machine of the same name takes the place of another", name=key[1], namespace=key[0])
        others = self._others_at(registration)
        await trio.to_thread.run_sync(self._save, registration, caller)
        await self._remove([other for other in others if other in self._known])
        self._known[key] = registration
        self._open[registration.stream] = registration
        self._away.pop(key, None)
        self._unsaved.discard(key)
        await self._show([key, *others])
        if before is None or before.gone:
            _log.info(
                "machine registered",
                namespace=key[0],
                name=key[1],
                group=registration.group,
                address=registration.address,
                identity=str(caller.identity),
            )

    def _others_at(self, registration: Registration) -> list[tuple[str, str]]:
        """Machines that are away and had the address; refuses one that somebody else has now."""
        network = registration.network or self._mesh.network
        own = entry_uid(self._cluster_id, *registration.key)
        found = []
        for name in self._mesh.catalog.by_alias.get(f"{network}/{registration.address}", ()):
            if name == own:
                continue
            key = next((key for key in self._known if entry_uid(self._cluster_id, *key) == name), None)
            if key is None or key not in self._away:
                raise RegistrationError(f"the address {registration.address} belongs to another workload or service")
            found.append(key)
        return found

    def _save(self, registration: Registration, caller: auth.Caller) -> None:
        """Durable before anybody hears of it; not for somebody who was revoked meanwhile."""
        for _ in range(_ATTEMPTS):
            generation = self._store.generation
            if why := auth.problem(self._store, caller):
                raise RegistrationError(f"the caller is not believed any longer: {why}", identity=True)
            try:
                self._store.register(registration, generation)
            except StaleAuthorityError:
                continue
            return
        raise RegistrationError("roots and revocations change without pause; try again")

    def disconnected(self, stream: str) -> None:
        """A stream has ended. Another stream of the same machine keeps it, whichever is the older."""
        self._open.pop(stream, None)
        for key, item in self._known.items():
            if item.stream == stream and item.disconnected is None:
                others = [each for each in self._open.values() if each.key == key and each.address == item.address]
                if others:
                    self._known[key] = attrs.evolve(item, stream=others[-1].stream, serial=others[-1].serial)
                else:
                    self._known[key] = attrs.evolve(item, disconnected=self._wall())
                    self._away[key] = trio.current_time() + self._grace
                self._unsaved.add(key)
                self._wake.set()

    # -- what follows

    async def _follow_state(self) -> None:
        """Write what changed, and drop what a command has taken out."""
        unsaved, self._unsaved = self._unsaved, set()
        if self._state_changed:
            self._state_changed = False
            await self._mesh.marks_changed()
        kept = await trio.to_thread.run_sync(self._write, [self._known[key] for key in unsaved if key in self._known])
        for key in [key for key in self._known if key not in kept]:
            del self._known[key]
            self._away.pop(key, None)
            _log.info("machine taken out of the mesh", namespace=key[0], name=key[1])

    def _write(self, changed: list[Registration]) -> set[tuple[str, str]]:
        kept = self._store.registrations()
        for item in changed:
            if item.key in kept:
                self._store.register(item)
        return set(kept)

    async def _expire(self) -> None:
        now, wall = trio.current_time(), self._wall()
        for key in [key for key, deadline in self._away.items() if deadline <= now]:
            del self._away[key]
            item = self._known[key]
            gone = attrs.evolve(item, disconnected=item.disconnected or wall, gone=True)
            await trio.to_thread.run_sync(self._store.register, gone)
            self._known[key] = gone
            _log.info("machine is gone", namespace=key[0], name=key[1], group=item.group)
        old = [key for key, item in self._known.items() if item.gone and wall - item.connected > FORGET_SECONDS]
        await self._remove(old)

    async def _remove(self, keys: list[tuple[str, str]]) -> None:
        for key in keys:
            await trio.to_thread.run_sync(self._store.unregister, *key)
            del self._known[key]
            self._away.pop(key, None)

    async def _show(self, keys: Iterable[tuple[str, str]] | None = None) -> None:
        """Make the mesh agree: those who are there, each made from its group as it is now.

        Args:
            keys: machines that something happened to; None looks at all, as when a group may have changed.
        """
        changed: list[WorkloadEntry] = []
        removed: list[tuple[str, str]] = []
        for key in list(dict.fromkeys((*self._known, *self._shown))) if keys is None else keys:
            item = self._known.get(key)
            group = None if item is None or item.gone else self._mesh.group(item.namespace, item.group)
            entry = None if item is None or group is None else entry_of(item, group)
            if entry is not None and self._shown.get(key) != entry:
                self._shown[key] = entry
                changed.append(entry)
            elif entry is None and self._shown.pop(key, None) is not None:
                removed.append(key)
        if removed:
            await self._mesh.drop_entries(removed)
        if changed:
            await self._mesh.put_entries(changed)

    def describe(self) -> list[dict[str, object]]:
        """For the debug pages."""
        return [
            {
                **attrs.asdict(item, filter=attrs.filters.exclude("stream", "gone")),
                "state": "gone" if item.gone else "away" if key in self._away else "connected",
            }
            for key, item in sorted(self._known.items())
        ]
