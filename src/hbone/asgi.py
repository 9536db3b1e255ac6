"""An ASGI application behind HBONE: each CONNECT stream carries HTTP/1.1, and the application knows who called.

```python
await hbone.trio.serve(hbone.asgi.handler(app), svid, authorize=hbone.same_trust_domain)
```

`scope["extensions"]["spiffe"]` says who called and as whom we were called; `scope["extensions"]["tls"]` is that of the
ASGI TLS extension. Needs the extra `asgi`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.serialization import Encoding

from hbone.daemon.http import HttpLimits, serve_stream

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hbone.daemon.http import App, Receive, Scope, Send
    from hbone.trio import HboneStream

__all__ = ["handler", "tls_extension"]

_TLS_1_3 = 0x0304
_CIPHER_SUITES = {
    "TLS_AES_128_GCM_SHA256": 0x1301,
    "TLS_AES_256_GCM_SHA384": 0x1302,
    "TLS_CHACHA20_POLY1305_SHA256": 0x1303,
}


def handler(app: App, *, limits: HttpLimits | None = None) -> Callable[[HboneStream], Awaitable[None]]:
    """A handler for `hbone.trio.serve` that gives each stream to `app`.

    HTTP/2 in cleartext and protocol upgrades are refused before the application sees them; so is CONNECT.

    Args:
        app: an ASGI application; it gets `http` scopes, no lifespan and no websocket.
        limits: what one stream may cost; by default one request takes at most a minute and a body 1 MiB.
    """
    chosen = limits or HttpLimits()

    async def serve(stream: HboneStream) -> None:
        tls = tls_extension(stream)
        spiffe = {
            "peer": str(stream.peer),
            "trust_domain": stream.peer.trust_domain,
            "namespace": stream.peer.namespace,
            "service_account": stream.peer.service_account,
        }

        async def with_identity(scope: Scope, receive: Receive, send: Send) -> None:
            scope["extensions"] = {**scope.get("extensions", {}), "tls": tls, "spiffe": spiffe}
            scope["hbone"] = {"authority": str(stream.request.authority)}
            await app(scope, receive, send)

        await serve_stream(with_identity, stream, limits=chosen)

    return serve


def tls_extension(stream: HboneStream) -> dict[str, Any]:
    """The `tls` extension of an ASGI scope. Source: ASGI TLS Extension 0.2."""
    tls = stream.session.endpoint.tls
    chain = [certificate.public_bytes(Encoding.PEM).decode() for certificate in tls.peer_chain]
    return {
        "server_cert": None,
        "client_cert_chain": chain,
        "client_cert_name": tls.peer_chain[0].subject.rfc4514_string() if tls.peer_chain else None,
        "client_cert_error": None,
        "tls_version": _TLS_1_3,
        "cipher_suite": _CIPHER_SUITES.get(tls.cipher or ""),
    }
