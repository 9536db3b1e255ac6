"""Gateways and routes of the Gateway API: where waypoints and other networks are, and what is left to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from miniistiod.resources import metadata as common
from miniistiod.resources.model import (
    AllowedNamespaces,
    Gateway,
    GatewayClass,
    LabelSelector,
    Listener,
    Metadata,
    Route,
    Target,
)

if TYPE_CHECKING:
    from miniistiod.resources.reader import IpAddress, Reader

__all__ = ["gateway", "gateway_class", "route", "target"]

GATEWAY_GROUP = "gateway.networking.k8s.io"
_TRAFFIC = ("service", "workload", "all", "none")
WAYPOINT_FOR = "istio.io/waypoint-for"
INBOUND_BINDING = "ambient.istio.io/waypoint-inbound-binding"


def gateway(reader: Reader, meta: Metadata) -> Gateway | None:
    """A Gateway: its class, its listeners and where it is."""
    status = reader.mapping("status")
    spec = reader.required_mapping("spec", "add spec with gatewayClassName and listeners")
    if spec is None:
        return None
    name = spec.text("gatewayClassName")
    if name is None:
        spec.require("gatewayClassName", "for a waypoint write istio-waypoint, for another network istio-remote")
    listeners = [_listener(item) for item in spec.readers("listeners") or ()]
    # Without a controller that writes a status, the addresses that were asked for are those it has.
    addresses = _addresses(spec)
    spec.ignore("infrastructure")
    spec.finish()
    if status is not None:
        status.ignore("conditions", "listeners", "attachedListenerSets")
        addresses = _addresses(status) or addresses
        status.finish()
    _check_words(reader, meta)
    return None if name is None else _gateway(meta, name, listeners, addresses)


def _gateway(
    meta: Metadata, name: str, listeners: list[Listener | None], addresses: tuple[IpAddress | str, ...]
) -> Gateway:
    return Gateway(
        meta=meta,
        class_name=name,
        listeners=tuple(item for item in listeners if item is not None),
        addresses=addresses,
    )


def _check_words(reader: Reader, meta: Metadata) -> None:
    value = meta.labels.get(WAYPOINT_FOR)
    if value is not None and value not in _TRAFFIC:
        reader.error(meta.line, f"the label {WAYPOINT_FOR} is {value!r}", f"write one of {', '.join(_TRAFFIC)}")
    value = meta.annotations.get(INBOUND_BINDING)
    if value is not None:
        protocol, slash, port = value.partition("/")
        if protocol not in ("PROXY", "NONE") or (slash and not (port.isascii() and port.isdigit() and len(port) < 6)):
            reader.error(meta.line, f"the annotation {INBOUND_BINDING} is {value!r}", "write PROXY/15088, or NONE")


def _addresses(reader: Reader) -> tuple[IpAddress | str, ...]:
    found: list[IpAddress | str] = []
    for item in reader.readers("addresses") or ():
        kind, value = item.text("type") or "IPAddress", item.text("value")
        item.finish()
        if value is None:
            item.require("value", "write an IP address, or a host name with type: Hostname")
            continue
        try:
            found.append(common.host_name(value) if kind == "Hostname" else common.ip_address(value))
        except ValueError as error:
            item.error(item.line, f"{item.field('value')} is {value!r}: {error}", "or say type: Hostname")
    return tuple(found)


def _listener(reader: Reader) -> Listener | None:
    reader.text("name")
    reader.text("hostname")
    port, protocol = reader.integer("port", 0, 65_535), reader.text("protocol")
    reader.ignore("tls")
    allowed, selector = AllowedNamespaces.SAME, None
    routes = reader.mapping("allowedRoutes")
    if routes is not None:
        routes.ignore("kinds")
        namespaces = routes.mapping("namespaces")
        if namespaces is not None:
            text = namespaces.choice("from", [item.value for item in AllowedNamespaces])
            allowed = AllowedNamespaces(text or "Same")
            inner = namespaces.mapping("selector")
            selector = None if inner is None else common.label_selector(inner)
            namespaces.finish()
            if allowed is AllowedNamespaces.SELECTOR and selector is None:
                namespaces.require("selector", "say whose objects may attach, or write from: All")
                selector = LabelSelector()
        routes.finish()
    reader.finish()
    if port is None or protocol is None:
        reader.require("port and protocol", "for a waypoint write {name: mesh, port: 15008, protocol: HBONE}")
        return None
    return Listener(port=port, protocol=protocol, allowed=allowed, selector=selector)


def gateway_class(reader: Reader, meta: Metadata) -> GatewayClass:
    """A class: only its labels and annotations count, and whose it is."""
    reader.ignore("status")
    _check_words(reader, meta)
    controller = ""
    spec = reader.mapping("spec")
    if spec is not None:
        controller = spec.text("controllerName") or ""
        spec.ignore("description", "parametersRef")
        spec.finish()
    return GatewayClass(meta=meta, controller=controller)


def route(reader: Reader, meta: Metadata) -> Route:
    """A route: what it is bound to. Its body is for the waypoint, and nobody here reads it."""
    reader.ignore("status")
    parents: tuple[Target, ...] = ()
    spec = reader.mapping("spec")
    if spec is not None:
        parents = tuple(
            found
            for item in spec.readers("parentRefs") or ()
            if (found := target(item, meta.namespace, default_kind="Gateway", default_group=GATEWAY_GROUP)) is not None
        )
    if not parents:
        reader.error(meta.line, f"{meta.kind} {meta.namespace}/{meta.name} is bound to nothing", "add spec.parentRefs")
    return Route(meta=meta, parents=parents)


def target(reader: Reader, namespace: str, *, default_kind: str = "", default_group: str = "") -> Target | None:
    """One `targetRef` or `parentRef`."""
    line = reader.line
    group, kind, name = reader.text("group"), reader.text("kind") or default_kind, reader.text("name")
    own = reader.text("namespace")
    reader.ignore("sectionName", "port")
    reader.finish()
    if not kind or name is None:
        reader.require("kind and name", f"write {{group: {GATEWAY_GROUP}, kind: Gateway, name: waypoint}}")
        return None
    return Target(
        kind=kind,
        namespace=namespace if own is None else own,
        name=name,
        group=default_group if group is None else group,
        line=line,
    )
