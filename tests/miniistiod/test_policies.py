"""AuthorizationPolicy and PeerAuthentication as a ztunnel enforces them, and the status of what it cannot."""

from __future__ import annotations

import ipaddress
import itertools
from typing import Any

import pytest
from tests.support.documents import Mesh, document, entry, policy

from hbone.identity import SpiffeId
from miniistiod import conditions
from miniistiod.explain import MeshView
from miniistiod.resources import load
from ztunnel.mesh.rbac import Connection, decide
from ztunnel.wire import authorization_pb2 as pb

A = {"app": "a"}
SELECTED = {"selector": {"matchLabels": A}}
L4 = {"from": [{"source": {"namespaces": ["x"]}}]}
L7 = {"to": [{"operation": {"methods": ["GET"], "paths": ["/"]}}]}
MIXED = {"to": [{"operation": {"ports": ["80"], "methods": ["GET"]}}]}


def rule(**match: Any) -> dict[str, Any]:
    return {"from": [{"source": match}]}


# -- scope, action, values


@pytest.mark.parametrize(
    ("namespace", "selector", "scope"),
    [
        ("shop", False, pb.NAMESPACE),
        ("shop", True, pb.WORKLOAD_SELECTOR),
        ("istio-system", False, pb.GLOBAL),
        ("istio-system", True, pb.WORKLOAD_SELECTOR),
    ],
)
@pytest.mark.parametrize("action", [None, "ALLOW", "DENY"])
def test_scope_and_action(namespace: str, selector: bool, scope: int, action: str | None) -> None:
    spec = {"rules": [{}], **(SELECTED if selector else {}), **({} if action is None else {"action": action})}
    found = Mesh(policy(namespace=namespace, spec=spec)).policy(f"{namespace}/p")
    assert (found.name, found.namespace, found.scope) == ("p", namespace, scope)
    assert found.action == (pb.DENY if action == "DENY" else pb.ALLOW)
    assert not found.dry_run


def test_the_root_namespace_is_a_setting() -> None:
    mesh = Mesh(policy(namespace="root"), config={"rootNamespace": "root"})
    assert mesh.policy("root/p").scope == pb.GLOBAL
    assert mesh.change(config={"rootNamespace": "other"}) == ["root/p"]
    assert mesh.policy("root/p").scope == pb.NAMESPACE


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("x", "exact", "x"),
        ("*", "presence", None),
        ("*x", "suffix", "x"),
        ("x*", "prefix", "x"),
        ("X.y", "exact", "X.y"),
    ],
)
def test_texts_with_and_without_a_star(text: str, kind: str, value: str | None) -> None:
    (found,) = Mesh(policy(spec={"rules": [rule(namespaces=[text])]})).policy("shop/p").rules
    (match,) = found.clauses[0].matches[0].namespaces
    assert match.WhichOneof("match_type") == kind
    assert value is None or getattr(match, kind) == value


@pytest.mark.parametrize(
    ("text", "namespace", "account"), [("ns/sa", "ns", "sa"), ("sa", "shop", "sa")], ids=["whole", "own namespace"]
)
def test_service_accounts(text: str, namespace: str, account: str) -> None:
    (found,) = Mesh(policy(spec={"rules": [rule(serviceAccounts=[text])]})).policy("shop/p").rules
    (match,) = found.clauses[0].matches[0].service_accounts
    assert (match.namespace, match.serviceAccount) == (namespace, account)


@pytest.mark.parametrize(
    ("text", "address", "length"),
    [
        ("1.2.3.4", "1.2.3.4", 32),
        ("1.2.3.4/24", "1.2.3.4", 24),
        ("fd00::1", "fd00::1", 128),
        ("0.0.0.0/0", "0.0.0.0", 0),
    ],
)
def test_networks_stay_as_written(text: str, address: str, length: int) -> None:
    (found,) = Mesh(policy(spec={"rules": [rule(ipBlocks=[text])]})).policy("shop/p").rules
    (match,) = found.clauses[0].matches[0].source_ips
    assert (str(ipaddress.ip_address(match.address)), match.length) == (address, length)


def test_no_rules_match_nothing_and_an_empty_rule_matches_everything() -> None:
    mesh = Mesh(policy("none", spec={}), policy("all", spec={"rules": [{}]}))
    assert len(mesh.policy("shop/none").rules) == 0
    assert [len(item.clauses) for item in mesh.policy("shop/all").rules] == [0]


# -- what a ztunnel cannot enforce: refused, and converted as Istio does it


STATUS = [
    ({"rules": [L4]}, {}, (True, "Accepted", "in force")),
    ({"rules": [L4, L7]}, {}, (True, "UnsupportedValue", "(methods, paths) are left out, which allows less")),
    ({"rules": [MIXED]}, {}, (True, "UnsupportedValue", "(methods) are left out, which allows less")),
    ({"action": "DENY", "rules": [MIXED]}, {}, (True, "UnsupportedValue", "(methods) are left out of its rules")),
    ({"action": "DENY", "rules": [L4, L7]}, {}, (True, "UnsupportedValue", "are left out of its rules")),
    ({"action": "DENY", "rules": [{**L4, **L7}]}, {}, (True, "UnsupportedValue", "no rule can ever match")),
    ({"action": "DENY", "rules": [L7]}, {}, (True, "UnsupportedValue", "bind the policy to a waypoint")),
    (
        {"action": "DENY", "rules": [{"when": [{"key": "request.auth.claims[x]", "values": ["y"]}]}]},
        {},
        (True, "UnsupportedValue", "without request.auth.claims[x]"),
    ),
    ({"action": "AUDIT", "rules": [L4]}, {}, (False, "UnsupportedValue", "does not support the AUDIT action")),
    (
        {"action": "CUSTOM", "provider": {"name": "x"}, "rules": [L4]},
        {},
        (False, "UnsupportedValue", "does not support the CUSTOM action"),
    ),
    ({"rules": [L4]}, {"istio.io/dry-run": "true"}, (False, "UnsupportedValue", "does not support dry runs")),
    ({"rules": [L4]}, {"istio.io/dry-run": "nonsense"}, (True, "Accepted", "in force")),
]


@pytest.mark.parametrize(("spec", "annotations", "condition"), STATUS)
def test_the_status_of_a_policy(spec: Any, annotations: dict[str, str], condition: tuple[bool, str, str]) -> None:
    text = policy(spec=spec, annotations=annotations)
    mesh = Mesh(text, refused=True)
    (found,) = conditions.every_condition(mesh.registry)["AuthorizationPolicy shop/p"]
    ok, reason, words = condition
    assert (found["type"].rpartition("/")[2], found["ok"], found["reason"]) == ("ZtunnelAccepted", ok, reason)
    assert words in found["text"]
    # The gate lets through what is enforced as it is written, and nothing else.
    assert bool(load({"a.yaml": text}).errors) is (reason != "Accepted")


# -- peer authentication: what is enforced is what inheritance says, for every combination

MODES = ["UNSET", "DISABLE", "PERMISSIVE", "STRICT"]
PORTS = [None, "UNSET", "DISABLE", "PERMISSIVE", "STRICT"]


def peer(name: str, mode: str, **spec: Any) -> str:
    wanted = {"mtls": {"mode": mode}, **spec}
    return document("PeerAuthentication", name, wanted, namespace="istio-system" if name == "mesh" else "shop")


def taken(mesh: Mesh, port: int, *, identity: bool) -> bool:
    """Whether a connection is let in by a ztunnel that has all of the mesh."""
    view = MeshView()
    store = view.take(view.news(mesh.registry.catalog))
    (workload,) = store.workloads.values()
    assert not store.policies_for(workload).missing
    who = SpiffeId.istio("cluster.local", "x", "y") if identity else None
    return decide(
        store, workload, Connection(ipaddress.ip_address("10.0.0.9"), who, (workload.addresses[0], port))
    ).allowed


@pytest.mark.parametrize("workload", [*MODES, "absent"])
def test_plaintext_is_taken_where_no_level_says_strict(workload: str) -> None:
    """Mesh, namespace, workload and port, each with every mode or without a document."""
    count = 0
    for mesh_mode, namespace_mode, port_mode in itertools.product(["absent", *MODES], ["absent", *MODES], PORTS):
        if workload == "absent" and port_mode is not None:
            continue
        texts = [entry(labels=A)]
        if mesh_mode != "absent":
            texts.append(peer("mesh", mesh_mode))
        if namespace_mode != "absent":
            texts.append(peer("namespace", namespace_mode))
        if workload != "absent":
            ports = {} if port_mode is None else {"portLevelMtls": {"9090": {"mode": port_mode}}}
            texts.append(peer("workload", workload, **SELECTED, **ports))
        effective = "PERMISSIVE"
        for mode in (mesh_mode, namespace_mode, workload):
            if mode not in ("absent", "UNSET"):
                effective = mode
        at_port = effective if port_mode in (None, "UNSET") else port_mode
        mesh = Mesh(*texts)
        assert taken(mesh, 8080, identity=False) is (effective != "STRICT"), texts
        assert taken(mesh, 9090, identity=False) is (at_port != "STRICT"), texts
        assert taken(mesh, 9090, identity=True)
        count += 1
    assert count == (25 if workload == "absent" else 125)


def test_the_oldest_of_each_level_counts() -> None:
    def of(name: str, mode: str, year: int, **spec: Any) -> str:
        created = f"{year}-01-01T00:00:00Z"
        return document("PeerAuthentication", name, {"mtls": {"mode": mode}, **spec}, creationTimestamp=created)

    static = ["istio-system/istio_converted_static_strict"]
    for old, young, expected in (("STRICT", "PERMISSIVE", static), ("PERMISSIVE", "STRICT", [])):
        mesh = Mesh(entry(labels=A), of("x", young, 2021), of("y", old, 2020))
        assert list(mesh.workload().authorization_policies) == expected
        mesh = Mesh(entry(labels=A), of("x", young, 2021, **SELECTED), of("y", old, 2020, **SELECTED))
        assert list(mesh.workload().authorization_policies) == expected


def test_a_selector_in_the_root_namespace_is_refused() -> None:
    text = document("PeerAuthentication", "x", {**SELECTED, "mtls": {"mode": "STRICT"}}, namespace="istio-system")
    assert "has no effect" in str(load({"a.yaml": text}).errors[0])
