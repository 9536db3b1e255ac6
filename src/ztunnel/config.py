"""Settings of the node proxy, from the environment under Istio's names. Nothing else reads the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from hbone.config import MIB, ConnectionConfig, between
from hbone.errors import ConfigurationError
from ztunnel.environment import (
    MAX_WORKERS,
    Variable,
    exactly_true,
    one_of,
    parse_address,
    parse_bool,
    parse_cores,
    parse_int,
    parse_optional_path,
    parse_path,
    parse_port,
    parse_seconds,
    parse_servers,
    parse_share,
    parse_url,
    setting,
)
from ztunnel.logscopes import read_levels
from ztunnel.settings import read_settings, supported_variables

if TYPE_CHECKING:
    import ipaddress
    from collections.abc import Mapping

    from ztunnel.mesh.address import Address, IpAddress

__all__ = ["DEFAULT_ROOT", "DEFAULT_STATE_DIR", "NO_ADDRESS", "Config", "Variable", "WorkloadInfo"]

DEFAULT_STATE_DIR = Path("/var/lib/ztunnel")
DEFAULT_ROOT = "./var/run/secrets/istio/root-cert.pem"
NO_ADDRESS = "1.1.1.1"
"""INSTANCE_IP where none is set. Source: Istio's ztunnel."""


@attrs.frozen
class WorkloadInfo:
    """The workload that this proxy serves."""

    namespace: str
    name: str
    service_account: str

    @classmethod
    def parse(cls, text: str) -> WorkloadInfo:
        """Read `namespace/name/service-account`.

        Raises:
            ValueError: another form.
        """
        parts = text.split("/")
        if len(parts) != 3 or not all(parts):
            raise ValueError("expected namespace/name/service-account")
        return cls(*parts)

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}/{self.service_account}"


def _mode(value: str) -> str:
    if value == "shared":
        raise ValueError("shared mode is not built yet; use dedicated, one proxy a workload")
    return one_of("dedicated")(value)


_PORT = between(0, 65_535)


@attrs.frozen(kw_only=True)
class Config:
    """Everything that can be set. Times are in seconds, sizes in bytes."""

    proxy_mode: str = setting(
        "dedicated", env="PROXY_MODE", parse=_mode, meaning="`dedicated`: one proxy serves one workload"
    )
    enable_proxy: bool = setting(True, env="ENABLE_PROXY", parse=parse_bool, meaning="the data path; false is an error")
    workload: WorkloadInfo | None = setting(  # noqa: RUF009 - it is attrs.field
        None,
        env="PROXY_WORKLOAD_INFO",
        parse=WorkloadInfo.parse,
        meaning="the workload served, `namespace/name/service-account`; an enrolled host knows it by itself",
    )
    network: str = setting("", env="NETWORK", meaning="network of this node")
    node_name: str | None = setting(None, env="NODE_NAME", meaning="the local node; only its workloads are served")
    cluster_id: str = setting(
        "Kubernetes", env="CLUSTER_ID", meaning="cluster named to the control plane; `ISTIO_META_CLUSTER_ID` wins"
    )
    cluster_domain: str = setting("cluster.local", env="CLUSTER_DOMAIN", meaning="DNS domain of the cluster")

    xds_address: str = setting(
        "https://localhost:15012",
        env="XDS_ADDRESS",
        parse=parse_url,
        meaning="discovery server, `host:port` or `https://host:port`; empty: none",
        shown="`discoveryAddress`, else istiod's in a cluster, else https://localhost:15012",
    )
    ca_address: str = setting(
        "https://localhost:15012",
        env="CA_ADDRESS",
        parse=parse_url,
        meaning="certificate authority, in the same form",
        shown="istiod's in a cluster, else https://localhost:15012",
    )
    xds_root_ca: str = setting(
        DEFAULT_ROOT, env="XDS_ROOT_CA", meaning="roots for discovery: a file, `SYSTEM`, or PEM text"
    )
    ca_root_ca: str = setting(DEFAULT_ROOT, env="CA_ROOT_CA", meaning="roots for the CA: a file, `SYSTEM`, or PEM text")
    alt_xds_hostname: str | None = setting(
        None, env="ALT_XDS_HOSTNAME", meaning="a further name that the discovery server's certificate may have"
    )
    alt_ca_hostname: str | None = setting(
        None, env="ALT_CA_HOSTNAME", meaning="a further name that the CA's certificate may have"
    )
    auth_token: str | None = setting(
        None,
        env="AUTH_TOKEN",
        meaning="token for the control plane: a file, read anew each time, or the token itself",
        shown="./var/run/secrets/tokens/istio-token if present",
        secret=True,
    )
    secret_ttl: float = setting(
        86_400.0,
        env="SECRET_TTL",
        parse=parse_seconds,
        meaning="lifetime asked for certificates",
        shown="24h",
        validator=between(1, 90 * 86_400),
    )
    xds_headers: tuple[tuple[str, str], ...] = attrs.field(default=(), repr=False)
    """Further headers for discovery, from `XDS_HEADER_<name>`."""
    ca_headers: tuple[tuple[str, str], ...] = attrs.field(default=(), repr=False)
    """Further headers for the CA, from `CA_HEADER_<name>`."""
    crl_path: Path | None = setting(  # noqa: RUF009 - it is attrs.field
        None,
        env="CRL_PATH",
        parse=parse_optional_path,
        meaning="file of revocation lists, PEM or DER, read anew when it changes; they end live tunnels too",
    )
    local_xds_path: Path | None = setting(  # noqa: RUF009 - it is attrs.field
        None,
        env="LOCAL_XDS_PATH",
        parse=parse_path,
        meaning="YAML file of workloads, services and policies, read at start",
    )
    local_xds: str | None = setting(None, env="LOCAL_XDS", meaning="the same as text; not together with the file")

    packet_mark: int | None = setting(
        None,
        env="PACKET_MARK",
        parse=parse_int,
        meaning="SO_MARK of outgoing connections",
        validator=attrs.validators.optional(between(0, 2**32 - 1)),
    )
    keepalive_enabled: bool = setting(True, env="KEEPALIVE_ENABLED", parse=parse_bool, meaning="TCP keepalive")
    keepalive_time: float = setting(
        180.0,
        env="KEEPALIVE_TIME",
        parse=parse_seconds,
        meaning="idle time before the first TCP probe",
        shown="180s",
        validator=between(1, 32_767),
    )
    keepalive_interval: float = setting(
        180.0,
        env="KEEPALIVE_INTERVAL",
        parse=parse_seconds,
        meaning="time between TCP probes",
        shown="180s",
        validator=between(1, 32_767),
    )
    keepalive_retries: int = setting(
        9,
        env="KEEPALIVE_RETRIES",
        parse=parse_int,
        meaning="TCP probes until the peer counts as gone",
        validator=between(1, 127),
    )
    user_timeout_enabled: bool = setting(
        False,
        env="USER_TIMEOUT_ENABLED",
        parse=parse_bool,
        meaning="TCP_USER_TIMEOUT: the idle time and all probes together",
    )

    pool_max_streams: int = setting(
        100,
        env="POOL_MAX_STREAMS_PER_CONNECTION",
        parse=parse_int,
        meaning="streams of one tunnel, after which a further one is opened",
        validator=between(1, 65_535),
    )
    pool_idle: float = setting(
        300.0,
        env="POOL_UNUSED_RELEASE_TIMEOUT",
        parse=parse_seconds,
        meaning="idle time after which a tunnel is closed",
        shown="5m",
        validator=between(0.01, 86_400),
    )
    stream_window: int = setting(
        4 * MIB,
        env="HTTP2_STREAM_WINDOW_SIZE",
        parse=parse_int,
        meaning="largest receive window of a stream, in bytes",
        validator=between(65_535, 2**31 - 1),
    )
    connection_window: int = setting(
        16 * MIB,
        env="HTTP2_CONNECTION_WINDOW_SIZE",
        parse=parse_int,
        meaning="receive window of a tunnel, in bytes",
        validator=between(65_535, 2**31 - 1),
    )
    frame_size: int = setting(
        MIB,
        env="HTTP2_FRAME_SIZE",
        parse=parse_int,
        meaning="largest HTTP/2 frame accepted, in bytes",
        validator=between(16_384, 2**24 - 1),
    )

    drain_deadline: float = setting(
        5.0,
        env="CONNECTION_TERMINATION_DEADLINE",
        parse=parse_seconds,
        meaning="time that open connections get when the proxy stops",
        shown="5s",
        validator=between(0, 86_400),
    )
    original_source: bool | None = setting(
        None,
        env="ENABLE_ORIG_SRC",
        parse=parse_bool,
        meaning="keep clients' addresses towards the application; unset: where it is seen to work",
    )
    ipv6_enabled: bool = setting(
        True, env="IPV6_ENABLED", parse=parse_bool, meaning="listen on `::` instead of 0.0.0.0"
    )
    socks5_enabled: bool = setting(
        False, env="UNSTABLE_ENABLE_SOCKS5", parse=parse_bool, meaning="SOCKS5 listener on loopback"
    )
    preferred_namespace: str | None = setting(
        None,
        env="PREFERED_SERVICE_NAMESPACE",
        meaning="DNS: of services of one host name, those of this namespace win over others' that are not canonical",
    )
    on_demand: bool = setting(
        False,
        env="XDS_ON_DEMAND",
        parse=exactly_true,
        meaning="ask for an address when a connection needs it, instead of subscribing to all; not with the DNS proxy",
    )
    localhost_app_tunnel: bool = setting(
        True,
        env="LOCALHOST_APP_TUNNEL",
        parse=parse_bool,
        meaning="an application that takes PROXY headers is reached on loopback",
    )
    response_baggage: bool = setting(
        True,
        env="ENABLE_RESPONSE_BAGGAGE",
        parse=parse_bool,
        meaning="send baggage in answers to CONNECT, and use that of requests for telemetry",
    )
    policy_info_logging: bool = setting(
        False,
        env="AUTHZ_POLICY_INFO_LOGGING",
        parse=exactly_true,
        meaning="exactly `true`: log each policy decision at info instead of debug",
    )

    pod_namespace: str = setting("", env="POD_NAMESPACE", meaning="the proxy's own namespace, told to discovery")
    pod_name: str = setting("", env="POD_NAME", meaning="the proxy's own name, told to discovery")
    service_account: str = setting("", env="SERVICE_ACCOUNT", meaning="the proxy's own service account, for dumps")
    trust_domain: str = setting("cluster.local", env="TRUST_DOMAIN", meaning="the proxy's own trust domain, for dumps")
    instance_ip: str = setting(NO_ADDRESS, env="INSTANCE_IP", meaning="this host's address, told to discovery")
    log_format: str = setting(
        "auto",
        env="LOG_FORMAT",
        parse=one_of("plain", "json", "console"),
        meaning="`plain`, `json` or `console`",
        shown="json, or console on a terminal",
    )
    log_level: str = setting(
        "info",
        env="RUST_LOG",
        parse=lambda value: str(read_levels(value)[0]),
        meaning="trace, debug, info, warn, error or off, and others for single scopes: `info,access=debug`",
    )

    bind_address: ipaddress.IPv4Address | ipaddress.IPv6Address | None = setting(  # noqa: RUF009 - it is attrs.field
        None,
        env="ZTUNNEL_BIND_ADDRESS",
        parse=parse_address,
        meaning="address that all listeners bind, and that outgoing connections come from; lets several share a host",
    )
    outbound_port: int = setting(
        15_001, env="ZTUNNEL_OUTBOUND_PORT", parse=parse_port, meaning="captured outgoing connections", validator=_PORT
    )
    inbound_port: int = setting(
        15_006, env="ZTUNNEL_INBOUND_PORT", parse=parse_port, meaning="captured incoming plaintext", validator=_PORT
    )
    hbone_port: int = setting(
        15_008,
        env="ZTUNNEL_HBONE_PORT",
        parse=parse_port,
        meaning="incoming tunnels; peers dial 15008",
        validator=_PORT,
    )
    socks5_port: int = setting(15_080, env="ZTUNNEL_SOCKS5_PORT", parse=parse_port, meaning="SOCKS5", validator=_PORT)
    dns_port: int = setting(
        15_053,
        env="ZTUNNEL_DNS_PORT",
        parse=parse_port,
        meaning="DNS proxy, on loopback; wins over `DNS_PROXY_ADDR`",
        validator=_PORT,
    )
    dns_servers: tuple[Address, ...] = setting(
        (),
        env="ZTUNNEL_DNS_SERVERS",
        parse=parse_servers,
        meaning="who knows the names that the mesh does not: `ip` or `ip:port`, with commas between",
        shown="those of /etc/resolv.conf",
    )
    admin_port: int = setting(
        15_000,
        env="ZTUNNEL_ADMIN_PORT",
        parse=parse_port,
        meaning="admin pages, on loopback only; wins over `proxyAdminPort`",
        validator=_PORT,
    )
    stats_port: int = setting(
        15_020, env="ZTUNNEL_STATS_PORT", parse=parse_port, meaning="metrics; wins over `statsPort`", validator=_PORT
    )
    ready_port: int = setting(15_021, env="ZTUNNEL_READY_PORT", parse=parse_port, meaning="readiness", validator=_PORT)
    state_dir: Path | None = setting(  # noqa: RUF009 - it is attrs.field
        None,
        env="ZTUNNEL_STATE_DIR",
        parse=parse_path,
        meaning="private directory of key, certificate, roots and the last picture of the mesh",
        shown=f"{DEFAULT_STATE_DIR} where it may be written",
    )
    worker_threads: str | None = setting(
        None,
        env="ZTUNNEL_WORKER_THREADS",
        parse=parse_share,
        meaning="processes that carry traffic, under one parent: a number, `0` for one a core, or a share of the cores"
        " such as `50%`; 1: the daemon's own process alone",
        shown="`concurrency` of the proxy configuration, else 1",
    )
    cpu_limit: int | None = setting(
        None,
        env="ZTUNNEL_CPU_LIMIT",
        parse=parse_int,
        meaning="cores that `0` and shares of `ZTUNNEL_WORKER_THREADS` are of",
        shown="those of this host that we may use",
        validator=attrs.validators.optional(between(1, MAX_WORKERS)),
    )
    resource_cpu_limit: int | None = setting(
        None,
        env="ZTUNNEL_RESOURCE_CPU_LIMIT",
        parse=parse_cores,
        meaning="the same as Kubernetes writes it, such as `2` or `1500m`, rounded up; wins over `ZTUNNEL_CPU_LIMIT`",
        validator=attrs.validators.optional(between(1, MAX_WORKERS)),
    )
    window_budget: int = setting(
        64 * MIB,
        env="ZTUNNEL_WINDOW_BUDGET",
        parse=parse_int,
        meaning="bytes by which the receive windows of all streams together may grow",
        validator=between(0, 2**40),
    )

    dns_proxy: bool = True
    """Whether the DNS proxy is on, by `DNS_CAPTURE` of the proxy metadata."""
    dns_address: IpAddress | None = None
    """Where it listens, by `DNS_PROXY_ADDR` of the proxy metadata; None is loopback."""
    proxy_metadata: Mapping[str, str] = attrs.field(factory=dict)
    """From `proxyMetadata` and `ISTIO_META_<key>`; told to discovery."""
    json_metadata: Mapping[str, Any] = attrs.field(factory=dict)
    """From `ISTIO_METAJSON_<key>`, parsed; told to discovery."""
    warnings: tuple[str, ...] = ()
    """What was set and does nothing here, one sentence each; to be logged at start."""

    @property
    def served(self) -> WorkloadInfo:
        """The workload that is served.

        Raises:
            ConfigurationError: none was named.
        """
        if self.workload is None:
            raise ConfigurationError(
                "PROXY_WORKLOAD_INFO is not set; name the workload as namespace/name/service-account,"
                " or enroll this host"
            )
        return self.workload

    @property
    def listen_host(self) -> str:
        """Address of the listeners that other hosts reach."""
        if self.bind_address is not None:
            return str(self.bind_address)
        return "::" if self.ipv6_enabled else "0.0.0.0"

    @property
    def loopback_host(self) -> str:
        """Address of admin and SOCKS5: the bind address where it is loopback, else 127.0.0.1; never another."""
        if self.bind_address is not None and self.bind_address.is_loopback:
            return str(self.bind_address)
        return "127.0.0.1"

    @property
    def dns_hosts(self) -> tuple[IpAddress, ...]:
        """Addresses of the DNS proxy: the one asked for, or loopback, of both families unless one is told."""
        if self.dns_address is not None:
            return (self.dns_address,)
        hosts = [parse_address(self.loopback_host)]
        if self.bind_address is None and self.ipv6_enabled:
            hosts.append(parse_address("::1"))
        return tuple(hosts)

    @property
    def own_ports(self) -> frozenset[int]:
        """Ports of our own listeners, which nothing may be proxied to."""
        ports = {
            self.outbound_port,
            self.inbound_port,
            self.hbone_port,
            self.admin_port,
            self.stats_port,
            self.ready_port,
        }
        if self.socks5_enabled:
            ports.add(self.socks5_port)
        if self.dns_proxy:
            ports.add(self.dns_port)
        return frozenset(ports - {0})

    @property
    def workers(self) -> int:
        """Processes that carry traffic. Source: Istio's ztunnel, worker threads; but one where none is asked for."""
        if self.worker_threads is None:
            return 1
        cores = self.resource_cpu_limit or self.cpu_limit or len(os.sched_getaffinity(0))
        if self.worker_threads.endswith("%"):
            percent = int(self.worker_threads[:-1])
            return min(MAX_WORKERS, max(1, -(-cores * percent // 100)))
        return min(MAX_WORKERS, int(self.worker_threads) or cores)

    @property
    def istio_version(self) -> str:
        """Version label of `istio_build`."""
        return self.proxy_metadata.get("ISTIO_VERSION") or "unknown"

    @property
    def connection(self) -> ConnectionConfig:
        """HTTP/2 parameters of tunnels."""
        return ConnectionConfig(
            stream_window=self.stream_window,
            connection_window=self.connection_window,
            max_frame_size=self.frame_size,
        )

    @classmethod
    def variables(cls) -> list[Variable]:
        """Every environment variable that is read, for the documentation."""
        return supported_variables(attrs.fields(cls))

    @classmethod
    def from_env(cls, environ: Mapping[str, str], *, directory: Path | None = None) -> Config:
        """Read the settings.

        Args:
            environ: The environment.
            directory: Where `etc/istio/config/mesh` is looked for; default the working directory.

        Raises:
            ConfigurationError: one sentence that names the variable and its value.
        """
        return cls(**read_settings(attrs.fields(cls), environ, directory or Path()))
