"""An issuer of tokens for tests, and a server of its keys."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from typing import TYPE_CHECKING, Any

from joserfc import jwt
from joserfc.jwk import ECKey, KeySet, OKPKey, RSAKey

from miniistiod.issuers import _REGISTRY

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator

ISSUER = "https://idp.example.com"
NOW = 1_900_000_000.0


class Signer:
    """Keys of an issuer."""

    def __init__(self, *keys: Any) -> None:
        self.keys = list(keys or [ECKey.generate_key("P-256", {"kid": "one"})])

    def jwks(self) -> str:
        return json.dumps(KeySet(self.keys).as_dict(private=False))

    def token(self, key: Any = None, *, header: dict[str, Any] | None = None, now: float = NOW, **claims: Any) -> str:
        key = key or self.keys[0]
        algorithm = {"RSA": "RS256", "EC": "ES256", "OKP": "EdDSA"}[key.key_type]
        fields = {"alg": algorithm, **({"kid": key.kid} if key.kid else {}), **(header or {})}
        body = {
            "iss": ISSUER,
            "aud": ["istio-ca"],
            "sub": "system:serviceaccount:shop:orders",
            "iat": int(now) - 10,
            "exp": int(now) + 600,
            **claims,
        }
        kept = {name: value for name, value in body.items() if value is not None}
        return jwt.encode(fields, kept, key, algorithms=[fields["alg"]], registry=_REGISTRY)


def rsa(kid: str | None = None) -> RSAKey:
    return RSAKey.generate_key(2048, {} if kid is None else {"kid": kid})


def ed25519(kid: str | None = None) -> OKPKey:
    return OKPKey.generate_key("Ed25519", {} if kid is None else {"kid": kid})


class Server:
    """Answers with `body`, or what a path has of its own, and counts."""

    def __init__(self, body: str) -> None:
        self.body = body
        self.pages: dict[str, str] = {}
        self.asked: list[str] = []
        self.status = 200
        self.calls = 0
        self.url = ""


@contextlib.contextmanager
def serving(body: str, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    """A server of keys on the loopback address."""
    state = Server(body)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.calls += 1
            state.asked.append(self.path)
            content = state.pages.get(self.path, state.body).encode()
            self.send_response(state.status)
            if state.status == 302:
                self.send_header("location", state.url + "elsewhere")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the parent's name
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{server.server_address[1]}/"
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
