"""`istioctl ztunnel-config` reads the dump with typed fields: one of another type is an error for the whole dump."""

from __future__ import annotations

import base64
import json
import re
from typing import TYPE_CHECKING, Any

import trio
from cryptography import x509
from tests.support.daemon import running, settings
from tests.support.sizes import size

from ztunnel import dump
from ztunnel.dump import mesh_dump, workload_state
from ztunnel.jsonstream import ENTRIES, Rows, collect, write
from ztunnel.mesh import Store
from ztunnel.mesh.local import load
from ztunnel.mesh.workload import Workload
from ztunnel.wire import workload_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

TEXT, NUMBER, FLAG, PORT = str, int, bool, range(65536)
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
DECIMAL = re.compile(r"\d+")
ANY = object()


class Map(dict[str, Any]):
    """An object whose keys are data: `*` is the type of each value."""


STRINGS = [{"Exact": TEXT, "Prefix": TEXT, "Suffix": TEXT, "Presence": ANY}]
ACCOUNTS = [{"namespace": TEXT, "serviceAccount": TEXT}]
MATCH = {
    key: form
    for name, form in {
        "namespaces": STRINGS,
        "principals": STRINGS,
        "sourceIps": [TEXT],
        "destinationIps": [TEXT],
        "destinationPorts": [PORT],
        "serviceAccounts": ACCOUNTS,
    }.items()
    for key in (name, "not" + name[0].upper() + name[1:])
}
CERTIFICATE = {"pem": TEXT, "serialNumber": DECIMAL, "validFrom": TIME, "expirationTime": TIME}
CONNECTION = [{"src": TEXT, "originalDst": TEXT, "actualDst": TEXT, "protocol": {"TCP", "HBONE", "DOUBLEHBONE"}}]
WORKLOAD = {
    "uid": TEXT,
    "workloadIps": [TEXT],
    "waypoint": {"destination": TEXT},
    "networkGateway": {"destination": TEXT},
    "protocol": {"TCP", "HBONE"},
    "name": TEXT,
    "namespace": TEXT,
    "serviceAccount": TEXT,
    "workloadName": TEXT,
    "workloadType": TEXT,
    "canonicalName": TEXT,
    "canonicalRevision": TEXT,
    "clusterId": TEXT,
    "trustDomain": TEXT,
    "locality": {"region": TEXT, "zone": TEXT, "subzone": TEXT},
    "node": TEXT,
    "network": TEXT,
    "status": {"Healthy", "Unhealthy"},
    "hostname": TEXT,
    "capacity": NUMBER,
    "applicationTunnel": {"protocol": TEXT, "port": PORT},
    "authorizationPolicies": [TEXT],
}
SERVICE = {
    "name": TEXT,
    "namespace": TEXT,
    "hostname": TEXT,
    "vips": [TEXT],
    "cidrVips": [{"cidr": TEXT, "network": TEXT}],
    "ports": Map({"*": NUMBER}),
    "loadBalancer": {"mode": TEXT, "routingPreferences": [TEXT], "healthPolicy": TEXT},
    "waypoint": {"destination": TEXT},
    "endpoints": Map({"*": {"workloadUid": TEXT, "port": Map({"*": PORT})}}),
    "subjectAltNames": [TEXT],
    "ipFamilies": TEXT,
    "canonical": FLAG,
    "visibility": TEXT,
}
POLICY = {
    "name": TEXT,
    "namespace": TEXT,
    "scope": {"Global", "Namespace", "WorkloadSelector"},
    "action": {"Allow", "Deny"},
    "rules": [[[MATCH]]],
}
READ_BY_ISTIOCTL = {
    "workloads": [WORKLOAD],
    "services": [SERVICE],
    "policies": [POLICY],
    "certificates": [
        {"identity": TEXT, "state": TEXT, "certChain": [CERTIFICATE], "rootCerts": [CERTIFICATE]},
    ],
    "workloadState": Map(
        {
            "*": {
                "state": {"Up", "Pending"},
                "connections": {"inbound": CONNECTION, "outbound": CONNECTION},
                "info": {"name": TEXT, "namespace": TEXT, "trustDomain": TEXT, "serviceAccount": TEXT},
            }
        }
    ),
}
"""Every key that it reads, with its type. All others are for people."""

ZTUNNELS = {"stagedServices", "staticConfig", "version", "config"} | READ_BY_ISTIOCTL.keys()
"""The keys at the top that ztunnel has."""

# fmt: off
CONFIG = {
    "proxy", "dnsProxy", "windowSize", "connectionWindowSize", "frameSize", "poolMaxStreamsPerConn",
    "poolUnusedReleaseTimeout", "socks5Addr", "adminAddr", "statsAddr", "readinessAddr", "inboundAddr",
    "inboundPlaintextAddr", "outboundAddr", "dnsProxyAddr", "illegalPorts", "network", "localNode", "proxyMode",
    "proxyWorkloadInformation", "clusterId", "clusterDomain", "caAddress", "caRootCert", "altCaHostname",
    "xdsAddress", "xdsRootCert", "altXdsHostname", "preferedServiceNamespace", "secretTtl",
    "selfTerminationDeadline", "proxyMetadata", "numWorkerThreads", "requireOriginalSource", "dnsResolverCfg",
    "packetMark", "socketConfig", "xdsHeaders", "caHeaders", "localhostAppTunnel", "ipv6Enabled", "crlPath",
    "enableEnhancedBaggage",
}
# fmt: on
"""ztunnel's settings that there are here too."""


def check(value: Any, form: Any, path: str = "") -> Iterator[str]:
    """Hold a value against its type; the paths of the keys that were there."""
    where = path or "the dump"
    if form is ANY:
        return
    if isinstance(form, list):
        assert type(value) is list, where
        for part in value:
            yield from check(part, form[0], path)
    elif isinstance(form, Map):
        assert type(value) is dict, where
        for part in value.values():
            yield from check(part, form["*"], path)
    elif isinstance(form, dict):
        assert type(value) is dict, where
        for key in value.keys() & form.keys():
            yield f"{path}.{key}"
            yield from check(value[key], form[key], f"{path}.{key}")
    elif isinstance(form, set):
        assert value in form, where
    elif isinstance(form, range):
        assert type(value) is int, where
        assert value in form, where
    elif isinstance(form, re.Pattern):
        assert form.fullmatch(value), where
    else:
        assert type(value) is form, where


def paths(form: Any, path: str = "") -> Iterator[str]:
    if isinstance(form, Map):
        yield from paths(form["*"], path)
    elif isinstance(form, list):
        yield from paths(form[0], path)
    elif isinstance(form, dict):
        for key, part in form.items():
            yield f"{path}.{key}"
            yield from paths(part, f"{path}.{key}")


MESH = """
workloads:
- uid: c1//Pod/shop/web-1
  name: web-1
  namespace: shop
  serviceAccount: web
  workloadIps: [10.0.0.1, "fd00::1"]
  network: n1
  node: node-a
  protocol: HBONE
  workloadName: web
  workloadType: deployment
  canonicalName: web
  canonicalRevision: v1
  clusterId: c1
  trustDomain: td.example
  status: Unhealthy
  hostname: web.example
  capacity: 3
  locality: {region: r1, zone: z1, subzone: s1}
  authorizationPolicies: [shop/all]
  waypoint: {destination: n1/10.0.0.9, hboneMtlsPort: 15008}
  networkGateway: {destination: shop/gateway.example, hboneMtlsPort: 15008}
  applicationTunnel: {protocol: PROXY, port: 15088}
  services: {shop/web.shop.svc: {80: 8080}}
policies:
- name: all
  namespace: shop
  scope: WorkloadSelector
  action: Allow
  dryRun: false
  rules:
  - - - namespaces: [!Exact a, !Prefix b, !Suffix c, !Presence []]
        notNamespaces: [!Exact a, !Prefix b, !Suffix c, !Presence []]
        principals: [!Exact a, !Prefix b, !Suffix c, !Presence []]
        notPrincipals: [!Exact a, !Prefix b, !Suffix c, !Presence []]
        sourceIps: [10.0.0.0/8]
        notSourceIps: [10.1.0.0/16]
        destinationIps: ["fd00::/64"]
        notDestinationIps: [10.2.0.0/16]
        destinationPorts: [80]
        notDestinationPorts: [81]
        serviceAccounts: [{namespace: shop, serviceAccount: web}]
        notServiceAccounts: [{namespace: shop, serviceAccount: cart}]
services:
- name: web
  namespace: shop
  hostname: web.shop.svc
  vips: [n1/10.96.0.1]
  cidrVips: [{network: n1, cidr: 10.97.0.0/16}]
  ports: {80: 8080}
  subjectAltNames: [spiffe://td.example/ns/shop/sa/web]
  ipFamilies: Dual
  canonical: true
  visibility: Namespace
  waypoint: {destination: shop/waypoint.example, hboneMtlsPort: 15008}
  loadBalancer: {routingPreferences: [Region], mode: Failover, healthPolicy: AllowAll}
"""


async def test_every_key_that_istioctl_reads_is_there_with_its_type() -> None:
    store = Store()
    local = load(MESH)
    local.apply(store)
    entry = {"src": "10.0.0.1:1", "originalDst": "10.0.0.2:80", "actualDst": "10.0.0.2:15008", "protocol": "HBONE"}
    connections = {way: Rows([entry], dict) for way in ("inbound", "outbound")}
    async with running() as ztunnel:
        await ztunnel.sync()
        await ztunnel.daemon.mesh.svids.fetch()
        whole = json.loads((await ztunnel.http("admin", "/config_dump"))[1])
    state = workload_state(local.workloads[0], connections, ready=True)
    part = json.loads(await collect(mesh_dump(store) | {"workloadState": state}))
    assert set(check(whole | part, READ_BY_ISTIOCTL)) == set(paths(READ_BY_ISTIOCTL))
    assert whole.keys() >= ZTUNNELS
    assert whole["config"].keys() >= CONFIG
    assert whole["workloadState"]["c1//Pod/shop/web-1"]["state"] == "Up"
    (certificate,) = whole["certificates"]
    for entry in certificate["certChain"] + certificate["rootCerts"]:
        found = x509.load_pem_x509_certificate(base64.b64decode(entry["pem"]))
        assert entry["serialNumber"] == str(found.serial_number)


async def test_the_local_file_is_shown_as_it_is_in_force() -> None:
    async with running(settings(LOCAL_XDS=MESH)) as ztunnel:
        found = json.loads((await ztunnel.http("admin", "/config_dump"))[1])
    static = found["staticConfig"]
    assert [entry["name"] for entry in static["workloads"]] == ["web-1"]
    assert [entry["name"] for entry in static["policies"]] == ["all"]
    assert [entry["hostname"] for entry in static["services"]] == ["web.shop.svc"]
    assert static["workloads"] == found["workloads"]


async def test_endpoints_that_wait_for_their_service_are_shown_as_staged() -> None:
    store = Store()
    message = workload_pb2.Workload(uid="u", namespace="shop", services={"shop/later.example": workload_pb2.PortList()})
    store.apply_addresses([Workload.from_wire(message)])
    found = json.loads(await collect(mesh_dump(store)))
    assert found["stagedServices"] == {
        "shop/later.example": {"u": {"workloadUid": "u", "port": {}, "status": "Healthy"}}
    }


class Turns(trio.abc.Instrument):
    """Counts what is made between two turns of the loop."""

    def __init__(self) -> None:
        self.made = self.most = self.turns = 0

    def before_task_step(self, _: trio.lowlevel.Task) -> None:
        self.most = max(self.most, self.made)
        self.made = 0
        self.turns += 1


async def test_the_dump_of_a_large_mesh_leaves_turns_to_the_data_path(monkeypatch: pytest.MonkeyPatch) -> None:
    count = size(100_000, 3000)
    turns = Turns()

    def counted(make: Any) -> Any:
        def entry(*arguments: Any) -> Any:
            turns.made += 1
            return make(*arguments)

        return entry

    for name in ("_workload", "_service", "_endpoint"):
        monkeypatch.setattr(dump, name, counted(getattr(dump, name)))
    store = Store()
    service = {"shop/web.shop.svc": workload_pb2.PortList()}
    local = load(MESH)
    local.apply(store)
    store.apply_addresses(
        Workload.from_wire(
            workload_pb2.Workload(uid=f"u{number}", name=f"w{number}", namespace="shop", services=service)
        )
        for number in range(count)
    )
    sent = 0

    async def send(part: bytes) -> None:
        nonlocal sent
        sent += len(part)
        await trio.lowlevel.checkpoint()

    trio.lowlevel.add_instrument(turns)
    try:
        await write(mesh_dump(store), send)
    finally:
        trio.lowlevel.remove_instrument(turns)
    assert 0 < turns.most <= ENTRIES
    assert turns.turns >= 2 * count / ENTRIES  # workloads, and endpoints of one service
    assert sent > 200 * count
