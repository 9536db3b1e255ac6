"""What Istio would write into the status of documents: whether a policy is enforced, and which waypoint is bound.

Source: Istio's conditions WaypointBound, WaypointMissing, ZtunnelAccepted, WaypointAccepted (types and reasons).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from miniistiod.policies import is_layer_4
from miniistiod.resources.binding import MESH_CONTROLLER_CLASS, Condition, Traffic, bind, is_waypoint_instance
from miniistiod.resources.gateway import GATEWAY_GROUP
from miniistiod.resources.model import (
    Action,
    AuthorizationPolicy,
    Gateway,
    GatewayClass,
    KubernetesService,
    Match,
    Route,
    ServiceEntry,
    Target,
    Visibility,
    WorkloadEntry,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from miniistiod.registry import Registry
    from miniistiod.resources.binding import Binding
    from miniistiod.resources.model import Resource, Rule

__all__ = ["conditions_of", "every_condition"]


def every_condition(registry: Registry) -> dict[str, list[dict[str, Any]]]:
    """Conditions of all documents that have any, by `Kind namespace/name`."""
    found: dict[str, list[dict[str, Any]]] = {}
    for key in sorted(registry.documents):
        items = conditions_of(registry, registry.documents[key])
        if items:
            found[f"{key[0]} {key[1]}/{key[2]}"] = [attrs.asdict(item) for item in items]
    return found


def conditions_of(registry: Registry, item: Resource) -> list[Condition]:
    """Conditions of one document."""
    if isinstance(item, AuthorizationPolicy):
        return _of_policy(registry, item)
    if isinstance(item, Route):
        missing = [target for target in item.parents if not _accepted(registry, target).ok]
        return (
            [_waypoint_missing("NoWaypointForRoute", "nothing that it is bound to has a waypoint")] if missing else []
        )
    if isinstance(item, WorkloadEntry):
        instance = is_waypoint_instance(item.labels)  # has no waypoint itself
        return [] if instance else _some(_bind(registry, item, item.labels, Traffic.WORKLOAD).condition)
    if not isinstance(item, ServiceEntry | KubernetesService):
        return []
    visibility = registry.visibility(item)
    binding = _bind_service(registry, item)
    found = _some(binding.condition)
    if isinstance(item, ServiceEntry):
        if binding.primary is None and any(host.startswith("*") for host in item.hosts):
            text = "a ztunnel cannot tell the hosts of a wildcard apart"
            found.append(_waypoint_missing("NoWaypointForWildcardService", text))
        if visibility is not Visibility.PUBLIC:
            text = f"by serviceEntryVisibility: {visibility.value}"
            found.append(Condition("istio.io/VisibilityApplied", True, visibility.value.title(), text))
    return found


def _bind(
    registry: Registry, item: Resource, labels: Mapping[str, str], traffic: Traffic, *, public: bool = True
) -> Binding:
    meta = item.meta
    return bind(meta.namespace, labels, meta.annotations, traffic, registry.documents, public=public)


def _bind_service(registry: Registry, item: ServiceEntry | KubernetesService) -> Binding:
    public = registry.visibility(item) is Visibility.PUBLIC
    return _bind(registry, item, item.meta.labels, Traffic.SERVICE, public=public)


def _waypoint_missing(reason: str, text: str) -> Condition:
    return Condition("istio.io/WaypointMissing", True, reason, text)


def _some(item: Condition | None) -> list[Condition]:
    return [] if item is None else [item]


def _of_policy(registry: Registry, item: AuthorizationPolicy) -> list[Condition]:
    if item.targets:
        return [_accepted(registry, target, item) for target in item.targets]
    if not is_layer_4(item):
        what = "dry runs" if item.dry_run else f"the {item.action.value} action"
        return [Condition(_ZTUNNEL, False, _UNSUPPORTED, f"ztunnel does not support {what}")]
    fields = sorted({name for rule in item.rules for name in rule.requests})
    if not fields:
        return [Condition(_ZTUNNEL, True, "Accepted", "in force")]
    if item.action is Action.ALLOW:
        text = f"rules about requests ({', '.join(fields)}) are left out, which allows less"
    elif any(_can_fire(rule) for rule in item.rules):
        text = f"fields about requests ({', '.join(fields)}) are left out of its rules"
    else:
        text = f"no rule can ever match without {', '.join(fields)}; bind the policy to a waypoint"
    return [Condition(_ZTUNNEL, True, _UNSUPPORTED, text)]


_ZTUNNEL, _UNSUPPORTED = "ZtunnelAccepted", "UnsupportedValue"


def _can_fire(rule: Rule) -> bool:
    """Whether what is left of a rule without fields about requests can match."""
    return all(any(attrs.evolve(match, requests=()) != Match() for match in clause) for clause in rule.clauses)


def _accepted(registry: Registry, target: Target, policy: AuthorizationPolicy | None = None) -> Condition:
    place = f"{target.kind}.{target.group or 'core'}:{target.namespace}/{target.name}"
    found = registry.documents.get((target.kind, target.namespace, target.name))
    if (target.kind, target.group) == ("GatewayClass", GATEWAY_GROUP):
        if policy is None or policy.meta.namespace != registry.mesh.root_namespace:
            return Condition(_WAYPOINT, False, "Invalid", f"{place}: only for policies of the root namespace")
        known = registry.documents.get(("GatewayClass", "", target.name))
        controller = known.controller if isinstance(known, GatewayClass) else ""
        if (controller or _CONTROLLERS.get(target.name)) != MESH_CONTROLLER:
            reason = "TargetNotFound" if known is None else "Invalid"
            return Condition(_WAYPOINT, False, reason, f"{place} is not a class of waypoints")
    elif (target.kind, target.group) == ("Gateway", GATEWAY_GROUP):
        if not isinstance(found, Gateway) or not found.addresses:
            return Condition(_WAYPOINT, False, "TargetNotFound", f"{place} is not a waypoint")
    elif not isinstance(found, ServiceEntry | KubernetesService):
        return Condition(_WAYPOINT, False, "TargetNotFound", f"there is no {place}")
    elif _bind_service(registry, found).primary is None:
        return Condition(_WAYPOINT, False, "AncestorNotBound", f"{place} has no waypoint")
    return Condition(_WAYPOINT, True, "Accepted", f"bound to {place}")


_WAYPOINT = "WaypointAccepted"
MESH_CONTROLLER = "istio.io/mesh-controller"
_CONTROLLERS = {MESH_CONTROLLER_CLASS: MESH_CONTROLLER}
"""Of classes that are there without a document."""
