"""What the peer did. Built once, by the layer that parsed it; bytes of a stream go to its sink, not through events.

They have no slots: they do not live long, and to make one that is frozen takes half as long without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from hbone.errors import ErrorCode

__all__ = [
    "ConnectAccepted",
    "ConnectReceived",
    "ConnectRefused",
    "Event",
    "HandshakeCompleted",
    "Headers",
    "PeerDraining",
    "PingAcknowledged",
    "SendCapacityIncreased",
    "SettingsReceived",
    "StreamEnded",
    "StreamReset",
    "TransportEnded",
]

Headers = tuple[tuple[bytes, bytes], ...]
"""Header fields in order, names in lower case, pseudo-headers first."""


@attrs.frozen(kw_only=True, slots=False)
class Event:
    """Something the peer did."""


@attrs.frozen(kw_only=True, slots=False)
class HandshakeCompleted(Event):
    """TLS is up, the peer's identity verified and authorized; HTTP/2 has begun."""


@attrs.frozen(kw_only=True, slots=False)
class SettingsReceived(Event):
    """The peer's first SETTINGS frame arrived; its limits are known now. Source: RFC 9113 §6.5."""


@attrs.frozen(kw_only=True, slots=False)
class ConnectReceived(Event):
    """Server: a CONNECT request opened `stream_id`. Answer with `accept` or `reject`."""

    stream_id: int
    headers: Headers
    ended: bool = False
    """The request carried END_STREAM: the client sends no byte."""


@attrs.frozen(kw_only=True, slots=False)
class ConnectAccepted(Event):
    """Client: the answer to CONNECT was 200."""

    stream_id: int
    headers: Headers


@attrs.frozen(kw_only=True, slots=False)
class ConnectRefused(Event):
    """Client: the answer to CONNECT was another status; the stream is closed."""

    stream_id: int
    status: int
    headers: Headers = ()


@attrs.frozen(kw_only=True, slots=False)
class StreamEnded(Event):
    """END_STREAM: the peer sends no more on this stream; our direction goes on. Source: RFC 9113 §8.5."""

    stream_id: int


@attrs.frozen(kw_only=True, slots=False)
class StreamReset(Event):
    """The stream ended abruptly. Source: RFC 9113 §6.4."""

    stream_id: int
    code: ErrorCode
    by_peer: bool = True
    """False when we reset it for a fault of the peer's."""
    processed: bool = True
    """False when the peer says it never acted on the request (REFUSED_STREAM, or above GOAWAY's last
    stream): it may be retried on another connection. Source: RFC 9113 §8.7."""


@attrs.frozen(kw_only=True, slots=False)
class SendCapacityIncreased(Event):
    """A stream that was told to wait may send again; `stream_id` 0: any stream may, ask each."""

    stream_id: int


@attrs.frozen(kw_only=True, slots=False)
class PeerDraining(Event):
    """GOAWAY: open no further stream here; streams up to `last_stream_id` go on. Source: RFC 9113 §6.8."""

    last_stream_id: int
    code: ErrorCode
    debug: bytes = b""


@attrs.frozen(kw_only=True, slots=False)
class PingAcknowledged(Event):
    """The peer answered our keepalive or liveness PING."""

    rtt: float
    """Seconds since it was sent."""


@attrs.frozen(kw_only=True, slots=False)
class TransportEnded(Event):
    """The connection is over: the peer closed it, it stopped answering, or its drain is complete."""

    reason: str
    clean: bool
    """True for close_notify or the end of a drain, with no stream cut."""
