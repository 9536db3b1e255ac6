"""A mesh as it is sent: every resource encoded once, whoever gets it, with a version that is the hash of its content.

The catalog changes in place and remembers in which order its resources changed, so that what a subscriber lacks is
found at the cost of what it lacks, however large the mesh is.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from google.protobuf.message import Message

__all__ = ["ADDRESS", "AUTHORIZATION", "Catalog", "Collection", "Entry", "Plan", "encode", "entry"]

ADDRESS = "type.googleapis.com/istio.workload.Address"
AUTHORIZATION = "type.googleapis.com/istio.security.Authorization"
MAX_REMOVED = 100_000
"""Removed names that are remembered; a subscriber that lags behind further must connect again."""


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited field of protobuf; numbers up to 15."""
    size = len(data)
    head = bytearray((number << 3 | 2,))
    while size > 0x7F:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    head.append(size)
    return bytes(head) + data


def encode(url: str, name: str, version: str, body: bytes, aliases: Iterable[str] = ()) -> bytes:
    """A resource as it stands in the field `resources` of a DeltaDiscoveryResponse; the body comes last."""
    names = b"".join(_field(4, alias.encode()) for alias in aliases)
    head = _field(1, version.encode()) + _field(3, name.encode()) + names
    return _field(2, head + _any(url, body))


def _any(url: str, body: bytes) -> bytes:
    """A body as `google.protobuf.Any`, with number 2: that is where both kinds of response expect it."""
    return _field(2, _field(1, url.encode()) + _field(2, body))


@attrs.frozen(eq=False)
class Entry:
    """One resource. While it does not change it is the same object."""

    name: str
    """The canonical name: a workload's uid, `namespace/hostname`, or a policy's `namespace/name`."""
    version: str
    wire: bytes
    """As `encode` makes it, under its canonical name and without aliases; it ends with the body."""
    size: int
    """Bytes of the body."""
    aliases: tuple[str, ...] = ()
    """`network/ip` of each address."""
    members: tuple[str, ...] = ()
    """Of a workload: the names of the services that it serves."""
    node: str = ""
    """Of a workload: the node it is on, when known."""
    is_service: bool = False
    """Of an address: not a workload."""

    @property
    def body(self) -> bytes:
        """The serialized resource."""
        return self.wire[len(self.wire) - self.size :]

    def any(self, url: str) -> bytes:
        """As it stands in the field `resources` of a DiscoveryResponse."""
        return _any(url, self.body)


def entry(
    url: str,
    message: Message,
    name: str,
    *,
    aliases: tuple[str, ...] = (),
    members: tuple[str, ...] = (),
    node: str = "",
    is_service: bool = False,
    previous: Mapping[str, Entry],
) -> Entry:
    """Serialize a resource; the entry of before when nothing changed."""
    body = message.SerializeToString(deterministic=True)
    version = hashlib.blake2b(body, digest_size=8).hexdigest()
    old = previous.get(name)
    if (
        old is not None
        and old.version == version
        and old.aliases == aliases
        and old.members == members
        and old.node == node
        and old.body == body
    ):
        return old
    return Entry(name, version, encode(url, name, version, body), len(body), aliases, members, node, is_service)


@attrs.frozen(kw_only=True)
class Plan:
    """What is to change: names to what they are from now on, None for those that are gone."""

    addresses: Mapping[str, Entry | None] = attrs.Factory(dict)
    policies: Mapping[str, Entry | None] = attrs.Factory(dict)

    def __bool__(self) -> bool:
        return bool(self.addresses or self.policies)


class Collection:
    """The resources of one type."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.entries: dict[str, Entry] = {}
        self._changed: dict[str, int] = {}
        """Name to the number of the change that touched it last, in that order; removed names too."""
        self._removed = 0
        self._forgotten = 0
        """Changes up to this number cannot be told apart any longer."""

    def put(self, name: str, item: Entry | None, number: int) -> None:
        """Set or remove a resource, as part of the change `number`."""
        if self._changed.pop(name, None) is not None and name not in self.entries:
            self._removed -= 1
        self._changed[name] = number
        if item is not None:
            self.entries[name] = item
            return
        self.entries.pop(name, None)
        self._removed += 1
        if self._removed > MAX_REMOVED:
            self._forget()

    def _forget(self) -> None:
        gone = [name for name in self._changed if name not in self.entries][: MAX_REMOVED // 2]
        self._forgotten = self._changed[gone[-1]]
        for name in gone:
            del self._changed[name]
        self._removed -= len(gone)

    def since(self, number: int) -> list[str] | None:
        """Names that changed after `number`, removed ones too; None when that is not known any longer."""
        if number < self._forgotten:
            return None
        found: list[str] = []
        for name in reversed(self._changed):
            if self._changed[name] <= number:
                break
            found.append(name)
        found.reverse()
        return found


class Catalog:
    """The whole mesh, now."""

    def __init__(self) -> None:
        self.number = 0
        """Counts changes."""
        self.of: dict[str, Collection] = {url: Collection(url) for url in (ADDRESS, AUTHORIZATION)}
        self.addresses: Mapping[str, Entry] = self.of[ADDRESS].entries
        """Workloads and services by canonical name."""
        self.policies: Mapping[str, Entry] = self.of[AUTHORIZATION].entries
        self.by_alias: dict[str, dict[str, None]] = {}
        """`network/ip` to the canonical names that have it."""
        self.by_service: dict[str, dict[str, None]] = {}
        """A service's name to its workloads."""
        self.by_node: dict[str, dict[str, None]] = {}
        """A node's name to its workloads."""
        self._demanded: dict[tuple[str, str], bytes] = {}
        self._demanded_number = 0

    def apply(self, plan: Plan) -> bool:
        """Make a change; whether there was any."""
        if not plan:
            return False
        self.number += 1
        for name, item in plan.addresses.items():
            self._index(self.addresses.get(name), item)
            self.of[ADDRESS].put(name, item, self.number)
        for name, item in plan.policies.items():
            self.of[AUTHORIZATION].put(name, item, self.number)
        return True

    def _index(self, old: Entry | None, new: Entry | None) -> None:
        for index, field in ((self.by_alias, "aliases"), (self.by_service, "members"), (self.by_node, "node")):
            before, after = _keys(old, field), _keys(new, field)
            if before == after:
                continue
            for key in before:
                names = index[key]
                del names[old.name]  # type: ignore[union-attr]  # it has keys
                if not names:
                    del index[key]
            for key in after:
                index.setdefault(key, {})[new.name] = None  # type: ignore[union-attr]

    def holders(self, address: str) -> tuple[str, ...]:
        """Canonical names of what has an address, workloads before services."""
        names = self.by_alias.get(address, ())
        if len(names) < 2:
            return tuple(names)
        return tuple(sorted(names, key=lambda name: (self.addresses[name].is_service, name)))

    def resolve(self, name: str) -> tuple[str, ...]:
        """Canonical names that a subscription to `name` stands for: itself, or what has that address.

        A service brings its workloads along.
        """
        names = (name,) if name in self.addresses else self.holders(name)
        services = [found for found in names if found in self.by_service]
        if not services:
            return names
        return tuple(dict.fromkeys((*names, *(w for service in services for w in self.by_service[service]))))

    def demanded(self, item: Entry, name: str) -> bytes:
        """An address as a subscriber on demand gets it: under the name it asked for, with aliases; encoded once."""
        if self._demanded_number != self.number:
            self._demanded, self._demanded_number = {}, self.number
        key = (item.name, name)
        found = self._demanded.get(key)
        if found is None:
            found = self._demanded[key] = encode(ADDRESS, name, item.version, item.body, item.aliases)
        return found


def _keys(item: Entry | None, field: str) -> tuple[str, ...]:
    if item is None:
        return ()
    value = getattr(item, field)
    if field == "node":
        return (value,) if value else ()
    return tuple(dict.fromkeys(value))
