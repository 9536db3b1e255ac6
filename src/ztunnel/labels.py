"""The labels of connections and questions, in Istio's order and with its odd ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from hbone.connect import Baggage
    from hbone.identity import SpiffeId
    from ztunnel.errors import ResponseFlag
    from ztunnel.mesh.service import Service
    from ztunnel.mesh.workload import Workload

__all__ = [
    "DNS",
    "SOURCE",
    "UNKNOWN",
    "Labels",
    "by_name",
    "connection_labels",
    "dns_labels",
    "merged",
    "source_labels",
]

UNKNOWN: Final = "unknown"
SOURCE: Final = (
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
)
DESTINATION: Final = (
    "destination_service",
    "destination_service_namespace",
    "destination_service_name",
    "destination_workload",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_cluster",
)
LOCALITY: Final = ("source_region", "source_zone", "destination_region", "destination_zone")

Labels = tuple[str, tuple[str, ...], tuple[str, ...], str, tuple[str, ...]]
"""Reporter, source, destination, security policy, locality (empty when nothing is known)."""
DNS: Final = ("request_query_type", "request_protocol", "source_canonical_service", "source_canonical_revision")


def by_name(labels: Labels, flag: ResponseFlag) -> dict[str, str]:
    """All labels of a connection, in Istio's order."""
    reporter, source, destination, policy, locality = labels
    return {
        "reporter": reporter,
        **dict(zip(SOURCE, source, strict=True)),
        **dict(zip(DESTINATION, destination, strict=True)),
        "request_protocol": "tcp",
        "response_flags": flag.value,
        "connection_security_policy": policy,
        **(dict(zip(LOCALITY, locality, strict=True)) if locality else {}),
    }


def merged(labels: Labels) -> Labels:
    """What connections are counted under when there are too many label sets."""
    return (labels[0], (UNKNOWN,) * len(SOURCE), (UNKNOWN,) * len(DESTINATION), UNKNOWN, ())


def dns_labels(query_type: str, protocol: str, source: Workload | None) -> tuple[str, ...]:
    """Values of `DNS`, for a question of a workload."""
    service, revision = (source.canonical_name, source.canonical_revision) if source is not None else ("", "")
    return (query_type, protocol, service or UNKNOWN, revision or UNKNOWN)


def source_labels(
    workload: Workload | None, identity: SpiffeId | None, baggage: Baggage | None = None
) -> tuple[str, ...]:
    """Values of `SOURCE`."""
    principal = str(identity) if identity is not None else ""
    return tuple(value or UNKNOWN for value in _party_labels(workload, principal, baggage))


def _party_labels(workload: Workload | None, principal: str, baggage: Baggage | None) -> tuple[str, ...]:
    if workload is not None:
        return _workload_labels(workload, principal)
    if baggage is None:
        return ("", "", "", "", principal, "", "", "")
    return (
        baggage.workload_name or "",
        baggage.service_name or "",
        baggage.service_version or "",
        baggage.namespace or "",
        principal,
        baggage.workload_name or "",  # as ztunnel has it, though the app is elsewhere the canonical name
        baggage.service_version or "",
        baggage.cluster or "",
    )


def _workload_labels(workload: Workload, principal: str) -> tuple[str, ...]:
    return (
        workload.workload_name,
        workload.canonical_name,
        workload.canonical_revision,
        workload.namespace,
        principal,
        workload.canonical_name,
        workload.canonical_revision,
        workload.cluster_id,
    )


def connection_labels(
    reporter: str,
    source: Workload | None,
    source_identity: SpiffeId | None,
    destination: Workload | None,
    service: Service | None,
    destination_identity: SpiffeId | None,
    security_policy: str,
    baggage: Baggage | None,
) -> Labels:
    """The label set of a connection; the arguments are those of `Metrics.connection`."""
    if destination_identity is None and destination is not None:
        destination_identity = destination.identity  # also for plaintext, as Istio has it
    principal = str(destination_identity) if destination_identity is not None else ""
    named = ("", "", "") if service is None else (service.hostname, service.namespace, service.name)
    said_here, said_there = (None, baggage) if reporter == "source" else (baggage, None)
    reached = _party_labels(destination, principal, said_there)
    locality: tuple[str, ...] = ()
    if source is not None or destination is not None or baggage is not None:
        places = (*_place(source, said_here), *_place(destination, said_there))
        locality = tuple(value or UNKNOWN for value in places)
    return (
        reporter,
        source_labels(source, source_identity, said_here),
        tuple(value or UNKNOWN for value in (*named, *reached)),
        security_policy,
        locality,
    )


def _place(workload: Workload | None, baggage: Baggage | None) -> tuple[str, str]:
    if workload is not None:
        return workload.locality.region, workload.locality.zone
    return ((baggage.region or "", baggage.zone or "")) if baggage is not None else ("", "")
