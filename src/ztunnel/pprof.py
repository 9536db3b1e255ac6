"""Stacks in the form that `go tool pprof` and collectors of profiles read. Source: google/pprof, profile.proto."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ztunnel.profiler import Stacks

__all__ = ["pprof"]


def pprof(stacks: Stacks, seconds: float, frequency: int, now: float) -> bytes:
    """A gzip-compressed `Profile` of CPU time in nanoseconds.

    Args:
        stacks: Microseconds by stack, outermost function first.
        seconds: How long was sampled.
        frequency: Samples per second.
        now: When that ended, seconds since 1970.
    """
    strings = {text: number for number, text in enumerate(["", "cpu", "nanoseconds"])}
    functions: dict[str, int] = {}  # a function is also its only place: lines are not told apart
    cpu = _number(1, strings["cpu"]) + _number(2, strings["nanoseconds"])
    parts = [_bytes(1, cpu)]
    for stack, spent in stacks.items():
        places = [functions.setdefault(name, len(functions) + 1) for name in reversed(stack)]
        parts.append(_bytes(2, _packed(1, places) + _packed(2, [spent * 1000])))
    for name, number in functions.items():
        index = strings.setdefault(name, len(strings))
        parts.append(_bytes(4, _number(1, number) + _bytes(4, _number(1, number))))
        parts.append(_bytes(5, _number(1, number) + _number(2, index) + _number(3, index)))
    parts += [_bytes(6, text.encode()) for text in strings]
    parts.append(_number(9, int((now - seconds) * 1e9)) + _number(10, int(seconds * 1e9)))
    parts.append(_bytes(11, cpu) + _number(12, 1_000_000_000 // frequency))
    packer = zlib.compressobj(wbits=31)  # with gzip's frame
    return packer.compress(b"".join(parts)) + packer.flush()


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _packed(field: int, values: Iterable[int]) -> bytes:
    return _bytes(field, b"".join(map(_varint, values)))
