"""X.509-SVIDs and trust bundles. Source: X509-SVID standard, sections 2 to 5."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from hbone.errors import IdentityError
from hbone.identity.spiffe import SpiffeId, TrustDomain, quoted

if TYPE_CHECKING:
    import datetime

__all__ = [
    "UNPARSABLE",
    "PrivateKey",
    "ServerCertificate",
    "TrustBundle",
    "TrustBundles",
    "X509Svid",
    "check_ca",
    "issued_by",
    "load_certificates",
    "load_private_key",
    "svid_id",
    "validity_problem",
]

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey
"""Keys that an SVID may have: P-256, P-384, P-521, Ed25519, RSA of 2048 to 8192 bits."""

MAX_PEM_SIZE = 4 * 1024 * 1024
"""Bytes of a PEM text that we parse."""
MAX_CHAIN = 10
"""Certificates of a chain, the leaf included."""

UNPARSABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""What reading a field of a certificate may raise; fields are parsed when they are first asked for."""

_E = TypeVar("_E", bound=x509.ExtensionType)


def _as_bytes(text: str | bytes) -> bytes:
    return text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text


def load_certificates(pem: str | bytes, what: str = "the certificate") -> tuple[x509.Certificate, ...]:
    """Every certificate of a PEM text, in order; other blocks are passed over.

    Raises:
        IdentityError: none, or one that cannot be parsed.
    """
    data = _as_bytes(pem)
    if len(data) > MAX_PEM_SIZE:
        raise IdentityError(f"{what} has {len(data)} bytes; at most {MAX_PEM_SIZE} are read")
    if b"-----BEGIN CERTIFICATE-----" not in data:
        raise IdentityError(f"{what} holds no PEM certificate; it must have a block BEGIN CERTIFICATE")
    try:
        return tuple(x509.load_pem_x509_certificates(data))
    except ValueError as error:
        raise IdentityError(f"{what} cannot be parsed as PEM certificates: {_sentence(error)}") from error


def load_private_key(pem: str | bytes, what: str = "the private key") -> PrivateKey:
    """The private key of a PEM text, without a passphrase.

    Raises:
        IdentityError: none, encrypted, or of a kind or size that is not allowed.
    """
    data = _as_bytes(pem)
    if len(data) > MAX_PEM_SIZE:
        raise IdentityError(f"{what} has {len(data)} bytes; at most {MAX_PEM_SIZE} are read")
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except TypeError as error:
        raise IdentityError(
            f"{what} is encrypted; write it without a passphrase, readable by its owner only"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        # The parser's own words are left out: they could quote the key.
        raise IdentityError(f"{what} cannot be parsed as a PEM private key") from error
    if isinstance(key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey):
        return key
    if isinstance(key, rsa.RSAPrivateKey) and 2048 <= key.key_size <= 8192:
        return key
    raise IdentityError(
        f"{what} is not usable; make it an EC key on P-256 or P-384, Ed25519, or RSA of 2048 bits or more"
    )


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _extension(certificate: x509.Certificate, kind: type[_E]) -> x509.Extension[_E] | None:
    try:
        return certificate.extensions.get_extension_for_class(kind)
    except x509.ExtensionNotFound:
        return None
    except UNPARSABLE as error:
        raise IdentityError(f"its extensions cannot be parsed: {_sentence(error)}") from error


def svid_id(certificate: x509.Certificate) -> SpiffeId:
    """The one SPIFFE ID of a leaf that follows every rule of an X.509-SVID; signatures and dates are not judged.

    Raises:
        IdentityError: the rule that is broken.

    Source: X509-SVID 2, 3, 4 and 5.
    """
    basic = _extension(certificate, x509.BasicConstraints)
    if basic is not None and basic.value.ca:
        raise IdentityError("it is a CA certificate, which must not authenticate anyone")
    usage = _extension(certificate, x509.KeyUsage)
    if usage is None:
        raise IdentityError("it has no key usage; an X.509-SVID must have it, critical, with digitalSignature")
    if not usage.critical:
        raise IdentityError("its key usage is not marked critical, as an X.509-SVID's must be")
    if usage.value.key_cert_sign or usage.value.crl_sign:
        raise IdentityError("its key usage has keyCertSign or cRLSign, which only a CA may have")
    if not usage.value.digital_signature:
        raise IdentityError("its key usage lacks digitalSignature")
    extended = _extension(certificate, x509.ExtendedKeyUsage)
    if extended is not None:
        for oid, name in (
            (ExtendedKeyUsageOID.SERVER_AUTH, "serverAuth"),
            (ExtendedKeyUsageOID.CLIENT_AUTH, "clientAuth"),
        ):
            if oid not in extended.value:
                raise IdentityError(f"its extended key usage lacks {name}; an X.509-SVID has both ends' or none")
    names = _extension(certificate, x509.SubjectAlternativeName)
    uris = names.value.get_values_for_type(x509.UniformResourceIdentifier) if names is not None else []
    if names is None or len(uris) != 1:
        raise IdentityError(f"it has {len(uris)} URI names; an X.509-SVID has exactly one, its SPIFFE ID")
    if not names.critical and not list(certificate.subject):
        raise IdentityError("its subject is empty and its alternative names are not marked critical")
    spiffe_id = SpiffeId.parse(uris[0])
    if not spiffe_id.path:
        raise IdentityError(f"its SPIFFE ID {spiffe_id} has no path; a trust domain itself authenticates no one")
    return spiffe_id


def check_ca(certificate: x509.Certificate) -> None:
    """May this certificate sign others?

    Raises:
        IdentityError: it is no CA.

    Source: X509-SVID 4.1, 4.3.
    """
    basic = _extension(certificate, x509.BasicConstraints)
    if basic is None or not basic.value.ca:
        raise IdentityError(f"{_subject(certificate)} is not a CA certificate")
    usage = _extension(certificate, x509.KeyUsage)
    if usage is not None and not usage.value.key_cert_sign:
        raise IdentityError(f"the key usage of CA {_subject(certificate)} lacks keyCertSign")


def validity_problem(certificate: x509.Certificate, now: datetime.datetime) -> str | None:
    """Why `certificate` is not valid at `now`, as the rest of a sentence; None where it is."""
    if now > certificate.not_valid_after_utc:
        return (
            f"it expired at {certificate.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ} (here it is {now:%Y-%m-%dT%H:%M:%SZ})"
        )
    if now < certificate.not_valid_before_utc:
        return (
            f"it is not valid before {certificate.not_valid_before_utc:%Y-%m-%dT%H:%M:%SZ}"
            f" (here it is {now:%Y-%m-%dT%H:%M:%SZ}); compare the clocks"
        )
    return None


def _subject(certificate: x509.Certificate) -> str:
    return quoted(certificate.subject.rfc4514_string() or "(empty subject)")


def issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Did `issuer` sign `certificate`? Nothing else about the two is judged."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _self_signed(certificate: x509.Certificate) -> bool:
    return certificate.subject == certificate.issuer and issued_by(certificate, certificate)


def _public_bytes(key: Any) -> bytes:
    encoded: bytes = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return encoded


def _check_pair(chain: tuple[x509.Certificate, ...], key: PrivateKey) -> None:
    if not chain:
        raise IdentityError("the chain is empty; it must begin with the certificate of the key")
    if len(chain) > MAX_CHAIN:
        raise IdentityError(f"the chain has {len(chain)} certificates; at most {MAX_CHAIN} are allowed")
    if _public_bytes(chain[0].public_key()) != _public_bytes(key.public_key()):
        raise IdentityError("the private key does not belong to the certificate; give the two that were made together")
    for number, (certificate, issuer) in enumerate(itertools.pairwise(chain), start=1):
        if not issued_by(certificate, issuer):
            raise IdentityError(
                f"certificate {number + 1} of the chain did not sign certificate {number};"
                " order them leaf first, each followed by its issuer"
            )
        check_ca(issuer)


def _without_roots(chain: Iterable[x509.Certificate]) -> tuple[x509.Certificate, ...]:
    """A peer has its own roots and must not be sent ours; a leaf stays, so that its own rules judge it."""
    certificates = tuple(chain)
    return certificates[:1] + tuple(c for c in certificates[1:] if not _self_signed(c))


def _as_given(chain: Iterable[x509.Certificate]) -> tuple[x509.Certificate, ...]:
    return tuple(chain)


def _key_pem(key: PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _chain_pem(chain: Iterable[x509.Certificate]) -> bytes:
    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in chain)


@attrs.frozen(eq=False)
class ServerCertificate:
    """A server's certificate with its key, for names and addresses instead of a SPIFFE ID: the control plane's.

    Raises:
        IdentityError: key and certificate don't belong together, or the chain is out of order.
    """

    chain: tuple[x509.Certificate, ...] = attrs.field(converter=_as_given)
    """Leaf first. A root at its end is sent too: a host that enrols knows its hash only, and finds it there."""
    key: PrivateKey = attrs.field(repr=False)

    def __attrs_post_init__(self) -> None:
        _check_pair(self.chain, self.key)

    @classmethod
    def from_pem(cls, cert: str | bytes, key: str | bytes) -> ServerCertificate:
        """From PEM texts; `cert` holds the leaf first, then intermediates.

        Raises:
            IdentityError: a text cannot be parsed, or the two don't belong together.
        """
        return cls(load_certificates(cert), load_private_key(key))

    @property
    def expires_at(self) -> datetime.datetime:
        """The end of the leaf's validity."""
        return self.chain[0].not_valid_after_utc


@attrs.frozen(eq=False)
class X509Svid:
    """A SPIFFE ID with the certificate chain and private key that prove it.

    Raises:
        IdentityError: the certificate is no X.509-SVID of `id`, the key is another's, or the chain is out of order.

    Source: X509-SVID 2 to 5.
    """

    id: SpiffeId
    chain: tuple[x509.Certificate, ...] = attrs.field(converter=_without_roots, repr=False)
    """Leaf first, without the root."""
    key: PrivateKey = attrs.field(repr=False)

    def __attrs_post_init__(self) -> None:
        _check_pair(self.chain, self.key)
        try:
            found = svid_id(self.chain[0])
        except IdentityError as error:
            raise IdentityError(f"the certificate is not an X.509-SVID: {error}") from error
        if found != self.id:
            raise IdentityError(f"the certificate is for {found}, not for {self.id}")

    @classmethod
    def from_pem(cls, cert: str | bytes, key: str | bytes) -> X509Svid:
        """From PEM texts; `cert` holds the leaf first, then intermediates. A root at its end is left out.

        Raises:
            IdentityError: a text cannot be parsed, the two don't belong together, or a rule is broken.
        """
        chain = load_certificates(cert)
        private_key = load_private_key(key)
        try:
            spiffe_id = svid_id(chain[0])
        except IdentityError as error:
            raise IdentityError(f"the certificate is not an X.509-SVID: {error}") from error
        return cls(spiffe_id, chain, private_key)

    @property
    def leaf(self) -> x509.Certificate:
        """The certificate itself."""
        return self.chain[0]

    @property
    def not_before(self) -> datetime.datetime:
        """The begin of the leaf's validity."""
        return self.leaf.not_valid_before_utc

    @property
    def expires_at(self) -> datetime.datetime:
        """The end of the leaf's validity."""
        return self.leaf.not_valid_after_utc

    @property
    def serial(self) -> int:
        """The leaf's serial number."""
        return self.leaf.serial_number

    def half_life(self) -> datetime.datetime:
        """The middle of the leaf's validity, when it is time for the next one."""
        return self.not_before + (self.expires_at - self.not_before) / 2

    def to_pem(self) -> tuple[bytes, bytes]:
        """The chain, leaf first, and the private key (PKCS#8, not encrypted)."""
        return _chain_pem(self.chain), _key_pem(self.key)


def _checked_roots(roots: Iterable[x509.Certificate]) -> tuple[x509.Certificate, ...]:
    unique = tuple(dict.fromkeys(roots))
    for root in unique:
        check_ca(root)
        if not _self_signed(root):
            raise IdentityError(
                f"{_subject(root)} is an intermediate, not a root; give the self-signed certificate that it leads to"
            )
    return unique


def _trust_domain_name(domain: str | TrustDomain) -> str:
    return TrustDomain(str(domain)).name


@attrs.frozen(eq=False)
class TrustBundle:
    """The roots that sign for one trust domain; none means that nobody of it is believed.

    Raises:
        IdentityError: a certificate that is not a self-signed CA.

    Source: SPIFFE trust domain and bundle 4.
    """

    trust_domain: str = attrs.field(converter=_trust_domain_name)
    roots: tuple[x509.Certificate, ...] = attrs.field(converter=_checked_roots)

    @classmethod
    def from_pem(cls, trust_domain: str, pem: str | bytes, what: str = "the trust bundle") -> TrustBundle:
        """From PEM certificates.

        Raises:
            IdentityError: none, or one that is unusable.
        """
        try:
            return cls(trust_domain, load_certificates(pem, what))
        except IdentityError as error:
            raise IdentityError(f"{what} is unusable: {error}" if what not in str(error) else str(error)) from error

    def to_pem(self) -> bytes:
        """The roots, one PEM block after the other."""
        return _chain_pem(self.roots)


class TrustBundles(Mapping[str, TrustBundle]):
    """Trust bundles by trust domain; immutable."""

    __slots__ = ("_bundles",)

    def __init__(self, bundles: TrustBundle | Iterable[TrustBundle] | Mapping[str, TrustBundle]) -> None:
        if isinstance(bundles, TrustBundle):
            bundles = (bundles,)
        if isinstance(bundles, Mapping):
            for domain, bundle in bundles.items():
                if bundle.trust_domain != str(domain):
                    raise IdentityError(f"the bundle of {bundle.trust_domain} is listed under {quoted(str(domain))}")
            bundles = bundles.values()
        self._bundles = {bundle.trust_domain: bundle for bundle in bundles}

    def __getitem__(self, trust_domain: str) -> TrustBundle:
        return self._bundles[trust_domain]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bundles)

    def __len__(self) -> int:
        return len(self._bundles)

    def __repr__(self) -> str:
        return f"TrustBundles({', '.join(f'{d}: {len(b.roots)} roots' for d, b in self._bundles.items())})"
