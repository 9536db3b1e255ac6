"""Documents of Istio's own kinds: read strictly, with the line of every value, so that errors can name it.

A document is refused rather than half understood: an unknown field, or one that a layer 4 proxy cannot enforce, is an
error with the file, the line and what to do. Nothing here reads files; `miniistiod.watch` does.
"""

from miniistiod.resources.findings import Finding, Severity
from miniistiod.resources.load import Delta, Loader, ResourceSet, load
from miniistiod.resources.model import (
    AuthorizationPolicy,
    EndpointSlice,
    Gateway,
    GatewayClass,
    KubernetesService,
    MeshConfig,
    Namespace,
    PeerAuthentication,
    Resource,
    Route,
    ServiceEntry,
    WorkloadEntry,
    WorkloadGroup,
)

__all__ = [
    "AuthorizationPolicy",
    "Delta",
    "EndpointSlice",
    "Finding",
    "Gateway",
    "GatewayClass",
    "KubernetesService",
    "Loader",
    "MeshConfig",
    "Namespace",
    "PeerAuthentication",
    "Resource",
    "ResourceSet",
    "Route",
    "ServiceEntry",
    "Severity",
    "WorkloadEntry",
    "WorkloadGroup",
    "load",
]
