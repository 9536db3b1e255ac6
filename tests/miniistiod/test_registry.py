"""What the recorded cases in `test_golden.py` do not show."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any

import pytest

from miniistiod import lint
from miniistiod.registry import HboneMark, Inputs, Registry, convert
from miniistiod.resources import ResourceSet, load
from ztunnel.wire import authorization_pb2, workload_pb2

if TYPE_CHECKING:
    from miniistiod.catalog import Catalog

WORKLOAD = """
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: a, namespace: shop}
spec: {address: 10.0.0.1, serviceAccount: orders}
"""
POLICY = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec: {selector: {matchLabels: {app: a}}, rules: [{}]}
"""
UID = "Kubernetes/networking.istio.io/WorkloadEntry/shop/a"


def documents(*texts: str) -> ResourceSet:
    resources = load({f"{number}.yaml": text for number, text in enumerate(texts)})
    assert not resources.errors
    return resources


def mesh(*texts: str, **inputs: Any) -> Catalog:
    return convert(documents(*texts), Inputs(**inputs))


def workload(catalog: Catalog, uid: str = UID) -> workload_pb2.Workload:
    return workload_pb2.Address.FromString(catalog.addresses[uid].body).workload


def test_a_selector_does_not_select_what_has_no_labels() -> None:
    assert list(workload(mesh(WORKLOAD, POLICY)).authorization_policies) == []


@pytest.mark.parametrize(("account", "tunnel"), [("orders", workload_pb2.HBONE), ("other", workload_pb2.NONE)])
def test_a_mark_holds_for_the_account_that_was_proved(account: str, tunnel: int) -> None:
    marks = {("shop", "a"): HboneMark(service_account=account, node="n1")}
    found = workload(mesh(WORKLOAD, marks=marks))
    assert found.tunnel_protocol == tunnel
    assert found.node == ("n1" if tunnel else "")
    assert not found.native_tunnel


def test_a_mark_of_the_default_account_holds_for_an_entry_without_one() -> None:
    marks = {("shop", "a"): HboneMark(service_account="default")}
    text = WORKLOAD.replace(", serviceAccount: orders", "")
    assert workload(mesh(text, marks=marks)).tunnel_protocol == workload_pb2.HBONE


def test_a_trust_domain_is_sent_unless_it_is_the_default() -> None:
    assert workload(mesh(WORKLOAD)).trust_domain == ""
    assert workload(mesh(WORKLOAD, trust_domain="mesh.example")).trust_domain == "mesh.example"


def test_the_local_network_is_a_label_of_the_root_namespace() -> None:
    root = "apiVersion: v1\nkind: Namespace\nmetadata: {name: istio-system, labels: {topology.istio.io/network: n}}\n"
    snapshot = mesh(WORKLOAD, root)
    assert workload(snapshot).network == "n"
    assert snapshot.resolve("n/10.0.0.1") == (UID,)
    assert snapshot.resolve("/10.0.0.1") == ()


def test_what_does_not_change_is_not_in_the_plan() -> None:
    registry = Registry.of(documents(WORKLOAD, POLICY))
    (moved,) = documents(WORKLOAD.replace("10.0.0.1", "10.0.0.2")).resources
    (same,) = documents("# another line\n" + POLICY).resources
    plan = registry.change({moved.meta.key: moved, same.meta.key: same})
    assert list(plan.addresses) == [UID]
    assert plan.policies == {}


def test_versions_are_the_same_in_another_process() -> None:
    assert mesh(WORKLOAD).addresses[UID].version == mesh(WORKLOAD).addresses[UID].version
    assert len(mesh(WORKLOAD).addresses[UID].version) == 16


SERVICE = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  hosts: [a.mesh]
  addresses: [{address}]
  resolution: STATIC
  ports: [{{number: 80, name: http}}]
  endpoints: [{{address: {endpoint}}}]
"""


def services(catalog: Catalog) -> dict[str, workload_pb2.Service]:
    found = (workload_pb2.Address.FromString(item.body) for item in catalog.addresses.values())
    return {
        f"{item.service.namespace}/{item.service.hostname}": item.service for item in found if item.HasField("service")
    }


def test_the_older_of_two_entries_has_the_host() -> None:
    young = SERVICE.format(name="young", namespace="shop", address="10.9.0.1", endpoint="10.0.0.1")
    old = SERVICE.format(name="old", namespace="shop", address="10.9.0.2", endpoint="10.0.0.2")
    first_seen = {
        ("ServiceEntry", "shop", "young"): datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
        ("ServiceEntry", "shop", "old"): datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
    }
    registry = Registry.of(documents(young, old), Inputs(first_seen=first_seen))
    assert services(registry.catalog)["shop/a.mesh"].name == "old"
    assert [str(item) for item in lint.findings(registry, "cluster.local")] == [
        "0.yaml:4: warning: ServiceEntry shop/young is not used for a.mesh, which ServiceEntry old (1.yaml:4) has"
        " already; keep one of them"
    ]
    dated = young.replace("namespace: shop}", "namespace: shop, creationTimestamp: 2020-01-01T00:00:00Z}")
    assert services(mesh(dated, old, first_seen=first_seen))["shop/a.mesh"].name == "young"


def test_one_of_the_same_host_in_two_namespaces_is_canonical() -> None:
    first = SERVICE.format(name="s", namespace="a", address="10.9.0.1", endpoint="10.0.0.1")
    second = SERVICE.format(name="s", namespace="b", address="10.9.0.2", endpoint="10.0.0.2")
    found = services(mesh(second, first))
    assert {name: item.canonical for name, item in found.items()} == {"a/a.mesh": False, "b/a.mesh": True}


def test_none_passes_through() -> None:
    text = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: s, namespace: shop}
spec: {hosts: [a.mesh], addresses: [10.9.0.0/24], ports: [{number: 80, name: http}]}
"""
    snapshot = mesh(text)
    (service,) = services(snapshot).values()
    assert service.load_balancing.mode == workload_pb2.LoadBalancing.PASSTHROUGH
    assert snapshot.resolve("/10.9.0.0/24") == ("shop/a.mesh",)


def test_names_that_dns_finds_become_workloads() -> None:
    text = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: s, namespace: shop}
spec: {hosts: [a.example, b.example], resolution: DNS, ports: [{number: 443, name: tls, protocol: TLS}]}
"""
    snapshot = mesh(text, vips={("shop", "a.example"): 5})
    parent = "Kubernetes/networking.istio.io/ServiceEntry/shop/s"
    assert workload(snapshot, f"{parent}/a.example").hostname == "a.example"
    assert list(workload(snapshot, f"{parent}/b.example").services) == ["shop/b.example"]
    assert snapshot.resolve("/240.240.0.5") == ("shop/a.example", f"{parent}/a.example")


@pytest.mark.parametrize(
    ("texts", "finding"),
    [
        ((WORKLOAD, WORKLOAD.replace("name: a", "name: b")), "has the address 10.0.0.1 of shop/a (0.yaml:4)"),
        (
            (
                SERVICE.format(name="s", namespace="a", address="10.9.0.1", endpoint="10.0.0.1"),
                SERVICE.format(name="s", namespace="b", address="10.9.0.1", endpoint="10.0.0.2"),
            ),
            "ServiceEntry b/a.mesh has the address 10.9.0.1 of a/s",
        ),
        (
            (POLICY.replace("rules: [{}]", "rules: [{from: [{source: {principals: [other/ns/a/sa/b]}}]}]"),),
            "'other/ns/a/sa/b' is not of the trust domain 'cluster.local', so it never matches",
        ),
    ],
)
def test_what_is_wrong_between_documents_is_a_warning(texts: tuple[str, ...], finding: str) -> None:
    (found,) = lint.findings(Registry.of(documents(*texts)), "cluster.local")
    assert finding in str(found)


@pytest.mark.parametrize(
    ("spec", "scope"),
    [("{rules: [{}]}", authorization_pb2.NAMESPACE), ("{selector: {matchLabels: {a: b}}}", 2)],
)
def test_scope_of_a_policy(spec: str, scope: int) -> None:
    text = POLICY.partition("spec:")[0] + f"spec: {spec}\n"
    found = authorization_pb2.Authorization.FromString(mesh(text).policies["shop/p"].body)
    assert found.scope == scope
    config = load({"meshconfig.yaml": "rootNamespace: shop\n", "a.yaml": text})
    found = authorization_pb2.Authorization.FromString(convert(config).policies["shop/p"].body)
    assert found.scope == (authorization_pb2.GLOBAL if scope != 2 else scope)
