"""What stands between the wire and hyper-h2: every frame is looked at before anything is kept.

hyper-h2 keeps what it is sent: an oversized frame until it is complete, unknown settings for ever, 64 CONTINUATION
frames. Here a frame's length is judged on its ninth byte, floods are counted by the same buckets as on tunnels, and
PRIORITY, unknown frames and unknown settings are dropped. What passes is handed on in one piece.

Source: RFC 9113 §4, §6, §10.5.
"""

from __future__ import annotations

from typing import Final

from hbone.engine.frames import ACK, END_HEADERS, END_STREAM, HEADER, HEADER_SIZE, PADDED, PREFACE, FrameType, Setting
from hbone.engine.guard import MAX_CONTINUATIONS, MAX_GOAWAY_SIZE, MAX_SETTINGS, Flood, Guard
from hbone.errors import ErrorCode, RemoteProtocolError

__all__ = ["FrameGuard"]

_KNOWN_SETTINGS: Final = frozenset(
    {
        Setting.HEADER_TABLE_SIZE,
        Setting.ENABLE_PUSH,
        Setting.MAX_CONCURRENT_STREAMS,
        Setting.INITIAL_WINDOW_SIZE,
        Setting.MAX_FRAME_SIZE,
        Setting.MAX_HEADER_LIST_SIZE,
    }
)
_MAX_TABLE: Final = 4096
_FIXED: Final = {FrameType.RST_STREAM: 4, FrameType.PING: 8, FrameType.WINDOW_UPDATE: 4}
_ON_CONNECTION: Final = frozenset({FrameType.SETTINGS, FrameType.PING, FrameType.GOAWAY})


class FrameGuard:
    """Scans one direction of one connection.

    Args:
        server: the bytes are a client's, so the preface comes first.
        max_frame_size: bytes of payload that we announced.
        max_header_block: bytes of one encoded header block, in HEADERS and CONTINUATION together.
    """

    def __init__(self, *, server: bool, max_frame_size: int, max_header_block: int) -> None:
        self.floods = Guard()
        self.sent_frames = 0
        """DATA frames that we sent, in units of 64 KiB where more is in one; each earns WINDOW_UPDATEs."""
        self._preface = PREFACE if server else b""
        self._max_frame_size = max_frame_size
        self._max_header_block = max_header_block
        self._head = bytearray()
        self._left = 0
        self._dropping = False
        self._settings: bytearray | None = None
        self._settings_flags = 0
        self._block_stream = 0
        self._block_size = 0
        self._block_frames = 0
        self._data_received = 0
        self._settled = False

    @property
    def in_header_block(self) -> bool:
        """A header block has begun and its END_HEADERS is missing."""
        return self._block_stream != 0

    def scan(self, data: memoryview, now: float) -> bytes | bytearray | memoryview:
        """What of `data` hyper-h2 may see.

        Raises:
            RemoteProtocolError: a frame that is too long or out of place, or a flood.
        """
        out = bytearray()
        position, end = 0, len(data)
        if self._preface:
            taken = min(len(self._preface), end)
            if self._preface[:taken] != data[:taken]:
                raise RemoteProtocolError("the client does not begin with HTTP/2's preface")
            out += data[:taken]
            self._preface = self._preface[taken:]
            position = taken
        while position < end:
            if self._left:
                taken = min(self._left, end - position)
                self._take(data[position : position + taken], out)
                self._left -= taken
                position += taken
                if not self._left:
                    self._finish(out)
                continue
            missing = HEADER_SIZE - len(self._head)
            self._head += data[position : position + missing]
            position += min(missing, end - position)
            if len(self._head) == HEADER_SIZE:
                self._begin(now, out)
                self._head.clear()
        return out

    def _take(self, payload: memoryview, out: bytearray) -> None:
        if self._settings is not None:
            self._settings += payload
        elif not self._dropping:
            out += payload

    def _finish(self, out: bytearray) -> None:
        self._dropping = False
        if self._settings is not None:
            kept = _clean_settings(self._settings)
            out += HEADER.pack(len(kept) << 8 | FrameType.SETTINGS, self._settings_flags, 0)
            out += kept
            self._settings = None

    def _begin(self, now: float, out: bytearray) -> None:
        word, flags, stream_id = HEADER.unpack(self._head)
        length, kind, stream_id = word >> 8, word & 0xFF, stream_id & 0x7FFF_FFFF
        if length > self._max_frame_size:
            raise RemoteProtocolError(
                f"a frame of {length} bytes on stream {stream_id}; the limit is {self._max_frame_size}",
                ErrorCode.FRAME_SIZE_ERROR,
            )
        if not self._settled:
            if kind != FrameType.SETTINGS or flags & ACK:
                raise RemoteProtocolError("the first frame is not SETTINGS")
            self._settled = True
        if self._block_stream and (kind != FrameType.CONTINUATION or stream_id != self._block_stream):
            raise RemoteProtocolError(f"a frame within the header block of stream {self._block_stream}")
        if kind in _FIXED and length != _FIXED[FrameType(kind)]:
            raise RemoteProtocolError(
                f"a {FrameType(kind).name} frame of {length} bytes; it has {_FIXED[FrameType(kind)]}",
                ErrorCode.FRAME_SIZE_ERROR,
            )
        if (kind in _ON_CONNECTION) != (stream_id == 0) and kind <= 9 and kind != FrameType.WINDOW_UPDATE:
            raise RemoteProtocolError(f"a {FrameType(kind).name} frame on stream {stream_id}")
        self._count(kind, flags, stream_id, length, now)
        self._left = length
        if kind == FrameType.SETTINGS and length:
            self._settings = bytearray()
            self._settings_flags = flags
        elif not self._dropping:
            out += self._head
        if not length:
            self._dropping = False

    def _count(self, kind: int, flags: int, stream_id: int, length: int, now: float) -> None:
        floods = self.floods
        if kind == FrameType.DATA:
            if flags & PADDED or (not length and not flags & END_STREAM):
                floods.count_empty(now, self._data_received)
            # How much of a padded frame is padding, its tenth byte will tell: up to 255, and that byte.
            self._data_received += max(0, length - 256) if flags & PADDED else length
        elif kind == FrameType.HEADERS:
            self._block_frames = 0
            self._block_size = 0
            self._count_block(flags, stream_id, length)
        elif kind == FrameType.CONTINUATION:
            if not self._block_stream:
                raise RemoteProtocolError(f"a CONTINUATION frame without a header block on stream {stream_id}")
            self._block_frames += 1
            if self._block_frames > MAX_CONTINUATIONS:
                raise RemoteProtocolError(
                    f"the header block of stream {stream_id} has more than {MAX_CONTINUATIONS} CONTINUATION frames",
                    ErrorCode.ENHANCE_YOUR_CALM,
                )
            self._count_block(flags, stream_id, length)
        elif kind == FrameType.WINDOW_UPDATE:
            floods.count_update(now, self.sent_frames)
        elif kind == FrameType.SETTINGS:
            if length > MAX_SETTINGS * 6:
                raise RemoteProtocolError(
                    f"a SETTINGS frame with {length // 6} entries; the limit is {MAX_SETTINGS}",
                    ErrorCode.ENHANCE_YOUR_CALM,
                )
            if length % 6 or (flags & ACK and length):
                raise RemoteProtocolError(f"a SETTINGS frame of {length} bytes", ErrorCode.FRAME_SIZE_ERROR)
            floods.count(Flood.SETTINGS, now)
        elif kind == FrameType.PING:
            floods.count(Flood.PING, now)
        elif kind == FrameType.RST_STREAM:
            floods.count(Flood.STRAY, now)  # those that cost us more are counted once it is known
        elif kind == FrameType.GOAWAY:
            if length > MAX_GOAWAY_SIZE:
                raise RemoteProtocolError(
                    f"a GOAWAY frame of {length} bytes; the limit is {MAX_GOAWAY_SIZE}", ErrorCode.ENHANCE_YOUR_CALM
                )
            floods.count(Flood.GOAWAY, now)
        elif kind == FrameType.PUSH_PROMISE:
            raise RemoteProtocolError("a PUSH_PROMISE frame; we never allowed one")
        else:  # PRIORITY and what nobody knows: read over
            floods.count(Flood.IGNORED, now)
            self._dropping = True

    def _count_block(self, flags: int, stream_id: int, length: int) -> None:
        self._block_size += length
        if self._block_size > self._max_header_block:
            raise RemoteProtocolError(
                f"the header block of stream {stream_id} is over {self._max_header_block} bytes",
                ErrorCode.ENHANCE_YOUR_CALM,
            )
        self._block_stream = 0 if flags & END_HEADERS else stream_id


def _clean_settings(payload: bytearray) -> bytearray:
    """The settings that have a meaning here; the header table never over 4096 bytes, whatever the peer allows."""
    kept = bytearray()
    for start in range(0, len(payload), 6):
        code = payload[start] << 8 | payload[start + 1]
        if code == Setting.HEADER_TABLE_SIZE:
            value = min(int.from_bytes(payload[start + 2 : start + 6], "big"), _MAX_TABLE)
            kept += payload[start : start + 2]
            kept += value.to_bytes(4, "big")
        elif code in _KNOWN_SETTINGS:
            kept += payload[start : start + 6]
    return kept
