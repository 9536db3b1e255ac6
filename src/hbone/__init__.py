"""HBONE: many TCP connections in one mutual-TLS HTTP/2 connection between two SPIFFE identities.

The names here need no event loop. `hbone.trio` and `hbone.asyncio` bring one, and are imported by that name;
`hbone.engine`, `hbone.tls` and `hbone.endpoint` are the parts without I/O for a loop of your own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hbone.lazy import names_at_first_use

if TYPE_CHECKING:
    from hbone.admission import Admission
    from hbone.config import ConnectionConfig
    from hbone.connect import Authority, BadConnect, Baggage, ConnectRequest
    from hbone.endpoint import Endpoint
    from hbone.engine import Engine
    from hbone.engine.flow import WindowBudget
    from hbone.errors import (
        ConfigurationError,
        ConnectionLost,
        ConnectRejected,
        ErrorCode,
        HboneError,
        IdentityError,
        LocalProtocolError,
        PeerIdentityError,
        PeerRevokedError,
        ProtocolError,
        RemoteProtocolError,
        StreamResetError,
        TlsError,
    )
    from hbone.identity import (
        Authorizer,
        FileSource,
        Identity,
        IdentitySource,
        RevocationLists,
        RevocationSource,
        SpiffeId,
        StaticSource,
        TrustBundle,
        TrustBundles,
        TrustDomain,
        X509Svid,
        allow,
        any_peer,
        same_trust_domain,
    )
    from hbone.pool import Pool, PoolKey
    from hbone.tls import IoBuffer, TlsConnection, TlsContext

_HOMES = {
    "admission": ("Admission",),
    "config": ("ConnectionConfig",),
    "connect": ("Authority", "BadConnect", "Baggage", "ConnectRequest"),
    "endpoint": ("Endpoint",),
    "engine": ("Engine",),
    "engine.flow": ("WindowBudget",),
    "errors": (
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
    ),
    "identity": (
        "Authorizer",
        "FileSource",
        "Identity",
        "IdentitySource",
        "RevocationLists",
        "RevocationSource",
        "SpiffeId",
        "StaticSource",
        "TrustBundle",
        "TrustBundles",
        "TrustDomain",
        "X509Svid",
        "allow",
        "any_peer",
        "same_trust_domain",
    ),
    "pool": ("Pool", "PoolKey"),
    "tls": ("IoBuffer", "TlsConnection", "TlsContext"),
}
_HOME = {name: f"hbone.{module}" for module, names in _HOMES.items() for name in names}

__all__ = [
    "Admission",
    "Authority",
    "Authorizer",
    "BadConnect",
    "Baggage",
    "ConfigurationError",
    "ConnectRejected",
    "ConnectRequest",
    "ConnectionConfig",
    "ConnectionLost",
    "Endpoint",
    "Engine",
    "ErrorCode",
    "FileSource",
    "HboneError",
    "Identity",
    "IdentityError",
    "IdentitySource",
    "IoBuffer",
    "LocalProtocolError",
    "PeerIdentityError",
    "PeerRevokedError",
    "Pool",
    "PoolKey",
    "ProtocolError",
    "RemoteProtocolError",
    "RevocationLists",
    "RevocationSource",
    "SpiffeId",
    "StaticSource",
    "StreamResetError",
    "TlsConnection",
    "TlsContext",
    "TlsError",
    "TrustBundle",
    "TrustBundles",
    "TrustDomain",
    "WindowBudget",
    "X509Svid",
    "allow",
    "any_peer",
    "same_trust_domain",
]


__getattr__ = names_at_first_use(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
