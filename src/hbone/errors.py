"""Errors of the library, and the error codes of HTTP/2.

```text
HboneError
├── ProtocolError(code)
│   ├── LocalProtocolError    we were asked for something the protocol forbids; nothing was sent
│   └── RemoteProtocolError   the peer broke the protocol; GOAWAY is queued, the connection is over
├── TlsError                  the handshake failed, or a record could not be read
│   └── PeerIdentityError     the peer's certificate is not one that we accept
│       └── PeerRevokedError  its CA took it back
├── IdentityError             a SPIFFE ID, SVID or trust bundle of ours is unusable
├── ConnectionLost            the transport went away
├── StreamResetError(code)    the peer ended one stream abruptly
├── ConnectRejected(status)   the peer answered CONNECT with another status than 200
└── ConfigurationError        a value given to us is out of range; names the field and the limit
```
"""

from __future__ import annotations

import enum

from hbone.enums import plain_members

__all__ = [
    "ConfigurationError",
    "ConnectRejected",
    "ConnectionLost",
    "ErrorCode",
    "HboneError",
    "IdentityError",
    "LocalProtocolError",
    "PeerIdentityError",
    "PeerRevokedError",
    "ProtocolError",
    "RemoteProtocolError",
    "StreamResetError",
    "TlsError",
]


@plain_members
class ErrorCode(enum.IntEnum):
    """Why a stream or a connection ended. Source: RFC 9113 §7."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    CONNECT_ERROR = 0xA
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC
    HTTP_1_1_REQUIRED = 0xD

    @classmethod
    def from_wire(cls, code: int) -> ErrorCode:
        """The code as received; an unknown one counts as INTERNAL_ERROR. Source: RFC 9113 §7."""
        try:
            return cls(code)
        except ValueError:
            return cls.INTERNAL_ERROR


class HboneError(Exception):
    """Root of every error that this library raises on purpose."""


class ProtocolError(HboneError):
    """HTTP/2 was broken by one of the two ends."""

    def __init__(self, message: str, code: ErrorCode = ErrorCode.PROTOCOL_ERROR) -> None:
        super().__init__(message)
        self.code = code


class LocalProtocolError(ProtocolError):
    """The caller asked for what the protocol does not allow now. Nothing was sent; the connection is as it was."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol. GOAWAY with `code` is queued; send it, then close."""


class TlsError(HboneError):
    """TLS could not be set up, or a record could not be read. An alert may be queued; send it, then close."""


class PeerIdentityError(TlsError):
    """The peer's certificate chain, SPIFFE ID or ALPN is not one that we accept."""


class PeerRevokedError(PeerIdentityError):
    """A certificate of the peer's chain was taken back by its CA."""


class IdentityError(HboneError, ValueError):
    """A SPIFFE ID, certificate, key or trust bundle that does not follow its rules."""


class ConnectionLost(HboneError):
    """The transport under a tunnel ended; the streams on it ended with it."""


class StreamResetError(HboneError):
    """The peer sent RST_STREAM. Source: RFC 9113 §6.4."""

    def __init__(self, code: ErrorCode, message: str = "") -> None:
        super().__init__(message or f"the peer reset the stream: {code.name}")
        self.code = code


class ConnectRejected(HboneError):
    """CONNECT was answered with `status`, which is not 200."""

    def __init__(self, status: int, message: str = "") -> None:
        super().__init__(message or f"CONNECT was rejected with status {status}")
        self.status = status


class ConfigurationError(HboneError, ValueError):
    """A setting is unusable. The message names the setting, its value, the limit and the remedy."""
