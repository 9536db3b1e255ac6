"""A registry that is changed step by step ends where one that reads everything at once begins."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.sizes import FULL

from miniistiod import services, vips
from miniistiod.registry import HboneMark, Inputs, Registry
from miniistiod.resources import Loader, load

if TYPE_CHECKING:
    from miniistiod.catalog import Catalog
    from miniistiod.resources import Resource

NAMESPACES = ("shop", "web", "istio-system")
LABELS = (
    *("", "app: a", "app: b", "app: a, tier: x", "istio.io/use-waypoint: w", "networking.istio.io/tunnel: http"),
    "istio.io/use-waypoint: w, istio.io/use-waypoint-canary: g",
    "gateway.istio.io/managed: istio.io-mesh-controller, gateway.networking.k8s.io/gateway-name: w",
)
NETWORK = "topology.istio.io/network"


def document(kind: str, name: str, namespace: str | None, labels: str, rest: str, annotations: str = "") -> str:
    version = {
        "Namespace": "v1",
        "Service": "v1",
        "Gateway": "gateway.networking.k8s.io/v1",
        "GatewayClass": "gateway.networking.k8s.io/v1",
        "EndpointSlice": "discovery.k8s.io/v1",
        "AuthorizationPolicy": "security.istio.io/v1",
        "PeerAuthentication": "security.istio.io/v1",
    }.get(kind, "networking.istio.io/v1")
    place = f", namespace: {namespace}" if namespace else ""
    extra = f", annotations: {{{annotations}}}" if annotations else ""
    head = f"apiVersion: {version}\nkind: {kind}\n"
    return f"{head}metadata: {{name: {name}{place}, labels: {{{labels}}}{extra}}}\n{rest}\n"


def entries(namespace: str) -> st.SearchStrategy[str]:
    return st.builds(
        lambda name, labels, address, network: document(
            "WorkloadEntry", name, namespace, labels, f"spec: {{address: {address}{network}, ports: {{http: 81}}}}"
        ),
        st.sampled_from("mn"),
        st.sampled_from(LABELS),
        st.sampled_from(["10.0.0.1", "10.0.0.2"]),
        st.sampled_from(["", ", network: far"]),
    )


def service_entries(namespace: str) -> st.SearchStrategy[str]:
    port = "ports: [{number: 80, name: http, protocol: HTTP}]"
    return st.builds(
        lambda name, labels, hosts, rest: document(
            "ServiceEntry", name, namespace, labels, f"spec: {{hosts: {hosts}, {port}, {rest}}}"
        ),
        st.sampled_from("st"),
        st.sampled_from(LABELS),
        st.sampled_from(["[a.mesh]", "[b.mesh]", "[a.mesh, b.mesh]"]),
        st.sampled_from(
            [
                "resolution: DNS",
                "resolution: STATIC, workloadSelector: {labels: {app: a}}",
                "resolution: STATIC, workloadSelector: {labels: {tier: x}}",
                "resolution: STATIC, endpoints: [{address: 10.1.0.1, network: far}, {address: 10.1.0.2}]",
                "addresses: [10.9.0.1]",
            ]
        ),
    )


def kubernetes(namespace: str) -> st.SearchStrategy[str]:
    return st.one_of(
        st.builds(
            lambda selector, labels: document(
                "Service", "k", namespace, labels, f"spec: {{ports: [{{port: 80, name: http}}]{selector}}}"
            ),
            st.sampled_from(["", ", selector: {app: a}", ", selector: {app: b}"]),
            st.sampled_from(LABELS),
        ),
        st.builds(
            lambda port: document(
                "EndpointSlice",
                "e",
                namespace,
                "kubernetes.io/service-name: k",
                f"endpoints: [{{addresses: [10.2.0.1]}}]\nports: [{{name: http, port: {port}}}]",
            ),
            st.integers(1, 2),
        ),
    )


def policies(namespace: str) -> st.SearchStrategy[str]:
    selectors = ["", "selector: {matchLabels: {app: a}}", "selector: {matchLabels: {app: a, tier: x}}"]
    modes = ["STRICT", "PERMISSIVE", "UNSET"]
    return st.one_of(
        st.builds(
            lambda name, selector, action: document(
                "AuthorizationPolicy", name, namespace, "", f"spec: {{{selector}{action}rules: [{{}}]}}"
            ),
            st.sampled_from("pq"),
            st.sampled_from([f"{item}, " if item else "" for item in selectors]),
            st.sampled_from(["", "action: DENY, "]),
        ),
        st.builds(
            lambda name, selector, mode, port: document(
                "PeerAuthentication",
                name,
                namespace,
                "",
                f"spec: {{{selector}mtls: {{mode: {mode}}}"
                + (f", portLevelMtls: {{90: {{mode: {port}}}}}" if selector else "")
                + "}",
            ),
            st.sampled_from("xy"),
            st.sampled_from([f"{item}, " if item and namespace != "istio-system" else "" for item in selectors]),
            st.sampled_from(modes),
            st.sampled_from(modes),
        ),
    )


def surroundings(namespace: str) -> st.SearchStrategy[str]:
    return st.one_of(
        st.builds(
            lambda labels, annotations: document("Namespace", namespace, None, labels, "", annotations),
            st.sampled_from(["", "istio.io/use-waypoint: w", f"{NETWORK}: here", f"{NETWORK}: far", "hidden: 'yes'"]),
            st.sampled_from(["", "networking.istio.io/traffic-distribution: PreferClose"]),
        ),
        st.builds(
            lambda name, kind, labels, address: document(
                "Gateway",
                name,
                namespace,
                labels,
                f"spec: {{gatewayClassName: {kind}, listeners: [{{port: 15008, protocol: HBONE}}]}}\n"
                f"status: {{addresses: {address}}}",
            ),
            st.sampled_from("wg"),
            st.sampled_from(["istio-waypoint", "istio-remote"]),
            st.sampled_from(["istio.io/waypoint-for: all", f"{NETWORK}: far", f"{NETWORK}: here", ""]),
            st.sampled_from(["[]", "[{value: 10.8.0.1}]", "[{type: Hostname, value: gw.example}]"]),
        ),
        st.builds(
            lambda labels, annotations: document("GatewayClass", "istio-waypoint", None, labels, "", annotations),
            st.sampled_from(["", "istio.io/waypoint-for: all", "istio.io/waypoint-for: none"]),
            st.sampled_from(["", "ambient.istio.io/waypoint-inbound-binding: PROXY/15088"]),
        ),
    )


def anything(namespace: str) -> st.SearchStrategy[str]:
    kinds = (entries, service_entries, kubernetes, policies, surroundings, surroundings)
    return st.one_of(*(kind(namespace) for kind in kinds))


DOCUMENTS = st.sampled_from(NAMESPACES).flatmap(anything)
CONFIGS = st.sampled_from(
    [
        None,
        "",
        "rootNamespace: web\n",
        "network: far\n",
        "serviceEntryVisibility: {policies: [{namespaceSelector: {matchLabels: {hidden: 'yes'}}, visibility: NONE}]}\n",
        "serviceEntryVisibility: {defaultVisibility: NAMESPACE}\n",
    ]
)
STEPS = st.lists(
    st.tuples(st.lists(DOCUMENTS, max_size=2), st.lists(st.integers(0, 30), max_size=1), st.none() | CONFIGS),
    min_size=1,
    max_size=8,
)
_PORTS = "ports: [{number: 80, name: http}]"
BASE = [
    document("WorkloadEntry", "m", "shop", "app: a", "spec: {address: 10.0.0.1}"),
    document("WorkloadEntry", "n", "shop", "app: a, tier: x", "spec: {address: 10.0.0.2, network: far}"),
    document("WorkloadEntry", "m", "web", "app: b", "spec: {address: 10.0.0.3, network: far}"),
    document("WorkloadEntry", "n", "web", "app: a", "spec: {address: 10.0.0.4}"),
    document(
        "ServiceEntry",
        "s",
        "shop",
        "app: a",
        f"spec: {{hosts: [a.mesh, b.mesh], resolution: STATIC, {_PORTS}, workloadSelector: {{labels: {{app: a}}}}}}",
    ),
    document("ServiceEntry", "t", "web", "", f"spec: {{hosts: [b.mesh], resolution: DNS, {_PORTS}}}"),
    document("Service", "k", "shop", "", "spec: {ports: [{port: 80, name: http}]}"),
    document("Namespace", "shop", None, "istio.io/use-waypoint: w", ""),
    document("Namespace", "istio-system", None, f"{NETWORK}: here", ""),
    document("AuthorizationPolicy", "p", "shop", "", "spec: {selector: {matchLabels: {app: a}}, rules: [{}]}"),
]


def contents(catalog: Catalog) -> Any:
    return (
        {name: (item.body, item.aliases, item.members, item.node) for name, item in catalog.addresses.items()},
        {name: item.body for name, item in catalog.policies.items()},
        {alias: set(names) for alias, names in catalog.by_alias.items()},
        {service: set(names) for service, names in catalog.by_service.items()},
    )


@settings(max_examples=2000 if FULL else 60, deadline=None)
@given(STEPS)
def test_step_by_step_is_the_same_as_at_once(steps: list[tuple[list[str], list[int], str | None]]) -> None:
    loader = Loader()
    marks: dict[tuple[str, str], HboneMark] = {}
    registry = Registry(Inputs(marks=marks))
    files: dict[str, str] = {}
    counter = itertools.count()
    numbers: dict[tuple[str, str], int] = {}
    for texts, gone, config in [(BASE, [], None), *steps]:
        changed: dict[str, str] = {}
        for text in texts:
            (item,) = load({"x": text}).resources
            # The file's name goes with the document, so that it has the same place when everything is read at once.
            changed[f"{'-'.join(item.meta.key)}.yaml"] = text
        if config is not None:
            changed["meshconfig.yaml"] = config
        files.update(changed)
        removed = [path for number in gone for path in sorted(files)[number : number + 1]]
        for path in removed:
            files.pop(path, None)
            changed.pop(path, None)
        loader.update(changed, removed)
        delta = loader.delta()
        wanted, given_addresses = services.vip_needs(loader.services.values())
        numbers = vips.allot(numbers, wanted, given_addresses)
        touched = [("WorkloadEntry", "shop", "m")] if next(counter) == 1 else []
        if touched:
            marks["shop", "m"] = HboneMark(service_account="default", node="n1")
        before = dict(registry.catalog.addresses)
        plan = registry.change(delta.changed, delta.removed, mesh=delta.mesh, vips=numbers, touched=touched)
        loader.taken()
        registry.catalog.apply(plan)
        assert all(before.get(name) is not item for name, item in plan.addresses.items())
        whole = Registry(Inputs(vips=numbers, marks=marks))
        everything: dict[Any, Resource] = dict(loader.documents)
        whole.catalog.apply(whole.change(everything, mesh=loader.mesh))
        assert contents(registry.catalog) == contents(whole.catalog)
        assert loader.load(files).resources == load(files).resources
