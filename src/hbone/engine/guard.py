"""Floods: each kind of frame that costs us more than it costs its sender has a bucket.

A bucket holds `burst` tokens and gains `rate` of them a second, up to `burst`. A frame takes one; a frame that finds
none ends the connection with ENHANCE_YOUR_CALM. Payload takes none: windows bound it, and a tunnel of one-byte
frames is somebody typing.

Source: RFC 9113 §10.5.
"""

from __future__ import annotations

import enum
from typing import Final

from hbone.enums import plain_members
from hbone.errors import ErrorCode, RemoteProtocolError

__all__ = ["MAX_CONTINUATIONS", "MAX_GOAWAY_SIZE", "MAX_REPLIES", "MAX_REPLY_BYTES", "MAX_SETTINGS", "Flood", "Guard"]

MAX_CONTINUATIONS: Final = 4
"""CONTINUATION frames of one header block."""
MAX_SETTINGS: Final = 32
"""Entries of one SETTINGS frame."""
MAX_GOAWAY_SIZE: Final = 4096
"""Bytes of one GOAWAY frame, of which all but eight are for people to read."""
MAX_REPLIES: Final = 1000
"""Frames that the peer made us queue and has not read."""
MAX_REPLY_BYTES: Final = 64 * 1024
"""Bytes of them."""
_UPDATES_PER_FRAME: Final = 10
_BYTES_PER_EMPTY: Final = 64


@plain_members
class Flood(enum.Enum):
    """What is counted: burst, tokens a second, and the words for it."""

    RESET = (100.0, 20.0, "reset streams")
    """RST_STREAM on a stream that we had not answered. Source: CVE-2023-44487."""
    ABANDONED = (1000.0, 20.0, "streams reset before they carried anything")
    """RST_STREAM on one that we had answered: the dial was made. No faster to fill up again than RESET, so that a peer
    that waits for each answer ends too; what checks whether ports are open needs less."""
    FAULT = (16.0, 0.2, "stream errors")
    """Streams that we had to reset for what the peer did. Source: CVE-2025-8671."""
    REFUSAL = (100.0, 10.0, "streams beyond the limit")
    SETTINGS = (10.0, 1.0, "SETTINGS frames")
    PING = (100.0, 10.0, "PING frames")
    GOAWAY = (10.0, 1.0, "GOAWAY frames")
    IGNORED = (100.0, 10.0, "PRIORITY or unknown frames")
    STRAY = (1000.0, 1000.0, "frames for closed streams")
    UPDATE = (1000.0, 1000.0, "WINDOW_UPDATE frames without need")
    EMPTY = (100.0, 10.0, "empty or padded DATA frames")


class _Bucket:
    __slots__ = ("at", "burst", "rate", "tokens", "words")

    def __init__(self, burst: float, rate: float, words: str) -> None:
        self.burst = burst
        self.rate = rate
        self.words = words
        self.tokens = burst
        self.at = 0.0


class Guard:
    """The buckets of one connection. They are made when first used: most connections need two or three."""

    __slots__ = ("_buckets", "_data_seen", "_updates_earned")

    def __init__(self) -> None:
        self._buckets: dict[Flood, _Bucket] = {}
        self._updates_earned = 0
        self._data_seen = 0

    def count(self, flood: Flood, now: float) -> None:
        """Take a token.

        Raises:
            RemoteProtocolError: there is none; ENHANCE_YOUR_CALM.
        """
        bucket = self._buckets.get(flood)
        if bucket is None:
            bucket = self._buckets[flood] = _Bucket(*flood.value)
            bucket.at = now
        if now > bucket.at:
            bucket.tokens = min(bucket.burst, bucket.tokens + (now - bucket.at) * bucket.rate)
            bucket.at = now
        bucket.tokens -= 1
        if bucket.tokens < 0:
            raise RemoteProtocolError(
                f"more than {bucket.burst:g} {bucket.words} at once and {bucket.rate:g} a second after that",
                ErrorCode.ENHANCE_YOUR_CALM,
            )

    def trim(self, now: float) -> None:
        """Forget the buckets that are full again, as new ones are."""
        for flood, bucket in list(self._buckets.items()):
            if bucket.tokens + (now - bucket.at) * bucket.rate >= bucket.burst:
                del self._buckets[flood]
        if not self._buckets:
            self._buckets = {}  # an emptied one keeps its room

    def count_update(self, now: float, sent_frames: int) -> None:
        """Count a WINDOW_UPDATE; ten come free with each of the DATA frames that we sent in all.

        Args:
            now: Seconds.
            sent_frames: Those, in units of 64 KiB where frames are larger.

        Raises:
            RemoteProtocolError: too many; ENHANCE_YOUR_CALM.
        """
        if self._updates_earned < sent_frames * _UPDATES_PER_FRAME:
            self._updates_earned += 1
        else:
            self.count(Flood.UPDATE, now)

    def count_empty(self, now: float, received: int) -> None:
        """Count a DATA frame that is empty or mostly padding; one comes free with each 64 bytes of `received` payload.

        Raises:
            RemoteProtocolError: too many; ENHANCE_YOUR_CALM.
        """
        if received - self._data_seen >= _BYTES_PER_EMPTY:
            self._data_seen = max(self._data_seen + _BYTES_PER_EMPTY, received - _BYTES_PER_EMPTY * 1000)
        else:
            self.count(Flood.EMPTY, now)
