"""A control plane for tests, and what its callers send."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

import miniistiod
from hbone.identity import Identity, TrustBundle, X509Svid
from miniistiod.watch import Debounce
from ztunnel.wire import ca_pb2, discovery_pb2
from ztunnel.wire.token import parse_enrolment_token

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

CREATE_CERTIFICATE = "/istio.v1.auth.IstioCertificateService/CreateCertificate"
DELTA = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
ADDRESS = "type.googleapis.com/istio.workload.Address"
AUTHORIZATION = "type.googleapis.com/istio.security.Authorization"

MESH = """
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: orders-1, namespace: shop, labels: {app: orders}}
spec: {address: 10.1.0.1, serviceAccount: orders}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: web-1, namespace: shop, labels: {app: web}}
spec: {address: 10.1.0.2, serviceAccount: web}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: orders, namespace: shop}
spec:
  hosts: [orders.mesh]
  addresses: [10.9.0.1]
  resolution: STATIC
  ports: [{number: 80, name: http, protocol: HTTP, targetPort: 8080}]
  workloadSelector: {labels: {app: orders}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: orders, namespace: shop}
spec:
  selector: {matchLabels: {app: orders}}
  rules: [{from: [{source: {serviceAccounts: [web]}}]}]
"""


def uid(name: str) -> str:
    """Resource name of a WorkloadEntry of `MESH`."""
    return f"Kubernetes/networking.istio.io/WorkloadEntry/shop/{name}"


@contextlib.asynccontextmanager
async def control_plane(
    directory: Path, documents: str | None = MESH, **fields: Any
) -> AsyncGenerator[miniistiod.MiniIstiod]:
    """A control plane on free ports of the loopback address, with its documents in `directory/mesh`."""
    mesh = directory / "mesh"
    mesh.mkdir(exist_ok=True)
    if documents is not None:
        (mesh / "mesh.yaml").write_text(documents)
    config = miniistiod.Config(
        config_dir=mesh,
        state_dir=directory / "state",
        init=True,
        listen=miniistiod.Address("127.0.0.1", 0),
        monitoring=miniistiod.Address("127.0.0.1", 0),
        debounce=Debounce(poll=0.01, quiet=0.01),
        **fields,
    )
    async with miniistiod.MiniIstiod(config) as cp:
        yield cp


def bearer(text: str) -> list[tuple[str, str]]:
    """Metadata with a token; of an enrolment token, what is presented of it."""
    secret = parse_enrolment_token(text).secret if text.startswith("enrol1.") else text
    return [("authorization", f"Bearer {secret}"), ("clusterid", "Kubernetes")]


class Applicant:
    """Somebody who asks for a certificate, with one key."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())

    def request(self, seconds: int = 0, impersonate: str | None = None) -> bytes:
        """A CreateCertificate request, as a ztunnel makes it."""
        csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(self.key, hashes.SHA256())
        message = ca_pb2.IstioCertificateRequest(
            csr=csr.public_bytes(serialization.Encoding.PEM).decode(), validity_duration=seconds
        )
        if impersonate is not None:
            message.metadata.update({"ImpersonatedIdentity": impersonate})
        return message.SerializeToString()

    def identity(self, answer: bytes) -> Identity:
        """The identity that an answer gives."""
        chain = ca_pb2.IstioCertificateResponse.FromString(answer).cert_chain
        key = self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        svid = X509Svid.from_pem("".join(chain[:-1]), key)
        return Identity(svid, {svid.id.trust_domain: TrustBundle.from_pem(svid.id.trust_domain, chain[-1])})


def subscribe(url: str = ADDRESS, *, name: str = "orders-1", namespace: str = "shop", **fields: Any) -> bytes:
    """The first request of a type, as a dedicated ztunnel sends it."""
    message = discovery_pb2.DeltaDiscoveryRequest(type_url=url, **fields)
    message.node.id = f"ztunnel~10.1.0.1~{name}.{namespace}~{namespace}.svc.cluster.local"
    message.node.metadata.update({"NAME": name, "NAMESPACE": namespace, "INSTANCE_IPS": "10.1.0.1", "NODE_NAME": ""})
    return message.SerializeToString()


def acknowledge(response: discovery_pb2.DeltaDiscoveryResponse, error: str | None = None) -> bytes:
    """ACK, or with `error` NACK, of a response."""
    message = discovery_pb2.DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
    if error is not None:
        message.error_detail.message = error
    return message.SerializeToString()
