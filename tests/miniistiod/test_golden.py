"""Documents of a mesh, and what another implementation of the same API sends for them.

`golden/CASE/input.yaml` are the documents, `expected.json` the state that istiod ended in. Where ours is meant to
differ, the test says how and why.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from miniistiod import vips
from miniistiod.registry import Inputs, Registry, build, vip_needs
from miniistiod.resources import ResourceSet, load
from miniistiod.snapshot import EMPTY, Snapshot, difference
from ztunnel.wire import authorization_pb2, workload_pb2

GOLDEN = Path(__file__).parent / "golden"


def documents(text: str, *, without: tuple[str, ...] = ()) -> str:
    """The documents of a text, without those of the names given."""
    kept = [
        part
        for part in re.split(r"^---\n", text, flags=re.MULTILINE)
        if not any(re.search(rf"\bname: {re.escape(name)}\b", part) for name in without)
    ]
    return "---\n".join(kept)


def mesh(resources: ResourceSet, previous: Snapshot = EMPTY, **inputs: Any) -> Snapshot:
    assert not resources.errors, [str(error) for error in resources.errors]
    wanted, given = vip_needs(resources)
    return build(Registry(resources, Inputs(vips=vips.allot({}, wanted, given), **inputs)), previous)


def plain(snapshot: Snapshot) -> tuple[dict[str, Any], dict[str, Any]]:
    """Addresses and policies as protojson, in the names that the golden files use."""
    addresses: dict[str, Any] = {}
    for name, item in snapshot.addresses.items():
        addresses[name] = json_format.MessageToDict(workload_pb2.Address.FromString(item.body))
    policies: dict[str, Any] = {}
    for name, item in snapshot.policies.items():
        policy = json_format.MessageToDict(authorization_pb2.Authorization.FromString(item.body))
        policies[name] = as_golden(policy)
    return addresses, policies


def as_golden(policy: dict[str, Any]) -> dict[str, Any]:
    """Istio calls rules groups, and clauses rules; the numbers on the wire are the same."""
    if "rules" in policy:
        policy["groups"] = [{"rules": rule["clauses"]} if "clauses" in rule else {} for rule in policy.pop("rules")]
    return policy


def expected(case: str) -> tuple[dict[str, Any], dict[str, Any]]:
    data = json.loads((GOLDEN / case / "expected.json").read_text())
    addresses, policies = (
        {item["name"]: item["resource"] for item in data[key]} for key in ("addresses", "authorizations")
    )
    return addresses, policies


def text_of(case: str) -> str:
    return (GOLDEN / case / "input.yaml").read_text()


def test_service_entries_with_endpoints() -> None:
    # Refused by us: an address that is none, and the same address twice in one entry.
    text = documents(text_of("se-vip-endpoints"), without=("bad-address", "same-address-twice"))
    addresses, policies = plain(mesh(load({"input.yaml": text})))
    wanted, _ = expected("se-vip-endpoints")
    wanted = {name: item for name, item in wanted.items() if "twice" not in name}
    # An endpoint without network is in the local one; there, an endpoint before it lent its own.
    for address in ("10.1.2.3", "store-3.example.com"):
        item = wanted[f"Kubernetes/networking.istio.io/ServiceEntry/shop/store/{address}"]["workload"]
        assert item.pop("network") == "net2"
    assert addresses == wanted
    assert policies == {}


def test_selectors_over_workload_entries() -> None:
    addresses, _ = plain(mesh(load({"input.yaml": text_of("se-workload-selector")})))
    wanted, _ = expected("se-workload-selector")
    # A Service's targetPort is its port where none is given; the recording had no API server to fill that in.
    wanted["shop/headless.shop.svc.cluster.local"]["service"]["ports"][0]["targetPort"] = 7000
    for name in ("a", "b", "noaddress"):
        workload = wanted[f"Kubernetes/networking.istio.io/WorkloadEntry/shop/{name}"]["workload"]
        workload["services"]["shop/headless.shop.svc.cluster.local"]["ports"][0]["targetPort"] = 7000
    assert addresses == wanted


def test_tunnel_label_and_annotation() -> None:
    assert plain(mesh(load({"input.yaml": text_of("we-tunnel-label")}))) == expected("we-tunnel-label")


def test_automatic_addresses_up_to_renaming() -> None:
    addresses, _ = plain(mesh(load({"input.yaml": text_of("se-auto-vip")})))
    wanted, _ = expected("se-auto-vip")
    automatic = {"auto/one.mesh", "auto/two-a.mesh", "auto/two-b.mesh", "auto/plain.example.com"}
    chosen = [json.dumps(addresses[name]["service"].pop("addresses")) for name in sorted(automatic)]
    assert len(set(chosen)) == len(automatic)
    for name in automatic:
        del wanted[name]["service"]["addresses"]
    assert addresses == wanted


def test_allow_policies() -> None:
    text = documents(text_of("authz-allow"), without=("empty-selector", "bad-values")).replace(', "*x*"', "")
    addresses, policies = plain(mesh(load({"input.yaml": text})))
    wanted_addresses, wanted = expected("authz-allow")
    # Refused by us: a selector that selects nothing, ports and networks that are none, two wildcards in one value.
    for name in ("shop/empty-selector", "shop/bad-values"):
        del wanted[name]
    del wanted_addresses["Kubernetes/networking.istio.io/WorkloadEntry/shop/web"]["workload"]["authorizationPolicies"]
    principals = wanted["shop/namespace-wide"]["groups"][0]["rules"][1]["matches"][1]["principals"]
    assert principals.pop() == {"suffix": "x*"}
    assert policies == wanted
    assert addresses == wanted_addresses


@pytest.mark.parametrize(
    "name",
    ["allow-mixed", "allow-only-l7", "deny-mixed", "deny-only-l7", "audit", "waypoint-only", "unknown-key"],
)
def test_a_policy_about_requests_is_refused_where_istiod_narrows_or_drops_it(name: str) -> None:
    parts = re.split(r"^---\n", text_of("authz-l7"), flags=re.MULTILINE)
    (text,) = [part for part in parts if f"name: {name}," in part]
    resources = load({"input.yaml": text})
    assert resources.errors
    assert all(error.line and error.fix for error in resources.errors)


def test_peer_authentication_without_ports() -> None:
    text = documents(text_of("pa-strict"), without=("ignored-root-selector",))  # refused by us: it has no effect
    assert plain(mesh(load({"input.yaml": text}))) == expected("pa-strict")


def test_peer_authentication_with_ports() -> None:
    addresses, policies = plain(mesh(load({"input.yaml": text_of("pa-ports-mesh-strict")})))
    wanted_addresses, wanted = expected("pa-ports-mesh-strict")
    for policy in wanted.values():  # istiod may say "no identity" twice in one rule
        for rule in policy["groups"]:
            rule["rules"] = [item for index, item in enumerate(rule["rules"]) if item not in rule["rules"][:index]]
    assert addresses.keys() == wanted_addresses.keys()
    # Namespaces are named n-<namespace mode>-w-<workload mode>-<port modes>; x is none.
    # istiod refers workloads to the policies of a strict port in a permissive workload, but does not send them ...
    differ = {name.partition("/")[0] for name in wanted | policies if wanted.get(name) != policies.get(name)}
    never_sent = {"n-u-w-p-s", "n-u-w-p-sp", "n-x-w-p-s", "n-x-w-p-sp"}
    # ... nor those of an exception in a workload that inherits from a namespace without a mode ...
    never_sent |= {"n-u-w-u-p", "n-u-w-u-sp", "n-u-w-x-p", "n-u-w-x-sp"}
    # ... and it forgets exceptions by DISABLE where STRICT is inherited.
    forgotten = {"n-s-w-u-d", "n-s-w-x-d", "n-x-w-u-d", "n-x-w-x-d", "n-u-w-u-d", "n-u-w-x-d"}
    assert differ <= never_sent | forgotten
    assert all(f"{name}/converted_peer_authentication_w" in policies for name in never_sent | forgotten)
    moved = {name.split("/")[3] for name in addresses if addresses[name] != wanted_addresses[name]}
    assert moved == forgotten


def test_each_change_sends_what_changed_and_nothing_else() -> None:
    files = {"input.yaml": text_of("changes")}
    snapshot = mesh(load(files))
    steps = {step["step"]: step for step in json.loads((GOLDEN / "changes" / "steps.json").read_text())}
    for path in sorted((GOLDEN / "changes" / "steps").iterdir()):
        text = path.read_text()
        kind, name = (re.search(pattern, text) for pattern in (r"kind: (\w+)", r"name: (\w+)"))
        assert kind is not None
        assert name is not None
        for other, text_before in list(files.items()):
            files[other] = "---\n".join(
                part
                for part in re.split(r"^---\n", text_before, flags=re.MULTILINE)
                if not (kind[0] in part and re.search(rf"{name[0]},", part))
            )
        if "lab/delete" not in text:
            files[path.name] = text
        before, snapshot = snapshot, mesh(load(files), snapshot)
        addresses, policies = plain(snapshot)
        for key, old, new, content in (
            ("addresses", before.addresses, snapshot.addresses, addresses),
            ("authorizations", before.policies, snapshot.policies, policies),
        ):
            wanted = steps[path.name].get(key, {"changed": [], "removed": None})
            found = difference(old, new)
            assert sorted(found.removed) == sorted(wanted["removed"] or []), path.name
            assert {name: content[name] for name in found.changed} == {
                item["name"]: item["resource"] for item in wanted["changed"]
            }, path.name
