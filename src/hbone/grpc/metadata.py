"""Custom metadata and timeouts of a call, to and from header fields.

Source: gRPC over HTTP2, "Requests".
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Iterable, Sequence
from typing import Final

from hbone.errors import LocalProtocolError
from hbone.grpc.status import GrpcError, StatusCode

__all__ = ["Metadata", "decode_metadata", "decode_timeout", "encode_metadata", "encode_timeout"]

Metadata = Sequence[tuple[str, str | bytes]]
"""Names in lower case; values are `bytes` where the name ends in `-bin`, else `str`."""

_NAME: Final = re.compile(r"[0-9a-z_.-]+")
_TEXT: Final = re.compile(r"(?:[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?)?")
_RESERVED: Final = frozenset({"te", "content-type", "user-agent", "connection", "host", "content-length"})
_OF_HTTP: Final = frozenset({b"te", b"content-type", b"content-length", b"date", b"server"})
_TIMEOUT: Final = re.compile(rb"([0-9]{1,8})([HMSmun])")
_UNITS: Final = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}


def encode_metadata(metadata: Metadata) -> list[tuple[bytes, bytes]]:
    """Header fields of `metadata`.

    Raises:
        LocalProtocolError: a name or value that a header cannot carry. The value is not repeated: it may be a secret.
    """
    fields: list[tuple[bytes, bytes]] = []
    for name, value in metadata:
        if not _NAME.fullmatch(name) or name.startswith("grpc-") or name in _RESERVED:
            raise LocalProtocolError(
                f"metadata name {name!r} cannot be used; take lower-case letters, digits, '_', '.' and '-',"
                " and no name of HTTP or gRPC"
            )
        if name.endswith("-bin"):
            if isinstance(value, str):
                raise LocalProtocolError(f"metadata {name!r} must be bytes, because its name ends in -bin")
            fields.append((name.encode(), base64.b64encode(value).rstrip(b"=")))
        elif isinstance(value, bytes):
            raise LocalProtocolError(f"metadata {name!r} must be text; give it a name that ends in -bin to send bytes")
        elif not _TEXT.fullmatch(value):
            raise LocalProtocolError(
                f"metadata {name!r} holds a character that a header cannot carry;"
                " take printable ASCII without a space or newline at either end"
            )
        else:
            fields.append((name.encode(), value.encode()))
    return fields


def decode_metadata(fields: Iterable[tuple[bytes, bytes]]) -> tuple[tuple[str, str | bytes], ...]:
    """The custom metadata among header fields; names of HTTP and gRPC are left out.

    Raises:
        GrpcError: a value that is neither printable ASCII nor, for `-bin`, base64.
    """
    metadata: list[tuple[str, str | bytes]] = []
    for raw_name, raw_value in fields:
        name, value = bytes(raw_name), bytes(raw_value)
        if name.startswith((b":", b"grpc-")) or name in _OF_HTTP:
            continue
        key = name.decode("latin-1")
        if name.endswith(b"-bin"):
            for part in value.split(b","):  # a list may have been joined on the way
                metadata.append((key, _decode_base64(key, part.strip())))
            continue
        try:
            text = value.decode("ascii")
        except UnicodeDecodeError:
            text = "\x00"
        if not _TEXT.fullmatch(text):
            raise GrpcError(StatusCode.INVALID_ARGUMENT, f"metadata {key!r} is not printable ASCII")
        metadata.append((key, text))
    return tuple(metadata)


def _decode_base64(name: str, value: bytes) -> bytes:
    try:
        return base64.b64decode(value.rstrip(b"=") + b"=" * (-len(value.rstrip(b"=")) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise GrpcError(StatusCode.INVALID_ARGUMENT, f"metadata {name!r} is not base64") from None


def encode_timeout(seconds: float) -> bytes:
    """A `grpc-timeout` value, rounded up to what eight digits hold. Source: gRPC over HTTP2, "Timeout"."""
    for unit, size in ((b"n", 1e-9), (b"u", 1e-6), (b"m", 1e-3), (b"S", 1.0), (b"M", 60.0)):
        amount = math.ceil(max(seconds, 0.0) / size)
        if amount < 10**8:
            return b"%d%s" % (amount, unit)
    return b"%dH" % min(math.ceil(seconds / 3600.0), 10**8 - 1)


def decode_timeout(value: bytes) -> float:
    """Seconds of a `grpc-timeout` value.

    Raises:
        GrpcError: another form.
    """
    match = _TIMEOUT.fullmatch(value)
    if match is None:
        raise GrpcError(StatusCode.INVALID_ARGUMENT, "grpc-timeout is malformed")
    return int(match.group(1)) * _UNITS[match.group(2)]
