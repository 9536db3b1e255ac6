"""SPIFFE identities: IDs, X.509-SVIDs, trust bundles, their sources, and the rules for a peer's certificate."""

from hbone.identity.revocation import RevocationLists, RevocationSource, Revoked
from hbone.identity.sources import FileSource, Identity, IdentitySource, StaticSource
from hbone.identity.spiffe import SpiffeId, TrustDomain
from hbone.identity.svid import ServerCertificate, TrustBundle, TrustBundles, X509Svid
from hbone.identity.verify import Authorizer, allow, any_peer, same_trust_domain, verify_peer_chain

__all__ = [
    "Authorizer",
    "FileSource",
    "Identity",
    "IdentitySource",
    "RevocationLists",
    "RevocationSource",
    "Revoked",
    "ServerCertificate",
    "SpiffeId",
    "StaticSource",
    "TrustBundle",
    "TrustBundles",
    "TrustDomain",
    "X509Svid",
    "allow",
    "any_peer",
    "same_trust_domain",
    "verify_peer_chain",
]
