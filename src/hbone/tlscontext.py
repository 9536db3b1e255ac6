"""Certificate, roots and parameters of TLS.

Nothing here may skip the verification of a certificate: no tickets, no session cache, no early data.
"""

from __future__ import annotations

import ipaddress
import weakref
from typing import TYPE_CHECKING, Literal

from OpenSSL import SSL, crypto

from hbone.errors import ConfigurationError, IdentityError, TlsError
from hbone.identity.revocation import RevocationLists
from hbone.identity.sources import Identity
from hbone.identity.spiffe import SpiffeId, quoted
from hbone.identity.svid import (
    PrivateKey,
    ServerCertificate,
    TrustBundle,
    TrustBundles,
    load_certificates,
)
from hbone.openssl import DIRECT, lib
from hbone.tlspeer import ON_VERIFY, Expectation, is_ip, on_verify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from cryptography import x509

__all__ = ["NoSharedProtocol", "TlsContext", "reason_of"]

MAX_CHAIN_DEPTH = 8
"""Certificates between a leaf and its root that are looked at."""

_NO_AUTO_CHAIN = 0x8  # SSL_MODE_NO_AUTO_CHAIN, which pyOpenSSL does not name
_CIPHERSUITES = b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384"
_ALPN = b"h2"


class NoSharedProtocol(TlsError):
    """Raised inside OpenSSL's ALPN callback, so that the alert no_application_protocol goes out."""


def _on_alpn(_: SSL.Connection, offered: list[bytes]) -> bytes:
    if _ALPN in offered:
        return _ALPN
    names = ", ".join(quoted(name.decode("ascii", "backslashreplace")) for name in offered[:4])
    raise NoSharedProtocol(f"the client offers the protocols {names}, and not h2")


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
        context.set_mode(_NO_AUTO_CHAIN)  # what is sent is `chain`: no root, and no search for one in each handshake
        if DIRECT:
            # One call encrypts all that it is given; memory never makes it wait.
            context.clear_mode(lib.SSL_MODE_ENABLE_PARTIAL_WRITE)
            context.set_mode(lib.SSL_MODE_RELEASE_BUFFERS)  # 17 KiB each, which an idle tunnel would keep for good
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
        context.set_verify(mode, on_verify)
        if DIRECT:
            lib.SSL_CTX_set_verify(context._context, mode, ON_VERIFY)
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
        crls: Sequence[x509.CertificateRevocationList] | RevocationLists = (),
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
            crls: revocation lists, checked for the whole chain. As `RevocationLists` they keep the context cached.

        Raises:
            IdentityError: certificate, key or roots are unusable.
            ConfigurationError: an incomplete or malformed set of arguments.
        """
        if roots is None:
            if identity is None or server_name is not None or alt_names:
                raise ConfigurationError("a TLS client needs an identity, or roots together with a server name")
            return _cached(
                identity,
                ("client",),
                crls,
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
        crls: Sequence[x509.CertificateRevocationList] | RevocationLists = (),
    ) -> TlsContext:
        """For listening.

        Args:
            identity: who we are: an identity for a tunnel, or the control plane's server certificate.
            client_certificate: `required` refuses a client without one; `optional` asks for one and verifies it
                if given. What is given must be an SVID either way.
            bundles: the roots of clients, for a server certificate; an identity brings its own.
            crls: revocation lists, checked for the whole chain. As `RevocationLists` they keep the context cached.

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

        if isinstance(identity, Identity) and bundles is None:
            return _cached(identity, ("server", client_certificate), crls, build)
        return build()

    def connection(self) -> SSL.Connection:
        """A new connection of OpenSSL's, in its first state."""
        connection = SSL.Connection(self._context, None)
        if self.is_server:
            connection.set_accept_state()
            return connection
        connection.set_connect_state()
        if self.server_name is not None:
            ip = is_ip(self.server_name)
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


def _cached(
    identity: Identity,
    role: _Role,
    crls: Sequence[x509.CertificateRevocationList] | RevocationLists,
    build: Callable[[], TlsContext],
) -> TlsContext:
    """The context for identity, role and lists; one with other lists takes the place of the one before."""
    if crls and not isinstance(crls, RevocationLists):
        return build()
    contexts = _cache.setdefault(identity, {})
    if crls:
        role = (*role, "revocable")
    context = contexts.get(role)
    if context is None or (crls and context.expectation.revoked is not crls):
        context = contexts[role] = build()
    return context


def _all_roots(bundles: Mapping[str, TrustBundle]) -> Iterable[x509.Certificate]:
    return dict.fromkeys(root for bundle in bundles.values() for root in bundle.roots)


def _check_name(name: str) -> None:
    if is_ip(name):
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
