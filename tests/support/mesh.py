"""Small meshes for tests of decisions."""

from __future__ import annotations

from typing import Any

from ztunnel.mesh import (
    Address,
    GatewayAddress,
    NamespacedHostname,
    NetworkAddress,
    Protocol,
    Service,
    Store,
    Workload,
    parse_ip,
)

__all__ = ["at", "gateway_at", "gateway_named", "hbone", "service", "store_of", "tcp"]


def at(text: str) -> Address:
    """`ip:port` or `[ip]:port`."""
    host, _, port = text.rpartition(":")
    return parse_ip(host.strip("[]")), int(port)


def tcp(name: str, *ips: str, **values: Any) -> Workload:
    """A workload that takes plaintext."""
    values.setdefault("uid", f"c//Pod/default/{name}")
    values.setdefault("namespace", "default")
    values.setdefault("service_account", name)
    return Workload(name=name, addresses=tuple(map(parse_ip, ips)), **values)


def hbone(name: str, *ips: str, **values: Any) -> Workload:
    """A workload that takes tunnels."""
    return tcp(name, *ips, protocol=Protocol.HBONE, **values)


def service(name: str, *vips: str, **values: Any) -> Service:
    """A service; a virtual address is `ip`, or `network/ip`."""
    values.setdefault("namespace", "default")
    values.setdefault("hostname", f"{name}.{values['namespace']}.svc.cluster.local")
    values.setdefault("ports", {80: 8080})
    pairs = (vip.rpartition("/") for vip in vips)
    return Service(name=name, vips=tuple(NetworkAddress(network, parse_ip(ip)) for network, _, ip in pairs), **values)


def gateway_at(ip: str, port: int = 15008, network: str = "") -> GatewayAddress:
    """A waypoint or gateway by address."""
    return GatewayAddress(NetworkAddress(network, parse_ip(ip)), port)


def gateway_named(namespace: str, hostname: str, port: int = 15008) -> GatewayAddress:
    """A waypoint or gateway by host name."""
    return GatewayAddress(NamespacedHostname(namespace, hostname), port)


def store_of(*resources: Workload | Service) -> Store:
    """A store that holds `resources`."""
    store = Store()
    store.apply_addresses(resources)
    return store
