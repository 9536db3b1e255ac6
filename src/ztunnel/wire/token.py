"""The text form of a one-time enrolment token: what `miniistiod token create` prints and `ztunnel enroll` reads.

```text
enrol1.<base64url of compact JSON>.<first 8 hex digits of the SHA-256 of what is before this dot>
```

The token names the identity that it stands for, so that the host can say what it will become, and the SHA-256 of the
mesh's root, so that the host can check the server's chain before the secret leaves it. Only `secret` is presented, as
`authorization: Bearer <secret>`; the server trusts none of the other fields.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from typing import Any

import attrs

from hbone.errors import ConfigurationError

__all__ = ["MAX_TOKEN_LENGTH", "SECRET_PREFIX", "EnrolmentToken", "TokenError", "parse_enrolment_token"]

MAX_TOKEN_LENGTH = 4096
"""Characters of a token that are looked at."""
SECRET_PREFIX = "once."
"""What the secret of a one-time token begins with."""

_PREFIX = "enrol1."
_SECRET = re.compile(r"once\.[A-Za-z0-9_-]{8,64}\.[A-Za-z0-9_-]{43}")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,253}")
_HASH_SIZE = 32
_AGAIN = "copy the whole line that 'miniistiod token create' printed"


class TokenError(ConfigurationError):
    """A text that is not an enrolment token. The message never repeats the text."""


@attrs.frozen(kw_only=True)
class EnrolmentToken:
    """A one-time token, taken apart."""

    secret: str = attrs.field(repr=False)
    """What is presented as `authorization: Bearer <secret>`, once the server's chain was checked."""
    root_sha256: bytes
    """SHA-256 of the DER of the mesh's root certificate, which 15012 sends as the last of its chain; 32 bytes."""
    trust_domain: str
    namespace: str
    service_account: str
    name: str | None = None
    """Name of the WorkloadEntry that the host will be, when the token is bound to one."""

    @property
    def spiffe_id(self) -> str:
        """The identity that the certificate will have."""
        return f"spiffe://{self.trust_domain}/ns/{self.namespace}/sa/{self.service_account}"

    def __str__(self) -> str:
        fields: dict[str, str] = {
            "td": self.trust_domain,
            "ns": self.namespace,
            "sa": self.service_account,
            "root": _encode(self.root_sha256),
            "secret": self.secret,
        }
        if self.name is not None:
            fields["name"] = self.name
        body = _PREFIX + _encode(json.dumps(fields, separators=(",", ":"), sort_keys=True).encode())
        return f"{body}.{_checksum(body)}"


def parse_enrolment_token(text: str) -> EnrolmentToken:
    """Take a token apart; white space around it is ignored.

    Raises:
        TokenError: not a token, a damaged one, or one with a field that this version does not know.
    """
    text = text.strip()
    if len(text) > MAX_TOKEN_LENGTH:
        raise TokenError(f"the enrolment token is over {MAX_TOKEN_LENGTH} characters long; {_AGAIN}")
    if text.startswith("eyJ"):
        raise TokenError(
            "this is a reusable token, which a ztunnel presents from its AUTH_TOKEN file; for enrolment make a one-time"
            " token: miniistiod token create without --reusable"
        )
    if not text.startswith(_PREFIX):
        raise TokenError(f"the enrolment token does not begin with {_PREFIX!r}; {_AGAIN}")
    body, dot, checksum = text.rpartition(".")
    if not dot or len(body) < len(_PREFIX) or checksum != _checksum(body):
        raise TokenError(f"the enrolment token is damaged or cut short; {_AGAIN}")
    fields = _fields(body[len(_PREFIX) :])
    root = _decode(fields.pop("root"))
    secret = fields.pop("secret")
    if len(root) != _HASH_SIZE:
        raise TokenError(f"the enrolment token has a root hash of {len(root)} bytes instead of 32; {_AGAIN}")
    if not _SECRET.fullmatch(secret):
        raise TokenError(f"the enrolment token has no usable secret; {_AGAIN}")
    for label, value in fields.items():
        if not _NAME.fullmatch(value):
            raise TokenError(f"the enrolment token's {label!r} is not a name; {_AGAIN}")
    return EnrolmentToken(
        secret=secret,
        root_sha256=root,
        trust_domain=fields["td"],
        namespace=fields["ns"],
        service_account=fields["sa"],
        name=fields.get("name"),
    )


def _fields(encoded: str) -> dict[str, str]:
    try:
        fields: Any = json.loads(_decode(encoded))
    except (ValueError, RecursionError):
        raise TokenError(f"the enrolment token cannot be read; {_AGAIN}") from None
    if not isinstance(fields, dict) or not all(isinstance(value, str) for value in fields.values()):
        raise TokenError(f"the enrolment token is not a list of named texts; {_AGAIN}")
    required = {"td", "ns", "sa", "root", "secret"}
    if missing := required - fields.keys():
        raise TokenError(f"the enrolment token lacks {', '.join(sorted(missing))}; {_AGAIN}")
    if unknown := fields.keys() - required - {"name"}:
        raise TokenError(
            f"the enrolment token has a field {min(unknown)[:40]!r} that this version does not know; update this host"
        )
    return fields


def _checksum(body: str) -> str:
    import hashlib  # a daemon has another OpenSSL loaded, and needs none of this

    return hashlib.sha256(body.encode()).hexdigest()[:8]


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise TokenError(f"the enrolment token is not base64; {_AGAIN}") from None
