"""ServiceEntries and Kubernetes Services as services.

Source: Istio's ambient index: names, fields and their precedence.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from miniistiod import vips
from miniistiod.catalog import ADDRESS, Entry, entry
from miniistiod.resources.binding import Traffic
from miniistiod.resources.model import KubernetesService, Resolution, ServiceEntry, Visibility
from miniistiod.resources.networking import TRAFFIC_DISTRIBUTION
from miniistiod.workloads import gateway_address
from ztunnel.wire import workload_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from miniistiod.registry import Registry, ServiceModel
    from miniistiod.resources.model import Resource
    from miniistiod.resources.reader import IpAddress, IpNetwork

__all__ = ["addresses", "encode", "hosts", "of_model", "vip_needs"]

_AUTOALLOCATE_LABEL = "networking.istio.io/enable-autoallocate-ip"
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
_FAMILIES = {
    ("IPv4",): pb.IPV4_ONLY,
    ("IPv6",): pb.IPV6_ONLY,
    ("IPv4", "IPv6"): pb.DUAL,
    ("IPv6", "IPv4"): pb.DUAL,
}


def hosts(source: ServiceEntry | KubernetesService, domain: str) -> tuple[str, ...]:
    """Host names of a document."""
    if isinstance(source, ServiceEntry):
        return tuple(dict.fromkeys(source.hosts))
    return (f"{source.meta.name}.{source.meta.namespace}.svc.{domain}",)


def encode(registry: Registry, model: ServiceModel, previous: Mapping[str, Entry]) -> Entry:
    """A service as a resource."""
    message = of_model(registry, model)
    aliases = tuple(_alias(item) for item in message.addresses)
    return entry(ADDRESS, pb.Address(service=message), model.name, aliases=aliases, is_service=True, previous=previous)


def of_model(registry: Registry, model: ServiceModel) -> pb.Service:
    """One host of a service."""
    source = model.source
    message = pb.Service(
        name=source.meta.name,
        namespace=source.meta.namespace,
        hostname=model.host,
        canonical=registry.is_canonical(model),
        visibility=pb.Service.NAMESPACE if model.visibility is Visibility.NAMESPACE else pb.Service.PUBLIC,
    )
    for address in addresses(registry, model):
        message.addresses.append(_network_address(registry.network, address))
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
    else:
        message.ip_families = _FAMILIES.get(source.families, pb.AUTOMATIC)
    balancing = _load_balancing(registry, source)
    if balancing is not None:
        message.load_balancing.CopyFrom(balancing)
    _add_waypoints(registry, model, message)
    return message


def _add_waypoints(registry: Registry, model: ServiceModel, message: pb.Service) -> None:
    public = model.visibility is Visibility.PUBLIC
    meta = model.source.meta
    binding = registry.bind(meta, meta.labels, Traffic.SERVICE, user=("service", "", model.name), public=public)
    if binding.primary is None:
        return
    message.waypoint.CopyFrom(gateway_address(binding.primary, registry.network))
    message.ingress_use_waypoint = binding.ingress
    if binding.canary is not None:
        for gateway, weight in ((binding.primary, 100 - binding.weight), (binding.canary, binding.weight)):
            message.weighted_waypoints.append(
                pb.WeightedWaypoint(destination=gateway_address(gateway, registry.network), weight=weight)
            )


def addresses(registry: Registry, model: ServiceModel) -> tuple[IpAddress | IpNetwork, ...]:
    """Virtual addresses: those of the document, else allotted ones."""
    source = model.source
    if source.addresses:
        return source.addresses
    if isinstance(source, KubernetesService):
        return ()
    if given := tuple(address for host, address in source.status_addresses if host == model.host):
        return given if _wants_vip(source, model.host) else ()
    number = registry.inputs.vips.get((source.meta.namespace, model.host))
    if number is None or not _wants_vip(source, model.host):
        return ()
    return vips.addresses_of(number)


def _network_address(network: str, address: IpAddress | IpNetwork) -> pb.NetworkAddress:
    if isinstance(address, ipaddress.IPv4Network | ipaddress.IPv6Network):
        return pb.NetworkAddress(network=network, address=address.network_address.packed, length=address.prefixlen)
    return pb.NetworkAddress(network=network, address=address.packed)


def _alias(address: pb.NetworkAddress) -> str:
    text = f"{address.network}/{ipaddress.ip_address(address.address)}"
    return f"{text}/{address.length}" if address.HasField("length") else text


def _load_balancing(registry: Registry, source: ServiceEntry | KubernetesService) -> pb.LoadBalancing | None:
    if isinstance(source, ServiceEntry) and source.resolution is Resolution.NONE:
        return pb.LoadBalancing(mode=pb.LoadBalancing.PASSTHROUGH, health_policy=pb.LoadBalancing.ALLOW_ALL)
    own = source.traffic_distribution if isinstance(source, KubernetesService) else None
    if own not in ("PreferClose", "PreferSameZone", "PreferSameNode"):
        own = source.meta.annotations.get(TRAFFIC_DISTRIBUTION)
        home = registry.namespace(source.meta.namespace)
        if own is None and home is not None:
            own = home.annotations.get(TRAFFIC_DISTRIBUTION)
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


def vip_needs(documents: Iterable[Resource]) -> tuple[list[tuple[str, str]], list[IpAddress]]:
    """Hosts that need an automatic address, and addresses that documents take for themselves."""
    wanted: list[tuple[str, str]] = []
    given: list[IpAddress] = []
    for item in documents:
        if not isinstance(item, ServiceEntry | KubernetesService):
            continue
        given.extend(a for a in item.addresses if isinstance(a, ipaddress.IPv4Address | ipaddress.IPv6Address))
        if isinstance(item, KubernetesService):
            continue
        for host in item.hosts:
            if not _wants_vip(item, host):
                continue
            own = [address for name, address in item.status_addresses if name == host]
            given.extend(own)
            if not own:
                wanted.append((item.meta.namespace, host))
    return wanted, given


def _wants_vip(item: ServiceEntry, host: str) -> bool:
    return (
        not item.addresses
        and item.resolution is not Resolution.NONE
        and item.meta.labels.get(_AUTOALLOCATE_LABEL) != "false"
        and (not host.startswith("*") or item.resolution is Resolution.DYNAMIC_DNS)
    )
