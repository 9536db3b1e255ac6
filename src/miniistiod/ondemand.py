"""What a client wants that asks for addresses by name, and has of it. Pure.

A change of the mesh costs a client a look at each name that changed, whatever else it has asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from miniistiod.catalog import Catalog, Entry

__all__ = ["OnDemand"]


class OnDemand:
    """The subscription of one stream to addresses.

    A resource is wanted when its name or one of its addresses was asked for, when it is a workload of such a service,
    or when it is on the client's own node. What was asked for by an address is sent under that name too: a ztunnel that
    waits for an address wakes up by the resource's name only.

    Args:
        catalog: the mesh.
        node: the client's node, whose workloads it gets unasked; may be empty.
        held: name to version of what the client has from an earlier stream.
    """

    def __init__(self, catalog: Catalog, node: str, held: Mapping[str, str]) -> None:
        self._catalog = catalog
        self._node = node
        self.asked: set[str] = set()
        """Names that the client subscribed to."""
        self.sent: dict[str, str] = dict(held)
        """Resource name to version, as far as the client has it; names as they were sent."""
        self._services: set[str] = set()
        """Services that are wanted, and with them their workloads."""
        self._place: dict[str, str] = {}
        """An address that was asked to the resource that it was answered with."""
        self._placed: dict[str, set[str]] = {}
        """The other way round."""
        self._due: dict[str, None] = dict.fromkeys(catalog.by_node.get(node, ()) if node else ())
        """Names to look at, besides those that changed."""
        self._again: set[str] = set()
        """Names to be answered though the client has them."""

    def ask(self, name: str, *, again: bool = True) -> None:
        """Subscribe to a name. With `again` it is answered even if the client has it."""
        self.asked.add(name)
        self._due[name] = None
        if again:
            self._again.add(name)

    def give_up(self, name: str) -> None:
        """Unsubscribe from a name."""
        self.asked.discard(name)
        self._again.discard(name)
        self.sent.pop(name, None)
        self._due[name] = None

    def answer(self, changed: Sequence[str]) -> tuple[list[bytes], list[str]]:
        """What the client is owed.

        Args:
            changed: names in the catalog that changed since the last answer.

        Returns:
            Encoded resources, and names that are gone.
        """
        names, addresses = self._affected(changed)
        for name in list(names):
            self._find_service(name, names)
        resources: list[bytes] = []
        removed: list[str] = []
        for name in names:
            self._settle(name, resources, removed)
        for address in addresses:
            self._settle_address(address, resources, removed)
        self._due = {}
        self._again.clear()
        return resources, sorted(removed)

    def _affected(self, changed: Sequence[str]) -> tuple[dict[str, None], list[str]]:
        """Names of resources to look at, and addresses that were asked or given up."""
        known = self._catalog.addresses
        if len(changed) > 100 + 2 * (len(self.sent) + len(self.asked)):
            # Most of it is nothing to this client: look at what it has and at what it wants instead.
            mine = self._catalog.by_node.get(self._node, ()) if self._node else ()
            self._due.update(dict.fromkeys((*self.asked, *self.sent, *mine, *self._services)))
            self._services.clear()
            changed = ()
        names: dict[str, None] = {}
        addresses: dict[str, None] = {}
        for name in changed:
            names[name] = None
            addresses.update(dict.fromkeys(self._placed.get(name, ())))
            if name in known:
                addresses.update((alias, None) for alias in known[name].aliases if alias in self.asked)
        for name in sorted(self._due):
            if name in known:
                names[name] = None
            else:
                addresses[name] = None
        for address in addresses:
            names.update(dict.fromkeys(self._catalog.holders(address)))
            if address in self._place:
                names[self._place[address]] = None
        return names, list(addresses)

    def _find_service(self, name: str, names: dict[str, None]) -> None:
        """Where a service begins or ends to be wanted, its workloads are to be looked at too."""
        item = self._catalog.addresses.get(name)
        wanted = item is not None and item.is_service and self._asked_for(item)
        if wanted and name not in self._services:
            self._services.add(name)
            names.update(dict.fromkeys(self._catalog.by_service.get(name, ())))
        elif not wanted and name in self._services:
            self._services.discard(name)
            names.update(dict.fromkeys(found for found in self.sent if found in self._catalog.addresses))

    def _asked_for(self, item: Entry) -> bool:
        return item.name in self.asked or any(alias in self.asked for alias in item.aliases)

    def _settle(self, name: str, resources: list[bytes], removed: list[str]) -> None:
        """Send a resource, or take it back."""
        item = self._catalog.addresses.get(name)
        if item is None:
            if self.sent.pop(name, None) is not None:
                removed.append(name)
            return
        wanted = (
            self._asked_for(item)
            or any(service in self._services for service in item.members)
            or (bool(self._node) and item.node == self._node)
        )
        if not wanted:
            self.sent.pop(name, None)  # the client may keep it, without news of it
        elif self.sent.get(name) != item.version or name in self._again:
            resources.append(self._catalog.demanded(item, name))
            self.sent[name] = item.version

    def _settle_address(self, address: str, resources: list[bytes], removed: list[str]) -> None:
        """Send what has an address under that name, or take it back."""
        before = self._place.pop(address, None)
        if before is not None:
            self._placed[before].discard(address)
            if not self._placed[before]:
                del self._placed[before]
        holder = next(iter(self._catalog.holders(address)), None) if address in self.asked else None
        if holder is None:
            if self.sent.pop(address, None) is not None or address in self._again:
                removed.append(address)
            return
        self._place[address] = holder
        self._placed.setdefault(holder, set()).add(address)
        item = self._catalog.addresses[holder]
        if self.sent.get(address) != item.version or address in self._again:
            resources.append(self._catalog.demanded(item, address))
            self.sent[address] = item.version
