"""Certificates that a CA took back. Pure: whoever reads a file of lists, or is sent them, makes a `RevocationLists`.

A path is looked up as a whole: the leaf and every certificate above it but the root. An unknown status passes, a list
past its `nextUpdate` stays in force, and a list counts for a certificate only if that one's issuer signed it, so two
CAs of one name do not speak for each other.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Protocol

import attrs
from cryptography import x509

from hbone.errors import IdentityError
from hbone.identity.spiffe import quoted
from hbone.identity.svid import UNPARSABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["RevocationLists", "RevocationSource", "Revoked"]

_KNOWN_SIGNERS = 1024  # pairs of list and issuer whose signature is remembered


@attrs.frozen
class Revoked:
    """What was found."""

    certificate: x509.Certificate

    def __str__(self) -> str:
        issuer = quoted(self.certificate.issuer.rfc4514_string())
        return f"the certificate with serial {self.certificate.serial_number:x} was revoked by {issuer}"


class RevocationSource(Protocol):
    """Who knows the lists, and tells when they change."""

    @property
    def current(self) -> RevocationLists:
        """Those in force."""

    def subscribe(self, callback: Callable[[], object]) -> Callable[[], None]:
        """Call after each change; returns what ends that."""


class RevocationLists:
    """Revocation lists, to be asked about certificates in a time that does not depend on their length. Immutable.

    Two objects are equal only if they are one, so that what was built for one can be kept with it.

    Args:
        lists: X.509 CRLs.

    Raises:
        IdentityError: a list says only what changed since another (delta), or speaks for several CAs (indirect); it
            would be understood wrongly.
    """

    __slots__ = ("__weakref__", "_by_issuer", "_verified", "lists")

    def __init__(self, lists: Iterable[x509.CertificateRevocationList] = ()) -> None:
        self.lists = tuple(lists)
        self._by_issuer: dict[x509.Name, list[tuple[x509.CertificateRevocationList, frozenset[int]]]] = {}
        self._verified: dict[tuple[int, x509.Certificate], bool] = {}
        for found in self.lists:
            try:
                entry = found, _serials(found)
                self._by_issuer.setdefault(found.issuer, []).append(entry)
            except IdentityError:
                raise
            except UNPARSABLE as error:
                reason = " ".join(str(error).split())[:100]
                raise IdentityError(f"a revocation list cannot be parsed: {reason}") from None

    @classmethod
    def joined(cls, *parts: RevocationLists) -> RevocationLists:
        """All of them in one; nothing is parsed again."""
        whole = cls()
        whole.lists = tuple(found for part in parts for found in part.lists)
        for part in parts:
            for name, entries in part._by_issuer.items():
                whole._by_issuer.setdefault(name, []).extend(entries)
        return whole

    def __bool__(self) -> bool:
        return bool(self._by_issuer)

    @property
    def count(self) -> int:
        """Certificates that the lists name."""
        return sum(len(serials) for entries in self._by_issuer.values() for _, serials in entries)

    def find(self, path: Sequence[x509.Certificate]) -> Revoked | None:
        """The first revoked certificate of a verified path, leaf first and root last.

        Raises:
            ValueError: a certificate of the path cannot be parsed.

        Source: RFC 5280 §6.3.
        """
        for certificate, issuer in itertools.pairwise(path):
            for found, serials in self._by_issuer.get(certificate.issuer, ()):
                if certificate.serial_number in serials and self._is_signed(found, issuer):
                    return Revoked(certificate)
        return None

    def _is_signed(self, found: x509.CertificateRevocationList, issuer: x509.Certificate) -> bool:
        key = (id(found), issuer)  # `lists` keeps each alive, so its id stays its own
        known = self._verified.get(key)
        if known is None:
            try:
                known = found.is_signature_valid(issuer.public_key())  # type: ignore[arg-type]  # any kind of key
            except (TypeError, ValueError):
                known = False
            if len(self._verified) >= _KNOWN_SIGNERS:
                self._verified.clear()
            self._verified[key] = known
        return known


def _serials(found: x509.CertificateRevocationList) -> frozenset[int]:
    for extension in found.extensions:
        if isinstance(extension.value, x509.DeltaCRLIndicator):
            raise IdentityError("a delta revocation list cannot be used; publish the complete one")
        if isinstance(extension.value, x509.IssuingDistributionPoint) and extension.value.indirect_crl:
            raise IdentityError("an indirect revocation list cannot be used; publish one for each CA")
    return frozenset(entry.serial_number for entry in found)
