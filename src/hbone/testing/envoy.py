"""A real Envoy as HBONE peer: terminates our tunnels, and originates tunnels to us."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from hbone.testing.hosts import Host

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

__all__ = ["EnvoyPorts", "config", "envoy", "free_port", "sidecar_config"]

TLS_TYPE = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3"
HTTP_MANAGER = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
HTTP_OPTIONS = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
MIB = 1 << 20


class EnvoyPorts:
    """Where one Envoy listens."""

    def __init__(self) -> None:
        self.admin = free_port()
        self.hbone = free_port()
        """mTLS HTTP/2; each CONNECT goes to the application."""
        self.outbound = free_port()
        """Plain TCP; each connection leaves in a tunnel to `tunnel_to`."""
        self.pid = 0


_CANDIDATES = itertools.cycle(random.sample(range(20_000, 32_000), 12_000))


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that was free a moment ago, below those that the kernel gives to whoever connects meanwhile.

    Raises:
        OSError: `host` is not an address of this machine, or a thousand ports are taken.
    """
    for port in itertools.islice(_CANDIDATES, 1000):
        try:
            socket.create_server((host, port)).close()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            continue
        return port
    raise OSError(errno.EADDRINUSE, f"a thousand ports of {host} from 20000 to 31999 are taken")


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _cluster(name: str, host: str, port: int, **more: Any) -> dict[str, Any]:
    endpoint = {"endpoint": {"address": _address(host, port)}}
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
        **more,
    }


def _tls(directory: Path, prefix: str, alpn: Sequence[str] = ("h2",)) -> dict[str, Any]:
    return {
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "alpn_protocols": list(alpn),
        "tls_certificates": [
            {
                "certificate_chain": {"filename": str(directory / "envoy.pem")},
                "private_key": {"filename": str(directory / "envoy.key")},
            }
        ],
        "validation_context": {
            "trusted_ca": {"filename": str(directory / "root.pem")},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"prefix": prefix}}],
        },
    }


def config(
    directory: Path,
    ports: EnvoyPorts,
    *,
    application: tuple[str, int],
    tunnel_to: tuple[str, int],
    authority: str,
    max_frame: int = MIB,
    streams: int = 200,
    drain_after: int = 0,
    bind: str = "127.0.0.1",
) -> dict[str, Any]:
    """Envoy's bootstrap.

    Args:
        directory: holds envoy.pem, envoy.key and root.pem; Envoy's logs go there too.
        ports: where Envoy listens.
        application: where CONNECT streams end.
        tunnel_to: the HBONE server that plain connections are tunnelled to.
        authority: the `:authority` of those.
        max_frame: SETTINGS_MAX_FRAME_SIZE that Envoy announces, in bytes.
        streams: SETTINGS_MAX_CONCURRENT_STREAMS that Envoy announces.
        drain_after: streams after which Envoy drains a tunnel with GOAWAY; 0 never.
        bind: address that both listeners bind.
    """
    settings = [{"identifier": 5, "value": max_frame}]
    http2 = {
        "allow_connect": True,
        "max_concurrent_streams": streams,
        "initial_stream_window_size": 4 * MIB,
        "initial_connection_window_size": 16 * MIB,
        "custom_settings_parameters": settings,
    }
    manager: dict[str, Any] = {
        "@type": HTTP_MANAGER,
        "stat_prefix": "terminate",
        "http2_protocol_options": http2,
        "codec_type": "HTTP2",
        "stream_idle_timeout": "0s",
        "upgrade_configs": [{"upgrade_type": "CONNECT"}],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [
                        {
                            "match": {"connect_matcher": {}},
                            "route": {
                                "cluster": "application",
                                "timeout": "0s",
                                "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}],
                            },
                        }
                    ],
                }
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
            }
        ],
    }
    if drain_after:
        manager["common_http_protocol_options"] = {"max_requests_per_connection": drain_after}
    terminate = {
        "name": "terminate",
        "address": _address(bind, ports.hbone),
        "filter_chains": [
            {
                "transport_socket": {
                    "name": "tls",
                    "typed_config": {
                        "@type": f"{TLS_TYPE}.DownstreamTlsContext",
                        "require_client_certificate": True,
                        "common_tls_context": _tls(directory, "spiffe://"),
                    },
                },
                "filters": [{"name": "hcm", "typed_config": manager}],
            }
        ],
    }
    originate = {
        "name": "originate",
        "address": _address(bind, ports.outbound),
        "filter_chains": [
            {
                "filters": [
                    {
                        "name": "tcp",
                        "typed_config": {
                            "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
                            "stat_prefix": "originate",
                            "cluster": "tunnel",
                            "tunneling_config": {"hostname": authority},
                        },
                    }
                ]
            }
        ],
    }
    options = {
        HTTP_OPTIONS.rsplit("/", 1)[1]: {
            "@type": HTTP_OPTIONS,
            "explicit_http_config": {"http2_protocol_options": http2},
        }
    }
    tunnel = _cluster(
        "tunnel",
        *tunnel_to,
        typed_extension_protocol_options=options,
        transport_socket={
            "name": "tls",
            "typed_config": {
                "@type": f"{TLS_TYPE}.UpstreamTlsContext",
                "common_tls_context": _tls(directory, "spiffe://"),
            },
        },
    )
    runtime = {"envoy.reloadable_features.allow_multiplexed_upstream_half_close": True}
    return {
        "layered_runtime": {"layers": [{"name": "half-close", "static_layer": runtime}]},
        "admin": {"address": _address("127.0.0.1", ports.admin)},
        "static_resources": {
            "listeners": [terminate, originate],
            "clusters": [_cluster("application", *application), tunnel],
        },
    }


def sidecar_config(
    directory: Path, ports: EnvoyPorts, *, application: tuple[str, int], neighbour: tuple[str, int]
) -> dict[str, Any]:
    """Bootstrap of an Envoy beside an application, as in a mesh of sidecars: mutual TLS of its own, and no tunnel.

    Args:
        directory: as in `config`.
        ports: `hbone` takes mutual TLS on every address, `outbound` plain TCP on loopback.
        application: what comes by mutual TLS goes there.
        neighbour: what comes in plain TCP goes there, by mutual TLS.

    Source: Istio's ALPN of mutual TLS among sidecars.
    """

    def proxied(cluster: str) -> dict[str, Any]:
        kind = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"
        return {"name": "tcp", "typed_config": {"@type": kind, "stat_prefix": cluster, "cluster": cluster}}

    def secured(side: str, **more: Any) -> dict[str, Any]:
        context = {"common_tls_context": _tls(directory, "spiffe://", ("istio-peer-exchange", "istio")), **more}
        return {"name": "tls", "typed_config": {"@type": f"{TLS_TYPE}.{side}TlsContext", **context}}

    taken = {"transport_socket": secured("Downstream", require_client_certificate=True)}
    listeners = [
        {
            "name": "in",
            "address": _address("0.0.0.0", ports.hbone),
            "filter_chains": [{**taken, "filters": [proxied("application")]}],
        },
        {
            "name": "out",
            "address": _address("127.0.0.1", ports.outbound),
            "filter_chains": [{"filters": [proxied("neighbour")]}],
        },
    ]
    clusters = [
        _cluster("application", *application),
        _cluster("neighbour", *neighbour, transport_socket=secured("Upstream")),
    ]
    return {
        "admin": {"address": _address("127.0.0.1", ports.admin)},
        "static_resources": {"listeners": listeners, "clusters": clusters},
    }


async def _ready(host: Host, port: int) -> bool:
    try:
        with trio.move_on_after(1):
            async with await host.connect("127.0.0.1", port) as stream:
                await stream.send_all(b"GET /ready HTTP/1.1\r\nhost: envoy\r\nconnection: close\r\n\r\n")
                return b" 200 " in await stream.receive_some()
    except OSError:
        pass
    return False


@contextlib.asynccontextmanager
async def envoy(
    directory: Path, ports: EnvoyPorts, bootstrap: dict[str, Any], *, host: Host | None = None
) -> AsyncIterator[EnvoyPorts]:
    """Run Envoy with `bootstrap` for the body; one worker thread, ended by its own process id.

    Args:
        directory: for its configuration and its log.
        ports: where it listens, as in `bootstrap`.
        bootstrap: by `config` or `sidecar_config`.
        host: where it runs; here when None.

    Raises:
        RuntimeError: Envoy did not become ready within 30 seconds; the message has the end of its log.
    """
    file = directory / "envoy.json"
    file.write_text(json.dumps(bootstrap))
    binary = Path(sys.executable).with_name("envoy")
    log = directory / "envoy.log"
    where = host or Host(name="here", address="127.0.0.1")
    command = where.command(
        str(binary), "-c", str(file), "--concurrency", "1", "--use-dynamic-base-id", "-l", "warning"
    )
    with log.open("wb") as output:
        process = await trio.lowlevel.open_process(command, stdout=output, stderr=subprocess.STDOUT)
        ports.pid = process.pid
        try:
            with trio.move_on_after(30):
                while not await _ready(where, ports.admin):
                    if process.poll() is not None:
                        break
                    await trio.sleep(0.1)
            if process.poll() is not None or not await _ready(where, ports.admin):
                raise RuntimeError(f"Envoy did not become ready: {log.read_text()[-2000:]}")
            yield ports
        finally:
            process.terminate()
            with trio.CancelScope(shield=True), trio.move_on_after(5):
                await process.wait()
            if process.poll() is None:
                process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()
