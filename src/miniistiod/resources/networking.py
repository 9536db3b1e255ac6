"""ServiceEntry, WorkloadEntry and WorkloadGroup."""

from __future__ import annotations

from typing import TYPE_CHECKING

from miniistiod.resources import metadata as common
from miniistiod.resources.model import (
    Endpoint,
    Metadata,
    Resolution,
    ServiceEntry,
    ServicePort,
    WorkloadEntry,
    WorkloadGroup,
)

if TYPE_CHECKING:
    from miniistiod.resources.reader import IpAddress, IpNetwork, Reader

__all__ = [
    "GROUP_ANNOTATION",
    "MAX_ENDPOINTS",
    "MAX_LIST",
    "NETWORK_LABEL",
    "NODE_ANNOTATION",
    "REDIRECTION_ANNOTATION",
    "TRAFFIC_DISTRIBUTION",
    "TUNNEL_LABEL",
    "check_distribution",
    "service_entry",
    "workload_entry",
    "workload_group",
]

NETWORK_LABEL = "topology.istio.io/network"
GROUP_ANNOTATION = "istio.io/autoRegistrationGroup"
TUNNEL_LABEL = "networking.istio.io/tunnel"
REDIRECTION_ANNOTATION = "ambient.istio.io/redirection"
NODE_ANNOTATION = "miniistiod/node"
"""The node that a machine's ztunnel runs on; set by enrolment, sent as the workload's node."""
TRAFFIC_DISTRIBUTION = "networking.istio.io/traffic-distribution"
_PROTOCOLS = frozenset(("HTTP", "HTTPS", "HTTP2", "GRPC", "GRPC-WEB", "MONGO", "MYSQL", "REDIS", "TCP", "TLS", "UDP"))
_DISTRIBUTIONS = frozenset(("preferclose", "prefersamezone", "prefersamenode", "any"))
_LOCATIONS = ("MESH_INTERNAL", "MESH_EXTERNAL")
_MAX_WEIGHT = 2**32 - 1
MAX_LIST = 256
"""Hosts, addresses and ports of one document."""
MAX_ENDPOINTS = 4096
"""Endpoints of one document. Each of them has the ports of each host."""


def workload_entry(reader: Reader, meta: Metadata) -> WorkloadEntry | None:
    """A machine."""
    healthy = _healthy(reader)
    spec = reader.required_mapping("spec", "add spec with the machine's address")
    if spec is None:
        return None
    endpoint = _endpoint(spec)
    spec.finish()
    if endpoint is None:
        return None
    tunnelled = "http" in meta.labels.get(TUNNEL_LABEL, "").split(",")
    if not tunnelled and meta.annotations.get(REDIRECTION_ANNOTATION) != "enabled":
        reader.warning(
            meta.line,
            f"WorkloadEntry {meta.namespace}/{meta.name} is reached in plaintext until its ztunnel has connected",
            f"if it runs one, add the label {TUNNEL_LABEL}: http",
        )
    return WorkloadEntry(meta=meta, endpoint=endpoint, healthy=healthy)


def _healthy(reader: Reader) -> bool:
    """What the condition `Healthy` of the status says; true without one."""
    status = reader.mapping("status")
    healthy = True
    for item in (status.readers("conditions") if status is not None else None) or ():
        if item.text("type") == "Healthy":
            healthy = item.text("status") != "False"
    return healthy


def workload_group(reader: Reader, meta: Metadata) -> WorkloadGroup | None:
    """What machines that register themselves have in common."""
    reader.ignore("status")
    spec = reader.required_mapping("spec", "add spec with template.serviceAccount")
    if spec is None:
        return None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    inner = spec.mapping("metadata")
    if inner is not None:
        labels, annotations = inner.string_map("labels"), inner.string_map("annotations")
        inner.finish()
    template = spec.mapping("template")
    endpoint = None
    if template is None:
        spec.require("template", "add template with serviceAccount")
    else:
        if template.has("address"):
            template.refuse("address", "is of one machine, and this is about many", "remove it")
        if template.mapping("labels") is not None:
            template.error(template.line, f"{template.field('labels')} is ignored by Istio", "use spec.metadata.labels")
        endpoint = _endpoint(template, needs_address=False)
        template.finish()
    if spec.take("probe") is not None:
        spec.warning(spec.line, "spec.probe is not run by this mesh's ztunnel", "report health from the machine itself")
    spec.choice("location", _LOCATIONS)
    spec.finish()
    if endpoint is None:
        return None
    return WorkloadGroup(meta=meta, labels=labels, annotations=annotations, template=endpoint)


def _endpoint(reader: Reader, *, needs_address: bool = True) -> Endpoint | None:
    line = reader.line
    text, network = reader.text("address") or "", reader.text("network") or ""
    ports, labels = reader.port_map("ports"), reader.string_map("labels")
    locality = reader.text("locality") or ""
    weight = reader.integer("weight", 0, _MAX_WEIGHT) or 0
    account = reader.text("serviceAccount") or ""
    if account and not common.is_object_name(account):
        reader.error(
            line, f"{reader.field('serviceAccount')} is {account!r}", "use lower case letters, digits, '-', '.'"
        )
    if locality.count("/") > 2:
        reader.error(line, f"{reader.field('locality')} is {locality!r}", "write region/zone/subzone")
    address: IpAddress | str = ""
    if text.startswith("unix:"):
        reader.error(line, f"{reader.field('address')} is {text!r}, a Unix socket", "only IP addresses are reachable")
        return None
    if text:
        try:
            address = common.ip_address(text)
        except ValueError as error:
            try:
                address = common.host_name(text)
            except ValueError:
                address = text
            if address is text or text[-1:].isdigit() or ":" in text:
                reader.error(line, f"{reader.field('address')} is {text!r}: {error}", "or write a host name")
                return None
    elif needs_address and not network:
        reader.error(line, f"{reader.field('address')} is missing", "write an IP address or host name, or a network")
        return None
    return Endpoint(
        address=address,
        ports=ports,
        labels=labels,
        network=network,
        locality=locality,
        weight=weight,
        service_account=account,
    )


def service_entry(reader: Reader, meta: Metadata) -> ServiceEntry | None:
    """A service by host names, with its endpoints or the labels of them."""
    status = _status_addresses(reader)
    spec = reader.required_mapping("spec", "add spec with hosts and ports")
    if spec is None:
        return None
    line = spec.line
    hosts = spec.texts("hosts", lambda text: common.host_name(text, wildcard=True), most=MAX_LIST) or ()
    errors = spec.findings.errors
    addresses = spec.texts("addresses", _virtual_address, most=MAX_LIST) or ()
    readable = spec.findings.errors == errors
    ports = _ports(spec, hosts)
    resolution = Resolution(spec.choice("resolution", {item.value for item in Resolution}) or "NONE")
    spec.choice("location", _LOCATIONS)
    _export_to(spec)
    sans = spec.texts("subjectAltNames", _subject) or ()
    selector = common.selector(spec, "workloadSelector", "labels")
    endpoints: list[Endpoint] = []
    known: set[IpAddress | str] = set()
    for item in spec.readers("endpoints", MAX_ENDPOINTS) or ():
        endpoint = _endpoint(item)
        item.finish()
        if endpoint is None:
            continue
        if endpoint.address in known:
            item.error(
                item.line,
                f"{item.path} has the address {endpoint.address} of another endpoint of this ServiceEntry",
                "keep one of them, or make two ServiceEntries",
            )
        known.add(endpoint.address)
        endpoints.append(endpoint)
    spec.finish()
    check_distribution(reader, meta)
    if not hosts:
        spec.error(line, "spec.hosts names no host", "name at least one, for example orders.mesh")
    for host in {host for host in hosts if hosts.count(host) > 1}:
        spec.error(line, f"spec.hosts names {host!r} twice", "keep one of them")
    if selector is not None and endpoints:
        spec.error(line, "spec has both endpoints and workloadSelector", "keep one of them")
    if resolution is Resolution.NONE and (endpoints or selector):
        spec.error(
            line,
            "spec.resolution NONE means the address that was dialled, but endpoints are given",
            "set resolution: STATIC, or remove the endpoints",
        )
    if resolution is Resolution.STATIC and not endpoints and selector is None:
        spec.warning(line, "spec.resolution is STATIC without any endpoint", "add endpoints or a workloadSelector")
    if resolution in (Resolution.DNS, Resolution.DNS_ROUND_ROBIN) and not endpoints and selector is None:
        for host in hosts:
            if host.startswith("*."):
                spec.warning(line, f"the wildcard {host!r} cannot be resolved by DNS", "name its hosts one by one")
    if not readable:
        return None  # as Istio has it: a service with some of its addresses would be reached past the mesh
    return ServiceEntry(
        meta=meta,
        hosts=hosts,
        addresses=addresses,
        ports=ports,
        resolution=resolution,
        endpoints=tuple(endpoints),
        selector=selector,
        subject_alt_names=sans,
        status_addresses=status,
    )


def _virtual_address(text: str) -> IpAddress | IpNetwork:
    network = common.ip_or_network(text)
    return network.network_address if network.prefixlen == network.max_prefixlen else network


def _subject(text: str) -> str:
    if not text:
        raise ValueError("empty; write a SPIFFE ID, for example spiffe://cluster.local/ns/shop/sa/orders")
    return text


def _export_to(spec: Reader) -> None:
    for path, item in spec.elements("exportTo") or ():
        text = spec.as_text(item, path)
        if text not in (None, "*"):
            spec.error(
                item.line,
                f"{path} is {text!r}, which is not enforced: every ztunnel sees every service",
                "remove exportTo, and use an AuthorizationPolicy to say who may connect",
            )


def _ports(spec: Reader, hosts: tuple[str, ...]) -> tuple[ServicePort, ...]:
    ports: list[ServicePort] = []
    for item in spec.readers("ports", MAX_LIST) or ():
        if not item.has("number"):
            item.require("number", "give the port a number")
        number = item.integer("number", 1, 65_535)
        name, protocol = item.text("name") or "", item.text("protocol") or ""
        target = item.integer("targetPort", 1, 65_535)
        item.finish()
        if number is None:
            continue
        if not name:
            item.require("name", "give the port a name")
        if protocol and protocol.upper() not in _PROTOCOLS:
            item.error(
                item.line, f"{item.field('protocol')} is {protocol!r}", f"write one of {', '.join(sorted(_PROTOCOLS))}"
            )
        if protocol.upper() == "UDP":
            item.warning(item.line, f"{item.path} is UDP, which the mesh does not carry", "it goes past the mesh")
        for other in ports:
            if other.number == number or (name and other.name == name):
                item.error(item.line, f"{item.path} repeats port {number} or name {name!r}", "keep one of them")
                break
        ports.append(ServicePort(number=number, name=name, protocol=protocol, target=target))
    if not ports and hosts and spec.path == "spec":
        spec.error(
            spec.line, "spec.ports names no port", "name at least one, as {number: 80, name: http, protocol: HTTP}"
        )
    return tuple(ports)


def _status_addresses(reader: Reader) -> tuple[tuple[str, IpAddress], ...]:
    """Virtual addresses that Istio allotted, so that a mesh can move here without changing them."""
    status = reader.mapping("status")
    if status is None:
        return ()
    found: list[tuple[str, IpAddress]] = []
    for item in status.readers("addresses") or ():
        host, value = item.text("host"), item.text("value")
        if host is None or value is None:
            continue
        try:
            found.append((host.lower(), common.ip_address(value)))
        except ValueError as error:
            item.error(item.line, f"{item.field('value')} is {value!r}: {error}", "or remove status")
    return tuple(found)


def check_distribution(reader: Reader, meta: Metadata) -> None:
    """Warn of a traffic distribution that is not known."""
    value = meta.annotations.get(TRAFFIC_DISTRIBUTION)
    if value is not None and value.lower() not in _DISTRIBUTIONS:
        reader.warning(
            meta.line,
            f"the annotation {TRAFFIC_DISTRIBUTION} is {value!r}, which means any endpoint",
            "write PreferClose, PreferSameZone, PreferSameNode or Any",
        )
