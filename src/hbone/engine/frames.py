"""Frames: the nine bytes before each payload, and the small frames that the engine builds itself.

Source: RFC 9113 §4.1, §6.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, Final

from hbone.enums import plain_members

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hbone.errors import ErrorCode

__all__ = [
    "ACK",
    "DEFAULT_FRAME_SIZE",
    "DEFAULT_WINDOW",
    "END_HEADERS",
    "END_STREAM",
    "HEADER",
    "HEADER_SIZE",
    "MAX_STREAM_ID",
    "MAX_WINDOW",
    "PADDED",
    "PREFACE",
    "PRIORITY",
    "U32",
    "FrameType",
    "Setting",
    "frame",
    "goaway",
    "header_block",
    "ping",
    "rst_stream",
    "settings",
    "window_update",
]

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""First bytes of a client. Source: RFC 9113 §3.4."""

HEADER: Final = struct.Struct(">IBI")
"""The frame header in three words: length << 8 | type, flags, reserved bit and stream."""
HEADER_SIZE: Final = 9
U32: Final = struct.Struct(">I")
_SETTING: Final = struct.Struct(">HI")
_WINDOW_UPDATE: Final = struct.Struct(">IBII")
_GOAWAY: Final = struct.Struct(">II")

MAX_STREAM_ID: Final = 2**31 - 1
MAX_WINDOW: Final = 2**31 - 1
DEFAULT_WINDOW: Final = 65_535
"""Window of a stream and of the connection before anyone says otherwise. Source: RFC 9113 §6.9.2."""
DEFAULT_FRAME_SIZE: Final = 16_384

END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
PRIORITY: Final = 0x20


@plain_members
class FrameType(enum.IntEnum):
    """Types of frame; any other number is ignored. Source: RFC 9113 §6."""

    DATA = 0x0
    HEADERS = 0x1
    PRIORITY = 0x2
    RST_STREAM = 0x3
    SETTINGS = 0x4
    PUSH_PROMISE = 0x5
    PING = 0x6
    GOAWAY = 0x7
    WINDOW_UPDATE = 0x8
    CONTINUATION = 0x9


@plain_members
class Setting(enum.IntEnum):
    """Settings with a meaning here; any other is dropped unread. Source: RFC 9113 §6.5.2, RFC 8441 §3."""

    HEADER_TABLE_SIZE = 0x1
    ENABLE_PUSH = 0x2
    MAX_CONCURRENT_STREAMS = 0x3
    INITIAL_WINDOW_SIZE = 0x4
    MAX_FRAME_SIZE = 0x5
    MAX_HEADER_LIST_SIZE = 0x6
    ENABLE_CONNECT_PROTOCOL = 0x8


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """One frame of any type. Source: RFC 9113 §4.1."""
    return HEADER.pack(len(payload) << 8 | kind, flags, stream_id) + payload


def settings(values: Iterable[tuple[int, int]] = (), *, ack: bool = False) -> bytes:
    """SETTINGS with the given values, or its acknowledgement. Source: RFC 9113 §6.5."""
    payload = b"".join([_SETTING.pack(code, value) for code, value in values])
    return frame(FrameType.SETTINGS, ACK if ack else 0, 0, payload)


def window_update(stream_id: int, increment: int) -> bytes:
    """WINDOW_UPDATE; stream 0 is the connection. Source: RFC 9113 §6.9."""
    return _WINDOW_UPDATE.pack(4 << 8 | FrameType.WINDOW_UPDATE, 0, stream_id, increment)


def rst_stream(stream_id: int, code: ErrorCode | int) -> bytes:
    """RST_STREAM. Source: RFC 9113 §6.4."""
    return _WINDOW_UPDATE.pack(4 << 8 | FrameType.RST_STREAM, 0, stream_id, code)


def ping(payload: bytes, *, ack: bool = False) -> bytes:
    """PING with eight bytes. Source: RFC 9113 §6.7."""
    return frame(FrameType.PING, ACK if ack else 0, 0, payload)


def goaway(last_stream_id: int, code: ErrorCode | int, debug: bytes = b"") -> bytes:
    """GOAWAY. Source: RFC 9113 §6.8."""
    return frame(FrameType.GOAWAY, 0, 0, _GOAWAY.pack(last_stream_id, code) + debug)


def header_block(stream_id: int, block: bytes, *, end_stream: bool, max_frame: int) -> bytes:
    """HEADERS, and CONTINUATION for what is longer than the peer's largest frame. Source: RFC 9113 §6.2, §6.10."""
    flags = END_STREAM if end_stream else 0
    if len(block) <= max_frame:
        return frame(FrameType.HEADERS, flags | END_HEADERS, stream_id, block)
    parts = [block[start : start + max_frame] for start in range(0, len(block), max_frame)]
    out = [frame(FrameType.HEADERS, flags, stream_id, parts[0])]
    out += [frame(FrameType.CONTINUATION, 0, stream_id, part) for part in parts[1:-1]]
    out.append(frame(FrameType.CONTINUATION, END_HEADERS, stream_id, parts[-1]))
    return b"".join(out)
