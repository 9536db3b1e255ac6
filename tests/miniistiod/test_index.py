"""A change of one document changes what depends on it, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.documents import Mesh, document, entry, policy, service, service_entry, waypoint

A = {"app": "a"}
STATIC = "istio-system/istio_converted_static_strict"


def peer(name: str = "default", mode: str | None = None, namespace: str = "shop", **spec: Any) -> str:
    wanted = {**spec} if mode is None else {"mtls": {"mode": mode}, **spec}
    return document("PeerAuthentication", name, wanted, namespace=namespace)


def test_services_over_the_same_workloads_are_apart() -> None:
    mesh = Mesh(entry(labels=A), entry("b", "10.0.0.2", labels=A), service_entry("s"), service("k"))
    host = "shop/k.shop.svc.cluster.local"
    assert mesh.ports() == {"shop/s.mesh": {80: 80}, host: {80: 8080}}
    assert mesh.change(removed=(("ServiceEntry", "shop", "s"),)) == ["-shop/s.mesh", "shop/a", "shop/b"]
    assert mesh.ports() == {host: {80: 8080}}
    assert mesh.change(service_entry("s")) == ["shop/a", "shop/b", "shop/s.mesh"]


def test_labels_move_a_workload_from_one_service_to_another() -> None:
    other = service_entry("t", spec={"addresses": ["10.9.0.2"], "workloadSelector": {"labels": {"app": "b"}}})
    mesh = Mesh(entry(labels=A), service_entry("s"), other)
    assert list(mesh.ports()) == ["shop/s.mesh"]
    assert mesh.change(entry(labels={"app": "b"})) == ["shop/a"]
    assert list(mesh.ports()) == ["shop/t.mesh"]
    assert mesh.change(entry(labels={"app": "b"})) == []
    assert mesh.change(service_entry("s", spec={"workloadSelector": {"labels": {"app": "b"}}})) == ["shop/a"]
    assert sorted(mesh.ports()) == ["shop/s.mesh", "shop/t.mesh"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("/10.0.0.1", ["shop/a"]),
        ("/10.9.0.1", ["shop/s.mesh", "shop/a"]),
        ("shop/s.mesh", ["shop/s.mesh", "shop/a"]),
        ("shop/nothing.mesh", []),
        ("/10.0.0.9", []),
        ("net1/10.0.0.1", []),
        ("10.0.0.1", []),
    ],
)
def test_what_a_name_stands_for(name: str, found: list[str]) -> None:
    catalog = Mesh(entry(labels=A), service_entry()).registry.catalog
    resolved = [item.rpartition("WorkloadEntry/")[2] for item in catalog.resolve(name)]
    assert resolved == found


def test_a_service_and_its_workload_asked_for_together_are_sent_once() -> None:
    catalog = Mesh(entry(labels=A), service_entry()).registry.catalog
    names = [*catalog.resolve("/10.9.0.1"), *catalog.resolve("/10.0.0.1")]
    assert len(set(names)) == 2


def test_an_empty_address_is_none() -> None:
    spec = {"clusterIP": "", "clusterIPs": [""]}
    mesh = Mesh(service(spec=spec))
    assert list(mesh.service("k.shop.svc.cluster.local").addresses) == []


def test_ids_of_cluster_and_network_are_in_names() -> None:
    mesh = Mesh(entry(), service_entry(), cluster_id="east", config={"network": "n1"})
    assert mesh.names() == ["east/networking.istio.io/WorkloadEntry/shop/a", "shop/s.mesh"]
    workload = mesh.workload(mesh.names()[0])
    assert (workload.cluster_id, workload.network) == ("east", "n1")
    assert mesh.service().addresses[0].network == "n1"
    assert mesh.registry.catalog.resolve("n1/10.0.0.1")


def test_everything_moves_with_the_local_network() -> None:
    system = document("Namespace", "istio-system", labels={"topology.istio.io/network": "n2"})
    mesh = Mesh(entry(labels=A), entry("b", "10.0.0.2", spec={"network": "n3"}), service_entry())
    assert mesh.change(system) == ["shop/a", "shop/s.mesh"]
    assert mesh.workload().network == "n2"
    assert mesh.workload("b").network == "n3"
    assert mesh.change(removed=(("Namespace", "", "istio-system"),)) == ["shop/a", "shop/s.mesh"]


def test_a_waypoint_counts_from_when_it_has_an_address() -> None:
    use = {"istio.io/use-waypoint": "wp"}
    mesh = Mesh(entry(labels=A), service_entry(labels=use), waypoint(address=None))
    assert not mesh.service().HasField("waypoint")
    assert mesh.conditions("ServiceEntry shop/s") == [("WaypointBound", False, "WaypointIsNotReady")]
    assert mesh.change(waypoint()) == ["shop/s.mesh"]
    assert mesh.service().waypoint.address.address == b"\x0a\x07\x00\x01"
    assert mesh.service().waypoint.hbone_mtls_port == 15008
    assert mesh.change(waypoint(address="wp.shop.mesh")) == ["shop/s.mesh"]
    assert mesh.service().waypoint.hostname.hostname == "wp.shop.mesh"
    assert mesh.change(removed=(("Gateway", "shop", "wp"),)) == ["shop/s.mesh"]
    assert not mesh.service().HasField("waypoint")


def test_a_waypoint_comes_by_the_namespace_the_object_or_not_at_all() -> None:
    everything = {"istio.io/waypoint-for": "all"}
    home = document("Namespace", "shop", labels={"istio.io/use-waypoint": "wp"})
    mesh = Mesh(
        entry(labels=A), entry("b", "10.0.0.2"), waypoint(labels=everything), waypoint("other", labels=everything)
    )
    assert mesh.change(home) == ["shop/a", "shop/b"]
    assert mesh.change(entry(labels={**A, "istio.io/use-waypoint": "none"})) == ["shop/a"]
    assert not mesh.workload().HasField("waypoint")
    assert mesh.change(entry(labels={**A, "istio.io/use-waypoint": "nobody"})) == []
    assert mesh.change(entry(labels={**A, "istio.io/use-waypoint": "other"})) == ["shop/a"]
    assert mesh.change(removed=(("Namespace", "", "shop"),)) == ["shop/b"]
    assert mesh.change(document("Namespace", "shop", annotations={"a": "b"})) == []


def test_a_mode_of_the_namespace_is_taken_back() -> None:
    mesh = Mesh(entry(labels=A), entry("b", "10.0.1.1", namespace="other"))
    assert mesh.change(peer(mode="STRICT")) == [STATIC, "shop/a"]
    assert list(mesh.workload().authorization_policies) == [STATIC]
    assert mesh.change(peer(mode="PERMISSIVE")) == ["shop/a"]
    assert list(mesh.workload().authorization_policies) == []
    assert mesh.change(peer(mode="STRICT", namespace="istio-system")) == ["other/b"]
    assert mesh.change(peer(mode="UNSET")) == ["shop/a"]
    assert mesh.change(removed=(("PeerAuthentication", "shop", "default"),)) == []
    gone = (("PeerAuthentication", "istio-system", "default"),)
    assert mesh.change(removed=gone) == [f"-{STATIC}", "other/b", "shop/a"]


def test_policies_change_the_workloads_whose_list_changes() -> None:
    converted = "shop/converted_peer_authentication_ports"
    selected = {"selector": {"matchLabels": A}, "rules": [{}]}
    mesh = Mesh(entry(labels=A), entry("b", "10.0.0.2", labels={"app": "b"}), entry("c", "10.0.0.3"))
    assert mesh.change(policy()) == ["shop/p"]
    assert mesh.change(policy(spec=selected)) == ["shop/a", "shop/p"]
    assert mesh.change(policy(spec={**selected, "action": "DENY"})) == ["shop/p"]
    assert mesh.change(policy(namespace="other", spec=selected)) == ["other/p"]
    assert mesh.change(policy(namespace="istio-system", spec=selected)) == ["istio-system/p", "shop/a"]
    ports: Any = {"selector": {"matchLabels": A}, "portLevelMtls": {"9090": {"mode": "STRICT"}}}
    assert mesh.change(peer("ports", "PERMISSIVE", **ports)) == [STATIC, "shop/a", converted]
    assert list(mesh.workload().authorization_policies) == ["istio-system/p", "shop/p", converted]
    assert mesh.change(peer(mode="STRICT")) == ["shop/b", "shop/c"]
    assert mesh.change(peer("ports", "STRICT", selector={"matchLabels": A})) == [f"-{converted}", "shop/a"]
    assert list(mesh.workload().authorization_policies) == ["istio-system/p", "shop/p", STATIC]
    assert mesh.change(removed=(("AuthorizationPolicy", "shop", "p"),)) == ["-shop/p", "shop/a"]


def test_policies_of_another_revision_are_not_ours() -> None:
    mesh = Mesh(policy(labels={"istio.io/rev": "canary"}), policy("q", labels={"istio.io/rev": "default"}), policy("r"))
    assert sorted(mesh.registry.catalog.policies) == ["shop/q", "shop/r"]


def test_a_gateway_to_another_network_is_one_workload() -> None:
    def gateway(**fields: object) -> str:
        spec = {
            "gatewayClassName": "istio-remote",
            "listeners": [{"name": "x", "port": 15008, "protocol": "HBONE"}],
            "addresses": [{"value": "172.16.0.1"}],
        }
        return document("Gateway", "east", spec, labels={"topology.istio.io/network": "n2"}, **fields)

    mesh = Mesh(entry(), entry("b", "10.0.0.2", spec={"network": "n2"}))
    way = "NetworkGateway/n2/172.16.0.1/15008"
    assert mesh.change(gateway()) == [way, "shop/b"]
    found = mesh.workload(way)
    assert (found.namespace, found.service_account, found.network) == ("shop", "east-istio-remote", "n2")
    assert mesh.workload("b").network_gateway.address.network == "n2"
    assert mesh.workload("b").network_gateway.hbone_mtls_port == 15008
    assert not mesh.workload().HasField("network_gateway")
    named = {"gateway.istio.io/service-account": "gate"}
    assert mesh.change(gateway(annotations=named)) == [way]
    assert mesh.workload(way).service_account == "gate"
    assert mesh.change(removed=(("Gateway", "shop", "east"),)) == [f"-{way}", "shop/b"]
