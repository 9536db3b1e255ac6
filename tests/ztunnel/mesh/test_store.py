from __future__ import annotations

from ipaddress import ip_network

import pytest
from tests.support.mesh import hbone, service, store_of, tcp

from ztunnel.mesh import (
    Change,
    RejectedResource,
    SnapshotError,
    Store,
    Workload,
    decode_address,
    decode_policy,
    parse_ip,
)
from ztunnel.mesh.policy import Action, Authorization, PolicyScope
from ztunnel.mesh.service import LoadBalancer
from ztunnel.wire import authorization_pb2, workload_pb2

WEB = "default/web.default.svc.cluster.local"
ALL = LoadBalancer(allow_unhealthy=True)


def policy(name: str, scope: PolicyScope = PolicyScope.NAMESPACE, namespace: str = "default") -> Authorization:
    return Authorization(name=name, namespace=namespace, scope=scope, action=Action.ALLOW)


def names(store: Store) -> list[str]:
    return sorted(store.endpoints(store.services[WEB]))


def test_workload_is_found_by_uid_address_and_hostname() -> None:
    web = hbone("web", "10.2.0.1", "fd00::1", hostname="web.example", network="n")
    store = store_of(web)
    assert store.workload_by_uid(web.uid) is web
    assert store.workload_by_address("n", parse_ip("fd00::1")) is web
    assert store.workload_by_address("", parse_ip("10.2.0.1")) is None
    assert store.workload_by_hostname("default", "web.example") is web
    store.apply_addresses([], [web.uid])
    assert store.workload_by_address("n", parse_ip("10.2.0.1")) is None
    assert store.workload_by_hostname("default", "web.example") is None


def test_update_moves_a_workload_to_its_new_address() -> None:
    store = store_of(hbone("web", "10.2.0.1"))
    store.apply_addresses([hbone("web", "10.2.0.2")])
    assert store.workload_by_address("", parse_ip("10.2.0.1")) is None
    assert store.workload_by_address("", parse_ip("10.2.0.2")) is not None


def test_best_rank_owns_an_address_and_removal_reveals_the_next() -> None:
    claims = [
        tcp("other", "10.2.0.1", uid="c/other"),
        hbone("hbone", "10.2.0.1", uid="c/hbone"),
        tcp("pod", "10.2.0.1"),
        hbone("best", "10.2.0.1"),
        tcp("last", "10.2.0.1", uid="c/last"),
    ]
    for order in (claims, claims[::-1]):
        store = store_of(*order)
        for name in ("best", "pod", "hbone"):
            found = store.workload_by_address("", parse_ip("10.2.0.1"))
            assert found is not None
            assert found.name == name
            store.apply_addresses([], [found.uid])


def test_of_equal_rank_the_last_to_come_wins() -> None:
    store = store_of(hbone("a", "10.2.0.1"), hbone("b", "10.2.0.1"))
    found = store.workload_by_address("", parse_ip("10.2.0.1"))
    assert found is not None
    assert found.name == "b"


def test_local_workload_needs_name_namespace_account_and_node() -> None:
    store = store_of(hbone("web", "10.2.0.1", node="n1"))
    assert store.find_local("web", "default", "web") is not None
    assert store.find_local("web", "default", "web", "n1") is not None
    assert store.find_local("web", "default", "web", "n2") is None
    assert store.find_local("web", "default", "other") is None


@pytest.mark.parametrize("first", ["service", "workloads"])
def test_endpoints_meet_their_service_in_either_order(first: str) -> None:
    workloads: list[Workload] = [hbone(f"w{n}", f"10.2.0.{n}", services={WEB: {}}) for n in range(50)]
    store = Store()
    if first == "service":
        store.apply_addresses([service("web", "10.96.0.1"), *workloads])
    else:
        store.apply_addresses(workloads)
        assert len(store.staged()[WEB]) == 50
        store.apply_addresses([service("web", "10.96.0.1")])
    assert len(names(store)) == 50
    assert store.staged() == {}


@pytest.mark.parametrize("first", ["service", "workload"])
def test_unhealthy_endpoint_is_left_out_unless_all_are_allowed(first: str) -> None:
    sick = hbone("sick", "10.2.0.1", services={WEB: {}}, healthy=False)
    for balancer, expected in ((None, []), (ALL, [sick.uid])):
        web = service("web", load_balancer=balancer)
        store = store_of(*((web, sick) if first == "service" else (sick, web)))
        assert names(store) == expected


def test_endpoint_follows_its_health() -> None:
    store = store_of(service("web"), hbone("w", "10.2.0.1", services={WEB: {}}))
    store.apply_addresses([hbone("w", "10.2.0.1", services={WEB: {}}, healthy=False)])
    assert names(store) == []
    store.apply_addresses([hbone("w", "10.2.0.1", services={WEB: {}})])
    assert names(store) == ["c//Pod/default/w"]


def test_service_that_starts_to_allow_all_regains_its_unhealthy_endpoints() -> None:
    store = store_of(service("web"), hbone("w", "10.2.0.1", services={WEB: {}}, healthy=False))
    store.apply_addresses([service("web", load_balancer=ALL)])
    assert names(store) == ["c//Pod/default/w"]


def test_reinsert_with_a_new_port_keeps_the_new_one() -> None:
    store = store_of(service("web"), hbone("w", "10.2.0.1", services={WEB: {80: 1}}))
    store.apply_addresses([hbone("w", "10.2.0.1", services={WEB: {80: 2}})])
    assert store.endpoints(store.services[WEB])["c//Pod/default/w"].ports == {80: 2}


def test_workload_that_leaves_a_service_is_no_endpoint_of_it() -> None:
    store = store_of(service("web"), hbone("w", "10.2.0.1", services={WEB: {}}))
    store.apply_addresses([hbone("w", "10.2.0.1")])
    assert names(store) == []


def test_removed_workload_leaves_services_and_staging() -> None:
    store = store_of(hbone("w", "10.2.0.1", services={WEB: {}, "default/later": {}}), service("web"))
    store.apply_addresses([], ["c//Pod/default/w"])
    assert names(store) == []
    assert store.staged() == {}
    assert not store.apply_addresses([], ["c//Pod/default/w", "default/unknown", "c//x/default/y"])


def test_removed_service_comes_back_with_its_endpoints() -> None:
    store = store_of(service("web", "10.96.0.1"), hbone("w", "10.2.0.1", services={WEB: {}}))
    store.apply_addresses([], [WEB])
    assert store.service_by_vip("", parse_ip("10.96.0.1")) is None
    store.apply_addresses([service("web", "10.96.0.1")])
    assert names(store) == ["c//Pod/default/w"]


def test_shared_vip_goes_to_own_namespace_then_canonical_then_first() -> None:
    one, two = service("web", "10.96.0.1", namespace="a"), service("web", "10.96.0.1", namespace="b", canonical=True)
    store = store_of(one, two)
    vip = parse_ip("10.96.0.1")
    assert store.service_by_vip("", vip, "a") is one
    assert store.service_by_vip("", vip, "c") is two
    store.apply_addresses([], [two.key])
    assert store.service_by_vip("", vip, "c") is one


def test_private_service_is_seen_by_its_namespace_only() -> None:
    private = service("web", "10.96.0.1", namespace="a", namespace_only=True)
    store = store_of(private)
    vip = parse_ip("10.96.0.1")
    assert store.service_by_vip("", vip, "a") is private
    assert store.service_by_vip("", vip, "b") is None
    assert store.service_by_vip("", vip) is private
    assert store.service_by_host(private.hostname, "b") is None
    assert store.service_by_host(private.hostname, "a") is private


def test_private_range_is_seen_by_its_namespace_only() -> None:
    private = service("web", namespace="a", namespace_only=True, cidrs=(("", ip_network("10.96.0.0/16")),))
    store = store_of(private)
    vip = parse_ip("10.96.3.4")
    assert store.service_by_vip("", vip, "a") is private
    assert store.service_by_vip("", vip, "b") is None
    assert store.service_by_vip("", vip) is private


def test_private_service_leaves_its_host_name_to_others() -> None:
    private = service("web", namespace="a", hostname="web.example", namespace_only=True)
    public = service("web", namespace="b", hostname="web.example")
    store = store_of(private, public)
    assert store.service_by_host("web.example", "a") is private
    assert store.service_by_host("web.example", "c") is public


def test_range_is_asked_after_a_private_exact_address() -> None:
    store = store_of(
        service("web", "10.96.0.1", namespace="a", namespace_only=True),
        service("wide", namespace="b", cidrs=(("", ip_network("10.96.0.0/16")),)),
    )
    found = store.service_by_vip("", parse_ip("10.96.0.1"), "b")
    assert found is not None
    assert found.name == "wide"


@pytest.mark.parametrize(
    ("wide", "long", "inside", "outside", "exact"),
    [
        ("10.0.0.0/8", "10.1.0.0/16", "10.1.2.3", "11.0.0.1", "10.1.0.9"),
        ("fd00::/16", "fd00:1::/32", "fd00:1::7", "fe00::1", "fd00:1::9"),
    ],
)
def test_longest_range_wins_and_an_exact_address_before_it(
    wide: str, long: str, inside: str, outside: str, exact: str
) -> None:
    store = store_of(
        service("wide", cidrs=(("", ip_network(wide)),)),
        service("long", cidrs=(("", ip_network(long)),)),
        service("exact", exact),
    )

    def found(ip: str, network: str = "") -> str | None:
        hit = store.service_by_vip(network, parse_ip(ip), "default")
        return hit.name if hit else None

    assert (found(inside), found(outside), found(exact)) == ("long", None, "exact")
    assert found(inside, "other") is None
    store.apply_addresses([], [store.services["default/long.default.svc.cluster.local"].key])
    assert found(inside) == "wide"


def test_families_of_ranges_never_cross() -> None:
    store = store_of(service("v6", cidrs=(("", ip_network("::/0")),)))
    assert store.service_by_vip("", parse_ip("10.0.0.1")) is None


def test_service_may_have_ranges_of_both_families_beside_addresses() -> None:
    both = service("both", "10.9.0.1", cidrs=(("", ip_network("10.8.0.0/16")), ("", ip_network("fd08::/32"))))
    store = store_of(both)
    for inside in ("10.9.0.1", "10.8.1.2", "fd08::1"):
        assert store.service_by_vip("", parse_ip(inside), "default") is both
    for outside in ("10.9.0.2", "fd09::1", "::ffff:10.7.0.1"):
        assert store.service_by_vip("", parse_ip(outside), "default") is None
    store.apply_addresses([], [both.key])
    assert store.service_by_vip("", parse_ip("fd08::1"), "default") is None


def test_same_range_of_two_namespaces_goes_to_the_own_one() -> None:
    ranged = (("", ip_network("10.8.0.0/16")),)
    one, two = service("web", namespace="a", cidrs=ranged), service("web", namespace="b", cidrs=ranged)
    store = store_of(one, two)
    vip = parse_ip("10.8.1.2")
    assert (store.service_by_vip("", vip, "a"), store.service_by_vip("", vip, "b")) == (one, two)
    store.apply_addresses([], [one.key])
    assert store.service_by_vip("", vip, "a") is two


def test_own_namespace_beats_a_longer_range() -> None:
    store = store_of(
        service("long", namespace="a", cidrs=(("", ip_network("10.1.0.0/16")),)),
        service("own", namespace="b", cidrs=(("", ip_network("10.0.0.0/8")),)),
    )
    found = store.service_by_vip("", parse_ip("10.1.0.1"), "b")
    assert found is not None
    assert found.name == "own"


def test_services_of_a_host_name_come_oldest_first_whatever_their_case() -> None:
    first, second = service("web", namespace="b", hostname="Web.Example"), service("web", hostname="web.example")
    store = store_of(first, second)
    assert list(store.services_by_host("web.example")) == [first, second]
    store.apply_addresses([], [first.key])
    assert list(store.services_by_host("web.example")) == [second]
    assert list(store.services_by_host("unknown")) == []


def test_policy_that_changes_scope_leaves_its_old_place() -> None:
    store = Store()
    web = hbone("web", "10.2.0.1")
    store.apply_policies([policy("p")])
    assert [found.name for found in store.policies_for(web).policies] == ["p"]
    store.apply_policies([policy("p", PolicyScope.WORKLOAD_SELECTOR)])
    assert store.policies_for(web).policies == ()
    named = hbone("named", "10.2.0.2", authorization_policies=("default/p",))
    assert [found.name for found in store.policies_for(named).policies] == ["p"]


def test_policies_come_from_namespace_then_mesh_then_the_workloads_list() -> None:
    store = Store()
    store.apply_policies(
        [
            policy("selected", PolicyScope.WORKLOAD_SELECTOR),
            policy("mesh", PolicyScope.GLOBAL, "istio-system"),
            policy("own"),
            policy("foreign", namespace="other"),
        ]
    )
    web = hbone("web", "10.2.0.1", authorization_policies=("default/selected", "default/gone", "default/own"))
    found = store.policies_for(web)
    assert [entry.name for entry in found.policies] == ["own", "mesh", "selected"]
    assert found.missing == ("default/gone",)


def test_each_change_is_announced_once_with_its_names() -> None:
    store = Store()
    seen: list[Change] = []
    unsubscribe = store.subscribe(seen.append)
    store.apply_addresses([service("web"), hbone("w", "10.2.0.1")], ["default/unknown"])
    store.apply_policies([policy("p")])
    store.apply_policies([], ["default/p"])
    store.apply_policies([], ["default/p"])
    unsubscribe()
    store.apply_policies([policy("p")])
    assert seen == [
        Change(workloads=frozenset({"c//Pod/default/w"}), services=frozenset({WEB})),
        Change(policies=frozenset({"default/p"})),
        Change(policies=frozenset({"default/p"})),
    ]


def test_removed_resource_in_the_same_push_is_gone() -> None:
    store = Store()
    store.apply_addresses([hbone("w", "10.2.0.1")], ["c//Pod/default/w"])
    assert store.workloads == {}


def address(**values: object) -> bytes:
    values.setdefault("namespace", "default")
    message = workload_pb2.Workload(**values)  # type: ignore[arg-type]  # built from keywords
    return workload_pb2.Address(workload=message).SerializeToString()


def test_snapshot_brings_everything_back() -> None:
    store = Store()
    wire = address(uid="c//Pod/default/w", name="w", addresses=[b"\x0a\x02\x00\x01"], tunnel_protocol=1)
    rule = authorization_pb2.Authorization(
        name="p", namespace="default", scope=authorization_pb2.NAMESPACE
    ).SerializeToString()
    store.apply_policies([decode_policy("default/p", rule)])
    store.apply_addresses([decode_address("c//Pod/default/w", wire), service("from-file")])
    data = store.snapshot({"c//Pod/default/w": "7"}, {"default/p": "3"})

    other = Store()
    restored = other.restore(data)
    assert restored.address_versions == {"c//Pod/default/w": "7"}
    assert restored.policy_versions == {"default/p": "3"}
    assert other.workloads == store.workloads
    assert other.policies == store.policies
    assert other.services == {}  # the local file is read again at each start
    assert other.snapshot({"c//Pod/default/w": "7"}, {"default/p": "3"}) == data


def test_snapshot_keeps_what_could_not_be_read_denying() -> None:
    store = Store()
    bad = authorization_pb2.Authorization(
        name="p", namespace="default", scope=authorization_pb2.NAMESPACE, action=authorization_pb2.DENY
    )
    bad.rules.add().clauses.add().matches.add(destination_ports=[70_000])
    payload = bad.SerializeToString()
    with pytest.raises(RejectedResource) as caught:
        decode_policy("default/p", payload)
    store.apply_policies([], [], [caught.value])
    other = Store()
    other.restore(store.snapshot())
    assert other.policies["default/p"].unusable == store.policies["default/p"].unusable != ""


@pytest.mark.parametrize("where", [0, 30, 60, -1])
def test_damaged_snapshot_is_refused_and_changes_nothing(where: int) -> None:
    source = Store()
    source.apply_addresses([decode_address("c//Pod/default/w", address(uid="c//Pod/default/w", name="w"))])
    data = bytearray(source.snapshot())
    data[where] ^= 1
    store = Store()
    for broken in (bytes(data), source.snapshot()[:-3], b""):
        with pytest.raises(SnapshotError):
            store.restore(broken)
    assert store.generation == 0


def test_rejected_update_keeps_the_last_good_version() -> None:
    store = store_of(hbone("w", "10.2.0.1"))
    bad = RejectedResource("c//Pod/default/w", "broken", addresses=(("", parse_ip("10.2.0.1")),))
    assert not store.apply_addresses([], [], [bad])
    assert store.workload_by_address("", parse_ip("10.2.0.1")) is not None
    assert store.rejection("", parse_ip("10.2.0.1")) is None
    good = policy("p")
    store.apply_policies([good])
    store.apply_policies([], [], [RejectedResource("default/p", "broken", namespace="default")])
    assert store.policies["default/p"] is good


def test_good_version_replaces_the_rejection() -> None:
    store = Store()
    claim = (("", parse_ip("10.2.0.1")),)
    store.apply_addresses([], [], [RejectedResource("c//Pod/default/w", "broken", addresses=claim)])
    assert store.rejection(*claim[0]) is not None
    store.apply_addresses([hbone("w", "10.2.0.1")])
    assert store.rejection(*claim[0]) is None
