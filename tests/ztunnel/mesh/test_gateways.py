"""Destinations on other networks: through which gateway, who is expected, and what is refused."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.mesh import at, gateway_at, gateway_named, hbone, service, store_of, tcp

from ztunnel.errors import NoHealthyUpstream, NoService, RemoteNetwork, UnknownGateway, UnusableDestination
from ztunnel.mesh import Service, Store, Workload, parse_ip
from ztunnel.mesh.route import Refused, Resolve, Route, Tunnel, route
from ztunnel.mesh.service import LoadBalancer, Mode, Scope
from ztunnel.mesh.workload import Locality, Protocol

if TYPE_CHECKING:
    from hbone.identity import SpiffeId

SOURCE = hbone("client", "10.1.0.1", network="near")
WEB = "default/web.default.svc.cluster.local"
NAME = "web.default.svc.cluster.local:80"
GATEWAY = tcp("gateway", "9.9.9.9", network="far")
REMOTE = "spiffe://cluster.local/ns/shop/sa/web"


def routed(store: Store, destination: str = "10.96.0.1:80", source: Workload = SOURCE, seed: int = 1) -> Route:
    store.apply_addresses([source])
    return route(store, source, at(destination), network="near", rng=random.Random(seed))


def tunnel(store: Store, destination: str = "10.96.0.1:80", **options: Any) -> Tunnel:
    found = routed(store, destination, **options)
    assert isinstance(found, Tunnel), found
    return found


def refused(store: Store, destination: str = "10.96.0.1:80", **options: Any) -> Exception:
    found = routed(store, destination, **options)
    assert isinstance(found, Refused), found
    return found.error


def web(**values: Any) -> Service:
    values.setdefault("subject_alt_names", (REMOTE,))
    return service("web", "near/10.96.0.1", **values)


def split(name: str = "split", **values: Any) -> Workload:
    """All endpoints of a service on another network in one: no address of its own, only a gateway."""
    values.setdefault("network_gateway", gateway_at("9.9.9.9", 15009, network="far"))
    values.setdefault("services", {WEB: {}})
    return Workload(
        uid=f"far/SplitHorizonWorkload/{name}",
        name=name,
        namespace="default",
        network="far",
        protocol=Protocol.HBONE,
        **values,
    )


def ids(found: frozenset[SpiffeId]) -> set[str]:
    return set(map(str, found))


def test_gateway_by_address_is_asked_for_the_services_name_and_port() -> None:
    found = tunnel(store_of(web(), split(), GATEWAY))
    assert (found.next_hop, found.authority, found.waypoint) == (at("9.9.9.9:15009"), NAME, False)
    assert found.workload == GATEWAY
    assert ids(found.expected) == {"spiffe://cluster.local/ns/default/sa/gateway"}
    assert found.inner is not None
    assert ids(found.inner.expected) == {REMOTE}
    assert found.service is not None
    assert found.service.key == WEB


def test_gateway_by_service_is_one_of_its_endpoints_on_its_mapped_port() -> None:
    key = "istio/gw.example"
    store = store_of(
        web(),
        split(network_gateway=gateway_named("istio", "gw.example", 15009)),
        service(
            "gw", "far/9.9.0.0", namespace="istio", hostname="gw.example", ports={15009: 15008},
            subject_alt_names=("spiffe://cluster.local/ns/istio/sa/gw",),
        ),
        tcp("gw-1", "9.9.9.1", network="far", services={key: {}}),
    )  # fmt: skip
    found = tunnel(store)
    assert found.next_hop == at("9.9.9.1:15008")
    assert ids(found.expected) == {
        "spiffe://cluster.local/ns/istio/sa/gw",
        "spiffe://cluster.local/ns/default/sa/gw-1",
    }


def test_gateway_by_the_virtual_address_of_a_service() -> None:
    key = "default/gw.default.svc.cluster.local"
    store = store_of(
        web(),
        split(network_gateway=gateway_at("9.9.0.0", 15009, network="far")),
        service("gw", "far/9.9.0.0", ports={15009: 15008}),
        tcp("gw-1", "9.9.9.1", network="far", services={key: {}}),
    )
    assert tunnel(store).next_hop == at("9.9.9.1:15008")


def test_gateways_share_by_capacity() -> None:
    key = "istio/gw.example"
    store = store_of(
        web(),
        split(network_gateway=gateway_named("istio", "gw.example", 15009)),
        service("gw", namespace="istio", hostname="gw.example", ports={15009: 15008}),
        tcp("gw-1", "9.9.9.1", network="far", services={key: {}}),
        tcp("gw-2", "9.9.9.2", network="far", services={key: {}}, capacity=0),
        tcp("gw-3", "9.9.9.3", network="far", services={key: {}}),
    )
    assert {tunnel(store, seed=n).next_hop for n in range(40)} == {at("9.9.9.1:15008"), at("9.9.9.3:15008")}


def test_gateway_by_host_name_of_a_workload_is_resolved_first() -> None:
    store = store_of(
        web(),
        split(network_gateway=gateway_named("istio", "lb.example", 15009)),
        tcp("lb", namespace="istio", hostname="lb.example", network="far"),
    )
    found = routed(store)
    assert isinstance(found, Resolve)
    assert found.hostname == "lb.example"
    then = found.then(parse_ip("192.0.2.7"))
    assert isinstance(then, Tunnel)
    assert (then.next_hop, then.authority) == (at("192.0.2.7:15009"), NAME)
    assert then.inner is not None


def test_gateway_service_that_does_not_declare_the_port_is_unknown() -> None:
    """Only a waypoint's port may go undeclared."""
    store = store_of(
        web(),
        split(network_gateway=gateway_named("istio", "gw.example", 15009)),
        service("gw", namespace="istio", hostname="gw.example", ports={80: 8080}),
        tcp("gw-1", "9.9.9.1", network="far", services={"istio/gw.example": {}}),
    )
    error = refused(store)
    assert isinstance(error, UnknownGateway)
    assert str(error) == "unknown network gateway: istio/gw.example:15009"


def test_unknown_gateway_is_never_bypassed() -> None:
    error = refused(store_of(web(), split(addresses=(parse_ip("10.2.0.1"),))))
    assert isinstance(error, UnknownGateway)
    assert str(error) == "unknown network gateway: far/9.9.9.9:15009"


@pytest.mark.parametrize("workload", [hbone, tcp])
def test_network_without_a_gateway_is_refused_and_never_plain(workload: Any) -> None:
    error = refused(store_of(web(), workload("web", "10.2.0.1", network="far", services={WEB: {}})))
    assert isinstance(error, RemoteNetwork)
    assert str(error) == ("no valid destination: 10.96.0.1:80 is on network 'far', and no gateway to there is known")


def test_endpoint_without_address_or_gateway_is_no_upstream() -> None:
    store = store_of(web(), split(network_gateway=None))
    assert isinstance(refused(store), RemoteNetwork)
    here = hbone("here", network="near", services={WEB: {}})
    assert isinstance(refused(store_of(web(), here)), NoHealthyUpstream)


def test_waypoint_on_another_network_is_reached_through_its_gateway() -> None:
    key = "default/waypoint.default.svc.cluster.local"
    store = store_of(
        web(waypoint=gateway_named("default", "waypoint.default.svc.cluster.local", 15008)),
        service("waypoint", ports={15008: 15008}, subject_alt_names=("spiffe://cluster.local/ns/shop/sa/wp",)),
        split("wp", services={key: {}}),
        GATEWAY,
    )
    found = tunnel(store)
    assert (found.next_hop, found.authority, found.waypoint) == (at("9.9.9.9:15009"), NAME, False)
    assert found.inner is not None
    assert ids(found.inner.expected) == {"spiffe://cluster.local/ns/shop/sa/wp"}
    assert found.service is not None
    assert found.service.key == WEB


def test_waypoint_of_another_network_without_a_gateway_is_refused() -> None:
    store = store_of(
        web(waypoint=gateway_at("10.9.0.9", network="far")),
        hbone("wp", "10.9.0.9", network="far"),
    )
    assert isinstance(refused(store), RemoteNetwork)


def test_workload_of_another_network_is_reached_by_its_service_only() -> None:
    far = hbone("web", "10.2.0.1", network="near", services={WEB: {}})
    source = hbone("client", "10.1.0.1", network="elsewhere")
    assert isinstance(refused(store_of(far), "10.2.0.1:80", source=source), NoService)


def test_workloads_waypoint_on_another_network_has_no_service_to_ask_for() -> None:
    store = store_of(
        hbone("web", "10.2.0.1", network="near", waypoint=gateway_at("10.9.0.9", network="far")),
        hbone("wp", "10.9.0.9", network="far", network_gateway=gateway_at("9.9.9.9", network="far")),
        GATEWAY,
    )
    assert isinstance(refused(store, "10.2.0.1:80"), NoService)


def test_endpoints_known_one_by_one_are_expected_too() -> None:
    """Any of them may be the gateway's choice, whichever we drew."""
    gateway = gateway_at("9.9.9.9", 15009, network="far")
    store = store_of(
        web(subject_alt_names=()),
        hbone("one", "10.2.0.1", network="far", network_gateway=gateway, services={WEB: {}}),
        hbone("two", "10.2.0.2", network="far", network_gateway=gateway, services={WEB: {}}),
        hbone("three", "10.2.0.2", network="third", network_gateway=gateway, services={WEB: {}}, capacity=0),
        hbone("near", "10.3.0.2", network="near", services={WEB: {}}, capacity=0),
        GATEWAY,
    )
    found = tunnel(store)
    assert found.inner is not None
    prefix = "spiffe://cluster.local/ns/default/sa/"
    assert ids(found.inner.expected) == {prefix + "one", prefix + "two"}
    store.apply_addresses([], ["c//Pod/default/two"])
    found = tunnel(store)
    assert found.inner is not None
    assert ids(found.inner.expected) == {prefix + "one"}


def test_nobody_to_expect_behind_the_gateway_is_refused() -> None:
    """What a workload that stands for many says of its own identity means nobody."""
    error = refused(store_of(web(subject_alt_names=("web.example",)), split(), GATEWAY))
    assert isinstance(error, UnusableDestination)
    assert "no identity is known" in str(error)


def test_hostname_that_is_no_authority_is_refused() -> None:
    everything = Service(
        name="all", namespace="default", hostname="*.example", vips=web().vips, ports={80: 80},
        subject_alt_names=(REMOTE,),
    )  # fmt: skip
    error = refused(store_of(everything, split(services={"default/*.example": {}}), GATEWAY))
    assert isinstance(error, UnusableDestination)


def test_near_and_far_share_by_capacity() -> None:
    """A workload that stands for many weighs as many."""
    store = store_of(web(), split(capacity=3), GATEWAY, hbone("web", "10.2.0.1", network="near", services={WEB: {}}))
    drawn = Counter(tunnel(store, seed=n).inner is not None for n in range(400))
    assert 260 <= drawn[True] <= 340


def test_network_as_first_preference_keeps_traffic_near_and_fails_over() -> None:
    balancer = LoadBalancer(mode=Mode.FAILOVER, preferences=(Scope.NETWORK, Scope.REGION))
    near = hbone("web", "10.2.0.1", network="near", services={WEB: {}})
    store = store_of(web(load_balancer=balancer), split(capacity=9), GATEWAY, near)
    assert {tunnel(store, seed=n).workload.name for n in range(30)} == {"web"}
    sick = hbone("web", "10.2.0.1", network="near", services={WEB: {}}, healthy=False)
    store.apply_addresses([sick])
    assert tunnel(store).inner is not None


def test_strict_preference_for_the_network_never_leaves_it() -> None:
    balancer = LoadBalancer(mode=Mode.STRICT, preferences=(Scope.NETWORK,))
    assert isinstance(refused(store_of(web(load_balancer=balancer), split(), GATEWAY)), NoHealthyUpstream)


def test_region_counts_across_networks() -> None:
    balancer = LoadBalancer(mode=Mode.FAILOVER, preferences=(Scope.REGION,))
    source = hbone("client", "10.1.0.1", network="near", locality=Locality("r1"))
    store = store_of(
        web(load_balancer=balancer),
        split(locality=Locality("r1")),
        GATEWAY,
        hbone("web", "10.2.0.1", network="near", services={WEB: {}}, locality=Locality("r2")),
    )
    assert all(tunnel(store, source=source, seed=n).inner is not None for n in range(20))


def test_undeclared_port_is_refused_on_every_network() -> None:
    assert isinstance(refused(store_of(web(), split(), GATEWAY), "10.96.0.1:81"), NoHealthyUpstream)
