"""How a ztunnel stands: certificate, roots, token, control plane, revocation. For `status`, and as gauges."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ztunnel.membership import Membership
    from ztunnel.metrics import Metrics

__all__ = ["add_gauges", "status", "timestamp"]


def timestamp(seconds: float | None) -> str | None:
    """Seconds since 1970 as RFC 3339, for people and programs."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds)) if seconds is not None else None


def status(mesh: Membership) -> dict[str, Any]:
    """Identity, control plane and mesh, for `ztunnel status`."""
    svid = mesh.svids.status()
    own = mesh.own_workload()
    found: dict[str, Any] = {
        "workload": str(mesh.served),
        "identities": [],
        "controlPlane": None,
        "mesh": {
            "workloads": len(mesh.store.workloads),
            "services": len(mesh.store.services),
            "policies": len(mesh.store.policies),
            "rulingPolicies": len(mesh.store.policies_for(own).policies) if own is not None else None,
            "knowsWorkload": own is not None,
        },
        "revocation": _revocation(mesh),
        "rootsExpire": timestamp(_roots_expire(mesh)),
        "tokenExpires": timestamp(mesh.token_expires),
        "stateDirectory": str(mesh.state.path) if mesh.state is not None else None,
    }
    if svid.identity is not None:
        found["identities"] = [
            {
                "identity": str(svid.identity),
                "state": svid.state,
                "notBefore": timestamp(svid.not_before.timestamp() if svid.not_before else None),
                "expires": timestamp(svid.expires_at.timestamp() if svid.expires_at else None),
                "renewsInSeconds": round(svid.renew_in, 1) if svid.renew_in is not None else None,
                "error": svid.last_error,
            }
        ]
    if mesh.discovery is not None:
        plane = mesh.discovery.status()
        found["controlPlane"] = {
            "address": mesh.config.xds_address,
            "connected": plane.connected,
            "synced": plane.synced,
            "connectedSince": timestamp(plane.connected_since),
            "lastUpdate": timestamp(plane.last_update),
            "staleSince": timestamp(plane.stale_since),
            "error": plane.last_error,
            "rejected": plane.rejected,
        }
    return found


def _revocation(mesh: Membership) -> dict[str, Any]:
    """How many lists, how old, and whether one is past its time."""
    revocations = mesh.revocations
    made = [found.last_update_utc.timestamp() for found in revocations.current.lists]
    due = revocations.next_update()
    return {
        "lists": len(made),
        "certificates": revocations.current.count,
        "asOf": timestamp(min(made, default=None)),
        "nextUpdate": timestamp(due),
        "overdue": due is not None and due < mesh.wall(),
        "file": str(mesh.config.crl_path) if mesh.config.crl_path is not None else None,
        "error": revocations.error,
    }


def _roots_expire(mesh: Membership) -> float | None:
    """When the first of the roots that peers are judged by ends, seconds since 1970."""
    identity = mesh.svids.held()
    if identity is None:
        return None
    ends = [root.not_valid_after_utc.timestamp() for bundle in identity.bundles.values() for root in bundle.roots]
    return min(ends, default=None)


def add_gauges(metrics: Metrics, mesh: Membership) -> None:
    """Show the same on the metrics page. Times are in seconds since 1970, and 0 where there is nothing that ends."""

    def certificate() -> float:
        identity = mesh.svids.held()
        return identity.svid.expires_at.timestamp() if identity is not None else 0.0

    def stale() -> float:
        since = mesh.discovery.status().stale_since if mesh.discovery is not None else None
        return max(0.0, mesh.wall() - since) if since is not None else 0.0

    def connected() -> float:
        return float(mesh.discovery is not None and mesh.discovery.status().connected)

    def rejected() -> float:
        return float(mesh.discovery.status().rejected) if mesh.discovery is not None else 0.0

    for name, meaning, read in (
        ("ztunnel_certificate_expiration_timestamp_seconds", "End of the certificate in use", certificate),
        (
            "ztunnel_root_expiration_timestamp_seconds",
            "End of the first root that ends, of those that peers are judged by",
            lambda: _roots_expire(mesh) or 0.0,
        ),
        (
            "ztunnel_token_expiration_timestamp_seconds",
            "End of the token for the control plane, if it is one that says so",
            lambda: mesh.token_expires or 0.0,
        ),
        ("ztunnel_control_plane_connected", "Whether the discovery stream is open", connected),
        ("ztunnel_mesh_stale_seconds", "Age of the picture of the mesh while the control plane is away", stale),
        (
            "ztunnel_revocation_lists",
            "Revocation lists in force",
            lambda: float(len(mesh.revocations.current.lists)),
        ),
        (
            "ztunnel_revocation_next_update_timestamp_seconds",
            "When the first of the revocation lists should have been replaced by a newer one",
            lambda: mesh.revocations.next_update() or 0.0,
        ),
    ):
        metrics.add_gauge(name, meaning, read)
    metrics.add_counter("ztunnel_rejected_resources", "Resources of discovery that were refused", rejected)
