"""The part of Kubernetes' Service, EndpointSlice and Namespace that has meaning without Kubernetes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from miniistiod.resources import metadata as common
from miniistiod.resources import networking
from miniistiod.resources.model import (
    EndpointSlice,
    KubernetesService,
    Metadata,
    Namespace,
    ServicePort,
    SliceEndpoint,
    SlicePort,
)

if TYPE_CHECKING:
    from miniistiod.resources.reader import IpAddress, Reader

__all__ = ["endpoint_slice", "namespace", "service"]

SERVICE_NAME = "kubernetes.io/service-name"


def namespace(reader: Reader, meta: Metadata) -> Namespace:
    """A namespace: only its labels and annotations count."""
    reader.ignore("spec", "status")
    networking.check_distribution(reader, meta)
    return Namespace(meta=meta)


def service(reader: Reader, meta: Metadata) -> KubernetesService | None:
    """A Kubernetes Service with a selector over WorkloadEntries, or with EndpointSlices."""
    balanced = _load_balancer_addresses(reader)
    spec = reader.required_mapping("spec", "add spec with ports and a selector")
    if spec is None:
        return None
    line = spec.line
    kind = spec.text("type")
    if kind not in (None, "ClusterIP", "LoadBalancer"):
        spec.error(line, f"spec.type is {kind!r}, which has no meaning without Kubernetes", "use ClusterIP")
        spec.ignore("externalName")
    ports: list[ServicePort] = []
    for item in spec.readers("ports", networking.MAX_LIST) or ():
        if not item.has("port"):
            item.require("port", "give the port a number")
        number = item.integer("port", 1, 65_535)
        name, app = item.text("name") or "", item.text("appProtocol")
        transport = item.choice("protocol", {"TCP", "UDP", "SCTP"}) or "TCP"
        target = _target_port(item)
        item.ignore("nodePort")
        item.finish()
        if number is None:
            continue
        if transport != "TCP":
            item.error(item.line, f"{item.path} is {transport}, which the mesh does not carry", "remove the port")
        protocol = app.removeprefix("kubernetes.io/") if app else name.split("-")[0]
        ports.append(ServicePort(number=number, name=name, protocol=protocol, target=target))
    if not ports:
        spec.error(line, "spec.ports names no port", "name at least one, as {port: 80, name: http}")
    addresses: list[IpAddress] = []
    single = spec.text("clusterIP")
    spec.ignore("loadBalancerIP", "externalTrafficPolicy", "allocateLoadBalancerNodePorts", "loadBalancerClass")
    spec.ignore("healthCheckNodePort")
    for text in dict.fromkeys(([single] if single else []) + list(spec.texts("clusterIPs", str) or ())):
        if text in ("None", ""):
            continue
        try:
            addresses.append(common.ip_address(text))
        except ValueError as error:
            spec.error(line, f"spec.clusterIP is {text!r}: {error}", "or None for a service without one")
    labels = spec.string_map("selector")
    publish = spec.boolean("publishNotReadyAddresses") or False
    local = spec.choice("internalTrafficPolicy", {"Cluster", "Local"}) == "Local"
    distribution = spec.text("trafficDistribution")
    families = spec.texts("ipFamilies", _family) or ()
    policy = spec.choice("ipFamilyPolicy", ("SingleStack", "PreferDualStack", "RequireDualStack"))
    if policy == "SingleStack":
        families = families[:1]
    spec.choice("sessionAffinity", {"None"})
    spec.finish()
    networking.check_distribution(reader, meta)
    if kind == "ExternalName":
        return None
    return KubernetesService(
        meta=meta,
        addresses=tuple(dict.fromkeys((*addresses, *balanced))),
        ports=tuple(ports),
        selector=labels or None,
        publish_not_ready=publish,
        internal_local=local,
        traffic_distribution=distribution,
        families=families,
    )


def _family(text: str) -> str:
    if text not in ("IPv4", "IPv6"):
        raise ValueError("not an address family; write IPv4 or IPv6")
    return text


def _load_balancer_addresses(reader: Reader) -> list[IpAddress]:
    status = reader.mapping("status")
    balancer = None if status is None else status.mapping("loadBalancer")
    found: list[IpAddress] = []
    for item in (balancer.readers("ingress") if balancer is not None else None) or ():
        text = item.text("ip")
        if not text:
            continue
        try:
            found.append(common.ip_address(text))
        except ValueError as error:
            item.error(item.line, f"{item.field('ip')} is {text!r}: {error}", "or remove status")
    return found


def _target_port(item: Reader) -> int | str | None:
    value = item.take("targetPort")
    if value is None:
        return None
    if getattr(value, "kind", "") == "text":
        return item.as_text(value, item.field("targetPort"))
    return item.as_integer(value, item.field("targetPort"), 1, 65_535)


def endpoint_slice(reader: Reader, meta: Metadata) -> EndpointSlice | None:
    """Where a Service without selector is: addresses outside of the mesh."""
    kind = reader.choice("addressType", ("IPv4", "IPv6"))
    service = meta.labels.get(SERVICE_NAME)
    if service is None:
        reader.error(meta.line, f"the label {SERVICE_NAME} is missing", "name the Service that it belongs to")
    endpoints: list[SliceEndpoint] = []
    for item in reader.readers("endpoints", networking.MAX_ENDPOINTS) or ():
        addresses = item.texts("addresses", common.ip_address) or ()
        if any(f"IPv{address.version}" != (kind or f"IPv{address.version}") for address in addresses):
            item.error(item.line, f"{item.path} has an address that is not {kind}", "correct addressType")
        conditions = item.mapping("conditions")
        ready = conditions is None or conditions.boolean("ready") is not False
        item.ignore("hostname", "nodeName", "zone", "hints", "deprecatedTopology")
        item.refuse("targetRef", "names a Pod, and there are none without Kubernetes", "use a WorkloadEntry for it")
        item.finish()
        if addresses:
            endpoints.append(SliceEndpoint(addresses=addresses, ready=ready))
    ports: list[SlicePort] = []
    for item in reader.readers("ports", networking.MAX_LIST) or ():
        name, number = item.text("name") or "", item.integer("port", 1, 65_535)
        item.choice("protocol", ("TCP",))
        item.ignore("appProtocol")
        item.finish()
        if number is not None:
            ports.append(SlicePort(name=name, number=number))
    if service is None:
        return None
    return EndpointSlice(meta=meta, service=service, endpoints=tuple(endpoints), ports=tuple(ports))
