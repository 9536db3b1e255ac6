"""The outbound rules of Istio's ztunnel one by one, as tables: waypoints, load balancing, ports, addresses, names."""

from __future__ import annotations

import random
from ipaddress import ip_network
from typing import Any

import pytest
from tests.support.mesh import at, gateway_at, gateway_named, hbone, service, store_of, tcp

from ztunnel.errors import NoHealthyUpstream, UnknownWaypoint
from ztunnel.mesh import GatewayAddress, Service, Store, Workload, parse_ip
from ztunnel.mesh.endpoints import Purpose, candidates, choose, rank
from ztunnel.mesh.route import Plain, Refused, Resolve, Route, Tunnel, route
from ztunnel.mesh.service import LoadBalancer, Mode, Scope, WeightedWaypoint
from ztunnel.mesh.workload import ApplicationTunnel, Locality

SOURCE = hbone("client", "10.1.0.1", "fd00::1")
WEB = "default/web.default.svc.cluster.local"
WP = "default/wp.default.svc.cluster.local"


def routed(store: Store, destination: str, source: Workload = SOURCE, seed: int = 1, **options: Any) -> Route:
    store.apply_addresses([source])
    return route(store, source, at(destination), rng=random.Random(seed), **options)


def tunnel(store: Store, destination: str, **options: Any) -> Tunnel:
    found = routed(store, destination, **options)
    assert isinstance(found, Tunnel), found
    return found


# Waypoints

REFERENCES = {
    "address": gateway_at("10.9.0.9"),
    "virtual address": gateway_at("10.96.0.9"),
    "service name": gateway_named("default", "wp.default.svc.cluster.local"),
    "workload name": gateway_named("default", "wp.example"),
}
references = pytest.mark.parametrize("reference", list(REFERENCES.values()), ids=list(REFERENCES))


def behind(reference: GatewayAddress, **waypoint: Any) -> Store:
    """A workload and a service that both belong behind a waypoint."""
    waypoint.setdefault("hostname", "wp.example")
    return store_of(
        service("wp", "10.96.0.9", ports={15008: 15008}),
        hbone("wp", "10.9.0.9", services={WP: {}}, **waypoint),
        hbone("web", "10.2.0.1", services={WEB: {}}, waypoint=reference),
        service("web", "10.96.0.1", waypoint=reference),
    )


@references
@pytest.mark.parametrize("destination", ["10.2.0.1:80", "10.96.0.1:80"])
def test_waypoint_is_found_by_every_kind_of_reference(reference: GatewayAddress, destination: str) -> None:
    found = tunnel(behind(reference), destination)
    assert (found.next_hop, found.authority, found.waypoint) == (at("10.9.0.9:15008"), destination, True)


@references
def test_what_comes_from_the_waypoint_goes_to_the_workload(reference: GatewayAddress) -> None:
    store = behind(reference)
    waypoint = store.workloads["c//Pod/default/wp"]
    found = tunnel(store, "10.2.0.1:80", source=waypoint, client_ip=parse_ip("10.9.0.9"))
    assert (found.next_hop, found.waypoint) == (at("10.2.0.1:15008"), False)
    impostor = hbone("impostor", "10.9.0.7", service_account="wp")
    assert tunnel(store, "10.2.0.1:80", source=impostor, client_ip=parse_ip("10.9.0.7")).waypoint


@references
def test_a_service_is_reached_through_its_waypoint_even_from_there(reference: GatewayAddress) -> None:
    store = behind(reference)
    waypoint = store.workloads["c//Pod/default/wp"]
    assert tunnel(store, "10.96.0.1:80", source=waypoint, client_ip=parse_ip("10.9.0.9")).waypoint


def test_waypoint_of_an_endpoint_is_not_that_of_its_service() -> None:
    store = store_of(
        service("web", "10.96.0.1"),
        hbone("web", "10.2.0.1", services={WEB: {}}, waypoint=gateway_at("10.9.0.9")),
        hbone("wp", "10.9.0.9"),
    )
    assert tunnel(store, "10.96.0.1:80").next_hop == at("10.2.0.1:15008")


def test_waypoint_by_name_is_reached_in_the_family_of_the_destination() -> None:
    store = store_of(
        service("web", "10.96.0.1", "fd96::1", waypoint=gateway_named("default", "wp.default.svc.cluster.local")),
        service("wp", ports={15008: 15008}),
        hbone("wp", "10.9.0.9", "fd09::9", services={WP: {}}),
    )
    assert tunnel(store, "10.96.0.1:80").next_hop == at("10.9.0.9:15008")
    assert tunnel(store, "[fd96::1]:80").next_hop == at("[fd09::9]:15008")


def test_waypoint_by_address_is_reached_in_the_family_of_the_reference() -> None:
    store = store_of(
        service("web", "10.96.0.1", waypoint=gateway_at("fd96::9")),
        service("wp", "fd96::9", ports={15008: 15008}),
        hbone("wp", "10.9.0.9", "fd09::9", services={WP: {}}),
    )
    assert tunnel(store, "10.96.0.1:80").next_hop == at("[fd09::9]:15008")


def test_waypoint_service_without_the_port_is_unknown() -> None:
    store = store_of(
        service("web", "10.96.0.1", waypoint=gateway_at("10.96.0.9")),
        service("wp", "10.96.0.9", ports={80: 8080}),
        hbone("wp", "10.9.0.9", services={WP: {}}),
    )
    found = routed(store, "10.96.0.1:80")
    assert isinstance(found, Refused)
    assert isinstance(found.error, UnknownWaypoint)


def test_waypoint_that_was_drawn_and_is_not_known_is_not_replaced_by_another() -> None:
    entries = (WeightedWaypoint(gateway_at("10.9.0.9"), 1), WeightedWaypoint(gateway_at("10.9.0.8"), 1))
    store = store_of(
        service("web", "10.96.0.1", weighted_waypoints=entries, waypoint=gateway_at("10.9.0.9")),
        hbone("wp", "10.9.0.9"),
    )
    kinds = {type(routed(store, "10.96.0.1:80", seed=n)) for n in range(30)}
    assert kinds == {Tunnel, Refused}


def test_plain_waypoint_is_used_when_no_weighted_one_has_weight() -> None:
    store = store_of(
        service(
            "web",
            "10.96.0.1",
            weighted_waypoints=(WeightedWaypoint(gateway_at("10.9.0.8"), 0),),
            waypoint=gateway_at("10.9.0.9"),
        ),
        hbone("wp", "10.9.0.9"),
    )
    assert tunnel(store, "10.96.0.1:80").next_hop == at("10.9.0.9:15008")


def test_waypoint_known_by_host_name_only_is_resolved() -> None:
    store = store_of(
        service("web", "10.96.0.1", waypoint=gateway_named("default", "wp.example")), hbone("wp", hostname="wp.example")
    )
    found = routed(store, "10.96.0.1:80")
    assert isinstance(found, Resolve)
    then = found.then(parse_ip("192.0.2.9"))
    assert isinstance(then, Tunnel)
    assert (then.next_hop, then.authority, then.waypoint) == (at("192.0.2.9:15008"), "10.96.0.1:80", True)


# Load balancing


@pytest.mark.parametrize(
    ("scope", "values"),
    [
        (Scope.REGION, {"locality": Locality("r")}),
        (Scope.ZONE, {"locality": Locality("", "z")}),
        (Scope.SUBZONE, {"locality": Locality("", "", "s")}),
        (Scope.NODE, {"node": "n"}),
        (Scope.CLUSTER, {"cluster_id": "c"}),
        (Scope.NETWORK, {"network": "w"}),
    ],
)
def test_each_scope_compares_one_thing_of_source_and_endpoint(scope: Scope, values: dict[str, Any]) -> None:
    source, same, other = hbone("a", **values), hbone("b", **values), hbone("c")
    assert rank(source, same, (scope,)) == (1, 1)
    assert rank(source, other, (scope,)) == (0, 0)
    assert rank(hbone("d"), other, (scope,)) == (1, 1)  # two that say nothing are the same


def test_a_preference_after_one_that_fails_does_not_count() -> None:
    source = hbone("a", locality=Locality("r1", "z1"), node="n")
    other = hbone("b", locality=Locality("r1", "z2"), node="n")
    assert rank(source, other, (Scope.REGION, Scope.ZONE, Scope.NODE)) == (1, 1)


def test_failover_without_preferences_takes_all() -> None:
    store = store_of(
        service("web", "10.96.0.1", load_balancer=LoadBalancer(mode=Mode.FAILOVER)),
        hbone("a", "10.2.0.1", services={WEB: {}}),
        hbone("b", "10.2.0.2", services={WEB: {}}),
    )
    assert {tunnel(store, "10.96.0.1:80", seed=n).workload.name for n in range(30)} == {"a", "b"}


@pytest.mark.parametrize(("allow", "reached"), [(True, True), (False, False)])
def test_health_policy_decides_on_unhealthy_endpoints(*, allow: bool, reached: bool) -> None:
    store = store_of(
        service("web", "10.96.0.1", load_balancer=LoadBalancer(allow_unhealthy=allow)),
        hbone("web", "10.2.0.1", services={WEB: {}}, healthy=False),
    )
    assert isinstance(routed(store, "10.96.0.1:80"), Tunnel) is reached


def test_an_endpoint_without_capacity_leaves_the_next_best_to_failover() -> None:
    balancer = LoadBalancer(mode=Mode.FAILOVER, preferences=(Scope.REGION,))
    source = hbone("client", "10.1.0.1", locality=Locality("r1"))
    store = store_of(
        service("web", "10.96.0.1", load_balancer=balancer),
        hbone("none", "10.2.0.1", services={WEB: {}}, locality=Locality("r1"), capacity=0),
        hbone("some", "10.2.0.2", services={WEB: {}}, locality=Locality("r2")),
    )
    assert tunnel(store, "10.96.0.1:80", source=source).workload.name == "some"


# Ports

DECLARED: dict[int, int] = {80: 8080}
WITH_PORT, WITHOUT_PORT = ApplicationTunnel(proxy=True, port=15088), ApplicationTunnel(proxy=True)


@pytest.mark.parametrize(
    ("declared", "own", "app", "purpose", "used"),
    [
        (DECLARED, {}, None, Purpose.DESTINATION, 8080),
        (DECLARED, {80: 9}, None, Purpose.DESTINATION, 9),
        ({80: 0}, {80: 9}, None, Purpose.DESTINATION, 9),
        ({80: 0}, {}, None, Purpose.DESTINATION, None),
        ({80: 0}, {}, WITH_PORT, Purpose.DESTINATION, None),
        ({}, {80: 9}, None, Purpose.DESTINATION, None),
        ({}, {80: 9}, WITH_PORT, Purpose.DESTINATION, None),
        (DECLARED, {}, None, Purpose.WAYPOINT, 8080),
        ({}, {}, None, Purpose.WAYPOINT, None),
        ({}, {}, WITH_PORT, Purpose.WAYPOINT, 80),
        ({}, {}, WITHOUT_PORT, Purpose.WAYPOINT, None),
        ({}, {80: 9}, WITHOUT_PORT, Purpose.WAYPOINT, 9),
        ({80: 0}, {}, WITH_PORT, Purpose.WAYPOINT, 80),
        ({}, {}, WITH_PORT, Purpose.GATEWAY, None),
        (DECLARED, {}, None, Purpose.GATEWAY, 8080),
    ],
)
def test_port_of_an_endpoint(
    declared: dict[int, int], own: dict[int, int], app: ApplicationTunnel | None, purpose: Purpose, used: int | None
) -> None:
    web = service("web", "10.96.0.1", ports=declared)
    store = store_of(web, hbone("web", "10.2.0.1", services={WEB: own}, application_tunnel=app))
    ((_, candidate, why),) = candidates(store, SOURCE, web, 80, purpose)
    assert (candidate.port if candidate is not None else None) == used
    assert bool(why) is (used is None)
    assert [found.port for found in choose(store, SOURCE, web, 80, purpose).candidates] == ([used] if used else [])


# Addresses and names


def test_address_that_was_asked_for_is_used_where_the_workload_has_it() -> None:
    """Even as a virtual address of the service, and whatever families it prefers."""
    store = store_of(service("web", "10.2.0.2"), hbone("web", "10.2.0.1", "10.2.0.2", services={WEB: {}}))
    assert tunnel(store, "10.2.0.2:80").next_hop == at("10.2.0.2:15008")


def named(namespace: str, *vips: str, **values: Any) -> Service:
    return service("web", *vips, namespace=namespace, hostname=f"web.{namespace}", **values)


def in_namespace(namespace: str) -> Workload:
    return hbone(f"web-{namespace}", f"10.2.0.{len(namespace)}", services={f"{namespace}/web.{namespace}": {}})


WHERE: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "address": (("10.50.3.4",), {}),
    "range": ((), {"cidrs": (("", ip_network("10.50.0.0/16")),)}),
}


@pytest.mark.parametrize("kind", WHERE)
@pytest.mark.parametrize(
    ("client", "reached"), [("default", "web-canonical"), ("other", "web-other"), ("private", "web-private")]
)
def test_service_is_chosen_by_the_clients_namespace(kind: str, client: str, reached: str) -> None:
    vips, values = WHERE[kind]
    store = store_of(
        named("private", *vips, namespace_only=True, **values),
        named("other", *vips, **values),
        named("canonical", *vips, canonical=True, **values),
        *(in_namespace(name) for name in ("private", "other", "canonical")),
    )
    source = hbone("client", "10.1.0.1", namespace=client)
    assert tunnel(store, "10.50.3.4:80", source=source).workload.name == reached


@pytest.mark.parametrize("kind", WHERE)
def test_service_that_only_its_namespace_sees_is_passed_by(kind: str) -> None:
    vips, values = WHERE[kind]
    store = store_of(named("private", *vips, namespace_only=True, **values), in_namespace("private"))
    assert isinstance(routed(store, "10.50.3.4:80"), Plain)


def test_virtual_address_counts_on_its_network_only() -> None:
    store = store_of(service("web", "far/10.96.0.1"), hbone("web", "10.2.0.1", services={WEB: {}}))
    assert isinstance(routed(store, "10.96.0.1:80"), Plain)


def test_service_named_by_host_name_only_is_resolved_in_the_family_that_was_asked_for() -> None:
    store = store_of(service("web", "fd96::1"), tcp("web", hostname="web.example", services={WEB: {}}))
    found = routed(store, "[fd96::1]:80")
    assert isinstance(found, Resolve)
    assert (found.hostname, found.hint.version) == ("web.example", 6)
    assert found.then(parse_ip("192.0.2.7")) == Plain(
        at("192.0.2.7:8080"), store.workloads["c//Pod/default/web"], store.services[WEB]
    )


def test_nothing_left_is_no_upstream_and_never_the_original_destination() -> None:
    store = store_of(service("web", "10.96.0.1"), hbone("web", "10.2.0.1", services={WEB: {}}, capacity=0))
    found = routed(store, "10.96.0.1:80")
    assert isinstance(found, Refused)
    assert isinstance(found.error, NoHealthyUpstream)
