"""May this certificate speak for an identity, and may that identity come? Pure decisions on parsed certificates."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import TYPE_CHECKING

from hbone.errors import IdentityError, PeerIdentityError
from hbone.identity.spiffe import SpiffeId, quoted
from hbone.identity.svid import check_ca, svid_id, validity_problem

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cryptography import x509

    from hbone.identity.svid import TrustBundle

__all__ = ["Authorizer", "allow", "any_peer", "same_trust_domain", "verify_peer_chain"]

Authorizer = Callable[[SpiffeId, SpiffeId], bool]
"""Says whether `(peer, own)` may talk."""


def verify_peer_chain(
    leaf: x509.Certificate,
    chain: Sequence[x509.Certificate],
    root: x509.Certificate,
    bundles: Mapping[str, TrustBundle],
    now: datetime.datetime | None = None,
) -> SpiffeId:
    """The identity that `leaf` proves.

    The signatures from `leaf` over `chain` to `root` must have been verified already; this adds what a TLS
    library does not know. `root` is the one that the verified path really ended in: a root of one trust domain
    must not sign for another.

    Args:
        leaf: the peer's certificate.
        chain: intermediates between the two, without `leaf` and `root`.
        root: where the verified path ended.
        bundles: the roots of each trust domain that we know.
        now: the moment to judge validity at, aware; the system's clock when None.

    Raises:
        PeerIdentityError: the first rule that is broken.

    Source: X509-SVID 2 to 5; SPIFFE trust domain and bundle 4.
    """
    moment = now or datetime.datetime.now(datetime.UTC)
    try:
        spiffe_id = svid_id(leaf)
        for certificate in chain:
            check_ca(certificate)
    except IdentityError as error:
        raise PeerIdentityError(f"the peer's certificate is refused: {error}") from error
    problem = validity_problem(leaf, moment)
    if problem:
        raise PeerIdentityError(f"the certificate of {spiffe_id} is refused: {problem}")
    bundle = bundles.get(spiffe_id.trust_domain)
    if bundle is None:
        known = ", ".join(sorted(bundles)) or "none"
        raise PeerIdentityError(
            f"{spiffe_id} is of trust domain {spiffe_id.trust_domain}, for which we hold no roots (we hold: {known})"
        )
    if root not in bundle.roots:
        raise PeerIdentityError(
            f"the certificate of {spiffe_id} was signed under root {quoted(root.subject.rfc4514_string())},"
            f" which is not a root of trust domain {spiffe_id.trust_domain}"
        )
    return spiffe_id


def same_trust_domain(peer: SpiffeId, own: SpiffeId) -> bool:
    """Any peer of our own trust domain."""
    return peer.trust_domain == own.trust_domain


def any_peer(peer: SpiffeId, own: SpiffeId) -> bool:
    """Any peer whose certificate was verified, of every trust domain that we hold roots for."""
    return True


def allow(*patterns: str | SpiffeId) -> Authorizer:
    """An authorizer for the listed peers.

    A pattern is a SPIFFE ID, or one whose last segment is `*`: it stands for one or more segments, so
    `spiffe://cluster.local/ns/shop/*` is all of a namespace and `spiffe://cluster.local/*` all of a trust domain.

    Raises:
        IdentityError: no pattern, or a malformed one.
    """
    if not patterns:
        raise IdentityError("allow() was given no identity; name at least one, or use any_peer")
    exact: set[SpiffeId] = set()
    prefixes: list[tuple[str, str]] = []
    for pattern in patterns:
        if isinstance(pattern, SpiffeId):
            exact.add(pattern)
            continue
        head, star, tail = pattern.partition("*")
        if not star:
            exact.add(SpiffeId.parse(pattern))
            continue
        if tail or not head.endswith("/") or head.count("/") < 3:
            raise IdentityError(
                f"pattern {quoted(pattern)} is malformed; * may only stand as the whole last segment,"
                " as in spiffe://cluster.local/ns/shop/*"
            )
        prefix = SpiffeId.parse(head[:-1])
        prefixes.append((prefix.trust_domain, prefix.path + "/"))

    def authorize(peer: SpiffeId, own: SpiffeId) -> bool:
        return peer in exact or any(
            peer.trust_domain == domain and peer.path.startswith(path) for domain, path in prefixes
        )

    return authorize
