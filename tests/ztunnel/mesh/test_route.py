from __future__ import annotations

import random
from collections import Counter
from ipaddress import ip_network
from typing import Any

import pytest
from tests.support.mesh import at, gateway_at, gateway_named, hbone, service, store_of, tcp

from hbone.identity import SpiffeId
from ztunnel.errors import (
    NoHealthyUpstream,
    NoService,
    RemoteNetwork,
    ResolutionFailed,
    SelfCall,
    UnknownWaypoint,
    UnusableDestination,
)
from ztunnel.mesh import RejectedResource, Service, Store, Workload, parse_ip
from ztunnel.mesh.endpoints import rank
from ztunnel.mesh.route import Plain, Refused, Resolve, Route, Tunnel, choose_waypoint, route
from ztunnel.mesh.service import Endpoint, IpFamilies, LoadBalancer, Mode, Scope, WeightedWaypoint
from ztunnel.mesh.workload import ApplicationTunnel, Locality

SOURCE = hbone("client", "10.1.0.1", "fd00::1")
OWN_PORTS = frozenset({15001, 15006, 15008, 15080, 15000, 15020, 15021})
WEB = "default/web.default.svc.cluster.local"


def routed(store: Store, destination: str, source: Workload = SOURCE, **options: Any) -> Route:
    store.apply_addresses([source])
    options.setdefault("own_ports", OWN_PORTS)
    options.setdefault("rng", random.Random(1))
    return route(store, source, at(destination), **options)


def tunnel(store: Store, destination: str, **options: Any) -> Tunnel:
    found = routed(store, destination, **options)
    assert isinstance(found, Tunnel), found
    return found


def plain(store: Store, destination: str, **options: Any) -> Plain:
    found = routed(store, destination, **options)
    assert isinstance(found, Plain), found
    return found


def refused(store: Store, destination: str, **options: Any) -> Exception:
    found = routed(store, destination, **options)
    assert isinstance(found, Refused), found
    return found.error


def test_unknown_destination_passes_through() -> None:
    assert plain(store_of(), "1.2.3.4:80") == Plain(at("1.2.3.4:80"))


@pytest.mark.parametrize("node", ["local", "remote"])
def test_tcp_workload_is_reached_directly_on_any_node(node: str) -> None:
    workload = tcp("web", "10.2.0.1", node=node)
    assert plain(store_of(workload), "10.2.0.1:80") == Plain(at("10.2.0.1:80"), workload)


@pytest.mark.parametrize("node", ["local", "remote"])
def test_hbone_workload_is_reached_through_15008_on_any_node(node: str) -> None:
    found = tunnel(store_of(hbone("web", "10.2.0.1", node=node)), "10.2.0.1:80")
    assert (found.next_hop, found.authority) == (at("10.2.0.1:15008"), "10.2.0.1:80")
    assert found.expected == {SpiffeId.parse("spiffe://cluster.local/ns/default/sa/web")}


def test_ipv6_authority_is_bracketed() -> None:
    found = tunnel(store_of(hbone("web", "fd00::2")), "[fd00::2]:80")
    assert (found.next_hop, found.authority) == (at("[fd00::2]:15008"), "[fd00::2]:80")


def test_mapped_destination_is_the_ipv4_workload() -> None:
    from ipaddress import IPv6Address

    store = store_of(hbone("web", "10.2.0.1"))
    found = route(store, SOURCE, (IPv6Address("::ffff:10.2.0.1"), 80))
    assert isinstance(found, Tunnel)


def test_service_leads_to_target_port_of_an_endpoint() -> None:
    store = store_of(service("web", "10.96.0.1"), hbone("web", "10.2.0.1", services={WEB: {}}))
    found = tunnel(store, "10.96.0.1:80")
    assert (found.next_hop, found.authority) == (at("10.2.0.1:15008"), "10.2.0.1:8080")
    assert found.service is not None
    assert found.service.key == WEB


def test_endpoint_mapping_wins_over_the_services_target_port() -> None:
    store = store_of(service("web", "10.96.0.1"), hbone("web", "10.2.0.1", services={WEB: {80: 9090}}))
    assert tunnel(store, "10.96.0.1:80").authority == "10.2.0.1:9090"


def test_only_the_endpoint_that_defines_a_named_port_is_eligible() -> None:
    store = store_of(
        service("web", "10.96.0.1", ports={80: 0}),
        hbone("a", "10.2.0.1", services={WEB: {}}),
        hbone("b", "10.2.0.2", services={WEB: {80: 8000}}),
    )
    assert {tunnel(store, "10.96.0.1:80", rng=random.Random(n)).authority for n in range(20)} == {"10.2.0.2:8000"}


def test_undeclared_port_of_a_service_is_refused() -> None:
    store = store_of(service("web", "10.96.0.1"), hbone("web", "10.2.0.1", services={WEB: {}}))
    error = refused(store, "10.96.0.1:81")
    assert str(error) == "no healthy upstream: 10.96.0.1:81"


def test_service_without_endpoints_is_refused() -> None:
    assert isinstance(refused(store_of(service("web", "10.96.0.1")), "10.96.0.1:80"), NoHealthyUpstream)


def test_service_with_only_unhealthy_endpoints_is_refused() -> None:
    store = store_of(service("web", "10.96.0.1"), hbone("web", "10.2.0.1", services={WEB: {}}, healthy=False))
    assert isinstance(refused(store, "10.96.0.1:80"), NoHealthyUpstream)


def test_service_names_widen_the_expected_identities_by_spiffe_ids_only() -> None:
    other = "spiffe://cluster.local/ns/default/sa/other"
    store = store_of(
        service("web", "10.96.0.1", subject_alt_names=(other, "web.example")),
        hbone("web", "10.2.0.1", services={WEB: {}}),
    )
    found = tunnel(store, "10.96.0.1:80")
    assert set(map(str, found.expected)) == {other, "spiffe://cluster.local/ns/default/sa/web"}


def test_near_endpoints_are_used_while_others_have_no_gateway() -> None:
    near, far = hbone("near", "10.2.0.1", services={WEB: {}}), hbone("far", "10.2.0.2", network="f", services={WEB: {}})
    store = store_of(service("web", "10.96.0.1"), near, far)
    assert {tunnel(store, "10.96.0.1:80", rng=random.Random(n)).workload.name for n in range(20)} == {"near"}


def test_sources_own_waypoint_is_not_used() -> None:
    source = hbone("client", "10.1.0.1", waypoint=gateway_at("10.9.0.9"))
    store = store_of(hbone("web", "10.2.0.1"), hbone("waypoint", "10.9.0.9"))
    assert tunnel(store, "10.2.0.1:80", source=source).next_hop == at("10.2.0.1:15008")


def test_waypoint_of_a_workload_gets_its_traffic() -> None:
    store = store_of(hbone("web", "10.2.0.1", waypoint=gateway_at("10.9.0.9")), hbone("waypoint", "10.9.0.9"))
    found = tunnel(store, "10.2.0.1:80")
    assert (found.next_hop, found.authority, found.waypoint) == (at("10.9.0.9:15008"), "10.2.0.1:80", True)
    assert set(map(str, found.expected)) == {"spiffe://cluster.local/ns/default/sa/waypoint"}


def test_waypoint_of_a_plaintext_workload_is_still_tunnelled_to() -> None:
    store = store_of(tcp("web", "10.2.0.1", waypoint=gateway_at("10.9.0.9")), hbone("waypoint", "10.9.0.9"))
    assert tunnel(store, "10.2.0.1:80").next_hop == at("10.9.0.9:15008")


def test_waypoint_by_ipv4_serves_an_ipv6_target() -> None:
    store = store_of(hbone("web", "fd00::2", waypoint=gateway_at("10.9.0.9")), hbone("waypoint", "10.9.0.9"))
    found = tunnel(store, "[fd00::2]:80")
    assert (found.next_hop, found.authority) == (at("10.9.0.9:15008"), "[fd00::2]:80")


def test_waypoint_of_a_service_keeps_address_and_port_of_the_service() -> None:
    store = store_of(
        service("web", "10.96.0.1", waypoint=gateway_at("10.9.0.9")),
        hbone("web", "10.2.0.1", services={WEB: {}}),
        hbone("waypoint", "10.9.0.9"),
    )
    found = tunnel(store, "10.96.0.1:80")
    assert (found.next_hop, found.authority) == (at("10.9.0.9:15008"), "10.96.0.1:80")
    assert found.service is not None


def test_waypoint_by_service_hostname_uses_its_mapped_port_and_names() -> None:
    key = "default/waypoint.default.svc.cluster.local"
    store = store_of(
        service("web", "10.96.0.1", waypoint=gateway_named("default", "waypoint.default.svc.cluster.local")),
        service(
            "waypoint", "10.96.0.9", ports={15008: 15009}, subject_alt_names=("spiffe://cluster.local/ns/i/sa/wp",)
        ),
        hbone("wp-1", "10.9.0.9", services={key: {}}),
    )
    found = tunnel(store, "10.96.0.1:80")
    assert found.next_hop == at("10.9.0.9:15009")
    assert set(map(str, found.expected)) == {
        "spiffe://cluster.local/ns/i/sa/wp",
        "spiffe://cluster.local/ns/default/sa/wp-1",
    }


def test_waypoint_by_workload_hostname() -> None:
    store = store_of(
        service("web", "10.96.0.1", waypoint=gateway_named("default", "wp.example")),
        hbone("wp", "10.9.0.9", hostname="wp.example"),
    )
    assert tunnel(store, "10.96.0.1:80").next_hop == at("10.9.0.9:15008")


def test_waypoint_with_an_application_tunnel_need_not_declare_the_port() -> None:
    key = "default/waypoint.default.svc.cluster.local"
    tunnel_to = ApplicationTunnel(proxy=True, port=15088)
    store = store_of(
        service("web", "10.96.0.1", waypoint=gateway_at("10.96.0.9")),
        service("waypoint", "10.96.0.9", ports={}),
        hbone("wp", "10.9.0.9", services={key: {}}, application_tunnel=tunnel_to),
    )
    assert tunnel(store, "10.96.0.1:80").next_hop == at("10.9.0.9:15008")


@pytest.mark.parametrize("where", ["service", "workload"])
def test_unknown_waypoint_is_never_bypassed(where: str) -> None:
    missing = gateway_at("10.9.0.9")
    on_service, on_workload = (missing, None) if where == "service" else (None, missing)
    store = store_of(
        service("web", "10.96.0.1", waypoint=on_service),
        hbone("web", "10.2.0.1", services={WEB: {}}, waypoint=on_workload),
    )
    error = refused(store, "10.96.0.1:80" if where == "service" else "10.2.0.1:80")
    assert isinstance(error, UnknownWaypoint)
    assert str(error) == "unknown waypoint: /10.9.0.9:15008"


def test_waypoint_on_another_network_is_refused() -> None:
    store = store_of(
        service("web", "10.96.0.1", waypoint=gateway_at("10.9.0.9", network="far")),
        hbone("wp", "10.9.0.9", network="far"),
    )
    assert isinstance(refused(store, "10.96.0.1:80"), RemoteNetwork)


def test_traffic_from_the_waypoint_goes_directly() -> None:
    waypoint = hbone("wp", "10.9.0.9")
    store = store_of(hbone("web", "10.2.0.1", waypoint=gateway_at("10.9.0.9")))
    for client_ip in (None, parse_ip("10.9.0.9")):
        found = tunnel(store, "10.2.0.1:80", source=waypoint, client_ip=client_ip)
        assert found.next_hop == at("10.2.0.1:15008")


def test_another_client_address_is_not_taken_for_the_waypoint() -> None:
    waypoint = hbone("wp", "10.9.0.9")
    store = store_of(hbone("web", "10.2.0.1", waypoint=gateway_at("10.9.0.9")))
    found = tunnel(store, "10.2.0.1:80", source=waypoint, client_ip=parse_ip("10.9.0.8"))
    assert found.waypoint


def test_weighted_waypoints_share_by_weight_and_skip_zero() -> None:
    entries = tuple(WeightedWaypoint(gateway_at(f"10.9.0.{n}"), weight) for n, weight in ((1, 0), (2, 75), (3, 25)))
    split = service("web", weighted_waypoints=entries)
    rng = random.Random(7)
    drawn = Counter(choose_waypoint(split, rng) for _ in range(10_000))
    assert set(drawn) == {entries[1].destination, entries[2].destination}
    assert 7_000 <= drawn[entries[1].destination] <= 8_000


def test_weighted_waypoints_without_weight_fall_back() -> None:
    none = service("web", weighted_waypoints=(WeightedWaypoint(gateway_at("10.9.0.1"), 0),))
    assert choose_waypoint(none, random.Random(1)) is None


def test_host_network_endpoint_is_reached_by_its_service_and_passed_through_by_address() -> None:
    node = hbone("node", "10.2.0.1", host_network=True, services={WEB: {}})
    store = store_of(service("web", "10.96.0.1"), node)
    assert tunnel(store, "10.96.0.1:80").workload == node
    assert plain(store, "10.2.0.1:80") == Plain(at("10.2.0.1:80"))


def test_each_family_keeps_its_family() -> None:
    store = store_of(service("web", "10.96.0.1", "fd96::1"), hbone("web", "10.2.0.1", "fd00::2", services={WEB: {}}))
    assert tunnel(store, "10.96.0.1:80").next_hop == at("10.2.0.1:15008")
    assert tunnel(store, "[fd96::1]:80").next_hop == at("[fd00::2]:15008")


@pytest.mark.parametrize(
    ("families", "target", "used"),
    [
        (IpFamilies.IPV6, "10.96.0.1:80", "[fd00::2]:15008"),
        (IpFamilies.IPV4, "[fd96::1]:80", "10.2.0.1:15008"),
        (IpFamilies.DUAL, "10.96.0.1:80", "10.2.0.1:15008"),
        (IpFamilies.DUAL, "[fd96::1]:80", "[fd00::2]:15008"),
    ],
)
def test_families_of_a_service_choose_the_address(families: IpFamilies, target: str, used: str) -> None:
    store = store_of(
        service("web", "10.96.0.1", "fd96::1", ip_families=families),
        hbone("web", "10.2.0.1", "fd00::2", services={WEB: {}}),
    )
    assert tunnel(store, target).next_hop == at(used)


def test_passthrough_service_keeps_the_destination() -> None:
    store = store_of(service("web", "10.96.0.1", load_balancer=LoadBalancer(mode=Mode.PASSTHROUGH)))
    assert plain(store, "10.96.0.1:80") == Plain(at("10.96.0.1:80"))


def test_passthrough_service_with_a_waypoint_uses_it() -> None:
    balancer = LoadBalancer(mode=Mode.PASSTHROUGH)
    store = store_of(
        service("web", "10.96.0.1", load_balancer=balancer, waypoint=gateway_at("10.9.0.9")), hbone("wp", "10.9.0.9")
    )
    assert tunnel(store, "10.96.0.1:80").next_hop == at("10.9.0.9:15008")


@pytest.mark.parametrize("mode", [Mode.PASSTHROUGH, Mode.STANDARD])
def test_hbone_workload_whose_address_is_a_services_too_is_never_plain(mode: Mode) -> None:
    store = store_of(service("web", "10.2.0.1", load_balancer=LoadBalancer(mode=mode)), hbone("web", "10.2.0.1"))
    assert tunnel(store, "10.2.0.1:80").next_hop == at("10.2.0.1:15008")


@pytest.mark.parametrize("ip", ["127.0.0.1", "[::1]", "127.5.5.5", "10.1.0.1"])
@pytest.mark.parametrize("port", sorted(OWN_PORTS))
def test_own_listeners_are_refused_on_every_own_address(ip: str, port: int) -> None:
    error = refused(store_of(), f"{ip}:{port}", own_addresses=frozenset({parse_ip("10.1.0.1")}))
    assert isinstance(error, SelfCall)
    assert str(error) == "attempted recursive call to ourselves"


def test_other_hosts_may_have_our_ports() -> None:
    assert isinstance(routed(store_of(hbone("web", "10.2.0.1")), "10.2.0.1:15020"), Tunnel)


def test_service_that_leads_back_to_an_own_listener_is_refused() -> None:
    store = store_of(service("web", "10.96.0.1", ports={80: 15000}))
    source = hbone("client", "10.1.0.1", services={WEB: {}})
    error = refused(store, "10.96.0.1:80", source=source, own_addresses=frozenset({parse_ip("10.1.0.1")}))
    assert isinstance(error, SelfCall)


def test_loopback_is_refused_unless_registered() -> None:
    assert isinstance(refused(store_of(), "127.0.0.1:80"), UnusableDestination)
    assert isinstance(routed(store_of(hbone("web", "127.0.1.2")), "127.0.1.2:80"), Tunnel)


@pytest.mark.parametrize("ip", ["0.0.0.0", "[::]", "224.0.0.1", "[ff02::1]"])
def test_addresses_of_nobody_are_refused(ip: str) -> None:
    assert isinstance(refused(store_of(), f"{ip}:80"), UnusableDestination)


def test_workload_that_could_not_be_read_is_refused_not_passed_through() -> None:
    store = store_of()
    bad = RejectedResource("c//Pod/default/web", "status 7 is unknown", addresses=(("", parse_ip("10.2.0.1")),))
    store.apply_addresses([], [], [bad])
    assert "status 7 is unknown" in str(refused(store, "10.2.0.1:80"))
    store.apply_addresses([], ["c//Pod/default/web"])
    assert isinstance(routed(store, "10.2.0.1:80"), Plain)


def test_hostname_workload_is_resolved_first() -> None:
    store = store_of(service("web", "10.96.0.1"), hbone("web", hostname="web.example", services={WEB: {}}))
    found = routed(store, "10.96.0.1:80")
    assert isinstance(found, Resolve)
    assert found.hostname == "web.example"
    resolved = found.then(parse_ip("192.0.2.7"))
    assert isinstance(resolved, Tunnel)
    assert (resolved.next_hop, resolved.authority) == (at("192.0.2.7:15008"), "192.0.2.7:8080")


@pytest.mark.parametrize("ip", ["127.0.0.1", "::1", "169.254.169.254", "0.0.0.0", "ff02::1", "::ffff:127.0.0.1"])
def test_hostname_may_not_lead_where_an_address_may_not(ip: str) -> None:
    store = store_of(service("web", "10.96.0.1"), tcp("web", hostname="web.example", services={WEB: {}}))
    found = routed(store, "10.96.0.1:80")
    assert isinstance(found, Resolve)
    resolved = found.then(parse_ip(ip))
    assert isinstance(resolved, Refused)
    assert isinstance(resolved.error, ResolutionFailed)


def test_workload_of_another_network_by_address_has_no_service() -> None:
    store = store_of(hbone("web", "10.2.0.1", network="far"))
    source = hbone("client", "10.1.0.1", network="near")
    assert isinstance(refused(store, "10.2.0.1:80", source=source, network="far"), NoService)


def balanced(mode: Mode) -> tuple[Store, Service]:
    web = service(
        "web",
        "10.96.0.1",
        load_balancer=LoadBalancer(mode=mode, preferences=(Scope.REGION, Scope.ZONE)),
    )
    store = store_of(
        web,
        hbone("same", "10.2.0.1", services={WEB: {}}, locality=Locality("r1", "z1")),
        hbone("region", "10.2.0.2", services={WEB: {}}, locality=Locality("r1", "z2")),
        hbone("else", "10.2.0.3", services={WEB: {}}, locality=Locality("r2", "z1")),
    )
    return store, web


@pytest.mark.parametrize(
    ("mode", "place", "chosen"),
    [
        (Mode.STRICT, Locality("r1", "z1"), {"same"}),
        (Mode.FAILOVER, Locality("r1", "z1"), {"same"}),
        (Mode.FAILOVER, Locality("r1", "z9"), {"same", "region"}),
        (Mode.FAILOVER, Locality("r9", "z1"), {"same", "region", "else"}),
        (Mode.STANDARD, Locality("r1", "z1"), {"same", "region", "else"}),
    ],
)
def test_routing_preferences_choose_endpoints(mode: Mode, place: Locality, chosen: set[str]) -> None:
    store, _ = balanced(mode)
    source = hbone("client", "10.1.0.1", locality=place)
    found = {tunnel(store, "10.96.0.1:80", source=source, rng=random.Random(n)).workload.name for n in range(60)}
    assert found == chosen


def test_strict_without_a_match_is_refused() -> None:
    store, _ = balanced(Mode.STRICT)
    source = hbone("client", "10.1.0.1", locality=Locality("r9", "z9"))
    assert isinstance(refused(store, "10.96.0.1:80", source=source), NoHealthyUpstream)


@pytest.mark.parametrize(
    ("network", "region", "zone", "score", "matched"),
    [
        ("n", "r", "z", 5, 3),
        ("n", "r", "x", 4, 2),
        ("n", "x", "z", 3, 1),
        ("x", "r", "z", 2, 2),
        ("x", "r", "x", 1, 1),
        ("x", "x", "x", 0, 0),
    ],
)
def test_rank_by_network_region_and_zone(network: str, region: str, zone: str, score: int, matched: int) -> None:
    source = hbone("a", network="n", locality=Locality("r", "z"))
    other = hbone("b", network=network, locality=Locality(region, zone))
    assert rank(source, other, (Scope.NETWORK, Scope.REGION, Scope.ZONE)) == (score, matched)


def test_capacity_weighs_and_zero_is_never_chosen() -> None:
    store = store_of(
        service("web", "10.96.0.1"),
        hbone("none", "10.2.0.1", services={WEB: {}}, capacity=0),
        hbone("one", "10.2.0.2", services={WEB: {}}, capacity=1),
        hbone("three", "10.2.0.3", services={WEB: {}}, capacity=3),
    )
    rng = random.Random(3)
    drawn = Counter(tunnel(store, "10.96.0.1:80", rng=rng).workload.name for _ in range(4000))
    assert set(drawn) == {"one", "three"}
    assert 2_800 <= drawn["three"] <= 3_200


def test_endpoint_without_workload_or_address_is_never_picked() -> None:
    static = {"ghost": Endpoint("ghost", {})}
    store = store_of(
        service("web", "10.96.0.1", endpoints=static),
        hbone("nowhere", services={WEB: {}}),
        hbone("web", "10.2.0.1", services={WEB: {}}),
    )
    assert {tunnel(store, "10.96.0.1:80", rng=random.Random(n)).workload.name for n in range(30)} == {"web"}


def test_choice_follows_changes_of_endpoints() -> None:
    store = store_of(service("web", "10.96.0.1"), hbone("a", "10.2.0.1", services={WEB: {}}))
    assert tunnel(store, "10.96.0.1:80").workload.name == "a"
    store.apply_addresses([hbone("b", "10.2.0.2", services={WEB: {}})], ["c//Pod/default/a"])
    assert tunnel(store, "10.96.0.1:80").workload.name == "b"


def test_cidr_service_is_found() -> None:
    store = store_of(
        service("web", cidrs=(("", ip_network("10.50.0.0/16")),)), hbone("web", "10.2.0.1", services={WEB: {}})
    )
    assert tunnel(store, "10.50.3.4:80").authority == "10.2.0.1:8080"
