"""The CA service of port 15012. What a caller did wrong is told; who it failed to be is not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio

from hbone.daemon.logs import get_logger
from hbone.errors import IdentityError
from hbone.grpc import GrpcError, StatusCode
from hbone.identity import SpiffeId
from miniistiod import auth, ca
from miniistiod.callers import parse, remote_of
from ztunnel.wire import ca_pb2, workload_pb2

if TYPE_CHECKING:
    from miniistiod.authority import Authority
    from miniistiod.callers import Call, Callers
    from miniistiod.catalog import Catalog
    from miniistiod.config import Config
    from miniistiod.mesh import Mesh
    from miniistiod.metrics import Metrics

__all__ = ["CREATE_CERTIFICATE", "CertificateService", "accounts_on"]

_log = get_logger("miniistiod.api")
CREATE_CERTIFICATE = "/istio.v1.auth.IstioCertificateService/CreateCertificate"
MAX_REQUEST = 64 * 1024
"""Bytes of a request, from callers that have proved nothing yet; a CSR may have a quarter of it."""


class CertificateService:
    """Handler of CreateCertificate."""

    def __init__(self, config: Config, authority: Authority, mesh: Mesh, callers: Callers, metrics: Metrics) -> None:
        self._config = config
        self._authority = authority
        self._mesh = mesh
        self._callers = callers
        self._metrics = metrics

    async def create(self, call: Call) -> None:
        """Sign a certificate for the identity that the caller has shown to be, or may ask for as a node's proxy."""
        self._metrics.requests.inc()
        request = parse(ca_pb2.IstioCertificateRequest, await call.receive(MAX_REQUEST))
        self._callers.limit_anonymous(call)
        # Who is not believed hears nothing of the request; and all of it is judged before a token is spent on it.
        caller = await self._callers.for_certificate(call, None)
        try:
            key = ca.parse_request(request.csr)
            lifetime = ca.lifetime_for(
                request.validity_duration, self._config.default_lifetime, self._config.max_lifetime
            )
        except (ca.CertificateRequestError, ca.LifetimeError) as error:
            self._metrics.bad_requests.inc()
            _log.info("certificate request refused", reason=str(error), peer=remote_of(call))
            raise GrpcError(StatusCode.INVALID_ARGUMENT, f"CSR signing error ({error})") from None
        if caller.enrolled:
            caller = await self._callers.for_certificate(call, ca.key_hash(key))
        identity = self._identity(call, caller, dict(request.metadata.fields).get("ImpersonatedIdentity"))
        self._callers.limit(caller)
        try:
            _, chain = await trio.to_thread.run_sync(self._authority.issue, caller, identity, key, lifetime)
        except ca.SigningError as error:
            _log.error("cannot sign", reason=str(error))
            raise GrpcError(StatusCode.INTERNAL, "CSR signing error (the authority cannot sign)") from None
        except auth.Refused as error:
            raise self._callers.refused(call, "ca", str(error), "request authenticate failure") from None
        self._metrics.issued.labels(caller.kind).inc()
        if caller.enrolled:
            await self._mesh.enrolled(caller)
        await call.send(ca_pb2.IstioCertificateResponse(cert_chain=chain).SerializeToString())

    def _identity(self, call: Call, caller: auth.Caller, wanted: Any) -> SpiffeId:
        """Whose certificate it is to be."""
        if wanted is None or wanted.string_value == str(caller.identity):
            return caller.identity
        text: str = wanted.string_value
        why = f"{caller.identity} is no proxy of a node"
        try:
            identity = SpiffeId.parse(text)
        except IdentityError as error:
            why = str(error)
        else:
            if identity.trust_domain != caller.identity.trust_domain or identity.namespace is None:
                why = f"{identity} is not a workload of {caller.identity.trust_domain}"
            elif caller.node:
                if (identity.namespace, identity.service_account) in accounts_on(self._mesh.catalog, caller.node):
                    return identity
                why = f"no workload of that identity is on the node {caller.node!r}"
        raise self._callers.refused(
            call,
            "ca",
            why,
            "request impersonation authentication failure",
            caller=str(caller.identity),
            wanted=text[:2048],
        )


def accounts_on(catalog: Catalog, node: str) -> set[tuple[str, str]]:
    """Namespace and service account of the workloads that are registered on a node."""
    found = set()
    for name in catalog.by_node.get(node, ()):
        workload = workload_pb2.Address.FromString(catalog.addresses[name].body).workload
        found.add((workload.namespace, workload.service_account or "default"))
    return found
