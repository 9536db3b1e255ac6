"""The services of port 15012: certificates and discovery, behind one door. What a caller did wrong is told, no more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miniistiod import auth
from miniistiod.callers import Callers
from miniistiod.certificates import CREATE_CERTIFICATE, CertificateService
from miniistiod.registrar import Registrar
from miniistiod.streams import DELTA, STATE_OF_THE_WORLD, Discovery

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from miniistiod.authority import Authority
    from miniistiod.config import Config
    from miniistiod.mesh import Mesh
    from miniistiod.metrics import Metrics
    from miniistiod.store import Store

__all__ = ["Api"]


class Api:
    """Handlers by the path of their method."""

    def __init__(
        self,
        config: Config,
        store: Store,
        mesh: Mesh,
        metrics: Metrics,
        authority: Authority,
        issuers: auth.Verifier | None = None,
    ) -> None:
        callers = Callers(auth.Authenticator(store, issuers), metrics)
        certificates = CertificateService(config, authority, mesh, callers, metrics)
        self.registrar = Registrar(store, mesh, config.cluster_id, grace=config.registration_grace.total_seconds())
        self.discovery = Discovery(store, mesh, metrics, authority, callers, self.registrar)
        self.handlers: dict[str, Callable[[Any], Awaitable[None]]] = {
            CREATE_CERTIFICATE: certificates.create,
            DELTA: self.discovery.delta,
            STATE_OF_THE_WORLD: self.discovery.state_of_the_world,
        }
        authority.on_change(self.discovery.authority_changed)
        authority.on_change(self.registrar.authority_changed)
