"""CSR -> certificate: one call to the CA, and a strict reading of its answer."""

from __future__ import annotations

import datetime
import time
from typing import TYPE_CHECKING, Protocol

import trio
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.message import DecodeError

from hbone.errors import HboneError, IdentityError
from hbone.grpc import GrpcError, GrpcUnavailable
from hbone.identity import Identity, TrustBundle, X509Svid
from hbone.identity.svid import UNPARSABLE, svid_id, validity_problem
from ztunnel.control.transport import REMEDY, ControlPlaneError, Unreachable, refusal, request_metadata
from ztunnel.wire import ca_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hbone.identity import SpiffeId
    from ztunnel.control.transport import Dial, TokenSource

__all__ = ["CREATE_CERTIFICATE", "CaClient", "CertificateAuthority", "make_csr", "read_answer"]

CREATE_CERTIFICATE = "/istio.v1.auth.IstioCertificateService/CreateCertificate"
CALL_TIMEOUT = 10.0
"""Seconds for one request to the CA, dial and answer together."""
MAX_ROOTS = 64
"""Roots of a bundle."""
MAX_CHAIN = 16
"""Elements of an answer's chain; a mesh has one or two intermediates."""


class CertificateAuthority(Protocol):
    """Who makes certificates: the CA client, or a script in a test."""

    async def create(self, spiffe_id: SpiffeId, current: Identity | None) -> Identity:
        """A new certificate for `spiffe_id`; raises ControlPlaneError."""
        ...


def make_csr(key: ec.EllipticCurvePrivateKey, spiffe_id: SpiffeId) -> str:
    """A certificate request in PEM: empty subject, one critical subjectAltName with one URI.

    Source: Istio's ztunnel, CSR.
    """
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(spiffe_id))])
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(names, critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def read_answer(
    chain: Sequence[str],
    key: ec.EllipticCurvePrivateKey,
    expected: SpiffeId,
    *,
    now: datetime.datetime,
    warn: Callable[[str], None] = lambda _: None,
) -> Identity:
    """Check what the CA sent and make an identity of it: leaf, then intermediates, last the bundle of roots.

    Args:
        chain: The elements of `cert_chain`.
        key: The key whose public half was in the request.
        expected: The identity that was asked for.
        now: Wall clock; an answer outside its own validity is refused.
        warn: Gets one sentence for what is wrong but harmless.

    Raises:
        ControlPlaneError: anything else than a usable certificate for `expected`.

    Source: istio.v1.auth.IstioCertificateResponse.
    """
    if not chain:
        raise ControlPlaneError("the CA's answer is empty")
    if len(chain) == 1:
        raise ControlPlaneError("the CA's answer has a certificate but no root; its last element must be the roots")
    if len(chain) > MAX_CHAIN:
        raise ControlPlaneError(f"the CA's answer has {len(chain)} elements; at most {MAX_CHAIN} are accepted")
    leaf = _first_certificate(chain[0], "certificate")
    middle = [_first_certificate(pem, "intermediate certificate") for pem in chain[1:-1]]
    try:
        found = svid_id(leaf)
        if found != expected:
            raise ControlPlaneError(f"the CA answered with a certificate for {found}; we asked for {expected}")
        svid = X509Svid(expected, (leaf, *middle), key)
    except IdentityError as error:
        raise ControlPlaneError(f"the CA's certificate cannot be used: {error}") from error
    check_validity(svid, now)
    bundle = read_roots(chain[-1].encode(), expected.trust_domain, warn)
    check_path(svid, bundle)
    return Identity(svid, bundle)


def read_roots(pem: bytes, trust_domain: str, warn: Callable[[str], None] = lambda _: None) -> TrustBundle:
    """The roots of a bundle; one that cannot be used costs a warning.

    Raises:
        ControlPlaneError: none can be used.
    """
    roots: list[x509.Certificate] = []
    for block in _pem_blocks(pem)[:MAX_ROOTS]:
        try:
            roots.extend(TrustBundle(trust_domain, (x509.load_pem_x509_certificate(block),)).roots)
        except UNPARSABLE as error:  # IdentityError among them
            warn(f"a root that came with the certificate is ignored: {error}")
    if not roots:
        raise ControlPlaneError("there is no usable root with the certificate")
    return TrustBundle(trust_domain, roots)


def check_validity(svid: X509Svid, now: datetime.datetime) -> None:
    """Refuse a certificate that is not valid now; most often it is a clock that is wrong.

    Raises:
        ControlPlaneError: not yet, or no longer.
    """
    problem = validity_problem(svid.leaf, now)
    if problem or now >= svid.expires_at:
        raise ControlPlaneError(f"the certificate of {svid.id} cannot be used: {problem or 'it expires now'}")


def check_path(svid: X509Svid, bundle: TrustBundle) -> None:
    """Refuse a chain that does not end in one of the roots: no peer would accept it either.

    Raises:
        ControlPlaneError: it does not.
    """
    if not any(_signed_by(svid.chain[-1], root) for root in bundle.roots):
        raise ControlPlaneError("the certificate's chain does not end in any of the roots that came with it")


def _signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _pem_blocks(pem: bytes) -> list[bytes]:
    begin, end = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"
    return [begin + part.partition(end)[0] + end + b"\n" for part in pem.split(begin)[1:]]


def _first_certificate(pem: str, what: str) -> x509.Certificate:
    blocks = _pem_blocks(pem.encode())
    if not blocks:
        raise ControlPlaneError(f"the CA's answer holds no PEM certificate where its {what} should be")
    try:
        return x509.load_pem_x509_certificate(blocks[0])
    except UNPARSABLE as error:
        raise ControlPlaneError(f"the {what} in the CA's answer cannot be read: {error}") from None


class CaClient:
    """Asks the CA for certificates, with a token or, for renewals without one, with the certificate it has."""

    def __init__(
        self,
        dial: Dial,
        *,
        lifetime: float,
        token: TokenSource | None = None,
        cluster_id: str = "Kubernetes",
        headers: Sequence[tuple[str, str]] = (),
        wall: Callable[[], float] = time.time,
        warn: Callable[[str], None] = lambda _: None,
        remedy: str = REMEDY,
    ) -> None:
        """Remember how to ask.

        Args:
            dial: Opens a channel to the CA.
            lifetime: Wanted lifetime in seconds (`SECRET_TTL`).
            token: Where the bearer token comes from.
            cluster_id: Sent with a token.
            headers: `CA_HEADER_*`.
            wall: Wall clock, seconds since 1970.
            warn: Gets one sentence for what is wrong but harmless.
            remedy: How this host gets a certificate when it has nothing to show; for people.
        """
        self._remedy = remedy
        self._dial = dial
        self._lifetime = lifetime
        self._token = token
        self._cluster_id = cluster_id
        self._headers = tuple(headers)
        self._wall = wall
        self._warn = warn

    async def create(self, spiffe_id: SpiffeId, current: Identity | None) -> Identity:
        """Ask for a certificate for `spiffe_id`, with a key made for it.

        Args:
            spiffe_id: Whose certificate.
            current: The certificate in use, presented when there is no token.

        Raises:
            ControlPlaneError: the CA cannot be reached within 10 s, refuses, or its answer cannot be used.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        presented = None
        if self._token is None and current is not None and self._wall() < current.svid.expires_at.timestamp():
            presented = current
        chain = await self.ask(spiffe_id, key, presented)
        now = datetime.datetime.fromtimestamp(self._wall(), datetime.UTC)
        return read_answer(chain, key, spiffe_id, now=now, warn=self._warn)

    async def ask(
        self, spiffe_id: SpiffeId, key: ec.EllipticCurvePrivateKey, presented: Identity | None = None
    ) -> list[str]:
        """Send the request for a certificate of `key`; the answer's chain as it came, to be read by `read_answer`.

        Raises:
            ControlPlaneError: the CA cannot be reached within 10 s, or refuses.
        """
        request = ca_pb2.IstioCertificateRequest(
            csr=make_csr(key, spiffe_id), validity_duration=max(1, round(self._lifetime))
        ).SerializeToString()
        metadata = request_metadata(self._token, self._cluster_id, self._headers)
        try:
            with trio.fail_after(CALL_TIMEOUT):
                async with self._dial(presented) as channel:
                    raw = await channel.unary(CREATE_CERTIFICATE, request, metadata)
        except trio.TooSlowError:
            raise Unreachable(f"the CA did not answer within {CALL_TIMEOUT:g} s") from None
        except ControlPlaneError:
            raise
        except GrpcUnavailable as error:
            raise Unreachable(f"the connection to the CA failed: {error.message}") from error
        except GrpcError as error:
            known = self._token is not None or presented is not None
            raise ControlPlaneError(f"the CA answered {refusal(error, known, self._remedy)}") from error
        except (HboneError, OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise Unreachable(f"the connection to the CA failed: {error}") from error
        try:
            answer = ca_pb2.IstioCertificateResponse.FromString(raw)
        except DecodeError:
            raise ControlPlaneError("the CA's answer is no IstioCertificateResponse") from None
        return list(answer.cert_chain)
