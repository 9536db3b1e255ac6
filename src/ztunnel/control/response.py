"""A response of discovery, read a little at a time, as protobuf would make objects of all its resources at once.

A large one is walked by hand, field by field, and only each resource given to protobuf.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
from google.protobuf.message import DecodeError

from ztunnel.wire import discovery_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ztunnel.control.pace import Pace

__all__ = ["SMALL", "Response", "read"]

SMALL = 64 * 1024
"""Bytes of a response that is read at once."""
_RESOURCES, _TYPE_URL, _NONCE, _REMOVED = 2, 4, 5, 6
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


@attrs.frozen(kw_only=True)
class Response:
    """What a response says. Source: envoy.service.discovery.v3.DeltaDiscoveryResponse."""

    type_url: str
    nonce: str
    removed: list[str]
    count: int
    """Of resources."""
    resources: Callable[[], Iterable[discovery_pb2.Resource]]
    """Reads them one by one. Raises DecodeError: one is no Resource."""


async def read(raw: bytes, pace: Pace) -> Response:
    """Read all but the resources.

    Args:
        raw: The message.
        pace: Cuts the work of a large one.

    Raises:
        DecodeError: it is no DeltaDiscoveryResponse.
    """
    if len(raw) <= SMALL:
        message = discovery_pb2.DeltaDiscoveryResponse.FromString(raw)
        return Response(
            type_url=message.type_url,
            nonce=message.nonce,
            removed=list(message.removed_resources),
            count=len(message.resources),
            resources=lambda: message.resources,
        )
    count = 0
    texts = {_TYPE_URL: "", _NONCE: ""}
    removed: list[str] = []
    slices = pace.begin()
    for number, start, end in _fields(raw):
        if number == _RESOURCES:
            count += 1
        elif number in texts:
            texts[number] = _text(raw[start:end])
        elif number == _REMOVED:
            removed.append(_text(raw[start:end]))
        if slices.due():
            await slices.rest()
    return Response(
        type_url=texts[_TYPE_URL],
        nonce=texts[_NONCE],
        removed=removed,
        count=count,
        resources=lambda: (
            discovery_pb2.Resource.FromString(raw[start:end])
            for number, start, end in _fields(raw)
            if number == _RESOURCES
        ),
    )


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise DecodeError("a string is no UTF-8") from None


def _fields(raw: bytes) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each field with a length; others are passed over.

    Source: Protocol Buffers, encoding.
    """
    at, size = 0, len(raw)
    while at < size:
        tag, at = _varint(raw, at)
        kind = tag & 7
        if kind == _LENGTH:
            length, at = _varint(raw, at)
            end = at + length
            if end > size:
                raise DecodeError("a field is cut")
            yield tag >> 3, at, end
            at = end
        elif kind == _VARINT:
            _, at = _varint(raw, at)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
            if at > size:
                raise DecodeError("a field is cut")
        else:
            raise DecodeError(f"a field of wire type {kind}")


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(raw) and shift < 70:
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise DecodeError("a number is cut, or too long")
