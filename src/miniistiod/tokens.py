"""Tokens by which a host without a certificate shows who it is. Pure.

One-time: `once.<id>.<secret>`, wrapped for people by `ztunnel.wire.token`. The state keeps only the secret's SHA-256.
Reusable: a JWT signed with HMAC-SHA256 by a key of the state, which a stock ztunnel presents from its token file on
both of its channels. It counts only while the state lists its id as not revoked: a copy of the key is not enough.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import secrets
from typing import Any

import attrs

from hbone.errors import HboneError
from ztunnel.wire.token import SECRET_PREFIX

__all__ = [
    "BadToken",
    "ReusableToken",
    "is_ours",
    "new_id",
    "new_secret",
    "secret_hash",
    "sign_reusable",
    "split_secret",
    "verify_reusable",
]

AUDIENCE = "istio-ca"
MAX_LENGTH = 4096
_HEADER = {"alg": "HS256", "typ": "JWT"}


class BadToken(HboneError):
    """A token that proves nothing; the message is for the log and never repeats it."""


def new_id() -> str:
    """An id to list and revoke a token by; not secret."""
    return secrets.token_hex(6)


def new_secret(token_id: str) -> str:
    """The secret of a one-time token: 256 random bits."""
    return f"{SECRET_PREFIX}{token_id}.{_encode(secrets.token_bytes(32))}"


def split_secret(secret: str) -> str | None:
    """The id that a one-time secret names; None when it is no one-time secret."""
    if not secret.startswith(SECRET_PREFIX) or len(secret) > MAX_LENGTH:
        return None
    token_id, dot, rest = secret.removeprefix(SECRET_PREFIX).partition(".")
    return token_id if dot and rest and token_id else None


def secret_hash(secret: str) -> str:
    """What the state keeps of a secret. It has 256 random bits, so a plain hash is enough."""
    return hashlib.sha256(secret.encode()).hexdigest()


@attrs.frozen(kw_only=True)
class ReusableToken:
    """What a reusable token says."""

    id: str
    trust_domain: str
    namespace: str
    service_account: str
    issued: int
    """Seconds since 1970."""
    expires: int


def sign_reusable(token: ReusableToken, key: bytes) -> str:
    """The text of a reusable token."""
    claims = {
        "iss": f"miniistiod:{token.trust_domain}",
        "aud": [AUDIENCE],
        "sub": f"system:serviceaccount:{token.namespace}:{token.service_account}",
        "iat": token.issued,
        "exp": token.expires,
        "jti": token.id,
    }
    body = f"{_segment(_HEADER)}.{_segment(claims)}"
    return f"{body}.{_signature(body, key)}"


def is_ours(text: str) -> bool:
    """Whether a text has the form of a reusable token; nothing is verified."""
    return text.partition(".")[0] == _segment(_HEADER)


def verify_reusable(text: str, key: bytes, trust_domain: str, now: float) -> ReusableToken:
    """Check signature, issuer, audience and time, in that order; nothing is parsed before the signature holds.

    Raises:
        BadToken: why not.
    """
    if len(text) > MAX_LENGTH:
        raise BadToken(f"a token of {len(text)} characters, over {MAX_LENGTH}")
    body, dot, signature = text.rpartition(".")
    header, _, _ = body.partition(".")
    # One algorithm, in one spelling: what the token says of itself is never followed.
    if not dot or not text.isascii() or header != _segment(_HEADER):
        raise BadToken("not a token of this control plane")
    if not hmac.compare_digest(signature, _signature(body, key)):
        raise BadToken("a token whose signature is not ours")
    try:
        claims: Any = json.loads(_decode(body.partition(".")[2]))
        prefix, kind, namespace, account = claims["sub"].split(":")
        token = ReusableToken(
            id=claims["jti"],
            trust_domain=trust_domain,
            namespace=namespace,
            service_account=account,
            issued=int(claims["iat"]),
            expires=int(claims["exp"]),
        )
        correct = (prefix, kind) == ("system", "serviceaccount") and claims["aud"] == [AUDIENCE]
        issuer = claims["iss"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadToken("a token of ours that cannot be read") from None
    if not correct or issuer != f"miniistiod:{trust_domain}":
        raise BadToken("a token for another purpose or trust domain")
    if now >= token.expires:
        raise BadToken(f"the token {token.id} has expired")
    return token


def _signature(body: str, key: bytes) -> str:
    return _encode(hmac.digest(key, body.encode("ascii"), "sha256"))


def _segment(value: object) -> str:
    return _encode(json.dumps(value, separators=(",", ":")).encode())


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error:
        raise BadToken("a token that is not base64") from None
