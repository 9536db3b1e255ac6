"""Settings of the protocol, each with its unit, default and limits."""

from __future__ import annotations

import re
from typing import Any

import attrs

from hbone.errors import ConfigurationError

__all__ = ["ConnectionConfig", "between", "parse_duration"]

KIB = 1024
MIB = 1024 * 1024

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ns|us|ms|s|m|h|d)")
_LONGEST = 100 * 365 * 86_400.0
_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(text: str) -> float:
    """Seconds of a duration such as `10s`, `250ms`, `1h30m` or `90d`.

    Raises:
        ConfigurationError: another form, a bare number, or more than a hundred years.
    """
    parts = _DURATION.findall(text.strip())
    if not parts or "".join(n + u for n, u in parts) != text.strip():
        raise ConfigurationError(f"{text!r} is not a duration; write a number and a unit, for example 10s, 5m or 1h30m")
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    if seconds > _LONGEST:
        raise ConfigurationError(f"{text[:40]!r} is over a hundred years; no duration is that long")
    return seconds


def between(low: float, high: float) -> Any:  # attrs' validator type is a protocol over Any
    """An attrs validator: `low <= value <= high`, with the field's name in the error."""

    def check(_: object, attribute: attrs.Attribute[Any], value: float) -> None:
        if not low <= value <= high:
            raise ConfigurationError(f"{attribute.name} is {value}; it must be from {low} to {high}")

    return check


@attrs.frozen(kw_only=True)
class ConnectionConfig:
    """HTTP/2 parameters of a tunnel. The defaults are ztunnel's; see its environment variables of the same meaning."""

    stream_window: int = attrs.field(default=4 * MIB, validator=between(65_535, 2**31 - 1))
    """Largest receive window of one stream, in bytes."""
    initial_stream_window: int = attrs.field(default=256 * KIB, validator=between(65_535, 2**31 - 1))
    """Receive window that a stream starts with, in bytes; it grows to `stream_window` while its reader keeps up."""
    connection_window: int = attrs.field(default=16 * MIB, validator=between(65_535, 2**31 - 1))
    """Receive window of the connection, in bytes."""
    max_frame_size: int = attrs.field(default=MIB, validator=between(16_384, 2**24 - 1))
    """Largest frame that we accept, in bytes."""
    max_send_frame: int = attrs.field(default=64 * KIB, validator=between(16_384, 2**24 - 1))
    """Largest DATA frame that we send, in bytes, where the peer allows as much; keeps streams fair to each other."""
    max_concurrent_streams: int = attrs.field(default=200, validator=between(1, 2**31 - 1))
    """Streams that a server lets one peer have open."""
    max_header_list_size: int = attrs.field(default=16 * KIB, validator=between(1024, 2**20))
    """Header list that we accept, in bytes by RFC 9113 §10.5.1; also the limit of its encoded block."""
    max_header_fields: int = attrs.field(default=64, validator=between(8, 1024))
    """Fields of one header list."""
    keepalive_interval: float = attrs.field(default=10.0, validator=between(0.0, 86_400.0))
    """Seconds from the last PING's answer to the next PING; 0 sends none."""
    keepalive_timeout: float = attrs.field(default=20.0, validator=between(0.1, 86_400.0))
    """Seconds until an unanswered PING ends the connection."""
    preface_timeout: float = attrs.field(default=5.0, validator=between(0.1, 3600.0))
    """Seconds from the end of the handshake to the peer's preface and first SETTINGS; also for an open header block."""
    settings_timeout: float = attrs.field(default=10.0, validator=between(0.1, 3600.0))
    """Seconds until our SETTINGS must be acknowledged."""
    handshake_timeout: float = attrs.field(default=10.0, validator=between(0.1, 3600.0))
    """Seconds from the first byte to the end of the TLS handshake."""

    def __attrs_post_init__(self) -> None:
        if self.initial_stream_window > self.stream_window:
            object.__setattr__(self, "initial_stream_window", self.stream_window)
        if self.connection_window < self.initial_stream_window:
            raise ConfigurationError(
                f"connection_window is {self.connection_window}; it must be at least the initial stream window,"
                f" {self.initial_stream_window}, or one unread stream stalls all"
            )
