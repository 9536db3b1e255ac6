"""What is known, as JSON for people and for `istioctl ztunnel-config`: the keys of ztunnel's `/config_dump`."""

from __future__ import annotations

import base64
import enum
import json
import time
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import trio
from cryptography.hazmat.primitives import serialization

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from cryptography import x509

    from ztunnel.control.svids import SvidManager
    from ztunnel.mesh import Authorization, Endpoint, Service, Store, Workload
    from ztunnel.mesh.address import GatewayAddress
    from ztunnel.mesh.policy import Match, ServiceAccount, StringMatch

__all__ = ["TIME", "dump_certificates", "encode", "mesh_dump"]

T = TypeVar("T")
R = TypeVar("R")
SLICE = 0.001
"""Seconds of work between two yields to the data path."""
TIME = "%Y-%m-%dT%H:%M:%SZ"


async def mesh_dump(store: Store) -> dict[str, Any]:
    """Workloads, services, policies and staged services, put together in slices."""
    return {
        "workloads": await _in_slices(_workload, sorted(store.workloads.values(), key=lambda found: found.uid)),
        "services": await _in_slices(
            lambda service: _service(service, store), sorted(store.services.values(), key=lambda found: found.hostname)
        ),
        "policies": await _in_slices(_policy, sorted(store.policies.values(), key=lambda found: found.key)),
        "stagedServices": {key: _endpoints(members) for key, members in store.staged().items()},
    }


async def encode(dumped: Mapping[str, Any]) -> bytes:
    """JSON, indented, keys sorted; long lists in slices, because the data path waits meanwhile."""
    parts: list[str] = []
    for key in sorted(dumped):
        value = dumped[key]
        if isinstance(value, list) and value:
            entries = await _in_slices(lambda entry: _json(entry, "\n    "), value)
            text = "[\n    " + ",\n    ".join(entries) + "\n  ]"
        else:
            text = _json(value, "\n  ")
        parts.append(f"  {json.dumps(key)}: {text}")
    return ("{\n" + ",\n".join(parts) + "\n}\n").encode()


def _json(value: Any, newline: str) -> str:
    return json.dumps(value, indent=2, sort_keys=True, default=str).replace("\n", newline)


async def _in_slices(make: Callable[[T], R], items: Iterable[T]) -> list[R]:
    made: list[R] = []
    end = time.perf_counter() + SLICE
    for item in items:
        made.append(make(item))
        if time.perf_counter() >= end:
            await trio.lowlevel.checkpoint()
            end = time.perf_counter() + SLICE
    return made


def dump_certificates(svids: SvidManager) -> list[dict[str, Any]]:
    """The certificate in use, without its key."""
    status = svids.status()
    identity = svids.held()
    if status.identity is None:
        return []
    roots = [root for bundle in identity.bundles.values() for root in bundle.roots] if identity is not None else []
    return [
        {
            "identity": str(status.identity),
            "state": status.state,
            "certChain": [_certificate(part) for part in identity.svid.chain] if identity is not None else [],
            "rootCerts": [_certificate(root) for root in roots],
        }
    ]


def _certificate(certificate: x509.Certificate) -> dict[str, str]:
    return {
        "pem": base64.b64encode(certificate.public_bytes(serialization.Encoding.PEM)).decode(),
        "serialNumber": str(certificate.serial_number),
        "validFrom": certificate.not_valid_before_utc.strftime(TIME),
        "expirationTime": certificate.not_valid_after_utc.strftime(TIME),
    }


def _workload(workload: Workload) -> dict[str, Any]:
    tunnel = workload.application_tunnel
    found: dict[str, Any] = {
        "uid": workload.uid,
        "name": workload.name,
        "namespace": workload.namespace,
        "workloadIps": [str(ip) for ip in workload.addresses],
        "hostname": workload.hostname,
        "network": workload.network,
        "protocol": workload.protocol.value,
        "networkMode": "HostNetwork" if workload.host_network else "Standard",
        "trustDomain": workload.trust_domain,
        "serviceAccount": workload.service_account,
        "waypoint": _gateway(workload.waypoint),
        "networkGateway": _gateway(workload.network_gateway),
        "node": workload.node,
        "canonicalName": workload.canonical_name,
        "canonicalRevision": workload.canonical_revision,
        "workloadType": workload.workload_type,
        "workloadName": workload.workload_name,
        "nativeTunnel": workload.native_tunnel,
        "applicationTunnel": (
            {"protocol": "PROXY" if tunnel.proxy else "NONE", "port": tunnel.port or None} if tunnel else None
        ),
        "services": sorted(workload.services),
        "authorizationPolicies": list(workload.authorization_policies),
        "status": "Healthy" if workload.healthy else "Unhealthy",
        "clusterId": workload.cluster_id,
        "locality": {name: value for name, value in attrs.asdict(workload.locality).items() if value},
        "capacity": workload.capacity,
    }
    required = {"uid", "name", "namespace", "workloadIps", "protocol", "capacity", "serviceAccount", "status"}
    return {key: value for key, value in found.items() if key in required or value not in ("", None, [], {}, False)}


def _gateway(gateway: GatewayAddress | None) -> dict[str, Any] | None:
    if gateway is None:
        return None
    return {"destination": str(gateway.destination), "hboneMtlsPort": gateway.hbone_mtls_port}


def _service(service: Service, store: Store | None) -> dict[str, Any]:
    members = store.endpoints(service) if store is not None else service.endpoints
    balancer = service.load_balancer
    found: dict[str, Any] = {
        "name": service.name,
        "namespace": service.namespace,
        "hostname": service.hostname,
        "vips": [str(vip) for vip in service.vips],
        "ports": {str(port): target for port, target in service.ports.items()},
        "endpoints": _endpoints(members),
    }
    optional: dict[str, Any] = {
        "cidrVips": [{"network": network, "cidr": str(cidr)} for network, cidr in service.cidrs],
        "subjectAltNames": list(service.subject_alt_names),
        "waypoint": _gateway(service.waypoint),
        "weightedWaypoints": [
            {"destination": _gateway(entry.destination), "weight": entry.weight} for entry in service.weighted_waypoints
        ],
        "loadBalancer": (
            {
                "routingPreferences": [scope.value for scope in balancer.preferences],
                "mode": balancer.mode.value,
                "healthPolicy": "AllowAll" if balancer.allow_unhealthy else "OnlyHealthy",
            }
            if balancer
            else None
        ),
        "ipFamilies": service.ip_families.value if service.ip_families.value != "Automatic" else None,
        "canonical": service.canonical,
        "visibility": "Namespace" if service.namespace_only else None,
    }
    return found | {key: value for key, value in optional.items() if value}


def _endpoints(members: Mapping[str, Endpoint]) -> dict[str, Any]:
    return {
        uid: {
            "workloadUid": endpoint.workload_uid,
            "port": {str(port): target for port, target in endpoint.ports.items()},
            "status": "Healthy" if endpoint.healthy else "Unhealthy",
        }
        for uid, endpoint in sorted(members.items())
    }


def _policy(policy: Authorization) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": policy.name,
        "namespace": policy.namespace,
        "scope": policy.scope.value,
        "action": policy.action.value,
        "rules": [[[_match(match) for match in clause] for clause in rule] for rule in policy.rules],
        "dryRun": policy.dry_run,
    }
    if policy.unusable:
        found["unusable"] = policy.unusable
    return found


def _match(match: Match) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in attrs.fields(type(match)):
        values = getattr(match, field.name)
        if values:
            head, *rest = field.name.split("_")
            found[head + "".join(part.title() for part in rest)] = [_value(value) for value in values]
    return found


def _value(value: StringMatch | ServiceAccount | object) -> Any:
    kind = getattr(value, "kind", None)
    if isinstance(kind, enum.Enum):
        text = getattr(value, "text", "")
        return {kind.value: [] if kind.value == "Presence" else text}
    if attrs.has(type(value)):
        return {"namespace": getattr(value, "namespace", ""), "serviceAccount": getattr(value, "name", "")}
    return value if isinstance(value, int) else str(value)
