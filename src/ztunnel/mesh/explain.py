"""The decisions about a connection, told in words. It asks the very functions that connections ask."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import attrs

from ztunnel.errors import address_text
from ztunnel.mesh.endpoints import Purpose, candidates, look_up, rank
from ztunnel.mesh.rbac import Connection, decide
from ztunnel.mesh.route import Plain, Refused, Resolve, Tunnel, find_service, route
from ztunnel.mesh.service import Mode

if TYPE_CHECKING:
    from collections.abc import Collection

    from hbone.identity import SpiffeId
    from ztunnel.mesh.address import Address, GatewayAddress, IpAddress
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
    """`source`, `destination`, `endpoints`, `waypoint`, `gateway`, `route`, `peer` or `policy`."""
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
            inner = self.route.inner
            if inner is not None:
                outcome["network"] = inner.workload.network
                outcome["expectedPeersBehindGateway"] = sorted(map(str, inner.expected))
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
    gateways: dict[GatewayAddress, str] = {}
    if service is not None:
        steps += _endpoint_steps(store, source, service, port, Purpose.DESTINATION, gateways)
    if addressed is not None:
        for entry in addressed.weighted_waypoints:
            text = f"{entry.weight} of its connections belong through waypoint {entry.destination}"
            steps.append(Step("waypoint", text + ("" if entry.weight else ": none")))
            steps += _place_steps(store, source, entry.destination, Purpose.WAYPOINT, gateways)
    waypoint = target.waypoint if target is not None else addressed.waypoint if addressed is not None else None
    if waypoint is not None:
        steps.append(Step("waypoint", f"traffic to it belongs through waypoint {waypoint}"))
        steps += _place_steps(store, source, waypoint, Purpose.WAYPOINT, gateways)
    for reference, beyond in gateways.items():
        steps.append(Step("gateway", f"network {beyond!r} is reached through {reference}"))
        steps += _place_steps(store, source, reference, Purpose.GATEWAY, {})

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
    asked = _asked(source, chosen, client_ip)
    decision = None
    if asked is not None:
        workload, connection = asked
        decision = decide(store, workload, connection)
        steps += _policy_steps(store, workload, connection, decision)
    return Explanation(tuple(steps), chosen, decision)


def _name(workload: Workload) -> str:
    return f"{workload.namespace}/{workload.name or workload.uid}"


def _place_steps(
    store: Store, source: Workload, reference: GatewayAddress, purpose: Purpose, gateways: dict[GatewayAddress, str]
) -> list[Step]:
    """What a reference leads to, and every alternative."""
    service, workload = look_up(store, reference, source.namespace)
    if service is not None:
        return _endpoint_steps(store, source, service, reference.hbone_mtls_port, purpose, gateways)
    if workload is None:
        return [Step(purpose.value, f"{reference} is neither a service nor a workload that is known here")]
    where = ", ".join(map(str, workload.addresses)) or workload.hostname or "no address"
    if workload.network != source.network and workload.network_gateway is not None and purpose is Purpose.WAYPOINT:
        gateways.setdefault(workload.network_gateway, workload.network)
    return [Step(purpose.value, f"{reference} is workload {_name(workload)} at {where}, the only one")]


def _endpoint_steps(
    store: Store,
    source: Workload,
    service: Service,
    port: int,
    purpose: Purpose,
    gateways: dict[GatewayAddress, str],
) -> list[Step]:
    """Each endpoint with what becomes of it.

    Args:
        store: The mesh.
        source: The client's workload.
        service: Whose endpoints.
        port: Of the service.
        purpose: What they are to be.
        gateways: Gets the gateways of those on other networks.
    """
    topic = "endpoints" if purpose is Purpose.DESTINATION else purpose.value
    if service.passthrough and purpose is Purpose.DESTINATION:
        return [Step(topic, f"service {service.key} keeps the original destination")]
    steps: list[Step] = []
    taken = store.endpoints(service)
    for uid, endpoint in store.members(service).items():
        if uid not in taken and not endpoint.healthy:
            steps.append(Step(topic, f"{uid} is left out: it is unhealthy"))
    balancer = service.load_balancer
    for endpoint, candidate, why in candidates(store, source, service, port, purpose):
        if candidate is None:
            steps.append(Step(topic, f"{endpoint.workload_uid} is left out: {why}"))
            continue
        workload = candidate.workload
        text = f"{_name(workload)} may be chosen, on port {candidate.port}, with weight {workload.capacity}"
        if workload.network != source.network and purpose is not Purpose.GATEWAY:
            text = f"{_name(workload)} on network {workload.network!r} may be chosen, with weight {workload.capacity}"
            if workload.network_gateway is not None:
                gateways.setdefault(workload.network_gateway, workload.network)
        if balancer is not None and balancer.mode in {Mode.STRICT, Mode.FAILOVER}:
            matched = rank(source, workload, balancer.preferences)[1]
            text += f"; meets {matched} of {len(balancer.preferences)} preferences ({balancer.mode.value})"
        steps.append(Step(topic, text))
    if not steps:
        steps.append(Step(topic, f"service {service.key} has no endpoint"))
    if len(steps) > _MAX_LISTED:
        more = len(steps) - _MAX_LISTED
        steps = [*steps[:_MAX_LISTED], Step(topic, f"and {more} more")]
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
    inner = chosen.inner
    kind = "gateway" if inner is not None else "waypoint" if chosen.waypoint else "workload"
    text = f"HBONE tunnel to {kind} {_name(chosen.workload)} at {address_text(chosen.next_hop)}"
    steps = [
        Step("route", f"{text}, asking for {chosen.authority}"),
        Step("peer", f"it must prove to be {_any_of(chosen.expected)}"),
    ]
    if inner is not None:
        steps[1:1] = [
            Step("route", f"in it, a tunnel to whom the gateway chooses on network {inner.workload.network!r}")
        ]
        steps.append(Step("peer", f"whoever answers behind it must prove to be {_any_of(inner.expected)}"))
        steps.append(Step("policy", "the policies of whoever answers are asked there"))
    return steps


def _any_of(identities: frozenset[SpiffeId]) -> str:
    names = sorted(map(str, identities))
    more = f" or one of {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return " or ".join(names[:_MAX_LISTED]) + more


def _asked(source: Workload, chosen: Route, client_ip: IpAddress | None) -> tuple[Workload, Connection] | None:
    """Whose policies are asked about what; None where they are not known here."""
    workload = chosen.workload if isinstance(chosen, (Tunnel, Plain)) else None
    if workload is None or (isinstance(chosen, Tunnel) and chosen.inner is not None):
        return None
    source_ip = client_ip or next(iter(source.addresses), None)
    address = _reached(chosen)
    if source_ip is None or address is None:
        return None
    identity = source.identity if isinstance(chosen, Tunnel) else None
    return workload, Connection(source_ip, identity, address)


def _reached(chosen: Route) -> Address | None:
    """The address that the destination's policies are asked about."""
    if isinstance(chosen, Plain):
        return chosen.address
    if not isinstance(chosen, Tunnel):
        return None
    port = int(chosen.authority.rpartition(":")[2])
    tunnel = chosen.workload.application_tunnel
    return chosen.next_hop[0], tunnel.port if tunnel is not None and tunnel.port else port


def _policy_steps(store: Store, workload: Workload, connection: Connection, decision: Decision) -> list[Step]:
    """Each policy in the order of evaluation, with what it says, and what comes of it."""
    policies = store.policies_for(workload)
    names = ", ".join(policy.label for policy in policies.policies[:_MAX_LISTED]) or "none"
    steps = [Step("policy", f"policies of {_name(workload)}: {names}")]
    groups = (
        ("would deny but is a dry run", policies.dry_deny),
        ("denies", policies.deny),
        ("would allow but is a dry run", policies.dry_allow),
        ("allows", policies.allow),
    )
    tested = [(label, what, matches) for what, group in groups for label, matches in group]
    for label, what, matches in tested[:_MAX_LISTED]:
        found = "matches" if matches(connection) else "does not match"
        steps.append(Step("policy", f"{label}, which {what}, {found}"))
    for name in policies.missing:
        steps.append(Step("policy", f"{name} is named by the workload, but the control plane did not send it"))
    for message, policy in decision.dry_run:
        steps.append(Step("policy", message + (f": {policy}" if policy else "")))
    steps.append(Step("policy", ("allowed" if decision.allowed else "denied") + f": {decision.reason}"))
    return steps
