"""What is refused, each with the line and the remedy. What is taken is in `test_golden.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from miniistiod.resources import (
    AuthorizationPolicy,
    Loader,
    Namespace,
    ResourceSet,
    ServiceEntry,
    Severity,
    WorkloadEntry,
    load,
)

if TYPE_CHECKING:
    from collections.abc import Callable

HEAD = {
    "AP": "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\nspec:\n",
    "PA": "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: p, namespace: shop}\nspec:\n",
    "SE": "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: s, namespace: shop}\nspec:\n",
    "WE": "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {name: w, namespace: shop}\nspec:\n",
    "WG": "apiVersion: networking.istio.io/v1\nkind: WorkloadGroup\nmetadata: {name: g, namespace: shop}\nspec:\n",
    "GW": "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: w, namespace: shop}\nspec:\n",
    "ROUTE": "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: r, namespace: shop}\nspec:\n",
    "SLICE": "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: e}\n",
    "SVC": "apiVersion: v1\nkind: Service\nmetadata: {name: s, namespace: shop}\nspec:\n",
}
HOSTS = "  hosts: [a.mesh]\n  ports: [{number: 80, name: http, protocol: HTTP}]\n"


def read(text: str) -> ResourceSet:
    return load({"a.yaml": text})


def errors(text: str) -> list[str]:
    return [str(error) for error in read(text).errors]


@pytest.mark.parametrize(
    ("kind", "spec", "line", "what"),
    [
        ("AP", "  action: AUDIT\n", 5, "spec.action AUDIT cannot be enforced"),
        ("AP", "  action: allow\n", 5, "spec.action is 'allow'"),
        ("AP", "  selector: {}\n", 5, "spec.selector names no label"),
        ("AP", "  selector: {matchLabels: {}}\n", 5, "spec.selector names no label"),
        ("AP", "  selector: {matchLabels: {app: 'a*'}}\n", 5, "wildcard"),
        ("AP", "  targetRef: {kind: Gateway, name: w}\n", 5, "nothing can be bound to a Gateway of group ''"),
        ("AP", "  targetRef: {kind: Gateway}\n", 5, "kind and name is missing"),
        ("AP", "  selector: {matchLabels: {a: b}}\n  targetRef: {kind: Service, name: w}\n", 5, "both targetRefs and"),
        ("AP", "  action: DENY\n", 5, "a DENY policy without rules denies nothing"),
        ("AP", "  rule: []\n", 5, "unknown field spec.rule"),
        ("AP", "  rules:\n  - from: []\n", 6, "spec.rules[0].from is empty"),
        ("AP", "  rules:\n  - from: [{source: {}}]\n", 6, "spec.rules[0].from[0].source says nothing"),
        ("AP", "  rules:\n  - from: [{}]\n", 6, "spec.rules[0].from[0].source is missing"),
        ("AP", "  rules:\n  - from: [{source: {principals: []}}]\n", 6, "is an empty list, which restricts nothing"),
        ("AP", "  rules:\n  - from:\n    - source: {principals: [spiffe://td/ns/a/sa/b]}\n", 7, "has the scheme"),
        ("AP", "  rules:\n  - from: [{source: {principals: [bob]}}]\n", 6, "not a principal"),
        ("AP", "  rules:\n  - from: [{source: {namespaces: ['*a*']}}]\n", 6, "more than one wildcard"),
        ("AP", "  rules:\n  - from: [{source: {namespaces: ['a*b']}}]\n", 6, "more than one wildcard"),
        ("AP", "  rules:\n  - from: [{source: {namespaces: ['']}}]\n", 6, "empty"),
        ("AP", "  rules:\n  - from: [{source: {serviceAccounts: ['a/b/c']}}]\n", 6, "not a service account"),
        ("AP", "  rules:\n  - from: [{source: {serviceAccounts: ['*']}}]\n", 6, "not a service account"),
        ("AP", "  rules:\n  - from: [{source: {ipBlocks: [10.0.0.0/33]}}]\n", 6, "not a network"),
        ("AP", "  rules:\n  - from: [{source: {ipBlocks: ['::ffff:10.0.0.1']}}]\n", 6, "an IPv4 address written as"),
        ("AP", "  rules:\n  - from: [{source: {ipBlocks: [fe80::1%eth0]}}]\n", 6, "a zone"),
        ("AP", "  rules:\n  - from: [{source: {remoteIpBlocks: [10.0.0.1]}}]\n", 6, "remoteIpBlocks is about requests"),
        ("AP", "  rules:\n  - to: [{operation: {methods: [GET]}}]\n", 6, "methods is about requests"),
        ("AP", "  rules:\n  - to: [{operation: {ports: [80]}}]\n", 6, "is '80', a number"),
        ("AP", "  rules:\n  - to: [{operation: {ports: ['080']}}]\n", 6, "not a port"),
        ("AP", "  rules:\n  - to: [{operation: {ports: ['65536']}}]\n", 6, "not a port"),
        ("AP", "  rules:\n  - to: [{operation: {ports: ['٨٠']}}]\n", 6, "not a port"),
        ("AP", "  rules:\n  - when: [{key: connection.sni, values: [a]}]\n", 6, "'connection.sni' is about requests"),
        ("AP", "  rules:\n  - when: [{key: source.ip}]\n", 6, "neither values nor notValues"),
        ("AP", "  rules:\n  - when: [{values: [a]}]\n", 6, "key is missing"),
        ("AP", "  rules: {}\n", 5, "spec.rules is a mapping instead of a list"),
        ("AP", "  rules: [1]\n", 5, "spec.rules[0] is number instead of a mapping"),
        ("PA", "  mtls: {mode: MAYBE}\n", 5, "spec.mtls.mode is 'MAYBE'"),
        ("PA", "  portLevelMtls: {80: {mode: STRICT}}\n", 5, "has an effect only with a selector"),
        ("PA", "  selector: {matchLabels: {a: b}}\n  portLevelMtls: {http: {mode: STRICT}}\n", 6, "has the key 'http'"),
        ("SE", "  ports: []\n", 5, "spec.hosts names no host"),
        ("SE", "  hosts: [a.mesh]\n", 5, "spec.ports names no port"),
        ("SE", HOSTS + "  hosts: [b.mesh]\n", 7, "given twice"),
        ("SE", "  hosts: [A..b]\n  ports: [{number: 80, name: http}]\n", 5, "not a host name"),
        ("SE", HOSTS + "  addresses: [10.0.0]\n", 7, "not an IP address"),
        ("SE", HOSTS + "  resolution: static\n", 7, "spec.resolution is 'static'"),
        ("SE", HOSTS + "  endpoints: [{address: 10.0.0.1}]\n", 5, "NONE means the address that was dialled"),
        ("SE", HOSTS + "  resolution: STATIC\n  endpoints: [{}]\n", 8, "spec.endpoints[0].address is missing"),
        ("SE", HOSTS + "  resolution: STATIC\n  endpoints: [{address: 'unix:///a'}]\n", 8, "a Unix socket"),
        ("SE", HOSTS + "  workloadSelector: {labels: {}}\n", 7, "names no label"),
        ("SE", HOSTS + "  exportTo: [.]\n", 7, "which is not enforced"),
        ("SE", "  hosts: [a.mesh]\n  ports: [{number: 0, name: http}]\n", 6, "spec.ports[0].number is 0"),
        ("SE", "  hosts: [a.mesh]\n  ports: [{number: 80}]\n", 6, "spec.ports[0].name is missing"),
        ("SE", "  hosts: [a.mesh]\n  ports: [{name: x}]\n", 6, "spec.ports[0].number is missing"),
        ("SE", "  hosts: [a.mesh]\n  ports: [{number: 80, name: a, protocol: X}]\n", 6, "protocol is 'X'"),
        ("SE", "  hosts: [a.mesh]\n  ports: [{number: 1, name: a}, {number: 1, name: b}]\n", 6, "repeats port 1"),
        ("WE", "  address: 10.0.0.300\n", 5, "not an IP address"),
        ("WE", "  address: [10.0.0.1]\n", 5, "is a list instead of a text"),
        ("WE", "  {}\n", 5, "spec.address is missing"),
        ("WE", "  address: 10.0.0.1\n  serviceAccount: A/b\n", 5, "spec.serviceAccount is 'A/b'"),
        ("WE", "  address: 10.0.0.1\n  weight: -1\n", 6, "spec.weight is -1"),
        ("WE", "  address: 10.0.0.1\n  locality: a/b/c/d\n", 5, "write region/zone/subzone"),
        ("WE", "  address: 10.0.0.1\n  ports: {http: 99999}\n", 6, "spec.ports[http] is 99999"),
        ("WE", "  address: 10.0.0.1\n  labels: {v: 1}\n", 6, "spec.labels[v] is '1', a number; put it in quotes"),
        ("SVC", "  type: NodePort\n  ports: [{port: 80}]\n", 5, "has no meaning without Kubernetes"),
        ("SVC", "  ports: [{port: 80, protocol: UDP}]\n", 5, "which the mesh does not carry"),
        ("SVC", "  type: ExternalName\n  externalName: a.b\n  ports: [{port: 80}]\n", 5, "has no meaning without"),
        ("SVC", "  ports: [{port: 80}]\n  ipFamilies: [IPv5]\n", 6, "not an address family"),
        ("WG", "  {}\n", 5, "spec.template is missing"),
        ("WG", "  template: {address: 10.0.0.1}\n", 5, "spec.template.address is of one machine"),
        ("WG", "  template: {labels: {a: b}}\n", 5, "use spec.metadata.labels"),
        ("GW", "  listeners: []\n", 5, "spec.gatewayClassName is missing"),
        ("GW", "  gatewayClassName: x\n  listeners: [{name: m}]\n", 6, "port and protocol is missing"),
        ("GW", "  gatewayClassName: x\n  addresses: [{value: a.b}]\n", 6, "or say type: Hostname"),
        (
            "GW",
            "  gatewayClassName: x\n  listeners:\n  - port: 1\n    allowedRoutes: {namespaces: {from: Never}}\n",
            8,
            "write one of All, Same, Selector",
        ),
        ("ROUTE", "  rules: []\n", 3, "is bound to nothing"),
        ("AP", "  rules: [{when: []}]\n", 5, "spec.rules[0].when is empty"),
        ("AP", "  targetRef: {kind: Service, name: w, namespace: other}\n", 5, "it is of another namespace"),
        ("PA", "  portLevelMtls: [80]\n  selector: {matchLabels: {a: b}}\n", 5, "portLevelMtls is not a mapping"),
        ("SE", "  hosts: [a.mesh, a.mesh]\n  ports: [{number: 80, name: http}]\n", 5, "names 'a.mesh' twice"),
        (
            "SE",
            HOSTS + "  resolution: STATIC\n  endpoints: [{address: 10.0.0.1}]\n  workloadSelector: {labels: {a: b}}\n",
            5,
            "both endpoints and workloadSelector",
        ),
        ("SE", HOSTS + "  subjectAltNames: ['']\n", 7, "empty; write a SPIFFE ID"),
        ("SE", HOSTS + "status: {addresses: [{host: a.mesh, value: x}]}\n", 7, "not an IP address"),
        ("WE", "  address: a..b\n", 5, "spec.address is 'a..b'"),
        (
            "WE",
            "  address: 10.0.0.1\n  ports: [80]\n",
            6,
            "spec.ports is a list instead of a mapping; write 'name: port'",
        ),
        ("WE", "  address: 10.0.0.1\n  labels: [a]\n", 6, "spec.labels is a list instead of a mapping"),
        ("WE", "  address: 10.0.0.1\n  weight: heavy\n", 6, "spec.weight is 'heavy', not a whole number"),
        ("SVC", "  ports: []\n", 5, "spec.ports names no port"),
        ("SVC", "  ports: [{name: x}]\n", 5, "spec.ports[0].port is missing"),
        ("SVC", "  ports: [{port: 80}]\n  clusterIP: x\n", 5, "spec.clusterIP is 'x'"),
        ("SVC", "  ports: [{port: 80}]\n  publishNotReadyAddresses: 'yes'\n", 6, "is yes; write true or false"),
        ("SVC", "  ports: [{port: 80}]\nstatus: {loadBalancer: {ingress: [{ip: x}]}}\n", 6, "ip is 'x'"),
        ("GW", "  gatewayClassName: x\n  addresses: [{}]\n", 6, "spec.addresses[0].value is missing"),
        (
            "GW",
            "  gatewayClassName: x\n  listeners:\n  - port: 1\n    protocol: HBONE\n    allowedRoutes: {namespaces:"
            " {from: Selector, selector: {matchExpressions: [{key: a}]}}}\n",
            9,
            "key and operator is missing",
        ),
        (
            "GW",
            "  gatewayClassName: x\n  listeners:\n  - port: 1\n    protocol: HBONE\n    allowedRoutes: {namespaces:"
            " {from: Selector, selector: {matchExpressions: [{key: a, operator: In}]}}}\n",
            9,
            "has 0 values for In",
        ),
        ("SLICE", "endpoints: [{addresses: ['fd00::1']}]\naddressType: IPv4\n", 4, "an address that is not IPv4"),
        *[(kind, None, 1, "spec is missing") for kind in ("AP", "PA", "SE", "WE", "WG", "GW", "SVC")],
    ],
)
def test_a_wrong_field_is_an_error_with_its_line(kind: str, spec: str | None, line: int, what: str) -> None:
    found = errors(HEAD[kind].removesuffix("spec:\n") if spec is None else HEAD[kind] + spec)
    assert any(item.startswith(f"a.yaml:{line}: error: ") and what in item for item in found), found


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[]\n", "a list instead of a mapping"),
        ("kind: Namespace\n", "the apiVersion of a Namespace is missing"),
        ("apiVersion: v2\nkind: Namespace\nmetadata: {name: a}\n", "the apiVersion of a Namespace is 'v2'"),
        ("apiVersion: v1\n", "kind is missing"),
        ("apiVersion: v1\nkind: Pod\n", "the kind 'Pod' is not known"),
        ("apiVersion: x\nkind: HTTPRoute\n", "the apiVersion of a HTTPRoute is 'x'"),
        ("apiVersion: networking.istio.io/v1\nkind: VirtualService\n", "a VirtualService is not handled"),
        ("apiVersion: v1\nkind: Namespace\n", "metadata is missing"),
        ("apiVersion: v1\nkind: Namespace\nmetadata: {}\n", "metadata.name is missing"),
        ("apiVersion: v1\nkind: Namespace\nmetadata: {name: A}\n", "metadata.name is 'A'"),
        ("apiVersion: v1\nkind: Namespace\nmetadata: {name: a, namespace: b}\n", "a Namespace has no namespace"),
        ("apiVersion: v1\nkind: Namespace\nmetadata: {name: a, label: {}}\n", "unknown field metadata.label"),
        ("apiVersion: v1\nkind: Namespace\nmetadata: {name: a, creationTimestamp: soon}\n", "is 'soon'"),
        ("apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\nextra: 1\n", "unknown field extra"),
        (HEAD["AP"].replace("shop", "sh/op") + "  {}\n", "metadata.namespace is 'sh/op'"),
        (
            HEAD["AP"].replace("shop}", "shop, annotations: {istio.io/dry-run: 'true'}}") + "  {}\n",
            "asks for a dry run",
        ),
    ],
)
def test_a_wrong_document_is_an_error(text: str, what: str) -> None:
    assert any(what in item for item in errors(text)), errors(text)


def test_one_load_tells_everything_that_is_wrong() -> None:
    text = HEAD["AP"] + "  action: AUDIT\n  rules: [{to: [{operation: {ports: [x], methods: [GET]}}]}]\n"
    assert len(errors(text)) == 3


def test_the_namespace_is_default_when_none_is_given() -> None:
    resources = read(HEAD["WE"].replace(", namespace: shop", "") + "  address: 10.0.0.1\n")
    assert resources.of(WorkloadEntry)[0].meta.namespace == "default"


def test_the_same_object_twice_names_both_places() -> None:
    text = HEAD["WE"] + "  address: 10.0.0.1\n"
    (error,) = load({"a.yaml": text, "b.yaml": text}).errors
    assert str(error).startswith("b.yaml:3: error: WorkloadEntry shop/w is defined a second time, first at a.yaml:3")


def test_objects_of_kinds_and_namespaces_are_apart() -> None:
    first = HEAD["WE"] + "  address: 10.0.0.1\n"
    other = HEAD["WE"].replace("shop", "web") + "  address: 10.0.0.2\n"
    assert not load({"a.yaml": first, "b.yaml": other}).errors


def test_what_an_api_server_adds_is_taken() -> None:
    text = HEAD["WE"].replace(
        "shop}", "shop, uid: x, resourceVersion: '1', generation: 2, creationTimestamp: 2025-01-01T00:00:00Z}"
    )
    resources = read(text + "  address: 10.0.0.1\nstatus: {conditions: []}\n")
    assert not resources.errors
    created = resources.of(WorkloadEntry)[0].meta.created
    assert created is not None
    assert created.year == 2025


def test_a_network_stays_as_it_was_written() -> None:
    resources = read(HEAD["AP"] + "  rules: [{from: [{source: {ipBlocks: [10.1.2.3/8]}}]}]\n")
    (policy,) = resources.of(AuthorizationPolicy)
    assert str(policy.rules[0].clauses[0][0].source_ips[0]) == "10.1.2.3/8"


def test_a_workload_in_plaintext_is_a_warning_only() -> None:
    resources = read(HEAD["WE"] + "  address: 10.0.0.1\n")
    assert [item.severity for item in resources.findings] == [Severity.WARNING]
    labelled = HEAD["WE"].replace("shop}", "shop, labels: {networking.istio.io/tunnel: http}}")
    assert not read(labelled + "  address: 10.0.0.1\n").findings


def test_hosts_are_compared_in_lower_case() -> None:
    resources = read(HEAD["SE"] + HOSTS.replace("a.mesh", "A.Mesh"))
    assert resources.of(ServiceEntry)[0].hosts == ("a.mesh",)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("trustDomain: mesh\nmeshId: x\n", "unknown field meshId"),
        ("trustDomain: a/b\n", "trustDomain is 'a/b'"),
        ("rootNamespace: A\n", "rootNamespace is 'A'"),
        ("a: 1\n---\nb: 2\n", "has 2 documents"),
        ("trustDomainAliases: [x]\n", "trustDomainAliases has no effect in an ambient mesh"),
        ("caCertificates: [{pem: x}]\n", "would have others believed"),
        ("outboundTrafficPolicy: {mode: REGISTRY_ONLY}\n", "REGISTRY_ONLY is not enforced"),
        ("serviceScopeConfigs: [{scope: GLOBAL}]\n", "about several clusters"),
        ("network: a/b\n", "network is 'a/b'"),
        ("serviceEntryVisibility: {policies: [{visibility: NONE}]}\n", "namespaceSelector and visibility is missing"),
    ],
)
def test_a_wrong_mesh_config_is_an_error(text: str, what: str) -> None:
    found = [str(error) for error in load({"meshconfig.yaml": text}).errors]
    assert any(what in item for item in found), found


def test_a_mesh_config_of_sidecars_is_taken_with_warnings() -> None:
    found = load({"meshconfig.yaml": "accessLogFile: /dev/stdout\ndefaultConfig: {a: b}\ntrustDomain: x\n"})
    assert [(item.severity, item.line) for item in found.findings] == [(Severity.WARNING, 1), (Severity.WARNING, 2)]
    assert not load({"meshconfig.yaml": "outboundTrafficPolicy: {mode: ALLOW_ANY}\ntrustDomainAliases: []\n"}).findings


def test_the_mesh_config_is_read_wherever_it_stands() -> None:
    resources = load({"b/meshconfig.yaml": "trustDomain: mesh.example\nrootNamespace: root\n"})
    assert (resources.mesh.trust_domain, resources.mesh.root_namespace) == ("mesh.example", "root")
    assert load({"b/meshconfig.yaml": "", "meshconfig.yaml": ""}).errors


@pytest.mark.parametrize(
    ("kind", "field", "limit", "element"),
    [
        ("SE", "hosts", 256, lambda number: f"h{number}.mesh"),
        ("SE", "addresses", 256, lambda number: f"10.0.{number // 256}.{number % 256}"),
        ("SE", "ports", 256, lambda number: f"{{number: {number}, name: p{number}}}"),
        ("SE", "endpoints", 4096, lambda number: f"{{address: 10.0.{number // 256}.{number % 256}}}"),
        ("SVC", "ports", 256, lambda number: f"{{port: {number}, name: p{number}}}"),
    ],
)
def test_lists_that_are_multiplied_have_a_limit(
    kind: str, field: str, limit: int, element: Callable[[int], str]
) -> None:
    """Each endpoint has the ports of each host: what a document becomes is bounded by this."""
    rest = {"hosts": "[a.mesh]", "ports": "[{number: 80, name: http}]", "resolution": "STATIC"} if kind == "SE" else {}

    def of(count: int) -> list[str]:
        listed = ", ".join(element(number) for number in range(1, count + 1))
        fields = {**rest, field: f"[{listed}]"}
        return errors(HEAD[kind] + "".join(f"  {name}: {value}\n" for name, value in fields.items()))

    assert of(limit) == []
    (found,) = of(limit + 1)
    assert f"spec.{field} has {limit + 1} elements, over the limit of {limit}; make several documents" in found


def test_an_empty_policy_is_taken_and_allows_nobody() -> None:
    (policy,) = read(HEAD["AP"] + "  {}\n").of(AuthorizationPolicy)
    assert policy.rules == ()


def test_a_list_as_kubectl_writes_it_is_its_items() -> None:
    text = "apiVersion: v1\nkind: List\nmetadata: {resourceVersion: ''}\nitems:\n"
    items = "".join(f"- apiVersion: v1\n  kind: Namespace\n  metadata: {{name: {name}}}\n" for name in ("a", "b", "a"))
    resources = read(text + items)
    assert [item.meta.name for item in resources.resources] == ["a", "b"]
    assert [str(item) for item in resources.errors] == [
        "a.yaml:13: error: Namespace a is defined a second time, first at a.yaml:7; keep one of them"
    ]
    assert read(text).resources == ()
    assert "items is a mapping instead of a list" in errors(text.replace("items:", "items: {}"))[0]
    assert "unknown field item" in errors(text.replace("items:", "item:"))[0]


def test_a_namespace_needs_no_spec() -> None:
    assert read("apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n").of(Namespace)


def test_a_file_that_did_not_change_is_not_parsed_again() -> None:
    loader = Loader()
    files = {"a.yaml": HEAD["WE"] + "  address: 10.0.0.1\n", "b.yaml": HEAD["SE"] + HOSTS}
    first = loader.load(files)
    second = loader.load({**files, "b.yaml": HEAD["SE"] + HOSTS.replace("a.mesh", "b.mesh")})
    assert second.resources[0] is first.resources[0]
    assert second.of(ServiceEntry)[0].hosts == ("b.mesh",)
    assert second.findings == first.findings
    assert loader.load({**files, "c.yaml": files["a.yaml"]}).errors
    assert loader.load(files) == load(files)
