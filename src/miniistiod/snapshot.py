"""A mesh as it is sent: every resource serialized once, with a version that is the hash of its content."""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from google.protobuf.message import Message

__all__ = ["EMPTY", "Difference", "Entry", "Snapshot", "difference", "entry"]


@attrs.frozen(eq=False)
class Entry:
    """One resource. Two snapshots share it while it does not change, so comparing is by identity."""

    name: str
    """The canonical name: a workload's uid, `namespace/hostname`, or a policy's `namespace/name`."""
    version: str
    body: bytes
    aliases: tuple[str, ...] = ()
    """`network/ip` of each address."""
    members: tuple[str, ...] = ()
    """Of a workload: the names of the services that it serves."""
    node: str = ""
    """Of a workload: the node it is on, when known."""


def entry(
    message: Message,
    name: str,
    *,
    aliases: tuple[str, ...] = (),
    members: tuple[str, ...] = (),
    node: str = "",
    previous: Mapping[str, Entry],
) -> Entry:
    """Serialize a resource; the entry of before when nothing changed."""
    body = message.SerializeToString(deterministic=True)
    old = previous.get(name)
    if old is not None and old.body == body and old.aliases == aliases and old.members == members and old.node == node:
        return old
    return Entry(name, hashlib.blake2b(body, digest_size=8).hexdigest(), body, aliases, members, node)


@attrs.frozen(eq=False)
class Snapshot:
    """The whole mesh at one moment."""

    addresses: Mapping[str, Entry]
    """Workloads and services by canonical name."""
    policies: Mapping[str, Entry]
    number: int = 0
    """Counts snapshots since the process started."""

    @functools.cached_property
    def by_alias(self) -> Mapping[str, tuple[str, ...]]:
        """`network/ip` to the canonical names that have it; workloads first."""
        found: dict[str, list[str]] = {}
        for item in self.addresses.values():
            for alias in item.aliases:
                found.setdefault(alias, []).append(item.name)
        return {alias: tuple(names) for alias, names in found.items()}

    @functools.cached_property
    def by_service(self) -> Mapping[str, tuple[str, ...]]:
        """A service's name to its workloads."""
        found: dict[str, list[str]] = {}
        for item in self.addresses.values():
            for service in item.members:
                found.setdefault(service, []).append(item.name)
        return {service: tuple(names) for service, names in found.items()}

    @functools.cached_property
    def by_node(self) -> Mapping[str, tuple[str, ...]]:
        """A node's name to its workloads."""
        found: dict[str, list[str]] = {}
        for item in self.addresses.values():
            if item.node:
                found.setdefault(item.node, []).append(item.name)
        return {node: tuple(names) for node, names in found.items()}

    def resolve(self, name: str) -> tuple[str, ...]:
        """Canonical names that a subscription to `name` stands for: itself, or by address a workload or a service.

        A service brings its workloads along.
        """
        names = (name,) if name in self.addresses else self.by_alias.get(name, ())
        services = [found for found in names if found in self.by_service]
        if not services:
            return names
        return tuple(dict.fromkeys((*names, *(w for service in services for w in self.by_service[service]))))


EMPTY = Snapshot({}, {})


@attrs.frozen
class Difference:
    """What changed between two snapshots, by canonical name."""

    changed: tuple[str, ...]
    removed: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.changed or self.removed)


def difference(old: Mapping[str, Entry], new: Mapping[str, Entry]) -> Difference:
    """Entries that are new or of another version, and names that are gone."""
    changed = []
    for name, item in new.items():
        before = old.get(name)
        if before is not item and (before is None or before.version != item.version):
            changed.append(name)
    return Difference(tuple(changed), tuple(name for name in old if name not in new))
