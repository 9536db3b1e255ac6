"""How a call ended: status codes, the errors that carry them, and what other layers' codes mean as status.

Source: gRPC over HTTP2, "Responses" and "Errors".
"""

from __future__ import annotations

import enum
import re
from typing import Final

from hbone.errors import ErrorCode, HboneError

__all__ = [
    "GrpcError",
    "GrpcUnavailable",
    "StatusCode",
    "decode_message",
    "encode_message",
    "status_from_http",
    "status_from_reset",
]


class StatusCode(enum.IntEnum):
    """Why a call ended. Source: gRPC, "Status codes and their use"."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16

    @classmethod
    def from_wire(cls, text: bytes) -> StatusCode:
        """The code of a `grpc-status` value; one that is no known number counts as UNKNOWN."""
        if text.isdigit() and len(text) <= 2 and int(text) <= 16:
            return cls(int(text))
        return cls.UNKNOWN


class GrpcError(HboneError):
    """A call ended with a status other than OK. Raised by a handler, it is what the client gets."""

    def __init__(self, code: StatusCode, message: str = "", trailers: tuple[tuple[str, str | bytes], ...] = ()) -> None:
        super().__init__(f"{code.name}: {message}" if message else code.name)
        self.code = code
        self.message = message
        self.trailers = trailers


class GrpcUnavailable(GrpcError):
    """The transport failed, not the call: the peer could not be reached, or went away. It may be tried again."""

    def __init__(self, message: str, *, processed: bool = True) -> None:
        super().__init__(StatusCode.UNAVAILABLE, message)
        self.processed = processed
        """False when the server certainly never saw the call."""


_NOT_PLAIN: Final = re.compile(rb"[^\x20-\x24\x26-\x7e]")
_ESCAPED: Final = re.compile(rb"%([0-9A-Fa-f]{2})")
_LONGEST_MESSAGE: Final = 4096


def encode_message(message: str) -> bytes:
    """A `grpc-message` value: UTF-8, percent-encoded, cut at 4096 characters. Source: gRPC, "Responses"."""
    plain = message[:_LONGEST_MESSAGE].encode(errors="replace")
    return _NOT_PLAIN.sub(lambda match: b"%%%02X" % match.group()[0], plain)


def decode_message(value: bytes) -> str:
    """The text of a `grpc-message`; what is not well formed stays as it came. Source: gRPC, "Responses"."""
    return _ESCAPED.sub(lambda match: bytes([int(match.group(1), 16)]), value).decode(errors="replace")


_HTTP: Final = {
    400: StatusCode.INTERNAL,
    401: StatusCode.UNAUTHENTICATED,
    403: StatusCode.PERMISSION_DENIED,
    404: StatusCode.UNIMPLEMENTED,
    429: StatusCode.UNAVAILABLE,
    502: StatusCode.UNAVAILABLE,
    503: StatusCode.UNAVAILABLE,
    504: StatusCode.UNAVAILABLE,
}

_RESETS: Final = {
    ErrorCode.REFUSED_STREAM: StatusCode.UNAVAILABLE,
    ErrorCode.CANCEL: StatusCode.CANCELLED,
    ErrorCode.ENHANCE_YOUR_CALM: StatusCode.RESOURCE_EXHAUSTED,
    ErrorCode.INADEQUATE_SECURITY: StatusCode.PERMISSION_DENIED,
}


def status_from_http(status: int) -> StatusCode:
    """What an HTTP status means where no `grpc-status` came. Source: gRPC, "HTTP to gRPC status code mapping"."""
    return _HTTP.get(status, StatusCode.UNKNOWN)


def status_from_reset(code: ErrorCode) -> StatusCode:
    """What a RST_STREAM means to a call that was not complete. Source: gRPC over HTTP2, "Errors"."""
    return _RESETS.get(code, StatusCode.INTERNAL)
