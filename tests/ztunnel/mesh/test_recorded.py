"""What a recorded istiod sent is taken in whole, and survives the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from ztunnel.mesh import Store, decode_address, decode_policy
from ztunnel.wire import authorization_pb2, workload_pb2

RECORDED = sorted((Path(__file__).parents[2] / "miniistiod" / "golden").glob("*/expected.json"))


def with_our_names(policy: dict[str, Any]) -> dict[str, Any]:
    """Istio calls rules groups, and clauses rules; the numbers on the wire are the same."""
    if "groups" in policy:
        groups = policy.pop("groups")
        policy["rules"] = [{"clauses": group["rules"]} if "rules" in group else {} for group in groups]
    return policy


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.parent.name)
def test_recorded_resources_are_read_kept_and_restored(path: Path) -> None:
    data = json.loads(path.read_text())
    store = Store()
    for item in data["addresses"]:
        message = json_format.ParseDict(item["resource"], workload_pb2.Address(), ignore_unknown_fields=True)
        store.apply_addresses([decode_address(item["name"], message.SerializeToString())])
    for item in data["authorizations"]:
        policy = with_our_names(item["resource"])
        rules = json_format.ParseDict(policy, authorization_pb2.Authorization(), ignore_unknown_fields=True)
        store.apply_policies([decode_policy(item["name"], rules.SerializeToString())])
    assert len(store.workloads) + len(store.services) == len(data["addresses"])
    assert len(store.policies) == len(data["authorizations"])
    other = Store()
    other.restore(store.snapshot())
    assert (other.workloads, other.services) == (store.workloads, store.services)
    assert other.policies == store.policies
