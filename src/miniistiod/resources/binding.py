"""Which waypoint stands before an object: labels of the object and its namespace -> a Gateway, or why there is none.

Source: Istio's ambient waypoint binding (labels, their precedence, the reasons of the condition WaypointBound).
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import attrs

from miniistiod.resources.gateway import INBOUND_BINDING, WAYPOINT_FOR
from miniistiod.resources.model import AllowedNamespaces, Gateway, GatewayClass, LabelSelector, Namespace

if TYPE_CHECKING:
    from collections.abc import Mapping

    from miniistiod.resources.model import Metadata, Resource

__all__ = ["Binding", "Condition", "Key", "Traffic", "bind", "inbound_binding", "instance_of", "is_waypoint_instance"]

Key = tuple[str, str, str]
"""Kind, namespace and name."""

WAYPOINT_BOUND = "istio.io/WaypointBound"
USE = "istio.io/use-waypoint"
CANARY = "istio.io/use-waypoint-canary"
CANARY_WEIGHT = "istio.io/use-waypoint-canary-weight"
INGRESS = "istio.io/ingress-use-waypoint"
MANAGED = "gateway.istio.io/managed"
GATEWAY_NAME = "gateway.networking.k8s.io/gateway-name"
REMOTE_CLASS = "istio-remote"
MESH_CONTROLLER_CLASS = "istio-waypoint"
HBONE_PORT = 15_008
_CONTROLLERS = ("istio.io-mesh-controller", "istio.io-eastwest-controller")
_NOT_WAYPOINTS = (REMOTE_CLASS, "istio-east-west")
_TRUE, _FALSE = ("1", "t", "T", "TRUE", "true", "True"), ("0", "f", "F", "FALSE", "false", "False")


class Traffic(enum.Enum):
    """What a waypoint is asked to take."""

    SERVICE = "service"
    WORKLOAD = "workload"


@attrs.frozen
class Condition:
    """What Istio would write into an object's status."""

    type: str
    ok: bool
    reason: str
    text: str = ""


@attrs.frozen(kw_only=True)
class Binding:
    """The waypoints of an object."""

    primary: Gateway | None = None
    canary: Gateway | None = None
    """Gets `weight` of a hundred connections."""
    weight: int = 0
    ingress: bool = False
    """Gateways into the mesh go through the waypoint too."""
    condition: Condition | None = None
    asked: tuple[tuple[str, str], ...] = ()
    """Namespaces and names of Gateways that this depends on, found or not."""


def bind(
    namespace: str,
    labels: Mapping[str, str],
    annotations: Mapping[str, str],
    traffic: Traffic,
    documents: Mapping[Key, Resource],
    *,
    public: bool = True,
) -> Binding:
    """The waypoints of an object.

    Args:
        namespace: the object's.
        labels: the object's.
        annotations: the object's.
        traffic: what the object is.
        documents: where Gateways, their classes and Namespaces are looked up.
        public: false where nobody outside of the namespace sees the object: then its waypoint must be inside too.
    """
    home = documents.get(("Namespace", "", namespace))
    inherited: Mapping[str, str] = home.meta.labels if home is not None else {}
    own = labels.get(USE)
    name, level = (own, labels) if own is not None else (inherited.get(USE), inherited)
    if name is None or name == "none":
        return Binding()
    place = (level.get(f"{USE}-namespace") or namespace, name)
    gateway, reason = _attach(place, namespace, traffic, documents, public=public)
    if gateway is None:
        if traffic is Traffic.WORKLOAD and own is None and reason == "UnsupportedTrafficType":
            return Binding(asked=(place,))  # a namespace's waypoint for services only says nothing of workloads
        text = f"waypoint {place[0]}/{place[1]}: {_TEXTS[reason]}"
        return Binding(condition=Condition(WAYPOINT_BOUND, False, reason, text), asked=(place,))
    ingress, malformed = _ingress(labels, inherited)
    result = Binding(primary=gateway, ingress=ingress, asked=(place,))
    condition = Condition(WAYPOINT_BOUND, True, "WaypointAccepted", f"bound to {place[0]}/{place[1]}")
    if malformed is not None and traffic is Traffic.SERVICE:
        text = f"{INGRESS} is {malformed!r}, neither true nor false"
        condition = Condition(WAYPOINT_BOUND, False, "IngressUseWaypointMalformed", text)
    second, weights = labels.get(CANARY), annotations
    level = labels
    if second is None and own is None:
        second, level = inherited.get(CANARY), inherited
        weights = home.meta.annotations if home is not None else {}
    if second is None:
        return attrs.evolve(result, condition=condition)
    other = (level.get(f"{CANARY}-namespace") or namespace, second)
    result = attrs.evolve(result, asked=(place, other))
    weight = weights.get(CANARY_WEIGHT, "0")
    if other == place:
        text = f"the second waypoint is {place[0]}/{place[1]} too"
        return attrs.evolve(result, condition=Condition(WAYPOINT_BOUND, False, "CanarySameAsPrimary", text))
    if not (weight.isascii() and weight.isdigit() and len(weight) <= 3 and int(weight) <= 100):
        text = f"{CANARY_WEIGHT} is {weight!r}, not a number from 0 to 100"
        return attrs.evolve(result, condition=Condition(WAYPOINT_BOUND, False, "CanaryInvalidWeight", text))
    canary, reason = _attach(other, namespace, traffic, documents, public=public)
    if canary is None:
        text = f"second waypoint {other[0]}/{other[1]}: {_TEXTS[reason]}"
        return attrs.evolve(result, condition=Condition(WAYPOINT_BOUND, False, reason, text))
    return attrs.evolve(result, canary=canary, weight=int(weight), condition=condition)


_TEXTS = {
    "WaypointIsNotReady": "there is no such waypoint Gateway, or it has no address",
    "CrossNamespaceWaypointForbidden": "it is of another namespace, which does not see this object",
    "AttachmentDenied": "its listener does not admit this namespace (allowedRoutes)",
    "UnsupportedTrafficType": "it is not for this kind of traffic (istio.io/waypoint-for)",
}


def _attach(
    place: tuple[str, str], namespace: str, traffic: Traffic, documents: Mapping[Key, Resource], *, public: bool
) -> tuple[Gateway | None, str]:
    found = documents.get(("Gateway", *place))
    if not isinstance(found, Gateway) or not found.addresses or found.class_name in _NOT_WAYPOINTS:
        return None, "WaypointIsNotReady"
    if not public and place[0] != namespace:
        return None, "CrossNamespaceWaypointForbidden"
    home = documents.get(("Namespace", "", namespace))
    if not admits(found, namespace, home if isinstance(home, Namespace) else None):
        return None, "AttachmentDenied"
    takes = _of_class(found, documents, "labels", WAYPOINT_FOR) or Traffic.SERVICE.value
    if takes not in (traffic.value, "all"):
        return None, "UnsupportedTrafficType"
    return found, ""


def admits(gateway: Gateway, namespace: str, home: Namespace | None) -> bool:
    """Whether a Gateway lets objects of a namespace attach."""
    allowed, selector = AllowedNamespaces.SAME, LabelSelector()
    for listener in gateway.listeners:
        if (listener.protocol == "HBONE" and listener.port == HBONE_PORT) or listener.protocol == "istio.io/PROXY":
            allowed, selector = listener.allowed, listener.selector or selector
            break
    if allowed is AllowedNamespaces.SELECTOR:
        known = {"kubernetes.io/metadata.name": namespace, **(home.meta.labels if home is not None else {})}
        return selector.matches(known)
    return allowed is AllowedNamespaces.ALL or gateway.meta.namespace == namespace


def _of_class(gateway: Gateway, documents: Mapping[Key, Resource], where: str, name: str) -> str | None:
    """A label or annotation of a Gateway, else of its class."""
    own: str | None = getattr(gateway.meta, where).get(name)
    if own is not None:
        return own
    found = documents.get(("GatewayClass", "", gateway.class_name))
    inherited: str | None = getattr(found.meta, where).get(name) if isinstance(found, GatewayClass) else None
    return inherited


def _ingress(labels: Mapping[str, str], inherited: Mapping[str, str]) -> tuple[bool, str | None]:
    """Whether ingress is to use the waypoint, and a value that says neither yes nor no."""
    value = labels.get(INGRESS, inherited.get(INGRESS))
    if value is None or value in _FALSE:
        return False, None
    return (True, None) if value in _TRUE else (False, value)


def is_waypoint_instance(labels: Mapping[str, str]) -> bool:
    """Whether a workload is a waypoint itself; then it has none."""
    return labels.get(MANAGED) in _CONTROLLERS


def inbound_binding(
    meta: Metadata, labels: Mapping[str, str], documents: Mapping[Key, Resource]
) -> tuple[str, int] | None:
    """How a waypoint's own instance wants its connections wrapped: protocol and port (0: that of the connection)."""
    place = instance_of(meta, labels)
    found = documents.get(("Gateway", *place)) if place is not None else None
    if not isinstance(found, Gateway):
        return None
    protocol, _, port = (_of_class(found, documents, "annotations", INBOUND_BINDING) or "").partition("/")
    return (protocol, int(port or 0)) if protocol == "PROXY" else None


def instance_of(meta: Metadata, labels: Mapping[str, str]) -> tuple[str, str] | None:
    """The Gateway of which a workload is an instance."""
    name = labels.get(GATEWAY_NAME)
    return (meta.namespace, name) if name is not None and is_waypoint_instance(labels) else None
