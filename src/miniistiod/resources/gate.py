"""What stands before the conversion: errors between documents, for which a set is not used.

A policy or a route that is for a waypoint has no effect in a ztunnel. Nobody here programs waypoints, so it is refused,
unless its Gateway says by annotation who does; then a warning names who enforces it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from miniistiod.resources.binding import Key, Traffic, bind
from miniistiod.resources.findings import Finding, Severity
from miniistiod.resources.gateway import GATEWAY_GROUP
from miniistiod.resources.model import (
    AuthorizationPolicy,
    Gateway,
    KubernetesService,
    MeshConfig,
    PeerAuthentication,
    Resource,
    Route,
    ServiceEntry,
    Target,
    Visibility,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = ["PROGRAMMED_BY", "concerns", "findings"]

PROGRAMMED_BY = "miniistiod/waypoint-programmed-by"
"""On a Gateway: who programs its waypoint; what is bound to it is theirs to enforce."""
_KINDS = {
    ("Service", ""): "Service",
    ("Service", "core"): "Service",
    ("ServiceEntry", "networking.istio.io"): "ServiceEntry",
}


def concerns(resource: Resource) -> bool:
    """Whether a document must be looked at together with others."""
    return (
        isinstance(resource, Route)
        or (isinstance(resource, AuthorizationPolicy) and bool(resource.targets))
        or (isinstance(resource, PeerAuthentication) and resource.selector is not None)
    )


def findings(watched: Iterable[Resource], documents: Mapping[Key, Resource], mesh: MeshConfig) -> list[Finding]:
    """Everything that is wrong between documents.

    Args:
        watched: those of which `concerns` is true.
        documents: all of them.
        mesh: the settings of all.
    """
    found: list[Finding] = []
    for item in watched:
        if isinstance(item, PeerAuthentication):
            if item.meta.namespace == mesh.root_namespace:
                found.append(_root_selector(item, mesh.root_namespace))
        elif isinstance(item, AuthorizationPolicy):
            found.extend(_bound(item, item.targets, documents, mesh))
        elif isinstance(item, Route):
            found.extend(_bound(item, item.parents, documents, mesh))
    return found


def _root_selector(item: PeerAuthentication, root_namespace: str) -> Finding:
    return Finding(
        item.meta.path,
        item.meta.line,
        Severity.ERROR,
        f"a selector in the root namespace {root_namespace} has no effect",
        "move the PeerAuthentication to the workload's namespace",
    )


def _bound(
    item: Resource, targets: Iterable[Target], documents: Mapping[Key, Resource], mesh: MeshConfig
) -> Iterator[Finding]:
    title = f"{item.meta.kind} {item.meta.namespace}/{item.meta.name}"
    for target in targets:
        where = f"{target.kind} {target.namespace}/{target.name}"
        gateways, what, fix = _gateways(item, target, documents, mesh)
        for gateway in gateways:
            name = f"{gateway.meta.namespace}/{gateway.meta.name}"
            who = gateway.meta.annotations.get(PROGRAMMED_BY)
            if not who:
                what = f"nobody here programs the waypoint {name}, so it would have no effect"
                fix = f"if somebody else does, annotate the Gateway with {PROGRAMMED_BY}: WHO; else remove the document"
            elif not gateway.addresses:
                what = f"the waypoint {name} has no address, so traffic would go past it"
                fix = "add status.addresses to the Gateway"
            else:
                yield Finding(
                    item.meta.path,
                    target.line,
                    Severity.WARNING,
                    f"{title} is enforced by {who} in the waypoint {name}, and by nobody here",
                    "see that it is in force there",
                )
        if what:
            yield Finding(item.meta.path, target.line, Severity.ERROR, f"{title} is bound to {where}: {what}", fix)


def _gateways(
    item: Resource, target: Target, documents: Mapping[Key, Resource], mesh: MeshConfig
) -> tuple[list[Gateway], str, str]:
    """The waypoints that must enforce something; else what is wrong, and how to mend it."""
    policy = isinstance(item, AuthorizationPolicy)
    if policy and target.namespace != item.meta.namespace:
        return [], "it is of another namespace", "move the policy there"
    if (target.kind, target.group) == ("Gateway", GATEWAY_GROUP):
        found = documents.get(("Gateway", target.namespace, target.name))
        if not isinstance(found, Gateway):
            return [], "there is no such Gateway", "correct the name, or add the Gateway"
        return [found], "", ""
    name = _KINDS.get((target.kind, target.group))
    if name is None:
        what = f"nothing can be bound to a {target.kind} of group {target.group!r} here"
        return [], what, f"name a Gateway of {GATEWAY_GROUP}, a Service of core, a ServiceEntry of networking.istio.io"
    service = documents.get((name, target.namespace, target.name))
    if not isinstance(service, KubernetesService | ServiceEntry):
        return [], f"there is no such {name}", "correct the name, or add it"
    meta = service.meta
    home = documents.get(("Namespace", "", meta.namespace))
    seen = mesh.visibility_of(meta.namespace, home.meta.labels if home is not None else {})
    public = isinstance(service, KubernetesService) or seen is Visibility.PUBLIC
    binding = bind(meta.namespace, meta.labels, meta.annotations, Traffic.SERVICE, documents, public=public)
    if binding.primary is None:
        reason = f" ({binding.condition.text})" if binding.condition is not None else ""
        return [], f"it has no waypoint{reason}", "label it istio.io/use-waypoint: NAME of a waypoint that admits it"
    return [binding.primary, *([binding.canary] if binding.canary is not None else [])], "", ""
