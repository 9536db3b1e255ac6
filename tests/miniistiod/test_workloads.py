"""WorkloadEntries and endpoints of ServiceEntries as workloads, field by field."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from tests.support.documents import Mesh, document, entry, policy, service, service_entry

from miniistiod.registry import HboneMark
from miniistiod.resources import load
from ztunnel.wire import workload_pb2 as pb

A = {"app": "a"}
TUNNEL = "networking.istio.io/tunnel"
REDIRECTION = "ambient.istio.io/redirection"


# -- WorkloadEntries


def test_an_entry_without_anything_has_the_defaults() -> None:
    found = Mesh(entry()).workload()
    assert found.uid == "Kubernetes/networking.istio.io/WorkloadEntry/shop/a"
    assert (found.name, found.namespace, found.cluster_id) == ("a", "shop", "Kubernetes")
    assert (found.network, found.hostname, found.service_account, found.node) == ("", "", "", "")
    assert list(found.addresses) == [b"\x0a\x00\x00\x01"]
    assert (found.workload_type, found.workload_name) == (pb.POD, "a")
    assert (found.canonical_name, found.canonical_revision) == ("a", "latest")
    assert (found.status, found.network_mode, found.tunnel_protocol) == (pb.HEALTHY, pb.STANDARD, pb.NONE)
    assert not any(map(found.HasField, ("capacity", "locality", "waypoint", "network_gateway", "application_tunnel")))


@pytest.mark.parametrize(
    ("address", "packed", "hostname"),
    [
        ("10.0.0.7", "10.0.0.7", ""),
        ("FD00::0007", "fd00::7", ""),
        ("vm.Example.com", None, "vm.example.com"),
    ],
)
def test_an_address_is_an_address_or_a_name(address: str, packed: str | None, hostname: str) -> None:
    found = Mesh(entry(address=address)).workload()
    assert [str(ipaddress.ip_address(item)) for item in found.addresses] == ([packed] if packed else [])
    assert found.hostname == hostname


def test_an_entry_behind_a_gateway_needs_no_address() -> None:
    found = Mesh(entry(address=None, spec={"network": "n2"})).workload()
    assert (list(found.addresses), found.hostname, found.network) == ([], "", "n2")
    assert "write an IP address" in str(load({"a.yaml": entry(address=None)}).errors[0])


def test_weight_locality_and_account_are_the_specifications() -> None:
    spec = {"weight": 3, "locality": "eu/west", "serviceAccount": "orders"}
    found = Mesh(entry(spec=spec)).workload()
    assert found.capacity.value == 3
    assert (found.locality.region, found.locality.zone, found.locality.subzone) == ("eu", "west", "")
    assert found.service_account == "orders"
    whole = Mesh(entry(spec={"locality": "eu/west/rack1"})).workload().locality
    assert (whole.region, whole.zone, whole.subzone) == ("eu", "west", "rack1")


@pytest.mark.parametrize(
    ("labels", "annotations", "names"),
    [
        ({}, {}, ("a", "a", "latest")),
        ({}, {"istio.io/autoRegistrationGroup": "group"}, ("group", "group", "latest")),
        ({"service.istio.io/workload-name": "w"}, {}, ("w", "w", "latest")),
        (
            {"service.istio.io/workload-name": "w"},
            {"istio.io/autoRegistrationGroup": "group"},
            ("group", "group", "latest"),
        ),
        ({"app": "x", "version": "v1"}, {}, ("a", "x", "v1")),
        (
            {"app": "x", "version": "v1", "app.kubernetes.io/name": "y", "app.kubernetes.io/version": "v2"},
            {},
            ("a", "y", "v2"),
        ),
        (
            {
                **{"app": "x", "app.kubernetes.io/name": "y", "app.kubernetes.io/version": "v2"},
                **{"service.istio.io/canonical-name": "z", "service.istio.io/canonical-revision": "v3"},
            },
            {},
            ("a", "z", "v3"),
        ),
    ],
)
def test_names_for_people_and_dashboards(
    labels: dict[str, str], annotations: dict[str, str], names: tuple[str, str, str]
) -> None:
    found = Mesh(entry(labels=labels, annotations=annotations)).workload()
    assert (found.workload_name, found.canonical_name, found.canonical_revision) == names


def test_labels_of_the_object_win_over_those_of_the_specification() -> None:
    mesh = Mesh(
        entry(spec={"labels": A}),
        entry("b", "10.0.0.2", labels={"app": "b"}, spec={"labels": A}),
        entry("c", "10.0.0.3", labels={"tier": "x"}, spec={"labels": A}),
        service_entry(),
    )
    assert [bool(mesh.ports(name)) for name in "abc"] == [True, False, True]


@pytest.mark.parametrize(
    ("labels", "annotations", "tunnel", "native"),
    [
        ({}, {}, pb.NONE, False),
        ({TUNNEL: "http"}, {}, pb.HBONE, True),
        ({TUNNEL: "x,http"}, {}, pb.HBONE, True),
        ({TUNNEL: "https"}, {}, pb.NONE, False),
        ({}, {REDIRECTION: "enabled"}, pb.HBONE, False),
        ({}, {REDIRECTION: "disabled"}, pb.NONE, False),
        ({TUNNEL: "http"}, {REDIRECTION: "enabled"}, pb.HBONE, True),
        ({"security.istio.io/tlsMode": "istio"}, {}, pb.NONE, False),
        ({"istio.io/dataplane-mode": "ambient"}, {}, pb.NONE, False),
    ],
)
def test_how_a_workload_is_reached(
    labels: dict[str, str], annotations: dict[str, str], tunnel: int, native: bool
) -> None:
    found = Mesh(entry(labels=labels, annotations=annotations)).workload()
    assert (found.tunnel_protocol, found.native_tunnel) == (tunnel, native)


@pytest.mark.parametrize(
    ("conditions", "status"),
    [
        ([], pb.HEALTHY),
        ([{"type": "Healthy", "status": "True"}], pb.HEALTHY),
        ([{"type": "Healthy", "status": "False"}], pb.UNHEALTHY),
        ([{"type": "Other", "status": "False"}], pb.HEALTHY),
    ],
)
def test_the_condition_healthy_is_the_workloads_status(conditions: Any, status: int) -> None:
    """Istio does not look at it; a machine that says it is not well should get no new connections."""
    assert Mesh(entry(status={"conditions": conditions})).workload().status == status


def test_the_node_is_named_by_annotation_or_by_who_connected() -> None:
    """A proxy with a NODE_NAME looks for itself among the workloads of that node only."""
    assert Mesh(entry(annotations={"miniistiod/node": "n1"})).workload().node == "n1"
    mark = {("shop", "a"): HboneMark(service_account="default", node="n2")}
    assert Mesh(entry(), marks=mark).workload().node == "n2"
    assert Mesh(entry(annotations={"miniistiod/node": "n1"}), marks=mark).workload().node == "n1"


@pytest.mark.parametrize(
    ("ports", "target", "found"),
    [
        ({}, None, 80),
        ({}, 8080, 8080),
        ({"http": 9090}, None, 9090),
        ({"http": 9090}, 8080, 9090),
        ({"other": 9090}, 8080, 8080),
    ],
)
def test_target_ports_of_a_service_entry(ports: dict[str, int], target: int | None, found: int) -> None:
    port = {"number": 80, "name": "http", "targetPort": target}
    mesh = Mesh(entry(labels=A, spec={"ports": ports}), service_entry(spec={"ports": [port]}))
    assert mesh.ports() == {"shop/s.mesh": {80: found}}


@pytest.mark.parametrize(
    ("ports", "target", "found"),
    [
        ({}, 8080, {80: 8080}),
        ({"http": 9090}, 8080, {80: 9090}),
        ({"web": 9090}, 8080, {80: 8080}),
        ({"web": 9090}, "web", {80: 9090}),
        ({"http": 9090}, "web", {}),
    ],
)
def test_target_ports_of_a_kubernetes_service(ports: dict[str, int], target: Any, found: dict[int, int]) -> None:
    spec = {"ports": [{"port": 80, "name": "http", "targetPort": target}]}
    mesh = Mesh(entry(labels=A, spec={"ports": ports}), service(spec=spec))
    assert mesh.ports() == {"shop/k.shop.svc.cluster.local": found}


def test_a_service_selects_in_its_own_namespace_and_never_everything() -> None:
    mesh = Mesh(
        entry(labels=A),
        entry("b", "10.0.0.2", labels=A, namespace="other"),
        entry("c", "10.0.0.3", labels={**A, "x": "y"}),
        service_entry(),
        service(spec={"selector": {}}),
        service_entry("t", spec={"addresses": ["10.9.0.2"], "workloadSelector": {"labels": {**A, "x": "y"}}}),
    )
    assert list(mesh.ports()) == ["shop/s.mesh"]
    assert sorted(mesh.ports("c")) == ["shop/s.mesh", "shop/t.mesh"]
    assert not mesh.workload("b", "other").services


def test_policies_are_named_by_those_that_they_select() -> None:
    def of(name: str, namespace: str, **labels: str) -> str:
        return policy(name, namespace=namespace, spec={"selector": {"matchLabels": labels}, "rules": [{}]})

    mesh = Mesh(
        entry(labels={**A, "x": "y"}),
        entry("none", "10.0.0.2"),
        of("own", "shop", app="a"),
        of("both", "shop", app="a", x="y"),
        of("not", "shop", app="b"),
        of("root", "istio-system", app="a"),
        of("elsewhere", "other", app="a"),
        policy("all", namespace="shop"),
        policy("mesh", namespace="istio-system"),
    )
    assert list(mesh.workload().authorization_policies) == ["istio-system/root", "shop/both", "shop/own"]
    assert list(mesh.workload("none").authorization_policies) == []


# -- endpoints of ServiceEntries


def test_endpoints_of_an_entry_are_workloads_with_its_labels() -> None:
    endpoints = [
        {"address": "10.0.0.1", "weight": 2, "locality": "eu/west", "serviceAccount": "x", "ports": {"http": 8080}},
        {"address": "db.example", "labels": {"app": "ignored"}},
    ]
    text = service_entry(spec={"endpoints": endpoints}, labels={**A, "version": "v2", TUNNEL: "http"})
    mesh = Mesh(text, policy(spec={"selector": {"matchLabels": A}}))
    first, second = mesh.endpoint("s/10.0.0.1"), mesh.endpoint("s/db.example")
    for found in (first, second):
        assert (found.name, found.workload_name, found.canonical_name, found.canonical_revision) == (
            "s",
            "s",
            "a",
            "v2",
        )
        assert list(found.authorization_policies) == ["shop/p"]
        assert (found.tunnel_protocol, found.native_tunnel, found.status) == (pb.HBONE, True, pb.HEALTHY)
    assert (first.capacity.value, first.locality.zone, first.service_account) == (2, "west", "x")
    assert mesh.ports(first.uid) == {"shop/s.mesh": {80: 8080}}
    assert (second.hostname, list(second.addresses)) == ("db.example", [])
    assert mesh.ports(second.uid) == {"shop/s.mesh": {80: 80}}


@pytest.mark.parametrize("resolution", ["DNS", "DNS_ROUND_ROBIN", "DYNAMIC_DNS"])
def test_hosts_that_are_resolved_are_endpoints_of_themselves_alone(resolution: str) -> None:
    mesh = Mesh(service_entry(spec={"hosts": ["a.example", "b.example"], "resolution": resolution}))
    for host in ("a.example", "b.example"):
        found = mesh.endpoint(f"s/{host}")
        assert found.hostname == host
        assert mesh.ports(found.uid) == {f"shop/{host}": {80: 80}}


@pytest.mark.parametrize(
    "spec",
    [
        {"resolution": "DNS", "workloadSelector": {"labels": A}},
        {"resolution": "NONE"},
        {"workloadSelector": {"labels": A}},
    ],
    ids=["selector", "none", "static"],
)
def test_other_entries_have_no_endpoints_of_their_own(spec: Any) -> None:
    assert Mesh(service_entry(spec=spec)).names() == ["shop/s.mesh"]


def test_each_endpoint_has_the_services_of_all_hosts() -> None:
    mesh = Mesh(service_entry(spec={"hosts": ["a.mesh", "b.mesh"], "endpoints": [{"address": "10.0.0.1"}]}))
    assert sorted(mesh.endpoint("s/10.0.0.1").services) == ["shop/a.mesh", "shop/b.mesh"]


def test_the_network_of_an_endpoint_is_its_own() -> None:
    """In istiod those after it inherit it."""
    endpoints = [
        {"address": f"10.0.0.{number}", "network": network} for number, network in enumerate(["", "n2", ""], 1)
    ]
    mesh = Mesh(service_entry(spec={"endpoints": endpoints}), config={"network": "n1"})
    assert [mesh.endpoint(f"s/10.0.0.{number}").network for number in (1, 2, 3)] == ["n1", "n2", "n1"]


def test_two_endpoints_of_one_address_are_refused() -> None:
    spec = {"endpoints": [{"address": "10.0.0.1", "ports": {"http": port}} for port in (1, 2)]}
    assert "of another endpoint" in str(load({"a.yaml": service_entry(spec=spec)}).errors[0])


# -- gateways to other networks


@pytest.mark.parametrize(("kind", "value"), [("IPAddress", "192.0.2.1"), ("Hostname", "gate.example")])
def test_a_workload_of_another_network_is_reached_through_its_gateway(kind: str, value: str) -> None:
    gate = document(
        "Gateway",
        "east",
        {"gatewayClassName": "istio-remote", "listeners": [{"name": "x", "port": 15009, "protocol": "HBONE"}]},
        labels={"topology.istio.io/network": "n2"},
        namespace="infra",
        status={"addresses": [{"type": kind, "value": value}]},
    )
    mesh = Mesh(gate, entry(spec={"network": "n2"}), entry("b", "10.0.0.2", spec={"network": "n3"}))
    way = mesh.workload().network_gateway
    assert way.hbone_mtls_port == 15009
    if kind == "Hostname":
        assert (way.hostname.namespace, way.hostname.hostname) == ("infra", value)
    else:
        assert (way.address.network, way.address.address) == ("n2", ipaddress.ip_address(value).packed)
    assert not mesh.workload("b").HasField("network_gateway")
    found = mesh.workload(f"NetworkGateway/n2/{value}/15009")
    assert (found.namespace, found.network, found.tunnel_protocol) == ("infra", "n2", pb.NONE)


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({"gatewayClassName": "istio-east-west"}, {"topology.istio.io/network": "n2"}),
        ({}, {}),
        ({"listeners": [{"name": "x", "port": 15008, "protocol": "TLS"}]}, {"topology.istio.io/network": "n2"}),
    ],
    ids=["of our own network", "without network", "without HBONE"],
)
def test_other_gateways_lead_nowhere(fields: Any, labels: dict[str, str]) -> None:
    spec = {
        "gatewayClassName": "istio-remote",
        "listeners": [{"name": "x", "port": 15008, "protocol": "HBONE"}],
        "addresses": [{"value": "192.0.2.1"}],
        **fields,
    }
    mesh = Mesh(document("Gateway", "east", spec, labels=labels), entry(spec={"network": "n2"}))
    assert not mesh.workload().HasField("network_gateway")
    assert len(mesh.names()) == 1
