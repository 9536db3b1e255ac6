"""Documents once they are read: plain values without YAML, in the terms of Istio's API."""

from __future__ import annotations

import datetime
import enum
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from miniistiod.resources.reader import IpAddress, IpNetwork

__all__ = [
    "Action",
    "AuthorizationPolicy",
    "Endpoint",
    "KubernetesService",
    "Match",
    "MeshConfig",
    "Metadata",
    "MtlsMode",
    "Namespace",
    "PeerAuthentication",
    "Resolution",
    "Resource",
    "Rule",
    "Selector",
    "ServiceEntry",
    "ServicePort",
    "WorkloadEntry",
]

NEVER = datetime.datetime.max.replace(tzinfo=datetime.UTC)


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

    @property
    def labels(self) -> dict[str, str]:
        """For selection: those of the object win over those of the specification."""
        return {**self.endpoint.labels, **self.meta.labels}


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


class Action(enum.Enum):
    """What a policy does when it matches."""

    ALLOW = "ALLOW"
    DENY = "DENY"


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
    source_ips: tuple[IpNetwork, ...] = ()
    not_source_ips: tuple[IpNetwork, ...] = ()
    destination_ips: tuple[IpNetwork, ...] = ()
    not_destination_ips: tuple[IpNetwork, ...] = ()
    ports: tuple[int, ...] = ()
    not_ports: tuple[int, ...] = ()


@attrs.frozen(kw_only=True)
class Rule:
    """AND over clauses; a clause is OR over its alternatives. No clause matches everything."""

    clauses: tuple[tuple[Match, ...], ...] = ()


@attrs.frozen(kw_only=True)
class AuthorizationPolicy(Resource):
    """Who may connect to what, at layer 4."""

    selector: Selector | None = None
    action: Action = Action.ALLOW
    rules: tuple[Rule, ...] = ()
    """OR over rules; none matches nothing."""


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


@attrs.frozen(kw_only=True)
class MeshConfig:
    """`meshconfig.yaml`."""

    trust_domain: str | None = None
    """None: that of the state."""
    root_namespace: str = "istio-system"
