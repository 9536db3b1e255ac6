"""The settings as `config_dump` shows them: under ztunnel's names and forms where it has them, else under ours.

Secrets are left out, and of headers for the control plane the values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs

from ztunnel.errors import address_text
from ztunnel.mesh.address import parse_ip

if TYPE_CHECKING:
    from collections.abc import Callable

    from ztunnel.config import Config

__all__ = ["camel", "config_dump"]


def _duration(seconds: float) -> dict[str, int]:
    whole = int(seconds)
    return {"secs": whole, "nanos": round((seconds - whole) * 1e9)}


def _root(setting: str) -> Any:
    if setting == "SYSTEM":
        return "Default"
    return "Static" if "-----BEGIN" in setting else {"File": setting}


def _names(headers: tuple[tuple[str, str], ...]) -> list[list[str]]:
    return [[name, "..."] for name, _ in headers]


def _same(value: Any) -> Any:
    return value


_ITS_OWN: Final[dict[str, tuple[str, Callable[[Any], Any]]]] = {
    "enable_proxy": ("proxy", _same),
    "stream_window": ("windowSize", _same),
    "connection_window": ("connectionWindowSize", _same),
    "frame_size": ("frameSize", _same),
    "pool_max_streams": ("poolMaxStreamsPerConn", _same),
    "pool_idle": ("poolUnusedReleaseTimeout", _duration),
    "node_name": ("localNode", _same),
    "proxy_mode": ("proxyMode", str.title),
    "workload": ("proxyWorkloadInformation", attrs.asdict),
    "ca_root_ca": ("caRootCert", _root),
    "xds_root_ca": ("xdsRootCert", _root),
    "preferred_namespace": ("preferedServiceNamespace", _same),
    "secret_ttl": ("secretTtl", _duration),
    "drain_deadline": ("selfTerminationDeadline", _duration),
    "original_source": ("requireOriginalSource", _same),
    "dns_servers": ("dnsResolverCfg", lambda servers: [address_text(server) for server in servers]),
    "xds_headers": ("xdsHeaders", _names),
    "ca_headers": ("caHeaders", _names),
    "response_baggage": ("enableEnhancedBaggage", _same),
}
"""Settings that ztunnel shows by another name, or in a form of its own."""

_TOGETHER: Final = {"keepalive_enabled", "keepalive_time", "keepalive_interval", "keepalive_retries"} | {
    "user_timeout_enabled",
    "outbound_port",
    "inbound_port",
    "hbone_port",
    "socks5_port",
    "dns_port",
    "dns_address",
    "admin_port",
    "stats_port",
    "ready_port",
    "warnings",
}
"""Settings that are part of an address or of another object."""


def config_dump(config: Config) -> dict[str, Any]:
    """All settings for people to read. Source: Istio's ztunnel, config dump."""
    found: dict[str, Any] = {}
    for field in attrs.fields(type(config)):
        if field.name in _TOGETHER or field.metadata.get("secret"):
            continue
        value = getattr(config, field.name)
        name, form = _ITS_OWN.get(field.name, (camel(field.name), _plain))
        found[name] = None if value is None else form(value)

    def listener(port: int, host: str = config.listen_host) -> dict[str, str]:
        return {"SocketAddr": address_text((parse_ip(host), port))}

    local = config.loopback_host
    return found | {
        "outboundAddr": listener(config.outbound_port),
        "inboundPlaintextAddr": listener(config.inbound_port),
        "inboundAddr": listener(config.hbone_port),
        "socks5Addr": listener(config.socks5_port, local) if config.socks5_enabled else None,
        "dnsProxyAddr": listener(config.dns_port, str(config.dns_hosts[0])) if config.dns_proxy else None,
        "adminAddr": listener(config.admin_port, local),
        "statsAddr": listener(config.stats_port),
        "readinessAddr": listener(config.ready_port),
        "illegalPorts": sorted(config.own_ports),
        "numWorkerThreads": config.workers,
        "socketConfig": {
            "keepaliveEnabled": config.keepalive_enabled,
            "keepaliveTime": _duration(config.keepalive_time),
            "keepaliveInterval": _duration(config.keepalive_interval),
            "keepaliveRetries": config.keepalive_retries,
            "userTimeoutEnabled": config.user_timeout_enabled,
        },
    }


def camel(name: str) -> str:
    """The name of a field as JSON has it."""
    head, *rest = name.split("_")
    return head + "".join(part.title() for part in rest)


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int | float | str | dict | list):
        return value
    return [_plain(part) for part in value] if isinstance(value, tuple) else str(value)
