"""ServiceEntries and Kubernetes Services as services, field by field."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from tests.support.documents import Mesh, document, entry, read, service, service_entry, waypoint

from miniistiod import lint
from miniistiod.resources import load
from ztunnel.wire import workload_pb2 as pb

KUBE = "k.shop.svc.cluster.local"
CLOSE = [pb.LoadBalancing.NETWORK, pb.LoadBalancing.REGION, pb.LoadBalancing.ZONE]
NODE = [*CLOSE, pb.LoadBalancing.SUBZONE, pb.LoadBalancing.NODE]
DISTRIBUTION = "networking.istio.io/traffic-distribution"


def addresses(message: pb.Service) -> list[str]:
    found = []
    for item in message.addresses:
        length = f"/{item.length}" if item.HasField("length") else ""
        found.append(f"{ipaddress.ip_address(item.address)}{length}")
    return found


def balancing(message: pb.Service) -> tuple[Any, list[Any]]:
    return message.load_balancing.mode, list(message.load_balancing.routing_preference)


# -- from ServiceEntries


def test_each_host_is_a_service_with_the_same_addresses_and_ports() -> None:
    ports = [
        {"number": 80, "name": "http", "protocol": "HTTP", "targetPort": 8080},
        {"number": 81, "name": "tcp", "protocol": "tcp"},
    ]
    spec = {"hosts": ["a.example", "b.example"], "resolution": "DNS", "ports": ports}
    sans = {"subjectAltNames": ["spiffe://cluster.local/ns/x/sa/y"]}
    mesh = Mesh(service_entry(spec={**spec, **sans, "addresses": ["10.9.0.1", "fd00::1"]}))
    for host in ("a.example", "b.example"):
        found = mesh.service(host)
        assert (found.name, found.namespace, found.hostname) == ("s", "shop", host)
        assert addresses(found) == ["10.9.0.1", "fd00::1"]
        assert [(p.service_port, p.target_port, p.app_protocol) for p in found.ports] == [
            (80, 8080, pb.HTTP11),
            (81, 81, pb.TCP),
        ]
        assert list(found.subject_alt_names) == ["spiffe://cluster.local/ns/x/sa/y"]
        assert not found.HasField("load_balancing")


@pytest.mark.parametrize(
    ("text", "protocol"),
    [
        *[("HTTP", pb.HTTP11), ("http", pb.HTTP11), ("HTTP2", pb.HTTP2), ("GRPC", pb.GRPC), ("gRPC", pb.GRPC)],
        *[("TLS", pb.TLS), ("HTTPS", pb.TLS), ("TCP", pb.TCP), ("GRPC-Web", 0), ("MONGO", 0), ("UDP", 0), ("", 0)],
    ],
)
def test_protocols_of_ports(text: str, protocol: int) -> None:
    mesh = Mesh(service_entry(spec={"ports": [{"number": 80, "name": "x", "protocol": text}]}))
    assert mesh.service().ports[0].app_protocol == protocol


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        *[("10.9.0.0/24", "10.9.0.0/24"), ("10.9.0.77/24", "10.9.0.0/24"), ("10.9.0.1/32", "10.9.0.1")],
        *[("fd00::/64", "fd00::/64"), ("fd00::1/128", "fd00::1"), ("FD00:0::1", "fd00::1"), ("0.0.0.0/0", "0.0.0.0/0")],
    ],
)
def test_networks_are_addresses_with_a_length(text: str, shown: str) -> None:
    assert addresses(Mesh(service_entry(spec={"addresses": [text]})).service()) == [shown]


@pytest.mark.parametrize(
    "text", ["10.9.0.1/33", "10.9.0.300", "a.example", "", "10.9.0.1/-1", "fe80::1%eth0", "::ffff:1.2.3.4"]
)
def test_one_address_that_is_none_refuses_the_entry(text: str) -> None:
    found = load({"a.yaml": service_entry(spec={"addresses": ["10.9.0.1", text]})})
    assert found.resources == ()
    assert "spec.addresses[1]" in str(found.errors[0])


STATUS = {
    "addresses": [
        {"host": "a.mesh", "value": "240.240.1.1"},
        {"host": "a.mesh", "value": "2001:2::101"},
        {"host": "b.mesh", "value": "240.240.1.2"},
    ]
}


def test_addresses_that_istio_allotted_are_kept_host_by_host() -> None:
    spec = {"hosts": ["a.mesh", "b.mesh"], "addresses": None}
    mesh = Mesh(service_entry(spec=spec, status=STATUS))
    assert addresses(mesh.service("a.mesh")) == ["240.240.1.1", "2001:2::101"]
    assert addresses(mesh.service("b.mesh")) == ["240.240.1.2"]


@pytest.mark.parametrize(
    ("spec", "labels", "found"),
    [
        ({"addresses": ["10.9.0.1"]}, {}, ["10.9.0.1"]),
        ({"resolution": "NONE", "addresses": None}, {}, []),
        ({"addresses": None}, {"networking.istio.io/enable-autoallocate-ip": "false"}, []),
        ({"addresses": None}, {"networking.istio.io/enable-autoallocate-ip": "true"}, ["240.240.1.1", "2001:2::101"]),
    ],
    ids=["own", "none", "opted out", "opted in"],
)
def test_allotted_addresses_do_not_count_beside_others_or_against_the_will(
    spec: Any, labels: dict[str, str], found: list[str]
) -> None:
    mesh = Mesh(service_entry(spec={"hosts": ["a.mesh"], **spec}, labels=labels, status=STATUS))
    assert addresses(mesh.service("a.mesh")) == found


@pytest.mark.parametrize(("resolution", "has"), [("DNS", False), ("DYNAMIC_DNS", True)])
def test_a_wildcard_gets_an_address_of_its_own_only_where_a_waypoint_can_tell_its_hosts_apart(
    resolution: str, has: bool
) -> None:
    spec = {"hosts": ["*.example", "a.mesh"], "addresses": None, "resolution": resolution}
    mesh = Mesh(service_entry(spec=spec))
    assert len(addresses(mesh.service("*.example"))) == (2 if has else 0)
    assert len(addresses(mesh.service("a.mesh"))) == 2


def test_automatic_addresses_stay_when_documents_are_put_in_another_order() -> None:
    texts = [service_entry(f"s{number}", spec={"addresses": None}) for number in range(20)]
    first, second = Mesh(*texts), Mesh(*reversed(texts))
    for number in range(20):
        assert addresses(first.service(f"s{number}.mesh")) == addresses(second.service(f"s{number}.mesh"))


def test_without_resolution_connections_go_where_they_were_going() -> None:
    found = Mesh(service_entry(spec={"resolution": "NONE"})).service()
    assert found.load_balancing.mode == pb.LoadBalancing.PASSTHROUGH
    assert found.load_balancing.health_policy == pb.LoadBalancing.ALLOW_ALL


@pytest.mark.parametrize(
    ("own", "namespace", "preference"),
    [
        ("PreferClose", None, CLOSE),
        ("prefersamezone", None, CLOSE),
        ("PreferSameNode", None, NODE),
        ("Any", None, None),
        (None, None, None),
        (None, "PreferClose", CLOSE),
        ("PreferSameNode", "PreferClose", NODE),
        ("Any", "PreferClose", None),
        ("nonsense", "PreferClose", None),
    ],
)
def test_the_nearest_annotation_says_which_endpoints_come_first(
    own: str | None, namespace: str | None, preference: list[Any] | None
) -> None:
    def marked(text: str | None) -> dict[str, str]:
        return {} if text is None else {DISTRIBUTION: text}

    home = document("Namespace", "shop", annotations=marked(namespace))
    found = Mesh(home, service_entry(annotations=marked(own))).service()
    assert balancing(found) == ((pb.LoadBalancing.FAILOVER, preference) if preference else (0, []))


# -- who sees a service, and which of several is meant


RULES = [
    {"namespaceSelector": {"matchLabels": {"tier": "hidden"}}, "visibility": "NONE"},
    {"namespaceSelector": {"matchExpressions": [{"key": "tier", "operator": "Exists"}]}, "visibility": "NAMESPACE"},
]


def config(default: str = "PUBLIC", rules: Any = RULES) -> Any:
    return {"serviceEntryVisibility": {"defaultVisibility": default, "policies": rules}}


@pytest.mark.parametrize(
    ("labels", "settings", "found"),
    [
        ({}, config(), "PUBLIC"),
        ({"tier": "x"}, config(), "NAMESPACE"),
        ({"tier": "hidden"}, config(), None),
        ({"tier": "hidden"}, config(rules=RULES[::-1]), "NAMESPACE"),
        ({}, config("NAMESPACE"), "NAMESPACE"),
        ({}, config("NONE"), None),
        ({}, config(rules=[{"namespaceSelector": {}, "visibility": "NAMESPACE"}]), "NAMESPACE"),
        ({}, {}, "PUBLIC"),
    ],
    ids=["default", "selector", "none", "first", "default namespace", "default none", "empty selector", "unset"],
)
def test_visibility_is_the_first_rule_that_matches_else_the_default(
    labels: dict[str, str], settings: Any, found: str | None
) -> None:
    mesh = Mesh(document("Namespace", "shop", labels=labels), service_entry(), config=settings)
    if found is None:
        assert mesh.names() == []
        return
    message = mesh.service()
    assert pb.Service.Visibility.Name(message.visibility) == found
    assert message.canonical is (found == "PUBLIC")
    applied = [("VisibilityApplied", True, "Namespace")] if found == "NAMESPACE" else []
    assert mesh.conditions("ServiceEntry shop/s") == applied


def test_a_kubernetes_service_is_seen_by_all() -> None:
    assert Mesh(service(), config=config("NONE")).service(KUBE).visibility == pb.Service.PUBLIC


def test_who_is_seen_in_its_namespace_only_uses_a_waypoint_of_that_namespace_only() -> None:
    def of(place: str) -> dict[str, str]:
        return {"istio.io/use-waypoint": "wp", "istio.io/use-waypoint-namespace": place}

    everyone = {"from": "All"}
    gates = [waypoint(allowed=everyone), waypoint(allowed=everyone, namespace="infra")]
    private = config("NAMESPACE")
    for place, settings, bound in (
        ("infra", private, False),
        ("shop", private, True),
        ("infra", {}, True),
    ):
        mesh = Mesh(*gates, service_entry(labels=of(place)), config=settings)
        assert mesh.service().HasField("waypoint") is bound
        reason = "WaypointAccepted" if bound else "CrossNamespaceWaypointForbidden"
        assert ("WaypointBound", bound, reason) in mesh.conditions("ServiceEntry shop/s")


OLD, YOUNG = "2020-01-01T00:00:00Z", "2021-01-01T00:00:00Z"


def test_of_one_host_in_a_namespace_the_oldest_entry_has_it_and_the_others_have_nothing() -> None:
    spec = {"hosts": ["one.mesh", "two.mesh"], "endpoints": [{"address": "10.0.0.1"}]}
    other = {"hosts": ["one.mesh", "three.mesh"], "endpoints": [{"address": "10.0.0.2"}]}
    mesh = Mesh(
        service_entry("young", spec=spec, creationTimestamp=YOUNG),
        service_entry("old", spec=other, creationTimestamp=OLD),
    )
    assert [mesh.service(f"{host}.mesh").name for host in ("one", "two", "three")] == ["old", "young", "old"]
    assert list(mesh.endpoint("young/10.0.0.1").services) == ["shop/two.mesh"]
    assert sorted(mesh.endpoint("old/10.0.0.2").services) == ["shop/one.mesh", "shop/three.mesh"]
    lost = Mesh(
        service_entry("young", spec={**spec, "hosts": ["one.mesh"]}, creationTimestamp=YOUNG),
        service_entry("old", spec=other, creationTimestamp=OLD),
    )
    assert not [name for name in lost.names() if "/young/" in name]


def test_a_kubernetes_service_goes_before_an_older_entry_of_its_name() -> None:
    mesh = Mesh(service_entry(spec={"hosts": [KUBE]}, creationTimestamp=OLD), service(creationTimestamp=YOUNG))
    assert mesh.service(KUBE).name == "k"
    assert mesh.change(removed=(("Service", "shop", "k"),)) == [f"shop/{KUBE}"]
    assert mesh.service(KUBE).name == "s"


def test_across_namespaces_one_is_canonical() -> None:
    def of(namespace: str, created: str) -> str:
        return service_entry(namespace=namespace, spec={"hosts": [KUBE]}, creationTimestamp=created)

    mesh = Mesh(of("a", OLD), of("b", YOUNG))
    assert [mesh.service(KUBE, place).canonical for place in ("a", "b")] == [True, False]
    before = {place: mesh.service(KUBE, place) for place in ("a", "b")}
    assert mesh.change(service()) == [f"a/{KUBE}", f"shop/{KUBE}"]
    assert [mesh.service(KUBE, place).canonical for place in ("shop", "a", "b")] == [True, False, False]
    for place, message in before.items():  # nothing but this flag is another
        message.canonical = False
        assert mesh.service(KUBE, place) == message


def test_an_older_entry_that_only_its_namespace_sees_is_not_canonical() -> None:
    rules = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "a"}}, "visibility": "NAMESPACE"}]
    mesh = Mesh(
        service_entry(namespace="a", creationTimestamp=OLD),
        service_entry(namespace="b", creationTimestamp=YOUNG),
        config=config(rules=rules),
    )
    assert [mesh.service(namespace=place).canonical for place in ("a", "b")] == [False, True]


# -- from Kubernetes Services


def test_a_kubernetes_service_has_its_cluster_name() -> None:
    found = Mesh(service()).service(KUBE)
    assert (found.name, found.namespace, found.hostname, found.canonical) == ("k", "shop", KUBE, True)
    assert addresses(found) == ["10.8.0.1"]
    assert [(port.service_port, port.target_port) for port in found.ports] == [(80, 8080)]
    elsewhere = Mesh(service(), cluster_domain="mesh.example")
    assert elsewhere.service("k.shop.svc.mesh.example").name == "k"


def test_a_named_target_port_is_each_workloads_own() -> None:
    ports = [{"port": 80, "name": "http", "targetPort": "web"}, {"port": 81, "name": "other"}]
    labels = {"app": "a"}
    mesh = Mesh(
        service(spec={"ports": ports}),
        entry(labels=labels, spec={"ports": {"web": 8080}}),
        entry("b", "10.0.0.2", labels=labels),
    )
    assert [(port.service_port, port.target_port) for port in mesh.service(KUBE).ports] == [(80, 0), (81, 81)]
    assert mesh.ports() == {f"shop/{KUBE}": {80: 8080, 81: 81}}
    assert mesh.ports("b") == {f"shop/{KUBE}": {81: 81}}


@pytest.mark.parametrize("spec", [{"clusterIP": "None"}, {"clusterIP": ""}, {"clusterIP": None}])
def test_a_headless_service_has_no_address(spec: Any) -> None:
    assert addresses(Mesh(service(spec=spec)).service(KUBE)) == []


def test_addresses_of_a_load_balancer_are_the_services_too() -> None:
    spec = {"type": "LoadBalancer", "clusterIPs": ["10.8.0.1", "fd00::1"], "ports": [{"port": 80, "nodePort": 30000}]}
    status = {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}, {"ip": ""}]}}
    assert addresses(Mesh(service(spec=spec, status=status)).service(KUBE)) == ["10.8.0.1", "fd00::1", "192.0.2.1"]


def test_an_external_name_is_refused() -> None:
    found = load({"a.yaml": service(spec={"type": "ExternalName", "externalName": "a.example"})})
    assert found.resources == ()
    assert "ExternalName" in str(found.errors[0])


@pytest.mark.parametrize(
    ("spec", "annotations", "mode", "preference"),
    [
        ({"trafficDistribution": "PreferClose"}, {}, pb.LoadBalancing.FAILOVER, CLOSE),
        ({"trafficDistribution": "PreferSameZone"}, {}, pb.LoadBalancing.FAILOVER, CLOSE),
        ({"trafficDistribution": "PreferSameNode"}, {}, pb.LoadBalancing.FAILOVER, NODE),
        ({"trafficDistribution": "preferclose"}, {}, 0, []),
        ({"trafficDistribution": "nonsense"}, {DISTRIBUTION: "PreferClose"}, pb.LoadBalancing.FAILOVER, CLOSE),
        ({"trafficDistribution": "PreferClose"}, {DISTRIBUTION: "Any"}, pb.LoadBalancing.FAILOVER, CLOSE),
        ({"internalTrafficPolicy": "Local"}, {}, pb.LoadBalancing.STRICT, [pb.LoadBalancing.NODE]),
        ({"internalTrafficPolicy": "Cluster"}, {}, 0, []),
    ],
)
def test_distribution_of_a_kubernetes_service(
    spec: Any, annotations: dict[str, str], mode: int, preference: list[Any]
) -> None:
    assert balancing(Mesh(service(spec=spec, annotations=annotations)).service(KUBE)) == (mode, preference)


def test_endpoints_that_are_not_ready_are_used_where_the_service_says_so_and_nowhere_else() -> None:
    close = {"trafficDistribution": "PreferClose"}
    mesh = Mesh(service(spec={**close, "publishNotReadyAddresses": True}), service("l", spec=close))
    first, second = mesh.service(KUBE), mesh.service("l.shop.svc.cluster.local")
    assert first.load_balancing.health_policy == pb.LoadBalancing.ALLOW_ALL
    assert second.load_balancing.health_policy == pb.LoadBalancing.ONLY_HEALTHY
    assert balancing(first) == balancing(second)


@pytest.mark.parametrize(
    ("spec", "families"),
    [
        ({}, pb.AUTOMATIC),
        ({"ipFamilies": ["IPv4"]}, pb.IPV4_ONLY),
        ({"ipFamilies": ["IPv6"], "ipFamilyPolicy": "SingleStack"}, pb.IPV6_ONLY),
        ({"ipFamilies": ["IPv6", "IPv4"], "ipFamilyPolicy": "PreferDualStack"}, pb.DUAL),
        ({"ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "SingleStack"}, pb.IPV4_ONLY),
    ],
)
def test_families_of_a_kubernetes_service(spec: Any, families: int) -> None:
    assert Mesh(service(spec=spec)).service(KUBE).ip_families == families


# -- EndpointSlices


def endpoint_slice(name: str = "k-1", service: str = "k", **fields: Any) -> str:
    body = {
        "addressType": "IPv4",
        "endpoints": [
            {"addresses": ["192.0.2.1"], "conditions": {"ready": True}},
            {"addresses": ["192.0.2.2"], "conditions": {"ready": False}},
        ],
        "ports": [{"name": "http", "port": 6443}],
        **fields,
    }
    return document("EndpointSlice", name, labels={"kubernetes.io/service-name": service}, **body)


def test_a_service_without_selector_is_where_its_slices_say() -> None:
    ports = [{"port": 443, "name": "http"}, {"port": 444, "name": "other"}]
    mesh = Mesh(service(spec={"selector": None, "ports": ports}), endpoint_slice())
    parent = "Kubernetes/discovery.k8s.io/EndpointSlice/shop/k-1"
    good, bad = (mesh.workload(f"{parent}/192.0.2.{number}") for number in (1, 2))
    assert (good.status, bad.status) == (pb.HEALTHY, pb.UNHEALTHY)
    assert mesh.ports(f"{parent}/192.0.2.1") == {f"shop/{KUBE}": {443: 6443}}
    # Nothing is known of it but where it is.
    assert good.network_mode == pb.HOST_NETWORK
    assert (good.tunnel_protocol, good.service_account, list(good.authorization_policies)) == (pb.NONE, "", [])


def test_a_slice_without_its_service_is_nothing_until_that_comes() -> None:
    mesh = Mesh(endpoint_slice())
    assert mesh.names() == []
    (warning,) = lint.findings(mesh.registry, "cluster.local")
    assert "the Service k, which is not there" in str(warning)
    found = mesh.change(service(spec={"selector": None}))
    assert len(found) == 3
    assert lint.findings(mesh.registry, "cluster.local") == []
    assert len(mesh.change(service())) == 2  # with a selector, its endpoints are what that selects
    assert mesh.names() == [f"shop/{KUBE}"]
    (warning,) = lint.findings(mesh.registry, "cluster.local")
    assert "its Service k has a selector" in str(warning)


def test_a_slice_that_names_pods_is_refused() -> None:
    pods = [{"addresses": ["192.0.2.1"], "targetRef": {"kind": "Pod", "name": "p"}}]
    found = load({"a.yaml": endpoint_slice(endpoints=pods)})
    assert "names a Pod" in str(found.errors[0])


def test_documents_as_kubernetes_writes_them_are_taken() -> None:
    spec = {
        "type": "ClusterIP",
        "clusterIPs": ["10.8.0.1"],
        "internalTrafficPolicy": "Cluster",
        "ipFamilies": ["IPv4"],
        "ipFamilyPolicy": "SingleStack",
        "sessionAffinity": "None",
        "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080, "appProtocol": "http"}],
    }
    text = service(spec=spec, status={"loadBalancer": {}})
    assert not read(text).findings
