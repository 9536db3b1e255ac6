"""Takes fields out of a mapping one by one; what was not taken in the end is an unknown field."""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from miniistiod.resources.tree import Mapping, Scalar, Sequence, Value, kind_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from miniistiod.resources.findings import Findings

__all__ = ["IpAddress", "IpInterface", "IpNetwork", "Reader", "names_like"]

T = TypeVar("T")
IpAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
IpInterface: TypeAlias = ipaddress.IPv4Interface | ipaddress.IPv6Interface

_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})")


def names_like(known: Iterable[str]) -> str:
    """A list of names for an error."""
    return ", ".join(sorted(known))


class Reader:
    """The fields of one mapping. Every getter notes an error and returns a harmless value when the field is wrong."""

    def __init__(self, value: Value, path: str, findings: Findings) -> None:
        self.path = path
        """Where we are in the document, as `spec.ports[1]`."""
        self.findings = findings
        self.line = value.line
        self._left: dict[str, tuple[int, Value]] = {}
        self._known: set[str] = set()
        if isinstance(value, Mapping):
            self._left = dict(value.items)
        elif not (isinstance(value, Scalar) and value.kind == "nothing"):
            self.error(value.line, f"{path} is {kind_of(value)} instead of a mapping", "write it as 'key: value' lines")

    def error(self, line: int, what: str, fix: str) -> None:
        """Note an error."""
        self.findings.error(line, what, fix)

    def warning(self, line: int, what: str, fix: str) -> None:
        """Note a warning."""
        self.findings.warning(line, what, fix)

    def field(self, name: str) -> str:
        """The full path of a field, for errors."""
        return f"{self.path}.{name}" if self.path else name

    def take(self, name: str) -> Value | None:
        """A field's value, if it is there and not null."""
        self._known.add(name)
        _, value = self._left.pop(name, (0, None))
        if isinstance(value, Scalar) and value.kind == "nothing":
            return None
        return value

    def has(self, name: str) -> bool:
        """Whether a field is there."""
        return name in self._left

    def ignore(self, *names: str) -> None:
        """Accept fields that have no meaning here."""
        for name in names:
            self._known.add(name)
            self._left.pop(name, None)

    def refuse(self, name: str, what: str, fix: str) -> bool:
        """Note an error when a field of Istio's that we cannot honour is there and not empty."""
        value = self.take(name)
        if value is None or (isinstance(value, Sequence | Mapping) and not value.items):
            return False
        self.error(value.line, f"{self.field(name)} {what}", fix)
        return True

    def finish(self) -> None:
        """Note an error for each field that nobody took."""
        for name, (line, _) in self._left.items():
            known = names_like(self._known)
            self.error(line, f"unknown field {self.field(name)}", f"remove it or mend its spelling (known: {known})")
        self._left.clear()

    def require(self, name: str, fix: str) -> None:
        """Note that a field is missing."""
        self.error(self.line, f"{self.field(name)} is missing", fix)

    # -- single values

    def text(self, name: str) -> str | None:
        """A text."""
        value = self.take(name)
        return None if value is None else self.as_text(value, self.field(name))

    def as_text(self, value: Value, path: str) -> str | None:
        """A value that must be a text."""
        if not isinstance(value, Scalar):
            self.error(value.line, f"{path} is {kind_of(value)} instead of a text", "write one value")
            return None
        if value.kind != "text":
            self.error(value.line, f"{path} is {value.text!r}, {_article(value.kind)}", "put it in quotes")
            return None
        return value.text

    def boolean(self, name: str) -> bool | None:
        """`true` or `false`."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, Scalar) and value.kind == "true or false" and value.text in ("true", "false"):
            return value.text == "true"
        shown = value.text if isinstance(value, Scalar) else kind_of(value)
        self.error(value.line, f"{self.field(name)} is {shown}", "write true or false")
        return None

    def integer(self, name: str, low: int, high: int) -> int | None:
        """A decimal number within limits."""
        value = self.take(name)
        return None if value is None else self.as_integer(value, self.field(name), low, high)

    def as_integer(self, value: Value, path: str, low: int, high: int) -> int | None:
        """A value that must be a decimal number within limits."""
        if not isinstance(value, Scalar) or value.kind != "number" or not _INTEGER.fullmatch(value.text):
            shown = repr(value.text) if isinstance(value, Scalar) else kind_of(value)
            self.error(value.line, f"{path} is {shown}, not a whole number", f"write a number from {low} to {high}")
            return None
        number = int(value.text)
        if not low <= number <= high:
            self.error(value.line, f"{path} is {number}", f"write a number from {low} to {high}")
            return None
        return number

    def choice(self, name: str, known: Iterable[str]) -> str | None:
        """One of a few words."""
        value = self.take(name)
        if value is None:
            return None
        text = self.as_text(value, self.field(name))
        if text is not None and text not in known:
            self.error(value.line, f"{self.field(name)} is {text!r}", f"write one of {names_like(known)}")
            return None
        return text

    # -- collections

    def mapping(self, name: str) -> Reader | None:
        """A mapping, to be finished by the caller."""
        value = self.take(name)
        return None if value is None else Reader(value, self.field(name), self.findings)

    def required_mapping(self, name: str, fix: str) -> Reader | None:
        """As `mapping`; its absence is noted."""
        found = self.mapping(name)
        if found is None:
            self.require(name, fix)
        return found

    def elements(self, name: str, most: int | None = None) -> list[tuple[str, Value]] | None:
        """The elements of a list, each with its path; None when the field is absent. More than `most` are an error."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, Sequence):
            self.error(value.line, f"{self.field(name)} is {kind_of(value)} instead of a list", "write '- value' lines")
            return []
        if most is not None and len(value.items) > most:
            what = f"{self.field(name)} has {len(value.items)} elements, over the limit of {most}"
            self.error(value.line, what, "make several documents")
        return [(f"{self.field(name)}[{index}]", item) for index, item in enumerate(value.items[:most])]

    def readers(self, name: str, most: int | None = None) -> list[Reader] | None:
        """The elements of a list of mappings; None when the field is absent. More than `most` are an error."""
        elements = self.elements(name, most)
        return None if elements is None else [Reader(item, path, self.findings) for path, item in elements]

    def texts(
        self,
        name: str,
        parse: Callable[[str], T],
        check: Callable[[T], None] | None = None,
        most: int | None = None,
    ) -> tuple[T, ...] | None:
        """A list of texts, each parsed. None when the field is absent.

        Args:
            name: the field.
            parse: raises ValueError with what is wrong; the value is left out.
            check: raises ValueError too; that is an error all the same, but the value stays.
            most: how many there may be.
        """
        elements = self.elements(name, most)
        if elements is None:
            return None
        found: list[T] = []
        for path, item in elements:
            text = self.as_text(item, path)
            if text is None:
                continue
            try:
                found.append(parse(text))
                if check is not None:
                    check(found[-1])
            except ValueError as error:
                what, _, fix = str(error).partition("; ")
                self.error(item.line, f"{path} is {text!r}: {what}", fix or "mend it")
        return tuple(found)

    def string_map(self, name: str) -> dict[str, str]:
        """A mapping of texts to texts, as labels are."""
        value = self.take(name)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self.error(value.line, f"{self.field(name)} is {kind_of(value)} instead of a mapping", "write 'key: value'")
            return {}
        pairs: dict[str, str] = {}
        for key, (_, item) in value.items.items():
            text = self.as_text(item, f"{self.field(name)}[{key}]")
            if text is not None:
                pairs[key] = text
        return pairs

    def port_map(self, name: str) -> dict[str, int]:
        """A mapping of port names to numbers."""
        value = self.take(name)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self.error(value.line, f"{self.field(name)} is {kind_of(value)} instead of a mapping", "write 'name: port'")
            return {}
        pairs: dict[str, int] = {}
        for key, (_, item) in value.items.items():
            port = self.as_integer(item, f"{self.field(name)}[{key}]", 1, 65_535)
            if port is not None:
                pairs[key] = port
        return pairs


def _article(kind: str) -> str:
    return f"a {kind}" if kind == "number" else kind
