"""Which waypoint stands before what, and what is said where none does."""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.documents import Mesh, document, entry, service, service_entry, waypoint

from miniistiod import lint
from miniistiod.resources import load
from ztunnel.wire import workload_pb2 as pb

USE, PLACE = "istio.io/use-waypoint", "istio.io/use-waypoint-namespace"
CANARY, WEIGHT = "istio.io/use-waypoint-canary", "istio.io/use-waypoint-canary-weight"
INGRESS = "istio.io/ingress-use-waypoint"
FOR = "istio.io/waypoint-for"
BOUND = ("WaypointBound", True, "WaypointAccepted")


def refused(reason: str) -> tuple[str, bool, str]:
    return ("WaypointBound", False, reason)


def home(**labels: str) -> str:
    return document("Namespace", "shop", labels=labels)


# -- what takes what


@pytest.mark.parametrize(
    ("takes", "services", "workloads"),
    [
        (None, True, False),
        ("service", True, False),
        ("workload", False, True),
        ("all", True, True),
        ("none", False, False),
    ],
)
@pytest.mark.parametrize("where", ["gateway", "class"])
def test_a_waypoint_is_for_services_or_for_workloads(
    where: str, takes: str | None, services: bool, workloads: bool
) -> None:
    labels = {} if takes is None else {FOR: takes}
    gate = waypoint(labels=labels if where == "gateway" else {})
    kind = document("GatewayClass", "istio-waypoint", labels=labels if where == "class" else {})
    mesh = Mesh(gate, kind, entry(labels={USE: "wp"}), service_entry(labels={USE: "wp"}))
    assert mesh.service().HasField("waypoint") is services
    assert mesh.workload().HasField("waypoint") is workloads
    unsupported = refused("UnsupportedTrafficType")
    assert mesh.conditions("ServiceEntry shop/s") == [BOUND if services else unsupported]
    assert mesh.conditions("WorkloadEntry shop/a") == [BOUND if workloads else unsupported]


def test_a_namespaces_waypoint_for_services_says_nothing_of_workloads() -> None:
    mesh = Mesh(home(**{USE: "wp"}), waypoint(), entry())
    assert not mesh.workload().HasField("waypoint")
    assert mesh.conditions("WorkloadEntry shop/a") == []


@pytest.mark.parametrize(
    ("namespace", "own", "found"),
    [
        ({}, {}, None),
        ({USE: "wp"}, {}, "wp"),
        ({}, {USE: "wp"}, "wp"),
        ({USE: "wp"}, {USE: "other"}, "other"),
        ({USE: "wp"}, {USE: "none"}, None),
        ({USE: "none"}, {USE: "wp"}, "wp"),
        ({USE: "none"}, {}, None),
        ({USE: "wp"}, {USE: "nobody"}, None),
        ({USE: "wp", PLACE: "infra"}, {}, "infra"),
        ({USE: "wp", PLACE: "infra"}, {USE: "wp"}, "wp"),
        ({}, {USE: "wp", PLACE: "infra"}, "infra"),
    ],
)
def test_the_object_says_it_before_its_namespace(
    namespace: dict[str, str], own: dict[str, str], found: str | None
) -> None:
    gates = {"wp": "10.7.0.1", "other": "10.7.0.2"}
    texts = [waypoint(name, address=address) for name, address in gates.items()]
    texts.append(waypoint(namespace="infra", address="10.7.0.3", allowed={"from": "All"}))
    mesh = Mesh(*texts, home(**namespace), service_entry(labels=own), service(labels=own))
    for message in (mesh.service(), mesh.service("k.shop.svc.cluster.local")):
        assert message.HasField("waypoint") is (found is not None)
        if found is not None:
            number = {"wp": 1, "other": 2, "infra": 3}[found]
            assert message.waypoint.address.address == bytes((10, 7, 0, number))


# -- who may attach


def attached(listener: Any, namespace: str = "shop", **labels: str) -> bool:
    gate = document(
        "Gateway",
        "wp",
        {"gatewayClassName": "istio-waypoint", "listeners": [listener], "addresses": [{"value": "10.7.0.1"}]},
        namespace="infra",
    )
    use = {USE: "wp", PLACE: "infra"}
    place = document("Namespace", namespace, labels=labels)
    mesh = Mesh(gate, place, service_entry(labels=use, namespace=namespace))
    bound = mesh.service(namespace=namespace).HasField("waypoint")
    condition = BOUND if bound else refused("AttachmentDenied")
    assert mesh.conditions(f"ServiceEntry {namespace}/s") == [condition]
    return bound


MESH = {"name": "mesh", "port": 15008, "protocol": "HBONE"}
PROXY = {"name": "mesh", "port": 15088, "protocol": "istio.io/PROXY"}


def allowed(**namespaces: Any) -> dict[str, Any]:
    return {"allowedRoutes": {"namespaces": namespaces}}


@pytest.mark.parametrize(
    ("listener", "same", "other"),
    [
        (MESH, True, False),
        ({**MESH, "allowedRoutes": {}}, True, False),
        ({**MESH, **allowed(**{"from": "Same"})}, True, False),
        ({**MESH, **allowed(**{"from": "All"})}, True, True),
        ({**MESH, **allowed(**{"from": "Selector"}, selector={"matchLabels": {"team": "x"}})}, False, True),
        ({**MESH, **allowed(**{"from": "Selector"}, selector={"matchLabels": {"team": "y"}})}, False, False),
        (
            {
                **MESH,
                **allowed(**{"from": "Selector"}, selector={"matchLabels": {"kubernetes.io/metadata.name": "shop"}}),
            },
            False,
            True,
        ),
        (PROXY, True, False),
        ({**PROXY, **allowed(**{"from": "All"})}, True, True),
        ({**PROXY, "port": 0, **allowed(**{"from": "All"})}, True, True),
        ({**MESH, "port": 15009, **allowed(**{"from": "All"})}, True, False),
        ({**MESH, "protocol": "HTTP", **allowed(**{"from": "All"})}, True, False),
    ],
    ids=[
        *("default", "empty", "same", "all", "selector", "another selector", "selector by name"),
        *("proxy", "proxy all", "proxy port 0", "another port", "another protocol"),
    ],
)
def test_a_listener_says_whose_objects_may_attach(listener: Any, same: bool, other: bool) -> None:
    assert attached(listener, "infra") is same
    assert attached(listener, "shop", team="x") is other


@pytest.mark.parametrize("kind", ["istio-remote", "istio-east-west"])
def test_gateways_of_networks_are_no_waypoints(kind: str) -> None:
    mesh = Mesh(waypoint(gateway_class=kind), service_entry(labels={USE: "wp"}))
    assert not mesh.service().HasField("waypoint")
    assert mesh.conditions("ServiceEntry shop/s") == [refused("WaypointIsNotReady")]


# -- two waypoints


@pytest.mark.parametrize(
    ("weight", "weights"), [(None, (100, 0)), ("0", (100, 0)), ("30", (70, 30)), ("100", (0, 100))]
)
def test_a_second_waypoint_gets_its_share(weight: str | None, weights: tuple[int, int]) -> None:
    annotations = {} if weight is None else {WEIGHT: weight}
    labels = {USE: "wp", CANARY: "new"}
    mesh = Mesh(waypoint(), waypoint("new", address="10.7.0.2"), service_entry(labels=labels, annotations=annotations))
    found = mesh.service()
    assert tuple(item.weight for item in found.weighted_waypoints) == weights
    assert [item.destination.address.address[-1] for item in found.weighted_waypoints] == [1, 2]
    assert found.waypoint == found.weighted_waypoints[0].destination
    assert mesh.conditions("ServiceEntry shop/s") == [BOUND]


@pytest.mark.parametrize(
    ("labels", "weight", "gate", "reason"),
    [
        *[({CANARY: "new"}, text, {}, "CanaryInvalidWeight") for text in ("101", "-1", "x", "", "1.5", "\u0661")],
        ({CANARY: "wp"}, "30", {}, "CanarySameAsPrimary"),
        ({CANARY: "new"}, "30", {"address": None}, "WaypointIsNotReady"),
        ({CANARY: "nobody"}, "30", {}, "WaypointIsNotReady"),
        ({CANARY: "new"}, "30", {"labels": {FOR: "workload"}}, "UnsupportedTrafficType"),
        ({CANARY: "new", f"{CANARY}-namespace": "infra"}, "30", {"namespace": "infra"}, "AttachmentDenied"),
    ],
)
def test_a_second_waypoint_that_cannot_be_used_is_left_out_and_told(
    labels: dict[str, str], weight: str, gate: Any, reason: str
) -> None:
    text = service_entry(labels={USE: "wp", **labels}, annotations={WEIGHT: weight})
    mesh = Mesh(waypoint(), waypoint("new", **{"address": "10.7.0.2", **gate}), text)
    assert mesh.service().HasField("waypoint")
    assert not mesh.service().weighted_waypoints
    assert mesh.conditions("ServiceEntry shop/s") == [refused(reason)]
    assert any(reason in str(item) for item in lint.findings(mesh.registry, "cluster.local"))


def test_a_namespaces_second_waypoint_counts_where_the_object_names_no_first() -> None:
    place = document("Namespace", "shop", labels={USE: "wp", CANARY: "new"}, annotations={WEIGHT: "40"})
    gates = [waypoint(), waypoint("new", address="10.7.0.2"), waypoint("own", address="10.7.0.3")]
    mesh = Mesh(place, *gates, service_entry())
    assert [item.weight for item in mesh.service().weighted_waypoints] == [60, 40]
    assert mesh.change(service_entry(annotations={WEIGHT: "10"})) == []  # the weight is of the level of the label
    mesh.change(service_entry(labels={USE: "own"}))
    assert mesh.service().waypoint.address.address[-1] == 3
    assert not mesh.service().weighted_waypoints
    mesh.change(service_entry(labels={CANARY: "own"}, annotations={WEIGHT: "10"}))
    assert [item.weight for item in mesh.service().weighted_waypoints] == [90, 10]


# -- ingress


@pytest.mark.parametrize(
    ("own", "namespace", "found"),
    [
        *[(text, None, True) for text in ("1", "t", "T", "true", "TRUE", "True")],
        *[(text, None, False) for text in ("0", "f", "F", "false", "FALSE", "False")],
        (None, "true", True),
        ("false", "true", False),
        ("true", "false", True),
        (None, None, False),
    ],
)
def test_ingress_uses_the_waypoint_where_the_service_or_its_namespace_says_so(
    own: str | None, namespace: str | None, found: bool
) -> None:
    def marked(text: str | None) -> dict[str, str]:
        return {} if text is None else {INGRESS: text}

    mesh = Mesh(home(**marked(namespace)), waypoint(), service_entry(labels={USE: "wp", **marked(own)}))
    assert mesh.service().ingress_use_waypoint is found
    assert mesh.conditions("ServiceEntry shop/s") == [BOUND]


def test_a_word_that_is_neither_yes_nor_no_is_told() -> None:
    mesh = Mesh(waypoint(), service_entry(labels={USE: "wp", INGRESS: "yes"}))
    assert mesh.service().HasField("waypoint")
    assert not mesh.service().ingress_use_waypoint
    ((_, ok, _),) = mesh.conditions("ServiceEntry shop/s")
    assert not ok


def test_ingress_uses_no_waypoint_where_there_is_none() -> None:
    assert not Mesh(service_entry(labels={INGRESS: "true"})).service().ingress_use_waypoint


# -- waypoints themselves


INSTANCE = {
    "gateway.istio.io/managed": "istio.io-mesh-controller",
    "gateway.networking.k8s.io/gateway-name": "wp",
}


@pytest.mark.parametrize(
    ("text", "protocol", "port"),
    [("PROXY/15088", pb.ApplicationTunnel.PROXY, 15088), ("PROXY", pb.ApplicationTunnel.PROXY, 0), ("NONE/1", None, 0)],
)
@pytest.mark.parametrize("where", ["gateway", "class"])
def test_an_instance_of_a_waypoint_has_none_and_may_want_its_connections_wrapped(
    where: str, text: str, protocol: int | None, port: int
) -> None:
    annotation = {"ambient.istio.io/waypoint-inbound-binding": text}
    gate = waypoint(labels={FOR: "all"}, annotations=annotation if where == "gateway" else {})
    kind = document("GatewayClass", "istio-waypoint", annotations=annotation if where == "class" else {})
    mesh = Mesh(home(**{USE: "wp"}), gate, kind, entry(labels=INSTANCE), entry("b", "10.0.0.2"))
    found = mesh.workload()
    assert not found.HasField("waypoint")
    assert mesh.workload("b").HasField("waypoint")
    assert mesh.conditions("WorkloadEntry shop/a") == []
    assert found.HasField("application_tunnel") is (protocol is not None)
    assert (found.application_tunnel.protocol, found.application_tunnel.port) == (protocol or 0, port)


def test_an_instance_follows_its_gateway() -> None:
    annotation = {"ambient.istio.io/waypoint-inbound-binding": "PROXY/15088"}
    mesh = Mesh(waypoint(), entry(labels=INSTANCE))
    assert not mesh.workload().HasField("application_tunnel")
    assert mesh.change(waypoint(annotations=annotation)) == ["shop/a"]
    assert mesh.workload().application_tunnel.port == 15088


def test_endpoints_of_an_entry_bind_by_their_own_labels() -> None:
    endpoints = [{"address": "10.0.0.1", "labels": {USE: "wp"}}, {"address": "10.0.0.2"}]
    mesh = Mesh(waypoint(labels={FOR: "workload"}), service_entry(spec={"endpoints": endpoints}))
    assert mesh.endpoint("s/10.0.0.1").HasField("waypoint")
    assert not mesh.endpoint("s/10.0.0.2").HasField("waypoint")


def test_hosts_that_are_resolved_have_no_waypoint_of_their_own() -> None:
    spec = {"resolution": "DNS", "hosts": ["a.example"]}
    mesh = Mesh(home(**{USE: "wp"}), waypoint(labels={FOR: "all"}), service_entry(spec=spec))
    assert mesh.service("a.example").HasField("waypoint")
    assert not mesh.endpoint("s/a.example").HasField("waypoint")


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"labels": {FOR: "everything"}}, "waypoint-for is 'everything'"),
        ({"annotations": {"ambient.istio.io/waypoint-inbound-binding": "PROXY/x"}}, "waypoint-inbound-binding"),
        ({"allowed": {"from": "Selector"}}, "namespaces.selector is missing"),
    ],
)
def test_words_that_mean_nothing_are_refused(fields: Any, what: str) -> None:
    assert what in str(load({"a.yaml": waypoint(**fields)}).errors[0])


@pytest.mark.parametrize(
    ("address", "known"),
    [
        ("10.7.0.1", entry("wp", "10.7.0.1")),
        ("10.7.0.1", service_entry("wp", spec={"addresses": ["10.7.0.1"]})),
        ("wp.mesh", service_entry("wp")),
    ],
)
def test_a_waypoint_that_nobody_knows_the_way_to_is_told(address: str, known: str) -> None:
    mesh = Mesh(waypoint(address=address), waypoint("unused"), service_entry(labels={USE: "wp"}))
    (warning,) = lint.findings(mesh.registry, "cluster.local")
    assert f"waypoint shop/wp is at {address}, which is neither" in str(warning)
    mesh.change(known)
    assert not [item for item in lint.findings(mesh.registry, "cluster.local") if "neither" in str(item)]


# -- policies and routes for waypoints

BY = {"miniistiod/waypoint-programmed-by": "ops"}


def bound_policy(kind: str = "ServiceEntry", name: str = "s", group: str = "networking.istio.io") -> str:
    target = {"group": group, "kind": kind, "name": name}
    operation = {"operation": {"methods": ["GET"]}}
    return document("AuthorizationPolicy", "p", {"targetRefs": [target], "rules": [{"to": [operation]}]})


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        ([waypoint(annotations=BY), service_entry(labels={USE: "wp"})], None),
        ([waypoint(), service_entry(labels={USE: "wp"})], "nobody here programs the waypoint shop/wp"),
        ([waypoint(annotations=BY), service_entry()], "it has no waypoint"),
        ([waypoint(annotations=BY)], "there is no such ServiceEntry"),
        ([waypoint(annotations=BY, address=None), service_entry(labels={USE: "wp"})], "it has no waypoint"),
        (
            [waypoint(annotations=BY), waypoint("new"), service_entry(labels={USE: "wp", CANARY: "new"})],
            "nobody here programs the waypoint shop/new",
        ),
    ],
)
def test_a_policy_for_a_waypoint_is_taken_where_somebody_else_programs_it(texts: list[str], why: str | None) -> None:
    found = load({f"{number}.yaml": text for number, text in enumerate([*texts, bound_policy()])})
    if why is None:
        assert not found.errors
        (warning,) = (item for item in found.findings if "enforced by ops" in str(item))
        assert "in the waypoint shop/wp, and by nobody here" in str(warning)
        assert not Mesh(*texts, bound_policy()).registry.catalog.policies
        return
    assert [why in str(item) for item in found.errors] == [True]


def test_a_policy_for_a_waypoint_that_nothing_uses_is_told() -> None:
    bound = bound_policy("Gateway", "wp", "gateway.networking.k8s.io")
    mesh = Mesh(waypoint(annotations=BY), bound, service_entry())
    (warning,) = lint.findings(mesh.registry, "cluster.local")
    assert "which nothing uses, so it protects nothing" in str(warning)
    mesh.change(service_entry(labels={USE: "wp"}), entry("wp", "10.7.0.1"))
    assert lint.findings(mesh.registry, "cluster.local") == []


@pytest.mark.parametrize(
    ("gates", "why"),
    [
        ([], "there is no such Gateway"),
        ([waypoint()], "nobody here programs the waypoint shop/wp"),
        ([waypoint(annotations=BY, address=None)], "has no address, so traffic would go past it"),
    ],
)
def test_a_policy_for_a_waypoint_itself_is_refused_where_it_would_not_be_enforced(gates: list[str], why: str) -> None:
    bound = bound_policy("Gateway", "wp", "gateway.networking.k8s.io")
    (error,) = load({f"{number}.yaml": text for number, text in enumerate([*gates, bound])}).errors
    assert why in str(error)


def test_a_policy_is_refused_where_the_waypoint_cannot_be_used_by_who_is_seen_in_its_namespace_only() -> None:
    """The service would be reached past it."""
    gate = waypoint(annotations=BY, allowed={"from": "All"}, namespace="infra")
    files = {"a.yaml": gate, "b.yaml": service_entry(labels={USE: "wp", PLACE: "infra"}), "c.yaml": bound_policy()}
    assert not load(files).errors
    files["meshconfig.yaml"] = '{"serviceEntryVisibility": {"defaultVisibility": "NAMESPACE"}}'
    (error,) = load(files).errors
    assert "it has no waypoint (waypoint infra/wp: it is of another namespace" in str(error)


def test_a_route_is_refused_or_its_enforcer_is_named() -> None:
    route = document("HTTPRoute", "r", {"parentRefs": [{"group": "", "kind": "Service", "name": "k"}], "rules": []})
    texts = [service(labels={USE: "wp"}), route]
    found = load({f"{number}.yaml": text for number, text in enumerate([waypoint(), *texts])})
    assert "nobody here programs the waypoint" in str(found.errors[0])
    mesh = Mesh(waypoint(annotations=BY), *texts)
    assert mesh.conditions("HTTPRoute shop/r") == []


@pytest.mark.parametrize(
    ("target", "texts", "namespace", "condition"),
    [
        (("Gateway", "wp", "gateway.networking.k8s.io"), [waypoint()], "shop", (True, "Accepted")),
        (("Gateway", "wp", "gateway.networking.k8s.io"), [], "shop", (False, "TargetNotFound")),
        (("Gateway", "wp", "gateway.networking.k8s.io"), [waypoint(address=None)], "shop", (False, "TargetNotFound")),
        (("Service", "k", ""), [waypoint(), service(labels={USE: "wp"})], "shop", (True, "Accepted")),
        (("Service", "k", ""), [service()], "shop", (False, "AncestorNotBound")),
        (("Service", "k", ""), [], "shop", (False, "TargetNotFound")),
        (
            ("ServiceEntry", "s", "networking.istio.io"),
            [waypoint(), service_entry(labels={USE: "wp"})],
            "shop",
            (True, "Accepted"),
        ),
        (("ServiceEntry", "s", "networking.istio.io"), [service_entry()], "shop", (False, "AncestorNotBound")),
        (("GatewayClass", "istio-waypoint", "gateway.networking.k8s.io"), [], "istio-system", (True, "Accepted")),
        (("GatewayClass", "istio-waypoint", "gateway.networking.k8s.io"), [], "shop", (False, "Invalid")),
        (("GatewayClass", "other", "gateway.networking.k8s.io"), [], "istio-system", (False, "TargetNotFound")),
        (
            ("GatewayClass", "other", "gateway.networking.k8s.io"),
            [document("GatewayClass", "other", {"controllerName": "somebody/else"})],
            "istio-system",
            (False, "Invalid"),
        ),
        (
            ("GatewayClass", "other", "gateway.networking.k8s.io"),
            [document("GatewayClass", "other", {"controllerName": "istio.io/mesh-controller"})],
            "istio-system",
            (True, "Accepted"),
        ),
    ],
)
def test_the_status_of_a_policy_for_a_waypoint(
    target: tuple[str, str, str], texts: list[str], namespace: str, condition: tuple[bool, str]
) -> None:
    kind, name, group = target
    wanted = {"targetRefs": [{"group": group, "kind": kind, "name": name}], "rules": [{}]}
    mesh = Mesh(*texts, document("AuthorizationPolicy", "p", wanted, namespace=namespace), refused=True)
    ((_, *found),) = mesh.conditions(f"AuthorizationPolicy {namespace}/p")
    assert tuple(found) == condition
