"""A certificate authority for tests: any certificate one could want, wrong ones included.

Nothing here is fit for more than tests: keys are made and kept in memory, and every rule can be broken on request.
"""

from __future__ import annotations

import datetime
import functools
import ipaddress
from typing import TYPE_CHECKING, Any

import attrs
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hbone.identity import Identity, ServerCertificate, SpiffeId, TrustBundle, X509Svid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from hbone.identity.svid import PrivateKey

__all__ = ["WRONG_SVIDS", "Issued", "TestCa"]

CLIENT_AUTH = ExtendedKeyUsageOID.CLIENT_AUTH
SERVER_AUTH = ExtendedKeyUsageOID.SERVER_AUTH

_HOUR = 3600.0
_BACKDATE = 60.0
_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


@functools.cache
def _rsa_key(bits: int) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, bits)


def _new_key(kind: str) -> PrivateKey:
    if kind == "p256":
        return ec.generate_private_key(ec.SECP256R1())
    if kind == "p384":
        return ec.generate_private_key(ec.SECP384R1())
    if kind == "ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    if kind.startswith("rsa"):
        return _rsa_key(int(kind[3:]))
    raise ValueError(f"unknown kind of key {kind!r}; use p256, p384, ed25519 or rsa2048")


def _hash_for(key: PrivateKey) -> Any:
    return None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()


def _key_usage(*names: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{usage: usage in names for usage in _USAGES})


def _name(common_name: str | None, organization: str | None = None) -> x509.Name:
    attributes = []
    if organization:
        attributes.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization))
    if common_name:
        attributes.append(x509.NameAttribute(NameOID.COMMON_NAME, common_name))
    return x509.Name(attributes)


def _utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


@attrs.frozen(eq=False)
class Issued:
    """A certificate chain, leaf first, and its key; whether they make sense is not checked."""

    chain: tuple[x509.Certificate, ...]
    key: PrivateKey = attrs.field(repr=False)

    @property
    def leaf(self) -> x509.Certificate:
        """The certificate itself."""
        return self.chain[0]

    @property
    def cert_pem(self) -> bytes:
        """The chain as PEM."""
        return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in self.chain)

    @property
    def key_pem(self) -> bytes:
        """The key as PEM (PKCS#8)."""
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def svid(self) -> X509Svid:
        """As an SVID, with every rule checked."""
        return X509Svid.from_pem(self.cert_pem, self.key_pem)

    def unchecked_svid(self, claimed: SpiffeId | None = None) -> X509Svid:
        """As an SVID of `claimed` without any check, so that a peer can be shown a wrong one."""
        svid = object.__new__(X509Svid)
        object.__setattr__(svid, "id", claimed or SpiffeId("unchecked", "/unchecked"))
        object.__setattr__(svid, "chain", self.chain)
        object.__setattr__(svid, "key", self.key)
        return svid

    def server_certificate(self) -> ServerCertificate:
        """As a certificate for names and addresses."""
        return ServerCertificate(self.chain, self.key)


class TestCa:
    """A root (or, by `intermediate`, one below it) that signs whatever a test asks for.

    Args:
        trust_domain: of the SVIDs that it makes.
        now: the clock, aware; the system's when None.
        key: kind of its key: `p256`, `p384`, `ed25519`, `rsa2048`.
        ttl: seconds that the root is valid; negative for one that has expired.
        name: the root's common name.
    """

    __test__ = False  # not a test, whatever its name begins with

    def __init__(
        self,
        trust_domain: str = "cluster.local",
        *,
        now: Callable[[], datetime.datetime] | None = None,
        key: str = "p256",
        ttl: float = 10 * 365 * 24 * _HOUR,
        name: str | None = None,
    ) -> None:
        self.trust_domain = trust_domain
        self._now = now or _utc_now
        self._ttl = ttl
        self.subject = _name(name or f"test root {x509.random_serial_number() & 0xFFFFFFFF:08x}", trust_domain)
        self.key = _new_key(key)
        self.certificate = self._sign_ca(self.subject, self.key, self.subject, self.key)
        """The certificate that this CA signs with: the root, or an intermediate."""
        self.root = self.certificate
        """The root that it all leads to."""
        self.intermediates: tuple[x509.Certificate, ...] = ()
        """What a leaf's chain continues with: from the issuer up to, without, the root."""

    @property
    def root_pem(self) -> bytes:
        """The root as PEM."""
        return self.root.public_bytes(serialization.Encoding.PEM)

    @property
    def bundle(self) -> TrustBundle:
        """The root as the trust bundle of this trust domain."""
        return TrustBundle(self.trust_domain, (self.root,))

    def _dates(self, builder: x509.CertificateBuilder, ttl: float, backdate: float) -> x509.CertificateBuilder:
        now = self._now()
        end = now + datetime.timedelta(seconds=ttl)
        begin = min(now, end) - datetime.timedelta(seconds=backdate)
        return builder.not_valid_before(begin).not_valid_after(end)

    def _sign_ca(
        self,
        subject: x509.Name,
        key: PrivateKey,
        issuer: x509.Name,
        issuer_key: PrivateKey,
        path_length: int | None = None,
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
            .add_extension(_key_usage("key_cert_sign", "crl_sign"), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        )
        return self._dates(builder, self._ttl, _BACKDATE).sign(issuer_key, _hash_for(issuer_key))

    def intermediate(self, name: str = "test intermediate", *, key: str = "p256") -> TestCa:
        """A CA whose certificate this one signs; the chains that it issues lead here."""
        child = object.__new__(type(self))
        child.trust_domain = self.trust_domain
        child._now = self._now
        child._ttl = self._ttl
        child.subject = _name(name, self.trust_domain)
        child.key = _new_key(key)
        child.certificate = self._sign_ca(child.subject, child.key, self.subject, self.key)
        child.root = self.root
        child.intermediates = (child.certificate, *self.intermediates)
        return child

    def cross_signed(self, other: TestCa) -> TestCa:
        """This CA's key and name, certified by `other`: chains that it issues lead to `other`'s root."""
        twin = object.__new__(type(self))
        twin.trust_domain = self.trust_domain
        twin._now = self._now
        twin._ttl = self._ttl
        twin.subject = self.subject
        twin.key = self.key
        twin.certificate = other._sign_ca(self.subject, self.key, other.subject, other.key)
        twin.root = other.root
        twin.intermediates = (twin.certificate, *other.intermediates)
        return twin

    def issue(
        self,
        *,
        uris: Sequence[str] = (),
        dns: Sequence[str] = (),
        ips: Sequence[str] = (),
        ttl: float = _HOUR,
        backdate: float = _BACKDATE,
        starts_in: float | None = None,
        ca: bool | None = False,
        key_usage: Sequence[str] | None = ("digital_signature", "key_encipherment"),
        key_usage_critical: bool = True,
        extended_key_usage: Sequence[x509.ObjectIdentifier] | None = (SERVER_AUTH, CLIENT_AUTH),
        common_name: str | None = None,
        san_critical: bool = True,
        key: str | PrivateKey = "p256",
    ) -> Issued:
        """A leaf with exactly what is asked for.

        Args:
            uris: URI names, put in as they are.
            dns: DNS names.
            ips: IP addresses.
            ttl: seconds until it expires; negative for one that has.
            backdate: seconds that it was valid before now.
            starts_in: seconds until it becomes valid.
            ca: basic constraints; None leaves them out.
            key_usage: its bits by cryptography's names; None leaves it out.
            key_usage_critical: whether it is critical.
            extended_key_usage: its purposes; None leaves it out.
            common_name: the subject, which is empty otherwise.
            san_critical: whether the names are critical.
            key: a kind of key, or a key.
        """
        leaf_key = _new_key(key) if isinstance(key, str) else key
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(common_name))
            .issuer_name(self.subject)
            .public_key(leaf_key.public_key())
            .serial_number(x509.random_serial_number())
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        if starts_in is not None:
            begin = self._now() + datetime.timedelta(seconds=starts_in)
            builder = builder.not_valid_before(begin).not_valid_after(begin + datetime.timedelta(seconds=ttl))
        else:
            builder = self._dates(builder, ttl, backdate)
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
        names += [x509.DNSName(name) for name in dns]
        names += [x509.IPAddress(ipaddress.ip_address(ip)) for ip in ips]
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=san_critical)
        if ca is not None:
            builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        if key_usage is not None:
            builder = builder.add_extension(_key_usage(*key_usage), critical=key_usage_critical)
        if extended_key_usage is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage(list(extended_key_usage)), critical=False)
        return Issued((builder.sign(self.key, _hash_for(self.key)), *self.intermediates), leaf_key)

    def id(self, namespace: str = "default", service_account: str = "default") -> SpiffeId:
        """The identity of a service account of this trust domain."""
        return SpiffeId.istio(self.trust_domain, namespace, service_account)

    def _id(self, name: str | SpiffeId, service_account: str) -> SpiffeId:
        if isinstance(name, SpiffeId):
            return name
        return SpiffeId.parse(name) if name.startswith("spiffe:") else self.id(name, service_account)

    def svid(
        self,
        namespace: str | SpiffeId = "default",
        service_account: str = "default",
        *,
        ttl: float = _HOUR,
        key: str | PrivateKey = "p256",
        **wrong: Any,
    ) -> X509Svid:
        """A right SVID; the first argument may also be a whole SPIFFE ID. Further arguments are those of `issue`."""
        return self.issue(uris=[str(self._id(namespace, service_account))], ttl=ttl, key=key, **wrong).svid()

    def identity(
        self,
        namespace: str | SpiffeId = "default",
        service_account: str = "default",
        *,
        also: Iterable[TestCa] = (),
        **issue: Any,
    ) -> Identity:
        """An SVID with this CA's bundle, and those of the CAs in `also`."""
        return Identity(self.svid(namespace, service_account, **issue), [self.bundle, *(ca.bundle for ca in also)])

    def wrong(self, kind: str) -> Issued:
        """A certificate that breaks the rule `kind` of `WRONG_SVIDS`."""
        return self.issue(**{"uris": [str(self.id("shop", "wrong"))], **WRONG_SVIDS[kind](self)})

    def wrong_identity(self, kind: str, *, also: Iterable[TestCa] = ()) -> Identity:
        """The same with this CA's bundle, as an Identity that a TLS context presents without noticing."""
        svid = self.wrong(kind).unchecked_svid(self.id("shop", "wrong"))
        return Identity(svid, [self.bundle, *(ca.bundle for ca in also)])

    def server(self, *names: str, **issue: Any) -> Issued:
        """A server's certificate for DNS names and IP addresses, no SVID; for localhost when none is named."""
        dns: list[str] = []
        ips: list[str] = []
        for name in names or ("localhost", "127.0.0.1", "::1"):
            try:
                ips.append(str(ipaddress.ip_address(name)))
            except ValueError:
                dns.append(name)
        return self.issue(**{"dns": dns, "ips": ips, "extended_key_usage": (SERVER_AUTH,), **issue})

    def crl(self, *revoked: x509.Certificate, ttl: float = _HOUR) -> x509.CertificateRevocationList:
        """A revocation list of this CA that names the certificates in `revoked`."""
        now = self._now()
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.subject)
            .last_update(now - datetime.timedelta(seconds=_BACKDATE))
            .next_update(now + datetime.timedelta(seconds=ttl))
        )
        for certificate in revoked:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder()
                .serial_number(certificate.serial_number)
                .revocation_date(now - datetime.timedelta(seconds=_BACKDATE))
                .build()
            )
        return builder.sign(self.key, _hash_for(self.key))


def _uri(template: str) -> Callable[[TestCa], dict[str, Any]]:
    return lambda ca: {"uris": [template.format(td=ca.trust_domain)]}


WRONG_SVIDS: dict[str, Callable[[TestCa], dict[str, Any]]] = {
    "two URI names": lambda ca: {"uris": [str(ca.id("shop", "wrong")), str(ca.id("shop", "second"))]},
    "a second URI name that is no SPIFFE ID": lambda ca: {
        "uris": [str(ca.id("shop", "wrong")), "https://example.com/"]
    },
    "no names": lambda _: {"uris": [], "common_name": "wrong"},
    "only a DNS name": lambda _: {"uris": [], "dns": ["wrong.shop.svc"]},
    "only an IP address": lambda _: {"uris": [], "ips": ["10.0.0.1"]},
    "a CA as leaf": lambda _: {"ca": True},
    "a signing CA as leaf": lambda _: {"ca": True, "key_usage": ("digital_signature", "key_cert_sign")},
    "keyCertSign": lambda _: {"key_usage": ("digital_signature", "key_cert_sign")},
    "cRLSign": lambda _: {"key_usage": ("digital_signature", "crl_sign")},
    "no digitalSignature": lambda _: {"key_usage": ("key_encipherment", "key_agreement")},
    "no key usage": lambda _: {"key_usage": None},
    "key usage not critical": lambda _: {"key_usage_critical": False},
    "only serverAuth": lambda _: {"extended_key_usage": (SERVER_AUTH,)},
    "only clientAuth": lambda _: {"extended_key_usage": (CLIENT_AUTH,)},
    "another purpose": lambda _: {"extended_key_usage": (ExtendedKeyUsageOID.CODE_SIGNING,)},
    "expired": lambda _: {"ttl": -10.0},
    "not yet valid": lambda _: {"starts_in": _HOUR},
    "names not critical and no subject": lambda _: {"san_critical": False},
    "another trust domain": _uri("spiffe://elsewhere.example/ns/shop/sa/wrong"),
    "no path": _uri("spiffe://{td}"),
    "a root path": _uri("spiffe://{td}/"),
    "a trailing slash": _uri("spiffe://{td}/ns/shop/sa/wrong/"),
    "an empty segment": _uri("spiffe://{td}/ns//sa/wrong"),
    "a dot segment": _uri("spiffe://{td}/ns/shop/../sa/wrong"),
    "percent-encoding": _uri("spiffe://{td}/ns/shop/sa/%65vil"),
    "a query": _uri("spiffe://{td}/ns/shop/sa/wrong?x=1"),
    "a fragment": _uri("spiffe://{td}/ns/shop/sa/wrong#x"),
    "an upper-case scheme": _uri("SPIFFE://{td}/ns/shop/sa/wrong"),
    "an upper-case trust domain": lambda ca: {"uris": [f"spiffe://{ca.trust_domain.upper()}/ns/shop/sa/wrong"]},
    "a port": _uri("spiffe://{td}:443/ns/shop/sa/wrong"),
    "user information": _uri("spiffe://admin@{td}/ns/shop/sa/wrong"),
    "a NUL": _uri("spiffe://{td}/ns/shop/sa/wrong\x00.example"),
    "a space": _uri("spiffe://{td}/ns/shop/sa/wrong "),
    "a comma": _uri("spiffe://{td}/ns/shop/sa/a,spiffe://{td}/ns/shop/sa/b"),
    "another scheme": _uri("https://{td}/ns/shop/sa/wrong"),
    "an over-long ID": lambda ca: {"uris": [f"spiffe://{ca.trust_domain}/{'a' * 2048}"]},
}
"""Ways to break an X.509-SVID, by what is wrong with it; for `TestCa.wrong`."""
