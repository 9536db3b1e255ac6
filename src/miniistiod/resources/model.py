"""Documents once they are read: plain values without YAML, in the terms of Istio's API."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    import datetime
    from collections.abc import Mapping

    from miniistiod.resources.reader import IpAddress, IpInterface, IpNetwork

__all__ = [
    "Action",
    "AllowedNamespaces",
    "AuthorizationPolicy",
    "Endpoint",
    "EndpointSlice",
    "Gateway",
    "GatewayClass",
    "KubernetesService",
    "LabelSelector",
    "Listener",
    "Match",
    "MeshConfig",
    "Metadata",
    "MtlsMode",
    "Namespace",
    "PeerAuthentication",
    "Requirement",
    "Resolution",
    "Resource",
    "Route",
    "Rule",
    "Selector",
    "ServiceEntry",
    "ServicePort",
    "SliceEndpoint",
    "SlicePort",
    "Target",
    "Visibility",
    "VisibilityRule",
    "WorkloadEntry",
    "WorkloadGroup",
]


@attrs.frozen(kw_only=True)
class Metadata:
    """What every document has."""

    kind: str
    namespace: str
    name: str
    labels: Mapping[str, str] = attrs.Factory(dict)
    annotations: Mapping[str, str] = attrs.Factory(dict)
    created: datetime.datetime | None = None
    path: str = ""
    """File that it stands in, relative to the directory."""
    line: int = 0
    position: int = 0
    """Number of the document within its file."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is told apart by."""
        return (self.kind, self.namespace, self.name)


@attrs.frozen(kw_only=True)
class Resource:
    """A document."""

    meta: Metadata


@attrs.frozen(kw_only=True)
class Namespace(Resource):
    """Labels and annotations that the objects of a namespace inherit."""


@attrs.frozen(kw_only=True)
class ServicePort:
    """A port of a service."""

    number: int
    name: str = ""
    protocol: str = ""
    target: int | str | None = None
    """A port of the workload: by number, or by name where the kind allows it."""


@attrs.frozen(kw_only=True)
class Endpoint:
    """One place where a service is; the body of a WorkloadEntry too."""

    address: IpAddress | str
    """An IP address, a host name, or empty where only a gateway reaches it."""
    ports: Mapping[str, int] = attrs.Factory(dict)
    labels: Mapping[str, str] = attrs.Factory(dict)
    network: str = ""
    locality: str = ""
    weight: int = 0
    service_account: str = ""


class Resolution(enum.Enum):
    """How the endpoints of a ServiceEntry are found."""

    NONE = "NONE"
    STATIC = "STATIC"
    DNS = "DNS"
    DNS_ROUND_ROBIN = "DNS_ROUND_ROBIN"
    DYNAMIC_DNS = "DYNAMIC_DNS"


@attrs.frozen(kw_only=True)
class WorkloadEntry(Resource):
    """A machine."""

    endpoint: Endpoint
    healthy: bool = True
    """False while its `Healthy` condition says so."""

    @property
    def labels(self) -> dict[str, str]:
        """For selection: those of the object win over those of the specification."""
        return {**self.endpoint.labels, **self.meta.labels}


@attrs.frozen(kw_only=True)
class WorkloadGroup(Resource):
    """What the WorkloadEntries of machines that register themselves are made from."""

    labels: Mapping[str, str] = attrs.Factory(dict)
    """Of each entry's metadata."""
    annotations: Mapping[str, str] = attrs.Factory(dict)
    template: Endpoint
    """Everything but the address."""


@attrs.frozen(kw_only=True)
class ServiceEntry(Resource):
    """Names and virtual addresses of a service, and where it is."""

    hosts: tuple[str, ...]
    addresses: tuple[IpAddress | IpNetwork, ...] = ()
    ports: tuple[ServicePort, ...] = ()
    resolution: Resolution = Resolution.NONE
    endpoints: tuple[Endpoint, ...] = ()
    selector: Mapping[str, str] | None = None
    subject_alt_names: tuple[str, ...] = ()
    status_addresses: tuple[tuple[str, IpAddress], ...] = ()
    """Host and address, as an earlier control plane allotted them."""


@attrs.frozen(kw_only=True)
class KubernetesService(Resource):
    """The part of a Kubernetes Service that has meaning without Kubernetes."""

    addresses: tuple[IpAddress, ...] = ()
    ports: tuple[ServicePort, ...] = ()
    selector: Mapping[str, str] | None = None
    publish_not_ready: bool = False
    internal_local: bool = False
    traffic_distribution: str | None = None
    families: tuple[str, ...] = ()
    """`IPv4`, `IPv6`; none: whatever its addresses are."""


@attrs.frozen(kw_only=True)
class SlicePort:
    """A port of an EndpointSlice; its name is that of a port of the Service."""

    name: str
    number: int


@attrs.frozen(kw_only=True)
class SliceEndpoint:
    """Something outside of the mesh that serves a Service."""

    addresses: tuple[IpAddress, ...]
    ready: bool = True


@attrs.frozen(kw_only=True)
class EndpointSlice(Resource):
    """Endpoints of a Service without selector."""

    service: str
    """The Service's name, in the same namespace."""
    endpoints: tuple[SliceEndpoint, ...] = ()
    ports: tuple[SlicePort, ...] = ()


@attrs.frozen(kw_only=True)
class Requirement:
    """One expression of a label selector."""

    key: str
    operator: str
    """`In`, `NotIn`, `Exists` or `DoesNotExist`."""
    values: tuple[str, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether labels meet it."""
        if self.operator == "Exists":
            return self.key in labels
        if self.operator == "DoesNotExist":
            return self.key not in labels
        found = labels.get(self.key) in self.values if self.key in labels else False
        return found if self.operator == "In" else not found


@attrs.frozen(kw_only=True)
class LabelSelector:
    """Kubernetes' selector of namespaces by their labels; an empty one selects all."""

    labels: Mapping[str, str] = attrs.Factory(dict)
    expressions: tuple[Requirement, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether labels meet all of it."""
        return all(labels.get(key) == value for key, value in self.labels.items()) and all(
            item.matches(labels) for item in self.expressions
        )


class AllowedNamespaces(enum.Enum):
    """Whose objects may attach to a Gateway."""

    SAME = "Same"
    ALL = "All"
    SELECTOR = "Selector"


@attrs.frozen(kw_only=True)
class Listener:
    """One listener of a Gateway."""

    port: int
    protocol: str
    allowed: AllowedNamespaces = AllowedNamespaces.SAME
    selector: LabelSelector | None = None


@attrs.frozen(kw_only=True)
class Gateway(Resource):
    """A waypoint, or the way into another network."""

    class_name: str
    listeners: tuple[Listener, ...] = ()
    addresses: tuple[IpAddress | str, ...] = ()
    """Where it is: IP addresses and host names. None: not ready."""


@attrs.frozen(kw_only=True)
class GatewayClass(Resource):
    """Labels and annotations that Gateways of the class inherit."""

    controller: str = ""
    """Who makes Gateways of the class work."""


@attrs.frozen(kw_only=True)
class Target:
    """What a policy or a route is bound to."""

    kind: str
    namespace: str
    name: str
    group: str = ""
    line: int = 0


@attrs.frozen(kw_only=True)
class Route(Resource):
    """An HTTPRoute, GRPCRoute, TLSRoute or TCPRoute: for waypoints only, so its body is not read."""

    parents: tuple[Target, ...] = ()


class Action(enum.Enum):
    """What a policy does when it matches."""

    ALLOW = "ALLOW"
    DENY = "DENY"
    AUDIT = "AUDIT"
    CUSTOM = "CUSTOM"

    @property
    def layer_4(self) -> bool:
        """Whether a ztunnel knows it."""
        return self in (Action.ALLOW, Action.DENY)


Selector = dict[str, str]


@attrs.frozen(kw_only=True)
class ValueMatch:
    """Values of which one must match, and values of which none may."""

    values: tuple[str, ...] = ()
    not_values: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class Match:
    """One alternative of a rule's `from`; the same fields hold a `to` and a `when`."""

    principals: ValueMatch = ValueMatch()
    namespaces: ValueMatch = ValueMatch()
    service_accounts: tuple[tuple[str, str], ...] = ()
    not_service_accounts: tuple[tuple[str, str], ...] = ()
    source_ips: tuple[IpInterface, ...] = ()
    not_source_ips: tuple[IpInterface, ...] = ()
    destination_ips: tuple[IpInterface, ...] = ()
    not_destination_ips: tuple[IpInterface, ...] = ()
    ports: tuple[int, ...] = ()
    not_ports: tuple[int, ...] = ()
    requests: tuple[str, ...] = ()
    """Fields about requests, by name: a ztunnel cannot see those. Documents that have them are refused, unless they
    are bound to a waypoint."""


@attrs.frozen(kw_only=True)
class Rule:
    """AND over clauses; a clause is OR over its alternatives. No clause matches everything."""

    clauses: tuple[tuple[Match, ...], ...] = ()

    @property
    def requests(self) -> tuple[str, ...]:
        """Fields about requests."""
        return tuple(name for clause in self.clauses for match in clause for name in match.requests)


@attrs.frozen(kw_only=True)
class AuthorizationPolicy(Resource):
    """Who may connect to what, at layer 4."""

    selector: Selector | None = None
    action: Action = Action.ALLOW
    rules: tuple[Rule, ...] = ()
    """OR over rules; none matches nothing."""
    targets: tuple[Target, ...] = ()
    """What a waypoint enforces it for; then no ztunnel sees it."""
    dry_run: bool = False


class MtlsMode(enum.Enum):
    """Whether plaintext is taken."""

    UNSET = "UNSET"
    DISABLE = "DISABLE"
    PERMISSIVE = "PERMISSIVE"
    STRICT = "STRICT"


@attrs.frozen(kw_only=True)
class PeerAuthentication(Resource):
    """Whether workloads take plaintext."""

    selector: Selector | None = None
    mode: MtlsMode = MtlsMode.UNSET
    ports: Mapping[int, MtlsMode] = attrs.Factory(dict)


class Visibility(enum.Enum):
    """Who sees a ServiceEntry."""

    PUBLIC = "PUBLIC"
    NAMESPACE = "NAMESPACE"
    NONE = "NONE"


@attrs.frozen(kw_only=True)
class VisibilityRule:
    """Visibility of the ServiceEntries of some namespaces."""

    selector: LabelSelector
    visibility: Visibility


@attrs.frozen(kw_only=True)
class MeshConfig:
    """`meshconfig.yaml`."""

    trust_domain: str | None = None
    """None: that of the state."""
    root_namespace: str = "istio-system"
    network: str | None = None
    """The network that is meant where none is named. None: that of the root namespace's label."""
    default_visibility: Visibility = Visibility.PUBLIC
    visibility: tuple[VisibilityRule, ...] = ()
    """The first that matches wins."""

    def visibility_of(self, namespace: str, labels: Mapping[str, str]) -> Visibility:
        """Who sees the ServiceEntries of a namespace with these labels."""
        known = {"kubernetes.io/metadata.name": namespace, **labels}
        for rule in self.visibility:
            if rule.selector.matches(known):
                return rule.visibility
        return self.default_visibility
