"""Certificate, roots and parameters of TLS, and the judgement on a peer's certificate.

Nothing here may skip the verification of a certificate: no tickets, no session cache, no early data, and the callback
that OpenSSL asks can only turn its yes into a no.
"""

from __future__ import annotations

import datetime
import ipaddress
import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from cryptography import x509
from OpenSSL import SSL, crypto

from hbone.errors import ConfigurationError, IdentityError, PeerIdentityError, TlsError
from hbone.identity.spiffe import SpiffeId, quoted
from hbone.identity.svid import (
    Identity,
    PrivateKey,
    ServerCertificate,
    TrustBundle,
    TrustBundles,
    load_certificates,
    validity_problem,
)
from hbone.identity.verify import verify_peer_chain
from hbone.openssl import DIRECT, ffi, lib, verify_callback

__all__ = ["Authorize", "PeerCheck", "TlsContext"]

MAX_CHAIN_DEPTH = 8
"""Certificates between a leaf and its root that are looked at."""

_CIPHERSUITES = b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384"
_ALPN = b"h2"

Authorize = Callable[[SpiffeId], bool]
"""Says whether a verified peer may go on."""

# What the peer's certificate is checked against


class Expectation:
    """What a context wants of a peer's certificate; shared by its connections."""

    __slots__ = ("bundles", "names", "revoked")

    def __init__(
        self,
        bundles: Mapping[str, TrustBundle] | None,
        names: tuple[str, ...] = (),
        crls: Sequence[x509.CertificateRevocationList] = (),
    ) -> None:
        self.bundles = bundles
        """Roots by trust domain: the peer must have an SVID. None: a server with a name, not an SVID."""
        self.names = names
        self.revoked = _Revocations(crls)

    def judge(self, path: Sequence[x509.Certificate]) -> SpiffeId | None:
        """Who the peer is, by the path that OpenSSL verified, leaf first.

        Raises:
            PeerIdentityError: it is not acceptable.
        """
        self.revoked.check(path)
        if self.bundles is not None:
            return verify_peer_chain(path[0], path[1:-1], path[-1], self.bundles)
        if self.names and not any(_bears_name(path[0], name) for name in self.names):
            raise PeerIdentityError(_wrong_name(path[0], self.names))
        return None


class _Revocations:
    """Certificates that a CA took back. An unknown status passes; a list must be signed by the issuer it names."""

    __slots__ = ("_by_issuer", "_verified")

    def __init__(self, crls: Sequence[x509.CertificateRevocationList]) -> None:
        self._by_issuer: dict[x509.Name, list[x509.CertificateRevocationList]] = {}
        for crl in crls:
            self._by_issuer.setdefault(crl.issuer, []).append(crl)
        self._verified: dict[tuple[int, x509.Certificate], bool] = {}

    def check(self, path: Sequence[x509.Certificate]) -> None:
        if not self._by_issuer:
            return
        for certificate, issuer in itertools.pairwise(path):
            for crl in self._by_issuer.get(certificate.issuer, ()):
                if not self._is_signed(crl, issuer):
                    continue
                if crl.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None:
                    raise PeerIdentityError(
                        f"the certificate with serial {certificate.serial_number:x} was revoked"
                        f" by {quoted(certificate.issuer.rfc4514_string())}"
                    )

    def _is_signed(self, crl: x509.CertificateRevocationList, issuer: x509.Certificate) -> bool:
        key = (id(crl), issuer)  # the list of lists keeps each alive, so its id stays its own
        known = self._verified.get(key)
        if known is None:
            try:
                known = crl.is_signature_valid(issuer.public_key())  # type: ignore[arg-type]  # any kind of key
            except (TypeError, ValueError):
                known = False
            if len(self._verified) >= 1024:
                self._verified.clear()
            self._verified[key] = known
        return known


def _alternative_names(certificate: x509.Certificate) -> tuple[list[str], list[str]]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        dns = names.get_values_for_type(x509.DNSName)
        return dns, [str(ip) for ip in names.get_values_for_type(x509.IPAddress)]
    except x509.ExtensionNotFound:
        return [], []
    except (ValueError, TypeError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise PeerIdentityError("the server's certificate has extensions that cannot be parsed") from error


def _is_ip(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _bears_name(certificate: x509.Certificate, name: str) -> bool:
    """Is `name`, a DNS name or an address, among the certificate's names? Source: RFC 9525 §6.3, §6.4."""
    dns, ips = _alternative_names(certificate)
    if _is_ip(name):
        return str(ipaddress.ip_address(name)) in ips
    wanted = name.lower().rstrip(".")
    for candidate in dns:
        pattern = candidate.lower()
        if pattern == wanted:
            return True
        # A wildcard is the whole leftmost label, and stands for exactly one.
        if pattern.startswith("*.") and pattern.count(".") >= 2 and wanted.partition(".")[2] == pattern[2:]:
            return True
    return False


def _wrong_name(certificate: x509.Certificate, names: Iterable[str]) -> str:
    dns, ips = _alternative_names(certificate)
    return (
        f"the server's certificate is not for {' or '.join(names)};"
        f" it is for {', '.join(map(quoted, [*dns, *ips][:8])) or 'no name and no address'}"
    )


class PeerCheck:
    """What the verification of one connection's peer came to; written by OpenSSL's callback."""

    __slots__ = ("accepted", "authorize", "expectation", "fault", "idle", "path", "peer_id", "problem")

    def __init__(self, expectation: Expectation, authorize: Authorize | None) -> None:
        self.expectation = expectation
        self.authorize = authorize
        self.path: list[x509.Certificate] = []
        self.problem: str | None = None
        self.fault: BaseException | None = None
        """What `authorize` raised, if it did."""
        self.peer_id: SpiffeId | None = None
        self.accepted = False
        self.idle = 0
        """Messages of TLS itself since the last that carried data."""

    def on_info(self, _: SSL.Connection, where: int, __: int) -> None:
        """OpenSSL tells of a handshake message after the handshake: KeyUpdate, or a ticket."""
        if where & SSL.SSL_CB_EXIT:
            self.idle += 1

    def refuse(self, number: int, depth: int, certificate: x509.Certificate) -> None:
        """OpenSSL found error `number` at `certificate`, `depth` steps above the leaf."""
        if self.problem is None:
            self.problem = _explain(number, depth, certificate, self.expectation)

    def add(self, certificate: x509.Certificate, depth: int) -> bool:
        """OpenSSL found the path to be in order, and tells it from the root down to the leaf."""
        self.path.insert(0, certificate)
        if depth:
            return True
        try:
            self.peer_id = self.expectation.judge(self.path)
            if self.authorize is not None and (self.peer_id is None or not self.authorize(self.peer_id)):
                raise PeerIdentityError(f"the peer is {self.peer_id or 'without a SPIFFE ID'}, who is not authorized")
        except PeerIdentityError as error:
            self.problem = str(error)
            return False
        self.accepted = True
        return True


def _judge(connection: SSL.Connection, certificate: x509.Certificate, number: int, depth: int, ok: bool) -> bool:
    check: PeerCheck = connection.get_app_data()
    try:
        if ok:
            return check.add(certificate, depth)
        check.refuse(number, depth, certificate)
    except BaseException as error:  # it cannot pass through OpenSSL; the handshake raises it
        check.fault = error
    return False


def _on_verify(connection: SSL.Connection, certificate: crypto.X509, number: int, depth: int, ok: int) -> bool:
    return _judge(connection, certificate.to_cryptography(), number, depth, bool(ok))


_ON_VERIFY = verify_callback(_judge) if DIRECT else None


_CODES = SSL.X509VerificationCodes


def _explain(number: int, depth: int, certificate: x509.Certificate, expectation: Expectation) -> str:
    """A sentence for OpenSSL's verification error `number` at `certificate`, `depth` steps above the leaf."""
    subject = certificate.subject.rfc4514_string()
    who = "the peer's certificate" if depth == 0 else f"the CA certificate {quoted(subject)} in the peer's chain"
    uris = ", ".join(map(quoted, _uris(certificate)))
    if depth == 0 and uris:
        who = f"the peer's certificate for {uris}"
    if number in (_CODES.ERR_CERT_HAS_EXPIRED, _CODES.ERR_CERT_NOT_YET_VALID):
        return (
            f"{who} is refused: {validity_problem(certificate, datetime.datetime.now(datetime.UTC)) or 'not valid now'}"
        )
    if number in (
        _CODES.ERR_UNABLE_TO_GET_ISSUER_CERT,
        _CODES.ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY,
        _CODES.ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE,
        _CODES.ERR_SELF_SIGNED_CERT_IN_CHAIN,
        _CODES.ERR_DEPTH_ZERO_SELF_SIGNED_CERT,
    ):
        return (
            f"{who} was signed by {quoted(certificate.issuer.rfc4514_string() or '(empty name)')}"
            f"{_authority_key(certificate)}, which is no root of ours; do both ends have the same roots?"
        )
    if number in (_CODES.ERR_HOSTNAME_MISMATCH, _CODES.ERR_IP_ADDRESS_MISMATCH):
        return _wrong_name(certificate, expectation.names)
    if number == _CODES.ERR_INVALID_PURPOSE:
        return f"{who} is refused: its extended key usage or key usage does not allow this use"
    reason = ffi.string(lib.X509_verify_cert_error_string(number)).decode() if DIRECT else f"error {number}"
    return f"{who} is refused: {reason}"


def _uris(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return names.get_values_for_type(x509.UniformResourceIdentifier)[:3]
    except (ValueError, TypeError, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        return []


def _authority_key(certificate: x509.Certificate) -> str:
    try:
        identifier = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    except (ValueError, TypeError, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        return ""
    return f" (key id {identifier.hex()})" if identifier else ""


class NoSharedProtocol(TlsError):
    """Raised inside OpenSSL's ALPN callback, so that the alert no_application_protocol goes out."""


def _on_alpn(_: SSL.Connection, offered: list[bytes]) -> bytes:
    if _ALPN in offered:
        return _ALPN
    names = ", ".join(quoted(name.decode("ascii", "backslashreplace")) for name in offered[:4])
    raise NoSharedProtocol(f"the client offers the protocols {names}, and not h2")


# Contexts

_Role = tuple[str, ...]
_cache: weakref.WeakKeyDictionary[Identity, dict[_Role, TlsContext]] = weakref.WeakKeyDictionary()


class TlsContext:
    """Certificate, roots and parameters of TLS. Immutable; one serves any number of connections.

    For a tunnel: `TlsContext.client(identity)` and `TlsContext.server(identity)`, one per identity version, cached with
    it. For the control plane: `client(roots=..., server_name=...)`, and `server` with a `ServerCertificate`.
    """

    __slots__ = (
        "__weakref__",
        "_context",
        "expectation",
        "is_server",
        "needs_peer",
        "own_expiry",
        "own_id",
        "server_name",
    )

    def __init__(
        self,
        *,
        is_server: bool,
        chain: Sequence[x509.Certificate],
        key: PrivateKey | None,
        roots: Iterable[x509.Certificate],
        expectation: Expectation,
        needs_peer: bool = True,
        own_id: SpiffeId | None = None,
        server_name: str | None = None,
    ) -> None:
        context = SSL.Context(SSL.TLS_METHOD)
        context.set_min_proto_version(SSL.TLS1_3_VERSION)
        context.set_max_proto_version(SSL.TLS1_3_VERSION)
        context.set_tls13_ciphersuites(_CIPHERSUITES)
        context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        context.set_options(SSL.OP_NO_TICKET | SSL.OP_CIPHER_SERVER_PREFERENCE | SSL.OP_NO_COMPRESSION)
        if DIRECT:
            # One call encrypts all that it is given; memory never makes it wait.
            context.clear_mode(lib.SSL_MODE_ENABLE_PARTIAL_WRITE)
        try:
            if key is not None:
                context.use_certificate(chain[0])
                context.use_privatekey(key)
                for certificate in chain[1:]:
                    context.add_extra_chain_cert(certificate)
                context.check_privatekey()
            store = context.get_cert_store()
            assert store is not None
            for root in roots:
                store.add_cert(crypto.X509.from_cryptography(root))
        except (SSL.Error, crypto.Error, ValueError, TypeError) as error:
            raise IdentityError(
                f"the certificate, its key or the roots cannot be used for TLS: {reason_of(error)}"
            ) from error
        mode = SSL.VERIFY_PEER | (SSL.VERIFY_FAIL_IF_NO_PEER_CERT if needs_peer else 0)
        context.set_verify(mode, _on_verify)
        if DIRECT:
            lib.SSL_CTX_set_verify(context._context, mode, _ON_VERIFY)
        context.set_verify_depth(MAX_CHAIN_DEPTH)
        if is_server:
            context.set_alpn_select_callback(_on_alpn)
        else:
            context.set_alpn_protos([_ALPN])
        self._context = context
        self.is_server = is_server
        self.expectation = expectation
        self.needs_peer = needs_peer
        """Whether a peer without a certificate is refused."""
        self.own_id = own_id
        """Who we are; None without an SVID."""
        self.own_expiry = chain[0].not_valid_after_utc if chain else None
        self.server_name = server_name

    @classmethod
    def client(
        cls,
        identity: Identity | None = None,
        *,
        roots: str | bytes | Iterable[x509.Certificate] | None = None,
        server_name: str | None = None,
        alt_names: Sequence[str] = (),
        crls: Sequence[x509.CertificateRevocationList] = (),
    ) -> TlsContext:
        """For dialling.

        With `identity` alone: a tunnel. The server must have an SVID of a trust domain whose bundle we hold; no server
        name is sent. With `roots` and `server_name`: the control plane. The server's certificate must lead to one of
        `roots` and bear the name or address, so no workload's certificate will do; an `identity` given is presented.

        Args:
            identity: who we are.
            roots: PEM text, or certificates, that the control plane's certificate may lead to.
            server_name: its DNS name or IP address.
            alt_names: other names or addresses that will do as well.
            crls: revocation lists, checked for the whole chain.

        Raises:
            IdentityError: certificate, key or roots are unusable.
            ConfigurationError: an incomplete or malformed set of arguments.
        """
        if roots is None:
            if identity is None or server_name is not None or alt_names:
                raise ConfigurationError("a TLS client needs an identity, or roots together with a server name")
            return _cached(
                identity,
                ("client",) if not crls else None,
                lambda: cls(
                    is_server=False,
                    chain=identity.svid.chain,
                    key=identity.svid.key,
                    roots=_all_roots(identity.bundles),
                    expectation=Expectation(identity.bundles, crls=crls),
                    own_id=identity.svid.id,
                ),
            )
        if not server_name:
            raise ConfigurationError("a TLS client with roots needs a server name or address to check")
        for name in (server_name, *alt_names):
            _check_name(name)
        anchors = load_certificates(roots, "the roots") if isinstance(roots, str | bytes) else tuple(roots)
        if not anchors:
            raise IdentityError("the roots are empty; give the certificate of at least one")
        return cls(
            is_server=False,
            chain=identity.svid.chain if identity else (),
            key=identity.svid.key if identity else None,
            roots=anchors,
            expectation=Expectation(None, (server_name, *alt_names), crls),
            own_id=identity.svid.id if identity else None,
            server_name=server_name,
        )

    @classmethod
    def server(
        cls,
        identity: Identity | ServerCertificate,
        client_certificate: Literal["required", "optional"] = "required",
        *,
        bundles: TrustBundle | Iterable[TrustBundle] | Mapping[str, TrustBundle] | None = None,
        crls: Sequence[x509.CertificateRevocationList] = (),
    ) -> TlsContext:
        """For listening.

        Args:
            identity: who we are: an identity for a tunnel, or the control plane's server certificate.
            client_certificate: `required` refuses a client without one; `optional` asks for one and verifies it
                if given. What is given must be an SVID either way.
            bundles: the roots of clients, for a server certificate; an identity brings its own.
            crls: revocation lists, checked for the whole chain.

        Raises:
            IdentityError: certificate, key or roots are unusable.
            ConfigurationError: no bundles.
        """
        needs_peer = client_certificate == "required"
        if isinstance(identity, Identity):
            clients: Mapping[str, TrustBundle] = identity.bundles if bundles is None else TrustBundles(bundles)
            own_id: SpiffeId | None = identity.svid.id
            chain, key = identity.svid.chain, identity.svid.key
        else:
            if bundles is None:
                raise ConfigurationError("a TLS server with a server certificate needs bundles to verify clients with")
            clients = TrustBundles(bundles)
            own_id = None
            chain, key = identity.chain, identity.key

        def build() -> TlsContext:
            return cls(
                is_server=True,
                chain=chain,
                key=key,
                roots=_all_roots(clients),
                expectation=Expectation(clients, crls=crls),
                needs_peer=needs_peer,
                own_id=own_id,
            )

        if isinstance(identity, Identity) and bundles is None and not crls:
            return _cached(identity, ("server", client_certificate), build)
        return build()

    def connection(self) -> SSL.Connection:
        """A new connection of OpenSSL's, in its first state."""
        connection = SSL.Connection(self._context, None)
        if self.is_server:
            connection.set_accept_state()
            return connection
        connection.set_connect_state()
        if self.server_name is not None:
            ip = _is_ip(self.server_name)
            if not ip:
                connection.set_tlsext_host_name(self.server_name.encode("ascii"))
            if len(self.expectation.names) == 1:
                self._have_openssl_check(connection, ip=ip)
        return connection

    def _have_openssl_check(self, connection: SSL.Connection, *, ip: bool) -> None:
        """OpenSSL checks the name too; it has room for one, so several are left to our own check."""
        if not DIRECT or self.server_name is None:
            return
        param = lib.SSL_get0_param(connection._ssl)
        flags = lib.X509_CHECK_FLAG_NEVER_CHECK_SUBJECT | lib.X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS
        lib.X509_VERIFY_PARAM_set_hostflags(param, flags)
        if ip:
            packed = ipaddress.ip_address(self.server_name).packed
            done = lib.X509_VERIFY_PARAM_set1_ip(param, packed, len(packed))
        else:
            name = self.server_name.encode("ascii")
            done = lib.X509_VERIFY_PARAM_set1_host(param, name, len(name))
        if done != 1:
            raise ConfigurationError(f"server name {quoted(self.server_name)} cannot be checked by OpenSSL")


def _cached(identity: Identity, role: _Role | None, build: Callable[[], TlsContext]) -> TlsContext:
    if role is None:
        return build()
    contexts = _cache.setdefault(identity, {})
    context = contexts.get(role)
    if context is None:
        context = contexts[role] = build()
    return context


def _all_roots(bundles: Mapping[str, TrustBundle]) -> Iterable[x509.Certificate]:
    return dict.fromkeys(root for bundle in bundles.values() for root in bundle.roots)


def _check_name(name: str) -> None:
    if _is_ip(name):
        return
    labels = name.rstrip(".").split(".")
    if len(name) > 253 or not all(
        0 < len(label) <= 63 and all(c.isascii() and (c.isalnum() or c in "-_") for c in label) for label in labels
    ):
        raise ConfigurationError(f"server name {quoted(name)} is neither a DNS name nor an IP address")


def reason_of(error: BaseException) -> str:
    """The reason in an exception of pyOpenSSL's, which carries OpenSSL's queue as its first argument."""
    if error.args and isinstance(error.args[0], list):
        reasons = [entry[-1] for entry in error.args[0] if entry and entry[-1]]
        return reasons[0] if reasons else "unknown reason"
    return " ".join(str(error).split())[:200] or type(error).__name__
