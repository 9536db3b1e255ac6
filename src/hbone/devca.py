"""A root and certificates to try things with. What makes a real mesh's certificates is miniistiod."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

import attrs
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from hbone.errors import IdentityError
from hbone.identity import SpiffeId

if TYPE_CHECKING:
    from cryptography.x509.name import Name

__all__ = ["DEV_SUBJECT", "DevCa", "spiffe_id_of"]

DEV_SUBJECT = "hbone dev-ca, for trying things, not for production"
_BACKDATE = datetime.timedelta(minutes=1)


def spiffe_id_of(name: str, trust_domain: str) -> SpiffeId:
    """The identity that `NAME` stands for: a SPIFFE ID, `NAMESPACE/SERVICE_ACCOUNT`, or an account of `default`.

    Raises:
        IdentityError: none of the three, of another trust domain, or no workload's.
    """
    if not name.startswith("spiffe://"):
        namespace, _, account = name.rpartition("/")
        return SpiffeId.istio(trust_domain, namespace or "default", account)
    found = SpiffeId.parse(name)
    if not found.path:
        raise IdentityError(f"{found} names a trust domain and no workload of it; add a path")
    if found.trust_domain != trust_domain:
        raise IdentityError(
            f"{found} is of trust domain {found.trust_domain}, and the root here of {trust_domain};"
            " name another directory for it"
        )
    return found


@attrs.frozen
class DevCa:
    """A self-signed root and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def create(cls, trust_domain: str, lifetime: datetime.timedelta) -> DevCa:
        """A new root for `trust_domain`.

        Raises:
            IdentityError: that is no trust domain.
        """
        SpiffeId.istio(trust_domain, "default", "default")
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name(
            [
                x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, trust_domain),
                x509.NameAttribute(x509.NameOID.COMMON_NAME, DEV_SUBJECT),
            ]
        )
        builder = (
            _builder(name, name, key.public_key(), lifetime)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(ca=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        return cls(builder.sign(key, hashes.SHA256()), key)

    @classmethod
    def load(cls, certificate: bytes, key: bytes) -> DevCa:
        """One made before.

        Raises:
            IdentityError: not a root that `create` made.
        """
        try:
            root = x509.load_pem_x509_certificate(certificate)
            private = serialization.load_pem_private_key(key, None)
        except (ValueError, TypeError) as error:
            raise IdentityError(f"the root of this directory cannot be read: {error}") from None
        if root.not_valid_after_utc <= _now():
            raise IdentityError(
                f"the root of this directory expired on {root.not_valid_after_utc:%Y-%m-%d}; name another directory"
            )
        names = root.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        if not names or names[0].value != DEV_SUBJECT or not isinstance(private, ec.EllipticCurvePrivateKey):
            raise IdentityError("the root of this directory was not made by 'hbone dev-ca'; name another directory")
        if private.public_key() != root.public_key():
            raise IdentityError("root.pem and root.key of this directory do not belong together; name another one")
        return cls(root, private)

    @property
    def trust_domain(self) -> str:
        """The trust domain that it was made for."""
        return str(self.certificate.subject.get_attributes_for_oid(x509.NameOID.ORGANIZATION_NAME)[0].value)

    def issue(self, spiffe_id: SpiffeId, lifetime: datetime.timedelta) -> tuple[bytes, bytes]:
        """Certificate and key of an X.509-SVID, as PEM; it never outlives the root.

        Raises:
            IdentityError: of another trust domain.
        """
        if spiffe_id.trust_domain != self.trust_domain:
            raise IdentityError(
                f"{spiffe_id} is of trust domain {spiffe_id.trust_domain}, and the root here of {self.trust_domain};"
                " name another directory for it"
            )
        key = ec.generate_private_key(ec.SECP256R1())
        lifetime = min(lifetime, self.certificate.not_valid_after_utc - _now())
        builder = (
            _builder(x509.Name([]), self.certificate.subject, key.public_key(), lifetime)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(ca=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            # With an empty subject the name stands here alone, and must be understood. Source: RFC 5280 §4.2.1.6.
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(spiffe_id))]), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
        )
        certificate = builder.sign(self.key, hashes.SHA256())
        return certificate.public_bytes(serialization.Encoding.PEM), _key_pem(key)

    def to_pem(self) -> tuple[bytes, bytes]:
        """Certificate and key."""
        return self.certificate.public_bytes(serialization.Encoding.PEM), _key_pem(self.key)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _builder(
    subject: Name, issuer: Name, key: ec.EllipticCurvePublicKey, lifetime: datetime.timedelta
) -> x509.CertificateBuilder:
    now = _now()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + lifetime)
    )


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
