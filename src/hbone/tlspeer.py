"""The judgement on a peer's certificate, made inside the TLS handshake; and its words.

OpenSSL builds and verifies the path; its callback can only turn that yes into a no.
"""

from __future__ import annotations

import datetime
import ipaddress
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence

from cryptography import x509
from OpenSSL import SSL, crypto

from hbone.errors import PeerIdentityError, PeerRevokedError
from hbone.identity.revocation import RevocationLists
from hbone.identity.spiffe import SpiffeId, quoted
from hbone.identity.svid import UNPARSABLE, TrustBundle, validity_problem
from hbone.identity.verify import verify_peer_chain
from hbone.openssl import DIRECT, ffi, info_callback, lib, verify_callback

__all__ = ["ON_INFO", "ON_VERIFY", "Authorize", "Expectation", "Peer", "PeerCheck", "is_ip", "on_verify"]

Authorize = Callable[[SpiffeId], bool]
"""Says whether a verified peer may go on."""


class Expectation:
    """What a context wants of a peer's certificate; shared by its connections."""

    __slots__ = ("bundles", "names", "revoked")

    def __init__(
        self,
        bundles: Mapping[str, TrustBundle] | None,
        names: tuple[str, ...] = (),
        crls: Sequence[x509.CertificateRevocationList] | RevocationLists = (),
    ) -> None:
        self.bundles = bundles
        """Roots by trust domain: the peer must have an SVID. None: a server with a name, not an SVID."""
        self.names = names
        self.revoked = crls if isinstance(crls, RevocationLists) else RevocationLists(crls)

    def judge(self, path: Sequence[x509.Certificate]) -> SpiffeId | None:
        """Who the peer is, by the path that OpenSSL verified, leaf first.

        Raises:
            PeerIdentityError: it is not acceptable.
        """
        if self.revoked and (found := self.revoked.find(path)) is not None:
            raise PeerRevokedError(str(found))
        if self.bundles is not None:
            return verify_peer_chain(path[0], path[1:-1], path[-1], self.bundles)
        if self.names and not any(_bears_name(path[0], name) for name in self.names):
            raise PeerIdentityError(_wrong_name(path[0], self.names))
        return None


def _alternative_names(certificate: x509.Certificate) -> tuple[list[str], list[str]]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        dns = names.get_values_for_type(x509.DNSName)
        return dns, [str(ip) for ip in names.get_values_for_type(x509.IPAddress)]
    except x509.ExtensionNotFound:
        return [], []
    except UNPARSABLE as error:
        raise PeerIdentityError("the server's certificate has extensions that cannot be parsed") from error


def is_ip(name: str) -> bool:
    """Is `name` an IP address?"""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _bears_name(certificate: x509.Certificate, name: str) -> bool:
    """Is `name`, a DNS name or an address, among the certificate's names? Source: RFC 9525 §6.3, §6.4."""
    dns, ips = _alternative_names(certificate)
    if is_ip(name):
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


class Peer:
    """A peer that was verified; one object for all connections to whoever showed the same certificates."""

    __slots__ = ("__weakref__", "chain", "id", "path", "root")

    def __init__(self, peer_id: SpiffeId | None, path: tuple[x509.Certificate, ...]) -> None:
        self.id = peer_id
        self.path = path
        self.chain = path[:-1] or path
        """Up to, without, the root; a leaf that is a root itself is both."""
        self.root = path[-1]


_peers: weakref.WeakValueDictionary[bytes, Peer] = weakref.WeakValueDictionary()  # by the signature of the leaf


def _nobody(_: SpiffeId) -> bool:
    return False


class PeerCheck:
    """What the verification of one connection's peer came to; written by OpenSSL's callback."""

    __slots__ = ("accepted", "authorize", "expectation", "fault", "idle", "path", "peer_id", "problem", "revoked")

    def __init__(self, expectation: Expectation, authorize: Authorize | None) -> None:
        self.expectation = expectation
        self.authorize = authorize
        self.path: tuple[x509.Certificate, ...] = ()
        self.problem: str | None = None
        self.revoked = False
        """The problem is a revocation."""
        self.fault: BaseException | None = None
        """What `authorize` raised, if it did."""
        self.peer_id: SpiffeId | None = None
        self.accepted = False
        self.idle = 0
        """Messages of TLS itself since the last that carried data."""

    def on_info(self, where: int) -> None:
        """OpenSSL tells of a handshake message after the handshake: KeyUpdate, or a ticket."""
        if where & SSL.SSL_CB_EXIT:
            self.idle += 1

    def settle(self) -> Peer:
        """The peer, once the handshake that verified it is complete; what only a handshake needs is let go.

        Only what a verification has just produced is looked up here: no certificate is trusted for being known.
        """
        path = self.path
        signature = path[0].signature  # a certificate's own hash is of all of it, and dear
        peer = _peers.get(signature)
        if peer is None or peer.path != path or peer.id != self.peer_id:
            peer = _peers[signature] = Peer(self.peer_id, path)
        self.peer_id = peer.id
        self.path = ()
        self.authorize = _nobody
        return peer

    def refuse(self, number: int, depth: int, certificate: x509.Certificate) -> None:
        """OpenSSL found error `number` at `certificate`, `depth` steps above the leaf."""
        if self.problem is None:
            try:
                self.problem = _explain(number, depth, certificate, self.expectation)
            except UNPARSABLE:  # anyone may send such a certificate: it is no fault of ours
                self.problem = _reason(number, "the peer's certificate")

    def add(self, certificate: x509.Certificate, depth: int) -> bool:
        """OpenSSL found the path to be in order, and tells it from the root down to the leaf."""
        self.path = (certificate, *self.path)
        if depth:
            return True
        try:
            self.peer_id = self.expectation.judge(self.path)
        except PeerIdentityError as error:
            self.problem = str(error)
            self.revoked = isinstance(error, PeerRevokedError)
            return False
        except UNPARSABLE as error:
            self.problem = f"the peer's certificate cannot be parsed: {' '.join(str(error).split())[:100]}"
            return False
        if self.authorize is not None and (self.peer_id is None or not self.authorize(self.peer_id)):
            self.problem = f"the peer is {self.peer_id or 'without a SPIFFE ID'}, who is not authorized"
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


def on_verify(connection: SSL.Connection, certificate: crypto.X509, number: int, depth: int, ok: int) -> bool:
    """What pyOpenSSL calls for each certificate of a peer's path."""
    return _judge(connection, certificate.to_cryptography(), number, depth, bool(ok))


ON_VERIFY = verify_callback(_judge) if DIRECT else None
"""`on_verify` for OpenSSL itself."""


def _on_info(connection: SSL.Connection, where: int) -> None:
    check: PeerCheck = connection.get_app_data()
    check.on_info(where)


ON_INFO = info_callback(_on_info) if DIRECT else None
"""`PeerCheck.on_info` for OpenSSL."""


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
    return _reason(number, who)


def _reason(number: int, who: str) -> str:
    """OpenSSL's own words."""
    reason = ffi.string(lib.X509_verify_cert_error_string(number)).decode() if DIRECT else f"error {number}"
    return f"{who} is refused: {reason}"


def _uris(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return names.get_values_for_type(x509.UniformResourceIdentifier)[:3]
    except (x509.ExtensionNotFound, *UNPARSABLE):
        return []


def _authority_key(certificate: x509.Certificate) -> str:
    try:
        identifier = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    except (x509.ExtensionNotFound, *UNPARSABLE):
        return ""
    return f" (key id {identifier.hex()})" if identifier else ""
