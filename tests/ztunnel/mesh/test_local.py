from __future__ import annotations

import pytest
from tests.support.mesh import at, gateway_at, gateway_named

from hbone.errors import ConfigurationError
from ztunnel.mesh import Connection, Store, decide, parse_ip
from ztunnel.mesh.local import load
from ztunnel.mesh.policy import Action, Kind, PolicyScope, StringMatch
from ztunnel.mesh.route import Tunnel, route
from ztunnel.mesh.service import IpFamilies, Mode, Scope

FULL = """
workloads:
- uid: c1//Pod/shop/web-0
  name: web-0
  namespace: shop
  serviceAccount: web
  trustDomain: cluster.local
  workloadIps: ["10.1.0.5", "fd00::5"]
  network: ""
  node: node-a
  protocol: HBONE
  networkMode: Standard
  workloadName: web
  workloadType: deployment
  canonicalName: web
  canonicalRevision: v1
  clusterId: Kubernetes
  status: Healthy
  capacity: 1
  nativeTunnel: true
  hostname: ""
  locality: {region: r1, zone: z1, subzone: ""}
  authorizationPolicies: ["shop/only-cart"]
  networkGateway: {destination: "far/192.0.2.1", hboneMtlsPort: 15009}
  services:
    "shop/web.shop.svc.cluster.local":
      80: 8080
- namespace: shop
  name: waypoint-0
  workloadIps: ["10.1.0.9"]
  protocol: HBONE
  applicationTunnel: {protocol: PROXY, port: 15088}
  services: {}
policies:
- name: only-cart
  namespace: shop
  scope: WorkloadSelector
  action: Allow
  dryRun: false
  rules:
  - - - principals: [!Exact cluster.local/ns/shop/sa/cart, {"Suffix": "/sa/x"}, !Presence []]
        destinationPorts: [8080]
        sourceIps: ["10.0.0.0/8"]
        serviceAccounts: [{namespace: shop, serviceAccount: cart}]
    - - notNamespaces: [!Prefix test-]
services:
- name: web
  namespace: shop
  hostname: web.shop.svc.cluster.local
  vips: ["/10.96.0.10"]
  cidrVips: [{network: "", cidr: 10.97.0.0/16}]
  ports: {80: 8080}
  endpoints: {x: {workloadUid: x, port: {80: 1}, status: Unhealthy}}
  subjectAltNames: ["spiffe://cluster.local/ns/shop/sa/web"]
  weightedWaypoints: [{destination: {destination: "shop/wp.example", hboneMtlsPort: 1}, weight: 3}]
  loadBalancer:
    routingPreferences: [Network, Region, Zone]
    mode: Failover
    healthPolicy: OnlyHealthy
  ipFamilies: IPv4
  canonical: true
  visibility: Namespace
"""


def test_every_key_is_read() -> None:
    found = load(FULL)
    web, waypoint = found.workloads
    assert web.addresses == (parse_ip("10.1.0.5"), parse_ip("fd00::5"))
    assert web.services == {"shop/web.shop.svc.cluster.local": {80: 8080}}
    assert web.network_gateway == gateway_at("192.0.2.1", 15009, "far")
    assert (web.locality.region, web.native_tunnel, web.node) == ("r1", True, "node-a")
    assert waypoint.application_tunnel is not None
    assert (waypoint.application_tunnel.proxy, waypoint.application_tunnel.port) == (True, 15088)
    (policy,) = found.policies
    assert (policy.key, policy.scope, policy.action) == ("shop/only-cart", PolicyScope.WORKLOAD_SELECTOR, Action.ALLOW)
    first, second = policy.rules[0]
    assert first[0].principals == (
        StringMatch(Kind.EXACT, "cluster.local/ns/shop/sa/cart"),
        StringMatch(Kind.SUFFIX, "/sa/x"),
        StringMatch(Kind.PRESENCE),
    )
    assert second[0].not_namespaces == (StringMatch(Kind.PREFIX, "test-"),)
    (service,) = found.services
    assert service.load_balancer is not None
    assert service.load_balancer.preferences == (Scope.NETWORK, Scope.REGION, Scope.ZONE)
    assert (service.load_balancer.mode, service.ip_families) == (Mode.FAILOVER, IpFamilies.IPV4)
    assert service.weighted_waypoints[0].destination == gateway_named("shop", "wp.example", 1)
    assert (service.canonical, service.namespace_only) == (True, True)


def test_missing_trust_domain_and_account_mean_what_discovery_means() -> None:
    waypoint = load(FULL).workloads[1]
    assert str(waypoint.identity) == "spiffe://cluster.local/ns/shop/sa/default"


def test_loaded_mesh_routes_and_decides() -> None:
    store = Store()
    load(FULL).apply(store)
    client, web = store.workloads["local//shop/waypoint-0"], store.workloads["c1//Pod/shop/web-0"]
    found = route(store, client, at("10.1.0.5:8080"))
    assert isinstance(found, Tunnel)
    assert not decide(store, web, Connection(parse_ip("10.1.0.9"), client.identity, at("10.1.0.5:8080"))).allowed


LOCALHOST = """
workloads:
- {uid: c//v1/Pod/default/app, name: app, namespace: default, serviceAccount: app, workloadIps: [127.0.0.2],
   protocol: HBONE, services: {default/app.example: {80: 8080}}}
- {uid: c//v1/Pod/default/far, name: far, namespace: default, workloadIps: [127.0.0.3], network: "",
   services: {default/far.example: {80: 8080}}}
services:
- {name: app, namespace: default, hostname: app.example, vips: [/127.10.0.1], ports: {80: 8080},
   subjectAltNames: ["spiffe://cluster.local/ns/default/sa/more"]}
- {name: far, namespace: default, hostname: far.example, vips: [remote/127.10.0.2], ports: {80: 8080}}
"""


def test_virtual_address_of_a_local_file_leads_to_its_workload() -> None:
    store = Store()
    load(LOCALHOST).apply(store)
    client = store.workloads["c//v1/Pod/default/app"]
    found = route(store, client, at("127.10.0.1:80"))
    assert isinstance(found, Tunnel)
    assert (found.authority, found.next_hop) == ("127.0.0.2:8080", at("127.0.0.2:15008"))
    assert set(map(str, found.expected)) == {
        "spiffe://cluster.local/ns/default/sa/app",
        "spiffe://cluster.local/ns/default/sa/more",
    }
    assert store.service_by_vip("", parse_ip("127.10.0.2")) is None
    far = store.service_by_vip("remote", parse_ip("127.10.0.2"))
    assert far is not None
    assert list(store.endpoints(far)) == ["c//v1/Pod/default/far"]


@pytest.mark.parametrize("text", ["", "{}", "workloads: []", "policies:"])
def test_empty_files_are_empty(text: str) -> None:
    found = load(text)
    assert (found.workloads, found.policies, found.services) == ((), (), ())


WORKLOAD = "workloads: [{name: a, namespace: b, services: {}, workloadIps: ['10.0.0.1'], %s}]"
SERVICE = "services: [{name: a, namespace: b, hostname: c, vips: [], ports: {}, %s}]"
POLICY = "policies: [{name: a, namespace: b, scope: Global, action: Deny, dryRun: false, rules: %s}]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "LOCAL_XDS, line 1: expected the node content, but found '<stream end>'"),
        ("- a", "LOCAL_XDS: expected keys and values, found ['a']"),
        ("a: 1", "LOCAL_XDS: unknown key 'a'; known are policies, services, workloads"),
        ("workloads: 1", "LOCAL_XDS: workloads: expected a list, found 1"),
        ("workloads: []\nworkloads: []", "LOCAL_XDS, line 2: key 'workloads' is given twice"),
        ("workloads: [{}]", "LOCAL_XDS: workloads[0].workloadIps: is missing"),
        (WORKLOAD % "nmae: x", "LOCAL_XDS: workloads[0]: unknown key 'nmae'"),
        (WORKLOAD % "protocol: QUIC", "workloads[0].protocol: expected TCP or HBONE, found 'QUIC'"),
        (WORKLOAD % "status: Sick", "workloads[0].status: expected Healthy or Unhealthy, found 'Sick'"),
        (WORKLOAD % "networkMode: x", "workloads[0].networkMode: expected Standard or HostNetwork, found 'x'"),
        (WORKLOAD % "capacity: -1", "workloads[0].capacity: expected a number from 0 to 4294967295, found -1"),
        (WORKLOAD % "capacity: true", "workloads[0].capacity: expected a number from 0 to 4294967295, found True"),
        (WORKLOAD % "node: 5", "workloads[0].node: expected a text, found 5; quote it"),
        (WORKLOAD % "nativeTunnel: 1", "workloads[0].nativeTunnel: expected true or false, found 1"),
        (WORKLOAD % "serviceAccount: a/b", "workloads[0]: service account 'a/b' is malformed"),
        (WORKLOAD % "waypoint: {destination: x, hboneMtlsPort: 1}", "expected network/ip or namespace/hostname"),
        (WORKLOAD % "waypoint: {destination: a/b}", "workloads[0].waypoint.hboneMtlsPort: is missing"),
        ("workloads: [{namespace: b, services: {a: {}}, workloadIps: []}]", "expected namespace/hostname as the key"),
        ("workloads: [{namespace: b, services: {a/b: {80: 70000}}, workloadIps: []}]", "from 0 to 65535, found 70000"),
        ("workloads: [{namespace: b, services: {}, workloadIps: [1.2.3]}]", "workloadIps[0]: '1.2.3' is no IP address"),
        (SERVICE % "visibility: x", "services[0].visibility: expected Public or Namespace, found 'x'"),
        (SERVICE % "loadBalancer: {mode: Strict}", "services[0].loadBalancer.routingPreferences: is missing"),
        (SERVICE % "cidrVips: [{network: '', cidr: 10.0.0.1}]", "expected an address with a prefix length"),
        ("services: [{name: a, namespace: b, hostname: c, ports: {}, vips: [x]}]", "expected network/ip, for example"),
        (POLICY % "[[[{prinicpals: []}]]]", "policies[0].rules[0][0][0]: unknown key 'prinicpals'"),
        (POLICY % "[[{}]]", "policies[0].rules[0][0]: expected a list of matches, found {}"),
        (POLICY % "[{}]", "policies[0].rules[0]: expected a list of clauses, found {}"),
        (POLICY % "[[[{principals: [plain]}]]]", "expected !Exact, !Prefix or !Suffix with a text, or !Presence []"),
        (POLICY % "[[[{principals: [!Exact [a]]}]]]", "!Exact takes a text"),
        (POLICY % "[[[{principals: [!Presence x]}]]]", "!Presence takes an empty list"),
        (POLICY % "[[[{sourceIps: [10.0.0.1]}]]]", "sourceIps[0]: expected an address with a prefix length"),
        (POLICY % "[[[{sourceIps: [10.0.0.1/40]}]]]", "sourceIps[0]: '10.0.0.1/40' does not appear to be"),
        (POLICY % "[[[{destinationPorts: ['80']}]]]", "destinationPorts[0]: expected a number from 0 to 65535"),
        ("policies: [{name: a, namespace: b, scope: All, action: Deny, dryRun: false, rules: []}]", "found 'All'"),
        (
            "policies: [{name: a, namespace: b, scope: Global, action: Audit, dryRun: false, rules: []}]",
            "found 'Audit'",
        ),
        ("policies: [{name: a}]", "policies[0].namespace: is missing"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor for the tag"),
        ("{? [a] : 1}", "a key must be a text or a number"),
    ],
)
def test_wrong_file_is_one_sentence_with_its_path(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("LOCAL_XDS")


def test_two_workloads_of_one_uid_are_an_error() -> None:
    entry = "{uid: x, namespace: b, services: {}, workloadIps: []}"
    with pytest.raises(ConfigurationError, match="two entries have the uid 'x'"):
        load(f"workloads: [{entry}, {entry}]", "mesh.yaml")
