"""Counters and gauges, under the names that istiod's dashboards know where there is one."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.exposition import choose_encoder

__all__ = ["Metrics"]


class Metrics:
    """What Prometheus is shown. One for each control plane, so that several can live in a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter("citadel_server_csr", "Certificate requests received.", registry=registry)
        self.issued = Counter(
            "citadel_server_success_cert_issuance", "Certificates issued.", ["caller"], registry=registry
        )
        self.bad_requests = Counter(
            "citadel_server_csr_parsing_err", "Certificate requests that could not be used.", registry=registry
        )
        self.unauthenticated = Counter(
            "citadel_server_authentication_failure", "Callers that were not believed.", ["service"], registry=registry
        )
        self.root_expiry = Gauge(
            "citadel_server_root_cert_expiry_timestamp", "When the root expires, in Unix seconds.", registry=registry
        )
        self.signer_expiry = Gauge(
            "citadel_server_cert_chain_expiry_timestamp",
            "When the first certificate of the chain that signs expires, in Unix seconds.",
            registry=registry,
        )
        self.ca_degraded = Gauge(
            "miniistiod_ca_degraded", "1 while the newest files of the CA are not in force.", registry=registry
        )
        self.token_expiry = Gauge(
            "miniistiod_reusable_token_expiry_timestamp",
            "When the next reusable token that is valid expires, in Unix seconds; 0 when there is none.",
            registry=registry,
        )
        self.streams = Gauge("pilot_xds", "Discovery streams that are open.", registry=registry)
        self.pushes = Counter("pilot_xds_pushes", "Discovery responses sent.", ["type"], registry=registry)
        self.rejected = Counter(
            "pilot_total_xds_rejects", "Discovery responses that a client rejected.", ["type"], registry=registry
        )
        self.degraded = Gauge(
            "miniistiod_documents_degraded", "1 while the newest documents are not in force.", registry=registry
        )

    def expose(self, accept: str) -> tuple[bytes, str]:
        """The text of all metrics and its content type."""
        encoder, content_type = choose_encoder(accept)
        text: bytes = encoder(self.registry)
        return text, content_type
