from __future__ import annotations

import random
from ipaddress import ip_network
from typing import TYPE_CHECKING

from tests.support.dns import CLIENT
from tests.support.mesh import service, store_of, tcp

from ztunnel.dns.answer import MAX_ADDRESSES, Answer, Result, Zone, decide, find, locate
from ztunnel.mesh import parse_ip
from ztunnel.mesh.service import IpFamilies

if TYPE_CHECKING:
    from ztunnel.mesh import Store

ZONE = Zone()


def asked(store: Store, name: str, version: int | None = 4, zone: Zone = ZONE) -> Answer | None:
    return decide(store, CLIENT, name, version, zone, random.Random(1))


def located(store: Store, name: str, version: int = 4, zone: Zone = ZONE) -> list[str] | None:
    found = locate(store, CLIENT, name, zone, random.Random(1), version)
    return None if found is None else [str(ip) for ip in found]


def test_why_there_are_no_records_is_told_for_the_log() -> None:
    store = store_of(
        service("four", "10.0.0.1", ip_families=IpFamilies.IPV4),
        service("far", "n2/10.0.0.2"),
        service("web", "10.0.0.3"),
    )
    assert asked(store, "four.default", 6) == Answer(result=Result.UNSUPPORTED)
    assert asked(store, "far.default") == Answer(result=Result.NO_RECORDS)
    assert asked(store, "web.default", None) == Answer(result=Result.NO_RECORDS)
    assert asked(store, "web.default") == Answer(result=Result.SUCCESS, addresses=[parse_ip("10.0.0.3")])
    assert asked(store, "web.other") is None


def test_addresses_come_in_another_order_each_time() -> None:
    store = store_of(service("web", *(f"10.0.0.{number}" for number in range(8))))
    rng = random.Random(1)
    found = [decide(store, CLIENT, "web.default", 4, ZONE, rng) for _ in range(8)]
    orders = {tuple(answer.addresses) for answer in found if answer is not None}
    assert len(orders) > 4
    assert len({frozenset(order) for order in orders}) == 1


def test_of_many_endpoints_some_are_answered() -> None:
    many = [
        tcp(f"w{number}", f"10.{number >> 8}.{number & 255}.1", services={"default/many.default.svc.cluster.local": {}})
        for number in range(MAX_ADDRESSES + 100)
    ]
    answer = asked(store_of(service("many"), *many), "many.default")
    assert answer is not None
    assert len(set(answer.addresses)) == MAX_ADDRESSES


def test_endpoints_that_come_and_go_are_seen_at_once() -> None:
    store = store_of(service("h"))
    key = "default/h.default.svc.cluster.local"
    assert located(store, "h.default") == []
    one = tcp("one", "10.0.0.1", services={key: {}})
    store.apply_addresses([one])
    assert located(store, "h.default") == ["10.0.0.1"]
    store.apply_addresses([tcp("one", "10.0.0.1", services={key: {}}, healthy=False)])
    assert located(store, "h.default") == []
    store.apply_addresses([], [one.uid])
    assert located(store, "h.default") == []


def test_a_range_of_addresses_is_no_address() -> None:
    ranged = (("", ip_network("10.9.0.0/16")),)
    store = store_of(service("inside", cidrs=ranged), service("outside", hostname="out.example", cidrs=ranged))
    assert located(store, "inside.default") == []
    assert located(store, "out.example") is None


def test_the_last_canonical_service_wins_and_then_the_first_of_the_others() -> None:
    first = service("a", "10.0.0.1", namespace="a", hostname="x.example")
    second = service("b", "10.0.0.2", namespace="b", hostname="x.example", canonical=True)
    third = service("c", "10.0.0.3", namespace="c", hostname="x.example", canonical=True)
    store = store_of(first, second, third)
    match = find(store, "ns1", "x.example", ZONE)
    assert match is not None
    assert match.service is third
    store.apply_addresses([], [second.key, third.key])
    match = find(store, "ns1", "x.example", ZONE)
    assert match is not None
    assert match.service is first


def test_wildcard_hit_by_an_earlier_alias_wins_over_an_exact_hit_by_a_later_one() -> None:
    store = store_of(
        service("w", "10.0.0.1", hostname="*.ns1.svc.cluster.local"), service("web", "10.0.0.2", hostname="web.example")
    )
    zone = Zone(search=("ns1.svc.cluster.local",))
    answer = asked(store, "web.example.ns1.svc.cluster.local", zone=zone)
    assert answer is not None
    assert answer.addresses == [parse_ip("10.0.0.1")]


def test_programs_that_ask_for_no_type_get_both_families_their_own_first() -> None:
    store = store_of(service("dual", "10.0.0.1", "2001:db8::1", "far/10.0.0.9"), service("far", "far/10.0.0.9"))
    assert located(store, "Dual.default.") == ["10.0.0.1", "2001:db8::1"]
    assert located(store, "dual.default", 6) == ["2001:db8::1", "10.0.0.1"]
    assert located(store, "dual.default", zone=Zone(ipv6=False)) == ["10.0.0.1"]
    assert located(store, "far.default") == []  # never an address of another network
    assert located(store, "elsewhere.example") is None


def test_names_of_the_mesh_are_compared_in_lower_case() -> None:
    store = store_of(service("web", "10.0.0.1", hostname="Web.Example"))
    assert located(store, "WEB.example") == ["10.0.0.1"]
    assert located(store, "x", zone=Zone(cluster_domain="Cluster.Local.")) is None
