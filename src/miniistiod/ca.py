"""The mesh's certificate authority: what is taken from a request, and what a certificate looks like. Pure.

From a CSR only the public key is taken; who it is for comes from the authenticated caller. The control plane's own
certificate has names and addresses and no SPIFFE ID, a workload's the other way round: neither passes as the other.

Source: Istio's CA (profile of the leaf, order of the chain, limits); SPIFFE X509-SVID.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import secrets
from typing import TYPE_CHECKING

import attrs
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hbone.errors import HboneError
from hbone.identity.svid import UNPARSABLE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hbone.identity import SpiffeId

__all__ = [
    "DEFAULT_LIFETIME",
    "MAX_LIFETIME",
    "CertificateRequestError",
    "LifetimeError",
    "PublicKey",
    "Signer",
    "SigningError",
    "SigningKey",
    "certificate_pem",
    "fingerprint",
    "issue",
    "issue_server",
    "key_hash",
    "lifetime_for",
    "make_crl",
    "make_root",
    "parse_request",
    "response_chain",
]

PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey
SigningKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey

MAX_REQUEST_BYTES = 16 * 1024
"""Bytes of a CSR's PEM text."""
ROOT_LIFETIME = datetime.timedelta(days=3650)
DEFAULT_LIFETIME = datetime.timedelta(hours=24)
MAX_LIFETIME = datetime.timedelta(days=90)
SERVER_LIFETIME = datetime.timedelta(days=30)
"""Of the control plane's own certificate, which is made again at half of it and at every start."""
CRL_LIFETIME = datetime.timedelta(days=7)
"""Of a list of revoked certificates, which is made again every day and with each revocation."""
_ROOT_BACKDATE = datetime.timedelta(hours=1)
_BACKDATE = datetime.timedelta(seconds=120)
_MAX_RSA_BITS = 4096
_SECOND = datetime.timedelta(seconds=1)


class CertificateRequestError(HboneError):
    """The CSR cannot be used."""


class LifetimeError(HboneError):
    """The lifetime asked for is over the limit."""


class SigningError(HboneError):
    """The authority cannot sign: its own certificate has expired."""


@attrs.frozen(eq=False)
class Signer:
    """A signing certificate with its key."""

    certificate: x509.Certificate
    key: SigningKey = attrs.field(repr=False)
    issuers: tuple[x509.Certificate, ...] = ()
    """The certificates above it, up to and with the root; none for a root."""

    @classmethod
    def from_pem(cls, certificate: bytes, key: bytes) -> Signer:
        """Read what `certificate_pem` and `key_pem` wrote."""
        private = serialization.load_pem_private_key(key, None)
        assert isinstance(private, SigningKey)
        return cls(x509.load_pem_x509_certificate(certificate), private)

    @property
    def chain(self) -> tuple[x509.Certificate, ...]:
        """What a leaf is sent with: this certificate and those above it, without the root."""
        return (self.certificate, *self.issuers)[:-1]

    @property
    def root(self) -> x509.Certificate:
        """Where its chain ends."""
        return (self.certificate, *self.issuers)[-1]

    @property
    def expires(self) -> datetime.datetime:
        """When the first certificate of its chain ends, and with it everything that is signed."""
        return min(item.not_valid_after_utc for item in (self.certificate, *self.issuers))

    def key_pem(self) -> bytes:
        """The private key, for the state."""
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    @property
    def sha256(self) -> bytes:
        """SHA-256 of the certificate's DER."""
        return self.certificate.fingerprint(hashes.SHA256())


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of a certificate's DER, in hex."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def make_root(trust_domain: str, now: datetime.datetime) -> Signer:
    """A new self-signed root for a trust domain: P-256, ten years."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, trust_domain[:64])])
    now = now.replace(microsecond=0)
    certificate = (
        x509.CertificateBuilder()
        .serial_number(_serial())
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        # A host whose clock is a little behind can enrol right after.
        .not_valid_before(now - _ROOT_BACKDATE)
        .not_valid_after(now + ROOT_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Signer(certificate, key)


def parse_request(pem: str) -> PublicKey:
    """The public key of a CSR, whose signature proves that the caller has the private key.

    Everything else in it (subject, names, extensions) is left unread.

    Raises:
        CertificateRequestError: malformed, not signed by its own key, or a key that is not allowed.
    """
    if len(pem) > MAX_REQUEST_BYTES:
        raise CertificateRequestError(f"the request has {len(pem)} characters, over the limit of {MAX_REQUEST_BYTES}")
    try:
        request = x509.load_pem_x509_csr(pem.encode("ascii"))
        key = request.public_key()
    except UNPARSABLE:
        raise CertificateRequestError("certificate signing request is not properly encoded") from None
    _check_key(key)  # before the signature: that of a huge key is dear to check
    try:
        signed = request.is_signature_valid
    except (InvalidSignature, *UNPARSABLE):
        signed = False
    if not signed:
        raise CertificateRequestError("certificate signing request is not signed by its own key")
    assert isinstance(key, ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey)
    return key


def _check_key(key: object) -> None:
    if isinstance(key, ed25519.Ed25519PublicKey):
        return
    if isinstance(key, ec.EllipticCurvePublicKey):
        if isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1):
            return
        raise CertificateRequestError(f"keys on the curve {key.curve.name} are not allowed; use P-256 or P-384")
    if isinstance(key, rsa.RSAPublicKey):
        if 2048 <= key.key_size <= _MAX_RSA_BITS and key.public_numbers().e == 65537:
            return
        raise CertificateRequestError(
            f"an RSA key of {key.key_size} bits is not allowed; use 2048 to {_MAX_RSA_BITS} bits and exponent 65537"
        )
    raise CertificateRequestError("this kind of key is not allowed; use P-256, P-384, Ed25519 or RSA")


def key_hash(key: PublicKey) -> str:
    """SHA-256 of a public key, in hex."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def lifetime_for(
    seconds: int,
    default: datetime.timedelta = DEFAULT_LIFETIME,
    limit: datetime.timedelta = MAX_LIFETIME,
) -> datetime.timedelta:
    """The lifetime for a request of `seconds`; none asked for means the default.

    Raises:
        LifetimeError: over the limit. It is not cut, because the caller plans its renewals by what it asked for.
    """
    if seconds <= 0:
        return default
    if seconds > limit.total_seconds():
        raise LifetimeError(
            f"requested TTL {seconds}s is greater than the max allowed TTL {int(limit.total_seconds())}s"
        )
    return datetime.timedelta(seconds=seconds)


def issue(
    signer: Signer, key: PublicKey, spiffe_id: SpiffeId, lifetime: datetime.timedelta, now: datetime.datetime
) -> x509.Certificate:
    """A workload's certificate: one SPIFFE ID, no other name, for both ends of a connection.

    Backdated by two minutes, or a tenth of a short lifetime, against clocks that differ; that is not added to it.

    Raises:
        SigningError: the signing certificate has expired.
    """
    backdate = min(_BACKDATE, lifetime / 10)
    return _issue(
        signer,
        key,
        x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(spiffe_id))]),
        (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH),
        not_before=now - backdate,
        not_after=now + lifetime,
        now=now,
    )


def issue_server(
    signer: Signer, key: PublicKey, names: Iterable[str], now: datetime.datetime, lifetime: datetime.timedelta
) -> x509.Certificate:
    """The control plane's own certificate: names and addresses, no SPIFFE ID, for a server only.

    Raises:
        SigningError: the signing certificate has expired.
    """
    general: list[x509.GeneralName] = []
    for name in dict.fromkeys(names):
        try:
            general.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            general.append(x509.DNSName(name))
    return _issue(
        signer,
        key,
        x509.SubjectAlternativeName(general),
        (ExtendedKeyUsageOID.SERVER_AUTH,),
        not_before=now - min(_ROOT_BACKDATE, lifetime / 10),
        not_after=now + lifetime,
        now=now,
    )


def _issue(
    signer: Signer,
    key: PublicKey,
    names: x509.SubjectAlternativeName,
    purposes: Sequence[x509.ObjectIdentifier],
    *,
    not_before: datetime.datetime,
    not_after: datetime.datetime,
    now: datetime.datetime,
) -> x509.Certificate:
    end = signer.expires
    if end <= now:
        raise SigningError(f"the signing certificate expired at {end:%Y-%m-%dT%H:%M:%SZ}; a new one is needed")
    # Certificates count whole seconds; the end is rounded up, so that a short lifetime is not cut further.
    not_after = not_after.replace(microsecond=0) + (_SECOND if not_after.microsecond else 0 * _SECOND)
    return (
        x509.CertificateBuilder()
        .serial_number(_serial())
        .subject_name(x509.Name([]))
        .issuer_name(signer.certificate.subject)
        .public_key(key)
        .not_valid_before(not_before.replace(microsecond=0))
        .not_valid_after(min(not_after, end))
        .add_extension(_usage(digital_signature=True, key_encipherment=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_authority_key(signer.certificate), critical=False)
        .add_extension(names, critical=True)
        .sign(signer.key, _digest(signer.key))
    )


def _authority_key(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    try:
        identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        key = issuer.public_key()
        assert isinstance(key, PublicKey)
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(key)
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _digest(key: SigningKey) -> hashes.SHA256 | hashes.SHA384 | None:
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return None
    large = isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.key_size >= 384
    return hashes.SHA384() if large else hashes.SHA256()


def make_crl(
    signer: Signer, revoked: Iterable[tuple[int, float]], *, number: int, now: datetime.datetime
) -> x509.CertificateRevocationList:
    """The list of what one signer takes back. Pure.

    Args:
        signer: of the revoked certificates, and of the list.
        revoked: serial and time (seconds since 1970) of each.
        number: grows from list to list.
        now: begin of the list's life of a week.

    Source: RFC 5280 §5.
    """
    now = now.replace(microsecond=0)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(signer.certificate.subject)
        .last_update(now)
        .next_update(now + CRL_LIFETIME)
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(_authority_key(signer.certificate), critical=False)
    )
    for serial, when in revoked:
        moment = datetime.datetime.fromtimestamp(when, datetime.UTC)
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(moment).build()
        )
    return builder.sign(signer.key, _digest(signer.key))


def response_chain(leaf: x509.Certificate, signer: Signer, roots: Iterable[x509.Certificate]) -> list[str]:
    """What CreateCertificate answers: the leaf, intermediates one by one, at last all roots as one text.

    Source: Istio's CA client, which takes the last element as the root store.
    """
    bundle = "".join(certificate_pem(root) for root in roots)
    return [certificate_pem(leaf), *(certificate_pem(item) for item in signer.chain), bundle]


def certificate_pem(certificate: x509.Certificate) -> str:
    """PEM text, ending in a newline."""
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _serial() -> int:
    """128 random bits, positive. DER needs a byte more for half of them, which is within the 20 of RFC 5280."""
    return secrets.randbits(128) or 1


def _usage(
    *,
    digital_signature: bool = False,
    key_encipherment: bool = False,
    key_cert_sign: bool = False,
    crl_sign: bool = False,
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=key_encipherment,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )
