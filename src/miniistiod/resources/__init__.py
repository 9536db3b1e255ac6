"""Documents of Istio's own kinds: read strictly, with the line of every value, so that errors can name it.

A document is refused rather than half understood: an unknown field, or one that a layer 4 proxy cannot enforce, is an
error with the file, the line and what to do. Nothing here reads files; `miniistiod.watch` does.
"""

from miniistiod.resources.findings import Finding, Severity
from miniistiod.resources.load import Loader, ResourceSet, load
from miniistiod.resources.model import (
    AuthorizationPolicy,
    KubernetesService,
    MeshConfig,
    Namespace,
    PeerAuthentication,
    ServiceEntry,
    WorkloadEntry,
)

__all__ = [
    "AuthorizationPolicy",
    "Finding",
    "KubernetesService",
    "Loader",
    "MeshConfig",
    "Namespace",
    "PeerAuthentication",
    "ResourceSet",
    "ServiceEntry",
    "Severity",
    "WorkloadEntry",
    "load",
]
