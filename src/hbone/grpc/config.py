"""Limits and times of a gRPC connection."""

from __future__ import annotations

import attrs

from hbone.config import KIB, MIB, between

__all__ = ["GrpcConfig"]


@attrs.frozen(kw_only=True)
class GrpcConfig:
    """Limits and times of a gRPC connection. The defaults are those of Istio's control plane."""

    max_message_size: int = attrs.field(default=4 * MIB, validator=between(1, 2**32 - 1))
    """Largest message that is received where a call names no other limit, in bytes."""
    max_concurrent_streams: int = attrs.field(default=100, validator=between(1, 2**31 - 1))
    """Calls that a server lets one client have open."""
    max_connection_window: int = attrs.field(default=16 * MIB, validator=between(65_535, 2**31 - 1))
    """Receive window of the connection, in bytes."""
    max_stream_window: int = attrs.field(default=4 * MIB, validator=between(65_535, 2**31 - 1))
    """Receive window of a call while a large message is waited for, in bytes; else it is 65,535."""
    max_header_list_size: int = attrs.field(default=16 * KIB, validator=between(1024, 2**20))
    """Headers of a call, in bytes by RFC 9113 §10.5.1; also the limit of the encoded block."""
    keepalive_interval: float = attrs.field(default=30.0, validator=between(0.0, 86_400.0))
    """Seconds of silence until a PING; 0 sends none. A client sends them only while a call is open."""
    keepalive_timeout: float = attrs.field(default=10.0, validator=between(0.1, 3600.0))
    """Seconds until an unanswered PING ends the connection."""
    preface_timeout: float = attrs.field(default=5.0, validator=between(0.1, 3600.0))
    """Seconds from the handshake to the peer's first SETTINGS; also for an open header block."""
    settings_timeout: float = attrs.field(default=10.0, validator=between(0.1, 3600.0))
    """Seconds until our SETTINGS must be acknowledged."""
    drain_grace: float = attrs.field(default=10.0, validator=between(0.0, 86_400.0))
    """Seconds that open calls have once the connection drains; then they end with UNAVAILABLE."""
    handshake_timeout: float = attrs.field(default=10.0, validator=between(0.1, 3600.0))
    """Seconds for the TLS handshake."""
    stall_timeout: float = attrs.field(default=300.0, validator=between(0.1, 86_400.0))
    """Seconds for which a peer may take nothing of a message that we send."""
    max_connection_age: float = attrs.field(default=1800.0, validator=between(0.1, 1e9))
    """Seconds until a server drains a connection, give or take a tenth, so that clients spread again."""
