"""Look-ups by label, both ways: what selects these labels, and which labels does this select."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping

__all__ = ["LabelIndex", "SelectorIndex", "selects"]

K = TypeVar("K", bound="Hashable")


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a selector is a part of labels."""
    return all(labels.get(key) == value for key, value in selector.items())


class SelectorIndex(Generic[K]):
    """Things by the labels that they select; a look-up costs what matches, not what exists."""

    def __init__(self) -> None:
        self._by_label: dict[tuple[str, str, str], dict[K, Mapping[str, str]]] = {}

    def put(self, namespace: str, selector: Mapping[str, str], thing: K) -> None:
        """Enter a thing, by one of its labels; the others are compared at look-up."""
        self._by_label.setdefault((namespace, *min(selector.items())), {})[thing] = selector

    def drop(self, namespace: str, selector: Mapping[str, str], thing: K) -> None:
        """Undo `put`."""
        label = (namespace, *min(selector.items()))
        things = self._by_label[label]
        del things[thing]
        if not things:
            del self._by_label[label]

    def selecting(self, namespace: str, labels: Mapping[str, str]) -> list[K]:
        """Things of a namespace whose selector is a part of `labels`."""
        return [
            thing
            for key, value in labels.items()
            for thing, selector in self._by_label.get((namespace, key, value), _NONE).items()
            if selects(selector, labels)
        ]


class LabelIndex(Generic[K]):
    """Things by the labels that they have."""

    def __init__(self) -> None:
        self._by_label: dict[tuple[str, str, str], dict[K, Mapping[str, str]]] = {}
        self._namespaces: dict[str, dict[K, None]] = {}

    def put(self, namespace: str, labels: Mapping[str, str], thing: K) -> None:
        """Enter a thing."""
        self._namespaces.setdefault(namespace, {})[thing] = None
        for label in labels.items():
            self._by_label.setdefault((namespace, *label), {})[thing] = labels

    def drop(self, namespace: str, labels: Mapping[str, str], thing: K) -> None:
        """Undo `put`."""
        things = self._namespaces[namespace]
        del things[thing]
        if not things:
            del self._namespaces[namespace]
        for label in labels.items():
            entered = self._by_label[(namespace, *label)]
            del entered[thing]
            if not entered:
                del self._by_label[(namespace, *label)]

    def of(self, namespace: str) -> Iterable[K]:
        """Everything in a namespace."""
        return self._namespaces.get(namespace, ())

    def selected(self, namespace: str | None, selector: Mapping[str, str]) -> list[K]:
        """What a selector selects in a namespace, or with None in all of them."""
        spaces = list(self._namespaces) if namespace is None else [namespace]
        found: list[K] = []
        for space in spaces:
            buckets = [self._by_label.get((space, *label), _NONE) for label in selector.items()]
            smallest = min(buckets, key=len, default=_NONE)
            found += [thing for thing, labels in smallest.items() if selects(selector, labels)]
        return found


_NONE: Mapping[Any, Mapping[str, str]] = {}
