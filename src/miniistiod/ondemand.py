"""What a client wants that asks for addresses by name, and has of it. Pure.

After a change of the mesh only those names are looked up again whose answer can have changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from miniistiod.catalog import Catalog

__all__ = ["OnDemand"]

_NODE = "\0node/"
"""Stands before a node's name where names are asked for: no resource is called that."""


class OnDemand:
    """The subscription of one stream to addresses.

    Args:
        catalog: the mesh.
        node: the client's node, whose workloads it gets unasked; may be empty.
        held: name to version of what the client has from an earlier stream.
    """

    def __init__(self, catalog: Catalog, node: str, held: Mapping[str, str]) -> None:
        self._catalog = catalog
        self.asked: set[str] = set()
        """Names that the client subscribed to."""
        self.sent: dict[str, str] = dict(held)
        """Resource name to version, as far as the client has it; names as they were sent."""
        self._answers: dict[str, tuple[str, ...]] = {}
        """A name that was asked to the names under which it was answered."""
        self._watched: dict[str, tuple[str, ...]] = {}
        """A name that was asked to the names in the catalog on which its answer depends."""
        self._watching: dict[str, set[str]] = {}
        """The other way round."""
        self._wanted: dict[str, int] = {}
        """Resource name to how many of the names asked bring it along."""
        self._unwanted: set[str] = set()
        self._due: set[str] = set()
        self._again: set[str] = set()
        self._own = f"{_NODE}{node}" if node else ""
        if self._own:
            self._due.add(self._own)

    def ask(self, name: str, *, again: bool = True) -> None:
        """Subscribe to a name. With `again` it is answered even if the client has it."""
        self.asked.add(name)
        self._due.add(name)
        if again:
            self._again.add(name)

    def give_up(self, name: str) -> None:
        """Unsubscribe from a name."""
        self.asked.discard(name)
        self._due.discard(name)
        self._again.discard(name)
        self.sent.pop(name, None)
        self._link(name, (), ())

    def answer(self, changed: Sequence[str]) -> tuple[list[bytes], list[str]]:
        """What the client is owed.

        Args:
            changed: names in the catalog that changed since the last answer.

        Returns:
            Encoded resources, and names that are gone.
        """
        todo = self._due | self._affected(changed)
        self._due = set()
        resources: dict[str, bytes] = {}
        removed: set[str] = set()
        for asked in sorted(todo):
            names = self._resolve(asked)
            # A ztunnel that waits for an address wakes up by the resource's name only: it gets that name too.
            alias = (asked,) if names and asked != self._own and asked not in self._catalog.addresses else ()
            if not names and (asked in self._again or asked in self.sent):
                removed.add(asked)
                self.sent.pop(asked, None)
            self._link(asked, (*names, *alias), names)
            for name in (*names, *alias):
                item = self._catalog.addresses[names[0] if name in alias else name]
                if self.sent.get(name) != item.version or name in self._again:
                    resources[name] = self._catalog.demanded(item, name)
                    self.sent[name] = item.version
        for name in self._unwanted:
            # What is still there, and nobody asks for any longer, the client may keep, without news of it.
            if name in self._wanted or name not in self.sent:
                continue
            del self.sent[name]
            if name not in self._catalog.addresses:
                removed.add(name)
        self._unwanted.clear()
        self._again.clear()
        return list(resources.values()), sorted(removed)

    def _resolve(self, asked: str) -> tuple[str, ...]:
        if asked == self._own:
            return tuple(self._catalog.by_node.get(asked.removeprefix(_NODE), ()))
        return self._catalog.resolve(asked)

    def _affected(self, changed: Sequence[str]) -> set[str]:
        """Names asked whose answer can have changed."""
        if len(changed) > 4 * len(self.asked) + 16:
            return {*self.asked, *([self._own] if self._own else [])}
        found: set[str] = set()
        for name in changed:
            found |= self._watching.get(name, _NONE)
            item = self._catalog.addresses.get(name)
            if item is not None:
                for key in (*item.aliases, *item.members, f"{_NODE}{item.node}"):
                    found |= self._watching.get(key, _NONE)
        return found

    def _link(self, asked: str, answers: Iterable[str], names: Iterable[str]) -> None:
        """Note what a name is answered with, and what it depends on; nothing at all where it is given up."""
        before = self._answers.pop(asked, ())
        after = tuple(answers)
        for name in after:
            self._wanted[name] = self._wanted.get(name, 0) + 1
        for name in before:
            self._wanted[name] -= 1
            if not self._wanted[name]:
                del self._wanted[name]
                self._unwanted.add(name)
        if after:
            self._answers[asked] = after
        for key in self._watched.pop(asked, ()):
            others = self._watching[key]
            others.discard(asked)
            if not others:
                del self._watching[key]
        if asked in self.asked or asked == self._own:
            keys = self._watched[asked] = tuple(dict.fromkeys((asked, *names)))
            for key in keys:
                self._watching.setdefault(key, set()).add(asked)


_NONE: frozenset[str] = frozenset()
