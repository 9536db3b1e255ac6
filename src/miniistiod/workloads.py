"""Machines, endpoints and gateways as workloads.

Source: Istio's ambient index: names, fields and their precedence.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from miniistiod.catalog import ADDRESS, Entry, entry
from miniistiod.resources.binding import (
    HBONE_PORT,
    REMOTE_CLASS,
    Traffic,
    inbound_binding,
    is_waypoint_instance,
)
from miniistiod.resources.model import Endpoint, KubernetesService, Resolution, ServicePort
from miniistiod.resources.networking import (
    GROUP_ANNOTATION,
    NETWORK_LABEL,
    NODE_ANNOTATION,
    REDIRECTION_ANNOTATION,
    TUNNEL_LABEL,
)
from ztunnel.wire import workload_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from miniistiod.registry import Registry, ServiceModel
    from miniistiod.resources.model import EndpointSlice, Gateway, Metadata, ServiceEntry, WorkloadEntry

__all__ = ["encode", "entry_uid", "gateway_address", "of_entry", "of_gateways", "of_service_entry", "of_slice", "ways"]

_ACCOUNT_ANNOTATION = "gateway.istio.io/service-account"
_BY_NAME = (Resolution.DNS, Resolution.DNS_ROUND_ROBIN, Resolution.DYNAMIC_DNS)


def entry_uid(cluster_id: str, namespace: str, name: str) -> str:
    """The resource name of a WorkloadEntry."""
    return f"{cluster_id}/networking.istio.io/WorkloadEntry/{namespace}/{name}"


def encode(message: pb.Workload, previous: Mapping[str, Entry]) -> Entry:
    """A workload as a resource."""
    return entry(
        ADDRESS,
        pb.Address(workload=message),
        message.uid,
        aliases=tuple(f"{message.network}/{ipaddress.ip_address(packed)}" for packed in message.addresses),
        members=tuple(sorted(message.services)),
        node=message.node,
        previous=previous,
    )


def of_entry(registry: Registry, item: WorkloadEntry) -> pb.Workload:
    """A WorkloadEntry."""
    meta, labels = item.meta, item.labels
    uid = entry_uid(registry.inputs.cluster_id, meta.namespace, meta.name)
    message = _workload(registry, meta, labels, item.endpoint, uid)
    _add_services(message, item.endpoint, registry.selecting(meta.namespace, labels))
    _add_tunnel(message, meta)
    if not item.healthy:
        message.status = pb.UNHEALTHY
    message.node = meta.annotations.get(NODE_ANNOTATION, "")
    mark = registry.inputs.marks.get((meta.namespace, meta.name))
    if mark is not None and mark.service_account == (message.service_account or "default"):
        message.tunnel_protocol = pb.HBONE
        message.node = message.node or mark.node
    if is_waypoint_instance(labels):
        registry.instance(meta, labels)
        tunnel = inbound_binding(meta, labels, registry.documents)
        if tunnel is not None:
            message.application_tunnel.protocol = pb.ApplicationTunnel.PROXY
            message.application_tunnel.port = tunnel[1]
    else:
        binding = registry.bind(meta, labels, Traffic.WORKLOAD, user=meta.key)
        if binding.primary is not None:
            message.waypoint.CopyFrom(gateway_address(binding.primary, registry.network))
    return message


def of_service_entry(registry: Registry, source: ServiceEntry) -> Iterator[pb.Workload]:
    """Endpoints that a ServiceEntry names itself, or the names that stand for them."""
    meta = source.meta
    owned = [registry.services.get(f"{meta.namespace}/{host}") for host in dict.fromkeys(source.hosts)]
    won = [model for model in owned if model is not None and model.source is source]
    if not won:
        return
    places = [(endpoint, won) for endpoint in source.endpoints]
    implicit = not places and source.selector is None and source.resolution in _BY_NAME
    if implicit:
        places = [(Endpoint(address=model.host), [model]) for model in won]
    parent = f"{registry.inputs.cluster_id}/networking.istio.io/ServiceEntry/{meta.namespace}/{meta.name}"
    made: dict[str, pb.Workload] = {}
    for endpoint, models in places:
        uid = f"{parent}/{endpoint.address}"
        message = _workload(registry, meta, meta.labels, endpoint, uid)
        _add_services(message, endpoint, models)
        _add_tunnel(message, meta)
        if not implicit:
            binding = registry.bind(meta, endpoint.labels, Traffic.WORKLOAD, user=meta.key)
            if binding.primary is not None:
                message.waypoint.CopyFrom(gateway_address(binding.primary, registry.network))
        made[uid] = message  # the last of several with one address, as istiod has it; such documents are refused
    yield from made.values()


def of_slice(registry: Registry, item: EndpointSlice) -> Iterator[pb.Workload]:
    """Places outside of the mesh that serve a Service: nothing is known of them but their address."""
    meta = item.meta
    host = f"{item.service}.{meta.namespace}.svc.{registry.inputs.cluster_domain}"
    model = registry.services.get(f"{meta.namespace}/{host}")
    if model is None or not isinstance(model.source, KubernetesService) or model.source.selector:
        return
    named = {port.name: port.number for port in item.ports}
    targets = [(port.number, named[port.name]) for port in model.source.ports if port.name in named]
    seen: set[str] = set()
    for endpoint in item.endpoints:
        address = endpoint.addresses[0]  # the others are the same place, and nobody may use them
        uid = f"{registry.inputs.cluster_id}/discovery.k8s.io/EndpointSlice/{meta.namespace}/{meta.name}/{address}"
        if uid in seen:
            continue
        seen.add(uid)
        message = pb.Workload(
            uid=uid,
            name=meta.name,
            namespace=meta.namespace,
            addresses=[address.packed],
            network=registry.network,
            cluster_id=registry.inputs.cluster_id,
            network_mode=pb.HOST_NETWORK,
            workload_type=pb.POD,
            workload_name=meta.name,
            canonical_name=meta.name,
            canonical_revision="latest",
            status=pb.HEALTHY if endpoint.ready else pb.UNHEALTHY,
        )
        ports = message.services[model.name].ports
        ports.extend(pb.Port(service_port=number, target_port=target) for number, target in targets)
        yield message


def of_gateways(registry: Registry) -> Iterator[pb.Workload]:
    """Ways into other networks, one workload for each of their addresses."""
    seen: set[str] = set()
    for gateway in registry.gateways():
        network, port = _remote(gateway)
        if network is None:
            continue
        for address in gateway.addresses:
            uid = f"NetworkGateway/{network}/{address}/{port}"
            if uid in seen:
                continue
            seen.add(uid)
            account = gateway.meta.annotations.get(_ACCOUNT_ANNOTATION)
            yield pb.Workload(
                uid=uid,
                name=uid,
                namespace=gateway.meta.namespace,
                network=network,
                trust_domain=_trust_domain(registry),
                service_account=account or f"{gateway.meta.name}-{gateway.class_name}",
                addresses=[] if isinstance(address, str) else [address.packed],
                hostname=address if isinstance(address, str) else "",
            )


def _remote(gateway: Gateway) -> tuple[str | None, int]:
    """The network that a Gateway leads to, and the port of it; None when it leads to none."""
    network = gateway.meta.labels.get(NETWORK_LABEL)
    port = next((item.port for item in gateway.listeners if item.protocol == "HBONE"), None)
    if gateway.class_name != REMOTE_CLASS or not network or port is None:
        return None, 0
    return network, port


def ways(gateways: Iterable[Gateway]) -> dict[str, pb.GatewayAddress]:
    """How each other network is reached; of several Gateways, by the oldest."""
    found: dict[str, pb.GatewayAddress] = {}
    for gateway in gateways:
        network, port = _remote(gateway)
        if network is not None and gateway.addresses and network not in found:
            found[network] = _address(gateway, gateway.addresses[0], network, port)
    return found


def gateway_address(waypoint: Gateway, network: str) -> pb.GatewayAddress:
    """Where a waypoint is: by name if it has one, else by address."""
    names = [item for item in waypoint.addresses if isinstance(item, str)]
    return _address(waypoint, (*names, *waypoint.addresses)[0], network, HBONE_PORT)


def _address(gateway: Gateway, address: object, network: str, port: int) -> pb.GatewayAddress:
    if isinstance(address, ipaddress.IPv4Address | ipaddress.IPv6Address):
        place = pb.NetworkAddress(network=network, address=address.packed)
        return pb.GatewayAddress(address=place, hbone_mtls_port=port)
    name = pb.NamespacedHostname(namespace=gateway.meta.namespace, hostname=str(address))
    return pb.GatewayAddress(hostname=name, hbone_mtls_port=port)


def _trust_domain(registry: Registry) -> str:
    """Istio leaves its default away, and so compares equal."""
    return "" if registry.inputs.trust_domain == "cluster.local" else registry.inputs.trust_domain


def _workload(
    registry: Registry, meta: Metadata, labels: Mapping[str, str], endpoint: Endpoint, uid: str
) -> pb.Workload:
    name = meta.annotations.get(GROUP_ANNOTATION) or labels.get("service.istio.io/workload-name") or meta.name
    if meta.kind == "ServiceEntry":
        name = meta.name
    message = pb.Workload(
        uid=uid,
        name=meta.name,
        namespace=meta.namespace,
        network=endpoint.network or registry.network,
        trust_domain=_trust_domain(registry),
        service_account=endpoint.service_account,
        cluster_id=registry.inputs.cluster_id,
        workload_type=pb.POD,
        workload_name=name,
        canonical_name=_first(labels, "service.istio.io/canonical-name", "app.kubernetes.io/name", "app") or name,
        canonical_revision=_first(labels, "service.istio.io/canonical-revision", "app.kubernetes.io/version", "version")
        or "latest",
        authorization_policies=registry.policies_of(meta.namespace, labels),
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
    way = registry.ways.get(message.network)
    if way is not None:
        message.network_gateway.CopyFrom(way)
    return message


def _add_services(message: pb.Workload, endpoint: Endpoint, models: Iterable[ServiceModel]) -> None:
    for model in models:
        ports = message.services[model.name].ports
        for port in model.source.ports:
            target = _target(port, endpoint, isinstance(model.source, KubernetesService))
            if target is not None:
                ports.append(pb.Port(service_port=port.number, target_port=target))


def _target(port: ServicePort, endpoint: Endpoint, kubernetes: bool) -> int | None:
    """The workload's port for a service's port; None when the workload has none of that name."""
    if kubernetes and isinstance(port.target, str):
        return endpoint.ports.get(port.target)
    if port.name in endpoint.ports:
        return endpoint.ports[port.name]
    return port.target if isinstance(port.target, int) else port.number


def _add_tunnel(message: pb.Workload, meta: Metadata) -> None:
    if "http" in meta.labels.get(TUNNEL_LABEL, "").split(","):
        message.tunnel_protocol = pb.HBONE
        message.native_tunnel = True
    if meta.annotations.get(REDIRECTION_ANNOTATION) == "enabled":
        message.tunnel_protocol = pb.HBONE


def _first(labels: Mapping[str, str], *names: str) -> str:
    for name in names:
        if value := labels.get(name):
            return value
    return ""
