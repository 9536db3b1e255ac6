"""What is known, as JSON for people and for `istioctl ztunnel-config`: the keys of ztunnel's `/config_dump`."""

from __future__ import annotations

import base64
import enum
from typing import TYPE_CHECKING, Any

import attrs
from cryptography.hazmat.primitives import serialization

from ztunnel.dumpconfig import camel
from ztunnel.jsonstream import Rows, in_order

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cryptography import x509

    from ztunnel.control.svids import SvidManager
    from ztunnel.mesh import Authorization, Endpoint, Service, Store, Workload
    from ztunnel.mesh.address import GatewayAddress
    from ztunnel.mesh.local import LocalFile
    from ztunnel.mesh.policy import Match, ServiceAccount, StringMatch

__all__ = ["TIME", "dump_certificates", "mesh_dump", "static_dump", "workload_state"]

TIME = "%Y-%m-%dT%H:%M:%SZ"


def mesh_dump(store: Store) -> dict[str, Any]:
    """Workloads, services, policies and staged services as they are now; each entry is made when it is written."""
    return {
        "workloads": Rows(in_order(store.workloads.values(), lambda found: found.uid), _workload),
        "services": Rows(
            in_order(store.services.values(), lambda found: found.hostname), lambda service: _service(service, store)
        ),
        "policies": Rows(in_order(store.policies.values(), lambda found: found.key), _policy),
        "stagedServices": Rows(
            in_order(store.staged().items(), lambda found: found[0]),
            lambda found: (found[0], _endpoints(found[1])),
            named=True,
        ),
    }


def static_dump(local: LocalFile | None) -> dict[str, Any]:
    """What the local file described at the start, which is what is in force; ztunnel reads it again to show it."""
    return {
        "workloads": Rows(local.workloads if local is not None else (), _workload),
        "policies": Rows(local.policies if local is not None else (), _policy),
        "services": Rows(local.services if local is not None else (), lambda service: _service(service, None)),
    }


def workload_state(
    workload: Workload | None, connections: Mapping[str, Any], *, ready: bool
) -> dict[str, dict[str, Any]]:
    """The workload that is served with its connections, in the form of shared mode: `istioctl` reads them there."""
    if workload is None:
        return {}
    info = {
        "name": workload.name,
        "namespace": workload.namespace,
        "trustDomain": workload.trust_domain,
        "serviceAccount": workload.service_account,
    }
    return {workload.uid: {"state": "Up" if ready else "Pending", "connections": connections, "info": info}}


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


def _endpoints(members: Mapping[str, Endpoint]) -> Rows:
    return Rows(in_order(members.items(), lambda found: found[0]), _endpoint, named=True)


def _endpoint(found: tuple[str, Endpoint]) -> tuple[str, dict[str, Any]]:
    uid, endpoint = found
    return uid, {
        "workloadUid": endpoint.workload_uid,
        "port": {str(port): target for port, target in endpoint.ports.items()},
        "status": "Healthy" if endpoint.healthy else "Unhealthy",
    }


def _policy(policy: Authorization) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": policy.name,
        "namespace": policy.namespace,
        "scope": policy.scope.value,
        "action": policy.action.value,
        "rules": Rows(policy.rules, lambda rule: [[_match(match) for match in clause] for clause in rule]),
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
            found[camel(field.name)] = [_value(value) for value in values]
    return found


def _value(value: StringMatch | ServiceAccount | object) -> Any:
    kind = getattr(value, "kind", None)
    if isinstance(kind, enum.Enum):
        text = getattr(value, "text", "")
        return {kind.value: [] if kind.value == "Presence" else text}
    if attrs.has(type(value)):
        return {"namespace": getattr(value, "namespace", ""), "serviceAccount": getattr(value, "name", "")}
    return value if isinstance(value, int) else str(value)
