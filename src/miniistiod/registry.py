"""Documents -> the mesh as ztunnels see it. One pure function, `build`.

Source: Istio's ambient index (names, fields and precedence). Where istiod has a defect, this follows the evident
intent: a selector never selects what has no labels, an endpoint's network is its own, and PeerAuthentication is
resolved by inheritance first.
"""

from __future__ import annotations

import datetime
import ipaddress
from typing import TYPE_CHECKING, Generic, TypeVar

import attrs

from miniistiod import policies, vips
from miniistiod.resources.model import (
    AuthorizationPolicy,
    Endpoint,
    KubernetesService,
    Metadata,
    Namespace,
    PeerAuthentication,
    Resolution,
    Resource,
    ServiceEntry,
    ServicePort,
    WorkloadEntry,
)
from miniistiod.resources.networking import REDIRECTION_ANNOTATION, TRAFFIC_DISTRIBUTION, TUNNEL_LABEL
from miniistiod.snapshot import EMPTY, Entry, Snapshot, entry
from ztunnel.wire import workload_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from miniistiod.resources import ResourceSet
    from miniistiod.resources.reader import IpAddress, IpNetwork

__all__ = ["HboneMark", "Inputs", "Registry", "build", "vip_needs", "workload_uid"]

_NETWORK_LABEL = "topology.istio.io/network"
_AUTOALLOCATE_LABEL = "networking.istio.io/enable-autoallocate-ip"
_GROUP_ANNOTATION = "istio.io/autoRegistrationGroup"
_LAST = datetime.datetime.max.replace(tzinfo=datetime.UTC)

_APP_PROTOCOLS = {
    "http": pb.HTTP11,
    "http2": pb.HTTP2,
    "h2c": pb.HTTP2,
    "grpc": pb.GRPC,
    "tls": pb.TLS,
    "https": pb.TLS,
    "tcp": pb.TCP,
}
_CLOSE = (pb.LoadBalancing.NETWORK, pb.LoadBalancing.REGION, pb.LoadBalancing.ZONE)
_PREFERENCES = {
    "preferclose": _CLOSE,
    "prefersamezone": _CLOSE,
    "prefersamenode": (*_CLOSE, pb.LoadBalancing.SUBZONE, pb.LoadBalancing.NODE),
}


@attrs.frozen(kw_only=True)
class HboneMark:
    """A WorkloadEntry whose machine has proved that it runs a ztunnel; it is never sent as plaintext again."""

    service_account: str
    """The account that was proved; the mark holds while the entry names the same."""
    node: str = ""
    """NODE_NAME that the ztunnel gave, so that it finds itself."""


@attrs.frozen(kw_only=True)
class Inputs:
    """What the mesh depends on besides the documents."""

    trust_domain: str = "cluster.local"
    cluster_id: str = "Kubernetes"
    cluster_domain: str = "cluster.local"
    marks: Mapping[tuple[str, str], HboneMark] = attrs.Factory(dict)
    """By namespace and name of the WorkloadEntry."""
    vips: Mapping[tuple[str, str], int] = attrs.Factory(dict)
    """By namespace and host."""
    first_seen: Mapping[tuple[str, str, str], datetime.datetime] = attrs.Factory(dict)
    """When a document was first seen, by kind, namespace and name; for those without creationTimestamp."""


@attrs.frozen(kw_only=True)
class ServiceModel:
    """One host of a service, whatever document it comes from."""

    source: ServiceEntry | KubernetesService
    host: str

    @property
    def name(self) -> str:
        """The resource name."""
        return f"{self.source.meta.namespace}/{self.host}"


R = TypeVar("R", bound=Resource)
T = TypeVar("T")


class SelectorIndex(Generic[T]):
    """Things by the labels that they select; a look-up costs what matches, not what exists."""

    def __init__(self) -> None:
        self._by_label: dict[tuple[str, str, str], list[tuple[Mapping[str, str], T]]] = {}

    def add(self, namespace: str, selector: Mapping[str, str], thing: T) -> None:
        """Enter a thing by one of its labels; the others are compared at look-up."""
        key, value = min(selector.items())
        self._by_label.setdefault((namespace, key, value), []).append((selector, thing))

    def selecting(self, namespace: str, labels: Mapping[str, str]) -> list[T]:
        """Things of a namespace whose selector is a part of `labels`."""
        return [
            thing
            for key, value in labels.items()
            for selector, thing in self._by_label.get((namespace, key, value), ())
            if all(labels.get(name) == wanted for name, wanted in selector.items())
        ]


class Registry:
    """The documents of a mesh, indexed; `build` makes the snapshot of it."""

    def __init__(self, resources: ResourceSet, inputs: Inputs) -> None:
        self.inputs = inputs
        self.root_namespace = resources.mesh.root_namespace
        self.namespaces = {item.meta.name: item for item in resources.of(Namespace)}
        self.workloads = resources.of(WorkloadEntry)
        root = self.namespaces.get(self.root_namespace)
        self.network = root.meta.labels.get(_NETWORK_LABEL, "") if root else ""
        self.policies = resources.of(AuthorizationPolicy)
        self.peer_authentication = policies.PeerAuthentications(
            self.by_age(resources.of(PeerAuthentication)), self.root_namespace
        )
        self.entries = self.by_age(resources.of(ServiceEntry))
        self.losers: list[tuple[ServiceEntry, str, Metadata]] = []
        """ServiceEntries that lost a host to another document of the namespace: which, the host, to whom."""
        self.services = self._services(self.by_age(resources.of(KubernetesService)))
        self._policies = SelectorIndex[str]()
        for policy in self.policies:
            if policy.selector:
                meta = policy.meta
                self._policies.add(meta.namespace, policy.selector, f"{meta.namespace}/{meta.name}")

    def by_age(self, items: Iterable[R]) -> list[R]:
        """Oldest first: by creationTimestamp, else by when it was first seen; ties by path and position."""
        seen = self.inputs.first_seen

        def age(item: R) -> tuple[datetime.datetime, str, int]:
            meta = item.meta
            return (meta.created or seen.get(meta.key, _LAST), meta.path, meta.position)

        return sorted(items, key=age)

    def _services(self, kubernetes: list[KubernetesService]) -> dict[str, ServiceModel]:
        """One winner for each namespace and host: a Kubernetes Service, else the oldest ServiceEntry."""
        found: dict[str, ServiceModel] = {}
        for service in kubernetes:
            host = f"{service.meta.name}.{service.meta.namespace}.svc.{self.inputs.cluster_domain}"
            model = ServiceModel(source=service, host=host)
            found[model.name] = model
        for item in self.entries:
            for host in item.hosts:
                model = ServiceModel(source=item, host=host)
                winner = found.setdefault(model.name, model)
                if winner is not model:
                    self.losers.append((item, host, winner.source.meta))
        return found

    # -- services

    def service_entries(self, previous: Mapping[str, Entry]) -> Iterable[Entry]:
        """Services as resources."""
        canonical: dict[str, str] = {}
        for kind in (KubernetesService, ServiceEntry):
            for name, model in self.services.items():
                if isinstance(model.source, kind):
                    canonical.setdefault(model.host, name)
        for name, model in self.services.items():
            message = self._service(model, canonical[model.host] == name)
            aliases = tuple(_alias(item) for item in message.addresses)
            yield entry(pb.Address(service=message), name, aliases=aliases, previous=previous)

    def _service(self, model: ServiceModel, canonical: bool) -> pb.Service:
        source = model.source
        message = pb.Service(
            name=source.meta.name, namespace=source.meta.namespace, hostname=model.host, canonical=canonical
        )
        for address in self.service_addresses(model):
            message.addresses.append(self._network_address(address))
        for port in source.ports:
            target = port.number if port.target is None else port.target
            message.ports.append(
                pb.Port(
                    service_port=port.number,
                    target_port=target if isinstance(target, int) else 0,
                    app_protocol=_APP_PROTOCOLS.get(port.protocol.lower(), pb.UNKNOWN),
                )
            )
        if isinstance(source, ServiceEntry):
            message.subject_alt_names.extend(source.subject_alt_names)
        balancing = self._load_balancing(source)
        if balancing is not None:
            message.load_balancing.CopyFrom(balancing)
        return message

    def service_addresses(self, model: ServiceModel) -> tuple[IpAddress | IpNetwork, ...]:
        """Virtual addresses: those of the document, else allotted ones."""
        source = model.source
        if source.addresses:
            return source.addresses
        if isinstance(source, KubernetesService):
            return ()
        if given := tuple(address for host, address in source.status_addresses if host == model.host):
            return given if _wants_vip(source, model.host) else ()
        number = self.inputs.vips.get((source.meta.namespace, model.host))
        if number is None or not _wants_vip(source, model.host):
            return ()
        return vips.addresses_of(number)

    def _network_address(self, address: IpAddress | IpNetwork) -> pb.NetworkAddress:
        if isinstance(address, ipaddress.IPv4Network | ipaddress.IPv6Network):
            return pb.NetworkAddress(
                network=self.network, address=address.network_address.packed, length=address.prefixlen
            )
        return pb.NetworkAddress(network=self.network, address=address.packed)

    def _load_balancing(self, source: ServiceEntry | KubernetesService) -> pb.LoadBalancing | None:
        if isinstance(source, ServiceEntry) and source.resolution is Resolution.NONE:
            return pb.LoadBalancing(mode=pb.LoadBalancing.PASSTHROUGH, health_policy=pb.LoadBalancing.ALLOW_ALL)
        namespace = self.namespaces.get(source.meta.namespace)
        own = source.traffic_distribution if isinstance(source, KubernetesService) else None
        if own not in ("PreferClose", "PreferSameZone", "PreferSameNode"):
            own = source.meta.annotations.get(TRAFFIC_DISTRIBUTION)
            if own is None and namespace is not None:
                own = namespace.meta.annotations.get(TRAFFIC_DISTRIBUTION)
        result = pb.LoadBalancing()
        scopes = _PREFERENCES.get((own or "").lower())
        if scopes is not None:
            result.mode = pb.LoadBalancing.FAILOVER
            result.routing_preference.extend(scopes)
        if isinstance(source, KubernetesService):
            if source.internal_local:
                result = pb.LoadBalancing(mode=pb.LoadBalancing.STRICT, routing_preference=[pb.LoadBalancing.NODE])
            if source.publish_not_ready:
                result.health_policy = pb.LoadBalancing.ALLOW_ALL
        return result if result.ByteSize() else None

    # -- workloads

    def workload_entries(self, previous: Mapping[str, Entry]) -> Iterable[Entry]:
        """Workloads as resources: WorkloadEntries, then the endpoints of ServiceEntries."""
        services = SelectorIndex[ServiceModel]()
        for model in self.services.values():
            if model.source.selector:
                services.add(model.source.meta.namespace, model.source.selector, model)
        for item in self.workloads:
            labels = item.labels
            chosen = services.selecting(item.meta.namespace, labels)
            message = self._workload(item.meta, labels, item.endpoint, workload_uid(self.inputs.cluster_id, item.meta))
            self._add_services(message, item.endpoint, chosen)
            self._add_tunnel(message, item.meta, self.inputs.marks.get((item.meta.namespace, item.meta.name)))
            yield self._encode(message, previous)
        for source in self.entries:
            yield from self._endpoints(source, previous)

    def _endpoints(self, source: ServiceEntry, previous: Mapping[str, Entry]) -> Iterable[Entry]:
        won = [
            m for m in (self.services[f"{source.meta.namespace}/{host}"] for host in source.hosts) if m.source is source
        ]
        places = [(endpoint, won) for endpoint in source.endpoints]
        if not places and source.selector is None and source.resolution in _BY_NAME:
            places = [(Endpoint(address=model.host), [model]) for model in won]
        if not won:
            return
        meta = source.meta
        for endpoint, models in places:
            parent = f"{self.inputs.cluster_id}/networking.istio.io/ServiceEntry/{meta.namespace}/{meta.name}"
            uid = f"{parent}/{endpoint.address}"
            message = self._workload(meta, meta.labels, endpoint, uid)
            self._add_services(message, endpoint, models)
            self._add_tunnel(message, meta, None)
            yield self._encode(message, previous)

    def _workload(self, meta: Metadata, labels: Mapping[str, str], endpoint: Endpoint, uid: str) -> pb.Workload:
        name = meta.annotations.get(_GROUP_ANNOTATION) or labels.get("service.istio.io/workload-name") or meta.name
        if meta.kind == "ServiceEntry":
            name = meta.name
        message = pb.Workload(
            uid=uid,
            name=meta.name,
            namespace=meta.namespace,
            network=endpoint.network or self.network,
            # Istio leaves its default away, and so compares equal.
            trust_domain="" if self.inputs.trust_domain == "cluster.local" else self.inputs.trust_domain,
            service_account=endpoint.service_account,
            cluster_id=self.inputs.cluster_id,
            workload_type=pb.POD,
            workload_name=name,
            canonical_name=_first(labels, "service.istio.io/canonical-name", "app.kubernetes.io/name", "app") or name,
            canonical_revision=_first(
                labels, "service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"
            )
            or "latest",
            authorization_policies=self._policies_of(meta.namespace, labels),
        )
        if isinstance(endpoint.address, str):
            message.hostname = endpoint.address
        else:
            message.addresses.append(endpoint.address.packed)
        if endpoint.weight:
            message.capacity.value = endpoint.weight
        if endpoint.locality:
            region, zone, subzone = (*endpoint.locality.split("/"), "", "")[:3]
            message.locality.region, message.locality.zone, message.locality.subzone = region, zone, subzone
        return message

    def _policies_of(self, namespace: str, labels: Mapping[str, str]) -> list[str]:
        scopes = {namespace, self.root_namespace}
        chosen = [name for scope in scopes for name in self._policies.selecting(scope, labels)]
        return sorted(chosen) + self.peer_authentication.names_for(namespace, labels)

    def _add_services(self, message: pb.Workload, endpoint: Endpoint, models: Iterable[ServiceModel]) -> None:
        for model in models:
            ports = message.services[model.name].ports
            for port in model.source.ports:
                target = _target(port, endpoint, isinstance(model.source, KubernetesService))
                if target is not None:
                    ports.append(pb.Port(service_port=port.number, target_port=target))

    def _add_tunnel(self, message: pb.Workload, meta: Metadata, mark: HboneMark | None) -> None:
        if "http" in meta.labels.get(TUNNEL_LABEL, "").split(","):
            message.tunnel_protocol = pb.HBONE
            message.native_tunnel = True
        if meta.annotations.get(REDIRECTION_ANNOTATION) == "enabled":
            message.tunnel_protocol = pb.HBONE
        if mark is not None and mark.service_account == (message.service_account or "default"):
            message.tunnel_protocol = pb.HBONE
            message.node = mark.node

    def _encode(self, message: pb.Workload, previous: Mapping[str, Entry]) -> Entry:
        network = message.network
        aliases = tuple(f"{network}/{ipaddress.ip_address(packed)}" for packed in message.addresses)
        members = tuple(sorted(message.services))
        return entry(
            pb.Address(workload=message),
            message.uid,
            aliases=aliases,
            members=members,
            node=message.node,
            previous=previous,
        )


_BY_NAME = (Resolution.DNS, Resolution.DNS_ROUND_ROBIN)


def build(registry: Registry, previous: Snapshot = EMPTY) -> Snapshot:
    """The mesh of the documents. What did not change since `previous` is the same object."""
    addresses: dict[str, Entry] = {}
    for item in registry.workload_entries(previous.addresses):
        addresses[item.name] = item
    for item in registry.service_entries(previous.addresses):
        addresses[item.name] = item
    converted: dict[str, Entry] = {}
    for policy in registry.policies:
        message = policies.authorization(policy, registry.root_namespace)
        name = f"{message.namespace}/{message.name}"
        converted[name] = entry(message, name, previous=previous.policies)
    for message in registry.peer_authentication.converted():
        name = f"{message.namespace}/{message.name}"
        converted[name] = entry(message, name, previous=previous.policies)
    return Snapshot(addresses, converted, previous.number + 1)


def vip_needs(resources: ResourceSet) -> tuple[list[tuple[str, str]], list[IpAddress]]:
    """Hosts that need an automatic address, and addresses that documents take for themselves."""
    wanted: list[tuple[str, str]] = []
    given: list[IpAddress] = []
    for item in resources.of(ServiceEntry):
        given.extend(a for a in item.addresses if isinstance(a, ipaddress.IPv4Address | ipaddress.IPv6Address))
        for host in item.hosts:
            if not _wants_vip(item, host):
                continue
            own = [address for name, address in item.status_addresses if name == host]
            given.extend(own)
            if not own and not item.addresses:
                wanted.append((item.meta.namespace, host))
    for service in resources.of(KubernetesService):
        given.extend(service.addresses)
    return wanted, given


def workload_uid(cluster_id: str, meta: Metadata) -> str:
    """The resource name of a WorkloadEntry."""
    return f"{cluster_id}/networking.istio.io/WorkloadEntry/{meta.namespace}/{meta.name}"


def _wants_vip(item: ServiceEntry, host: str) -> bool:
    return (
        not item.addresses
        and item.resolution is not Resolution.NONE
        and item.meta.labels.get(_AUTOALLOCATE_LABEL) != "false"
        and not host.startswith("*")
    )


def _target(port: ServicePort, endpoint: Endpoint, kubernetes: bool) -> int | None:
    """The workload's port for a service's port; None when the workload has none of that name."""
    if kubernetes and isinstance(port.target, str):
        return endpoint.ports.get(port.target)
    if port.name in endpoint.ports:
        return endpoint.ports[port.name]
    return port.target if isinstance(port.target, int) else port.number


def _first(labels: Mapping[str, str], *names: str) -> str:
    for name in names:
        if value := labels.get(name):
            return value
    return ""


def _alias(address: pb.NetworkAddress) -> str:
    text = f"{address.network}/{ipaddress.ip_address(address.address)}"
    return f"{text}/{address.length}" if address.HasField("length") else text
