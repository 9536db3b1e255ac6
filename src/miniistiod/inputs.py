"""What the mesh depends on besides its documents, and a service as the conversion sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from miniistiod.resources.model import Visibility

if TYPE_CHECKING:
    import datetime
    from collections.abc import Mapping

    from miniistiod.resources.binding import Key
    from miniistiod.resources.model import KubernetesService, ServiceEntry

__all__ = ["HboneMark", "Inputs", "ServiceModel"]


@attrs.frozen(kw_only=True)
class HboneMark:
    """A WorkloadEntry whose machine has proved that it runs a ztunnel; it is never sent as plaintext again."""

    service_account: str
    """The account that was proved; the mark holds while the entry names the same."""
    node: str = ""
    """NODE_NAME that the ztunnel gave, so that it finds itself."""


@attrs.frozen(kw_only=True)
class Inputs:
    """What the mesh depends on besides the documents."""

    trust_domain: str = "cluster.local"
    cluster_id: str = "Kubernetes"
    cluster_domain: str = "cluster.local"
    marks: Mapping[tuple[str, str], HboneMark] = attrs.Factory(dict)
    """By namespace and name of the WorkloadEntry."""
    vips: Mapping[tuple[str, str], int] = attrs.Factory(dict)
    """By namespace and host."""
    first_seen: Mapping[Key, datetime.datetime] = attrs.Factory(dict)
    """When a document was first seen, by kind, namespace and name; for those without creationTimestamp."""


@attrs.frozen(kw_only=True)
class ServiceModel:
    """One host of a service, whatever document it comes from."""

    source: ServiceEntry | KubernetesService
    host: str
    visibility: Visibility = Visibility.PUBLIC

    @property
    def name(self) -> str:
        """The resource name."""
        return f"{self.source.meta.namespace}/{self.host}"
