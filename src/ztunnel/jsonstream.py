"""JSON of any size, made and sent a little at a time: between two turns of the loop lies a bounded number of entries.

Indented and with sorted keys, as `json.dumps(value, indent=2, sort_keys=True)` writes it.
"""

from __future__ import annotations

import heapq
import itertools
import json
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping

__all__ = ["ENTRIES", "Rows", "collect", "collect_pieces", "in_order", "with_rows", "write", "write_pieces"]

ENTRIES: Final = 32
"""Entries of lists that are made between two turns; about a millisecond's worth."""
RUN: Final = 1024
"""Things that are sorted at once."""
CHUNK: Final = 64 * 1024
"""Characters that are sent at once."""
_PAUSE: Final = object()
_quote = json.encoder.encode_basestring_ascii


@attrs.frozen
class Rows:
    """A long list, or with `named` a long object, whose entries are made when their turn comes.

    Args:
        items: What there is, in order, such as `in_order` gives. Each is used once.
        make: The entry for one; with `named` its name and its value. None leaves it out.
        named: Whether it is an object. Its keys are not sorted further.
    """

    items: Iterable[Any]
    make: Callable[[Any], Any]
    named: bool = False


def with_rows(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` with its lists as `Rows`."""
    return {name: Rows(part, lambda entry: entry) if isinstance(part, list) else part for name, part in value.items()}


def in_order(items: Iterable[Any], key: Callable[[Any], Any]) -> Iterator[Any]:
    """What `sorted` would give of what there is now, with pauses between runs for who consumes it in turns."""
    return _merged(list(items), key)


def _merged(found: list[Any], key: Callable[[Any], Any]) -> Iterator[Any]:
    runs = []
    for start in range(0, len(found), RUN):
        runs.append(sorted(found[start : start + RUN], key=key))
        for _ in range(ENTRIES // 2):  # sorting a run takes as long as making some entries
            yield _PAUSE
    yield from heapq.merge(*runs, key=key)


async def write(value: Mapping[str, Any], send: Callable[[bytes], Awaitable[object]]) -> None:
    """Send `value` as JSON, with turns of the loop in between.

    Args:
        value: The object; what is long in it is `Rows`.
        send: Takes the next part of the text; not called again before it returns.
    """
    await write_pieces(itertools.chain(_pieces(value, "\n"), ["\n"]), send)


async def write_pieces(pieces: Iterable[str], send: Callable[[bytes], Awaitable[object]]) -> None:
    """Send a text whose pieces are made when they are read, with turns of the loop in between."""
    waiting: list[str] = []
    size = 0
    for count, piece in enumerate(pieces, 1):
        waiting.append(piece)
        size += len(piece)
        if size >= CHUNK:
            await send("".join(waiting).encode())
            waiting.clear()
            size = 0
        if count % ENTRIES == 0:
            await trio.lowlevel.checkpoint()
    await send("".join(waiting).encode())


async def collect(value: Mapping[str, Any]) -> bytes:
    """`value` as JSON in one piece, made with turns of the loop in between."""
    return await collect_pieces(itertools.chain(_pieces(value, "\n"), ["\n"]))


async def collect_pieces(pieces: Iterable[str]) -> bytes:
    """A text in one piece, as `write_pieces` makes it."""
    parts: list[bytes] = []

    async def keep(part: bytes) -> None:
        parts.append(part)

    await write_pieces(pieces, keep)
    return b"".join(parts)


def _pieces(value: Any, newline: str) -> Iterator[str]:
    """The text in pieces of one entry each; `newline` begins a line at the value's depth."""
    if isinstance(value, Rows):
        yield from _rows(value, newline)
    elif isinstance(value, dict) and any(isinstance(part, (Rows, dict)) for part in value.values()):
        inner = newline + "  "
        before = "{" + inner
        for name in sorted(value):
            yield f"{before}{_quote(name)}: "
            yield from _pieces(value[name], inner)
            before = "," + inner
        yield newline + "}"
    else:
        yield _text(value, newline)


def _rows(rows: Rows, newline: str) -> Iterator[str]:
    opening, closing = "{}" if rows.named else "[]"
    inner = newline + "  "
    before = opening + inner
    empty = True
    for item in rows.items:
        entry = rows.make(item) if item is not _PAUSE else None
        if entry is None:
            yield ""
            continue
        if rows.named:
            name, entry = entry
            before += f"{_quote(name)}: "
        yield before
        yield from _pieces(entry, inner)
        before = "," + inner
        empty = False
    yield opening + closing if empty else newline + closing


def _text(value: Any, newline: str) -> str:
    kind = type(value)
    if kind is str:
        return _quote(value)
    if kind is int:
        return str(value)
    if kind is dict:
        inner = newline + "  "
        parts = [f"{_quote(str(name))}: {_text(value[name], inner)}" for name in sorted(value)]
        return "{" + inner + ("," + inner).join(parts) + newline + "}" if parts else "{}"
    if kind is list or kind is tuple:
        inner = newline + "  "
        parts = [_text(part, inner) for part in value]
        return "[" + inner + ("," + inner).join(parts) + newline + "]" if parts else "[]"
    if value is None:
        return "null"
    return json.dumps(value, default=str)
