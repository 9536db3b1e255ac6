"""The decisions about a connection, told in words. It asks the very functions that connections ask."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import attrs

from ztunnel.errors import address_text
from ztunnel.mesh.endpoints import candidates, rank
from ztunnel.mesh.rbac import Connection, decide
from ztunnel.mesh.route import Plain, Refused, Resolve, Tunnel, find_service, route
from ztunnel.mesh.service import Mode

if TYPE_CHECKING:
    from collections.abc import Collection

    from ztunnel.mesh.address import Address, IpAddress
    from ztunnel.mesh.rbac import Decision
    from ztunnel.mesh.route import Route
    from ztunnel.mesh.service import Service
    from ztunnel.mesh.store import Store
    from ztunnel.mesh.workload import Workload

__all__ = ["Explanation", "Step", "explain"]

_MAX_LISTED = 20


@attrs.frozen
class Step:
    """One step of the decision."""

    topic: str
    """`source`, `destination`, `endpoints`, `waypoint`, `route`, `peer` or `policy`."""
    text: str


@attrs.frozen
class Explanation:
    """Every step, and how it ends."""

    steps: tuple[Step, ...]
    route: Route
    decision: Decision | None
    """Of the destination's policies, as far as they are known here; None when they are not asked."""

    @property
    def allowed(self) -> bool:
        """Whether the connection would be made and accepted."""
        return not isinstance(self.route, Refused) and (self.decision is None or self.decision.allowed)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        outcome: dict[str, Any] = {"kind": type(self.route).__name__.lower()}
        if isinstance(self.route, Tunnel):
            outcome["nextHop"] = address_text(self.route.next_hop)
            outcome["authority"] = self.route.authority
            outcome["expectedPeers"] = sorted(map(str, self.route.expected))
            outcome["waypoint"] = self.route.waypoint
        elif isinstance(self.route, Plain):
            outcome["address"] = address_text(self.route.address)
        elif isinstance(self.route, Resolve):
            outcome["hostname"] = self.route.hostname
        else:
            outcome["error"] = str(self.route.error)
        policy = None
        if self.decision is not None:
            policy = {"allowed": self.decision.allowed, "policy": self.decision.policy, "reason": self.decision.reason}
        return {
            "allowed": self.allowed,
            "route": outcome,
            "policy": policy,
            "steps": [{"topic": step.topic, "text": step.text} for step in self.steps],
        }


def explain(
    store: Store,
    source: Workload,
    destination: Address,
    *,
    network: str = "",
    own_ports: Collection[int] = frozenset(),
    own_addresses: Collection[IpAddress] = frozenset(),
    rng: random.Random | None = None,
    client_ip: IpAddress | None = None,
) -> Explanation:
    """What would happen to a connection of `source` to `destination`, and why.

    Args:
        store: The mesh.
        source: The client's workload.
        destination: Where it wants to go.
        network: The network of this node.
        own_ports: Ports of this proxy's own listeners.
        own_addresses: Addresses of this host.
        rng: Draws among endpoints; another draw may choose another.
        client_ip: Address of the client, if known.
    """
    ip, port = destination
    steps = [Step("source", f"{_name(source)} with identity {source.identity}")]
    target = store.workload_by_address(network, ip)
    addressed = None if target is not None else store.service_by_vip(network, ip, source.namespace)
    rejected = store.rejection(network, ip)
    if target is not None:
        text = f"{ip} is the address of workload {_name(target)}, reached by {target.protocol.value}"
    elif addressed is not None:
        text = f"{ip} is a virtual address of service {addressed.key}"
    elif rejected is not None:
        text = f"{ip} is claimed by {rejected.name}, which could not be read: {rejected.reason}"
    else:
        text = f"{ip} is not in the mesh on network {network!r}"
    steps.append(Step("destination", text))

    service = find_service(store, source, destination, addressed, network)
    if service is not None:
        steps += _endpoint_steps(store, source, service, port)
    waypoint = target.waypoint if target is not None else addressed.waypoint if addressed is not None else None
    if waypoint is not None:
        steps.append(Step("waypoint", f"traffic to it belongs through waypoint {waypoint}"))

    chosen = route(
        store,
        source,
        destination,
        network=network,
        own_ports=own_ports,
        own_addresses=own_addresses,
        rng=rng or random.Random(),
        client_ip=client_ip,
    )
    steps += _route_steps(chosen)
    decision = _decision(store, source, chosen, client_ip)
    if decision is not None:
        steps += _policy_steps(store, chosen, decision)
    return Explanation(tuple(steps), chosen, decision)


def _name(workload: Workload) -> str:
    return f"{workload.namespace}/{workload.name or workload.uid}"


def _endpoint_steps(store: Store, source: Workload, service: Service, port: int) -> list[Step]:
    if service.passthrough:
        return [Step("endpoints", f"service {service.key} keeps the original destination")]
    steps: list[Step] = []
    taken = store.endpoints(service)
    for uid, endpoint in store.members(service).items():
        if uid not in taken and not endpoint.healthy:
            steps.append(Step("endpoints", f"{uid} is left out: it is unhealthy"))
    balancer = service.load_balancer
    for endpoint, candidate, why in candidates(store, source, service, port):
        if candidate is None:
            steps.append(Step("endpoints", f"{endpoint.workload_uid} is left out: {why}"))
            continue
        workload = candidate.workload
        text = f"{_name(workload)} may be chosen, on port {candidate.port}, with weight {workload.capacity}"
        if workload.network != source.network:
            text = f"{_name(workload)} is on network {workload.network!r}, which cannot be reached from here yet"
        elif balancer is not None and balancer.mode in {Mode.STRICT, Mode.FAILOVER}:
            matched = rank(source, workload, balancer.preferences)[1]
            text += f"; meets {matched} of {len(balancer.preferences)} preferences ({balancer.mode.value})"
        steps.append(Step("endpoints", text))
    if not steps:
        steps.append(Step("endpoints", f"service {service.key} has no endpoint"))
    if len(steps) > _MAX_LISTED:
        more = len(steps) - _MAX_LISTED
        steps = [*steps[:_MAX_LISTED], Step("endpoints", f"and {more} more")]
    return steps


def _route_steps(chosen: Route) -> list[Step]:
    if isinstance(chosen, Refused):
        return [Step("route", f"refused: {chosen.error}")]
    if isinstance(chosen, Resolve):
        return [Step("route", f"the address of host name {chosen.hostname} is looked up when a connection needs it")]
    if isinstance(chosen, Plain):
        where = address_text(chosen.address)
        if chosen.workload is None:
            return [Step("route", f"plain TCP to {where}: it is passed through, out of the mesh")]
        return [Step("route", f"plain TCP to {_name(chosen.workload)} at {where}: it takes no tunnels")]
    kind = "waypoint" if chosen.waypoint else "workload"
    text = f"HBONE tunnel to {kind} {_name(chosen.workload)} at {address_text(chosen.next_hop)}"
    expected = " or ".join(sorted(map(str, chosen.expected)))
    return [Step("route", f"{text}, asking for {chosen.authority}"), Step("peer", f"it must prove to be {expected}")]


def _decision(store: Store, source: Workload, chosen: Route, client_ip: IpAddress | None) -> Decision | None:
    workload = chosen.workload if isinstance(chosen, (Tunnel, Plain)) else None
    if workload is None:
        return None
    source_ip = client_ip or next(iter(source.addresses), None)
    address = _reached(chosen)
    if source_ip is None or address is None:
        return None
    identity = source.identity if isinstance(chosen, Tunnel) else None
    return decide(store, workload, Connection(source_ip, identity, address))


def _reached(chosen: Route) -> Address | None:
    """The address that the destination's policies are asked about."""
    if isinstance(chosen, Plain):
        return chosen.address
    if not isinstance(chosen, Tunnel):
        return None
    port = int(chosen.authority.rpartition(":")[2])
    tunnel = chosen.workload.application_tunnel
    return chosen.next_hop[0], tunnel.port if tunnel is not None and tunnel.port else port


def _policy_steps(store: Store, chosen: Route, decision: Decision) -> list[Step]:
    assert isinstance(chosen, (Tunnel, Plain))
    assert chosen.workload is not None
    policies = store.policies_for(chosen.workload)
    names = ", ".join(policy.label for policy in policies.policies[:_MAX_LISTED]) or "none"
    steps = [Step("policy", f"policies of {_name(chosen.workload)}: {names}")]
    for name in policies.missing:
        steps.append(Step("policy", f"{name} is named by the workload, but the control plane did not send it"))
    for message, policy in decision.dry_run:
        steps.append(Step("policy", message + (f": {policy}" if policy else "")))
    steps.append(Step("policy", ("allowed" if decision.allowed else "denied") + f": {decision.reason}"))
    return steps
