"""Documents of a mesh, and what another implementation of the same API sends for them.

`golden/CASE/input.yaml` are the documents, `expected.json` the state that istiod ended in, `status.json` the conditions
that it wrote. Conversion is compared on every document, also on those that the gate before it refuses: `REFUSED` lists
them, with the reason. Where ours differs on purpose, `DIFFERENT` says how and why.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf import json_format
from tests.support.policies import PEER_CASES, POLICY_CASES, expand

from miniistiod import conditions, policies, services, vips
from miniistiod.registry import Inputs, Registry
from miniistiod.resources import AuthorizationPolicy, PeerAuthentication, load
from ztunnel.wire import authorization_pb2, workload_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

    from miniistiod.catalog import Catalog
    from miniistiod.resources import ResourceSet

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.name for path in GOLDEN.iterdir() if (path / "input.yaml").exists())

REFUSED: dict[str, dict[str, str]] = {
    "authz-allow": {
        "AuthorizationPolicy shop/namespace-wide": "*x* has two wildcards; Istio takes the second for a character",
        "AuthorizationPolicy shop/empty-selector": "it selects nothing, so it would be in force nowhere",
        "AuthorizationPolicy shop/bad-values": "ports and networks that are none would widen the rule they stand in",
    },
    "authz-dryrun": {
        "AuthorizationPolicy shop/dryrun": "older ztunnels would enforce it, and Istio drops it by default",
    },
    "authz-l7": {
        "AuthorizationPolicy shop/allow-mixed": "rules about requests would be left out",
        "AuthorizationPolicy shop/allow-only-l7": "rules about requests would be left out",
        "AuthorizationPolicy shop/deny-mixed": "fields about requests would be left out: it would deny more",
        "AuthorizationPolicy shop/deny-only-l7": "it would deny nothing",
        "AuthorizationPolicy shop/audit": "a ztunnel does not audit",
        "AuthorizationPolicy shop/waypoint-only": "nobody programs that waypoint",
        "AuthorizationPolicy shop/unknown-key": "its rule would be left out",
    },
    "pa-strict": {
        "PeerAuthentication istio-system/ignored-root-selector": "a selector in the root namespace has no effect",
    },
    "se-vip-endpoints": {
        "ServiceEntry shop/bad-address": "an address that is none drops the whole entry",
        "ServiceEntry shop/same-address-twice": "one of its endpoints would be lost",
    },
}


def own_networks(addresses: dict[str, Any], _: dict[str, Any]) -> None:
    """An endpoint without network is in the local one; in istiod an endpoint before it lends its own."""
    for address in ("10.1.2.3", "store-3.example.com"):
        item = addresses[f"Kubernetes/networking.istio.io/ServiceEntry/shop/store/{address}"]["workload"]
        assert item.pop("network") == "net2"


def target_ports(addresses: dict[str, Any], _: dict[str, Any]) -> None:
    """A Service's targetPort is its port where none is given; the recording had no API server to fill that in."""
    host = "shop/headless.shop.svc.cluster.local"
    addresses[host]["service"]["ports"][0]["targetPort"] = 7000
    for name in ("a", "b", "noaddress"):
        workload = addresses[f"Kubernetes/networking.istio.io/WorkloadEntry/shop/{name}"]["workload"]
        workload["services"][host]["ports"][0]["targetPort"] = 7000


DIFFERENT: dict[str, Callable[[dict[str, Any], dict[str, Any]], None]] = {
    "se-vip-endpoints": own_networks,
    "se-workload-selector": target_ports,
}


def files_of(case: str) -> dict[str, str]:
    return {path.name: path.read_text() for path in (GOLDEN / case).glob("*.yaml")}


def registry_of(resources: ResourceSet) -> Registry:
    wanted, given = services.vip_needs(resources.resources)
    return Registry.of(resources, Inputs(vips=vips.allot({}, wanted, given)))


def plain(catalog: Catalog) -> tuple[dict[str, Any], dict[str, Any]]:
    """Addresses and policies as protojson, in the names that the golden files use."""
    addresses: dict[str, Any] = {}
    for name, item in catalog.addresses.items():
        addresses[name] = json_format.MessageToDict(workload_pb2.Address.FromString(item.body))
    converted: dict[str, Any] = {}
    for name, item in catalog.policies.items():
        policy = json_format.MessageToDict(authorization_pb2.Authorization.FromString(item.body))
        converted[name] = as_golden(policy)
    return addresses, converted


def as_golden(policy: dict[str, Any]) -> dict[str, Any]:
    """Istio calls rules groups, and clauses rules; the numbers on the wire are the same."""
    if "rules" in policy:
        policy["groups"] = [{"rules": rule["clauses"]} if "clauses" in rule else {} for rule in policy.pop("rules")]
    return policy


def expected(case: str) -> tuple[dict[str, Any], dict[str, Any]]:
    data = json.loads((GOLDEN / case / "expected.json").read_text())
    addresses, converted = (
        {item["name"]: item["resource"] for item in data[key]} for key in ("addresses", "authorizations")
    )
    return addresses, converted


def rename_addresses(ours: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Automatic addresses count up to renaming: give ours the recorded ones, and no two of them the same."""
    names: dict[str, str] = {}
    for name, item in ours.items():
        for mine, theirs in zip(
            item.get("service", {}).get("addresses", ()),
            wanted[name].get("service", {}).get("addresses", ()),
            strict=True,
        ):
            assert names.setdefault(mine["address"], theirs["address"]) == theirs["address"]
            mine["address"] = theirs["address"]
    assert len(set(names.values())) == len(names)


@pytest.mark.parametrize("case", [case for case in CASES if case != "pa-ports-mesh-strict"])
def test_documents_become_what_istiod_sends(case: str) -> None:
    addresses, converted = plain(registry_of(load(files_of(case))).catalog)
    wanted_addresses, wanted = expected(case)
    if case in DIFFERENT:
        DIFFERENT[case](wanted_addresses, wanted)
    assert addresses.keys() == wanted_addresses.keys()
    rename_addresses(addresses, wanted_addresses)
    assert addresses == wanted_addresses
    assert converted == wanted


@pytest.mark.parametrize("case", CASES)
def test_the_gate_refuses_what_the_table_says(case: str) -> None:
    """Each listed document alone is refused, with a line and a remedy; without them the rest is taken."""
    refused = REFUSED.get(case, {})
    (text,) = (text for name, text in files_of(case).items() if name == "input.yaml")
    parts = re.split(r"^---\n", text, flags=re.MULTILINE)
    good: list[str] = []
    found = set()
    for part in parts:
        errors = load({"input.yaml": part}).errors
        if not errors:
            good.append(part)
            continue
        kind = re.search(r"^kind: (\w+)", part, re.MULTILINE)
        name, namespace = (re.search(rf"\b{field}: ([\w-]+)", part) for field in ("name", "namespace"))
        assert kind is not None
        assert name is not None
        assert namespace is not None
        found.add(f"{kind[1]} {namespace[1]}/{name[1]}")
        assert all(error.line and error.fix for error in errors)
    assert found == refused.keys()
    assert not load({"input.yaml": "---\n".join(good)}).errors


@pytest.mark.parametrize("case", [case for case in CASES if (GOLDEN / case / "status.json").exists()])
def test_conditions_are_those_that_istiod_writes(case: str) -> None:
    recorded = json.loads((GOLDEN / case / "status.json").read_text())
    wanted = {
        name: [(item["type"], item["status"] == "True", item["reason"]) for item in status["conditions"]]
        for name, status in recorded.items()
        if "conditions" in status
    }
    found = conditions.every_condition(registry_of(load(files_of(case))))
    assert {name: [(c["type"], c["ok"], c["reason"]) for c in items] for name, items in found.items()} == wanted


def test_peer_authentication_with_ports() -> None:
    addresses, converted = plain(registry_of(load(files_of("pa-ports-mesh-strict"))).catalog)
    wanted_addresses, wanted = expected("pa-ports-mesh-strict")
    for policy in wanted.values():  # istiod may say "no identity" twice in one rule
        for rule in policy["groups"]:
            rule["rules"] = [item for index, item in enumerate(rule["rules"]) if item not in rule["rules"][:index]]
    assert addresses.keys() == wanted_addresses.keys()
    # Namespaces are named n-<namespace mode>-w-<workload mode>-<port modes>; x is none.
    # istiod refers workloads to the policies of a strict port in a permissive workload, but does not send them ...
    differ = {name.partition("/")[0] for name in wanted | converted if wanted.get(name) != converted.get(name)}
    never_sent = {"n-u-w-p-s", "n-u-w-p-sp", "n-x-w-p-s", "n-x-w-p-sp"}
    # ... nor those of an exception in a workload that inherits from a namespace without a mode ...
    never_sent |= {"n-u-w-u-p", "n-u-w-u-sp", "n-u-w-x-p", "n-u-w-x-sp"}
    # ... and it forgets exceptions by DISABLE where STRICT is inherited.
    forgotten = {"n-s-w-u-d", "n-s-w-x-d", "n-x-w-u-d", "n-x-w-x-d", "n-u-w-u-d", "n-u-w-x-d"}
    assert differ <= never_sent | forgotten
    assert all(f"{name}/converted_peer_authentication_w" in converted for name in never_sent | forgotten)
    moved = {name.split("/")[3] for name in addresses if addresses[name] != wanted_addresses[name]}
    assert moved == forgotten


def test_each_change_sends_what_changed_and_nothing_else() -> None:
    """The steps one after the other, each as a change of one document.

    With a changed service istiod pushes all its workloads again, changed or not; in none of these steps does a
    service change, so what is pushed is the same.
    """
    resources = load(files_of("changes"))
    registry = registry_of(resources)
    steps = {step["step"]: step for step in json.loads((GOLDEN / "changes" / "steps.json").read_text())}
    for path in sorted((GOLDEN / "changes" / "steps").iterdir()):
        text = path.read_text()
        number = registry.catalog.number
        if "lab/delete" in text:
            plan = registry.change({}, [("AuthorizationPolicy", "shop", "p")])
        else:
            (document,) = load({path.name: text}).resources
            plan = registry.change({document.meta.key: document})
        registry.catalog.apply(plan)
        addresses, converted = plain(registry.catalog)
        for key, made, content in (
            ("addresses", plan.addresses, addresses),
            ("authorizations", plan.policies, converted),
        ):
            wanted = steps[path.name].get(key, {"changed": [], "removed": None})
            assert sorted(name for name, item in made.items() if item is None) == sorted(wanted["removed"] or [])
            assert {name: content[name] for name, item in made.items() if item is not None} == {
                item["name"]: item["resource"] for item in wanted["changed"]
            }, path.name
        assert registry.catalog.number == number + bool(plan)


@pytest.mark.parametrize("name", POLICY_CASES)
def test_policies_are_converted_as_the_reference_cases_are(name: str) -> None:
    text, wanted = POLICY_CASES[name]
    (policy,) = load({"a.yaml": text}).of(AuthorizationPolicy)
    message = policies.authorization(policy, "istio-system")
    assert message is not None
    assert message.scope == authorization_pb2.NAMESPACE
    assert [expand(rule) for rule in message.rules] == wanted


@pytest.mark.parametrize("name", PEER_CASES)
def test_peer_authentication_is_converted_as_the_reference_cases_are(name: str) -> None:
    text, wanted = PEER_CASES[name]
    items = load({"a.yaml": text}).of(PeerAuthentication)
    peers = policies.PeerAuthentications("istio-system")
    for namespace in {item.meta.namespace for item in items}:
        peers.replace(namespace, [item for item in items if item.meta.namespace == namespace])
    found = [rule for message in peers.converted("foo") for rule in message.rules]
    assert [expand(rule) for rule in found] == wanted
    assert all(message.action == authorization_pb2.DENY for message in peers.converted("foo"))
    static = peers.static()
    assert static is not None
    assert [expand(rule) for rule in static.rules] == ["!P +"]
