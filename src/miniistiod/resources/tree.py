"""YAML text -> values that remember their line. Strict and bounded.

Built from parser events, not by PyYAML's constructors: nothing recurses on the input's depth, an alias costs what its
expansion would, and a key given twice is an error instead of a silent choice.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs
import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator

    from miniistiod.resources.findings import Findings

__all__ = ["MAX_BYTES", "MAX_DEPTH", "MAX_VALUES", "Mapping", "Scalar", "Sequence", "Value", "documents", "kind_of"]

MAX_BYTES = 8 << 20
"""Bytes of one file."""
MAX_VALUES = 1_000_000
"""Values in one file, aliases counted as if they were written out."""
MAX_DEPTH = 32
"""Levels of lists and mappings within each other."""

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_RESOLVER = yaml.resolver.Resolver()
_KINDS = {"str": "text", "int": "number", "float": "number", "bool": "true or false", "null": "nothing"}


@attrs.frozen
class Scalar:
    """A single value as written."""

    text: str
    line: int
    kind: str
    """`text`, `number`, `true or false` or `nothing`, as a reader of YAML would take it."""


@attrs.frozen
class Sequence:
    """A list."""

    items: list[Value]
    line: int
    size: int = 1
    """Values inside, this one included."""


@attrs.frozen
class Mapping:
    """A mapping; keys are texts."""

    items: dict[str, tuple[int, Value]]
    """Key to its line and value."""
    line: int
    size: int = 1


Value: TypeAlias = Scalar | Sequence | Mapping


def kind_of(value: Value) -> str:
    """What a value is, in words for an error."""
    return "a list" if isinstance(value, Sequence) else "a mapping" if isinstance(value, Mapping) else value.kind


class _Bad(Exception):
    def __init__(self, line: int, what: str, fix: str) -> None:
        super().__init__(what)
        self.line, self.what, self.fix = line, what, fix


@attrs.define
class _Open:
    """A collection whose end has not come yet."""

    line: int
    mapping: bool
    anchor: str | None
    items: list[Value] = attrs.Factory(list)
    pairs: dict[str, tuple[int, Value]] = attrs.Factory(dict)
    key: Scalar | None = None
    size: int = 1

    def add(self, value: Value) -> None:
        self.size += _size(value)
        if not self.mapping:
            self.items.append(value)
        elif self.key is None:
            self.key = _as_key(value)
            if self.key.text in self.pairs:
                first = self.pairs[self.key.text][0]
                raise _Bad(
                    value.line,
                    f"the key {self.key.text!r} is given twice, first on line {first}",
                    "keep one of them",
                )
        else:
            self.pairs[self.key.text] = (self.key.line, value)
            self.key = None

    def close(self) -> Value:
        if self.mapping:
            return Mapping(self.pairs, self.line, self.size)
        return Sequence(self.items, self.line, self.size)


def documents(text: str, findings: Findings) -> list[Value]:
    """The documents of a file, empty ones left out.

    A file with any error gives none: what follows a broken line may not be what its author meant.
    """
    if len(text) > MAX_BYTES:
        findings.error(0, f"the file has {len(text)} characters, over the limit of {MAX_BYTES}", "split it")
        return []
    try:
        return list(_build(text))
    except _Bad as bad:
        findings.error(bad.line, bad.what, bad.fix)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(part for part in (error.context, error.problem) if part)
        findings.error(mark.line + 1 if mark else 0, f"not YAML: {what}", "mend the syntax there or just above")
    except yaml.YAMLError as error:
        findings.error(0, f"not YAML: {' '.join(str(error).split())[:200]}", "save the file as UTF-8 text")
    return []


def _build(text: str) -> Iterator[Value]:
    stack: list[_Open] = []
    anchors: dict[str, Value] = {}
    values = 0
    for event in yaml.parse(text, Loader=_LOADER):
        line = event.start_mark.line + 1 if event.start_mark else 0
        done: Value | None = None
        if isinstance(event, yaml.ScalarEvent):
            done = _scalar(event, line)
            if event.anchor:
                anchors[event.anchor] = done
        elif isinstance(event, yaml.AliasEvent):
            name = event.anchor
            if name not in anchors:
                raise _Bad(line, f"the alias *{name} refers to no anchor before it", f"define &{name} above it")
            done = anchors[name]
        elif isinstance(event, yaml.CollectionStartEvent):
            if event.tag and not event.tag.startswith("tag:yaml.org,2002:"):
                raise _Bad(line, f"the tag {event.tag} has no meaning here", "remove it")
            if len(stack) >= MAX_DEPTH:
                raise _Bad(line, f"more than {MAX_DEPTH} levels of lists and mappings", "flatten the document")
            stack.append(_Open(line, isinstance(event, yaml.MappingStartEvent), event.anchor))
        elif isinstance(event, yaml.CollectionEndEvent):
            opened = stack.pop()
            done = opened.close()
            if opened.anchor:
                anchors[opened.anchor] = done
        elif isinstance(event, yaml.DocumentStartEvent):
            anchors.clear()
        if done is None:
            continue
        if not isinstance(event, yaml.CollectionEndEvent):
            values += _size(done)
            if values > MAX_VALUES:
                raise _Bad(line, f"more than {MAX_VALUES} values, aliases written out", "split the file")
        if stack:
            stack[-1].add(done)
        elif not (isinstance(done, Scalar) and done.kind == "nothing"):
            yield done


def _scalar(event: Any, line: int) -> Scalar:
    tag = event.tag
    if tag is None or tag == "!":
        tag = (_tag if len(event.value) < 64 else _tag.__wrapped__)(event.value, event.implicit)
    name = tag.removeprefix("tag:yaml.org,2002:")
    if name == tag:
        raise _Bad(line, f"the tag {tag} has no meaning here", "remove it")
    return Scalar(event.value, line, _KINDS.get(name, "text"))


@functools.lru_cache(maxsize=16_384)
def _tag(text: str, implicit: tuple[bool, bool]) -> str:
    """The type of a value without one; the same few words come again and again."""
    # PyYAML's resolver has no type hints.
    tag: str = _RESOLVER.resolve(yaml.ScalarNode, text, implicit)  # type: ignore[no-untyped-call]
    return tag


def _as_key(value: Value) -> Scalar:
    if not isinstance(value, Scalar):
        raise _Bad(value.line, f"{kind_of(value)} stands where a key is expected", "write keys as plain texts")
    if value.text == "<<" and value.kind == "text":
        raise _Bad(value.line, "the merge key << is not supported", "write the fields out")
    return value


def _size(value: Value) -> int:
    return 1 if isinstance(value, Scalar) else value.size
