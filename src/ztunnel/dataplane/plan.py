"""What the connections of one route have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hbone.connect import Authority, Baggage, ConnectRequest
from hbone.pool import PoolKey
from ztunnel.dataplane.sockets import text_of
from ztunnel.errors import address_text
from ztunnel.logs import INBOUND, OUTBOUND, Parties
from ztunnel.mesh.inbound import proxy_header
from ztunnel.mesh.rbac import Connection as PolicyFacts
from ztunnel.mesh.rbac import evaluate
from ztunnel.mesh.route import Plain, Tunnel

if TYPE_CHECKING:
    from collections.abc import Hashable

    from hbone.events import Headers
    from hbone.identity import SpiffeId
    from ztunnel.config import Config
    from ztunnel.dataplane.plane import Plane
    from ztunnel.dataplane.tunnel import Tunnel as LiveTunnel
    from ztunnel.mesh.address import Address
    from ztunnel.mesh.inbound import InboundTarget
    from ztunnel.mesh.rbac import Decision, PolicySet
    from ztunnel.mesh.route import Inner
    from ztunnel.mesh.store import Store
    from ztunnel.mesh.workload import Workload
    from ztunnel.metrics import Metrics, Traffic

__all__ = ["GatewayPlan", "InboundPlan", "Plan", "baggage_of", "inbound_accounts", "plan_of"]

_ANSWERERS: Final = 64  # behind one gateway, for one service


class Plan:
    """What the connections of one route have in common; made once, and forgotten when the mesh changes."""

    __slots__ = ("_traffic", "forwarded", "headers", "key", "network", "parties", "plane", "route", "source")

    def __init__(self, plane: Plane, source: Workload, found: Tunnel | Plain) -> None:
        self.plane = plane
        self.source = source
        self.route = found
        self._traffic: Traffic | None = None
        self.parties = Parties(
            OUTBOUND,
            found.next_hop if isinstance(found, Tunnel) else found.address,
            hbone_authority=found.authority if isinstance(found, Tunnel) else None,
            source_workload=source,
            source_identity=source.identity if isinstance(found, Tunnel) else None,
            destination_workload=found.workload,
            destination_identity=found.workload.identity if isinstance(found, Tunnel) else None,
            service=found.service,
        )
        self.key: PoolKey | None = None
        self.headers: Headers = ()
        self.network: Headers = ()
        """What only a CONNECT inside another says."""
        self.forwarded = b""
        if isinstance(found, Tunnel):
            ip, port = found.next_hop
            self.key = PoolKey(source.identity, (text_of(ip), port), found.expected)
            service = found.service
            fields = ConnectRequest(
                authority=Authority.parse(found.authority),
                baggage=baggage_of(source),
                forwarded_host=service.hostname if service is not None else None,
            ).to_headers()
            self.headers = tuple(field for field in fields if field[0] != b"forwarded")
            self.forwarded = b"".join(b";" + value for name, value in fields if name == b"forwarded")

    @property
    def traffic(self) -> Traffic:
        """The counters; made when there is something to count."""
        traffic = self._traffic
        if traffic is None:
            found = self.route
            tunnel = isinstance(found, Tunnel)
            traffic = self._traffic = self.plane.metrics.connection(
                "source",
                self.source,
                self.source.identity if tunnel else None,
                found.workload,
                found.service,
                None,
                "mutual_tls" if tunnel else "unknown",
            )
        return traffic


class GatewayPlan(Plan):
    """The same through a gateway, where it shows only in the end who answers."""

    __slots__ = ("_answerers", "inner")

    def __init__(self, plane: Plane, source: Workload, found: Tunnel, inner: Inner) -> None:
        super().__init__(plane, source, found)
        self.inner = inner
        network = ConnectRequest(authority=Authority.parse(found.authority), network=plane.config.network)
        self.network = tuple(field for field in network.to_headers() if field[0] == b"x-forwarded-network")
        self._answerers: dict[Hashable, tuple[Parties, Traffic]] = {}

    def answered(self, peer: SpiffeId | None, headers: Headers) -> tuple[Parties, Traffic]:
        """Who it was, by the certificate, and by its own words as far as labels go. Source: Istio, double HBONE."""
        baggage = Baggage.parse(value for name, value in headers if name == b"baggage") or Baggage()
        found = self._answerers.get((peer, baggage))
        if found is None:
            route = self.route
            assert isinstance(route, Tunnel)
            identity = self.source.identity
            parties = Parties(
                OUTBOUND,
                route.next_hop,
                hbone_authority=route.authority,
                source_workload=self.source,
                source_identity=identity,
                destination_identity=peer,
                service=route.service,
                destination_baggage=baggage,
            )
            traffic = self.plane.metrics.connection(
                "source", self.source, identity, None, route.service, peer, "mutual_tls", baggage
            )
            if len(self._answerers) >= _ANSWERERS:
                self._answerers.clear()
            found = self._answerers[peer, baggage] = (parties, traffic)
        return found


def plan_of(plane: Plane, source: Workload, found: Tunnel | Plain) -> Plan:
    """The plan for a route."""
    if isinstance(found, Tunnel) and found.inner is not None:
        return GatewayPlan(plane, source, found, found.inner)
    return Plan(plane, source, found)


class InboundPlan:
    """What the streams of one tunnel that ask for the same have in common; forgotten when the mesh changes.

    Policies are asked once, and again when they are others.
    """

    __slots__ = ("_decision", "_policies", "client", "facts", "header", "parties", "target", "traffic", "workload")

    def __init__(
        self,
        plane: Plane,
        workload: Workload,
        tunnel: LiveTunnel,
        local: Address,
        peer: SpiffeId,
        request: ConnectRequest,
        target: InboundTarget,
    ) -> None:
        client = tunnel.address
        self.client = address_text(client)
        self.workload = workload
        self.target = target
        self.facts = PolicyFacts(client[0], peer, target.address)
        self._policies: PolicySet | None = None
        self._decision: Decision | None = None
        self.header = b"" if target.proxy_target is None else proxy_header(client, target.proxy_target, peer)
        self.parties, self.traffic = inbound_accounts(
            plane.config, plane.store, plane.metrics, workload, client, local, peer, request, target
        )

    def decide(self, store: Store) -> Decision:
        """What the policies say to these facts; the same as before while the store gives the same set of them."""
        policies = store.policies_for(self.workload)
        decision = self._decision
        if decision is None or policies is not self._policies:
            self._policies = policies
            decision = self._decision = evaluate(policies, self.facts)
        return decision


def inbound_accounts(
    config: Config,
    store: Store,
    metrics: Metrics,
    workload: Workload,
    client: Address,
    local: Address,
    peer: SpiffeId,
    request: ConnectRequest,
    target: InboundTarget,
) -> tuple[Parties, Traffic]:
    """What a stream of a peer is logged and counted under; in a program that embeds us as in the daemon."""
    # A gateway's address is not the client's, so what the client's proxy says is all there is.
    by_gateway = request.is_from_gateway(config.network)
    source = None if by_gateway else store.workload_by_address(config.network, client[0])
    baggage = request.baggage if config.response_baggage else None
    parties = Parties(
        INBOUND,
        local,
        hbone_authority=str(request.authority),
        source_workload=source,
        source_identity=peer,
        destination_workload=workload,
        destination_identity=workload.identity,
        service=target.service,
        source_baggage=baggage,
    )
    said = baggage if source is None else None
    traffic = metrics.connection("destination", source, peer, workload, target.service, None, "mutual_tls", said)
    return parties, traffic


def baggage_of(workload: Workload) -> Baggage:
    """What we say of a workload. Source: ztunnel's baggage."""
    return Baggage(
        cluster=workload.cluster_id or None,
        namespace=workload.namespace or None,
        workload_type=workload.workload_type or None,
        workload_name=workload.workload_name or None,
        service_name=workload.canonical_name or None,
        service_version=workload.canonical_revision or None,
        region=workload.locality.region or None,
        zone=workload.locality.zone or None,
    )
