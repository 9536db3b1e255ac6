"""SPIFFE IDs. Source: SPIFFE-ID standard, sections 2 and 2.1 to 2.4.

The parser refuses what a URL library would repair: upper case, percent-encoding, `..`, a port, a query.
Two spellings of one identity would be two identities to one reader and one to another.
"""

from __future__ import annotations

import re

import attrs

from hbone.errors import IdentityError

__all__ = ["MAX_ID_LENGTH", "SpiffeId", "TrustDomain", "quoted"]

MAX_ID_LENGTH = 2048
"""Bytes of a whole SPIFFE ID. Source: SPIFFE-ID 2.3."""
MAX_TRUST_DOMAIN_LENGTH = 255
"""Bytes of a trust domain's name. Source: SPIFFE-ID 2.1."""

_SCHEME = "spiffe://"
_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]+")
_SEGMENT = re.compile(r"[a-zA-Z0-9._-]+")


def quoted(text: str) -> str:
    """`text` as it may stand in a message: quoted, escaped, and cut at 100 characters."""
    return repr(text if len(text) <= 100 else text[:100] + "…")


def _check_trust_domain(name: str) -> None:
    if not name:
        raise IdentityError("a trust domain is empty; write a name such as cluster.local")
    if len(name) > MAX_TRUST_DOMAIN_LENGTH:
        raise IdentityError(
            f"trust domain {quoted(name)} has {len(name)} characters; at most {MAX_TRUST_DOMAIN_LENGTH} are allowed"
        )
    if not _TRUST_DOMAIN.fullmatch(name):
        raise IdentityError(f"trust domain {quoted(name)} is malformed; only a-z 0-9 . - _ are allowed")


def _check_path(path: str) -> None:
    if not path:
        return
    if path[0] != "/":
        raise IdentityError(f"SPIFFE path {quoted(path)} does not begin with a slash")
    for segment in path[1:].split("/"):
        if not segment:
            raise IdentityError(f"SPIFFE path {quoted(path)} has an empty segment or ends in a slash; remove it")
        if segment in (".", ".."):
            raise IdentityError(f"SPIFFE path {quoted(path)} has the segment {segment}, which is not allowed")
        if not _SEGMENT.fullmatch(segment):
            raise IdentityError(f"SPIFFE path {quoted(path)} is malformed; only a-z A-Z 0-9 . - _ and / are allowed")


@attrs.frozen(cache_hash=True)
class TrustDomain:
    """The name of a trust domain, such as `cluster.local`.

    Raises:
        IdentityError: the name is empty, too long, or has other characters than a-z 0-9 . - _

    Source: SPIFFE-ID 2.1.
    """

    name: str

    def __attrs_post_init__(self) -> None:
        _check_trust_domain(self.name)

    def __str__(self) -> str:
        return self.name


@attrs.frozen(cache_hash=True)
class SpiffeId:
    """One identity: a trust domain and a path; the path is empty for the trust domain itself.

    Raises:
        IdentityError: one of the two is malformed, or the whole is over 2048 bytes.

    Source: SPIFFE-ID 2.
    """

    trust_domain: str
    path: str

    def __attrs_post_init__(self) -> None:
        length = len(_SCHEME) + len(self.trust_domain) + len(self.path)
        if length > MAX_ID_LENGTH:
            raise IdentityError(f"a SPIFFE ID has {length} characters; at most {MAX_ID_LENGTH} are allowed")
        _check_trust_domain(self.trust_domain)
        _check_path(self.path)

    @classmethod
    def parse(cls, text: str) -> SpiffeId:
        """The identity that `text` spells, such as `spiffe://cluster.local/ns/shop/sa/orders`.

        Raises:
            IdentityError: any deviation from the standard's form; nothing is normalized.

        Source: SPIFFE-ID 2.
        """
        if not text.startswith(_SCHEME):
            raise IdentityError(f"{quoted(text)} is not a SPIFFE ID; it must begin with {_SCHEME}, in lower case")
        domain, slash, rest = text[len(_SCHEME) :].partition("/")
        return cls(domain, slash + rest)

    @classmethod
    def istio(cls, trust_domain: str, namespace: str, service_account: str) -> SpiffeId:
        """The identity of a service account, in Istio's form.

        Raises:
            IdentityError: a part is empty or has a slash or another character that is not allowed.
        """
        for what, part in (("namespace", namespace), ("service account", service_account)):
            if not _SEGMENT.fullmatch(part):
                raise IdentityError(f"{what} {quoted(part)} is malformed; only a-z A-Z 0-9 . - _ are allowed")
        return cls(trust_domain, f"/ns/{namespace}/sa/{service_account}")

    def _istio_parts(self) -> tuple[str, str] | None:
        parts = self.path.split("/")
        if len(parts) == 5 and parts[1] == "ns" and parts[3] == "sa":
            return parts[2], parts[4]
        return None

    @property
    def namespace(self) -> str | None:
        """The namespace, where the path is exactly `/ns/<namespace>/sa/<service account>`; else None."""
        parts = self._istio_parts()
        return parts[0] if parts else None

    @property
    def service_account(self) -> str | None:
        """The service account, where the path is exactly `/ns/<namespace>/sa/<service account>`; else None."""
        parts = self._istio_parts()
        return parts[1] if parts else None

    def __str__(self) -> str:
        return f"{_SCHEME}{self.trust_domain}{self.path}"
