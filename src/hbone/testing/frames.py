"""Frames for tests, as bytes: every type of HTTP/2, right ones and wrong ones.

Nothing is checked here. A builder for each type takes what the frame has in it; `raw` builds any nine bytes and any
payload, also with a length that lies.

```python
peer = frames.PREFACE + frames.settings() + frames.connect(1, "10.0.0.1:80") + frames.data(1, b"x", pad=3)
```
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from hpack import Encoder

from hbone.engine.frames import PREFACE, FrameType, Setting
from hbone.errors import ErrorCode

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from hbone.events import Headers

__all__ = [
    "PREFACE",
    "FrameType",
    "Setting",
    "block",
    "connect",
    "connect_headers",
    "continuation",
    "data",
    "goaway",
    "headers",
    "ping",
    "priority",
    "push_promise",
    "raw",
    "response",
    "rst_stream",
    "settings",
    "settings_ack",
    "split",
    "unknown",
    "window_update",
]


def raw(kind: int, flags: int, stream_id: int, payload: bytes = b"", *, length: int | None = None) -> bytes:
    """Any frame. `length` is what its header claims; without it, the truth."""
    size = len(payload) if length is None else length
    return struct.pack(">IBI", size << 8 | kind, flags, stream_id) + payload


def _padded(flags: int, payload: bytes, pad: int | None) -> tuple[int, bytes]:
    return (flags, payload) if pad is None else (flags | 0x8, bytes([pad]) + payload + bytes(pad))


def data(stream_id: int, payload: bytes = b"", *, end_stream: bool = False, pad: int | None = None) -> bytes:
    """DATA; `pad` is the number of padding bytes, with their length byte, None for an unpadded frame."""
    flags, payload = _padded(0x1 if end_stream else 0, payload, pad)
    return raw(FrameType.DATA, flags, stream_id, payload)


def block(fields: Iterable[tuple[bytes | str, bytes | str]], *, huffman: bool = False) -> bytes:
    """A header block that uses no dynamic table, so that it fits anywhere in a connection."""
    return Encoder().encode([(name, value, True) for name, value in fields], huffman=huffman)


def headers(
    stream_id: int,
    fields: Headers | bytes,
    *,
    end_stream: bool = False,
    end_headers: bool = True,
    pad: int | None = None,
    priority: tuple[int, int] | None = None,
) -> bytes:
    """HEADERS of fields, or of a block as it stands; `priority` is the stream depended on, and the weight."""
    payload = fields if isinstance(fields, bytes) else block(fields)
    flags = (0x1 if end_stream else 0) | (0x4 if end_headers else 0)
    if priority is not None:
        flags |= 0x20
        payload = struct.pack(">IB", *priority) + payload
    flags, payload = _padded(flags, payload, pad)
    return raw(FrameType.HEADERS, flags, stream_id, payload)


def continuation(stream_id: int, payload: bytes = b"", *, end_headers: bool = False) -> bytes:
    """CONTINUATION of a part of a block."""
    return raw(FrameType.CONTINUATION, 0x4 if end_headers else 0, stream_id, payload)


def connect_headers(authority: str = "10.0.0.1:80", extra: Iterable[tuple[bytes, bytes]] = ()) -> Headers:
    """The fields of a CONNECT."""
    return ((b":method", b"CONNECT"), (b":authority", authority.encode()), *extra)


def connect(
    stream_id: int,
    authority: str = "10.0.0.1:80",
    extra: Iterable[tuple[bytes, bytes]] = (),
    *,
    end_stream: bool = False,
) -> bytes:
    """A CONNECT request."""
    return headers(stream_id, connect_headers(authority, extra), end_stream=end_stream)


def response(
    stream_id: int, status: int = 200, extra: Iterable[tuple[bytes, bytes]] = (), *, end_stream: bool = False
) -> bytes:
    """An answer."""
    return headers(stream_id, ((b":status", str(status).encode()), *extra), end_stream=end_stream)


def priority(stream_id: int, depends_on: int = 0, weight: int = 15) -> bytes:
    """PRIORITY."""
    return raw(FrameType.PRIORITY, 0, stream_id, struct.pack(">IB", depends_on, weight))


def rst_stream(stream_id: int, code: int = ErrorCode.CANCEL) -> bytes:
    """RST_STREAM."""
    return raw(FrameType.RST_STREAM, 0, stream_id, struct.pack(">I", code))


def settings(values: Mapping[int, int] | Iterable[tuple[int, int]] = ()) -> bytes:
    """SETTINGS."""
    pairs = values.items() if hasattr(values, "items") else values
    return raw(FrameType.SETTINGS, 0, 0, b"".join([struct.pack(">HI", code, value) for code, value in pairs]))


def settings_ack() -> bytes:
    """The acknowledgement of SETTINGS."""
    return raw(FrameType.SETTINGS, 0x1, 0)


def push_promise(stream_id: int, promised: int, fields: Headers) -> bytes:
    """PUSH_PROMISE."""
    return raw(FrameType.PUSH_PROMISE, 0x4, stream_id, struct.pack(">I", promised) + block(fields))


def ping(payload: bytes = bytes(8), *, ack: bool = False) -> bytes:
    """PING."""
    return raw(FrameType.PING, 0x1 if ack else 0, 0, payload)


def goaway(last_stream_id: int = 0, code: int = ErrorCode.NO_ERROR, debug: bytes = b"") -> bytes:
    """GOAWAY."""
    return raw(FrameType.GOAWAY, 0, 0, struct.pack(">II", last_stream_id, code) + debug)


def window_update(stream_id: int, increment: int) -> bytes:
    """WINDOW_UPDATE."""
    return raw(FrameType.WINDOW_UPDATE, 0, stream_id, struct.pack(">I", increment))


def unknown(stream_id: int = 0, payload: bytes = b"", kind: int = 0xFE, flags: int = 0) -> bytes:
    """A frame of a type that HTTP/2 does not know."""
    return raw(kind, flags, stream_id, payload)


def split(wire: bytes) -> list[tuple[int, int, int, bytes]]:
    """Frames in `wire`, each as type, flags, stream and payload; a client's preface is left out.

    Raises:
        ValueError: `wire` ends within a frame.
    """
    position = len(PREFACE) if wire.startswith(PREFACE) else 0
    out = []
    while position < len(wire):
        if len(wire) - position < 9:
            raise ValueError(f"{len(wire) - position} bytes after the last frame")
        word, flags, stream_id = struct.unpack_from(">IBI", wire, position)
        payload = wire[position + 9 : position + 9 + (word >> 8)]
        if len(payload) != word >> 8:
            raise ValueError(f"a frame of {word >> 8} bytes has {len(payload)}")
        out.append((word & 0xFF, flags, stream_id, payload))
        position += 9 + len(payload)
    return out
